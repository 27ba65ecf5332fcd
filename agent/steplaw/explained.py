"""What stands behind a span's worth, taken apart: its requests by class, and one of them with its surroundings."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.steplaw.chunks import budget_of
from kvtally.agent.steplaw.mfu import coupling_share
from kvtally.agent.steplaw.windows import cut, least_seconds
from kvtally.agent.steplaw.worth import MIXED, Law, load_of, marginal
from kvtally.agent.worth import A_TOKEN

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.worth import Load
    from kvtally.agent.worth import Three

    Array = NDArray[np.float64]
    Instants = NDArray[np.int64]

MOST_CLASSES = 8
LEAST_EDGE = 256.0  # tokens: classes are cut at this and its doubles


class Requests(NamedTuple):
    """The requests of a span as points under the coupling `mixed`.

    nothing, actual   engine-seconds of a point's prefills with no reuse, and as they were
    avoided           of all requests under each coupling (together, mixed, apart)
    position          where between apart (0) and together (1) MFU counters place them; None where they do not tell
    """

    machine: Machine
    calibration: Calibration
    load: Load
    span_ns: tuple[Instants, Instants]
    weight: Array
    prompt: Array
    reused: Array
    nothing: Array
    actual: Array
    avoided: Three
    position: float | None


class RequestClass(NamedTuple):
    """Requests that reused from `low` up to below `high` tokens: how many, their means, and their engine-seconds.

    nothing, actual   with no reuse, and as they were
    """

    low: float
    high: float
    requests: float
    prompt_tokens: float
    reused_tokens: float
    nothing: float
    actual: float


class Example(NamedTuple):
    """One request, and the steps that it met; tokens, seconds, unix nanoseconds.

    avoided         engine-seconds that its reuse avoided by the law, unrounded
    decodes, context, occupancy   decodes in a step, the context that they read, and how likely they run at all
    packing         prefills that share a step, where its budget lets them
    budget          tokens that a step leaves to prefill
    window_clock, loaded_clock   SM clock as a share of the reference: in its window, and under a large chunk
    """

    machine: Machine
    calibration: Calibration
    start_ns: int
    end_ns: int
    prompt_tokens: float
    reused_tokens: float
    avoided: float
    decodes: float
    context: float
    occupancy: float
    packing: float
    budget: float
    window_clock: float
    loaded_clock: float


def requests_of(machine: Machine, series: Series, start: int, end: int, calibration: Calibration) -> Requests | None:
    """The requests between the scrapes `start` and `end` as `worth` values them; None of a span without work."""
    windows = cut(series, start, end, least_seconds(machine, series))
    if not len(windows.start):
        return None
    load = load_of(machine, series, windows, calibration.clock)
    law = Law(np.array(calibration.medians), calibration.clock)
    sides = []
    for people in load.populations:
        nothing = marginal(load, people, law, np.zeros(len(people.prompt)))
        sides.append((nothing, marginal(load, people, law, people.reused)))
    together, mixed, apart = (float((nothing - actual).sum()) for nothing, actual in sides)
    position = coupling_share(
        machine, series, windows, told=load.told, window=load.window, populations=load.populations
    )
    people = load.populations[MIXED]
    instants = series.instants_ns
    return Requests(
        machine,
        calibration,
        load,
        (instants[windows.start], instants[windows.end]),
        people.weight,
        people.prompt,
        people.reused,
        *sides[MIXED],
        (together, mixed, apart),
        position,
    )


def classes(parts: Sequence[Requests]) -> list[RequestClass]:
    """Requests by reused tokens: those without any, then classes that double, at most MOST_CLASSES in all."""
    if not parts:
        return []
    reused = np.concatenate([part.reused for part in parts])
    weight, prompt = (np.concatenate([getattr(part, name) for part in parts]) for name in ("weight", "prompt"))
    nothing, actual = (np.concatenate([getattr(part, name) for part in parts]) for name in ("nothing", "actual"))
    place = np.where(reused < A_TOKEN, 0, 1 + np.maximum(np.floor(np.log2(np.maximum(reused, 1) / LEAST_EDGE)) + 1, 0))
    groups = [np.flatnonzero(place == each) for each in np.unique(place)]
    while len(groups) > MOST_CLASSES:
        # the neighbours that tell least go together, those without reuse with nobody
        first = 1 if reused[groups[0][0]] < A_TOKEN else 0
        told = [float((nothing - actual)[group].sum()) for group in groups]
        least = min(range(first, len(groups) - 1), key=lambda at: told[at] + told[at + 1])
        groups[least : least + 2] = [np.concatenate(groups[least : least + 2])]
    found = []
    for group in groups:
        count = float(weight[group].sum())
        low, high = _edges(reused[group])
        sums = [float(each[group].sum()) for each in (weight * prompt, weight * reused, nothing, actual)]
        found.append(RequestClass(low, high, count, sums[0] / count, sums[1] / count, sums[2], sums[3]))
    return found


def _edges(reused: Array) -> tuple[float, float]:
    """The edges around tokens: none at all, or multiples of LEAST_EDGE by a power of two."""
    if reused[0] < A_TOKEN:
        return 0.0, A_TOKEN
    low, high = (float(2.0 ** np.floor(np.log2(end / LEAST_EDGE))) for end in (reused.min(), reused.max()))
    return (A_TOKEN if low < 1 else low * LEAST_EDGE), max(2 * high, 1.0) * LEAST_EDGE


def example(parts: Sequence[Requests], one: RequestClass) -> Example:
    """The request in the middle of a class, by reused tokens."""
    inside: list[tuple[float, float, int, int]] = []
    for number, part in enumerate(parts):
        own = np.flatnonzero((part.reused >= one.low) & (part.reused < one.high)).tolist()
        inside += [(float(part.reused[at]), float(part.weight[at]), number, at) for at in own]
    inside.sort()
    half = sum(weight for _, weight, _, _ in inside) / 2
    passed = 0.0
    for _, weight, number, at in inside:
        passed += weight
        if passed >= half:
            return _example(parts[number], at)
    raise ValueError("a class without requests")


def _example(part: Requests, at: int) -> Example:
    load = part.load
    told = load.told
    window = int(load.of(load.populations[MIXED])[at])
    budget = budget_of(part.machine, told.occupancy, told.decodes)
    return Example(
        part.machine,
        part.calibration,
        int(part.span_ns[0][window]),
        int(part.span_ns[1][window]),
        float(part.prompt[at]),
        float(part.reused[at]),
        float((part.nothing[at] - part.actual[at]) / part.weight[at]),
        float(told.decodes[window]),
        float(told.context[window]),
        float(told.occupancy[window]),
        float(told.packing[window]),
        float(budget[window]),
        float(told.clock[window]),
        part.calibration.clock,
    )
