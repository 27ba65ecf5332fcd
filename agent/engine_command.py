"""What the command line of an engine says of it: which engine it is, its parallel sizes, where its KV lies."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

# Only these leave an environment; everything else in it may be a secret
HICACHE_FOLDER = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
PATH_VARIABLES = ("LMCACHE_LOCAL_DISK", "LMCACHE_GDS_PATH", "LMCACHE_REMOTE_URL", HICACHE_FOLDER)
LMCACHE_FILE = "LMCACHE_CONFIG_FILE"  # YAML; where it is named, LMCache takes its settings from there
VARIABLES = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", LMCACHE_FILE, *PATH_VARIABLES)
MODEL_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")
# Every option goes by the name that vLLM gives it; no engine has another meaning for one of these
OTHER_NAMES = {
    "-tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-pcp": "--prefill-context-parallel-size",
    "-dp": "--data-parallel-size",
    "-dpl": "--data-parallel-size-local",
    "-dpn": "--data-parallel-rank",
    "-dpe": "--data-parallel-external-lb",
    "-cc": "--compilation-config",
    "-O": "--compilation-config",
    "-q": "--quantization",
    # SGLang and TensorRT-LLM
    "--tp": "--tensor-parallel-size",
    "--tp-size": "--tensor-parallel-size",
    "--pp": "--pipeline-parallel-size",
    "--pp-size": "--pipeline-parallel-size",
    "--dp": "--data-parallel-size",
    "--dp-size": "--data-parallel-size",
    "--cp-size": "--prefill-context-parallel-size",
    "--context-parallel-size": "--prefill-context-parallel-size",
    "--model-path": "--model",
    "--chunked-prefill-size": "--max-num-batched-tokens",
    "--max-num-tokens": "--max-num-batched-tokens",
}
# files that may hold what the command line does not
FILE_OPTIONS = frozenset(("--config", "--extra-llm-api-options", "--extra-engine-args", "--override-engine-args"))
# JSON: vLLM's, SGLang's, and that of LMCache's server
PATH_OPTIONS = frozenset(("--kv-transfer-config", "--hicache-storage-backend-extra-config", "--l2-adapter"))
# may stand more than once, each a cache tier of its own; of any other option the last one wins
_REPEATED = frozenset(("--l2-adapter",))
PATH_KEYS = frozenset(
    ("base_path", "disk_path", "file_path", "gds_path", "local_disk", "root_dir", "shared_storage_path", "storage_dir")
)
# local_disk: "file:///mnt/nvme0/"  |  remote_url: fs:///mnt/shared  |  below extra_config, nixl_path: /mnt/kv
_LMCACHE_LINE = re.compile(r"^[ \t]*(?:local_disk|gds_path|remote_url|nixl_path)[ \t]*:[ \t]+(.*)$", re.MULTILINE)


class Engine(NamedTuple):
    """How the servers of one engine are started; `kind` is its name in kvtally.collectors.registry.

    program     its own program
    modules     parts of the names of modules for `python -m`: its own, and the worker that NVIDIA Dynamo runs it in
    script      part of the path of a script that is given to Python
    title       what its processes may overwrite their command lines with, up to the first name that is not fixed
    """

    kind: str
    program: str
    modules: frozenset[str]
    script: str
    title: str | None = None


ENGINES = (
    Engine("vllm", "vllm", frozenset(("vllm",)), "vllm/entrypoints/", "VLLM::"),
    Engine("sglang", "sglang", frozenset(("sglang",)), "sglang/launch_server", "sglang::"),
    Engine("tensorrt_llm", "trtllm-serve", frozenset(("tensorrt_llm", "trtllm")), "tensorrt_llm/commands/serve"),
)
# trtllm-serve disaggregated -c config.yaml: a proxy before engines
_PROXIES = frozenset(("disaggregated",))


class Sizes(NamedTuple):
    """Parallel sizes by the command line; `data` counts the ranks of this process, `context` is prefill context.

    None where the command line does not tell: a process title, a --config file, a program of its own.
    """

    tensor: int | None
    pipeline: int | None
    context: int
    data: int

    @property
    def gpus(self) -> int | None:
        """GPUs of all the ranks together."""
        if self.tensor is None or self.pipeline is None:
            return None
        return self.tensor * self.pipeline * self.context * self.data

    def __str__(self) -> str:
        if self.gpus is None:
            return "parallel sizes not told"
        more = (f" x {name} {size}" for name, size in (("context", self.context), ("DP", self.data)) if size != 1)
        return f"TP {self.tensor} x PP {self.pipeline}{''.join(more)}"


def engine_of(arguments: Sequence[str]) -> str:
    """The engine whose command line or process title this is (VLLM::Worker_TP0, sglang::scheduler); "" for none."""
    titled = next((one.kind for one in ENGINES if _is_titled(one, arguments)), "")
    return titled or _located(arguments)[0]


def is_title(arguments: Sequence[str]) -> bool:
    """Whether an engine has overwritten the command line, and with it the environment."""
    return any(_is_titled(one, arguments) for one in ENGINES)


def behind_program(arguments: Sequence[str]) -> list[str]:
    """The words behind the interpreter, the program and `serve`; all of them where no engine's program is named."""
    position = _located(arguments)[1]
    if position is None:  # launchers of somebody's own may still say what they launch
        launched = (at for at, word in enumerate(arguments[:8]) if word == "serve" or _is_api_server(word))
        position = next(launched, -1)
    behind = list(arguments[position + 1 :])
    return behind[1:] if behind[:1] == ["serve"] else behind


def _is_api_server(word: str) -> bool:
    return PurePosixPath(word).name.endswith(("api_server", "api_server.py"))


