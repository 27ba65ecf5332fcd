"""What the checks look at: the reports of a window as they print, an audit, and when each engine was last heard of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Window
from kvtally.agent.audit import audit
from kvtally.agent.grouping import default_window, finding_json
from kvtally.agent.report import cost_report

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.accounts import Payment
    from kvtally.agent.check.verdict import Asked
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.rates import RateBook

AUDITED_MOST = 200_000  # intervals that a check audits in passing: about three seconds
MINUTE_NS = 60 * 10**9
_CADENCE_NS = 10 * MINUTE_NS  # of an engine's last minutes: its usual interval is theirs


class Source(NamedTuple):
    """An engine that was scraped in the window: the end of its newest interval, and its usual interval's length."""

    name: str
    end_ns: int
    interval_ns: int


class Audited(NamedTuple):
    """An audit of the whole ledger: how many intervals it read, and what it found of the window, as it prints."""

    intervals: int
    findings: tuple[Mapping[str, str], ...]


class Seen(NamedTuple):
    """What there is to judge.

    cost, before   of the window, and of the one of the same length before it; None: not asked for
    savings        None: not asked for
    audited        None: not audited
    sources        engines of the window
    is_live        the window reaches the ledger's end, so what lags behind that is gone now
    newest_ns      the newest scrape of anything; None for an empty ledger
    now_ns         the clock
    """

    cost: Mapping[str, Any]
    before: Mapping[str, Any] | None
    savings: Mapping[str, Any] | None
    audited: Audited | None
    sources: tuple[Source, ...]
    is_live: bool
    newest_ns: int | None
    now_ns: int


def look(
    reader: LedgerReader,
    window: Window | None,
    asked: Asked,
    book: RateBook,
    payment: Payment,
    *,
    now_ns: int,
    audited_most: int = AUDITED_MOST,
) -> Seen:
    """Ask the ledger for what is to be checked, by the functions behind the other commands. LedgerError.

    window         None: the default one of CLI.md
    audited_most   a ledger of more intervals is not audited
    """
    with reader.snapshot():
        extent = reader.extent()
        asked_for = window or (None if extent is None else default_window(extent))
        cost = cost_report(reader, asked_for, asked.by, book, payment)
        before = savings = None
        if asked.hit_rate_drop is not None and asked_for is not None and cost.window is not None:
            earlier = _before(asked_for, cost.window, extent)
            before = earlier and cost_report(reader, earlier, asked.by, book, payment).as_json()
        if "savings" not in asked.skipped:
            from kvtally.agent.savings_report import savings_report  # noqa: PLC0415  # numpy, where it is asked for

            savings = savings_report(reader, asked_for, asked.by, book, payment).as_json()
        ends = reader.state_ends()
        sources = () if cost.window is None else _sources(reader, cost.window, ends)
    is_live = extent is not None and asked_for is not None and asked_for.end_ns >= extent[1]
    audited = None
    if cost.window is not None and "reconcile" not in asked.skipped:
        audited = _audited(reader, book, cost.window, audited_most)
    newest_ns = max(ends.values(), default=None)
    return Seen(cost.as_json(), before, savings, audited, sources, is_live, newest_ns, now_ns)


def _before(asked_for: Window, real: Window, extent: tuple[int, int] | None) -> Window | None:
    """The window of the same length that ends where this one begins; None where the ledger has nothing before it."""
    # where raw intervals have aged out, a window begins with its hour
    end_ns = min(asked_for.start_ns, real.start_ns)
    if extent is None or end_ns <= extent[0]:
        return None
    return Window(max(end_ns - (asked_for.end_ns - asked_for.start_ns), 0), end_ns)


def _sources(reader: LedgerReader, window: Window, ends: Mapping[tuple[str, str], int]) -> tuple[Source, ...]:
    """Engines that the window has intervals of: one that was gone before it began is not missed."""
    names = {target.id: target.name for target in reader.targets().values() if target.kind == "engine"}
    lengths: dict[int, dict[str, list[int]]] = {}
    found: list[Source] = []
    for (kind, name), end_ns in sorted(ends.items()):
        if kind != "engine" or end_ns <= window.start_ns:
            continue
        # engines that fell silent together are looked up together
        until_ns = -(-end_ns // MINUTE_NS) * MINUTE_NS
        if until_ns not in lengths:
            near: dict[str, list[int]] = {}
            lengths[until_ns] = near
            for row in reader.engine_rows(until_ns - _CADENCE_NS, until_ns):
                near.setdefault(names[row.target_id], []).append(row.end_ns - row.start_ns)
        own = sorted(lengths[until_ns].get(name, [0]))  # none is there once they have aged out
        found.append(Source(name, end_ns, own[len(own) // 2]))
    return tuple(found)


def _audited(reader: LedgerReader, book: RateBook, window: Window, most: int) -> Audited | None:
    """What an audit finds of a window; None for a ledger of too many intervals."""
    intervals = sum(rows for table, rows in reader.counts().items() if table.endswith("_interval"))
    if intervals > most:
        return None
    found = audit(reader, book)
    inside = (
        finding_json(one)
        for one in found
        if one.kind == "audit_cut_short" or (one.start_ns < window.end_ns and one.end_ns >= window.start_ns)
    )
    return Audited(intervals, tuple(inside))
