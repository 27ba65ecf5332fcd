"""Calibrations of the step law, what each settled hour's reuse was worth under them, and the GPUs' clock under load.

Revision ID: 0002
Revises: 0001
Create Date: 2026-11-23
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_IMMUTABLE = ("calibration", "saving")


def upgrade() -> None:
    """Create both tables with triggers that keep their rows, and a column of GPUs; no row that is there is touched."""
    for table in ("gpu_interval", "gpu_hour"):
        op.add_column(table, sa.Column("busy_cycles", sa.BigInteger(), nullable=True))
    op.create_table(
        "calibration",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column(
            "fingerprint", sa.Text(), nullable=False, comment="the kind of replica that it holds for, in one line"
        ),
        sa.Column("made_at_ns", sa.BigInteger(), nullable=False),
        sa.Column("start_ns", sa.BigInteger(), nullable=False, comment="of its evidence"),
        sa.Column("end_ns", sa.BigInteger(), nullable=False),
        sa.Column(
            "prior_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="its prior; NULL: the packaged one",
        ),
        sa.Column("rung", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=False, comment="JSON: the law with its covariance and its evidence"),
        sa.Column("reason", sa.Text(), nullable=False, comment="why it was made"),
        sa.ForeignKeyConstraint(["prior_id"], ["calibration.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("fingerprint", "start_ns", "end_ns", "body"),
        comment="step laws as they were learned; never changed",
    )
    op.create_table(
        "saving",
        sa.Column("period_start_ns", sa.BigInteger(), nullable=False),
        sa.Column(
            "target_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=False,
            comment="the replica",
        ),
        sa.Column("revision", sa.Integer(), nullable=False, comment="of the settlement that it was written with"),
        sa.Column(
            "calibration_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="NULL: no law was at hand",
        ),
        sa.Column("body", sa.Text(), nullable=False, comment="JSON: what reuse was worth to the replica in the hour"),
        sa.ForeignKeyConstraint(["calibration_id"], ["calibration.id"]),
        sa.ForeignKeyConstraint(["target_id"], ["target.id"]),
        sa.PrimaryKeyConstraint("period_start_ns", "target_id", "revision"),
        comment="what reuse was worth in one hour, by replica; never changed",
    )
    for table in _IMMUTABLE:
        _refuse(table, "UPDATE", "a written row never changes")
        _refuse(table, "DELETE", "a written row never leaves")


def _refuse(table: str, act: str, why: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER {table}_no_{act.lower()} BEFORE {act} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table}: {why}'); END"
        )


def downgrade() -> None:
    """Refused: a ledger is never thrown away by a program."""
    raise NotImplementedError("a ledger has no way back: restore a copy instead")
