"""The sidecar: scrape, close, append, at an even cadence, until it is told to stop."""

from __future__ import annotations

import gc
import math
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING

from kvtally.agent.cadence import Cadence, Stop, told_by_signals
from kvtally.agent.child import Child
from kvtally.agent.clock import LedgerClock, elapsed_ns
from kvtally.agent.exporting import Exporting
from kvtally.agent.gather import Gatherer
from kvtally.agent.health import Health, file_bytes, resident_bytes
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.errors import LedgerError, LedgerLost, LedgerUnreachable
from kvtally.agent.ledger.place import WriterLock, check_whole, connect, file_of, is_current
from kvtally.agent.look import Found, look_around, open_nvml
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.replica import About, Describer
from kvtally.agent.sources import Sources
from kvtally.agent.target_files import TargetFiles

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.log import Level, Log
    from kvtally.agent.pipeline import Tick
    from kvtally.collectors.base import Scrape

MINUTE_SECONDS = 60.0
FIRST_LOOK_SECONDS = 3.0  # a look is waited for this long at the start: ports that hang hold up no engine
FIRST_LOOKS_SECONDS = 10.0  # while no engine is known, look for one this often
SETTLED_LOOKS_SECONDS = 3600.0  # where config lists the engines and all are found: only a restart tells anything new
NEXT_LOOK_SECONDS = 5.0  # when another process answers, look no sooner than this after the last look
LOOK_HANGS = "the look around this host does not end: engines that come or go are not seen"
LOOK_SECONDS = 300.0  # a look that takes longer hangs: 256 ports that answer nothing take a second each
SETTLE_SECONDS = 3600.0  # a child costs 0.4 s of CPU; until it has run, reports work the hour out themselves
COMMIT_SECONDS = 5.0  # ticks of so much time share a transaction: a kill costs their grain, never their tokens
_LEVEL: dict[str, Level] = {"info": "info", "warning": "warning", "error": "error"}
_WORDS = {"failed": "could not be read", "no_data": "has no data"}
_HINT = "the next good scrape covers the gap; `kvtally doctor` looks closer"


