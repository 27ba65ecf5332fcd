"""Two scrapes become one interval: the only place where counters turn into differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.identity import FAMILIES, Identity, check
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
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

# in a state: a quantity whose count so far nobody knows, since the page showed no number for it, or since this kvtally
# reads what the one before did not. The next value is a baseline
UNASKED = float("nan")

MISSING = "counter_missing"
BACKWARDS = "counter_backwards"
IMPOSSIBLE = "counter_impossible"
_FAULTS = {
    BACKWARDS: "went backwards although its process did not restart: its values are unknown from here on, and nothing "
    "more is counted until it passes its highest one",
    IMPOSSIBLE: "shows more than anything can have counted: its values are unknown until it comes down again",
}
# A sum of floats that is taken in another order differs in its last bits: in multiprocess mode vLLM adds up the files
# of its processes as the folder lists them. A token less in ten thousand billion is no restart either way.
NOISE = 1 - 1e-13
INTEGER_MAX = 2**63  # what the ledger's integers hold; a page may show anything

_COUNTS = {kind: tuple(q.type != "gauge" for q in quantities) for kind, quantities in QUANTITIES.items()}
_OWN = {kind: tuple(q.type == "counter" for q in quantities) for kind, quantities in QUANTITIES.items()}
_SCALES = {kind: tuple(q.scale for q in quantities) for kind, quantities in QUANTITIES.items()}
_RULES = {
    kind: tuple((q.type != "gauge", q.type == "integral", q.scale) for q in quantities)
    for kind, quantities in QUANTITIES.items()
}
# LMCache by POST /metrics/reset, Storage Scale by `mmpmon reset`, Lustre by `lctl set_param … clear`
_TOLD_TO_RESET = frozenset({"cache", "filesystem", "gateway"})
_ENGINE = {quantity.name: position for position, quantity in enumerate(QUANTITIES["engine"])}
_RUNNING, _WAITING, _AWAKE = (_ENGINE[name] for name in ("running_requests", "waiting_requests", "awake"))
DROPPED = "event_bus_dropped_events"  # a detail of LMCache's server: what it lost before it was counted
_HOUR_NS = 3_600_000_000_000
_WORK = tuple(_ENGINE[name] for name in ("steps", "generated_tokens", "prompt_tokens"))


Values = tuple[float | None, ...]
Parts = Mapping[str, Values]


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
    kind = reading.kind
    target = f"{kind}/{reading.name}"
    reset = _began_anew(previous, reading)
    behind: dict[str, str] = {}
    parts = reading.parts
    kept = reading.values
    if parts is None:
        differences, kept = _differences(previous, reading, reset, behind)
    else:
        differences, parts = _part_differences(kind, previous.parts or {}, reading)
    details, names, kept_details = _detail_differences(previous, reading, reset, behind)
    flags, began_ns = RESET if reset else 0, None
    if reset and reading.epoch is not None and previous.taken_at_ns < reading.epoch * 1e9 < taken_at_ns:
        began_ns = round(reading.epoch * 1e9)
    findings = [
        _unusable(target, name, why, previous, taken_at_ns)
        for name, why in behind.items()
        if why != MISSING and previous.behind.get(name) != why
    ]
    moved = False
    if kind == "engine":
        flags |= _state_flags(previous.values, reading.values)
        moved = bool(flags & BUSY_AT_END) or any(differences[at] for at in _WORK)
        if reset:
            findings.append(_restarted(target, previous, began_ns, taken_at_ns))
        if reset or previous.behind.keys().isdisjoint(FAMILIES):
            # else one of the families covers more time than the others
            identity = check(reading.attributes.get("version"), differences, reading.detail_names, details)
            if identity.state is Identity.OK:
                flags |= IDENTITY_OK
            elif identity.state is Identity.BROKEN:
                flags |= IDENTITY_BROKEN
                findings.append(
                    Finding("identity_broken", "error", target, previous.taken_at_ns, taken_at_ns, identity.message)
                )
    elif kind == "cache" and _has_dropped(previous, reading, reset=reset):
        findings.append(_lower_bound(target, previous.taken_at_ns))
    interval = Interval(previous.taken_at_ns, taken_at_ns, tuple(differences), details, flags, missed, began_ns)
    # a page that does not tell its start once does not end the epoch
    epoch = previous.epoch if reading.epoch is None and not reset else reading.epoch
    state = State(taken_at_ns, kept, epoch, reading.session, names, kept_details, parts, moved, behind)
    return interval, state, findings


def _began_anew(previous: State, reading: Reading) -> bool:
    """Whether the source's counts began anew since the previous scrape.

    A start marker decides where there is one. Without one (multiprocess mode), two counters that fall together are
    a restart; one alone is a counter that lies, unless its collector began anew as well (a GPU's energy counts from
    the loading of the driver, which no open handle survives).

    Some sources can be told to begin anew while they run: there the marker says nothing, and one counter that falls
    while none rises is enough.
    """
    is_told = reading.kind in _TOLD_TO_RESET
    if reading.epoch is not None and previous.epoch is not None and (reading.epoch != previous.epoch or not is_told):
        return reading.epoch != previous.epoch
    fallen, risen = _moved(reading.kind, reading.values, previous.values, previous.behind if is_told else {})
    return fallen > 1 or (fallen == 1 and (reading.session != previous.session or (is_told and not risen)))


def _fallen(kind: Kind, values: Values, before: Values) -> int:
    """How many of a source's own counters are lower than before."""
    return _moved(kind, values, before)[0]


