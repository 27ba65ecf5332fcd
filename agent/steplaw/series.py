"""A replica's counters as arrays over time: cumulative at the scrapes, gauges at each, evidence joined to them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.interval import BORN, BUSY_AT_START, GAUGES_UNKNOWN, IDENTITY_BROKEN, RESET

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from kvtally.agent.observed import CacheSpan, Observed, ObservedRow
    from kvtally.agent.timeline import Timeline

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

# what the law cannot do without; a replica that lacks one of them has no figure
NEEDED = (
    "first_tokens",
    "finished_requests",
    "steps",
    "generated_tokens",
    "prompt_tokens",
    "computed_tokens",
    "hbm_tokens",
    "external_tokens",
    "prefill_ns",
    "decode_ns",
    "queue_ns",
)
OPTIONAL = ("preemptions",)
HISTOGRAMS = ("step_tokens", "request_prompt_tokens", "request_computed_tokens")
FINISHED_PROMPT = "finished_prompt_tokens"
MFU = ("estimated_gflop", "estimated_read_bytes")
# external tokens by the tier that they came from, counted when a request is admitted (vLLM >= 0.32)
ADMITTED = ("admitted_host_tokens", "admitted_disk_tokens", "admitted_p2p_tokens", "admitted_unspecified_tokens")
# connectors that hand KV from one engine to another, so that nothing is stored
HANDING_ON = frozenset({"NixlConnector", "P2pNcclConnector", "MooncakeConnector", "MoRIIOConnector"})
QUIET = 0.5  # requests running and waiting: fewer than one
_TOGETHER_NS = 1_000_000  # pages of one tick
# around a report of a cache, for which it tells: LMCache's come 10 s late, and some series begin with their first use
_TELLING_SECONDS = 60.0
AT_REST = 0.6  # share of the next sample in which the GPUs work; the gauges are stale during a chunk without output


class Histogram(NamedTuple):
    """Counts up to each scrape, one column per bucket, each on its own; the last edge is infinite."""

    edges: Array
    counts: Array


class Hits(NamedTuple):
    """What lookups in the cache behind the engine found up to each scrape, and the intervals that it tells of."""

    dram: Array
    disk: Array
    told: Flags


class Logged(NamedTuple):
    """Requests of a log in the order of their first token: when that came (unix seconds), and their tokens.

    outer       what of the reused tokens came from outside HBM; NaN where the log does not tell
    """

    first_token: Array
    prompt: Array
    reused: Array
    outer: Array


class Series(NamedTuple):
    """One replica's counters at k scrapes, from the first on; seconds since `epoch_ns`.

    at          k instants
    totals      cumulative quantities, k values each, tokens, counts and seconds
    sound       k flags: the interval that ends here is whole (no restart, no gap, every counter known and true)
    worked      cumulative seconds of work, `worked_known` where the interval's own is measured
    tensor      cumulative tensor-pipe seconds, and the same times the clock in MHz
    loads, stores   cumulative seconds of the outer tiers, spread over the work since their last report
    loads_told, stores_told   k flags: an outer tier tells of the interval that ends here
    is_storing  an outer tier is there that may store what is computed
    resting     k shares of work right after the scrape
    logged      requests of a log, where there is one: exact pairs instead of histograms
    hits        of the cache that found the most, None where none tells DRAM from storage
    """

    epoch_ns: int
    at: Array
    totals: Mapping[str, Array]
    histograms: Mapping[str, Histogram]
    sound: Flags
    running: Array
    waiting: Array
    starved: Array
    worked: Array
    worked_known: Flags
    tensor: Array
    tensor_mhz: Array
    loads: Array
    stores: Array
    resting: Array
    missing: tuple[str, ...]
    is_starving_told: bool
    loads_told: Flags
    stores_told: Flags
    is_storing: bool
    logged: Logged | None = None
    hits: Hits | None = None

    def over(self, name: str, start: Index, end: Index) -> Array:
        """A quantity's increase between scrapes."""
        total = self.totals[name]
        result: Array = total[end] - total[start]
        return result

    def seconds(self, start: Index, end: Index) -> Array:
        """Time between scrapes."""
        result: Array = self.at[end] - self.at[start]
        return result

    @property
    def instants_ns(self) -> NDArray[np.int64]:
        """The scrapes' instants, unix nanoseconds."""
        return self.epoch_ns + np.round(self.at * 1e9).astype(np.int64)

    @property
    def quiet(self) -> Flags:
        """Scrapes at which nothing runs, so that all counters agree."""
        result: Flags = (self.running + self.waiting < QUIET) & (self.resting < AT_REST)
        return result


