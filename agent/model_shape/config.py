"""What of a model's config.json the formulas read, wherever it is kept, as one flat mapping."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

_COUNT_LIMIT = 10**7
BITS_OF_A_BYTE = 8
# What the formulas read; a config's other keys are left behind
_KEYS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_shared_experts",
    "shared_expert_intermediate_size",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "decoder_sparse_step",
    "moe_layer_freq",
    "mlp_only_layers",
    "parameters",
)
# Keys that, if set, say that a token does not attend to all before it, or that there is more than attention
_SPECIAL_PREFIXES = ("mamba_", "ssm_", "linear_", "rwkv", "attn_layer_")
_SPECIAL = {
    "attention_chunk_size",
    "attn_type_list",
    "block_configs",
    "conv_L_cache",
    "cross_attention_layers",
    "dual_chunk_attention_config",
    "full_attention_interval",
    "hybrid_override_pattern",
    "index_topk",
    "is_encoder_decoder",
    "layer_group_size",
    "num_kv_shared_layers",
}
_FP8 = {"fp8", "fbgemm_fp8", "ptpc_fp8"}


class UnknownArchitecture(ValueError):  # noqa: N818  # it is the answer to a question, and read as one
    """A model whose formulas are not known here; `hint` says what would help."""

    def __init__(self, message: str, hint: str = "") -> None:
        self.hint = hint or "only decoders with full attention (MHA, GQA, MLA), dense or MoE, are known"
        super().__init__(message)


def shape_text(
    config: Mapping[str, Any],
    *,
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    quantization: str | None = None,
) -> str:
    """What `shape_of` needs of a config as one line of JSON, for the `shape` attribute of a target."""
    flat = flat_of(config, weight_dtype, kv_dtype, quantization)
    return msgspec.json.encode(flat, order="sorted").decode()


def flat_of(
    config: Mapping[str, Any], weight_dtype: str | None, kv_dtype: str | None, quantization: str | None
) -> dict[str, Any]:
    """The keys that matter, from wherever the config keeps them; unset ones are left out. Applied twice, it is once."""
    text = config.get("text_config")  # of a model that sees or hears, the part that is served by tokens
    inner: Mapping[str, Any] = text if isinstance(text, dict) else config
    flat = {key: inner[key] for key in _KEYS if inner.get(key) is not None}
    if "tie_word_embeddings" not in flat and isinstance(config.get("tie_word_embeddings"), bool):
        flat["tie_word_embeddings"] = config["tie_word_embeddings"]
    architectures = config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else config.get("architecture")
    flat["architecture"] = named if isinstance(named, str) else ""
    flat |= _special_of(config) | _special_of(inner)
    stored = _first_text(inner.get("dtype"), inner.get("torch_dtype"), config.get("dtype"), config.get("torch_dtype"))
    weight = _first_text(weight_dtype, config.get("weight_dtype"), stored)
    scheme = _scheme_of(config, inner)
    kv = _first_text(kv_dtype, config.get("kv_dtype"), "fp8" if _has_narrow_kv(scheme) else "auto", weight)
    return flat | {"weight_dtype": weight, "kv_dtype": kv} | _quantization_of(config, scheme, quantization)


def _first_text(*choices: Any) -> str:
    """The first that is said, without "torch."; "auto" says nothing."""
    said = [choice.removeprefix("torch.") for choice in choices if isinstance(choice, str) and choice != "auto"]
    return said[0] if said else ""


def _special_of(config: Mapping[str, Any]) -> dict[str, Any]:
    special: dict[str, Any] = {
        key: True for key in config if (key in _SPECIAL or key.startswith(_SPECIAL_PREFIXES)) and config[key]
    }
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    reaches_all = isinstance(window, int) and isinstance(longest, int) and window >= longest
    if window and config.get("use_sliding_window", True) and not reaches_all:
        special["sliding_window"] = window
    kinds = config.get("layer_types")
    if kinds:
        others = sorted({str(kind) for kind in kinds} - {"full_attention"}) if isinstance(kinds, list) else ["?"]
        special |= {"layer_types": others} if others else {}
    return special


def _scheme_of(config: Mapping[str, Any], inner: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the config says of how the checkpoint is quantised."""
    stored = config.get("quantization_config") or inner.get("quantization_config")
    return stored if isinstance(stored, dict) else {}


