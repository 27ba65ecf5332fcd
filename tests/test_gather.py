from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.gather import Gatherer
from kvtally.collectors.base import CollectError, NoData, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.collectors.base import Scrape

LONG = 30.0  # what nobody waits for in a test that passes


class Prompt:
    """A source that answers at once, and says in which thread it was read."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.threads: list[str] = []

    def collect(self) -> tuple[Reading, ...]:
        self.threads.append(threading.current_thread().name)
        return (Reading("process", f"{self.source}#{len(self.threads)}", {}, ()),)


class Hanging(Prompt):
    """A source that answers only when it is let; `entered` tells that it is being read."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.entered = threading.Event()
        self.let = threading.Event()

    def collect(self) -> tuple[Reading, ...]:
        self.entered.set()
        assert self.let.wait(LONG)
        return super().collect()


class Failing(Prompt):
    """A source that raises what it is given."""

    def __init__(self, source: str, error: Exception) -> None:
        super().__init__(source)
        self.error = error

    def collect(self) -> tuple[Reading, ...]:
        raise self.error


@pytest.fixture
def gatherer() -> Iterator[Gatherer]:
    one = Gatherer(lambda: 42)
    yield one
    one.close()
    for thread in one._workers.values():
        thread.join(LONG)


def worker(source: str) -> threading.Thread | None:
    return next((thread for thread in threading.enumerate() if thread.name == source), None)


def ended(source: str) -> bool:
    thread = worker(source)
    if thread is not None:
        thread.join(LONG)
    return worker(source) is None


def free(gatherer: Gatherer, source: str, *, lies_ready: bool = True) -> None:
    """Wait until a worker has given its answer, as time between two ticks would."""
    deadline = time.monotonic() + LONG
    while gatherer._workers[source].busy or (lies_ready and gatherer._answers.empty()):
        assert time.monotonic() < deadline
        time.sleep(0.001)


def outcomes(scrapes: list[Scrape]) -> dict[str, str]:
    assert len({scrape.source for scrape in scrapes}) == len(scrapes)
    return {scrape.source: scrape.outcome for scrape in scrapes}


def names(scrapes: list[Scrape]) -> dict[str, list[str]]:
    return {scrape.source: [reading.name for reading in scrape.readings] for scrape in scrapes}


def test_every_source_is_read_once_a_tick(gatherer: Gatherer) -> None:
    gatherer.use([Prompt("vllm:a"), Prompt("vllm:b")], [Prompt("disks"), Prompt("process:a")])
    for number in (1, 2, 3):
        scrapes = gatherer.gather(LONG)
        assert names(scrapes) == {name: [f"{name}#{number}"] for name in ("vllm:a", "vllm:b", "disks", "process:a")}
        assert {scrape.taken_at_ns for scrape in scrapes} == {42}


def test_sources_that_may_hang_have_a_thread_each_and_prompt_ones_none(gatherer: Gatherer) -> None:
    sources = [Prompt("vllm:a"), Prompt("vllm:b"), Prompt("disks")]
    gatherer.use(sources[:2], sources[2:])
    gatherer.gather(LONG)
    assert [one.threads for one in sources] == [["vllm:a"], ["vllm:b"], [threading.current_thread().name]]


def test_a_lone_source_is_read_without_a_thread_of_its_own(gatherer: Gatherer) -> None:
    lone = Prompt("vllm:a")
    gatherer.use([lone], [Prompt("disks")])
    assert outcomes(gatherer.gather(LONG)) == {"vllm:a": "ok", "disks": "ok"}
    assert lone.threads == [threading.current_thread().name]
    assert worker("vllm:a") is None


def test_gpus_come_first_since_they_name_the_products_of_engines(gatherer: Gatherer) -> None:
    gatherer.use([Prompt("vllm:a"), Prompt("nvml")], [Prompt("disks")])
    assert gatherer.gather(LONG)[0].source == "nvml"
    gatherer.use([Prompt("vllm:a")], [Prompt("disks"), Prompt("nvml")])
    assert gatherer.gather(LONG)[0].source == "nvml"


