from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.facts import WORK, Facts, Replica
from kvtally.agent.unit_cost import (
    Bounds,
    Shares,
    Spent,
    Tokens,
    TokenSums,
    attributed,
    holding_of,
    unit_costs,
)
from kvtally.agent.words import OUTER

REPLICA = Replica(1, "a/0", "m", "0.25.1", ("GPU-a",), "", "on-demand", "", {})
SECOND = 10**9
NO_TOKENS = Tokens(0, 0, 0, 0, 0, derived=False)


def facts(*, replica: Replica | None = REPLICA, **work: int | None) -> Facts:
    """A replica's facts: tokens count 0 unless given."""
    return Facts(replica, 0, dict.fromkeys(WORK, 0) | work, {}, (), None, 0, SECOND, float(SECOND), False)


def tokens_of(every: list[Facts]) -> Tokens:
    sums = TokenSums()
    for one in every:
        assert one.replica is not None
        sums.add(one.work, one.replica.version)
    return sums.tokens()


def test_tokens_of_replicas_add_up() -> None:
    one = facts(prompt_tokens=100, computed_tokens=60, hbm_tokens=30, external_tokens=10, generated_tokens=5)
    assert tokens_of([one, one]) == Tokens(200, 120, 60, 20, 10, derived=False)
    assert tokens_of([]) == NO_TOKENS


def test_one_part_that_is_unknown_makes_its_sum_unknown_and_no_other() -> None:
    known, unknown = facts(prompt_tokens=10, computed_tokens=10), facts(prompt_tokens=10, computed_tokens=None)
    assert tokens_of([known, unknown]) == Tokens(20, None, 0, 0, 0, derived=False)
    assert tokens_of([unknown, known]).computed is None


@pytest.mark.parametrize(
    ("version", "hits", "outer", "expected"),
    [
        ("0.12.0", 30, None, (70, 30, 0, True)),
        ("0.15.9", 30, 20, (50, 30, 20, True)),
        ("0.12.0", 100, 0, (0, 100, 0, True)),
        ("0.12.0", 90, 11, (None, None, None, False)),  # more found than asked for
        ("0.12.0", None, 0, (None, None, None, False)),
        ("0.16.0", 30, 0, (None, None, None, False)),  # it counts them and did not tell
        (None, 30, 20, (50, 30, 20, True)),  # nobody tells the version: it shows no tokens by source
        ("0.1.dev7", 30, 20, (50, 30, 20, True)),
    ],
)
def test_before_0_16_computed_tokens_are_prompts_less_what_was_found(
    version: str | None, hits: int | None, outer: int | None, expected: tuple[int | None, int | None, int | None, bool]
) -> None:
    old = facts(
        replica=REPLICA._replace(version=version),
        prompt_tokens=100,
        computed_tokens=None,
        hbm_tokens=None,
        external_tokens=None,
        prefix_hit_tokens=hits,
        external_hit_tokens=outer,
    )
    assert tokens_of([old]) == Tokens(100, *expected[:3], 0, derived=expected[3])


@pytest.mark.parametrize("told", ["hbm_tokens", "external_tokens"])
def test_an_engine_without_a_version_that_counts_tokens_by_source_has_none_derived(told: str) -> None:
    by_source = dict.fromkeys(("computed_tokens", "hbm_tokens", "external_tokens")) | {told: 7}
    one = facts(replica=REPLICA._replace(version=None), prompt_tokens=100, prefix_hit_tokens=30, **by_source)
    assert (tokens_of([one]).computed, tokens_of([one]).derived) == (None, False)


def shares(
    prefill: tuple[int, int, int], decode: tuple[int, int, int], stall: int | None = 0, store: int | None = 0
) -> Shares:
    """Nano-units by what they were spent on; loading and storing within a tenth."""

    def within(point: int | None) -> Bounds | None:
        return None if point is None else Bounds(point * 0.9, point, point * 1.1)

    return Shares(Bounds(*prefill), Bounds(*decode), within(stall), within(store))


