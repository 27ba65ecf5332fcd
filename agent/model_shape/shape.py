"""The shape of a model: what a token costs in FLOP, weights and KV bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.model_shape.config import BITS_OF_A_BYTE, UnknownArchitecture, count_of, flat_of, refuse_special
from kvtally.agent.model_shape.families import family_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.model_shape.families import Family

_LAYER_LIMIT = 10**4
_DTYPE_BYTES = {"float32": 4, "float": 4, "bfloat16": 2, "float16": 2, "half": 2}
_KV_DTYPE_BYTES = _DTYPE_BYTES | {"fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "fp8_inc": 1, "int8": 1}
_WEIGHT_ONLY_BITS = {"awq": 4, "awq_marlin": 4, "gptq": None, "gptq_marlin": None, "bitsandbytes": None}


class ModelShape(NamedTuple):
    """What a model's tokens cost; parameters are counts, bytes are those of all GPUs together.

    kv_heads, head_dim          of what the KV cache holds; MLA: one head, as wide as the compressed vector
    weight_bytes_per_parameter  of the matrices in the layers, quantised or not
    is_fp8                      whether these are multiplied as 8-bit floats
    linear_parameters           what every token multiplies with: the layers' matrices, of experts only those that it
                                is sent to; without embedding and output matrix (METHOD 4.2)
    total_parameters            all, as a model's name counts them; what its vision tower has is left out
    dense_weight_bytes          what every step reads: all but the routed experts and the embedding
    expert_weight_bytes         all routed experts
    attention_flop              of one query token and one context token in a prefill, all layers: A of METHOD 1
    kv_bytes_per_token          of all layers: kappa_v of METHOD 1
    """

    architecture: str
    layers: int
    hidden: int
    query_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    weight_bytes_per_parameter: float
    kv_bytes_per_value: float
    is_fp8: bool
    linear_parameters: int
    total_parameters: int
    dense_weight_bytes: float
    expert_weight_bytes: float
    experts: int
    experts_per_token: int
    attention_flop: float
    kv_bytes_per_token: float

    def weight_bytes(self, tokens: Any) -> Any:
        """Bytes of weights that a step of so many tokens reads: of the routed experts, the share that they touch.

        Takes a number or an array of them, and gives what it was given.
        """
        if not self.experts:
            return self.dense_weight_bytes
        sent = tokens * self.experts_per_token / self.experts
        touched = sent - (sent > 1) * (sent - 1)  # min() knows no arrays
        return self.dense_weight_bytes + touched * self.expert_weight_bytes

    @property
    def active_parameters(self) -> float:
        """All parameters but those of the experts that a token is not sent to: the P of METHOD 1 and 8."""
        if not self.experts:
            return float(self.total_parameters)
        routed = self.expert_weight_bytes / self.weight_bytes_per_parameter
        return self.total_parameters - routed * (1 - self.experts_per_token / self.experts)

    @property
    def is_latent(self) -> bool:
        """Whether the cache keeps one compressed vector (MLA), rather than keys and values."""
        return self.kv_bytes_per_token < 2 * self.layers * self.kv_heads * self.head_dim * self.kv_bytes_per_value

    @property
    def sizes(self) -> str:
        """All that a law reads of it, in a word: layers x width, and a digest of the rest: "32x4096-9d0e2f"."""
        from zlib import crc32  # noqa: PLC0415  # the daemon reads shapes and tells none apart

        rest = (
            self.linear_parameters,
            self.dense_weight_bytes,
            self.expert_weight_bytes,
            self.experts,
            self.experts_per_token,
            self.attention_flop,
            self.kv_bytes_per_token,
            self.is_fp8,
        )
        return f"{self.layers}x{self.hidden}-{crc32(repr(rest).encode()) % 2**24:06x}"

    @property
    def resident_bytes(self) -> float:
        """Bytes of GPU memory that the weights take, the embedding counted at the layers' precision."""
        return self.total_parameters * self.weight_bytes_per_parameter