def test_what_a_source_raises_is_its_own_outcome(gatherer: Gatherer) -> None:
    gatherer.use(
        [Failing("vllm:a", CollectError("refused", "start it")), Failing("nvml", NoData("no GPU")), Prompt("vllm:b")],
        [Failing("disks", ZeroDivisionError("oh"))],
    )
    found = {scrape.source: scrape for scrape in gatherer.gather(LONG)}
    assert {name: one.outcome for name, one in found.items()} == {
        "vllm:a": "failed",
        "nvml": "no_data",
        "vllm:b": "ok",
        "disks": "failed",
    }
    assert (found["vllm:a"].reason, found["vllm:a"].hint) == ("refused", "start it")
    assert found["disks"].reason == "ZeroDivisionError: oh"


def test_a_source_that_hangs_fails_its_tick_and_holds_up_nobody(gatherer: Gatherer) -> None:
    hanging = Hanging("vllm:a")
    gatherer.use([hanging, Prompt("vllm:b")], [Prompt("disks")])
    scrapes = gatherer.gather(0.05)
    assert outcomes(scrapes) == {"vllm:a": "failed", "vllm:b": "ok", "disks": "ok"}
    (late,) = [scrape for scrape in scrapes if scrape.source == "vllm:a"]
    assert (late.reason, late.readings, late.taken_at_ns) == ("vllm:a gave no answer in 0.05 s", (), 42)
    # while it hangs it is not asked again, and nobody waits for it
    scrapes = gatherer.gather(LONG)
    assert outcomes(scrapes) == {"vllm:a": "failed", "vllm:b": "ok", "disks": "ok"}
    (late,) = [scrape for scrape in scrapes if scrape.source == "vllm:a"]
    assert late.reason == "vllm:a is still busy with an earlier scrape"
    hanging.let.set()


def test_an_answer_that_comes_late_is_not_taken_for_the_next_ticks(gatherer: Gatherer) -> None:
    hanging = Hanging("vllm:a")
    gatherer.use([hanging, Prompt("vllm:b")], [])
    gatherer.gather(0.05)
    hanging.let.set()
    free(gatherer, "vllm:a")
    assert names(gatherer.gather(LONG)) == {"vllm:a": ["vllm:a#2"], "vllm:b": ["vllm:b#2"]}


def test_an_answer_that_comes_while_the_next_tick_waits_is_not_taken_either(gatherer: Gatherer) -> None:
    late, slow = Hanging("vllm:a"), Hanging("vllm:b")
    gatherer.use([late, slow], [])
    slow.let.set()
    assert outcomes(gatherer.gather(0.05))["vllm:a"] == "failed"
    slow.let.clear()
    slow.entered.clear()

    def answers() -> None:
        slow.entered.wait(LONG)
        late.let.set()
        free(gatherer, "vllm:a", lies_ready=False)  # the waiting tick takes it, and leaves it out
        slow.let.set()

    helper = threading.Thread(target=answers)
    helper.start()
    scrapes = gatherer.gather(LONG)
    helper.join()
    assert outcomes(scrapes) == {"vllm:a": "failed", "vllm:b": "ok"}
    assert outcomes(gatherer.gather(LONG)) == {"vllm:a": "ok", "vllm:b": "ok"}


def test_answers_that_lie_ready_count_though_a_prompt_source_took_all_the_time(gatherer: Gatherer) -> None:
    class Slow(Prompt):
        def collect(self) -> tuple[Reading, ...]:
            while gatherer._answers.qsize() < 2:
                time.sleep(0.001)
            time.sleep(0.02)  # past the deadline
            return super().collect()

    gatherer.use([Prompt("vllm:a"), Prompt("vllm:b")], [Slow("processes")])
    assert outcomes(gatherer.gather(0.01)) == {"vllm:a": "ok", "vllm:b": "ok", "processes": "ok"}


def test_sources_that_stay_keep_their_thread_and_those_that_go_end_theirs(gatherer: Gatherer) -> None:
    stays, goes = Prompt("vllm:a"), Prompt("vllm:b")
    gatherer.use([stays, goes], [])
    thread = worker("vllm:a")
    gatherer.use([stays, Prompt("vllm:c")], [])
    assert worker("vllm:a") is thread is not None
    assert ended("vllm:b")
    assert outcomes(gatherer.gather(LONG)) == {"vllm:a": "ok", "vllm:c": "ok"}


