from __future__ import annotations

from math import hypot
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.ledger.settled import Parted
from kvtally.agent.report.division import NO_COPIES, Copies, alike, by_pool, by_step_law, by_two_costs, copies_of
from kvtally.agent.report.spread import TWO_COSTS, Spread
from kvtally.agent.split import Split

if TYPE_CHECKING:
    from kvtally.agent.report.division import Division
    from kvtally.agent.savings import Loading

SECOND = 10**9
NONE = (0.0,) * len(PARAMETERS)
COVARIANCE = tuple(
    tuple(0.04 if one == other == 0 else 0.01 if one == other else 0.0 for other in range(len(PARAMETERS)))
    for one in range(len(PARAMETERS))
)


def parted(
    prefill: tuple[float, float, float] = (2.0, 3.0, 4.0),
    decode: float = 5.0,
    *,
    loads: float | None = 0.0,
    stores: float | None = 0.0,
    by: tuple[float, float] = (0.0, 0.0),
) -> Parted:
    """What the step law says; `by`: derivatives of prefill and decode by the law's first parameter."""
    one, other = ((each, *NONE[1:]) for each in by)
    return Parted(prefill, decode, one, other, loads, stores, 0.0, 0.0, 0.0, 0.0)


def divided(occupied_ns: int, told: Parted, copies: Copies | None = NO_COPIES) -> Division:
    division = by_step_law(occupied_ns, told, copies)
    assert division is not None
    return division


def test_prefill_and_decode_of_the_step_law_are_scaled_to_the_occupied_time() -> None:
    division = divided(16 * SECOND, parted())
    # the law says 3 + 5 s where 16 were occupied; by the marginal views prefill has 2 or 4 of the 8
    assert division.parts == {"prefill": 6 * SECOND, "decode": 10 * SECOND, "stall": 0, "store": 0}
    assert (division.low_ns, division.high_ns) == (4 * SECOND, 8 * SECOND)
    assert division.law_ns == 8 * SECOND


def test_loading_and_storing_come_before_prefill_and_decode() -> None:
    division = divided(16 * SECOND, parted(), Copies(3 * SECOND, 5 * SECOND))
    assert division.parts == {
        "prefill": 3 * SECOND,
        "decode": 5 * SECOND,
        "stall": 3 * SECOND,
        "store": 5 * SECOND,
    }


def test_a_burst_of_copies_longer_than_the_hours_work_fills_it() -> None:
    division = divided(4 * SECOND, parted(), Copies(6 * SECOND, 2 * SECOND))
    assert division.parts == {"prefill": 0, "decode": 0, "stall": 3 * SECOND, "store": SECOND}


def test_only_the_ratio_of_prefill_to_decode_moves_their_shares() -> None:
    # d/dlog of 16 x 3/8: 16 x (p' d - d' p) / 64
    assert divided(16 * SECOND, parted(by=(1.0, 0.0))).by[0] == pytest.approx(16e9 * 5 / 64)
    assert divided(16 * SECOND, parted(by=(0.0, 1.0))).by[0] == pytest.approx(-16e9 * 3 / 64)
    assert divided(16 * SECOND, parted(by=(3.0, 5.0))).by[0] == pytest.approx(0.0)  # both by the same factor


def test_where_the_law_knows_of_no_step_it_divides_nothing() -> None:
    assert by_step_law(SECOND, parted((0.0, 0.0, 0.0), 0.0), NO_COPIES) is None


@pytest.mark.parametrize(
    ("told", "loading", "external", "has_page", "expected"),
    [
        (parted(loads=2.0, stores=1.0), "synchronous", 10, True, Copies(2 * SECOND, SECOND)),
        (parted(), "synchronous", 0, True, NO_COPIES),
        (parted(loads=2.0, stores=1.0), "asynchronous", 10, True, NO_COPIES),  # latency, not engine time
        (None, "asynchronous", 10, False, NO_COPIES),
        (parted(loads=2.0), "unknown", 10, True, None),
        (None, "synchronous", 10, True, None),
        (parted(), "synchronous", 0, False, None),  # nobody reports what is stored
        (parted(stores=1.0), "synchronous", 10, True, None),  # tokens were loaded, in a time that nobody reports
        (parted(loads=2.0, stores=None), "synchronous", 10, True, None),  # the page has no clock of stores
        (parted(loads=None, stores=1.0), "synchronous", 0, True, None),
    ],
)
def test_what_an_outer_tier_takes_is_known_where_its_page_and_its_connector_are(
    told: Parted | None, loading: Loading, external: int, has_page: bool, expected: Copies | None
) -> None:
    assert copies_of(told, loading, external_tokens=external, is_told=has_page) == expected


