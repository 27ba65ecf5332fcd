from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.replica_rows import LENGTH_EDGES, Asked, observed, row, told

from kvtally.agent.steplaw.population import (
    COUPLINGS,
    MOST_POINTS,
    Population,
    agreement,
    expanded,
    finished_with_aborted,
    pieces_of,
    points_of,
    populations,
)
from kvtally.agent.steplaw.series import Logged, Series, series_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtally.agent.observed import ObservedRow

    Array = NDArray[np.float64]

BUCKETS = np.array([10.0, 100.0, 1000.0])
LOWER = np.array([0.5, 10.0, 100.0])


def series(rows: Sequence[ObservedRow]) -> Series:
    """Rows whose GPUs rest right after each scrape."""
    return series_of(observed(rows, worked=[(-1, 0, 0.0)]))


def over(found: Series, start: int = 0, end: int | None = None) -> list[Population]:
    last = len(found.at) - 1 if end is None else end
    return populations(found, np.array([start]), np.array([last]), COUPLINGS)


def one_piece(counts: list[float], total: float, points: int, edges: Array = BUCKETS) -> list[float]:
    """Points of a single histogram."""
    found = expanded(edges, np.array([counts]), np.array([total]), points_of(np.array([points])))
    return [float(value) for value in found]


# --- points of a histogram


def test_points_are_spread_log_uniformly_in_their_bucket() -> None:
    # two of four in (10, 100]: at 1/4 and 3/4 of the bucket 10^1.25 and 10^1.75, in all 74.01
    assert one_piece([0, 2, 0], 10**1.25 + 10**1.75, 2) == pytest.approx([10**1.25, 10**1.75])


def test_points_are_tilted_until_they_sum_to_the_exact_total_and_stay_in_their_bucket() -> None:
    # both ranks are raised to the power that makes 10 x 10^(0.25^e) + 10 x 10^(0.75^e) = 120: e = 0.3616
    assert one_piece([0, 2, 0], 120.0, 2) == pytest.approx([40.345, 79.655], abs=0.005)


def test_a_bucket_without_an_upper_edge_reaches_three_times_its_lower_one() -> None:
    edges = np.array([10.0, math.inf])
    (value,) = one_piece([0, 1], 29.0, 1, edges)
    assert value == pytest.approx(29)
    assert one_piece([0, 2], 10 * 3**0.25 + 10 * 3**0.75, 2, edges) == pytest.approx([10 * 3**0.25, 10 * 3**0.75])


def test_a_histogram_that_counted_nothing_gives_the_mean() -> None:
    assert one_piece([0, 0, 0], 60.0, 3) == [20, 20, 20]


def test_the_sum_is_kept_where_the_buckets_cannot_hold_it() -> None:
    # counters that tick at different moments can tell that two prompts of (10, 100] have 500 tokens
    assert sum(one_piece([0, 2, 0], 500.0, 2)) == pytest.approx(500)


def test_histograms_that_are_read_at_once_do_not_touch_each_other() -> None:
    counts, sums = np.array([[0.0, 2.0, 0.0], [3.0, 0.0, 1.0]]), np.array([80.0, 600.0])
    together = expanded(BUCKETS, counts, sums, points_of(np.array([2, 4])))
    assert together[:2] == pytest.approx(one_piece([0, 2, 0], 80.0, 2))
    assert together[2:] == pytest.approx(one_piece([3, 0, 1], 600.0, 4))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.floats(0.02, 0.98)), min_size=1, max_size=40),
    st.data(),
)
def test_points_sum_to_the_total_and_each_lies_inside_its_bucket(
    values: list[tuple[int, float]], data: st.DataObject
) -> None:
    # values that exist: so many in each bucket, anywhere inside, a point for each
    real = sorted(LOWER[bucket] * (BUCKETS[bucket] / LOWER[bucket]) ** within for bucket, within in values)
    counts = [float(sum(bucket == one for one, _ in values)) for bucket in range(3)]
    found = one_piece(counts, sum(real), len(real))
    assert sum(found) == pytest.approx(sum(real), rel=1e-9)
    edges = [bucket for bucket, count in enumerate(counts) for _ in range(int(count))]
    for value, bucket in zip(found, edges, strict=True):
        assert LOWER[bucket] * (1 - 1e-9) <= value <= BUCKETS[bucket] * (1 + 1e-9)
    # fewer points than values: the sum is kept all the same
    fewer = data.draw(st.integers(1, len(real)))
    few = one_piece(counts, sum(real) * fewer / len(real), fewer)
    assert sum(few) == pytest.approx(sum(real) * fewer / len(real), rel=1e-6)


# --- where the counters agree


