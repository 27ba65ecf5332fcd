"""What an engine's process tells of itself: its arguments without secrets, its model's shape, how it is run."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kvtally.agent.engine_command import MODEL_VARIABLES, behind_program, is_title, options
from kvtally.agent.model_shape import shape_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

REMOVED = "<removed>"
COMMAND_LIMIT_BYTES = 256 << 10
MODEL_LIMIT_BYTES = 1 << 20
SHAPE_LIMIT_BYTES = 4 << 10

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
# of a shape; the rest are numbers
_TEXTS = ("architecture", "weight_dtype", "kv_dtype", "quantization", "quantization_types", "layer_types")
_TEXT = re.compile(r"\w[\w.+-]{0,63}", re.ASCII)
_REPOSITORY = re.compile(r"[\w.-]{1,96}(?:/[\w.-]{1,96})?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)[\w.-]+(?:/[\w.-]+)*", re.ASCII)
_COUNT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([kKmM]?)")
_COUNT_LIMIT = 10**9
# connectors that hand KV from one engine to another; LMCache's serves one engine alone where it is kv_both
_HANDING_ON = ("NixlConnector", "MooncakeConnector", "MoRIIOConnector", "P2pNcclConnector", "LMCacheConnectorV1")
# kv_both is what llm-d gives to either: it tells nothing
_ROLES = {"kv_producer": "prefill", "kv_consumer": "decode"}
# what SGLang and NVIDIA Dynamo call them; TensorRT-LLM has words of its own
_MODES = {"prefill": "prefill", "decode": "decode", "context": "prefill", "generation": "decode"}
_SHORT_TYPES = {"bf16": "bfloat16"}  # SGLang's
_SCALES = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20}


def arguments_of(pid: int, proc: str = "/proc") -> list[str] | None:
    """The engine's own arguments, secrets removed; None where the process may not be read or shows a title instead."""
    words = _command(pid, proc)
    if not words or is_title(words):
        return None
    return without_secrets(behind_program(words))


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
    """Layers, heads, experts and types by the engine's arguments and its model's config.json; None where none is read.

    That is looked up as the engine itself would: in the model's folder, or by its name in the cache of Hugging Face.
    """
    arguments = _arguments(pid, proc)
    config = _own_config(Path(proc, str(pid)), arguments)
    return None if config is None else _shape(config, options(arguments))


def facts_of_process(pid: int | None, proc: str = "/proc", *, model_config: str = "") -> dict[str, str]:
    """`facts_of` what a process tells; `model_config`, a config.json or its folder, stands in for the one it reads."""
    arguments = [] if pid is None else _arguments(pid, proc)
    config = config_in(Path(model_config)) if model_config else None
    if config is None and pid is not None:
        config = _own_config(Path(proc, str(pid)), arguments)
    return facts_of(arguments, config)


def facts_of(arguments: Sequence[str], config: Mapping[str, Any] | None) -> dict[str, str]:
    """How an engine is run, as attributes of its target row; what is not told is left out, and so is a size of 1.

    config  its model's config.json, or the "model" of a recording's meta.json

    shape           of the model, as sorted JSON; kvtally.agent.model_shape reads it
    token_budget    most tokens of a step
    tensor_parallel, pipeline_parallel
    eager           "1": steps with prefill run without compiled graphs
    connector       class of the KV connector
    role            "prefill" or "decode", where an option or a connector between engines says which this is
    """
    given = options(arguments)
    shape = None if config is None else _shape(config, given)
    text = "" if shape is None else msgspec.json.encode(shape, order="sorted").decode()
    parallel = {kind: _count(given.get(f"--{kind}-parallel-size", "")) for kind in ("tensor", "pipeline")}
    found = {
        "shape": text if len(text) <= SHAPE_LIMIT_BYTES else "",
        "token_budget": _count(given.get("--max-num-batched-tokens", "")),
        **{f"{kind}_parallel": count for kind, count in parallel.items() if count != "1"},
        "eager": "1" if _is_eager(given) else "",
        "connector": _connector(given),
        "role": _role(given),
    }
    return {name: value for name, value in found.items() if value}