def series_of(observed: Observed, epoch_ns: int | None = None) -> Series:
    """The arrays of an observed replica; it must have a row."""
    rows = observed.rows
    start = rows[0].row.start_ns
    epoch = start if epoch_ns is None else epoch_ns
    # a point at each row's end, one before the first, and one more at the start of a row behind a gap
    ends, owners, whole = [start], [-1], [True]
    for number, one in enumerate(rows):
        if one.row.start_ns > ends[-1]:
            ends.append(one.row.start_ns)
            owners.append(-1)
            whole.append(False)
        ends.append(one.row.end_ns)
        owners.append(number)
        whole.append(not one.row.flags & (RESET | BORN | GAUGES_UNKNOWN | IDENTITY_BROKEN))
    points = np.array(owners)
    at = (np.array(ends, dtype=np.int64) - epoch) / 1e9
    totals, missing, known = _totals(rows, points)
    histograms = {name: found for name in HISTOGRAMS if (found := _histogram(name, rows, points)) is not None}
    worked, worked_known = _evidence(observed.worked, rows, points)
    tensor, _ = _evidence(observed.tensor, rows, points)
    clocked, _ = _evidence(observed.clocked, rows, points)
    caches, instants = observed.caches, np.array(ends)
    connectors = {replica.connector for replica in observed.replicas.values()} - {""}
    has_outer = any(caches.values()) or totals["external_tokens"][-1] > 0
    sound = np.array(whole) & known
    return Series(
        epoch,
        at,
        totals,
        histograms,
        sound,
        _gauge(rows, points, "running_requests"),
        _gauge(rows, points, "waiting_requests"),
        _gauge(rows, points, "waiting_for_capacity"),
        worked,
        worked_known,
        tensor,
        clocked,
        _cache_seconds(caches, instants, totals["external_tokens"], _load_ns),
        _cache_seconds(caches, instants, totals["computed_tokens"], _store_ns),
        _resting(observed.worked, ends),
        missing,
        any(one.row.value("waiting_for_capacity") is not None for one in rows),
        _told(caches, instants, _load_ns),
        _told(caches, instants, _store_ns),
        bool(connectors - HANDING_ON) if connectors else has_outer,
        hits=_hits(caches, instants),
    )


def _load_ns(span: CacheSpan) -> int | None:
    return span.load_ns


def _store_ns(span: CacheSpan) -> int | None:
    return span.store_ns


def _told(
    caches: Mapping[str, Sequence[CacheSpan]],
    ends: NDArray[np.int64],
    seconds_ns: Callable[[CacheSpan], int | None],
) -> Flags:
    """Whether a cache tells what it took in the intervals that end at the points."""
    told = [span for spans in caches.values() for span in spans if seconds_ns(span) is not None]
    margin_ns = round(_TELLING_SECONDS * 1e9)
    # more have begun than are over
    starts = np.sort(np.array([span.start_ns - margin_ns for span in told], dtype=np.int64))
    over = np.sort(np.array([span.end_ns + margin_ns for span in told], dtype=np.int64))
    begun, ended = np.searchsorted(starts, ends, "left"), np.searchsorted(over, ends - _TOGETHER_NS, "right")
    result: Flags = begun > ended
    return result


def _totals(rows: Sequence[ObservedRow], points: Index) -> tuple[dict[str, Array], tuple[str, ...], Flags]:
    """Cumulative quantities, the needed ones that no row tells, and where every needed one is known."""
    totals: dict[str, Array] = {}
    missing: list[str] = []
    known = np.ones(len(points), dtype=bool)
    for name in (*NEEDED, *OPTIONAL):
        values = [one.row.value(name) for one in rows]
        scale = 1e9 if name.endswith("_ns") else 1.0
        totals[name.removesuffix("_ns")] = _cumulative([(value or 0) / scale for value in values], points)
        if name in NEEDED:
            told = np.array([value is not None for value in values])
            if not told.any():
                missing.append(name)
            known &= np.where(points >= 0, told[points], True)
    for name in (FINISHED_PROMPT, *MFU, *ADMITTED):
        if any(one.details is not None and name in one.details for one in rows):
            totals[name] = _cumulative([(one.details or {}).get(name, 0) for one in rows], points)
    if FINISHED_PROMPT not in totals:
        missing.append(FINISHED_PROMPT)
        totals[FINISHED_PROMPT] = np.zeros(len(points))
    return totals, tuple(missing), known


