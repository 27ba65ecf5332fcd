"""The invariants of the savings (METHOD section 5), by their numbers there."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.present import present
from tests.replica_rows import SECOND, THETA, Asked, calibration, h100, load, observed, people, row, told

from kvtally.agent.attribution import last_in, serving, shapley
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.interval import BUSY_AT_START
from kvtally.agent.observed import CacheSpan
from kvtally.agent.savings import (
    DISCREPANCY,
    EXACTLY_NOTHING,
    Z90,
    Estimate,
    Loading,
    Part,
    Seconds,
    parts_of,
    seconds_of,
    with_held,
)
from kvtally.agent.savings_money import Money, money_of
from kvtally.agent.steplaw.chunks import budget_of
from kvtally.agent.steplaw.law import packaged_prior
from kvtally.agent.steplaw.series import series_of
from kvtally.agent.steplaw.worth import Law, marginal, worth
from kvtally.agent.worth import NOTHING, Worth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.observed import ObservedRow
    from kvtally.agent.steplaw.machine import Machine

MACHINE = h100()
MEDIANS = tuple(packaged_prior(MACHINE).medians.tolist())
PLACES = {name: place for place, name in enumerate(PARAMETERS)}
NANO = 10**9
RATE = Fraction(269 * NANO, 360_000)  # 2.69 an hour
HELD = {"dram": 120_000_001, "disk": 30_000_007, "external": 5_000_003}
NOTHING_HELD = dict.fromkeys(HELD, 0)

# --- what is drawn


@st.composite
def requests(draw: st.DrawFn, reuse: bool = True, outer: bool = True) -> Asked:
    """A request of a few hundred to some thousand tokens."""
    prompt = draw(st.integers(64, 12_000))
    reused = draw(st.integers(0, prompt - 1)) if reuse else 0
    of_outer = draw(st.integers(0, reused)) if outer else 0
    output = draw(st.integers(1, 60))
    return Asked(prompt, reused - of_outer, of_outer, output, decode_seconds=0.02 * (output - 1))


def stories(reuse: bool = True, outer: bool = True) -> st.SearchStrategy[list[ObservedRow]]:
    """A minute or less of an engine, twenty requests or more in it."""

    def rows(told_seconds: list[list[Asked]]) -> list[ObservedRow]:
        return [
            row(3 * at, 3 * at + 3, asked, flags=BUSY_AT_START, running_requests=len(asked) % 3)
            for at, asked in enumerate(told_seconds)
        ]

    asked = st.lists(requests(reuse, outer), min_size=1, max_size=6)
    return st.lists(asked, min_size=1, max_size=8).map(rows)


def law_of(**factors: float) -> tuple[float, ...]:
    return tuple(value * factors.get(name, 1.0) for name, value in zip(PARAMETERS, MEDIANS, strict=True))


def valued(
    rows: Sequence[ObservedRow],
    machine: Machine = MACHINE,
    law: Calibration | None = None,
    loading: Sequence[CacheSpan] = (),
) -> Worth:
    series = series_of(observed(rows, caches={"lmcache": loading}))
    return worth(machine, series, 0, len(series.at) - 1, law or calibration(MEDIANS))


def figures(found: Worth, loading: Loading = "synchronous", law: Calibration | None = None) -> Seconds:
    return seconds_of([Part(law or calibration(MEDIANS), found, loading)], 60.0)


@st.composite
def worths(draw: st.DrawFn) -> Worth:
    """What a span could be worth: with everything that a law can say of it."""
    full = draw(st.floats(1, 1000))
    share = draw(st.floats(0, 1))
    outer = draw(st.floats(0, 1))
    spread = draw(st.floats(0, 0.1))
    middle = full * share
    slopes = draw(st.lists(st.floats(-1, 1), min_size=len(PARAMETERS), max_size=len(PARAMETERS)))
    seconds = draw(st.floats(1, 3600))
    starved = draw(st.one_of(st.none(), st.floats(0, 1)))
    split = draw(st.floats(0, 1))
    tokens = draw(st.integers(1, 10**7))
    external = round(tokens * outer)
    outer = external / tokens
    named = draw(st.sampled_from([0.0, 0.6, 1.0]))
    return NOTHING._replace(
        avoided=(middle * (1 + spread), middle, middle * (1 - spread)),
        outer=(middle * outer * (1 + spread), middle * outer, middle * outer * (1 - spread)),
        full=(full,) * 3,
        avoided_by=tuple(slope * middle for slope in slopes),
        outer_by=tuple(slope * middle * outer for slope in slopes),
        full_by=tuple(slope * full for slope in slopes),
        clock_by=(-middle, -middle * outer, -full),
        dram=middle * outer * named * split,
        disk=middle * outer * named * (1 - split),
        dram_tokens=external * named * split,
        disk_tokens=external * named * (1 - split),
        bound=middle * (starved or 0.0),
        loads=draw(st.floats(0, 50)),
        stores=draw(st.floats(0, 50)),
        requests=float(draw(st.integers(20, 1000))),
        preemptions=float(draw(st.integers(0, 30))),
        hbm_tokens=float(tokens - external),
        external_tokens=float(external),
        computed_tokens=float(draw(st.integers(1, 10**7))),
        seconds=seconds,
        starved_seconds=None if starved is None else seconds * starved,
        attention_seconds=full * draw(st.floats(0, 0.9)),
    )


LOADING: st.SearchStrategy[Loading] = st.sampled_from(["synchronous", "asynchronous", "unknown"])
HELD_BY_TIER = st.fixed_dictionaries(dict.fromkeys(HELD, st.integers(0, 10**12)))
RATES = st.fractions(min_value=Fraction(1), max_value=Fraction(10**9), max_denominator=10**6)

# --- (12) to (14): what was not reused avoided nothing


@settings(max_examples=20, deadline=None)
@given(stories(reuse=False), st.floats(0, 5), LOADING)
def test_12_no_reuse_avoids_exactly_nothing_has_no_interval_and_is_charged_for_holding(
    rows: list[ObservedRow], stores: float, loading: Loading
) -> None:
    span = CacheSpan(0, rows[-1].row.end_ns, 0, round(stores * SECOND), None, None, None, None)
    found = valued(rows, loading=[span])
    assert found.avoided == found.outer == (0.0, 0.0, 0.0)
    seconds = figures(found, loading)
    assert seconds.avoided == EXACTLY_NOTHING
    assert all(tier.avoided == EXACTLY_NOTHING for tier in seconds.tiers.values())
    money = money_of(seconds, RATE, HELD)
    assert money.gross == (0, 0, 0)
    assert money.holding == sum(HELD.values())
    assert present(money.net).point == -present(money.stall) - present(money.store) - money.holding


@settings(max_examples=20, deadline=None)
@given(stories(outer=False))
def test_13_no_external_tokens_make_outer_tiers_avoid_nothing(rows: list[ObservedRow]) -> None:
    found = valued(rows)
    assert found.outer == (0.0, 0.0, 0.0)
    seconds = figures(found)
    assert list(seconds.tiers) == ["hbm"]
    assert seconds.tiers["hbm"].avoided == seconds.avoided


@settings(max_examples=20, deadline=None)
@given(stories())
def test_14_outer_tiers_avoid_no_less_than_nothing_and_no_more_than_all_reuse(rows: list[ObservedRow]) -> None:
    found = valued(rows)
    for avoided, outer, full in zip(found.avoided, found.outer, found.full, strict=True):
        # chunks that are cut elsewhere may cost a hundredth of the whole prefill (17)
        assert -0.01 * full <= outer <= avoided + 0.01 * full
        assert avoided <= full


# --- (15), (16), (21), (24): money


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, RATES, HELD_BY_TIER)
def test_15_net_is_gross_less_every_cost_to_the_nano_unit_and_never_more(
    found: Worth, loading: Loading, rate: Fraction, held: dict[str, int]
) -> None:
    money = money_of(figures(found, loading), rate, held)
    assert present(money.net).point + present(money.stall) + present(money.store) + money.holding == money.gross.point
    assert present(money.net).point <= money.gross.point
    assert min(present(money.stall), present(money.store), money.holding) >= 0


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, RATES, HELD_BY_TIER)
def test_19_the_money_of_the_tiers_is_that_of_the_group_to_the_nano_unit(
    found: Worth, loading: Loading, rate: Fraction, held: dict[str, int]
) -> None:
    seconds = with_held(figures(found, loading), [name for name, amount in held.items() if amount])
    money = money_of(seconds, rate, held)
    assert sum(tier.gross.point for tier in money.tiers.values()) == money.gross.point
    assert sum(tier.holding for tier in money.tiers.values()) == money.holding
    assert sum(present(tier.net).point for tier in money.tiers.values()) == present(money.net).point
    assert money.tiers["hbm"].gross == money.tiers["hbm"].net
    for name, tier in money.tiers.items():
        exact = float(Fraction(seconds.tiers[name].avoided.point) * rate)
        assert tier.gross.point == pytest.approx(exact, abs=len(money.tiers), rel=1e-12)


def bound(found: Worth, share: float) -> Worth:
    """The same, with requests waiting for capacity for that share of everything."""
    return found._replace(
        starved_seconds=found.seconds * share,
        bound=found.avoided[1] * share,
        bound_loads=present(found.loads) * share,
        bound_stores=present(found.stores) * share,
    )


@settings(max_examples=40, deadline=None)
@given(worths(), RATES, HELD_BY_TIER, st.tuples(*[st.floats(0, 1)] * 5))
def test_16_realised_is_at_most_net_where_net_is_a_gain(
    found: Worth, rate: Fraction, held: dict[str, int], drawn: tuple[float, ...]
) -> None:
    # two stretches of time, in the one capacity was short and in the other it was not, neither of them at a loss
    share, *costs = drawn
    avoided = found.avoided[1] * share, found.avoided[1] * (1 - share)
    loads = avoided[0] * costs[0] * 0.6, avoided[1] * costs[1] * 0.6
    stores = avoided[0] * costs[2] * 0.4, avoided[1] * costs[3] * 0.4
    told_of = found._replace(
        bound=avoided[0], loads=sum(loads), stores=sum(stores), bound_loads=loads[0], bound_stores=stores[0]
    )._replace(avoided=(found.avoided[1],) * 3, starved_seconds=found.seconds / 2)
    money = money_of(figures(told_of), rate, held)
    assert money.realised is not None
    assert present(money.realised).point <= present(money.net).point + 2 + abs(money.gross.point) * 1e-12


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, RATES, HELD_BY_TIER)
def test_16_with_capacity_to_spare_at_all_times_only_what_is_held_is_realised(
    found: Worth, loading: Loading, rate: Fraction, held: dict[str, int]
) -> None:
    money = money_of(figures(bound(found, 0.0), loading), rate, held)
    assert money.realised == (-sum(held.values()),) * 3


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, RATES, HELD_BY_TIER)
def test_16_with_capacity_short_at_all_times_everything_is_realised(
    found: Worth, loading: Loading, rate: Fraction, held: dict[str, int]
) -> None:
    money = money_of(figures(bound(found, 1.0), loading), rate, held)
    assert money.realised is not None
    # a nano-unit for each amount that is rounded on its own
    assert abs(present(money.realised).point - present(money.net).point) <= 2
    assert present(money.realised).high - present(money.realised).point == pytest.approx(
        present(money.net).high - present(money.net).point, rel=0.3, abs=2
    )


@settings(max_examples=40, deadline=None)
@given(worths(), RATES, st.integers(1, 16))
def test_21_engine_seconds_of_a_replica_cost_what_all_its_gpus_cost(found: Worth, rate: Fraction, gpus: int) -> None:
    one, many = (money_of(figures(found), rate * factor, NOTHING_HELD) for factor in (1, gpus))
    assert many.gross.point == pytest.approx(gpus * one.gross.point, abs=gpus)
    assert present(many.net).point == pytest.approx(gpus * present(one.net).point, abs=4 * gpus)
    # seconds x (nano-units a second): nothing else is in it
    assert one.gross.point == round(Fraction(figures(found).avoided.point) * rate)


@settings(max_examples=40, deadline=None)
@given(worths(), RATES, HELD_BY_TIER, st.integers(0, 10**12), st.sampled_from(sorted(HELD)))
def test_24_what_holding_costs_more_net_and_realised_are_less(
    found: Worth, rate: Fraction, held: dict[str, int], more: int, name: str
) -> None:
    dearer = {**held, name: held[name] + more}
    one, other = (money_of(figures(found), rate, of) for of in (held, dearer))
    assert moved(present(one.net), present(other.net)) == [more] * 3
    assert one.gross == other.gross
    if one.realised is not None:
        assert other.realised is not None
        assert moved(one.realised, other.realised) == [more] * 3


def moved(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [before - after for before, after in zip(one, other, strict=True)]


# --- (17), (18), (20): how the law values one request

SURROUNDINGS = st.fixed_dictionaries(
    {
        "occupancy": st.floats(0, 1),
        "decodes": st.floats(0, 200),
        "context": st.floats(0, 400_000),
        "packing": st.floats(1, 6),
    }
)


def prefills(
    prompt: int, begins: Sequence[int], around: dict[str, float], theta: Sequence[float], machine: Machine
) -> list[float]:
    """PF(n, r) of METHOD 3 for several r."""
    found = load(machine, people([float(prompt)] * len(begins), [float(at) for at in begins]), **around)
    values = marginal(found, found.populations[0], Law(np.array(theta), 1.0), np.array(begins, dtype=float))
    return [float(value) for value in values]


THETAS = st.tuples(*[st.floats(math.log(0.6), math.log(1.5)).map(math.exp)] * len(PARAMETERS)).map(
    lambda factors: tuple(factor * median for factor, median in zip(factors, MEDIANS, strict=True))
)


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(st.integers(200, 60_000), st.floats(0, 1), st.floats(0, 1)),
    SURROUNDINGS,
    THETAS,
    st.sampled_from([h100(), h100(2048), h100(gpus=4)]),
)
def test_17_more_reuse_never_avoids_less_and_never_more_than_the_whole_prefill(
    drawn: tuple[int, float, float], around: dict[str, float], theta: tuple[float, ...], machine: Machine
) -> None:
    prompt, *shares = drawn
    less, more = sorted(math.floor((prompt - 1) * share) for share in shares)
    whole, some, few = prefills(prompt, [0, less, more], around, theta, machine)
    # where a chunk ends, a hundredth of the whole may come back
    assert whole - few >= whole - some - 0.01 * whole
    assert -0.01 * whole <= whole - some <= whole
    assert -0.01 * whole <= whole - few <= whole


@settings(max_examples=100, deadline=None)
@given(st.integers(4000, 60_000), st.floats(0.1, 0.9), st.floats(1.05, 8.0), THETAS)
def test_18_a_token_that_is_reused_further_back_in_the_prompt_avoids_more(
    prompt: int, share: float, times: float, theta: tuple[float, ...]
) -> None:
    # attention makes late tokens dearer than early ones: W(n, r) / r grows with r
    few = math.floor(prompt * share)
    many = min(math.floor(few * times), prompt - 1)
    # METHOD 5: what chunks round off is a chunk's overhead, so both reach over several of them
    assume(few >= 4096)
    quick = tuple(1e-6 if name == "launch_seconds" else value for name, value in zip(PARAMETERS, theta, strict=True))
    whole, some, rest = prefills(prompt, [0, few, many], {}, quick, h100(2048))
    assert (whole - rest) / many >= 0.85 * (whole - some) / few


@settings(max_examples=20, deadline=None)
@given(
    stories(),
    st.sampled_from(["compute_efficiency", "attention_efficiency"]),
    st.floats(1.01, 1.5),
)
def test_20_a_more_efficient_engine_avoids_no_more(rows: list[ObservedRow], name: str, factor: float) -> None:
    one, other = (valued(rows, law=calibration(law_of(**{name: by}))) for by in (1.0, factor))
    for slow, fast, full in zip(one.avoided, other.avoided, one.full, strict=True):
        assert fast <= slow + 0.002 * full
    assert other.full[1] <= one.full[1] * (1 + 1e-9)


@settings(max_examples=20, deadline=None)
@given(stories(), st.floats(1.05, 3.0))
def test_20_a_faster_gpu_avoids_less_and_a_larger_model_more(rows: list[ObservedRow], factor: float) -> None:
    plain = valued(rows)
    assume(plain.avoided[1] > 0.01 * plain.full[1])
    quick = MACHINE._replace(flops=MACHINE.flops * factor, attention_flops=MACHINE.attention_flops * factor)
    large = MACHINE._replace(linear_flop=MACHINE.linear_flop * factor)
    assert valued(rows, quick).avoided[1] < plain.avoided[1] + 0.002 * plain.full[1]
    assert valued(rows, large).avoided[1] > plain.avoided[1] - 0.002 * plain.full[1]
    assert valued(rows, quick).full[1] < plain.full[1] < valued(rows, large).full[1]


# --- (19), (28): whose work it is


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING)
def test_19_what_tiers_avoided_sums_to_all_and_a_tier_that_served_nothing_gets_nothing(
    found: Worth, loading: Loading
) -> None:
    seconds = figures(found, loading)
    assert sum(tier.avoided.point for tier in seconds.tiers.values()) == pytest.approx(
        seconds.avoided.point, rel=1e-6, abs=1e-3
    )
    assert sum(tier.tokens for tier in seconds.tiers.values()) == pytest.approx(
        found.hbm_tokens + found.external_tokens, abs=1
    )
    assert sum(present(tier.net).point for tier in seconds.tiers.values()) == pytest.approx(
        present(seconds.net).point, rel=1e-6, abs=1e-3
    )
    for tier in seconds.tiers.values():
        if not tier.tokens:
            assert tier.avoided.point == pytest.approx(0, abs=1e-3)
        assert tier.avoided.low <= tier.avoided.point <= tier.avoided.high
        assert present(tier.net).low <= present(tier.net).point <= present(tier.net).high


@settings(max_examples=15, deadline=None)
@given(stories(), st.integers(0, 10), st.integers(0, 10), st.integers(0, 10))
def test_19_tiers_that_an_engine_tells_apart_sum_to_what_outer_tiers_avoided(
    rows: list[ObservedRow], host: int, disk: int, peer: int
) -> None:
    assume(host + disk + peer)
    named = {"admitted_host_tokens": host, "admitted_disk_tokens": disk, "admitted_p2p_tokens": peer}
    found = valued([told(one, **{name: 1000 * part for name, part in named.items()}) for one in rows])
    assert found.dram + found.disk + found.p2p == pytest.approx(found.outer[1], rel=1e-9, abs=1e-9)
    for part, seconds in ((host, found.dram), (disk, found.disk), (peer, found.p2p)):
        assert part or seconds == 0


@given(st.tuples(*[st.floats(0, 100)] * 7))
def test_28_a_shapley_share_lies_between_what_a_tier_adds_last_and_what_it_is_worth_alone(
    drawn: tuple[float, ...],
) -> None:
    # tiers stand in for each other: what one adds falls with every other that is there
    tiers = ("hbm", "dram", "disk")
    tokens = dict(zip(tiers, drawn[:3], strict=True))

    def value(present: frozenset[str]) -> float:
        return math.sqrt(sum(tokens[name] for name in present)) if present else 0.0

    shares, last = shapley(tiers, value), last_in(tiers, value)
    assert sum(shares.values()) == pytest.approx(value(frozenset(tiers)))
    assert sum(serving(tiers, value).values()) == pytest.approx(value(frozenset(tiers)))
    for name in tiers:
        assert last[name] - 1e-9 <= shares[name] <= value(frozenset({name})) + 1e-9
        if not tokens[name]:
            assert shares[name] == pytest.approx(0, abs=1e-9)


# --- (22), (23), (25): the same, twice, and slower


@settings(max_examples=15, deadline=None)
@given(stories())
def test_22_twice_the_requests_avoid_twice_as_much(rows: list[ObservedRow]) -> None:
    # a second replica with the same story: its worth is added
    seconds = [figures(valued(rows)), seconds_of(parts_of([both(rows)] * 2), 120.0)]
    assert seconds[1].avoided.point == pytest.approx(2 * seconds[0].avoided.point)
    # every request twice, in twice the time
    twice = [*rows, *(later(one, rows[-1].row.end_ns + 30 * SECOND) for one in rows)]
    one, other = valued(rows), valued(twice)
    assert other.requests == 2 * one.requests
    assert other.hbm_tokens == 2 * one.hbm_tokens
    for slot in (0, 2):  # in between, other requests are shuffled
        assert other.avoided[slot] == pytest.approx(2 * one.avoided[slot], rel=0.1, abs=0.02 * one.full[slot])


def both(rows: list[ObservedRow]) -> tuple[Calibration, Loading, Worth]:
    return calibration(MEDIANS), "synchronous", valued(rows)


def later(one: ObservedRow, by_ns: int) -> ObservedRow:
    return one._replace(row=one.row._replace(start_ns=one.row.start_ns + by_ns, end_ns=one.row.end_ns + by_ns))


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, st.floats(0, 20), st.floats(0, 20), RATES)
def test_23_slower_storage_never_nets_more(
    found: Worth, loading: Loading, loads: float, stores: float, rate: Fraction
) -> None:
    slower = found._replace(loads=present(found.loads) + loads, stores=present(found.stores) + stores)
    one, other = (figures(worth_, loading) for worth_ in (found, slower))
    assert present(other.net).point <= present(one.net).point + 1e-9
    # the interval grows with what the timers may be off by, and only downwards beyond the point
    assert present(other.net).low <= present(one.net).low + 1e-9
    assert present(money_of(other, rate, HELD).net).point <= present(money_of(one, rate, HELD).net).point


@settings(max_examples=15, deadline=None)
@given(stories(), st.floats(0.1, 0.9))
def test_23_a_load_that_takes_longer_than_to_compute_again_is_a_loss(rows: list[ObservedRow], faster: float) -> None:
    plain = valued(rows)
    assume(plain.outer[1] > 1e-3)
    span = CacheSpan(0, rows[-1].row.end_ns, round(plain.outer[1] / faster * SECOND), 0, None, None, None, None)
    seconds = figures(valued(rows, loading=[span]))
    assert present(seconds.tiers["external"].net).point <= 1e-6


@settings(max_examples=15, deadline=None)
@given(stories())
def test_25_the_same_intervals_give_the_same_figures(rows: list[ObservedRow]) -> None:
    one, other = valued(rows), valued(list(rows))
    assert one == other
    assert figures(one) == figures(other)


# --- (26), (27): intervals


@settings(max_examples=40, deadline=None)
@given(worths(), LOADING, st.floats(0, 1))
def test_26_an_interval_contains_its_point_and_is_never_narrower_than_the_error_of_the_law(
    found: Worth, loading: Loading, sd: float
) -> None:
    seconds = figures(found, loading, calibration(MEDIANS, sd=sd))
    for estimate in all_of(seconds):
        assert estimate.low <= estimate.point <= estimate.high
        assert all(math.isfinite(value) for value in estimate)
    floor = Z90 * DISCREPANCY * abs(seconds.avoided.point)
    assert seconds.avoided.high - seconds.avoided.point >= floor * (1 - 1e-9)
    # nothing is below no saving at all
    assert seconds.avoided.point - seconds.avoided.low >= min(floor, seconds.avoided.point) * (1 - 1e-9)


def all_of(seconds: Seconds) -> list[Estimate]:
    tiers = [estimate for tier in seconds.tiers.values() for estimate in (tier.avoided, present(tier.net))]
    return [
        seconds.avoided,
        present(seconds.stall),
        present(seconds.store),
        present(seconds.net),
        *([seconds.bound] if seconds.bound else []),
        *tiers,
    ]


@settings(max_examples=40, deadline=None)
@given(worths(), RATES, HELD_BY_TIER)
def test_26_an_interval_in_money_contains_its_point(found: Worth, rate: Fraction, held: dict[str, int]) -> None:
    money: Money = money_of(figures(found), rate, held)
    for amount in (money.gross, present(money.net), *(present(tier.net) for tier in money.tiers.values())):
        assert amount.low <= amount.point <= amount.high


def width(seconds: Seconds) -> float:
    return seconds.avoided.high - seconds.avoided.low


@settings(max_examples=40, deadline=None)
@given(worths(), st.floats(0.05, 1), st.sampled_from(["M0", "M1", "M2", "M4"]))
def test_27_falling_back_from_mfu_counters_never_narrows(found: Worth, sd: float, rung: str) -> None:
    best, fallen = (figures(found, "synchronous", calibration(MEDIANS, sd=sd, rung=name)) for name in ("M3", rung))
    assert width(fallen) >= width(best) - 1e-9


@settings(max_examples=40, deadline=None)
@given(worths(), st.floats(0, 1), st.floats(0, 1), st.floats(0, 300), st.floats(0, 300))
def test_27_a_law_that_knows_less_never_narrows(
    found: Worth, one: float, other: float, few: float, many: float
) -> None:
    sure, unsure = sorted((one, other))
    little, much = sorted((few, many))
    known = calibration(MEDIANS, sd=sure)._replace(clock_weight_seconds=much)
    guessed = calibration(MEDIANS, sd=unsure)._replace(clock_weight_seconds=little)
    assert width(figures(found, "synchronous", guessed)) >= width(figures(found, "synchronous", known)) - 1e-9


@settings(max_examples=20, deadline=None)
@given(st.lists(requests(outer=False), min_size=20, max_size=40))
def test_27_requests_that_share_a_piece_leave_more_open_than_each_on_its_own(asked: list[Asked]) -> None:
    apart = [row(6 * place, 6 * place + 6, [one]) for place, one in enumerate(asked)]
    shared = [row(0, 6 * len(asked), asked)]
    spread = [max(found.avoided) - min(found.avoided) for found in (valued(apart), valued(shared))]
    # what one request computed is told; of many it is told in sum
    assert spread[0] == pytest.approx(0, abs=1e-6)
    assert spread[1] >= spread[0] - 1e-6


# --- unknown stays unknown


@settings(max_examples=40, deadline=None)
@given(worths(), RATES, HELD_BY_TIER)
def test_what_nobody_told_is_none_and_never_nothing(found: Worth, rate: Fraction, held: dict[str, int]) -> None:
    untold = found._replace(starved_seconds=None, worked_seconds=None)
    seconds = figures(untold)
    assert seconds.bound is None
    assert seconds.capacity_bound_share is None
    assert money_of(seconds, rate, held).realised is None
    known = seconds_of([Part(calibration(MEDIANS), one, "synchronous") for one in (untold, bound(found, 0.5))], 60.0)
    assert known.bound is None


@settings(max_examples=20, deadline=None)
@given(stories())
def test_no_figure_is_ever_not_a_number(rows: list[ObservedRow]) -> None:
    found = valued(rows)
    for name, value in found._asdict().items():
        for one in value if isinstance(value, tuple) else (value,):
            assert one is None or math.isfinite(one), name


def test_a_step_that_leaves_no_budget_still_values_what_was_reused() -> None:
    # 500 decodes where a step holds 300 tokens
    machine = MACHINE._replace(token_budget=300)
    around = {"occupancy": 1.0, "decodes": 500.0, "context": 1e6}
    assert budget_of(machine, np.ones(1), np.array([500.0]))[0] > 0
    whole, rest = prefills(5000, [0, 4000], around, THETA, machine)
    assert whole > rest > 0
