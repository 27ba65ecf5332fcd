"""What lookups in the caches behind the engines found, hour by hour: in DRAM, and on storage."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, select

from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HOUR_NS

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kvtally.agent.ledger.read import LedgerReader


class Found(NamedTuple):
    """Of one cache target in one hour: the length of its intervals, and the tokens; None where it does not tell."""

    length_ns: int
    dram: int | None
    disk: int | None


def found_in_hours(reader: LedgerReader, hours: Collection[int]) -> Mapping[tuple[int, int], Found]:
    """By (hour, cache target), from the hours' sums."""
    c = schema.hours["cache"].c
    query = select(c.hour_ns, c.target_id, c.length_ns, c.dram_hit_tokens, c.disk_hit_tokens)
    rows = reader.connection.execute(query.where(c.hour_ns >= min(hours), c.hour_ns <= max(hours))).all()
    return {(row[0], row[1]): Found(*row[2:]) for row in rows if row[0] in hours}


def found_in_span(reader: LedgerReader, start_ns: int, end_ns: int) -> Mapping[tuple[int, int], Found]:
    """By (hour, cache target), from the intervals that start in [start_ns, end_ns)."""
    c = schema.intervals["cache"].c
    hour_ns = (c.start_ns - c.start_ns % HOUR_NS).label("hour_ns")
    sums = (func.sum(column) for column in (c.length_ns, c.dram_hit_tokens, c.disk_hit_tokens))
    query = select(hour_ns, c.target_id, *sums).where(c.start_ns >= start_ns, c.start_ns < end_ns)
    rows = reader.connection.execute(query.group_by(hour_ns, c.target_id)).all()
    return {(row[0], row[1]): Found(int(row[2]), _whole(row[3]), _whole(row[4])) for row in rows}


def _whole(amount: object) -> int | None:
    """A sum as an integer: of some databases it is a decimal number."""
    return None if amount is None else int(str(amount))
