"""TensorRT-LLM's families (trtllm-serve, /prometheus/metrics) as engine readings, and its host tier as a cache."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Plan

# trtllm_prompt_tokens_total{engine_type="trtllm",model_name="nemotron"} 20480.0
# trtllm_prompt_cache_hit_tokens_total{cache_level="1",cache_tier="host",engine_type="trtllm",model_name="n"} 96.0
_PROMPT = "trtllm_prompt_tokens_total"
_CACHED = "trtllm_prompt_cached_tokens_total"
_BY_TIER = "trtllm_prompt_cache_hit_tokens_total"
_GPU = "gpu"
_OUTER = re.compile(f"(?!{_GPU}).+")
_REQUESTS = "counted when a request finishes; needs return_perf_metrics: true"
_STEPS = "needs enable_iter_perf_stats: true"
_SCHEDULED = f"counted when a request is scheduled, so it differs from cached tokens by requests in flight; {_STEPS}"

FAMILIES = (
    Family("prompt_tokens", _PROMPT, trap=_REQUESTS),
    Family("computed_tokens", _PROMPT, less=((_CACHED, {}),), trap=f"prompt tokens less cached ones; {_REQUESTS}"),
    Family("generated_tokens", "trtllm_generation_tokens_total", trap=_REQUESTS),
    Family("prefix_hit_tokens", _BY_TIER, {"cache_tier": _GPU}, trap=_SCHEDULED),
    Family("external_hit_tokens", _BY_TIER, {"cache_tier": _OUTER}, trap=_SCHEDULED),
    Family("first_tokens", "trtllm_time_to_first_token_seconds_count", unit="requests", trap=_REQUESTS),
    Family("first_token_ns", "trtllm_time_to_first_token_seconds_sum", unit="seconds", trap=_REQUESTS),
    Family("finished_requests", "trtllm_request_success_total", unit="requests", trap=_REQUESTS),
    Family("queue_ns", "trtllm_request_queue_time_seconds_sum", unit="seconds", trap=_REQUESTS),
    Family("prefill_ns", "trtllm_request_prefill_time_seconds_sum", unit="seconds", trap=_REQUESTS),
    Family("decode_ns", "trtllm_request_decode_time_seconds_sum", unit="seconds", trap=_REQUESTS),
    Family("request_ns", "trtllm_e2e_request_latency_seconds_sum", unit="seconds", trap=_REQUESTS),
    Family("running_requests", "trtllm_num_requests_running", unit="requests", trap=_STEPS),
    Family("waiting_requests", "trtllm_num_requests_waiting", unit="requests", trap=_STEPS),
    Family("kv_usage_ppm", "trtllm_kv_cache_utilization", unit="ratio", trap=_STEPS),
    Family("cached_tokens", _CACHED, trap=_REQUESTS),
    Family("admitted_device_tokens", _BY_TIER, {"cache_tier": _GPU}, trap=_SCHEDULED),
    Family("admitted_host_tokens", _BY_TIER, {"cache_tier": "host"}, trap=f"disk pages read ahead too; {_SCHEDULED}"),
    Family("admitted_disk_tokens", _BY_TIER, {"cache_tier": "disk"}, trap=_SCHEDULED),
    Family("reused_blocks", "trtllm_kv_cache_reused_blocks_total", unit="blocks", trap=_STEPS),
    Family("missed_blocks", "trtllm_kv_cache_missed_blocks_total", unit="blocks", trap=_STEPS),
    Family("disk_prefetch_blocks", "trtllm_kv_cache_disk_prefetch_blocks_total", unit="blocks", trap=_STEPS),
)
# where the page names no tier but the GPU's, every cached token is from there
ONE_TIER_FAMILIES = (
    Family("hbm_tokens", _CACHED, trap=f"where the GPU is the only tier; {_REQUESTS}"),
    Family("external_tokens", _BY_TIER, {"cache_tier": _OUTER}, zero_beside=_CACHED, trap="the GPU is the only tier"),
)
CACHE_FAMILIES = (
    Family("load_bytes", "trtllm_kv_cache_onboard_bytes_total", unit="bytes", trap=f"host to GPU; {_STEPS}"),
    Family("store_bytes", "trtllm_kv_cache_offload_bytes_total", unit="bytes", trap=f"GPU to host; {_STEPS}"),
)
# (family, * for any ending; why it is not read)
NOT_READ = (
    ("trtllm_kv_cache_hit_rate", "a ratio over the engine's life"),
    ("trtllm_kv_cache_iter_reuse_rate", "a ratio of the last iteration"),
    ("trtllm_kv_cache_iter_reused_blocks_total", "the same blocks as trtllm_kv_cache_reused_blocks_total"),
    ("trtllm_kv_cache_iter_full_reused_blocks_total", "blocks, of which reused_blocks is the sum; tokens are read"),
    ("trtllm_kv_cache_iter_partial_reused_blocks_total", "as above; a part of a block has no size here"),
    ("trtllm_kv_cache_iter_missed_blocks_total", "the same blocks as trtllm_kv_cache_missed_blocks_total"),
    ("trtllm_kv_cache_gen_alloc_blocks_total", "blocks of answers: generated tokens are read"),
    ("trtllm_kv_cache_tokens_per_block", "a setting; every count of tokens is one of tokens already"),
    ("trtllm_kv_cache_host_utilization", "a share of the host tier at an instant"),
    ("trtllm_kv_cache_*_blocks", "blocks at an instant: kv_cache_utilization is read"),
    ("trtllm_request_inference_time_seconds", "the sum of prefill and decode time, which are read"),
    ("trtllm_*_memory_usage_bytes", "memory at an instant: the GPU collectors measure"),
    ("trtllm_max_*", "settings, and limits at an instant"),
    ("trtllm_*_config_info", "settings"),
    ("trtllm_num_*_requests", "requests of the last iteration: num_requests_running is read"),
    ("trtllm_avg_decoded_tokens_per_iter", "a mean of the last iteration"),
    ("trtllm_spec_decode_*", "accepted tokens are among the generated ones; drafts have no price of their own"),
    ("trtllm_kv_cache_intra_device_copy_bytes_total", "copies within the GPU move nothing between tiers"),
    ("trtllm_time_per_output_token_seconds", "a mean per request: its sum is no sum over tokens"),
    ("trtllm_num_requests_completed_total", "iterations count requests that failed too; successes are read"),
    ("trtllm_total_context_tokens", "a gauge of the last iteration"),
    ("trtllm_iteration_latency_seconds", "a gauge of the last iteration; nothing counts iterations"),
    ("nv_trt_llm_kv_cache_block_metrics", "Triton's gauges of blocks: no tokens are counted beside them"),
    ("nv_trt_llm_request_metrics", "Triton's gauges of requests: no tokens are counted beside them"),
)


class TensorRtLlmMapping:
    """Reads the pages of trtllm-serve, whose url the config gives: http://host:8000/prometheus/metrics.

    Tiers are told when a request is scheduled, prompt tokens when it finishes. So tokens by tier stay in their own
    quantities (prefix_hit_tokens, external_hit_tokens): reports part what was cached by their shares.
    """

    def __init__(self) -> None:
        self._tiers, self._one_tier = (
            TableMapping(
                "engine",
                families,
                source="tensorrt-llm",
                suffix="/0",
                by=("model_name",),
                tells={"model": ("model_name",)},
                attributes={"engine": "tensorrt-llm"},
            )
            for families in (FAMILIES, FAMILIES + ONE_TIER_FAMILIES)
        )
        self._cache = TableMapping(
            "cache",
            CACHE_FAMILIES,
            source="tensorrt-llm",
            suffix="/kv_host",
            attributes={"cache": "tensorrt-llm host pool"},
        )

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read."""
        return self._one_tier.wants(sample_name) or self._cache.wants(sample_name)

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read."""
        return tuple(dict.fromkeys((*self._one_tier.names(), *self._cache.names())))

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One engine plan per model, and a cache plan where bytes move between host and GPU."""
        tiers = {one.labels.get("cache_tier") for one in series if one.name == _BY_TIER}
        engines = self._one_tier if tiers == {_GPU} else self._tiers
        return [
            *engines.compile(target, series, version, helps),
            *self._cache.compile(target, series, version, helps),
        ]
