from __future__ import annotations

import json

import pytest
from tests.ledgers import SKU

from kvtally.agent.calibration import Fingerprint
from kvtally.agent.facts import Replica
from kvtally.agent.observed import fingerprint_of

SHAPE = {"architecture": "LlamaForCausalLM", "weight_dtype": "bfloat16", "kv_dtype": "fp8", "num_hidden_layers": 32}
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
}
REPLICA = Replica(
    7, "10.0.0.1:8000/0", "llama-8b", "0.25.1", ("GPU-a", "GPU-b"), SKU, "on-demand", "", {}, shape=json.dumps(SHAPE)
)


def shaped(**changes: object) -> Replica:
    """The replica with another shape; None leaves a key out."""
    shape = {key: value for key, value in {**SHAPE, **changes}.items() if value is not None}
    return REPLICA._replace(shape=json.dumps(shape))


def test_a_replica_whose_facts_are_known_has_a_fingerprint() -> None:
    expected = Fingerprint("llama-8b", "LlamaForCausalLM", "bfloat16", "fp8", SKU, 2, "0.25.1", 8192)
    assert fingerprint_of(REPLICA) == expected
    assert fingerprint_of(REPLICA._replace(token_budget=2048)) == expected._replace(token_budget=2048)
    assert fingerprint_of(REPLICA._replace(version=None)) == expected._replace(version="")


def test_models_of_other_sizes_behind_one_name_have_fingerprints_of_their_own() -> None:
    plain, deep, wide = (
        fingerprint_of(shaped(**{**LLAMA, **changes}))
        for changes in ({}, {"num_hidden_layers": 64}, {"intermediate_size": 28672})
    )
    assert plain is not None
    assert deep is not None
    assert wide is not None
    assert plain.sizes.startswith("32x4096-")
    assert deep.sizes.startswith("64x4096-")
    assert wide.sizes.startswith("32x4096-")
    assert len({plain, deep, wide}) == 3
    assert plain._replace(sizes="") == deep._replace(sizes="") == wide._replace(sizes="")
    # what a law does not read of the shape tells no two apart, so that a key more in it loses no law
    assert fingerprint_of(shaped(**LLAMA, parameters=8_030_261_248)) == plain
    assert fingerprint_of(shaped(**LLAMA)._replace(eager=True)) == plain._replace(is_eager=True)


def test_where_it_ran_and_what_it_was_called_is_no_part_of_a_fingerprint() -> None:
    other = REPLICA._replace(target_id=9, name="10.0.0.9:8000/3", gpus=("GPU-y", "GPU-z"), site="hall", term="owned")
    assert fingerprint_of(other) == fingerprint_of(REPLICA)


def test_a_replica_without_a_gpu_has_a_fingerprint() -> None:
    found = fingerprint_of(REPLICA._replace(gpus=(), sku=None))
    assert found is not None
    assert (found.gpus, found.sku) == (0, "")


def test_the_kv_cache_has_the_type_of_the_weights_where_nobody_chose_one() -> None:
    found = fingerprint_of(shaped(kv_dtype=None))
    assert found is not None
    assert found.kv_dtype == "bfloat16"


def test_a_quantized_model_does_not_share_a_law_with_the_plain_one() -> None:
    found = fingerprint_of(shaped(quantization="fp8"))
    assert found is not None
    assert found.weight_dtype == "bfloat16+fp8"


@pytest.mark.parametrize(
    "replica",
    [
        pytest.param(REPLICA._replace(gpus=None), id="a mapping"),
        pytest.param(REPLICA._replace(sku=None), id="a product"),
        pytest.param(REPLICA._replace(sku=""), id="a product's name"),
        pytest.param(REPLICA._replace(shape=""), id="a shape"),
        pytest.param(shaped(architecture=None), id="an architecture"),
        pytest.param(shaped(architecture=""), id="a name of one"),
        pytest.param(shaped(weight_dtype=None), id="a type"),
    ],
)
def test_a_replica_that_lacks_one_of_them_has_no_fingerprint(replica: Replica) -> None:
    assert fingerprint_of(replica) is None
