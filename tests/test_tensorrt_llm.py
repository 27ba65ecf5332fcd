from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.interval import IDENTITY_OK, close, opened
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE, ENGINE, index
from kvtally.collectors.registry import SOURCES, reader_class, sources_on
from kvtally.collectors.tensorrt_llm import NOT_READ, TensorRtLlmMapping

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

L = 'engine_type="trtllm",model_name="nemotron"'


def page(prompt: int = 4096, cached: int = 1024, tiers: dict[str, int] | None = None) -> str:
    """A page with return_perf_metrics and enable_iter_perf_stats, a second tier where `tiers` has one."""
    by_tier = "".join(
        f'trtllm_prompt_cache_hit_tokens_total{{cache_level="{level}",cache_tier="{tier}",{L}}} {count}.0\n'
        for level, (tier, count) in enumerate((tiers or {}).items())
    )
    return f"""\
# HELP trtllm_prompt_tokens_total Cumulative number of prompt (input) tokens processed.
# TYPE trtllm_prompt_tokens_total counter
trtllm_prompt_tokens_total{{{L}}} {prompt}.0
trtllm_generation_tokens_total{{{L}}} 512.0
trtllm_prompt_cached_tokens_total{{{L}}} {cached}.0
{by_tier}trtllm_request_success_total{{finished_reason="stop",{L}}} 6.0
trtllm_request_success_total{{finished_reason="length",{L}}} 2.0
trtllm_time_to_first_token_seconds_count{{{L}}} 8.0
trtllm_time_to_first_token_seconds_sum{{{L}}} 0.5
trtllm_time_per_output_token_seconds_sum{{{L}}} 0.125
trtllm_request_queue_time_seconds_sum{{{L}}} 0.25
trtllm_request_prefill_time_seconds_sum{{{L}}} 0.75
trtllm_request_decode_time_seconds_sum{{{L}}} 3.0
trtllm_e2e_request_latency_seconds_sum{{{L}}} 4.0
trtllm_kv_cache_reused_blocks_total{{{L}}} 32.0
trtllm_kv_cache_missed_blocks_total{{{L}}} 96.0
trtllm_kv_cache_hit_rate{{{L}}} 0.25
trtllm_kv_cache_utilization{{{L}}} 0.5
trtllm_num_requests_running{{{L}}} 2.0
trtllm_num_requests_waiting{{{L}}} 1.0
trtllm_kv_cache_onboard_bytes_total{{{L}}} 1048576.0
trtllm_kv_cache_offload_bytes_total{{{L}}} 2097152.0
trtllm_kv_cache_disk_prefetch_blocks_total{{{L}}} 7.0
"""


def read(text: str) -> tuple[Reading, ...]:
    return PageMapper("gpu1:8000", [TensorRtLlmMapping()]).read(text.encode())


def engine(text: str) -> dict[str, float | None]:
    return dict(zip((quantity.name for quantity in ENGINE), read(text)[0].values, strict=True))


def test_every_quantity_of_a_page_with_tiers_is_as_the_page_tells_it() -> None:
    told = page(tiers={"gpu": 768, "host": 256, "disk": 64})
    reading = read(told)[0]
    assert {name: value for name, value in engine(told).items() if value is not None} == {
        "prompt_tokens": 4096,
        "computed_tokens": 3072,
        "generated_tokens": 512,
        "prefix_hit_tokens": 768,
        "external_hit_tokens": 320,
        "first_tokens": 8,
        "finished_requests": 8,
        "first_token_ns": 0.5,
        "queue_ns": 0.25,
        "prefill_ns": 0.75,
        "decode_ns": 3,
        "request_ns": 4,
        "running_requests": 2,
        "waiting_requests": 1,
        "kv_usage_ppm": 0.5,
    }
    assert dict(zip(reading.detail_names, reading.details, strict=True)) == {
        "cached_tokens": 1024,
        "admitted_device_tokens": 768,
        "admitted_host_tokens": 256,
        "admitted_disk_tokens": 64,
        "reused_blocks": 32,
        "missed_blocks": 96,
        "disk_prefetch_blocks": 7,
    }
    assert (reading.name, reading.attributes["engine"], reading.attributes["model"]) == (
        "gpu1:8000/0",
        "tensorrt-llm",
        "nemotron",
    )


def test_tokens_by_tier_are_of_another_instant_than_prompt_tokens_and_are_not_set_against_them() -> None:
    found = engine(page(tiers={"gpu": 768, "host": 256}))
    assert (found["hbm_tokens"], found["external_tokens"]) == (None, None)


def test_where_the_gpu_is_the_only_tier_every_cached_token_is_from_there() -> None:
    found = engine(page(tiers={"gpu": 900}))
    assert [found[name] for name in ("computed_tokens", "hbm_tokens", "external_tokens")] == [3072, 1024, 0]


def test_its_intervals_satisfy_the_identity_with_one_tier() -> None:
    before, after = (read(page(prompt, cached, {"gpu": cached}))[0] for prompt, cached in ((100, 0), (356, 128)))
    interval, _, findings = close(opened(before, 1), after, 2)
    names = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")
    assert [interval.values[index("engine", name)] for name in names] == [256, 128, 128, 0]
    assert interval.flags & IDENTITY_OK
    assert findings == []


def test_a_release_without_cached_tokens_does_not_tell_what_it_computed() -> None:
    old = "".join(f"{line}\n" for line in page().splitlines() if "cached_tokens" not in line)
    assert engine(old)["prompt_tokens"] == 4096
    assert engine(old)["computed_tokens"] is None


def test_bytes_between_host_and_gpu_are_a_cache_s() -> None:
    cache = read(page())[1]
    found = dict(zip((quantity.name for quantity in CACHE), cache.values, strict=True))
    assert (cache.kind, cache.name) == ("cache", "gpu1:8000/kv_host")
    assert {name: value for name, value in found.items() if value is not None} == {
        "load_bytes": 1048576,
        "store_bytes": 2097152,
    }


@pytest.mark.parametrize(("name", "reason"), NOT_READ)
def test_what_is_not_read_has_its_reason(name: str, reason: str) -> None:
    assert not TensorRtLlmMapping().wants(name)
    assert reason


def test_the_registry_knows_the_page() -> None:
    assert sources_on(page().encode()) == ("tensorrt_llm",)
    assert SOURCES["tensorrt_llm"].is_engine
    assert reader_class("tensorrt_llm") is TensorRtLlmMapping
