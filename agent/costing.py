"""The actual cost of a period: engine time by state, what it held, what that costs (METHOD section 2). Pure."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.disaggregation import counted_work
from kvtally.agent.facts import GPUS, WORK, EngineRow, Evidence, Facts, Line, Replica, product_of
from kvtally.agent.finding import Finding
from kvtally.agent.lookup_tiers import with_tiers
from kvtally.agent.price import MILLIJOULES_PER_KWH
from kvtally.agent.rates import PriceGap, RateBook, charge_nano
from kvtally.agent.sharing import GPU_SHARED, NOBODY, REMEDY, Sharing, told
from kvtally.agent.split import Slice, fit
from kvtally.agent.states import STATES, EngineTime, engine_time

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.price import Rate, Resource, Term
    from kvtally.agent.split import Split

CPU_HOST = "cpu-host"
GPU_HOST = "gpu-host"


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
    if not rest:
        return parts
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
        whole: dict[str, int] = {state: getattr(time, state) for state in STATES}
        self.state_ns = apportioned(self.end_ns - self.start_ns, whole)

    def within(self, start_ns: int, end_ns: int) -> dict[str, int]:
        """Time by state of the part of the piece that lies in a span."""
        low, high = max(self.start_ns, start_ns), min(self.end_ns, end_ns)
        if (low, high) == (self.start_ns, self.end_ns):
            return self.state_ns
        return apportioned(max(high - low, 0), self.state_ns)


def working_ns(row: EngineRow, replica: Replica, evidence: Evidence) -> float | None:
    """Nanoseconds in which the engine worked: the busiest of its GPUs, else its workers' CPU seconds."""
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


def time_of(row: EngineRow, replica: Replica, evidence: Evidence, sharing: Sharing = NOBODY) -> EngineTime:
    """Time by state of one interval; a GPU that another engine works on too tells nothing of this one."""
    is_alone = not sharing.others(replica, row.start_ns, row.end_ns)
    worked = working_ns(row, replica, evidence) if replica.gpus and is_alone else None
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
    *,
    period_ns: tuple[int, int],
    tokens_from_ns: int,
    split: Split | None = None,
    host_gpus: int | None = None,
    sharing: Sharing = NOBODY,
) -> Facts:
    """What a replica did and cost in [period_ns).

    `rows` are its intervals that overlap the period, in time order. Time and money are cut at the period's edges;
    tokens belong to the period if their interval starts in it and not before `tokens_from_ns`.
    """
    start_ns, end_ns = period_ns
    pieces = [_Piece(row, time_of(row, replica, evidence, sharing), start_ns, end_ns) for row in rows]
    work: dict[str, int | None] = dict.fromkeys(WORK)
    for row in rows:
        if max(start_ns, tokens_from_ns) <= row.start_ns < end_ns:
            for name, value in zip(WORK, row.work(), strict=True):
                if value is not None:
                    work[name] = (work[name] or 0) + value
    state_ns: dict[str, int] = {state: sum(piece.state_ns[state] for piece in pieces) for state in STATES}
    lines, findings = _lines(replica, pieces, evidence, book, host_gpus, sharing=sharing)
    shared = _shared(replica, pieces, sharing)
    return Facts(
        replica,
        start_ns,
        with_tiers(replica, counted_work(replica, work)),
        state_ns,
        lines,
        split,
        pieces[0].start_ns if pieces else start_ns,
        pieces[-1].end_ns if pieces else start_ns,
        sum((piece.end_ns - piece.start_ns) / (1 + piece.row.missed) for piece in pieces),
        bool(shared) or any(piece.modelled for piece in pieces),
        findings + shared,
    )


def law_of(replica: Replica, rows: Sequence[EngineRow], evidence: Evidence, sharing: Sharing = NOBODY) -> Split | None:
    """The law that divides this replica's occupied time, from the rows given; None where they cannot carry one."""
    return fit([_slice(row, replica, evidence, sharing) for row in rows])