def shape_of(
    config: Mapping[str, Any],
    *,
    weight_dtype: str | None = None,
    kv_dtype: str | None = None,
    quantization: str | None = None,
) -> ModelShape:
    """The shape from a Hugging Face config.json, or from the flat keys of `shape_text`; UnknownArchitecture."""
    flat = flat_of(config, weight_dtype, kv_dtype, quantization)
    family = family_of(flat["architecture"])
    refuse_special(flat)
    layers, hidden = count_of(flat, "num_hidden_layers"), count_of(flat, "hidden_size")
    heads, vocab = count_of(flat, "num_attention_heads"), count_of(flat, "vocab_size")
    if layers > _LAYER_LIMIT:
        raise UnknownArchitecture(f"{layers} layers are no model's")
    attention = _latent_attention(flat, hidden, heads) if family.is_latent else _attention(flat, family, hidden, heads)
    experts, routed, other = _feed_forward(flat, family, layers, hidden)
    dense = layers * attention.parameters + other
    head = vocab * hidden
    per_token = count_of(flat, "num_experts_per_tok") if experts else 0
    if per_token > experts:
        raise UnknownArchitecture(f"{per_token} experts a token of {experts} are no model's")
    tied = flat.get("tie_word_embeddings", family.is_tied)
    counted = dense + routed + head * (1 if tied else 2) + (2 * layers + 1) * hidden
    bytes_per_parameter, is_fp8 = _weight_bytes(flat)
    kv_bytes = _KV_DTYPE_BYTES.get(flat.get("kv_dtype", ""))
    if kv_bytes is None:
        raise UnknownArchitecture(f"KV cache of type {flat.get('kv_dtype')!r}", "give --kv-dtype, such as bfloat16")
    return ModelShape(
        architecture=flat["architecture"],
        layers=layers,
        hidden=hidden,
        query_heads=heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        vocab=vocab,
        weight_bytes_per_parameter=bytes_per_parameter,
        kv_bytes_per_value=kv_bytes,
        is_fp8=is_fp8,
        linear_parameters=dense + (routed * per_token // experts if experts else 0),
        total_parameters=count_of(flat, "parameters") if "parameters" in flat else counted,
        dense_weight_bytes=dense * bytes_per_parameter + head * _DTYPE_BYTES[flat["weight_dtype"]],
        expert_weight_bytes=routed * bytes_per_parameter,
        experts=experts,
        experts_per_token=per_token,
        attention_flop=layers * attention.flop,
        kv_bytes_per_token=layers * attention.kv_values * kv_bytes,
    )


class _Attention(NamedTuple):
    """Of one layer: parameters, FLOP of a query and a context token, and values that the cache keeps of a token."""

    parameters: int
    flop: int
    kv_values: int
    kv_heads: int
    head_dim: int


def _attention(flat: Mapping[str, Any], family: Family, hidden: int, heads: int) -> _Attention:
    """MHA, GQA and MQA."""
    if "kv_lora_rank" in flat:
        raise UnknownArchitecture(f"{flat['architecture']} with kv_lora_rank")
    is_told = "num_key_value_heads" in flat or not family.is_multi_head
    kv_heads = count_of(flat, "num_key_value_heads") if is_told else heads
    if "head_dim" not in flat and hidden % heads:
        raise UnknownArchitecture(
            f"{flat['architecture']}: {hidden} values over {heads} heads", "the config lacks head_dim"
        )
    width = count_of(flat, "head_dim") if "head_dim" in flat else hidden // heads
    parameters = 2 * hidden * width * (heads + kv_heads)  # query and output, key and value
    return _Attention(parameters, 4 * heads * width, 2 * kv_heads * width, kv_heads, width)


def _latent_attention(flat: Mapping[str, Any], hidden: int, heads: int) -> _Attention:
    """MLA: the cache keeps a compressed vector and a rotary key; a prefill attends to what is unpacked from them."""
    rank, rotary = count_of(flat, "kv_lora_rank"), count_of(flat, "qk_rope_head_dim")
    plain, value = count_of(flat, "qk_nope_head_dim"), count_of(flat, "v_head_dim")
    query = heads * (plain + rotary)
    if "q_lora_rank" in flat:
        query_rank = count_of(flat, "q_lora_rank")
        query_parameters = query_rank * (hidden + query)
    else:
        query_parameters = hidden * query
    parameters = query_parameters + hidden * (rank + rotary) + rank * heads * (plain + value) + heads * value * hidden
    return _Attention(parameters, 2 * heads * (plain + rotary + value), rank + rotary, 1, rank + rotary)


def _feed_forward(flat: Mapping[str, Any], family: Family, layers: int, hidden: int) -> tuple[int, int, int]:
    """Routed experts a layer, parameters of all routed experts, and all other parameters behind the attention."""
    matrices = family.mlp_matrices * hidden
    counts = [flat[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if key in flat]
    if not family.experts:
        if any(counts):
            raise UnknownArchitecture(f"{flat['architecture']} with experts")
        return 0, 0, layers * matrices * count_of(flat, "intermediate_size")
    experts, width = count_of(flat, family.experts), count_of(flat, family.expert_width)
    sparse = _expert_layers(flat, layers)
    other = sparse * (matrices * _shared_width(flat, width) + hidden * experts)  # the router's matrix, too
    if sparse < layers:
        other += (layers - sparse) * matrices * count_of(flat, "intermediate_size")
    return experts, sparse * experts * matrices * width, other


def _shared_width(flat: Mapping[str, Any], width: int) -> int:
    """Of the experts that every token is sent to, all together; 0 where there are none."""
    if flat.get("shared_expert_intermediate_size"):
        return count_of(flat, "shared_expert_intermediate_size")
    return count_of(flat, "n_shared_experts") * width if flat.get("n_shared_experts") else 0


def _expert_layers(flat: Mapping[str, Any], layers: int) -> int:
    """How many layers have experts; the others have one MLP."""
    first = count_of(flat, "first_k_dense_replace", 0) if "first_k_dense_replace" in flat else 0
    step = count_of(flat, "decoder_sparse_step") if "decoder_sparse_step" in flat else 1
    every = count_of(flat, "moe_layer_freq") if "moe_layer_freq" in flat else 1
    dense = flat.get("mlp_only_layers", [])
    if not isinstance(dense, list):
        raise UnknownArchitecture(f"{flat['architecture']} with mlp_only_layers {dense!r}")
    return sum(at >= first and at not in dense and (at + 1) % step == 0 and at % every == 0 for at in range(layers))


def _weight_bytes(flat: Mapping[str, Any]) -> tuple[float, bool]:
    """Bytes of a parameter in the layers' matrices, and whether these are multiplied as 8-bit floats."""
    plain = _DTYPE_BYTES.get(flat["weight_dtype"])
    if plain is None:
        raise UnknownArchitecture(f"weights of type {flat['weight_dtype']!r}", "give --weight-dtype, such as bfloat16")
    method = flat.get("quantization", "")
    if not method:
        return plain, False
    if flat.get("quantization_fp8"):
        return 1.0, True
    bits = flat.get("quantization_bits", _WEIGHT_ONLY_BITS.get(method))
    if bits is None or not 2 <= bits <= BITS_OF_A_BYTE:  # noqa: PLR2004  # nothing is stored in one bit
        types = zip(flat.get("quantization_types", "").split("+"), ("weights", "activations"), strict=False)
        raise UnknownArchitecture(
            f"quantization {method!r} of {' and '.join(f'{kind} {part}'.strip() for kind, part in types)}",
            "known: 8-bit floats (fp8), and weights alone in 2 to 8 bits, by awq, gptq, compressed-tensors",
        )
    return bits / BITS_OF_A_BYTE, False
