from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.replica_rows import SECOND, Asked, observed, round_machine, row

from kvtally.agent.observed import CacheSpan
from kvtally.agent.request_log import Request
from kvtally.agent.steplaw.alone import Alone, at_client, at_engine
from kvtally.agent.steplaw.series import series_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.steplaw.series import Series

COLD = Asked(2000, prefill_seconds=0.5)
WARM = Asked(3000, hbm=1000, outer=500, prefill_seconds=0.4)
FOREVER = (0, 1000 * SECOND)


def series(*spans: Sequence[Asked], caches: dict[str, list[CacheSpan]] | None = None) -> Series:
    """Rows of one second each, at rest at both ends."""
    rows = [row(float(at), at + 1.0, requests) for at, requests in enumerate(spans)]
    ends = [(at + 0.0, at + 1.0, sum(one.prefill_seconds for one in asked) / 2) for at, asked in enumerate(spans)]
    return series_of(observed(rows, worked=ends, caches=caches))


def sent(at: float, prompt: int, cached: int | None, ttft: float | None, outer: int | None = None) -> Request:
    return Request(at, prompt, cached, ttft, outer)


def test_a_request_between_two_scrapes_is_a_point_of_the_engine() -> None:
    found = at_engine(round_machine(), series((), (COLD,), (), (WARM,), ()), *FOREVER)
    assert found.requests == (Alone(2000, 0, 0, 0.5, 0.0), Alone(3000, 1500, 500, 0.4, 0.0))
    assert found.together == 0


def test_of_several_between_two_scrapes_nothing_tells_which_reused_what() -> None:
    short = COLD._replace(prefill_seconds=0.2)
    found = at_engine(round_machine(), series((), (short, short), (), (WARM,)), *FOREVER)
    assert [one.prompt_tokens for one in found.requests] == [3000]
    assert found.together == 2


def test_only_the_window_is_looked_at() -> None:
    of = series((), (COLD,), (), (WARM,), ())
    assert len(at_engine(round_machine(), of, 2 * SECOND, 5 * SECOND).requests) == 1
    assert at_engine(round_machine(), of, 900 * SECOND, 901 * SECOND).requests == ()
    assert at_client(round_machine(), of, 900 * SECOND, 901 * SECOND, ()) == ()


def test_loading_and_storing_of_the_span_belong_to_its_request() -> None:
    cache = [CacheSpan(0, SECOND, 0, 0, 0, 0, 0, 0), CacheSpan(3 * SECOND, 4 * SECOND, SECOND // 10, 0, 500, 0, 0, 0)]
    found = at_engine(round_machine(), series((), (), (), (WARM,), (), caches={"one": cache}), *FOREVER)
    assert [one.copies_seconds for one in found.requests] == [pytest.approx(0.1)]


def test_clients_tell_what_each_of_several_requests_reused() -> None:
    pair = (Asked(2000, prefill_seconds=0.3), Asked(2000, hbm=1000, prefill_seconds=0.2))
    log = [sent(1.5, 2000, 1000, 0.22), sent(1.05, 2000, 0, 0.33)]
    found = at_client(round_machine(), series((), pair, ()), *FOREVER, log)
    assert found == (Alone(2000, 0, 0, 0.33, 0.0), Alone(2000, 1000, 0, 0.22, 0.0))


def test_a_log_that_lacks_a_request_of_the_span_tells_nothing_of_it() -> None:
    pair = (Asked(2000, prefill_seconds=0.3), Asked(2000, hbm=1000, prefill_seconds=0.2))
    of = series((), pair, (), (COLD,), ())
    found = at_client(round_machine(), of, *FOREVER, [sent(1.05, 2000, 0, 0.33), sent(3.1, 2000, 0, 0.52)])
    assert [one.seconds for one in found] == [0.52]


def test_a_request_whose_reuse_or_time_is_not_told_is_no_point() -> None:
    of = series((), (COLD,), (), (COLD,), ())
    assert at_client(round_machine(), of, *FOREVER, [sent(1.1, 2000, None, 0.5), sent(3.6, 2000, 0, None)]) == ()


@pytest.mark.parametrize(
    ("asked", "logged", "expected"),
    [
        (WARM._replace(hbm=0, outer=1500), None, 1500),
        (WARM._replace(hbm=1500, outer=0), None, 0),
        (WARM, None, None),
        (WARM, 500, 500),
    ],
)
def test_where_reuse_came_from_is_told_by_the_log_or_by_the_span(
    asked: Asked, logged: int | None, expected: int | None
) -> None:
    (found,) = at_client(round_machine(), series((), (asked,), ()), *FOREVER, [sent(1.1, 3000, 1500, 0.45, logged)])
    assert found.outer_tokens == expected


# 0.1 s of loading for 500 tokens of the second request, 0.3 s of storing for 2,000 and 1,000 computed tokens
def test_the_copies_of_a_span_are_shared_by_what_was_loaded_and_computed() -> None:
    pair = (Asked(2000, prefill_seconds=0.3), Asked(1500, outer=500, prefill_seconds=0.2))
    span = CacheSpan(SECOND, 2 * SECOND, SECOND // 10, 3 * SECOND // 10, 500, 3000, 0, 0)
    log = [sent(1.05, 2000, 0, 0.33), sent(1.5, 1500, 500, 0.22)]
    found = at_client(round_machine(), series((), pair, (), caches={"one": [span]}), *FOREVER, log)
    assert [one.copies_seconds for one in found] == [pytest.approx(0.2), pytest.approx(0.2)]