def _slice(row: EngineRow, replica: Replica, evidence: Evidence, sharing: Sharing) -> Slice:
    is_alone = not sharing.others(replica, row.start_ns, row.end_ns)
    worked = working_ns(row, replica, evidence) if is_alone else None
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


class _Holding(NamedTuple):
    """A resource that a replica holds in a span of time."""

    resource: Resource
    sku: str
    quantity: Fraction | int
    span: tuple[int, int]


def _holdings(
    replica: Replica, book: RateBook, span: tuple[int, int], host_gpus: int | None, sharing: Sharing
) -> list[_Holding]:
    held: list[_Holding] = []
    if replica.gpus:
        whole = replica.gpu_units or Fraction(0)
        for start_ns, end_ns, units in sharing.parts(replica, *span):
            if not units:
                continue
            own = (start_ns, end_ns)
            held.append(_Holding("gpu", product_of(replica.sku or ""), units, own))
            share = units / max(host_gpus or whole, whole)
            held += [_Holding("server", GPU_HOST, share, part) for part in _host_priced(replica, book, own)]
    else:
        held.append(_Holding("server", CPU_HOST, 1, span))
    if replica.dram_gib:
        held.append(_Holding("dram", "", replica.dram_gib, span))
    if replica.storage_tib:
        held.append(_Holding("storage", "", replica.storage_tib, span))
    return held


def _host_priced(replica: Replica, book: RateBook, span: tuple[int, int]) -> list[tuple[int, int]]:
    """Where in a span the host of GPUs has a price of its own; elsewhere it is inside theirs."""
    edges = {
        edge for rate in book.rates if rate.resource == "server" for edge in (rate.valid_from_ns, rate.valid_until_ns)
    }
    inside = sorted(edge for edge in edges if edge is not None and span[0] < edge < span[1])
    return [
        part
        for part in pairwise([span[0], *inside, span[1]])
        if book.select("server", GPU_HOST, replica.term, replica.site, part[0]) is not None
    ]


def _shared(replica: Replica, pieces: Sequence[_Piece], sharing: Sharing) -> tuple[Finding, ...]:
    """That other engines are on this one's GPUs, and what that does to its figures."""
    if not (pieces and sharing and replica.gpus):
        return ()
    span = (pieces[0].start_ns, pieces[-1].end_ns)
    others = sharing.others(replica, *span)
    if not others and all(part.units == replica.gpu_units for part in sharing.parts(replica, *span)):
        return ()
    who = told(others) or "another engine held its GPUs between two of its own processes"
    message = (
        f"{who}: for that time each is charged an equal part of the price, and what their work is worth is not told "
        f"apart; {REMEDY}"
    )
    return (Finding(GPU_SHARED, "warning", f"engine/{replica.name}", *span, message),)


def _lines(
    replica: Replica,
    pieces: Sequence[_Piece],
    evidence: Evidence,
    book: RateBook,
    host_gpus: int | None,
    *,
    sharing: Sharing,
) -> tuple[tuple[Line, ...] | None, tuple[Finding, ...]]:
    if not pieces:
        return (), ()
    first, last = pieces[0].start_ns, pieces[-1].end_ns
    where = f"engine/{replica.name}"
    if replica.gpus is None or (replica.gpus and (replica.sku is None or replica.gpu_units is None)):
        return None, (Finding("replica_mapping_unknown", "warning", where, first, last, _unmapped(replica)),)
    lines: list[Line] = []
    unmetered: list[tuple[int, int]] = []
    try:
        for span in _spans(pieces):
            inside = [piece for piece in pieces if span[0] <= piece.start_ns < span[1]]
            for held in _holdings(replica, book, span, host_gpus, sharing):
                lines += _held_lines(held, replica, inside, book)
            if replica.term == "owned" and replica.gpus:
                metered = _energy_lines(replica, inside, span, evidence, book, sharing=sharing)
                lines += metered
                unmetered += [] if metered else [span]
    except PriceGap as gap:
        return None, (Finding("no_rate", "warning", where, first, last, str(gap)),)
    if not unmetered:
        return joined_lines(lines), ()
    seconds = sum(end - start for start, end in unmetered) / 1e9
    why = "`kvtally doctor` says what NVML lacks"
    if replica.slices is not None:
        why = "NVML meters whole GPUs, and which of their MIG instances draws the power nothing tells"
    message = f"nothing metered the energy of this engine's own GPUs for {seconds:.0f} s: it is not in the cost; {why}"
    found = Finding("energy_unknown", "warning", where, unmetered[0][0], unmetered[-1][1], message)
    return joined_lines(lines), (found,)