def _is_titled(engine: Engine, arguments: Sequence[str]) -> bool:
    return engine.title is not None and bool(arguments) and arguments[0].startswith(engine.title)


# vllm serve M  |  python3 -u -m sglang.launch_server --model-path M  |  python3 /usr/local/bin/trtllm-serve M
def _located(arguments: Sequence[str]) -> tuple[str, int | None]:
    """The engine that a command line runs, and the position of the word that says so; "" and None for none."""
    for position, word in _program_words(arguments):
        is_module = position > 0 and arguments[position - 1] == "-m"
        for engine in ENGINES:
            if is_module:
                is_its = not engine.modules.isdisjoint(word.split("."))
            else:
                is_its = PurePosixPath(word).name == engine.program or (position > 0 and engine.script in word)
            if is_its and _PROXIES.isdisjoint(arguments[position + 1 : position + 2]):
                return engine.kind, position
    return "", None


def _program_words(arguments: Sequence[str]) -> list[tuple[int, str]]:
    """The word that names the program, with its position: the first one, or what a Python interpreter is given."""
    if not arguments:
        return []
    if not PurePosixPath(arguments[0]).name.startswith("python"):
        return [(0, arguments[0])]
    position = 1
    while position < len(arguments):
        word = arguments[position]
        if word == "-m":
            return [(position + 1, arguments[position + 1])] if position + 1 < len(arguments) else []
        if not word.startswith("-"):
            return [(position, word)]
        position += 2 if word in {"-W", "-X"} else 1
    return []


def options(arguments: Sequence[str]) -> dict[str, str]:
    """Options as the engines' parsers take them: `--name value`, `--name=value`, `_` for `-`, the last one wins."""
    return dict(_given(arguments))


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Options in their order, each time that they stand there."""
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            continue
        if not equals and position + 1 < len(arguments):
            value = arguments[position + 1]
        head, dot, tail = name.partition(".")  # --kv-transfer-config.kv_role: keys of JSON keep their form
        plain = head.replace("_", "-")
        yield OTHER_NAMES.get(plain, plain) + dot + tail, value


def sizes(arguments: Sequence[str]) -> Sizes:
    """Read the parallel sizes of a command line."""
    given = options(arguments)
    is_whole = _located(arguments)[1] is not None and FILE_OPTIONS.isdisjoint(given)
    default = 1 if is_whole else None
    tensor = _number(given.get("--tensor-parallel-size"), default)
    pipeline = _number(given.get("--pipeline-parallel-size"), default)
    context = _number(given.get("--prefill-context-parallel-size"), 1)
    data = _number(given.get("--data-parallel-size-local"), _number(given.get("--data-parallel-size"), 1))
    if "--data-parallel-rank" in given or "--data-parallel-external-lb" in given:
        data = 1  # every rank is a server of its own
    if "--enable-dp-attention" in given:
        data = 1  # SGLang's ranks then share the GPUs of tensor parallelism
    return Sizes(tensor, pipeline, context or 1, data or 1)


def logs_scrapes(arguments: Sequence[str]) -> bool | None:
    """Whether vLLM's access log has a line for every scrape; None where the command line does not tell."""
    if _located(arguments)[0] != "vllm":
        return None
    given = options(arguments)
    if "--disable-uvicorn-access-log" in given or given.get("--uvicorn-log-level") in {"warning", "error", "critical"}:
        return False
    return "/metrics" not in given.get("--disable-access-log-for-endpoints", "").split(",")


def kv_paths(arguments: Sequence[str], environment: Mapping[str, str], lmcache_config: str = "") -> tuple[str, ...]:
    """Directories of KV cache tiers that the command line or the environment name, as the engine sees them.

    lmcache_config  what stands in the file that LMCACHE_FILE names
    """
    named: list[str] = [environment.get(name, "") for name in PATH_VARIABLES]
    named += (line.partition(" #")[0].strip().strip("\"'") for line in _LMCACHE_LINE.findall(lmcache_config))
    given = options(arguments)
    if given.get("--hicache-storage-backend") == "file" and HICACHE_FOLDER not in environment:
        named.append("/tmp/hicache")  # noqa: S108  # SGLang's own default
    once = {name: value for name, value in given.items() if name not in _REPEATED}
    repeated = (one for one in _given(arguments) if one[0] in _REPEATED)
    for name, value in (*once.items(), *repeated):
        if name.startswith("--kv-transfer-config."):
            named += _paths_in({name.rpartition(".")[2]: value})
        elif name in PATH_OPTIONS:
            try:
                named += _paths_in(msgspec.json.decode(value))
            except msgspec.DecodeError:
                continue
    found: dict[str, None] = {}
    for path in (part.strip() for each in named for part in each.split(",")):
        scheme, separator, rest = path.rpartition("://")
        if scheme == "fs":
            rest = "/" + rest.partition("/")[2]  # fs://host:port/path: the host is not used
        # another scheme is no directory, and may hold a password
        directory = rest if not separator or scheme in {"file", "fs"} else ""
        if directory.startswith("/") and directory != "/":
            found[directory.rstrip("/")] = None
    return tuple(found)


def _number(text: str | None, default: int | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() else default


def _paths_in(value: Any) -> list[str]:
    """Strings under the keys that name directories, at any depth of a connector's JSON."""
    if isinstance(value, list):
        return [path for each in value for path in _paths_in(each)]
    if not isinstance(value, dict):
        return []
    found = []
    for key, below in value.items():
        if isinstance(below, str) and key.rpartition(".")[2] in PATH_KEYS:
            found.append(below)
        found += _paths_in(below)
    return found
