from __future__ import annotations

import json
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from kvtally.agent.cadence import Stop
from kvtally.agent.clock import LedgerClock
from kvtally.agent.config import Config, Engine, Gpu, Labels, Scrape, complete, complete_page
from kvtally.agent.config import Page as ConfigPage
from kvtally.agent.discovery import FoundEngine
from kvtally.agent.engine_recording import EngineRecording, folder_names, meta_of
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.log import Log
from kvtally.agent.recorder import Recorded, Recorder
from kvtally.agent.recording import Event, Failure, GpuLine, HostLine, Page, RecordingError, open_recording
from kvtally.agent.recording_writer import pack
from kvtally.agent.replay import Replay, Replayed, about_of
from kvtally.agent.replica import About
from kvtally.collectors.base import CollectError
from kvtally.collectors.gpu import GpuIntegrator, GpuSample

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from kvtally.collectors.base import Reading

FAST_SECONDS = 0.05
UUIDS = ("GPU-a", "GPU-b")


class Metrics:
    """What an engine counts; every page that it gives counts 7 requests of 100 prompt and 3 output tokens more."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.totals: list[tuple[int, int]] = []  # prompt and output tokens on each page
        labels = {"engine": "0", "model_name": "llama"}
        self._counters = [
            Counter(name, "Counts.", labels, registry=self.registry).labels(*labels.values())
            for name in ("vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success")
        ]
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            Gauge(name, "Gauges.", labels, registry=self.registry).labels(*labels.values())
        self._lock = threading.Lock()

    def page(self) -> bytes:
        with self._lock:
            for counter, more in zip(self._counters, (700, 21, 7), strict=True):
                counter.inc(more)
            self.totals.append((700 * (len(self.totals) + 1), 21 * (len(self.totals) + 1)))
            return generate_latest(self.registry)


class EngineServer(ThreadingHTTPServer):
    """A server on loopback that answers as an engine does; `answers` decides what becomes of a page."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.metrics = Metrics()
        self.version = "0.25.1"
        self.pages_given: list[bytes] = []
        self.refused = 0
        self.on_page: Callable[[int], bool] = lambda _: True

    @property
    def port(self) -> int:
        return self.server_address[1]

    def page(self) -> bytes | None:
        """The next page; None for HTTP 500."""
        if not self.on_page(len(self.pages_given) + self.refused):
            self.refused += 1
            return None
        self.pages_given.append(self.metrics.page())
        return self.pages_given[-1]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = cast("EngineServer", self.server)
        body: bytes | None = None
        if self.path == "/version":
            body = json.dumps({"version": server.version}).encode()
        elif self.path == "/metrics":
            body = server.page()
        self.send_response(200 if body else 500)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        self.wfile.write(body or b"")

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # http.server's own word
        """Say nothing."""


