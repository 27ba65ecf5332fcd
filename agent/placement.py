"""Which GPUs an engine holds, and by what evidence: its command line, its environment, NVML."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Only these leave an environment; everything else in it may be a secret
PATH_VARIABLES = ("LMCACHE_LOCAL_DISK", "LMCACHE_GDS_PATH", "LMCACHE_REMOTE_URL")
VARIABLES = ("NVIDIA_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES", *PATH_VARIABLES)
MODEL_VARIABLES = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME")
SHORT_OPTIONS = {
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
}
PATH_KEYS = frozenset(("base_path", "disk_path", "gds_path", "local_disk", "root_dir", "shared_storage_path"))
ACCELERATOR_DRIVERS = frozenset(("nvidia", "nvidia-frontend", "kfd", "accel", "neuron", "davinci"))
FULL_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|MIG-.+")


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


class Host(NamedTuple):
    """What NVML tells of this host: UUIDs in the order of their indices (None: no NVML), compute pids by UUID."""

    gpu_uuids: Sequence[str] | None
    compute_pids: Mapping[str, Sequence[int]]
    has_accelerator: bool


class Placement(NamedTuple):
    """GPUs in the order of the ranks (none for a CPU build), or None, and the evidence in words."""

    gpus: tuple[str, ...] | None
    evidence: str


def is_vllm(arguments: Sequence[str]) -> bool:
    """Whether a command line is one of vLLM's: `vllm serve`, `python -m vllm...`, or a title like VLLM::Worker_TP0."""
    if not arguments:
        return False
    if is_title(arguments):
        return True
    program = PurePosixPath(arguments[0]).name
    if not program.startswith("python"):
        return program == "vllm"
    words = iter(arguments[1:])
    for word in words:
        if word == "-m":
            return "vllm" in next(words, "").split(".")
        if word in {"-W", "-X"}:
            next(words, None)
        elif not word.startswith("-"):
            return PurePosixPath(word).name == "vllm" or "vllm/entrypoints/" in word
    return False


def is_title(arguments: Sequence[str]) -> bool:
    """Whether vLLM has overwritten the command line, and with it the environment."""
    return bool(arguments) and arguments[0].startswith("VLLM::")


def options(arguments: Sequence[str]) -> dict[str, str]:
    """Options as vLLM's parser takes them: `--name value`, `--name=value`, `_` for `-`, the last one wins."""
    found = {}
    for position, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if not name.startswith("-"):
            continue
        if not equals and position + 1 < len(arguments):
            value = arguments[position + 1]
        head, dot, tail = name.partition(".")  # --kv-transfer-config.kv_role: keys of JSON keep their form
        found[SHORT_OPTIONS.get(head, head.replace("_", "-")) + dot + tail] = value
    return found


def sizes(arguments: Sequence[str]) -> Sizes:
    """Read the parallel sizes of a command line."""
    given = options(arguments)
    default = 1 if is_vllm(arguments) and not is_title(arguments) and "--config" not in given else None
    tensor = _number(given.get("--tensor-parallel-size"), default)
    pipeline = _number(given.get("--pipeline-parallel-size"), default)
    context = _number(given.get("--prefill-context-parallel-size"), 1)
    data = _number(given.get("--data-parallel-size-local"), _number(given.get("--data-parallel-size"), 1))
    if "--data-parallel-rank" in given or "--data-parallel-external-lb" in given:
        data = 1  # every rank is a server of its own
    return Sizes(tensor, pipeline, context or 1, data or 1)


def logs_scrapes(arguments: Sequence[str]) -> bool | None:
    """Whether vLLM's access log has a line for every scrape; None where the command line does not tell."""
    if not is_vllm(arguments) or is_title(arguments):
        return None
    given = options(arguments)
    if "--disable-uvicorn-access-log" in given or given.get("--uvicorn-log-level") in {"warning", "error", "critical"}:
        return False
    return "/metrics" not in given.get("--disable-access-log-for-endpoints", "").split(",")


def kv_paths(arguments: Sequence[str], environment: Mapping[str, str]) -> tuple[str, ...]:
    """Directories of KV cache tiers that the command line or the environment name, as the engine sees them."""
    named: list[str] = [environment.get(name, "") for name in PATH_VARIABLES]
    for name, value in options(arguments).items():
        if name.startswith("--kv-transfer-config."):
            named += _paths_in({name.rpartition(".")[2]: value})
        elif name == "--kv-transfer-config":
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


def accelerator_driver(proc: str) -> bool:
    """Whether the kernel has loaded a driver of an accelerator: /proc/devices is the host's in every container."""
    try:
        lines = Path(proc, "devices").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return True  # nothing is known, so nothing is ruled out
    return any(line.split()[-1] in ACCELERATOR_DRIVERS for line in lines if line.strip())


