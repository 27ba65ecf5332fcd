from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE, ENGINE
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

PAGES = Path(__file__).parent / "fixtures" / "pages"
NAMES = tuple(quantity.name for quantity in ENGINE)

# Read off the pages by eye; None where this version has no such family.
BY_VERSION: dict[str, tuple[str, dict[str, float | None], float | None]] = {
    "0.12.0": (
        "cpu-v012/1795410619075.prom",
        {
            "prompt_tokens": 66593,
            "computed_tokens": None,
            "hbm_tokens": None,
            "external_tokens": None,
            "generated_tokens": 1104,
            "prefix_query_tokens": 66593,
            "prefix_hit_tokens": 28736,
            "external_query_tokens": 0,
            "external_hit_tokens": 0,
            "first_tokens": 67,
            "finished_requests": 67,
            "preemptions": 0,
            "steps": 1104,
            "step_tokens": 67697,
            "first_token_ns": 13.755624532699585,
            "queue_ns": 0.0011180589999639778,
            "prefill_ns": 13.553695478001828,
            "decode_ns": 12.24841974599758,
            "inter_token_ns": 12.24841974599758,
            "request_ns": 25.991191625595093,
            "running_requests": 0,
            "waiting_requests": 0,
            "waiting_for_capacity": None,
            "kv_usage_ppm": 0,
            "awake": 1,
        },
        1.79541056142e09,
    ),
    "0.16.0": (
        "cpu-v016/1795410049451.prom",
        {
            "prompt_tokens": 169185,
            "computed_tokens": 85921,
            "hbm_tokens": 83264,
            "external_tokens": 0,
            "generated_tokens": 3008,
            "prefix_query_tokens": 168885,
            "prefix_hit_tokens": 83264,
            "external_query_tokens": 0,
            "external_hit_tokens": 0,
            "first_tokens": 183,
            "finished_requests": 171,
            "preemptions": 0,
            "steps": 2994,
            "step_tokens": 172193,
            "first_token_ns": 57.134981632232666,
            "queue_ns": 0.0027524599954631412,
            "prefill_ns": 54.71822339200344,
            "decode_ns": 40.37931468799934,
            "inter_token_ns": 41.52315064199911,
            "request_ns": 95.73980712890625,
            "running_requests": 0,
            "waiting_requests": 0,
            "waiting_for_capacity": None,
            "kv_usage_ppm": 0,
            "awake": 1,
        },
        1.79540989691e09,
    ),
    "0.25.1": (
        "h100-v025-lmcache/1795409582483.prom",
        {
            "prompt_tokens": 4312520,
            "computed_tokens": 2363340,
            "hbm_tokens": 1391088,
            "external_tokens": 558092,
            "generated_tokens": 23586,
            "prefix_query_tokens": 8453481,
            "prefix_hit_tokens": 2042000,
            "external_query_tokens": 2921432,
            "external_hit_tokens": 558092,
            "first_tokens": 381,
            "finished_requests": 381,
            "preemptions": 29,
            "steps": 4273,
            "step_tokens": 2386926,
            "first_token_ns": 167.8508358001709,
            "queue_ns": 45.47866249199967,
            "prefill_ns": 110.58681334300229,
            "decode_ns": 331.62621964599873,
            "inter_token_ns": 331.62621964599873,
            "request_ns": 499.3473279476166,
            "running_requests": 0,
            "waiting_requests": 0,
            "waiting_for_capacity": 0,
            "kv_usage_ppm": 0,
            "awake": 1,
        },
        None,  # multiprocess mode tells neither process_start_time_seconds nor _created
    ),
    "0.32.0": (
        "cpu-v032/1795408686554.prom",
        {
            "prompt_tokens": 116986,
            "computed_tokens": 60666,
            "hbm_tokens": 56320,
            "external_tokens": 0,
            "generated_tokens": 2069,
            "prefix_query_tokens": 116986,
            "prefix_hit_tokens": 56320,
            "external_query_tokens": 0,
            "external_hit_tokens": 0,
            "first_tokens": 136,
            "finished_requests": 134,
            "preemptions": 0,
            "steps": 1720,
            "step_tokens": 62735,
            "first_token_ns": 25.182156085968018,
            "queue_ns": 0.0031867699992744747,
            "prefill_ns": 22.844945006001808,
            "decode_ns": 24.446467565999228,
            "inter_token_ns": 25.139356132998955,
            "request_ns": 49.3851637840271,
            "running_requests": 2,
            "waiting_requests": 0,
            "waiting_for_capacity": 0,
            "kv_usage_ppm": 0.00952380952380949,
            "awake": 1,
        },
        1.79540862537e09,
    ),
}
RECORDED = pytest.mark.parametrize("version", BY_VERSION)


