from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtally.agent.model_shape import ModelShape, UnknownArchitecture, shape_of, shape_text

CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"
KNOWN = (
    "llama-3.1-8b",
    "llama-3.1-70b",
    "mistral-7b-v0.3",
    "mistral-small-3.1-24b",
    "qwen2.5-7b",
    "qwen3-30b-a3b",
    "mixtral-8x7b",
    "deepseek-v3",
)


def config(name: str, **changed: Any) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return {key: value for key, value in (kept | changed).items() if value != "removed"}


def shape(name: str, **changed: Any) -> ModelShape:
    return shape_of(config(name, **changed))


# 32 x (2 x 4096 x 4096 + 2 x 4096 x 1024 + 3 x 4096 x 14336) = 6,979,321,856 in the layers' matrices,
# 2 x 128,256 x 4096 = 1,050,673,152 outside, 65 norms of 4096
def test_llama_8b_is_counted_to_the_parameter() -> None:
    llama = shape("llama-3.1-8b")
    assert llama.linear_parameters == 6_979_321_856
    assert llama.total_parameters == 8_030_261_248
    assert llama.active_parameters == 8_030_261_248
    assert llama.attention_flop == 4 * 32 * 32 * 128
    assert llama.kv_bytes_per_token == 131_072
    assert llama.dense_weight_bytes == 2 * (6_979_321_856 + 128_256 * 4096)
    assert llama.weight_bytes(1) == llama.weight_bytes(8192) == llama.dense_weight_bytes
    assert llama.resident_bytes == 2 * 8_030_261_248


def test_llama_70b_keeps_320_kib_of_keys_and_values_a_token() -> None:
    llama = shape("llama-3.1-70b")
    assert llama.kv_bytes_per_token == 327_680
    assert llama.total_parameters == 70_553_706_496
    assert llama.attention_flop == 4 * 80 * 64 * 128


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("mistral-7b-v0.3", 7.248e9, 7.248e9),
        ("qwen2.5-7b", 7.616e9, 7.616e9),
        ("mixtral-8x7b", 46.70e9, 12.88e9),
        ("qwen3-30b-a3b", 30.53e9, 3.35e9),
        ("deepseek-v3", 671.0e9, 37.55e9),
        ("mistral-small-3.1-24b", 23.57e9, 23.57e9),
    ],
)
def test_parameters_are_those_that_the_family_publishes(name: str, total: float, active: float) -> None:
    known = shape(name)
    assert known.total_parameters == pytest.approx(total, rel=0.002)
    assert known.active_parameters == pytest.approx(active, rel=0.005)


# 32 layers x 8 experts x 3 x 4096 x 14336, two of eight for a token
def test_a_step_of_one_token_reads_the_experts_that_it_is_sent_to() -> None:
    mixtral = shape("mixtral-8x7b")
    routed = 32 * 8 * 3 * 4096 * 14336
    assert mixtral.expert_weight_bytes == 2 * routed
    outside = 32 * (2 * 4096 * 128 * 40 + 4096 * 8)  # attention and router
    assert mixtral.linear_parameters == outside + routed // 4
    assert mixtral.dense_weight_bytes == 2 * (outside + 32_000 * 4096)
    assert mixtral.weight_bytes(1) == mixtral.dense_weight_bytes + mixtral.expert_weight_bytes / 4
    assert mixtral.weight_bytes(4) == mixtral.weight_bytes(1000) == mixtral.dense_weight_bytes + 2 * routed
    assert mixtral.weight_bytes(0) == mixtral.dense_weight_bytes


# of a token and layer: 512 compressed values and 64 of the rotary key, not 2 x 128 heads x 192
def test_multi_head_latent_attention_keeps_one_compressed_vector() -> None:
    deepseek = shape("deepseek-v3")
    assert deepseek.kv_bytes_per_token == 61 * 576 * 2
    assert deepseek.attention_flop == 61 * 2 * 128 * (128 + 64 + 128)
    assert (deepseek.kv_heads, deepseek.head_dim) == (1, 576)
    assert (deepseek.weight_bytes_per_parameter, deepseek.is_fp8) == (1.0, True)


def test_latent_attention_without_a_query_rank_projects_the_query_at_once() -> None:
    with_rank, without = shape("deepseek-v3"), shape("deepseek-v3", q_lora_rank=None)
    per_layer = 7168 * 128 * 192 - 1536 * (7168 + 128 * 192)
    assert without.linear_parameters - with_rank.linear_parameters == 61 * per_layer


def test_the_first_layers_of_deepseek_have_no_experts() -> None:
    deepseek = shape("deepseek-v3")
    assert deepseek.expert_weight_bytes == 58 * 256 * 3 * 7168 * 2048
    assert shape("deepseek-v3", first_k_dense_replace=61 - 1).expert_weight_bytes == 256 * 3 * 7168 * 2048


def test_layers_without_experts_are_told_by_step_and_by_name() -> None:
    per_layer = 128 * 3 * 2048 * 768 * 2
    assert shape("qwen3-30b-a3b").expert_weight_bytes == 48 * per_layer
    assert shape("qwen3-30b-a3b", decoder_sparse_step=2).expert_weight_bytes == 24 * per_layer
    assert shape("qwen3-30b-a3b", mlp_only_layers=[0, 47]).expert_weight_bytes == 46 * per_layer


