"""Which GPUs' device nodes processes have open, and which they could open: by numbers that every container shares."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

NVIDIA_MAJOR = 195  # NVIDIA's own, where /proc/devices is hidden
NVIDIA_DRIVERS = frozenset(("nvidia", "nvidia-frontend"))
GPU_MINOR_MAX = 247  # 254 sets modes and 255 controls the driver: what all GPUs share


class Nodes(NamedTuple):
    """Minor numbers of GPUs' device nodes, as NVML counts them; None where they cannot be read.

    opened   that any process of a tree has open; these are at least the GPUs on which it computes
    shown    in the /dev of the tree's root: in a container those that were let in
    """

    opened: frozenset[int] | None = None
    shown: frozenset[int] | None = None


def nodes_of(tree: Iterable[int], proc: str = "/proc") -> Nodes:
    """The nodes of a process tree that begins with its root; /proc shows them to whom it shows the environment."""
    pids = tuple(tree)
    if not pids:
        return Nodes()
    major = nvidia_major(proc)
    opened: frozenset[int] | None = frozenset()
    for pid in pids:
        found = _opened(pid, major, proc)
        opened = None if opened is None or found is None else opened | found
    return Nodes(opened, _shown(pids[0], major, proc))


# Character devices:
# 195 nvidia
def nvidia_major(proc: str = "/proc") -> int:
    """The major number of the nodes of NVIDIA's GPUs by the kernel's list."""
    try:
        lines = Path(proc, "devices").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return NVIDIA_MAJOR
    pairs = (line.split(None, 1) for line in lines if line.strip())
    majors = (int(pair[0]) for pair in pairs if pair[0].isdecimal() and pair[-1].strip() in NVIDIA_DRIVERS)
    return next(majors, NVIDIA_MAJOR)


# /proc/812/fd/41 -> /dev/nvidia6
def _opened(pid: int, major: int, proc: str) -> frozenset[int] | None:
    """What one process has open: nothing once it has ended, None where that may not be read."""
    try:
        return frozenset(_minors(_devices(f"{proc}/{pid}/fd"), major))
    except (FileNotFoundError, ProcessLookupError):
        return frozenset()
    except OSError:
        return frozenset() if _has_ended(pid, proc) else None


def _devices(folder: str) -> Iterator[str]:
    """Open files that are device nodes by their paths: to ask for others may wait on a server that is gone."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if os.readlink(entry.path).startswith("/dev/"):  # noqa: PTH115  # many of them: no Path objects
                    yield entry.path
            except FileNotFoundError:
                continue  # it was just closed


# /proc/812/root/dev/{nvidia6,nvidiactl,nvidia-uvm,nvidia-caps/}
def _shown(pid: int, major: int, proc: str) -> frozenset[int] | None:
    """What a process sees in its /dev; None where that may not be read."""
    try:
        with os.scandir(f"{proc}/{pid}/root/dev") as entries:
            return frozenset(_minors((entry.path for entry in entries if entry.name.startswith("nvidia")), major))
    except OSError:
        return None


def _minors(paths: Iterable[str], major: int) -> Iterator[int]:
    """Numbers of the GPUs among some nodes: a node may go by another name in a container, never by another number."""
    for path in paths:
        try:
            device = os.stat(path).st_rdev  # noqa: PTH116  # as above
        except FileNotFoundError:
            continue
        if os.major(device) == major and os.minor(device) <= GPU_MINOR_MAX:
            yield os.minor(device)


# 812 (python3) Z 811 ...
def _has_ended(pid: int, proc: str) -> bool:
    """Whether a process has ended and waits for its parent to ask how: the kernel then hides it from its own user."""
    try:
        return Path(proc, str(pid), "stat").read_bytes().rpartition(b")")[2].split()[:1] == [b"Z"]
    except OSError:
        return False
