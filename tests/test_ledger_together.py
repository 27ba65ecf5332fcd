from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import SECOND, START, FakeEngine, new_ledger, reader_of

from kvtally.agent.audit import audit
from kvtally.agent.finding import Finding
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.errors import LedgerBusy
from kvtally.agent.ledger.place import connect
from kvtally.agent.pipeline import Pipeline
from kvtally.agent.rates import RateBook
from kvtally.collectors.base import Scrape

if TYPE_CHECKING:
    from pathlib import Path

    from kvtally.agent.pipeline import Tick


class Run:
    """A kvtally that writes three ticks together."""

    def __init__(self, path: str, engine: FakeEngine) -> None:
        self.path, self.engine = path, engine
        self.writer = LedgerWriter(connect(path, busy_seconds=0.1), path, ticks_together=3)
        self.pipeline = Pipeline(self.writer, self.writer.states(), list, interval_ns=SECOND, started_ns=START)

    def tick(self, second: int) -> Tick:
        """Scrape; since the last time the engine has served 100 tokens."""
        self.engine.serve(computed=60, hbm=40, generated=10, steps=5)
        scrape = Scrape("vllm", START + second * SECOND, 0.0, (self.engine.reading(),))
        return self.pipeline.tick([scrape])

    def written(self) -> list[tuple[int, int, int]]:
        """Start in seconds, missed scrapes and prompt tokens of every interval that another process sees."""
        with closing(sqlite3.connect(self.path)) as connection:
            found = connection.execute("SELECT start_ns, missed, prompt_tokens FROM engine_interval ORDER BY 1")
            return [((start_ns - START) // SECOND, missed, tokens) for start_ns, missed, tokens in found]


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def audited(path: str) -> list[Finding]:
    with reader_of(path) as reader:
        return audit(reader, RateBook([]))


def test_ticks_are_held_until_enough_of_them_share_a_transaction(path: str) -> None:
    run = Run(path, FakeEngine())
    seen = []
    for second in range(8):
        run.tick(second)
        seen.append(len(run.written()))
    run.writer.close()
    # the first scrape is written at once, and what is held at the end when the writer closes
    assert seen == [0, 0, 0, 3, 3, 3, 6, 6]
    assert run.written() == [(second, 0, 100) for second in range(7)]
    assert audited(path) == []


def test_a_tick_with_a_finding_is_written_at_once_with_those_before_it(path: str) -> None:
    run = Run(path, FakeEngine())
    run.tick(0)
    run.tick(1)
    run.engine.restart(START / 1e9 + 1.5)
    run.tick(2)
    assert run.written() == [(0, 0, 100), (1, 0, 100)]
    run.writer.close()
    with reader_of(path) as reader:
        assert [one.kind for one in reader.findings(0, 2**62)] == ["tokens_lost"]


def test_a_process_that_dies_with_ticks_in_hand_loses_their_grain_and_no_token(path: str) -> None:
    engine = FakeEngine()
    dies = Run(path, engine)
    for second in range(6):
        dies.tick(second)
    # killed: two ticks were in its hands
    dies.writer._connection.close()
    goes_on = Run(path, engine)
    goes_on.tick(9)
    goes_on.writer.close()
    assert goes_on.written() == [(0, 0, 100), (1, 0, 100), (2, 0, 100), (3, 5, 300)]
    assert audited(path) == []


def test_a_ledger_that_is_locked_keeps_what_is_held_and_the_next_interval_covers_the_rest(path: str) -> None:
    run = Run(path, FakeEngine())
    run.tick(0)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        errors = [run.tick(second).error for second in (1, 2, 3, 4)]
        with pytest.raises(LedgerBusy):
            run.pipeline.skip(SECOND, Finding("clock_set_forward", "warning", "", START, START + SECOND, "a step"))
        other.execute("ROLLBACK")
    assert [type(error) for error in errors] == [type(None), type(None), LedgerBusy, LedgerBusy]
    assert run.tick(5).error is None
    run.writer.close()
    assert run.written() == [(0, 0, 100), (1, 0, 100), (2, 2, 300)]
    assert audited(path) == []
