"""The hours behind a savings report, taken apart again from the raw intervals that the ledger still holds."""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.kin import kin_of
from kvtally.agent.ledger.columns import HOUR_NS, quantity_columns
from kvtally.agent.steplaw.explained import requests_of
from kvtally.agent.valuing import MARGIN_NS
from kvtally.agent.worth import worth_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.kin import Kin, Subject
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.observed import Observed, ObservedRow
    from kvtally.agent.savings_report import SavingsReport
    from kvtally.agent.steplaw.explained import Requests
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.valuing import Laws, Valued

MOST_SETTLED = 48  # hours that are taken apart again: of more, the newest


class Piece(NamedTuple):
    """One replica in one hour as the raw intervals tell it.

    start_ns, end_ns   its first and last scrape
    totals             what the engine counted, by quantity; None where an interval does not tell
    details            what its page counted beyond, by name
    source             what tells how long the engine worked: as in Observed
    worked_seconds     by that source, over `worked_over` seconds of the span
    requests           None where there is no law, or no work
    """

    name: str
    start_ns: int
    end_ns: int
    machine: Machine | None
    totals: Mapping[str, int | None]
    details: Mapping[str, int]
    source: str
    worked_seconds: float
    worked_over: float
    caches: tuple[str, ...]
    cache_totals: Mapping[str, int]
    requests: Requests | None


class Apart(NamedTuple):
    """What could be taken apart, by hour and target; `gone` has the hours that raw intervals do not cover any more."""

    pieces: Mapping[tuple[int, int], Piece]
    settled: frozenset[tuple[int, int]]
    gone: frozenset[tuple[int, int]]
    left_out: frozenset[tuple[int, int]]


def taken_apart(reader: LedgerReader, report: SavingsReport, laws: Laws | None) -> Apart:
    """The report's hours from raw intervals, valued by the laws that the report used."""
    values = {(one.hour_ns, one.target_id): one for group in report.groups for one in group.values}
    if report.window is None or not values:
        return Apart({}, frozenset(), frozenset(), frozenset())
    settled = _settled(reader, values)
    whole_from = reader.whole_hours_from()
    gone = frozenset(key for key in settled if whole_from is None or key[0] < whole_from)
    hours = sorted({hour for hour, _ in settled - gone})
    kept = hours[-MOST_SETTLED:]
    spans = [(hour, hour + HOUR_NS) for hour in kept]
    at = report.window.start_ns
    for hour in [*sorted({hour for hour, _ in settled}), report.window.end_ns]:
        if at < hour:
            spans.append((at, hour))
        at = hour + HOUR_NS
    targets = reader.targets()
    pieces: dict[tuple[int, int], Piece] = {}
    for span in spans:
        pieces |= _pieces(reader, span, targets, values, laws)
    left_out = frozenset(key for key in settled - gone if key[0] not in kept)
    return Apart(pieces, settled, gone, left_out)


def _settled(reader: LedgerReader, values: Mapping[tuple[int, int], Valued]) -> frozenset[tuple[int, int]]:
    """Values that are a settlement's, rather than worked out for this report."""
    hours = [hour for hour, _ in values]
    saved = reader.savings(min(hours), max(hours) + HOUR_NS)
    return frozenset(
        key
        for key, value in values.items()
        if key in saved and saved[key].body["worth"] is not None and worth_of(saved[key].body["worth"]) == value.worth
    )


def _pieces(
    reader: LedgerReader,
    span_ns: tuple[int, int],
    targets: Mapping[int, Target],
    values: Mapping[tuple[int, int], Valued],
    laws: Laws | None,
) -> dict[tuple[int, int], Piece]:
    start_ns, end_ns = span_ns
    found: dict[tuple[int, int], Piece] = {}
    for kin in kin_of(reader, (start_ns - MARGIN_NS, end_ns + MARGIN_NS), targets):
        for subject in kin.subjects:
            target_id = subject.observed.rows[0].row.target_id
            for hour_ns in range(start_ns - start_ns % HOUR_NS, end_ns, HOUR_NS):
                value = values.get((hour_ns, target_id))
                inside = (max(hour_ns, start_ns), min(hour_ns + HOUR_NS, end_ns))
                piece = None if value is None else _piece(kin, subject, inside, value, laws)
                if piece is not None:
                    found[hour_ns, target_id] = piece
    return found


def _piece(kin: Kin, subject: Subject, inside: tuple[int, int], value: Valued, laws: Laws | None) -> Piece | None:
    series, observed = subject.series, subject.observed
    instants = [series.epoch_ns + round(at * 1e9) for at in series.at.tolist()]
    first = bisect_left(instants, inside[0])
    last = min(bisect_left(instants, inside[1]), len(instants) - 1)
    if first >= last:
        return None
    start_ns, end_ns = instants[first], instants[last]
    rows = [one for one in observed.rows if start_ns <= one.row.start_ns < end_ns]
    extra = None if laws is None else laws.extra.get(subject.name)
    requests = None
    if kin.machine is not None and value.calibration is not None:
        told = series if extra is None else series._replace(logged=extra.logged)
        requests = requests_of(kin.machine, told, first, last, value.calibration)
    known = series.worked_known[first + 1 : last + 1]
    lengths = series.at[first + 1 : last + 1] - series.at[first:last]
    return Piece(
        subject.name,
        start_ns,
        end_ns,
        kin.machine,
        _totals(rows),
        _details(rows),
        observed.source,
        float(series.worked[last] - series.worked[first]),
        float(lengths[known].sum()),
        tuple(observed.caches),
        _cache_totals(observed, start_ns, end_ns),
        requests,
    )


def _totals(rows: Sequence[ObservedRow]) -> dict[str, int | None]:
    totals: dict[str, int | None] = {}
    for name in quantity_columns("engine"):
        values = [one.row.value(name) for one in rows]
        totals[name] = None if None in values else sum(value or 0 for value in values)
    return totals


def _details(rows: Sequence[ObservedRow]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for one in rows:
        for name, value in (one.details or {}).items():
            totals[name] = totals.get(name, 0) + value
    return totals


def _cache_totals(observed: Observed, start_ns: int, end_ns: int) -> dict[str, int]:
    """What the caches of this engine tell of the span; what none of them tells is left out.

    Pages of several workers repeat each other, or tell of what went on side by side: of each quantity the cache with
    the most stands for all, as in kvtally.agent.steplaw.series.
    """
    greatest: dict[str, int] = {}
    for spans in observed.caches.values():
        totals: dict[str, int] = {}
        for span in spans:
            if start_ns <= span.start_ns < end_ns:
                for name, value in span._asdict().items():
                    if name not in {"start_ns", "end_ns"} and value is not None:
                        totals[name] = totals.get(name, 0) + value
        for name, total in totals.items():
            greatest[name] = max(total, greatest.get(name, 0))
    return greatest
