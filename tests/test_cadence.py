from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.cadence import Cadence, Stop, told_by_signals

if TYPE_CHECKING:
    from collections.abc import Callable


class Passing(Stop):
    """Waits on a clock of its own: the moment of every tick, in seconds after the start."""

    def __init__(self, until: float = 1e9) -> None:
        super().__init__()
        self.now = 1000.0
        self._until = 1000.0 + until

    def clock(self) -> float:
        return self.now

    def wait(self, timeout_seconds: float) -> bool:
        self.now = min(self.now + timeout_seconds, self._until)
        return self.now == self._until


def ticks(stop: Passing, cadence: Cadence, took: Callable[[int], float], count: int) -> list[float]:
    """Begins of the ticks after the first, each of which takes its time."""
    begins = []
    for number in range(count):
        stop.now += took(number)
        is_last = cadence.wait(stop)
        begins.append(stop.now - 1000)
        if is_last:
            break
    return begins


def test_ticks_do_not_drift_by_what_each_takes() -> None:
    stop = Passing()
    assert ticks(stop, Cadence(5.0, clock=stop.clock), lambda _: 1.25, 4) == [5.0, 10.0, 15.0, 20.0]


def test_a_tick_that_takes_too_long_is_followed_at_once_and_then_by_the_even_ones() -> None:
    stop = Passing()
    # the tick at 5 ends at 17: those due at 10 and 15 become one at 17, and the next is at 20
    took = {1: 12.0}
    assert ticks(stop, Cadence(5.0, clock=stop.clock), lambda n: took.get(n, 0.0), 4) == [5.0, 17.0, 20.0, 25.0]


def test_the_last_tick_comes_when_the_duration_ends() -> None:
    stop = Passing()
    assert ticks(stop, Cadence(5.0, 12.0, stop.clock), lambda _: 0.5, 9) == [5.0, 10.0, 12.0]


def test_a_duration_of_whole_intervals_has_no_tick_more() -> None:
    stop = Passing()
    assert ticks(stop, Cadence(5.0, 10.0, stop.clock), lambda _: 0.0, 9) == [5.0, 10.0]


def test_the_word_to_stop_makes_the_tick_that_follows_the_last() -> None:
    stop = Passing(until=7.0)
    assert ticks(stop, Cadence(5.0, clock=stop.clock), lambda _: 0.0, 9) == [5.0, 7.0]


def test_ticks_without_time_between_them_are_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Cadence(0.0)


def test_without_a_word_waiting_ends_by_itself() -> None:
    stop = Stop()
    assert not stop.wait(0.0)
    assert not stop.is_set()


def test_one_word_is_for_all_that_wait_and_for_all_that_come_later() -> None:
    stop = Stop()
    heard: list[bool] = []
    threads = [threading.Thread(target=lambda: heard.append(stop.wait(30))) for _ in range(3)]
    for thread in threads:
        thread.start()
    stop.set()
    for thread in threads:
        thread.join(30)
    assert heard == [True, True, True]
    assert stop.is_set()
    assert stop.wait(30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_the_word_and_the_handlers_before_come_back(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop = Stop()
    with told_by_signals(stop):
        sender = threading.Thread(target=os.kill, args=(os.getpid(), number))
        sender.start()
        assert stop.wait(30)
        sender.join()
    assert signal.getsignal(number) is before
