from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.replica_rows import described, observed, people, round_machine, row, told

from kvtally.agent.steplaw.mfu import coupling_share
from kvtally.agent.steplaw.series import series_of
from kvtally.agent.steplaw.windows import Windows

MACHINE = round_machine(token_budget=30_000, attention_flop=1e6)
WHOLE = Windows(np.array([0]), np.array([1]), np.zeros(1), np.zeros(1, dtype=bool))
# prompts of 2,000 and 20,000 tokens of which 1,000 and 10,000 are computed, in one chunk each
PROMPTS = [2000.0, 20_000.0]
TOGETHER = people(PROMPTS, [1000.0, 10_000.0])
APART = people(PROMPTS, [0.0, 11_000.0])  # 2,000 and 9,000
# an engine counts a chunk as tokens x context at its end: 1,000 x 2,000 + 10,000 x 20,000 and 2,000^2 + 9,000 x 20,000
LONG, SHORT = 202e6, 184e6
LINEAR = 11_000 * 1e10  # FLOP of the computed tokens


def share(
    gflop: float | None,
    *,
    gpus: int = 1,
    generated: int = 0,
    decodes: float = 0.0,
    context: float = 0.0,
    steps: int = 2,
) -> float | None:
    """The share that a counter shows; it counts one GPU's part."""
    machine = MACHINE._replace(gpus=gpus)
    one = row(0, 10, first_tokens=2, prompt_tokens=22_000, computed_tokens=11_000, generated_tokens=generated)
    if gflop is not None:
        one = told(one, estimated_gflop=round(gflop / gpus))
    seen = described(1, first=2.0, steps=float(steps), decodes=decodes, context=context)
    return coupling_share(
        machine,
        series_of(observed([one])),
        WHOLE,
        told=seen,
        window=np.zeros(1, dtype=np.intp),
        populations=(TOGETHER, TOGETHER, APART),
    )


def gflop(products: float, more: float = 0.0) -> float:
    """What a counter shows of so many products (1e6 FLOP each), the computed tokens, and more FLOP."""
    return (products * 1e6 + LINEAR + more) / 1e9


def test_attention_as_of_long_prompts_that_compute_much_is_all_together() -> None:
    assert share(gflop(LONG)) == pytest.approx(1, abs=1e-3)


def test_attention_as_of_long_prompts_that_compute_little_is_all_apart() -> None:
    assert share(gflop(SHORT)) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("position", [0.25, 0.5, 0.9])
def test_attention_between_the_two_lies_between_them(position: float) -> None:
    assert share(gflop(SHORT + position * (LONG - SHORT))) == pytest.approx(position, abs=1e-3)


def test_what_the_counter_gets_wrong_leaves_no_share_beyond_the_two() -> None:
    assert share(gflop(3 * LONG)) == 1
    assert share(gflop(0)) == 0


def test_every_gpu_counts_its_own_part() -> None:
    assert share(gflop(SHORT + 0.5 * (LONG - SHORT)), gpus=4) == pytest.approx(0.5, abs=1e-3)


def test_decodes_are_taken_off() -> None:
    # 500 steps of 4 decodes that read 12,000 tokens of context: 2,000 tokens, 6e6 products; 2,002 tokens of output
    # each pass the output matrix, 2 x 128,256 x 1,000 FLOP
    head = 2.0 * 128_256 * 1000
    more = 2000 * 1e10 + 6e6 * 1e6 + 2002 * head
    middle = SHORT + 0.5 * (LONG - SHORT)
    found = share(gflop(middle, more), generated=2002, decodes=4.0, context=12_000.0, steps=500)
    assert found == pytest.approx(0.5, abs=2e-3)
    assert share(gflop(middle, more)) == 1


def test_an_engine_without_the_counter_tells_no_share() -> None:
    assert share(None) is None
    assert share(0) is None


def test_prompts_that_leave_nothing_open_have_no_share() -> None:
    one = told(row(0, 10, first_tokens=1, computed_tokens=9000), estimated_gflop=gflop_of_nothing_open())
    alone = people([20_000.0], [11_000.0])
    found = coupling_share(
        MACHINE,
        series_of(observed([one])),
        WHOLE,
        told=described(1, first=1.0, steps=1.0),
        window=np.zeros(1, dtype=np.intp),
        populations=(alone, alone, alone),
    )
    assert found is None


def gflop_of_nothing_open() -> int:
    return round((9000 * 1e10 + 180e6 * 1e6) / 1e9)


@settings(deadline=None)
@given(st.floats(0, 1e6))
def test_a_share_is_one_or_none(shown: float) -> None:
    found = share(shown)
    assert found is None or 0 <= found <= 1
