from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.lookup_tiers import TierTokens, estimated

tokens = st.integers(0, 10**12)


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
