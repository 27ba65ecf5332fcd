from __future__ import annotations

import math

import numpy as np
import pytest
from tests.replica_rows import THETA, calibration, cpu, h100, round_machine, step_by_hand

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.forward import break_even_bandwidth, marginal_break_even_bandwidth, saved_seconds
from kvtally.agent.steplaw.fit import alone_seconds
from kvtally.agent.steplaw.forwards import Z90, Doubt, calibrated_laws

SURE = calibration(sd=0.0)
GAP = PARAMETERS.index("gap_seconds")
REQUEST = PARAMETERS.index("request_seconds")


def known_but_for(name: str, sd: float = 0.1) -> tuple[tuple[float, ...], ...]:
    covariance = np.zeros((len(PARAMETERS), len(PARAMETERS)))
    covariance[PARAMETERS.index(name), PARAMETERS.index(name)] = sd**2
    return tuple(tuple(row) for row in covariance.tolist())


# 1,500 tokens in steps of 1,000: 1000 x 500 and 500 x (1000 + 250) products
def test_a_prefill_takes_its_steps_one_after_the_other() -> None:
    law = calibrated_laws(round_machine(), SURE, Doubt()).point
    whole = step_by_hand(1000, 500_000) + step_by_hand(500, 625_000)
    assert law.prefill_seconds(1500, 0) == pytest.approx(whole)
    assert law.prefill_seconds(1500, 1000) == pytest.approx(step_by_hand(500, 625_000))
    assert law.prefill_seconds(1500, 1500) == 0
    assert law.first_token_seconds == 0.004


def test_with_its_request_it_is_what_the_calibration_fits_to_requests_that_ran_alone() -> None:
    learned = calibration((0.7, 0.6, 0.7, 0.8, 5e-4, 4e-4, 0.029, 4.0, 0.004), clock=0.9)
    law = calibrated_laws(h100(), learned, Doubt()).point
    for prompt, reused in ((30_720.0, 0.0), (30_720.0, 15_360.0), (8192.0, 8191.0)):
        alone = alone_seconds(h100(), np.array(learned.medians), np.array([prompt]), np.array([reused]), 0.9)
        assert law.first_token_seconds + law.prefill_seconds(prompt, reused) == pytest.approx(float(alone[0]))


# two gaps of 2 ms: of the whole, the share that goes with the log of the gap
def test_the_interval_is_what_the_covariance_leaves_of_this_very_prefill() -> None:
    learned = SURE._replace(covariance=known_but_for("gap_seconds"))
    laws = calibrated_laws(round_machine(), learned, Doubt())
    slow, point, fast = (each.prefill_seconds(1500, 0) for each in (laws.slow, laws.point, laws.fast))
    sd = 0.1 * 2 * THETA[GAP] / point
    assert slow / point == pytest.approx(math.exp(Z90 * sd), rel=1e-5)
    assert slow * fast == pytest.approx(point**2)


def test_what_the_form_and_the_clock_leave_open_comes_on_top() -> None:
    sure, form = (calibrated_laws(round_machine(), SURE, doubt) for doubt in (Doubt(), Doubt(form=0.06)))
    assert sure.slow.prefill_seconds(5000, 0) == sure.fast.prefill_seconds(5000, 0)
    assert form.slow.prefill_seconds(5000, 0) == pytest.approx(
        sure.point.prefill_seconds(5000, 0) * math.exp(Z90 * 0.06)
    )
    # at 5,000 tokens nearly all of a step is compute, which goes with the clock
    clocked = calibrated_laws(round_machine(), SURE, Doubt(clock=0.06))
    ratio = clocked.slow.prefill_seconds(5000, 0) / sure.point.prefill_seconds(5000, 0)
    assert 1.08 < ratio < math.exp(Z90 * 0.06)


def test_elsewhere_every_efficiency_is_less_sure_and_no_seconds_are() -> None:
    laws = calibrated_laws(round_machine(), SURE, Doubt(efficiency=0.12))
    assert laws.slow.prefill_seconds(5000, 0) > 1.1 * laws.point.prefill_seconds(5000, 0)
    assert laws.slow.first_token_seconds == laws.fast.first_token_seconds


def test_the_seconds_of_a_request_have_a_range_unless_they_are_given() -> None:
    learned = SURE._replace(covariance=known_but_for("request_seconds", 0.5))
    laws = calibrated_laws(round_machine(), learned, Doubt())
    assert laws.slow.first_token_seconds == pytest.approx(THETA[REQUEST] * math.exp(Z90 * 0.5))
    given = calibrated_laws(round_machine(), learned, Doubt(), 0.2)
    assert {each.first_token_seconds for each in given} == {0.2}


def test_a_replica_without_a_gpu_has_a_law_as_well() -> None:
    laws = calibrated_laws(cpu(), SURE, Doubt())
    assert laws.point.prefill_seconds(1000, 0) > laws.point.prefill_seconds(1000, 900) > 0


def test_what_a_prefix_saves_has_no_step_in_it_that_runs_anyway() -> None:
    # a step takes 29 ms at least, which 1,000 tokens do not fill: alone they would cost it, before others they do not
    learned = calibration((0.7, 0.6, 0.7, 0.8, 5e-4, 4e-4, 0.029, 4.0, 0.004), sd=0.0)
    law = calibrated_laws(h100(), learned, Doubt()).point
    # 2 x 6.98e9 FLOP a token at 989.4e12 x 0.7 FLOP/s: 20.2 us
    assert saved_seconds(law, 0, 1000) == pytest.approx(1000 * 20.2e-6, rel=0.05)
    assert law.prefill_seconds(1000, 0) > 0.029
    kv = h100().kv_bytes
    assert break_even_bandwidth(law, kv, 1) == pytest.approx(kv / 20.2e-6, rel=0.02)
    assert marginal_break_even_bandwidth(law, kv, 1) == pytest.approx(break_even_bandwidth(law, kv, 1), rel=0.01)


def test_where_a_prefix_takes_no_time_no_bandwidth_breaks_even() -> None:
    endless = calibration((0.7, 0.6, 0.7, 0.8, 5e-4, 4e-4, 10.0, 4.0, 0.004), sd=0.0)
    law = calibrated_laws(h100(), endless, Doubt()).point
    assert break_even_bandwidth(law, h100().kv_bytes, 1) == math.inf
    assert marginal_break_even_bandwidth(law, h100().kv_bytes, 1000) == math.inf
