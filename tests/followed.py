"""Intervals from readings that follow each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.agent.interval import close, opened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.finding import Finding
    from kvtally.agent.interval import Interval, State
    from kvtally.collectors.base import Reading

SECOND = 1_000_000_000


def follow(readings: Sequence[Reading], state: State | None = None) -> tuple[list[Interval], State, list[Finding]]:
    """Close an interval a second from each reading to the next."""
    at = 2000 * SECOND
    if state is None:
        state, readings = opened(readings[0], at), readings[1:]
    intervals: list[Interval] = []
    findings: list[Finding] = []
    for number, one in enumerate(readings, start=1):
        interval, state, found = close(state, one, at + number * SECOND)
        intervals.append(interval)
        findings += found
    return intervals, state, findings
