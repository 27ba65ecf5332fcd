"""Feed a recording through the pipeline, on the recording's own clock."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvtally.agent.engine_process import config_in, facts_of
from kvtally.agent.facts import RECORDED, UNRECORDED
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.recording import Failure, GpuLine, HostLine, Page, Recording, RecordingError
from kvtally.agent.replica import About, Describer
from kvtally.agent.sources import about_of as given_about
from kvtally.agent.sources import by_hand, given_facts
from kvtally.collectors.base import CollectError, NoData, Scrape
from kvtally.collectors.engine_page import EnginePage
from kvtally.collectors.filesystem import disk_readings
from kvtally.collectors.gpu import GpuIntegrator, parse_line
from kvtally.collectors.host import process_reading
from kvtally.collectors.http import Response
from kvtally.collectors.side_page import SidePage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.config import Engine
    from kvtally.agent.finding import Finding
    from kvtally.agent.ledger.append import LedgerWriter

_TOKEN_BUDGET_LIMIT = 1 << 24  # as in a config
_CONNECTOR = re.compile("[A-Za-z0-9_.]{1,200}")  # as in a config
_SLACK_NS = 50_000_000  # a recorded tick that comes a little early still closes its interval


class Replayed(NamedTuple):
    """What a replay did: pages of engines, intervals written, scrapes that the ledger had, pages that nobody reads.

    unread      pages beside the engine's that show no family which kvtally reads
    """

    pages: int
    intervals: int
    skipped: int
    unread: int
    start_ns: int
    end_ns: int
    findings: tuple[Finding, ...]


def about_of(meta: Mapping[str, Any], engine: Engine | None = None) -> About:
    """The replica mapping that a recording's meta.json tells, and how its engine was run.

    What the config says of an `engine` of its name goes before that; ConfigError where its model_config is none.
    """
    recorded = _recorded(meta)
    if engine is None:
        return recorded
    model: Any = meta.get("model")
    if engine.model_config and given_facts(engine):
        model = config_in(Path(engine.model_config))
    told = given_about(engine, None, _facts({**meta, "model": model}) | by_hand(engine))
    told = told._replace(sku=recorded.sku, labels={**recorded.labels, **told.labels})
    if engine.gpus is not None:
        return told
    per_replica = engine.gpus_per_replica or recorded.per_replica
    return told._replace(gpus=recorded.gpus, per_replica=per_replica, mapping=recorded.mapping)


def _recorded(meta: Mapping[str, Any]) -> About:
    gpus = meta.get("gpus")
    facts = _facts(meta)
    if not isinstance(gpus, list):
        return About(mapping=UNRECORDED, facts=facts)
    uuids = tuple(str(gpu["uuid"]) for gpu in gpus if isinstance(gpu, dict) and gpu.get("uuid"))
    names = {str(gpu["name"]) for gpu in gpus if isinstance(gpu, dict) and gpu.get("name")}
    labels = {key: str(value) for key, value in (meta.get("labels") or {}).items()}
    per_replica = meta.get("gpus_per_replica") or None
    sku = names.pop() if len(names) == 1 else ""
    return About(uuids, per_replica, RECORDED, sku, labels=labels, facts=facts)


def _facts(meta: Mapping[str, Any]) -> dict[str, str]:
    told, model = meta.get("engine_args"), meta.get("model")
    arguments = [word for word in told if isinstance(word, str)] if isinstance(told, list) else []
    facts = facts_of(arguments, model if isinstance(model, dict) else None)
    # what the recorder's config said goes before the arguments, as it did there
    budget, connector = meta.get("token_budget"), meta.get("connector")
    if isinstance(budget, int) and not isinstance(budget, bool) and 0 < budget <= _TOKEN_BUDGET_LIMIT:
        facts["token_budget"] = str(budget)
    if isinstance(connector, str) and _CONNECTOR.fullmatch(connector):
        facts["connector"] = connector
    return facts


class _Recorded:
    """A recorded page as an endpoint that serves it."""

    url = "http://recording/metrics"  # it is never asked

    def __init__(self) -> None:
        self.body = b""

    def get(self, target: str | None = None) -> Response:
        """The page; CollectError for any other."""
        if target is not None:
            raise CollectError("a recording holds an engine's metrics alone")
        return Response(200, self.body, "text/plain")

    def close(self) -> None:
        """Nothing is open."""


class Replay:
    """One recording on its way into a ledger."""

    def __init__(
        self, recording: Recording, writer: LedgerWriter, *, interval_ns: int = 0, engine: Engine | None = None
    ) -> None:
        """`interval_ns` joins recorded scrapes until that much time has passed; 0 closes one interval for each.

        engine  what the config says of the recorded one, where it does
        """
        self._recording = recording
        self._interval_ns = interval_ns
        self._writer = writer
        version = recording.meta.get("engine_version")
        self._endpoint = _Recorded()
        self._engine = EnginePage(
            recording.name, self._endpoint, restrict=False, version=version if isinstance(version, str) else None
        )
        about = about_of(recording.meta, engine)
        self._sku = about.sku or None
        self._describe = Describer({}, about)
        self._pipeline: Pipeline | None = None
        self._gpus: GpuIntegrator | None = None
        self._gpu_at_ns = 0
        self._host: HostLine | None = None
        self._last_page_ns: int | None = None
        self._joined_page: Page | None = None  # the newest one, where it lies inside an interval that is not closed yet
        # of the recording's name, as the engine: so both belong together
        self._side_endpoint = _Recorded()
        self._side = SidePage(recording.name, self._side_endpoint, clock=lambda: self._side_at_ns / 1e9)
        self._side_at_ns = 0
        self._side_page: Page | None = None  # the newest one beside the engine's, not yet in an interval
        self._engine_caches: frozenset[str] = frozenset()
        self._failures: list[Scrape] = []
        self._counts = {"pages": 0, "intervals": 0, "skipped": 0, "unread": 0}
        self._findings: dict[tuple[str, str, int], Finding] = {}  # each once, as in the ledger

    def run(self, progress: Callable[[int], None] = lambda _: None) -> Replayed:
        """Replay everything; `progress` hears the instant of every page. LedgerError if it cannot be written."""
        first_ns = last_ns = None
        for event in self._recording.events():
            if first_ns is None:
                first_ns = event.t_ns
                self._pipeline = Pipeline(
                    self._writer, self._writer.states(), self._describe, interval_ns=None, started_ns=first_ns
                )
            last_ns = event.t_ns
            if isinstance(event, Page):
                self._page(event)
                progress(event.t_ns)
            elif isinstance(event, GpuLine):
                self._gpu(event)
            elif isinstance(event, HostLine):
                self._host = event
            elif isinstance(event, Failure) and event.source in {"vllm", "lmcache"}:
                source = self._engine.source if event.source == "vllm" else self._side.source
                self._failures.append(_failure(source, event.t_ns, event.took_seconds, event.error))
        if first_ns is None or last_ns is None or not self._counts["pages"]:
            raise RecordingError(f"{self._recording.name}: no page of an engine", "is this a recording?")
        if self._joined_page is not None:
            self._close(self._joined_page)  # a recording is counted to its end
        self._tick([*self._others()])
        return Replayed(**self._counts, start_ns=first_ns, end_ns=last_ns, findings=tuple(self._findings.values()))

    def _page(self, page: Page) -> None:
        if page.source != "vllm":
            if self._side_page is not None and not self._side.sources and self._last_page_ns is not None:
                self._tick([self._beside(self._side_page)])  # where the caches' counts begin
            self._side_page = page
            return
        due = self._last_page_ns is None or page.t_ns >= self._last_page_ns + self._interval_ns - _SLACK_NS
        self._joined_page = None if due else page
        if due:
            self._close(page)

    def _close(self, page: Page) -> None:
        """Close the interval that ends with a page."""
        self._last_page_ns = page.t_ns
        self._counts["pages"] += 1
        self._endpoint.body = page.body
        try:
            scrape = Scrape(self._engine.source, page.t_ns, 0.0, self._engine.collect())
        except CollectError as error:
            scrape = _failure(self._engine.source, page.t_ns, 0.0, str(error))
        self._engine_caches |= {one.name for one in scrape.readings if one.kind == "cache"}
        # GPUs first: an engine's target row names their product
        self._tick([*self._others(), *self._failures, scrape])
        self._failures.clear()

    def _others(self) -> list[Scrape]:
        scrapes: list[Scrape] = []
        if self._gpus is not None:
            scrapes.append(Scrape("nvml", self._gpu_at_ns, 0.0, self._gpus.readings()))
        if self._host is not None:
            line, t_ns = self._host.line, self._host.t_ns
            if line.get("processes"):
                reading = process_reading(self._recording.name, line["processes"])
                scrapes.append(Scrape("processes", t_ns, 0.0, (reading,)))
            if line.get("disks"):
                scrapes.append(Scrape("diskstats", t_ns, 0.0, disk_readings(line["disks"])))
            self._host = None
        if self._side_page is not None:
            scrapes.append(self._beside(self._side_page))
            self._side_page = None
        return scrapes

    def _beside(self, page: Page) -> Scrape:
        """What a page beside the engine's tells, but for caches that the engine's own page has told."""
        self._side_at_ns, self._side_endpoint.body = page.t_ns, page.body
        try:
            readings = self._side.collect()
        except NoData as nothing:
            return Scrape(self._side.source, page.t_ns, 0.0, (), "no_data", str(nothing))
        except CollectError as error:
            self._counts["unread"] += 1
            return _failure(self._side.source, page.t_ns, 0.0, str(error))
        own = tuple(one for one in readings if one.kind != "cache" or one.name not in self._engine_caches)
        return Scrape(self._side.source, page.t_ns, 0.0, own)

    def _gpu(self, event: GpuLine) -> None:
        if self._gpus is None:
            self._gpus = GpuIntegrator(event.t_ns / 1e9)
        for sample in parse_line(event.line):
            named = sample if sample.name else msgspec.structs.replace(sample, name=self._sku)
            self._gpus.add(named)
        self._gpu_at_ns = event.t_ns

    def _tick(self, scrapes: list[Scrape]) -> None:
        if self._pipeline is None or not scrapes:
            return
        tick = self._pipeline.tick(scrapes)
        if tick.error is not None:
            raise tick.error
        self._counts["intervals"] += sum(one.interval is not None for one in tick.closed)
        engines = sum(scrape.source == self._engine.source and scrape.outcome == "ok" for scrape in scrapes)
        written = sum(one.reading.kind == "engine" for one in tick.closed)
        self._counts["skipped"] += engines if engines and not written else 0
        for finding in (*tick.findings, *(finding for one in tick.closed for finding in one.findings)):
            self._findings.setdefault((finding.kind, finding.target, finding.start_ns), finding)


def _failure(source: str, t_ns: int, took_seconds: float, error: str) -> Scrape:
    return Scrape(source, t_ns, took_seconds, (), "failed", error)