def test_a_model_that_sees_is_read_by_the_part_that_reads_text() -> None:
    mistral = shape("mistral-small-3.1-24b")
    assert (mistral.layers, mistral.hidden, mistral.head_dim) == (40, 5120, 128)


def test_a_tied_embedding_is_counted_once() -> None:
    apart = shape("qwen2.5-7b").total_parameters - shape("qwen2.5-7b", tie_word_embeddings=True).total_parameters
    assert apart == 152_064 * 3584


# what a recording's meta.json says of a model
def test_the_flat_keys_of_a_recording_are_enough() -> None:
    recorded = {
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": 6,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 4096,
        "weight_dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "parameters": 21_895_680,
    }
    tiny = shape_of(recorded)
    assert tiny.total_parameters == 21_895_680
    assert tiny.linear_parameters == 6 * (2 * 512 * 64 * 12 + 3 * 512 * 1408)
    assert tiny.kv_bytes_per_token == 2 * 6 * 4 * 64 * 2
    del recorded["parameters"]
    assert shape_of(recorded).total_parameters == 21_895_680


@pytest.mark.parametrize("name", KNOWN)
def test_the_attribute_says_all_that_the_shape_needs(name: str) -> None:
    text = shape_text(config(name))
    assert shape_of(json.loads(text)) == shape(name)
    assert shape_text(json.loads(text)) == text
    assert len(text) < 800


@pytest.mark.parametrize("name", ["gpt-oss-20b", "bamba-9b", "mistral-7b-v0.1"])
def test_the_attribute_of_an_unknown_model_is_refused_as_its_config_is(name: str) -> None:
    with pytest.raises(UnknownArchitecture):
        shape_of(json.loads(shape_text(config(name))))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gpt-oss-20b", "the formulas of GptOssForCausalLM are unknown"),
        ("bamba-9b", "the formulas of BambaForCausalLM are unknown"),
        ("mistral-7b-v0.1", "MistralForCausalLM with a sliding window of 4096 tokens"),
    ],
)
def test_what_does_not_attend_to_everything_is_refused(name: str, said: str) -> None:
    with pytest.raises(UnknownArchitecture, match=said) as refused:
        shape(name)
    assert "full attention" in refused.value.hint


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": ["T5ForConditionalGeneration"]},
        {"architectures": []},
        {"architectures": "removed"},
        {"architectures": [7]},
        {"is_encoder_decoder": True},
        {"layer_types": ["full_attention", "linear_attention"]},
        {"layer_types": "full_attention"},
        {"mamba_d_state": 128},
        {"linear_num_value_heads": 32},
        {"attention_chunk_size": 8192},
        {"index_topk": 2048},
        {"kv_lora_rank": 512},
        {"num_local_experts": 8},
        {"num_hidden_layers": "removed"},
        {"num_hidden_layers": None},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": 32.5},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**6},
        {"num_attention_heads": [32, 16]},
        {"num_attention_heads": 33},
        {"num_key_value_heads": 0},
        {"hidden_size": -4096},
        {"vocab_size": 10**30},
        {"torch_dtype": "removed"},
        {"torch_dtype": "float4"},
        {"torch_dtype": 16},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {"quant_method": "gptq"}},
        {"quantization_config": {"quant_method": "gptq", "bits": 1}},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}}}},
    ],
)
def test_a_config_that_is_no_plain_decoder_is_never_guessed_at(changed: dict[str, Any]) -> None:
    with pytest.raises(UnknownArchitecture) as refused:
        shape("llama-3.1-8b", **changed)
    assert refused.value.hint
    assert "\n" not in str(refused.value)


def test_a_mixture_without_its_experts_counts_is_refused() -> None:
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size"):
        with pytest.raises(UnknownArchitecture, match=f"lacks {key}"):
            shape("qwen3-30b-a3b", **{key: None})
    with pytest.raises(UnknownArchitecture, match="9 experts a token of 8"):
        shape("mixtral-8x7b", num_experts_per_tok=9)


@pytest.mark.parametrize(
    "changed",
    [{"sliding_window": 131_072}, {"sliding_window": 4096, "use_sliding_window": False}, {"layer_types": None}],
)
def test_a_window_that_cuts_nothing_off_is_none(changed: dict[str, Any]) -> None:
    assert shape("llama-3.1-8b", **changed) == shape("llama-3.1-8b")


def test_layers_that_are_all_of_full_attention_are_nothing_special() -> None:
    assert shape("llama-3.1-8b", layer_types=["full_attention"] * 32) == shape("llama-3.1-8b")


