"""The decoders whose formulas are known, by the architecture that a config names."""

from __future__ import annotations

from typing import NamedTuple

from kvtally.agent.model_shape.config import UnknownArchitecture


class Family(NamedTuple):
    """How one kind of decoder reads its config."""

    mlp_matrices: int = 3  # gate, up and down; 2 where there is no gate
    experts: str = ""  # key of the number of routed experts; "" for a dense model
    expert_width: str = "moe_intermediate_size"
    is_latent: bool = False  # MLA: one compressed vector a token and layer in the place of keys and values
    is_multi_head: bool = False  # each query head has its own keys and values, where the config does not say
    is_tied: bool = False  # the embedding is the output's matrix, too, where the config does not say


_DENSE = Family()
# what Hugging Face takes where num_key_value_heads is missing; other classes have a number of their own
_MULTI_HEAD = Family(is_multi_head=True)
_MOE = Family(experts="num_experts")
_FAMILIES = {
    "ApertusForCausalLM": Family(mlp_matrices=2, is_multi_head=True),
    "ArceeForCausalLM": Family(mlp_matrices=2, is_multi_head=True),
    "CohereForCausalLM": Family(is_multi_head=True, is_tied=True),
    "DeepseekV2ForCausalLM": Family(experts="n_routed_experts", is_latent=True),
    "DeepseekV3ForCausalLM": Family(experts="n_routed_experts", is_latent=True),
    "Ernie4_5ForCausalLM": Family(is_tied=True),
    "GemmaForCausalLM": Family(is_tied=True),
    "Glm4ForCausalLM": _DENSE,
    "Glm4MoeForCausalLM": Family(experts="n_routed_experts"),
    "GlmForCausalLM": _DENSE,
    "GraniteForCausalLM": Family(is_multi_head=True, is_tied=True),
    "LlamaForCausalLM": _MULTI_HEAD,
    "Mistral3ForConditionalGeneration": _DENSE,
    "MistralForCausalLM": _DENSE,
    "MixtralForCausalLM": Family(experts="num_local_experts", expert_width="intermediate_size"),
    "NemotronForCausalLM": Family(mlp_matrices=2, is_multi_head=True),
    "Olmo2ForCausalLM": _MULTI_HEAD,
    "OlmoeForCausalLM": Family(experts="num_experts", expert_width="intermediate_size", is_multi_head=True),
    "Phi3ForCausalLM": _MULTI_HEAD,
    "Qwen2ForCausalLM": _DENSE,
    "Qwen2MoeForCausalLM": _MOE,
    "Qwen2VLForConditionalGeneration": _DENSE,
    "Qwen2_5_VLForConditionalGeneration": _DENSE,
    "Qwen3ForCausalLM": _DENSE,
    "Qwen3MoeForCausalLM": _MOE,
    "Qwen3VLForConditionalGeneration": _DENSE,
    "Qwen3VLMoeForConditionalGeneration": _MOE,
    "SeedOssForCausalLM": _DENSE,
    "SmolLM3ForCausalLM": Family(is_tied=True),
    "StableLmForCausalLM": _DENSE,
    "Starcoder2ForCausalLM": Family(mlp_matrices=2, is_tied=True),
}


def family_of(architecture: str) -> Family:
    """How to read the config of that architecture; UnknownArchitecture."""
    if architecture not in _FAMILIES:
        name = architecture or "a model that does not name its architecture"
        raise UnknownArchitecture(f"the formulas of {name} are unknown")
    return _FAMILIES[architecture]
