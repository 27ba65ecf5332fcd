from __future__ import annotations

import json
import math
from decimal import ROUND_HALF_UP, Decimal
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.forward import (
    LOWER_BOUND,
    NO_CACHE,
    PRIOR,
    PRIOR_FAST,
    PRIOR_SLOW,
    Backend,
    Efficiency,
    Estimate,
    Law,
    LawRange,
    Parameters,
    Roofline,
    bandwidth_for,
    break_even_bandwidth,
    first_token_seconds_for,
    gpus_for,
    load_seconds,
    marginal_break_even_bandwidth,
    roofline,
    ttft_seconds,
)
from kvtally.agent.hardware import gpu_of
from kvtally.agent.model_shape import ModelShape, shape_of

CONFIGS = Path(__file__).parent / "fixtures" / "model_configs"
KV_70B, KV_8B = 327_680.0, 131_072.0
AVERAGE = Backend("average", "storage", 8e9)
FAST = Backend("fast", "storage", 100e9)
DRAM = Backend("DRAM", "dram", 200e9)


def shape(name: str) -> ModelShape:
    return shape_of(json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8")))


def law(
    name: str = "llama-3.1-70b",
    gpus: int = 4,
    efficiency: Efficiency = PRIOR,
    t0: float = 0.15,
    parameters: Parameters = 70.6e9,
    *,
    has_all_reduce: bool = False,
) -> Roofline:
    """By default METHOD 8's own case, which takes P as the published 70.6e9."""
    gpu = gpu_of("H100")
    assert gpu is not None
    return roofline(
        shape(name),
        gpu,
        gpus,
        efficiency,
        first_token_seconds=t0,
        parameters=parameters,
        has_all_reduce=has_all_reduce,
    )


def printed(value: float, places: int = 1) -> str:
    """As METHOD 8 prints its figures: rounded from two places to one, half up."""
    rounded = Decimal(f"{value:.2f}")
    return str(rounded.quantize(Decimal(10) ** -places, ROUND_HALF_UP))


# METHOD 8: 70B, 128,000 tokens, 4 H100, t0 = 0.15 s, efficiencies 0.55 and 0.40; reuse 0, 50, 90, 100 %
@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        (NO_CACHE, ["22.0", "22.0", "22.0", "22.0"]),
        (AVERAGE, ["22.0", "17.1", "8.3", "5.4"]),
        (FAST, ["22.0", "14.7", "3.9", "0.57"]),
        (Backend("40", "storage", 40e9), ["22.0", "15.0", "4.5", "1.20"]),
        (DRAM, ["22.0", "14.6", "3.8", "0.36"]),
        (LOWER_BOUND, ["22.0", "14.5", "3.6", "0.15"]),
    ],
)
def test_the_methods_table_of_first_tokens_is_reproduced(backend: Backend, expected: list[str]) -> None:
    found = [ttft_seconds(law(), backend, KV_70B, 128_000, reuse) for reuse in (0.0, 0.5, 0.9, 1.0)]
    places = [len(each.partition(".")[2]) for each in expected]
    assert [printed(each, digits) for each, digits in zip(found, places, strict=True)] == expected


def giga_bytes(kv: float, prefix: float, law: Law) -> float:
    return break_even_bandwidth(law, kv, prefix) / 1e9


# METHOD 8: GB/s at the prior medians, and at the ends of the efficiencies
@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("8b", 1, ["4.3 3.2-5.5", "3.8 2.8-4.9", "2.6 1.9-3.4", "1.2 0.9-1.5"]),
        ("8b", 4, ["17.4 12.6-22.2", "15.1 11.0-19.4", "10.3 7.6-13.6", "4.6 3.4-6.2"]),
        ("8b", 8, ["34.8 25.3-44.3", "30.1 22.0-38.8", "20.7 15.2-27.2", "9.2 6.8-12.4"]),
        ("70b", 1, ["1.3 0.9-1.6", "1.2 0.8-1.5", "0.9 0.7-1.2", "0.5 0.4-0.6"]),
        ("70b", 4, ["5.0 3.6-6.4", "4.6 3.3-5.9", "3.6 2.6-4.7", "1.9 1.4-2.6"]),
        ("70b", 8, ["10.0 7.3-12.7", "9.2 6.7-11.8", "7.2 5.3-9.3", "3.8 2.8-5.1"]),
    ],
)
def test_the_methods_break_even_bandwidths_are_reproduced(name: str, gpus: int, expected: list[str]) -> None:
    kv, parameters = (KV_8B, 8.03e9) if name == "8b" else (KV_70B, 70.6e9)
    laws = LawRange(
        *(law(f"llama-3.1-{name}", gpus, each, parameters=parameters) for each in (PRIOR, PRIOR_SLOW, PRIOR_FAST))
    )
    found = []
    for prefix in (1000, 8000, 32_000, 128_000):
        low, point, high = (printed(each) for each in laws.estimate(partial(giga_bytes, kv, prefix)))
        found.append(f"{point} {low}-{high}")
    assert found == expected


