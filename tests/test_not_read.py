from __future__ import annotations

from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from kvtally.collectors.host_fields import HOST_NOT_READ
from kvtally.collectors.registry import SOURCES, reader_class

PAGES = Path(__file__).parent / "fixtures" / "pages"
# on the wire, a histogram as one; what no list of a real page has is there where a remote backend, a peer or a study is
KNOWN = {
    "lmcache": """
        lmcache:remote_time_to_get lmcache:remote_time_to_put lmcache:remote_time_to_get_sync
        lmcache:remote_backend_batched_get_blocking_time lmcache:instrumented_connector_batched_get_time
        lmcache:retrieve_broadcast_time lmcache:p2p_time_to_transfer lmcache:p2p_transfer_speed
        lmcache:num_p2p_requests_total lmcache:num_p2p_transferred_tokens_total
        lmcache:num_l2_hit_tokens_total lmcache:num_l3_hit_tokens_total lmcache:num_remote_hit_tokens_total
        lmcache:cache_controller_worker_count
    """,
    "lmcache_mp": """
        lmcache_mp_lookup_early_exit_requests_total lmcache_mp_l2_evicted_objects_chunks_total
        lmcache_mp_lookup_prompt_tokens_total lmcache_mp_lookup_request_hit_tokens_total
        lmcache_mp_inflight_load_memory_usage_bytes lmcache_mp_num_inflight_l2_loads
        lmcache_mp_transfer_phase_bytes_total lmcache_mp_transfer_phase_elapsed_seconds_total
        lmcache_mp_transfer_staging_throughput_GB_per_second
    """,
    "llm_d": """
        llm_d_epp_request_total llm_d_epp_request_error_total llm_d_epp_request_running
        llm_d_epp_request_input_tokens llm_d_epp_request_output_tokens llm_d_epp_request_cached_tokens
        llm_d_epp_request_duration_seconds llm_d_epp_request_ttft_seconds llm_d_epp_request_ntpot_seconds
        llm_d_epp_request_streaming_tpot_seconds llm_d_epp_request_streaming_itl_seconds
        llm_d_epp_request_predicted_ttft_seconds llm_d_epp_request_size_bytes llm_d_epp_response_size_bytes
        llm_d_epp_request_processing_duration_seconds llm_d_epp_response_processing_duration_seconds
        llm_d_epp_scheduler_e2e_duration_seconds llm_d_epp_plugin_duration_seconds
        llm_d_epp_flow_control_request_queue_duration_seconds llm_d_epp_flow_control_queue_bytes
        llm_d_epp_prefix_indexer_hit_ratio llm_d_epp_prefix_indexer_hit_bytes llm_d_epp_prefix_indexer_size
        llm_d_epp_kv_cache_index_lookup_hits_total kvcache_index_lookup_hits_total llm_d_epp_inflight_tokens
        llm_d_epp_average_kv_cache_utilization llm_d_epp_average_queue_size llm_d_epp_ready_endpoints
        llm_d_epp_per_endpoint_queue_size llm_d_epp_disagg_decision_total llm_d_epp_scheduler_attempts_total
        llm_d_epp_info inference_objective_input_tokens inference_objective_request_duration_seconds
        inference_objective_prompt_cached_tokens inference_objective_request_sizes inference_objective_response_sizes
        inference_objective_normalized_time_per_output_token_seconds inference_objective_running_requests
        inference_pool_average_kv_cache_utilization inference_pool_average_queue_size inference_pool_ready_pods
        inference_pool_per_pod_queue_size inference_extension_info inference_extension_prefix_indexer_hit_bytes
        inference_extension_scheduler_e2e_duration_seconds
    """,
    "tensorrt_llm": """
        trtllm_request_success_total trtllm_e2e_request_latency_seconds trtllm_time_to_first_token_seconds
        trtllm_time_per_output_token_seconds trtllm_request_queue_time_seconds trtllm_request_prefill_time_seconds
        trtllm_request_decode_time_seconds trtllm_request_inference_time_seconds trtllm_prompt_tokens_total
        trtllm_generation_tokens_total trtllm_prompt_cached_tokens_total trtllm_prompt_cache_hit_tokens_total
        trtllm_kv_cache_hit_rate trtllm_kv_cache_utilization trtllm_kv_cache_host_utilization
        trtllm_kv_cache_iter_reuse_rate trtllm_kv_cache_reused_blocks_total trtllm_kv_cache_missed_blocks_total
        trtllm_kv_cache_iter_reused_blocks_total trtllm_kv_cache_iter_full_reused_blocks_total
        trtllm_kv_cache_iter_partial_reused_blocks_total trtllm_kv_cache_iter_missed_blocks_total
        trtllm_kv_cache_gen_alloc_blocks_total trtllm_kv_cache_onboard_bytes_total trtllm_kv_cache_offload_bytes_total
        trtllm_kv_cache_intra_device_copy_bytes_total trtllm_kv_cache_disk_prefetch_blocks_total
        trtllm_num_requests_running trtllm_num_requests_waiting trtllm_num_requests_completed_total
        trtllm_max_num_active_requests trtllm_iteration_latency_seconds trtllm_gpu_memory_usage_bytes
        trtllm_cpu_memory_usage_bytes trtllm_pinned_memory_usage_bytes trtllm_max_batch_size_static
        trtllm_kv_cache_max_blocks trtllm_kv_cache_free_blocks trtllm_kv_cache_used_blocks
        trtllm_kv_cache_tokens_per_block trtllm_num_context_requests trtllm_num_generation_requests
        trtllm_total_context_tokens trtllm_avg_decoded_tokens_per_iter trtllm_spec_decode_num_draft_tokens_total
        trtllm_model_config_info nv_trt_llm_kv_cache_block_metrics nv_trt_llm_request_metrics
    """,
}
LISTS = {"lmcache": "lmcache-families.tsv", "lmcache_mp": "lmcache-mp-families.tsv"}
ENDINGS = ("", "_sum", "_count")


def families(source: str) -> list[str]:
    lines = (PAGES / LISTS[source]).read_text().splitlines()[1:] if source in LISTS else []
    return [line.partition("\t")[0] for line in lines] + KNOWN[source].split()


def table(source: str) -> tuple[tuple[str, str], ...]:
    module: Any = import_module(SOURCES[source].reader.partition(":")[0])
    return tuple(module.NOT_READ)


def matches(family: str, pattern: str) -> bool:
    return any(fnmatch(family + ending, pattern) for ending in ENDINGS)


@pytest.mark.parametrize(("source", "family"), [(source, family) for source in KNOWN for family in families(source)])
def test_every_family_is_read_or_said_not_to_be_and_why(source: str, family: str) -> None:
    mapping = reader_class(source)()
    is_read = any(mapping.wants(family + ending) for ending in ENDINGS)
    reasons = [why for pattern, why in table(source) if matches(family, pattern)]
    assert (is_read, len(reasons)) in {(True, 0), (False, 1)}, reasons
    assert all(reasons)


@pytest.mark.parametrize(("source", "pattern"), [(source, pattern) for source in KNOWN for pattern, _ in table(source)])
def test_a_family_that_is_not_read_exists(source: str, pattern: str) -> None:
    assert any(matches(family, pattern) for family in families(source))


def test_what_this_host_shows_and_nobody_reads_is_said() -> None:
    assert {"BeeGFS", "NVLink (fields 138 to 141, GPM 60 and 61)"} <= HOST_NOT_READ.keys()
