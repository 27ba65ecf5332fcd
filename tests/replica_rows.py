"""Observed replicas for tests: rows whose counts a test writes, and a machine whose seconds can be done by hand."""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from kvtally.agent.calibration import Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.facts import EngineRow
from kvtally.agent.hardware import gpu_of
from kvtally.agent.model_shape import shape_of
from kvtally.agent.observed import Observed, ObservedRow
from kvtally.agent.steplaw.law import TILE_TOKENS
from kvtally.agent.steplaw.machine import Machine, machine
from kvtally.agent.steplaw.population import Population
from kvtally.agent.steplaw.windows import Described
from kvtally.agent.steplaw.worth import Load
from kvtally.agent.timeline import Span, Timeline
from kvtally.collectors.quantities import ENGINE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from kvtally.agent.model_shape import ModelShape
    from kvtally.agent.observed import CacheSpan

    Array = NDArray[np.float64]

SECOND = 1_000_000_000
SKU = "NVIDIA H100 80GB HBM3"
LENGTH_EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, math.inf)
STEP_EDGES = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, math.inf)
_CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"

# on the round machine 0.2 ms of compute a token, 20 ms of weights, 2 ns a product and 0.2 us a token of context
THETA = (0.5, 0.5, 0.5, 0.5, 0.001, 0.002, 0.010, 2.0, 0.004)


def shape(name: str = "llama-3.1-8b", **changes: str) -> ModelShape:
    return shape_of(json.loads((_CONFIGS / f"{name}.json").read_text(encoding="utf-8")), **changes)


def round_machine(**changes: Any) -> Machine:
    """1e10 FLOP and 1e10 bytes of weights a token, 1e5 FLOP a product, 1e5 bytes of KV; 1e14 FLOP/s, 1e12 bytes/s."""
    dense = shape()._replace(
        linear_parameters=5 * 10**9, dense_weight_bytes=1e10, expert_weight_bytes=0.0, experts=0, layers=10, hidden=1000
    )
    plain = Machine(dense, 1, 1e14, 1e14, 1e12, 1e10, 1e5, 1e5, 2000.0, 1000, is_eager=False)
    return plain._replace(**changes)


def worked_by_hand(tokens: float, products: float = 0.0, context: float = 0.0) -> float:
    """Seconds for which the round machine works in a step, by THETA; compute and weights at sharpness 2."""
    dense = math.hypot(0.2e-3 * (tokens + TILE_TOKENS), 0.020)
    return dense + 2e-9 * products + 0.2e-6 * context + 0.001


def step_by_hand(tokens: float, products: float = 0.0, context: float = 0.0) -> float:
    """Wall seconds of such a step: it works for longer than its launches take, and a gap of 2 ms comes on top."""
    worked = worked_by_hand(tokens, products, context)
    assert worked > 0.010
    return worked + 0.002


def h100(budget: int = 8192, gpus: int = 1) -> Machine:
    """Llama 8B on H100s."""
    return machine(shape(), gpu_of(SKU), gpus, token_budget=budget)


def cpu() -> Machine:
    return machine(shape(), None, 0, token_budget=2048)


class Asked(NamedTuple):
    """A request and how it was served: tokens, seconds of its prefill and of its decodes."""

    prompt: int
    hbm: int = 0
    outer: int = 0
    generated: int = 1
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def computed(self) -> int:
        return self.prompt - self.hbm - self.outer


def counts_of(requests: Sequence[Asked]) -> dict[str, int]:
    """What an interval in which these requests began and finished counts."""
    return {
        "first_tokens": len(requests),
        "finished_requests": len(requests),
        "prompt_tokens": sum(one.prompt for one in requests),
        "computed_tokens": sum(one.computed for one in requests),
        "hbm_tokens": sum(one.hbm for one in requests),
        "external_tokens": sum(one.outer for one in requests),
        "generated_tokens": sum(one.generated for one in requests),
        "steps": sum(one.generated for one in requests),
        "prefill_ns": round(sum(one.prefill_seconds for one in requests) * 1e9),
        "decode_ns": round(sum(one.decode_seconds for one in requests) * 1e9),
        "inter_token_ns": round(sum(one.decode_seconds for one in requests) * 1e9),
    }


def lengths(prefix: str, edges: Sequence[float], values: Sequence[float]) -> dict[str, int]:
    """Values in the buckets of a histogram, as details."""
    found = {f"{prefix}_le_{edge:.15g}": 0 for edge in edges}
    for value in values:
        found[f"{prefix}_le_{edges[bisect_left(edges, value)]:.15g}"] += 1
    return found


