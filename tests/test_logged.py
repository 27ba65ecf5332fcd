from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtally.agent.calibrating import Extra, learn
from kvtally.agent.kin import kin_of
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.request_log import Request, read_requests
from kvtally.agent.steplaw.laying import laid
from kvtally.agent.steplaw.logged import counted, logged_of, probes_of, ran_alone
from kvtally.agent.steplaw.population import COUPLINGS, Population, populations
from kvtally.agent.valuing import Laws, valued

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.steplaw.series import Series

LOG = Path(__file__).parent / "fixtures" / "requests" / "h100-llama8b.csv"  # the driver's, of the packaged recording
START_NS = 1_795_409_206_962_000_000
NAME = "h100-llama8b-on/0"


@pytest.fixture(scope="module")
def reader(demo_ledger: str) -> Iterator[LedgerReader]:
    with LedgerReader(demo_ledger) as opened:
        yield opened


@pytest.fixture(scope="module")
def series(reader: LedgerReader) -> Series:
    """The recording's counters, scraped once a second."""
    extent = reader.extent()
    assert extent is not None
    (kin,) = kin_of(reader, extent, reader.targets())
    return kin.subjects[0].series


@pytest.fixture(scope="module")
def requests() -> tuple[Request, ...]:
    with LOG.open("rb") as lines:
        return read_requests(lines).requests


def over(series: Series, start: int, end: int) -> list[Population]:
    return populations(series, np.array([start]), np.array([end]), COUPLINGS)


# the log as arrays


def test_requests_come_in_the_order_of_their_first_token_without_those_of_unknown_reuse() -> None:
    found = logged_of(
        [Request(1e9, 100, 10, 5.0), Request(1e9 + 1, 200, None, 1.0), Request(1e9 + 2, 300, 30, 1.0, outer_tokens=20)]
    )
    assert found.first_token.tolist() == [1e9 + 3, 1e9 + 5]
    assert found.prompt.tolist() == [300, 100]
    assert found.reused.tolist() == [30, 10]
    assert found.outer[0] == 20
    assert math.isnan(found.outer[1])


def test_a_request_without_a_time_to_first_token_stands_where_it_was_sent() -> None:
    assert logged_of([Request(1e9, 100, 10)]).first_token.tolist() == [1e9]
    assert [len(column) for column in logged_of([])] == [0, 0, 0, 0]


# exact pairs


def test_the_pairs_of_a_log_are_the_same_for_every_coupling_and_sum_to_the_counters(
    series: Series, requests: tuple[Request, ...]
) -> None:
    logged = series._replace(logged=laid(logged_of(requests), [series]).log)
    start, end = 29, 50  # the phase of 200 requests
    first, *others = over(logged, start, end)
    assert all(other is first for other in others)
    assert first.weight.sum() == pytest.approx(200)
    prompts = series.totals["prompt_tokens"]
    assert (first.prompt * first.weight).sum() == pytest.approx(prompts[end] - prompts[start], rel=0.002)
    reused = series.totals["hbm_tokens"]
    assert (first.reused * first.weight).sum() == pytest.approx(reused[end] - reused[start])


def test_windows_that_overlap_each_have_their_requests(series: Series, requests: tuple[Request, ...]) -> None:
    logged = series._replace(logged=laid(logged_of(requests), [series]).log)
    found = populations(logged, np.array([29, 0, 35]), np.array([50, 40, 45]), COUPLINGS)[0]
    for piece, (start, end) in enumerate(((29, 50), (0, 40), (35, 45))):
        alone = over(logged, start, end)[0]
        assert found.prompt[found.piece == piece].tolist() == alone.prompt.tolist()


def test_a_log_that_lacks_more_than_a_tenth_is_left_for_the_histograms(
    series: Series, requests: tuple[Request, ...]
) -> None:
    gappy = series._replace(logged=laid(logged_of(requests[::2]), [series]).log)
    assert [one.prompt.tolist() for one in over(gappy, 29, 50)] == [one.prompt.tolist() for one in over(series, 29, 50)]


def test_with_a_log_the_couplings_leave_no_range(
    reader: LedgerReader, series: Series, requests: tuple[Request, ...]
) -> None:
    targets, window = reader.targets(), (START_NS + 29 * 10**9, START_NS + 50 * 10**9)
    extra = {NAME: Extra(logged=laid(logged_of(requests), [series]).log, rung="M2")}
    (without,) = valued(reader, window, Laws(reader, targets), targets)
    (within,) = valued(reader, window, Laws(reader, targets, extra=extra), targets)
    assert without.worth is not None
    assert within.worth is not None
    assert max(without.worth.avoided) - min(without.worth.avoided) > 0.1
    assert len(set(within.worth.avoided)) == 1
    assert within.worth.avoided[1] == pytest.approx(without.worth.avoided[1], rel=0.03)


