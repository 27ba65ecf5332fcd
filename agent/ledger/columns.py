"""Names of the ledger's tables and columns, free of any SQL library: the daemon's writer and the schema share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from kvtally.collectors.base import Kind

HEAD_REVISION = "0004"
# what one engine interval may be apart from its quantities
INTERVAL_HEAD = ("start_ns", "target_id", "length_ns", "missed", "flags", "began_ns")
HOUR_HEAD = ("hour_ns", "target_id", "intervals", "length_ns", "missed", "flags")
HOUR_NS = 3_600_000_000_000
KINDS: tuple[Kind, ...] = ("engine", "cache", "gpu", "filesystem", "process", "gateway")


def interval_table(kind: Kind) -> str:
    """The table of a kind's intervals."""
    return f"{kind}_interval"


def hour_table(kind: Kind) -> str:
    """The table of a kind's hourly sums."""
    return f"{kind}_hour"


def quantity_columns(kind: Kind) -> tuple[str, ...]:
    """The quantities of a kind, in the order of a reading's values."""
    return tuple(quantity.name for quantity in QUANTITIES[kind])


def sum_columns(kind: Kind) -> tuple[str, ...]:
    """The quantities that add up over time: gauges have no hourly sum."""
    return tuple(quantity.name for quantity in QUANTITIES[kind] if quantity.type != "gauge")
