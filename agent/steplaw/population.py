"""The requests behind the counters: (prompt, reused) pairs as far as histograms tell them (METHOD 4.4).

The joint distribution of prompt length and computed length is in no counter. It is bounded by three couplings:
`together` (long prompts compute much), `apart` (long prompts compute little) and `mixed` (neither).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.series import Histogram, Logged, Series

    Array = NDArray[np.float64]
    Index = NDArray[np.intp]

Coupling = Literal["together", "mixed", "apart"]
COUPLINGS: tuple[Coupling, ...] = ("together", "mixed", "apart")
MOST_POINTS = 64  # that stand for the requests of one piece
BISECTIONS = 48
LEAST_LOGGED = 0.9  # of the requests that the engine counted, for a log to stand for them
_SHIFT = 6.0  # of the log exponent that tilts points inside their buckets


class Population(NamedTuple):
    """Points, each for `weight` requests, in `piece`; tokens."""

    piece: Index
    weight: Array
    prompt: Array
    reused: Array
    reused_hbm: Array

    @property
    def computed(self) -> Array:
        """Tokens that were not reused."""
        result: Array = self.prompt - self.reused
        return result


class Points(NamedTuple):
    """Points that stand for requests: the piece of each and its rank there, and how many points each piece has."""

    piece: Index
    rank: Index
    each: Index


def points_of(each: Index) -> Points:
    """So many points for each piece, one piece after the other."""
    piece = np.repeat(np.arange(len(each)), each)
    return Points(piece, np.arange(len(piece)) - np.repeat(np.cumsum(each) - each, each), each)


def agreement(series: Series) -> NDArray[np.bool_]:
    """Scrapes at which as many requests finished as gave a first token, with the same prompt tokens in sum.

    A request that its client aborts never ticks the families of finished requests: what is behind at quiet scrapes is
    carried along.
    """
    finished, prompts = finished_with_aborted(series)
    agree: NDArray[np.bool_] = (np.abs(finished - series.totals["first_tokens"]) < 0.5) & (  # noqa: PLR2004  # counts
        np.abs(prompts - series.totals["prompt_tokens"]) < 1
    )
    return agree


def finished_with_aborted(series: Series) -> tuple[Array, Array]:
    """Finished requests and their prompt tokens, both with those of aborted ones."""
    pairs = (("finished_requests", "first_tokens"), ("finished_prompt_tokens", "prompt_tokens"))
    joined = []
    for late, early in pairs:
        behind = np.where(series.quiet, np.maximum(series.totals[early] - series.totals[late], 0), 0)
        joined.append(series.totals[late] + np.maximum.accumulate(behind))
    return joined[0], joined[1]


def pieces_of(starts: Index, ends: Index, agree: NDArray[np.bool_]) -> tuple[Index, Index, Index]:
    """Windows cut at the scrapes where the counters agree: starts, ends, and the window each piece is of."""
    at = np.flatnonzero(agree)
    first, last, window = [], [], []
    for number, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        inside = at[np.searchsorted(at, start, "right") : np.searchsorted(at, end, "left")].tolist()
        cuts = [start, *inside, end]
        first += cuts[:-1]
        last += cuts[1:]
        window += [number] * (len(cuts) - 1)
    return np.array(first, dtype=np.intp), np.array(last, dtype=np.intp), np.array(window, dtype=np.intp)


def populations(series: Series, starts: Index, ends: Index, couplings: tuple[Coupling, ...]) -> list[Population]:
    """The requests whose first token fell between scrapes, one population per coupling.

    Histograms tick when a request finishes: they are read at the same count, not at the same time.
    """
    first, prompt = series.over("first_tokens", starts, ends), series.over("prompt_tokens", starts, ends)
    hbm, outer = series.over("hbm_tokens", starts, ends), series.over("external_tokens", starts, ends)
    kept = np.flatnonzero((np.round(first) >= 1) & (prompt > 0))
    count = np.round(first[kept])
    points = points_of(np.minimum(count, MOST_POINTS).astype(np.intp))
    piece = points.piece
    weight = (count / points.each)[piece]
    if series.logged is not None:
        exact = _logged(series, series.logged, starts[kept], ends[kept], kept)
        if exact is not None:
            return [exact] * len(couplings)
    lengths = _lengths(series, "request_prompt_tokens", (starts[kept], ends[kept]), prompt[kept], points)
    reused = np.minimum(hbm + outer, prompt)[kept]
    computed_total = np.maximum(prompt[kept] - reused, count)
    computed = _lengths(series, "request_computed_tokens", (starts[kept], ends[kept]), computed_total, points)
    computed = np.maximum(computed, 1.0)
    of_hbm = np.divide(hbm[kept], (hbm + outer)[kept], out=np.zeros(len(kept)), where=reused > 0)
    populations = []
    for coupling in couplings:
        paired = _paired(computed, coupling, points)
        paired = _fitted(paired, lengths, weight, piece, len(kept))
        left = np.maximum(lengths - paired, 0.0)
        sums = np.bincount(piece, left * weight, len(kept))
        scale = np.divide(reused, sums, out=np.zeros(len(kept)), where=(sums > 0) & (reused >= 1))
        shared = np.minimum(left * scale[piece], np.maximum(lengths - 1, 0.0))
        populations.append(Population(kept[piece], weight, lengths, shared, shared * of_hbm[piece]))
    return populations


def _logged(series: Series, log: Logged, starts: Index, ends: Index, kept: Index) -> Population | None:
    """The requests of a log, weighted to the counts; None where it lacks more than a tenth of them.

    Pieces may overlap: a request is in each in which its first token came. Where the log does not tell HBM from the
    outer tiers, every request gets its piece's shares; reuse that a piece counted no hit for, those of all pieces.
    """
    # laid on the engine's clock, every request inside the span that counted it
    place = np.searchsorted(log.first_token - series.epoch_ns / 1e9, series.at, "right")
    points = points_of(place[ends] - place[starts])
    piece, inside = points.piece, place[starts][points.piece] + points.rank
    begun = np.round(series.over("first_tokens", starts, ends))
    if len(piece) < LEAST_LOGGED * begun.sum():
        return None
    # pieces of a log that lacks a few requests may lack different ones: the weight is common to all
    weight = np.full(len(piece), begun.sum() / max(len(piece), 1))
    hbm, outer = series.over("hbm_tokens", starts, ends), series.over("external_tokens", starts, ends)
    total = float((hbm + outer).sum())
    prompt = log.prompt[inside]
    reused = _summing(np.minimum(log.reused[inside], prompt - 1), weight, total, prompt - 1)
    if not outer.sum():
        return Population(kept[piece], weight, prompt, reused, reused)
    overall = np.full(len(starts), float(hbm.sum()) / total)
    share = np.divide(hbm, hbm + outer, out=overall, where=hbm + outer > 0)[piece]
    loaded = log.outer[inside]
    from_hbm = np.where(np.isnan(loaded), reused * share, np.clip(log.reused[inside] - loaded, 0.0, reused))
    return Population(kept[piece], weight, prompt, reused, _summing(from_hbm, weight, float(hbm.sum()), reused))


def _summing(values: Array, weight: Array, total: float, most: Array) -> Array:
    """Values in the same proportions that sum to what was counted, none of them beyond its own most."""
    found = float((values * weight).sum())
    scaled: Array = np.minimum(values * (total / found), most) if found > 0 else values
    return scaled


def _lengths(series: Series, name: str, span: tuple[Index, Index], totals: Array, points: Points) -> Array:
    """Equal-weight points of a histogram between two counts, which sum to the exact total."""
    starts, ends = span
    requests = np.maximum(np.round(series.over("first_tokens", starts, ends)), 1)
    histogram = series.histograms.get(name)
    if histogram is None or not len(points.piece):
        return (totals / requests)[points.piece]
    finished, _ = finished_with_aborted(series)
    begun = series.totals["first_tokens"]
    counts = _at_count(histogram, finished, begun[ends]) - _at_count(histogram, finished, begun[starts])
    return expanded(histogram.edges, np.maximum(counts, 0.0), totals * points.each / requests, points)


def _at_count(histogram: Histogram, finished: Array, count: Array) -> Array:
    """A histogram's cumulative buckets at the moment when so many requests had finished."""
    distinct, last = np.unique(finished, return_index=True)
    # of scrapes with the same count, the first: later ones are the same
    place = np.clip(np.searchsorted(distinct, count, "right") - 1, 0, max(len(distinct) - 2, 0))
    following = np.minimum(place + 1, len(distinct) - 1)
    span = np.maximum(distinct[following] - distinct[place], 1e-9)
    share = np.clip((count - distinct[place]) / span, 0.0, 1.0)[:, None]
    low, high = histogram.counts[last[place]], histogram.counts[last[following]]
    result: Array = low + (high - low) * share
    return result


