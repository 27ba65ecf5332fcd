from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import Asked, cpu, lengths, observed, round_machine, row, told

from kvtally.agent.interval import BUSY_AT_START, RESET
from kvtally.agent.steplaw.series import Series, series_of
from kvtally.agent.steplaw.windows import (
    SHORTEST_SECONDS,
    Described,
    Windows,
    chosen,
    clock_under_load,
    cut,
    describe,
    joined,
    least_seconds,
    overall_clock,
    singles,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.observed import ObservedRow

QUIET = [(-1.0, 0.0, 0.0)]  # GPUs that nobody measures once the rows begin
MACHINE = round_machine()


def series(rows: Sequence[ObservedRow]) -> Series:
    return series_of(observed(rows, worked=QUIET))


def busy(at: int, **counts: Any) -> ObservedRow:
    """A second in which an engine that never rests took ten steps."""
    return row(at, at + 1, flags=BUSY_AT_START, **{"steps": 10, "running_requests": 4, **counts})


def alone(at: float, one: Asked, **counts: Any) -> ObservedRow:
    return row(at, at + 1, [one], **counts)


def pairs(windows: Windows) -> list[tuple[int, int]]:
    return list(zip(windows.start.tolist(), windows.end.tolist(), strict=True))


def cuts(rows: Sequence[ObservedRow], least: float = 6.0) -> list[tuple[int, int]]:
    found = series(rows)
    return pairs(cut(found, 0, len(found.at) - 1, least))


def described(rows: Sequence[ObservedRow], of: Windows | None = None, clock: float = 0.9) -> Described:
    found = series(rows)
    last = np.array([len(found.at) - 1])
    whole = Windows(np.array([0]), last, np.zeros(1), np.zeros(1, dtype=bool))
    return describe(MACHINE, found, of or whole, clock)


# --- how long a window is


def test_a_window_lasts_at_least_some_mean_prefills() -> None:
    # 2e10 FLOP a token take 333 us at 60 % of 1e14: 10,000 tokens 3.33 s, of which a window holds sixteen
    slow = round_machine(linear_flop=2e10)
    found = series([row(0, 1, [Asked(10_000)]), row(1, 2, [Asked(9_000), Asked(11_000, hbm=1_000)])])
    assert least_seconds(slow, found) == pytest.approx(16 * (10_000 + 9_000 + 10_000) / 3 * 2e10 / 0.6e14)


def test_a_window_of_small_prefills_lasts_a_least_time_nevertheless() -> None:
    assert least_seconds(MACHINE, series([row(0, 1, [Asked(10)])])) == SHORTEST_SECONDS
    assert least_seconds(MACHINE, series([row(0, 1)])) == SHORTEST_SECONDS


# --- where windows are cut


def test_an_engine_that_never_rests_is_cut_by_time() -> None:
    assert cuts([busy(at) for at in range(14)]) == [(0, 6), (6, 12), (12, 14)]


def test_quiet_scrapes_cut_earlier_and_their_windows_have_no_cut_edge() -> None:
    rows = [busy(at, running_requests=0 if at == 3 else 4) for at in range(8)]
    found = series(rows)
    windows = cut(found, 0, 8, 6.0)
    assert pairs(windows) == [(0, 4), (4, 8)]
    # requests ran at 0 and at 8, none at 4
    assert windows.cut.tolist() == [1, 1]
    assert not windows.single.any()


def test_quiet_scrapes_right_behind_a_cut_do_not_make_a_window_of_a_second() -> None:
    rows = [busy(at, running_requests=0) for at in range(6)]
    assert cuts(rows) == [(0, 3), (3, 6)]


def test_idle_time_is_no_window() -> None:
    rows = [busy(0, running_requests=0), *(row(at, at + 1) for at in range(1, 20)), busy(20, running_requests=0)]
    windows = cuts(rows)
    assert windows[0][0] == 0
    assert windows[-1][1] == 21
    found = series(rows)
    for start, end in windows:
        assert found.totals["steps"][end] > found.totals["steps"][start]
    # of twenty seconds of rest most are in no window
    assert sum(end - start for start, end in windows) <= 6


def test_nothing_but_rest_has_no_windows() -> None:
    found = series([row(at, at + 1) for at in range(9)])
    assert len(cut(found, 0, 9, 6.0).start) == 0
    assert len(singles(found, 0, 9).start) == 0


def test_a_restart_is_a_window_of_its_own() -> None:
    rows = [busy(at, first_tokens=1) for at in range(6)]
    rows[2] = busy(2, first_tokens=1)._replace(row=rows[2].row._replace(flags=RESET))
    assert cuts(rows) == [(0, 2), (2, 3), (3, 6)]


def test_a_restart_in_the_first_or_the_last_interval_is_cut_off_too() -> None:
    rows = [busy(at) for at in range(5)]
    for at in (0, 4):
        rows[at] = rows[at]._replace(row=rows[at].row._replace(flags=RESET))
    assert cuts(rows) == [(0, 1), (1, 4), (4, 5)]


def test_a_gap_is_in_no_window() -> None:
    # scrapes 0..3, nothing until 50, then 50..53
    rows = [busy(0), busy(1), busy(2), busy(50), busy(51), busy(52)]
    found = series(rows)
    assert found.at.tolist() == [0, 1, 2, 3, 50, 51, 52, 53]
    assert pairs(cut(found, 0, 7, 6.0)) == [(0, 3), (4, 7)]


def test_windows_stay_between_the_scrapes_that_are_asked_for() -> None:
    found = series([busy(at) for at in range(20)])
    assert pairs(cut(found, 5, 14, 6.0)) == [(5, 11), (11, 14)]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 3), st.sampled_from([0, 0, 0, RESET]), st.sampled_from([0, 0, 7])),
        min_size=1,
        max_size=40,
    ),
    st.data(),
)
def test_windows_hold_all_that_was_counted_once_and_mix_whole_intervals_with_no_other(
    told_rows: list[tuple[int, int, int, int]], data: st.DataObject
) -> None:
    rows, at = [], 0
    for steps, running, flags, gap in told_rows:
        at += gap
        rows.append(row(at, at + 1, flags=flags, steps=steps, first_tokens=steps, running_requests=running))
        at += 1
    found = series(rows)
    last = len(found.at) - 1
    start = data.draw(st.integers(0, last - 1))
    end = data.draw(st.integers(start + 1, last))
    windows = cut(found, start, end, 6.0)
    held = sum(found.totals["steps"][b] - found.totals["steps"][a] for a, b in pairs(windows))
    assert held == found.totals["steps"][end] - found.totals["steps"][start]
    edge = start
    for a, b in pairs(windows):
        assert edge <= a < b <= end
        edge = b
        assert found.sound[a + 1 : b + 1].all() or b == a + 1