def place(
    needed: Sizes, environment: Mapping[str, str], tree: Iterable[int], host: Host, *, is_only_engine: bool
) -> Placement:
    """Map one engine to its GPUs: the environment first, then NVML, then what cannot be otherwise (METHOD 2.3).

    A number of GPUs that is not the product of the parallel sizes is no mapping.
    """
    pids = frozenset(tree)
    order = {uuid: position for position, uuid in enumerate(host.gpu_uuids or ())}
    computing = [uuid for uuid, users in host.compute_pids.items() if pids.intersection(users)]
    computing.sort(key=lambda uuid: order.get(uuid, len(order)))
    told, doubts = _by_environment(needed, environment, computing, host.gpu_uuids)
    if told is not None:
        return told
    if computing and _fits(len(computing), needed):
        return Placement(tuple(computing), f"NVML sees its processes compute there; {needed}")
    if computing:
        doubts.append(f"NVML sees its processes on {len(computing)}, {_wanted(needed)}")
    if not host.gpu_uuids and not host.has_accelerator:
        return Placement((), "no GPU on this host")
    if is_only_engine and host.gpu_uuids and len(host.gpu_uuids) == 1 and not doubts and _fits(1, needed):
        return Placement(tuple(host.gpu_uuids), "one engine and one GPU on this host")
    if not host.gpu_uuids:
        doubts.append("NVML shows no GPU here, although the kernel has an accelerator's driver")
    elif not doubts:
        doubts.append(f"nothing tells which of the GPUs it holds ({len(host.gpu_uuids)} on this host)")
    return Placement(None, _unknown(doubts))


def _by_environment(
    needed: Sizes, environment: Mapping[str, str], computing: Sequence[str], uuids: Sequence[str] | None
) -> tuple[Placement | None, list[str]]:
    """What the environment decides, or why it does not."""
    named, variables = _named(environment, uuids)
    if named is None:
        return None, [f"{variables} names what NVML does not know"] if variables else []
    stray = [uuid for uuid in computing if uuid not in named]
    if stray and not any(uuid.startswith("MIG-") for uuid in named):
        doubt = f"{variables} leaves out {', '.join(stray)}, where NVML sees its processes"
        return Placement(None, _unknown([doubt])), []
    if not named:
        return Placement((), f"{variables} hides every GPU"), []
    if _fits(len(named), needed):
        return Placement(named, f"{variables}; {needed}"), []
    return None, [f"{variables} names {len(named)}, {_wanted(needed)}"]


def _named(environment: Mapping[str, str], uuids: Sequence[str] | None) -> tuple[tuple[str, ...] | None, str]:
    """GPUs that the environment names, and the variables that do; None where they name none or cannot be resolved."""
    container = environment.get("NVIDIA_VISIBLE_DEVICES", "void")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    text = f"NVIDIA_VISIBLE_DEVICES={container}"
    pool: tuple[str, ...] | None
    if container in {"", "none", "void"}:  # what CDI leaves there: it says nothing
        text, pool = "", tuple(uuids) if uuids is not None else None
    elif container == "all":
        pool = tuple(uuids) if uuids else None
    else:
        pool = _resolved(container.replace(" ", "").split(","), uuids)
        # CUDA numbers what it sees in the order of the host, not of the list
        if pool is not None and uuids is not None and set(pool) <= set(uuids):
            pool = tuple(uuid for uuid in uuids if uuid in pool)
    if visible is None:
        return (pool, text) if text else (None, "")
    text = f"{text} CUDA_VISIBLE_DEVICES={visible}".strip()
    words = visible.replace(" ", "").split(",")
    valid = next((words[:end] for end, word in enumerate(words) if word in {"", "-1", "NoDevFiles"}), words)
    if not valid:
        return (), text
    return _resolved(valid, pool), text


def _resolved(words: Sequence[str], uuids: Sequence[str] | None) -> tuple[str, ...] | None:
    """Indices, UUIDs and beginnings of UUIDs to UUIDs; None if one of them stands for no GPU that is known."""
    found = []
    for word in words:
        known = [uuid for uuid in uuids or () if uuid.startswith(word)]
        if word.isdecimal() and uuids is not None and int(word) < len(uuids):
            found.append(uuids[int(word)])
        elif len(known) == 1:
            found += known
        elif FULL_UUID.fullmatch(word):
            found.append(word)
        else:
            return None
    return tuple(found)


def _fits(count: int, needed: Sizes) -> bool:
    """Whether so many GPUs are all that the sizes need; unknown sizes fit one GPU only."""
    return count == (1 if needed.gpus is None else needed.gpus)


def _wanted(needed: Sizes) -> str:
    return (
        "and the command line does not tell how many it takes"
        if needed.gpus is None
        else f"{needed} takes {needed.gpus}"
    )


def _unknown(doubts: Sequence[str]) -> str:
    return f"mapping unknown: {'; '.join(doubts)}"


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
