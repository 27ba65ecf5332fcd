from __future__ import annotations

from itertools import chain, combinations
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.attribution import last_in, serving, shapley

if TYPE_CHECKING:
    from collections.abc import Callable

TIERS = ("hbm", "dram", "disk")
SETS = [
    frozenset(chosen) for chosen in chain.from_iterable(combinations(TIERS, size) for size in range(len(TIERS) + 1))
]
worths = st.floats(-1000, 1000)


@st.composite
def any_values(draw: st.DrawFn) -> Callable[[frozenset[str]], float]:
    """Any worth of each set of tiers; none is worth nothing."""
    values = {each: draw(worths) for each in SETS} | {frozenset[str](): 0.0}
    return values.__getitem__


@st.composite
def substitutes(draw: st.DrawFn) -> Callable[[frozenset[str]], float]:
    """Tiers that each hold some of the same prefixes: what several hold is saved once."""
    saved = draw(st.lists(st.tuples(st.sets(st.sampled_from(TIERS)), st.floats(0, 100)), max_size=8))
    return lambda tiers: sum(seconds for holders, seconds in saved if holders & tiers)


@given(any_values())
def test_what_serves_and_shapley_sum_to_what_all_tiers_are_worth(value: Callable[[frozenset[str]], float]) -> None:
    total = value(frozenset(TIERS))
    assert sum(serving(TIERS, value).values()) == pytest.approx(total, abs=1e-9)
    assert sum(shapley(TIERS, value).values()) == pytest.approx(total, abs=1e-9)


@given(any_values(), st.sampled_from(TIERS))
def test_a_tier_that_adds_nothing_gets_nothing(value: Callable[[frozenset[str]], float], idle: str) -> None:
    def without(tiers: frozenset[str]) -> float:
        return value(tiers - {idle})

    for parts in (serving(TIERS, without), last_in(TIERS, without), shapley(TIERS, without)):
        assert parts[idle] == 0


@given(substitutes())
def test_shapley_lies_between_last_in_and_alone_where_tiers_stand_in_for_each_other(
    value: Callable[[frozenset[str]], float],
) -> None:
    last, fair = last_in(TIERS, value), shapley(TIERS, value)
    for tier in TIERS:
        assert last[tier] - 1e-9 <= fair[tier] <= value(frozenset({tier})) + 1e-9


@given(any_values(), st.permutations(TIERS))
def test_shapley_does_not_depend_on_the_order_of_lookup(
    value: Callable[[frozenset[str]], float], order: list[str]
) -> None:
    one, other = shapley(TIERS, value), shapley(tuple(order), value)
    assert one == pytest.approx(other, abs=1e-9)


def test_two_tiers_by_hand() -> None:
    # HBM alone 10; disk alone 8, since it holds all and is slower; both 11
    worth = {
        frozenset[str](): 0.0,
        frozenset({"hbm"}): 10.0,
        frozenset({"disk"}): 8.0,
        frozenset({"hbm", "disk"}): 11.0,
    }
    assert serving(("hbm", "disk"), worth.__getitem__) == {"hbm": 10.0, "disk": 1.0}
    assert last_in(("hbm", "disk"), worth.__getitem__) == {"hbm": 3.0, "disk": 1.0}
    assert shapley(("hbm", "disk"), worth.__getitem__) == {"hbm": 6.5, "disk": 4.5}
