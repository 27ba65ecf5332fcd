"""The ledger's tables in SQLAlchemy Core; migrations create them, and a test holds the two equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import (
    BigInteger,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    UniqueConstraint,
)

from kvtally.agent.ledger.columns import KINDS, hour_table, interval_table, quantity_columns, sum_columns

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.collectors.base import Kind

metadata = MetaData()
# SQLite makes only INTEGER PRIMARY KEY an alias of the row's own number
_ID = BigInteger().with_variant(Integer, "sqlite")
# quantities of later revisions: SQLite adds a column behind those that are there
_ADDED: Mapping[Kind, tuple[str, ...]] = {
    "gpu": ("busy_cycles",),
    "cache": (
        "dram_hit_tokens",
        "disk_hit_tokens",
        "storage_read_bytes",
        "storage_read_ns",
        "storage_write_bytes",
        "storage_write_ns",
    ),
    "filesystem": ("app_read_bytes", "app_write_bytes"),
    "process": ("worker_cpu_ns",),
}

target = Table(
    "target",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("name", Text, nullable=False, comment="a replica is named <target>/<engine>"),
    Column("attributes", Text, nullable=False, comment="JSON, keys sorted: model, version, labels, GPUs"),
    Column("detail_names", Text, nullable=False, comment="JSON: what the details of its intervals are"),
    UniqueConstraint("kind", "name", "attributes", "detail_names"),
    comment="one row per target as it was; a change of version, model or GPUs opens a new row",
)


def _interval_table(kind: Kind) -> Table:
    added = _ADDED.get(kind, ())
    return Table(
        interval_table(kind),
        metadata,
        Column("start_ns", BigInteger, primary_key=True),
        Column("target_id", _ID, ForeignKey("target.id"), primary_key=True),
        Column("length_ns", BigInteger, nullable=False),
        Column("missed", Integer, nullable=False, comment="scrapes due inside it that gave nothing"),
        Column("flags", Integer, nullable=False, comment="bits of kvtally.agent.interval"),
        Column("began_ns", BigInteger, comment="where the counts began anew"),
        *(Column(name, BigInteger) for name in quantity_columns(kind) if name not in added),
        Column("details", LargeBinary, comment="packed differences of the target's detail_names"),
        *(Column(name, BigInteger) for name in added),
        sqlite_with_rowid=False,
    )


def _hour_table(kind: Kind) -> Table:
    return Table(
        hour_table(kind),
        metadata,
        Column("hour_ns", BigInteger, primary_key=True),
        Column("target_id", _ID, ForeignKey("target.id"), primary_key=True),
        Column("intervals", Integer, nullable=False),
        Column("length_ns", BigInteger, nullable=False, comment="of the intervals that start in the hour"),
        Column("missed", Integer, nullable=False),
        Column("flags", Integer, nullable=False, comment="all flags of its intervals"),
        *(Column(name, BigInteger) for name in sum_columns(kind)),
        # a target's last hour before an instant (kvtally.agent.ledger.reach)
        Index(f"ix_{hour_table(kind)}_target_id_hour_ns", "target_id", "hour_ns"),
        sqlite_with_rowid=False,
    )


intervals = {kind: _interval_table(kind) for kind in KINDS}
hours = {kind: _hour_table(kind) for kind in KINDS}

counter_state = Table(
    "counter_state",
    metadata,
    Column("kind", Text, primary_key=True),
    Column("name", Text, primary_key=True),
    Column("target_id", _ID, ForeignKey("target.id"), nullable=False),
    Column("taken_at_ns", BigInteger, nullable=False),
    Column("state", Text, nullable=False, comment="JSON: the last raw counters, in the source's own unit"),
    comment="written in the same transaction as the interval that they closed",
)

rate = Table(
    "rate",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("resource", Text, nullable=False),
    Column("sku", Text, nullable=False),
    Column("site", Text, nullable=False),
    Column("term", Text, nullable=False),
    Column("unit", Text, nullable=False),
    Column("price_nano", BigInteger, nullable=False, comment="1e-9 currency units per unit"),
    Column("currency", Text, nullable=False),
    Column("valid_from_ns", BigInteger, nullable=False),
    Column("valid_until_ns", BigInteger),
    Column("basis", Text, nullable=False),
    Column("source", Text, nullable=False),
    Column("note", Text, nullable=False),
    Column("committed", Integer, comment="reserved units that are paid for whether or not used"),
    Column("pue", Text, comment="energy: decimal factor on kWh"),
    comment="effective-dated prices: superseded by later rows, never edited",
)

settlement = Table(
    "settlement",
    metadata,
    Column("period_start_ns", BigInteger, primary_key=True),
    Column("revision", Integer, primary_key=True),
    Column("period_end_ns", BigInteger, nullable=False),
    Column("reason", Text, nullable=False, comment="why it was settled, or why again"),
    Column("intervals", Integer, nullable=False, comment="engine intervals that had begun in it by then"),
    Column("facts", Text, nullable=False, comment="JSON: seconds by state and split per replica, findings"),
    comment="an hour settled; a later revision supersedes the earlier and leaves it readable",
)

charge = Table(
    "charge",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("period_start_ns", BigInteger, nullable=False, index=True),
    Column("revision", Integer, nullable=False),
    Column("target_id", _ID, ForeignKey("target.id"), comment="the replica; NULL: no replica holds the resource"),
    Column("account", Text, nullable=False, comment="JSON labels: cluster, namespace, tenant"),
    Column("resource", Text, nullable=False),
    Column("sku", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("quantity", BigInteger, nullable=False, comment="nanoseconds times units held, millijoules, or bytes"),
    Column("unit", Text, nullable=False),
    Column("rate_id", _ID, ForeignKey("rate.id")),
    Column("amount_nano", BigInteger, nullable=False, comment="1e-9 currency units"),
    UniqueConstraint("period_start_ns", "revision", "target_id", "resource", "sku", "state", "rate_id"),
    comment="what a resource cost in one hour, by replica and state; never changed",
)

calibration = Table(
    "calibration",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("fingerprint", Text, nullable=False, comment="the kind of replica that it holds for, in one line"),
    Column("made_at_ns", BigInteger, nullable=False),
    Column("start_ns", BigInteger, nullable=False, comment="of its evidence"),
    Column("end_ns", BigInteger, nullable=False),
    Column("prior_id", _ID, ForeignKey("calibration.id"), comment="its prior; NULL: the packaged one"),
    Column("rung", Text, nullable=False),
    Column("body", Text, nullable=False, comment="JSON: the law with its covariance and its evidence"),
    Column("reason", Text, nullable=False, comment="why it was made"),
    UniqueConstraint("fingerprint", "start_ns", "end_ns", "body"),
    comment="step laws as they were learned; never changed",
)

saving = Table(
    "saving",
    metadata,
    Column("period_start_ns", BigInteger, primary_key=True),
    Column("target_id", _ID, ForeignKey("target.id"), primary_key=True, comment="the replica"),
    Column("revision", Integer, primary_key=True, comment="of the settlement that it was written with"),
    Column("calibration_id", _ID, ForeignKey("calibration.id"), comment="NULL: no law was at hand"),
    Column("body", Text, nullable=False, comment="JSON: what reuse was worth to the replica in the hour"),
    comment="what reuse was worth in one hour, by replica; never changed",
)

finding = Table(
    "finding",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("target", Text, nullable=False),
    Column("start_ns", BigInteger, nullable=False),
    Column("end_ns", BigInteger, nullable=False),
    Column("message", Text, nullable=False),
    UniqueConstraint("kind", "target", "start_ns"),
    # the end comes first: windows mostly reach to now, and few findings end after one has begun
    Index("ix_finding_end_ns_start_ns", "end_ns", "start_ns"),
)

prune_log = Table(
    "prune_log",
    metadata,
    Column("id", _ID, primary_key=True),
    Column("before_ns", BigInteger, nullable=False, comment="intervals that ended by then left the ledger"),
    Column("removed", Text, nullable=False, comment="JSON: rows removed, by table"),
    comment="the only way in which intervals leave",
)
