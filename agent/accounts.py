"""The facts of a window: settled hours as they were written, the rest worked out from raw intervals."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from kvtally.agent.commitments import with_unused
from kvtally.agent.costing import law_of, replica_facts
from kvtally.agent.disaggregation import counted_work, grouped
from kvtally.agent.facts import WORK, EngineRow, Evidence, Facts, Line
from kvtally.agent.finding import Finding
from kvtally.agent.ledger import settled
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.read import LedgerReader, Target, replica_of
from kvtally.agent.lookup_tiers import with_tiers
from kvtally.agent.price import DAY_NS
from kvtally.agent.sharing import NOBODY, Sharing
from kvtally.agent.split import Split
from kvtally.agent.unheld import joined, unheld_facts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.facts import Replica
    from kvtally.agent.price import Term
    from kvtally.agent.rates import RateBook


_NO_WORK: Mapping[str, int | None] = dict.fromkeys(WORK, 0)  # of an hour in which no interval began: known, and nothing
_T = TypeVar("_T", bound="EngineRow | tuple[int, int]")


class Window(NamedTuple):
    """A half-open span of time, unix nanoseconds."""

    start_ns: int
    end_ns: int


class Payment(NamedTuple):
    """How GPUs that no replica holds are paid for."""

    term: Term = "on-demand"
    site: str = ""


def on_hour(at_ns: int) -> bool:
    """Whether an instant is the edge of an hour."""
    return at_ns % HOUR_NS == 0


def hour_of(at_ns: int) -> int:
    """The hour in which an instant lies."""
    return at_ns - at_ns % HOUR_NS


def widened(window: Window, raw_from_ns: int | None, last_ns: int) -> Window:
    """The window, widened to whole hours at an edge whose raw intervals have aged out."""
    start, end = window
    if raw_from_ns is None or start < raw_from_ns:
        start = hour_of(start)
    if not on_hour(end) and (raw_from_ns is None or end <= raw_from_ns) and end < last_ns:
        end = hour_of(end) + HOUR_NS
    return Window(start, end)


class Part(NamedTuple):
    """A part of a window: `hours`, settled, by their revision; or, with none, a span of raw intervals."""

    window: Window
    hours: dict[int, int]


def replicas_of(targets: Mapping[int, Target]) -> dict[int, Replica]:
    """Every replica of a ledger by the id of its target, with the group that it costs together with."""
    return grouped({target.id: replica_of(target) for target in targets.values() if target.kind == "engine"})


def facts_of(
    reader: LedgerReader, window: Window, book: RateBook, payment: Payment, *, use_settled: bool = True
) -> list[Facts]:
    """Facts of every replica, and of GPUs that none holds, hour by hour over the window."""
    targets = reader.targets()
    parts = parts_of(reader, window) if use_settled else [Part(window, {})]
    return [one for part in parts for one in facts_in(reader, part, book, payment, targets)]


def parts_of(reader: LedgerReader, window: Window) -> list[Part]:
    """The parts of a window in order: settled hours of one day, or what no settled hour serves.

    A year of a fleet is never in memory whole.
    """
    hours = _serving(reader, window)
    parts: list[Part] = []
    at, end_ns = window
    for hour, revision in hours.items():
        if at < hour:
            parts.append(Part(Window(at, hour), {}))
        last = parts[-1] if parts else None
        if last is not None and last.hours and last.window.end_ns == hour and hour % DAY_NS:
            last.hours[hour] = revision
            parts[-1] = last._replace(window=Window(last.window.start_ns, hour + HOUR_NS))
        else:
            parts.append(Part(Window(hour, hour + HOUR_NS), {hour: revision}))
        at = hour + HOUR_NS
    return [*parts, Part(Window(at, end_ns), {})] if at < end_ns else parts


def facts_in(
    reader: LedgerReader,
    part: Part,
    book: RateBook,
    payment: Payment,
    targets: Mapping[int, Target],
    *,
    with_lines: bool = True,
) -> list[Facts]:
    """Facts of one part of a window, in order of time; without lines, settled ones that are priced have none."""
    facts = (
        _settled_facts(reader, part.hours, targets, with_lines=with_lines)
        if part.hours
        else _raw_facts(reader, part.window, book, payment, targets)
    )
    return sorted(facts, key=lambda one: (one.period_ns, one.replica.target_id if one.replica else 0))


def settled_hours_of(reader: LedgerReader, window: Window) -> list[int]:
    """The settled hours that serve a window, in order."""
    return list(_serving(reader, window))


def _serving(reader: LedgerReader, window: Window) -> dict[int, int]:
    """The settled hours that serve a window, in order, each with its newest revision."""
    whole_from, whole_to = _whole_from(reader, window.start_ns), hour_of(window.end_ns)
    return settled.revisions(reader, whole_from, whole_to) if whole_from < whole_to else {}


def _whole_from(reader: LedgerReader, start_ns: int) -> int:
    """The first hour whose settlement may serve a window from `start_ns` on.

    An interval that began before a start inside an hour belongs, whole, to the window before; a settled hour that it
    reaches into holds a part of it.
    """
    if on_hour(start_ns):
        return start_ns
    crossing = [row.end_ns for row in reader.engine_rows(start_ns, start_ns + 1) if row.start_ns < start_ns]
    return hour_of(max(crossing, default=start_ns) - 1) + HOUR_NS


def _raw_facts(
    reader: LedgerReader, window: Window, book: RateBook, payment: Payment, targets: Mapping[int, Target]
) -> list[Facts]:
    start_ns, end_ns = window
    near = list(reader.engine_rows(start_ns, end_ns))
    rows: dict[int, list[EngineRow]] = {}
    for row in near:
        # an unaligned window takes whole intervals; one on the hour is cut there, as settled hours are
        if row.start_ns >= start_ns or on_hour(start_ns):
            rows.setdefault(row.target_id, []).append(row)
    # an interval's time by state does not depend on the window that asks for it
    first_ns = min([start_ns, *(row.start_ns for row in near)])
    until_ns = max([end_ns, *(row.end_ns for row in near)])
    evidence = reader.evidence(first_ns, until_ns, targets)
    sharing = _sharing(reader, (first_ns, until_ns), targets)
    facts: list[Facts] = []
    hosts: dict[int, Mapping[str, set[str]]] = {}
    replicas = replicas_of(targets)
    for target_id, own in sorted(rows.items()):
        replica = replicas[target_id]
        law = law_of(replica, own, evidence, sharing)
        last_ns = end_ns if on_hour(end_ns) else own[-1].end_ns
        for hour in range(hour_of(max(own[0].start_ns, start_ns)), min(last_ns, own[-1].end_ns), HOUR_NS):
            period = (max(hour, start_ns), min(hour + HOUR_NS, last_ns))
            inside = _overlapping(own, *period)
            if hour not in hosts:
                hosts[hour] = _hosts(evidence, period)
            if inside:
                one = replica_facts(
                    replica,
                    inside,
                    evidence,
                    book,
                    period_ns=period,
                    tokens_from_ns=start_ns,
                    split=law,
                    host_gpus=_host_gpus(hosts[hour], replica),
                    sharing=sharing,
                )
                facts.append(one if any(row.start_ns >= period[0] for row in inside) else one._replace(work=_NO_WORK))
    facts += _unheld(reader, window, near, evidence, targets=targets, book=book, payment=payment)
    return with_unused(facts, book)


def _hosts(evidence: Evidence, period: tuple[int, int]) -> Mapping[str, set[str]]:
    """The GPUs and MIG instances that were seen, by their host."""
    hosts: dict[str, set[str]] = {}
    for gpu in evidence.present:
        if _overlapping(gpu.spans, *period):
            hosts.setdefault(gpu.host, set()).add(gpu.uuid)
    return hosts


def _host_gpus(hosts: Mapping[str, set[str]], replica: Replica) -> int | None:
    """How many GPUs were seen in a replica's host, ours where its own were not; a MIG instance is a part of one."""
    own = [gpus for gpus in hosts.values() if not gpus.isdisjoint(replica.gpus or ())]
    seen: set[str] = set().union(*(own or [hosts.get("", set())]))
    return sum(not uuid.startswith("MIG-") for uuid in seen) or None


