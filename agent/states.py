"""Who owns an engine's time: every nanosecond of an interval goes to exactly one state (METHOD 2.2)."""

from __future__ import annotations

from typing import Literal, NamedTuple

from kvtally.agent.interval import (
    ASLEEP_AT_END,
    ASLEEP_AT_START,
    BORN,
    BUSY_AT_END,
    BUSY_AT_START,
    GAUGES_UNKNOWN,
    RESET,
)

State = Literal["unallocated", "asleep", "warm_up", "idle", "occupied"]
STATES: tuple[State, ...] = ("occupied", "idle", "asleep", "warm_up", "unallocated")


class EngineTime(NamedTuple):
    """Nanoseconds by state of one interval; `modelled` where the gauges alone could not tell."""

    occupied: int = 0
    idle: int = 0
    asleep: int = 0
    warm_up: int = 0
    unallocated: int = 0
    modelled: bool = False


def engine_time(
    length_ns: int,
    flags: int,
    steps: int | None,
    working_ns: int | None,
    began_after_ns: int | None = None,
) -> EngineTime:
    """Split one interval by state; the parts sum to `length_ns`.

    working_ns       seconds in which the engine worked, as nanoseconds: GPU graphics utilisation x time, else the
                     requests' inference time; None where neither is known
    began_after_ns   how long after the interval's start the engine process started, for a restart
    """
    if flags & ASLEEP_AT_START and flags & ASLEEP_AT_END:
        return EngineTime(asleep=length_ns)
    if flags & (RESET | BORN):
        # from the last sight of the old process to the start of the new one nobody held the engine
        gone = 0 if flags & BORN else max(0, min(began_after_ns or 0, length_ns))
        occupied = _worked(length_ns - gone, steps, working_ns)
        return EngineTime(occupied=occupied, warm_up=length_ns - gone - occupied, unallocated=gone, modelled=True)
    if not flags & GAUGES_UNKNOWN:
        if flags & BUSY_AT_START and flags & BUSY_AT_END:
            return EngineTime(occupied=length_ns)
        if not flags & (BUSY_AT_START | BUSY_AT_END) and steps == 0:
            return EngineTime(idle=length_ns)
    occupied = _worked(length_ns, steps, working_ns)
    return EngineTime(occupied=occupied, idle=length_ns - occupied, modelled=True)


def _worked(length_ns: int, steps: int | None, working_ns: int | None) -> int:
    if steps == 0:
        return 0
    if working_ns is None:
        # an engine that stepped, for an unknown time: calling it idle would hide cost from its tokens
        return length_ns
    return max(0, min(length_ns, working_ns))
