"""Rows for warehouses as the ledger holds them, one by one in order of time: a year of a fleet is never in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from kvtally.agent.ledger import schema, settled
from kvtally.agent.ledger.columns import HOUR_NS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.collectors.base import Kind

CHARGE = ("period_start_ns", "revision", "target_id", "account", "resource", "sku", "state", "quantity", "unit")


def intervals_begun(
    reader: LedgerReader, kind: Kind, start_ns: int, end_ns: int, columns: Sequence[str]
) -> Iterator[Any]:
    """(target, start, length, …) of the intervals of a kind that start in [start_ns, end_ns), by their start.

    columns     further columns of the kind's intervals
    """
    c = schema.intervals[kind].c
    query = select(c.target_id, c.start_ns, c.length_ns, *(c[name] for name in columns))
    query = query.where(c.start_ns >= start_ns, c.start_ns < end_ns).order_by(c.start_ns, c.target_id)
    yield from reader.connection.execute(query)


def hours_begun(reader: LedgerReader, kind: Kind, start_ns: int, end_ns: int, columns: Sequence[str]) -> Iterator[Any]:
    """(target, hour, length, …) of the hourly sums in [start_ns, end_ns), by the hour."""
    c = schema.hours[kind].c
    query = select(c.target_id, c.hour_ns, c.length_ns, *(c[name] for name in columns))
    query = query.where(c.hour_ns >= start_ns, c.hour_ns < end_ns).order_by(c.hour_ns, c.target_id)
    yield from reader.connection.execute(query)


def charges_settled(reader: LedgerReader, start_ns: int, end_ns: int) -> Iterator[Any]:
    """(CHARGE …, rate, nano-units) of the newest revision of every hour settled in [start_ns, end_ns)."""
    hours = settled.revisions(reader, start_ns, end_ns)
    c = schema.charge.c
    query = select(*(c[name] for name in CHARGE), c.rate_id, c.amount_nano)
    query = query.where(c.period_start_ns >= start_ns, c.period_start_ns < end_ns)
    for row in reader.connection.execute(query.order_by(c.period_start_ns, c.id)):
        if hours.get(row[0]) == row[1]:
            yield row


def savings_settled(reader: LedgerReader, start_ns: int, end_ns: int) -> Iterator[Any]:
    """(hour, target, revision, calibration, body) of the newest revision of every hour settled in [start, end)."""
    hours = settled.revisions(reader, start_ns, end_ns)
    c = schema.saving.c
    query = select(c.period_start_ns, c.target_id, c.revision, c.calibration_id, c.body)
    query = query.where(c.period_start_ns >= start_ns, c.period_start_ns < end_ns)
    for row in reader.connection.execute(query.order_by(c.period_start_ns, c.target_id)):
        if hours.get(row[0]) == row[2]:
            yield row


def hour_from(reader: LedgerReader, start_ns: int, end_ns: int) -> int:
    """The instant in [start_ns, end_ns] from which on raw intervals tell what was counted; before it, hourly sums do.

    `start_ns` is on the hour where raw intervals have aged out of its hour (kvtally.agent.accounts.widened).
    """
    raw_from_ns = reader.raw_from()
    if raw_from_ns is None:
        return end_ns
    if start_ns >= raw_from_ns or reader.pruned_before() is None:
        return start_ns
    return min(max(-(-raw_from_ns // HOUR_NS) * HOUR_NS, start_ns), end_ns)
