"""The actual cost of a period: engine time by state, what it held, what that costs (METHOD section 2). Pure."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

from kvtally.agent.facts import WORK, EngineRow, Evidence, Facts, GpuPresence, Line, Replica
from kvtally.agent.finding import Finding
from kvtally.agent.price import Rate
from kvtally.agent.rates import PriceGap, RateBook, charge_nano
from kvtally.agent.split import Slice, fit
from kvtally.agent.states import STATES, EngineTime, engine_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.price import Resource, Term
    from kvtally.agent.split import Split

CPU_HOST = "cpu-host"
GPU_HOST = "gpu-host"
GIB = 2**30


def apportioned(total: int, weights: Mapping[str, int]) -> dict[str, int]:
    """Split an integer by weights so that the parts sum to it exactly (largest remainder, ties in order).

    ValueError where there is something to split and no weight.
    """
    whole = sum(weights.values())
    if not whole:
        if total:
            raise ValueError(f"{total} to split, and no weight")
        return dict.fromkeys(weights, 0)
    parts = {key: total * weight // whole for key, weight in weights.items()}
    rest = total - sum(parts.values())
    for key in sorted(weights, key=lambda key: -(total * weights[key] % whole))[:rest]:
        parts[key] += 1
    return parts


class _Piece:
    """An interval's share of a period, its time by state cut in proportion."""

    __slots__ = ("end_ns", "modelled", "row", "start_ns", "state_ns")

    def __init__(self, row: EngineRow, time: EngineTime, start_ns: int, end_ns: int) -> None:
        self.row = row
        self.start_ns, self.end_ns = max(row.start_ns, start_ns), min(row.end_ns, end_ns)
        self.modelled = time.modelled
        whole = {state: getattr(time, state) for state in STATES}
        self.state_ns = apportioned(self.end_ns - self.start_ns, whole)

    def within(self, start_ns: int, end_ns: int) -> dict[str, int]:
        """Time by state of the part of the piece that lies in a span."""
        low, high = max(self.start_ns, start_ns), min(self.end_ns, end_ns)
        if (low, high) == (self.start_ns, self.end_ns):
            return self.state_ns
        return apportioned(max(high - low, 0), self.state_ns)


def working_ns(row: EngineRow, replica: Replica, evidence: Evidence) -> float | None:
    """Nanoseconds in which the engine worked: the busiest of its GPUs, else its processes' CPU seconds."""
    if replica.gpus:
        busy = [
            amount
            for uuid in replica.gpus
            if uuid in evidence.graphics
            and (amount := evidence.graphics[uuid].over(row.start_ns, row.end_ns)) is not None
        ]
        return max(busy) if busy else None
    target, _, rank = replica.name.partition("/")
    if replica.gpus == () and rank == "0" and target in evidence.cpu:
        return evidence.cpu[target].over(row.start_ns, row.end_ns)
    return None


def time_of(row: EngineRow, replica: Replica, evidence: Evidence) -> EngineTime:
    """Time by state of one interval."""
    worked = working_ns(row, replica, evidence) if replica.gpus else None
    prefill, decode = row.value("prefill_ns"), row.value("decode_ns")
    if worked is None and prefill is not None and decode is not None:
        worked = prefill + decode  # inference time of the requests that finished
    began_after = None if row.began_ns is None else row.began_ns - row.start_ns
    return engine_time(
        row.end_ns - row.start_ns,
        row.flags,
        row.value("steps"),
        None if worked is None else round(worked),
        began_after,
    )


def replica_facts(
    replica: Replica,
    rows: Sequence[EngineRow],
    evidence: Evidence,
    book: RateBook,
    period_ns: tuple[int, int],
    tokens_from_ns: int,
    split: Split | None = None,
    host_gpus: int | None = None,
) -> Facts:
    """What a replica did and cost in [period_ns).

    `rows` are its intervals that overlap the period, in time order. Time and money are cut at the period's edges;
    tokens belong to the period if their interval starts in it and not before `tokens_from_ns`.
    """
    start_ns, end_ns = period_ns
    pieces = [_Piece(row, time_of(row, replica, evidence), start_ns, end_ns) for row in rows]
    work: dict[str, int | None] = dict.fromkeys(WORK)
    for row in rows:
        if max(start_ns, tokens_from_ns) <= row.start_ns < end_ns:
            for name, value in zip(WORK, row.work(), strict=True):
                if value is not None:
                    work[name] = (work[name] or 0) + value
    state_ns = {state: sum(piece.state_ns[state] for piece in pieces) for state in STATES}
    lines, findings = _lines(replica, pieces, evidence, book, host_gpus)
    return Facts(
        replica,
        start_ns,
        work,
        state_ns,
        lines,
        split,
        pieces[0].start_ns if pieces else start_ns,
        pieces[-1].end_ns if pieces else start_ns,
        sum((piece.end_ns - piece.start_ns) / (1 + piece.row.missed) for piece in pieces),
        any(piece.modelled for piece in pieces),
        findings,
    )


