"""What an engine's process tree takes from its host: CPU time, bytes read and written, memory."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.collectors.base import NoData, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

READ_LIMIT_BYTES = 4096  # /proc/<pid>/stat and io are a few hundred bytes
SCANS_EVERY = 10  # collects between two searches for new children; a member that vanishes brings the search forward
IO_LIMIT = "the same user or CAP_SYS_PTRACE is needed, and in Kubernetes shareProcessNamespace: true"
IO_FIELDS = ("rchar", "wchar", "read_bytes", "write_bytes")
# VLLM::Worker_TP0, VLLM::EngineCore_DP1, sglang::scheduler_TP0, ray::RayWorkerWrapper, of which a comm holds 15 bytes.
# vLLM's API servers, SGLang's tokenizers and detokenizers compute nothing, and a core that has workers waits for them
# in a loop that takes CPU time: it computes where it has none.
COMPUTING = (("Worker", "RayWorker", "schedul"), ("Engine",))


class Stat(NamedTuple):
    """What is wanted of /proc/<pid>/stat, in the kernel's units."""

    comm: str
    parent: int
    cpu_ticks: int
    start_ticks: int
    resident_pages: int


# 1857 (VLLM::EngineCor) R 1788 1788 1788 0 -1 4194304 9112 0 0 0 51234 1189 0 0 20 0 131 0 88123 61834 217 ...
#  pid  comm        state ppid                             (14) utime stime         threads (22) start vsize rss
def parse_stat(text: bytes) -> Stat:
    """Read one stat line; ValueError if it is cut short."""
    opened, closed = text.find(b"("), text.rfind(b")")  # a comm may hold blanks and brackets
    fields = text[closed + 2 :].split()
    try:
        return Stat(
            comm=text[opened + 1 : closed].decode("utf-8", "replace"),
            parent=int(fields[1]),
            cpu_ticks=int(fields[11]) + int(fields[12]),
            start_ticks=int(fields[19]),
            resident_pages=int(fields[21]),
        )
    except IndexError:
        raise ValueError(f"not a stat line: {text[:80]!r}") from None


# one field a line -> rchar: 697973263 | wchar: 97506 | syscr: 90211 | syscw: 1204 | read_bytes: 479232 | ...
def parse_io(text: bytes) -> dict[str, int]:
    """Read /proc/<pid>/io: bytes by the kernel's names."""
    pairs = (line.partition(b": ") for line in text.splitlines())
    return {name.decode(): int(value) for name, _, value in pairs if value}


def read_stat(proc: str, pid: int) -> Stat | None:
    """Stat of one process; None if there is no such process. PermissionError where /proc hides it."""
    try:
        return parse_stat(_read(f"{proc}/{pid}/stat"))
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return None


def parents(proc: str) -> dict[int, int]:
    """Parent of every process that may be seen.

    One read a process: on 300 processes 4 ms of CPU. /proc/<pid>/task/*/children needs one a thread, which engines
    have by the hundred (7 ms for ten processes of 100), and may skip children while others exit.
    """
    found = {}
    with os.scandir(proc) as entries:
        pids = sorted(int(entry.name) for entry in entries if entry.name.isdecimal())
    for pid in pids:
        try:
            stat = read_stat(proc, pid)
        except PermissionError:
            continue
        if stat is not None:
            found[pid] = stat.parent
    return found


def descendants(root: int, parent_of: Mapping[int, int]) -> list[int]:
    """The root, its children and theirs; each once, even where pids reused during the reading close a ring."""
    children: dict[int, list[int]] = {}
    for pid, parent in parent_of.items():
        children.setdefault(parent, []).append(pid)
    tree, position = [root], 0
    while position < len(tree):
        tree += [child for child in children.get(tree[position], ()) if child not in tree]
        position += 1
    return tree


def computing(comms: Sequence[str]) -> tuple[bool | None, ...]:
    """Which of an engine's processes compute its steps, by their comms; None of each where no title tells."""
    titles = [comm.partition("::")[2] for comm in comms]
    each = (tuple(title.startswith(beginnings) for title in titles) for beginnings in COMPUTING)
    return next((found for found in each if any(found)), (None,) * len(titles))


