"""The law's parameters from evidence: the most probable ones given the prior, and how sure they are (METHOD 4.3).

Two kinds of evidence beat one: seconds of GPU work over windows, and requests that ran alone, whose summed prefill
seconds are wall seconds. Windows are not independent of each other (clock, temperature, load): whatever their number,
each kind counts as twenty facts.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.steplaw.chunks import chunked
from kvtally.agent.steplaw.law import GAP, LAUNCH, REQUEST, Prior, Steps, prefill_seconds, working_seconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtally.agent.steplaw.evidence import Evidence, Probe
    from kvtally.agent.steplaw.machine import Machine

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]
    Index = NDArray[np.intp]

FACTS = 20.0  # that all windows of a kind together may count for
SINGLE_ERROR = 0.03
SINGLE_FLOOR_SECONDS = 0.004
WALL_FLOOR_SECONDS = 0.1
SOFT = 1.5  # standard deviations from which on a residual counts less
COPY_MEDIAN, COPY_SD = 0.5, 0.3  # share of load and store seconds that shows as work
CPU_COPY_SD = 0.5
THREADS_SD = 1.5  # of the log: CPU seconds per second of an engine's step
# what all windows get wrong alike, of the log: seconds of work, and wall seconds. Windows of one load agree
# with each other better than with any law. Probes run alone for some seconds, at a clock that is not that of a load
WORK_SD, WALL_SD, PROBE_SD = 0.03, 0.02, 0.05
NUISANCES = 4
ITERATIONS = 40
STEP = 1e-4
# a change of the log of launch_seconds that is none, and how far above its median the search begins anew then
HIDDEN, ABOVE = 1e-3, 1.2


class Fit(NamedTuple):
    """Logs of the parameters, the covariance, and how well it describes the evidence."""

    logs: Array
    covariance: Array
    windows: int
    singles: int
    saturated: int
    worked_ratio: float | None
    single_error: float | None
    at_bound: tuple[str, ...]


class _Problem:
    """Residuals in standard deviations, as a function of the logs of the parameters and of the nuisances.

    Nuisances: the share of copies that shows as work, and the logs of what all windows' work (on a CPU: its threads),
    their wall seconds and the probes are off by.
    """

    def __init__(
        self, machine: Machine, parts: Sequence[Evidence], prior: Prior, probes: Sequence[Probe], clock: float
    ) -> None:
        self.machine = machine
        self.clock = clock
        self.parts = parts
        self.logs = np.log(prior.medians)
        self.precision = np.linalg.cholesky(np.linalg.inv(prior.covariance)).T
        self.is_cpu = machine.is_cpu
        self.probes = np.array(probes, dtype=np.float64).reshape(-1, 4)
        singles = sum(int(part.single.sum()) for part in parts)
        others = sum(len(part.single) for part in parts) - singles
        self.single_weight = math.sqrt(min(1.0, FACTS / max(singles, 1)))
        self.other_weight = math.sqrt(min(1.0, FACTS / max(others, 1)))
        self.probe_weight = math.sqrt(min(1.0, FACTS / max(len(self.probes), 1)))
        self.priors = len(PARAMETERS) + NUISANCES

    def start(self) -> Array:
        """The prior's medians."""
        return np.concatenate([self.logs, [COPY_MEDIAN, 0.0, 0.0, 0.0]])

    def predicted(self, part: Evidence, x: Array) -> tuple[Array, Array]:
        """Seconds of work and of wall time in each window."""
        theta = np.exp(x[: len(PARAMETERS)])
        machine, rows, told = self.machine, part.rows, part.told
        count = len(told.first)
        prefill = working_seconds(machine, theta, Steps(rows.tokens, rows.products, rows.context, rows.clock))
        decode = working_seconds(machine, theta, Steps(told.decodes, 0.0, told.context, told.clock))
        copies = told.loads + told.stores
        work = np.bincount(rows.window, prefill * rows.weight, count) + part.decode_steps * decode
        wall = np.bincount(rows.window, prefill_seconds(prefill, theta) * rows.weight, count)
        alone = wall + theta[REQUEST] * told.first
        full = wall + part.decode_steps * (decode + theta[GAP])
        copied, worked, walled, _ = x[len(PARAMETERS) :]
        work = (work + copied * copies) * math.exp(worked)
        full = (full + copies) * math.exp(walled)
        return work, np.where(part.single, alone + copies, full)

    def residuals(self, x: Array) -> Array:
        """Everything that pulls at the parameters; the last `priors` are the prior's."""
        found = []
        for part in self.parts:
            work, wall = self.predicted(part, x)
            told, single = part.told, part.single
            sd = np.hypot(part.error, part.ambiguity)
            measured = told.is_worked_known & ~single
            found.append((self.other_weight * (work - told.worked) / sd)[measured])
            observed = np.where(single, told.prefill, told.seconds)
            floor = (SINGLE_FLOOR_SECONDS + SINGLE_ERROR * told.occupancy) * told.first
            alone = np.sqrt((SINGLE_ERROR * observed) ** 2 + floor**2 + part.ambiguity**2)
            full = np.sqrt(sd**2 + WALL_FLOOR_SECONDS**2)
            weight = np.where(single, self.single_weight, self.other_weight)
            found.append((weight * (wall - observed) / np.where(single, alone, full))[single | part.saturated])
        found.append(self._probe_residuals(x))
        found.append(self.precision @ (x[: len(PARAMETERS)] - self.logs))
        copied, *scales = x[len(PARAMETERS) :]
        copy_sd = CPU_COPY_SD if self.is_cpu else COPY_SD
        sds = (THREADS_SD if self.is_cpu else WORK_SD, WALL_SD, PROBE_SD)
        found.append(np.array([(copied - COPY_MEDIAN) / copy_sd, *np.divide(scales, sds)]))
        return np.concatenate(found)

    def _probe_residuals(self, x: Array) -> Array:
        if not len(self.probes):
            return np.zeros(0)
        prompt, reused, seconds, error = self.probes.T
        predicted = alone_seconds(self.machine, np.exp(x[: len(PARAMETERS)]), prompt, reused, self.clock)
        result: Array = self.probe_weight * (np.log(predicted / seconds) + x[-1]) / error
        return result


