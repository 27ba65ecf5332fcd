"""Whose work a saving is, where several cache tiers take part (METHOD section 3, per-tier attribution). Pure."""

from __future__ import annotations

from itertools import combinations
from math import factorial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def serving(order: Sequence[str], value: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """Each tier gets what it adds behind those that are looked up before it; the parts sum to the value of all."""
    parts: dict[str, float] = {}
    before: frozenset[str] = frozenset()
    for tier in order:
        parts[tier] = value(before | {tier}) - value(before)
        before |= {tier}
    return parts


def last_in(tiers: Sequence[str], value: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """What would be lost if a tier alone went away; where tiers stand in for each other, the parts sum to less."""
    everything = frozenset(tiers)
    return {tier: value(everything) - value(everything - {tier}) for tier in tiers}


def shapley(tiers: Sequence[str], value: Callable[[frozenset[str]], float]) -> dict[str, float]:
    """The mean of what a tier adds over every order in which the tiers could have come; sums to the value of all."""
    count = len(tiers)
    parts: dict[str, float] = {}
    for tier in tiers:
        others = [other for other in tiers if other != tier]
        total = 0.0
        for size in range(count):
            weight = factorial(size) * factorial(count - size - 1) / factorial(count)
            for chosen in combinations(others, size):
                before = frozenset(chosen)
                total += weight * (value(before | {tier}) - value(before))
        parts[tier] = total
    return parts
