"""A calibrated step law run forwards: seconds of one request's prefill on an idle engine, with the law's error.

What the forward model asks of a law (kvtally.agent.forward.Law), by chunks, as METHOD sections 3 and 8 have it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.forward import LawRange
from kvtally.agent.steplaw.fit import alone_seconds
from kvtally.agent.steplaw.law import REQUEST

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.steplaw.machine import Machine

    Array = NDArray[np.float64]

Z90 = 1.645
DERIVATIVE_STEP = 0.03  # of a logarithm
# what efficiencies differ by from one kind or number of GPUs to another: ASSUMED, about half of what a prior leaves
ELSEWHERE_SD = 0.12


class Doubt(NamedTuple):
    """Standard deviations of logs, beside the covariance of the parameters.

    form        what the law's form gets wrong
    clock       of the clock under load
    efficiency  of every efficiency, where the law was learned on other GPUs than it is asked about
    """

    form: float = 0.0
    clock: float = 0.0
    efficiency: float = 0.0


class CalibratedLaw:
    """The law so many standard deviations from its median: each prefill's own quantile, not one set of parameters."""

    def __init__(self, prefills: _Prefills, deviations: float, first_token_seconds: float | None) -> None:
        """`first_token_seconds` in place of the learned one."""
        self._prefills = prefills
        self._deviations = deviations
        self._first_token_seconds = first_token_seconds

    @property
    def first_token_seconds(self) -> float:
        """Of every request, beside its prefill."""
        if self._first_token_seconds is not None:
            return self._first_token_seconds
        median, sd = self._prefills.request
        return median * math.exp(self._deviations * sd)

    def prefill_seconds(self, prompt: float, reused: float) -> float:
        """To compute the tokens from `reused` to `prompt`, step by step."""
        seconds, sd = self._prefills.of(prompt, reused)
        return seconds * math.exp(self._deviations * sd)


def calibrated_laws(
    machine: Machine, calibration: Calibration, doubt: Doubt, first_token_seconds: float | None = None
) -> LawRange:
    """The law with the ends of its 90 % interval, for a machine that may differ from the one it was learned on."""
    prefills = _Prefills(machine, calibration, doubt)
    point, slow, fast = (CalibratedLaw(prefills, each, first_token_seconds) for each in (0.0, Z90, -Z90))
    return LawRange(point, slow, fast)


class _Prefills:
    """Seconds of prefills and the standard deviation of their log, each worked out once."""

    def __init__(self, machine: Machine, calibration: Calibration, doubt: Doubt) -> None:
        self._machine = machine
        self._theta = np.array(calibration.medians)
        self._clock = calibration.clock
        self._doubt = doubt
        of_efficiency = np.array([doubt.efficiency if name.endswith("_efficiency") else 0.0 for name in PARAMETERS])
        self._covariance = np.array(calibration.covariance) + np.diag(of_efficiency**2)
        self._known: dict[tuple[float, float], tuple[float, float]] = {}

    @property
    def request(self) -> tuple[float, float]:
        """Seconds of a request beside its prefill, and the standard deviation of their log."""
        return float(self._theta[REQUEST]), math.sqrt(float(self._covariance[REQUEST, REQUEST]))

    def of(self, prompt: float, reused: float) -> tuple[float, float]:
        """Seconds and standard deviation of the log."""
        key = (prompt, reused)
        if key not in self._known:
            seconds = self._seconds(self._theta, self._clock, prompt, reused)
            self._known[key] = (seconds, self._sd(seconds, prompt, reused) if seconds > 0 else 0.0)
        return self._known[key]

    def _seconds(self, theta: Array, clock: float, prompt: float, reused: float) -> float:
        found = alone_seconds(self._machine, theta, np.array([prompt]), np.array([reused]), clock)
        return float(found[0] - theta[REQUEST])

    def _sd(self, seconds: float, prompt: float, reused: float) -> float:
        """By the delta method: how the prefill goes with each parameter."""
        by = np.zeros(len(PARAMETERS))
        for place in range(len(PARAMETERS)):
            sides = []
            for sign in (1.0, -1.0):
                theta = self._theta.copy()
                theta[place] *= math.exp(sign * DERIVATIVE_STEP)
                sides.append(self._seconds(theta, self._clock, prompt, reused))
            by[place] = (sides[0] - sides[1]) / (2 * DERIVATIVE_STEP * seconds)
        quicker = self._seconds(self._theta, self._clock * math.exp(DERIVATIVE_STEP), prompt, reused)
        by_clock = (quicker / seconds - 1) / DERIVATIVE_STEP
        learned = math.sqrt(max(float(by @ self._covariance @ by), 0.0))
        return math.hypot(learned, self._doubt.form, by_clock * self._doubt.clock)