def _cumulative(values: Sequence[float], points: Index) -> Array:
    """Values of rows as a running sum at the points."""
    steps = np.where(points >= 0, np.array(values, dtype=np.float64)[points], 0.0)
    result: Array = np.cumsum(steps)
    return result


def _histogram(name: str, rows: Sequence[ObservedRow], points: Index) -> Histogram | None:
    prefix = f"{name}_le_"
    names = {key for one in rows if one.details for key in one.details if key.startswith(prefix)}
    if not names:
        return None
    edges = sorted((float(key.removeprefix(prefix)), key) for key in names)
    counts = [_cumulative([(one.details or {}).get(key, 0) for one in rows], points) for _, key in edges]
    return Histogram(np.array([edge for edge, _ in edges]), np.stack(counts, axis=1))


def _gauge(rows: Sequence[ObservedRow], points: Index, name: str) -> Array:
    """A gauge at the points; before a row that begins busy, one request is taken to run."""
    values = []
    for at, number in enumerate(points):
        if number >= 0:
            values.append(float(rows[number].row.value(name) or 0))
        else:
            following = rows[points[at + 1]].row if at + 1 < len(points) else rows[0].row
            if name == "waiting_for_capacity":  # nobody saw who waited there: as at the interval's end
                values.append(float(following.value(name) or 0))
            else:
                values.append(float(name == "running_requests" and bool(following.flags & BUSY_AT_START)))
    return np.array(values)


def _evidence(timeline: Timeline | None, rows: Sequence[ObservedRow], points: Index) -> tuple[Array, Flags]:
    """Cumulative amounts at the points (1e9 parts as one), and where each interval's is known."""
    if timeline is None:
        return np.zeros(len(points)), np.zeros(len(points), dtype=bool)
    amounts = [timeline.over(one.row.start_ns, one.row.end_ns) for one in rows]
    known = np.array([amount is not None for amount in amounts])
    return _cumulative([(amount or 0.0) / 1e9 for amount in amounts], points), np.where(
        points >= 0, known[points], True
    )


def _resting(timeline: Timeline | None, ends: Sequence[int]) -> Array:
    """Share of work in the quarter of a second after each scrape, as finely as the samples tell."""
    if timeline is None:
        return np.zeros(len(ends))
    after = 250_000_000
    return np.array([(timeline.over(end, end + after) or 0.0) / after for end in ends])


def _cache_seconds(
    caches: Mapping[str, Sequence[CacheSpan]],
    ends: NDArray[np.int64],
    work: Array,
    seconds_ns: Callable[[CacheSpan], int | None],
) -> Array:
    """Cumulative seconds of the outer tiers at the points.

    LMCache reports in bursts (every 10 s): a burst is spread over the work since the one before. Several workers of
    one engine load side by side: the slowest one's seconds are the engine's.
    """
    total = np.zeros(len(ends))
    for spans in caches.values():
        raw = np.zeros(len(ends))
        for span in spans:
            amount = seconds_ns(span) or 0
            place = int(np.searchsorted(ends, span.end_ns - _TOGETHER_NS, "left"))
            if amount and 0 < place < len(raw):
                raw[place] += amount / 1e9
        reported = np.cumsum(raw)
        before = 0
        for place in [*np.flatnonzero(raw), len(raw) - 1]:
            done = work[before : place + 1] - work[before]
            share = done / done[-1] if done[-1] > 0 else np.linspace(0, 1, place - before + 1)
            reported[before : place + 1] = reported[before] + (reported[place] - reported[before]) * share
            before = int(place)
        total = np.maximum(total, reported)
    return total


def _hits(caches: Mapping[str, Sequence[CacheSpan]], ends: NDArray[np.int64]) -> Hits | None:
    """Hits by tier, as they were reported; several pages of one cache repeat each other, so that one of them counts."""
    best: Hits | None = None
    for spans in caches.values():
        dram, disk, told = np.zeros(len(ends)), np.zeros(len(ends)), np.zeros(len(ends), dtype=bool)
        for span in spans:
            told[1:] |= (ends[:-1] < span.end_ns) & (ends[1:] > span.start_ns)
            place = int(np.searchsorted(ends, span.end_ns - _TOGETHER_NS, "left"))
            if 0 < place < len(ends):
                dram[place] += span.dram_hit_tokens or 0
                disk[place] += span.disk_hit_tokens or 0
        tells = any(None not in {span.dram_hit_tokens, span.disk_hit_tokens} for span in spans)
        if tells and (best is None or (dram + disk).sum() > best.dram[-1] + best.disk[-1]):
            best = Hits(np.cumsum(dram), np.cumsum(disk), told)
    return best