# --- requests that ran alone


def test_a_request_that_begins_and_finishes_between_two_scrapes_is_a_single() -> None:
    rows = [row(0, 1), alone(1, Asked(100, prefill_seconds=0.2)), row(2, 3), alone(3, Asked(50, prefill_seconds=0.1))]
    found = series(rows)
    windows = singles(found, 0, 4)
    assert pairs(windows) == [(0, 2), (2, 4)]
    assert windows.single.all()
    assert windows.cut.tolist() == [0, 0]
    told_of = describe(MACHINE, found, windows, 0.9)
    assert told_of.is_alone.tolist() == [True, True]
    assert told_of.prefill == pytest.approx([0.2, 0.1])


def test_a_request_that_spans_scrapes_is_told_when_it_finished() -> None:
    rows = [
        row(0, 1, running_requests=1, steps=0),
        row(1, 2, first_tokens=1, prompt_tokens=80, computed_tokens=80, steps=5, running_requests=1),
        told(row(2, 3, finished_requests=1, steps=5, prefill_ns=10**9), finished_prompt_tokens=80),
    ]
    assert pairs(singles(series(rows), 0, 3)) == [(0, 3)]


def test_requests_whose_prompts_do_not_agree_are_no_single() -> None:
    # as many finished as began, and not the same ones
    rows = [told(row(0, 1, [Asked(100)]), finished_prompt_tokens=70), row(1, 2, [Asked(40)])]
    assert (0, 1) not in pairs(singles(series(rows), 0, 2))


def test_a_crowd_is_no_single_and_some_requests_later_the_search_goes_on() -> None:
    crowd = told(row(0, 1, [Asked(100)] * 5, finished_requests=0, running_requests=5), finished_prompt_tokens=0)
    done = told(row(1, 2, finished_requests=5), finished_prompt_tokens=500)
    found = pairs(singles(series([crowd, done, *(alone(at, Asked(30)) for at in range(2, 12))]), 0, 12))
    assert found
    assert (11, 12) in found
    assert all(start >= 2 for start, _ in found)


