"""The answer of `kvtally model`: curves, break-even bandwidths, reuses that pay, and claims."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.forward import break_even_bandwidth, marginal_break_even_bandwidth
from kvtally.agent.forward_cost.claims import CLAIMS, claims

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from decimal import Decimal

    from kvtally.agent.forward import Estimate, Law, LawRange
    from kvtally.agent.forward_cost.cost import Scenario, Store
    from kvtally.agent.hardware import Gpu
    from kvtally.agent.model_shape import ModelShape

_USABLE_SHARE = 0.9  # of GPU memory: vLLM's --gpu-memory-utilization
SHORT_PREFIX = 1000


class Input(NamedTuple):
    """One input: its value in words, whether it was GIVEN, comes from a SOURCE or is ASSUMED, and from where."""

    name: str
    value: str
    basis: str
    source: str = ""


class Told(NamedTuple):
    """What a ledger tells beside the curves, as it prints.

    deployment  the replicas, the window, and the calibration where one was asked for
    measured    rows of kvtally.agent.model_report.measured; None where they were not asked for
    what_ifs    answers of kvtally.agent.model_report.what_if
    """

    deployment: dict[str, Any]
    measured: list[dict[str, Any]] | None
    what_ifs: list[dict[str, Any]]
    findings: tuple[str, ...] = ()


class Question(NamedTuple):
    """What the model is asked; `law_basis` is MODELLED for datasheet and priors, and for a calibration as well.

    gpu     None is a CPU, of which only a calibration knows the speed
    """

    model: str
    shape: ModelShape
    gpu: Gpu | None
    scenario: Scenario
    prompts: tuple[int, ...]
    reuses: tuple[float, ...]
    inputs: tuple[Input, ...]
    currency: str = "USD"
    law_basis: str = "MODELLED"
    prices_basis: str = "ASSUMED"
    ledger: Told | None = None

    @property
    def hardware(self) -> str:
        """What a replica runs on."""
        return "a CPU" if self.gpu is None else f"{self.scenario.gpus} x {self.gpu.name}"


def model_report(question: Question) -> dict[str, Any]:
    """The whole answer; amounts are decimal strings of nine places, as everywhere."""
    scenario, told = question.scenario, question.ledger
    answer: dict[str, Any] = {
        "model": _model(question),
        "inputs": [each._asdict() for each in question.inputs],
        "currency": question.currency,
        "basis": {
            "ttft": question.law_basis,
            "break_even": question.law_basis,
            "cost": None if scenario.replica_hourly is None else question.prices_basis,
            "claims": question.law_basis,
        },
        "stores": [_store(scenario, store) for store in scenario.stores],
        "prompts": [_prompt(question, prompt) for prompt in question.prompts],
        "break_even": [_break_even(scenario, prefix) for prefix in sorted({1, SHORT_PREFIX, *question.prompts})],
        "reuses_per_month": [
            _reuses(scenario, store, prompt) for store in scenario.stores for prompt in question.prompts
        ],
        "claims": [
            claim._asdict() | {"says": CLAIMS[claim.claim], "figure": _span(claim.figure)}
            for prompt in question.prompts
            for claim in claims(scenario, prompt)
        ],
        "findings": _findings(question),
    }
    if told is not None:
        answer |= {"deployment": told.deployment, "measured": told.measured, "what_ifs": told.what_ifs}
    return answer


def points(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The curves as rows, one for each point, for a table of figures; below them what was measured."""
    curves = [
        {
            "prompt_tokens": prompt["prompt_tokens"],
            "backend": curve["backend"],
            "kind": curve["kind"],
            **point,
            "ttft_basis": report["basis"]["ttft"],
            "cost_basis": report["basis"]["cost"],
            "currency": report["currency"],
        }
        for prompt in report["prompts"]
        for curve in prompt["curves"]
        for point in curve["points"]
    ]
    return curves + [
        {
            "prompt_tokens": row["prompt_tokens"],
            "backend": f"measured at the {row['seen_by']}",
            "kind": "measured",
            "reuse": row["reuse"],
            "ttft_seconds": row["seconds"],
            "ttft_basis": row["basis"],
            "requests": row["requests"],
            "tier": row["tier"],
            "predicted_seconds": row["predicted_seconds"],
            "error": row["error"],
        }
        for row in report.get("measured") or ()
    ]


def _model(question: Question) -> dict[str, Any]:
    shape, scenario = question.shape, question.scenario
    return {
        "name": question.model,
        "architecture": shape.architecture,
        "parameters": shape.total_parameters,
        "active_parameters": round(shape.active_parameters),
        "linear_parameters": shape.linear_parameters,
        "weight_bytes": round(shape.resident_bytes),
        "kv_bytes_per_token": round(scenario.kv_bytes_per_token),
        "gpu": None if question.gpu is None else question.gpu.name,
        "gpus": scenario.gpus,
        "hardware": question.hardware,
        "replicas": scenario.replicas,
        "load": "overlaps" if scenario.overlaps else "stalls",
    }