def recorded(version: str) -> str:
    return (PAGES / BY_VERSION[version][0]).read_text()


def read(page: str, version: str | None = None) -> tuple[Reading, ...]:
    return PageMapper("host:8000", [VllmMapping()], version).read(page.encode())


def values(reading: Reading) -> dict[str, float | None]:
    names = NAMES if reading.kind == "engine" else tuple(quantity.name for quantity in CACHE)
    return dict(zip(names, reading.values, strict=True))


def details(reading: Reading) -> dict[str, float]:
    return dict(zip(reading.detail_names, reading.details, strict=True))


def told(page: str, name: str, *labels: str) -> float:
    """The sum of all samples of a name whose labels hold these texts: an oracle of one regular expression."""
    lines = re.findall(rf"^{name}(?:\{{(.*)\}})? (\S+)$", page, re.MULTILINE)
    return sum(float(value) for held, value in lines if all(label in held for label in labels))


@RECORDED
def test_every_quantity_of_a_recorded_page_is_as_the_page_tells_it(version: str) -> None:
    (reading,) = read(recorded(version), version)
    assert values(reading) == BY_VERSION[version][1]
    assert (reading.kind, reading.name, reading.epoch) == ("engine", "host:8000/0", BY_VERSION[version][2])
    assert reading.attributes["version"] == version


@RECORDED
def test_prompt_tokens_are_the_sum_of_their_sources_where_these_are_told(version: str) -> None:
    (reading,) = read(recorded(version))
    read_off = values(reading)
    parts = [read_off["computed_tokens"], read_off["hbm_tokens"], read_off["external_tokens"]]
    assert parts == [None] * 3 if version == "0.12.0" else sum(filter(None, parts)) == read_off["prompt_tokens"]


@RECORDED
def test_secondary_counters_are_there_exactly_where_the_version_has_them(version: str) -> None:
    page = recorded(version)
    (reading,) = read(page)
    plain = {name: value for name, value in details(reading).items() if "_le_" not in name}
    expected = {
        "finished_prompt_tokens": told(page, "vllm:request_prompt_tokens_sum"),
        "finished_generated_tokens": told(page, "vllm:request_generation_tokens_sum"),
        "finished_abort": 0,
    }
    if version != "0.12.0":
        expected |= {
            "cached_tokens": told(page, "vllm:prompt_tokens_cached_total"),
            "finished_computed_tokens": told(page, "vllm:request_prefill_kv_computed_tokens_sum"),
            "finished_error": 0,
        }
    if version == "0.16.0":
        expected["recomputed_tokens"] = 0
    if version in {"0.25.1", "0.32.0"}:
        expected |= {
            "estimated_gflop": told(page, "vllm:estimated_flops_per_gpu_total") / 1e9,
            "estimated_read_bytes": told(page, "vllm:estimated_read_bytes_per_gpu_total"),
            "estimated_write_bytes": told(page, "vllm:estimated_write_bytes_per_gpu_total"),
        }
    if version == "0.32.0":
        tiers = ("device", "host", "disk", "p2p", "unspecified")
        expected |= {f"admitted_{tier}_tokens": 56320 if tier == "device" else 0 for tier in tiers}
    assert plain == pytest.approx(expected)


