"""What GPUDirect Storage moved between storage and GPUs, past the page cache: the nvidia-fs driver's own counts."""

from __future__ import annotations

import re
from pathlib import Path

from kvtally.collectors.base import CollectError, NoData, Reading

STATS = "driver/nvidia-fs/stats"
MIB = 2**20
# IO stats: Enabled, peer IO stats: Disabled
IO_STATS = re.compile(r"^IO stats: (\w+)", re.MULTILINE)
# Reads				: n=1048576 ok=1048576 err=0 readMiB=1048576 io_state_err=0
# Reads				: Bandwidth(MiB/s)=13224 Avg-Latency(usec)=594
# Writes				: n=500 ok=498 err=2 writeMiB=2048 io_state_err=1 pg-cache=50 pg-cache-fail=0 pg-cache-eio=0
READS = re.compile(r"^Reads\s*: n=(\d+) .*?\breadMiB=(\d+)", re.MULTILINE)
WRITES = re.compile(r"^Writes\s*: n=(\d+) .*?\bwriteMiB=(\d+)", re.MULTILINE)


def parse_stats(text: str) -> tuple[int, int, int, int]:
    """Bytes read, reads, bytes written, writes; NoData where the driver does not count, CollectError if unknown."""
    enabled = IO_STATS.search(text)
    reads, writes = READS.search(text), WRITES.search(text)
    if enabled is not None and enabled[1] == "Disabled":
        raise NoData(
            "nvidia-fs does not count bytes: IO stats are disabled",
            "echo 1 > /sys/module/nvidia_fs/parameters/rw_stats_enabled",
        )
    if reads is None or writes is None:
        raise CollectError("nvidia-fs tells its counts in a form that is not known")
    return int(reads[2]) * MIB, int(reads[1]), int(writes[2]) * MIB, int(writes[1])


class GpuDirectStorage:
    """Reads the whole host's GPUDirect Storage counts.

    Bytes are whole MiB, the rest cut off. A block device below counts the same bytes once more; what cuFile does in
    its compatibility mode, by read() and write(), is not here. Counts begin anew with the driver, and when somebody
    writes to the file.
    """

    source = "gds"

    def __init__(self, proc: str = "/proc") -> None:
        self._path = Path(proc, STATS)

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where the driver is not loaded or does not count."""
        try:
            text = self._path.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            raise NoData(
                "the nvidia-fs driver is not loaded", "without it cuFile reads as any program does: modprobe nvidia-fs"
            ) from None
        read, reads, written, writes = parse_stats(text)
        values = (read, reads, None, written, writes, None, None, None)
        return (Reading("filesystem", "gds", {"source": "nvidia-fs"}, values),)
