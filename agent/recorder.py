"""Records live engines: whole pages, GPU and host samples at an even cadence, for a replay that tells the same."""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from kvtally import __version__
from kvtally.agent.cadence import Cadence, Stop, told_by_signals
from kvtally.agent.clock import LedgerClock
from kvtally.agent.discovery import BIRTH
from kvtally.agent.engine_recording import EngineRecording, folder_names
from kvtally.agent.gather import Gatherer
from kvtally.agent.recording_members import RecordingError
from kvtally.agent.sources import Sources, look_around, open_nvml, probe
from kvtally.collectors.base import CollectError, NoData, scrape
from kvtally.collectors.filesystem import BlockDevices
from kvtally.collectors.host import ProcessTree

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from kvtally.agent.config import Config
    from kvtally.agent.discovery import FoundEngine
    from kvtally.agent.log import Log
    from kvtally.agent.sources import Found
    from kvtally.collectors.base import Scrape
    from kvtally.collectors.engine_page import EnginePage
    from kvtally.collectors.gpu import GpuSample
    from kvtally.collectors.nvml import NvmlCollector

MAX_BYTES = 2 << 30  # a day of 5 s scrapes of one engine
MINUTE_SECONDS = 60.0
DRIVER_PATIENCE_SECONDS = 2.0
MEMORY_FIELDS = ("MemFree", "MemAvailable", "Cached")

Ending = Literal["told to stop", "the time is over", "the size limit is reached"]
Answer = TypeVar("Answer")


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


class Kept(Generic[Answer]):
    """A collector that keeps what its source answers, as it is."""

    def __init__(self, source: str, read: Callable[[], Answer]) -> None:
        self.source = source
        self.answer: Answer | None = None
        self._read = read

    def collect(self) -> tuple[()]:
        """Read now; `answer` is None where that fails."""
        self.answer = None
        self.answer = self._read()
        return ()


class Recorder:
    """Writes a recording of every engine that is found at the start, until it is told to stop.

    max_bytes          ends the recording before its files are larger, all together
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
        proc: str = "/proc",
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
        self._proc = proc
        self._engines: dict[str, EngineRecording] = {}
        self._pages: dict[str, Kept[bytes]] = {}
        self._fault: RecordingError | None = None
        self._is_full = False
        self._lacking: set[str] = set()
        self._looking: threading.Thread | None = None
        self._found: Found | None = None
        self._is_look_due = False
        self._looked_at = 0.0

    def run(self, *, duration_seconds: float | None) -> Recorded:
        """Record to the end. RecordingError if no engine is found, or its folder cannot be written, or no longer.

        What was written until then is whole and can be replayed.
        """
        with ExitStack() as stack:
            if self._hears_signals:
                stack.enter_context(told_by_signals(self._stop))
            nvml = self._open_gpus(self._config)
            if nvml is not None:
                stack.callback(nvml.close)
            found = self._look(self._config, nvml)
            gpus = self._present(nvml)
            self._sources = Sources(self._config, None)
            stack.callback(self._sources.close)
            self._sources.take(found)
            self._begin(found, gpus, stack)
            self._gatherer = Gatherer(self._clock.now_ns)
            stack.callback(self._gatherer.close)
            self._gatherer.use(list(self._pages.values()), [])
            stack.callback(self._stop.set)
            thread = self._start_gpus(nvml)
            is_over = self._loop(duration_seconds)
            self._stop.set()
            if thread is not None:
                thread.join(DRIVER_PATIENCE_SECONDS)
        ended_by: Ending = "the time is over" if is_over else "told to stop"
        recorded = self._recorded("the size limit is reached" if self._is_full else ended_by)
        level: Literal["info", "warning"] = "warning" if self._is_full or self._fault else "info"
        self._log.line(level, "recorded", folder=self._folder, holds=str(recorded))
        if self._fault is not None:
            raise self._fault
        return recorded

    def _present(self, nvml: NvmlCollector | None) -> list[GpuSample]:
        """Which GPUs there are; none where they do not answer."""
        if nvml is None:
            return []
        try:
            samples = nvml.sample()
            nvml.close()
            nvml.compute_pids()  # opened anew, so that the first sample that is kept holds the dear values too
        except (NoData, CollectError) as error:
            self._log.line("warning", str(error), hint=error.hint or None)
            return []
        return samples

    def _begin(self, found: Found, gpus: Sequence[GpuSample], stack: ExitStack) -> None:
        """Open a folder for every engine; RecordingError if there is none, or a folder is in use."""
        pages = self._sources.engines
        if not pages:
            ports = ", ".join(map(str, self._config.scrape.ports)) or "(none)"
            hint = "start one, or name it in kvtally.toml: [[engine]] url = …"
            raise RecordingError(f"no vLLM engine found on ports {ports}", hint)
        folders = [self._folder]
        top = self._folder.resolve().name
        if len(pages) > 1:
            if self._folder.is_dir() and any(self._folder.iterdir()):
                raise RecordingError(f"{self._folder} is not empty", "name a new folder for each recording")
            folders = [self._folder / name for name in folder_names([page.name for page in pages])]
            self._log.line("info", f"{len(pages)} engines: each is recorded into a folder of its own")
        present = {sample.uuid: sample for sample in gpus}
        for page, folder in zip(pages, folders, strict=True):
            about = self._sources.abouts[page.name]
            # each of several holds its own GPUs alone: in the others they would seem to be free
            only = None if len(pages) == 1 or about.gpus is None else frozenset(about.gpus)
            meta = {
                "name": top if folder is self._folder else f"{top}-{folder.name}",
                "engine": "vllm",
                "engine_version": None,
                "engine_args": None,
                "model": None,
                "gpus": None if about.gpus is None else [_gpu(uuid, present.get(uuid)) for uuid in about.gpus],
                "gpus_per_replica": about.per_replica,
                "labels": dict(about.labels),
                "target": page.name,
                "mapping": about.mapping,
                "interval_seconds": self._config.scrape.interval_seconds,
                "gpu_every_seconds": self._gpu_every_seconds,
                "recorded_by": f"kvtally {__version__}",
                "recorded": {"start": self._clock.now_ns() / 1e9, "end": None},
            }
            engine = self._engines[page.name] = EngineRecording(folder, meta, only)
            stack.callback(self._close, engine)
            self._pages[page.name] = Kept(page.source, page.page)
            self._learn(engine, found)
            count = None if about.gpus is None else len(about.gpus)
            self._log.line("info", "recording", target=page.name, folder=folder, version=engine.version, gpus=count)

