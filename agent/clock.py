"""The ledger's clock: wall time that never goes back, and durations that no clock step can stretch."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from kvtally.agent.finding import Finding, utc_text

if TYPE_CHECKING:
    from collections.abc import Callable

STEP_NS = 1_000_000_000  # NTP slews by far less between two ticks; more than this is somebody setting the clock


def elapsed_ns() -> int:
    """Nanoseconds since boot, time asleep included: a suspended machine is still paid for."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class LedgerClock:
    """Follows the wall clock while that runs evenly.

    Set forward, it follows at the next tick: the interval that is open closes where its own duration ends, and the
    skipped time belongs to no interval. Set back, it goes on from where it was: time that the ledger has already
    is never written twice; when the wall clock has caught up, it follows again. Any thread may ask for the time.
    """

    def __init__(
        self, wall_ns: Callable[[], int] = time.time_ns, steady_ns: Callable[[], int] = elapsed_ns, floor_ns: int = 0
    ) -> None:
        """`floor_ns` is the newest instant that the ledger has."""
        self._wall_ns = wall_ns
        self._steady_ns = steady_ns
        self._steady = steady_ns()
        self._now = max(wall_ns(), floor_ns + 1)
        self._behind = self._now > wall_ns() + STEP_NS
        self._finding: Finding | None = self._set_back(self._now) if self._behind else None
        self._skip = self._offered = 0
        self._lock = threading.Lock()

    def now_ns(self) -> int:
        """The ledger's time. A step forward is not in it until `follow`."""
        with self._lock:
            return self._advance()

    def _advance(self) -> int:
        steady = self._steady_ns()
        passed = steady - self._steady
        self._steady = steady
        expected = self._now + passed
        wall = self._wall_ns()
        self._skip = 0
        if wall - expected > STEP_NS:
            self._skip = wall - expected
            self._behind = False
            self._now = expected
        elif expected - wall > STEP_NS:
            if not self._behind:
                self._finding = self._set_back(expected)
            self._behind = True
            self._now = expected
        else:
            # within a second: take the wall clock's word, but never backwards
            self._now = max(wall, self._now + 1)
            self._behind = False
        return self._now

    @property
    def step(self) -> tuple[int, Finding] | None:
        """A step forward that waits to be followed: its length, and what to write about it."""
        with self._lock:
            skip, now = self._skip, self._now
            self._offered = skip
        if not skip:
            return None
        return skip, Finding(
            "clock_set_forward",
            "warning",
            "",
            now,
            now + skip,
            f"the clock was set forward by {skip / 1e9:.0f} s at {utc_text(now)}: no interval covers the skipped time, "
            "and nothing is charged for it",
        )

    def follow(self) -> None:
        """Go with the step that was told last, once the ledger has it."""
        with self._lock:
            self._now += self._offered
            self._skip = self._offered = 0

    def take_finding(self) -> Finding | None:
        """What is to be told about a clock that was set back, once."""
        finding, self._finding = self._finding, None
        return finding

    def _set_back(self, at_ns: int) -> Finding:
        wall = self._wall_ns()
        return Finding(
            "clock_set_back",
            "warning",
            "",
            wall,
            at_ns,
            f"the clock is {(at_ns - wall) / 1e9:.0f} s behind the ledger: until it has caught up, the ledger's time "
            "goes on from its newest interval, since time that is written once is not written again",
        )