def test_a_restart_and_a_gap_end_the_search_for_a_single() -> None:
    begun = row(0, 1, first_tokens=1, prompt_tokens=80, running_requests=1)
    ended = told(row(2, 3, finished_requests=1), finished_prompt_tokens=80)
    for between in (row(1, 2, flags=RESET), None):
        rows = [begun, ended] if between is None else [begun, between, ended]
        found = series(rows)
        assert pairs(singles(found, 0, len(found.at) - 1)) == []


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param({"running_requests": 2}, id="another request ran"),
        pytest.param({"waiting_requests": 1}, id="one waited"),
        pytest.param({"queue_ns": 300_000_000}, id="it queued"),
        pytest.param({"generated_tokens": 40}, id="another one decoded in its steps"),
    ],
)
def test_a_request_beside_others_did_not_run_alone(beside: dict[str, int]) -> None:
    calm = alone(0, Asked(100, generated=10, prefill_seconds=0.3, decode_seconds=0.2))
    assert described([calm]).is_alone.tolist() == [True]
    rows = [alone(0, Asked(100, generated=10, prefill_seconds=0.3, decode_seconds=0.2), **beside)]
    assert described(rows).is_alone.tolist() == [False]


def test_two_requests_whose_seconds_do_not_fit_one_after_the_other_did_not_run_alone() -> None:
    fits = [row(0, 1, [Asked(100, prefill_seconds=0.4), Asked(100, prefill_seconds=0.4)])]
    overlaps = [row(0, 1, [Asked(100, prefill_seconds=0.9), Asked(100, prefill_seconds=0.9, decode_seconds=0.9)])]
    assert described(fits).is_alone.tolist() == [True]
    assert described(overlaps).is_alone.tolist() == [False]


def test_a_prefill_longer_than_its_window_is_looked_at_from_where_it_began() -> None:
    # 3.5 s of prefill end in the last second; two requests ran at the second scrape
    long = Asked(5000, prefill_seconds=3.5)
    for running, expected in ((2, False), (1, True)):
        rows = [row(0, 1), row(1, 2, running_requests=running), row(2, 3, running_requests=1)]
        rows += [row(3, 4, running_requests=1), alone(4, long)]
        found = series(rows)
        last = Windows(np.array([4]), np.array([5]), np.zeros(1), np.ones(1, dtype=bool))
        assert describe(MACHINE, found, last, 0.9).is_alone.tolist() == [expected]


# --- what windows did


def test_decodes_and_their_context_come_from_the_counts() -> None:
    # 40 s, 8 requests of 500 tokens that decode 10 s each: 2 run on average, none with exp(-2) = 13.5 %
    # 328 generated, 320 behind the first ones, in 168 steps of which 8 end a prefill
    requests = [Asked(500, generated=41, decode_seconds=10)] * 8
    found = described([row(0, 40, requests, steps=168)])
    assert found.occupancy == pytest.approx([1 - math.exp(-2)])
    assert found.first.tolist() == [8]
    assert found.finals.tolist() == [8]
    assert found.packing.tolist() == [1]
    # steps with decodes: all but those that end a prefill while none run
    decodes = 320 / (168 - math.exp(-2) * 8)
    assert found.decodes == pytest.approx([decodes])
    # each decode reads its prompt and what it has generated so far
    assert decodes * 500 < found.context[0] <= decodes * (500 + 41)


def test_prefills_that_end_in_one_step_are_packed() -> None:
    # 8 first tokens, and only two steps of more tokens than decodes run: four prefills a step
    steps = lengths("step_tokens", (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, math.inf), [])
    rows = [row(0, 10, [Asked(200)] * 8, details=steps | {"step_tokens_le_1024": 2, "step_tokens_le_8": 90})]
    found = described(rows)
    assert found.finals.tolist() == [2]
    assert found.packing.tolist() == [4]


def test_no_more_prefills_are_packed_than_four_and_no_step_ends_less_than_one() -> None:
    requests = [Asked(200)] * 8
    none = dict.fromkeys(row(0, 1, requests).details or {}, 0)
    assert described([row(0, 10, requests, details=none)]).packing.tolist() == [4]
    many = none | {"step_tokens_le_1024": 50}
    assert described([row(0, 10, requests, details=many)]).packing.tolist() == [1]


