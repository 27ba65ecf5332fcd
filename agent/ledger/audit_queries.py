"""What the audit asks of the ledger: rows as a stream, whatever the size of the tables."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import case, func, or_, select

from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HOUR_NS, quantity_columns, sum_columns
from kvtally.agent.ledger.reach import reach

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sqlalchemy import Select

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.collectors.base import Kind

_ROWS_HELD = 1000


class IntervalRow(NamedTuple):
    """One interval as it is written; `details` packed."""

    target_id: int
    start_ns: int
    end_ns: int
    flags: int
    values: tuple[int | None, ...]
    details: bytes | None


class SettledHour(NamedTuple):
    """One settlement; `newest` tells whether no later revision supersedes it."""

    start_ns: int
    revision: int
    end_ns: int
    newest: bool
    entries: Sequence[Mapping[str, Any]]


def _rows(reader: LedgerReader, query: Select[Any]) -> Iterator[Any]:
    yield from reader.connection.execution_options(yield_per=_ROWS_HELD).execute(query)


def spans(reader: LedgerReader, kind: Kind) -> Iterator[tuple[int, int, int]]:
    """(target, start, end) of every interval of a kind, in time order."""
    c = schema.intervals[kind].c
    query = select(c.target_id, c.start_ns, c.start_ns + c.length_ns).order_by(c.start_ns, c.target_id)
    yield from _rows(reader, query)


def impossible(reader: LedgerReader, kind: Kind) -> Iterator[tuple[int, int, int, list[str]]]:
    """Intervals with no length or a negative quantity: (target, start, end, the columns)."""
    c = schema.intervals[kind].c
    names = ("missed", *quantity_columns(kind))
    columns = [c[name] for name in names]
    query = select(c.target_id, c.start_ns, c.length_ns, *columns).order_by(c.start_ns, c.target_id)
    for row in _rows(reader, query.where(or_(c.length_ns <= 0, *(column < 0 for column in columns)))):
        wrong = [name for name, value in zip(names, row[3:], strict=True) if value is not None and value < 0]
        yield row[0], row[1], row[1] + row[2], ["length_ns", *wrong] if row[2] <= 0 else wrong


def intervals(reader: LedgerReader, kind: Kind) -> Iterator[IntervalRow]:
    """Every interval of a kind whole, in time order."""
    c = schema.intervals[kind].c
    head = (c.target_id, c.start_ns, c.start_ns + c.length_ns, c.flags, c.details)
    query = select(*head, *(c[name] for name in quantity_columns(kind))).order_by(c.start_ns, c.target_id)
    for row in _rows(reader, query):
        yield IntervalRow(row[0], row[1], row[2], row[3], tuple(row[5:]), row[4])


def states(reader: LedgerReader, kind: Kind) -> Iterator[tuple[str, int]]:
    """(name, last scrape) of every target of a kind."""
    c = schema.counter_state.c
    yield from _rows(reader, select(c.name, c.taken_at_ns).where(c.kind == kind).order_by(c.name))


def clock_steps(reader: LedgerReader) -> list[tuple[int, int]]:
    """When the clock was set forward, and to when: time that no interval covers."""
    c = schema.finding.c
    query = select(c.start_ns, c.end_ns).where(c.kind == "clock_set_forward").order_by(c.start_ns)
    return [(start_ns, end_ns) for start_ns, end_ns in _rows(reader, query)]


def wrong_hours(reader: LedgerReader, kind: Kind) -> Iterator[tuple[int, int, list[str]]]:
    """Hourly sums that differ from those of their raw intervals, where these are whole: (hour, target, columns)."""
    names = ("intervals", "length_ns", "missed", "flags", *sum_columns(kind))
    for hour_ns in _hours(reader, kind, reader.pruned_before() or 0):
        kept, summed = _kept(reader, kind, hour_ns), _summed(reader, kind, hour_ns)
        for target_id in sorted(kept.keys() | summed.keys()):
            if target_id not in kept or target_id not in summed:
                yield hour_ns, target_id, ["intervals"]
                continue
            pairs = zip(names, kept[target_id], summed[target_id], strict=True)
            wrong = [name for name, one, other in pairs if one != other]
            if wrong:
                yield hour_ns, target_id, wrong


def _hours(reader: LedgerReader, kind: Kind, from_ns: int) -> Iterator[int]:
    """Hours from an instant on that have sums or intervals."""
    raw, hour = schema.intervals[kind].c, schema.hours[kind].c
    at_ns = -(-from_ns // HOUR_NS) * HOUR_NS
    while True:
        first = reader.connection.execute(select(func.min(raw.start_ns)).where(raw.start_ns >= at_ns)).scalar()
        summed = reader.connection.execute(select(func.min(hour.hour_ns)).where(hour.hour_ns >= at_ns)).scalar()
        found = [one // HOUR_NS * HOUR_NS for one in (first, summed) if one is not None]
        if not found:
            return
        yield min(found)
        at_ns = min(found) + HOUR_NS


def _kept(reader: LedgerReader, kind: Kind, hour_ns: int) -> dict[int, tuple[Any, ...]]:
    c = schema.hours[kind].c
    columns = [c[name] for name in ("target_id", "intervals", "length_ns", "missed", "flags", *sum_columns(kind))]
    return {row[0]: tuple(row[1:]) for row in _rows(reader, select(*columns).where(c.hour_ns == hour_ns))}


def _summed(reader: LedgerReader, kind: Kind, hour_ns: int) -> dict[int, tuple[Any, ...]]:
    c = schema.intervals[kind].c
    # SQL has no sum of bits: few values are distinct
    flags = func.group_concat(c.flags.distinct())
    sums = [func.count(), func.sum(c.length_ns), func.sum(c.missed), flags]
    sums += [func.sum(c[name]) for name in sum_columns(kind)]
    query = select(c.target_id, *sums).where(c.start_ns >= hour_ns, c.start_ns < hour_ns + HOUR_NS)
    summed: dict[int, tuple[Any, ...]] = {}
    for target_id, count, length_ns, missed, distinct, *rest in _rows(reader, query.group_by(c.target_id)):
        joined = 0
        for number in distinct.split(","):
            joined |= int(number)
        summed[target_id] = (count, length_ns, missed, joined, *rest)
    return summed


def settled(reader: LedgerReader) -> Iterator[SettledHour]:
    """Every settlement, by hour and revision."""
    c = schema.settlement.c
    newest = func.max(c.revision).over(partition_by=c.period_start_ns)
    query = select(c.period_start_ns, c.revision, c.period_end_ns, newest, c.facts)
    for start_ns, revision, end_ns, last, facts in _rows(reader, query.order_by(c.period_start_ns, c.revision)):
        yield SettledHour(start_ns, revision, end_ns, revision == last, json.loads(facts)["facts"])


def charges_of(reader: LedgerReader, hour: SettledHour) -> list[Mapping[str, Any]]:
    """The charges of one settlement."""
    c = schema.charge.c
    query = select(schema.charge).where(c.period_start_ns == hour.start_ns, c.revision == hour.revision)
    return [dict(row) for row in reader.connection.execute(query.order_by(c.id)).mappings()]


def unsettled_charges(reader: LedgerReader) -> Iterator[tuple[int, int, int]]:
    """Charges that belong to no settlement: (hour, revision, how many)."""
    charge, settlement = schema.charge.c, schema.settlement.c
    joined = (charge.period_start_ns == settlement.period_start_ns) & (charge.revision == settlement.revision)
    query = (
        select(charge.period_start_ns, charge.revision, func.count())
        .outerjoin_from(schema.charge, schema.settlement, joined)
        .where(settlement.revision.is_(None))
        .group_by(charge.period_start_ns, charge.revision)
    )
    yield from _rows(reader, query)


def unfounded_savings(reader: LedgerReader) -> Iterator[tuple[int, int, int, int | None, bool]]:
    """Savings without their settlement or calibration: (hour, revision, target, calibration, has a settlement)."""
    saving, settlement, calibration = schema.saving.c, schema.settlement.c, schema.calibration.c
    joined = (saving.period_start_ns == settlement.period_start_ns) & (saving.revision == settlement.revision)
    has_no_law = saving.calibration_id.is_not(None) & calibration.id.is_(None)
    is_settled = settlement.revision.is_not(None)
    about = (saving.period_start_ns, saving.revision, saving.target_id, saving.calibration_id, is_settled)
    query = (
        select(*about)
        .outerjoin_from(schema.saving, schema.settlement, joined)
        .outerjoin(schema.calibration, saving.calibration_id == calibration.id)
        .where(~is_settled | has_no_law)
        .order_by(saving.period_start_ns, saving.revision, saving.target_id)
    )
    yield from _rows(reader, query)


def covered(reader: LedgerReader, hour_ns: int) -> dict[int, int]:
    """Nanoseconds of an hour that raw engine intervals cover, by target."""
    c, end_ns = schema.intervals["engine"].c, hour_ns + HOUR_NS
    until = c.start_ns + c.length_ns
    low, high = case((c.start_ns < hour_ns, hour_ns), else_=c.start_ns), case((until > end_ns, end_ns), else_=until)
    query = select(c.target_id, func.sum(high - low)).where(
        c.start_ns >= reach(reader.connection, "engine", hour_ns), c.start_ns < end_ns, until > hour_ns
    )
    return dict(_rows(reader, query.group_by(c.target_id)))


def begun(reader: LedgerReader, kind: Kind, hour_ns: int) -> dict[int, int]:
    """How many intervals of each target of a kind begin in an hour."""
    c = schema.hours[kind].c
    return dict(_rows(reader, select(c.target_id, c.intervals).where(c.hour_ns == hour_ns)))
