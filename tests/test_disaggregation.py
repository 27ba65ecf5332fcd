from __future__ import annotations

import pytest

from kvtally.agent.disaggregation import counted_work, grouped, pool_of, without_other_half
from kvtally.agent.facts import Replica

COUNTED: dict[str, int | None] = {
    "prompt_tokens": 1000,
    "computed_tokens": 16,
    "hbm_tokens": 84,
    "external_tokens": 900,
    "generated_tokens": 50,
    "prefix_hit_tokens": 84,
    "external_hit_tokens": 900,
    "steps": 40,
}


def replica(role: str, *, name: str = "a:8000/0", model: str = "llama", group: str = "", **labels: str) -> Replica:
    return Replica(1, name, model, "0.25.1", ("GPU-a",), "", "on-demand", "", labels, role=role, group=group)


@pytest.mark.parametrize("role", ["", "both"])
def test_an_engine_that_does_both_counts_everything(role: str) -> None:
    assert counted_work(replica(role), COUNTED) is COUNTED


def test_prompts_of_a_decode_engine_are_another_engines() -> None:
    work = counted_work(replica("decode"), COUNTED)
    assert work == {
        **dict.fromkeys(COUNTED, 0),
        "generated_tokens": 50,
        "steps": 40,
        "computed_at_decode_tokens": 16,
        "prompt_at_decode_tokens": 1000,
    }


def test_the_token_of_a_prefill_engine_is_another_engines() -> None:
    assert counted_work(replica("prefill"), COUNTED) == {**COUNTED, "generated_tokens": 0}


def test_what_a_decode_engine_does_not_tell_stays_unknown() -> None:
    work = counted_work(replica("decode"), dict.fromkeys(COUNTED))
    assert (work["generated_tokens"], work["prompt_tokens"]) == (None, 0)


@pytest.mark.parametrize(
    ("one", "pool"),
    [
        (replica(""), "llama"),
        (replica("", namespace="chat"), "chat/llama"),
        (replica("", cluster="east", namespace="chat"), "east/chat/llama"),
        (replica("", group="pair-1", namespace="chat"), "pair-1"),
    ],
)
def test_a_pool_is_its_group_or_a_model_in_one_place(one: Replica, pool: str) -> None:
    assert pool_of(one) == pool


def test_both_roles_of_one_model_in_one_place_cost_together() -> None:
    found = grouped(
        {
            1: replica("prefill", namespace="chat"),
            2: replica("decode", namespace="chat"),
            3: replica("decode", namespace="code"),  # its prefill engines are elsewhere
            4: replica("decode", namespace="chat", model="qwen"),
            5: replica("", namespace="chat"),
            6: replica("decode", namespace="chat", group="mine"),
        }
    )
    names = {number: one.group for number, one in found.items()}
    assert names == {1: "chat/llama prefill+decode", 2: "chat/llama prefill+decode", 3: "", 4: "", 5: "", 6: "mine"}


@pytest.mark.parametrize(
    ("roles", "lacks_prefill", "lacks_decode"),
    [
        ({""}, False, False),
        ({"both"}, False, False),
        ({"prefill", "decode"}, False, False),
        ({"decode"}, True, False),
        ({"prefill"}, False, True),
        ({"decode", ""}, True, False),  # nothing says that the other one does the prefill
        ({"decode", "both"}, False, False),
    ],
)
def test_one_half_alone_is_found(roles: set[str], lacks_prefill: bool, lacks_decode: bool) -> None:
    assert without_other_half({"pool": roles}, "decode") == ["pool"] * lacks_prefill
    assert without_other_half({"pool": roles}, "prefill") == ["pool"] * lacks_decode