def alone_seconds(machine: Machine, theta: Array, prompt: Array, reused: Array, clock: float = 1.0) -> Array:
    """Wall seconds of prefills on an engine that does nothing else: what a client sees as time to first token."""
    count = len(prompt)
    budget = np.full(count, float(machine.token_budget))
    parts = chunked(prompt, reused, budget, np.ones(count))
    working = working_seconds(machine, theta, Steps(parts.tokens, parts.products, 0.0, clock))
    result: Array = np.bincount(parts.request, prefill_seconds(working, theta), count) + theta[REQUEST]
    return result


def fit(
    machine: Machine, parts: Sequence[Evidence], prior: Prior, probes: Sequence[Probe] = (), clock: float = 1.0
) -> Fit:
    """The most probable parameters: Levenberg-Marquardt on their logs, far residuals held down (soft L1).

    `clock` is the one under load: prefills of probes run at it, as all others do.
    """
    problem = _Problem(machine, parts, prior, probes, clock)
    x = _descended(problem, problem.start())
    if abs(x[LAUNCH] - problem.logs[LAUNCH]) < HIDDEN:
        # launches that are shorter than every step's work pull at nothing: look above as well
        above = problem.start()
        above[LAUNCH] += ABOVE
        x = min(x, _descended(problem, above), key=lambda one: _cost(problem.residuals(one), problem.priors))
    residuals = problem.residuals(x)
    weight = _weights(residuals, problem.priors)
    jacobian = _jacobian(problem, x, residuals) * weight[:, None]
    covariance = np.linalg.inv(jacobian.T @ jacobian).astype(np.float64)
    return _told(problem, x, covariance[: len(PARAMETERS), : len(PARAMETERS)])