def law_of(replica: Replica, rows: Sequence[EngineRow], evidence: Evidence) -> Split | None:
    """The law that divides this replica's occupied time, from the rows given; None where they cannot carry one."""
    return fit([_slice(row, replica, evidence) for row in rows])


def _slice(row: EngineRow, replica: Replica, evidence: Evidence) -> Slice:
    worked = working_ns(row, replica, evidence)
    steps, computed = row.value("steps"), row.value("computed_tokens")
    if worked is None or steps is None or computed is None:
        return Slice(0, 0.0, 0, 0)
    return Slice(row.end_ns - row.start_ns, worked, steps, computed)


def _spans(pieces: Iterable[_Piece]) -> list[tuple[int, int]]:
    """Pieces joined where they touch."""
    spans: list[tuple[int, int]] = []
    for piece in pieces:
        if spans and spans[-1][1] == piece.start_ns:
            spans[-1] = (spans[-1][0], piece.end_ns)
        else:
            spans.append((piece.start_ns, piece.end_ns))
    return spans


class _Holding:
    """A resource that a replica holds all the time."""

    def __init__(self, resource: Resource, sku: str, quantity: Fraction | int) -> None:
        self.resource, self.sku, self.quantity = resource, sku, quantity


def _holdings(replica: Replica, book: RateBook, at_ns: int, host_gpus: int | None) -> list[_Holding]:
    count = replica.gpu_count
    if count is None:
        return []
    held: list[_Holding] = []
    if count:
        held.append(_Holding("gpu", replica.sku or "", count))
        if book.select("server", GPU_HOST, replica.term, replica.site, at_ns):
            held.append(_Holding("server", GPU_HOST, Fraction(count, max(host_gpus or count, count))))
    else:
        held.append(_Holding("server", CPU_HOST, 1))
    if replica.dram_gib:
        held.append(_Holding("dram", "", replica.dram_gib))
    if replica.storage_tib:
        held.append(_Holding("storage", "", replica.storage_tib))
    return held


def _lines(
    replica: Replica, pieces: Sequence[_Piece], evidence: Evidence, book: RateBook, host_gpus: int | None
) -> tuple[tuple[Line, ...] | None, tuple[Finding, ...]]:
    if not pieces:
        return (), ()
    first, last = pieces[0].start_ns, pieces[-1].end_ns
    where = f"engine/{replica.name}"
    if replica.gpus is None or (replica.gpus and replica.sku is None):
        why = replica.mapping or "nothing says which GPUs this engine holds"
        message = (
            f"replica mapping unknown ({why}): tokens and seconds are shown, money is not. Write in kvtally.toml: "
            f'[[engine]] url = "http://{replica.name.rsplit("/", 1)[0]}/metrics"  gpus = ["GPU-…"]'
        )
        return None, (Finding("replica_mapping_unknown", "warning", where, first, last, message),)
    lines: list[Line] = []
    try:
        for span in _spans(pieces):
            inside = [piece for piece in pieces if span[0] <= piece.start_ns < span[1]]
            for held in _holdings(replica, book, span[0], host_gpus):
                lines += _held_lines(held, replica, inside, span, book)
            if replica.term == "owned" and replica.gpus:
                lines += _energy_lines(replica, inside, span, evidence, book)
    except PriceGap as gap:
        return None, (Finding("no_rate", "warning", where, first, last, str(gap)),)
    return _joined(lines), ()


def _held_lines(
    held: _Holding, replica: Replica, pieces: Sequence[_Piece], span: tuple[int, int], book: RateBook
) -> list[Line]:
    term, site = replica.term, replica.site
    lines: list[Line] = []
    asked = (held.resource, held.sku, term, site)
    for part in book.stretches(*asked, start_ns=span[0], end_ns=span[1]):
        amount = charge_nano(book, *asked, quantity=held.quantity, start_ns=part.start_ns, end_ns=part.end_ns)
        cuts = [piece.within(part.start_ns, part.end_ns) for piece in pieces]
        state_ns = {state: sum(cut[state] for cut in cuts) for state in STATES}
        amounts = apportioned(amount, state_ns)
        lines += [
            Line(
                held.resource,
                held.sku,
                state,
                int(state_ns[state] * held.quantity),
                f"{part.rate.unit.split('-')[0]}-ns",
                part.rate,
                amounts[state],
            )
            for state in STATES
            if state_ns[state]
        ]
    return lines