@RECORDED
@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("vllm:iteration_tokens_total", "step_tokens"),
        ("vllm:request_prompt_tokens", "request_prompt_tokens"),
        ("vllm:request_prefill_kv_computed_tokens", "request_computed_tokens"),
    ],
)
def test_buckets_are_plain_counts_that_add_up_to_the_count_of_the_histogram(
    version: str, family: str, prefix: str
) -> None:
    page = recorded(version)
    (reading,) = read(page)
    buckets = {name: value for name, value in details(reading).items() if name.startswith(f"{prefix}_le_")}
    if version == "0.12.0" and prefix == "request_computed_tokens":
        assert buckets == {}  # since 0.13
        return
    assert sum(buckets.values()) == told(page, f"{family}_count") > 0
    assert len(buckets) == len(re.findall(rf"^{family}_bucket", page, re.MULTILINE))


def test_step_buckets_of_a_recorded_page_by_hand() -> None:
    (reading,) = read(recorded("0.32.0"))
    # cumulative: 1477 1591 1591 1591 1591 1612 1642 1675 1709 1720 1720 1720 1720 1720
    assert [(name, value) for name, value in details(reading).items() if name.startswith("step_tokens_le_")] == [
        ("step_tokens_le_1", 1477),
        ("step_tokens_le_8", 114),
        ("step_tokens_le_16", 0),
        ("step_tokens_le_32", 0),
        ("step_tokens_le_64", 0),
        ("step_tokens_le_128", 21),
        ("step_tokens_le_256", 30),
        ("step_tokens_le_512", 33),
        ("step_tokens_le_1024", 34),
        ("step_tokens_le_2048", 11),
        ("step_tokens_le_4096", 0),
        ("step_tokens_le_8192", 0),
        ("step_tokens_le_16384", 0),
        ("step_tokens_le_inf", 0),
    ]


@pytest.mark.parametrize(
    ("version", "model", "capacity"),
    [
        ("0.12.0", "tiny", {"block_size": "32", "num_gpu_blocks": "5461"}),
        ("0.16.0", "tiny", {"block_size": "32", "num_gpu_blocks": "5461"}),
        ("0.25.1", "llama-8b", {"block_size": "16", "num_gpu_blocks": "4600", "kv_cache_size_tokens": "73600"}),
        ("0.32.0", "tiny", {"block_size": "32", "num_gpu_blocks": "5461", "kv_cache_size_tokens": "174752"}),
    ],
)
def test_attributes_say_which_model_and_how_large_its_cache_is(
    version: str, model: str, capacity: dict[str, str]
) -> None:
    (reading,) = read(recorded(version))
    assert reading.attributes == {
        "engine": "vllm",
        "model": model,
        "cache_dtype": "auto",
        "enable_prefix_caching": "True",
        **capacity,
    }


@RECORDED
def test_a_page_in_the_rewritten_spelling_gives_the_same_reading(version: str) -> None:
    page = recorded(version)
    rewritten = re.sub(r"^(# TYPE )?vllm:", r"\1vllm_", page, flags=re.MULTILINE)
    assert "vllm:" not in re.sub(r"# HELP.*", "", rewritten)
    assert read(rewritten, version) == read(page, version)


PAGE_017 = """\
process_start_time_seconds 1.79541e+09
vllm:num_requests_running{engine="0",model_name="m"} 1.0
vllm:prompt_tokens_total{engine="0",model_name="m"} 4096.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_compute"} 1026.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="local_cache_hit"} 3072.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="m",source="external_kv_transfer"} 0.0
vllm:prompt_tokens_cached_total{engine="0",model_name="m"} 3070.0
vllm:prompt_tokens_recomputed_total{engine="0",model_name="m"} 2.0
"""


def test_recomputed_tokens_of_0_17_are_taken_off_the_hits_among_which_they_are() -> None:
    (reading,) = read(PAGE_017, "0.17.1")
    found = values(reading)
    assert (found["prompt_tokens"], found["computed_tokens"], found["hbm_tokens"]) == (4096, 1026, 3070)
    assert details(reading) == {"cached_tokens": 3070, "recomputed_tokens": 2}