def tiers_of(**tokens: int | None) -> dict[str, int | None]:
    return dict.fromkeys(("hbm", *OUTER), 0) | tokens


def test_unit_costs_are_worked_out_by_hand() -> None:
    # 4 s at work of a GPU at a thousandth a second; a quarter of the work is prefill, an eighth to three eighths
    own = shares((500_000, 1_000_000, 1_500_000), (2_500_000, 3_000_000, 3_500_000))
    tokens = Tokens(3000, 1000, 2000, 0, 500, derived=False)
    assert unit_costs(tokens, tiers_of(hbm=2000), Spent(4_000_000, own, {}), outer=False) == {
        "total": "1.142857143",  # 0.004 / 3500
        "input_computed": "1.000000000",  # 0.001 / 1000
        "input_cached": {"hbm": "0.000000000"},
        "input": "0.333333333",  # 0.001 / 3000
        "output": "6.000000000",  # 0.003 / 500
        "intervals": {
            "input_computed": {"low": "0.500000000", "high": "1.500000000"},
            "input": {"low": "0.166666667", "high": "0.500000000"},
            "output": {"low": "5.000000000", "high": "7.000000000"},
            "input_cached": {},
        },
    }


def test_reused_tokens_of_an_outer_tier_bear_what_loading_storing_and_holding_them_costs() -> None:
    own = shares((1_000_000,) * 3, (2_000_000,) * 3, stall=300_000, store=700_000)
    tokens = Tokens(3000, 1000, 500, 1500, 500, derived=False)
    spent = Spent(4_500_000, own, {"dram": 500_000, "disk": 0})
    units = unit_costs(tokens, tiers_of(hbm=500, external=1500), spent, outer=True)
    # 0.0003 + 0.0007 + 0.0005 over 1500 tokens; a tenth of 0.0003 and of 0.0007 is 0.00007615773 together
    assert units["input_cached"] == {"hbm": "0.000000000", "external": "1.000000000"}
    assert units["intervals"]["input_cached"] == {"external": {"low": "0.949228179", "high": "1.050771821"}}
    assert units["input_computed"] == "1.000000000"  # 0.001 / 1000
    assert units["input"] == "0.833333333"  # 0.0025 / 3000
    assert units["output"] == "4.000000000"


def test_tiers_that_are_told_apart_share_loading_by_their_tokens_and_hold_for_themselves() -> None:
    own = shares((0, 0, 0), (0, 0, 0), stall=900, store=100)
    spent = Spent(1300, own, {"dram": 200, "disk": 100})
    known = attributed(spent, tiers_of(dram=300, disk=100))
    assert known is not None
    # three quarters of 900 and 100, and 200; a quarter of both, and 100
    assert {tier: bounds.point for tier, bounds in known.input_cached.items()} == {"dram": 950, "disk": 350}
    assert (known.orphan_holding, known.orphan_copies) == (0, 0)


@pytest.mark.parametrize(
    ("tiers", "borne", "orphan"),
    [
        (tiers_of(dram=1), {"dram": 200}, 100),  # what stands on disk served nobody
        (tiers_of(dram=1, external=1), {"dram": 200, "external": 100}, 0),  # it may have served those
        (tiers_of(external=1), {"external": 300}, 0),
        (tiers_of(hbm=5), {}, 300),
        (tiers_of(external=None), {}, 300),
    ],
)
def test_holding_for_no_token_is_an_orphan(tiers: dict[str, int | None], borne: dict[str, int], orphan: int) -> None:
    assert holding_of({"dram": 200, "disk": 100, "external": 0}, tiers) == (borne, orphan)


def test_storing_for_tokens_that_nobody_reused_is_an_orphan_too() -> None:
    known = attributed(Spent(1400, shares((300,) * 3, (500,) * 3, store=400), {"dram": 200}), tiers_of())
    assert known == (300, {}, 200, 400, 500)


