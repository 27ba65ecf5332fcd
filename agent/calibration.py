"""A calibration: the step law of one kind of replica, as it was learned, with the evidence behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

# the law's parameters, in the order of medians and covariance (METHOD 4.2); priors: kvtally.agent.steplaw.prior
PARAMETERS = (
    "compute_efficiency",  # of the datasheet's dense FLOP/s, linear layers
    "attention_efficiency",  # the same, attention
    "weight_bandwidth_efficiency",  # of the datasheet's bytes/s, reading weights
    "kv_bandwidth_efficiency",  # the same, reading the KV cache
    "step_seconds",  # of every step, on the GPU
    "gap_seconds",  # of every step, between two steps
    "launch_seconds",  # the least that a step with prefill takes
    "sharpness",  # how sharply compute hands over to bandwidth
    "request_seconds",  # of every request, before its prefill begins
)


class Fingerprint(NamedTuple):
    """What a law holds for: replicas that agree in all of this share it.

    sizes       of the model (ModelShape.sizes), since a served name may be an alias of several; "" in a law of before
                these were told, and where the formulas of the architecture are not known
    is_eager    steps with prefill run without compiled graphs
    """

    model: str
    architecture: str
    weight_dtype: str
    kv_dtype: str
    sku: str
    gpus: int
    version: str
    token_budget: int
    sizes: str = ""
    is_eager: bool = False

    def text(self) -> str:
        """As one line, for people and as the ledger's key."""
        where = f"{self.gpus} x {self.sku}" if self.gpus else "CPU"
        what = f"{self.architecture} {self.sizes}".rstrip()
        return (
            f"{self.model} ({what}, {self.weight_dtype}, KV {self.kv_dtype}) on {where}, "
            f"vLLM {self.version or '?'}, {self.token_budget} tokens a step{', eager' if self.is_eager else ''}"
        )

    def completed(self, kinds: Collection[Fingerprint | None]) -> Fingerprint:
        """That of a law of before sizes were told as the one kind that it can be of; as it is if there are several."""
        if self.sizes:
            return self
        own = {
            kind for kind in kinds if kind and kind.sizes and kind._replace(sizes="", is_eager=self.is_eager) == self
        }
        return own.pop() if len(own) == 1 else self


class CalibrationEvidence(NamedTuple):
    """What a law was fitted to; seconds, and counts of windows and of what happened in them.

    worked_ratio    fitted working seconds over measured ones, all windows together
    single_error    root mean square of the relative error over requests that ran alone; None without any
    """

    start_ns: int
    end_ns: int
    source: str
    windows: int
    singles: int
    saturated: int
    probes: int
    requests: int
    steps: int
    occupied_seconds: float
    worked_ratio: float | None
    single_error: float | None
    notes: tuple[str, ...] = ()


class Calibration(NamedTuple):
    """A law: log-normal parameters with the covariance of their logs, and where they come from.

    medians     one per PARAMETERS; efficiencies without unit, the rest in seconds
    covariance  of the logs, as rows
    clock       SM clock under prefill as a share of the one at which the datasheet's peak holds, and its weight in
                seconds of evidence
    prior       "packaged", or the id of the calibration whose posterior was the prior
    id          its number in the ledger; None: not stored
    """

    fingerprint: Fingerprint
    rung: str
    medians: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    clock: float
    clock_weight_seconds: float
    evidence: CalibrationEvidence
    prior: str = "packaged"
    id: int | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything but its number, as plain values."""
        return {
            "fingerprint": self.fingerprint._asdict(),
            "rung": self.rung,
            "medians": dict(zip(PARAMETERS, self.medians, strict=True)),
            "covariance": [list(row) for row in self.covariance],
            "clock": self.clock,
            "clock_weight_seconds": self.clock_weight_seconds,
            "evidence": self.evidence._asdict(),
            "prior": self.prior,
        }


def calibration_of(body: Mapping[str, Any], number: int | None = None) -> Calibration:
    """Invert `as_json`; KeyError, TypeError or ValueError if it is not one."""
    evidence = dict(body["evidence"])
    evidence["notes"] = tuple(evidence["notes"])
    medians = tuple(float(body["medians"][name]) for name in PARAMETERS)
    covariance = tuple(tuple(float(value) for value in row) for row in body["covariance"])
    if len(covariance) != len(PARAMETERS) or any(len(row) != len(PARAMETERS) for row in covariance):
        raise ValueError(f"a covariance of {len(PARAMETERS)} x {len(PARAMETERS)} is wanted")
    return Calibration(
        Fingerprint(**body["fingerprint"]),
        str(body["rung"]),
        medians,
        covariance,
        float(body["clock"]),
        float(body["clock_weight_seconds"]),
        CalibrationEvidence(**evidence),
        str(body["prior"]),
        number,
    )
