from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import SECOND, Asked, observed, row, told

from kvtally.agent.interval import BORN, BUSY_AT_START, GAUGES_UNKNOWN, IDENTITY_BROKEN, IDENTITY_OK, RESET
from kvtally.agent.observed import CacheSpan, ObservedRow
from kvtally.agent.steplaw.series import NEEDED, series_of


def burst(start: float, end: float, load: float | None, store: float | None = None) -> CacheSpan:
    """What a cache reports for (start, end], in seconds."""
    loaded, stored = (None if value is None else round(value * SECOND) for value in (load, store))
    return CacheSpan(round(start * SECOND), round(end * SECOND), loaded, stored, None, None, None, None)


def idle(*ends: float) -> list[ObservedRow]:
    return [row(one - 1, one) for one in ends]


def test_a_series_has_a_point_before_the_first_row_and_one_at_the_end_of_each() -> None:
    found = series_of(observed([row(100, 101, first_tokens=2), row(101, 103, first_tokens=3)]))
    assert found.epoch_ns == 100 * SECOND
    assert found.at.tolist() == [0, 1, 3]
    assert found.totals["first_tokens"].tolist() == [0, 2, 5]
    assert found.sound.tolist() == [True, True, True]
    assert found.seconds(np.array([0, 1]), np.array([1, 2])).tolist() == [1, 2]
    assert found.over("first_tokens", np.array([0, 1]), np.array([2, 2])).tolist() == [5, 3]


def test_seconds_count_from_an_epoch_that_is_given() -> None:
    found = series_of(observed([row(100, 101)]), epoch_ns=90 * SECOND)
    assert found.at.tolist() == [10, 11]


def test_a_gap_between_rows_is_a_point_of_its_own_to_which_nothing_is_counted() -> None:
    rows = [row(0, 1, first_tokens=2, running_requests=3), row(11, 12, first_tokens=5, running_requests=1)]
    found = series_of(observed(rows))
    assert found.at.tolist() == [0, 1, 11, 12]
    assert found.totals["first_tokens"].tolist() == [0, 2, 2, 7]
    assert found.sound.tolist() == [True, True, False, True]
    # nothing says that requests ran when the row behind the gap began
    assert found.running.tolist() == [0, 3, 0, 1]


def test_a_row_behind_a_gap_that_begins_busy_has_a_request_running_at_its_start() -> None:
    rows = [row(0, 1), row(11, 12, flags=BUSY_AT_START)]
    found = series_of(observed(rows))
    assert found.running.tolist() == [0, 0, 1, 0]
    assert found.waiting.tolist() == [0, 0, 0, 0]
    assert series_of(observed(rows[1:])).running.tolist() == [1, 0]


@pytest.mark.parametrize("flag", [RESET, BORN, GAUGES_UNKNOWN, IDENTITY_BROKEN])
def test_a_row_that_is_not_whole_is_unsound_and_counts_all_the_same(flag: int) -> None:
    rows = [
        row(0, 1, first_tokens=1, flags=IDENTITY_OK),
        row(1, 2, first_tokens=4, flags=flag),
        row(2, 3, first_tokens=1),
    ]
    found = series_of(observed(rows))
    assert found.sound.tolist() == [True, True, False, True]
    assert found.totals["first_tokens"].tolist() == [0, 1, 5, 6]


def test_nanoseconds_are_counted_in_seconds() -> None:
    found = series_of(observed([row(0, 1, prefill_ns=1_500_000_000)]))
    assert found.totals["prefill"].tolist() == [0, 1.5]
    assert "prefill_ns" not in found.totals


def test_a_row_that_lacks_a_needed_count_is_unsound() -> None:
    rows = [row(0, 1, computed_tokens=7), row(1, 2, computed_tokens=None), row(2, 3, computed_tokens=7)]
    found = series_of(observed(rows))
    assert found.missing == ()
    assert found.sound.tolist() == [True, True, False, True]
    assert found.totals["computed_tokens"].tolist() == [0, 7, 7, 14]