def _descended(problem: _Problem, x: Array) -> Array:
    """Where the residuals are least, as seen from a start."""
    damping = 1e-2
    residuals = problem.residuals(x)
    for _ in range(ITERATIONS):
        weight = _weights(residuals, problem.priors)
        jacobian = _jacobian(problem, x, residuals) * weight[:, None]
        weighted = residuals * weight
        hessian, gradient = jacobian.T @ jacobian, jacobian.T @ weighted
        step: NDArray[np.floating] = np.zeros_like(x)
        for _ in range(8):
            step = -1.0 * np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            tried = x + np.clip(step, -0.5, 0.5)
            following = problem.residuals(tried)
            if ((following * weight) ** 2).sum() < (weighted**2).sum():
                x, residuals, damping = tried, following, damping / 4
                break
            damping *= 4
        else:
            break
        if np.abs(step).max() < STEP:
            break
    return x


def _cost(residuals: Array, priors: int) -> float:
    """What is made least: squares of the prior's residuals, of the others their soft L1."""
    soft = 2 * SOFT**2 * (np.sqrt(1 + (residuals[:-priors] / SOFT) ** 2) - 1)
    return float(soft.sum() + (residuals[-priors:] ** 2).sum())


def _weights(residuals: Array, priors: int) -> Array:
    weight = np.ones(len(residuals))
    weight[:-priors] = (1 + (residuals[:-priors] / SOFT) ** 2) ** -0.25
    return weight


def _jacobian(problem: _Problem, x: Array, residuals: Array) -> Array:
    columns = []
    for place in range(len(x)):
        moved = x.copy()
        moved[place] += STEP
        columns.append((problem.residuals(moved) - residuals) / STEP)
    return np.stack(columns, axis=1)


def _told(problem: _Problem, x: Array, covariance: Array) -> Fit:
    work = measured = 0.0
    errors: list[Array] = []
    singles = saturated = windows = 0
    for part in problem.parts:
        predicted, wall = problem.predicted(part, x)
        known = part.told.is_worked_known & ~part.single
        off = (
            1.0 if problem.is_cpu else math.exp(x[len(PARAMETERS) + 1])
        )  # what the fit allowed for, but a CPU's threads
        work += float(predicted[known].sum()) / off
        measured += float(part.told.worked[known].sum())
        errors.append((wall / np.maximum(part.told.prefill, 1e-9) - 1)[part.single])
        singles += int(part.single.sum())
        saturated += int(part.saturated.sum())
        windows += len(part.single)
    error = np.concatenate(errors) if errors else np.zeros(0)
    return Fit(
        x[: len(PARAMETERS)],
        covariance,
        windows,
        singles,
        saturated,
        work / measured if measured else None,
        float(np.sqrt(np.mean(error**2))) if len(error) else None,
        () if problem.is_cpu else _at_bound(x),  # nobody knows what a CPU could do at best
    )


# beyond these a parameter is no longer believable, and whatever it explains is something else (METHOD 4.2)
_BOUNDS = {
    "compute_efficiency": (0.10, 1.05),
    "attention_efficiency": (0.05, 1.10),
    "weight_bandwidth_efficiency": (0.20, 1.05),
    "kv_bandwidth_efficiency": (0.10, 2.00),  # decodes of one prefix may share its reading
}


def _at_bound(x: Array) -> tuple[str, ...]:
    return beyond_belief(np.exp(x[: len(PARAMETERS)]).tolist())


def beyond_belief(medians: Sequence[float]) -> tuple[str, ...]:
    """Names of the parameters that no GPU can have."""
    theta = dict(zip(PARAMETERS, medians, strict=True))
    return tuple(name for name, (low, high) in _BOUNDS.items() if not low <= theta[name] <= high)