# kappa Pi g eta / 2P = 327,680 x 4 x 989.4e12 x 0.55 / (2 x 70.6e9)
def test_the_limit_of_short_prefixes_is_that_of_the_matrices_alone() -> None:
    assert break_even_bandwidth(law(), KV_70B, 1) == pytest.approx(5.0514e9, rel=1e-4)
    assert marginal_break_even_bandwidth(law(), KV_70B, 0.5) == pytest.approx(5.0514e9, rel=1e-4)


# kappa / (2P/(g Pi eta) + A r/(g Pi eta_a)): at 128,000 tokens 327,680 / (64.868 + 211.98 us)
def test_the_last_token_of_a_prefix_breaks_even_earlier_than_the_whole() -> None:
    assert marginal_break_even_bandwidth(law(), KV_70B, 128_000) == pytest.approx(1.1836e9, rel=1e-3)


# 0.5722 s of prefill at 8,000 tokens, 2.917 at 32,000, 21.87 at 128,000; a tenth of the whole, less t0
@pytest.mark.parametrize(
    ("prompt", "t0", "expected"),
    [
        (128_000, 0.15, "20.4"),
        (128_000, 0.05, "19.6"),
        (32_000, 0.15, "66.7"),
        (32_000, 0.05, "42.4"),
        (8000, 0.05, "216.3"),
    ],
)
def test_the_bandwidth_of_a_tenfold_is_that_of_the_method(prompt: int, t0: float, expected: str) -> None:
    # the method says 67 and 215 for two of them: it leaves the one token out that is always computed
    found = bandwidth_for(law(t0=t0), KV_70B, prompt)
    assert found is not None
    assert f"{found / 1e9:.1f}" == expected


def test_eight_thousand_tokens_never_get_ten_times_faster_behind_a_slow_front() -> None:
    assert first_token_seconds_for(law(), 8000) == pytest.approx(0.0635, abs=0.00005)
    assert bandwidth_for(law(t0=0.15), KV_70B, 8000) is None
    assert bandwidth_for(law(t0=0.064), KV_70B, 8000) is None
    assert bandwidth_for(law(t0=0.063), KV_70B, 8000) is not None


def test_average_storage_is_slower_than_computing_on_eight_gpus_at_short_prompts() -> None:
    def ratio(gpus: int, prompt: int) -> str:
        none, full = (ttft_seconds(law(gpus=gpus), AVERAGE, KV_70B, prompt, reuse) for reuse in (0.0, 1.0))
        return f"{none / full:.1f}"

    assert [ratio(4, prompt) for prompt in (8000, 32_000, 128_000)] == ["1.5", "2.1", "4.1"]
    assert (ratio(8, 8000), ratio(8, 128_000)) == ("0.9", "2.1")


def test_average_storage_gains_tenfold_on_less_than_two_gpus_only() -> None:
    assert f"{gpus_for(law(t0=0.05), AVERAGE, KV_70B, 128_000, 4):.2f}" == "1.65"


# IBM: "almost 20 seconds" for 128,000 tokens on 4 H100
def test_the_published_anchor_lies_between_the_efficiencies() -> None:
    even = law(efficiency=Efficiency(0.5, 0.5))
    assert even.prefill_seconds(128_000, 0) == pytest.approx(20.0, abs=0.05)


def test_the_packaged_law_takes_all_active_parameters_and_a_calibrated_one_the_linear_ones() -> None:
    llama = shape("llama-3.1-70b")
    active, linear = law(parameters="active"), law(parameters="linear")
    assert active.token_seconds / linear.token_seconds == pytest.approx(
        llama.total_parameters / llama.linear_parameters
    )
    assert active == law(parameters=float(llama.total_parameters))


def test_eight_bit_weights_multiply_twice_as_fast_but_attention_does_not() -> None:
    gpu = gpu_of("H200")
    assert gpu is not None
    config = json.loads((CONFIGS / "llama-3.1-8b.json").read_text(encoding="utf-8"))
    plain, narrow = (
        roofline(shape_of(config, quantization=quantization), gpu, 1, first_token_seconds=0)
        for quantization in (None, "fp8")
    )
    assert narrow.token_seconds == plain.token_seconds / 2
    assert narrow.product_seconds == plain.product_seconds


# 80 layers x 2 x (10 us a step + 2 x 2 x 8192 B x 3/4 / 350 GB/s a token), two steps of at most 8192 tokens
def test_all_reduces_are_counted_where_they_are_asked_for() -> None:
    without, counted = law(), law(has_all_reduce=True)
    more = counted.prefill_seconds(10_000, 0) - without.prefill_seconds(10_000, 0)
    assert more == pytest.approx(160 * (2 * 10e-6 + 10_000 * 32_768 * 0.75 / 350e9))
    assert law(gpus=1, has_all_reduce=True) == law(gpus=1)


def test_a_load_that_overlaps_hides_behind_the_prefill() -> None:
    computing = law().prefill_seconds(128_000, 0.5 * 127_999)
    hidden = ttft_seconds(law(), FAST, KV_70B, 128_000, 0.5, overlaps=True)
    assert hidden == pytest.approx(0.15 + computing)
    at_once = ttft_seconds(law(), AVERAGE, KV_70B, 128_000, 1.0, overlaps=True)
    assert at_once == pytest.approx(0.15 + 327_680 * 127_999 / 8e9)


