"""Two scrapes of one target become one interval."""

from __future__ import annotations

from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.difference import (
    BACKWARDS,
    IMPOSSIBLE,
    MISSING,
    TOLD_TO_RESET,
    UNASKED,
    differences,
    fell_to_begin_anew,
)
from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.identity import FAMILIES, Identity, check
from kvtally.agent.part_sums import part_sums
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.difference import Values
    from kvtally.agent.part_sums import Parts
    from kvtally.collectors.base import Reading

__all__ = [
    "ASLEEP_AT_END",
    "ASLEEP_AT_START",
    "BACKWARDS",
    "BORN",
    "BUSY_AT_END",
    "BUSY_AT_START",
    "DROPPED",
    "GAUGES_UNKNOWN",
    "IDENTITY_BROKEN",
    "IDENTITY_OK",
    "IMPOSSIBLE",
    "RESET",
    "UNASKED",
    "Interval",
    "State",
    "appeared",
    "born",
    "close",
    "opened",
]

# Flags of an interval, as bits of one integer
BUSY_AT_START = 1  # requests were running or waiting
BUSY_AT_END = 2
ASLEEP_AT_START = 4
ASLEEP_AT_END = 8
GAUGES_UNKNOWN = 16  # the page did not tell how many requests run
RESET = 32  # the counts began anew inside the interval
BORN = 64  # the engine started while kvtally watched: the interval begins at its process start
IDENTITY_OK = 128
IDENTITY_BROKEN = 256  # neither bit: this version offers no identity to check

_FAULTS = {
    BACKWARDS: "went backwards although its process did not restart: its values are unknown from here on, and nothing "
    "more is counted until it passes its highest one",
    IMPOSSIBLE: "shows more than anything can have counted: its values are unknown until it comes down again",
}
_ENGINE = {quantity.name: position for position, quantity in enumerate(QUANTITIES["engine"])}
_RUNNING, _WAITING, _AWAKE = (_ENGINE[name] for name in ("running_requests", "waiting_requests", "awake"))
DROPPED = "event_bus_dropped_events"  # a detail of LMCache's server: what it lost before it was counted
_HOUR_NS = 3_600_000_000_000
_WORK = tuple(_ENGINE[name] for name in ("steps", "generated_tokens", "prompt_tokens"))


class State(NamedTuple):
    """What is kept of a target between two scrapes: the last known raw counters, in the source's own unit.

    A counter that is missing from a page keeps its last known value here, so that nothing is lost when it returns
    and nothing is counted twice when it went backwards (it is then the high-water mark).
    """

    taken_at_ns: int
    values: Values
    epoch: float | None = None
    session: float | None = None
    detail_names: tuple[str, ...] = ()
    details: tuple[float, ...] = ()
    parts: Parts | None = None
    moved: bool = False  # the engine worked in the interval that ended here
    behind: Mapping[str, str] = {}  # quantities whose kept value is older than this scrape -> why


class Interval(NamedTuple):
    """One row of the ledger: what a target counted in the half-open span [start_ns, end_ns).

    values     differences of counters, gauges at the end; None where the source did not tell
    details    differences of the secondary counters; None where unknown
    missed     scrapes that were due inside the span and gave nothing: coverage is 1 / (1 + missed)
    began_ns   where the counts began anew, if they did and the source says when
    """

    start_ns: int
    end_ns: int
    values: tuple[int | None, ...]
    details: tuple[int, ...] | None
    flags: int
    missed: int
    began_ns: int | None


def opened(reading: Reading, taken_at_ns: int) -> State:
    """The state after the first scrape of a target: its counts so far are not ours."""
    busy = reading.kind == "engine" and bool(_busy(reading.values))
    return State(
        taken_at_ns,
        reading.values,
        reading.epoch,
        reading.session,
        reading.detail_names,
        reading.details if isfinite(sum(reading.details)) else (),
        reading.parts,
        busy,
    )


