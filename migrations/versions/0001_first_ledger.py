"""The first ledger: targets, intervals, hourly sums, raw counters, rates, charges and findings.

Revision ID: 0001
Create Date: 2026-11-23
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_IMMUTABLE = ("rate", "charge", "settlement", "finding", "prune_log")
_INTERVALS = ("engine_interval", "cache_interval", "gpu_interval", "filesystem_interval", "process_interval")


def upgrade() -> None:
    """Create every table and the triggers that keep written rows as they are."""
    op.create_table(
        "finding",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("severity", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("end_ns", sa.BigInteger(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "target", "start_ns"),
    )
    op.create_table(
        "prune_log",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("before_ns", sa.BigInteger(), nullable=False, comment="intervals that ended by then left the ledger"),
        sa.Column("removed", sa.Text(), nullable=False, comment="JSON: rows removed, by table"),
        sa.PrimaryKeyConstraint("id"),
        comment="the only way in which intervals leave",
    )
    op.create_table(
        "rate",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("site", sa.Text(), nullable=False),
        sa.Column("term", sa.Text(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("price_nano", sa.BigInteger(), nullable=False, comment="1e-9 currency units per unit"),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.Column("valid_from_ns", sa.BigInteger(), nullable=False),
        sa.Column("valid_until_ns", sa.BigInteger(), nullable=True),
        sa.Column("basis", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column(
            "committed", sa.Integer(), nullable=True, comment="reserved units that are paid for whether or not used"
        ),
        sa.Column("pue", sa.Text(), nullable=True, comment="energy: decimal factor on kWh"),
        sa.PrimaryKeyConstraint("id"),
        comment="effective-dated prices: superseded by later rows, never edited",
    )
    op.create_table(
        "settlement",
        sa.Column("period_start_ns", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("period_end_ns", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False, comment="why it was settled, or why again"),
        sa.Column("intervals", sa.Integer(), nullable=False, comment="engine intervals that had begun in it by then"),
        sa.Column("facts", sa.Text(), nullable=False, comment="JSON: seconds by state and split per replica, findings"),
        sa.PrimaryKeyConstraint("period_start_ns", "revision"),
        comment="an hour settled; a later revision supersedes the earlier and leaves it readable",
    )
    op.create_table(
        "target",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False, comment="a replica is named <target>/<engine>"),
        sa.Column("attributes", sa.Text(), nullable=False, comment="JSON, keys sorted: model, version, labels, GPUs"),
        sa.Column("detail_names", sa.Text(), nullable=False, comment="JSON: what the details of its intervals are"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kind", "name", "attributes", "detail_names"),
        comment="one row per target as it was; a change of version, model or GPUs opens a new row",
    )
    op.create_table(
        "cache_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        sa.Column("lookup_tokens", sa.BigInteger(), nullable=True),
        sa.Column("lookup_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("requested_tokens", sa.BigInteger(), nullable=True),
        sa.Column("loaded_tokens", sa.BigInteger(), nullable=True),
        sa.Column("stored_tokens", sa.BigInteger(), nullable=True),
        sa.Column("loads", sa.BigInteger(), nullable=True),
        sa.Column("stores", sa.BigInteger(), nullable=True),
        sa.Column("load_ns", sa.BigInteger(), nullable=True),
        sa.Column("store_ns", sa.BigInteger(), nullable=True),
        sa.Column("load_bytes", sa.BigInteger(), nullable=True),
        sa.Column("store_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "cache_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        sa.Column("lookup_tokens", sa.BigInteger(), nullable=True),
        sa.Column("lookup_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("requested_tokens", sa.BigInteger(), nullable=True),
        sa.Column("loaded_tokens", sa.BigInteger(), nullable=True),
        sa.Column("stored_tokens", sa.BigInteger(), nullable=True),
        sa.Column("loads", sa.BigInteger(), nullable=True),
        sa.Column("stores", sa.BigInteger(), nullable=True),
        sa.Column("load_ns", sa.BigInteger(), nullable=True),
        sa.Column("store_ns", sa.BigInteger(), nullable=True),
        sa.Column("load_bytes", sa.BigInteger(), nullable=True),
        sa.Column("store_bytes", sa.BigInteger(), nullable=True),
        sa.Column("used_bytes", sa.BigInteger(), nullable=True),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "charge",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("period_start_ns", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column(
            "target_id",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            nullable=True,
            comment="the replica; NULL: no replica holds the resource",
        ),
        sa.Column("account", sa.Text(), nullable=False, comment="JSON labels: cluster, namespace, tenant"),
        sa.Column("resource", sa.Text(), nullable=False),
        sa.Column("sku", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column(
            "quantity", sa.BigInteger(), nullable=False, comment="nanoseconds times units held, millijoules, or bytes"
        ),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("rate_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("amount_nano", sa.BigInteger(), nullable=False, comment="1e-9 currency units"),
        sa.ForeignKeyConstraint(
            ["rate_id"],
            ["rate.id"],
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("period_start_ns", "revision", "target_id", "resource", "sku", "state", "rate_id"),
        comment="what a resource cost in one hour, by replica and state; never changed",
    )
    op.create_index(op.f("ix_charge_period_start_ns"), "charge", ["period_start_ns"], unique=False)
    op.create_table(
        "counter_state",
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("taken_at_ns", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False, comment="JSON: the last raw counters, in the source's own unit"),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("kind", "name"),
        comment="written in the same transaction as the interval that they closed",
    )
    op.create_table(
        "engine_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("computed_tokens", sa.BigInteger(), nullable=True),
        sa.Column("hbm_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_tokens", sa.BigInteger(), nullable=True),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=True),
        sa.Column("prefix_query_tokens", sa.BigInteger(), nullable=True),
        sa.Column("prefix_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_query_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("first_tokens", sa.BigInteger(), nullable=True),
        sa.Column("finished_requests", sa.BigInteger(), nullable=True),
        sa.Column("preemptions", sa.BigInteger(), nullable=True),
        sa.Column("steps", sa.BigInteger(), nullable=True),
        sa.Column("step_tokens", sa.BigInteger(), nullable=True),
        sa.Column("first_token_ns", sa.BigInteger(), nullable=True),
        sa.Column("queue_ns", sa.BigInteger(), nullable=True),
        sa.Column("prefill_ns", sa.BigInteger(), nullable=True),
        sa.Column("decode_ns", sa.BigInteger(), nullable=True),
        sa.Column("inter_token_ns", sa.BigInteger(), nullable=True),
        sa.Column("request_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "engine_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=True),
        sa.Column("computed_tokens", sa.BigInteger(), nullable=True),
        sa.Column("hbm_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_tokens", sa.BigInteger(), nullable=True),
        sa.Column("generated_tokens", sa.BigInteger(), nullable=True),
        sa.Column("prefix_query_tokens", sa.BigInteger(), nullable=True),
        sa.Column("prefix_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_query_tokens", sa.BigInteger(), nullable=True),
        sa.Column("external_hit_tokens", sa.BigInteger(), nullable=True),
        sa.Column("first_tokens", sa.BigInteger(), nullable=True),
        sa.Column("finished_requests", sa.BigInteger(), nullable=True),
        sa.Column("preemptions", sa.BigInteger(), nullable=True),
        sa.Column("steps", sa.BigInteger(), nullable=True),
        sa.Column("step_tokens", sa.BigInteger(), nullable=True),
        sa.Column("first_token_ns", sa.BigInteger(), nullable=True),
        sa.Column("queue_ns", sa.BigInteger(), nullable=True),
        sa.Column("prefill_ns", sa.BigInteger(), nullable=True),
        sa.Column("decode_ns", sa.BigInteger(), nullable=True),
        sa.Column("inter_token_ns", sa.BigInteger(), nullable=True),
        sa.Column("request_ns", sa.BigInteger(), nullable=True),
        sa.Column("running_requests", sa.BigInteger(), nullable=True),
        sa.Column("waiting_requests", sa.BigInteger(), nullable=True),
        sa.Column("waiting_for_capacity", sa.BigInteger(), nullable=True),
        sa.Column("kv_usage_ppm", sa.BigInteger(), nullable=True),
        sa.Column("awake", sa.BigInteger(), nullable=True),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "filesystem_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        sa.Column("read_bytes", sa.BigInteger(), nullable=True),
        sa.Column("reads", sa.BigInteger(), nullable=True),
        sa.Column("read_ns", sa.BigInteger(), nullable=True),
        sa.Column("write_bytes", sa.BigInteger(), nullable=True),
        sa.Column("writes", sa.BigInteger(), nullable=True),
        sa.Column("write_ns", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "filesystem_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        sa.Column("read_bytes", sa.BigInteger(), nullable=True),
        sa.Column("reads", sa.BigInteger(), nullable=True),
        sa.Column("read_ns", sa.BigInteger(), nullable=True),
        sa.Column("write_bytes", sa.BigInteger(), nullable=True),
        sa.Column("writes", sa.BigInteger(), nullable=True),
        sa.Column("write_ns", sa.BigInteger(), nullable=True),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "gpu_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        sa.Column("energy_mj", sa.BigInteger(), nullable=True),
        sa.Column("observed_ns", sa.BigInteger(), nullable=True),
        sa.Column("busy_ns", sa.BigInteger(), nullable=True),
        sa.Column("memory_busy_ns", sa.BigInteger(), nullable=True),
        sa.Column("power_sampled_mj", sa.BigInteger(), nullable=True),
        sa.Column("gpm_ns", sa.BigInteger(), nullable=True),
        sa.Column("graphics_ns", sa.BigInteger(), nullable=True),
        sa.Column("sm_ns", sa.BigInteger(), nullable=True),
        sa.Column("tensor_ns", sa.BigInteger(), nullable=True),
        sa.Column("dram_ns", sa.BigInteger(), nullable=True),
        sa.Column("pcie_received_bytes", sa.BigInteger(), nullable=True),
        sa.Column("pcie_sent_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "gpu_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        sa.Column("energy_mj", sa.BigInteger(), nullable=True),
        sa.Column("observed_ns", sa.BigInteger(), nullable=True),
        sa.Column("busy_ns", sa.BigInteger(), nullable=True),
        sa.Column("memory_busy_ns", sa.BigInteger(), nullable=True),
        sa.Column("power_sampled_mj", sa.BigInteger(), nullable=True),
        sa.Column("gpm_ns", sa.BigInteger(), nullable=True),
        sa.Column("graphics_ns", sa.BigInteger(), nullable=True),
        sa.Column("sm_ns", sa.BigInteger(), nullable=True),
        sa.Column("tensor_ns", sa.BigInteger(), nullable=True),
        sa.Column("dram_ns", sa.BigInteger(), nullable=True),
        sa.Column("pcie_received_bytes", sa.BigInteger(), nullable=True),
        sa.Column("pcie_sent_bytes", sa.BigInteger(), nullable=True),
        sa.Column("memory_used_bytes", sa.BigInteger(), nullable=True),
        sa.Column("power_mw", sa.BigInteger(), nullable=True),
        sa.Column("sm_clock_mhz", sa.BigInteger(), nullable=True),
        sa.Column("clock_reasons", sa.BigInteger(), nullable=True),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "process_hour",
        sa.Column("hour_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("intervals", sa.Integer(), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False, comment="of the intervals that start in the hour"),
        sa.Column("missed", sa.Integer(), nullable=False),
        sa.Column("flags", sa.Integer(), nullable=False, comment="all flags of its intervals"),
        sa.Column("cpu_ns", sa.BigInteger(), nullable=True),
        sa.Column("read_call_bytes", sa.BigInteger(), nullable=True),
        sa.Column("write_call_bytes", sa.BigInteger(), nullable=True),
        sa.Column("read_bytes", sa.BigInteger(), nullable=True),
        sa.Column("write_bytes", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("hour_ns", "target_id"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "process_interval",
        sa.Column("start_ns", sa.BigInteger(), nullable=False),
        sa.Column("target_id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("length_ns", sa.BigInteger(), nullable=False),
        sa.Column("missed", sa.Integer(), nullable=False, comment="scrapes due inside it that gave nothing"),
        sa.Column("flags", sa.Integer(), nullable=False, comment="bits of kvtally.agent.interval"),
        sa.Column("began_ns", sa.BigInteger(), nullable=True, comment="where the counts began anew"),
        sa.Column("cpu_ns", sa.BigInteger(), nullable=True),
        sa.Column("read_call_bytes", sa.BigInteger(), nullable=True),
        sa.Column("write_call_bytes", sa.BigInteger(), nullable=True),
        sa.Column("read_bytes", sa.BigInteger(), nullable=True),
        sa.Column("write_bytes", sa.BigInteger(), nullable=True),
        sa.Column("processes", sa.BigInteger(), nullable=True),
        sa.Column("resident_bytes", sa.BigInteger(), nullable=True),
        sa.Column(
            "details", sa.LargeBinary(), nullable=True, comment="packed differences of the target's detail_names"
        ),
        sa.ForeignKeyConstraint(
            ["target_id"],
            ["target.id"],
        ),
        sa.PrimaryKeyConstraint("start_ns", "target_id"),
        sqlite_with_rowid=False,
    )

    for table in _IMMUTABLE:
        _refuse(table, "UPDATE", "a written row never changes")
        _refuse(table, "DELETE", "a written row never leaves")
    for table in _INTERVALS:
        _refuse(table, "UPDATE", "intervals never change; they leave by prune")


def _refuse(table: str, act: str, why: str) -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute(
            f"CREATE TRIGGER {table}_no_{act.lower()} BEFORE {act} ON {table} "
            f"BEGIN SELECT RAISE(ABORT, '{table}: {why}'); END"
        )


def downgrade() -> None:
    """Refused: a ledger is never thrown away by a program."""
    raise NotImplementedError("a ledger has no way back: restore a copy instead")
