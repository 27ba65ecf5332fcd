from __future__ import annotations

import pytest
from tests.replica_rows import SECOND, Asked, calibration, observed, round_machine, row, step_by_hand

from kvtally.agent.steplaw.series import series_of
from kvtally.agent.steplaw.supposed import SHARES, Supposed, supposed
from kvtally.agent.steplaw.worth import worth

LAW = calibration()
MACHINE = round_machine()
SPAN = (0, 100 * SECOND)
# each in a row of its own: so the pairs of prompt and reuse are known, whatever the coupling
ROWS = [row(10.0 * at, 10.0 * at + 10, (Asked(2000, hbm=500, outer=500, prefill_seconds=0.5),)) for at in range(8)]
SERIES = series_of(observed(ROWS))
BEFORE = worth(MACHINE, SERIES, 0, len(SERIES.at) - 1, LAW)


def at(share: float, span: tuple[int, int] = SPAN) -> Supposed:
    found = supposed(MACHINE, SERIES, span, LAW, before=BEFORE, extra_share=share)
    assert found is not None
    return found


def test_with_no_more_reuse_it_is_the_worth_of_the_present_tier() -> None:
    found = at(0.0)
    assert found.worth.avoided == pytest.approx(BEFORE.outer)
    assert found.worth.avoided_by == pytest.approx(BEFORE.outer_by)
    assert found.worth.clock_by[0] == pytest.approx(BEFORE.clock_by[1])
    assert (found.worth.external_tokens, found.worth.computed_tokens) == (8 * 500, 8 * 1000)
    assert found.loading == 8


# of the 1,000 computed tokens, half: prefill from 500 on against prefill from 1,500 on, steps of 1,000
def test_a_share_of_what_was_computed_lengthens_the_prefix() -> None:
    found = at(0.5)
    without = step_by_hand(1000, 1000 * (500 + 500)) + step_by_hand(500, 500 * (1500 + 250))
    left = step_by_hand(500, 500 * (1500 + 250))
    assert found.worth.avoided[1] == pytest.approx(8 * (without - left))
    assert (found.worth.external_tokens, found.worth.computed_tokens) == (8 * 1000, 8 * 500)


def test_one_token_is_always_computed() -> None:
    assert at(1.0).worth.external_tokens == 8 * (2000 - 1 - 500)


def test_the_curve_says_the_same_as_each_of_its_shares() -> None:
    found = at(0.25)
    assert found.by_share[SHARES.index(0.25)] == pytest.approx((found.worth.avoided[1], 8 * 750, 8))
    assert [row[0] for row in found.by_share] == sorted(row[0] for row in found.by_share)
    assert [row[1] for row in found.by_share] == sorted(row[1] for row in found.by_share)


def test_tokens_reused_from_hbm_are_no_store_s() -> None:
    rows = [row(10.0 * at, 10.0 * at + 10, (Asked(2000, hbm=1999, prefill_seconds=0.1),)) for at in range(4)]
    series = series_of(observed(rows))
    before = worth(MACHINE, series, 0, len(series.at) - 1, LAW)
    found = supposed(MACHINE, series, SPAN, LAW, before=before, extra_share=1.0)
    assert found is not None
    assert (found.worth.avoided[1], found.worth.external_tokens, found.loading) == (0, 0, 0)


def test_a_span_without_work_has_nothing_to_suppose() -> None:
    assert supposed(MACHINE, SERIES, (500 * SECOND, 600 * SECOND), LAW, before=BEFORE, extra_share=0.2) is None
    idle = series_of(observed([row(0.0, 10.0), row(10.0, 20.0)]))
    assert supposed(MACHINE, idle, SPAN, LAW, before=BEFORE, extra_share=0.2) is None