def _unmapped(replica: Replica) -> str:
    """Why an engine has no money, and what to do."""
    shown = "tokens and seconds are shown, money is not"
    if replica.gpus:
        return (
            f"replica mapping unknown (no driver here shows {replica.gpus[0]}, so its product is unknown): {shown}. "
            "Compare `gpus` in kvtally.toml with `nvidia-smi -L`"
        )
    why = replica.mapping or "nothing says which GPUs this engine holds"
    return f"replica mapping unknown ({why}): {shown}. Name them {replica.in_config(GPUS)}"


def _held_lines(held: _Holding, replica: Replica, pieces: Sequence[_Piece], book: RateBook) -> list[Line]:
    term, site = replica.term, replica.site
    lines: list[Line] = []
    asked = (held.resource, held.sku, term, site)
    for part in book.stretches(*asked, start_ns=held.span[0], end_ns=held.span[1]):
        amount = charge_nano(book, *asked, quantity=held.quantity, start_ns=part.start_ns, end_ns=part.end_ns)
        cuts = [piece.within(part.start_ns, part.end_ns) for piece in pieces]
        state_ns: dict[str, int] = {state: sum(cut[state] for cut in cuts) for state in STATES}
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
    replica: Replica,
    pieces: Sequence[_Piece],
    span: tuple[int, int],
    evidence: Evidence,
    book: RateBook,
    *,
    sharing: Sharing,
) -> list[Line]:
    """Metered energy of owned GPUs; rented ones have it in their price. Of a shared GPU's, an equal part."""
    known = [evidence.energy[uuid].over(*span) for uuid in replica.gpus or () if uuid in evidence.energy]
    used = [amount for amount in known if amount is not None]
    if not used or len(used) < len(replica.gpus or ()):
        return []
    units = replica.gpu_units or Fraction(1)
    parts = sharing.parts(replica, *span)
    own = sum((end - start) * each for start, end, each in parts) / ((span[1] - span[0]) * units)
    energy_mj = round(sum(used) * float(own))
    weights: dict[str, int] = {state: sum(piece.state_ns[state] for piece in pieces) for state in STATES}
    lines: list[Line] = []
    kwh = Fraction(energy_mj, MILLIJOULES_PER_KWH)
    asked: tuple[Resource, str, Term, str] = ("energy", "", replica.term, replica.site)
    for part in book.stretches(*asked, start_ns=span[0], end_ns=span[1]):
        amount = charge_nano(book, *asked, quantity=kwh, start_ns=part.start_ns, end_ns=part.end_ns, used_over_ns=span)
        until, since = (energy_mj * (edge - span[0]) // (span[1] - span[0]) for edge in (part.end_ns, part.start_ns))
        amounts, energies = apportioned(amount, weights), apportioned(until - since, weights)
        lines += [
            Line("energy", "", state, energies[state], "mj", part.rate, amounts[state])
            for state in STATES
            if weights[state]
        ]
    return lines


def joined_lines(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Lines of the same resource, state and rate as one, in the order of their first."""
    sums: dict[tuple[str, str, str, str, Rate], list[int]] = {}
    first: dict[tuple[str, str, str, str, Rate], Line] = {}
    for line in lines:
        key = (line.resource, line.sku, line.state, line.unit, line.rate)
        first.setdefault(key, line)
        total = sums.setdefault(key, [0, 0])
        total[0] += line.quantity
        total[1] += line.amount_nano
    return tuple(first[key]._replace(quantity=q, amount_nano=a) for key, (q, a) in sums.items())