def _energy_lines(
    replica: Replica, pieces: Sequence[_Piece], span: tuple[int, int], evidence: Evidence, book: RateBook
) -> list[Line]:
    """Metered energy of owned GPUs; rented ones have it in their price."""
    known = [evidence.energy[uuid].over(*span) for uuid in replica.gpus or () if uuid in evidence.energy]
    used = [amount for amount in known if amount is not None]
    if not used or len(used) < len(replica.gpus or ()):
        return []
    energy_mj = round(sum(used))
    weights = {state: sum(piece.state_ns[state] for piece in pieces) for state in STATES}
    lines: list[Line] = []
    kwh = Fraction(energy_mj, 3_600_000_000)
    asked: tuple[Resource, str, Term, str] = ("energy", "", replica.term, replica.site)
    for part in book.stretches(*asked, start_ns=span[0], end_ns=span[1]):
        amount = charge_nano(
            book, *asked, quantity=kwh, start_ns=part.start_ns, end_ns=part.end_ns, used_over_ns=span
        )
        share = energy_mj * (part.end_ns - part.start_ns) // (span[1] - span[0])
        amounts, energies = apportioned(amount, weights), apportioned(share, weights)
        lines += [
            Line("energy", "", state, energies[state], "mj", part.rate, amounts[state])
            for state in STATES
            if weights[state]
        ]
    return lines


def _joined(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Lines of the same resource, state and rate as one."""
    sums: dict[tuple[str, str, str, str, Rate], list[int]] = {}
    first: dict[tuple[str, str, str, str, Rate], Line] = {}
    for line in lines:
        key = (line.resource, line.sku, line.state, line.unit, line.rate)
        first.setdefault(key, line)
        total = sums.setdefault(key, [0, 0])
        total[0] += line.quantity
        total[1] += line.amount_nano
    return tuple(first[key]._replace(quantity=q, amount_nano=a) for key, (q, a) in sums.items())


def unheld_facts(
    gpu: GpuPresence,
    held: Sequence[tuple[int, int]],
    book: RateBook,
    period_ns: tuple[int, int],
    term: Term,
    site: str,
) -> Facts | None:
    """A GPU in the time in which no replica held it; None where there is no such time.

    `held` are the spans of all replicas that hold it. A GPU interval counts as held if one of them lies within its
    own length of it: engines and GPUs are not read at the same moment.
    """
    free: list[tuple[int, int]] = []
    for start_ns, end_ns in gpu.spans:
        slack = end_ns - start_ns
        low, high = max(start_ns, period_ns[0]), min(end_ns, period_ns[1])
        if low < high and not any(a - slack < end_ns and start_ns < b + slack for a, b in held):
            free.append((low, high))
    if not free:
        return None
    where = f"gpu/{gpu.uuid}"
    total_ns = sum(end - start for start, end in free)
    lines: list[Line] | None = []
    findings: tuple[Finding, ...] = ()
    try:
        for start_ns, end_ns in free:
            for part in book.stretches("gpu", gpu.sku, term, site, start_ns=start_ns, end_ns=end_ns):
                amount = charge_nano(
                    book, "gpu", gpu.sku, term, site, quantity=1, start_ns=part.start_ns, end_ns=part.end_ns
                )
                length = part.end_ns - part.start_ns
                lines.append(Line("gpu", gpu.sku, "unallocated", length, "gpu-ns", part.rate, amount))
    except PriceGap as gap:
        lines, findings = None, (Finding("no_rate", "warning", where, free[0][0], free[-1][1], str(gap)),)
    return Facts(
        None,
        period_ns[0],
        {},
        {"unallocated": total_ns},
        None if lines is None else _joined(lines),
        None,
        free[0][0],
        free[-1][1],
        float(total_ns),
        False,
        findings,
    )


def joined(group: Sequence[Facts]) -> Facts:
    """Facts of several GPUs of one product that nobody held in the same period, as one."""
    lines = [line for one in group for line in one.lines or ()]
    return group[0]._replace(
        state_ns={"unallocated": sum(one.state_ns["unallocated"] for one in group)},
        lines=None if any(one.lines is None for one in group) else _joined(lines),
        start_ns=min(one.start_ns for one in group),
        end_ns=max(one.end_ns for one in group),
        covered_ns=sum(one.covered_ns for one in group),
        findings=tuple(finding for one in group for finding in one.findings),
    )
