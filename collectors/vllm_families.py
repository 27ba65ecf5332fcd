"""What vLLM 0.8 to 0.33 serves: which family tells a quantity, from which version on, in what unit, with what trap."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.family import Family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

SECONDS, BYTES, BLOCKS, REQUESTS, SHARE = "seconds", "bytes", "blocks", "requests", "share of 1"

# A page of vLLM 0.25:
#   vllm:prompt_tokens_by_source_total{engine="0",model_name="llama-8b",source="local_compute"} 859550.0
#   vllm:iteration_tokens_total_count{engine="0",model_name="llama-8b"} 4688.0
_BY_SOURCE = "vllm:prompt_tokens_by_source_total"
_RECOMPUTED = "vllm:prompt_tokens_recomputed_total"
_CACHED_BY_SOURCE = "vllm:prompt_tokens_cached_by_source_total"
_EXTERNAL_QUERIES = "vllm:external_prefix_cache_queries_total"
_ITERATION = "vllm:iteration_tokens_total"  # a histogram, for all its name
_ATTEMPTS = "until 0.26 counted on every scheduling attempt of a waiting request, so inflated under load"
_HIDDEN = "shown by default until 0.10; 0.11 needs --show-hidden-metrics-for-version=0.10, 0.12 has it no more"
_AT_FINISH = "counted at finish: requests in flight and aborted ones are not among them"
_ADMITTED = (
    "counted at admission, so it differs from the tokens by source, counted at first token, by requests in flight; "
    "connectors that name no tier (LMCache's among them) are under external_unspecified"
)


def _at_finish(quantity: str, sample: str, unit: str, trap: str = "") -> Family:
    return Family(quantity, sample, since="0.8", unit=unit, trap=f"{_AT_FINISH}. {trap}".removesuffix(". "))


def _gauge(quantity: str, sample: str, since: str, *, unit: str = REQUESTS, until: str = "", trap: str = "") -> Family:
    # several front-ends may show a gauge each (label pid): it is the same engine that they show
    return Family(quantity, sample, {}, since, until, unit, greatest=True, trap=trap)


FAMILIES = (
    Family(
        "prompt_tokens",
        "vllm:prompt_tokens_total",
        since="0.8",
        trap="whole prompts, counted at first token; where prefill and decode are apart, both pods count the same one",
    ),
    Family("computed_tokens", _BY_SOURCE, {"source": "local_compute"}, "0.16"),
    Family(
        "hbm_tokens",
        _BY_SOURCE,
        {"source": "local_cache_hit"},
        "0.16",
        "0.19",
        less=((_RECOMPUTED, {}),),
        trap="where a whole prompt was cached it counts the token that is computed again as a hit too: taken off here",
    ),
    Family("hbm_tokens", _BY_SOURCE, {"source": "local_cache_hit"}, "0.20"),
    Family(
        "external_tokens",
        _BY_SOURCE,
        {"source": "external_kv_transfer"},
        "0.16",
        trap="what another pod prefilled for this one (NIXL) is among it: no saving",
    ),
    Family(
        "generated_tokens",
        "vllm:generation_tokens_total",
        since="0.8",
        trap="output of aborted requests is among it, and one token a request of a prefill pod",
    ),
    Family("prefix_query_tokens", "vllm:prefix_cache_queries_total", since="0.9", trap=_ATTEMPTS),
    Family("prefix_query_tokens", "vllm:gpu_prefix_cache_queries_total", since="0.9", until="0.11", trap=_HIDDEN),
    Family(
        "prefix_query_tokens",
        "vllm:gpu_prefix_cache_queries_total",
        since="0.8",
        until="0.8",
        unit=BLOCKS,
        trap="whole blocks, times block_size of cache_config_info; the last, partial block of a prompt is not in it",
    ),
    Family("prefix_hit_tokens", "vllm:prefix_cache_hits_total", since="0.9", trap=_ATTEMPTS),
    Family("prefix_hit_tokens", "vllm:gpu_prefix_cache_hits_total", since="0.9", until="0.11", trap=_HIDDEN),
    Family(
        "prefix_hit_tokens",
        "vllm:gpu_prefix_cache_hits_total",
        since="0.8",
        until="0.8",
        unit=BLOCKS,
        trap="times block_size of cache_config_info; counted on every scheduling attempt",
    ),
    Family(
        "external_query_tokens",
        _EXTERNAL_QUERIES,
        since="0.11",
        trap="0.11.1 to 0.14 count whole prompts, 0.16 on what is left after the engine's own hits",
    ),
    Family(
        "external_hit_tokens",
        "vllm:external_prefix_cache_hits_total",
        since="0.11",
        trap="counted at admission: a load that fails later is not taken off; transfers between pods are hits here",
    ),
    Family("first_tokens", "vllm:time_to_first_token_seconds_count", since="0.8", unit=REQUESTS),
    Family(
        "finished_requests",
        "vllm:request_success_total",
        since="0.8",
        unit=REQUESTS,
        trap="what a client aborts is not in it",
    ),
    Family("preemptions", "vllm:num_preemptions_total", since="0.8", unit="preemptions"),
    Family("steps", f"{_ITERATION}_count", since="0.8", unit="steps", trap="steps without output are not observed"),
    Family(
        "step_tokens",
        f"{_ITERATION}_sum",
        since="0.8",
        trap="until 0.22 whole prompts, since 0.23 computed tokens; all of a prompt in the step of its first token",
    ),
    Family(
        "first_token_ns",
        "vllm:time_to_first_token_seconds_sum",
        since="0.8",
        unit=SECONDS,
        trap="arrival to first token as the front-end sees it: queue, loading and prefill",
    ),
    _at_finish(
        "queue_ns",
        "vllm:request_queue_time_seconds_sum",
        SECONDS,
        "Asynchronous loads of KV lie before: they are in it",
    ),
    _at_finish(
        "prefill_ns",
        "vllm:request_prefill_time_seconds_sum",
        SECONDS,
        "Wall time of requests that overlap: no engine seconds. Synchronous loads of KV are in it",
    ),
    _at_finish("decode_ns", "vllm:request_decode_time_seconds_sum", SECONDS, "Requests overlap"),
    Family("inter_token_ns", "vllm:inter_token_latency_seconds_sum", since="0.10", unit=SECONDS),
    Family(
        "inter_token_ns",
        "vllm:time_per_output_token_seconds_sum",
        since="0.8",
        until="0.14",
        unit=SECONDS,
        trap="hidden from 0.12 on, gone in 0.16",
    ),
    _at_finish("request_ns", "vllm:e2e_request_latency_seconds_sum", SECONDS),
    _gauge("running_requests", "vllm:num_requests_running", "0.8"),
    _gauge("waiting_requests", "vllm:num_requests_waiting", "0.8"),
    _gauge("waiting_for_capacity", "vllm:num_requests_waiting_by_reason", "0.20")._replace(
        labels={"reason": "capacity"}
    ),
    _gauge("kv_usage_ppm", "vllm:kv_cache_usage_perc", "0.9", unit=SHARE, trap="blocks that are cached count as free"),
    _gauge("kv_usage_ppm", "vllm:gpu_cache_usage_perc", "0.8", unit=SHARE, until="0.11", trap=_HIDDEN),
    _gauge("awake", "vllm:engine_sleep_state", "0.11", unit="1 or 0")._replace(labels={"sleep_state": "awake"}),
    Family("cached_tokens", "vllm:prompt_tokens_cached_total", since="0.16"),
    Family(
        "recomputed_tokens",
        _RECOMPUTED,
        since="0.16",
        until="0.19",
        trap="one for each prompt that was cached whole: nothing of it is waste",
    ),
    Family("admitted_device_tokens", _CACHED_BY_SOURCE, {"source": "device"}, "0.32", trap=_ADMITTED),
    Family("admitted_host_tokens", _CACHED_BY_SOURCE, {"source": "host"}, "0.32", trap=_ADMITTED),
    Family("admitted_disk_tokens", _CACHED_BY_SOURCE, {"source": "disk"}, "0.32", trap=_ADMITTED),
    Family("admitted_p2p_tokens", _CACHED_BY_SOURCE, {"source": "p2p"}, "0.32", trap=_ADMITTED),
    Family(
        "admitted_unspecified_tokens", _CACHED_BY_SOURCE, {"source": "external_unspecified"}, "0.32", trap=_ADMITTED
    ),
    _at_finish("finished_prompt_tokens", "vllm:request_prompt_tokens_sum", "tokens"),
    Family(
        "finished_computed_tokens",
        "vllm:request_prefill_kv_computed_tokens_sum",
        since="0.13",
        trap=f"{_AT_FINISH}. Since 0.33 a decode pod tells what its prefill pod computed",
    ),
    _at_finish("finished_generated_tokens", "vllm:request_generation_tokens_sum", "tokens"),
    Family(
        "finished_abort",
        "vllm:request_success_total",
        {"finished_reason": "abort"},
        "0.8",
        unit=REQUESTS,
        trap="stays 0: what a client aborts is dropped without being counted",
    ),
    Family("finished_error", "vllm:request_success_total", {"finished_reason": "error"}, "0.16", unit=REQUESTS),
    Family(
        "estimated_gflop",
        "vllm:estimated_flops_per_gpu_total",
        since="0.17",
        unit="floating-point operations",
        scale=1e-9,
        trap="an estimate of one GPU of the group, prefill and decode together; needs --enable-mfu-metrics",
    ),
    Family(
        "estimated_read_bytes",
        "vllm:estimated_read_bytes_per_gpu_total",
        since="0.17",
        unit=BYTES,
        trap="of HBM by a model, no I/O",
    ),
    Family(
        "estimated_write_bytes",
        "vllm:estimated_write_bytes_per_gpu_total",
        since="0.17",
        unit=BYTES,
        trap="of HBM by a model, no I/O",
    ),
    Family(
        "lmcache_lookup_ns",
        "vllm:lmcache_mp_lookup_duration_seconds_sum",
        unit=SECONDS,
        scale=1e9,
        trap="time to ask the LMCache server what it has; LMCache 0.5.6 and later",
    ),
    Family(
        "hisparse_load_bytes",
        "vllm:hisparse_host_to_device_bytes_total",
        since="0.32",
        unit=BYTES,
        trap="what decode steps fetch from host memory: no reuse",
    ),
)

# Their buckets become details `<quantity>_le_<bound>`, as plain counts.
HISTOGRAMS = (
    Family("step_tokens", f"{_ITERATION}_bucket", since="0.8", unit="steps", trap="until 0.22 by whole prompts"),
    Family("request_prompt_tokens", "vllm:request_prompt_tokens_bucket", since="0.8", unit=REQUESTS, trap=_AT_FINISH),
    Family(
        "request_computed_tokens",
        "vllm:request_prefill_kv_computed_tokens_bucket",
        since="0.13",
        unit=REQUESTS,
        trap=_AT_FINISH,
    ),
)


def counters_of(quantities: Sequence[str]) -> list[str]:
    """What the newest vLLM shows these quantities as; of a family split by labels all that are asked for as one."""
    rows = {row.quantity: row for row in reversed((*FAMILIES, *HISTOGRAMS)) if not row.until}
    samples = [rows[name].sample for name in quantities if name in rows]
    told = []
    for name in quantities:
        row = rows.get(name)
        labels = "" if row is None else ",".join(f'{label}="{value}"' for label, value in row.labels.items())
        if row is None:
            told.append(name)
        else:
            told.append(f"{row.sample}{{{labels}}}" if labels and samples.count(row.sample) == 1 else row.sample)
    return list(dict.fromkeys(told))


class Connector(NamedTuple):
    """A KV connector that counts by itself: its families make a cache target of their own, `<engine>/<name>`.

    information  families whose labels say what it is, and which of them
    is_transfer  it moves KV between pods: what it loads was computed for this very request, and is no saving
    """

    name: str
    title: str
    families: tuple[Family, ...]
    information: Mapping[str, tuple[str, ...]] = {}
    is_transfer: bool = False


# vllm:kv_offload_total_bytes_total{engine="0",model_name="m",transfer_type="CPU_to_GPU"} 71326760960
# vllm:kv_offload_total_bytes_total{engine="0",model_name="m",transfer_type="SHARED_STORAGE_to_GPU"} 4096
_TO_GPU, _FROM_GPU = {"transfer_type": re.compile(r".+_to_GPU")}, {"transfer_type": re.compile(r"GPU_to_.+")}
_STORAGE_TO_GPU = {"transfer_type": re.compile(r"(?!CPU_).+_to_GPU")}
_GPU_TO_STORAGE = {"transfer_type": re.compile(r"GPU_to_(?!CPU).+")}
# vllm:kv_offload_load_bytes_sharedstorage_total: llm-d's backend beside another; read as {spec="sharedstorage"}
_SHARED = {"spec": "sharedstorage"}
# vllm:kv_offload_tiering_read_bytes_total{engine="0",model_name="m",tier="1:fs"} 76714344448
_STORAGE_TIER = {"tier": re.compile(r"\d+:(?!primary$|p2p$|kvcr$).+")}
_PEER_TIER = {"tier": re.compile(r"\d+:(?:p2p|kvcr)")}
_LOAD, _STORE, _TOTAL = "vllm:kv_offload_load", "vllm:kv_offload_store", "vllm:kv_offload_total"
_TIERING = "vllm:kv_offload_tiering"
_SIMPLE = "vllm:simple_kv_offload"
_WORKERS = "summed over tensor-parallel workers"
_OLD = f"{_WORKERS}; deprecated since 0.24 and still shown beside its successors: never added to them"
_CHUNKS = "whole chunks, padding included, when the job that moves them is done"
_LLM_D = "llm-d's filesystem backend: the copy to the GPU is in its time"

_KV_OFFLOAD = (
    Family("load_bytes", f"{_LOAD}_bytes_total", {}, "0.24", "", BYTES, trap=_WORKERS),
    Family("load_bytes", f"{_TOTAL}_bytes_total", _TO_GPU, "0.16", "", BYTES, trap=_OLD),
    Family("store_bytes", f"{_STORE}_bytes_total", {}, "0.24", "", BYTES, trap=_WORKERS),
    Family("store_bytes", f"{_TOTAL}_bytes_total", _FROM_GPU, "0.16", "", BYTES, trap=_OLD),
    Family("load_ns", f"{_LOAD}_time_total", {}, "0.24", "", SECONDS, trap=_WORKERS),
    Family("load_ns", f"{_TOTAL}_time_total", _TO_GPU, "0.16", "", SECONDS, trap=_OLD),
    Family("store_ns", f"{_STORE}_time_total", {}, "0.24", "", SECONDS, trap=_WORKERS),
    Family("store_ns", f"{_TOTAL}_time_total", _FROM_GPU, "0.16", "", SECONDS, trap=_OLD),
    Family("loads", f"{_LOAD}_size_count", {}, "0.24", "", "transfers", trap=_WORKERS),
    Family("loads", "vllm:kv_offload_size_count", _TO_GPU, "0.16", "", "transfers", trap=_OLD),
    Family("stores", f"{_STORE}_size_count", {}, "0.24", "", "transfers", trap=_WORKERS),
    Family("stores", "vllm:kv_offload_size_count", _FROM_GPU, "0.16", "", "transfers", trap=_OLD),
    Family("storage_read_bytes", f"{_TIERING}_read_bytes_total", _STORAGE_TIER, "0.28", "", BYTES, trap=_CHUNKS),
    Family("storage_read_bytes", f"{_LOAD}_bytes_total", _SHARED, "0.24", "", BYTES, trap=_LLM_D),
    Family("storage_read_bytes", f"{_TOTAL}_bytes_total", _STORAGE_TO_GPU, "0.16", "", BYTES, trap=_LLM_D),
    Family("storage_read_ns", f"{_TIERING}_read_time_total", _STORAGE_TIER, "0.28", "", SECONDS, trap=_CHUNKS),
    Family("storage_read_ns", f"{_LOAD}_time_total", _SHARED, "0.24", "", SECONDS, trap=_LLM_D),
    Family("storage_read_ns", f"{_TOTAL}_time_total", _STORAGE_TO_GPU, "0.16", "", SECONDS, trap=_LLM_D),
    Family("storage_write_bytes", f"{_TIERING}_write_bytes_total", _STORAGE_TIER, "0.28", "", BYTES, trap=_CHUNKS),
    Family("storage_write_bytes", f"{_STORE}_bytes_total", _SHARED, "0.24", "", BYTES, trap=_LLM_D),
    Family("storage_write_bytes", f"{_TOTAL}_bytes_total", _GPU_TO_STORAGE, "0.16", "", BYTES, trap=_LLM_D),
    Family("storage_write_ns", f"{_TIERING}_write_time_total", _STORAGE_TIER, "0.28", "", SECONDS, trap=_CHUNKS),
    Family("storage_write_ns", f"{_STORE}_time_total", _SHARED, "0.24", "", SECONDS, trap=_LLM_D),
    Family("storage_write_ns", f"{_TOTAL}_time_total", _GPU_TO_STORAGE, "0.16", "", SECONDS, trap=_LLM_D),
    Family("peer_read_bytes", f"{_TIERING}_read_bytes_total", _PEER_TIER, "0.28", "", BYTES, trap=_CHUNKS),
    Family("peer_read_ns", f"{_TIERING}_read_time_total", _PEER_TIER, "0.28", "", SECONDS, 1e9, trap=_CHUNKS),
    Family("peer_write_bytes", f"{_TIERING}_write_bytes_total", _PEER_TIER, "0.28", "", BYTES, trap=_CHUNKS),
    Family("lookup_ns", "vllm:kv_offload_lookup_sync_delay_seconds_sum", {}, "0.26", "", SECONDS, 1e9),
    Family(
        "lookup_wait_ns",
        "vllm:kv_offload_lookup_async_delay_seconds_sum",
        {},
        "0.26",
        "",
        SECONDS,
        1e9,
        trap="requests wait side by side, mostly for a lower tier to be read",
    ),
    Family(
        "loaded_blocks",
        f"{_SIMPLE}_load_blocks_total",
        {"phase": re.compile("completed|")},
        "0.31",
        "",
        BLOCKS,
        trap="of the offloading pool: models with several kinds of layers hold several for the same tokens",
    ),
    Family(
        "stored_blocks",
        f"{_SIMPLE}_save_outcomes_total",
        {"outcome": "stored"},
        "0.31",
        "",
        BLOCKS,
        trap="decisions to store; lazy stores are not among them",
    ),
)
# vllm:kv_offload_config_info{cpu_kv_cache_size_bytes="1073741824",cpu_kv_cache_size_tokens="8192",…} 1.0, since 0.33
_KV_OFFLOAD_INFORMATION = {
    "vllm:kv_offload_config_info": (
        "cpu_num_chunks",
        "cpu_blocks_per_chunk",
        "cpu_kv_cache_size_bytes",
        "cpu_kv_cache_size_tokens",
    ),
    "vllm:simple_kv_offload_info": ("backend", "page_cache", "lazy_offload", "capacity_blocks"),  # since 0.31
}
# vllm:nixl_bytes_transferred_sum{engine="0",model_name="m"} 4194304.0
_NIXL = "vllm:nixl"
_PULL = "counted by the pod that moves them: decode where it pulls, prefill where it pushes; ranks overlap"
# vllm:mooncake_store_operation_bytes_total{engine="0",model_name="m",operation="load_get",status="ok"} 1024
_STORE_OPERATION = "vllm:mooncake_store_operation"
_GET = {"operation": "load_get", "status": "ok"}
_PUT = {"operation": "save_put", "status": "ok"}
_WHOLE = "batches that failed in part are left out: their bytes are told as if all had come"
_MOONCAKE = "vllm:mooncake"
_HF3FS = "vllm:hf3fs"
CONNECTORS = (
    Connector("kv_offload", "vllm kv_offload", _KV_OFFLOAD, _KV_OFFLOAD_INFORMATION),
    Connector(
        "nixl",
        "nixl",
        (
            Family("load_bytes", f"{_NIXL}_bytes_transferred_sum", {}, "0.11", "", BYTES, trap=_PULL),
            Family("load_ns", f"{_NIXL}_xfer_time_seconds_sum", {}, "0.11", "", SECONDS, trap=_PULL),
            Family("loads", f"{_NIXL}_xfer_time_seconds_count", {}, "0.11", "", "transfers", trap=_PULL),
            Family("failed_transfers", f"{_NIXL}_num_failed_transfers_total", {}, "0.11", "", "transfers"),
            Family(
                "expired_requests",
                f"{_NIXL}_num_kv_expired_reqs_total",
                {},
                "0.16",
                "",
                REQUESTS,
                trap="told by the prefill pod: it computed them for nobody",
            ),
        ),
        is_transfer=True,
    ),
    Connector(
        "mooncake_store",
        "mooncake_store",
        (
            Family("load_bytes", f"{_STORE_OPERATION}_bytes_total", _GET, "0.22", "", BYTES, trap=_WHOLE),
            Family("load_ns", f"{_STORE_OPERATION}_time_seconds_sum", _GET, "0.22", "", SECONDS, trap=_WHOLE),
            Family("loads", f"{_STORE_OPERATION}_total", _GET, "0.22", "", "operations", trap=_WHOLE),
            Family("store_bytes", f"{_STORE_OPERATION}_bytes_total", _PUT, "0.22", "", BYTES, trap=_WHOLE),
            Family("store_ns", f"{_STORE_OPERATION}_time_seconds_sum", _PUT, "0.22", "", SECONDS, trap=_WHOLE),
            Family("stores", f"{_STORE_OPERATION}_total", _PUT, "0.22", "", "operations", trap=_WHOLE),
            Family("storage_read_bytes", f"{_STORE_OPERATION}_bytes_total", _GET, "0.22", "", BYTES, trap=_WHOLE),
            Family("storage_read_ns", f"{_STORE_OPERATION}_time_seconds_sum", _GET, "0.22", "", SECONDS, trap=_WHOLE),
            Family("storage_write_bytes", f"{_STORE_OPERATION}_bytes_total", _PUT, "0.22", "", BYTES, trap=_WHOLE),
            Family("storage_write_ns", f"{_STORE_OPERATION}_time_seconds_sum", _PUT, "0.22", "", SECONDS, trap=_WHOLE),
        ),
    ),
    Connector(
        "mooncake",
        "mooncake",
        (
            Family("load_bytes", f"{_MOONCAKE}_bytes_transferred_sum", {}, "0.33", "", BYTES, trap=_PULL),
            Family("load_ns", f"{_MOONCAKE}_xfer_time_seconds_sum", {}, "0.33", "", SECONDS, trap=_PULL),
            Family("loads", f"{_MOONCAKE}_xfer_time_seconds_count", {}, "0.33", "", "transfers", trap=_PULL),
        ),
        is_transfer=True,
    ),
    Connector(
        "hf3fs",
        "hf3fs",
        (
            Family("load_ns", f"{_HF3FS}_load_duration_seconds_sum", {}, "0.20", "", SECONDS),
            Family("loads", f"{_HF3FS}_load_duration_seconds_count", {}, "0.20", "", "operations"),
            Family("store_ns", f"{_HF3FS}_save_duration_seconds_sum", {}, "0.20", "", SECONDS),
            Family("stores", f"{_HF3FS}_save_duration_seconds_count", {}, "0.20", "", "operations"),
        ),
    ),
)
OFFLOAD: tuple[Family, ...] = tuple(row for connector in CONNECTORS for row in connector.families)

# Every field of vLLM's CacheConfig is a label of it
INFORMATION = "vllm:cache_config_info"
INFORMATION_LABELS = ("block_size", "cache_dtype", "num_gpu_blocks", "kv_cache_size_tokens", "enable_prefix_caching")

# (family as it is registered, * for any ending; why it is not read)
NOT_READ: tuple[tuple[str, str], ...] = (
    ("vllm:gpu_prefix_cache_hit_rate", "a ratio of the V0 engine: no volume"),
    ("vllm:cpu_prefix_cache_hit_rate", "a ratio of the V0 engine: no volume"),
    ("vllm:cpu_cache_usage_perc", "of the V0 engine"),
    ("vllm:num_requests_swapped", "of the V0 engine"),
    ("vllm:mm_cache_*", "counts images and the like, not tokens"),
    ("vllm:request_inference_time_seconds", "the sum of prefill and decode time, which are read"),
    ("vllm:request_time_per_output_token_seconds", "a mean of each request: its sum means nothing"),
    ("vllm:request_num_preemptions", "num_preemptions counts them when they happen"),
    ("vllm:request_max_num_generation_tokens", "what was asked for, not what was done"),
    ("vllm:request_params_*", "what was asked for, not what was done"),
    ("vllm:num_requests_kv_fetch_by_stage", "requests at an instant; what loading took is read from the connectors"),
    ("vllm:admission_rejections", "requests that never reached an engine: no token and no second"),
    ("vllm:corrupted_requests", "health, no volume"),
    ("vllm:watermark_requests", "health, no volume"),
    ("vllm:lora_requests_info", "label sets without bound; no model and no engine is named"),
    ("vllm:kv_block_*", "samples of one block in a hundred, where --kv-cache-metrics is on"),
    ("vllm:spec_decode_*", "accepted tokens are among the generated ones; drafts have no price of their own"),
    ("vllm:diffusion_*", "steps of diffusion models, which keep no KV"),
    ("vllm:kv_offload_tiering_chunk_*", "chunks, of a size that no version before 0.33 tells; bytes by tier are read"),
    ("vllm:kv_offload_tiering_*_usage_perc", "room that transfers pin at an instant, not what is held"),
    ("vllm:kv_offload_cpu_cache*_usage_perc", "room that transfers pin at an instant, not what is held"),
    ("vllm:kv_offload_tiering_lookup_*_seconds", "the same lookups as kv_offload_lookup_*, by tier"),
    ("vllm:kv_offload_tiering_promotion_latency_seconds", "reads as they are waited for; read_time is read"),
    ("vllm:kv_offload_tiering_*_failure*", "health, no volume"),
    ("vllm:kv_offload_tiering_active_*", "jobs at an instant"),
    ("vllm:kv_offload_tiering_backpressure_*", "health, no volume"),
    ("vllm:kv_offload_cpu_allocation_size", "room asked for, not bytes moved"),
    ("vllm:kv_offload_stores_skipped", "health, no volume"),
    ("vllm:kv_offload_allocation_failure", "health, no volume"),
    ("vllm:simple_kv_offload_used_blocks", "blocks that transfers pin at an instant, not what is held"),
    ("vllm:simple_kv_offload_pending_store_blocks", "a queue at an instant"),
    ("vllm:nixl_post_time_seconds", "time to hand a transfer over; the transfer itself is read"),
    ("vllm:nixl_num_descriptors", "pieces of a transfer"),
    ("vllm:nixl_num_failed_notifications", "among nixl_num_failed_transfers"),
    ("vllm:nixl_num_notifications_after_expiry", "one a rank, of requests that nixl_num_kv_expired_reqs counts"),
    ("vllm:mooncake_store_operation_keys_total", "keys; their bytes are read"),
    ("vllm:mooncake_store_operation_failed_keys_total", "health, no volume"),
    ("vllm:mooncake_num_*", "pieces and failures of transfers; their bytes and seconds are read"),
    ("vllm:hf3fs_num_failed_*", "health, no volume"),
    ("vllm:hisparse_cache_*", "pages of a buffer that decode steps use: no reuse between requests"),
    ("vllm:hisparse_host_block_*", "samples of one block in a hundred"),
    ("vllm:hisparse_host_cache_usage_perc", "room at an instant, without its size"),
    ("vllm:hisparse_pending_page_transfers", "a queue at an instant"),
    ("vllm:umbp_transfer_bytes_total", "0.33, whose labels say the direction: not seen yet, and not guessed"),
    ("vllm:sleep_mode_*", "how falling asleep goes; how long it sleeps is read from engine_sleep_state"),
    ("vllm_llmd_fs_metadata_cache_*", "lookups of file names, no KV"),
)
