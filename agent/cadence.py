"""Even ticks, and the word to stop that may come from a signal handler at any moment."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Stop:
    """The word to stop, given once and for all; any number of threads may wait for it.

    threading.Event is not for signal handlers: its lock is not reentrant, so a signal that arrives while the same
    thread enters `wait` would hang in `set`. A SimpleQueue's `put` may be called there.
    """

    def __init__(self) -> None:
        self._words: SimpleQueue[None] = SimpleQueue()
        self._is_set = False

    def set(self) -> None:
        """Give the word."""
        self._is_set = True
        self._words.put(None)

    def is_set(self) -> bool:
        """Whether the word was given."""
        return self._is_set

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the word; whether it was given."""
        if not self._is_set:
            try:
                self._words.get(timeout=timeout_seconds)
            except Empty:
                return self._is_set
            self._words.put(None)  # for whoever else waits
        return True


@contextmanager
def told_by_signals(stop: Stop) -> Iterator[None]:
    """Let SIGTERM and SIGINT say stop; main thread only."""
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Cadence:
    """Ticks without drift: the n-th is due n intervals after the start, whatever the ones before took.

    A tick that took longer than an interval is followed at once by the newest that is due; the others are left out.
    With `duration_seconds` there is a last tick, due when it ends.
    """

    def __init__(
        self,
        interval_seconds: float,
        duration_seconds: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if interval_seconds <= 0:
            raise ValueError("the time between two ticks must be above 0")
        self._interval_seconds = interval_seconds
        self._duration_seconds = duration_seconds
        self._clock = clock
        self._began = clock()
        self._ticks = 0

    def wait(self, stop: Stop) -> bool:
        """Wait until the next tick is due; True if it is the last, for the end has come or the word to stop."""
        passed = self._clock() - self._began
        self._ticks = max(self._ticks + 1, int(passed / self._interval_seconds))
        due = self._ticks * self._interval_seconds
        ends = self._duration_seconds
        is_last = ends is not None and due >= ends
        if ends is not None and is_last:
            due = ends
        return stop.wait(max(0.0, due - passed)) or is_last
