from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvtally.agent.split import (
    DISCREPANCY,
    LEAST_SLICES,
    WIDEST,
    Z90,
    Slice,
    Split,
    fit,
    lent,
    merged,
)

SECOND = 1_000_000_000
STEP_NS, TOKEN_NS = 10e6, 20e3  # 10 ms a step, 20 us a computed token


def slices(
    count: int, length_ns: int = 15 * SECOND, step_ns: float = STEP_NS, token_ns: float = TOKEN_NS
) -> list[Slice]:
    """Slices of a varied load that follow the law exactly."""
    chance = random.Random(11)
    varied = [(chance.randrange(1, 200), chance.choice([0, 0, chance.randrange(1, 90_000)])) for _ in range(count)]
    return [Slice(length_ns, step_ns * steps + token_ns * tokens, steps, tokens) for steps, tokens in varied]


def share(pieces: list[Slice], step_ns: float = STEP_NS, token_ns: float = TOKEN_NS) -> float:
    prefill = token_ns * sum(piece.computed_tokens for piece in pieces)
    return prefill / (prefill + step_ns * sum(piece.steps for piece in pieces))


def test_pieces_are_joined_until_they_are_long_enough_and_a_rest_joins_the_last() -> None:
    pieces = [Slice(3, 1.0, 2, 10), Slice(3, 1.5, 3, 20), Slice(9, 4.0, 1, 0), Slice(1, 0.5, 1, 5)]
    assert merged(pieces, 5) == [Slice(6, 2.5, 5, 30), Slice(10, 4.5, 2, 5)]
    assert merged(pieces, 1) == pieces
    assert merged(pieces, 16) == [Slice(16, 7.0, 7, 35)]
    assert merged(pieces, 17) == []


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=20),
    st.integers(1, 20),
)
def test_joining_loses_nothing_once_there_is_one_slice(drawn: list[tuple[int, int, int]], slice_ns: int) -> None:
    pieces = [Slice(length, float(steps), steps, tokens) for length, steps, tokens in drawn]
    found = merged(pieces, slice_ns)
    assert all(one.length_ns >= slice_ns for one in found)
    if found:
        # a trailing piece of no length tells of no time, and is no rest
        ends = len(pieces)
        while pieces[ends - 1].length_ns == 0:
            ends -= 1
        for at in (0, 2, 3):
            assert sum(one[at] for one in found) in {
                sum(one[at] for one in pieces[:end]) for end in range(ends, len(pieces) + 1)
            }
    else:
        assert sum(one.length_ns for one in pieces) < slice_ns


@given(st.floats(1e5, 1e8), st.floats(1e2, 1e6), st.integers(LEAST_SLICES, 40))
def test_the_law_is_recovered_from_slices_that_follow_it(step_ns: float, token_ns: float, count: int) -> None:
    pieces = slices(count, step_ns=step_ns, token_ns=token_ns)
    law = fit(pieces)
    truth = share(pieces, step_ns, token_ns)
    assert law is not None
    assert law.step_ns == pytest.approx(step_ns, rel=1e-5)
    assert law.token_ns == pytest.approx(token_ns, rel=1e-5)
    assert law.point == pytest.approx(truth, abs=1e-6)
    assert law.slices == count
    # without scatter, what is left is what a law of two costs cannot say
    half = Z90 * DISCREPANCY * truth * (1 - truth)
    assert law.high - law.low == pytest.approx(2 * half, abs=1e-5)
    assert 0 <= law.low <= law.point <= law.high <= 1


def test_the_interval_is_that_of_least_squares_and_of_what_the_law_cannot_say() -> None:
    chance = random.Random(2)
    pieces = [one._replace(working_ns=one.working_ns * chance.uniform(0.7, 1.3)) for one in slices(20)]
    law = fit(pieces)
    assert law is not None
    rest = [one.working_ns - law.step_ns * one.steps - law.token_ns * one.computed_tokens for one in pieces]
    variance = sum(one**2 for one in rest) / (20 - 2)  # two costs were fitted
    ss = sum(one.steps**2 for one in pieces)
    tt = sum(one.computed_tokens**2 for one in pieces)
    st_ = sum(one.steps * one.computed_tokens for one in pieces)
    determinant = ss * tt - st_**2
    # how the share moves with each cost, by moving it
    by_step = (share(pieces, law.step_ns + 1, law.token_ns) - share(pieces, law.step_ns - 1, law.token_ns)) / 2
    by_token = (
        share(pieces, law.step_ns, law.token_ns + 0.01) - share(pieces, law.step_ns, law.token_ns - 0.01)
    ) / 0.02
    noise = variance / determinant * (by_step**2 * tt + by_token**2 * ss - 2 * by_step * by_token * st_)
    half = 1.645 * math.sqrt(noise + (0.15 * law.point * (1 - law.point)) ** 2)
    assert noise > 0.0002
    assert (law.low, law.high) == pytest.approx((law.point - half, law.point + half), rel=1e-4)


