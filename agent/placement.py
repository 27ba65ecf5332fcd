"""Which GPUs an engine holds, and by what evidence: its parallel sizes, its environment, NVML, device nodes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.device_nodes import Nodes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.engine_command import Sizes

ACCELERATOR_DRIVERS = frozenset(("nvidia", "nvidia-frontend", "kfd", "accel", "neuron", "davinci"))
HOST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's first: its inode is the same everywhere
OWN_PIDS = (
    "NVML numbers processes as the host does, and this container numbers its own: hostPID: true, or "
    "NVIDIA_VISIBLE_DEVICES in its environment, or gpus in kvtally.toml"
)
NO_NODES = Nodes()
FULL_UUID = re.compile(r"GPU-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|MIG-.+")


class Host(NamedTuple):
    """What NVML tells of this host: UUIDs in the order of their indices (None: no NVML), compute pids by UUID.

    instances       GPUs that are cut -> the UUIDs of their MIG instances
    has_own_pids    processes have other numbers here than NVML gives them, so `compute_pids` is empty
    minors          minor numbers of device nodes -> UUIDs; empty where NVML does not tell them
    """

    gpu_uuids: Sequence[str] | None
    compute_pids: Mapping[str, Sequence[int]]
    has_accelerator: bool
    instances: Mapping[str, Sequence[str]] = {}
    has_own_pids: bool = False
    minors: Mapping[int, str] = {}


class Placement(NamedTuple):
    """GPUs in the order of the ranks (none for a CPU build), or None, and the evidence in words."""

    gpus: tuple[str, ...] | None
    evidence: str


def accelerator_driver(proc: str) -> bool:
    """Whether the kernel has loaded a driver of an accelerator: /proc/devices is the host's in every container."""
    try:
        lines = Path(proc, "devices").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return True  # nothing is known, so nothing is ruled out
    return any(line.split()[-1] in ACCELERATOR_DRIVERS for line in lines if line.strip())


def numbers_as_host(proc: str) -> bool:
    """Whether processes have the numbers here that the host, and so NVML, gives them.

    Elsewhere a number stands for another process, and where both are small it may well be an engine's.
    """
    try:
        return os.readlink(f"{proc}/self/ns/pid") == HOST_PID_NAMESPACE  # noqa: PTH115  # a link to no path
    except OSError:
        return True  # a kernel without PID namespaces has one numbering


def place(
    needed: Sizes,
    environment: Mapping[str, str],
    tree: Iterable[int],
    host: Host,
    nodes: Nodes = NO_NODES,
    *,
    is_only_engine: bool,
) -> Placement:
    """Map one engine to its GPUs: the environment first, then NVML, then device nodes, then what cannot be otherwise.

    A number of GPUs that is not the product of the parallel sizes is no mapping (METHOD 2.3).
    """
    pids = frozenset(tree)
    order = {uuid: position for position, uuid in enumerate(host.gpu_uuids or ())}
    computing = [uuid for uuid, users in host.compute_pids.items() if pids.intersection(users)]
    computing.sort(key=lambda uuid: order.get(uuid, len(order)))
    told, doubts = _by_environment(needed, environment, computing, host, nodes)
    if told is not None:
        return told
    told, more = _by_use(needed, computing, host, nodes)
    if told is not None:
        return told
    doubts += more
    if not host.gpu_uuids and not host.has_accelerator:
        return Placement((), "no GPU on this host")
    if is_only_engine and host.gpu_uuids and len(host.gpu_uuids) == 1 and not doubts and _fits(1, needed):
        only, doubt = _uncut(host.gpu_uuids, computing, host)
        if only:
            return Placement(only, "one engine and one GPU on this host")
        doubts.append(doubt)
    if not host.gpu_uuids:
        doubts.append("NVML shows no GPU here, although the kernel has an accelerator's driver")
    elif not doubts:
        doubts.append(f"nothing tells which of the GPUs it holds ({len(host.gpu_uuids)} on this host)")
    if host.has_own_pids:
        doubts.append(OWN_PIDS)
    return Placement(None, _unknown(doubts))


def _by_use(needed: Sizes, computing: Sequence[str], host: Host, nodes: Nodes) -> tuple[Placement | None, list[str]]:
    """What NVML's processes decide, or else device nodes; or why neither does."""
    if computing and _fits(len(computing), needed):
        return Placement(tuple(computing), f"NVML sees its processes compute there; {needed}"), []
    told, doubt = _by_nodes(needed, computing, host, nodes)
    doubts = [f"NVML sees its processes on {len(computing)}, {_wanted(needed)}"] if computing else []
    return told, [*doubts, doubt] if doubt else doubts


