from __future__ import annotations

import pytest

from kvtally.agent.identity import Identity, check
from kvtally.agent.interval import IDENTITY_BROKEN, IDENTITY_OK, close, opened
from kvtally.collectors.base import CollectError, Reading
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE, ENGINE, index
from kvtally.collectors.registry import SOURCES, reader_class, sources_on
from kvtally.collectors.sglang import NOT_READ, SglangMapping

SECOND = 10**9

# As 0.5.10 shows it with --tp 2 --enable-hierarchical-cache and a file backend: the tokenizer's families carry no
# engine_type, HiCache's no rank, so that both ranks add up under one series.
PAGE_0_5_10 = """\
# HELP sglang:prompt_tokens_total Number of prefill tokens processed.
# TYPE sglang:prompt_tokens_total counter
sglang:prompt_tokens_total{model_name="qwen"} 10000.0
# HELP sglang:generation_tokens_total Number of generation tokens processed.
# TYPE sglang:generation_tokens_total counter
sglang:generation_tokens_total{model_name="qwen"} 700.0
# HELP sglang:cached_tokens_total Number of cached prompt tokens by source (device/host/storage).
# TYPE sglang:cached_tokens_total counter
sglang:cached_tokens_total{cache_source="device",model_name="qwen"} 2048.0
sglang:cached_tokens_total{cache_source="host",model_name="qwen"} 1024.0
sglang:cached_tokens_total{cache_source="storage_HiCacheFile",model_name="qwen"} 512.0
sglang:num_requests_total{model_name="qwen"} 9.0
sglang:time_to_first_token_seconds_bucket{le="+Inf",model_name="qwen"} 9.0
sglang:time_to_first_token_seconds_count{model_name="qwen"} 9.0
sglang:time_to_first_token_seconds_sum{model_name="qwen"} 1.5
sglang:inter_token_latency_seconds_sum{model_name="qwen"} 6.25
sglang:e2e_request_latency_seconds_sum{model_name="qwen"} 8.0
sglang:num_running_reqs{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 3.0
sglang:num_queue_reqs{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 1.0
sglang:token_usage{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.25
sglang:cache_hit_rate{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.9
sglang:queue_time_seconds_sum{engine_type="unified",model_name="qwen",moe_ep_rank="0",pp_rank="0",tp_rank="0"} 0.5
sglang:load_back_tokens_total{cache_type="HiRadixCache"} 4096.0
sglang:load_back_duration_seconds_count{cache_type="HiRadixCache"} 8.0
sglang:load_back_duration_seconds_sum{cache_type="HiRadixCache"} 0.125
"""


def of_rank(rank: int, tokens: int, bytes_moved: int, seconds: float) -> str:
    labels = f'cache_type="HiRadixCache",dp_rank="0",pp_rank="0",tp_rank="{rank}"'
    return f"""\
sglang:load_back_tokens_total{{{labels},pool="kv"}} {tokens}
sglang:load_back_tokens_total{{{labels},pool="swa"}} 77
sglang:hicache_backup_tokens_total{{{labels},pool="kv"}} {2 * tokens}
sglang:load_back_duration_seconds_count{{{labels}}} 4
sglang:load_back_duration_seconds_sum{{{labels}}} {seconds}
sglang:hicache_backup_duration_seconds_count{{{labels}}} 5
sglang:hicache_backup_duration_seconds_sum{{{labels}}} {2 * seconds}
sglang:load_back_bytes_total{{{labels}}} {bytes_moved}
sglang:hicache_backup_bytes_total{{{labels}}} {2 * bytes_moved}
"""