def test_too_few_slices_carry_no_law() -> None:
    assert fit(slices(8)) is not None
    assert fit(slices(7)) is None
    assert fit([]) is None


def test_slices_in_which_nothing_was_done_are_not_counted() -> None:
    nothing = [Slice(15 * SECOND, 0.0, 0, 0)] * 20
    law = fit(slices(LEAST_SLICES) + nothing)
    assert law is not None
    assert law.slices == LEAST_SLICES
    assert fit(slices(LEAST_SLICES - 1) + nothing) is None
    assert fit(nothing) is None


@pytest.mark.parametrize(
    ("seconds", "count"),
    [
        (200, 13),  # of 15 s
        (180, 12),
        (179, 17),  # of 10 s: only 11 of 15 s
        (120, 12),
        (119, 14),  # of 8 s
        (96, 12),
        (95, 15),  # of 6 s
        (72, 12),
        (71, 17),  # of 4 s
        (48, 12),
        (47, 23),  # of 2 s
        (20, 10),  # all that there are
    ],
)
def test_slices_are_as_long_as_leaves_enough_of_them(seconds: int, count: int) -> None:
    law = fit(slices(seconds, SECOND))
    assert law is not None
    assert law.slices == count


def test_a_time_too_short_for_enough_slices_has_no_law() -> None:
    assert fit(slices(15, SECOND)) is None


def test_steps_and_tokens_that_move_together_tell_neither_cost() -> None:
    together = [Slice(15 * SECOND, 1e9 * size, 10 * size, 1000 * size) for size in range(1, 30)]
    assert fit(together) is None
    nearly = [one._replace(steps=one.steps + number % 2) for number, one in enumerate(together)]
    assert fit(nearly) is None


@pytest.mark.parametrize(("steps", "tokens"), [(1, 0), (0, 1)])
def test_a_load_of_one_kind_only_tells_no_share(steps: int, tokens: int) -> None:
    assert fit([Slice(15 * SECOND, 1e9 * size, steps * size, tokens * size) for size in range(1, 30)]) is None


def test_costs_that_come_out_negative_are_no_law() -> None:
    # the more tokens, the less work
    assert fit([one._replace(working_ns=STEP_NS * one.steps - 1e3 * one.computed_tokens) for one in slices(20)]) is None
    # the more steps, the less work
    odd = [one._replace(working_ns=max(0.0, 1e6 * one.computed_tokens - 1e6 * one.steps)) for one in slices(20)]
    assert fit(odd) is None


def test_work_that_the_law_does_not_describe_has_no_share() -> None:
    chance = random.Random(7)
    # a device that works for others most of the time
    assert fit([one._replace(working_ns=chance.choice([0.0, 0.0, 0.0, 1e12])) for one in slices(60)]) is None
    # however many slices there are to average: half of the work is chance
    torn = [one._replace(working_ns=one.working_ns * chance.choice([0, 2])) for one in slices(2000)]
    assert fit(torn) is None
    law = fit([one._replace(working_ns=one.working_ns * chance.choice([0.7, 1.3])) for one in slices(2000)])
    assert law is not None
    assert law.point == pytest.approx(share(slices(2000)), abs=0.02)


def test_a_share_that_could_be_almost_anything_is_no_figure() -> None:
    # nearly collinear, with scatter: the fit is good, its parts are not
    chance = random.Random(3)
    pieces = [
        Slice(15 * SECOND, 1e9 * size * chance.uniform(0.9, 1.1), 10 * size, 1000 * size + 900 * (size % 3))
        for size in range(1, 12)
    ]
    assert fit(pieces) is None


