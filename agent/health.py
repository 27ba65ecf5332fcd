"""kvtally's own health as metrics: what it scrapes, what that takes, how far its ledger lags."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from kvtally import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.pipeline import Tick
    from kvtally.collectors.base import Scrape

SOURCES_MAX = 512  # engines that come and go on ever new ports must not fill the memory
ALIVE_SECONDS = 900.0  # three times the longest interval


class About(NamedTuple):
    """What a metric is: its type, what it means, its labels."""

    kind: str
    meaning: str
    labels: tuple[str, ...] = ()


# by name, that of a counter without its _total
OWN: Mapping[str, About] = {
    "kvtally_build_info": About("gauge", "Which kvtally this is", ("version",)),
    "kvtally_scrape_duration_seconds": About("gauge", "What the last scrape of a source took", ("source",)),
    "kvtally_scrapes": About("counter", "Scrapes by outcome: ok, no_data, failed", ("source", "outcome")),
    "kvtally_intervals": About("counter", "Intervals written since the start of this process", ("kind",)),
    "kvtally_failed_writes": About("counter", "Ticks that the ledger did not take at once"),
    "kvtally_ledger_lag_seconds": About(
        "gauge", "Age of the newest interval that this process wrote, or of the process where it wrote none"
    ),
    "kvtally_ledger_bytes": About("gauge", "Size of the ledger's file"),
    "kvtally_snapshot_age_seconds": About(
        "gauge",
        "Age of the figures that were last worked out from the ledger, or of the process where none were; where it is "
        "great, they are left out",
    ),
    "kvtally_children_cpu_seconds": About(
        "counter", "CPU time of its children that have ended: figures for exporters, settling"
    ),
    "process_cpu_seconds": About("counter", "CPU time of this process"),
    "process_resident_memory_bytes": About("gauge", "Resident memory of this process"),
    "process_start_time_seconds": About("gauge", "When this process began, unix time"),
}


class Family(NamedTuple):
    """One metric: its name without _total, its type, what it means, its samples."""

    name: str
    kind: str
    meaning: str
    samples: tuple[tuple[Mapping[str, str], float], ...]


class _Source(NamedTuple):
    outcomes: dict[str, int]
    took_seconds: float = 0.0


class Health:
    """What one run has done so far; told to other threads."""

    def __init__(self, ledger_path: str, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._path = ledger_path
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._started_seconds = time.time()
        self._sources: dict[str, _Source] = {}  # the one that was read longest ago first
        self._intervals: dict[str, int] = {}
        self._newest_ns: int | None = None
        self._failed_writes = 0
        self._started_at = self._ticked_at = monotonic()
        # once it is, it stays so: a disk that is full later must not take the engine's pod out of service
        self.is_ready = False

    @property
    def is_alive(self) -> bool:
        """Whether a tick was not long ago."""
        return self._monotonic() - self._ticked_at < ALIVE_SECONDS

    def add(self, scrapes: Sequence[Scrape], tick: Tick) -> None:
        """Count one tick."""
        with self._lock:
            for one in scrapes:
                source = self._sources.pop(one.source, None) or _Source({})
                source.outcomes[one.outcome] = source.outcomes.get(one.outcome, 0) + 1
                if len(self._sources) >= SOURCES_MAX:
                    del self._sources[next(iter(self._sources))]
                self._sources[one.source] = source._replace(took_seconds=one.took_seconds)
            for closed in tick.closed:
                if closed.interval is not None:
                    kind = closed.reading.kind
                    self._intervals[kind] = self._intervals.get(kind, 0) + 1
                    self._newest_ns = max(self._newest_ns or 0, closed.interval.end_ns)
            self._failed_writes += tick.error is not None
            self._ticked_at = self._monotonic()
        self.is_ready = self.is_ready or tick.error is None

    def families(self, now_ns: int, snapshot_age_seconds: float | None) -> Iterator[Family]:
        """All metrics now; those of which nothing is known are left out.

        What never came is as old as this process: an alert on an age must not wait for the first of it.
        """
        own_age_seconds = self._monotonic() - self._started_at
        with self._lock:
            sources = [(name, one.took_seconds, tuple(one.outcomes.items())) for name, one in self._sources.items()]
            kinds, newest_ns, failed_writes = tuple(self._intervals.items()), self._newest_ns, self._failed_writes
        yield _family("kvtally_build_info", ((__version__,), 1))
        yield _family("kvtally_scrape_duration_seconds", *(((name,), seconds) for name, seconds, _ in sources))
        outcomes = (((name, outcome), count) for name, _, told in sources for outcome, count in told)
        yield _family("kvtally_scrapes", *outcomes)
        yield _family("kvtally_intervals", *(((kind,), count) for kind, count in kinds))
        yield _family("kvtally_failed_writes", ((), failed_writes))
        lag_seconds = own_age_seconds if newest_ns is None else max(0.0, (now_ns - newest_ns) / 1e9)
        yield _family("kvtally_ledger_lag_seconds", ((), lag_seconds))
        if (size := file_bytes(self._path)) is not None:
            yield _family("kvtally_ledger_bytes", ((), size))
        age_seconds = own_age_seconds if snapshot_age_seconds is None else snapshot_age_seconds
        yield _family("kvtally_snapshot_age_seconds", ((), age_seconds))
        yield from self._process()

    def _process(self) -> Iterator[Family]:
        """As Prometheus' own clients name it."""
        times = os.times()
        yield _family("kvtally_children_cpu_seconds", ((), times.children_user + times.children_system))
        yield _family("process_cpu_seconds", ((), times.user + times.system))
        if (resident := resident_bytes()) is not None:
            yield _family("process_resident_memory_bytes", ((), resident))
        yield _family("process_start_time_seconds", ((), self._started_seconds))


def rendered(families: Iterable[Family], *, openmetrics: bool) -> str:
    """Metrics in the text format 0.0.4 or in OpenMetrics, which differ in where a counter's _total stands."""
    lines: list[str] = []
    for family in families:
        if not family.samples:
            continue
        sample = f"{family.name}_total" if family.kind == "counter" else family.name
        head = family.name if openmetrics else sample
        lines += [f"# HELP {head} {family.meaning}", f"# TYPE {head} {family.kind}"]
        for labels, value in family.samples:
            told = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
            lines.append(f"{sample}{{{told}}} {value!r}" if told else f"{sample} {value!r}")
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, *samples: tuple[tuple[str, ...], float]) -> Family:
    """A metric of OWN; each sample with the values of its labels."""
    about = OWN[name]
    told = tuple((dict(zip(about.labels, values, strict=True)), value) for values, value in samples)
    return Family(name, about.kind, about.meaning, told)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def file_bytes(path: str) -> int | None:
    """Bytes of a file; None where it cannot be asked, as when somebody moved it away."""
    try:
        return os.path.getsize(path)  # noqa: PTH202  # pathlib costs memory
    except OSError:
        return None


def resident_bytes() -> int | None:
    """Bytes of memory that this process holds; None where the kernel does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # as above
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