TOKENIZER = 'engine_type="unified",model_name="qwen"'
# As 0.5.23 shows it with --tp 2, --enable-metrics-for-all-schedulers and priority scheduling.
PAGE_0_5_23 = (
    f"""\
sglang:prompt_tokens_total{{{TOKENIZER},is_streaming="true"}} 6000.0
sglang:prompt_tokens_total{{{TOKENIZER},is_streaming="false"}} 4000.0
sglang:generation_tokens_total{{{TOKENIZER},is_streaming="true"}} 400.0
sglang:generation_tokens_total{{{TOKENIZER},is_streaming="false"}} 300.0
sglang:cached_tokens_total{{cache_source="device",{TOKENIZER}}} 2048.0
sglang:cached_tokens_total{{cache_source="host",{TOKENIZER}}} 1024.0
sglang:cached_tokens_total{{cache_source="storage",{TOKENIZER}}} 512.0
sglang:num_requests_total{{{TOKENIZER},is_streaming="true"}} 5.0
sglang:num_requests_total{{{TOKENIZER},is_streaming="false"}} 4.0
sglang:time_to_first_token_seconds_count{{{TOKENIZER},is_streaming="true"}} 9.0
sglang:time_to_first_token_seconds_sum{{{TOKENIZER},is_streaming="true"}} 1.5
sglang:inter_token_latency_seconds_sum{{{TOKENIZER}}} 6.25
sglang:e2e_request_latency_seconds_sum{{{TOKENIZER},is_streaming="true"}} 8.0
sglang:token_usage{{{TOKENIZER},moe_ep_rank="0",pp_rank="0",priority="",tp_rank="0"}} 0.25
"""
    + "".join(
        f"""\
sglang:num_running_reqs{{{TOKENIZER},moe_ep_rank="0",pp_rank="0",priority="",tp_rank="{rank}"}} 3.0
sglang:num_running_reqs{{{TOKENIZER},moe_ep_rank="0",pp_rank="0",priority="1",tp_rank="{rank}"}} 2.0
sglang:num_queue_reqs{{{TOKENIZER},moe_ep_rank="0",pp_rank="0",priority="",tp_rank="{rank}"}} 1.0
sglang:queue_time_seconds_sum{{{TOKENIZER},moe_ep_rank="0",pp_rank="0",priority="",tp_rank="{rank}"}} 0.5
"""
        for rank in (0, 1)
    )
    + of_rank(0, 1024, 2**30, 0.5)
    + of_rank(1, 1024, 2**30, 0.75)
)
# 10000 prompt tokens, of which 2048 + 1024 + 512 were cached
EXPECTED: dict[str, float] = {
    "prompt_tokens": 10000,
    "computed_tokens": 6416,
    "hbm_tokens": 2048,
    "external_tokens": 1536,
    "generated_tokens": 700,
    "first_tokens": 9,
    "finished_requests": 9,
    "first_token_ns": 1.5,
    "queue_ns": 0.5,
    "inter_token_ns": 6.25,
    "request_ns": 8,
    "running_requests": 3,
    "waiting_requests": 1,
    "kv_usage_ppm": 0.25,
}


def read(page: str) -> tuple[Reading, ...]:
    return PageMapper("127.0.0.1:30000", [SglangMapping()]).read(page.encode())


def engine(page: str) -> dict[str, float | None]:
    return dict(zip((quantity.name for quantity in ENGINE), read(page)[0].values, strict=True))