def born(reading: Reading, taken_at_ns: int, watched_since_ns: int) -> tuple[Interval, State, list[Finding]] | None:
    """The first interval of an engine that started after kvtally began to watch its address.

    Everything it counted is ours then, and the time from its process start is its warm-up. None where the start is
    unknown or lies before `watched_since_ns`: the first scrape is a baseline.
    """
    if reading.kind != "engine" or reading.epoch is None:
        return None
    began_ns = round(reading.epoch * 1e9)
    if not watched_since_ns <= began_ns < taken_at_ns:
        return None
    nothing = State(
        began_ns,
        tuple(None if position == _AWAKE else 0.0 for position in range(len(reading.values))),
        reading.epoch,
        reading.session,
        reading.detail_names,
        tuple(0.0 for _ in reading.details),
    )
    interval, state, findings = close(nothing, reading, taken_at_ns)
    return interval._replace(flags=interval.flags | BORN, began_ns=began_ns), state, findings


def appeared(reading: Reading, since_ns: int, taken_at_ns: int) -> tuple[Interval, State, list[Finding]]:
    """The first interval of a target that its page, scraped at `since_ns`, did not show yet: all its counts are ours.

    ValueError if this scrape is not later than that one.
    """
    nothing = State(
        since_ns,
        (None,) * len(reading.values),
        reading.epoch,
        reading.session,
        reading.detail_names,
        (0.0,) * len(reading.details),
    )
    interval, state, findings = close(nothing, reading, taken_at_ns)
    return interval._replace(began_ns=since_ns), state, findings


def close(
    previous: State, reading: Reading, taken_at_ns: int, missed: int = 0
) -> tuple[Interval, State, list[Finding]]:
    """Close the interval from the previous scrape to this one.

    ValueError if this scrape is not later than the previous one: the caller drops it.
    """
    if taken_at_ns <= previous.taken_at_ns:
        raise ValueError(f"scrape at {taken_at_ns} is not after {previous.taken_at_ns}")
    target = f"{reading.kind}/{reading.name}"
    reset = _began_anew(previous, reading)
    behind: dict[str, str] = {}
    kept, parts = reading.values, reading.parts
    if parts is None:
        is_new_session = reading.session != previous.session
        values, kept = differences(
            reading.kind, previous.values, kept, behind, reset=reset, is_new_session=is_new_session
        )
    else:
        values, parts = part_sums(previous.parts or {}, reading, previous.behind, behind)
    details, names, kept_details = _detail_differences(previous, reading, reset, behind)
    flags, began_ns = RESET if reset else 0, None
    if reset and reading.epoch is not None and previous.taken_at_ns < reading.epoch * 1e9 < taken_at_ns:
        began_ns = round(reading.epoch * 1e9)
    interval = Interval(previous.taken_at_ns, taken_at_ns, tuple(values), details, flags, missed, began_ns)
    findings = [
        _unusable(target, name, why, previous, taken_at_ns)
        for name, why in behind.items()
        if why != MISSING and previous.behind.get(name) != why
    ]
    moved = False
    if reading.kind == "engine":
        interval, found = _judged(interval, target, previous, reading)
        findings += found
        moved = bool(interval.flags & BUSY_AT_END) or any(values[at] for at in _WORK)
    elif reading.kind == "cache" and _has_dropped(previous, reading, reset=reset):
        findings.append(_lower_bound(target, previous.taken_at_ns))
    # a page that does not tell its start once does not end the epoch
    epoch = previous.epoch if reading.epoch is None and not reset else reading.epoch
    state = State(taken_at_ns, kept, epoch, reading.session, names, kept_details, parts, moved, behind)
    return interval, state, findings


def _judged(interval: Interval, target: str, previous: State, reading: Reading) -> tuple[Interval, list[Finding]]:
    """An engine's interval with what its gauges and the identity say of it, and findings of a restart and a breach."""
    flags = interval.flags | _state_flags(previous.values, reading.values)
    findings: list[Finding] = []
    reset = interval.flags & RESET
    if reset:
        findings.append(_restarted(target, previous, interval))
    if reset or previous.behind.keys().isdisjoint(FAMILIES):
        # else one of the families covers more time than the others
        version = reading.attributes.get("version")
        identity = check(version, interval.values, reading.detail_names, interval.details)
        if identity.state is Identity.OK:
            flags |= IDENTITY_OK
        elif identity.state is Identity.BROKEN:
            flags |= IDENTITY_BROKEN
            message = f"from {utc_text(interval.start_ns)} on: {identity.message}"
            findings.append(Finding("identity_broken", "error", target, *_hour_of(interval.start_ns), message))
    return interval._replace(flags=flags), findings