def _moved(kind: Kind, values: Values, before: Values, behind: Mapping[str, str] = {}) -> tuple[int, int]:
    """How many of a source's own counters are lower than before, and how many are higher.

    Of one that is known to have gone backwards, what is kept is its highest value, and tells nothing here.
    """
    fallen = risen = 0
    for quantity, own, current, was in zip(QUANTITIES[kind], _OWN[kind], values, before, strict=True):
        if own and current is not None and was is not None and behind.get(quantity.name) != BACKWARDS:
            fallen += current < was * NOISE
            risen += current > was
    return fallen, risen


def _differences(
    previous: State, reading: Reading, reset: bool, behind: dict[str, str]
) -> tuple[list[int | None], Values]:
    """Differences (gauges as they are) and the raw values to keep; `behind` takes those that stay as they were."""
    session_new = reading.session != previous.session
    steady = not reset and not session_new
    differences: list[int | None] = []
    kept: list[float | None] = []
    for position, (current, before, (counts, integral, scale)) in enumerate(
        zip(reading.values, previous.values, _RULES[reading.kind], strict=True)
    ):
        difference: int | None
        keep, why = current, ""
        if not counts:
            # a page may show anything
            difference = None if current is None or abs(current * scale) >= INTEGER_MAX else round(current * scale)
        elif steady and current is not None and before is not None and 0 <= (current - before) * scale < INTEGER_MAX:
            # nearly all of them, nearly always; an UNASKED one compares false
            difference = round(current * scale) - round(before * scale)
        else:
            # where counting began anew the old value means nothing; a family that was not there had counted nothing
            base = None if (session_new if integral else reset) else before
            difference, keep, why = _difference(base, current, integral=integral, scale=scale)
        if why:
            behind[QUANTITIES[reading.kind][position].name] = why
        differences.append(difference)
        kept.append(keep)
    return differences, tuple(kept)


def _difference(
    base: float | None, current: float | None, *, integral: bool, scale: float
) -> tuple[int | None, float | None, str]:
    """A counter's difference, the raw value to keep, and why the value cannot be used; "" if it can."""
    was_told = base is not None and base == base  # noqa: PLR0124  # UNASKED is NaN
    if current is None or current != current:  # noqa: PLR0124  # NaN: shown, and not to be read
        # on the first page the second is no count of nothing: what it shows later is a baseline
        return None, current if base is None else base, MISSING if was_told else ""
    if base is not None and not was_told:
        return None, current, ""
    if base is None or (integral and current < base):
        base = 0.0  # a collector's own sums fall only where they begin anew
    if base * NOISE <= current < base:
        current = base  # the same sum in another order
    if current < base:
        return None, base, BACKWARDS
    if (current - base) * scale < INTEGER_MAX:
        return round(current * scale) - round(base * scale), current, ""
    return None, base, IMPOSSIBLE


def _part_differences(kind: Kind, before: Parts, reading: Reading) -> tuple[list[int | None], Parts]:
    """Sum the differences of parts: one that is new counts whole, one that is gone has been counted.

    A part that may not be read makes the sum unknown; one that was read before and is not now is counted later.
    """
    totals: list[int | None] = [
        None if gauge is None or counts else round(gauge * scale)
        for gauge, counts, scale in zip(reading.values, _COUNTS[kind], _SCALES[kind], strict=True)
    ]
    hidden: set[int] = set()
    kept: dict[str, Values] = {}
    for key, values in (reading.parts or {}).items():
        was = before.get(key)
        if was is not None and len(was) != len(values):
            was = (UNASKED,) * len(values)  # kept by a kvtally with other quantities
        if was is None or _fallen(kind, values, was) > 1:
            was = (0.0,) * len(values)  # it began after the previous scrape
        now = list(values)
        for position, (current, base, scale) in enumerate(zip(values, was, _SCALES[kind], strict=True)):
            if not _COUNTS[kind][position]:
                continue
            if current is None:
                if base is None:
                    hidden.add(position)
                # of one that was never read, nothing is known from here on
                now[position] = base if key in before else None
            elif base is not None and current < base:
                now[position] = base
            elif base is not None and base == base:  # noqa: PLR0124  # UNASKED is NaN
                totals[position] = (totals[position] or 0) + round(current * scale) - round(base * scale)
        kept[key] = tuple(now)
    return [None if position in hidden else total for position, total in enumerate(totals)], kept


def _detail_differences(
    previous: State, reading: Reading, reset: bool, behind: dict[str, str]
) -> tuple[tuple[int, ...] | None, tuple[str, ...], tuple[float, ...]]:
    """Differences of the secondary counters or None, and the names and values to keep."""
    names, details = reading.detail_names, reading.details
    if len(details) != len(names):
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


def _lower_bound(target: str, at_ns: int) -> Finding:
    """Of the whole hour, so that an hour in which a cache loses events all the time has one finding."""
    hour_ns = at_ns - at_ns % _HOUR_NS
    return Finding(
        "cache_events_dropped",
        "warning",
        target,
        hour_ns,
        hour_ns + _HOUR_NS,
        "LMCache has dropped events before it counted them: its tokens of this hour are a lower bound; it is short of "
        "CPU, give it more",
    )


def _restarted(target: str, previous: State, began_ns: int | None, taken_at_ns: int) -> Finding:
    # the kernel tells its boot in whole seconds, so a process start may read up to one early
    until_ns = taken_at_ns if began_ns is None else min(began_ns + 1_000_000_000, taken_at_ns)
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
