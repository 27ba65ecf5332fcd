"""Costs under the names and labels of OpenCost's inference cost, for setting the two side by side."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Values = tuple[str, dict[str, str], float]  # metric, labels, value

# its basis, and which of our views says the same: allocation has the idle share in it, usage has not
_BASES = {"allocation": "fully_loaded", "usage": "active"}
_PHASES = {"": "total", "prompt": "input", "generation": "output"}


def opencost_figures(answer: Mapping[str, Any]) -> Iterator[Values]:
    """The three gauges out of a cost report by model and namespace; what is unknown is left out."""
    hours = answer["window"]["covered_seconds"] / 3600
    for group in answer["groups"]:
        by, tokens = group["by"], group["tokens"]
        if by["model"] is None:  # GPUs that no engine holds: OpenCost knows models only
            continue
        # OpenCost has these two labels for what it may tell apart one day
        about = {"model_name": by["model"], "model_version": "unknown", "namespace": by["namespace"] or ""}
        about["workload_type"] = "inference"
        if group["cost"] is not None:
            yield from _costs(group, hours, about)
        if tokens["prompt"] and tokens["cached"]["hbm"] is not None:
            yield "llm_cache_savings_fraction", about, tokens["cached"]["hbm"] / tokens["prompt"]


def _costs(group: Mapping[str, Any], hours: float, about: Mapping[str, str]) -> Iterator[Values]:
    total = Decimal(group["cost"]["total"])
    used = total - sum(map(Decimal, group["cost"]["of_which"].values()))
    for basis, amount in (("allocation", total), ("usage", used)):
        labels = {**about, "cost_basis": basis}
        prices = group["cost_per_million"][_BASES[basis]]
        for phase, ours in _PHASES.items():
            if prices[ours] is not None:
                method = {"phase": phase, "allocation_method": "compute_time" if phase else ""}
                yield "llm_cost_per_million_tokens", {**labels, **method}, float(prices[ours])
        if hours:
            yield "llm_total_hourly_cost", labels, float(amount) / hours