def tokens(page: str) -> tuple[float | None, ...]:
    found = engine(page)
    return tuple(found[name] for name in ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens"))


@pytest.mark.parametrize("page", [PAGE_0_5_10, PAGE_0_5_23], ids=["0.5.10", "0.5.23"])
def test_both_versions_give_the_same_quantities_and_what_is_not_counted_stays_unknown(page: str) -> None:
    reading = read(page)[0]
    assert {name: value for name, value in engine(page).items() if value is not None} == EXPECTED
    assert (reading.kind, reading.name) == ("engine", "127.0.0.1:30000/0")
    assert reading.attributes == {
        "engine": "sglang",
        "source": "sglang",
        "model": "qwen",
        "engine_type": "unified",
    }
    details = dict(zip(reading.detail_names, reading.details, strict=True))
    assert details == {"admitted_device_tokens": 2048, "admitted_host_tokens": 1024, "admitted_disk_tokens": 512}


def test_tensor_parallel_ranks_tell_the_same_tokens_and_each_moves_its_own_bytes() -> None:
    cache = read(PAGE_0_5_23)[1]
    found = dict(zip((quantity.name for quantity in CACHE), cache.values, strict=True))
    assert (cache.kind, cache.name) == ("cache", "127.0.0.1:30000/hicache")
    assert {name: value for name, value in found.items() if value is not None} == {
        "loaded_tokens": 1024,
        "stored_tokens": 2048,
        "loads": 4,
        "stores": 5,
        "load_ns": 0.5,  # of rank 0
        "store_ns": 1.0,
        "load_bytes": 2 * 2**30,
        "store_bytes": 4 * 2**30,
    }


def test_without_rank_labels_host_tokens_may_be_a_multiple_and_are_not_read() -> None:
    assert set(read(PAGE_0_5_10)[1].values) == {None}


def test_data_parallel_replicas_add_up() -> None:
    page = PAGE_0_5_10 + (
        'sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="qwen",tp_rank="0"} 4.0\n'
        'sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="qwen",tp_rank="10"} 4.0\n'
        'sglang:num_running_reqs{dp_rank="1",engine_type="unified",model_name="qwen",tp_rank="9"} 5.0\n'
        'sglang:token_usage{dp_rank="1",engine_type="unified",model_name="qwen",tp_rank="0"} 0.75\n'
    )
    assert engine(page)["running_requests"] == 7
    assert engine(page)["kv_usage_ppm"] == 0.75


def test_a_tier_that_no_token_came_from_is_zero_as_long_as_the_page_counts_prompts() -> None:
    assert tokens('sglang:prompt_tokens_total{model_name="m"} 50\n') == (50, 50, 0, 0)
    cached = 'sglang:cached_tokens_total{cache_source="device",model_name="m"} 16\n'
    assert tokens('sglang:prompt_tokens_total{model_name="m"} 80\n' + cached) == (80, 64, 16, 0)


@pytest.mark.parametrize("labels", ['cache_source="total",model_name="m"', 'model_name="m"'])
def test_cached_tokens_without_a_tier_are_in_no_tier(labels: str) -> None:
    page = f'sglang:prompt_tokens_total{{model_name="m"}} 80\nsglang:cached_tokens_total{{{labels}}} 32\n'
    assert tokens(page) == (80, 48, None, None)
    # a request tells its tiers or its total, never both
    device = 'sglang:cached_tokens_total{cache_source="device",model_name="m"} 16\n'
    assert tokens(page + device) == (80, 32, None, None)


def test_intervals_from_the_first_request_on_add_up_and_satisfy_the_identity() -> None:
    pages = [
        'sglang:num_running_reqs{model_name="m",tp_rank="0"} 0\n',
        'sglang:num_running_reqs{model_name="m",tp_rank="0"} 1\nsglang:prompt_tokens_total{model_name="m"} 50\n',
        (
            'sglang:num_running_reqs{model_name="m",tp_rank="0"} 0\nsglang:prompt_tokens_total{model_name="m"} 130\n'
            'sglang:cached_tokens_total{cache_source="host",model_name="m"} 48\n'
        ),
    ]
    (first,), (second,), (third,) = (read(page) for page in pages)
    one, state, _ = close(opened(first, SECOND), second, 2 * SECOND)
    two, _, findings = close(state, third, 3 * SECOND)
    assert findings == []
    names = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")
    counted = [[interval.values[index("engine", name)] for name in names] for interval in (one, two)]
    assert counted == [[50, 50, 0, 0], [80, 32, 0, 48]]
    assert [interval.flags & (IDENTITY_OK | IDENTITY_BROKEN) for interval in (one, two)] == [IDENTITY_OK] * 2


def test_the_rules_of_vllm_s_versions_are_not_asked_for() -> None:
    reading = read(PAGE_0_5_23)[0]
    assert "version" not in reading.attributes
    values = [None if value is None else round(value) for value in reading.values]
    assert check(None, values, reading.detail_names, [2048, 1024, 512]).state is Identity.OK


def test_a_page_in_the_rewritten_spelling_gives_the_same_readings() -> None:
    assert read(PAGE_0_5_23.replace("sglang:", "sglang_")) == read(PAGE_0_5_23)


def test_the_registry_knows_the_page_and_a_restricted_one_would_show_all_that_is_read() -> None:
    assert sources_on(PAGE_0_5_23.encode()) == ("sglang",)
    assert SOURCES["sglang"].is_engine
    assert reader_class("sglang") is SglangMapping
    asked = set(SglangMapping().names())
    kept = "".join(f"{line}\n" for line in PAGE_0_5_23.splitlines() if line.partition("{")[0] in asked)
    assert read(kept) == read(PAGE_0_5_23)
    assert asked.isdisjoint(name for name, _ in NOT_READ)


def test_an_engine_whose_metrics_are_off_is_no_reading() -> None:
    with pytest.raises(CollectError, match="no family that kvtally reads"):
        read("python_gc_objects_collected_total 3\n")