def test_without_a_split_only_the_whole_has_a_price() -> None:
    tokens = Tokens(3000, 1000, 2000, 0, 500, derived=False)
    units = unit_costs(tokens, tiers_of(hbm=2000), Spent(5_000_000, None, {}), outer=False)
    assert units["total"] == "1.428571429"
    assert units["input"] is units["input_computed"] is units["output"] is None
    assert units["intervals"] == {"input_computed": None, "input": None, "output": None, "input_cached": {}}
    assert attributed(Spent(5_000_000, None, {}), tiers_of(hbm=2000)) is None


def test_no_tokens_have_no_price_rather_than_an_endless_one() -> None:
    units = unit_costs(NO_TOKENS, tiers_of(), Spent(10, shares((4,) * 3, (6,) * 3), {}), outer=False)
    assert units["total"] is units["input"] is units["output"] is None
    assert units["input_cached"] == {}


def test_unknown_tokens_have_no_price_and_known_ones_keep_theirs() -> None:
    tokens = Tokens(1000, None, None, None, 500, derived=False)
    own = shares((2_000_000,) * 3, (2_000_000,) * 3)
    units = unit_costs(tokens, tiers_of(hbm=None, external=None), Spent(4_000_000, own, {}), outer=False)
    assert (units["input_computed"], units["input"], units["output"]) == (None, "2.000000000", "4.000000000")


def test_a_token_from_an_outer_tier_has_no_price_while_its_stall_is_inside_prefill() -> None:
    tokens = Tokens(1000, 500, 0, 500, 100, derived=False)
    spent = Spent(4_000_000, shares((2_000_000,) * 3, (2_000_000,) * 3, None, None), {})
    units = unit_costs(tokens, tiers_of(external=500), spent, outer=True)
    assert units["input_cached"] == {"external": None}
    assert units["intervals"]["input_cached"] == {"external": None}
    assert units["input_computed"] == "4.000000000"
    assert attributed(spent, tiers_of(external=500)) is None


amounts = st.integers(0, 10**15)
counts = st.integers(0, 10**10)


@given(
    st.tuples(amounts, amounts, amounts, amounts),
    st.fixed_dictionaries(dict.fromkeys(("dram", "disk", "external"), amounts)),
    st.fixed_dictionaries(dict.fromkeys(("hbm", *OUTER), counts)),
    st.tuples(counts, counts),
)
def test_what_tokens_bear_is_the_total_and_prices_times_tokens_make_it_again(
    money: tuple[int, int, int, int], held: dict[str, int], tiers: dict[str, int], counted: tuple[int, int]
) -> None:
    (prefill, decode, stall, store), (computed, generated) = money, counted
    total = sum(money) + sum(held.values())
    spent = Spent(total, shares((prefill,) * 3, (decode,) * 3, stall, store), held)
    known = attributed(spent, tiers)
    assert known is not None
    cached = sum(bounds.point for bounds in known.input_cached.values())
    orphans = known.orphan_holding + known.orphan_copies
    assert known.input_computed + cached + orphans + known.output == total  # to the nano-unit
    prompt = computed + sum(tiers.values())
    outer = sum(tiers[tier] for tier in OUTER)
    units = unit_costs(
        Tokens(prompt, computed, tiers["hbm"], outer, generated, derived=False), tiers, spent, outer=True
    )
    classes = {"input_computed": (computed, known.input_computed), "output": (generated, known.output)}
    again, priced = 0, 0
    for name, (count, amount) in classes.items():
        again += nano(units[name]) * count if count else amount * 10**6
        priced += count
    for tier, bounds in known.input_cached.items():
        again += nano(units["input_cached"][tier]) * tiers[tier]
        assert bounds.point == 0 or tier != "hbm"
        priced += tiers[tier]
    # each price is rounded to 1e-9 for a million tokens
    assert abs(again + orphans * 10**6 - total * 10**6) * 2 <= priced
    if prompt:
        assert abs(nano(units["input"]) * prompt - (total - decode) * 10**6) * 2 <= prompt


def nano(text: str) -> int:
    return round(Decimal(text) * 10**9)
