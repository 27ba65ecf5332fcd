from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledgers import HOUR, RATES, SECOND

from kvtally.agent.facts import Facts, Line
from kvtally.agent.savings import EXACTLY_NOTHING, Estimate, Seconds, TierSeconds
from kvtally.agent.savings_money import holding_of, mean_rate, money_of, rate_of

NOTHING_HELD = {"dram": 0, "disk": 0, "external": 0}
# 3.60 an hour: a thousandth of a unit a second
RATE = Fraction(1_000_000)


def tier(tokens: float, avoided: Estimate, net: Estimate) -> TierSeconds:
    return TierSeconds(tokens, avoided, net, "ok")


def seconds(**changes: object) -> Seconds:
    """10 seconds avoided, 6 of them by outer tiers whose loads took 1.5 and stores 0.5; a fifth of it bound."""
    plain = Seconds(
        "ok",
        (),
        Estimate(8.0, 10.0, 12.0),
        Estimate(1.0, 1.5, 2.0),
        Estimate(0.25, 0.5, 0.75),
        Estimate(5.0, 8.0, 10.5),
        {
            "hbm": tier(600, Estimate(3.0, 4.0, 5.0), Estimate(3.0, 4.0, 5.0)),
            "external": tier(400, Estimate(5.0, 6.0, 7.0), Estimate(2.0, 4.0, 6.0)),
        },
        {},
        Estimate(1.0, 1.6, 2.0),
        0.2,
        0.0,
    )
    return plain._replace(**changes)  # type: ignore[arg-type]  # fields of a test


def facts(amounts: dict[str, int] | None, state_ns: int = HOUR) -> Facts:
    lines = None
    if amounts is not None:
        lines = tuple(Line(name, "", "occupied", 1, "", RATES[0], amount) for name, amount in amounts.items())  # type: ignore[arg-type]  # names of resources
    return Facts(None, 0, {}, {"occupied": state_ns}, lines, None, 0, HOUR, 0.0, modelled=False)


# --- what an engine-second costs


def test_an_engine_second_costs_what_its_gpus_and_server_cost() -> None:
    # 7.2 for GPUs and 1.8 for the server in an hour: 2.5 thousandths a second; what is held is no engine time
    found = rate_of(facts({"gpu": 7_200_000_000, "server": 1_800_000_000, "dram": 99, "storage": 99, "energy": 99}))
    assert found == 2_500_000


def test_a_second_of_a_part_of_an_hour_costs_as_much() -> None:
    assert rate_of(facts({"gpu": 1_000_000_007}, 600 * SECOND)) == Fraction(1_000_000_007, 600)


def test_where_the_money_is_unknown_a_second_has_no_price() -> None:
    assert rate_of(facts(None)) is None


def test_no_time_has_no_price() -> None:
    nothing = facts({"gpu": 0}, 0)
    assert rate_of(nothing._replace(start_ns=5, end_ns=5)) is None


def test_a_mean_rate_weighs_the_seconds_that_were_avoided_at_each() -> None:
    assert mean_rate([(Fraction(100), 1.0), (Fraction(400), 3.0)]) == 325


def test_without_avoided_seconds_every_rate_weighs_the_same() -> None:
    assert mean_rate([(Fraction(100), 0.0), (Fraction(400), 0.0)]) == 250
    # seconds that reuse cost are no weight
    assert mean_rate([(Fraction(100), -2.0), (Fraction(400), 1.0)]) == 400


def test_what_holding_costs_is_charged_by_tier_whether_it_served_or_not() -> None:
    one = facts({"gpu": 10**9, "dram": 5, "storage": 7, "network": 11, "platform": 13})
    other = facts({"dram": 100})
    assert holding_of([one, other, facts(None)]) == {"dram": 105, "disk": 7, "external": 24}
    assert holding_of([]) == NOTHING_HELD


# --- a group's money


def test_seconds_are_priced_and_add_up() -> None:
    found = money_of(seconds(), RATE, {"dram": 300_000, "disk": 200_000, "external": 100_000})
    assert found.gross == (8_000_000, 10_000_000, 12_000_000)
    assert (found.stall, found.store, found.holding) == (1_500_000, 500_000, 600_000)
    assert found.net.point == 10_000_000 - 1_500_000 - 500_000 - 600_000 == 7_400_000
    # the interval of the net seconds around it: 3 s below, 2.5 above
    assert (found.net.low, found.net.high) == (4_400_000, 9_900_000)
    # a part of it came where capacity was short; what is held is paid for at all times
    assert found.realised == (400_000, 1_000_000, 1_400_000)
    assert found.rate_nano == RATE


