"""Lays a log's requests into the spans between scrapes, in its own order and by the engine's counts alone.

The clock of a log is not the engine's, and the way to the client, or a log that tells when requests were sent, moves
them across scrapes. How many gave their first token until each scrape, with how many tokens, is counted: the log's
times tell only where to look.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.steplaw.population import points_of
from kvtally.agent.steplaw.series import Logged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtally.agent.steplaw.series import Series

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

CLOCK_SECONDS = 5.0  # that the log's clock, or its waits, may be off
MOST_APART = 300  # requests, for which a log is searched around where its clock says
NEARBY = 10  # spans on either side, over which clock and counts are compared
TIE = 0.01  # of a request's tokens for each request that the log's clock is gone against, where nothing else decides


class Laid(NamedTuple):
    """A log on the engine's clock, without what the engine did not count, and how well it fits.

    late        seconds that the log's clock is to be put on by
    misplaced   tokens that lie in other spans than the engine counted them in, as a share of its prompts
    reuse       reused share of the prompts by the log, less the engine's, where it lacks no request
    """

    log: Logged
    late: float
    misplaced: float
    reuse: float


class _Spans(NamedTuple):
    """Spans between scrapes in which first tokens came: unix seconds, requests before each, and what came in it.

    `anew`: behind a gap or a restart, so that the engine may have served requests that it did not count.
    """

    start: Array
    end: Array
    before: Index
    requests: Index
    prompt: Array
    reused: Array
    anew: Flags


def laid(log: Logged, series: Sequence[Series]) -> Laid:
    """The requests of a log that a replica's series, one after the other, counted: each inside the span it is of."""
    parts = [_spans(one) for one in series]
    # a version that came back has spans around those of another
    order = np.argsort(np.concatenate([one.start for one in parts]), kind="stable")
    spans = _Spans(*(np.concatenate(columns)[order] for columns in zip(*parts, strict=True)))
    spans = spans._replace(before=np.cumsum(spans.requests) - spans.requests)
    if not len(log.prompt) or not len(spans.requests):
        return Laid(Logged(*(column[:0] for column in log)), 0.0, 0.0, 0.0)
    first = spans.before + _offsets(log, spans)
    # where two spans ask for the same request, the one that the log lacks is of the first
    begin = np.clip(np.maximum.accumulate(first), 0, len(log.prompt))
    end = np.minimum(np.maximum(first + spans.requests, begin), np.append(begin[1:], len(log.prompt)))
    points = points_of(end - begin)
    span, row = points.piece, begin[points.piece] + points.rank
    found = Logged(*(column[row] for column in log))
    late = _late(found.first_token, spans.start[span], spans.end[span])
    margin = 1e-3 * (spans.end - spans.start)[span]
    on_time = np.clip(found.first_token + late, spans.start[span] + margin, spans.end[span] - margin)
    off = [
        np.bincount(span, values, len(counted)) - counted
        for values, counted in ((found.prompt, spans.prompt), (found.reused, spans.reused))
    ]
    total = max(float(spans.prompt.sum()), 1.0)
    # a log that lacks requests has too little in some spans: misplaced is what lies in one and is lacking in another
    misplaced = max(min(np.maximum(one, 0).sum(), np.maximum(-one, 0).sum()) for one in off) / total
    whole = points.each == spans.requests
    reuse = off[1][whole].sum() / max(spans.prompt[whole].sum(), 1.0)
    return Laid(found._replace(first_token=on_time), late, float(misplaced), float(reuse))


def _spans(series: Series) -> _Spans:
    counted = np.round(series.totals["first_tokens"]).astype(np.intp)
    reused = series.totals["hbm_tokens"] + series.totals["external_tokens"]
    last = np.flatnonzero(np.diff(counted) > 0) + 1
    breaks = np.cumsum(~series.sound)[last]
    at = series.at + series.epoch_ns / 1e9
    return _Spans(
        at[last - 1],
        at[last],
        counted[last - 1],
        np.diff(counted)[last - 1],
        np.diff(series.totals["prompt_tokens"])[last - 1],
        np.diff(reused)[last - 1],
        np.diff(breaks, prepend=-1) > 0,
    )


