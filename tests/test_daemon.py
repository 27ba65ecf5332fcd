from __future__ import annotations

import json
import os
import random
import sqlite3
import threading
import time
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace
from tests.daemon_process import DaemonProcess, config_of, kvtally
from tests.ledgers import new_ledger
from tests.loopback import RUNNING, FakeEngine, Server, Tokens, answer

from kvtally.agent.config import Config, Engine, Gpu, Scrape, complete
from kvtally.agent.config_tables import Export, Prometheus
from kvtally.agent.daemon import LOOK_HANGS, Daemon, _Minute
from kvtally.agent.interval import BORN, RESET, Interval, State, opened
from kvtally.agent.ledger.append import Closed, LedgerWriter
from kvtally.agent.ledger.place import WriterLock, connect
from kvtally.agent.log import Log
from kvtally.agent.look import Found
from kvtally.agent.pipeline import Tick
from kvtally.collectors.base import Reading
from kvtally.collectors.base import Scrape as Scraped
from kvtally.collectors.quantities import ENGINE

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

SECRET = "geheim-0815"
SECOND_NS = 10**9
HOUR_NS = 3600 * SECOND_NS


def refuse(connection: socket.socket, _target: str) -> bool:
    connection.sendall(answer(b"", "500 Internal Server Error"))
    return True


