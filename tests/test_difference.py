from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.difference import (
    BACKWARDS,
    IMPOSSIBLE,
    MISSING,
    UNASKED,
    difference,
    differences,
    fell_to_begin_anew,
    gauge,
)
from kvtally.collectors.quantities import QUANTITIES

anything = st.none() | st.floats() | st.sampled_from([UNASKED, 0.0, 5.0, 2.0**62, 2.0**63, 1e300])


def same(one: float | None, other: float | None) -> bool:
    return one is other or one == other or (one is not None and other is not None and one != one and other != other)  # noqa: PLR0124  # NaN


@given(st.sampled_from(sorted(QUANTITIES)), st.data())
def test_counters_together_come_to_what_each_comes_to_alone(kind: str, data: st.DataObject) -> None:
    quantities = QUANTITIES[kind]  # type: ignore[index]
    pairs = data.draw(st.lists(st.tuples(anything, anything), min_size=len(quantities), max_size=len(quantities)))
    before, values = tuple(base for base, _ in pairs), tuple(current for _, current in pairs)
    behind: dict[str, str] = {}
    found, kept = differences(kind, before, values, behind, reset=False, is_new_session=False)  # type: ignore[arg-type]
    for quantity, base, current, counted, keep in zip(quantities, before, values, found, kept, strict=True):
        if quantity.type == "gauge":
            assert (counted, quantity.name in behind) == (gauge(current, quantity.scale), False)
            continue
        one = difference(base, current, integral=quantity.type == "integral", scale=quantity.scale)
        assert (counted, behind.get(quantity.name, "")) == (one[0], one[2])
        assert same(keep, one[1])
        assert counted is None or 0 <= counted < 2**63


@pytest.mark.parametrize(
    ("base", "current", "counted", "keep", "why"),
    [
        (5.0, 7.0, 2, 7.0, ""),
        (5.0, 5.0, 0, 5.0, ""),
        (None, 7.0, 7, 7.0, ""),
        (5.0, None, None, 5.0, MISSING),
        (5.0, math.nan, None, 5.0, MISSING),
        (None, None, None, None, ""),
        (5.0, 4.0, None, 5.0, BACKWARDS),
        (5.0, -math.inf, None, 5.0, BACKWARDS),
        (5.0, math.inf, None, 5.0, IMPOSSIBLE),
        (5.0, 2.0**63 + 4096, None, 5.0, IMPOSSIBLE),
        (1e300, 1e300, None, 1e300, IMPOSSIBLE),
        (2.0**63, 7.0, None, 7.0, ""),
        (UNASKED, 7.0, None, 7.0, ""),
        (math.inf, 7.0, None, 7.0, ""),
    ],
)
def test_what_a_counter_counted_what_is_kept_and_why_it_cannot_be_used(
    base: float | None, current: float | None, counted: int | None, keep: float | None, why: str
) -> None:
    assert difference(base, current, integral=False, scale=1) == (counted, keep, why)


def test_a_collectors_own_sum_that_falls_began_anew() -> None:
    assert difference(5.0, 4.0, integral=True, scale=10) == (40, 4.0, "")


@pytest.mark.parametrize("impossible", [math.nan, math.inf, -math.inf, 2.0**63, 1e300])
def test_a_gauge_that_can_be_no_number_of_64_bits_is_unknown(impossible: float) -> None:
    assert gauge(impossible, 1) is None
    assert gauge(impossible, 1e9) is None
    assert gauge(0.25, 1e6) == 250_000


def cache(*shown: float | None) -> tuple[float | None, ...]:
    return (*shown, *(None,) * (len(QUANTITIES["cache"]) - len(shown)))


@pytest.mark.parametrize(
    ("before", "now", "backwards", "anew"),
    [
        ((5.0, 5.0, 5.0), (4.0, 4.0, 6.0), (), True),
        ((5.0, 5.0, 5.0), (4.0, 5.0, 5.0), (), True),
        ((5.0, 5.0, 5.0), (4.0, 5.0, 6.0), (), False),
        ((5.0, 5.0, 5.0), (4.0, None, 5.0), ("lookup_tokens",), False),
        ((5.0, 5.0, 5.0), (5.0, 5.0, 5.0), (), False),
        ((UNASKED, None, 5.0), (1.0, 1.0, 5.0), (), False),
    ],
)
def test_a_source_that_can_be_told_to_begin_anew_did_where_two_fall_or_one_falls_and_none_rises(
    before: tuple[float | None, ...], now: tuple[float | None, ...], backwards: tuple[str, ...], anew: bool
) -> None:
    assert fell_to_begin_anew("cache", cache(*before), cache(*now), backwards) is anew


def test_of_another_source_two_below_their_highest_began_anew_though_one_is_known_to_have_gone_backwards() -> None:
    rest = (None,) * (len(QUANTITIES["engine"]) - 2)
    before, now = (5.0, 5.0, *rest), (4.0, 4.0, *rest)
    assert fell_to_begin_anew("engine", before, now, {"prompt_tokens"})
    assert not fell_to_begin_anew("engine", before, (4.0, 5.0, *rest))
