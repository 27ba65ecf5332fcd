from __future__ import annotations

from kvtally.collectors.dynamo import FAMILIES, NOT_READ, DynamoMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import reader_class, sources_on

PAGE = """
dynamo_frontend_requests_total{endpoint="chat_completions",model="llama-8b",request_type="stream",status="success"} 8
dynamo_frontend_requests_total{endpoint="completions",model="llama-8b",request_type="unary",status="success"} 1
dynamo_frontend_requests_total{endpoint="chat_completions",model="llama-8b",request_type="stream",status="error"} 2
dynamo_frontend_input_sequence_tokens_sum{model="llama-8b"} 9000
dynamo_frontend_input_sequence_tokens_count{model="llama-8b"} 9
dynamo_frontend_cached_tokens_sum{model="llama-8b"} 4000
dynamo_frontend_output_tokens_total{model="llama-8b"} 1234
dynamo_frontend_output_sequence_tokens_sum{model="llama-8b"} 1200
dynamo_frontend_time_to_first_token_seconds_sum{model="llama-8b"} 2.5
dynamo_frontend_request_duration_seconds_sum{model="llama-8b"} 40
dynamo_frontend_model_workers{model="llama-8b"} 2
dynamo_frontend_worker_last_input_sequence_tokens{dp_rank="0",worker_id="1",worker_type="decode"} 800
"""


def told(page: str) -> dict[str, dict[str, float]]:
    """What each target tells, by its name."""
    names = [quantity.name for quantity in QUANTITIES["gateway"]]
    return {
        reading.name: {n: value for n, value in zip(names, reading.values, strict=True) if value is not None}
        for reading in PageMapper("front:8000", (DynamoMapping(),)).read(page.encode())
    }


def test_the_frontend_is_a_gateway_of_each_model() -> None:
    # 8 + 1 + 2 requests that ended; tokens as they come go before those of requests that ended
    assert told(PAGE) == {
        "front:8000/dynamo/llama-8b": {
            "requests": 11,
            "failed_requests": 2,
            "input_tokens": 9000,
            "cached_tokens": 4000,
            "output_tokens": 1234,
            "first_token_ns": 2.5,
            "request_ns": 40,
        }
    }
    assert set(told(PAGE + PAGE.replace("llama-8b", "qwen"))) == {
        "front:8000/dynamo/llama-8b",
        "front:8000/dynamo/qwen",
    }


def test_an_older_frontend_tells_output_when_a_request_ends_and_cached_tokens_by_another_name() -> None:
    lines = [line for line in PAGE.splitlines() if "output_tokens_total" not in line]
    older = "\n".join(lines).replace("cached_tokens_sum", "cached_sequence_length_sum")
    (values,) = told(older).values()
    assert (values["output_tokens"], values["cached_tokens"]) == (1200, 4000)


def test_the_registry_finds_it_and_what_is_left_out_is_not_read() -> None:
    assert reader_class("dynamo") is DynamoMapping
    assert sources_on(PAGE.encode()) == ("dynamo",)
    assert not [
        row.sample for row in FAMILIES if row.sample.startswith(tuple(name.removesuffix("*") for name, _ in NOT_READ))
    ]