class Story:
    """One daemon and what happens beside it, told once: an engine each for what an engine may do."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.steady, self.idle, self.busy = (stack.enter_context(FakeEngine()) for _ in range(3))
        self.late = FakeEngine().start()
        self.late.stop()  # its port is known now, and nobody listens there
        stack.callback(self.late.stop)
        refusing = stack.enter_context(Server(refuse))
        self.daemon = DaemonProcess(
            folder,
            config_of(
                [self.steady.name, self.idle.name, self.busy.name, f"{refusing.origin}/metrics?token={SECRET}"],
                f"discover = true\nports = [{self.late.name.partition(':')[2]}]\ndiscover_every_seconds = 5",
            ),
        )
        stack.enter_context(self.daemon)
        listed = (self.steady, self.idle, self.busy)
        self.daemon.wait_until("the first scrapes", lambda: all(self.daemon.knows(one.name) for one in listed))
        self.second = kvtally("run", "--ledger", self.daemon.url)
        # it starts while kvtally runs, and has served before anybody looks
        self.late_ns = time.time_ns()
        self.late.begin_anew(self.late_ns / 1e9)
        self.late.start()
        self.late.serve(1000, 0, 10)
        for one in listed:
            one.serve(100, 40, 7)
        self.busy.set(RUNNING, 1)
        for one in (self.idle, self.busy):
            one.wait_for_scrapes(3)  # a page that was begun before shows the old counts
        self.lost = Tokens(50, 0, 5)
        self.busy.wait_for_scrapes()
        self.busy.serve(*self.lost)  # the next scrape would be a second later, and the engine is gone by then
        for one in (self.busy, self.idle):
            one.stop()
        time.sleep(0.3)
        self.restarted_ns = time.time_ns()
        for one in (self.busy, self.idle):
            one.begin_anew(time.time())
            one.start()
        for one in listed:
            one.serve(10, 5, 1)
        self.steady.wait_for_scrapes(2)
        self.daemon.wait_until("the late engine is known", lambda: self.daemon.rows(self.late.name))
        for one in (*listed, self.late):
            one.serve(3, 2, 1)  # right before the end
        self.status = self.daemon.stop()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    with ExitStack() as stack:
        yield Story(tmp_path_factory.mktemp("story"), stack)


def test_it_ends_at_sigterm_with_status_0(story: Story) -> None:
    assert story.status == 0
    assert story.daemon.lines("info", "stopped")


def test_counts_from_before_the_first_scrape_are_not_ours_and_all_since_are(story: Story) -> None:
    # the page has 116,986 prompt tokens when it is first read; then 100 + 10 + 3
    assert story.daemon.tokens(story.steady.name) == Tokens(113, 47, 9)


def test_the_last_interval_has_what_was_served_right_before_the_end(story: Story) -> None:
    *_, last = story.daemon.rows(story.steady.name)
    assert last.tokens == Tokens(3, 2, 1)


def test_intervals_of_a_target_follow_each_other_without_gap_or_overlap(story: Story) -> None:
    assert story.daemon.gaps() == []
    assert story.daemon.query("SELECT 1 FROM process_interval")


def test_an_idle_engine_that_restarts_loses_nothing_and_the_span_is_a_finding(story: Story) -> None:
    name = story.idle.name
    assert story.daemon.tokens(name) == Tokens(113, 47, 9)
    (row,) = (row for row in story.daemon.rows(name) if row.flags & RESET)
    assert row.began_ns is not None
    assert row.start_ns < story.restarted_ns <= row.began_ns < row.end_ns
    # a process start is told up to a second early
    until_ns = min(row.began_ns + 1_000_000_000, row.end_ns)
    assert story.daemon.findings("engine_restarted") == [
        ("engine_restarted", f"engine/{name}/0", row.start_ns, until_ns)
    ]


def test_what_a_busy_engine_took_with_it_is_a_finding_with_its_span(story: Story) -> None:
    name = story.busy.name
    assert story.busy.served == Tokens(163, 47, 14)
    assert story.daemon.tokens(name) == Tokens(113, 47, 9)  # without the lost 50 and 5
    (row,) = (row for row in story.daemon.rows(name) if row.flags & RESET)
    assert row.began_ns is not None
    until_ns = min(row.began_ns + 1_000_000_000, row.end_ns)
    assert story.daemon.findings("tokens_lost") == [("tokens_lost", f"engine/{name}/0", row.start_ns, until_ns)]


def test_an_engine_that_starts_later_is_found_and_counted_from_its_process_start(story: Story) -> None:
    name = story.late.name
    first, *_ = story.daemon.rows(name)
    assert first.flags & BORN
    assert first.start_ns == first.began_ns
    assert abs(first.start_ns - story.late_ns) < SECOND_NS // 1000  # as exact as a float of the page
    assert first.tokens == Tokens(1000, 0, 10)
    assert story.daemon.tokens(name) == Tokens(1003, 2, 11)


def test_the_time_from_a_process_start_to_the_first_work_is_its_warm_up(story: Story) -> None:
    groups = story.daemon.cost("--by", "replica")["groups"]
    warm = {group["by"]["replica"]: group["engine_seconds"]["warm_up"] for group in groups}
    assert warm[f"{story.late.name}/0"] > 0
    assert warm[f"{story.steady.name}/0"] == 0


def test_a_second_daemon_on_the_same_ledger_is_refused_with_the_process_id_of_the_first(story: Story) -> None:
    assert story.second.returncode == 3
    (line,) = story.second.stderr.splitlines()
    assert f"process {story.daemon.pid} writes this ledger" in line


def test_the_rest_of_an_address_stands_in_no_log_and_no_ledger(story: Story) -> None:
    assert story.daemon.lines("warning", "HTTP 500")
    assert SECRET not in story.daemon.log()
    assert SECRET.encode() not in story.daemon.ledger.read_bytes()


def test_every_engine_is_told_once(story: Story) -> None:
    for engine in (story.steady, story.idle, story.busy, story.late):
        assert len(story.daemon.lines("info", "engine target=", engine.name)) == 1


def test_no_line_is_a_traceback(story: Story) -> None:
    assert "Traceback" not in story.daemon.log()


def test_kill_9_at_any_moment_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    chance = random.Random(815)  # the same moments in every run
    ended = threading.Event()
    with FakeEngine() as engine, DaemonProcess(tmp_path, config_of([engine.name])) as daemon:

        def traffic() -> None:
            while not ended.wait(0.005):
                prompt = chance.randrange(1, 100)
                engine.serve(prompt, chance.randrange(prompt), chance.randrange(20))

        daemon.wait_until("the first scrape", lambda: daemon.knows(engine.name))
        clients = threading.Thread(target=traffic)
        clients.start()
        try:
            for moment in ("any", "read", "written") * 4:
                if moment == "any":
                    time.sleep(chance.random())
                elif moment == "read":  # a page is read, closed and written within 10 ms
                    engine.wait_for_scrapes()
                    time.sleep(chance.random() * 0.01)
                else:  # if that were the first of two transactions, the second would be missing
                    daemon.wait_for_write()
                daemon.kill()
                daemon.start()
            engine.wait_for_scrapes()
        finally:
            ended.set()
            clients.join()
        assert daemon.stop() == 0
        assert engine.served.prompt > 1000
        assert daemon.tokens(engine.name) == engine.served
        assert daemon.gaps() == []


def test_a_file_of_targets_that_changes_adds_and_removes_engines_within_seconds(tmp_path: Path) -> None:
    def name(*engines: FakeEngine) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(json.dumps([{"targets": [engine.name for engine in engines]}]), encoding="utf-8")
        fresh.replace(tmp_path / "targets.json")

    with FakeEngine() as first, FakeEngine() as second:
        name(first)
        config = config_of([], 'discover = false\ndiscover_every_seconds = 3600\nfile_sd = ["*.json"]')
        with DaemonProcess(tmp_path, config) as daemon:
            daemon.wait_until("the first engine is read", lambda: daemon.knows(first.name))
            name(first, second)
            daemon.wait_until("the second engine is read", lambda: daemon.knows(second.name))
            second.serve(100, 40, 7)
            second.wait_for_scrapes(2)
            name(first)
            (tmp_path / "broken.json").write_text("[", encoding="utf-8")
            daemon.wait_until("a complaint", lambda: daemon.lines("warning", "broken.json", "file_sd"))
            scrapes = second.scrapes
            first.serve(30, 10, 2)
            first.wait_for_scrapes(3)
            assert second.scrapes == scrapes
            assert daemon.stop() == 0
        assert daemon.tokens(first.name) == Tokens(30, 10, 2)
        assert daemon.tokens(second.name) == Tokens(100, 40, 7)
        assert len(daemon.lines("warning", "broken.json")) == 1  # and not at every look


def test_the_time_without_a_daemon_is_one_long_interval_with_its_coverage(tmp_path: Path) -> None:
    with FakeEngine() as engine, DaemonProcess(tmp_path, config_of([engine.name])) as daemon:
        daemon.wait_until("the first scrape", lambda: daemon.knows(engine.name))
        daemon.kill()
        engine.serve(500, 100, 20)
        time.sleep(2)
        daemon.start()
        daemon.wait_until("an interval", lambda: daemon.rows(engine.name))
        daemon.stop()
        first, *_ = daemon.rows(engine.name)
        assert first.tokens == Tokens(500, 100, 20)
        assert first.missed >= 1
        assert first.missed == round((first.end_ns - first.start_ns) / SECOND_NS) - 1
        ((kind, target, start_ns, end_ns),) = daemon.findings("not_watched")
        assert (kind, target, start_ns) == ("not_watched", f"engine/{engine.name}/0", first.start_ns)
        assert start_ns + 2 * SECOND_NS < end_ns <= first.end_ns  # until the next daemon ran, not until its first page


def test_once_closes_one_interval_and_ends(tmp_path: Path) -> None:
    with FakeEngine() as engine, DaemonProcess(tmp_path, config_of([engine.name]), "--once") as daemon:
        assert daemon.process.wait(30) == 0
        (row,) = daemon.rows(engine.name)
        assert row.missed == 0


def test_it_ends_soon_though_its_only_engine_never_answers(tmp_path: Path) -> None:
    with Server(lambda connection, _: not connection.recv(1)) as silent:
        config = config_of([silent.origin], "discover = false\ntimeout_seconds = 0.9")
        with DaemonProcess(tmp_path, config) as daemon:
            daemon.wait_until("a scrape that failed", lambda: daemon.lines("timed out after 0.9 s"))
            assert daemon.stop(within_seconds=10) == 0


def test_it_goes_on_counting_though_its_log_cannot_be_written(tmp_path: Path) -> None:
    with FakeEngine() as engine:
        daemon = DaemonProcess(tmp_path, config_of([engine.name]), "--once")
        new_ledger(tmp_path)
        (tmp_path / "kvtally.log").symlink_to("/dev/full")  # every write fails as on a full disk
        with daemon:
            assert daemon.process.wait(30) == 0
        assert len(daemon.rows(engine.name)) == 1


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("[scrape]\nintervall_seconds = 1\n", "scrape.intervall_seconds"),
        ("[scrape]\ninterval_seconds = 0.5\n", "scrape.interval_seconds"),
        ("[scrape\n", "kvtally.toml"),
        ('[[engine]]\nurl = "ftp://127.0.0.1"\n', "engine[0].url"),
    ],
)
def test_a_mistake_in_the_config_is_one_line_and_status_2(tmp_path: Path, config: str, words: str) -> None:
    with DaemonProcess(tmp_path, config) as daemon:
        assert daemon.process.wait(30) == 2
    (line,) = daemon.log().splitlines()
    assert words in line
    assert not daemon.ledger.exists()


@pytest.mark.parametrize("place", ["/proc/kvtally.db", "/dev/null/ledger.db"])
def test_a_ledger_that_cannot_be_written_is_one_line_and_status_3(place: str) -> None:
    done = kvtally("run", "--ledger", f"sqlite:///{place}")
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert place.rpartition("/")[0] in line
    assert "(" in line  # a hint


def test_a_ledger_that_another_run_holds_is_not_brought_up_to_date_under_it(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    with WriterLock(path):
        done = kvtally("run", "--ledger", f"sqlite:///{path}")
    assert done.returncode == 3
    assert f"process {os.getpid()} writes this ledger" in done.stderr
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []


class Lines:
    """Keeps the lines of a log."""

    def __init__(self) -> None:
        self.text = ""

    def __call__(self, line: str) -> None:
        self.text += line

    def bodies(self, message_or_level: str) -> list[dict[str, object]]:
        bodies = [json.loads(line) for line in self.text.splitlines()]
        return [body for body in bodies if message_or_level in {body["message"], body["level"]}]

    def wait_for(self, message: str) -> bool:
        deadline = time.monotonic() + 30
        while message not in self.text and time.monotonic() < deadline:
            time.sleep(0.02)
        return message in self.text


class Hurried:
    """A clock that runs a given number of times as fast as the true one."""

    def __init__(self, times: float) -> None:
        self._times = times
        self._began = time.monotonic()

    def __call__(self) -> float:
        return self._began + (time.monotonic() - self._began) * self._times


def test_it_tells_of_itself_once_a_minute_and_has_the_hours_settled(tmp_path: Path) -> None:
    """A tenth of a second of the ticks is three minutes for all else."""
    path = new_ledger(tmp_path)
    watched_before(path, time.time_ns() - 3 * HOUR_NS)
    lines = Lines()
    with FakeEngine() as engine:
        scrape = Scrape(interval_seconds=0.1, timeout_seconds=0.9, discover=False)
        config = Config(scrape=scrape, gpu=Gpu(enabled=False), export=Export(prometheus=Prometheus(listen="")))
        config = replace(config, engines=(complete(Engine(url=f"http://{engine.name}"), config),))
        daemon = Daemon(config, f"sqlite:///{path}", Log("json", write=lines), monotonic=Hurried(1800))
        ender = threading.Thread(target=lambda: daemon._stop.set() if settled(path) else None)
        ender.start()
        daemon.run()
        ender.join()
    minutes = lines.bodies("minute")
    assert len(minutes) > 5
    assert minutes[0]["engines"] == 0  # a first scrape closes no interval
    assert {minute["engines"] for minute in minutes[1:]} == {1}
    assert {minute["failed_scrapes"] for minute in minutes} == {0}
    # at this pace a sixth of a second of a look takes five minutes
    assert {line["message"] for line in lines.bodies("warning")} <= {LOOK_HANGS}


def test_a_look_that_does_not_end_is_told_and_the_engines_are_read_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines, let = new_ledger(tmp_path), Lines(), threading.Event()
    looks: list[int] = []

    def look(*_: object) -> Found:
        looks.append(1)
        if len(looks) > 1:
            assert let.wait(30)  # a filesystem that is gone
        return Found((), None)

    monkeypatch.setattr("kvtally.agent.daemon.look_around", look)
    with FakeEngine() as engine:
        scrape = Scrape(interval_seconds=0.1, timeout_seconds=0.9, discover=True, discover_every_seconds=5)
        config = Config(scrape=scrape, gpu=Gpu(enabled=False), export=Export(prometheus=Prometheus(listen="")))
        config = replace(config, engines=(complete(Engine(url=f"http://{engine.name}"), config),))
        daemon = Daemon(config, f"sqlite:///{path}", Log("json", write=lines), monotonic=Hurried(600))
        ender = threading.Thread(target=lambda: daemon._stop.set() if lines.wait_for(LOOK_HANGS) else None)
        ender.start()
        daemon.run()
        ender.join()
        let.set()
    assert len(looks) == 2
    assert lines.bodies(LOOK_HANGS)
    assert not lines.bodies("error")
    with closing(connect(path)) as connection:
        (intervals,) = connection.execute("SELECT count(*) FROM engine_interval").fetchone()
    assert intervals >= 3  # ten minutes to the next look, five to the word: 0.5 s of the ticks


def settled(path: str) -> bool:
    """Wait until an hour is settled."""
    deadline = time.monotonic() + 30
    with closing(sqlite3.connect(path, timeout=10)) as connection:
        while time.monotonic() < deadline:
            if connection.execute("SELECT 1 FROM settlement").fetchone():
                return True
            time.sleep(0.05)
    return False


def watched_before(path: str, at_ns: int) -> None:
    """Put an interval of a second into a ledger."""
    reading = Reading("engine", "old:1/0", {"model": "m"}, (0.0,) * len(ENGINE))
    first = Closed(reading, None, opened(reading, at_ns))
    values = tuple(0 for _ in ENGINE)
    end_ns = at_ns + SECOND_NS
    second = Closed(reading, Interval(at_ns, end_ns, values, (), 0, 0, None), first.state._replace(taken_at_ns=end_ns))
    with closing(LedgerWriter(connect(path), path)) as writer:
        writer.append([first])
        writer.append([second])


def minute_of(*rows: tuple[int | None, int | None, int | None]) -> dict[str, object]:
    """The fields of a minute with one engine's intervals of these prompt, computed and generated tokens."""
    clock = iter((100.0, 160.0))
    minute = _Minute(lambda: next(clock))
    for prompt, computed, generated in rows:
        values = (prompt, computed, None, None, generated, *[None] * (len(ENGINE) - 5))
        reading = Reading("engine", "a:1/0", {}, tuple(values))
        closed = Closed(reading, Interval(0, 1, values, None, 0, 0, None), State(1, reading.values))
        minute.add(
            [Scraped("vllm:a:1", 1, 0.0, (reading,)), Scraped("nvml", 1, 0.0, (), "failed")], Tick((closed,), ())
        )
    return minute.fields("/nowhere")


def test_a_minute_adds_up_what_its_ticks_counted() -> None:
    fields = minute_of((100, 25, 7), (300, 75, 8))
    assert fields["prompt_tokens"] == 400
    assert fields["generated_tokens"] == 15
    assert fields["reused"] == "75.0%"
    assert (fields["engines"], fields["intervals"], fields["failed_scrapes"]) == (1, 2, 2)


def test_the_reuse_of_a_minute_leaves_out_prompts_of_unknown_sources() -> None:
    assert minute_of((100, 25, 7), (300, None, 8))["reused"] == "75.0%"
    assert minute_of((300, None, 8))["reused"] is None
    assert minute_of((0, 0, 0))["reused"] is None
    assert minute_of((100, 0, 1))["reused"] == "100.0%"


def test_a_minute_can_be_told_though_the_ledger_file_is_gone() -> None:
    assert minute_of((1, 1, 1))["ledger_mib"] is None