@pytest.mark.parametrize(
    ("quantization", "bytes_per_parameter", "is_fp8"),
    [
        ({"quant_method": "fp8"}, 1.0, True),
        ({"quant_method": "awq", "bits": 4}, 0.5, False),
        ({"quant_method": "gptq", "bits": 8}, 1.0, False),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, 0.5, False),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, 1.0, True),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {
                    "group_0": {
                        "weights": {"num_bits": 8, "type": "float"},
                        "input_activations": {"num_bits": 8, "type": "float"},
                    }
                },
            },
            1.0,
            True,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}, "input_activations": None}},
            },
            0.5,
            False,
        ),
    ],
)
def test_quantised_weights_take_fewer_bytes(
    quantization: dict[str, Any], bytes_per_parameter: float, is_fp8: bool
) -> None:
    changed = config("llama-3.1-8b", quantization_config=quantization)
    known = shape_of(changed)
    assert (known.weight_bytes_per_parameter, known.is_fp8) == (bytes_per_parameter, is_fp8)
    assert known.dense_weight_bytes == 6_979_321_856 * bytes_per_parameter + 2 * 128_256 * 4096
    assert shape_of(json.loads(shape_text(changed))) == known


def compressed(*types: tuple[str, int]) -> dict[str, Any]:
    """One group of compressed-tensors, by its weights and activations."""
    parts = [{"type": kind, "num_bits": bits} for kind, bits in types]
    group = dict(zip(("weights", "input_activations"), parts, strict=False))
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


# 8-bit integers on both sides: not the arithmetic that the GPU's row knows
@pytest.mark.parametrize(
    ("quantization", "said"),
    [
        (compressed(("int", 8), ("int", 8)), "quantization 'compressed-tensors' of int8 weights and int8 activations"),
        (compressed(("float", 4)), "quantization 'compressed-tensors' of float4 weights"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {}, "group_1": {}}},
            "quantization 'compressed-tensors' of mixed weights",
        ),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quantization 'modelopt' of NVFP4 weights"),
        ({"quant_method": "mxfp4"}, "quantization 'mxfp4' of weights"),
    ],
)
def test_arithmetic_whose_speed_is_not_known_is_refused_by_its_name(quantization: dict[str, Any], said: str) -> None:
    changed = config("llama-3.1-8b", quantization_config=quantization)
    for kept in (changed, json.loads(shape_text(changed))):
        with pytest.raises(UnknownArchitecture) as refused:
            shape_of(kept)
        assert str(refused.value) == said
        assert refused.value.hint.startswith("known: 8-bit floats (fp8)")


# Llama 1 has no such key; Hugging Face then gives every query head its own, but Mistral eight in all
def test_heads_of_keys_are_as_many_as_of_queries_where_the_family_has_it_so() -> None:
    plain = shape("llama-3.1-8b", num_key_value_heads="removed")
    assert plain == shape("llama-3.1-8b", num_key_value_heads=32)
    assert plain.kv_bytes_per_token == 524_288
    with pytest.raises(UnknownArchitecture, match="lacks num_key_value_heads") as refused:
        shape("mistral-7b-v0.3", num_key_value_heads="removed")
    assert "a copy of it in which num_key_value_heads is written" in refused.value.hint


# as Qwen2.5-7B-Instruct-1M has it
def test_attention_in_chunks_is_not_taken_for_full_attention() -> None:
    with pytest.raises(UnknownArchitecture, match="with dual_chunk_attention_config"):
        shape("qwen2.5-7b", dual_chunk_attention_config={"chunk_size": 262_144, "sparse_attention_enabled": True})


# what vLLM and the daemon do with --kv-cache-dtype auto
@pytest.mark.parametrize(
    ("asked", "kv_bytes"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 65_536),
        ({"kv_cache_quant_algo": "FP8"}, 65_536),
        ({"kv_cache_scheme": None}, 131_072),
    ],
)
def test_a_checkpoint_with_a_cache_of_8_bit_floats_halves_its_bytes(asked: dict[str, Any], kv_bytes: int) -> None:
    scheme = {"quant_method": "modelopt", "quant_algo": "FP8", **asked}
    changed = config("llama-3.1-8b", quantization_config=scheme)
    assert shape_of(changed).kv_bytes_per_token == kv_bytes
    assert shape_of(json.loads(shape_text(changed))).kv_bytes_per_token == kv_bytes
    assert shape_of(changed, kv_dtype="bfloat16").kv_bytes_per_token == 131_072


def test_what_the_engine_was_told_goes_before_the_config() -> None:
    given = shape_of(config("llama-3.1-8b"), weight_dtype="float16", kv_dtype="fp8_e4m3", quantization="fp8")
    assert given.kv_bytes_per_token == 65_536
    assert given.is_fp8
    assert shape_of(config("llama-3.1-8b"), weight_dtype="auto", kv_dtype="auto") == shape("llama-3.1-8b")


def test_an_unknown_type_of_cache_is_refused() -> None:
    with pytest.raises(UnknownArchitecture, match="fp8_ds_mla"):
        shape_of(config("deepseek-v3"), kv_dtype="fp8_ds_mla")


def test_weights_are_read_for_an_array_of_steps_as_for_each_of_them() -> None:
    mixtral = shape("mixtral-8x7b")
    tokens = np.array([0.0, 1.0, 3.0, 4.0, 100.0])
    assert mixtral.weight_bytes(tokens).tolist() == [mixtral.weight_bytes(each) for each in (0.0, 1.0, 3.0, 4.0, 100.0)]