def test_time_without_a_count_of_its_own_is_divided_like_the_time_before() -> None:
    before = divided(16 * SECOND, parted(by=(1.0, 0.0)), Copies(3 * SECOND, 5 * SECOND))
    division = alike(4 * SECOND, before)
    assert division.parts == {
        "prefill": 750_000_000,
        "decode": 1_250_000_000,
        "stall": 750_000_000,
        "store": 1_250_000_000,
    }
    assert (division.low_ns, division.high_ns) == (before.low_ns / 4, before.high_ns / 4)
    assert division.by[0] == before.by[0] / 4
    assert division.law_ns == before.law_ns / 4


seconds = st.floats(0, 1e6, allow_subnormal=False)
lengths = st.integers(10**6, 10**16)


@given(lengths, lengths, st.tuples(seconds, seconds, seconds).map(sorted), seconds, st.tuples(lengths, lengths))
def test_every_division_sums_to_the_occupied_time_within_its_bounds(
    occupied: int, later: int, prefill: list[float], decode: float, copied: tuple[int, int]
) -> None:
    least, middle, most = prefill
    split = Split(0.2, 0.5, 0.7, 1.0, 1.0, 9)
    for copies in (None, NO_COPIES, Copies(*copied)):
        step_law = by_step_law(occupied, parted((least, middle, most), decode), copies)
        for division in (step_law, by_two_costs(occupied, split, copies)):
            if division is None:
                assert middle + decode <= 0
                continue
            for whole, one in ((occupied, division), (later, alike(later, division))):
                assert sum(one.parts.values()) == whole
                assert min(one.parts.values()) >= 0
                slack = 1 + whole * 1e-6  # nanoseconds of a short time, taken for those of a long one
                assert -slack <= one.low_ns <= one.prefill_ns + slack
                assert one.prefill_ns <= one.high_ns + slack <= whole + 2 * slack
                assert (one.copies is None) == (copies is None)


def test_views_calibration_and_form_make_the_interval_of_prefill() -> None:
    spread = Spread()
    spread.add(divided(16 * SECOND, parted(by=(1.6, 0.0))), 7, 32)
    shares = spread.shares_of_time({7: COVARIANCE}, parted=True)
    # views: 2 s either way; the law's: sd 0.2 of 16 x 1.6 x 5 / 64 = 2 s; the ratio's: 6 % of 16 x 3/8 x 5/8
    gap = hypot(2.0, 1.645 * hypot(0.4, 0.06 * 3.75)) * 1e9
    assert shares.prefill == pytest.approx((6e9 - gap, 6e9, 6e9 + gap))
    assert shares.decode == pytest.approx((10e9 - gap, 10e9, 10e9 + gap))
    assert shares.stall == shares.store == (0, 0, 0)
    # 32 nano-units in 16 s: 2e-9 each nanosecond
    money = spread.shares_of_money({7: COVARIANCE}, parted=True)
    assert (money.prefill.point, money.decode.point) == (12, 20)
    assert money.prefill.high == pytest.approx(12 + 2e-9 * gap)


def test_hours_of_one_calibration_err_together_and_those_of_two_apart() -> None:
    one, two = Spread(), Spread()
    for hour in range(2):
        division = divided(16 * SECOND, parted((3.0, 3.0, 3.0), by=(16.0, 0.0)))
        one.add(division, 7, 0)
        two.add(division, 7 + hour, 0)
    covariances: dict[int | str, tuple[tuple[float, ...], ...]] = {7: COVARIANCE, 8: COVARIANCE}
    form = 1.645 * 0.06 * 2 * 3.75  # the form of the law is common to all
    together, apart = (each.shares_of_time(covariances, parted=True).prefill for each in (one, two))
    # 0.2 of 20 s in each hour
    assert (together.high - together.point) / 1e9 == pytest.approx(min(hypot(1.645 * 8, form), 20.0))
    assert (apart.high - apart.point) / 1e9 == pytest.approx(hypot(1.645 * 4 * 2**0.5, form))


