from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import Asked, calibration, h100, observed, row

from kvtally.agent.interval import BUSY_AT_START, RESET
from kvtally.agent.savings import Part, seconds_of
from kvtally.agent.steplaw.law import packaged_prior
from kvtally.agent.steplaw.laying import laid
from kvtally.agent.steplaw.series import Logged, Series, series_of
from kvtally.agent.steplaw.worth import worth

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.observed import ObservedRow

MACHINE = h100()
LAW = calibration(tuple(packaged_prior(MACHINE).medians.tolist()))
CHANCE = np.random.default_rng(7)
LENGTHS = CHANCE.integers(100, 9000, 60).tolist()
# a minute, a row a second, in which one or two requests have their first token, the second of a row half a second later
ASKED = [[Asked(LENGTHS[at], hbm=LENGTHS[at] // 3)] + [Asked(500 + at)] * (at % 2) for at in range(60)]
TIMES = [at + 0.25 + 0.5 * number for at, asked in enumerate(ASKED) for number in range(len(asked))]


def replica(rows: Sequence[ObservedRow]) -> Series:
    return series_of(observed(rows), epoch_ns=0)


SERIES = replica([row(at, at + 1, asked) for at, asked in enumerate(ASKED)])
LOG = Logged(
    np.array(TIMES),
    np.array([one.prompt for asked in ASKED for one in asked], dtype=np.float64),
    np.array([one.hbm for asked in ASKED for one in asked], dtype=np.float64),
    np.full(len(TIMES), math.nan),
)


def part_of(log: Logged, kept: Sequence[int]) -> Logged:
    return Logged(*(column[list(kept)] for column in log))


def seconds_in(log: Logged) -> list[int]:
    return [math.floor(at) for at in log.first_token]


@pytest.mark.parametrize("late", [-4.5, -2.5, -0.5, 0.5, 1.0, 2.5, 4.5])
def test_a_log_finds_its_place_whatever_its_clock(late: float) -> None:
    found = laid(LOG._replace(first_token=LOG.first_token + late), [SERIES])
    assert seconds_in(found.log) == seconds_in(LOG)
    assert found.log.prompt.tolist() == LOG.prompt.tolist()
    # at 0.25 and 0.75 s of their seconds, the log could be up to a quarter of a second early or late
    assert found.late == pytest.approx(-late, abs=0.26)
    assert (found.misplaced, found.reuse) == (0, 0)


def test_a_log_that_is_on_time_stays_as_it_is() -> None:
    found = laid(LOG, [SERIES])
    assert found.late == 0
    assert found.log.first_token.tolist() == LOG.first_token.tolist()


def test_a_log_of_when_requests_were_sent_finds_its_place() -> None:
    waited = LOG._replace(first_token=LOG.first_token - 2 - np.linspace(0, 1.5, len(TIMES)))
    assert seconds_in(laid(waited, [SERIES]).log) == seconds_in(LOG)


def test_requests_that_a_log_lacks_move_no_other() -> None:
    kept = [number for number in range(len(TIMES)) if number not in {10, 40, 41}]
    some = part_of(LOG, kept)
    found = laid(some._replace(first_token=some.first_token + 1.5), [SERIES])
    assert seconds_in(found.log) == seconds_in(some)
    assert (found.misplaced, found.reuse) == (0, 0)


def test_a_request_that_the_engine_did_not_count_is_left_out() -> None:
    more = Logged(
        np.insert(LOG.first_token, 30, 19.6),
        np.insert(LOG.prompt, 30, 77.0),
        np.insert(LOG.reused, 30, 7.0),
        np.insert(LOG.outer, 30, math.nan),
    )
    found = laid(more, [SERIES])
    assert found.log.prompt.tolist() == LOG.prompt.tolist()


def test_a_log_in_another_order_lies_elsewhere_than_it_was_counted() -> None:
    order = np.concatenate([np.random.default_rng(1).permutation(np.arange(at, at + 9)) for at in range(0, 90, 9)])
    mixed = part_of(LOG, order.tolist())._replace(first_token=LOG.first_token)
    assert laid(mixed, [SERIES]).misplaced > 0.05


def test_tokens_that_lie_one_span_off_are_misplaced_once() -> None:
    rows = [row(at, at + 1, [Asked(prompt)]) for at, prompt in enumerate((100, 200, 300, 400))]
    times, prompts = np.array([0.5, 1.5, 2.5, 3.5]), np.array([100.0, 300, 200, 400])
    swapped = Logged(times, prompts, np.zeros(4), np.full(4, math.nan))
    # 100 tokens of 1000 are in the second span instead of in the third
    assert laid(swapped, [replica(rows)]).misplaced == pytest.approx(0.1)


def test_a_log_that_tells_of_other_reuse_says_so() -> None:
    total, reused = LOG.prompt.sum(), LOG.reused.sum()
    assert laid(LOG._replace(reused=LOG.reused * 0), [SERIES]).reuse == pytest.approx(-reused / total)


@pytest.mark.parametrize("flags", [0, RESET])
def test_requests_of_a_gap_are_left_out(flags: int) -> None:
    rows = [row(at, at + 1, asked) for at, asked in enumerate(ASKED) if not 20 <= at < 40]
    if flags:  # a restart: the row is there, and counts nothing of what came before it
        rows.insert(20, row(20, 40, flags=flags))
    found = laid(LOG._replace(first_token=LOG.first_token + 1.5), [replica(rows)])
    outside = [second for second in seconds_in(LOG) if not 20 <= second < 40]
    assert seconds_in(found.log) == outside


def test_a_log_goes_on_over_a_replica_s_series() -> None:
    rows = [row(at, at + 1, asked) for at, asked in enumerate(ASKED)]
    parts = [series_of(observed(some), epoch_ns=epoch) for some, epoch in ((rows[:25], 0), (rows[25:], 25 * 10**9))]
    found = laid(LOG._replace(first_token=LOG.first_token - 2.5), parts)
    assert seconds_in(found.log) == seconds_in(LOG)


def test_a_log_goes_on_over_a_version_that_comes_back() -> None:
    rows = [row(at, at + 1, asked) for at, asked in enumerate(ASKED)]
    around = series_of(observed([*rows[:20], *rows[40:]]), epoch_ns=0)
    within = series_of(observed(rows[20:40]), epoch_ns=0)
    for parts in ([around, within], [within, around]):
        found = laid(LOG, parts)
        assert (seconds_in(found.log), found.misplaced) == (seconds_in(LOG), 0)


def test_nothing_is_laid_where_nothing_is() -> None:
    nothing = part_of(LOG, [])
    assert len(laid(nothing, [SERIES]).log.prompt) == 0
    idle = laid(LOG, [replica([row(0, 60)])])
    assert (len(idle.log.prompt), idle.late) == (0, 0)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(64, 9000), st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.2, 1.0])),
        min_size=20,
        max_size=40,
    ),
    st.floats(-20, 20),
    st.sampled_from([0.0, 1.0, 1.7]),
    st.booleans(),
)
def test_whatever_a_log_s_clock_the_tiers_add_up_to_all_that_was_avoided(
    drawn: list[tuple[int, float, float]], late: float, waits: float, has_outer: bool
) -> None:
    asked = [
        Asked(prompt, hbm=int((prompt - 1) * share * (1 - outer)), outer=int((prompt - 1) * share * outer))
        for prompt, share, outer in ((prompt, share, outer * has_outer) for prompt, share, outer in drawn)
    ]
    rows = [row(3 * at, 3 * at + 3, [one], flags=BUSY_AT_START) for at, one in enumerate(asked)]
    series = series_of(observed(rows), epoch_ns=0)
    log = Logged(
        np.sort(3 * np.arange(len(asked)) + 1.0 + late + waits * np.sin(np.arange(len(asked)))),
        np.array([float(one.prompt) for one in asked]),
        np.array([float(one.hbm + one.outer) for one in asked]),
        np.full(len(asked), math.nan),
    )
    for logged in (log, laid(log, [series]).log):
        valued = worth(MACHINE, series._replace(logged=logged), 0, len(rows), LAW)
        found = seconds_of([Part(LAW, valued, "synchronous")], 60.0)
        parts = sum(one.avoided.point for one in found.tiers.values())
        assert parts == pytest.approx(found.avoided.point, abs=1e-9 + 1e-9 * valued.full[1])