def test_the_latency_of_a_store_is_paid_by_requests_that_load() -> None:
    store = Backend("far", "storage", 1e9, latency_seconds=0.2)
    assert load_seconds(store, 1000.0, 0) == 0
    assert load_seconds(store, 1000.0, 10**6) == pytest.approx(1.2)


def test_an_estimate_spans_the_laws_whichever_way_the_figure_runs() -> None:
    laws = LawRange(Roofline(2, 0, 0), Roofline(4, 0, 0), Roofline(1, 0, 0))
    assert laws.estimate(lambda law: law.prefill_seconds(1, 0)) == Estimate(1, 2, 4)
    assert laws.estimate(lambda law: 1 / law.prefill_seconds(1, 0)) == Estimate(0.25, 0.5, 1)


laws = st.builds(
    Roofline,
    st.floats(1e-7, 1e-2),
    st.floats(0, 1e-8),
    st.floats(0, 1),
    st.just(0.0),
    st.just(0.0),
)
prompts = st.integers(2, 10**6)
kv_bytes = st.floats(1e3, 1e7)
shares = st.floats(0, 1)
bandwidths = st.floats(1e8, 1e13)


@given(laws, kv_bytes, prompts, shares, st.tuples(bandwidths, bandwidths))
def test_more_bandwidth_is_never_slower(
    law: Roofline, kv: float, prompt: int, reuse: float, pair: tuple[float, float]
) -> None:
    slow, fast = sorted(pair)
    for overlaps in (False, True):
        times = [
            ttft_seconds(law, Backend("", "storage", each), kv, prompt, reuse, overlaps=overlaps)
            for each in (slow, fast, math.inf)
        ]
        assert times[0] >= times[1] >= times[2]


@given(laws, kv_bytes, prompts, st.tuples(shares, shares), st.floats(1, 100))
def test_more_reuse_is_never_slower_where_bandwidth_is_above_break_even(
    law: Roofline, kv: float, prompt: int, pair: tuple[float, float], more: float
) -> None:
    store = Backend("", "storage", break_even_bandwidth(law, kv, 1) * more * 1.0001)
    # whole tokens: the first half of a token attends to less than its second, and saves less
    low, high = sorted(round(share * (prompt - 1)) / (prompt - 1) for share in pair)
    least, most = (ttft_seconds(law, store, kv, prompt, reuse) for reuse in (high, low))
    assert least <= most * (1 + 1e-9)


@given(laws, kv_bytes, prompts)
def test_loading_at_the_break_even_bandwidth_takes_as_long_as_computing(law: Roofline, kv: float, prompt: int) -> None:
    store = Backend("", "storage", break_even_bandwidth(law, kv, prompt - 1))
    with_store = ttft_seconds(law, store, kv, prompt, 1.0)
    assert with_store == pytest.approx(ttft_seconds(law, NO_CACHE, kv, prompt, 1.0), rel=1e-9)


@given(laws, kv_bytes, prompts, st.tuples(st.floats(1.5, 50), st.floats(0, 0.1)), st.booleans())
def test_at_the_bandwidth_of_a_tenfold_a_request_is_ten_times_faster(
    law: Roofline, kv: float, prompt: int, pair: tuple[float, float], overlaps: bool
) -> None:
    factor, latency = pair
    found = bandwidth_for(law, kv, prompt, factor=factor, latency_seconds=latency, overlaps=overlaps)
    none = ttft_seconds(law, NO_CACHE, kv, prompt, 0.0)
    if found is None:
        bound = ttft_seconds(law, Backend("", "bound", math.inf, latency), kv, prompt, 1.0, overlaps=overlaps)
        assert none / bound <= factor * (1 + 1e-6)
    else:
        full = ttft_seconds(law, Backend("", "storage", found, latency), kv, prompt, 1.0, overlaps=overlaps)
        assert none / full == pytest.approx(factor, rel=1e-6)


@given(laws, kv_bytes, prompts, bandwidths)
def test_with_that_many_gpus_full_reuse_is_ten_times_faster(
    law: Roofline, kv: float, prompt: int, bandwidth: float
) -> None:
    store = Backend("", "storage", bandwidth)
    gpus = gpus_for(law, store, kv, prompt, 4)
    if gpus <= 0:
        return
    scaled = law._replace(token_seconds=law.token_seconds * 4 / gpus, product_seconds=law.product_seconds * 4 / gpus)
    ratio = ttft_seconds(scaled, store, kv, prompt, 0.0) / ttft_seconds(scaled, store, kv, prompt, 1.0)
    assert ratio == pytest.approx(10, rel=1e-6)


@given(laws, prompts, shares)
def test_a_prefix_and_the_rest_make_the_whole_prefill(law: Roofline, prompt: int, share: float) -> None:
    reused = share * (prompt - 1)
    parts = law.prefill_seconds(reused, 0) + law.prefill_seconds(prompt, reused)
    assert parts == pytest.approx(law.prefill_seconds(prompt, 0), rel=1e-9)
