from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.facts import WORK, Replica
from kvtally.agent.lookup_tiers import BY_LOOKUPS, TierTokens, estimated, with_tiers

tokens = st.integers(0, 10**12)
REPLICA = Replica(1, "a/0", "m", None, (), None, "on-demand", "", {}, engine="tensorrt-llm")


def work(**counted: int | None) -> dict[str, int | None]:
    return dict.fromkeys(WORK) | counted


def test_what_hbm_held_is_taken_off_dram_first() -> None:
    # 1000 found, 600 loaded: 400 were in HBM, and these DRAM found
    assert estimated(600, 700, 300) == TierTokens(300, 300)


def test_a_recording_with_little_dram_loaded_everything_from_storage() -> None:
    # the totals of cpu-lmcache056-dram-disk: 43776 found, 5376 loaded, more than DRAM found was in HBM
    assert estimated(5376, 33792, 9984) == TierTokens(0, 5376)


def test_a_recording_whose_dram_held_all_loaded_everything_from_it() -> None:
    # the totals of cpu-lmcache056-dram
    assert estimated(6912, 46080, 0) == TierTokens(6912, 0)


def test_where_nothing_was_in_hbm_the_tiers_are_what_they_found() -> None:
    assert estimated(1000, 700, 300) == TierTokens(700, 300)


def test_what_no_lookup_found_is_of_no_tier() -> None:
    assert estimated(1000, 400, 100) == TierTokens(400, 100)
    assert estimated(1000, 0, 0) == TierTokens(0, 0)


@given(tokens, tokens, tokens)
def test_tiers_are_parts_of_what_was_loaded_and_of_what_each_found(external: int, dram: int, disk: int) -> None:
    found = estimated(external, dram, disk)
    assert 0 <= found.dram <= dram
    assert 0 <= found.disk <= external
    assert found.dram + found.disk == min(external, dram + disk)


@pytest.mark.parametrize(
    ("hits", "outer", "own", "expected"),
    [
        (32, 48, {}, (32, 48)),
        (64, 96, {}, (32, 48)),  # as many requests again are in flight
        (1, 2, {}, (27, 53)),  # 26.7: whole tokens, which add up
        (None, 8, {}, (0, 80)),
        (8, None, {}, (80, 0)),
        (30, 50, {"hbm_tokens": 10, "external_tokens": 0}, (30, 50)),  # an outer tier was first used within the hour
    ],
)
def test_cached_tokens_that_are_one_number_are_parted_by_what_the_lookups_of_each_tier_found(
    hits: int | None, outer: int | None, own: dict[str, int | None], expected: tuple[int, int]
) -> None:
    counted = work(prompt_tokens=100, computed_tokens=20, prefix_hit_tokens=hits, external_hit_tokens=outer, **own)
    found = with_tiers(REPLICA, counted)
    assert found == {**counted, "hbm_tokens": expected[0], "external_tokens": expected[1], BY_LOOKUPS: 80}


def test_where_nothing_was_cached_no_tier_served_a_token() -> None:
    found = with_tiers(REPLICA, work(prompt_tokens=100, computed_tokens=100))
    assert (found["hbm_tokens"], found["external_tokens"], found[BY_LOOKUPS]) == (0, 0, 0)


@pytest.mark.parametrize(
    "counted",
    [
        {"prompt_tokens": 100, "prefix_hit_tokens": 5},
        {"computed_tokens": 100, "prefix_hit_tokens": 5},
        {"prompt_tokens": 100, "computed_tokens": 20},  # no lookups: without enable_iter_perf_stats
        {"prompt_tokens": 100, "computed_tokens": 20, "prefix_hit_tokens": 0, "external_hit_tokens": 0},
        {"prompt_tokens": 100, "computed_tokens": 120, "prefix_hit_tokens": 5},
        {"prompt_tokens": 100, "computed_tokens": 20, "hbm_tokens": 80, "external_tokens": 0, "prefix_hit_tokens": 5},
    ],
)
def test_work_whose_tiers_are_told_or_that_nothing_tells_stays_as_it_is(counted: dict[str, int | None]) -> None:
    assert with_tiers(REPLICA, work(**counted)) == work(**counted)


def test_what_vllm_tells_by_source_is_not_mended() -> None:
    counted = work(prompt_tokens=100, computed_tokens=20, hbm_tokens=70, external_tokens=0, prefix_hit_tokens=80)
    assert with_tiers(REPLICA._replace(engine="vllm"), counted) == counted
