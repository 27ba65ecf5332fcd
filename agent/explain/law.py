"""The law behind a figure: what each parameter is believed to be, before and after the evidence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from kvtally.agent.calibrating import prior_of
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.explain.arithmetic import rounded
from kvtally.agent.explain.request import MEANINGS, SYMBOLS
from kvtally.agent.savings import Z90
from kvtally.agent.savings_report import calibration_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.ledger.calibrations import StoredCalibration
    from kvtally.agent.savings import Part
    from kvtally.agent.steplaw.machine import Machine

_Belief = tuple[float, float]  # median, and standard deviation of its log


def law_json(part: Part, machine: Machine | None, stored: Sequence[StoredCalibration]) -> dict[str, Any]:
    """A calibration with its parameters and their priors, None where nothing tells them any more.

    `stored` are those of the ledger, one of which may be its prior. `moves` is by how much a standard deviation of the
    parameter moves W of the part.
    """
    law = part.calibration
    before = _prior(law, machine, stored)
    parameters = []
    for place, name in enumerate(PARAMETERS):
        now = (law.medians[place], math.sqrt(max(law.covariance[place][place], 0.0)))
        was = None if before is None else before[place]
        parameters.append(
            {
                "name": name,
                "symbol": SYMBOLS.get(name, name),
                "meaning": MEANINGS.get(name, ""),
                "unit": "s" if name.endswith("_seconds") else "",
                **_belief(now),
                "prior": None if was is None else _belief(was),
                "moves": rounded(part.worth.avoided_by[place] * now[1], 4),
                "narrowed": None if was is None or not now[1] else rounded(was[1] / now[1], 1),
            }
        )
    evidence = law.evidence
    return {
        **calibration_json(law),
        "parameters": parameters,
        "clock": {"median": rounded(law.clock), "evidence_seconds": rounded(law.clock_weight_seconds, 1)},
        "worked_ratio": evidence.worked_ratio,
        "single_error": evidence.single_error,
    }


def _prior(law: Calibration, machine: Machine | None, stored: Sequence[StoredCalibration]) -> list[_Belief] | None:
    if machine is None:
        return None
    prior, name = prior_of(machine, law.fingerprint, stored, law.evidence.start_ns)
    if name != law.prior:
        return None
    variances = prior.covariance.diagonal().tolist()
    return [(median, math.sqrt(variance)) for median, variance in zip(prior.medians.tolist(), variances, strict=True)]


def _belief(of: _Belief) -> dict[str, str]:
    median, sd = of
    reach = math.exp(Z90 * sd)
    return {"low": rounded(median / reach), "median": rounded(median), "high": rounded(median * reach)}
