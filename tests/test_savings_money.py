from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledgers import HOUR, RATES, SECOND
from tests.present import present

from kvtally.agent.facts import Facts, Line
from kvtally.agent.savings import EXACTLY_NOTHING, Estimate, Seconds, TierSeconds, nothing_reused, with_held
from kvtally.agent.savings_money import holding_of, mean_rate, money_of, rate_of, weighed

NOTHING_HELD = {"dram": 0, "disk": 0, "external": 0}
# 3.60 an hour: a thousandth of a unit a second
RATE = Fraction(1_000_000)


def tier(tokens: float, avoided: Estimate, net: Estimate) -> TierSeconds:
    return TierSeconds(tokens, avoided, net, "ok")


def seconds(**changes: Any) -> Seconds:
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
    return plain._replace(**changes)


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
    assert present(found.net).point == 10_000_000 - 1_500_000 - 500_000 - 600_000 == 7_400_000
    # the interval of the net seconds around it: 3 s below, 2.5 above
    assert (present(found.net).low, present(found.net).high) == (4_400_000, 9_900_000)
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
    assert present(found.tiers["dram"].net).point == 2_000_000 - 300


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
    assert found.gross.point == present(found.net).point + present(found.stall) + present(found.store) + found.holding
    assert found.gross.low <= found.gross.point <= found.gross.high
    assert present(found.net).low <= present(found.net).point <= present(found.net).high
    assert all(
        isinstance(amount, int)
        for amount in (*found.gross, *present(found.net), present(found.stall), present(found.store))
    )


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


def test_a_tier_that_is_all_there_is_has_the_money_of_the_group() -> None:
    # a third of a nano-unit more or less wherever a bound is rounded
    found = Estimate(10 / 3, 20 / 3, 31 / 3)
    alone = seconds(avoided=found, net=found, tiers={"hbm": tier(600, found, found)})
    alone = alone._replace(stall=EXACTLY_NOTHING, store=EXACTLY_NOTHING)
    for rate in (Fraction(7), Fraction(29, 3), Fraction(1_000_001)):
        money = money_of(alone, rate, NOTHING_HELD)
        assert money.gross == money.net == money.tiers["hbm"].gross == money.tiers["hbm"].net


def test_what_rounding_leaves_over_falls_to_the_largest_tier() -> None:
    # 1.4 + 1.4 s at a nano-unit each, of 2.8; loading and storing took 0.4 + 0.4, each rounded for itself to nothing
    gain, net = Estimate(1.4, 1.4, 1.4), Estimate(0.6, 0.6, 0.6)
    cost = Estimate(0.4, 0.4, 0.4)
    two = seconds(
        avoided=Estimate(2.8, 2.8, 2.8),
        stall=cost,
        store=cost,
        net=Estimate(2.0, 2.0, 2.0),
        tiers={"hbm": tier(1, gain, gain), "external": tier(1, gain, net)},
    )
    money = money_of(two, Fraction(1), NOTHING_HELD)
    assert (money.gross.point, money.stall, money.store) == (3, 0, 0)
    assert [one.gross.point for one in money.tiers.values()] == [2, 1]
    assert [present(one.net).point for one in money.tiers.values()] == [2, 1]


# --- statuses and reasons by money


def told(found: Seconds) -> list[str]:
    return [reason.text for reason in found.reasons]


EVEN = "the interval of net in money contains zero: what is held costs about as much as reuse saved"
DEARER = "what is held costs more than reuse saved"


@pytest.mark.parametrize("status", ["ok", "lower_bound"])
@pytest.mark.parametrize(
    ("held", "is_proven", "reasons"),
    [
        # 8 s net, 5 to 10.5, at a million nano-units each
        (0, True, []),
        (4_999_999, True, []),
        (5_000_000, False, [EVEN]),
        (8_000_000, False, [EVEN]),
        (10_500_000, False, [EVEN]),
        (10_500_001, True, [DEARER]),
    ],
)
def test_a_net_in_money_with_zero_in_its_interval_is_not_proven_and_a_loss_says_why(
    held: int, is_proven: bool, reasons: list[str], status: str
) -> None:
    before = seconds(status=status)
    found = weighed(before, money_of(before, RATE, {"dram": held, "disk": 0, "external": 0}))
    assert found.status == (status if is_proven else "not_proven")
    assert told(found) == reasons
    assert (found.net, found.avoided, found.tiers.keys()) == (before.net, before.avoided, before.tiers.keys())


def test_each_tier_is_weighed_by_what_is_held_for_it() -> None:
    # external is worth 4 s, 2 to 6; HBM 4 s, for which nothing is held
    found = weighed(seconds(), money_of(seconds(), RATE, {"dram": 3_000_000, "disk": 0, "external": 0}))
    assert found.status == "ok"
    assert (found.tiers["hbm"].status, found.tiers["hbm"].reasons) == ("ok", ())
    assert found.tiers["external"].status == "not_proven"
    (reason,) = found.tiers["external"].reasons
    assert reason.text.startswith("its net interval in money contains zero")
    lost = weighed(seconds(), money_of(seconds(), RATE, {"dram": 6_000_001, "disk": 0, "external": 0}))
    assert lost.tiers["external"].status == "ok"
    assert [one.text for one in lost.tiers["external"].reasons] == ["what is held for it costs more than it saved"]


def test_a_tier_that_served_nothing_says_that_it_is_held_all_the_same() -> None:
    unused = with_held(seconds(tiers={"hbm": seconds().tiers["hbm"]}), ["dram"])
    found = weighed(unused, money_of(unused, RATE, {"dram": 1, "disk": 0, "external": 0}))
    assert found.tiers["dram"].status == "ok"  # it is exactly that much
    (reason,) = found.tiers["dram"].reasons
    assert reason.text == "it served nothing, and what is held for it is charged all the same"
    nothing = with_held(nothing_reused(), ["dram"])
    found = weighed(nothing, money_of(nothing, RATE, {"dram": 1, "disk": 0, "external": 0}))
    assert (found.status, told(found)) == ("ok", ["nothing was reused, and what is held is charged all the same"])


@pytest.mark.parametrize("is_priced", [True, False])
def test_a_loss_of_engine_seconds_is_laid_to_loading_and_storing(is_priced: bool) -> None:
    slow = seconds(net=Estimate(-3.0, -2.0, -1.0))
    money = money_of(slow, RATE, {"dram": 9, "disk": 0, "external": 0}) if is_priced else None
    found = weighed(slow, money)
    assert (found.status, told(found)) == ("ok", ["loading and storing took more of the engine than reuse avoided"])


@pytest.mark.parametrize("status", ["insufficient_data", "unreconciled", "not_proven"])
def test_money_lifts_no_status_and_adds_nothing_to_a_refusal(status: str) -> None:
    before = seconds(status=status)
    found = weighed(before, money_of(before, RATE, {"dram": 8_000_000, "disk": 0, "external": 0}))
    assert (found.status, found.reasons) == (status, ())


def test_where_the_net_is_not_known_money_says_nothing_of_it() -> None:
    unknown = seconds(status="not_proven", stall=None, store=None, net=None, bound=None)
    unknown.tiers["external"] = unknown.tiers["external"]._replace(net=None, status="insufficient_data")
    money = money_of(unknown, RATE, {"dram": 300, "disk": 0, "external": 0})
    assert (money.net, money.tiers["external"].net, money.tiers["external"].holding) == (None, None, 300)
    assert money.tiers["hbm"].net == money.tiers["hbm"].gross
    assert weighed(unknown, money) == unknown
