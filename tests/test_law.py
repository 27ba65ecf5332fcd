from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import THETA, cpu, h100, round_machine, shape, worked_by_hand

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.hardware import gpu_of
from kvtally.agent.steplaw import law
from kvtally.agent.steplaw.law import TILE_TOKENS, Steps, packaged_prior, prefill_seconds, working_seconds
from kvtally.agent.steplaw.machine import Machine, machine

PLACES = {name: place for place, name in enumerate(PARAMETERS)}


def seconds(
    of: Machine,
    tokens: float,
    *,
    products: float = 0.0,
    context: float = 0.0,
    clock: float = 1.0,
    theta: tuple[float, ...] = THETA,
) -> float:
    steps = Steps(np.array([tokens]), products, context, clock)
    return float(working_seconds(of, np.array(theta), steps)[0])


def with_(name: str, value: float) -> tuple[float, ...]:
    return tuple(value if place == PLACES[name] else one for place, one in enumerate(THETA))


def test_every_parameter_has_the_place_that_its_name_has() -> None:
    named = ["COMPUTE", "ATTENTION", "WEIGHT_BANDWIDTH", "KV_BANDWIDTH", "STEP", "GAP", "LAUNCH", "SHARPNESS"]
    assert [getattr(law, name) for name in [*named, "REQUEST"]] == [
        PLACES[name]
        for name in (
            *("compute_efficiency", "attention_efficiency", "weight_bandwidth_efficiency"),
            *("kv_bandwidth_efficiency", "step_seconds", "gap_seconds", "launch_seconds", "sharpness"),
            "request_seconds",
        )
    ]


def test_a_step_takes_its_work_its_attention_its_context_and_its_overhead() -> None:
    # 75 tokens, those of half a tile among them: compute 75 x 1e10 / (1e14 x 0.5) = 15 ms; weights 1e10 / (1e12 x 0.5)
    # = 20 ms; sharpness 2: 25 ms. 1e6 products x 1e5 / (1e14 x 0.5) = 2 ms; 50,000 tokens of context x 1e5 / (1e12 x
    # 0.5) = 10 ms; step 1 ms
    found = seconds(round_machine(), 75 - TILE_TOKENS, products=1e6, context=5e4)
    assert found == pytest.approx(0.025 + 0.002 + 0.010 + 0.001)
    assert found == pytest.approx(worked_by_hand(75 - TILE_TOKENS, 1e6, 5e4))


def test_a_sharp_law_takes_the_longer_of_compute_and_weights() -> None:
    sharp = with_("sharpness", 40.0)
    # 70 tokens: 14 ms of compute hide behind 20 ms of weights; 500: 100 ms hide the weights
    assert seconds(round_machine(), 70 - TILE_TOKENS, theta=sharp) == pytest.approx(0.021)
    assert seconds(round_machine(), 500 - TILE_TOKENS, theta=sharp) == pytest.approx(0.101)


def test_the_clock_slows_what_is_computed_and_not_what_is_read() -> None:
    sharp = with_("sharpness", 40.0)
    # at half the clock 500 tokens take 200 ms and 1e6 products 4 ms; 50,000 tokens of context 10 ms as before
    found = seconds(round_machine(), 500 - TILE_TOKENS, products=1e6, context=5e4, clock=0.5, theta=sharp)
    assert found == pytest.approx(0.2 + 0.004 + 0.010 + 0.001)


def test_a_step_without_tokens_still_reads_the_weights() -> None:
    assert seconds(round_machine(), 0, theta=with_("sharpness", 40.0)) == pytest.approx(0.021, rel=1e-3)


def test_tensor_parallel_steps_reduce_their_tokens() -> None:
    # 2 x 10 layers x (10 us + 500 x 4 x 1000 x 1/2 / 350e9) = 20 x 12.857 us
    one, two = (seconds(round_machine(gpus=gpus), 500) for gpus in (1, 2))
    assert two - one == pytest.approx(257.14e-6, rel=1e-4)


def test_a_step_of_few_tokens_reads_few_experts() -> None:
    mixture = machine(shape("mixtral-8x7b"), gpu_of("H100"), 2, token_budget=8192)
    sharp = np.array(with_("sharpness", 40.0))
    found = working_seconds(mixture, sharp, Steps(np.array([1.0, 4.0, 8.0]), 0.0, 0.0, 1.0))
    # one token touches 2 of 8 experts, four or more all of them
    expert = mixture.shape.expert_weight_bytes / (mixture.bandwidth * 0.5)
    assert found[1] - found[0] == pytest.approx(0.75 * expert, rel=0.01)
    assert found[2] - found[1] < 0.01 * expert


