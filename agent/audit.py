"""Every invariant of a ledger, checked on demand: what is violated comes back as findings."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

from kvtally.agent.audit_charges import Ledger, settlements
from kvtally.agent.finding import Finding
from kvtally.agent.identity import Identity, check
from kvtally.agent.interval import IDENTITY_BROKEN, IDENTITY_OK
from kvtally.agent.ledger import audit_queries as ask
from kvtally.agent.ledger.columns import HOUR_NS, KINDS
from kvtally.agent.ledger.packing import unpacked
from kvtally.agent.price import FOREVER_NS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvtally.agent.ledger.audit_queries import IntervalRow
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.rates import RateBook

MOST = 100  # findings of one check: a ledger that is broken throughout says so in a page, not in a million lines
FAMILIES = 4  # of an engine's quantities, the first: prompt tokens, and those by source
_FLAG = {Identity.OK: IDENTITY_OK, Identity.BROKEN: IDENTITY_BROKEN, Identity.UNCHECKED: 0}


def audit(reader: LedgerReader, book: RateBook) -> list[Finding]:
    """Check everything, as of one instant; an empty list is a sound ledger. LedgerError if it cannot be read."""
    with reader.snapshot():
        steps, whole_from_ns = ask.clock_steps(reader), reader.whole_hours_from()
        about = Ledger(reader, book, reader.targets(), dict(reader.rates()), steps, whole_from_ns)
        return [finding for one in CHECKS for finding in _first(one(about))]


def _first(findings: Iterator[Finding]) -> list[Finding]:
    head = list(islice(findings, MOST + 1))
    if len(head) > MOST:
        last = head.pop()
        message = f"and more than {MOST} findings like the last ones"
        head.append(Finding("audit_cut_short", "error", last.target, last.start_ns, last.end_ns, message))
    return head


def timelines(about: Ledger) -> Iterator[Finding]:
    """Intervals of a target follow on each other, over all its rows of `target`, up to its last scrape."""
    for kind in KINDS:
        ends: dict[str, int] = {}
        for target_id, start_ns, end_ns in ask.spans(about.reader, kind):
            name = about.name(target_id)
            before_ns = ends.get(name, start_ns)
            ends[name] = max(end_ns, before_ns)
            if start_ns < before_ns:
                message = "two intervals overlap: what was counted in this time may be in the ledger twice"
                yield Finding("intervals_overlap", "error", name, start_ns, min(before_ns, end_ns), message)
            elif start_ns - before_ns != _stepped(about, before_ns, max(end_ns, before_ns + 1)):
                message = "an interval is missing: what was counted in this time is not in the ledger"
                yield Finding("interval_missing", "error", name, before_ns, start_ns, message)
        for short, taken_at_ns in ask.states(about.reader, kind):
            name = f"{kind}/{short}"
            end_ns = ends.get(name, taken_at_ns)  # a first scrape opens an interval and closes none
            if taken_at_ns != end_ns and taken_at_ns - end_ns != _stepped(about, end_ns, FOREVER_NS):
                span = min(taken_at_ns, end_ns), max(taken_at_ns, end_ns)
                message = "its last raw counters are not those of its newest interval's end: the next one will be wrong"
                yield Finding("counters_out_of_step", "error", name, *span, message)


def _stepped(about: Ledger, from_ns: int, until_ns: int) -> int:
    """By how much the clock was set forward in a span."""
    return sum(after - before for before, after in about.clock_steps if from_ns <= before < until_ns)


def quantities(about: Ledger) -> Iterator[Finding]:
    """Intervals last, and count nothing below 0."""
    for kind in KINDS:
        for target_id, start_ns, end_ns, columns in ask.impossible(about.reader, kind):
            message = f"{', '.join(columns)} cannot be"
            yield Finding("quantity_impossible", "error", about.name(target_id), start_ns, end_ns, message)


def contents(about: Ledger) -> Iterator[Finding]:
    """Details are as many as their target names, and an engine's prompt tokens by source add up."""
    lacking: dict[str, bool] = {}
    for kind in KINDS:
        for row in ask.intervals(about.reader, kind):
            found = _unpacked(about, row)
            if isinstance(found, ValueError):
                span = (row.start_ns, row.end_ns)
                yield Finding("details_unreadable", "error", about.name(row.target_id), *span, str(found))
            elif kind == "engine":
                yield from _identity(about, row, found, lacking)