def test_counters_agree_where_as_many_requests_finished_as_began() -> None:
    rows = [
        row(0, 1, first_tokens=1, prompt_tokens=70, running_requests=1),
        told(row(1, 2, finished_requests=1), finished_prompt_tokens=70),
        row(2, 3, first_tokens=1, prompt_tokens=40, running_requests=2),
        # another request finished than the one that began: the counts agree and the tokens do not
        told(row(3, 4, finished_requests=1, running_requests=1), finished_prompt_tokens=50),
    ]
    assert agreement(series(rows)).tolist() == [True, False, True, False, False]


def test_an_aborted_request_is_carried_along_from_the_next_quiet_scrape_on() -> None:
    rows = [
        row(0, 1, [Asked(100)]),
        row(1, 2, first_tokens=1, prompt_tokens=30, running_requests=1),  # its client goes away in the next interval
        row(2, 3),
        row(3, 4, [Asked(200)]),
        row(4, 5, first_tokens=1, prompt_tokens=25, running_requests=1),
    ]
    found = series(rows)
    assert agreement(found).tolist() == [True, True, False, True, True, False]
    finished, prompts = finished_with_aborted(found)
    assert finished.tolist() == [0, 1, 1, 2, 3, 3]
    assert prompts.tolist() == [0, 100, 100, 130, 330, 330]


def test_without_a_quiet_scrape_nothing_tells_an_abort_from_a_request_that_still_runs() -> None:
    rows = [
        row(0, 1, first_tokens=1, prompt_tokens=30, running_requests=2),
        row(1, 2, running_requests=1),
        row(2, 3, [Asked(200)], running_requests=1),
    ]
    assert agreement(series(rows)).tolist() == [True, False, False, False]


def test_windows_are_cut_into_pieces_at_the_scrapes_inside_them_where_the_counters_agree() -> None:
    agree = np.array([True, False, True, True, False, True, False])
    first, last, window = pieces_of(np.array([0, 3]), np.array([3, 6]), agree)
    assert list(zip(first.tolist(), last.tolist(), window.tolist(), strict=True)) == [
        *((0, 2, 0), (2, 3, 0)),
        *((3, 5, 1), (5, 6, 1)),
    ]
    nothing = np.zeros(0, dtype=np.intp)
    assert [len(one) for one in pieces_of(nothing, nothing, agree)] == [0, 0, 0]


# --- the requests behind the counters


def test_one_request_is_told_exactly() -> None:
    for found in over(series([row(0, 1, [Asked(700, hbm=300, outer=100)])])):
        assert found.weight.tolist() == [1]
        assert found.prompt == pytest.approx([700])
        assert found.reused == pytest.approx([400])
        assert found.reused_hbm == pytest.approx([300])
        assert found.computed == pytest.approx([300])


def test_couplings_pair_prompt_and_computed_tokens_from_one_end_to_the_other() -> None:
    # prompts of 150 and 1,500, of which 15 and 150 tokens are computed: nothing says which of which
    rows = [row(0, 1, [Asked(150, hbm=135), Asked(1500, hbm=1350)])]
    together, mixed, apart = over(series(rows))
    for found in (together, mixed, apart):
        assert (found.prompt * found.weight).sum() == pytest.approx(1650)
        assert (found.reused * found.weight).sum() == pytest.approx(1485)
        assert found.prompt[0] < found.prompt[1]
    assert together.computed[0] < together.computed[1]
    assert apart.computed[0] > apart.computed[1]
    ascending = sorted(together.computed.tolist())
    assert sorted(apart.computed.tolist()) == pytest.approx(ascending, rel=0.02)
    # attention work falls from one end to the other
    squares = [float((one.prompt**2 - one.reused**2).sum()) for one in (together, mixed, apart)]
    assert squares[0] >= squares[1] >= squares[2]
    assert squares[0] > squares[2]


def test_the_same_counts_are_mixed_in_the_same_way() -> None:
    rows = [row(0, 1, [Asked(100 * at, hbm=90 * at) for at in range(1, 30)])]
    one, other = (over(series(rows))[1] for _ in range(2))
    assert one.reused.tolist() == other.reused.tolist()


def test_many_requests_are_told_by_few_points() -> None:
    rows = [row(0, 1, [Asked(100 + at, hbm=50) for at in range(200)])]
    (found, *_) = over(series(rows))
    assert len(found.weight) == MOST_POINTS
    assert found.weight.sum() == pytest.approx(200)
    assert (found.weight * found.prompt).sum() == pytest.approx(sum(100 + at for at in range(200)))


