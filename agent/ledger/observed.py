"""One replica over a span of time, with everything that the calibration and the savings look at."""

from __future__ import annotations

from itertools import pairwise
from operator import itemgetter
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import select

from kvtally.agent.facts import EngineRow
from kvtally.agent.joins import CacheTarget, caches_behind
from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import quantity_columns
from kvtally.agent.ledger.evidence import cpu, mean_until, near
from kvtally.agent.ledger.packing import unpacked
from kvtally.agent.ledger.read import replica_of
from kvtally.agent.observed import CacheSpan, Observed, ObservedRow
from kvtally.agent.timeline import Span, Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.read import LedgerReader, Target

_ALWAYS = (-(2**63), 2**63)
_CACHE = (
    "load_ns",
    "store_ns",
    "loaded_tokens",
    "stored_tokens",
    "load_bytes",
    "store_bytes",
    "dram_hit_tokens",
    "disk_hit_tokens",
)
_GPU = ("gpm_ns", "graphics_ns", "tensor_ns", "observed_ns", "busy_ns", "busy_cycles", "sm_clock_mhz")


class _Held(NamedTuple):
    """The GPUs that a replica held in [start_ns, end_ns); None where the mapping is unknown."""

    start_ns: int
    end_ns: int
    gpus: tuple[str, ...] | None


class _Sample(NamedTuple):
    """What one interval of a GPU tells."""

    uuid: str
    until_ns: int
    gpm_ns: int | None
    graphics_ns: int | None
    tensor_ns: int | None
    observed_ns: int | None
    busy_ns: int | None
    busy_cycles: int | None
    gauge_mhz: int | None

    @property
    def mhz(self) -> float | None:
        """The SM clock while the GPU was busy; an interval may last longer than a load, and so may its last clock."""
        if self.busy_ns and self.busy_cycles is not None:
            return self.busy_cycles * 1e3 / self.busy_ns
        return self.gauge_mhz

    def graphics(self) -> Span | None:
        return mean_until(self.until_ns, self.gpm_ns, self.graphics_ns)

    def utilization(self) -> Span | None:
        return mean_until(self.until_ns, self.observed_ns, self.busy_ns)

    def tensor(self) -> Span | None:
        return None if self.mhz is None else mean_until(self.until_ns, self.gpm_ns, self.tensor_ns)

    def clocked(self) -> Span | None:
        tensor = self.tensor()
        return None if tensor is None or self.mhz is None else tensor._replace(amount=tensor.amount * self.mhz)