def _identity(
    about: Ledger, row: IntervalRow, found: tuple[int, ...] | None, lacking: dict[str, bool]
) -> Iterator[Finding]:
    """Prompt tokens by source add up, in the form of the engine's version, and the flags say so.

    An interval after one that lacked a family holds more of that family than of the others: it may be unchecked.
    """
    target, name = about.targets[row.target_id], about.name(row.target_id)
    flagged = row.flags & (IDENTITY_OK | IDENTITY_BROKEN)
    excused = not flagged and lacking.get(name, True)
    lacking[name] = None in row.values[:FAMILIES] or found is None
    if excused:
        return
    state, message = check(target.attributes.get("version"), row.values, target.detail_names, found)
    if state is Identity.BROKEN:
        yield Finding("identity_broken", "error", name, row.start_ns, row.end_ns, message)
    if flagged != _FLAG[state]:
        message = f"its flags do not say that the identity of prompt tokens is {state.value}"
        yield Finding("identity_flag_wrong", "error", name, row.start_ns, row.end_ns, message)


def _unpacked(about: Ledger, row: IntervalRow) -> tuple[int, ...] | ValueError | None:
    try:
        return unpacked(row.details, len(about.targets[row.target_id].detail_names))
    except ValueError as error:
        return error


def hourly_sums(about: Ledger) -> Iterator[Finding]:
    """Hourly sums are those of their raw intervals."""
    for kind in KINDS:
        for hour_ns, target_id, columns in ask.wrong_hours(about.reader, kind):
            message = f"hourly sums differ from the raw intervals in {', '.join(columns)}"
            yield Finding("hour_wrong", "error", about.name(target_id), hour_ns, hour_ns + HOUR_NS, message)


def revisions(about: Ledger) -> Iterator[Finding]:
    """An hour's revisions count from 1, each has the whole hour, and no charge is outside of one."""
    before = (-1, 0)
    for hour in ask.settled(about.reader):
        expected = before[1] + 1 if hour.start_ns == before[0] else 1
        before = (hour.start_ns, hour.revision)
        span = (hour.start_ns, hour.end_ns)
        if hour.revision != expected:
            message = f"revision {hour.revision} stands where {expected} should"
            yield Finding("revision_missing", "error", "", *span, message)
        if hour.start_ns % HOUR_NS or hour.end_ns - hour.start_ns != HOUR_NS:
            message = f"revision {hour.revision} settles something else than an hour"
            yield Finding("settlement_wrong", "error", "", *span, message)
    for hour_ns, revision, count in ask.unsettled_charges(about.reader):
        message = f"{count} charges belong to revision {revision}, which is not there"
        yield Finding("charge_unsettled", "error", "", hour_ns, hour_ns + HOUR_NS, message)


def savings(about: Ledger) -> Iterator[Finding]:
    """Every saving belongs to a settlement, and names a calibration that is there, if it names one."""
    for hour_ns, revision, target_id, calibration_id, is_settled in ask.unfounded_savings(about.reader):
        span = (hour_ns, hour_ns + HOUR_NS)
        if is_settled:
            message = f"the saving of revision {revision} names calibration {calibration_id}, which is not there"
            yield Finding("saving_unfounded", "error", about.name(target_id), *span, message)
        else:
            message = f"a saving belongs to revision {revision}, which is not there"
            yield Finding("saving_unsettled", "error", about.name(target_id), *span, message)


CHECKS: tuple[Callable[[Ledger], Iterator[Finding]], ...] = (
    timelines,
    quantities,
    contents,
    hourly_sums,
    revisions,
    settlements,
    savings,
)