def details_of(requests: Sequence[Asked]) -> dict[str, int]:
    """The details of such an interval, each decode in a step of its own."""
    steps = [one.computed for one in requests] + [1] * sum(one.generated - 1 for one in requests)
    return {
        "finished_prompt_tokens": sum(one.prompt for one in requests),
        **lengths("request_prompt_tokens", LENGTH_EDGES, [one.prompt for one in requests]),
        **lengths("request_computed_tokens", LENGTH_EDGES, [one.computed for one in requests]),
        **lengths("step_tokens", STEP_EDGES, steps),
    }


def row(
    start_seconds: float,
    end_seconds: float,
    requests: Sequence[Asked] = (),
    *,
    flags: int = 0,
    details: Mapping[str, int] | None = None,
    **counts: int | None,
) -> ObservedRow:
    """An interval: what the requests count, replaced by `counts`; whatever nobody names is 0."""
    values = dict.fromkeys((quantity.name for quantity in ENGINE), 0) | counts_of(requests) | counts
    assert len(values) == len(ENGINE), f"no such quantity among {sorted(counts)}"
    more = details_of(requests) | dict(details or {})
    ends = (round(start_seconds * SECOND), round(end_seconds * SECOND))
    return ObservedRow(EngineRow(1, *ends, 0, flags, None, tuple(values.values())), more)


def told(observed_row: ObservedRow, **details: int | None) -> ObservedRow:
    """The row with other details; None leaves one out."""
    more = {**(observed_row.details or {}), **details}
    return observed_row._replace(details={name: value for name, value in more.items() if value is not None})


def observed(
    rows: Sequence[ObservedRow],
    *,
    worked: Sequence[tuple[float, float, float]] | None = (),
    tensor: Sequence[tuple[float, float, float, float]] = (),
    caches: Mapping[str, Sequence[CacheSpan]] | None = None,
) -> Observed:
    """A replica; worked: (start, end, seconds at work), () for half of every row; tensor: the same and the MHz."""
    if worked is None:
        line = None
    elif worked:
        line = Timeline(Span(round(a * SECOND), round(b * SECOND), seconds * SECOND) for a, b, seconds in worked)
    else:
        halves = [Span(one.row.start_ns, one.row.end_ns, (one.row.end_ns - one.row.start_ns) / 2) for one in rows]
        line = Timeline(halves)
    spans = [Span(round(a * SECOND), round(b * SECOND), seconds * SECOND) for a, b, seconds, _ in tensor]
    clocked = [span._replace(amount=span.amount * mhz) for span, (*_, mhz) in zip(spans, tensor, strict=True)]
    found = {name: tuple(one) for name, one in (caches or {}).items()}
    return Observed(
        {},
        tuple(rows),
        line,
        Timeline(spans) if spans else None,
        Timeline(clocked) if spans else None,
        "" if line is None else "graphics",
        found,
    )


FINGERPRINT = Fingerprint("llama-8b", "LlamaForCausalLM", "bfloat16", "bfloat16", SKU, 1, "0.25.1", 1000)
EVIDENCE = CalibrationEvidence(0, 60 * SECOND, "graphics", 40, 20, 5, 0, 200, 4000, 55.0, 1.01, 0.03)


def calibration(
    theta: Sequence[float] = THETA, sd: float = 0.1, clock: float = 1.0, rung: str = "M1", number: int | None = None
) -> Calibration:
    """A law with these medians, each of its logs known to `sd`."""
    covariance = np.diag(np.full(len(theta), sd**2)).tolist()
    rows = tuple(tuple(float(value) for value in one) for one in covariance)
    return Calibration(FINGERPRINT, rung, tuple(theta), rows, clock, 30.0, EVIDENCE, id=number)


def described(windows: int = 1, **values: float) -> Described:
    """Windows of 10 s in which nothing but what is named happened, at the reference clock."""
    plain = {"seconds": 10.0, "packing": 1.0, "clock": 1.0} | values
    columns = [np.full(windows, plain.get(name, 0.0)) for name in Described._fields]
    filled = Described(*columns)
    flags = {name: getattr(filled, name) > 0 for name in ("is_worked_known", "is_saturated", "is_alone")}
    return filled._replace(**flags)


def people(prompts: Sequence[float], reused: Sequence[float], hbm: Sequence[float] | None = None) -> Population:
    """Single requests, all in the first piece."""
    count = len(prompts)
    own = np.array(reused if hbm is None else hbm, dtype=np.float64)
    piece = np.zeros(count, dtype=np.intp)
    return Population(piece, np.ones(count), np.array(prompts, float), np.array(reused, float), own)


def load(of: Machine, population: Population, **told_values: float) -> Load:
    """One window with these requests, whatever the coupling."""
    return Load(of, described(1, **told_values), np.zeros(1, dtype=np.intp), (population,) * 3)