def replica_names(reader: LedgerReader, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> list[str]:
    """Names of the replicas of which an interval starts in [start_ns, end_ns)."""
    c = schema.intervals["engine"].c
    query = select(c.target_id).where(c.start_ns >= start_ns, c.start_ns < end_ns).distinct()
    return sorted({targets[target_id].name for target_id in reader.connection.execute(query).scalars()})


def observed(reader: LedgerReader, start_ns: int, end_ns: int, targets: Mapping[int, Target], name: str) -> Observed:
    """The replica of this name over the intervals that start in [start_ns, end_ns), each of them whole."""
    rows = _rows(reader, start_ns, end_ns, _named(targets, "engine", {name}))
    replicas = {target_id: replica_of(targets[target_id]) for target_id in {one.row.target_id for one in rows}}
    caches = _caches(reader, start_ns, end_ns, targets, name)
    if not rows:
        return Observed({}, (), None, None, None, "", caches)
    held = _held(rows, replicas)
    span = (start_ns, max(end_ns, rows[-1].row.end_ns))
    if all(one.gpus == () for one in held):
        worked = _cpu(reader, span, targets, name)
        return Observed(replicas, rows, worked, None, None, "cpu" if worked is not None else "", caches)
    samples = _samples(reader, span, _named(targets, "gpu", {uuid for one in held for uuid in one.gpus or ()}))
    worked, source = _over_gpus(samples, _Sample.graphics, held, max), "graphics"
    if worked is None:
        worked, source = _over_gpus(samples, _Sample.utilization, held, max), "utilization"
    tensor, clocked = (_over_gpus(samples, what, held, fmean) for what in (_Sample.tensor, _Sample.clocked))
    return Observed(replicas, rows, worked, tensor, clocked, source if worked is not None else "", caches)


def _named(targets: Mapping[int, Target], kind: str, names: set[str]) -> dict[int, Target]:
    return {target.id: target for target in targets.values() if target.kind == kind and target.name in names}


def _rows(reader: LedgerReader, start_ns: int, end_ns: int, own: Mapping[int, Target]) -> tuple[ObservedRow, ...]:
    c = schema.intervals["engine"].c
    head = (c.details, c.target_id, c.start_ns, c.start_ns + c.length_ns, c.missed, c.flags, c.began_ns)
    query = select(*head, *(c[name] for name in quantity_columns("engine"))).where(
        c.start_ns >= start_ns, c.start_ns < end_ns, c.target_id.in_(own)
    )
    # an idle engine's intervals are alike
    details: dict[tuple[int, bytes | None], Mapping[str, int] | None] = {}
    rows: list[ObservedRow] = []
    for row in reader.connection.execute(query.order_by(c.start_ns, c.target_id)):
        packed, target_id = row[0], row[1]
        key = (target_id, packed)
        if key not in details:
            details[key] = _details(own[target_id].detail_names, packed)
        rows.append(
            ObservedRow(EngineRow(row[1], row[2], row[3], row[4], row[5], row[6], tuple(row[7:])), details[key])
        )
    return tuple(rows)


def _details(names: Sequence[str], packed: bytes | None) -> Mapping[str, int] | None:
    try:
        differences = unpacked(packed, len(names))
    except ValueError:
        return None  # damaged: the audit tells
    return None if differences is None else dict(zip(names, differences, strict=True))


def _held(rows: Sequence[ObservedRow], replicas: Mapping[int, Replica]) -> list[_Held]:
    """Which GPUs the replica held when: those of an interval from its start on, until one that says otherwise."""
    since: list[tuple[int, tuple[str, ...] | None]] = []
    for one in rows:
        gpus = replicas[one.row.target_id].gpus
        if not since:
            since.append((_ALWAYS[0], gpus))
        elif since[-1][1] != gpus:
            since.append((one.row.start_ns, gpus))
    edges = [*(at for at, _ in since), _ALWAYS[1]]
    return [_Held(*edge, gpus) for edge, (_, gpus) in zip(pairwise(edges), since, strict=True)]


def _samples(reader: LedgerReader, span: tuple[int, int], own: Mapping[int, Target]) -> list[_Sample]:
    c = schema.intervals["gpu"].c
    query = select(c.target_id, c.start_ns + c.length_ns, *(c[name] for name in _GPU)).where(
        *near(reader.connection, "gpu", *span), c.target_id.in_(own)
    )
    return [_Sample(own[row[0]].name, *row[1:]) for row in reader.connection.execute(query.order_by(c.start_ns))]


def _cpu(reader: LedgerReader, span: tuple[int, int], targets: Mapping[int, Target], name: str) -> Timeline | None:
    """CPU time of the engine's process tree: its ranks share it and nothing tells them apart, so the first has it."""
    target, _, rank = name.partition("/")
    return cpu(reader.connection, *span, targets).get(target) if rank == "0" else None


def _over_gpus(
    samples: Iterable[_Sample],
    what: Callable[[_Sample], Span | None],
    held: Iterable[_Held],
    of_all: Callable[[Collection[float]], float],
) -> Timeline | None:
    """One timeline of the GPUs that were held, `of_all` their rates at each instant; None where nothing is known."""
    spans: dict[str, list[Span]] = {}
    for sample in samples:
        span = what(sample)
        if span is not None:
            spans.setdefault(sample.uuid, []).append(span)
    joined: list[Span] = []
    for one in held:
        own = [_within(spans[uuid], one.start_ns, one.end_ns) for uuid in one.gpus or () if uuid in spans]
        joined += own[0] if len(own) == 1 else at_each_instant(own, of_all)
    return Timeline(joined) if joined else None


def _within(spans: Iterable[Span], start_ns: int, end_ns: int) -> list[Span]:
    """The part of each span that lies in [start_ns, end_ns)."""
    inside: list[Span] = []
    for span in spans:
        if start_ns <= span.start_ns and span.end_ns <= end_ns:
            inside.append(span)
        elif span.start_ns < end_ns and span.end_ns > start_ns:
            low, high = max(span.start_ns, start_ns), min(span.end_ns, end_ns)
            inside.append(Span(low, high, span.amount * (high - low) / (span.end_ns - span.start_ns)))
    return inside


def at_each_instant(lines: Iterable[Iterable[Span]], of_all: Callable[[Collection[float]], float]) -> list[Span]:
    """Spans of several sources as one: between any two edges the rates of those that are known there, joined.

    Where spans of one source overlap, the earlier counts, as in a Timeline.
    """
    marks: list[tuple[int, int, float | None]] = []  # from when on a source has which rate
    for source, spans in enumerate(lines):
        reached = _ALWAYS[0]
        for span in sorted(spans):
            start_ns = max(span.start_ns, reached)
            if start_ns >= span.end_ns:
                continue
            if start_ns > reached:
                marks.append((reached, source, None))
            marks.append((start_ns, source, span.amount / (span.end_ns - span.start_ns)))
            reached = span.end_ns
        marks.append((reached, source, None))
    joined: list[Span] = []
    rates: dict[int, float] = {}
    for (start_ns, source, rate), (end_ns, _, _) in pairwise(sorted(marks, key=itemgetter(0))):
        if rate is None:
            rates.pop(source, None)
        else:
            rates[source] = rate
        if rates and start_ns < end_ns:
            joined.append(Span(start_ns, end_ns, of_all(rates.values()) * (end_ns - start_ns)))
    return joined


def _caches(
    reader: LedgerReader, start_ns: int, end_ns: int, targets: Mapping[int, Target], name: str
) -> dict[str, tuple[CacheSpan, ...]]:
    """What the caches of this engine did in the intervals that start in [start_ns, end_ns)."""
    engines = {target.name for target in targets.values() if target.kind == "engine"}
    own = {cache.id: cache for cache in caches_behind(name, cache_targets(targets), engines)}
    c = schema.intervals["cache"].c
    query = select(c.target_id, c.start_ns, c.start_ns + c.length_ns, *(c[column] for column in _CACHE)).where(
        c.start_ns >= start_ns, c.start_ns < end_ns, c.target_id.in_(own)
    )
    spans: dict[str, list[CacheSpan]] = {}
    for target_id, *rest in reader.connection.execute(query.order_by(c.start_ns, c.target_id)):
        spans.setdefault(own[target_id].name, []).append(CacheSpan(*rest))
    return {cache: tuple(found) for cache, found in sorted(spans.items())}


def cache_targets(targets: Mapping[int, Target]) -> list[CacheTarget]:
    """The caches among a ledger's targets."""
    return [
        CacheTarget(target.id, target.name, target.attributes) for target in targets.values() if target.kind == "cache"
    ]