def test_what_copies_really_took_moves_prefill_and_decode() -> None:
    spread = Spread()
    told = parted((4.0, 4.0, 4.0), 4.0)
    spread.add(divided(28 * SECOND, told, Copies(10 * SECOND, 10 * SECOND)), 7, 0)
    shares = spread.shares_of_time({7: COVARIANCE}, parted=True)
    form = 1.645 * 0.06 * 2
    # half of what loading leaves (3 s less or more of 10) and of what storing leaves (5 s less, 2 s more)
    for part in (shares.prefill, shares.decode):
        assert part.point == 4 * SECOND
        assert (part.high - part.point) / 1e9 == pytest.approx(hypot(form, 1.5, 2.5))
        assert (part.point - part.low) / 1e9 == pytest.approx(hypot(form, 1.5, 1.0))
    assert shares.stall == pytest.approx((7e9, 10e9, 13e9))
    assert shares.store == pytest.approx((5e9, 10e9, 12e9))
    assert spread.shares_of_time({7: COVARIANCE}, parted=False)[2:] == (None, None)


def test_hours_of_the_law_of_two_costs_keep_its_interval() -> None:
    spread = Spread()
    for point in (0.4, 0.6):
        spread.add(by_two_costs(10 * SECOND, Split(point - 0.1, point, point + 0.2, 1.0, 1.0, 9), None), TWO_COSTS, 10)
    shares = spread.shares_of_time({}, parted=False)
    assert shares.prefill == pytest.approx((8e9, 10e9, 14e9))
    assert shares.decode == pytest.approx((6e9, 10e9, 12e9))
    assert spread.shares_of_money({}, parted=False).prefill == pytest.approx((8, 10, 14))


def test_replicas_at_different_prices_each_bring_their_own_share() -> None:
    spread = Spread()
    spread.add(by_two_costs(SECOND, Split(0.5, 1.0, 1.0, 1.0, 1.0, 9), NO_COPIES), TWO_COSTS, 1000)
    spread.add(by_two_costs(SECOND, Split(0.0, 0.0, 0.0, 1.0, 1.0, 9), NO_COPIES), TWO_COSTS, 9000)
    money = spread.shares_of_money({}, parted=True)
    assert (money.prefill.point, money.decode.point) == (1000, 9000)  # not half of the sum each
    assert money.prefill.low == pytest.approx(500)


@given(st.lists(st.tuples(lengths, st.integers(0, 10**15), st.floats(0, 1), st.tuples(lengths, lengths)), max_size=6))
def test_sums_are_exact_and_lie_in_their_intervals(
    hours: list[tuple[int, int, float, tuple[int, int]]],
) -> None:
    spread = Spread()
    for occupied, worked, share, copied in hours:
        told = parted((share / 2, share, share), 1 - share, by=(0.3, -0.1))
        spread.add(divided(occupied, told, Copies(*copied)), 7, worked)
    time, money = (shares({7: COVARIANCE}, parted=True) for shares in (spread.shares_of_time, spread.shares_of_money))
    for shares, total in ((time, sum(hour[0] for hour in hours)), (money, sum(hour[1] for hour in hours))):
        parts = (shares.prefill, shares.decode, shares.stall, shares.store)
        assert sum(part.point for part in parts if part is not None) == total
        for part in parts:
            assert part is not None
            assert 0 <= part.low <= part.point <= part.high


@pytest.mark.parametrize(("role", "prefill", "decode"), [("prefill", 13, 0), ("decode", 0, 13)])
def test_an_engine_that_does_one_half_only_needs_no_law(role: str, prefill: int, decode: int) -> None:
    division = by_pool(16 * SECOND, role, Copies(2 * SECOND, 1 * SECOND))
    assert division.parts == {
        "prefill": prefill * SECOND,
        "decode": decode * SECOND,
        "stall": 2 * SECOND,
        "store": SECOND,
    }
    assert (division.low_ns, division.high_ns) == (prefill * SECOND, prefill * SECOND)


def test_stalls_of_a_prefill_engine_make_its_prefill_uncertain_and_no_decode() -> None:
    spread = Spread()
    spread.add(by_pool(16 * SECOND, "prefill", Copies(2 * SECOND, 0)), TWO_COSTS, 0)
    shares = spread.shares_of_time({}, parted=True)
    # of 2 s that the timers tell the engine may have lost 70 to 130 %
    assert shares.prefill.low == pytest.approx(13.4 * SECOND)
    assert shares.prefill.high == pytest.approx(14.6 * SECOND)
    assert shares.decode == (0, 0, 0)
