from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import round_machine

from kvtally.agent.steplaw.chunks import LEAST_BUDGET, budget_of, chunked, clock_of


def test_a_prefill_of_two_chunks() -> None:
    # 1,400 tokens of which 200 are reused, 1,000 a step: 1,000 from 200 on, then 200 from 1,200 on
    # products: 1,000 x (200 + 500) = 700,000; 200 x (1,200 + 100) = 260,000; in all (1,400^2 - 200^2) / 2
    found = chunked(np.array([1400.0]), np.array([200.0]), np.array([1000.0]), np.ones(1))
    assert found.request.tolist() == [0, 0]
    assert found.tokens.tolist() == [1000, 200]
    assert found.products.tolist() == [700_000, 260_000]
    assert found.products.sum() == (1400**2 - 200**2) / 2
    assert found.sharing.tolist() == [1, 1]


def test_small_chunks_share_a_step_as_far_as_its_budget_and_what_was_seen_allow() -> None:
    # a step of 1,000 holds ten chunks of 100, but three were seen together; of 400 it holds 2.5; 1,000 have it alone
    found = chunked(np.array([100.0, 400.0, 1000.0]), np.zeros(3), np.full(3, 1000.0), np.full(3, 3.0))
    assert found.sharing.tolist() == [3, 2.5, 1]


def test_the_last_chunk_of_a_long_prompt_shares_its_step_and_the_others_do_not() -> None:
    found = chunked(np.array([1250.0]), np.zeros(1), np.array([1000.0]), np.array([2.0]))
    assert found.tokens.tolist() == [1000, 250]
    assert found.sharing.tolist() == [1, 2]


def test_a_prompt_that_is_reused_to_the_last_token_has_no_chunk() -> None:
    found = chunked(np.array([500.0]), np.array([500.0]), np.array([1000.0]), np.ones(1))
    assert [len(column) for column in found] == [0, 0, 0, 0]


def test_no_prompts_have_no_chunks() -> None:
    nothing = np.zeros(0)
    assert [len(column) for column in chunked(nothing, nothing, nothing, nothing)] == [0, 0, 0, 0]


def test_one_token_that_is_left_is_a_chunk() -> None:
    found = chunked(np.array([500.0]), np.array([499.0]), np.array([1000.0]), np.ones(1))
    assert found.tokens.tolist() == [1]
    assert found.products.tolist() == [499.5]


def test_what_is_given_stays_as_it_is() -> None:
    begin = np.array([200, 300])
    chunked(np.array([1400.0, 2000.0]), begin, np.full(2, 1000.0), np.ones(2))
    assert begin.tolist() == [200, 300]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 60_000), st.floats(0, 1), st.integers(256, 8192), st.floats(1, 20)),
        min_size=1,
        max_size=8,
    )
)
def test_chunks_are_the_prefill_cut_in_pieces(given_: list[tuple[int, float, int, float]]) -> None:
    prompt = np.array([one[0] for one in given_], dtype=float)
    begin = np.floor(prompt * [one[1] for one in given_])
    budget, packing = (np.array([one[place] for one in given_], dtype=float) for place in (2, 3))
    found = chunked(prompt, begin, budget, packing)
    count = len(prompt)
    assert np.bincount(found.request, found.tokens, count) == pytest.approx(prompt - begin)
    assert np.bincount(found.request, found.products, count) == pytest.approx((prompt**2 - begin**2) / 2)
    assert np.bincount(found.request, minlength=count).tolist() == np.ceil((prompt - begin) / budget).tolist()
    assert (found.tokens <= budget[found.request]).all()
    assert ((found.sharing >= 1) & (found.sharing <= packing[found.request])).all()
    # what shares a step fits into it
    assert (found.sharing * found.tokens <= np.maximum(budget[found.request], found.tokens) * (1 + 1e-12)).all()


def test_decodes_take_their_share_of_a_steps_budget() -> None:
    # 1,000 tokens a step; 40 decodes that run half of the time leave 980
    found = budget_of(round_machine(), np.array([0.5, 0.0, 1.0]), np.array([40.0, 40.0, 100.0]))
    assert found.tolist() == [980, 1000, 900]


def test_however_many_decodes_run_some_prefill_goes_on() -> None:
    found = budget_of(round_machine(), np.ones(2), np.array([800.0, 5000.0]))
    assert found.tolist() == [LEAST_BUDGET, LEAST_BUDGET]


def test_large_chunks_run_at_the_clock_under_load_and_small_ones_at_their_windows() -> None:
    # half of 1,000 tokens is where a chunk is large
    found = clock_of(round_machine(), np.array([100.0, 499.0, 500.0, 1000.0]), np.full(4, 1.05), 0.88)
    assert found.tolist() == [1.05, 1.05, 0.88, 0.88]