def expanded(edges: Array, counts: Array, sums: Array, points: Points) -> Array:
    """Points of several histograms at once: log-uniform in their buckets, tilted inside them until they sum to `sums`.

    edges       of the buckets, ascending, the last may be infinite
    counts      of each histogram (row) by bucket; one that is empty gives its mean
    """
    piece, each = points.piece, points.each
    total = counts.sum(axis=1)
    lower = np.concatenate([[0.5], edges[:-1]])
    upper = np.where(np.isfinite(edges), edges, 3 * np.maximum(lower, 1.0))
    cumulative = np.cumsum(counts, axis=1) / np.maximum(total, 1e-12)[:, None]
    share = (points.rank + 0.5) / each[piece]
    bucket = np.minimum((cumulative[piece] < share[:, None] - 1e-9).sum(axis=1), len(edges) - 1)
    width = counts[piece, bucket] / np.maximum(total, 1e-12)[piece]
    below = cumulative[piece, bucket] - width
    within = np.clip((share - below) / np.maximum(width, 1e-12), 0.01, 0.99)
    low, ratio = lower[bucket], upper[bucket] / lower[bucket]
    floor, ceiling = np.full(len(each), -_SHIFT), np.full(len(each), _SHIFT)
    for _ in range(BISECTIONS):
        middle = (floor + ceiling) / 2
        values = low * ratio ** (within ** np.exp(middle[piece]))
        above = np.bincount(piece, values, len(each)) > sums
        # a larger exponent lowers the points
        floor, ceiling = np.where(above, middle, floor), np.where(above, ceiling, middle)
    values = low * ratio ** (within ** np.exp(((floor + ceiling) / 2)[piece]))
    reached = np.bincount(piece, values, len(each))
    scaled = values * np.divide(sums, reached, out=np.zeros(len(each)), where=reached > 0)[piece]
    result: Array = np.where(total[piece] > 0, scaled, (sums / each)[piece])
    return result


def _paired(values: Array, coupling: Coupling, points: Points) -> Array:
    """The values, which ascend in each piece, in the order that a coupling gives them."""
    if coupling == "together":
        return values
    piece, each = points.piece, points.each
    if coupling == "apart":
        order = (np.cumsum(each) - 1)[piece] - points.rank
    else:
        # a fixed shuffle: the same data give the same figure
        order = np.lexsort((np.random.default_rng(0).random(len(values)), piece))
    shuffled: Array = values[order]
    return shuffled


def _fitted(computed: Array, lengths: Array, weight: Array, piece: Index, pieces: int) -> Array:
    """No request computes more than its prompt: what does not fit goes to the others of its piece."""
    for _ in range(8):
        beyond = np.bincount(piece, np.maximum(computed - lengths, 0.0) * weight, pieces)
        computed = np.minimum(computed, lengths)
        room = lengths - computed
        rooms = np.bincount(piece, room * weight, pieces)
        share = np.minimum(1.0, np.divide(beyond, rooms, out=np.zeros(pieces), where=rooms > 0))
        if not share.any():
            break
        computed = computed + room * share[piece]
    return computed
