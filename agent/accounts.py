"""The facts of a window: settled hours as they were written, the rest worked out from raw intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from kvtally.agent.costing import joined, law_of, replica_facts, unheld_facts
from kvtally.agent.facts import WORK, EngineRow, Evidence, Facts, Line, Replica
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.read import LedgerReader, Target, replica_of
from kvtally.agent.split import Split

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.price import Rate, Term
    from kvtally.agent.rates import RateBook


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


def facts_of(
    reader: LedgerReader, window: Window, book: RateBook, payment: Payment, *, use_settled: bool = True
) -> list[Facts]:
    """Facts of every replica, and of GPUs that none holds, hour by hour over the window."""
    targets = reader.targets()
    whole_from = window.start_ns if on_hour(window.start_ns) else hour_of(window.start_ns) + HOUR_NS
    whole_to = hour_of(window.end_ns)
    settled = reader.settlements(whole_from, whole_to) if use_settled and whole_from < whole_to else {}
    facts = _settled_facts(reader, settled, targets)
    for start_ns, end_ns in _gaps(window, sorted(settled)):
        facts += _raw_facts(reader, Window(start_ns, end_ns), book, payment, targets)
    return sorted(facts, key=lambda one: (one.period_ns, one.replica.target_id if one.replica else 0))


def _gaps(window: Window, hours: Sequence[int]) -> list[tuple[int, int]]:
    gaps: list[tuple[int, int]] = []
    at = window.start_ns
    for hour in hours:
        if at < hour:
            gaps.append((at, hour))
        at = hour + HOUR_NS
    if at < window.end_ns:
        gaps.append((at, window.end_ns))
    return gaps


def _raw_facts(
    reader: LedgerReader, window: Window, book: RateBook, payment: Payment, targets: Mapping[int, Target]
) -> list[Facts]:
    start_ns, end_ns = window
    rows: dict[int, list[EngineRow]] = {}
    for row in reader.engine_rows(start_ns, end_ns):
        # an unaligned window takes whole intervals; one on the hour is cut there, as settled hours are
        if row.start_ns >= start_ns or on_hour(start_ns):
            rows.setdefault(row.target_id, []).append(row)
    evidence = reader.evidence(start_ns, end_ns, targets)
    host_gpus = len(evidence.present) or None
    facts: list[Facts] = []
    held: dict[str, list[tuple[int, int]]] = {}
    for target_id, own in sorted(rows.items()):
        replica = replica_of(targets[target_id])
        law = law_of(replica, own, evidence)
        last_ns = end_ns if on_hour(end_ns) else own[-1].end_ns
        hour = hour_of(max(own[0].start_ns, start_ns))
        while hour < last_ns:
            period = (max(hour, start_ns), min(hour + HOUR_NS, last_ns))
            inside = [row for row in own if row.start_ns < period[1] and row.end_ns > period[0]]
            if inside:
                facts.append(replica_facts(replica, inside, evidence, book, period, start_ns, law, host_gpus))
            hour += HOUR_NS
        for uuid in replica.gpus or ():
            held.setdefault(uuid, []).extend((row.start_ns, row.end_ns) for row in own)
    unmapped = any(replica_of(targets[target_id]).gpus is None for target_id in rows)
    if not unmapped:
        # with an engine whose GPUs are unknown, a GPU that seems free may be its own
        facts += _unheld(evidence, held, book, payment, window)
    return facts


def _unheld(
    evidence: Evidence,
    held: Mapping[str, Sequence[tuple[int, int]]],
    book: RateBook,
    payment: Payment,
    window: Window,
) -> list[Facts]:
    """GPUs while no replica held them, one entry per product and hour."""
    facts: list[Facts] = []
    for hour in range(hour_of(window.start_ns), window.end_ns, HOUR_NS):
        period = (max(hour, window.start_ns), min(hour + HOUR_NS, window.end_ns))
        alike: dict[str, list[Facts]] = {}
        for gpu in evidence.present:
            near = [
                span
                for span in held.get(gpu.uuid, ())
                if span[0] < period[1] + HOUR_NS and span[1] > period[0] - HOUR_NS
            ]
            free = unheld_facts(gpu, near, book, period, payment.term, payment.site)
            if free is not None:
                alike.setdefault(gpu.sku, []).append(free)
        facts += [joined(group) for _, group in sorted(alike.items())]
    return facts


def _settled_facts(
    reader: LedgerReader, settled: Mapping[int, tuple[int, dict[str, Any]]], targets: Mapping[int, Target]
) -> list[Facts]:
    if not settled:
        return []
    first, last = min(settled), max(settled) + HOUR_NS
    rates = dict(reader.rates())
    lines: dict[tuple[int, int | None, str], list[Line]] = {}
    for charge in reader.charges(first, last):
        hour = charge["period_start_ns"]
        if hour in settled and charge["revision"] == settled[hour][0]:
            key = (hour, charge["target_id"], charge["sku"] if charge["target_id"] is None else "")
            lines.setdefault(key, []).append(_line(charge, rates))
    sums = {(row["hour_ns"], row["target_id"]): row for row in reader.hour_sums("engine", first, last)}
    facts: list[Facts] = []
    for hour, (_, body) in settled.items():
        for entry in body["facts"]:
            target_id = entry["target_id"]
            replica: Replica | None = None if target_id is None else replica_of(targets[target_id])
            row = sums.get((hour, target_id), {}) if target_id is not None else {}
            facts.append(
                Facts(
                    replica,
                    hour,
                    {name: row.get(name) for name in WORK},
                    entry["state_ns"],
                    tuple(lines.get((hour, target_id, entry["sku"]), ())) if entry["priced"] else None,
                    Split(*entry["split"]) if entry["split"] else None,
                    entry["start_ns"],
                    entry["end_ns"],
                    entry["covered_ns"],
                    entry["modelled"],
                )
            )
    return facts


def _line(charge: Mapping[str, Any], rates: Mapping[int, Rate]) -> Line:
    return Line(
        cast("Any", charge["resource"]),
        charge["sku"],
        charge["state"],
        charge["quantity"],
        charge["unit"],
        rates[charge["rate_id"]],
        charge["amount_nano"],
    )
