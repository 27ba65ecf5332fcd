from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.facts import WORK, Facts, Line, Replica
from kvtally.agent.price import Rate
from kvtally.agent.split import Split
from kvtally.agent.unit_cost import Tokens, tokens_of, unit_costs

RATE = Rate("gpu", "", "", "on-demand", "gpu-hour", 3_600_000_000, "USD", 0)
REPLICA = Replica(1, "a/0", "m", "0.25.1", ("GPU-a",), "", "on-demand", "", {})
SECOND = 10**9
NO_TOKENS = Tokens(0, 0, 0, 0, 0, derived=False)


def facts(
    amounts: dict[str, int] | None = None,
    *,
    replica: Replica | None = REPLICA,
    split: float | None = None,
    occupied: int = 0,
    **work: int | None,
) -> Facts:
    """A replica's facts: `amounts` are nano-units by state, tokens count 0 unless given."""
    lines = tuple(Line("gpu", "", state, 0, "gpu-ns", RATE, amount) for state, amount in (amounts or {}).items())
    law = None if split is None else Split(split / 2, split, min(1.0, split * 1.5), 1.0, 1.0, 10)
    return Facts(
        replica, 0, dict.fromkeys(WORK, 0) | work, {"occupied": occupied}, lines, law, 0, SECOND, float(SECOND), False
    )


def test_tokens_of_replicas_add_up() -> None:
    one = facts(prompt_tokens=100, computed_tokens=60, hbm_tokens=30, external_tokens=10, generated_tokens=5)
    assert tokens_of([one, one]) == Tokens(200, 120, 60, 20, 10, derived=False)
    assert tokens_of([]) == NO_TOKENS


def test_gpus_that_nobody_holds_have_no_tokens() -> None:
    assert tokens_of([facts(replica=None, prompt_tokens=7)]) == NO_TOKENS


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
        (None, 30, 0, (None, None, None, False)),
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


def test_unit_costs_are_worked_out_by_hand() -> None:
    # 4 s at work and 1 s idle of a GPU at a thousandth a second; a quarter of the work is prefill
    one = facts({"occupied": 4_000_000, "idle": 1_000_000}, split=0.25, occupied=4 * SECOND)
    tokens = Tokens(3000, 1000, 2000, 0, 500, derived=False)
    units = unit_costs([one], tokens, (SECOND // 2, SECOND, 3 * SECOND // 2), 4 * SECOND, outer=False)
    assert units["active"] == {
        "total": "1.142857143",  # 0.004 / 3500
        "input_computed": "1.000000000",  # 0.001 / 1000
        "input_cached": {"hbm": "0.000000000"},
        "input": "0.333333333",  # 0.001 / 3000
        "output": "6.000000000",  # 0.003 / 500
        "intervals": {
            "input_computed": {"low": "0.500000000", "high": "1.500000000"},
            "input": {"low": "0.166666667", "high": "0.500000000"},
            "output": {"low": "5.000000000", "high": "7.000000000"},
        },
    }
    # idle money goes with the engine's time: a quarter of it to prefill
    loaded = units["fully_loaded"]
    assert loaded["total"] == "1.428571429"  # 0.005 / 3500
    assert loaded["input_computed"] == "1.250000000"
    assert loaded["output"] == "7.500000000"
    assert loaded["intervals"]["output"] == {"low": "6.250000000", "high": "8.750000000"}


def test_replicas_at_different_prices_each_bring_their_own_share() -> None:
    cheap = facts({"occupied": 1_000_000}, split=1.0, occupied=SECOND)  # all of it prefill
    dear = facts({"occupied": 9_000_000}, split=0.0, occupied=SECOND)  # all of it decode
    tokens = Tokens(1000, 1000, 0, 0, 1000, derived=False)
    active = unit_costs([cheap, dear], tokens, (SECOND // 2, SECOND, SECOND), 2 * SECOND, outer=False)["active"]
    assert (active["input"], active["output"]) == ("1.000000000", "9.000000000")  # not half of the sum each


def test_without_a_split_only_the_whole_has_a_price() -> None:
    one = facts({"occupied": 4_000_000, "idle": 1_000_000}, occupied=4 * SECOND)
    tokens = Tokens(3000, 1000, 2000, 0, 500, derived=False)
    units = unit_costs([one], tokens, None, 4 * SECOND, outer=False)
    assert units["fully_loaded"]["total"] == "1.428571429"
    for view in units.values():
        assert view["input"] is view["input_computed"] is view["output"] is None
        assert view["intervals"] == {"input_computed": None, "input": None, "output": None}


def test_no_tokens_have_no_price_rather_than_an_endless_one() -> None:
    one = facts({"idle": 1_000_000})
    units = unit_costs([one], NO_TOKENS, (0, 0, 0), 0, outer=False)
    assert units["fully_loaded"]["total"] is units["active"]["total"] is None
    assert units["fully_loaded"]["input_cached"] == {}


def test_unknown_tokens_have_no_price_and_known_ones_keep_theirs() -> None:
    one = facts({"occupied": 4_000_000}, split=0.5, occupied=SECOND)
    tokens = Tokens(1000, None, None, None, 500, derived=False)
    active = unit_costs([one], tokens, (0, SECOND // 2, SECOND), SECOND, outer=False)["active"]
    assert (active["input_computed"], active["input"], active["output"]) == (None, "2.000000000", "4.000000000")


def test_a_token_from_an_outer_tier_has_a_price_that_nobody_knows() -> None:
    one = facts({"occupied": 4_000_000}, occupied=SECOND)
    tokens = Tokens(1000, 500, 0, 500, 100, derived=False)
    assert unit_costs([one], tokens, None, SECOND, outer=True)["active"]["input_cached"] == {"external": None}
    tokens = Tokens(1000, 500, 500, 0, 100, derived=False)
    assert unit_costs([one], tokens, None, SECOND, outer=False)["active"]["input_cached"] == {"hbm": "0.000000000"}


amounts = st.integers(0, 10**13)
counts = st.integers(1, 10**9)


@given(st.tuples(amounts, amounts), st.integers(1, 10**13), st.floats(0, 1), st.tuples(counts, counts))
def test_prices_times_tokens_are_the_ledgers_total(
    money: tuple[int, int], occupied: int, share: float, counted: tuple[int, int]
) -> None:
    (worked, idle), (prompt, generated) = money, counted
    one = facts({"occupied": worked, "idle": idle}, split=share, occupied=occupied)
    prefill = round(share * occupied)
    tokens = Tokens(prompt, prompt, 0, 0, generated, derived=False)
    units: dict[str, Any] = unit_costs([one], tokens, (prefill, prefill, prefill), occupied, outer=False)
    for view, total in (("active", worked), ("fully_loaded", worked + idle)):
        parts = Decimal(units[view]["input"]) * prompt + Decimal(units[view]["output"]) * generated
        rounding = Decimal(prompt + generated) / 2  # each price is rounded to 1e-9 for a million tokens
        assert abs(parts * 10**3 - total) <= rounding / 10**6 + 1