def test_another_collector_of_the_same_source_replaces_the_one_before(gatherer: Gatherer) -> None:
    old, new, other = Hanging("vllm:a"), Prompt("vllm:a"), Prompt("vllm:b")
    gatherer.use([old, other], [])
    gatherer.gather(0.05)
    gatherer.use([new, other], [])
    old.let.set()
    assert names(gatherer.gather(LONG)) == {"vllm:a": ["vllm:a#1"], "vllm:b": ["vllm:b#2"]}
    assert (new.threads, other.threads) == (["vllm:a"], ["vllm:b"] * 2)
    assert len(old.threads) <= 1  # its late answer is nobody's


def test_a_source_that_is_alone_from_now_on_needs_its_thread_no_more(gatherer: Gatherer) -> None:
    lone = Prompt("vllm:a")
    gatherer.use([lone, Prompt("vllm:b")], [])
    gatherer.use([lone], [])
    assert ended("vllm:a")
    assert ended("vllm:b")
    gatherer.gather(LONG)
    assert lone.threads == [threading.current_thread().name]


def test_a_source_that_hangs_is_not_read_by_two_threads_when_it_is_left_alone(gatherer: Gatherer) -> None:
    hanging, goes = Hanging("vllm:a"), Prompt("vllm:b")
    gatherer.use([hanging, goes], [])
    gatherer.gather(0.05)
    gatherer.use([hanging], [])
    assert outcomes(gatherer.gather(0.05)) == {"vllm:a": "failed"}
    hanging.let.set()
    free(gatherer, "vllm:a")
    assert outcomes(gatherer.gather(LONG)) == {"vllm:a": "ok"}
    assert hanging.threads == ["vllm:a"] * 2


def test_closing_ends_the_threads_and_one_that_hangs_holds_up_no_exit() -> None:
    gatherer = Gatherer(lambda: 42)
    hanging = Hanging("vllm:hangs")
    gatherer.use([hanging, Prompt("vllm:ends")], [])
    gatherer.gather(0.05)
    gatherer.close()
    assert ended("vllm:ends")
    thread = worker("vllm:hangs")
    assert thread is not None
    assert thread.daemon
    hanging.let.set()
    assert ended("vllm:hangs")


def test_without_sources_there_is_nothing_to_wait_for(gatherer: Gatherer) -> None:
    assert gatherer.gather(LONG) == []
    gatherer.use([], [])
    assert gatherer.gather(LONG) == []


class Kept(Hanging):
    """A source that keeps something open, and says in which thread it was closed."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.let.set()
        self.closed: list[str] = []

    def close(self) -> None:
        self.closed.append(threading.current_thread().name)


def test_a_source_that_is_read_no_more_is_closed_by_the_thread_that_reads_it_once_it_has_its_answer(
    gatherer: Gatherer,
) -> None:
    gone, stays = Kept("vllm:gone"), Kept("vllm:stays")
    gone.let.clear()
    gatherer.use([gone, stays], [])
    gatherer.gather(0.01)
    assert gone.entered.wait(LONG)
    gatherer.use([Prompt("vllm:new"), stays], [])
    assert gone.closed == []
    gone.let.set()
    assert ended("vllm:gone")
    assert (gone.closed, stays.closed) == (["vllm:gone"], [])


def test_a_source_that_goes_from_a_thread_to_the_caller_and_back_stays_open(gatherer: Gatherer) -> None:
    here, own = Kept("vllm:a"), threading.current_thread().name
    gatherer.use([here], [])
    gatherer.use([here, Prompt("vllm:b")], [])
    gatherer.use([here], [])
    assert ended("vllm:a")
    gatherer.gather(LONG)
    assert (here.threads, here.closed) == ([own], [])
    gatherer.use([Prompt("vllm:b")], [])
    assert here.closed == [own]


def test_the_end_closes_every_source(gatherer: Gatherer) -> None:
    lone, two = Kept("vllm:a"), [Kept("vllm:b"), Kept("vllm:c")]
    gatherer.use([lone], [])
    gatherer.close()
    assert lone.closed == [threading.current_thread().name]
    gatherer.use(two, [])
    gatherer.close()
    assert all(ended(one.source) for one in two)
    assert [one.closed for one in two] == [["vllm:b"], ["vllm:c"]]
