"""The sidecar: scrape, close, append, at an even cadence, until it is told to stop."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

from kvtally.agent.cadence import Cadence, Stop
from kvtally.agent.child import Child
from kvtally.agent.clock import LedgerClock
from kvtally.agent.gather import Gatherer
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.errors import LedgerError, LedgerUnreachable
from kvtally.agent.ledger.place import WriterLock, connect, file_of, is_current
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.replica import About, Describer
from kvtally.agent.sources import Found, Sources, look_around, open_nvml

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.log import Level, Log
    from kvtally.agent.pipeline import Tick
    from kvtally.collectors.base import Scrape

MINUTE_SECONDS = 60.0
FIRST_LOOKS_SECONDS = 10.0  # while no engine is known, look for one this often
SETTLE_SECONDS = 900.0
HOUR_SECONDS = 3600.0
_LEVEL: dict[str, Level] = {"info": "info", "warning": "warning", "error": "error"}


class Daemon:
    """One run over one ledger."""

    def __init__(self, config: Config, url: str, log: Log, config_path: str | None = None) -> None:
        self._config = config
        self._url = url
        self._config_path = config_path
        self._path = file_of(url)
        self._log = log
        self._stop = Stop()
        self._child: Child | None = None
        self._look: threading.Thread | None = None
        self._found: Found | None = None
        self._looked_at = -MINUTE_SECONDS
        self._settled_at = time.monotonic()
        self._minute = _Minute()

    def run(self, *, once: bool = False) -> None:
        """Run until SIGTERM or SIGINT; `once` closes one interval and returns. LedgerError if there is no ledger."""
        self._make_ledger()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        with WriterLock(self._path), closing(LedgerWriter(connect(self._path), self._path)) as writer:
            nvml = open_nvml(self._config)
            sources = Sources(self._config, nvml)
            found = look_around(self._config, nvml)
            sources.take(found)
            states = writer.states()
            newest = max((state.taken_at_ns for state in states.values()), default=0)
            self._clock = LedgerClock(floor_ns=newest)
            interval_seconds = self._config.scrape.interval_seconds
            self._sources = sources
            self._describer = Describer(sources.abouts, About())
            self._pipeline = Pipeline(
                writer,
                states,
                self._describer,
                interval_ns=round(interval_seconds * 1e9),
                started_ns=self._clock.now_ns(),
            )
            self._gatherer = Gatherer(self._clock.now_ns)
            self._gatherer.use(sources.may_hang, sources.prompt)
            self._looked_at = time.monotonic()
            self._greet(found)
            try:
                self._loop(interval_seconds, once=once)
            finally:
                self._gatherer.close()
                sources.close()
        self._log.line("info", "stopped", ledger=self._path)

    def _make_ledger(self) -> None:
        """Create the ledger or bring it up to date, in a child: alembic would stay in memory for good."""
        with closing(connect(self._path)) as connection:
            if is_current(connection, self._path):
                return
        child = Child("ledger", "upgrade", "--ledger", self._url)
        if child.wait():
            raise LedgerUnreachable(f"{self._path}: the ledger could not be made", f"see `{child.command}`")

    def _greet(self, found: Found) -> None:
        for engine in self._sources.engines:
            about = self._sources.abouts[engine.name]
            gpus = None if about.gpus is None else len(about.gpus)
            self._log.line("info", "engine", target=engine.name, gpus=gpus, mapping=about.mapping)
        if not self._sources.engines:
            ports = self._config.scrape.ports
            self._log.line(
                "warning",
                "no vLLM engine found yet; looking again every 10 s. Name one in kvtally.toml: [[engine]] url = …",
                ports=",".join(str(port) for port in ports),
            )
        count = None if found.gpu_indices is None else len(found.gpu_indices)
        self._log.line(
            "info", "started", ledger=self._path, interval_seconds=self._config.scrape.interval_seconds, gpus=count
        )

    def _loop(self, interval_seconds: float, *, once: bool) -> None:
        cadence = Cadence(interval_seconds)
        while True:
            self._tick()
            if self._stop.is_set():
                return
            if cadence.wait(self._stop) or once:
                # one last interval, so that what was counted until now is in the ledger
                self._tick()
                return
            self._chores()

    def _tick(self) -> None:
        timeout_seconds = min(self._config.scrape.timeout_seconds, self._config.scrape.interval_seconds) + 0.5
        scrapes = self._gatherer.gather(timeout_seconds)
        finding = self._clock.take_finding()
        tick = self._pipeline.tick(scrapes, [finding] if finding else [])
        self._tell(scrapes, tick)
        step = self._clock.step
        if step is not None:
            try:
                self._pipeline.skip(*step)
            except LedgerError as error:
                self._log.complain("error", str(error), hint=error.hint)
                return
            self._clock.follow()
            self._log.line("warning", step[1].message)

    def _tell(self, scrapes: Sequence[Scrape], tick: Tick) -> None:
        for one in scrapes:
            if one.outcome == "failed":
                self._log.complain("warning", one.reason, hint=one.hint or None)
            elif one.outcome == "no_data":
                self._log.complain("debug", one.reason, source=one.source, hint=one.hint or None)
        if tick.error is not None:
            self._log.complain("error", str(tick.error), hint=tick.error.hint or None)
        for finding in (*tick.findings, *(finding for closed in tick.closed for finding in closed.findings)):
            self._log.complain(_LEVEL[finding.severity], finding.message, finding=finding.kind, target=finding.target)
            if finding.kind in {"tokens_lost", "engine_restarted", "scrapes_failed"}:
                self._looked_at = -MINUTE_SECONDS  # another process answers: see which
        self._minute.add(scrapes, tick)

    def _chores(self) -> None:
        """What is done between two ticks, none of it for long."""
        now = time.monotonic()
        self._take_look()
        every = self._config.scrape.discover_every_seconds
        if not self._sources.engines:
            every = min(every, FIRST_LOOKS_SECONDS)
        if self._look is None and now - self._looked_at >= every:
            self._looked_at = now
            self._look = threading.Thread(target=self._look_around, name="discovery", daemon=True)
            self._look.start()
        if now - self._minute.since >= MINUTE_SECONDS:
            self._log.line("info", "minute", **self._minute.fields(self._path))
            self._minute = _Minute()
        if self._child is not None:
            status = self._child.poll()
            if status:
                self._log.line("warning", f"`{self._child.command}` ended with {status}")
            if status is not None:
                self._child = None
        elif now - self._settled_at >= SETTLE_SECONDS:
            self._settled_at = now
            options = ["--config", self._config_path] if self._config_path else []
            self._child = Child("ledger", "settle", "--quiet", "--prune", "--ledger", self._url, *options)

    def _look_around(self) -> None:
        # the collector's own thread owns its handle; one for this look does not disturb its sums
        nvml = open_nvml(self._config)
        self._found = look_around(self._config, nvml)
        if nvml is not None:
            nvml.close()

    def _take_look(self) -> None:
        if self._look is None or self._look.is_alive():
            return
        self._look = None
        found, self._found = self._found, None
        if found is None:
            return
        known = {engine.name for engine in self._sources.engines}
        if self._sources.take(found):
            self._gatherer.use(self._sources.may_hang, self._sources.prompt)
        self._describer.learn(self._sources.abouts)
        for engine in self._sources.engines:
            if engine.name not in known:
                about = self._sources.abouts[engine.name]
                self._log.line("info", "engine", target=engine.name, mapping=about.mapping)


class _Minute:
    """What the line of a minute tells."""

    def __init__(self) -> None:
        self.since = time.monotonic()
        self._cpu = time.process_time()
        self._intervals = self._failed = self._prompt = self._computed = self._generated = 0
        self._engines: set[str] = set()

    def add(self, scrapes: Sequence[Scrape], tick: Tick) -> None:
        """Count one tick."""
        self._failed += sum(one.outcome == "failed" for one in scrapes)
        for closed in tick.closed:
            if closed.interval is None:
                continue
            self._intervals += 1
            if closed.reading.kind == "engine":
                self._engines.add(closed.reading.name)
                prompt, computed, _, _, generated = closed.interval.values[:5]
                self._prompt += prompt or 0
                self._computed += computed or 0
                self._generated += generated or 0

    def fields(self, path: str) -> dict[str, object]:
        """The line's fields; the share of reuse only where there were prompts."""
        length = time.monotonic() - self.since
        reuse = f"{1 - self._computed / self._prompt:.1%}" if self._prompt and self._computed else None
        return {
            "engines": len(self._engines),
            "intervals": self._intervals,
            "failed_scrapes": self._failed,
            "prompt_tokens": self._prompt,
            "generated_tokens": self._generated,
            "reused": reuse,
            "cpu_percent": round(100 * (time.process_time() - self._cpu) / length, 2),
            "rss_mib": _resident_mib(),
            "ledger_mib": round(os.path.getsize(path) / 2**20, 2),  # noqa: PTH202  # pathlib costs memory
        }


def _resident_mib() -> float | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # as above
            return round(int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)
    except OSError:
        return None