def test_hits_of_0_17_are_unknown_where_the_recomputed_tokens_among_them_are() -> None:
    (reading,) = read(PAGE_017.replace("} 2.0", "} NaN"), "0.17.1")
    assert math.isnan(values(reading)["hbm_tokens"] or 0)
    assert values(reading)["computed_tokens"] == 1026


def rank(engine: int, model: str = "m") -> str:
    labels = f'engine="{engine}",model_name="{model}"'
    return (
        f"vllm:num_requests_running{{{labels}}} {engine + 1}\n"
        f"vllm:prompt_tokens_total{{{labels}}} {1000 * (engine + 1)}\n"
        f"vllm:generation_tokens_total{{{labels}}} {10 * (engine + 1)}\n"
        f'vllm:request_success_total{{finished_reason="stop",{labels}}} {engine}\n'
        f'vllm:request_success_total{{finished_reason="length",{labels}}} 5\n'
        f'vllm:iteration_tokens_total_bucket{{le="8.0",{labels}}} {engine}\n'
        f'vllm:iteration_tokens_total_bucket{{le="+Inf",{labels}}} {2 * engine}\n'
        f'vllm:cache_config_info{{block_size="16",engine="{engine}",num_gpu_blocks="{100 + engine}"}} 1\n'
    )


def test_every_data_parallel_rank_is_a_reading_of_its_own() -> None:
    readings = read("process_start_time_seconds 17\n" + "".join(map(rank, range(4))))
    assert [reading.name for reading in readings] == ["host:8000/0", "host:8000/1", "host:8000/2", "host:8000/3"]
    assert [values(reading)["prompt_tokens"] for reading in readings] == [1000, 2000, 3000, 4000]
    assert [values(reading)["generated_tokens"] for reading in readings] == [10, 20, 30, 40]
    assert [values(reading)["running_requests"] for reading in readings] == [1, 2, 3, 4]
    assert [values(reading)["finished_requests"] for reading in readings] == [5, 6, 7, 8]
    assert [details(reading)["step_tokens_le_inf"] for reading in readings] == [0, 1, 2, 3]
    assert [reading.attributes["num_gpu_blocks"] for reading in readings] == ["100", "101", "102", "103"]
    assert {reading.epoch for reading in readings} == {17}


def test_interleaved_ranks_of_a_page_are_kept_apart() -> None:
    lines = "".join(map(rank, range(4))).splitlines(keepends=True)
    assert read("".join(sorted(lines))) == read("".join(lines))


def test_a_family_without_the_engine_label_is_nobodys_on_a_page_of_several_engines() -> None:
    page = rank(0) + rank(1) + 'vllm:num_preemptions_total{model_name="m"} 7\n'
    assert [values(reading)["preemptions"] for reading in read(page)] == [None, None]
    assert [values(reading)["preemptions"] for reading in read(page.replace(rank(1), ""))] == [7]


def test_two_models_of_one_engine_are_two_readings_and_share_its_configuration() -> None:
    first, second = read(rank(0, "a") + rank(0, "b").replace(" 1000\n", " 77\n").split("vllm:cache_config_info")[0])
    assert (first.name, first.attributes["model"], values(first)["prompt_tokens"]) == ("host:8000/0/a", "a", 1000)
    assert (second.name, second.attributes["model"], values(second)["prompt_tokens"]) == ("host:8000/0/b", "b", 77)
    assert first.attributes["num_gpu_blocks"] == second.attributes["num_gpu_blocks"] == "100"


def test_a_page_without_the_engine_label_is_engine_0() -> None:
    page = re.sub(r'engine="0",?', "", recorded("0.32.0"))
    assert read(page) == read(recorded("0.32.0"))


def test_a_page_without_model_names_has_one_engine_without_a_model() -> None:
    (reading,) = read('vllm:prompt_tokens_total{engine="0"} 5\nvllm:num_preemptions_total 1\n')
    assert (reading.name, reading.attributes["model"]) == ("host:8000/0", "")
    assert (values(reading)["prompt_tokens"], values(reading)["preemptions"]) == (5, 1)


