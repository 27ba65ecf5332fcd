"""How much of what was avoided fell into time in which requests waited for capacity (METHOD section 3, kappa).

A gauge tells it at the scrapes alone: a wait of two seconds is seen by one scrape in three at 5 s, and then stands for
ten seconds. So each interval at whose ends the gauge differs is half in doubt, and the engine's queue seconds, which
are summed and not sampled, say how much may have been missed: where no request queued, none waited.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.series import Series

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

HALF = 0.5
_LEAST_QUEUED_SECONDS = 1e-4  # of an interval: what is less is the time that a look at the queue takes


class Short(NamedTuple):
    """Of each interval between scrapes, what part of it requests waited for capacity.

    share       the best guess
    variance    of it: all of the interval or nothing of it, with a chance
    most        what part of it cannot be excluded
    """

    share: Array
    variance: Array
    most: Array


class Bound(NamedTuple):
    """Of an amount, what fell into that time: the best guess, its variance, and how much more it may be."""

    point: float
    variance: float
    missed: float


def short_of_capacity(series: Series, start: int, end: int) -> Short:
    """The intervals between the scrapes `start` and `end`."""
    waits = (series.starved[start : end + 1] > 0).astype(np.float64)
    before, after = waits[:-1], waits[1:]
    lengths = np.diff(series.at[start : end + 1])
    queued = np.diff(queue_seconds(series)[start : end + 1])
    # a request that was preempted waits again, in no sum of queue seconds
    preempted = np.diff(series.totals["preemptions"][start : end + 1]) > 0
    open_share = np.divide(queued, lengths, out=np.zeros(len(lengths)), where=lengths > 0)
    open_share = np.where(preempted, 1.0, np.clip(open_share, 0.0, 1.0))
    is_edge = before != after
    share = (before + after) * HALF
    # so many requests that wait, fewer and fewer, take half of that many queue seconds a second
    waiting = series.waiting[start : end + 1] * waits
    by_queue = np.divide(2 * queued, lengths * np.maximum(np.maximum(waiting[:-1], waiting[1:]), 1.0))
    is_told = is_edge & ~preempted & (queued > 0)  # of those that still wait nothing is summed yet
    share = np.where(is_told, np.minimum(share, by_queue), share)
    chance = np.where(is_edge, HALF, np.where(after > 0, 0.0, np.minimum(open_share, HALF)))
    most = np.where((before > 0) | (after > 0), 1.0, open_share)
    return Short(share, chance * (1 - chance), most)


def queue_seconds(series: Series) -> Array:
    """Seconds that requests queued, cumulative at the scrapes, when they did and not when they finished.

    A request's are counted as it finishes: by then prefill and decode lie behind it, their mean in the interval.
    """
    done = np.diff(series.totals["finished_requests"])
    queued = np.diff(series.totals["queue"])
    served = np.diff(series.totals["prefill"]) + np.diff(series.totals["decode"])
    place = np.flatnonzero((done > 0) & (queued > _LEAST_QUEUED_SECONDS))
    if not len(place):
        return np.zeros(len(series.at))
    service, wait = served[place] / done[place], queued[place] / done[place]
    begin, over = series.at[place] - service - wait, series.at[place + 1] - service
    rate = queued[place] / (over - begin)
    marks = np.concatenate([begin, over])
    order = np.argsort(marks, kind="stable")
    marks, rates = marks[order], np.cumsum(np.concatenate([rate, -rate])[order])
    total = np.concatenate([[0.0], np.cumsum(rates[:-1] * np.diff(marks))])
    result: Array = np.interp(series.at, marks, total)
    return result


def bound_of(short: Short, amounts: Array) -> Bound:
    """Of an amount in each interval, what fell into time of short capacity."""
    point = float((amounts * short.share).sum())
    most = float((amounts * np.maximum(short.most, short.share)).sum())
    return Bound(point, float((amounts**2 * short.variance).sum()), max(most - point, 0.0))


def spread(series: Series, start: Index, end: Index, amounts: Array, span: tuple[int, int]) -> Array:
    """Amounts of windows by interval of the span: with their reused tokens, else with their time."""
    reused = series.totals["hbm_tokens"] + series.totals["external_tokens"]
    result = np.zeros(span[1] - span[0])
    for first, last, amount in zip(start.tolist(), end.tolist(), amounts.tolist(), strict=True):
        weight = np.diff(reused[first : last + 1])
        if weight.sum() <= 0:
            weight = np.diff(series.at[first : last + 1])
        result[first - span[0] : last - span[0]] += amount * weight / weight.sum()
    return result
