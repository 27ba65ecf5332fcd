"""Records live engines: whole pages, GPU and host samples at an even cadence, for a replay that tells the same."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from kvtally.agent.cadence import Cadence, Stop, told_by_signals
from kvtally.agent.clock import LedgerClock
from kvtally.agent.discovery import BIRTH
from kvtally.agent.engine_recording import EngineRecording, folder_names, meta_of
from kvtally.agent.gather import Gatherer
from kvtally.agent.recording_members import RecordingError
from kvtally.agent.sources import Sources, look_around, open_nvml, probe
from kvtally.collectors.base import CollectError, NoData, scrape
from kvtally.collectors.filesystem import BlockDevices
from kvtally.collectors.host import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.agent.config import Config
    from kvtally.agent.log import Log
    from kvtally.agent.sources import Found
    from kvtally.collectors.base import Scrape
    from kvtally.collectors.gpu import GpuSample
    from kvtally.collectors.nvml import NvmlCollector

MAX_BYTES = 2 << 30  # a day of 5 s scrapes of one engine
MINUTE_SECONDS = 60.0
PATIENCE_SECONDS = 2.0  # for threads at the end; one that hangs ends with the process
MEMORY_FIELDS = frozenset(("MemFree", "MemAvailable", "Cached"))

Answer = TypeVar("Answer")


class Recorded(NamedTuple):
    """What was recorded, all engines together."""

    folders: tuple[Path, ...]
    pages: int
    failed_scrapes: int
    gpu_lines: int
    bytes_written: int
    ended_by: Literal["told to stop", "the time is over", "the size limit is reached", "it could not be written"]

    def __str__(self) -> str:
        """One line for a person."""
        return (
            f"{self.pages} pages, {self.failed_scrapes} failed scrapes, {self.gpu_lines} GPU samples, "
            f"{self.bytes_written / 2**20:.1f} MiB; {self.ended_by}"
        )


class Recorder:
    """Writes a recording of every engine that is found at the start, until it is told to stop.

    max_bytes          ends the recording at the page that would make its files larger, all engines together
    gpu_every_seconds  time between two GPU samples; the scrapes' interval by default
    stop               the word to stop; where none is given SIGTERM and SIGINT say it. Set when it ends by itself
    """

    def __init__(
        self,
        config: Config,
        folder: Path,
        log: Log,
        *,
        max_bytes: int = MAX_BYTES,
        gpu_every_seconds: float | None = None,
        stop: Stop | None = None,
        clock: LedgerClock | None = None,
        look: Callable[[Config, NvmlCollector | None], Found] = look_around,
        open_gpus: Callable[[Config], NvmlCollector | None] = open_nvml,
    ) -> None:
        self._config = config
        self._folder = folder
        self._log = log
        self._max_bytes = max_bytes
        self._gpu_every_seconds = gpu_every_seconds or config.scrape.interval_seconds
        self._hears_signals = stop is None
        self._stop = stop or Stop()
        # its steps are never followed: within a recording time goes on evenly, whatever is done to the wall clock
        self._clock = clock or LedgerClock()
        self._look = look
        self._open_gpus = open_gpus
        self._engines: dict[str, EngineRecording] = {}
        self._bodies: dict[str, _Kept[bytes]] = {}
        self._fault: RecordingError | None = None
        self._is_full = False
        self._lacking: set[str] = set()
        self._sampling: threading.Thread | None = None
        self._search = _Search(self._look_apart, config.scrape.discover_every_seconds)

    def run(self, *, duration_seconds: float | None) -> Recorded:
        """Record to the end. RecordingError if no engine is found, or its folder cannot be written, or no longer.

        What was written until then is whole and can be replayed.
        """
        with ExitStack() as stack:
            if self._hears_signals:
                stack.enter_context(told_by_signals(self._stop))
            nvml = self._open_gpus(self._config)
            stack.callback(self._release, nvml)
            found = self._look(self._config, nvml)
            present = self._present(nvml)
            self._sources = Sources(self._config, None)
            stack.callback(self._sources.close)
            self._sources.take(found)
            stack.callback(self._close)
            self._begin(found, present)
            self._gatherer = Gatherer(self._clock.now_ns)
            stack.callback(self._gatherer.close)
            self._gatherer.use(list(self._bodies.values()), [])
            stack.callback(self._end_threads)
            if nvml is not None:
                self._sampling = threading.Thread(target=self._sample_gpus, args=(nvml,), name="gpus", daemon=True)
                self._sampling.start()
            is_over = self._loop(duration_seconds)
        recorded = self._recorded(is_over=is_over)
        level: Literal["info", "warning"] = "warning" if self._is_full or self._fault else "info"
        self._log.line(level, "recorded", folder=self._folder, holds=str(recorded))
        if self._fault is not None:
            raise self._fault
        return recorded

    def _present(self, nvml: NvmlCollector | None) -> dict[str, GpuSample]:
        """Which GPUs there are, by UUID; none where they do not answer."""
        if nvml is None:
            return {}
        try:
            samples = nvml.sample()
            nvml.close()
            nvml.compute_pids()  # opened anew, so that the first sample that is kept holds the dear values too
        except (NoData, CollectError) as error:
            self._log.line("warning", str(error), hint=error.hint or None)
            return {}
        return {sample.uuid: sample for sample in samples}

    def _begin(self, found: Found, present: dict[str, GpuSample]) -> None:
        """Open a folder for every engine; RecordingError if there is no engine, or a folder is in use."""
        pages = self._sources.engines
        if not pages:
            ports = ", ".join(map(str, self._config.scrape.ports)) or "(none)"
            hint = "start one, or name it in kvtally.toml: [[engine]] url = …"
            raise RecordingError(f"no vLLM engine found on ports {ports}", hint)
        top = self._folder.resolve().name
        places = [(top, self._folder)]
        if len(pages) > 1:
            if self._folder.is_dir() and any(self._folder.iterdir()):
                raise RecordingError(f"{self._folder} is not empty", "name a new folder for each recording")
            names = folder_names([page.name for page in pages])
            places = [(f"{top}-{name}", self._folder / name) for name in names]
            self._log.line("info", f"{len(pages)} engines: each is recorded into a folder of its own")
        for page, (name, folder) in zip(pages, places, strict=True):
            about = self._sources.abouts[page.name]
            # each of several keeps its own GPUs alone: in the others' recordings they would seem to be free
            only = None if len(pages) == 1 or about.gpus is None else frozenset(about.gpus)
            meta = meta_of(name, page.name, about, present, self._clock.now_ns())
            meta |= {
                "interval_seconds": self._config.scrape.interval_seconds,
                "gpu_every_seconds": self._gpu_every_seconds if present else None,
            }
            engine = self._engines[page.source] = EngineRecording(folder, meta, only)
            self._bodies[page.source] = _Kept(page.source, page.page)
            self._learn(engine, found)
            gpus = None if about.gpus is None else len(about.gpus)
            self._log.line("info", "recording", target=page.name, folder=folder, version=engine.version, gpus=gpus)

    def _loop(self, duration_seconds: float | None) -> bool:
        """Tick to the end; whether it came because the time is over."""
        cadence = Cadence(self._config.scrape.interval_seconds, duration_seconds)
        told_at = time.monotonic()
        is_last = False
        while True:
            try:
                self._tick()
            except RecordingError as error:
                self._give_up(error)
            if is_last or self._stop.is_set():
                return not self._stop.is_set()
            if time.monotonic() - told_at >= MINUTE_SECONDS:
                told_at = time.monotonic()
                self._log.line("info", "minute", **self._totals())
            is_last = cadence.wait(self._stop)

    def _tick(self) -> None:
        self._host()
        timeout_seconds = min(self._config.scrape.timeout_seconds, self._config.scrape.interval_seconds) + 0.5
        for one in self._gatherer.gather(timeout_seconds):
            engine, body = self._engines[one.source], self._bodies[one.source].answer
            if one.outcome != "ok" or body is None:
                engine.failure(one.taken_at_ns, "vllm", one.took_seconds, one.reason)
                self._log.complain("warning", one.reason, target=engine.target, hint=one.hint or None)
            elif self._has_room(len(body)):
                engine.page(one.taken_at_ns, one.took_seconds, body)
                self._see_process(engine, body)
        self._has_room(0)
        finding = self._clock.take_finding()
        step = self._clock.step
        if finding or step:
            self._log.complain("warning", "the clock was set: the recording's own time goes on evenly")
        found = self._search.result()
        if found is not None:
            self._take(found)

    def _has_room(self, more_bytes: int) -> bool:
        if sum(one.bytes_written for one in self._engines.values()) + more_bytes > self._max_bytes:
            self._is_full = True
            self._stop.set()
        return not self._is_full

    def _host(self) -> None:
        readers = {one.source: one for one in self._sources.prompt if isinstance(one, ProcessTree | BlockDevices)}
        for engine in self._engines.values():
            t_ns = self._clock.now_ns()
            line: dict[str, Any] = {}
            took_seconds = 0.0
            for key, source in (("processes", f"process:{engine.target}"), ("disks", BlockDevices.source)):
                if source in readers:
                    kept = _Kept(source, readers[source].sample)
                    one = scrape(kept, self._clock.now_ns)
                    took_seconds += one.took_seconds
                    if one.outcome == "ok":
                        line[key] = kept.answer
                    self._host_outcome(engine, one)
            if line:
                engine.host(t_ns, took_seconds, {**line, "memory_kib": _memory_kib()})

    def _host_outcome(self, engine: EngineRecording, one: Scrape) -> None:
        if one.outcome == "failed":
            engine.failure(one.taken_at_ns, "host", one.took_seconds, one.reason)
            self._log.complain("warning", one.reason, source=one.source, hint=one.hint or None)
        elif one.outcome == "ok":
            self._lacking.discard(one.source)
        else:
            if one.source.startswith("process:"):
                self._search.begin()  # it may have been started anew
            if one.source not in self._lacking:
                self._lacking.add(one.source)
                self._log.line("warning", one.reason, source=one.source, hint=one.hint or None)
