"""Follows the engines of a recording from one process to the next: their version, their arguments, their pid."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from kvtally.agent.discovery import BIRTH, version_told
from kvtally.agent.look import probe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.config import Config
    from kvtally.agent.engine_recording import EngineRecording
    from kvtally.agent.log import Log
    from kvtally.agent.look import Found
    from kvtally.agent.sources import Sources

PATIENCE_SECONDS = 2.0  # for a look at the end; one that takes longer ends with the process


class ProcessWatch:
    """Tells the recordings what is learnt of their engines, and the sources their pids; for one thread.

    engines  by the source of their page ("engine:127.0.0.1:8000")
    look     a look around this host; it is called in a thread of its own
    """

    def __init__(
        self,
        config: Config,
        sources: Sources,
        engines: Mapping[str, EngineRecording],
        log: Log,
        look: Callable[[], Found],
    ) -> None:
        self._config = config
        self._sources = sources
        self._engines = engines
        self._log = log
        self._look = look
        self._births: dict[str, bytes] = {}
        self._thread: threading.Thread | None = None
        self._found: Found | None = None
        self._looked_at = time.monotonic()

    def learn(self, engine: EngineRecording, found: Found) -> None:
        """Write into meta.json what a look found of one engine."""
        url = self._url(engine)
        own = (one for one in found.engines if one.name == engine.target or url == one.url)
        match = next(own, None)
        given = next((one.pid for one in self._config.engines if one.name == engine.target), None)
        engine.learn_process(match, given or (match.pid if match else None))

    def see_page(self, engine: EngineRecording, body: bytes) -> None:
        """Where a page tells of another process: ask it for its version, and look for its pid."""
        birth = b"\n".join(BIRTH.findall(body))
        before = self._births.get(engine.target)
        self._births[engine.target] = birth
        if birth == before or (before is None and engine.version is not None):
            return
        version = _version(self._url(engine))
        engine.learn(engine_version=version)
        if version is not None and version != engine.version:
            self._log.line(
                "warning",
                f"the engine was {engine.version} and is {version} now; meta.json names the first: record anew",
                target=engine.target,
            )
        self._begin()

    def lost(self) -> None:
        """Look around, since a process is gone; as often as discovery does."""
        if time.monotonic() - self._looked_at >= self._config.scrape.discover_every_seconds:
            self._begin()

    def take_look(self) -> None:
        """Take in what a look found that has ended since."""
        if self._thread is None or self._thread.is_alive():
            return
        found, self._thread, self._found = self._found, None, None
        if found is None:
            return
        self._sources.take(found)
        for engine in self._engines.values():
            self.learn(engine, found)
        for page in self._sources.engines:
            if page.source not in self._engines:
                self._log.complain("warning", "an engine that came later is not recorded", target=page.name)

    def end(self) -> None:
        """Wait a moment for a look that is under way."""
        if self._thread is not None:
            self._thread.join(PATIENCE_SECONDS)

    def _begin(self) -> None:
        if self._thread is None:
            self._looked_at = time.monotonic()
            self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        self._found = self._look()

    def _url(self, engine: EngineRecording) -> str:
        listed = (one.url for one in self._config.engines if one.name == engine.target)
        return next(listed, f"http://{engine.target}/metrics")


def _version(url: str) -> str | None:
    """The version of the server of a page; None where it does not tell."""
    return version_told(probe(urlsplit(url)._replace(path="/version", query="", fragment="").geturl()))