def _sharing(reader: LedgerReader, span: tuple[int, int], targets: Mapping[int, Target]) -> Sharing:
    """Who shares GPUs with whom in a span; without a further look at the ledger where no two engines name the same."""
    holders: dict[str, set[str]] = {}
    replicas = {target.id: replica_of(target) for target in targets.values() if target.kind == "engine"}
    for replica in replicas.values():
        for uuid in replica.gpus or ():
            holders.setdefault(uuid, set()).add(replica.name)
    common = {uuid for uuid, names in holders.items() if len(names) > 1}
    if not common:
        return NOBODY
    own = {number: replica for number, replica in replicas.items() if not common.isdisjoint(replica.gpus or ())}
    return Sharing((own[row.target_id], row) for row in reader.engine_rows(*span) if row.target_id in own)


def _overlapping(spans: Sequence[_T], start_ns: int, end_ns: int) -> Sequence[_T]:
    """Those of `spans`, which follow on each other, that overlap [start_ns, end_ns)."""
    first = bisect_right(spans, start_ns, key=_end)
    return spans[first : bisect_left(spans, end_ns, lo=first, key=_start)]


def _start(span: EngineRow | tuple[int, int]) -> int:
    return span.start_ns if isinstance(span, EngineRow) else span[0]


def _end(span: EngineRow | tuple[int, int]) -> int:
    return span.end_ns if isinstance(span, EngineRow) else span[1]