def test_finish_time_histograms_are_read_at_the_same_count_and_not_at_the_same_time() -> None:
    # the prompt of 9,000 begins in the first second and finishes in the third, one of 60 the other way round
    rows = [
        told(row(0, 1, first_tokens=1, prompt_tokens=9000, computed_tokens=9000, running_requests=1)),
        row(1, 2, running_requests=1),
        told(
            row(2, 3, [Asked(60)], finished_requests=1, running_requests=1),
            finished_prompt_tokens=9000,
            request_prompt_tokens_le_10000=1,
            request_computed_tokens_le_10000=1,
            request_prompt_tokens_le_100=0,
            request_computed_tokens_le_100=0,
        ),
        told(
            row(3, 4, finished_requests=1),
            finished_prompt_tokens=60,
            request_prompt_tokens_le_100=1,
            request_computed_tokens_le_100=1,
        ),
    ]
    found = series(rows)
    early, late = (over(found, *edges)[1] for edges in ((0, 1), (1, 4)))
    assert early.prompt == pytest.approx([9000])
    assert late.prompt == pytest.approx([60])
    both = over(found, 0, 4)[1]
    # each point lies in its own request's bucket, whatever their windows
    assert 50 <= both.prompt[0] <= 100
    assert 5000 <= both.prompt[1] <= 10000
    assert both.prompt.sum() == pytest.approx(9060)


def test_a_count_between_two_scrapes_takes_its_share_of_what_ticked_between_them() -> None:
    # four requests finish at once, two of 60 and two of 9,000 tokens; two of them had begun in the first second
    rows = [
        row(0, 1, first_tokens=2, prompt_tokens=9060, computed_tokens=9060, running_requests=2),
        row(1, 2, [Asked(60), Asked(9000), Asked(60), Asked(9000)], first_tokens=2, prompt_tokens=9060),
    ]
    found = over(series(rows), 0, 1)[1]
    assert found.weight.tolist() == [1, 1]
    assert 50 <= found.prompt[0] <= 100
    assert 5000 <= found.prompt[1] <= 10000


def test_requests_without_histograms_are_all_alike() -> None:
    rows = [row(0, 1, [Asked(100), Asked(300, hbm=200)])._replace(details={"finished_prompt_tokens": 400})]
    for found in over(series(rows)):
        assert found.prompt == pytest.approx([200, 200])
        assert found.reused == pytest.approx([100, 100])


def test_a_piece_without_a_first_token_has_no_request() -> None:
    rows = [row(0, 1, [Asked(100)]), row(1, 2, steps=5, generated_tokens=5), row(2, 3, [Asked(100)])]
    found = populations(series(rows), np.array([0, 1, 2]), np.array([1, 2, 3]), COUPLINGS)
    for one in found:
        assert one.piece.tolist() == [0, 2]
        assert np.isfinite(one.prompt).all()
    (empty, *_) = over(series(rows), 1, 2)
    assert len(empty.weight) == 0


def test_nothing_reused_is_nothing_reused_of_any_request() -> None:
    rows = [row(0, 1, [Asked(40), Asked(700), Asked(3000)])]
    for found in over(series(rows)):
        assert found.reused.tolist() == [0, 0, 0]
        assert found.reused_hbm.tolist() == [0, 0, 0]


def test_without_external_tokens_all_that_is_reused_is_of_hbm() -> None:
    rows = [row(0, 1, [Asked(40, hbm=16), Asked(700, hbm=512), Asked(3000)])]
    for found in over(series(rows)):
        assert found.reused.tolist() == found.reused_hbm.tolist()


ASKED = st.builds(
    lambda prompt, reused, outer: Asked(
        prompt, hbm=round((prompt - 1) * reused * (1 - outer)), outer=math.floor((prompt - 1) * reused * outer)
    ),
    st.integers(2, 20_000),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.0, 0.3, 1.0]),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(ASKED, max_size=12), min_size=1, max_size=5))
def test_points_are_requests_that_could_be(seconds: list[list[Asked]]) -> None:
    assume(any(seconds))
    found = series([row(at, at + 1, requests) for at, requests in enumerate(seconds)])
    asked = [one for requests in seconds for one in requests]
    starts, ends = np.arange(len(seconds)), np.arange(1, len(seconds) + 1)
    for people in populations(found, starts, ends, COUPLINGS):
        assert people.weight.sum() == pytest.approx(len(asked))
        assert (people.weight * people.prompt).sum() == pytest.approx(sum(one.prompt for one in asked))
        reused = sum(one.hbm + one.outer for one in asked)
        # where whole prompts were reused but for their last token, a point cannot take more
        assert reused * 0.9 - len(asked) <= (people.weight * people.reused).sum() <= reused * (1 + 1e-9)
        assert (people.reused >= 0).all()
        assert (people.reused <= np.maximum(people.prompt - 1, 0) + 1e-6).all()
        assert (people.reused_hbm <= people.reused + 1e-9).all()
        assert (people.reused_hbm >= 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(ASKED, min_size=1, max_size=30))
