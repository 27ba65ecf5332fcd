"""Indexes for what is asked by time, a target's hour before an instant and findings of a window; workers' CPU time.

Revision ID: 0004
Revises: 0003
Create Date: 2026-11-23
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

_KINDS = ("engine", "cache", "gpu", "filesystem", "process", "gateway")


def upgrade() -> None:
    """Add indexes to hourly sums and findings, and a column to processes; no row that is there is touched."""
    for kind in _KINDS:
        op.create_index(f"ix_{kind}_hour_target_id_hour_ns", f"{kind}_hour", ["target_id", "hour_ns"])
    op.create_index("ix_finding_end_ns_start_ns", "finding", ["end_ns", "start_ns"])
    for table in ("process_interval", "process_hour"):
        op.add_column(table, sa.Column("worker_cpu_ns", sa.BigInteger(), nullable=True))


def downgrade() -> None:
    """Refused: a ledger is never thrown away by a program."""
    raise NotImplementedError("a ledger has no way back: restore a copy instead")
