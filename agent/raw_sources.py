"""Reads sources as they are, for a recording: pages, GPU samples, what processes and disks have counted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from kvtally.agent.cadence import Cadence
from kvtally.collectors.base import scrape
from kvtally.collectors.filesystem import BlockDevices
from kvtally.collectors.host import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from kvtally.agent.cadence import Stop
    from kvtally.collectors.base import Collector, Scrape
    from kvtally.collectors.gpu import GpuSample
    from kvtally.collectors.nvml import NvmlCollector

MEMORY_FIELDS = frozenset(("MemFree", "MemAvailable", "Cached"))

Answer = TypeVar("Answer")


class Kept(Generic[Answer]):
    """A collector that keeps what its source answers: `scrape` times it, and tells a failure from no data."""

    def __init__(self, source: str, read: Callable[[], Answer]) -> None:
        self.source = source
        self.answer: Answer | None = None
        self._read = read

    def collect(self) -> tuple[()]:
        """Read now; `answer` is None where that fails."""
        self.answer = None
        self.answer = self._read()
        return ()


class GpuSampling(threading.Thread):
    """Samples the GPUs at a cadence of its own, so that neither a hanging engine nor a hanging driver holds up both."""

    def __init__(
        self,
        nvml: NvmlCollector,
        every_seconds: float,
        clock_ns: Callable[[], int],
        take: Callable[[int, Scrape, list[GpuSample]], None],
        stop: Stop,
    ) -> None:
        """`take` gets the instant at which a sampling began, how it went, and what it gave."""
        super().__init__(name="gpus", daemon=True)
        self._samples = Kept("nvml", nvml.sample)
        self._every_seconds = every_seconds
        self._clock_ns = clock_ns
        self._take = take
        self._stop_word = stop

    def run(self) -> None:
        """Sample until the word to stop, and once more then."""
        cadence = Cadence(self._every_seconds)
        is_last = False
        while True:
            began_ns = self._clock_ns()
            outcome = scrape(self._samples, self._clock_ns)
            self._take(began_ns, outcome, self._samples.answer or [])
            if is_last or self._stop_word.is_set():
                return
            is_last = cadence.wait(self._stop_word)


def host_line(
    target: str, collectors: Iterable[Collector], clock_ns: Callable[[], int], meminfo: str = "/proc/meminfo"
) -> tuple[dict[str, Any], list[Scrape]]:
    """What an engine's processes and the disks have counted, but for the time, and how reading them went."""
    line: dict[str, Any] = {}
    outcomes: list[Scrape] = []
    for collector in collectors:
        if isinstance(collector, BlockDevices):
            key = "disks"
        elif isinstance(collector, ProcessTree) and collector.source == f"process:{target}":
            key = "processes"
        else:
            continue
        kept = Kept(collector.source, collector.sample)
        outcomes.append(scrape(kept, clock_ns))
        if kept.answer is not None:
            line[key] = kept.answer
    if line:
        line["memory_kib"] = _memory_kib(meminfo)
    return line, outcomes


# MemAvailable:   129004056 kB
def _memory_kib(meminfo: str) -> dict[str, int]:
    try:
        lines = Path(meminfo).read_text(encoding="ascii").splitlines()
        pairs = (line.partition(":") for line in lines)
        return {name: int(rest.split()[0]) for name, _, rest in pairs if name in MEMORY_FIELDS}
    except (OSError, ValueError, IndexError):
        return {}
