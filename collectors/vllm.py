"""vLLM's own families (0.11.1 to 0.33) as engine readings, one per engine core (data-parallel rank)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.base import CollectError
from kvtally.collectors.page import Detail, Pick, Plan, bucket_details, positions
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.base import Kind
    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Samples

    Engine = tuple[str, str]  # index and model
# quantity -> the samples that may serve it, best first: (name, labels)
# A page of vLLM 0.25:
#   vllm:prompt_tokens_by_source_total{engine="0",model_name="llama-8b",source="local_compute"} 859550.0
#   vllm:iteration_tokens_total_count{engine="0",model_name="llama-8b"} 4688.0
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_ENGINE: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
    "prompt_tokens": (("vllm:prompt_tokens_total", {}),),
    "computed_tokens": ((_BY_SOURCE, {"source": "local_compute"}),),
    "hbm_tokens": ((_BY_SOURCE, {"source": "local_cache_hit"}),),
    "external_tokens": ((_BY_SOURCE, {"source": "external_kv_transfer"}),),
    "generated_tokens": (("vllm:generation_tokens_total", {}),),
    "prefix_query_tokens": (("vllm:prefix_cache_queries_total", {}),),
    "prefix_hit_tokens": (("vllm:prefix_cache_hits_total", {}),),
    "external_query_tokens": (("vllm:external_prefix_cache_queries_total", {}),),
    "external_hit_tokens": (("vllm:external_prefix_cache_hits_total", {}),),
    "first_tokens": (("vllm:time_to_first_token_seconds_count", {}),),
    "finished_requests": (("vllm:request_success_total", {}),),
    "preemptions": (("vllm:num_preemptions_total", {}),),
    "steps": (("vllm:iteration_tokens_total_count", {}),),
    "step_tokens": (("vllm:iteration_tokens_total_sum", {}),),
    "first_token_ns": (("vllm:time_to_first_token_seconds_sum", {}),),
    "queue_ns": (("vllm:request_queue_time_seconds_sum", {}),),
    "prefill_ns": (("vllm:request_prefill_time_seconds_sum", {}),),
    "decode_ns": (("vllm:request_decode_time_seconds_sum", {}),),
    "inter_token_ns": (
        ("vllm:inter_token_latency_seconds_sum", {}),
        ("vllm:time_per_output_token_seconds_sum", {}),  # its name until 0.11
    ),
    "request_ns": (("vllm:e2e_request_latency_seconds_sum", {}),),
    "running_requests": (("vllm:num_requests_running", {}),),
    "waiting_requests": (("vllm:num_requests_waiting", {}),),
    "waiting_for_capacity": (("vllm:num_requests_waiting_by_reason", {"reason": "capacity"}),),
    "kv_usage_ppm": (("vllm:kv_cache_usage_perc", {}), ("vllm:gpu_cache_usage_perc", {})),
    "awake": (("vllm:engine_sleep_state", {"sleep_state": "awake"}),),
}
_CACHED_BY_SOURCE = "vllm:prompt_tokens_cached_by_source_total"
_DETAILS: tuple[tuple[str, str, Mapping[str, str], float], ...] = (
    ("cached_tokens", "vllm:prompt_tokens_cached_total", {}, 1),
    ("recomputed_tokens", "vllm:prompt_tokens_recomputed_total", {}, 1),  # 0.16 to 0.19
    # counted at admission, so they differ from hbm_tokens and external_tokens by requests in flight
    ("admitted_device_tokens", _CACHED_BY_SOURCE, {"source": "device"}, 1),
    ("admitted_host_tokens", _CACHED_BY_SOURCE, {"source": "host"}, 1),
    ("admitted_disk_tokens", _CACHED_BY_SOURCE, {"source": "disk"}, 1),
    ("admitted_p2p_tokens", _CACHED_BY_SOURCE, {"source": "p2p"}, 1),
    ("admitted_unspecified_tokens", _CACHED_BY_SOURCE, {"source": "external_unspecified"}, 1),
    ("finished_prompt_tokens", "vllm:request_prompt_tokens_sum", {}, 1),
    ("finished_computed_tokens", "vllm:request_prefill_kv_computed_tokens_sum", {}, 1),
    ("finished_generated_tokens", "vllm:request_generation_tokens_sum", {}, 1),
    ("finished_abort", "vllm:request_success_total", {"finished_reason": "abort"}, 1),
    ("finished_error", "vllm:request_success_total", {"finished_reason": "error"}, 1),
    ("estimated_gflop", "vllm:estimated_flops_per_gpu_total", {}, 1e-9),
    ("estimated_read_bytes", "vllm:estimated_read_bytes_per_gpu_total", {}, 1),
    ("estimated_write_bytes", "vllm:estimated_write_bytes_per_gpu_total", {}, 1),
)
_HISTOGRAMS = (
    ("vllm:iteration_tokens_total_bucket", "step_tokens"),
    ("vllm:request_prompt_tokens_bucket", "request_prompt_tokens"),
    ("vllm:request_prefill_kv_computed_tokens_bucket", "request_computed_tokens"),
)
_OFFLOAD: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]] = {
    "load_bytes": (
        ("vllm:kv_offload_load_bytes_total", {}),
        ("vllm:kv_offload_total_bytes_total", {"transfer_type": "CPU_to_GPU"}),  # 0.16 to 0.23
    ),
    "store_bytes": (
        ("vllm:kv_offload_store_bytes_total", {}),
        ("vllm:kv_offload_total_bytes_total", {"transfer_type": "GPU_to_CPU"}),
    ),
    "load_ns": (
        ("vllm:kv_offload_load_time_total", {}),
        ("vllm:kv_offload_total_time_total", {"transfer_type": "CPU_to_GPU"}),
    ),
    "store_ns": (
        ("vllm:kv_offload_store_time_total", {}),
        ("vllm:kv_offload_total_time_total", {"transfer_type": "GPU_to_CPU"}),
    ),
}
_INFO = "vllm:cache_config_info"
_INFO_LABELS = ("block_size", "cache_dtype", "num_gpu_blocks", "kv_cache_size_tokens", "enable_prefix_caching")
_START = "process_start_time_seconds"
_CREATED = "vllm:prompt_tokens_created"
# every engine has one of these from its start on
_SURE = ("vllm:prompt_tokens_total", "vllm:num_requests_running", "vllm:generation_tokens_total")
_MAX_ENGINES = 512  # of one page: each becomes a target of the ledger


def spelled(sample_name: str) -> str:
    """The sample's name with vLLM's own colon, which OpenMetrics without escaping=allow-utf-8 rewrites."""
    return "vllm:" + sample_name[5:] if sample_name.startswith("vllm_") else sample_name


class VllmMapping:
    """Reads the pages of vLLM's API server."""

    def __init__(self) -> None:
        tables = (_ENGINE, _OFFLOAD)
        names = {name for table in tables for choices in table.values() for name, _ in choices}
        names |= {name for _, name, _, _ in _DETAILS} | {name for name, _ in _HISTOGRAMS} | {_INFO, _START, _CREATED}
        self._names = frozenset(names)

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read, in either spelling."""
        return spelled(sample_name) in self._names

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read."""
        return tuple(sorted(self._names))

    def compile(self, target: str, series: Sequence[Series], version: str | None) -> list[Plan]:
        """One engine plan per (engine, model), and one cache plan where it offloads KV by itself."""
        owned = _by_engine(series)
        crowded = len({engine for engine, _ in owned}) < len(owned)
        start = next((at for at, one in enumerate(series) if one.name == _START), None)
        plans: list[Plan] = []
        for (engine, model), own in sorted(owned.items()):
            name = f"{target}/{engine}/{model}" if crowded else f"{target}/{engine}"
            attributes = {"engine": "vllm", "model": model} | ({"version": version} if version else {})
            for _, labels in own.get(_INFO, ()):
                attributes |= {key: labels[key] for key in _INFO_LABELS if key in labels}
            epoch = start if start is not None else next(iter(positions(own, _CREATED)), None)
            picks = _picks(own, _ENGINE, "engine")
            plans.append(Plan("engine", name, attributes, picks, details=_details(own), epoch=epoch))
            offload = _picks(own, _OFFLOAD, "cache")
            if any(offload):
                about = {"cache": "vllm kv_offload", "model": model}
                plans.append(Plan("cache", f"{name}/kv_offload", about, offload, epoch=epoch))
        return plans