@pytest.mark.parametrize("name", NEEDED)
def test_a_count_that_no_row_tells_is_missing(name: str) -> None:
    lacking: dict[str, Any] = {name: None}
    found = series_of(observed([row(0, 1, **lacking), row(1, 2, **lacking)]))
    assert found.missing == (name,)
    assert not found.sound[1:].any()


def test_prompt_tokens_at_finish_that_no_row_tells_are_missing() -> None:
    rows = [told(one, finished_prompt_tokens=None) for one in idle(1, 2)]
    assert series_of(observed(rows)).missing == ("finished_prompt_tokens",)
    # an engine whose page has no histograms at all has no details
    bare = [one._replace(details=None) for one in idle(1, 2)]
    assert series_of(observed(bare)).missing == ("finished_prompt_tokens",)
    assert series_of(observed(bare)).histograms == {}


def test_preemptions_may_be_missing() -> None:
    found = series_of(observed([row(0, 1, preemptions=None)]))
    assert found.missing == ()
    assert found.sound.all()


def test_whether_requests_wait_for_capacity_is_told_or_not() -> None:
    assert series_of(observed([row(0, 1, waiting_for_capacity=2)])).is_starving_told
    found = series_of(observed([row(0, 1, waiting_for_capacity=None)]))
    assert not found.is_starving_told


def test_details_are_told_where_they_are() -> None:
    rows = [told(row(0, 1), estimated_gflop=70), row(1, 2), told(row(2, 3), estimated_gflop=30, admitted_disk_tokens=5)]
    found = series_of(observed(rows))
    assert found.totals["estimated_gflop"].tolist() == [0, 70, 70, 100]
    assert found.totals["admitted_disk_tokens"].tolist() == [0, 0, 0, 5]
    assert "admitted_host_tokens" not in found.totals


def test_histograms_are_read_by_the_number_of_their_edge() -> None:
    # as text 1000 comes before 200
    rows = [row(0, 1, [Asked(150), Asked(150)]), row(1, 2, [Asked(900), Asked(60_000)])]
    found = series_of(observed(rows)).histograms["request_prompt_tokens"]
    edges = found.edges.tolist()
    assert edges == sorted(edges)
    assert edges[-1] == math.inf
    assert found.counts[-1].sum() == 4
    assert found.counts[1, edges.index(200)] == 2
    assert found.counts[2, edges.index(200)] == 2
    assert found.counts[1, edges.index(1000)] == 0
    assert found.counts[2, edges.index(1000)] == 1
    assert found.counts[2, -1] == 1


def test_work_is_known_where_half_of_an_interval_is() -> None:
    rows = idle(1, 2, 3)
    found = series_of(observed(rows, worked=[(0, 1, 0.5), (1, 1.4, 0.4)]))
    assert found.worked.tolist() == [0, 0.5, 0.5, 0.5]
    assert found.worked_known.tolist() == [True, True, False, False]
    nothing = series_of(observed(rows, worked=None))
    assert not nothing.worked_known.any()
    assert nothing.worked.tolist() == [0, 0, 0, 0]


def test_scrapes_are_quiet_where_nothing_runs_waits_or_works() -> None:
    rows = [row(0, 1), row(1, 2, running_requests=1), row(2, 3, waiting_requests=1), row(3, 4), row(4, 5)]
    # the gauges are stale while a chunk without output runs: the GPUs work on right after the scrape at 4
    worked = [(0, 4, 0.0), (4, 4.25, 0.2), (4.25, 6, 0.0)]
    found = series_of(observed(rows, worked=worked))
    assert found.quiet.tolist() == [True, True, False, False, False, True]
    assert found.resting[4] == pytest.approx(0.8)