def test_the_law_of_exact_pairs_describes_single_requests_better(
    reader: LedgerReader, series: Series, requests: tuple[Request, ...]
) -> None:
    extent = reader.extent()
    assert extent is not None
    extra = {NAME: Extra(logged=laid(logged_of(requests), [series]).log, rung="M2")}
    (without,), (within,) = (learn(reader, extent, reader.targets(), (), one) for one in ({}, extra))
    assert without.calibration is not None
    assert within.calibration is not None
    assert (without.calibration.rung, within.calibration.rung) == ("M1", "M2")
    errors = [one.evidence.single_error for one in (without.calibration, within.calibration)]
    assert errors[0] is not None
    assert errors[1] is not None
    assert errors[1] < errors[0]


# requests that ran alone


def test_first_tokens_are_counted_between_the_scrapes_inside(series: Series) -> None:
    assert counted(series, START_NS, START_NS + 94 * 10**9) == 373
    # the scrapes inside are 6.962 to 26.962 s, and 29.962 to 50.962 s
    first = series.totals["first_tokens"]
    assert counted(series, START_NS + 29 * 10**9 - 1, START_NS + 50 * 10**9 + 1) == first[50] - first[29]
    assert counted(series, START_NS - 10**9, START_NS) == 0


def request_at(series: Series, scrape: int, prompt: int, cached: int = 0) -> Request:
    """A request that began and ended between this scrape and the next."""
    return Request(series.at[scrape] + series.epoch_ns / 1e9 + 0.01, prompt, cached, 0.2)


def lonely(series: Series, scrape: int, finished: int = 0) -> Series:
    """The counters as if one request alone had given its first token behind this scrape, and goes on."""
    after = np.arange(len(series.at)) > scrape
    still = series.running * 0
    totals: dict[str, Any] = {name: np.zeros(len(after)) for name in series.totals}
    totals["first_tokens"], totals["finished_requests"] = after * 1.0, after * float(finished)
    running = still + after * (1.0 - finished)
    return series._replace(totals=totals, running=running, waiting=still, resting=still, sound=series.sound | True)


def test_a_request_that_the_engine_had_alone_is_told_by_the_scrapes_around_it(series: Series) -> None:
    own = lonely(series, 10)
    alone, before, behind = (request_at(own, scrape, 3000) for scrape in (10, 9, 12))
    assert ran_alone(own, [alone, before, behind]) == (alone,)
    assert ran_alone(own, [alone._replace(ttft_seconds=None)]) == ()


@pytest.mark.parametrize("what", ["busy before", "another finishes", "another waits", "a gap", "two first tokens"])
def test_a_request_that_had_company_did_not_run_alone(what: str, series: Series) -> None:
    own = lonely(series, 10)
    at = np.arange(len(own.at))
    changes: dict[str, dict[str, Any]] = {
        "busy before": {"running": np.where(at == 10, 1.0, own.running)},
        "another finishes": {"totals": {**own.totals, "finished_requests": (at > 10) * 1.0}},
        "another waits": {"waiting": np.where(at == 11, 1.0, 0.0)},
        "a gap": {"sound": at != 11},
        "two first tokens": {"totals": {**own.totals, "first_tokens": (at > 10) * 2.0}},
    }
    assert ran_alone(own._replace(**changes[what]), [request_at(own, 10, 3000)]) == ()


def test_a_request_that_ran_alone_is_a_fact_with_the_error_of_a_client_s_clock(series: Series) -> None:
    own = lonely(series, 10)
    (probe,) = probes_of(own, [request_at(own, 10, 3000, cached=1000)])
    # 12 % of it, and 15 ms of 200: the root of 0.12² + 0.075²
    assert (probe.prompt_tokens, probe.reused_tokens, probe.seconds) == (3000, 1000, 0.2)
    assert probe.relative_error == pytest.approx(0.1415, abs=1e-4)


def test_a_short_prefill_tells_the_rest_of_the_request_and_is_no_fact(series: Series) -> None:
    own = lonely(series, 10)
    assert probes_of(own, [request_at(own, 10, 3000, cached=2489)]) == ()  # 511 tokens
    assert len(probes_of(own, [request_at(own, 10, 3000, cached=2488)])) == 1


def test_what_the_engine_s_own_seconds_tell_is_no_second_fact(series: Series) -> None:
    own = lonely(series, 10, finished=1)
    own.totals["finished_prompt_tokens"][:] = own.totals["prompt_tokens"]
    request = request_at(own, 10, 3000)
    assert ran_alone(own, [request]) == (request,)
    assert probes_of(own, [request]) == ()


def test_a_prefill_that_may_have_been_a_load_is_no_fact(series: Series) -> None:
    own = lonely(series, 10)
    own.totals["external_tokens"][50:] = 1
    assert probes_of(own, [request_at(own, 10, 3000, cached=1000)]) == ()
    assert len(probes_of(own, [request_at(own, 10, 3000, cached=700)])) == 1  # less than a quarter


def test_of_the_recording_s_requests_few_ran_alone_beyond_those_that_its_engine_tells(
    series: Series, requests: tuple[Request, ...]
) -> None:
    assert len(ran_alone(series, requests)) == 5
    assert [(probe.prompt_tokens, probe.reused_tokens) for probe in probes_of(series, requests)] == [
        (5789.0, 4928.0),
        (7016.0, 6336.0),
    ]
