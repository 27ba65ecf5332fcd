"""One engine's recording: its folder, what is written there, and how much that is."""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from kvtally import __version__
from kvtally.agent.engine_process import arguments_of, model_shape
from kvtally.agent.recording_members import LINE_FILES, RecordingError
from kvtally.agent.recording_writer import RecordingWriter
from kvtally.collectors.gpu import format_line
from kvtally.collectors.registry import SOURCES, sources_on

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from kvtally.agent.discovery import FoundEngine
    from kvtally.agent.replica import About
    from kvtally.collectors.gpu import GpuSample


class EngineRecording:
    """Writes one recording; several threads may call it. RecordingError where the folder cannot be written.

    meta       what is known at the start, "target" and "recorded" in it; None for what may be learnt later
    only_gpus  UUIDs of the GPUs whose samples are kept; None: all
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any], only_gpus: frozenset[str] | None = None) -> None:
        self.folder = folder
        self.target = str(meta["target"])
        self.pages = self.failed_scrapes = self.gpu_lines = 0
        self._page_bytes = 0
        self._only_gpus = only_gpus
        self._meta = dict(meta)
        self._lock = threading.Lock()
        self._writer: RecordingWriter | None = RecordingWriter(folder, meta)

    @property
    def version(self) -> str | None:
        """The engine's version, as far as it is known."""
        return self._meta.get("engine_version")

    @property
    def bytes_written(self) -> int:
        """Size of all its files."""
        total = self._page_bytes
        for name in (*LINE_FILES, "meta.json"):
            with suppress(FileNotFoundError):
                total += (self.folder / name).stat().st_size
        return total

    def page(self, t_ns: int, took_seconds: float, body: bytes, source: Literal["vllm", "lmcache"] = "vllm") -> None:
        """Write a page, and that it was read; "lmcache": of a cache that serves this engine."""
        if source == "vllm" and self._meta.get("engine") is None:
            self.learn(engine=next((name for name in sources_on(body) if SOURCES[name].is_engine), None))
        with self._lock:
            if self._writer is not None:
                self._writer.page(source, t_ns, body)
                self.pages += source == "vllm"
                self._page_bytes += len(body)
                self._writer.scrape_ok(t_ns, source, took_seconds)

    def failure(self, t_ns: int, source: str, took_seconds: float, reason: str) -> None:
        """Write that a source ("vllm", "lmcache", "gpu", "host") could not be read."""
        with self._lock:
            if self._writer is not None:
                self._writer.failure(t_ns, source, took_seconds, reason)
                self.failed_scrapes += 1

    def gpus(self, t_ns: int, took_seconds: float, samples: Iterable[GpuSample]) -> None:
        """Write the samples of one instant, those of other engines' GPUs left out."""
        own = [sample for sample in samples if self._only_gpus is None or sample.uuid in self._only_gpus]
        with self._lock:
            if self._writer is not None and own:
                self._writer.gpu({**format_line(own), "t": _exact_seconds(t_ns)})
                self.gpu_lines += 1
                self._writer.scrape_ok(t_ns, "gpu", took_seconds)

    def host(self, t_ns: int, took_seconds: float, line: Mapping[str, Any]) -> None:
        """Write what its processes and the disks have counted."""
        with self._lock:
            if self._writer is not None:
                self._writer.host({"t": _exact_seconds(t_ns), **line})
                self._writer.scrape_ok(t_ns, "host", took_seconds)

    def learn(self, **fields: Any) -> None:
        """Fill in what meta.json does not tell yet; None is nothing to tell."""
        new = {key: value for key, value in fields.items() if value is not None and self._meta.get(key) is None}
        if new:
            self._update(new)

    def learn_process(self, found: FoundEngine | None, pid: int | None, proc: str = "/proc") -> None:
        """Fill in what discovery and the engine's process tell."""
        gpus: list[Any] | None = self._meta.get("gpus")
        has_one_rank = found is not None and found.data_parallel == 1
        if found is not None and pid == found.pid:
            pid = found.command_pid
        self.learn(
            engine=None if found is None else found.engine_kind,
            engine_version=None if found is None else found.version,
            gpus_per_replica=len(gpus) if has_one_rank and gpus is not None else None,
            engine_args=None if pid is None else arguments_of(pid, proc),
            model=None if pid is None else model_shape(pid, proc),
        )

    def close(self, t_ns: int) -> None:
        """Write when it ended, and close the files; what a thread brings later is left out."""
        with suppress(RecordingError):  # on a full disk meta.json stays as it was
            self._update({"recorded": {**self._meta["recorded"], "end": t_ns / 1e9}})
        with self._lock:
            if self._writer is not None:
                self._writer.close()
            self._writer = None

    def _update(self, fields: Mapping[str, Any]) -> None:
        with self._lock:
            if self._writer is not None:
                self._meta |= fields
                self._writer.update_meta(**fields)


def meta_of(name: str, target: str, about: About, gpus: Mapping[str, GpuSample], begun_ns: int) -> dict[str, Any]:
    """What meta.json tells at the start of a recording; `gpus` are those of the host, by UUID."""
    own = None
    if about.gpus is not None:
        samples = [(uuid, gpus.get(uuid)) for uuid in about.gpus]
        own = [
            {"uuid": uuid} if sample is None else {"index": sample.index, "uuid": uuid, "name": sample.name}
            for uuid, sample in samples
        ]
    return {
        "name": name,
        "engine": None,
        "engine_version": None,
        "engine_args": None,
        "model": msgspec.json.decode(about.facts["shape"]) if "shape" in about.facts else None,
        "token_budget": int(about.facts["token_budget"]) if "token_budget" in about.facts else None,
        "connector": about.facts.get("connector"),
        "gpus": own,
        "gpus_per_replica": about.per_replica,
        "mapping": about.mapping,
        "labels": dict(about.labels),
        "target": target,
        "recorded_by": f"kvtally {__version__}",
        "recorded": {"start": begun_ns / 1e9, "end": None},
    }


def folder_names(targets: Sequence[str]) -> list[str]:
    """A folder's name for each target: its own, with "-" for whatever a plain name does not hold, and no two alike."""
    names: list[str] = []
    for target in targets:
        plain = re.sub(r"[^\w.-]+", "-", target).strip("-.")[:100] or "engine"
        name, number = plain, 1
        while name in names:
            number += 1
            name = f"{plain}-{number}"
        names.append(name)
    return names


def _exact_seconds(t_ns: int) -> Decimal:
    return Decimal(t_ns).scaleb(-9)
