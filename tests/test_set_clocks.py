from __future__ import annotations

import itertools
import threading
import time
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace
from tests.daemon_process import DaemonProcess
from tests.ledgers import new_ledger
from tests.loopback import FakeEngine, Tokens

from kvtally.agent.config import Config, Engine, Gpu, Scrape, complete
from kvtally.agent.daemon import Daemon
from kvtally.agent.log import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.daemon_process import Row

SECOND_NS = 10**9
HOUR_NS = 3600 * SECOND_NS


class Clocks:
    """Clocks that somebody sets, and a machine that sleeps."""

    def __init__(self) -> None:
        self.set_by_ns = 0
        self.slept_ns = 0

    def wall_ns(self) -> int:
        return time.time_ns() + self.set_by_ns + self.slept_ns

    def steady_ns(self) -> int:
        return time.monotonic_ns() + self.slept_ns


class Watch:
    """A daemon in this process, ten ticks a second, on clocks that are set while it runs."""

    def __init__(self, folder: Path, engine: FakeEngine) -> None:
        self.clocks = Clocks()
        self.engine = engine
        self.lines: list[str] = []
        self.ledger = DaemonProcess(folder, "")  # never started: it reads the ledger
        new_ledger(folder)
        config = Config(
            scrape=Scrape(interval_seconds=0.1, timeout_seconds=0.9, discover=False), gpu=Gpu(enabled=False)
        )
        self._config = replace(config, engines=(complete(Engine(url=f"http://{engine.name}"), config),))

    def run(self, *changes: Callable[[], None]) -> None:
        """Run until all changes are made, each after two scrapes with traffic before and after."""
        log = Log(write=self.lines.append)
        daemon = Daemon(
            self._config, self.ledger.url, log, wall_ns=self.clocks.wall_ns, steady_ns=self.clocks.steady_ns
        )

        def story() -> None:
            try:
                self.engine.wait_for_scrapes(2)
                for change in changes:
                    self.engine.serve(100, 40, 7)
                    self.engine.wait_for_scrapes(2)
                    change()
                    self.engine.serve(10, 4, 1)
                    self.engine.wait_for_scrapes(2)
            finally:
                daemon._stop.set()

        teller = threading.Thread(target=story)
        teller.start()
        daemon.run()
        teller.join()

    @property
    def rows(self) -> list[Row]:
        return self.ledger.rows(self.engine.name)

    @property
    def gaps_seconds(self) -> list[float]:
        """Time that no interval covers; below 0: time that two do."""
        rows = self.rows
        gaps = ((after.start_ns - before.end_ns) / SECOND_NS for before, after in itertools.pairwise(rows))
        return [gap for gap in gaps if gap]

    @property
    def longest_seconds(self) -> float:
        return max((row.end_ns - row.start_ns) / SECOND_NS for row in self.rows)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    with FakeEngine() as engine:
        yield Watch(tmp_path, engine)


def test_a_clock_that_is_set_an_hour_forward_and_back_changes_no_token_and_no_duration(watch: Watch) -> None:
    def forward() -> None:
        watch.clocks.set_by_ns += HOUR_NS

    def back() -> None:
        watch.clocks.set_by_ns -= HOUR_NS

    watch.run(forward, back)
    assert watch.ledger.tokens(watch.engine.name) == Tokens(220, 88, 16) == watch.engine.served
    assert watch.gaps_seconds == [pytest.approx(3600, abs=0.5)]
    assert watch.longest_seconds < 5
    (ahead,), (behind,) = watch.ledger.findings("clock_set_forward"), watch.ledger.findings("clock_set_back")
    assert (ahead[3] - ahead[2]) / SECOND_NS == pytest.approx(3600, abs=0.5)
    assert (behind[3] - behind[2]) / SECOND_NS == pytest.approx(3600, abs=0.5)
    assert [line for line in watch.lines if "set forward by 3600 s" in line]
    assert [line for line in watch.lines if "3600 s behind the ledger" in line]


def test_a_clock_that_was_set_back_while_no_kvtally_ran_writes_no_time_twice(watch: Watch) -> None:
    watch.run(lambda: None)
    watch.clocks.set_by_ns -= HOUR_NS
    watch.engine.serve(1000, 0, 0)
    watch.run(lambda: None)
    assert watch.ledger.tokens(watch.engine.name) == Tokens(1220, 88, 16) == watch.engine.served
    assert watch.gaps_seconds == []
    assert watch.longest_seconds < 5
    assert len(watch.ledger.findings("clock_set_back")) == 1


def test_the_time_that_a_machine_sleeps_is_inside_an_interval(watch: Watch) -> None:
    def sleep() -> None:
        watch.clocks.slept_ns += HOUR_NS

    watch.run(sleep)
    assert watch.ledger.tokens(watch.engine.name) == Tokens(110, 44, 8) == watch.engine.served
    assert watch.gaps_seconds == []
    assert watch.longest_seconds == pytest.approx(3600, abs=5)
    assert watch.ledger.findings("clock_set_forward", "clock_set_back") == []
