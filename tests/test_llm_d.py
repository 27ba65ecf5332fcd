from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError
from kvtally.collectors.llm_d import FAMILIES, NOT_READ, LlmDMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import reader_class, sources_on

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.collectors.base import Reading

# the EPP's page as its documentation has it: two tenants of one model, a second model that is asked for by another name
PAGE = """
# HELP llm_d_epp_request_total [ALPHA] Total requests.
# TYPE llm_d_epp_request_total counter
llm_d_epp_request_total{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 7
llm_d_epp_request_total{fairness_id="blue",model_name="chat",priority="1",target_model_name="llama-8b"} 3
llm_d_epp_request_total{fairness_id="",model_name="qwen",priority="0",target_model_name=""} 2
llm_d_epp_request_error_total{error_code="429",fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 1
llm_d_epp_request_error_total{error_code="500",fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 2
llm_d_epp_request_input_tokens_bucket{fairness_id="",le="8",model_name="chat",priority="0",target_model_name="llama-8b"} 1
llm_d_epp_request_input_tokens_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 700
llm_d_epp_request_input_tokens_count{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 7
llm_d_epp_request_input_tokens_sum{fairness_id="blue",model_name="chat",priority="1",target_model_name="llama-8b"} 300
llm_d_epp_request_input_tokens_sum{fairness_id="",model_name="qwen",priority="0",target_model_name=""} 50
llm_d_epp_request_cached_tokens_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 400
llm_d_epp_request_output_tokens_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 90
llm_d_epp_request_ttft_seconds_sum{model_name="chat",streaming="true",target_model_name="llama-8b"} 1.5
llm_d_epp_request_ttft_seconds_sum{model_name="chat",streaming="false",target_model_name="llama-8b"} 2
llm_d_epp_request_duration_seconds_sum{fairness_id="",model_name="chat",priority="0",target_model_name="llama-8b"} 30.5
llm_d_epp_disagg_decision_total{decision_type="decode-only",model_name="llama-8b",plugin_name="d",plugin_type="d"} 4
llm_d_epp_disagg_decision_total{decision_type="prefill-decode",model_name="llama-8b",plugin_name="d",plugin_type="d"} 5
llm_d_epp_disagg_decision_total{decision_type="encode-prefill-decode",model_name="llama-8b",plugin_name="d",plugin_type="d"} 1
llm_d_epp_disagg_decision_total{decision_type="encode-decode",model_name="llama-8b",plugin_name="d",plugin_type="d"} 100
llm_d_epp_disagg_decision_total{decision_type="aggregated-fallback",model_name="llama-8b",plugin_name="d",plugin_type="d"} 200
llm_d_epp_disagg_decision_total{decision_type="prefill-decode",model_name="unknown",plugin_name="d",plugin_type="d"} 9
llm_d_epp_prefix_indexer_hit_ratio_sum{plugin_name="p",plugin_type="p"} 3.5
llm_d_epp_kv_cache_index_lookup_hits_total 77
"""  # noqa: E501  # lines of a page
WHOLE = {
    "requests": 10,
    "failed_requests": 3,
    "input_tokens": 1000,
    "cached_tokens": 400,
    "output_tokens": 90,
    "disaggregated_requests": 6,
    "first_token_ns": 3.5,
    "request_ns": 30.5,
}


def read(page: str) -> dict[str, Reading]:
    readings = PageMapper("epp:9090", (LlmDMapping(),)).read(page.encode())
    return {reading.name: reading for reading in readings}


def told(reading: Reading) -> Mapping[str, float | None]:
    names = [quantity.name for quantity in QUANTITIES["gateway"]]
    return {name: value for name, value in zip(names, reading.values, strict=True) if value is not None}


def test_each_model_is_a_gateway_with_its_tenants_and_priorities_summed() -> None:
    readings = read(PAGE)
    assert sorted(readings) == ["epp:9090/llm-d/llama-8b", "epp:9090/llm-d/qwen"]
    llama = readings["epp:9090/llm-d/llama-8b"]
    assert (llama.kind, llama.attributes) == ("gateway", {"source": "llm-d", "model": "llama-8b"})
    # 7 + 3 requests, 1 + 2 errors, 700 + 300 tokens, 5 + 1 decisions that split a request, 1.5 + 2 s
    assert told(llama) == WHOLE
    assert told(readings["epp:9090/llm-d/qwen"]) == {"requests": 2, "input_tokens": 50}


def test_a_model_keeps_its_target_when_it_is_the_only_one() -> None:
    alone = "\n".join(line for line in PAGE.splitlines() if "qwen" not in line)
    assert list(read(alone)) == ["epp:9090/llm-d/llama-8b"]


LEGACY = {
    "llm_d_epp_request_input_tokens": "inference_objective_input_tokens",
    "llm_d_epp_request_cached_tokens": "inference_objective_prompt_cached_tokens",
    "llm_d_epp_request_output_tokens": "inference_objective_output_tokens",
    "llm_d_epp_disagg_decision": "llm_d_inference_scheduler_disagg_decision",
    "llm_d_epp_request_": "inference_objective_request_",
}


def renamed(page: str) -> str:
    for new, old in LEGACY.items():
        page = page.replace(new, old)
    return page


def test_what_is_emitted_under_two_names_counts_once() -> None:
    assert told(read(PAGE + renamed(PAGE))["epp:9090/llm-d/llama-8b"]) == WHOLE


def test_an_older_name_serves_where_the_new_one_is_absent() -> None:
    older = told(read(renamed(PAGE))["epp:9090/llm-d/llama-8b"])
    assert older == {name: value for name, value in WHOLE.items() if name != "first_token_ns"}


@pytest.mark.parametrize("prefix", ["llm_d_epp_", "llm_d_router_epp_", "inference_objective_", "inference_model_"])
def test_the_prefixes_of_older_releases_are_read(prefix: str) -> None:
    page = f'{prefix}request_total{{model_name="m",target_model_name="m"}} 2\n'
    page += f'{prefix}input_tokens_sum{{model_name="m",target_model_name="m"}} 30\n'
    page += f'{prefix}prompt_cached_tokens_sum{{model_name="m",target_model_name="m"}} 20\n'
    (reading,) = read(page).values()
    assert told(reading) == {"requests": 2, "input_tokens": 30, "cached_tokens": 20}
    assert sources_on(page.encode()) == ("llm_d",)


def test_what_the_router_guesses_of_caches_is_not_read() -> None:
    guesses = [
        line for line in PAGE.splitlines() if line.startswith(tuple(name.removesuffix("*") for name, _ in NOT_READ))
    ]
    assert len(guesses) == 2
    with pytest.raises(CollectError):
        read("\n".join(guesses))
    assert not [
        row.sample for row in FAMILIES if row.sample.startswith(tuple(name.removesuffix("*") for name, _ in NOT_READ))
    ]


def test_a_restart_of_the_router_is_told_by_its_process_start() -> None:
    page = PAGE + "process_start_time_seconds 1795406400.5\n"
    assert {reading.epoch for reading in read(page).values()} == {1795406400.5}


def test_the_registry_finds_it() -> None:
    assert reader_class("llm_d") is LlmDMapping
    assert sources_on(PAGE.encode()) == ("llm_d",)


def test_every_quantity_of_a_gateway_has_a_row() -> None:
    assert {row.quantity for row in FAMILIES} == {quantity.name for quantity in QUANTITIES["gateway"]}