def _store(scenario: Scenario, store: Store) -> dict[str, Any]:
    backend, holding = store.backend, store.holding
    return {
        "name": backend.name,
        "kind": backend.kind,
        "bandwidth_bytes_per_second": backend.bandwidth_bytes_per_second,
        "latency_seconds": backend.latency_seconds,
        "capacity_bytes": store.capacity_bytes,
        "tokens_held": int(store.capacity_bytes / scenario.kv_bytes_per_token),
        "price": None if holding is None else _amount(holding.price_of(store.capacity_bytes)),
        "price_hours": None if holding is None else float(holding.hours),
        "hourly": None if holding is None else _amount(store.hourly()),
    }


def _prompt(question: Question, prompt: int) -> dict[str, Any]:
    scenario = question.scenario
    return {
        "prompt_tokens": prompt,
        "kv_bytes": round(scenario.kv_bytes_per_token * prompt),
        "curves": [
            {
                "backend": store.backend.name,
                "kind": store.backend.kind,
                "points": [_point(scenario, store, prompt, reuse) for reuse in question.reuses],
            }
            for store in scenario.all_stores()
        ],
    }


def _point(scenario: Scenario, store: Store, prompt: int, reuse: float) -> dict[str, Any]:
    return {
        "reuse": reuse,
        "ttft_seconds": _span(scenario.laws.estimate(lambda law: scenario.ttft(law, store, prompt, reuse))),
        "cost_per_100m_tokens": _amounts(scenario.laws, lambda law: scenario.cost(law, store, prompt, reuse)),
    }


def _break_even(scenario: Scenario, prefix: int) -> dict[str, Any]:
    def whole(law: Law) -> float:
        return break_even_bandwidth(law, scenario.kv_bytes_per_token, prefix)

    def last(law: Law) -> float:
        return marginal_break_even_bandwidth(law, scenario.kv_bytes_per_token, prefix)

    return {
        "prefix_tokens": prefix,
        "bytes_per_second": _span(scenario.laws.estimate(whole)),
        "last_token_bytes_per_second": _span(scenario.laws.estimate(last)),
    }


def _reuses(scenario: Scenario, store: Store, prefix: int) -> dict[str, Any]:
    """Reuses a month; a null high end is a range in which none are enough."""
    laws = scenario.laws
    slow, point, fast = (scenario.reuses_that_pay(law, store, prefix) for law in (laws.slow, laws.point, laws.fast))
    reuses = None if point is None else {"low": slow, "point": point, "high": fast}
    return {"backend": store.backend.name, "prefix_tokens": prefix, "reuses": reuses}


def _findings(question: Question) -> list[str]:
    shape, gpu, scenario = question.shape, question.gpu, question.scenario
    found = [] if question.ledger is None else list(question.ledger.findings)
    if gpu is not None and shape.resident_bytes > scenario.gpus * gpu.memory_bytes * _USABLE_SHARE:
        least = math.ceil(shape.resident_bytes / gpu.memory_bytes / _USABLE_SHARE)
        found.append(
            f"the weights take {shape.resident_bytes / 1e9:,.0f} GB and do not fit into {scenario.gpus} x {gpu.name}: "
            f"read the figures as scaled by GPU, or give --gpus {least}"
        )
    if scenario.replica_hourly is None:
        found.append(_unpriced(question))
    slower = [
        store.backend.name
        for store in scenario.stores
        if any(
            scenario.ttft(scenario.laws.point, store, prompt, 1.0)
            > scenario.ttft(scenario.laws.point, store, prompt, 0.0)
            for prompt in question.prompts
        )
    ]
    if slower:
        found.append(f"slower than computing at some prompt length: {', '.join(slower)}")
    if shape.is_latent:
        found.append("latent attention: unpacking the reused prefix again in each chunk is not counted")
    return found


def _unpriced(question: Question) -> str:
    if question.gpu is None:
        return "no price of the host is known, so no cost: give --host-price"
    return f"no price of {question.gpu.name} is known, so no cost: give --gpu-price or --owned"


def _span(figure: Estimate | None) -> dict[str, float | None] | None:
    """A figure as it prints; an end that is infinite is none."""
    if figure is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in figure._asdict().items()}


def _amount(value: Decimal) -> str:
    return f"{value:.9f}"


def _amounts(laws: LawRange, cost: Callable[[Law], Decimal | None]) -> dict[str, str] | None:
    amounts: Sequence[Decimal] = [each for law in laws if (each := cost(law)) is not None]
    if not amounts:
        return None
    return {"low": _amount(min(amounts)), "point": _amount(amounts[0]), "high": _amount(max(amounts))}
