"""Writes the folder of a tiny random Llama whose every word is a token: what a real engine needs to serve.

    PYTHON tests/bench/tiny_model.py FOLDER

PYTHON is the engine's own: it has tokenizers and transformers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOKENS = 2048
HIDDEN = 256
HEAD = 64
LAYERS = 4
POSITIONS = 8192


def main(folder: Path) -> None:
    """Write configuration and tokenizer; the weights are the engine's to invent (--load-format dummy)."""
    from tokenizers import (  # type: ignore[import-not-found]  # noqa: PLC0415  # of the engine's Python
        Tokenizer,
        models,
        pre_tokenizers,
    )
    from transformers import LlamaConfig, PreTrainedTokenizerFast  # type: ignore[import-not-found]  # noqa: PLC0415

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = [*special.values(), *(f"w{number}" for number in range(len(special), TOKENS))]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=TOKENS,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // HEAD,
        num_key_value_heads=HIDDEN // HEAD // 2,
        head_dim=HEAD,
        max_position_embeddings=POSITIONS,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    # transformers 4 and 5 spell the type differently, and name different classes of tokenizers
    _add(folder / "config.json", torch_dtype="bfloat16", dtype="bfloat16", rope_theta=10000.0)
    _add(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _add(path: Path, **values: object) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(body | values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