class FakeGpus:
    """Two GPUs in the place of NVML: the energy counter of each rises by 1 J a sample, twice that for the second.

    The first sample after opening holds what is dear to read, as NVML's does: here that is the clock reasons. Every
    other one finds the GPUs at work, where their clock is lower than at rest.
    """

    def __init__(self) -> None:
        self.taken = 0
        self.on_sample: Callable[[int], None] = lambda _: None
        self.is_open = False
        self._integrator = GpuIntegrator(time.time())

    def sample(self) -> list[GpuSample]:
        self.taken += 1
        self.on_sample(self.taken)
        reasons, self.is_open = (None if self.is_open else 1), True
        return [
            GpuSample(
                time.time(),
                uuid,
                index,
                "H100",
                mig=False,
                utilization_percent=80 * (self.taken % 2),
                energy_millijoules=1000 * self.taken * (index + 1),
                sm_clock_mhz=1650 if self.taken % 2 else 1965,
                clock_reasons=reasons,
            )
            for index, uuid in enumerate(UUIDS)
        ]

    def collect(self) -> tuple[Reading, ...]:
        for sample in self.sample():
            self._integrator.add(sample)
        return self._integrator.readings()

    def compute_pids(self) -> dict[str, list[int]]:
        return {UUIDS[1]: [os.getpid()]}

    def minor_numbers(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.is_open = False


@contextmanager
def serving(port: int = 0) -> Iterator[EngineServer]:
    with EngineServer(port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server() -> Iterator[EngineServer]:
    with serving() as one:
        yield one


def config_of(*servers: EngineServer, interval_seconds: float = FAST_SECONDS, gpu: bool = False) -> Config:
    return Config(
        scrape=Scrape(
            interval_seconds=interval_seconds, timeout_seconds=5.0, ports=tuple(server.port for server in servers)
        ),
        labels=Labels(cluster="rome", tenant="red"),
        gpu=Gpu(enabled=gpu),
    )


def recorded(config: Config, folder: Path, lines: list[str] | None = None, **given: Any) -> Recorded:
    log = Log(write=(lines if lines is not None else []).append)
    duration_seconds = given.pop("duration_seconds", None)
    return Recorder(config, folder, log, **given).run(duration_seconds=duration_seconds)


def stopping_at(server: EngineServer, page: int) -> Stop:
    """The word to stop, given while this page (the first is 0) is being served."""
    stop = Stop()

    def on_page(number: int) -> bool:
        if number >= page:
            stop.set()
        return True

    server.on_page = on_page
    return stop


def replayed(recording: Path, ledger: Path) -> Replayed:
    upgrade(f"sqlite:///{ledger}")
    with closing(LedgerWriter(connect(str(ledger)), str(ledger))) as writer:
        return Replay(open_recording(recording), writer).run()


def asked(ledger: Path, question: str) -> Any:
    with closing(sqlite3.connect(ledger)) as connection:
        return connection.execute(question).fetchone()


def dumped(ledger: Path) -> list[str]:
    with closing(sqlite3.connect(ledger)) as connection:
        return list(connection.iterdump())


def meta_in(folder: Path) -> dict[str, Any]:
    meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return meta


def size_of(folder: Path) -> int:
    return sum(place.stat().st_size for place in folder.rglob("*") if place.is_file())


def test_a_replay_counts_what_the_server_counted_from_the_first_page_to_the_last(
    server: EngineServer, tmp_path: Path
) -> None:
    place, packed = tmp_path / "live", tmp_path / "live.tar.xz"
    config = config_of(server, interval_seconds=0.1, gpu=True)
    # page 0 is discovery's
    done = recorded(config, place, stop=stopping_at(server, 20), open_gpus=lambda _: FakeGpus())
    events = list(open_recording(place).events())
    assert [event.body for event in events if isinstance(event, Page)] == server.pages_given[1:]
    assert done.pages == 20
    pack(place, packed)
    for recorded_at, ledger in ((place, tmp_path / "folder.db"), (packed, tmp_path / "packed.db")):
        assert replayed(recorded_at, ledger).pages == 20
        question = "SELECT sum(prompt_tokens), sum(generated_tokens), sum(missed), count(*) FROM engine_interval"
        assert asked(ledger, question) == (19 * 700, 19 * 21, 0, 19)
        assert asked(ledger, "SELECT sum(energy_mj) FROM gpu_interval") == (millijoules_in(events),)
        # busy is in nanoseconds, so by 1650 MHz
        loaded = "SELECT sum(busy_ns) > 0, sum(busy_cycles) * 1000.0 / sum(busy_ns) FROM gpu_interval"
        assert asked(ledger, loaded) == (1, pytest.approx(1650, rel=1e-6))
        assert asked(ledger, "SELECT count(*) > 0, sum(cpu_ns) > 0 FROM process_interval") == (1, 1)
    assert dumped(tmp_path / "folder.db") == dumped(tmp_path / "packed.db")


def millijoules_in(events: list[Event]) -> int:
    """Energy of all GPUs from the last sample before a page, the first that has one, to the very last."""
    sums = [
        sum(gpu["energy_millijoules"] for gpu in event.line["gpus"]) if isinstance(event, GpuLine) else None
        for event in events
        if isinstance(event, GpuLine | Page)
    ]
    first = next(at for at in range(1, len(sums)) if sums[at] is None and sums[at - 1] is not None)
    known = [one for one in sums[first - 1 :] if one is not None]
    return int(known[-1] - known[0])


def test_meta_tells_the_engine_and_how_it_was_recorded(server: EngineServer, tmp_path: Path) -> None:
    lines: list[str] = []
    place = tmp_path / "monday"
    recorded(config_of(server), place, lines, stop=stopping_at(server, 2))
    meta = meta_in(place)
    start, end = meta["recorded"]["start"], meta["recorded"]["end"]
    first, *_, last = (event.t_ns / 1e9 for event in open_recording(place).events() if isinstance(event, Page))
    assert start - 0.001 <= first < last <= end  # a page is named by its millisecond
    expected = {
        "name": "monday",
        "engine": "vllm",
        "engine_version": "0.25.1",
        "target": f"127.0.0.1:{server.port}",
        "labels": {"cluster": "rome", "tenant": "red"},
        "interval_seconds": 0.05,
    }
    assert {key: meta[key] for key in expected} == expected
    assert meta["engine_args"]  # our own, since the server runs in this process
    assert f"recording target=127.0.0.1:{server.port}" in lines[0]
    assert "told to stop" in lines[-1]


def test_pages_that_fail_are_failures_and_the_interval_across_them_says_how_many(
    server: EngineServer, tmp_path: Path
) -> None:
    stop = Stop()

    def on_page(number: int) -> bool:
        if number == 9:
            stop.set()
        return number not in {4, 5, 6}

    server.on_page = on_page
    lines: list[str] = []
    place, ledger = tmp_path / "live", tmp_path / "live.db"
    done = recorded(config_of(server), place, lines, stop=stop)
    failures = [event for event in open_recording(place).events() if isinstance(event, Failure)]
    assert [(event.source, "HTTP 500" in event.error) for event in failures] == [("vllm", True)] * 3
    assert done.failed_scrapes == server.refused == 3
    assert sum("HTTP 500" in line for line in lines) == 1  # a complaint a minute
    found = replayed(place, ledger)
    assert [finding.kind for finding in found.findings] == ["scrapes_failed"]
    # pages 1 2 3 . . . 7 8 9
    assert done.pages == 6
    assert asked(ledger, "SELECT max(missed), sum(missed) FROM engine_interval") == (3, 3)
    assert asked(ledger, "SELECT sum(prompt_tokens) FROM engine_interval") == (5 * 700,)


def test_each_scrape_has_its_line(server: EngineServer, tmp_path: Path) -> None:
    place = tmp_path / "live"
    done = recorded(config_of(server, gpu=True), place, stop=stopping_at(server, 3), open_gpus=lambda _: FakeGpus())
    lines = [json.loads(line) for line in (place / "scrapes.jsonl").read_text(encoding="utf-8").splitlines()]
    sources = [line["source"] for line in lines]
    assert sources.count("vllm") == sources.count("host") == done.pages
    assert sources.count("gpu") == done.gpu_lines
    assert all(line["error"] is None and line["took_seconds"] >= 0 for line in lines)


def test_the_host_lines_hold_the_engines_processes_and_the_memory(server: EngineServer, tmp_path: Path) -> None:
    place = tmp_path / "live"
    recorded(config_of(server), place, stop=stopping_at(server, 2))
    host = [event.line for event in open_recording(place).events() if isinstance(event, HostLine)]
    assert host
    for line in host:
        assert line["processes"][0]["pid"] == os.getpid()
        assert set(line["memory_kib"]) == {"MemFree", "MemAvailable", "Cached"}


def test_gpus_are_sampled_as_finely_as_asked_for(server: EngineServer, tmp_path: Path) -> None:
    stop = Stop()
    gpus = FakeGpus()
    gpus.on_sample = lambda number: stop.set() if number == 13 else None
    place = tmp_path / "live"
    config = config_of(server, interval_seconds=300.0, gpu=True)
    done = recorded(config, place, stop=stop, gpu_every_seconds=0.01, open_gpus=lambda _: gpus)
    lines = [event.line for event in open_recording(place).events() if isinstance(event, GpuLine)]
    # samples 1 and 2 are discovery's and meta.json's
    assert [line["gpus"][1]["energy_millijoules"] for line in lines] == [2000 * number for number in range(3, 14)]
    assert [line["gpus"][0]["clock_reasons"] for line in lines] == [1] + [None] * 10
    assert done.gpu_lines == 11
    assert done.pages <= 2
    assert not gpus.is_open
    assert meta_in(place)["gpus"] == [{"index": 1, "uuid": "GPU-b", "name": "H100"}]  # whose process it is


def test_a_driver_that_fails_does_not_stop_the_pages(server: EngineServer, tmp_path: Path) -> None:
    gpus = FakeGpus()

    def on_sample(number: int) -> None:
        if number > 3:
            raise CollectError("the NVIDIA driver went away", "wait")

    gpus.on_sample = on_sample
    lines: list[str] = []
    place = tmp_path / "live"
    stop = stopping_at(server, 5)
    done = recorded(config_of(server, gpu=True), place, lines, stop=stop, open_gpus=lambda _: gpus)
    failures = [event for event in open_recording(place).events() if isinstance(event, Failure)]
    assert {(event.source, event.error) for event in failures} == {("gpu", "the NVIDIA driver went away")}
    assert (done.gpu_lines, done.pages) == (1, 5)
    assert sum("went away hint=wait" in line for line in lines) == 1


def test_of_several_engines_each_has_a_recording_of_its_own(server: EngineServer, tmp_path: Path) -> None:
    lines: list[str] = []
    place = tmp_path / "two"
    with serving() as other:
        config = config_of(server, other, gpu=True)
        given = tuple(
            complete(Engine(url=f"http://127.0.0.1:{one.port}", gpus=(uuid,), gpus_per_replica=1), config)
            for one, uuid in zip((server, other), UUIDS, strict=True)
        )
        config = Config(scrape=config.scrape, engines=given, gpu=config.gpu)
        stop = stopping_at(server, 4)
        done = recorded(config, place, lines, stop=stop, open_gpus=lambda _: FakeGpus())
        assert done.folders == tuple(place / f"127.0.0.1-{one.port}" for one in (server, other))
        for folder, one, uuid in zip(done.folders, (server, other), UUIDS, strict=True):
            recording = open_recording(folder)
            events = list(recording.events())
            assert recording.name == f"two-127.0.0.1-{one.port}"
            assert {event.body for event in events if isinstance(event, Page)} <= set(one.pages_given)
            sampled = {gpu["uuid"] for event in events if isinstance(event, GpuLine) for gpu in event.line["gpus"]}
            assert sampled == {uuid}  # the other's GPU would seem to be free
            assert recording.meta["gpus"][0]["uuid"] == uuid
            assert recording.meta["gpus_per_replica"] == 1
    assert any("2 engines: each is recorded into a folder of its own" in line for line in lines)


def test_gpus_that_are_unknown_are_not_written_as_none_at_all() -> None:
    known = {"GPU-a": GpuSample(1.0, "GPU-a", 0, "H100")}

    def gpus(given: tuple[str, ...] | None) -> object:
        return meta_of("name", "target", About(given), known, 0)["gpus"]

    assert gpus(None) is None
    assert gpus(()) == []
    assert gpus(("GPU-z", "GPU-a")) == [{"uuid": "GPU-z"}, {"index": 0, "uuid": "GPU-a", "name": "H100"}]


def test_meta_tells_how_an_engine_is_run_and_a_replay_knows_it_again() -> None:
    facts = {
        "shape": '{"architecture":"LlamaForCausalLM","num_hidden_layers":32}',
        "token_budget": "2048",
        "connector": "LMCacheConnectorV1",
    }
    meta = meta_of("name", "target", About(facts=facts), {}, 0)
    assert meta["model"] == {"architecture": "LlamaForCausalLM", "num_hidden_layers": 32}
    assert (meta["token_budget"], meta["connector"]) == (2048, "LMCacheConnectorV1")
    assert about_of(json.loads(json.dumps(meta))).facts == facts
    unknown = meta_of("name", "target", About(), {}, 0)
    assert (unknown["model"], unknown["token_budget"], unknown["connector"]) == (None, None, None)
    assert about_of(unknown).facts == {}


def test_of_a_server_that_shows_a_title_the_arguments_of_its_supervisor_are_written(tmp_path: Path) -> None:
    for pid, words in ((7, "vllm serve m -tp 2"), (8, "VLLM::APIServer_DP0")):
        (tmp_path / f"proc/{pid}").mkdir(parents=True)
        (tmp_path / f"proc/{pid}/cmdline").write_text(words.replace(" ", "\0"), encoding="utf-8")
    server = FoundEngine("http://a", "a", 8, None, "vllm", None, "", 2, 1, (), command_pid=7)
    for given, arguments in ((8, ["m", "-tp", "2"]), (9, None)):  # 9: a process that config names in its place
        engine = EngineRecording(tmp_path / str(given), meta_of("name", "a", About(), {}, 0))
        engine.learn_process(server, given, str(tmp_path / "proc"))
        engine.close(1)
        assert meta_in(tmp_path / str(given))["engine_args"] == arguments


def test_folders_are_named_after_their_targets() -> None:
    targets = ["127.0.0.1:8000", "[::1]:8000", "prod/llama", "prod llama", "..", "127.0.0.1:8000"]
    expected = ["127.0.0.1-8000", "1-8000", "prod-llama", "prod-llama-2", "engine", "127.0.0.1-8000-2"]
    assert folder_names(targets) == expected


def test_without_an_engine_nothing_is_made(tmp_path: Path) -> None:
    config = Config(scrape=Scrape(ports=(1,)), gpu=Gpu(enabled=False))
    with pytest.raises(RecordingError, match="no engine found on ports 1") as caught:
        recorded(config, tmp_path / "none")
    assert "[[engine]]" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_left_alone(server: EngineServer, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine", encoding="utf-8")
    with pytest.raises(RecordingError, match="is not empty"):
        recorded(config_of(server), tmp_path)
    with serving() as other, pytest.raises(RecordingError, match="is not empty"):
        recorded(config_of(server, other), tmp_path)
    assert [place.name for place in tmp_path.iterdir()] == ["notes"]


@contextmanager
def recording(config: Config, folder: Path, lines: list[str]) -> Iterator[None]:
    """A recorder at work in a thread, until the block ends."""
    stop = Stop()
    recorder = Recorder(config, folder, Log(write=lines.append), stop=stop)
    thread = threading.Thread(target=recorder.run, kwargs={"duration_seconds": None})
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)


def wait_for(happens: Callable[[], bool]) -> None:
    """Wait for what must come, within pytest's own time-out."""
    while not happens():
        time.sleep(0.01)


def test_a_listed_engine_that_is_down_is_waited_for(tmp_path: Path) -> None:
    with serving() as gone:
        port = gone.port
    config = config_of()
    engine = complete(Engine(url=f"http://127.0.0.1:{port}", name="late"), config)
    config = Config(scrape=config.scrape, engines=(engine,), gpu=config.gpu)
    lines: list[str] = []
    place = tmp_path / "late"
    scrapes = place / "scrapes.jsonl"
    with recording(config, place, lines):
        wait_for(lambda: scrapes.exists() and b"connection refused" in scrapes.read_bytes())
        assert meta_in(place)["engine_version"] is None
        with serving(port):
            wait_for(lambda: meta_in(place)["engine_args"] is not None)  # it was looked for, and its process found
            wait_for((place / "host.jsonl").exists)
    events = list(open_recording(place).events())
    assert isinstance(next(event for event in events if not isinstance(event, HostLine)), Failure)
    assert any(isinstance(event, Page) for event in events)
    assert any("processes" in event.line for event in events if isinstance(event, HostLine))
    assert meta_in(place)["engine_version"] == "0.25.1"


def test_an_engine_that_comes_back_as_another_version_is_told_of(tmp_path: Path) -> None:
    lines: list[str] = []
    place = tmp_path / "live"
    with serving() as before:
        port = before.port
        config = config_of(before)
        with recording(config, place, lines):
            wait_for(lambda: len(before.pages_given) >= 3)
            before.metrics = Metrics()  # its counters begin anew
            before.version = "0.32.0"
            wait_for(lambda: any("the engine was 0.25.1 and is 0.32.0 now" in line for line in lines))
    assert port == before.port
    assert meta_in(place)["engine_version"] == "0.25.1"


def test_a_recording_ends_when_its_time_is_over(server: EngineServer, tmp_path: Path) -> None:
    done = recorded(config_of(server, interval_seconds=10.0), tmp_path / "live", duration_seconds=0.3)
    assert (done.pages, done.ended_by) == (2, "the time is over")  # the first, and one at the end


def test_a_recording_ends_before_it_grows_too_large(server: EngineServer, tmp_path: Path) -> None:
    lines: list[str] = []
    place = tmp_path / "live"
    done = recorded(config_of(server), place, lines, max_bytes=20_000)
    assert done.ended_by == "the size limit is reached"
    assert str(done).endswith("the size limit is reached")
    assert "warning recorded" in lines[-1]
    assert 10_000 < done.bytes_written == size_of(place) < 21_000
    assert open_recording(place).page_count == done.pages > 1


def test_a_disk_that_fills_up_ends_the_recording_and_what_is_written_stays_whole(
    server: EngineServer, tmp_path: Path
) -> None:
    place = tmp_path / "live"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_page(number: int) -> bool:
        if number == 4:  # from now on no file may grow beyond what host.jsonl is
            resource.setrlimit(resource.RLIMIT_FSIZE, ((place / "host.jsonl").stat().st_size, before[1]))
        return True

    server.on_page = on_page
    lines: list[str] = []
    try:
        with pytest.raises(RecordingError, match="cannot be written: File too large") as caught:
            recorded(config_of(server), place, lines)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "make room" in caught.value.hint
    assert "it cannot be written" in lines[-1]
    whole = open_recording(place)
    assert whole.notes == ()
    assert whole.page_count == len(list((place / "vllm").iterdir())) >= 3
    assert sum(isinstance(event, HostLine) for event in whole.events()) >= 3


PROGRAM = """
import sys
from pathlib import Path
from kvtally.agent.config import Config, Gpu, Scrape
from kvtally.agent.log import Log
from kvtally.agent.recorder import Recorder
scrape = Scrape(interval_seconds=0.05, timeout_seconds=5.0, ports=(int(sys.argv[1]),))
config = Config(scrape=scrape, gpu=Gpu(enabled=False))
print(Recorder(config, Path(sys.argv[2]), Log()).run(duration_seconds=None))
"""


@contextmanager
def child_recording(server: EngineServer, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", PROGRAM, str(server.port), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            wait_for(lambda: child.poll() is not None or len(server.pages_given) >= 8)
            yield child
        finally:
            child.kill()
            child.communicate()


def test_a_recording_that_was_killed_can_be_replayed(server: EngineServer, tmp_path: Path) -> None:
    place = tmp_path / "live"
    with child_recording(server, place) as child:
        child.kill()
        child.wait()
    with (place / "scrapes.jsonl").open("ab") as file:  # the one line that may be torn
        file.write(b'{"t": 17954')
    whole = open_recording(place)
    assert whole.page_count >= 6
    assert whole.notes == (f"scrapes.jsonl line {lines_in(place / 'scrapes.jsonl')} is torn and was left out",)
    assert meta_in(place)["recorded"]["end"] is None
    assert replayed(place, tmp_path / "live.db").intervals >= 5
    assert asked(tmp_path / "live.db", "SELECT sum(prompt_tokens) FROM engine_interval")[0] == 700 * (
        whole.page_count - 1
    )


def lines_in(place: Path) -> int:
    return len(place.read_bytes().splitlines())


def test_sigterm_ends_a_recording_with_a_last_page(server: EngineServer, tmp_path: Path) -> None:
    place = tmp_path / "live"
    with child_recording(server, place) as child:
        child.send_signal(signal.SIGTERM)
        out, err = child.communicate()
    assert child.returncode == 0, err
    assert out.rstrip().endswith("told to stop")
    pages = [event.body for event in open_recording(place).events() if isinstance(event, Page)]
    assert pages[-1] == server.pages_given[-1]
    assert meta_in(place)["recorded"]["end"] is not None


def test_a_wall_clock_that_is_set_leaves_the_recordings_time_even(server: EngineServer, tmp_path: Path) -> None:
    year_ns = 365 * 86400 * 10**9
    shift_ns = 0

    def on_page(number: int) -> bool:
        nonlocal shift_ns
        shift_ns = {3: -3600, 5: 7200}.get(number, shift_ns // 10**9) * 10**9
        if number == 7:
            stop.set()
        return True

    stop = Stop()
    server.on_page = on_page
    lines: list[str] = []
    place = tmp_path / "live"
    clock = LedgerClock(wall_ns=lambda: time.time_ns() - year_ns + shift_ns)  # in the year before
    recorded(config_of(server), place, lines, stop=stop, clock=clock)
    pages = [event for event in open_recording(place).events() if isinstance(event, Page)]
    assert [event.body for event in pages] == server.pages_given[1:]  # in the order in which they were served
    assert pages[-1].t_ns - pages[0].t_ns < 60 * 10**9
    assert 0 <= time.time_ns() - year_ns - pages[0].t_ns < 60 * 10**9
    assert any("the clock was set" in line for line in lines)


# -- a cache's own page beside the engine's


class CacheMetrics(Metrics):
    """An LMCache server; every page counts lookups of 500 tokens more, 300 of them in DRAM and 100 on disk."""

    padding = ""

    def page(self) -> bytes:
        with self._lock:
            self.totals.append((300 * (len(self.totals) + 1), 100 * (len(self.totals) + 1)))
            dram, disk = self.totals[-1]
        counts = {"requested": 500 * len(self.totals), "hit": dram + disk, "hit_l1": dram, "hit_l2": disk}
        lines = (f'lmcache_mp_lookup_{name}_tokens_total{{model_name="m"}} {count}.0' for name, count in counts.items())
        return "\n".join([*lines, self.padding, ""]).encode()


@pytest.fixture
def cache() -> Iterator[EngineServer]:
    with serving() as one:
        one.metrics = CacheMetrics()
        yield one


def target(server: EngineServer) -> str:
    return f"127.0.0.1:{server.port}"


def beside(*caches: EngineServer, engine: str) -> tuple[ConfigPage, ...]:
    return tuple(complete_page(ConfigPage(url=f"http://{target(one)}/metrics", engines=(engine,))) for one in caches)


def test_a_cache_that_is_found_is_recorded_beside_its_engine_and_a_replay_tells_its_tiers(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    place = tmp_path / "live"
    done = recorded(config_of(server, cache), place, stop=stopping_at(server, 6))
    pages = [event for event in open_recording(place).events() if isinstance(event, Page)]
    assert [page.body for page in pages if page.source == "vllm"] == server.pages_given[1:]
    # page 0 is discovery's
    assert [page.body for page in pages if page.source == "lmcache"] == cache.pages_given[1:]
    assert (done.pages, done.bytes_written) == (len(server.pages_given) - 1, size_of(place))
    ledger = tmp_path / "ledger.db"
    assert replayed(place, ledger).unread == 0
    intervals = len(cache.pages_given) - 2
    question = "SELECT sum(lookup_tokens), sum(dram_hit_tokens), sum(disk_hit_tokens) FROM cache_interval"
    assert asked(ledger, question) == (500 * intervals, 300 * intervals, 100 * intervals)
    assert asked(ledger, "SELECT name FROM target WHERE kind = 'cache'") == ("live/lmcache_mp",)


def test_a_cache_that_fails_is_a_failure_in_the_recording_and_stops_nothing(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    cache.on_page = lambda number: number not in {3, 4}
    place, lines = tmp_path / "live", list[str]()
    done = recorded(config_of(server, cache), place, lines, stop=stopping_at(server, 8))
    events = list(open_recording(place).events())
    assert [event.body for event in events if isinstance(event, Page) and event.source == "vllm"] == (
        server.pages_given[1:]
    )
    assert [event.body for event in events if isinstance(event, Page) and event.source == "lmcache"] == (
        cache.pages_given[1:]
    )
    failures = [event for event in events if isinstance(event, Failure)]
    assert [(one.source, one.error) for one in failures] == [("lmcache", f"HTTP 500 from {target(cache)}/metrics")] * 2
    assert done.failed_scrapes == 2
    assert any("HTTP 500" in line and f"source=page:{target(cache)}" in line for line in lines)


def test_pages_of_a_cache_count_against_the_size_limit(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    metrics = CacheMetrics()
    metrics.padding = "#" * 200_000
    cache.metrics = metrics
    place = tmp_path / "live"
    done = recorded(config_of(server, cache), place, max_bytes=500_000)
    assert done.ended_by == "the size limit is reached"
    assert size_of(place) == done.bytes_written <= 500_000
    assert len(list((place / "lmcache").iterdir())) == 2


def test_of_two_caches_of_an_engine_one_is_recorded_and_the_other_is_told_of(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    place, lines = tmp_path / "live", list[str]()
    with serving() as other:
        metrics = CacheMetrics()
        metrics.padding = "# not as the first one's"
        other.metrics = metrics
        config = msgspec.structs.replace(config_of(server), pages=beside(cache, other, engine=target(server)))
        recorded(config, place, lines, stop=stopping_at(server, 4))
        events = open_recording(place).events()
        kept = [event.body for event in events if isinstance(event, Page) and event.source == "lmcache"]
        # discovery asks both, for the folders of their servers
        assert kept in (cache.pages_given[1:], other.pages_given[1:])
        left_out = other if kept == cache.pages_given[1:] else cache
    assert any("a second cache" in line and f"source=page:{target(left_out)}" in line for line in lines)


def test_a_page_that_config_gives_to_another_engine_is_not_recorded(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    place = tmp_path / "live"
    config = msgspec.structs.replace(config_of(server), pages=beside(cache, engine="elsewhere:8000"))
    recorded(config, place, stop=stopping_at(server, 3))
    assert len(cache.pages_given) > 2
    assert not (place / "lmcache").exists()


def test_a_page_that_is_no_caches_is_not_recorded_whatever_engines_config_gives_it(
    server: EngineServer, cache: EngineServer, tmp_path: Path
) -> None:
    class Router(Metrics):
        def page(self) -> bytes:
            return b"dynamo_frontend_requests_total 5\n"

    cache.metrics = Router()
    place = tmp_path / "live"
    config = msgspec.structs.replace(config_of(server), pages=beside(cache, engine=target(server)))
    recorded(config, place, stop=stopping_at(server, 3))
    assert len(cache.pages_given) > 2
    assert not (place / "lmcache").exists()
