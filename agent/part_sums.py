"""Sums over parts that come and go: processes of a tree, devices of a cgroup, mounts and targets of a filesystem."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from kvtally.agent.difference import (
    BACKWARDS,
    COUNT_MAX,
    INTEGER_MAX,
    RULES,
    UNASKED,
    Values,
    difference,
    fell_to_begin_anew,
    gauge,
)
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from kvtally.collectors.base import Kind, Reading

Parts = Mapping[str, Values]


def part_sums(
    before: Parts, reading: Reading, was_behind: Mapping[str, str], behind: dict[str, str]
) -> tuple[list[int | None], Parts]:
    """What all parts counted (gauges as they are), and the raw values to keep of each.

    A part that is new, or whose counters began anew, counts whole; one that is gone has been counted. One that was
    read before and cannot be used now is in `behind`: what it counts is counted later, the others' now. One whose
    count so far nobody knows, and which still may not be read, makes the sum unknown.
    """
    kind = reading.kind
    quantities, rules = QUANTITIES[kind], RULES[kind]
    sums = [
        None if counts else gauge(value, scale) for value, (counts, _, scale) in zip(reading.values, rules, strict=True)
    ]
    unknown: set[int] = set()
    kept: dict[str, Values] = {}
    for key, values in (reading.parts or {}).items():
        bases = _bases(kind, key, before.get(key), values, was_behind)
        is_others = len(before.get(key, values)) != len(values)  # kept by a kvtally with other quantities
        keep = list(values)
        for position, (base, current, (counts, integral, scale)) in enumerate(zip(bases, values, rules, strict=True)):
            if not counts:
                continue
            counted, raw, why = difference(base, current, integral=integral, scale=scale)
            keep[position] = raw
            if counted is not None:
                sums[position] = (sums[position] or 0) + counted
            elif is_others or (raw is not None and not abs(raw) < COUNT_MAX):  # NaN, or what cannot be
                unknown.add(position)
            if why:
                behind[_name(quantities[position].name, key)] = why
        kept[key] = tuple(keep)
    return [None if at in unknown or (one or 0) >= INTEGER_MAX else one for at, one in enumerate(sums)], kept


def _bases(kind: Kind, key: str, was: Values | None, values: Values, was_behind: Mapping[str, str]) -> Values:
    """What a part's values count from."""
    if was is None:
        return (None,) * len(values)  # it began after the previous scrape
    if len(was) != len(values):
        return (UNASKED,) * len(values)
    names = (quantity.name for quantity in QUANTITIES[kind])
    backwards = {name for name in names if was_behind.get(_name(name, key)) == BACKWARDS} if was_behind else ()
    if fell_to_begin_anew(kind, was, values, backwards):
        return (0.0,) * len(values)
    # a part that once could not be read has counted we know not what
    return tuple(UNASKED if base is None else base for base in was)


def _name(quantity: str, key: str) -> str:
    return f"{quantity} of {key}"