def test_a_saturated_engine_has_a_law_though_all_its_slices_are_full() -> None:
    chance = random.Random(5)
    pieces = []
    for _ in range(30):
        tokens = chance.randrange(0, 500_000, 1000)
        steps = round((15e9 - TOKEN_NS * tokens) / STEP_NS)
        pieces.append(Slice(15 * SECOND, 15e9, steps, tokens))
    law = fit(pieces)
    assert law is not None
    assert law.point == pytest.approx(share(pieces), abs=0.01)


def noisy(seed: int) -> tuple[list[Slice], float]:
    """A simulated engine: a bursty load, with work that scatters and tokens that land in the slice after their work."""
    chance = random.Random(seed)
    step_ns, token_ns = chance.uniform(5e6, 30e6), chance.uniform(10e3, 200e3)
    pieces, late, prefill, decode = [], 0, 0.0, 0.0
    for _ in range(chance.randrange(60, 240)):
        steps = chance.randrange(0, 100)
        tokens = chance.choice([0, 0, chance.randrange(100, 8000)])
        spill = tokens // 10 if chance.random() < 0.3 else 0
        worked = step_ns * steps * chance.gauss(1, 0.1) + token_ns * tokens * chance.gauss(1, 0.15)
        pieces.append(Slice(SECOND, max(0.0, worked), steps, tokens - spill + late))
        late = spill
        prefill += token_ns * tokens
        decode += step_ns * steps
    return pieces, prefill / (prefill + decode)


def test_the_interval_of_a_noisy_engine_holds_the_truth_as_often_as_it_claims() -> None:
    held = fitted = 0
    for seed in range(300):
        pieces, truth = noisy(seed)
        law = fit(pieces)
        if law is None:
            continue
        assert 0 <= law.low <= law.point <= law.high <= 1
        fitted += 1
        held += law.low <= truth <= law.high
    assert fitted > 200
    assert held >= 0.85 * fitted


@given(
    st.lists(
        st.tuples(st.integers(0, 20 * SECOND), st.floats(0, 1e12), st.integers(0, 10**5), st.integers(0, 10**7)),
        max_size=40,
    )
)
def test_whatever_the_slices_a_share_lies_in_its_interval_and_that_between_0_and_1(
    drawn: list[tuple[int, float, int, int]],
) -> None:
    law = fit([Slice(*one) for one in drawn])
    if law is not None:
        assert 0 <= law.low <= law.point <= law.high <= 1
        assert law.high - law.low <= 2 * WIDEST
        assert min(law.step_ns, law.token_ns) > 0
        assert law.slices >= LEAST_SLICES


LAW = Split(0.4, 0.5, 0.6, STEP_NS, TOKEN_NS, 20)


def test_a_lent_law_gives_the_share_of_the_work_that_it_is_lent_to() -> None:
    # 100 steps of 10 ms and 150,000 tokens of 20 us: 1 s and 3 s
    found = lent(LAW, 100, 150_000)
    assert found is not None
    assert found.point == pytest.approx(0.75)
    # odds 2/3, 1 and 3/2 times odds of 3: 2, 3 and 4.5
    assert (found.low, found.high) == pytest.approx((2 / 3, 9 / 11))
    assert found[3:] == LAW[3:]


def test_a_lent_law_for_the_same_mix_is_the_law() -> None:
    found = lent(LAW, 2, 1000)
    assert found is not None
    assert found[:3] == pytest.approx(LAW[:3])


def test_work_of_one_kind_needs_no_law_to_be_split() -> None:
    wide = LAW._replace(low=0.0, high=1.0)
    for law in (LAW, wide):
        only_decode, only_prefill = lent(law, 5, 0), lent(law, 0, 5)
        assert only_decode is not None
        assert only_prefill is not None
        assert only_decode[:3] == (0.0, 0.0, 0.0)
        assert only_prefill[:3] == (1.0, 1.0, 1.0)


def test_no_work_has_no_share() -> None:
    assert lent(LAW, 0, 0) is None


@given(
    st.floats(0.001, 0.999),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 10**9),
    st.integers(0, 10**9),
)
def test_a_lent_share_lies_in_its_interval_and_that_between_0_and_1(
    point: float, below: float, above: float, steps: int, tokens: int
) -> None:
    law = Split(point * below, point, point + (1 - point) * above, STEP_NS, TOKEN_NS, 20)
    assume(law.high <= 1)
    found = lent(law, steps, tokens)
    if found is not None:
        assert not any(map(math.isnan, found))
        assert -1e-9 <= found.low <= found.point + 1e-9
        assert found.point - 1e-9 <= found.high <= 1 + 1e-9
