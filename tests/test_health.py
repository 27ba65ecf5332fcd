from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from kvtally import __version__
from kvtally.agent.health import ALIVE_SECONDS, OWN, SOURCES_MAX, Family, Health, rendered
from kvtally.agent.interval import Interval, opened
from kvtally.agent.ledger.append import Closed
from kvtally.agent.ledger.errors import LedgerError
from kvtally.agent.pipeline import Tick
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from pathlib import Path

    from kvtally.collectors.base import Kind, Outcome

SECOND = 1_000_000_000
START = 1_795_406_400 * SECOND


def scrape(source: str, outcome: Outcome = "ok", took: float = 0.25) -> Scrape:
    return Scrape(source, START, took, (), outcome, "" if outcome == "ok" else "a reason")


def closed(kind: Kind, end_ns: int) -> Closed:
    reading = Reading(kind, "one", {}, (0.0,) * len(QUANTITIES[kind]))
    return Closed(reading, Interval(end_ns - SECOND, end_ns, (), (), 0, 0, None), opened(reading, end_ns))


def tick(*ends: Closed, error: LedgerError | None = None) -> Tick:
    return Tick(tuple(ends), (), error)


def told(health: Health, now_ns: int = START, age: float | None = None) -> dict[tuple[str, ...], float]:
    """Every value by its name and the values of its labels."""
    return {
        (family.name, *labels.values()): value
        for family in health.families(now_ns, age)
        for labels, value in family.samples
    }


def test_scrapes_are_counted_by_source_and_outcome_and_the_last_one_tells_its_length() -> None:
    health = Health("ledger.db")
    health.add([scrape("vllm:a"), scrape("nvml", took=0.5)], tick())
    health.add([scrape("vllm:a", "failed", 2.0), scrape("nvml", "no_data", 0.1)], tick())
    health.add([scrape("vllm:a")], tick())
    shown = told(health)
    assert shown["kvtally_scrapes", "vllm:a", "ok"] == 2
    assert shown["kvtally_scrapes", "vllm:a", "failed"] == 1
    assert shown["kvtally_scrapes", "nvml", "no_data"] == 1
    assert shown["kvtally_scrape_duration_seconds", "vllm:a"] == 0.25
    assert shown["kvtally_scrape_duration_seconds", "nvml"] == 0.1


def test_sources_that_come_and_go_do_not_fill_the_memory() -> None:
    health = Health("ledger.db")
    for number in range(3 * SOURCES_MAX):
        health.add([scrape("always"), scrape(f"port {number}")], tick())
    shown = told(health)
    assert shown["kvtally_scrapes", "always", "ok"] == 3 * SOURCES_MAX
    assert shown["kvtally_scrapes", f"port {3 * SOURCES_MAX - 1}", "ok"] == 1
    assert ("kvtally_scrapes", "port 0", "ok") not in shown
    assert sum(key[0] == "kvtally_scrapes" for key in shown) == SOURCES_MAX


def test_the_lag_is_the_age_of_the_newest_interval_that_was_written() -> None:
    health = Health("ledger.db")
    health.add([], tick(closed("engine", START), closed("gpu", START - SECOND)))
    health.add([], tick(error=LedgerError("disk full", "make room")))
    shown = told(health, START + 7 * SECOND)
    assert shown["kvtally_ledger_lag_seconds",] == 7
    assert (shown["kvtally_intervals", "engine"], shown["kvtally_intervals", "gpu"]) == (1, 1)
    assert shown["kvtally_failed_writes",] == 1
    assert told(health, START - SECOND)["kvtally_ledger_lag_seconds",] == 0  # a clock that was set back


def test_what_never_came_is_as_old_as_this_process() -> None:
    now = [100.0]
    health = Health("ledger.db", lambda: now[0])
    now[0] += 1800
    health.add([], tick(error=LedgerError("disk full", "make room")))
    shown = told(health)
    assert (shown["kvtally_ledger_lag_seconds",], shown["kvtally_snapshot_age_seconds",]) == (1800, 1800)
    health.add([], tick(closed("engine", START)))
    shown = told(health, START + 7 * SECOND, age=12.5)
    assert (shown["kvtally_ledger_lag_seconds",], shown["kvtally_snapshot_age_seconds",]) == (7, 12.5)