def _by_engine(series: Sequence[Series]) -> dict[Engine, Samples]:
    """The samples of each engine; one that lacks a label belongs to the only engine it can mean, else to none."""
    engines = {
        (one.labels.get("engine", "0"), one.labels.get("model_name", ""))
        for one in series
        if spelled(one.name) in _SURE
    }
    if len(engines) > _MAX_ENGINES:
        raise CollectError(f"the page shows {len(engines)} engines, the limit is {_MAX_ENGINES}")
    homes: dict[tuple[str | None, str | None], list[Engine]] = {}
    for engine, model in engines:
        for labels in ((engine, model), (engine, None), (None, model), (None, None)):
            homes.setdefault(labels, []).append((engine, model))
    owned: dict[Engine, dict[str, list[tuple[int, Mapping[str, str]]]]] = {engine: {} for engine in engines}
    for at, one in enumerate(series):
        name = spelled(one.name)
        candidates = homes.get((one.labels.get("engine"), one.labels.get("model_name")), [])
        # the configuration names no model: it holds for all that this engine serves
        if len(candidates) == 1 or name == _INFO:
            for candidate in candidates:
                owned[candidate].setdefault(name, []).append((at, one.labels))
    return dict(owned)


def _picks(
    samples: Samples, table: Mapping[str, tuple[tuple[str, Mapping[str, str]], ...]], kind: Kind
) -> list[Pick | None]:
    picks: list[Pick | None] = []
    for quantity in QUANTITIES[kind]:
        found = next(
            (at for name, labels in table.get(quantity.name, ()) if (at := positions(samples, name, labels))), ()
        )
        # several front-ends may show a gauge each (label pid): it is the same engine that they show
        picks.append(Pick(found, quantity.type == "gauge") if found else None)
    return picks


def _details(samples: Samples) -> list[Detail]:
    details = [
        Detail(quantity, at[0], None, scale)
        for quantity, name, labels, scale in _DETAILS
        if len(at := positions(samples, name, labels)) == 1
    ]
    for name, prefix in _HISTOGRAMS:
        details += bucket_details(samples, name, prefix)
    return details
