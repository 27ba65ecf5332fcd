"""Records live engines: whole pages, GPU and host samples at an even cadence, for a replay that tells the same."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.agent.cadence import Cadence, Stop, told_by_signals
from kvtally.agent.clock import LedgerClock
from kvtally.agent.engine_recording import EngineRecording, folder_names, meta_of
from kvtally.agent.gather import Gatherer
from kvtally.agent.look import look_around, open_nvml
from kvtally.agent.process_watch import ProcessWatch
from kvtally.agent.raw_sources import GpuSampling, Kept, host_line
from kvtally.agent.recording_members import RecordingError
from kvtally.agent.sources import Sources, keeps_kv
from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.registry import sources_on

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from kvtally.agent.config import Config
    from kvtally.agent.log import Log
    from kvtally.agent.look import Found
    from kvtally.collectors.base import Scrape
    from kvtally.collectors.gpu import GpuSample
    from kvtally.collectors.nvml import NvmlCollector
    from kvtally.collectors.side_page import SidePage

MAX_BYTES = 2 << 30  # a day of 5 s scrapes of one engine
MINUTE_SECONDS = 60.0
PATIENCE_SECONDS = 2.0  # for a driver at the end; a thread that hangs in it ends with the process

Ending = Literal["told to stop", "the time is over", "the size limit is reached", "it cannot be written"]


class Recorded(NamedTuple):
    """What was recorded, all engines together."""

    folders: tuple[Path, ...]
    pages: int
    failed_scrapes: int
    gpu_lines: int
    bytes_written: int
    ended_by: Ending

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
        self._pages: dict[str, Kept[bytes]] = {}
        self._caches: dict[str, str] = {}  # engine -> the source of the cache's page that lies beside its own
        self._fault: RecordingError | None = None
        self._is_full = False
        self._lacking: set[str] = set()
        self._sampling: GpuSampling | None = None

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
            self._watch = ProcessWatch(self._config, self._sources, self._engines, self._log, self._look_apart)
            self._begin(found, present)
            self._gatherer = Gatherer(self._clock.now_ns)
            stack.callback(self._gatherer.close)
            self._beside = {page.source: page for page in self._sources.pages}
            self._pages |= {source: Kept(source, page.page) for source, page in self._beside.items()}
            self._gatherer.use(list(self._pages.values()), [])
            stack.callback(self._end_threads)
            if nvml is not None:
                every_seconds = self._gpu_every_seconds
                self._sampling = GpuSampling(nvml, every_seconds, self._clock.now_ns, self._take_gpus, self._stop)
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
            raise RecordingError(f"no engine found on ports {ports}", hint)
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
            meta["interval_seconds"] = self._config.scrape.interval_seconds
            engine = self._engines[page.source] = EngineRecording(folder, meta, only)
            self._pages[page.source] = Kept(page.source, page.page)
            self._watch.learn(engine, found)
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
                self._log.line("info", "minute", recorded=str(self._recorded(is_over=False)).partition(";")[0])
            is_last = cadence.wait(self._stop)

    def _tick(self) -> None:
        for engine in self._engines.values():
            self._read_host(engine)
        for one in self._gatherer.gather(self._config.scrape.answer_seconds):
            body = self._pages[one.source].answer
            if one.source in self._beside:
                self._take_cache(self._beside[one.source], one, body)
                continue
            engine = self._engines[one.source]
            if one.outcome != "ok" or body is None:
                engine.failure(one.taken_at_ns, "vllm", one.took_seconds, one.reason)
                self._log.complain("warning", one.reason, target=engine.target, hint=one.hint or None)
            elif self._has_room(len(body)):
                engine.page(one.taken_at_ns, one.took_seconds, body)
                self._watch.see_page(engine, body)
        self._has_room(0)
        if self._clock.take_finding() or self._clock.step:
            self._log.complain("warning", "the clock was set; the recording's own time goes on evenly")
        self._watch.take_look()

    def _take_cache(self, page: SidePage, taken: Scrape, body: bytes | None) -> None:
        """Write a cache's own page into the recording of every engine that it serves; other pages are not kept.

        A recording has room for one page beside the engine's: the first one that serves it.
        """
        if body is not None and keeps_kv(sources_on(body)):
            for name in page.engines:
                if self._caches.setdefault(name, page.source) != page.source:
                    reason = (
                        "a second cache of an engine is not recorded: a recording holds one page beside the engine's"
                    )
                    self._log.complain("warning", reason, target=name, source=page.source)
        if taken.outcome != "ok":
            self._log.complain("warning", taken.reason, source=page.source, hint=taken.hint or None)
        for engine in self._engines.values():
            if self._caches.get(engine.target) != page.source:
                continue
            if taken.outcome != "ok" or body is None:
                engine.failure(taken.taken_at_ns, "lmcache", taken.took_seconds, taken.reason)
            elif self._has_room(len(body)):
                engine.page(taken.taken_at_ns, taken.took_seconds, body, "lmcache")

    def _has_room(self, more_bytes: int) -> bool:
        if sum(engine.bytes_written for engine in self._engines.values()) + more_bytes > self._max_bytes:
            self._is_full = True
            self._stop.set()
        return not self._is_full

    def _read_host(self, engine: EngineRecording) -> None:
        began_ns = self._clock.now_ns()
        line, outcomes = host_line(engine.target, self._sources.prompt, self._clock.now_ns)
        if line:
            engine.host(began_ns, sum(one.took_seconds for one in outcomes), line)
        for one in outcomes:
            if one.outcome == "ok":
                self._lacking.discard(one.source)
            elif one.outcome == "failed":
                engine.failure(one.taken_at_ns, "host", one.took_seconds, one.reason)
                self._log.complain("warning", one.reason, source=one.source, hint=one.hint or None)
            else:
                if one.source not in self._lacking:
                    self._lacking.add(one.source)
                    self._log.line("warning", one.reason, source=one.source, hint=one.hint or None)
                if one.source == f"process:{engine.target}":
                    self._watch.lost()  # the engine may run again as another process

    def _take_gpus(self, began_ns: int, outcome: Scrape, samples: list[GpuSample]) -> None:
        """Write one sampling; called in the thread of the GPUs."""
        try:
            for engine in self._engines.values():
                if outcome.outcome == "ok":
                    engine.gpus(began_ns, outcome.took_seconds, samples)
                else:
                    engine.failure(outcome.taken_at_ns, "gpu", outcome.took_seconds, outcome.reason)
                    self._log.complain("warning", outcome.reason, hint=outcome.hint or None)
        except RecordingError as error:
            self._give_up(error)

    def _look_apart(self) -> Found:
        # the thread of the GPUs has its own handle, whose turns this look leaves alone
        nvml = self._open_gpus(self._config)
        try:
            return self._look(self._config, nvml)
        finally:
            if nvml is not None:
                nvml.close()

    def _give_up(self, error: RecordingError) -> None:
        self._fault = self._fault or error
        self._stop.set()

    def _end_threads(self) -> None:
        self._stop.set()
        if self._sampling is not None:
            self._sampling.join(PATIENCE_SECONDS)
        self._watch.end()

    def _release(self, nvml: NvmlCollector | None) -> None:
        if nvml is not None and (self._sampling is None or not self._sampling.is_alive()):
            nvml.close()

    def _close(self) -> None:
        for engine in self._engines.values():
            engine.close(self._clock.now_ns())

    def _recorded(self, *, is_over: bool) -> Recorded:
        engines = self._engines.values()
        ended_by: Ending = "the time is over" if is_over else "told to stop"
        if self._is_full:
            ended_by = "the size limit is reached"
        if self._fault is not None:
            ended_by = "it cannot be written"
        return Recorded(
            tuple(engine.folder for engine in engines),
            sum(engine.pages for engine in engines),
            sum(engine.failed_scrapes for engine in engines),
            sum(engine.gpu_lines for engine in engines),
            sum(engine.bytes_written for engine in engines),
            ended_by,
        )