def test_it_is_ready_with_the_first_tick_that_was_written_and_stays_so() -> None:
    health = Health("ledger.db")
    seen = [health.is_ready]
    for error in (LedgerError("locked", ""), None, LedgerError("disk full", "")):
        health.add([], tick(error=error))
        seen.append(health.is_ready)
    assert seen == [False, False, True, True]


def test_it_is_alive_as_long_as_ticks_come() -> None:
    now = [100.0]
    health = Health("ledger.db", lambda: now[0])
    assert health.is_alive
    now[0] += ALIVE_SECONDS - 1
    assert health.is_alive
    now[0] += 1
    assert not health.is_alive
    health.add([], tick())
    assert health.is_alive


def test_the_size_of_the_ledger_and_the_process_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    health = Health(str(path))
    assert ("kvtally_ledger_bytes",) not in told(health)
    path.write_bytes(b"x" * 4096)
    shown = told(health, age=12.5)
    assert shown["kvtally_ledger_bytes",] == 4096
    assert shown["kvtally_snapshot_age_seconds",] == 12.5
    assert shown["kvtally_build_info", __version__] == 1
    assert 2**20 < shown["process_resident_memory_bytes",] < 2**40
    assert shown["process_cpu_seconds",] == pytest.approx(sum(os.times()[:2]), abs=1)
    assert shown["kvtally_children_cpu_seconds",] == pytest.approx(sum(os.times()[2:4]), abs=1)


def families(page: str, *, openmetrics: bool) -> dict[str, Any]:
    parse = openmetrics_families if openmetrics else text_families
    text = page + "# EOF\n" if openmetrics else page
    return {family.name: family for family in parse(text)}


@pytest.mark.parametrize("openmetrics", [False, True])
def test_the_page_parses_and_says_the_same(*, openmetrics: bool) -> None:
    health = Health("ledger.db")
    hostile = 'http://[::1]:8000/"x"\\y\nz'
    health.add([scrape(hostile), scrape("b", "failed")], tick(closed("engine", START)))
    page = rendered(health.families(START, 1.0), openmetrics=openmetrics)
    found = families(page, openmetrics=openmetrics)
    assert (found["kvtally_scrapes"].type, found["kvtally_ledger_lag_seconds"].type) == ("counter", "gauge")
    shown = {(one.name, *one.labels.values()): one.value for one in found["kvtally_scrapes"].samples}
    assert shown == {("kvtally_scrapes_total", hostile, "ok"): 1, ("kvtally_scrapes_total", "b", "failed"): 1}
    assert page.count("# TYPE ") == page.count("# HELP ") == len(found)


def test_every_metric_that_is_listed_can_be_on_the_page(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    health = Health(str(path))
    health.add([scrape("a")], tick(closed("engine", START)))
    families = list(health.families(START, 1.0))
    assert {family.name for family in families if family.samples} == OWN.keys()
    for family in families:
        assert (family.kind, family.meaning) == OWN[family.name][:2]
        assert all(tuple(labels) == OWN[family.name].labels for labels, _ in family.samples)


def test_a_family_without_samples_is_not_on_the_page() -> None:
    assert rendered([Family("kvtally_nothing", "gauge", "Nothing", ())], openmetrics=False) == ""


def test_pages_can_be_asked_for_while_ticks_are_counted() -> None:
    health = Health("ledger.db")
    is_over = threading.Event()

    def count() -> None:
        number = 0
        while not is_over.is_set():
            number += 1
            health.add([scrape(f"port {number}")], tick())

    thread = threading.Thread(target=count)
    thread.start()
    try:
        for _ in range(300):
            assert "kvtally_build_info" in rendered(health.families(START, None), openmetrics=False)
    finally:
        is_over.set()
        thread.join()