def _shape(config: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any] | None:
    """What a model's law needs of its config and of the options; None where that is nothing, or no plain values."""
    kv_dtype = given.get("--kv-cache-dtype", "auto")
    types = {"weight_dtype": given.get("--dtype", "auto"), "kv_dtype": _SHORT_TYPES.get(kv_dtype, kv_dtype)}
    text = config.get("text_config")
    stored = [part.get(key) for part in (text, config) if isinstance(part, dict) for key in ("dtype", "torch_dtype")]
    if types["weight_dtype"] == "auto" and next((one for one in stored if one), None) == "float32":
        types["weight_dtype"] = "bfloat16"  # what vLLM makes of it where nobody chooses; SGLang float16, as wide
    try:
        told = msgspec.json.decode(shape_text(config, **types, quantization=given.get("--quantization")))
    except (ValueError, RecursionError):
        return None
    shape: dict[str, Any] = {name: value for name, value in told.items() if value != ""}
    if not ("architecture" in shape or "num_hidden_layers" in shape):
        return None
    hidden, heads = shape.get("hidden_size"), shape.get("num_attention_heads")
    if "kv_lora_rank" not in shape and isinstance(hidden, int) and isinstance(heads, int) and heads:
        shape.setdefault("head_dim", hidden // heads)
    return shape if all(_is_plain(name, value) for name, value in shape.items()) else None


def _is_plain(name: str, value: Any) -> bool:
    """Whether a value may stand in a ledger: numbers and short words, or lists of them."""
    each = value if isinstance(value, list) else [value]
    if not _TEXT.fullmatch(name):
        return False
    if name in _TEXTS:
        return all(isinstance(one, str) and _TEXT.fullmatch(one) for one in each)
    return all(isinstance(one, int) and 0 <= one < 1 << 53 for one in each)


def _is_eager(given: Mapping[str, str]) -> bool:
    """Whether steps that hold prefill run without compiled graphs, by any of the options that say so."""
    if "--enforce-eager" in given and "--no-enforce-eager" not in given:
        return True
    told = _decoded(given.get("--compilation-config", ""))
    compilation = told if isinstance(told, dict) else {"mode": told}  # -O 0
    for name, value in given.items():
        if name.startswith("--compilation-config."):
            compilation[name.partition(".")[2]] = value
    mode, level, graphs = (str(compilation.get(name, "")).upper() for name in ("mode", "level", "cudagraph_mode"))
    is_compiled = mode not in {"0", "NONE"} and level != "0"
    is_optimized = "-O0" not in given and given.get("--optimization-level") != "0"
    return not (is_compiled and is_optimized) or graphs in {"NONE", "FULL_DECODE_ONLY"}


def _connector(given: Mapping[str, str]) -> str:
    """The class of the KV connector; "" for none, and where its name is no name of a class."""
    told = _decoded(given.get("--kv-transfer-config", ""))
    name = told.get("kv_connector") if isinstance(told, dict) else None
    name = given.get("--kv-transfer-config.kv_connector", name)
    if "--enable-lmcache" in given:  # SGLang's, in-process
        name = "LMCacheConnector"
    if "--kv-offloading-size" in given:
        # which connector "lmcache" stands for depends on vLLM's version
        name = "OffloadingConnector" if given.get("--kv-offloading-backend", "native") == "native" else None
    return name if isinstance(name, str) and name.isidentifier() and _TEXT.fullmatch(name) else ""


# --disaggregation-mode prefill  |  --server_role CONTEXT  |  --is-decode-worker: of a worker of NVIDIA Dynamo's |
# --kv-transfer-config '{"kv_connector":"P2pNcclConnector","kv_role":"kv_producer"}'  |  MultiConnector with the like of
# it in kv_connector_extra_config.connectors
def _role(given: Mapping[str, str]) -> str:
    """What the engine does of a request whose other half another engine does; "" where it does both, or may."""
    mode = given.get("--disaggregation-mode") or given.get("--server-role", "")
    workers = [role for role in ("prefill", "decode") if f"--is-{role}-worker" in given]
    told_role = _MODES.get(mode.lower()) or (workers[0] if len(workers) == 1 else "")
    if told_role:
        return told_role
    told = _decoded(given.get("--kv-transfer-config", ""))
    whole = dict(told) if isinstance(told, dict) else {}
    for name in ("kv_connector", "kv_role"):
        if f"--kv-transfer-config.{name}" in given:
            whole[name] = given[f"--kv-transfer-config.{name}"]
    extra = whole.get("kv_connector_extra_config")
    inner = extra.get("connectors") if isinstance(extra, dict) else None
    for one in (whole, *(inner if isinstance(inner, list) else ())):
        if isinstance(one, dict) and str(one.get("kv_connector")) in _HANDING_ON:
            role = _ROLES.get(str(one.get("kv_role")), "")
            if role:
                return role
    return ""


def _decoded(text: str) -> Any:
    """The JSON of an option, which a recording may hold in its shell's quotes; an empty table for what is none."""
    text = text.strip()
    if text[:1] == text[-1:] == "'":
        text = text[1:-1]
    try:
        value = msgspec.json.decode(text)
    except (ValueError, RecursionError):
        return {}
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def _count(text: str) -> str:
    """A number as vLLM takes it (8192, 8k, 8K) in digits; "" for anything else."""
    match = _COUNT.fullmatch(text)
    count = 0 if match is None else int(float(match[1]) * _SCALES[match[2]])
    return str(count) if 0 < count < _COUNT_LIMIT else ""


def _own_config(process: Path, arguments: Sequence[str]) -> dict[str, Any] | None:
    """The config of the model that the arguments name, as the process itself would find it."""
    given = options(arguments)
    first = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    model = given.get("--hf-config-path") or given.get("--model") or first
    if not model:
        return None
    return config_in(_seen(process, model) / "config.json") or _cached_config(process, model, given.get("--revision"))


def _seen(process: Path, path: str) -> Path:
    """A path of the process's own, in its file system and from its working folder."""
    return Path(process, f"root{path}" if path.startswith("/") else f"cwd/{path}")


# ~/.cache/huggingface/hub/models--meta-llama--Llama-3.1-8B/{refs/main, snapshots/COMMIT/config.json}
def _cached_config(process: Path, model: str, revision: str | None) -> dict[str, Any] | None:
    """The config of a model of Hugging Face's in the cache of the process; of several snapshots the one asked for."""
    if not (_REPOSITORY.fullmatch(model) and _REVISION.fullmatch(revision or "main")):
        return None
    words = (word.partition("=") for word in _words(process / "environ"))
    told = {name: value for name, _, value in words if name in MODEL_VARIABLES}
    home = told.get("HF_HOME") or f"{told.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    hub = told.get("HF_HUB_CACHE") or told.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    if hub.startswith("~/"):
        hub = told.get("HOME", "") + hub[1:]
    folder = _seen(process, hub) / f"models--{model.replace('/', '--')}"
    commit = "".join(_words(folder / "refs" / (revision or "main"))).strip() or revision or ""
    if _REVISION.fullmatch(commit):
        return config_in(folder / "snapshots" / commit)
    snapshots: list[Path] = []
    with suppress(OSError):  # the process may be gone by now
        snapshots += islice(folder.glob("snapshots/*/config.json"), 2)
    return config_in(snapshots[0]) if len(snapshots) == 1 else None


def config_in(place: Path) -> dict[str, Any] | None:
    """A config.json, by its own path or its folder's; None where there is none that can be read."""
    try:
        if place.is_dir():
            place /= "config.json"
        if not place.is_file():  # a pipe would keep us waiting
            return None
        with place.open("rb") as file:
            config = msgspec.json.decode(file.read(MODEL_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return config if isinstance(config, dict) else None


def _command(pid: int, proc: str) -> list[str]:
    """The words of a command line; none where it may not be read."""
    return _words(Path(proc, str(pid), "cmdline"))


def _arguments(pid: int, proc: str) -> list[str]:
    """The engine's own arguments, secrets and all; none where the process may not be read or shows a title instead."""
    words = _command(pid, proc)
    return [] if is_title(words) else behind_program(words)


def _words(file: Path) -> list[str]:
    """What stands in a file of the kernel's between zeros; none where it may not be read."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            content = os.read(descriptor, COMMAND_LIMIT_BYTES)
        finally:
            os.close(descriptor)
    except OSError:
        return []
    content = content.removesuffix(b"\0")
    return [word.decode("utf-8", "replace") for word in content.split(b"\0")] if content else []


def _names_secret(name: str) -> bool:
    spelled = name.lower().replace("_", "-")
    shortened = len(spelled) >= _ABBREVIATED_LENGTH and any(one.startswith(spelled) for one in _SECRET_OPTIONS)
    return shortened or _SECRET_OPTION.search(name) is not None
