"""What an engine's process tells of itself: its arguments, with no secret among them, and the shape of its model."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import msgspec

from kvtally.agent.placement import is_title, options

if TYPE_CHECKING:
    from collections.abc import Sequence

REMOVED = "<removed>"
COMMAND_LIMIT_BYTES = 256 << 10
MODEL_LIMIT_BYTES = 1 << 20

# Of an option's name: --hf-token and --kv-config.api_key, not --max-num-batched-tokens or --tokenizer
_SECRET_OPTION = re.compile(r"[-_.](?:(?:api)?key|passw|secret|credential|auth|token(?:[-_.]|$))", re.IGNORECASE)
# argparse takes any beginning of an option that is no other's
_SECRET_OPTIONS = ("--api-key", "--hf-token")
_ABBREVIATED_LENGTH = len("--hf-")
_SECRET_VALUE = re.compile(
    r"token|key|passw|secret|credential|authorization|bearer"
    r"|://[^/]*@"  # user and password of a URL
    r"|\bhf_\w{16}|\bsk-\w{8}",
    re.IGNORECASE,
)
_SHAPE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)


def arguments_of(pid: int, proc: str = "/proc") -> list[str] | None:
    """The engine's own arguments, secrets removed; None where the process may not be read or shows a title instead."""
    words = _command(pid, proc)
    if not words or is_title(words):
        return None
    return without_secrets(_behind_program(words))


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The arguments with every value replaced that an option calls a secret, or that looks like one."""
    shown = []
    is_secret = False
    for word in arguments:
        name, equals, value = word.partition("=")
        if name.startswith("-"):
            is_secret = _names_secret(name)
            removed = equals and (is_secret or _SECRET_VALUE.search(value))
            shown.append(f"{name}={REMOVED}" if removed else word)
        else:
            # --api-key takes any number of keys
            shown.append(REMOVED if is_secret or _SECRET_VALUE.search(word) else word)
    return shown


def model_shape(pid: int, proc: str = "/proc") -> dict[str, Any] | None:
    """Layers, heads and types from the config.json of a model that lies in a folder; None where none can be read.

    The path is the engine's own: it is looked up in its file system and from its working folder.
    """
    arguments = _behind_program(_command(pid, proc))
    given = options(arguments)
    model = given.get("--model") or (arguments[0] if arguments and not arguments[0].startswith("-") else "")
    if not model:
        return None
    folder = f"root{model}" if model.startswith("/") else f"cwd/{model}"
    place = Path(proc, str(pid), folder, "config.json")
    try:
        if not place.is_file():  # a pipe would keep us waiting
            return None
        with place.open("rb") as file:
            config = msgspec.json.decode(file.read(MODEL_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return _shape(config, given) if isinstance(config, dict) else None


def _shape(config: dict[str, Any], given: dict[str, str]) -> dict[str, Any]:
    text = config.get("text_config")  # of a model that sees or hears, the part that is served by tokens
    inner = text if isinstance(text, dict) else config
    architectures = config.get("architectures")
    shape = {"architecture": architectures[0] if isinstance(architectures, list) and architectures else None}
    shape |= {name: inner.get(name) for name in _SHAPE}
    hidden, heads = shape["hidden_size"], shape["num_attention_heads"]
    if shape["head_dim"] is None and isinstance(hidden, int) and isinstance(heads, int) and heads:
        shape["head_dim"] = hidden // heads
    stored = inner.get("dtype") or inner.get("torch_dtype") or config.get("dtype") or config.get("torch_dtype")
    weight = _chosen(given.get("--dtype"), stored)
    quantization = config.get("quantization_config")
    shape |= {
        "weight_dtype": weight,
        "kv_dtype": _chosen(given.get("--kv-cache-dtype"), weight),
        "quantization": quantization.get("quant_method") if isinstance(quantization, dict) else None,
    }
    return {key: value for key, value in shape.items() if isinstance(value, str | int)}


def _chosen(option: str | None, default: Any) -> Any:
    return default if option in {None, "auto"} else option


def _command(pid: int, proc: str) -> list[str]:
    """The words of a command line; none where it may not be read."""
    try:
        descriptor = os.open(f"{proc}/{pid}/cmdline", os.O_RDONLY)
        try:
            content = os.read(descriptor, COMMAND_LIMIT_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return []
    content = content.removesuffix(b"\0")
    return [word.decode("utf-8", "replace") for word in content.split(b"\0")] if content else []


# python3 -m vllm.entrypoints.openai.api_server --model …  |  /usr/bin/python3 /usr/local/bin/vllm serve MODEL --port …
def _behind_program(words: Sequence[str]) -> list[str]:
    """The words behind the interpreter, the program and `serve`; all of them where no program of vLLM's is named."""
    for position, word in enumerate(words[:8]):
        if word == "serve" or PurePosixPath(word).name.endswith(("api_server", "api_server.py")):
            return list(words[position + 1 :])
    return list(words)


def _names_secret(name: str) -> bool:
    spelled = name.lower().replace("_", "-")
    shortened = len(spelled) >= _ABBREVIATED_LENGTH and any(one.startswith(spelled) for one in _SECRET_OPTIONS)
    return shortened or _SECRET_OPTION.search(name) is not None