def test_prompts_lie_inside_the_buckets_that_counted_them(asked: list[Asked]) -> None:
    found = over(series([row(0, 1, asked)]))[0]
    edges = np.array(LENGTH_EDGES)
    told_of = np.sort(edges[np.searchsorted(edges, [one.prompt for one in asked])])
    upper = np.where(np.isfinite(told_of), told_of, 150_000)
    lower = np.concatenate([[0.5], edges])[np.searchsorted(edges, told_of)]
    # prompts that lie on an edge of their bucket all of them are met to a hundredth
    assert (found.prompt <= upper * 1.01).all()
    assert (found.prompt >= lower * 0.99).all()


# --- a log of the requests


def logged(*requests: tuple[float, float, float, float]) -> Logged:
    return Logged(*np.array(requests).T)


NAN = math.nan


def test_a_log_tells_the_pairs_that_histograms_leave_open() -> None:
    rows = [row(100, 101, [Asked(150), Asked(1500, hbm=1400)])]
    found = series(rows)._replace(logged=logged((100.2, 150, 0, NAN), (100.7, 1500, 1400, NAN)))
    for one in over(found):
        assert one.prompt.tolist() == [150, 1500]
        assert one.reused == pytest.approx([0, 1400])
        assert one.reused_hbm == pytest.approx([0, 1400])
        assert one.weight.tolist() == [1, 1]


def test_a_log_that_lacks_a_tenth_of_the_requests_does_not_stand_for_them() -> None:
    asked = [Asked(100, hbm=16)] * 10
    rows = [row(0, 1, asked)]
    lines = [(0.05 + at / 20, 100.0, 0.0, NAN) for at in range(10)]
    enough = series(rows)._replace(logged=logged(*lines[:9]))
    assert over(enough)[1].weight == pytest.approx(np.full(9, 10 / 9))
    less = series(rows)._replace(logged=logged(*lines[:8]))
    assert len(over(less)[1].weight) == 10


def test_what_a_log_says_was_reused_is_brought_to_what_the_engine_counted() -> None:
    rows = [row(0, 1, [Asked(1000, hbm=300), Asked(1000, outer=300)])]
    found = series(rows)._replace(logged=logged((0.1, 1000, 100, NAN), (0.2, 1000, 200, NAN)))
    one = over(found)[1]
    assert one.reused == pytest.approx([200, 400])
    # it does not tell the tiers apart: half of what was counted was external
    assert one.reused_hbm == pytest.approx([100, 200])


def test_a_log_that_tells_the_tiers_apart_is_taken_at_its_word() -> None:
    rows = [row(0, 1, [Asked(1000, hbm=300), Asked(1000, outer=300)])]
    found = series(rows)._replace(logged=logged((0.1, 1000, 300, 0), (0.2, 1000, 300, 300)))
    one = over(found)[1]
    assert one.reused == pytest.approx([300, 300])
    assert one.reused_hbm == pytest.approx([300, 0])


def test_a_log_cannot_say_that_a_whole_prompt_was_reused() -> None:
    rows = [row(0, 1, [Asked(100, hbm=99)])]
    found = series(rows)._replace(logged=logged((0.5, 100, 100, NAN)))
    assert over(found)[1].reused.tolist() == [99]


def test_reuse_that_a_log_lays_where_no_hit_was_counted_is_of_the_tiers_that_served_the_others() -> None:
    rows = [row(0, 1, [Asked(1000)]), row(1, 2, [Asked(1000, hbm=300, outer=100)])]
    found = series(rows)._replace(logged=logged((0.5, 1000, 200, NAN), (1.5, 1000, 200, NAN)))
    each = populations(found, np.array([0, 1]), np.array([1, 2]), COUPLINGS)[0]
    assert each.reused == pytest.approx([200, 200])
    assert each.reused_hbm == pytest.approx([150, 150])


@pytest.mark.parametrize("outer", [NAN, 200.0])
def test_without_an_external_token_all_reuse_of_a_log_is_of_hbm(outer: float) -> None:
    rows = [row(0, 1, [Asked(1000)]), row(1, 2, [Asked(1000, hbm=400)])]
    found = series(rows)._replace(logged=logged((0.5, 1000, 200, outer), (1.5, 1000, 200, NAN)))
    each = populations(found, np.array([0, 1]), np.array([1, 2]), COUPLINGS)[0]
    assert each.reused_hbm.tolist() == each.reused.tolist() == pytest.approx([200, 200])


def test_without_a_hit_in_hbm_all_reuse_of_a_log_is_external() -> None:
    rows = [row(0, 1, [Asked(1000)]), row(1, 2, [Asked(1000, outer=400)])]
    found = series(rows)._replace(logged=logged((0.5, 1000, 200, NAN), (1.5, 1000, 200, NAN)))
    each = populations(found, np.array([0, 1]), np.array([1, 2]), COUPLINGS)[0]
    assert each.reused == pytest.approx([200, 200])
    assert each.reused_hbm.tolist() == [0, 0]