def test_without_a_histogram_of_steps_each_prefill_ends_in_its_own() -> None:
    rows = [row(0, 10, [Asked(200)] * 8)._replace(details={"finished_prompt_tokens": 1600})]
    found = described(rows)
    assert found.finals.tolist() == [8]
    assert found.packing.tolist() == [1]


def test_a_window_of_decodes_alone_has_no_prefill() -> None:
    found = described([row(0, 10, steps=100, generated_tokens=400, running_requests=4)])
    assert found.finals.tolist() == [0]
    assert found.packing.tolist() == [1]
    assert found.occupancy.tolist() == [0]
    assert found.decodes.tolist() == [4]
    for column in found:
        assert np.isfinite(column).all()


def test_a_window_with_a_prefill_and_no_decode_has_no_context() -> None:
    found = described([row(0, 10, [Asked(700)])])
    assert found.decodes.tolist() == [0]
    assert found.context.tolist() == [0]
    assert found.occupancy.tolist() == [0]


def test_an_engine_is_saturated_where_every_scrape_found_a_request() -> None:
    rows = [busy(0), busy(1), busy(2)]
    assert described(rows).is_saturated.tolist() == [True]
    rows[1] = busy(1, running_requests=0)
    assert described(rows).is_saturated.tolist() == [False]
    rows[1] = busy(1, running_requests=0, waiting_requests=1)
    assert described(rows).is_saturated.tolist() == [True]


def test_work_is_known_only_where_all_of_a_window_is() -> None:
    rows = [busy(0), busy(1), busy(2)]
    whole = Windows(np.array([0, 0]), np.array([2, 3]), np.zeros(2), np.zeros(2, dtype=bool))
    found = describe(MACHINE, series_of(observed(rows, worked=[(0, 1, 0.5), (1, 2, 0.7)])), whole, 0.9)
    assert found.is_worked_known.tolist() == [True, False]
    assert found.worked[0] == pytest.approx(1.2)


# --- clocks


def test_the_clock_is_the_mean_over_the_tensor_work() -> None:
    # 0.6 s at 1,800 MHz and 0.2 s at 1,400 MHz: 1,700 MHz of 2,000
    rows = [busy(0), busy(1), busy(2)]
    found = series_of(observed(rows, tensor=[(0, 1, 0.6, 1800), (1, 2, 0.2, 1400), (2, 3, 0.0, 1980)]))
    starts, ends = np.array([0, 2]), np.array([3, 3])
    # of the last second there is too little to tell
    assert clock_under_load(MACHINE, found, starts, ends, 0.9) == pytest.approx([0.85, 0.9])


def test_a_cpu_has_no_clock_to_correct() -> None:
    found = series([busy(0)])
    assert clock_under_load(cpu(), found, np.array([0]), np.array([1]), 0.9).tolist() == [1]
    assert overall_clock(cpu(), found) == (1.0, math.inf)


def test_without_samples_the_clock_is_what_is_assumed() -> None:
    clock, seconds = overall_clock(MACHINE, series([busy(0)]))
    assert seconds == 0
    assert 0.8 < clock < 1


def test_the_clock_under_prefill_follows_its_evidence() -> None:
    # 300 s of mostly tensor work at 1,500 of 2,000 MHz beside three of belief; idle seconds at 1,980 tell nothing
    rows = [busy(at) for at in range(400)]
    load = [(at, at + 1, 0.8 if at < 375 else 0.01, 1500.0 if at < 375 else 1980.0) for at in range(400)]
    clock, seconds = overall_clock(MACHINE, series_of(observed(rows, tensor=load)))
    assert seconds == pytest.approx(300)
    assert clock == pytest.approx(0.75, abs=0.005)
    little, _ = overall_clock(MACHINE, series_of(observed(rows, tensor=load[:2])))
    assert clock < little < 0.88


# --- sets of windows


def test_windows_are_joined_and_chosen() -> None:
    one = Windows(np.array([0, 5]), np.array([5, 9]), np.array([1.0, 2.0]), np.zeros(2, dtype=bool))
    other = Windows(np.array([1]), np.array([2]), np.zeros(1), np.ones(1, dtype=bool))
    both = joined(one, other)
    assert pairs(both) == [(0, 5), (5, 9), (1, 2)]
    assert both.single.tolist() == [False, False, True]
    assert pairs(chosen(both, both.single)) == [(1, 2)]
    assert pairs(chosen(both, np.array([0, 2]))) == [(0, 5), (1, 2)]
    assert chosen(both, np.array([1])).cut.tolist() == [2]