class Daemon:
    """One run over one ledger."""

    def __init__(
        self,
        config: Config,
        url: str,
        log: Log,
        config_path: str | None = None,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        steady_ns: Callable[[], int] = elapsed_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`wall_ns` and `steady_ns` make the ledger's time, `monotonic` times what is done beside the ticks."""
        self._config = config
        self._url = url
        self._config_path = config_path
        self._path = file_of(url)
        self._log = log
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        self._monotonic = monotonic
        self._stop = Stop()
        self._child: Child | None = None
        self._look: threading.Thread | None = None
        self._found: Found | None = None
        self._files = TargetFiles(config)
        self._gpu_count: int | None = None
        self._told: dict[str, About] = {}
        self._looked_at = -math.inf
        self._must_look = False
        self._is_settled = False
        self._settled_at = monotonic()
        self._minute = _Minute(monotonic)

    def run(self, *, once: bool = False) -> None:
        """Run until SIGTERM or SIGINT; `once` closes one interval and returns.

        LedgerError if there is no ledger, LedgerLost if it is gone or another's: whoever starts this again goes on from
        what is there then.
        """
        with closing(connect(self._path)) as connection:
            current = is_current(connection, self._path)
            check_whole(connection, self._path)
        # the lock comes before an upgrade: nobody may change the tables under another run
        with told_by_signals(self._stop), WriterLock(self._path):
            if not current:
                self._make_ledger()
            with closing(self._writer()) as writer:
                self._begin(writer)
                # what is loaded now stays: the collector need not walk it again on every few ticks
                gc.collect()
                gc.freeze()
                try:
                    self._loop(once=once)
                finally:
                    self._exporting.close()
                    self._gatherer.close()
            self._exporting.push_last()
        self._log.line("info", "stopped", ledger=self._path)

    def _writer(self) -> LedgerWriter:
        together = max(1, int(COMMIT_SECONDS / self._config.scrape.interval_seconds))
        return LedgerWriter(connect(self._path), self._path, together)

    def _begin(self, writer: LedgerWriter) -> None:
        """Build the way from the sources to the ledger; go on from the counters that it has."""
        states = writer.states()
        newest_ns = max((state.taken_at_ns for state in states.values()), default=0)
        self._clock = LedgerClock(self._wall_ns, self._steady_ns, newest_ns)
        self._sources = Sources(self._config, open_nvml(self._config))
        self._gatherer = Gatherer(self._clock.now_ns)
        self._gatherer.use(self._sources.may_hang, self._sources.prompt)
        self._describer = Describer(self._sources.abouts, About())
        self._pipeline = Pipeline(
            writer,
            states,
            self._describer,
            interval_ns=round(self._config.scrape.interval_seconds * 1e9),
            started_ns=self._clock.now_ns(),
        )
        self._health = Health(self._path)
        self._exporting = Exporting(self._config, self._options(), self._health, self._log)
        self._begin_look().join(FIRST_LOOK_SECONDS)
        self._take_look()
        self._greet()

    def _options(self) -> tuple[str, ...]:
        """Those that name the ledger and the config to a child."""
        return ("--ledger", self._url, *(("--config", self._config_path) if self._config_path else ()))

    def _make_ledger(self) -> None:
        """Create the ledger or bring it up to date, in a child: alembic would stay in memory for good."""
        child = Child("ledger", "upgrade", "--ledger", self._url)
        if child.wait():
            raise LedgerUnreachable(f"{self._path}: the ledger could not be made", f"see `{child.command}`")

    def _greet(self) -> None:
        scrape = self._config.scrape
        self._tell_engines()
        if not self._sources.engines:
            self._log.line(
                "warning",
                "no engine found yet; looking again every 10 s. Name one in kvtally.toml: [[engine]] url = …",
                ports=",".join(str(port) for port in scrape.ports),
            )
        port = self._exporting.port
        self._log.line(
            "info",
            "started",
            ledger=self._path,
            interval_seconds=scrape.interval_seconds,
            gpus=self._gpu_count,
            metrics=None if port is None else f"{self._config.export.prometheus.listen.rpartition(':')[0]}:{port}",
        )

    def _tell_engines(self) -> None:
        """Tell of every engine that is new, or of which something else is known now."""
        for name, about in self._sources.abouts.items():
            if self._told.get(name) != about:
                gpus = None if about.gpus is None else len(about.gpus)
                self._log.line("info", "engine", target=name, gpus=gpus, mapping=about.mapping)
        self._told = dict(self._sources.abouts)

    def _loop(self, *, once: bool) -> None:
        cadence = Cadence(self._config.scrape.interval_seconds)
        while True:
            self._tick()
            if cadence.wait(self._stop) or once:
                # one last interval, so that what was counted until the word to stop is in the ledger
                self._tick()
                return
            self._chores()

    def _tick(self) -> None:
        scrapes = self._gatherer.gather(self._config.scrape.answer_seconds)
        finding = self._clock.take_finding()
        tick = self._pipeline.tick(scrapes, [finding] if finding else [])
        self._tell(scrapes, tick)
        if isinstance(tick.error, LedgerLost):
            raise tick.error
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
        # what is told once a minute is told by source: a reason may read otherwise at every tick
        for one in scrapes:
            if one.outcome != "ok":
                level: Level = "warning" if one.outcome == "failed" else "debug"
                self._log.complain(
                    level, f"{one.source} {_WORDS[one.outcome]}", reason=one.reason, hint=one.hint or _HINT
                )
        if tick.error is not None:
            self._log.complain("error", str(tick.error), hint=tick.error.hint or None)
        for finding in (*tick.findings, *(finding for closed in tick.closed for finding in closed.findings)):
            about = f"{finding.kind} {finding.target}".rstrip()
            self._log.complain(_LEVEL[finding.severity], about, finding=finding.message)
            # another process answers: see which
            self._must_look |= finding.kind in {"tokens_lost", "engine_restarted", "scrapes_failed"}
        self._minute.add(scrapes, tick)
        self._health.add(scrapes, tick)

    def _chores(self) -> None:
        """What is done between two ticks, none of it for long."""
        now = self._monotonic()
        self._take_look()
        if self._look is not None and now - self._looked_at >= LOOK_SECONDS:
            # a model's config on a filesystem that is gone, say: nothing can end that thread
            self._log.complain("warning", LOOK_HANGS, seconds=round(now - self._looked_at))
        every = self._config.scrape.discover_every_seconds
        if not self._sources.engines:
            every = min(every, FIRST_LOOKS_SECONDS)
        elif self._is_settled:
            every = max(every, SETTLED_LOOKS_SECONDS)
        if self._must_look or self._files.has_changed():
            every = min(every, NEXT_LOOK_SECONDS)
        if self._look is None and now - self._looked_at >= every:
            self._begin_look()
        if now - self._minute.since >= MINUTE_SECONDS:
            self._log.line("info", "minute", **self._minute.fields(self._path))
            self._minute = _Minute(self._monotonic)
        self._settle(now)
        self._exporting.look()

    def _settle(self, now: float) -> None:
        """Have the hours that are over settled, in a child."""
        if self._child is not None:
            status = self._child.poll()
            if status:
                self._log.line("warning", f"`{self._child.command}` ended with {status}")
            if status is not None:
                self._child = None
        elif now - self._settled_at >= SETTLE_SECONDS:
            self._settled_at = now
            try:
                self._child = Child("ledger", "settle", "--quiet", "--prune", *self._options())
            except OSError as error:  # no memory or no process is left: the next one will do
                self._log.complain("warning", "the hours that are over could not be settled", reason=str(error))

    def _begin_look(self) -> threading.Thread:
        self._looked_at = self._monotonic()
        self._must_look = False
        self._look = threading.Thread(target=self._look_around, name="discovery", daemon=True)
        self._look.start()
        return self._look

    def _look_around(self) -> None:
        # the collector's own thread owns its handle; one for this look does not disturb its sums
        nvml = open_nvml(self._config)
        try:
            self._found = look_around(self._config, nvml, self._files)
        except OSError as error:
            self._log.complain("warning", "no look around this host", reason=str(error))
        finally:
            if nvml is not None:
                nvml.close()

    def _take_look(self) -> None:
        if self._look is None or self._look.is_alive():
            return
        self._look = None
        found, self._found = self._found, None
        if found is None:
            return
        for complaint in found.complaints:
            self._log.line("warning", complaint)
        located = sum(one.pid is not None for one in found.engines)
        listed = len((found.config or self._config).engines)
        self._is_settled = not self._config.scrape.discover and located == listed
        self._gpu_count = None if found.gpu_indices is None else len(found.gpu_indices)
        if self._sources.take(found):
            self._gatherer.use(self._sources.may_hang, self._sources.prompt)
        self._describer.learn(self._sources.abouts)
        self._tell_engines()


class _Minute:
    """What the line of a minute tells."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self.since = monotonic()
        self._cpu = time.process_time()
        self._intervals = self._failed = self._prompt = self._generated = 0
        self._known = self._computed = 0  # of the prompts whose sources are known
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
                self._generated += generated or 0
                if prompt is not None and computed is not None:
                    self._known += prompt
                    self._computed += computed

    def fields(self, path: str) -> dict[str, object]:
        """The line's fields; the share of reuse only where there were prompts whose sources are known."""
        seconds = self._monotonic() - self.since
        return {
            "engines": len(self._engines),
            "intervals": self._intervals,
            "failed_scrapes": self._failed,
            "prompt_tokens": self._prompt,
            "generated_tokens": self._generated,
            "reused": f"{1 - self._computed / self._known:.1%}" if self._known else None,
            "cpu_percent": round(100 * (time.process_time() - self._cpu) / seconds, 2),
            "rss_mib": _mib(resident_bytes(), 1),
            "ledger_mib": _mib(file_bytes(path), 2),
        }


def _mib(size_bytes: int | None, places: int) -> float | None:
    return None if size_bytes is None else round(size_bytes / 2**20, places)
