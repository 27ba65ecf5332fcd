"""What a process costs, as the kernel counts it: CPU time and resident memory."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import NamedTuple

_PROCESS_CPU_CLOCK = 2  # CPUCLOCK_SCHED of a whole process, see clock_getcpuclockid(3)


class Memory(NamedTuple):
    """Resident memory in KiB, and the part of it that no file backs."""

    resident_kib: int
    anonymous_kib: int


def cpu_ns(pid: int) -> int:
    """CPU time of a process: its threads' schedstat summed, that of ended ones included; OSError if it is gone."""
    return time.clock_gettime_ns((~pid << 3) | _PROCESS_CPU_CLOCK)


def children_cpu_ns(pid: int) -> int:
    """CPU time of the child processes that it has waited for, to 10 ms."""
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[13]) + int(fields[14])) * 10**9 // os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> Memory:
    """What a process holds now."""
    lines = (line.split() for line in Path("/proc", str(pid), "status").read_text().splitlines())
    found = {words[0]: int(words[1]) for words in lines if words[0] in {"VmRSS:", "RssAnon:"}}
    return Memory(found["VmRSS:"], found["RssAnon:"])
