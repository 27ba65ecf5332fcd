"""What gateways count, which tier a cache found its tokens in, and what programs read through a filesystem.

Revision ID: 0003
Revises: 0002
Create Date: 2026-11-23
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_ADDED = {
    "cache": (
        "dram_hit_tokens",
        "disk_hit_tokens",
        "storage_read_bytes",
        "storage_read_ns",
        "storage_write_bytes",
        "storage_write_ns",
    ),
    "filesystem": ("app_read_bytes", "app_write_bytes"),
}
_GATEWAY = (
    "requests",
    "failed_requests",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "disaggregated_requests",
    "first_token_ns",
    "request_ns",
)


def upgrade() -> None:
    """Add columns of caches and filesystems, and both tables of gateways; no row that is there is touched."""
    for kind, names in _ADDED.items():
        for table in (f"{kind}_interval", f"{kind}_hour"):
            for name in names:
                op.add_column(table, sa.Column(name, sa.BigInteger(), nullable=True))
    op.create_table(
        "gateway_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        _target(),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in _GATEWAY),
        sa.ForeignKeyConstraint(["target_id"], ["target.id"]),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "gateway_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        _target(),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        *(sa.Column(name, sa.BigInteger(), nullable=True) for name in _GATEWAY),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(["target_id"], ["target.id"]),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            "CREATE TRIGGER gateway_interval_no_update BEFORE UPDATE ON gateway_interval "
            "BEGIN SELECT RAISE(ABORT, 'gateway_interval: intervals never change; they leave by prune'); END"
        )


def _target() -> sa.Column[int]:
    return sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False)


def downgrade() -> None:
    """Refused: a ledger is never thrown away by a program."""
    raise NotImplementedError("a ledger has no way back: restore a copy instead")
