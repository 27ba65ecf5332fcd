"""Stretches of time between scrapes, and what happened in them as far as counters say (METHOD 4.3)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Series

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

SHORTEST_SECONDS = 6.0
QUIET_SECONDS = 3.0  # between quiet scrapes a window may be this short: its edges cut nothing
PREFILLS = 16  # a window lasts at least this many mean prefills, so that its edges weigh little
MOST_TOGETHER = 4  # requests of a span that is taken for one at a time
NEAR_SECONDS = 7.0  # over which the clock of a single request is averaged: one sample of it is noise
CONTEXT_SECONDS = 30.0  # on either side of a window, over which the length of contexts is averaged
CLOCK_PRIOR, CLOCK_PRIOR_SECONDS = 0.88, 3.0
HARD = 0.5  # share of the time in which the tensor pipes work: what counts as load
CLOCK_LEAST_SECONDS = 0.05  # of tensor work, for a clock under load to be told
# a step whose tokens are beyond this many times the running decodes held the end of a prefill (METHOD 4.3)
DECODES_FACTOR, DECODES_MARGIN = 1.6, 12.0


class Windows(NamedTuple):
    """Windows between the scrapes `start` and `end`; `cut` counts the edges at which something ran."""

    start: Index
    end: Index
    cut: Array
    single: Flags


class Described(NamedTuple):
    """What each window did; tokens, counts, seconds.

    decodes     mean decodes in a step
    occupancy   probability that decodes run when a prefill comes (METHOD section 3, rho)
    finals      steps in which a prefill ended, and how many prefills such a step holds
    context     context tokens that the decodes of a step read
    clock       share of the reference clock
    """

    seconds: Array
    first: Array
    steps: Array
    decodes: Array
    occupancy: Array
    finals: Array
    packing: Array
    context: Array
    clock: Array
    worked: Array
    is_worked_known: Flags
    is_saturated: Flags
    is_alone: Flags
    prefill: Array
    loads: Array
    stores: Array
    computed_mean: Array
    prompt_mean: Array
    preemptions: Array


def least_seconds(machine: Machine, series: Series) -> float:
    """How long a window is at least: several prefills of this load."""
    first = series.totals["first_tokens"]
    computed = series.totals["computed_tokens"]
    mean = float(computed[-1] - computed[0]) / max(float(first[-1] - first[0]), 1.0)
    return max(SHORTEST_SECONDS, PREFILLS * mean * machine.token_seconds)


def cut(series: Series, start: int, end: int, least: float) -> Windows:
    """Windows of [start, end], cut at quiet scrapes and else after `least` seconds; idle ones are left out."""
    quiet, at = series.quiet, series.at
    first, steps = series.totals["first_tokens"], series.totals["steps"]
    shortest = min(least, QUIET_SECONDS)
    found: list[tuple[int, int]] = []
    begin = start
    for place in range(start + 1, end + 1):
        length = at[place] - at[begin]
        broken = not series.sound[place] or (place < end and not series.sound[place + 1])
        if broken or (quiet[place] and length >= shortest) or length >= least or place == end:
            if first[place] > first[begin] or steps[place] > steps[begin]:
                found.append((begin, place))
            begin = place
    return _windows(series, found, single=False)


def singles(series: Series, start: int, end: int) -> Windows:
    """The shortest spans in which every request that gave its first token also finished, a few at most."""
    first, finished = series.totals["first_tokens"], series.totals["finished_requests"]
    prompt, late = series.totals["prompt_tokens"], series.totals["finished_prompt_tokens"]
    found: list[tuple[int, int]] = []
    begin: int | None = None
    previous = start
    for place in range(start + 1, end + 1):
        if not series.sound[place]:
            begin, previous = None, place
            continue
        begin = previous if begin is None else begin
        previous = place
        begun = first[place] - first[begin]
        ended = finished[place] - finished[begin]
        agree = begun == ended and abs((prompt[place] - prompt[begin]) - (late[place] - late[begin])) < 1
        if begun == 0 and ended == 0:
            begin = place if place - begin >= MOST_TOGETHER else begin
        elif begun > 0 and agree:
            found.append((begin, place))
            begin = place
        elif begun > MOST_TOGETHER:
            begin = place
    return _windows(series, found, single=True)


def _windows(series: Series, found: list[tuple[int, int]], *, single: bool) -> Windows:
    pairs = np.array(found, dtype=np.intp).reshape(-1, 2)
    quiet = series.quiet
    edges = (~quiet[pairs[:, 0]]).astype(float) + (~quiet[pairs[:, 1]]).astype(float)
    return Windows(pairs[:, 0], pairs[:, 1], edges * (not single), np.full(len(pairs), single))


def joined(one: Windows, other: Windows) -> Windows:
    """Both, one after the other."""
    return Windows(
        np.concatenate([one.start, other.start]),
        np.concatenate([one.end, other.end]),
        np.concatenate([one.cut, other.cut]),
        np.concatenate([one.single, other.single]),
    )


def chosen(windows: Windows, keep: Index | Flags) -> Windows:
    """Some of the windows."""
    return Windows(windows.start[keep], windows.end[keep], windows.cut[keep], windows.single[keep])


def clock_under_load(machine: Machine, series: Series, start: Index, end: Index, default: float) -> Array:
    """SM clock while the tensor pipes worked, as a share of the reference; `default` where that is not told."""
    tensor = series.tensor[end] - series.tensor[start]
    weighted = series.tensor_mhz[end] - series.tensor_mhz[start]
    told = (tensor > CLOCK_LEAST_SECONDS) & (weighted > 0)
    if machine.clock_mhz is None:
        return np.ones(len(start))
    share = np.divide(weighted, tensor * machine.clock_mhz, out=np.full(len(start), default), where=told)
    result: Array = np.where(told, share, default)
    return result


def describe(machine: Machine, series: Series, windows: Windows, clock_default: float) -> Described:
    """What the windows did, from counter differences alone."""
    start, end = windows.start, windows.end

    def over(name: str) -> Array:
        return series.over(name, start, end)

    seconds = series.seconds(start, end)
    first, steps = over("first_tokens"), over("steps")
    finished, decode, prefill = over("finished_requests"), over("decode"), over("prefill")
    # PASTA: a prefill that arrives finds decodes running with this probability
    occupancy = 1 - np.exp(-first / seconds * decode / np.maximum(finished, 1))
    generated = over("generated_tokens")
    decoded = np.maximum(generated - first, 0.0)
    finals = _finals(series, windows, decoded / np.maximum(steps, 1), first)
    decodes = decoded / np.maximum(steps - (1 - occupancy) * finals, 1.0)
    length = _context_length(series, windows)
    near_start, near_end = start.copy(), end.copy()
    alone = windows.single
    near_start[alone] = np.maximum(np.searchsorted(series.at, series.at[start[alone]] - NEAR_SECONDS), 0)
    near_end[alone] = np.minimum(np.searchsorted(series.at, series.at[end[alone]] + NEAR_SECONDS), len(series.at) - 1)
    return Described(
        seconds,
        first,
        steps,
        decodes,
        occupancy,
        finals,
        np.where(finals > 0, np.maximum(np.divide(first, finals, out=np.ones(len(first)), where=finals > 0), 1), 1.0),
        decodes * length,
        clock_under_load(machine, series, near_start, near_end, clock_default),
        series.worked[end] - series.worked[start],
        _all_over(series.worked_known, start, end),
        _all_points(series.running + series.waiting > 0.5, start, end),  # noqa: PLR2004  # a request
        _alone(series, windows, first, finished, decoded),
        prefill,
        series.loads[end] - series.loads[start],
        series.stores[end] - series.stores[start],
        np.divide(over("computed_tokens"), first, out=np.zeros(len(first)), where=first > 0),
        np.divide(over("prompt_tokens"), first, out=np.zeros(len(first)), where=first > 0),
        over("preemptions"),
    )


def _context_length(series: Series, windows: Windows) -> Array:
    """Mean context of a running decode: the prompt, and what it has generated, taken from a minute around the window.

    A decode that is seen running is a long one more often than not: where lengths vary as they do (exponentially), it
    has generated a mean output by then (METHOD 4.3, Little).
    """
    start = np.searchsorted(series.at, series.at[windows.start] - CONTEXT_SECONDS)
    end = np.minimum(np.searchsorted(series.at, series.at[windows.end] + CONTEXT_SECONDS), len(series.at) - 1)
    start = np.minimum(start, windows.start)
    end = np.maximum(end, windows.end)
    tokens = series.over("prompt_tokens", start, end) + series.over("generated_tokens", start, end)
    first = series.over("first_tokens", start, end)
    whole = [float(series.totals[name][-1]) for name in ("prompt_tokens", "generated_tokens", "first_tokens")]
    overall = (whole[0] + whole[1]) / max(whole[2], 1.0)
    result: Array = np.where(first > 0, tokens / np.maximum(first, 1.0), overall)
    return result


def _finals(series: Series, windows: Windows, decodes: Array, first: Array) -> Array:
    """Steps in which a prefill ended: those with many more tokens than decodes run."""
    histogram = series.histograms.get("step_tokens")
    if histogram is None:
        return first
    counts = histogram.counts[windows.end] - histogram.counts[windows.start]
    lower = np.concatenate([[0.0], histogram.edges[:-1]])
    large = lower[None, :] >= (DECODES_FACTOR * decodes + DECODES_MARGIN)[:, None]
    result: Array = np.where(first > 0, np.clip((counts * large).sum(axis=1), first / 4, first), 0.0)
    return result


def _alone(series: Series, windows: Windows, first: Array, finished: Array, decoded: Array) -> Flags:
    """Windows whose prefills ran one at a time, so that their summed prefill seconds are wall seconds."""
    start, end = windows.start, windows.end
    seconds = series.seconds(start, end)
    prefill, queue = series.over("prefill", start, end), series.over("queue", start, end)
    decode, steps = series.over("decode", start, end), series.over("steps", start, end)
    prompt = series.over("prompt_tokens", start, end)
    late = series.over("finished_prompt_tokens", start, end)
    # a prefill longer than the window began before it: look back as far
    back = np.where(prefill * 1.1 > seconds, np.ceil(prefill * 1.1 / seconds * (end - start)), 0).astype(np.intp)
    since = np.maximum(start - back, 0)
    calm = ~_any_points((series.running > 1) | (series.waiting >= 1), since, end)
    calm &= queue < 0.02 * np.maximum(seconds, prefill)
    whole = (first >= 1) & (finished == first) & (np.abs(prompt - late) < 1)
    # no more than one token a step: nobody decoded beside
    plain = decoded <= 1.02 * (steps - 0.5)
    fits = (first == 1) | (prefill + decode <= 1.2 * seconds + 0.5 * prefill)
    result: Flags = calm & whole & plain & fits
    return result


def _running_sum(flags: Flags) -> Index:
    return np.concatenate([[0], np.cumsum(flags)]).astype(np.intp)


def _all_over(flags: Flags, start: Index, end: Index) -> Flags:
    """Whether every interval between the scrapes has the flag."""
    total = _running_sum(flags)
    result: Flags = total[end + 1] - total[start + 1] == end - start
    return result


def _all_points(flags: Flags, start: Index, end: Index) -> Flags:
    """Whether every scrape from start to end has the flag."""
    total = _running_sum(flags)
    result: Flags = total[end + 1] - total[start] == end - start + 1
    return result


def _any_points(flags: Flags, start: Index, end: Index) -> Flags:
    total = _running_sum(flags)
    result: Flags = total[end + 1] - total[start] > 0
    return result


def overall_clock(machine: Machine, series: Series) -> tuple[float, float]:
    """Clock under prefill as a share of the reference, and the tensor seconds behind it.

    Taken where the tensor pipes work most of the time: a lighter load shows the clock between its prefills. Large GPUs
    run into their power limit under prefill: ASSUMED 0.88 +- 0.06, as three seconds of evidence.
    """
    if machine.clock_mhz is None:
        return 1.0, math.inf
    tensor, weighted = np.diff(series.tensor), np.diff(series.tensor_mhz)
    busy = (tensor > HARD * np.diff(series.at)) & (weighted > 0)
    measured = float(tensor[busy].sum())
    clock = float(weighted[busy].sum()) / machine.clock_mhz
    return (clock + CLOCK_PRIOR_SECONDS * CLOCK_PRIOR) / (measured + CLOCK_PRIOR_SECONDS), measured
