"""When a gateway was watched, and how many requests its engines had in hand at either end of that time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HOUR_NS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from kvtally.agent.ledger.read import LedgerReader

NEAR_NS = 600_000_000_000  # of an end, for a gauge to tell of it
WHOLE = 0.99  # of an hour, for it to count as scraped throughout: its intervals begin and end beside its edges


def watched(reader: LedgerReader, targets: Collection[int], start_ns: int, end_ns: int) -> tuple[int, int] | None:
    """From where to where in [start_ns, end_ns) these gateways were scraped; None where they were not.

    Either end lies half an interval before the start of an interval: other targets of the same ticks, which are read a
    moment earlier or later, fall on the same side of it. Where raw intervals have aged out it is the edge of an hour in
    which they were scraped throughout.
    """
    hour = schema.hours["gateway"].c
    query = select(func.min(hour.hour_ns), func.max(hour.hour_ns)).where(
        hour.target_id.in_(targets), hour.hour_ns > start_ns - HOUR_NS, hour.hour_ns < end_ns
    )
    first_ns, last_ns = reader.connection.execute(query).one()
    if first_ns is None or last_ns is None:
        return None
    c = schema.intervals["gateway"].c
    own = select(c.start_ns, c.length_ns).where(c.target_id.in_(targets))
    inside = own.where(c.start_ns >= max(first_ns, start_ns), c.start_ns < min(first_ns + HOUR_NS, end_ns))
    first = reader.connection.execute(inside.order_by(c.start_ns).limit(1)).first()
    inside = own.where(c.start_ns >= max(last_ns, start_ns), c.start_ns < min(last_ns + HOUR_NS, end_ns))
    last = reader.connection.execute(inside.order_by(c.start_ns.desc()).limit(1)).first()
    if first is None:
        begin_ns = first_ns if _is_whole(reader, targets, first_ns) else first_ns + HOUR_NS
    else:
        begin_ns = first.start_ns - first.length_ns // 2
    if last is None:
        until_ns = last_ns + HOUR_NS if _is_whole(reader, targets, last_ns) else last_ns
    else:
        until_ns = last.start_ns + last.length_ns // 2
    return (begin_ns, until_ns) if begin_ns < until_ns else None


def _is_whole(reader: LedgerReader, targets: Collection[int], hour_ns: int) -> bool:
    hour = schema.hours["gateway"].c
    query = select(func.max(hour.length_ns)).where(hour.target_id.in_(targets), hour.hour_ns == hour_ns)
    return (reader.connection.execute(query).scalar() or 0) >= WHOLE * HOUR_NS


def running(reader: LedgerReader, engines: Collection[int], start_ns: int, end_ns: int) -> int:
    """Requests that ran at these engines at the start and at the end of a span, together; 0 where no gauge tells."""
    c = schema.intervals["engine"].c
    query = select(c.target_id, c.running_requests).where(c.target_id.in_(engines)).order_by(c.start_ns)
    begins = query.where(c.start_ns >= start_ns, c.start_ns < min(start_ns + NEAR_NS, end_ns))
    ends = query.where(c.start_ns >= max(end_ns - NEAR_NS, start_ns), c.start_ns < end_ns)
    first = _last_of_each(reversed(reader.connection.execute(begins).all()))
    return first + _last_of_each(reader.connection.execute(ends).all())


def _last_of_each(rows: Iterable[tuple[int, int | None]]) -> int:
    return sum(requests or 0 for requests in {target_id: requests for target_id, requests in rows}.values())  # noqa: C416  # a Row is no pair for dict()
