"""llm-d's router (its endpoint picker, the EPP): requests and their tokens as the responses tell them, by model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Plan

_EPP = "llm_d_epp_"
# Releases around a renaming emit the old name beside the new one, both with the whole count: whichever row comes first
# serves, and no two of them ever add up. inference_model_ is of the Gateway API Inference Extension up to 1.0.
_OLDER = ("llm_d_router_epp_", "inference_objective_", "inference_model_")
_OLD_NAME = "an older name of the same count, emitted beside the new one: it serves only where that is absent"
_FROM_RESPONSE = "from the usage that the response tells at its end: a request that was aborted is not in it"

# decode-only: a decode engine computed the prompt itself; encode-decode: the same behind an encoder of images;
# aggregated-fallback: one engine did both. Values that a later release may add count as none of ours.
DISAGGREGATED = re.compile(r"prefill-decode|encode-prefill-decode")


def _rows(quantity: str, suffix: str, older: str, unit: str, trap: str = "") -> list[Family]:
    """One quantity under its name of today, then under the older ones."""
    names = dict.fromkeys((f"{_EPP}{suffix}", *(f"{prefix}{older}" for prefix in (_EPP, *_OLDER))))
    return [Family(quantity, name, unit=unit, trap=trap if not at else _OLD_NAME) for at, name in enumerate(names)]


FAMILIES = (
    *_rows("requests", "request_total", "request_total", "requests", "counted when they come in"),
    *_rows("failed_requests", "request_error_total", "request_error_total", "requests", "by error_code; all of them"),
    *_rows("input_tokens", "request_input_tokens_sum", "input_tokens_sum", "tokens", _FROM_RESPONSE),
    *_rows(
        "cached_tokens",
        "request_cached_tokens_sum",
        "prompt_cached_tokens_sum",
        "tokens",
        "0 unless the engines run with --enable-prompt-tokens-details; of a disaggregated request, the transfer too",
    ),
    *_rows("output_tokens", "request_output_tokens_sum", "output_tokens_sum", "tokens", _FROM_RESPONSE),
    *(
        Family(
            "disaggregated_requests",
            f"{prefix}{name}_total",
            {"decision_type": DISAGGREGATED},
            unit="requests",
            trap="a decision of the router, made before the request ran" if not at else _OLD_NAME,
        )
        for at, (prefix, name) in enumerate(
            (prefix, name)
            for name in ("disagg_decision", "pd_decision")
            for prefix in (_EPP, "llm_d_router_epp_", "llm_d_inference_scheduler_")
        )
    ),
    Family(
        "first_token_ns",
        f"{_EPP}request_ttft_seconds_sum",
        unit="seconds",
        trap="with streaming=false the time of the whole answer",
    ),
    *_rows("request_ns", "request_duration_seconds_sum", "request_duration_seconds_sum", "seconds"),
)

# (family, * for any ending; why it is not read)
NOT_READ = (
    (
        "llm_d_epp_prefix_indexer_*",
        "what the router expects of an engine's cache, in bytes of prompt text: no hit of it",
    ),
    ("llm_d_epp_kv_cache_index_*", "blocks that the router's own index knows, asked to choose an engine: no hit of it"),
    ("kvcache_index_*", "as llm_d_epp_kv_cache_index_, under its older name"),
    ("llm_d_epp_scheduler_attempts_total", "attempts at choosing an engine: a request may take several"),
    ("llm_d_epp_request_size_bytes", "bytes of text"),
    ("llm_d_epp_response_size_bytes", "bytes of text"),
    ("llm_d_epp_request_ntpot_seconds", "a mean of each request: its sum means nothing"),
    ("llm_d_epp_request_streaming_tpot_seconds", "as above, of streaming requests"),
    (
        "llm_d_epp_request_streaming_itl_seconds",
        "between chunks of streamed answers, which need not be tokens; the engines tell theirs",
    ),
    ("llm_d_epp_request_predicted_*", "what the router expects, not what was"),
    ("llm_d_epp_request_running", "requests at an instant: the engines tell their own"),
    ("llm_d_epp_*_processing_duration_seconds", "seconds in the router: they are no engine's"),
    ("llm_d_epp_*e2e_duration_seconds", "as above"),
    ("llm_d_epp_plugin_duration_seconds", "as above"),
    ("llm_d_epp_flow_control_*", "the router's own queue: waiting there costs no engine"),
    ("llm_d_epp_average_*", "means over engines at an instant: the engines tell their own"),
    ("llm_d_epp_per_endpoint_queue_size", "gauges that the engines' own pages have"),
    ("llm_d_epp_ready_endpoints", "engines at an instant"),
    ("llm_d_epp_info", "the router's own version"),
    ("inference_objective_normalized_time_per_output_token_seconds", "request_ntpot_seconds by its older name"),
    ("inference_objective_*_sizes", "bytes of text, by their older names"),
    ("inference_objective_running_requests", "requests at an instant, by its older name"),
    (
        "inference_pool_*",
        "queues and caches of engines at an instant, by their older names: the engines tell their own",
    ),
    ("inference_extension_*", "the router's own work and its prefix index, by their older names"),
    ("llm_d_epp_inflight_tokens", "the router's estimate of what waits at an engine"),
)
_MODEL = "model"


class LlmDMapping(TableMapping):
    """Reads the EPP's families; one gateway target per model that engines are asked for.

    Requests of all tenants (fairness_id) and priorities are summed.
    """

    def __init__(self) -> None:
        super().__init__("gateway", FAMILIES, source="llm-d", by=(_MODEL,), tells={_MODEL: (_MODEL,)})

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One plan per model; its target keeps its name whichever other models come and go."""
        known = [one._replace(labels={**one.labels, _MODEL: _model(one.labels)}) for one in series]
        plans = super().compile(target, known, version, helps)
        for plan in plans:
            plan.name = f"{target}/llm-d/{plan.attributes.get(_MODEL, '')}".rstrip("/")
        return plans


# llm_d_epp_request_total{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 12
# llm_d_epp_disagg_decision_total{decision_type="prefill-decode",model_name="llama-8b",plugin_name="…"} 9
def _model(labels: Mapping[str, str]) -> str:
    """The model that the engine was asked for; a decision has it as model_name, or "unknown"."""
    if "decision_type" in labels and labels.get("model_name") == "unknown":
        return ""
    return labels.get("target_model_name") or labels.get("model_name", "")
