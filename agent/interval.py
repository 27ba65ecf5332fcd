"""Two scrapes become one interval: the only place where counters turn into differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.identity import Identity, check
from kvtally.collectors.quantities import QUANTITIES, Quantity

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.base import Kind, Reading

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

UNASKED = float("nan")  # in a state: this kvtally reads a quantity that the one before did not

_COUNTS = {kind: tuple(q.type != "gauge" for q in quantities) for kind, quantities in QUANTITIES.items()}
_INTEGRALS = {kind: tuple(q.type == "integral" for q in quantities) for kind, quantities in QUANTITIES.items()}
_SCALES = {kind: tuple(q.scale for q in quantities) for kind, quantities in QUANTITIES.items()}
_ENGINE = {quantity.name: position for position, quantity in enumerate(QUANTITIES["engine"])}
_RUNNING, _WAITING, _AWAKE, _STEPS = (
    _ENGINE[name] for name in ("running_requests", "waiting_requests", "awake", "steps")
)


class State(NamedTuple):
    """What is kept of a target between two scrapes: the last known raw counters, in the source's own unit.

    A counter that is missing from a page keeps its last known value here, so that nothing is lost when it returns
    and nothing is counted twice when it went backwards (it is then the high-water mark).
    """

    taken_at_ns: int
    values: tuple[float | None, ...]
    epoch: float | None = None
    session: float | None = None
    detail_names: tuple[str, ...] = ()
    details: tuple[float, ...] = ()
    parts: Mapping[str, tuple[float | None, ...]] | None = None
    moved: bool = False  # the engine worked in the interval that ended here


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
        reading.details,
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


def close(
    previous: State, reading: Reading, taken_at_ns: int, missed: int = 0
) -> tuple[Interval, State, list[Finding]]:
    """Close the interval from the previous scrape to this one.

    ValueError if this scrape is not later than the previous one: the caller drops it.
    """
    if taken_at_ns <= previous.taken_at_ns:
        raise ValueError(f"scrape at {taken_at_ns} is not after {previous.taken_at_ns}")
    kind = reading.kind
    target = f"{kind}/{reading.name}"
    findings: list[Finding] = []
    reset = _began_anew(previous, reading)
    backwards: list[str] = []
    if reading.parts is None:
        differences, kept = _differences(kind, previous, reading, reset, backwards)
    else:
        differences = _part_differences(kind, previous.parts or {}, reading)
        kept = reading.values
    details = _detail_differences(previous, reading, reset)
    flags, began_ns = RESET if reset else 0, None
    if reset and reading.epoch is not None and previous.taken_at_ns < reading.epoch * 1e9 < taken_at_ns:
        began_ns = round(reading.epoch * 1e9)
    for name in backwards:
        findings.append(_went_backwards(target, name, previous, taken_at_ns))
    moved = False
    if kind == "engine":
        flags |= _state_flags(previous.values, reading.values)
        moved = bool(flags & BUSY_AT_END) or bool(differences[_STEPS])
        if reset:
            findings.append(_restarted(target, previous, began_ns, taken_at_ns))
        identity = check(reading.attributes.get("version"), differences, reading.detail_names, details)
        flags |= {Identity.OK: IDENTITY_OK, Identity.BROKEN: IDENTITY_BROKEN}.get(identity.state, 0)
        if identity.state is Identity.BROKEN:
            findings.append(
                Finding("identity_broken", "error", target, previous.taken_at_ns, taken_at_ns, identity.message)
            )
    interval = Interval(previous.taken_at_ns, taken_at_ns, tuple(differences), details, flags, missed, began_ns)
    known_details = reading.details if len(reading.details) == len(reading.detail_names) else previous.details
    names = reading.detail_names if known_details is reading.details else previous.detail_names
    state = State(taken_at_ns, tuple(kept), reading.epoch, reading.session, names, known_details, reading.parts, moved)
    return interval, state, findings


def _began_anew(previous: State, reading: Reading) -> bool:
    """Whether the source's counts began anew since the previous scrape.

    A start marker decides where there is one. Without one (multiprocess mode), two counters that fall together are
    a restart; one alone is a counter that lies.
    """
    if reading.epoch is not None and previous.epoch is not None:
        return reading.epoch != previous.epoch
    fallen = sum(
        quantity.type == "counter" and current is not None and before is not None and current < before
        for quantity, current, before in zip(QUANTITIES[reading.kind], reading.values, previous.values, strict=True)
    )
    return fallen > 1


def _differences(
    kind: Kind, previous: State, reading: Reading, reset: bool, backwards: list[str]
) -> tuple[list[int | None], list[float | None]]:
    """Differences (gauges as they are) and the raw values to keep."""
    session_new = reading.session != previous.session
    differences: list[int | None] = []
    kept: list[float | None] = []
    for position, (current, before, counts, integral, scale) in enumerate(
        zip(reading.values, previous.values, _COUNTS[kind], _INTEGRALS[kind], _SCALES[kind], strict=True)
    ):
        if current is None:
            differences.append(None)
            # after a restart the old high-water mark means nothing
            kept.append(None if reset or not counts else before)
        elif not counts:
            differences.append(round(current * scale))
            kept.append(current)
        elif reset or before is None or (integral and session_new):
            # a family that was not there had counted nothing
            differences.append(round(current * scale))
            kept.append(current)
        elif current >= before:
            differences.append(round(current * scale) - round(before * scale))
            kept.append(current)
        elif before != before:  # noqa: PLR0124  # UNASKED is NaN
            differences.append(None)
            kept.append(current)
        else:
            differences.append(None)
            kept.append(before)
            backwards.append(QUANTITIES[kind][position].name)
    return differences, kept


def _part_differences(kind: Kind, before: Mapping[str, tuple[float | None, ...]], reading: Reading) -> list[int | None]:
    """Sum the differences of parts: one that is new counts whole, one that is gone has been counted."""
    totals: list[int | None] = []
    parts = reading.parts or {}
    for position, (quantity, gauge) in enumerate(zip(QUANTITIES[kind], reading.values, strict=True)):
        if quantity.type == "gauge":
            totals.append(None if gauge is None else round(gauge * quantity.scale))
            continue
        total, known = 0, False
        for key, values in parts.items():
            current = values[position]
            if current is None:
                continue
            was = before[key][position] if key in before else 0.0
            known = True
            if was is not None and current >= was:
                total += round(current * quantity.scale) - round(was * quantity.scale)
        totals.append(total if known else None)
    return totals


def _detail_differences(previous: State, reading: Reading, reset: bool) -> tuple[int, ...] | None:
    if len(reading.details) != len(reading.detail_names):
        return None
    if reset:
        return tuple(round(current) for current in reading.details)
    if reading.detail_names == previous.detail_names:
        before: Sequence[float] = previous.details
    else:
        # a counter that this page shows for the first time gives a baseline only
        known = dict(zip(previous.detail_names, previous.details, strict=False))
        before = [known.get(name, now) for name, now in zip(reading.detail_names, reading.details, strict=True)]
    if len(before) != len(reading.details):
        return None
    changes = tuple(round(now) - round(was) for now, was in zip(reading.details, before, strict=True))
    return changes if all(change >= 0 for change in changes) else None


def _busy(values: tuple[float | None, ...]) -> bool | None:
    running, waiting = values[_RUNNING], values[_WAITING]
    if running is None and waiting is None:
        return None
    return bool(running) or bool(waiting)


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


def _went_backwards(target: str, name: str, previous: State, taken_at_ns: int) -> Finding:
    return Finding(
        "counter_backwards",
        "warning",
        target,
        previous.taken_at_ns,
        taken_at_ns,
        f"{name} went backwards although its process did not restart; the interval's value is unknown, and nothing "
        "more is counted until the counter passes its highest value",
    )


def _restarted(target: str, previous: State, began_ns: int | None, taken_at_ns: int) -> Finding:
    until_ns = taken_at_ns if began_ns is None else began_ns
    span = f"{(until_ns - previous.taken_at_ns) / 1e9:.1f} s from {utc_text(previous.taken_at_ns)}"
    if previous.moved:
        return Finding(
            "tokens_lost",
            "warning",
            target,
            previous.taken_at_ns,
            until_ns,
            f"the engine restarted while it was at work: what it served in the {span} was counted by nobody",
        )
    return Finding(
        "engine_restarted",
        "info",
        target,
        previous.taken_at_ns,
        until_ns,
        f"the engine restarted; it was idle at the last two scrapes, what it may have served in the {span} is unknown",
    )


def quantity_names(kind: Kind) -> tuple[str, ...]:
    """Names of a kind's quantities in the order of an interval's values."""
    return tuple(quantity.name for quantity in QUANTITIES[kind])


def counters(kind: Kind) -> tuple[Quantity, ...]:
    """The quantities that add up over time."""
    return tuple(quantity for quantity in QUANTITIES[kind] if quantity.type != "gauge")
