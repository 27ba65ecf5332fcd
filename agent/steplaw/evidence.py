"""What a replica's counters say of its law: windows of work, and requests that ran alone, with the prefills in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.steplaw.chunks import budget_of, chunked, clock_of
from kvtally.agent.steplaw.population import agreement, pieces_of, populations
from kvtally.agent.steplaw.windows import Windows, chosen, cut, describe, joined, least_seconds, singles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.windows import Described

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

MOST_WINDOWS = 240  # of each kind that are looked at: more would say the same
LEAST_WORK = 0.05  # seconds, for a window to tell of work
RELATIVE_ERROR = 0.04  # of measured work, and a floor in seconds
SATURATED = 0.6  # share of the time with work, for wall seconds to be the law's
EDGE_COST = 0.6  # METHOD 4.2: efficiency at which a prefill cut by a window's edge is valued


class Probe(NamedTuple):
    """A cold or nearly cold request that ran alone: its tokens and the seconds of its prefill."""

    prompt_tokens: float
    reused_tokens: float
    seconds: float
    relative_error: float


class Rows(NamedTuple):
    """Chunks of all windows' prefills, with what surrounds them."""

    window: Index
    tokens: Array
    products: Array
    context: Array
    weight: Array
    clock: Array


class Evidence(NamedTuple):
    """Windows of one or several replicas with their prefills.

    single, saturated   which windows' wall seconds the law must meet as well
    decode_steps        steps without prefill
    error               seconds, of the measured work
    ambiguity           seconds that the unknown joint distribution of prompt and computed tokens may make
    """

    rows: Rows
    told: Described
    single: Flags
    saturated: Flags
    decode_steps: Array
    error: Array
    ambiguity: Array
    is_cpu: bool


def evidence_of(machine: Machine, series: Series, start: int, end: int, clock: float) -> Evidence | None:
    """What the scrapes from `start` to `end` say; None if nothing."""
    spans = cut(series, start, end, least_seconds(machine, series))
    alone = singles(series, start, end)
    alone = chosen(alone, describe(machine, series, alone, clock).is_alone)
    told = describe(machine, series, spans, clock)
    worked = _sound(series, spans) & told.is_worked_known & (told.worked >= LEAST_WORK)
    spans = _thinned(chosen(spans, worked))
    windows = joined(spans, _thinned(alone))
    if not len(windows.start):
        return None
    told = describe(machine, series, windows, clock)
    rows, nonfinal, ambiguity = _rows(machine, series, windows, told, clock)
    decode_steps = np.maximum(told.steps - told.finals - told.occupancy * nonfinal, 0.0)
    edge = 0.5 * told.computed_mean * machine.linear_flop / (EDGE_COST * machine.flops)
    # a preempted request computes again what no counter shows: its prompt, or less where it is still cached
    again = told.preemptions * told.prompt_mean * machine.token_seconds / 2
    error = np.sqrt((RELATIVE_ERROR * told.worked) ** 2 + RELATIVE_ERROR**2 + windows.cut * edge**2 + again**2)
    saturated = ~windows.single & told.is_saturated & (told.worked > SATURATED * told.seconds)
    if machine.is_cpu:
        saturated = ~windows.single & told.is_saturated
    return Evidence(rows, told, windows.single, saturated, decode_steps, error, ambiguity, machine.is_cpu)


def _sound(series: Series, windows: Windows) -> Flags:
    total = np.concatenate([[0], np.cumsum(series.sound)])
    result: Flags = total[windows.end + 1] - total[windows.start + 1] == windows.end - windows.start
    return result


def _thinned(windows: Windows) -> Windows:
    """At most MOST_WINDOWS of them, evenly over time."""
    count = len(windows.start)
    if count <= MOST_WINDOWS:
        return windows
    return chosen(windows, np.unique(np.linspace(0, count - 1, MOST_WINDOWS).astype(np.intp)))


def _rows(
    machine: Machine, series: Series, windows: Windows, told: Described, clock: float
) -> tuple[Rows, Array, Array]:
    """The prefills' chunks, chunks that end no prefill per window, and the ambiguity in seconds."""
    count = len(windows.start)
    first, last, window_of = pieces_of(windows.start, windows.end, agreement(series))
    together, mixed, apart = populations(series, first, last, ("together", "mixed", "apart"))
    window = window_of[mixed.piece]
    decodes = told.occupancy * told.decodes
    budget = budget_of(machine, told.occupancy, told.decodes)[window]
    parts = chunked(mixed.prompt, mixed.reused, budget, told.packing[window])
    of = window[parts.request]
    weight = mixed.weight[parts.request] / parts.sharing
    rows = Rows(
        of,
        parts.tokens * parts.sharing + decodes[of],
        parts.products * parts.sharing,
        told.occupancy[of] * told.context[of],
        weight,
        clock_of(machine, parts.tokens, told.clock[of], clock),
    )
    chunks = np.bincount(of, mixed.weight[parts.request], count)
    nonfinal = np.maximum(chunks - np.bincount(window, mixed.weight, count), 0.0)
    spread = [np.bincount(window, one.weight * (one.prompt**2 - one.reused**2) / 2, count) for one in (together, apart)]
    efficiency = 0.5
    ambiguity = np.abs(spread[0] - spread[1]) / 2 * machine.attention_flop / (efficiency * machine.attention_flops)
    return rows, nonfinal, ambiguity
