from __future__ import annotations

import json
from typing import Any

import pytest

from kvtally.agent.replay import about_of

MODEL = {"architecture": "LlamaForCausalLM", "num_hidden_layers": 32, "weight_dtype": "bfloat16"}
SHAPE = '{"architecture":"LlamaForCausalLM","kv_dtype":"bfloat16","num_hidden_layers":32,"weight_dtype":"bfloat16"}'


def facts(**meta: Any) -> dict[str, str]:
    return dict(about_of(meta).facts)


def test_a_recording_tells_how_its_engine_was_run() -> None:
    told = '{"kv_connector":"LMCacheConnectorV1"}'
    arguments = ["--max-num-batched-tokens", "2048", "--enforce-eager", "-tp", "2", "--kv-transfer-config", told]
    about = about_of({"model": MODEL, "engine_args": arguments, "gpus": [], "gpus_per_replica": 0})
    assert about.facts == {
        "shape": SHAPE,
        "token_budget": "2048",
        "tensor_parallel": "2",
        "eager": "1",
        "connector": "LMCacheConnectorV1",
    }
    assert (about.gpus, about.per_replica, about.mapping) == ((), None, "recorded")


def test_a_recording_that_does_not_know_its_gpus_tells_how_its_engine_was_run_all_the_same() -> None:
    about = about_of({"model": MODEL, "gpus": None})
    assert (about.gpus, about.facts) == (None, {"shape": SHAPE})


def test_options_choose_other_types_than_the_model_has() -> None:
    told = json.loads(facts(model=MODEL, engine_args=["--kv-cache-dtype=fp8"])["shape"])
    assert (told["weight_dtype"], told["kv_dtype"]) == ("bfloat16", "fp8")


@pytest.mark.parametrize("model", [None, 7, "llama", [MODEL], {}, {"num_hidden_layers": "many"}, {"name": "llama"}])
def test_a_model_that_is_nonsense_is_no_shape(model: object) -> None:
    assert facts(model=model, engine_args=None) == {}


@pytest.mark.parametrize("arguments", [None, "--enforce-eager", {"--enforce-eager": 1}, [7, None, ["-tp", "2"]]])
def test_arguments_that_are_nonsense_tell_nothing(arguments: object) -> None:
    assert facts(model=MODEL, engine_args=arguments) == {"shape": SHAPE}


@pytest.mark.parametrize(
    ("connector", "told"),
    [("MultiConnector", "MultiConnector"), (None, "A"), ("", "A"), ("x y", "A"), (7, "A"), ("B" * 201, "A")],
)
def test_a_connector_that_the_recorders_config_gave_goes_before_the_arguments(connector: object, told: str) -> None:
    arguments = ["--kv-transfer-config", '{"kv_connector":"A"}']
    assert facts(connector=connector, engine_args=arguments) == {"connector": told}


@pytest.mark.parametrize(
    ("budget", "told"),
    [(4096, "4096"), (None, "2048"), (True, "2048"), (0, "2048"), ("4096", "2048"), (10**30, "2048")],
)
def test_a_budget_that_the_recorders_config_gave_goes_before_the_arguments(budget: object, told: str) -> None:
    assert facts(token_budget=budget, engine_args=["--max-num-batched-tokens", "2048"]) == {"token_budget": told}