def test_without_a_process_start_the_birth_of_the_first_counter_is_the_epoch() -> None:
    page = re.sub(r"^process_.*\n", "", recorded("0.16.0"), flags=re.MULTILINE)
    (reading,) = read(page)
    assert reading.epoch == 1.7954099198029454e09


def test_gauges_that_each_front_end_shows_with_its_pid_are_not_added_up() -> None:
    page = rank(0) + "".join(
        f'vllm:kv_cache_usage_perc{{engine="0",model_name="m",pid="{pid}"}} {share}\n'
        f'vllm:engine_sleep_state{{engine="0",model_name="m",pid="{pid}",sleep_state="awake"}} 1\n'
        f'vllm:num_requests_waiting{{engine="0",model_name="m",pid="{pid}"}} {waiting}\n'
        for pid, share, waiting in ((71, 0.5, 3), (72, 0.75, 4))
    )
    (reading,) = read(page)
    found = values(reading)
    assert (found["kv_usage_ppm"], found["awake"], found["waiting_requests"]) == (0.75, 1, 4)


def test_a_secondary_counter_that_is_there_twice_is_not_told() -> None:
    cached = 'vllm:prompt_tokens_cached_total{engine="0",model_name="m",pid="%d"} 5\n'
    assert details(read(rank(0) + cached % 71)[0])["cached_tokens"] == 5
    assert "cached_tokens" not in details(read(rank(0) + cached % 71 + cached % 72)[0])


def test_a_sleeping_engine_is_not_awake() -> None:
    page = recorded("0.32.0").replace('sleep_state="awake"} 1.0', 'sleep_state="awake"} 0.0')
    assert values(read(page)[0])["awake"] == 0


def test_old_names_serve_where_the_new_ones_are_missing_and_never_beside_them() -> None:
    old = rank(0) + (
        'vllm:time_per_output_token_seconds_sum{engine="0",model_name="m"} 3.5\n'
        'vllm:gpu_cache_usage_perc{engine="0",model_name="m"} 0.25\n'
    )
    new = (
        'vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 4.5\n'
        'vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.5\n'
    )
    (reading,) = read(old)
    assert (values(reading)["inter_token_ns"], values(reading)["kv_usage_ppm"]) == (3.5, 0.25)
    (reading,) = read(old + new)
    assert (values(reading)["inter_token_ns"], values(reading)["kv_usage_ppm"]) == (4.5, 0.5)


OFFLOAD_UNTIL_023 = """\
vllm:kv_offload_total_bytes_total{engine="0",model_name="m",transfer_type="CPU_to_GPU"} 1000
vllm:kv_offload_total_bytes_total{engine="0",model_name="m",transfer_type="GPU_to_CPU"} 3000
vllm:kv_offload_total_time_total{engine="0",model_name="m",transfer_type="CPU_to_GPU"} 0.5
vllm:kv_offload_total_time_total{engine="0",model_name="m",transfer_type="GPU_to_CPU"} 1.5
"""
OFFLOAD_SINCE_024 = """\
vllm:kv_offload_load_bytes_total{engine="0",model_name="m"} 1001
vllm:kv_offload_store_bytes_total{engine="0",model_name="m"} 3001
vllm:kv_offload_load_time_total{engine="0",model_name="m"} 0.25
vllm:kv_offload_store_time_total{engine="0",model_name="m"} 1.25
"""


