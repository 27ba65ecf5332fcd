from __future__ import annotations

import math
import random
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pytest
from tests import ledger_child
from tests.ledgers import HOUR, SECOND, START, FakeEngine, FakeGpu, new_ledger, reader_of

from kvtally.agent.audit import audit
from kvtally.agent.finding import Finding
from kvtally.agent.interval import UNASKED, Interval, State
from kvtally.agent.ledger.append import Closed, LedgerWriter, decoded, encoded
from kvtally.agent.ledger.columns import quantity_columns
from kvtally.agent.ledger.errors import LedgerBusy, LedgerUnreachable
from kvtally.agent.ledger.place import connect
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.rates import RateBook
from kvtally.agent.recording import Page, open_recording
from kvtally.agent.replay import Replay
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import ENGINE
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.pipeline import Tick

DEMO = files("kvtally.agent") / "demo" / "h100-llama8b.tar.xz"


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def rows(path: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def dump(path: str) -> list[str]:
    """The text of `sqlite3 LEDGER .dump`."""
    with closing(sqlite3.connect(path)) as connection:
        return list(connection.iterdump())


def audited(path: str) -> list[Finding]:
    with reader_of(path) as reader:
        return audit(reader, RateBook([]))


class Run:
    """One kvtally over a ledger: its writer, its pipeline, and the engine and GPU that it reads."""

    def __init__(self, path: str, engine: FakeEngine | None = None, gpu: FakeGpu | None = None) -> None:
        self.connection = connect(path, busy_seconds=0.1)
        self.writer = LedgerWriter(self.connection, path)
        self.engine, self.gpu = engine or FakeEngine(), gpu or FakeGpu("GPU-a")
        self.pipeline = Pipeline(self.writer, self.writer.states(), list, interval_ns=10 * SECOND, started_ns=START)

    def tick(self, second: int) -> Tick:
        """Scrape both; since the last time the engine has served 100 tokens."""
        self.engine.serve(computed=60, hbm=40, generated=10, steps=5)
        self.gpu.run(10, 5)
        at_ns = START + second * SECOND
        return self.pipeline.tick(
            [
                Scrape("vllm", at_ns, 0.0, (self.engine.reading(),)),
                Scrape("nvml", at_ns, 0.0, (self.gpu.reading(),)),
            ]
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.writer.close()


def prompt_tokens(path: str) -> int:
    return int(rows(path, "SELECT coalesce(sum(prompt_tokens), 0) FROM engine_interval")[0][0])


def test_a_first_scrape_opens_an_interval_and_writes_none(path: str) -> None:
    with Run(path) as run:
        tick = run.tick(0)
    assert [closed.interval for closed in tick.closed] == [None, None]
    assert rows(path, "SELECT count(*) FROM engine_interval") == [(0,)]
    states = rows(path, "SELECT kind, name, taken_at_ns FROM counter_state ORDER BY kind")
    assert states == [("engine", "127.0.0.1:8000/0", START), ("gpu", "GPU-a", START)]


def test_an_interval_is_a_row_a_part_of_its_hour_and_the_next_ones_beginning(path: str) -> None:
    with Run(path) as run:
        for second in (0, 10, 20, 3600, 3610):
            assert run.tick(second).error is None
    columns = "start_ns, length_ns, missed, flags, began_ns, prompt_tokens, computed_tokens, hbm_tokens, details"
    assert rows(path, f"SELECT {columns} FROM engine_interval ORDER BY start_ns LIMIT 1") == [
        # identity holds; details: 40 cached tokens, 5 steps in the second bucket
        (START, 10 * SECOND, 0, 128, None, 100, 60, 40, bytes([1, 40, 2, 5])),
    ]
    columns = "hour_ns, intervals, length_ns, missed, flags, prompt_tokens, generated_tokens"
    assert rows(path, f"SELECT {columns} FROM engine_hour ORDER BY hour_ns") == [
        # the interval from 04:00:20 to 05:00 missed 357 scrapes and belongs to the hour in which it begins
        (START, 3, HOUR, 357, 128, 300, 30),
        (START + HOUR, 1, 10 * SECOND, 0, 128, 100, 10),
    ]
    assert rows(path, "SELECT taken_at_ns FROM counter_state") == [(START + 3610 * SECOND,)] * 2
    assert audited(path) == []


def test_an_unknown_difference_adds_nothing_to_its_hour_and_does_not_hide_the_others(path: str) -> None:
    with Run(path) as run:
        for second, known in enumerate((True, False, True, True)):
            run.engine.serve(computed=100)
            reading = run.engine.reading()
            if not known:
                reading = reading._replace(values=(None, *reading.values[1:]))
            run.pipeline.tick([Scrape("vllm", START + second * SECOND, 0.0, (reading,))])
    assert rows(path, "SELECT prompt_tokens FROM engine_interval ORDER BY start_ns") == [(None,), (200,), (100,)]
    assert rows(path, "SELECT prompt_tokens, computed_tokens, external_hit_tokens FROM engine_hour") == [(300, 300, 0)]


def test_a_quantity_that_is_never_told_is_null_in_its_hour_too(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.tick(10)
    assert rows(path, "SELECT power_sampled_mj FROM gpu_hour") == [(0,)]
    with Run(path) as run:
        run.gpu.counts["power_sampled_mj"] = None  # type: ignore[assignment]
        run.gpu.name = "GPU-b"
        run.tick(100)
        run.tick(110)
    query = "SELECT power_sampled_mj FROM gpu_hour JOIN target ON target.id = target_id WHERE name = 'GPU-b'"
    assert rows(path, query) == [(None,)]


def test_another_version_of_an_engine_is_another_target_and_goes_on_in_time(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.tick(10)
        run.engine.attributes = {**run.engine.attributes, "version": "0.26.0"}
        run.tick(20)
        run.tick(30)
    query = "SELECT target_id, start_ns FROM engine_interval ORDER BY start_ns"
    assert rows(path, query) == [(1, START), (3, START + 10 * SECOND), (3, START + 20 * SECOND)]
    assert rows(path, "SELECT target_id FROM counter_state WHERE kind = 'engine'") == [(3,)]
    assert audited(path) == []


def test_an_engine_that_starts_while_it_is_watched_begins_with_its_process(path: str) -> None:
    with Run(path, FakeEngine(epoch=START / 1e9 + 50)) as run:
        assert run.tick(80).error is None
        assert run.tick(90).error is None
    assert rows(path, "SELECT start_ns, length_ns, began_ns, prompt_tokens FROM engine_interval ORDER BY 1") == [
        (START + 50 * SECOND, 30 * SECOND, START + 50 * SECOND, 100),
        (START + 80 * SECOND, 10 * SECOND, None, 100),
    ]
    assert audited(path) == []


@pytest.mark.parametrize("table", ["target", "engine_interval", "engine_hour", "gpu_interval", "gpu_hour", "finding"])
def test_a_tick_that_fails_in_its_middle_is_not_written_at_all(path: str, table: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.tick(10)
        run.connection.execute(f"CREATE TRIGGER broken BEFORE INSERT ON {table} BEGIN SELECT RAISE(ABORT, 'no'); END")
        before, states = dump(path), dict(run.pipeline.states)
        run.engine.attributes = {**run.engine.attributes, "version": "0.26.0"}  # so that `target` is written too
        run.engine.serve(computed=1)
        at_ns = START + 20 * SECOND
        scrapes = [
            Scrape("vllm", at_ns, 0.0, (run.engine.reading(),)),
            Scrape("nvml", at_ns, 0.0, (run.gpu.reading(),)),
        ]
        tick = run.pipeline.tick(scrapes, [Finding("a", "info", "", START, START, "b")])
        assert isinstance(tick.error, LedgerUnreachable)
        assert tick.closed == ()
        assert dump(path) == before
        assert run.pipeline.states == states
        run.connection.execute("DROP TRIGGER broken")
        assert run.tick(30).error is None
    # the next tick covers the one that was lost, and says so
    assert rows(path, "SELECT start_ns, length_ns, missed, prompt_tokens FROM engine_interval ORDER BY 1") == [
        (START, 10 * SECOND, 0, 100),
        (START + 10 * SECOND, 20 * SECOND, 1, 101),
    ]
    assert audited(path) == []


def test_a_full_disk_loses_nothing(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        (pages,) = run.connection.execute("PRAGMA page_count").fetchone()
        run.connection.execute(f"PRAGMA max_page_count = {pages + 2}")
        second, error = 0, None
        while error is None:
            second += 10
            before = dump(path)
            error = run.tick(second).error
            assert second < 10_000
        assert isinstance(error, LedgerUnreachable)
        assert str(error) == f"{path}: the disk is full"
        assert error.hint == "free space; the next interval then covers the gap"
        assert dump(path) == before
        assert run.tick(second + 10).error is not None
        run.connection.execute("PRAGMA max_page_count = 100000")
        assert run.tick(second + 20).error is None
        expected = run.engine.counts["prompt_tokens"] - 100  # what it had served when it was first seen
    assert prompt_tokens(path) == expected
    assert rows(path, "SELECT max(missed) FROM engine_interval") == [(2,)]
    assert audited(path) == []


def test_a_ledger_that_somebody_holds_is_busy_and_the_next_tick_covers_the_gap(path: str) -> None:
    with Run(path) as run, closing(sqlite3.connect(path, isolation_level=None)) as other:
        run.tick(0)
        other.execute("BEGIN EXCLUSIVE")
        error = run.tick(10).error
        assert isinstance(error, LedgerBusy)
        assert str(error) == f"{path}: locked by another process"
        assert "nothing is lost" in error.hint
        with pytest.raises(LedgerBusy):
            run.pipeline.skip(SECOND, Finding("clock_set_forward", "warning", "", START, START + SECOND, "a step"))
        other.execute("ROLLBACK")
        assert run.tick(20).error is None
    assert rows(path, "SELECT start_ns, length_ns, missed, prompt_tokens FROM engine_interval") == [
        (START, 20 * SECOND, 1, 200)
    ]
    assert audited(path) == []


def test_a_write_only_connection_that_turned_read_only_is_one_clear_error(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.connection.execute("PRAGMA query_only = 1")
        error = run.tick(10).error
        assert isinstance(error, LedgerUnreachable)
        assert str(error) == f"{path}: read-only"
        run.connection.execute("PRAGMA query_only = 0")
        assert run.tick(20).error is None
    assert prompt_tokens(path) == 200


def test_a_page_that_is_damaged_under_the_writer_is_one_clear_error(path: str) -> None:
    with Run(path) as run:
        for second in range(0, 900, 10):
            run.tick(second)
    whole = Path(path).read_bytes()
    scrape = Scrape("vllm", START + 1000 * SECOND, 0.0, (run.engine.reading(),))
    refused = 0
    for number in range(1, len(whole) // 4096):
        Path(path).write_bytes(whole[: number * 4096] + b"\xff" * 4096 + whole[(number + 1) * 4096 :])
        try:
            with closing(LedgerWriter(connect(path), path)) as writer:
                error = Pipeline(writer, writer.states(), list, interval_ns=None, started_ns=START).tick([scrape]).error
        except LedgerUnreachable as caught:
            error = caught
        if error is not None:
            refused += 1
            assert str(error).startswith(f"{path}: damaged or not a SQLite database")
            assert error.hint
    assert refused > 5  # of the pages that a tick touches


def test_a_difference_beyond_64_bits_is_unknown_and_its_tick_is_written(path: str) -> None:
    reading = FakeEngine().reading()
    state = State(START + SECOND, reading.values, reading.epoch, None, reading.detail_names, reading.details)
    values = (100, 2**63 - 1, 2**63, -(2**63) - 1, *[None] * (len(ENGINE) - 4))
    interval = Interval(START, START + SECOND, values, (0, 0, 0), 0, 0, START)
    with closing(LedgerWriter(connect(path), path)) as writer:
        writer.append([Closed(reading, interval, state)])
    columns = "prompt_tokens, computed_tokens, hbm_tokens, external_tokens"
    assert rows(path, f"SELECT {columns} FROM engine_interval") == [(100, 2**63 - 1, None, None)]
    assert rows(path, f"SELECT {columns} FROM engine_hour") == [(100, 2**63 - 1, None, None)]


def test_a_page_that_shows_an_impossible_counter_does_not_keep_the_others_from_the_ledger(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.engine.counts |= {"preemptions": 1e300, "queue_ns": 1e305}
        assert run.tick(10).error is None
        assert run.tick(20).error is None
    query = "SELECT prompt_tokens, preemptions, queue_ns FROM engine_interval ORDER BY start_ns LIMIT 1"
    assert rows(path, query) == [(100, None, None)]
    assert prompt_tokens(path) == 200
    assert audited(path) == []


def test_of_two_writers_the_one_that_comes_later_counts_nothing_twice(path: str) -> None:
    engine, gpu = FakeEngine(), FakeGpu("GPU-a")
    with Run(path, engine, gpu) as first:
        first.tick(0)
        with Run(path, engine, gpu) as second:  # it reads the same states, and has no lock
            assert first.tick(10).error is None
            before = dump(path)
            error = second.tick(20).error
            assert isinstance(error, LedgerUnreachable)
            assert str(error) == f"{path}: somebody else wrote counters of engine/127.0.0.1:8000/0"
            assert "only one `kvtally run` may write a ledger" in error.hint
            assert dump(path) == before
        assert first.tick(30).error is None
    assert prompt_tokens(path) == engine.counts["prompt_tokens"] - 100
    assert audited(path) == []


def test_of_two_writers_that_both_found_an_empty_ledger_one_is_refused(path: str) -> None:
    engine, gpu = FakeEngine(), FakeGpu("GPU-a")
    with Run(path, engine, gpu) as first, Run(path, engine, gpu) as second:
        first.tick(0)
        first.tick(10)
        assert second.tick(20).error is None  # it asks for the counters that the first one left, and goes on from them
        assert isinstance(first.tick(30).error, LedgerUnreachable)
        assert second.tick(40).error is None
    assert prompt_tokens(path) == engine.counts["prompt_tokens"] - 100
    assert audited(path) == []


def test_of_many_targets_those_that_were_read_last_are_held_and_the_others_recalled(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtally.agent.ledger.append._STATES_MAX", 2)
    monkeypatch.setattr("kvtally.agent.ledger.append._IDS_MAX", 2)
    engines = [FakeEngine(f"10.0.0.{number}:8000/0") for number in range(4)]
    for second, engine in enumerate(engines):
        with Run(path, engine) as run:
            assert not [name for kind, name in run.writer.states() if kind == "engine" and name == engine.name]
            run.tick(second)
    with Run(path, engines[0]) as run:
        assert len(run.writer.states()) == 2
        assert run.writer.recall("engine", engines[0].name) is not None
        assert run.writer.recall("gpu", engines[0].name) is None
        for second in (10, 20):
            assert run.tick(second).error is None
    assert prompt_tokens(path) == 200
    assert audited(path) == []


def test_a_clock_set_forward_is_left_out_of_every_interval(path: str) -> None:
    step = Finding("clock_set_forward", "warning", "", START + 10 * SECOND, START + 10 * SECOND + HOUR, "a step")
    with Run(path) as run:
        run.tick(0)
        run.tick(10)
        run.pipeline.skip(HOUR, step)
        run.tick(3620)
    assert rows(path, "SELECT start_ns, length_ns FROM engine_interval ORDER BY 1") == [
        (START, 10 * SECOND),
        (START + HOUR + 10 * SECOND, 10 * SECOND),
    ]
    with reader_of(path) as reader:
        assert reader.findings(START, START + 2 * HOUR) == [step]
    assert audited(path) == []


def test_the_counters_of_a_clock_step_that_closed_nothing_yet_are_in_step(path: str) -> None:
    step = Finding("clock_set_forward", "warning", "", START + 10 * SECOND, START + 10 * SECOND + HOUR, "a step")
    with Run(path) as run:
        run.tick(0)
        run.tick(10)
        run.pipeline.skip(HOUR, step)
    assert audited(path) == []


def test_states_come_back_as_they_were_kept(path: str) -> None:
    with Run(path) as run:
        run.tick(0)
        run.engine.counts["queue_ns"] = 0.1 + 0.2  # no rounding on the way
        run.tick(10)
        kept = dict(run.pipeline.states)
    with Run(path) as run:
        assert run.pipeline.states == kept


def test_a_state_of_parts_comes_back_whole() -> None:
    values = (None,) * len(quantity_columns("process"))
    parts = {"17 3.5": (1.5, None, 2.0, 0.0, 0.0, None, None), "18 4.0": values}
    state = State(START, values, 7.25, None, (), (), parts, True, {"cpu_ns": "counter_missing"})
    assert decoded("process", START, encoded("process", state), ()) == state


def test_a_quantity_that_an_older_kvtally_did_not_ask_for_is_known_as_such() -> None:
    names = quantity_columns("filesystem")
    values = (1.0, UNASKED, None, *(4.0 for _ in names[3:]))
    state = State(START, values, None, None, ("a",), (3.0,))
    text = encoded("filesystem", state)
    assert f'"{names[1]}"' not in text
    back = decoded("filesystem", START, text, ("a",))
    assert math.isnan(back.values[1] or 0.0)
    assert (back.values[0], back.values[2], back.details) == (1.0, None, (3.0,))


def test_an_append_without_a_pipeline_takes_any_iterable(path: str) -> None:
    reading = FakeEngine().reading()
    state = State(START, reading.values, reading.epoch, None, reading.detail_names, reading.details)
    with closing(LedgerWriter(connect(path), path)) as writer:
        writer.append((Closed(reading, None, state) for _ in range(1)), iter([Finding("a", "info", "", 1, 2, "b")]))
    assert rows(path, "SELECT count(*) FROM counter_state") == rows(path, "SELECT count(*) FROM finding") == [(1,)]


KILLS = 18


def test_a_writer_that_is_killed_again_and_again_loses_nothing_and_counts_nothing_twice(path: str) -> None:
    base_ns = time.monotonic_ns()
    moment = random.Random(9)
    with closing(LedgerWriter(connect(path), path)) as writer:
        ledger_child.pipeline_over(writer).tick(ledger_child.scrapes_at(0))
    command = [sys.executable, str(Path(ledger_child.__file__)), path, str(base_ns)]
    for number in range(KILLS):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
            assert child.stdout is not None
            assert child.stderr is not None
            if number % 6 != 5:
                assert child.stdout.readline() == "2\n", child.stderr.read()
                time.sleep(moment.uniform(0, 0.05))
            else:
                time.sleep(moment.uniform(0, 0.15))  # before it has begun, or while it begins
            child.kill()
            assert child.wait() == -9
    passed_ns = time.monotonic_ns() - base_ns
    with closing(LedgerWriter(connect(path), path)) as writer:
        assert ledger_child.pipeline_over(writer).tick(ledger_child.scrapes_at(passed_ns)).error is None
    count = passed_ns // 1000
    for table in ("engine_interval", "engine_hour"):
        query = f"SELECT sum(prompt_tokens), sum(computed_tokens), sum(hbm_tokens), sum(length_ns) FROM {table}"
        assert rows(path, query) == [(3 * count, count, 2 * count, passed_ns)]
    assert rows(path, "SELECT sum(energy_mj), sum(length_ns) FROM gpu_interval") == [(count, passed_ns)]
    intervals = rows(path, "SELECT start_ns, length_ns, missed FROM engine_interval ORDER BY start_ns")
    assert len(intervals) > 10 * KILLS
    ends = [start_ns + length_ns for start_ns, length_ns, _ in intervals]
    assert [start_ns for start_ns, *_ in intervals] == [ledger_child.BEGAN_NS, *ends[:-1]]
    # every start of a process took tens of milliseconds, at a cadence of one
    assert sum(missed >= 10 for *_, missed in intervals) >= KILLS * 5 // 6
    assert all(missed == max(0, round(length / ledger_child.CADENCE_NS) - 1) for _, length, missed in intervals)
    assert audited(path) == []


def test_a_recording_replayed_twice_makes_the_same_ledger_to_the_letter(tmp_path: Path) -> None:
    dumps = []
    for name in ("one.db", "two.db"):
        path = new_ledger(tmp_path, name)
        with closing(LedgerWriter(connect(path), path)) as writer:
            replayed = Replay(open_recording(DEMO), writer).run()
        assert replayed.pages == 95
        dumps.append(dump(path))
        assert prompt_tokens(path) == 2_828_558
        assert audited(path) == []
    assert dumps[0] == dumps[1]


def test_a_recording_replayed_into_the_same_ledger_again_adds_nothing(path: str) -> None:
    tables = ("engine_interval", "engine_hour", "gpu_interval", "gpu_hour", "process_interval", "counter_state")
    contents = []
    for _ in range(2):
        with closing(LedgerWriter(connect(path), path)) as writer:
            Replay(open_recording(DEMO), writer).run()
        contents.append({table: rows(path, f"SELECT * FROM {table}") for table in tables})
    assert contents[0] == contents[1]
    assert prompt_tokens(path) == 2_828_558
    assert audited(path) == []


def real_readings(count: int) -> Iterator[Reading]:
    """The engine of the demo's recording, second by second; when it ends its counters go on from where they stood."""
    recording = open_recording(DEMO)
    mapper = PageMapper(recording.name, (VllmMapping(),), "0.25.1")
    pages = [mapper.read(event.body)[0] for event in recording.events() if isinstance(event, Page)]
    first, last = pages[0], pages[-1]
    grown = [
        0.0 if quantity.type == "gauge" or end is None or begin is None else end - begin
        for quantity, begin, end in zip(ENGINE, first.values, last.values, strict=True)
    ]
    for number in range(count):
        rounds, at = divmod(number, len(pages) - 1)
        page = pages[at]
        values = (
            None if value is None else value + rounds * more for value, more in zip(page.values, grown, strict=True)
        )
        details = (
            value + rounds * (end - begin)
            for value, begin, end in zip(page.details, first.details, last.details, strict=True)
        )
        yield page._replace(values=tuple(values), details=tuple(details))


def test_an_interval_of_a_real_engine_takes_less_than_150_bytes_of_the_file(path: str) -> None:
    before = Path(path).stat().st_size
    with closing(LedgerWriter(connect(path), path)) as writer:
        pipeline = Pipeline(writer, {}, list, interval_ns=SECOND, started_ns=START)
        for second, reading in enumerate(real_readings(2001)):
            assert pipeline.tick([Scrape("vllm", START + second * SECOND + 7_000_000, 0.0, (reading,))]).error is None
    assert rows(path, "SELECT count(*) FROM engine_interval") == [(2000,)]
    assert (Path(path).stat().st_size - before) / 2000 < 150
    assert audited(path) == []
