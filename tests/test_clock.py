from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.clock import STEP_NS, LedgerClock, elapsed_ns
from kvtally.agent.finding import utc_text

if TYPE_CHECKING:
    from collections.abc import Callable

SECOND = 1_000_000_000
HOUR = 3600 * SECOND
NOON = 1_800_000_000 * SECOND


class Machine:
    """A machine with its two clocks."""

    def __init__(self) -> None:
        self.wall = NOON
        self.steady = 77 * SECOND

    def passes(self, by_ns: int) -> None:
        self.wall += by_ns
        self.steady += by_ns

    def clock(self, floor_ns: int = 0) -> LedgerClock:
        return LedgerClock(lambda: self.wall, lambda: self.steady, floor_ns)


@pytest.fixture
def machine() -> Machine:
    return Machine()


def test_the_ledgers_time_is_the_wall_clock_while_that_runs_evenly(machine: Machine) -> None:
    clock = machine.clock()
    for seconds in (5, 5, 300):
        machine.passes(seconds * SECOND)
        assert clock.now_ns() == machine.wall
    assert clock.step is None
    assert clock.take_finding() is None


@pytest.mark.parametrize("by_ns", [STEP_NS, -STEP_NS, STEP_NS // 2])
def test_a_second_more_or_less_is_slewing_and_no_step(machine: Machine, by_ns: int) -> None:
    clock = machine.clock()
    machine.passes(5 * SECOND)
    machine.wall += by_ns
    assert clock.now_ns() == machine.wall
    assert clock.step is None
    assert clock.take_finding() is None


def test_small_steps_back_never_make_two_instants_equal(machine: Machine) -> None:
    clock = machine.clock()
    before = clock.now_ns()
    machine.wall -= STEP_NS // 2
    assert clock.now_ns() == before + 1
    assert clock.now_ns() == before + 2


def test_an_hour_forward_waits_until_the_ledger_has_it(machine: Machine) -> None:
    clock = machine.clock()
    machine.passes(5 * SECOND)
    machine.wall += HOUR
    # the open interval closes where its own duration ends, whoever asks and how often
    assert [clock.now_ns(), clock.now_ns()] == [NOON + 5 * SECOND] * 2
    assert clock.step is not None
    by_ns, finding = clock.step
    assert by_ns == HOUR
    assert (finding.kind, finding.severity, finding.target) == ("clock_set_forward", "warning", "")
    assert (finding.start_ns, finding.end_ns) == (NOON + 5 * SECOND, NOON + 5 * SECOND + HOUR)
    assert f"set forward by 3600 s at {utc_text(NOON + 5 * SECOND)}" in finding.message
    clock.follow()
    assert clock.step is None
    machine.passes(5 * SECOND)
    assert clock.now_ns() == machine.wall == NOON + HOUR + 10 * SECOND
    assert clock.step is None


def test_a_step_that_the_ledger_could_not_take_is_told_again_with_the_time_that_has_passed(machine: Machine) -> None:
    clock = machine.clock()
    machine.wall += HOUR
    clock.now_ns()
    assert clock.step is not None
    machine.passes(5 * SECOND)
    assert clock.now_ns() == NOON + 5 * SECOND
    assert clock.step is not None
    assert clock.step[0] == HOUR
    assert clock.step[1].start_ns == NOON + 5 * SECOND


def test_a_step_forward_that_is_taken_back_before_it_was_followed_is_no_step(machine: Machine) -> None:
    clock = machine.clock()
    machine.wall += HOUR
    clock.now_ns()
    machine.wall -= HOUR
    machine.passes(5 * SECOND)
    assert clock.now_ns() == NOON + 5 * SECOND
    assert clock.step is None
    clock.follow()
    assert clock.now_ns() == NOON + 5 * SECOND + 1


def test_what_is_followed_is_the_step_that_the_ledger_was_told(machine: Machine) -> None:
    clock = machine.clock()
    machine.wall += HOUR
    clock.now_ns()
    assert clock.step is not None
    machine.wall += HOUR
    clock.now_ns()  # a slow scrape asks for the time between the telling and the following
    clock.follow()
    assert clock.now_ns() == NOON + HOUR
    assert clock.step is not None
    assert clock.step[0] == HOUR


def test_an_hour_back_goes_on_from_where_the_ledger_is_and_is_told_once(machine: Machine) -> None:
    clock = machine.clock()
    machine.passes(5 * SECOND)
    machine.wall -= HOUR
    assert clock.now_ns() == NOON + 5 * SECOND
    finding = clock.take_finding()
    assert finding is not None
    assert (finding.kind, finding.start_ns, finding.end_ns) == ("clock_set_back", machine.wall, NOON + 5 * SECOND)
    assert finding.message.startswith("the clock is 3600 s behind the ledger")
    machine.passes(5 * SECOND)
    assert clock.now_ns() == NOON + 10 * SECOND
    assert clock.take_finding() is None
    assert clock.step is None


def test_a_wall_clock_that_is_set_right_again_is_followed_again(machine: Machine) -> None:
    clock = machine.clock()
    machine.wall -= HOUR
    clock.now_ns()
    clock.take_finding()
    machine.passes(60 * SECOND)
    machine.wall += HOUR
    assert clock.now_ns() == machine.wall == NOON + 60 * SECOND
    assert clock.step is None
    machine.wall -= HOUR
    clock.now_ns()
    assert clock.take_finding() is not None


def test_a_clock_set_back_that_is_then_set_too_far_forward_steps_forward(machine: Machine) -> None:
    clock = machine.clock()
    machine.wall -= HOUR
    clock.now_ns()
    clock.take_finding()
    machine.wall += 3 * HOUR
    assert clock.now_ns() == NOON
    assert clock.step is not None
    assert clock.step[0] == 2 * HOUR
    clock.follow()
    machine.wall -= 3 * HOUR
    assert clock.now_ns() == NOON + 2 * HOUR
    assert clock.take_finding() is not None  # it is behind anew


def test_a_suspended_machine_is_paid_for(machine: Machine) -> None:
    clock = machine.clock()
    machine.passes(8 * HOUR)
    assert clock.now_ns() == NOON + 8 * HOUR
    assert clock.step is None


def test_a_ledger_that_is_ahead_of_the_clock_goes_on_from_its_newest_instant(machine: Machine) -> None:
    clock = machine.clock(floor_ns=NOON + HOUR)
    finding = clock.take_finding()
    assert finding is not None
    assert (finding.kind, finding.start_ns, finding.end_ns) == ("clock_set_back", NOON, NOON + HOUR + 1)
    machine.passes(5 * SECOND)
    assert clock.now_ns() == NOON + HOUR + 1 + 5 * SECOND
    assert clock.take_finding() is None


def test_a_ledger_that_is_ahead_by_less_than_a_second_needs_no_words(machine: Machine) -> None:
    clock = machine.clock(floor_ns=NOON + SECOND // 2)
    assert clock.take_finding() is None
    assert clock.now_ns() > NOON + SECOND // 2
    machine.passes(SECOND)
    assert clock.now_ns() == machine.wall


def test_a_ledger_of_the_past_does_not_hold_the_clock_back(machine: Machine) -> None:
    clock = machine.clock(floor_ns=NOON - HOUR)
    assert clock.now_ns() == NOON + 1


steps = st.sampled_from(["pass", "set", "ask", "follow", "step"])


@given(st.lists(st.tuples(steps, st.integers(-3 * HOUR, 3 * HOUR))), st.integers(-HOUR, HOUR))
def test_time_never_goes_back_and_durations_are_those_that_passed(
    events: list[tuple[str, int]], floor_ahead_ns: int
) -> None:
    machine = Machine()
    clock = machine.clock(NOON + floor_ahead_ns)
    before, steady, followed = clock.now_ns(), machine.steady, 0
    for event, by_ns in events:
        if event == "pass":
            machine.passes(abs(by_ns))
        elif event == "set":
            machine.wall += by_ns
        elif event == "step":
            _ = clock.step
        elif event == "follow" and clock.step is not None:
            followed += clock.step[0]
            clock.follow()
        else:
            now = clock.now_ns()
            assert now >= before + followed
            # slewing apart, exactly the time that passed and the steps that the ledger was told
            assert abs((now - before) - (machine.steady - steady) - followed) <= STEP_NS
            before, steady, followed = now, machine.steady, 0


def test_threads_that_ask_at_once_do_not_count_time_twice() -> None:
    """Each reading of the steady clock is a millisecond; the wall clock is an hour behind the ledger."""
    lock = threading.Lock()
    steady = 0

    def ticking() -> int:
        nonlocal steady
        with lock:
            steady += SECOND // 1000
            read = steady
        time.sleep(0)  # let another thread in
        return read

    clock = LedgerClock(lambda: 0, ticking, floor_ns=HOUR)
    began = steady
    seen: list[list[int]] = [[] for _ in range(4)]

    def asks(mine: list[int]) -> Callable[[], None]:
        return lambda: mine.extend(clock.now_ns() for _ in range(200))

    threads = [threading.Thread(target=asks(mine)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(map(max, seen)) == HOUR + 1 + steady - began
    assert all(mine == sorted(mine) for mine in seen)
    assert len({one for mine in seen for one in mine}) == 800


def test_the_steady_clock_counts_while_the_machine_sleeps() -> None:
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert before <= elapsed_ns() <= time.clock_gettime_ns(time.CLOCK_BOOTTIME)