@pytest.mark.parametrize(
    ("families", "expected"),
    [
        (OFFLOAD_UNTIL_023, (1000, 3000, 0.5, 1.5)),
        (OFFLOAD_SINCE_024, (1001, 3001, 0.25, 1.25)),
        (OFFLOAD_UNTIL_023 + OFFLOAD_SINCE_024, (1001, 3001, 0.25, 1.25)),  # 0.24 to 0.33 may show both
    ],
)
def test_an_engine_that_offloads_kv_by_itself_has_a_cache_reading(
    families: str, expected: tuple[float, float, float, float]
) -> None:
    _, cache = read("process_start_time_seconds 17\n" + rank(0) + families)
    assert (cache.kind, cache.name, cache.epoch) == ("cache", "host:8000/0/kv_offload", 17)
    assert cache.attributes == {"cache": "vllm kv_offload", "model": "m"}
    found = values(cache)
    assert tuple(found.pop(name) for name in ("load_bytes", "store_bytes", "load_ns", "store_ns")) == expected
    assert set(found.values()) == {None}


def test_each_rank_offloads_for_itself() -> None:
    page = rank(0) + rank(1) + OFFLOAD_SINCE_024 + OFFLOAD_SINCE_024.replace('engine="0"', 'engine="1"')
    names = [reading.name for reading in read(page)]
    assert names == ["host:8000/0", "host:8000/0/kv_offload", "host:8000/1", "host:8000/1/kv_offload"]


@pytest.mark.parametrize("bad", ["NaN", "+Inf", "-Inf"])
def test_a_counter_that_is_no_number_is_unknown_and_the_others_are_read(bad: str) -> None:
    page = recorded("0.16.0").replace(
        'vllm:generation_tokens_total{engine="0",model_name="tiny"} 3008.0',
        f'vllm:generation_tokens_total{{engine="0",model_name="tiny"}} {bad}',
    )
    (reading,) = read(page, "0.16.0")
    found = values(reading)
    assert math.isnan(found["generated_tokens"] or 0)
    assert found | {"generated_tokens": None} == BY_VERSION["0.16.0"][1] | {"generated_tokens": None}
    assert reading.details == read(recorded("0.16.0"))[0].details


def test_one_reason_that_is_no_number_makes_the_finished_requests_unknown() -> None:
    page = recorded("0.16.0").replace('finished_reason="length",model_name="tiny"} 171.0', 'model_name="tiny"} NaN')
    (reading,) = read(page)
    assert math.isnan(values(reading)["finished_requests"] or 0)


@pytest.mark.parametrize("bad", ["NaN", "+Inf"])
def test_a_bucket_that_is_no_number_costs_the_details_and_not_the_reading(bad: str) -> None:
    page = recorded("0.16.0").replace('le="2048.0",model_name="tiny"} 2994.0', f'le="2048.0",model_name="tiny"}} {bad}')
    assert page != recorded("0.16.0")
    (reading,) = read(page, "0.16.0")
    assert reading.details == ()
    assert reading.detail_names == read(recorded("0.16.0"))[0].detail_names
    assert values(reading) == BY_VERSION["0.16.0"][1]


def test_a_process_start_that_is_no_number_is_an_unknown_epoch() -> None:
    assert read("process_start_time_seconds NaN\n" + rank(0))[0].epoch is None


def test_an_engine_that_keeps_no_statistics_is_named_with_its_remedy() -> None:
    page = re.sub(r"^(# (HELP|TYPE) )?vllm:.*\n", "", recorded("0.32.0"), flags=re.MULTILINE)
    assert "process_start_time_seconds" in page
    with pytest.raises(CollectError, match="host:8000: the page holds no family") as error:
        read(page)
    assert "--disable-log-stats" in error.value.hint


def test_a_page_that_claims_a_thousand_engines_is_refused() -> None:
    with pytest.raises(CollectError, match="513 engines, the limit is 512"):
        read("".join(f'vllm:prompt_tokens_total{{engine="{index}"}} 1\n' for index in range(513)))


def test_a_restricted_scrape_asks_for_every_sample_that_a_recorded_page_is_read_for() -> None:
    asked = set(VllmMapping().names())
    for version in BY_VERSION:
        page = recorded(version)
        kept = [line for line in page.splitlines() if re.split(r"[ {]", line)[0] in asked]
        assert len(kept) < len(page.splitlines())
        assert read("\n".join(kept) + "\n", version) == read(page, version)
