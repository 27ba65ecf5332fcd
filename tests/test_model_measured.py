from __future__ import annotations

import pytest

from kvtally.agent.forward import LawRange, Roofline
from kvtally.agent.model_report.measured import (
    MOST_LENGTHS,
    MOST_ROWS,
    Point,
    client_seconds,
    lengths_of,
    measured_rows,
    near,
    points_of,
)
from kvtally.agent.steplaw.alone import Alone

# 10 us a token, 5 to 20, and 10 ms of each request
LAWS = LawRange(Roofline(10e-6, 0, 0.01), Roofline(20e-6, 0, 0.01), Roofline(5e-6, 0, 0.01))


def seen(prompt: float, reused: float, seconds: float, outer: float | None = 0.0, copies: float = 0.0) -> Alone:
    return Alone(prompt, reused, outer, seconds, copies)


def at_engine(*requests: Alone) -> list[Point]:
    return points_of("engine", requests, LAWS, stalls=True)


def test_a_point_stands_beside_what_each_law_says() -> None:
    (row,) = measured_rows(at_engine(seen(10_001, 5000.5, 0.05)))
    # 0.01 + 5,000 x 5, 10, 20 us
    assert row["predicted_seconds"] == pytest.approx({"low": 0.035, "point": 0.06, "high": 0.11}, rel=1e-3)
    assert (row["reuse"], row["seconds"]["point"], row["requests"]) == (pytest.approx(0.5, abs=1e-3), 0.05, 1)
    assert row["error"] == pytest.approx(0.2, rel=1e-3)
    assert (row["basis"], row["predicted_basis"], row["seen_by"]) == ("MEASURED", "MODELLED", "engine")


def test_copies_are_added_where_they_stall_the_prefill() -> None:
    request = seen(1000, 0, 0.1, copies=0.05)
    stalled, behind = (points_of("engine", [request], LAWS, stalls=stalls)[0].predicted[1] for stalls in (True, False))
    assert stalled - behind == pytest.approx(0.05)


def test_alike_requests_are_a_row_with_their_median() -> None:
    rows = measured_rows(at_engine(*(seen(1000 + 10 * at, 0, seconds) for at, seconds in enumerate((9.0, 0.02, 0.03)))))
    assert [(row["requests"], row["seconds"]) for row in rows] == [(3, {"low": 0.02, "point": 0.03, "high": 9.0})]
    assert rows[0]["prompt_tokens"] == 1010


def test_lengths_reuse_tier_and_observer_are_kept_apart() -> None:
    requests = [
        seen(1000, 0, 1),
        seen(2000, 0, 1),
        seen(2000, 1000, 1),
        seen(2000, 1000, 1, outer=1000),
        seen(2000, 1000, 1, outer=400),
        seen(2000, 1000, 1, outer=None),
    ]
    rows = measured_rows(at_engine(*requests) + points_of("client", requests[:1], LAWS, stalls=True))
    assert [(row["prompt_tokens"], row["tier"], row["seen_by"]) for row in rows] == [
        (1000, "none", "client"),
        (1000, "none", "engine"),
        (2000, "none", "engine"),
        (2000, "both", "engine"),
        (2000, "hbm", "engine"),
        (2000, "outer", "engine"),
        (2000, "unknown", "engine"),
    ]


def test_what_reuse_saved_is_told_against_requests_without_any() -> None:
    rows = measured_rows(at_engine(seen(10_001, 0, 0.2), seen(10_001, 5000, 0.12), seen(20_001, 10_000, 0.3)))
    assert rows[0]["saved"] is None
    # 5,000 x 10 us of 80 ms
    assert rows[1]["saved"] == pytest.approx({"seconds": 0.08, "predicted_seconds": 0.05, "error": -0.375})
    assert rows[2]["saved"] is None  # nobody of that length reused nothing


def test_a_saving_of_nothing_has_no_error() -> None:
    rows = measured_rows(at_engine(seen(10_001, 0, 0.1), seen(10_001, 5000, 0.1)))
    assert rows[1]["saved"]["error"] is None


def test_many_lengths_and_shares_are_told_more_coarsely() -> None:
    requests = [seen(500 * 1.07**at, 500 * 1.07**at * (at * 37 % 100) / 100, 0.1) for at in range(150)]
    rows = measured_rows(at_engine(*requests))
    assert 10 < len(rows) <= MOST_ROWS
    assert sum(row["requests"] for row in rows) == 150


def test_a_request_that_computed_nothing_is_no_point() -> None:
    assert at_engine(seen(1000, 1000, 0.1)) == []
    assert measured_rows([]) == []


def test_the_lengths_with_most_levels_of_reuse_are_drawn() -> None:
    requests = [seen(8000, 8000 * share, 0.1) for share in (0, 0.5, 0.9)] + [
        seen(30_000, 0, 0.1),
        seen(30_000, 15_000, 1),
    ]
    rows = measured_rows(at_engine(*requests, seen(100, 0, 0.1)))
    assert lengths_of(rows) == (8000, 30_000)
    assert len(near(rows, 8000)) == 3
    assert near(rows, 20_000) == []


def test_where_nothing_was_reused_the_longest_prompt_is_drawn() -> None:
    assert lengths_of(measured_rows(at_engine(seen(8000, 0, 0.1), seen(30_000, 0, 0.1)))) == (30_000,)
    assert lengths_of([]) == ()


def test_no_more_panels_than_a_page_holds() -> None:
    requests = [seen(1000 * 2**at, 500 * 2**at * level, 0.1) for at in range(8) for level in (0, 1)]
    assert len(lengths_of(measured_rows(at_engine(*requests)))) == MOST_LENGTHS


# a client's 0.15, 0.17 and 0.90 s against 0.11 s of the law
def test_what_a_client_sees_beyond_the_law_is_a_median() -> None:
    clients = points_of("client", [seen(10_000, 0, each) for each in (0.15, 0.17, 0.90)], LAWS, stalls=True)
    assert client_seconds([*clients, *at_engine(seen(10_000, 0, 5.0))]) == pytest.approx(0.06)
    assert client_seconds(at_engine(seen(10_000, 0, 5.0))) is None