def test_the_clock_comes_with_the_tensor_work_that_it_was_seen_under() -> None:
    found = series_of(observed(idle(1, 2), tensor=[(0, 1, 0.5, 1800), (1, 2, 0.25, 1600)]))
    assert found.tensor.tolist() == [0, 0.5, 0.75]
    assert found.tensor_mhz.tolist() == [0, 900, 1300]


def test_a_burst_of_a_caches_seconds_is_spread_over_the_work_since_the_one_before() -> None:
    # 10 s of stores are told at second 4, for computed tokens of 100, 300, 0 and 600: 1, 3, 0 and 6 s; then nothing
    tokens = (100, 300, 0, 600, 500)
    rows = [row(at, at + 1, computed_tokens=more) for at, more in enumerate(tokens)]
    found = series_of(observed(rows, caches={"lmcache": [burst(0, 2, 0, 0), burst(2, 4, 0, 10)]}))
    assert found.stores.tolist() == pytest.approx([0, 1, 4, 4, 10, 10])
    assert found.loads.tolist() == [0, 0, 0, 0, 0, 0]


def test_loads_are_spread_over_external_tokens_and_the_next_burst_from_the_last_on() -> None:
    rows = [row(at, at + 1, external_tokens=more) for at, more in enumerate((1, 3, 2, 2))]
    found = series_of(observed(rows, caches={"lmcache": [burst(0, 2, 8), burst(2, 4, 2)]}))
    assert found.loads.tolist() == pytest.approx([0, 2, 8, 9, 10])


def test_a_burst_without_work_is_spread_evenly() -> None:
    found = series_of(observed(idle(1, 2, 3, 4), caches={"lmcache": [burst(0, 4, 2)]}))
    assert found.loads.tolist() == pytest.approx([0, 0.5, 1, 1.5, 2])


def test_the_slowest_of_several_workers_is_the_engines() -> None:
    # both load at the same time: at second 2 the one has taken 3 s, the other 4 s; at second 4 it is 9 and 5
    caches = {"worker 0": [burst(0, 2, 3), burst(2, 4, 6)], "worker 1": [burst(0, 2, 4), burst(2, 4, 1)]}
    rows = [row(at, at + 1, external_tokens=1) for at in range(4)]
    found = series_of(observed(rows, caches=caches))
    assert found.loads.tolist() == pytest.approx([0, 2, 4, 6, 9])


def test_what_a_cache_reported_before_the_first_row_or_after_the_last_is_not_of_the_span() -> None:
    rows = [row(10, 11, external_tokens=1), row(11, 12, external_tokens=1)]
    caches = {
        "worker 0": [burst(0, 10, 50), burst(10, 12, 2), burst(12, 22, 50)],
        "worker 1": [burst(10, 12, 4)],
    }
    found = series_of(observed(rows, caches=caches))
    assert (found.loads - found.loads[0]).tolist() == pytest.approx([0, 2, 4])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 20), st.integers(0, 5), st.integers(0, 500)), min_size=1, max_size=12),
    st.lists(st.tuples(st.integers(0, 60), st.floats(0, 9)), max_size=6),
)
def test_cumulative_seconds_never_fall_and_end_at_what_was_reported(
    spans: list[tuple[float, int, int]], bursts: list[tuple[int, float]]
) -> None:
    rows, at = [], 0.0
    for length, gap, tokens in spans:
        rows.append(row(at + gap, at + gap + length, computed_tokens=tokens))
        at = at + gap + length
    told_spans = [burst(max(0, end - 10), end, None, seconds) for end, seconds in sorted(bursts)]
    found = series_of(observed(rows, caches={"lmcache": told_spans}))
    ends = rows[-1].row.end_ns / SECOND
    begin = rows[0].row.start_ns / SECOND
    inside = sum(seconds for end, seconds in bursts if begin < end - 1e-3 <= ends)
    assert (np.diff(found.stores) >= -1e-9).all()
    assert found.stores[-1] - found.stores[0] == pytest.approx(inside, abs=1e-6)
    assert np.isfinite(found.stores).all()
