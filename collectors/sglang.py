"""SGLang's families (0.5.10 to 0.5.23) as engine readings, and its host tier (HiCache) as a cache of its own."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Labels, Plan

# sglang:prompt_tokens_total{engine_type="unified",is_streaming="true",model_name="qwen"} 5120.0
# sglang:cached_tokens_total{cache_source="storage_HiCacheFile",model_name="qwen"} 768.0
# sglang:num_running_reqs{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 3.0
_PROMPT = "sglang:prompt_tokens_total"
_CACHED = "sglang:cached_tokens_total"
_STORAGE = re.compile("storage(_.*)?")
_HOST_OR_STORAGE = re.compile("host|storage(_.*)?")
_AT_FINISH = "counted when a request finishes, all its tokens at once"
# The tokenizer counts tokens, once for all ranks. Schedulers count by rank: those of one dp_rank run the same requests.
_RANKS = ("tp_rank", "pp_rank", "moe_ep_rank")
# with priority scheduling a gauge is shown once more for each priority; the whole carries an empty one
_WHOLE = {"priority": ""}

FAMILIES = (
    Family("prompt_tokens", _PROMPT, since="0.5.10", trap=f"{_AT_FINISH}; 0.5.23 splits it by is_streaming"),
    Family(
        "computed_tokens",
        _PROMPT,
        since="0.5.10",
        less=((_CACHED, {}),),
        trap="prompt tokens less cached ones, both counted at the same instant; a second prefill after a retraction "
        "is in neither",
    ),
    Family("computed_tokens", _PROMPT, since="0.5.10", trap="while nothing was cached there is no cached_tokens"),
    Family(
        "hbm_tokens", _CACHED, {"cache_source": "device"}, since="0.5.10", zero_beside=_PROMPT, trap=f"{_AT_FINISH}"
    ),
    Family(
        "external_tokens",
        _CACHED,
        {"cache_source": _HOST_OR_STORAGE},
        since="0.5.10",
        zero_beside=_PROMPT,
        trap="host DRAM and storage; storage is storage_<backend> in 0.5.10 and storage in 0.5.23",
    ),
    Family("generated_tokens", "sglang:generation_tokens_total", since="0.5.10", trap=_AT_FINISH),
    Family("first_tokens", "sglang:time_to_first_token_seconds_count", unit="requests"),
    Family("first_token_ns", "sglang:time_to_first_token_seconds_sum", unit="seconds"),
    Family("finished_requests", "sglang:num_requests_total", unit="requests"),
    Family("preemptions", "sglang:num_retracted_requests_total", unit="requests", repeated=_RANKS),
    Family("queue_ns", "sglang:queue_time_seconds_sum", unit="seconds", repeated=_RANKS),
    Family("inter_token_ns", "sglang:inter_token_latency_seconds_sum", unit="seconds"),
    Family("request_ns", "sglang:e2e_request_latency_seconds_sum", unit="seconds"),
    Family("running_requests", "sglang:num_running_reqs", _WHOLE, unit="requests", repeated=_RANKS),
    Family("waiting_requests", "sglang:num_queue_reqs", _WHOLE, unit="requests", repeated=_RANKS),
    Family("kv_usage_ppm", "sglang:token_usage", unit="ratio", greatest=True, trap="the fullest of the ranks"),
    Family("admitted_device_tokens", _CACHED, {"cache_source": "device"}, since="0.5.10", trap=_AT_FINISH),
    Family("admitted_host_tokens", _CACHED, {"cache_source": "host"}, since="0.5.10", trap=_AT_FINISH),
    Family("admitted_disk_tokens", _CACHED, {"cache_source": _STORAGE}, since="0.5.10", trap=_AT_FINISH),
    Family(
        "admitted_unspecified_tokens",
        _CACHED,
        {"cache_source": re.compile("(total)?")},
        trap="of requests whose tiers are not told; in no tier's count",
    ),
    Family("finished_abort", "sglang:num_aborted_requests_total", unit="requests"),
    Family(
        "estimated_gflop",
        "sglang:estimated_flops_per_gpu_total",
        unit="FLOP",
        scale=1e-9,
        repeated=_RANKS,
        trap="needs --enable-mfu-metrics",
    ),
    Family("estimated_read_bytes", "sglang:estimated_read_bytes_per_gpu_total", unit="bytes", repeated=_RANKS),
    Family("estimated_write_bytes", "sglang:estimated_write_bytes_per_gpu_total", unit="bytes", repeated=_RANKS),
)
# Without rank labels (0.5.10) the page adds up what every rank counts alike, so its tokens and seconds are a multiple.
_OF_RANK: Labels = {"tp_rank": re.compile(r"\d+")}
_KV_OF_RANK: Labels = {**_OF_RANK, "pool": "kv"}
CACHE_FAMILIES = (
    Family("loaded_tokens", "sglang:load_back_tokens_total", _KV_OF_RANK, since="0.5.23", repeated=_RANKS),
    Family("stored_tokens", "sglang:hicache_backup_tokens_total", _KV_OF_RANK, since="0.5.23", repeated=_RANKS),
    Family(
        "loads",
        "sglang:load_back_duration_seconds_count",
        _OF_RANK,
        since="0.5.23",
        unit="operations",
        repeated=_RANKS,
    ),
    Family(
        "stores",
        "sglang:hicache_backup_duration_seconds_count",
        _OF_RANK,
        since="0.5.23",
        unit="operations",
        repeated=_RANKS,
    ),
    Family(
        "load_ns",
        "sglang:load_back_duration_seconds_sum",
        _OF_RANK,
        since="0.5.23",
        unit="seconds",
        repeated=_RANKS,
        trap="one rank's, the others copy beside it; gaps between layers are among it",
    ),
    Family(
        "store_ns",
        "sglang:hicache_backup_duration_seconds_sum",
        _OF_RANK,
        since="0.5.23",
        unit="seconds",
        repeated=_RANKS,
    ),
    Family("load_bytes", "sglang:load_back_bytes_total", since="0.5.23", unit="bytes", trap="all ranks' shards"),
    Family("store_bytes", "sglang:hicache_backup_bytes_total", since="0.5.23", unit="bytes", trap="all ranks' shards"),
)
NOT_READ = (
    ("sglang:cache_hit_rate", "of the last prefill batch, and 0 after every decode step: a mean of it means nothing"),
    ("sglang:realtime_tokens_total", "tokens of retracted requests are in it a second time; tokens at finish are read"),
    ("sglang:prefill_effective_tokens_total", "what cached_tokens tells at finish, told at every log interval"),
    ("sglang:uncached_prompt_tokens_histogram", "prompt tokens less cached ones, which are read"),
    ("sglang:prefetched_tokens_total", "storage to host ahead of need: what of it was used is in cached_tokens"),
    ("sglang:backuped_tokens_total", "host to storage, counted by each rank"),
    ("sglang:storage_prefetch_hit_tokens_total", "what storage promised, not what a request used"),
    ("sglang:prefetch_bandwidth", "a histogram of GB/s: no bytes and no seconds follow from it"),
    ("sglang:evicted_tokens_total", "slots freed, whether or not they were kept elsewhere"),
    ("sglang:hicache_host_used_tokens", "tokens, where the cache's used_bytes are bytes"),
    ("sglang:gpu_execution_seconds_total", "GPU seconds by batch kind, gone in 0.5.23; the GPU collectors measure"),
    ("sglang:forward_execution_seconds_total", "as above, since 0.5.23; steps are not counted beside it"),
)


def spelled(sample_name: str) -> str:
    """The sample's name with SGLang's own colon, which OpenMetrics without escaping=allow-utf-8 rewrites."""
    return "sglang:" + sample_name[7:] if sample_name.startswith("sglang_") else sample_name


class SglangMapping:
    """Reads the pages of an SGLang server: one engine per model, and its host tier where it has one.

    A series of cached_tokens is made with its first token, so one that is absent stands for zero, unless the page
    counts cached tokens without their tier.
    """

    def __init__(self) -> None:
        untold = tuple(row for row in FAMILIES if row.quantity not in {"hbm_tokens", "external_tokens"})
        self._by_tier, self._untold = (
            TableMapping(
                "engine",
                families,
                source="sglang",
                suffix="/0",
                by=("model_name",),
                tells={"model": ("model_name",), "engine_type": ("engine_type",)},
                attributes={"engine": "sglang"},
                spelled=spelled,
            )
            for families in (FAMILIES, untold)
        )
        self._cache = TableMapping(
            "cache",
            CACHE_FAMILIES,
            source="sglang",
            suffix="/hicache",
            attributes={"cache": "sglang hicache"},
            spelled=spelled,
        )

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read, in either spelling."""
        return self._by_tier.wants(sample_name) or self._cache.wants(sample_name)

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read."""
        return tuple(dict.fromkeys((*self._by_tier.names(), *self._cache.names())))

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One engine plan per model, and a cache plan where host memory holds KV."""
        tiers = {one.labels.get("cache_source", "") for one in series if spelled(one.name) == _CACHED}
        engines = self._untold if tiers & {"", "total"} else self._by_tier
        return [
            *engines.compile(target, series, version, helps),
            *self._cache.compile(target, series, version, helps),
        ]