def _by_nodes(needed: Sizes, computing: Sequence[str], host: Host, nodes: Nodes) -> tuple[Placement | None, str]:
    """What device nodes decide, or why they do not; "" where they tell nothing.

    CUDA may open the nodes of all GPUs that it sees, and use some. But no process computes on a GPU whose node it has
    not opened, nor opens what is not in its /dev: where these are as many as the sizes take, they are those.
    """
    if not host.minors or nodes.opened == frozenset():  # an engine that has none open computes on none
        return None, ""
    doubts = []
    for minors, words in ((nodes.opened, "its processes have {} open"), (nodes.shown, "its /dev shows {} alone")):
        if not minors:
            continue
        known = [host.minors[minor] for minor in minors if minor in host.minors]
        gpus = tuple(uuid for uuid in host.gpu_uuids or () if uuid in known)
        seen = words.format(_paths(minors))
        stray = [uuid for uuid in computing if uuid not in gpus]
        if not host.instances.keys().isdisjoint(known):  # nodes are whole GPUs'
            doubt = _uncut(known, (), host)[1]
            doubts.append(f"{seen}: {doubt}" if doubt else "")
        elif not _fits(len(minors), needed):
            doubts.append(f"{seen}, {_wanted(needed)}")
        elif len(gpus) != len(minors):
            doubts.append(f"{seen}, and NVML shows not all of these")
        elif stray:
            doubts.append(f"{seen}, and NVML sees its processes on {', '.join(stray)}")
        else:
            return Placement(gpus, f"{seen}; {needed}"), ""
    return None, doubts[0] if doubts else ""


def _by_environment(
    needed: Sizes, environment: Mapping[str, str], computing: Sequence[str], host: Host, nodes: Nodes
) -> tuple[Placement | None, list[str]]:
    """What the environment decides, or why it does not."""
    named, variables = _named(environment, host, nodes)
    if named is None:
        return None, [f"{variables} names what NVML does not know"] if variables else []
    named, doubt = _uncut(named, computing, host)
    if named is None:
        return None, [f"{variables}: {doubt}"]
    stray = [uuid for uuid in computing if uuid not in named]
    if stray and not any(uuid.startswith("MIG-") for uuid in named):
        doubt = f"{variables} leaves out {', '.join(stray)}, where NVML sees its processes"
        return Placement(None, _unknown([doubt])), []
    if not named:
        return Placement((), f"{variables} hides every GPU"), []
    if _fits(len(named), needed):
        return Placement(named, f"{variables}; {needed}"), []
    return None, [f"{variables} names {len(named)}, {_wanted(needed)}"]


def _uncut(named: Sequence[str], computing: Sequence[str], host: Host) -> tuple[tuple[str, ...] | None, str]:
    """The GPUs, in place of one that is cut those of its MIG instances that the engine holds; None and why not.

    No program holds a GPU that is cut: CUDA gives it one instance.
    """
    found: list[str] = []
    for uuid in named:
        instances = host.instances.get(uuid)
        if instances is None:
            found.append(uuid)
            continue
        held = [one for one in instances if one in computing]
        if not held and len(instances) != 1:
            return None, f"{uuid} is cut into {len(instances)} MIG instances, and nothing tells which it holds"
        found += held or instances
    return tuple(dict.fromkeys(found)), ""


def _seen(host: Host, nodes: Nodes) -> tuple[tuple[str, ...] | None, str]:
    """The GPUs that an engine can see, None for unknown ones, and in words the nodes that leave others of them out."""
    if host.gpu_uuids is None or not host.minors or not nodes.shown:
        return None if host.gpu_uuids is None else tuple(host.gpu_uuids), ""
    if not nodes.shown <= host.minors.keys():
        return None, ""
    known = [host.minors[minor] for minor in nodes.shown]
    gpus = tuple(uuid for uuid in host.gpu_uuids if uuid in known)
    return gpus, f" of {_paths(nodes.shown)}" if len(gpus) < len(host.gpu_uuids) else ""


def _named(environment: Mapping[str, str], host: Host, nodes: Nodes) -> tuple[tuple[str, ...] | None, str]:
    """GPUs that the environment names, and the variables that do; None where they name none or cannot be resolved."""
    container = environment.get("NVIDIA_VISIBLE_DEVICES", "void")
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    text = f"NVIDIA_VISIBLE_DEVICES={container}"
    uuids = host.gpu_uuids
    pool, within = _seen(host, nodes)
    if container in {"", "none", "void"}:  # what CDI leaves there: it says nothing
        text = ""
    elif container == "all":  # of those that were let in: images of CUDA have it from their base
        text, pool = text + (within if visible is None else ""), pool or None
    else:
        within = ""
        pool = _resolved(container.replace(" ", "").split(","), uuids)
        # CUDA numbers what it sees in the order of the host, not of the list
        if pool is not None and uuids is not None and set(pool) <= set(uuids):
            pool = tuple(uuid for uuid in uuids if uuid in pool)
    if visible is None:
        return (pool, text) if text else (None, "")
    text = f"{text} CUDA_VISIBLE_DEVICES={visible}{within}".strip()
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


def _paths(minors: Iterable[int]) -> str:
    """The nodes by the names that the host has for them."""
    return ", ".join(f"/dev/nvidia{minor}" for minor in sorted(minors))


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