def _began_anew(previous: State, reading: Reading) -> bool:
    """Whether the source's counts began anew since the previous scrape.

    A start marker decides where there is one; of sources that can be told to begin anew while they run, one that
    stays says nothing.
    """
    is_told = reading.kind in TOLD_TO_RESET
    if reading.epoch is not None and previous.epoch is not None and (reading.epoch != previous.epoch or not is_told):
        return reading.epoch != previous.epoch
    backwards = {name for name, why in previous.behind.items() if why == BACKWARDS}
    is_new_session = reading.session != previous.session
    return fell_to_begin_anew(reading.kind, previous.values, reading.values, backwards, is_new_session=is_new_session)


def _detail_differences(
    previous: State, reading: Reading, reset: bool, behind: dict[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[float, ...]]:
    """Differences of the secondary counters or None, and the names and values to keep."""
    names, details = reading.detail_names, reading.details
    if len(details) != len(names) or not isfinite(sum(details)):
        behind["details"] = MISSING
        return None, previous.detail_names, previous.details
    if reset:
        before: tuple[float, ...] = (0.0,) * len(names)
    elif names == previous.detail_names and len(details) == len(previous.details):
        before = previous.details
    else:
        # a counter that this page shows for the first time gives a baseline only
        known = dict(zip(previous.detail_names, previous.details, strict=False))
        before = tuple(known.get(name, now) for name, now in zip(names, details, strict=True))
    # most stand still between two scrapes
    changes = [0 if now == was else round(now) - round(was) for now, was in zip(details, before, strict=True)]
    if min(changes, default=0) >= 0:
        return tuple(changes), names, details
    behind["details"] = BACKWARDS
    return None, names, before


def _busy(values: tuple[float | None, ...]) -> bool | None:
    running, waiting = values[_RUNNING], values[_WAITING]
    if running or waiting:
        return True
    return None if running is None or waiting is None else False


def _state_flags(before: tuple[float | None, ...], now: tuple[float | None, ...]) -> int:
    flags = 0
    for values, busy_bit, asleep_bit in ((before, BUSY_AT_START, ASLEEP_AT_START), (now, BUSY_AT_END, ASLEEP_AT_END)):
        busy = _busy(values)
        if busy is None:
            flags |= GAUGES_UNKNOWN
        elif busy:
            flags |= busy_bit
        if values[_AWAKE] == 0:
            flags |= asleep_bit
    return flags


def _unusable(target: str, name: str, why: str, previous: State, taken_at_ns: int) -> Finding:
    return Finding(
        why,
        "warning",
        target,
        previous.taken_at_ns,
        taken_at_ns,
        f"{name} {_FAULTS[why]}",
    )


def _has_dropped(previous: State, reading: Reading, *, reset: bool) -> bool:
    """Whether a cache has lost events since the previous scrape; the family is shown once it has."""
    now = dict(zip(reading.detail_names, reading.details, strict=False)).get(DROPPED, 0.0)
    before = 0.0 if reset else dict(zip(previous.detail_names, previous.details, strict=False)).get(DROPPED, 0.0)
    return now > before


def _hour_of(at_ns: int) -> tuple[int, int]:
    """The hour of an instant: what goes on being wrong has one finding an hour, for the ledger keeps a span once."""
    hour_ns = at_ns - at_ns % _HOUR_NS
    return hour_ns, hour_ns + _HOUR_NS


def _lower_bound(target: str, at_ns: int) -> Finding:
    return Finding(
        "cache_events_dropped",
        "warning",
        target,
        *_hour_of(at_ns),
        "LMCache has dropped events before it counted them: its tokens of this hour are a lower bound; it is short of "
        "CPU, give it more",
    )


def _restarted(target: str, previous: State, interval: Interval) -> Finding:
    # the kernel tells its boot in whole seconds, so a process start may read up to one early
    until_ns = interval.end_ns if interval.began_ns is None else min(interval.began_ns + 1_000_000_000, interval.end_ns)
    span = f"{(until_ns - previous.taken_at_ns) / 1e9:.1f} s from {utc_text(previous.taken_at_ns)}"
    if previous.moved:
        return Finding(
            "tokens_lost",
            "warning",
            target,
            previous.taken_at_ns,
            until_ns,
            f"the engine restarted while it was at work: what it served in the {span} is in no interval",
        )
    return Finding(
        "engine_restarted",
        "info",
        target,
        previous.taken_at_ns,
        until_ns,
        f"the engine restarted; it was idle when last seen, what it may have served in the {span} is unknown",
    )