def process_reading(name: str, processes: Sequence[Mapping[str, Any]]) -> Reading:
    """Build the reading of a tree from its processes in recorded form (a line's "processes" in host.jsonl).

    A part is a process, told from a later one of the same pid by its start. Resident memory counts a page once for
    every process that shares it.
    """
    computes = computing([str(process.get("comm", "")) for process in processes])
    parts = {
        f"{process['pid']}:{process.get('start_time', '')}": (
            process.get("cpu_seconds"),
            *(process.get(field) for field in IO_FIELDS),
            _worker_seconds(process.get("cpu_seconds"), is_worker),
            None,
            None,
        )
        for process, is_worker in zip(processes, computes, strict=True)
    }
    resident = [process.get("resident_bytes") for process in processes]
    known = [memory for memory in resident if memory is not None]
    memory = sum(known) if known and len(known) == len(resident) else None
    counters = (None,) * (2 + len(IO_FIELDS))
    return Reading("process", name, {}, (*counters, len(processes), memory), parts=parts)


def _worker_seconds(cpu_seconds: float | None, is_worker: bool | None) -> float | None:
    """What a process adds to the workers' CPU seconds; None where they or their part of the tree are unknown."""
    return None if cpu_seconds is None or is_worker is None else cpu_seconds * is_worker


class ProcessTree:
    """Reads one engine's processes from /proc, from a root pid down.

    `limits` tells after each collect what may not be read and why.
    """

    def __init__(
        self,
        name: str,
        root_pid: Callable[[], int | None] | int,
        proc: str = "/proc",
        *,
        clock_ticks: int | None = None,
        page_bytes: int | None = None,
        scans_every: int = SCANS_EVERY,
    ) -> None:
        self.source = f"process:{name}"
        self.limits: dict[str, str] = {}
        self._name = name
        self._root_pid = root_pid
        self._proc = proc
        self._clock_ticks = clock_ticks or os.sysconf("SC_CLK_TCK")
        self._page_bytes = page_bytes or os.sysconf("SC_PAGE_SIZE")
        self._scans_every = scans_every
        self._members: dict[int, int] = {}  # pid -> start_ticks, the root first
        self._scan_due_in = 0

    def collect(self) -> tuple[Reading, ...]:
        """Read the tree now; NoData if its root is unknown, gone or hidden."""
        return (process_reading(self._name, self.sample()),)

    def sample(self) -> list[dict[str, Any]]:
        """Read the tree in recorded form; start_time is in seconds since boot, which no clock step moves."""
        root = self._root_pid if isinstance(self._root_pid, int) else self._root_pid()
        if root is None:
            raise NoData("the engine's process is not known", f"to see it, {IO_LIMIT}")
        stats = self._known_members(root) or self._scan(root)
        processes = []
        denied = 0
        for pid, stat in stats.items():
            counters = self._io(pid)
            denied += counters is None
            processes.append(
                {
                    "pid": pid,
                    "comm": stat.comm,
                    "start_time": stat.start_ticks / self._clock_ticks,
                    "cpu_seconds": stat.cpu_ticks / self._clock_ticks,
                    **{field: (counters or {}).get(field) for field in IO_FIELDS},
                    "resident_bytes": stat.resident_pages * self._page_bytes,
                }
            )
        self.limits.clear()
        if denied:
            self.limits["io"] = f"bytes of {denied} of {len(stats)} processes may not be read: {IO_LIMIT}"
        return processes

    def _known_members(self, root: int) -> dict[int, Stat] | None:
        """Stats of the tree as it was last seen; None if one has gone or a search is due."""
        self._scan_due_in -= 1
        if self._scan_due_in <= 0 or root not in self._members:
            return None
        stats = {}
        for pid, start_ticks in self._members.items():
            stat = read_stat(self._proc, pid)
            if stat is None or stat.start_ticks != start_ticks:
                return None
            stats[pid] = stat
        return stats

    def _scan(self, root: int) -> dict[int, Stat]:
        """Find the tree anew."""
        try:
            if read_stat(self._proc, root) is None:
                raise NoData(f"process {root} is gone", f"or /proc hides it: {IO_LIMIT}")
            found = ((pid, read_stat(self._proc, pid)) for pid in descendants(root, parents(self._proc)))
            stats = {pid: stat for pid, stat in found if stat is not None}
        except PermissionError:
            raise NoData(f"process {root} may not be read", IO_LIMIT) from None
        self._members = {pid: stat.start_ticks for pid, stat in stats.items()}
        self._scan_due_in = self._scans_every
        return stats

    def _io(self, pid: int) -> dict[str, int] | None:
        """Byte counters of one process: None where they may not be read, empty if it has just gone."""
        try:
            return parse_io(_read(f"{self._proc}/{pid}/io"))
        except PermissionError:
            return None
        except OSError:
            return {}


def _read(path: str) -> bytes:
    """Read a small file of /proc at one stroke: 8 us of CPU, 12 with open()."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, READ_LIMIT_BYTES)
    finally:
        os.close(descriptor)