def test_launches_are_the_least_that_a_step_with_prefill_takes_and_the_gap_comes_on_top() -> None:
    # launch 10 ms, gap 2 ms
    found = prefill_seconds(np.array([0.004, 0.010, 0.050]), np.array(THETA))
    assert found == pytest.approx([0.012, 0.012, 0.052])


TOKENS = st.floats(0, 20_000)


@settings(max_examples=50, deadline=None)
@given(TOKENS, TOKENS, st.floats(0, 1e8), st.floats(0, 1e6), st.floats(0.3, 1.2))
def test_more_tokens_never_take_less(few: float, more: float, products: float, context: float, clock: float) -> None:
    low, high = sorted((few, more))
    for of in (h100(), h100(gpus=4), cpu(), round_machine()):
        one, other = (seconds(of, tokens, products=products, context=context, clock=clock) for tokens in (low, high))
        assert 0 < one <= other * (1 + 1e-12)


@settings(max_examples=50, deadline=None)
@given(
    st.sampled_from(
        [
            *("compute_efficiency", "attention_efficiency", "weight_bandwidth_efficiency"),
            *("kv_bandwidth_efficiency", "sharpness"),
        ]
    ),
    st.floats(0.05, 1.2),
    st.floats(0.05, 1.2),
    TOKENS,
)
def test_what_is_more_efficient_never_takes_longer(name: str, one: float, other: float, tokens: float) -> None:
    slow, fast = (
        seconds(h100(), tokens, products=1e7, context=1e5, theta=with_(name, value)) for value in sorted((one, other))
    )
    assert slow >= fast * (1 - 1e-12)


@pytest.mark.parametrize("of", [h100(), h100(gpus=8), cpu()], ids=["one GPU", "eight GPUs", "a CPU"])
def test_a_packaged_prior_is_a_proper_belief_of_every_parameter(of: Machine) -> None:
    prior = packaged_prior(of)
    assert len(prior.medians) == len(PARAMETERS)
    assert (prior.medians > 0).all()
    assert np.allclose(prior.covariance, prior.covariance.T)
    assert (np.linalg.eigvalsh(prior.covariance) > 0).all()


def test_nothing_is_believed_of_a_cpu_with_any_certainty() -> None:
    known, open_ = np.diag(packaged_prior(h100()).covariance), np.diag(packaged_prior(cpu()).covariance)
    for name in ("compute_efficiency", "weight_bandwidth_efficiency", "launch_seconds"):
        assert open_[PLACES[name]] >= 4 * known[PLACES[name]]


def test_launches_without_compiled_graphs_are_believed_to_take_longer() -> None:
    plain, eager = (packaged_prior(one).medians for one in (h100(), h100()._replace(is_eager=True)))
    launch = PLACES["launch_seconds"]
    assert eager[launch] > plain[launch]
    assert np.delete(eager, launch) == pytest.approx(np.delete(plain, launch))


def test_narrow_types_are_believed_with_less_certainty() -> None:
    plain = np.diag(packaged_prior(h100()).covariance)
    weights = machine(shape(quantization="fp8"), gpu_of("H100"), 1, token_budget=8192)
    cache = machine(shape(kv_dtype="fp8"), gpu_of("H100"), 1, token_budget=8192)
    compute, attention = PLACES["compute_efficiency"], PLACES["attention_efficiency"]
    assert np.diag(packaged_prior(weights).covariance)[compute] > plain[compute]
    assert np.diag(packaged_prior(cache).covariance)[attention] > plain[attention]
    assert np.diag(packaged_prior(cache).covariance)[compute] == plain[compute]


def test_the_prior_holds_the_cold_prefill_of_a_real_h100() -> None:
    # METHOD 6: 30,720 prompt tokens one at a time took 1,142 ms; the prior's doubt is some 25 %
    theta = packaged_prior(h100()).medians
    tokens = np.array([8192.0, 8192.0, 8192.0, 6144.0])
    starts = np.concatenate([[0.0], np.cumsum(tokens)[:-1]])
    working = working_seconds(h100(), theta, Steps(tokens, tokens * (starts + tokens / 2), 0.0, 1.0))
    assert prefill_seconds(working, theta).sum() == pytest.approx(1.142, rel=0.25)
