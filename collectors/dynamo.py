"""NVIDIA Dynamo's frontend: requests and their tokens by model; its workers' pages are those of their engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Plan

_PREFIX = "dynamo_frontend_"

FAMILIES = (
    Family("requests", f"{_PREFIX}requests_total", unit="requests", trap="counted when they end, by status"),
    Family("failed_requests", f"{_PREFIX}requests_total", {"status": "error"}, unit="requests"),
    Family("input_tokens", f"{_PREFIX}input_sequence_tokens_sum", trap="counted at the first token"),
    Family(
        "cached_tokens",
        f"{_PREFIX}cached_tokens_sum",
        trap="as the engines tell them; of a disaggregated request, the transfer too",
    ),
    Family("cached_tokens", f"{_PREFIX}cached_sequence_length_sum", trap="an older name of the same"),
    Family("output_tokens", f"{_PREFIX}output_tokens_total", trap="counted as they come"),
    Family("output_tokens", f"{_PREFIX}output_sequence_tokens_sum", trap="counted when a request ends"),
    Family("first_token_ns", f"{_PREFIX}time_to_first_token_seconds_sum", unit="seconds"),
    Family("request_ns", f"{_PREFIX}request_duration_seconds_sum", unit="seconds"),
)

# (family, * for any ending; why it is not read)
NOT_READ = (
    ("dynamo_component_kvstats_*", "gauges of a worker's cache; its engine counts the same on the same page"),
    ("dynamo_component_router_kv_hit_rate", "what the router expects of an engine's cache: no hit of it"),
    ("dynamo_frontend_worker_*", "gauges of the last request, or of the router's own book-keeping"),
    ("dynamo_frontend_model_*", "how the workers are run; migrations have no tokens"),
)


class DynamoMapping(TableMapping):
    """Reads the frontend's families; one gateway target per model."""

    def __init__(self) -> None:
        super().__init__("gateway", FAMILIES, source="dynamo", by=("model",), tells={"model": ("model",)})

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One plan per model; its target keeps its name whichever other models come and go."""
        plans = super().compile(target, series, version, helps)
        for plan in plans:
            plan.name = f"{target}/dynamo/{plan.attributes.get('model', '')}".rstrip("/")
        return plans