def test_where_nothing_tells_of_capacity_what_was_realised_is_unknown() -> None:
    assert money_of(seconds(bound=None, capacity_bound_share=None), RATE, NOTHING_HELD).realised is None


def test_on_a_fleet_that_never_queues_only_what_is_held_is_realised() -> None:
    found = money_of(seconds(bound=EXACTLY_NOTHING), RATE, {"dram": 300, "disk": 0, "external": 45})
    assert found.realised == (-345, -345, -345)


def test_nothing_reused_costs_what_it_takes_to_hold_nothing() -> None:
    idle = seconds(
        avoided=EXACTLY_NOTHING,
        stall=EXACTLY_NOTHING,
        store=EXACTLY_NOTHING,
        net=EXACTLY_NOTHING,
        bound=EXACTLY_NOTHING,
        tiers={"hbm": tier(0, EXACTLY_NOTHING, EXACTLY_NOTHING)},
    )
    found = money_of(idle, RATE, {"dram": 1000, "disk": 0, "external": 0})
    assert found.gross == (0, 0, 0)
    assert found.net == (-1000, -1000, -1000)
    assert found.holding == 1000


def test_tiers_are_priced_and_each_bears_what_is_held_for_it() -> None:
    found = money_of(seconds(), RATE, {"dram": 300, "disk": 200, "external": 100})
    assert found.tiers["hbm"] == ((3_000_000, 4_000_000, 5_000_000), 0, (3_000_000, 4_000_000, 5_000_000))
    # DRAM and disk are not told apart: what they hold falls to the outer tiers together
    assert found.tiers["external"].holding == 600
    assert found.tiers["external"].net == (1_999_400, 3_999_400, 5_999_400)


def test_tiers_that_are_told_apart_bear_their_own() -> None:
    half = tier(200, Estimate(2.5, 3.0, 3.5), Estimate(1.0, 2.0, 3.0))
    apart = seconds(tiers={"hbm": seconds().tiers["hbm"], "dram": half, "external": half})
    found = money_of(apart, RATE, {"dram": 300, "disk": 200, "external": 100})
    assert found.tiers["dram"].holding == 300
    assert found.tiers["external"].holding == 300
    assert found.tiers["dram"].net.point == 2_000_000 - 300


@settings(deadline=None)
@given(
    st.tuples(*[st.floats(0, 1e6)] * 3),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
    st.fractions(min_value=0, max_value=10**10),
    st.integers(0, 10**15),
)
def test_gross_is_net_and_every_cost_to_the_nano_unit(
    bounds: tuple[float, float, float], stall: float, store: float, rate: Fraction, held: int
) -> None:
    low, point, high = sorted(bounds)
    net = Estimate(low - stall - store, point - stall - store, high - stall - store)
    told = seconds(
        avoided=Estimate(low, point, high),
        stall=Estimate(stall, stall, stall),
        store=Estimate(0.0, store, store),
        net=net,
    )
    found = money_of(told, rate, {"dram": held, "disk": 0, "external": 0})
    assert found.gross.point == found.net.point + found.stall + found.store + found.holding
    assert found.gross.low <= found.gross.point <= found.gross.high
    assert found.net.low <= found.net.point <= found.net.high
    assert all(isinstance(amount, int) for amount in (*found.gross, *found.net, found.stall, found.store))


def test_an_amount_is_exact_however_large() -> None:
    # a float of 1e9 seconds at a price with thirds: rounded once, at the end
    rate = Fraction(10**10, 3)
    found = money_of(seconds(avoided=Estimate(1e9, 1e9, 1e9)), rate, NOTHING_HELD)
    assert found.gross.point == round(Fraction(10**19, 3))


@pytest.mark.parametrize("gpus", [1, 4])
def test_a_second_of_a_replica_is_a_second_of_all_its_gpus(gpus: int) -> None:
    # so many GPUs at 3.60 an hour cost so many thousandths a second: seconds x GPUs x units per GPU-second
    rate = rate_of(facts({"gpu": gpus * 3_600_000_000}))
    assert rate is not None
    assert money_of(seconds(), rate, NOTHING_HELD).gross.point == 10 * gpus * 1_000_000