def _unheld(
    reader: LedgerReader,
    window: Window,
    near: Sequence[EngineRow],
    evidence: Evidence,
    *,
    targets: Mapping[int, Target],
    book: RateBook,
    payment: Payment,
) -> list[Facts]:
    """GPUs while no replica held them, one entry per product and hour."""
    start_ns, end_ns = window
    # a GPU interval counts as held if an engine's lies within its own length of it, and it may cross an edge by as much
    far_ns = 2 * max((end - start for gpu in evidence.present for start, end in gpu.spans), default=0)
    if not far_ns:
        return []
    spans: dict[str, list[tuple[int, int]]] = {}
    unmapped: list[tuple[int, int]] = []
    before, after = reader.engine_rows(start_ns - far_ns, start_ns), reader.engine_rows(end_ns, end_ns + far_ns)
    gpus = {target.id: replica_of(target).gpus for target in targets.values() if target.kind == "engine"}
    for row in (*before, *near, *after):
        own = gpus[row.target_id]
        if own is None:
            unmapped.append((row.start_ns, row.end_ns))
        for uuid in own or ():
            spans.setdefault(uuid, []).append((row.start_ns, row.end_ns))
    held = {uuid: _joined_spans(busy) for uuid, busy in spans.items()}
    unmapped = _joined_spans(unmapped)
    facts: list[Facts] = []
    # a window may reach from 1970 on: no hour without a GPU is looked at
    first_ns = min(gpu.spans[0][0] for gpu in evidence.present if gpu.spans)
    last_ns = max(gpu.spans[-1][1] for gpu in evidence.present if gpu.spans)
    for hour in range(hour_of(max(start_ns, first_ns)), min(end_ns, last_ns), HOUR_NS):
        period = (max(hour, start_ns), min(hour + HOUR_NS, end_ns))
        if _overlapping(unmapped, *period):
            continue  # a GPU that seems free may be that engine's own
        alike: dict[str, list[Facts]] = {}
        for gpu in evidence.present:
            seen = gpu._replace(spans=tuple(_overlapping(gpu.spans, *period)))
            free = unheld_facts(seen, held.get(gpu.uuid, ()), book, period, term=payment.term, site=payment.site)
            if free is not None:
                alike.setdefault(gpu.sku, []).append(free)
        facts += [joined(group) for _, group in sorted(alike.items())]
    return facts


def _joined_spans(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans joined where they touch or overlap."""
    union: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(union[-1][1], end))
        else:
            union.append((start, end))
    return union


def _settled_facts(
    reader: LedgerReader, hours: dict[int, int], targets: Mapping[int, Target], *, with_lines: bool
) -> list[Facts]:
    lines = _settled_lines(reader, hours) if with_lines else {}
    work = settled.work(reader, hours)
    replicas = replicas_of(targets)
    facts: list[Facts] = []
    for hour, entry in settled.entries(reader, hours):
        target_id = entry.target_id
        replica = None if target_id is None else replicas[target_id]
        own = {} if replica is None else work.get((hour, replica.target_id), _NO_WORK)
        facts.append(
            Facts(
                replica,
                hour,
                own if replica is None else with_tiers(replica, counted_work(replica, own)),
                entry.state_ns,
                tuple(lines.get((hour, target_id, entry.sku), ())) if entry.priced else None,
                None if entry.split is None else Split(*entry.split),
                entry.start_ns,
                entry.end_ns,
                entry.covered_ns,
                entry.modelled,
                tuple(Finding(*finding) for finding in entry.findings),
            )
        )
    return facts


def _settled_lines(reader: LedgerReader, hours: dict[int, int]) -> dict[tuple[int, int | None, str], list[Line]]:
    """Lines by hour, target and, where none holds them, product."""
    rates = dict(reader.rates())
    lines: dict[tuple[int, int | None, str], list[Line]] = {}
    for hour, _, target_id, resource, sku, state, quantity, unit, rate_id, amount_nano in settled.charges(
        reader, hours
    ):
        key = (hour, target_id, sku if target_id is None else "")
        line = Line(resource, sku, state, quantity, unit, rates[rate_id], amount_nano)
        lines.setdefault(key, []).append(line)
    return lines
