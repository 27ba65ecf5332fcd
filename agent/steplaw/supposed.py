"""What a store that is not there would be worth: a span's requests, reusing more than they did (METHOD 3 and 8)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.steplaw.windows import cut, least_seconds
from kvtally.agent.steplaw.worth import CLOCK_STEP, DERIVATIVE_STEP, MIXED, Law, around, load_of, marginal
from kvtally.agent.worth import A_TOKEN

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.population import Population
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.worth import Load
    from kvtally.agent.worth import Worth

    Array = NDArray[np.float64]

SHARES = tuple(step / 20 for step in range(21))


class Supposed(NamedTuple):
    """A span with another outer store in place of the present one.

    worth       that of the span, `avoided` and `outer` being what the store would avoid beyond HBM
    loading     requests that would load something
    by_share    (mixed) seconds avoided, tokens loaded and requests that load, at each of SHARES of what was computed
    """

    worth: Worth
    loading: float
    by_share: tuple[tuple[float, float, float], ...]


def supposed(
    machine: Machine,
    series: Series,
    span_ns: tuple[int, int],
    calibration: Calibration,
    *,
    before: Worth,
    extra_share: float,
) -> Supposed | None:
    """The worth of a span if `extra_share` of the computed tokens of each request were hits too; None without work.

    `before` is the worth as it was: its counts stay, its loads and stores are the caller's to replace.
    """
    instants = series.instants_ns
    start = int(np.searchsorted(instants, span_ns[0], "left"))
    end = min(int(np.searchsorted(instants, span_ns[1], "left")), len(instants) - 1)
    windows = cut(series, start, end, least_seconds(machine, series)) if start < end else None
    if windows is None or not len(windows.start):
        return None
    load = load_of(machine, series, windows, calibration.clock)
    law = Law(np.array(calibration.medians), calibration.clock)
    together, mixed, apart = (_avoided(load, one, law, extra_share) for one in load.populations)
    people = load.populations[MIXED]
    by = tuple(_derivative(load, people, law, place, extra_share) for place in range(len(PARAMETERS)))
    faster = law._replace(clock=law.clock * (1 + CLOCK_STEP), faster=1 + CLOCK_STEP)
    by_clock = (_avoided(load, people, faster, extra_share) - mixed) / CLOCK_STEP
    loaded, loading = _loads(people, extra_share)
    worth = before._replace(
        avoided=(together, mixed, apart),
        outer=(together, mixed, apart),
        avoided_by=by,
        outer_by=by,
        clock_by=(by_clock, by_clock, before.clock_by[2]),
        dram=0.0,
        disk=0.0,
        p2p=0.0,
        hbm_tokens=0.0,
        external_tokens=loaded,
        dram_tokens=0.0,
        disk_tokens=0.0,
        p2p_tokens=0.0,
        computed_tokens=before.computed_tokens + before.external_tokens - loaded,
    )
    curve = [(_avoided(load, people, law, share), *_loads(people, share)) for share in SHARES]
    return Supposed(worth, loading, tuple(curve))


def _begin(people: Population, share: float) -> Array:
    """Where each prefill would begin: a prefix grows, and the last token is always computed."""
    longer = np.minimum(people.reused + share * people.computed, people.prompt - 1)
    result: Array = np.maximum(longer, people.reused)
    return result


def _loads(people: Population, share: float) -> tuple[float, float]:
    """Tokens that come from outside HBM, and requests with any."""
    outer = _begin(people, share) - people.reused_hbm
    return float((outer * people.weight).sum()), float(people.weight[outer > A_TOKEN].sum())


def _avoided(load: Load, people: Population, law: Law, share: float) -> float:
    """Seconds that reuse beyond HBM avoids."""
    without = marginal(load, people, law, people.reused_hbm)
    return float((without - marginal(load, people, law, _begin(people, share))).sum())


def _derivative(load: Load, people: Population, law: Law, place: int, share: float) -> float:
    """By the log of one parameter, from both sides."""
    up, down = (_avoided(load, people, one, share) for one in around(law, place))
    return (up - down) / (2 * DERIVATIVE_STEP)