def _has_narrow_kv(scheme: Mapping[str, Any]) -> bool:
    """Whether a checkpoint asks for a KV cache of 8-bit floats: engines heed it where nobody chooses a type."""
    asked = scheme.get("kv_cache_scheme") or scheme.get("kv_cache_quant_algo")
    if isinstance(asked, dict):
        return asked.get("num_bits") == BITS_OF_A_BYTE and asked.get("type") == "float"
    return isinstance(asked, str) and asked.lower() == "fp8"


def _quantization_of(config: Mapping[str, Any], detail: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Method, bits of a weight and whether the arithmetic is fp8, as far as the config tells.

    Where its formulas are not known, "quantization_types" says what it is: "int8+int8", weights and activations.
    """
    name = _first_text(method, detail.get("quant_method"), config.get("quantization"))
    if not name:
        return {}
    bits = config.get("quantization_bits", detail.get("bits"))
    is_fp8 = bool(config.get("quantization_fp8", name in _FP8))
    if detail.get("load_in_4bit") or detail.get("load_in_8bit"):
        bits = 4 if detail.get("load_in_4bit") else BITS_OF_A_BYTE
    if name == "modelopt" and detail.get("quant_algo") == "FP8":
        bits, is_fp8 = BITS_OF_A_BYTE, True
    groups = detail.get("config_groups")
    types = _first_text(config.get("quantization_types"), detail.get("quant_algo"))
    if name == "compressed-tensors" and isinstance(groups, dict) and groups:
        (bits, is_fp8), types = (None, False), "mixed"
        if len(groups) == 1:
            (group,) = groups.values()
            (bits, is_fp8), types = _compressed(group), _types_of(group)
    known: dict[str, Any] = {"quantization_bits": bits} if isinstance(bits, int) else {}
    if types and not known:
        known = {"quantization_types": types}
    return {"quantization": name, "quantization_fp8": is_fp8, **known}


def _compressed(group: Any) -> tuple[int | None, bool]:
    """Bits and fp8 arithmetic of a group of compressed-tensors; no bits where the arithmetic is another."""
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict) or not isinstance(weights.get("num_bits"), int):
        return None, False
    inputs = group.get("input_activations")
    if not isinstance(inputs, dict):
        return (weights["num_bits"], False) if weights.get("type") == "int" else (None, False)
    is_fp8 = all(part.get("type") == "float" and part.get("num_bits") == BITS_OF_A_BYTE for part in (weights, inputs))
    return (BITS_OF_A_BYTE, True) if is_fp8 else (None, False)


def _types_of(group: Any) -> str:
    """Types of weights and activations in a group of compressed-tensors: "int8+int8", "float4"."""
    parts = [group.get(name) for name in ("weights", "input_activations")] if isinstance(group, dict) else []
    return "+".join(f"{part.get('type', '?')}{part.get('num_bits', '')}" for part in parts if isinstance(part, dict))


def refuse_special(flat: Mapping[str, Any]) -> None:
    """Raise UnknownArchitecture for a model in which some tokens are not attended to, or something else is done."""
    if "sliding_window" in flat:
        raise UnknownArchitecture(f"{flat['architecture']} with a sliding window of {flat['sliding_window']} tokens")
    if "layer_types" in flat:
        raise UnknownArchitecture(f"{flat['architecture']} with layers of {', '.join(flat['layer_types'])}")
    for key in flat:
        if key in _SPECIAL or key.startswith(_SPECIAL_PREFIXES):
            raise UnknownArchitecture(f"{flat['architecture']} with {key}")


def count_of(flat: Mapping[str, Any], key: str, least: int = 1) -> int:
    """The count that stands under a key; UnknownArchitecture if there is none that a model could have."""
    value = flat.get(key)
    limit = _COUNT_LIMIT**2 if key == "parameters" else _COUNT_LIMIT
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        told = "lacks" if value is None else f"has no usable value of ({value!r})"
        raise UnknownArchitecture(
            f"the config of {flat['architecture']} {told} {key}",
            f"give the config.json beside the model's weights, or a copy of it in which {key} is written",
        )
    return value