def _expected(log: Logged, spans: _Spans) -> Index:
    """How many more requests the log has had by its clock than the engine counted, around each span's end."""
    apart = np.searchsorted(log.first_token, spans.end, "right") - spans.before - spans.requests
    padded = np.pad(apart, NEARBY, mode="edge")
    steady = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * NEARBY + 1), axis=1)
    result: Index = np.round(steady).astype(np.intp)
    return result


def _offsets(log: Logged, spans: _Spans) -> Index:
    """How many requests the log has before each span beyond the engine's: what explains most tokens, changing least.

    A change is a request that the log lacks, or one that the engine did not count: it costs a mean prompt. The best
    of all ways through the spans is found as usual, from each offset to the best one before it.
    """
    middle = _expected(log, spans)
    busiest = float((spans.requests / np.maximum(spans.end - spans.start, 1.0)).max())
    reach = min(MOST_APART, math.ceil(busiest * CLOCK_SECONDS) + NEARBY)
    states = np.arange(2 * reach + 1)
    change = max(float(log.prompt.mean()), 1.0)
    by_clock = TIE * change * np.abs(states - reach)
    prompts, reuses = (np.concatenate([[0.0], np.cumsum(values)]) for values in (log.prompt, log.reused))
    came_from = np.empty((len(middle), len(states)), dtype=np.uint16)
    total = by_clock
    for number in range(len(middle)):
        if spans.anew[number] or not number:
            came_from[number] = total.argmin()
            total = total.min() + by_clock
        else:
            total, came_from[number] = _nearest(total, change, int(middle[number] - middle[number - 1]))
        first = spans.before[number] + middle[number] - reach + states
        begin, end = (np.clip(place, 0, len(log.prompt)) for place in (first, first + spans.requests[number]))
        total = total + np.abs(prompts[end] - prompts[begin] - spans.prompt[number])
        total += np.abs(reuses[end] - reuses[begin] - spans.reused[number])
    state = int(total.argmin())
    found = middle - reach
    for number in range(len(middle) - 1, -1, -1):
        found[number] += state
        state = int(came_from[number, state])
    return found


def _nearest(total: Array, change: float, moved: int) -> tuple[Array, Index]:
    """The least cost of each offset by way of those before, and the place of the best of them.

    `moved`: by how much offsets are larger than the ones that stood in the same places before.
    """
    places = np.arange(len(total))
    slope = change * places
    rising, falling = total - slope, (total + slope)[::-1]
    below, above = np.minimum.accumulate(rising), np.minimum.accumulate(falling)
    from_below = np.maximum.accumulate(np.where(rising == below, places, 0))
    from_above = places[-1] - np.maximum.accumulate(np.where(falling == above, places, 0))[::-1]
    below, above = below + slope, above[::-1] - slope
    wanted = places + moved
    reached = np.clip(wanted, 0, places[-1])
    origin: Index = np.where(above < below, from_above, from_below)[reached]
    least: Array = np.minimum(below, above)[reached] + change * np.abs(wanted - reached)
    return least, origin


def _late(at: Array, start: Array, end: Array) -> float:
    """Seconds to put a log's clock on by, so that most of its requests lie inside their spans; 0 where that is one."""
    edges = np.concatenate([start - at, end - at, [0.0]])
    order = np.argsort(edges, kind="stable")
    inside = np.cumsum(np.repeat([1.0, -1.0, 0.0], [len(at), len(at), 1])[order])
    best = int(inside.argmax())
    if inside[order == len(edges) - 1] == inside[best]:
        return 0.0
    return float(edges[order[best]] + edges[order[best + 1]]) / 2
