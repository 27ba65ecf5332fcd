from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.timeline import Span, Timeline


def test_the_amount_over_a_span_is_the_share_of_what_accrued_evenly_in_it() -> None:
    line = Timeline([Span(0, 10, 20.0), Span(10, 20, 5.0)])
    assert line.over(0, 10) == 20
    assert line.over(5, 10) == 10
    assert line.over(5, 15) == 12.5
    assert line.over(0, 20) == 25


def test_spans_may_come_in_any_order() -> None:
    assert Timeline([Span(10, 20, 5.0), Span(0, 10, 20.0)]).over(5, 15) == 12.5


def test_what_is_not_known_is_scaled_up_from_what_is() -> None:
    line = Timeline([Span(0, 10, 20.0), Span(15, 20, 5.0)])
    assert line.over(0, 20) == pytest.approx(25 * 20 / 15)
    assert line.over(5, 15) == 20  # 10 over a half that is known


def test_a_span_of_which_less_than_half_is_known_is_unknown() -> None:
    line = Timeline([Span(10, 20, 5.0)])
    assert line.over(0, 20) == 10
    assert line.over(0, 21) is None
    assert line.over(0, 21, least_known=0.4) == pytest.approx(10.5)
    assert line.over(0, 10) is None
    assert line.over(20, 30) is None
    assert Timeline([]).over(0, 10) is None


def test_nothing_accrues_in_no_time() -> None:
    line = Timeline([Span(0, 10, 20.0)])
    assert line.over(5, 5) is None
    assert line.over(5, 5, least_known=0.0) is None


def test_where_spans_overlap_the_earlier_one_counts_and_the_later_keeps_its_share() -> None:
    line = Timeline([Span(0, 10, 20.0), Span(5, 15, 40.0)])
    assert line.over(0, 10) == 20
    assert line.over(10, 15) == 20
    assert line.over(0, 15) == 40


@pytest.mark.parametrize("inner", [Span(2, 8, 99.0), Span(0, 10, 99.0), Span(5, 5, 99.0), Span(7, 6, 99.0)])
def test_a_span_within_another_or_of_no_length_adds_nothing(inner: Span) -> None:
    assert Timeline([Span(0, 10, 20.0), inner]).over(0, 10) == 20


@given(
    st.lists(st.tuples(st.integers(0, 200), st.integers(1, 50), st.floats(0, 1e6)), max_size=8),
    st.integers(0, 250),
    st.integers(1, 50),
)
def test_the_answer_is_the_mean_rate_of_the_known_instants_times_the_length(
    drawn: list[tuple[int, int, float]], start_ns: int, length_ns: int
) -> None:
    spans = [Span(start, start + length, amount) for start, length, amount in drawn]
    rate: list[float | None] = [None] * 400
    for span in sorted(spans):
        for at in range(span.start_ns, span.end_ns):
            if rate[at] is None:
                rate[at] = span.amount / (span.end_ns - span.start_ns)
    known = [one for one in rate[start_ns : start_ns + length_ns] if one is not None]
    answer = Timeline(spans).over(start_ns, start_ns + length_ns)
    if known and 2 * len(known) >= length_ns:
        assert answer == pytest.approx(sum(known) / len(known) * length_ns, rel=1e-9, abs=1e-9)
    else:
        assert answer is None
