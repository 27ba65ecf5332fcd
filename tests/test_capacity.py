from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.bench.savings_bench import valued
from tests.present import present
from tests.replica_rows import SECOND, Asked, observed, row
from tests.simulator.scenarios import build
from tests.simulator.truth import truth_of

from kvtally.agent import savings
from kvtally.agent.steplaw.capacity import bound_of, queue_seconds, short_of_capacity, spread
from kvtally.agent.steplaw.series import series_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.simulator.scenarios import Scenario
    from tests.simulator.story import Run

    from kvtally.agent.savings import Seconds


def test_queue_seconds_lie_before_the_service_of_those_that_queued() -> None:
    # in 20 to 30 s two requests finish that had 4 s of service each and 6 s in the queue: 3 s each, over 13 to 26 s
    asked = [Asked(1400, prefill_seconds=1.0, decode_seconds=3.0)] * 2
    rows = [row(at, at + 10, asked if at == 20 else (), queue_ns=6 * SECOND * (at == 20)) for at in (0, 10, 20, 30)]
    found = queue_seconds(series_of(observed(rows)))
    assert found == pytest.approx([0, 0, 6 * 7 / 13, 6, 6])


def test_nobody_queued_for_a_moment_that_every_look_at_the_queue_takes() -> None:
    rows = [row(at, at + 10, [Asked(1400)], queue_ns=50_000) for at in (0, 10)]
    assert list(queue_seconds(series_of(observed(rows)))) == [0, 0, 0]


def test_an_amount_of_a_window_lies_where_its_tokens_were_reused() -> None:
    rows = [row(at, at + 5, [Asked(1400, hbm=hbm)]) for at, hbm in ((0, 100), (5, 300), (10, 0), (15, 0))]
    series = series_of(observed(rows))
    start, end, amounts = np.array([0, 2]), np.array([2, 4]), np.array([8.0, 3.0])
    # without reuse by time
    assert spread(series, start, end, amounts, (0, 4)) == pytest.approx([2, 6, 1.5, 1.5])


def test_time_with_waiting_at_both_ends_is_not_in_doubt() -> None:
    rows = [row(at, at + 5, [Asked(1400)], waiting_for_capacity=2, waiting_requests=2) for at in range(0, 20, 5)]
    short = short_of_capacity(series_of(observed(rows)), 0, 4)
    assert bound_of(short, np.full(4, 7.0)) == (28.0, 0.0, 0.0)


# -- against a simulator that knows who waited when

EVERY = (1, 2, 5, 15)


def realised(scenario: Scenario, run: Run) -> float:
    """Of the net seconds, those of requests whose first token came while others waited for capacity."""
    given = [one for one in run.served if one.first == one.first]  # NaN: it gave none
    places = np.searchsorted(run.column("end"), [one.first + 1e-9 for one in given], "right") - 1
    reused = np.array([one.cached for one in given])
    waiting = run.column("waiting")[places] > 0
    return truth_of(scenario, run).net_all * float((reused * waiting).sum() / reused.sum())


def scraped(scenario: Scenario, run: Run, every: int, folder: Path) -> Seconds:
    seen = scenario._replace(view=scenario.view._replace(scrape_seconds=float(every)))
    return present(valued(seen.recorded(run).write(folder / str(every)), "M1"))


@pytest.mark.parametrize("seed", [1, 2])
def test_what_is_realised_holds_the_truth_and_what_more_scrapes_say_at_any_interval(seed: int, tmp_path: Path) -> None:
    scenario = build("backlog8", seed, seconds=200)
    run = scenario.run()
    truth = realised(scenario, run)
    assert truth > 0
    found = {every: present(scraped(scenario, run, every, tmp_path).bound) for every in EVERY}
    assert all(one.holds(truth) for one in found.values())
    assert all(found[coarse].holds(found[fine].point) for fine, coarse in combinations(EVERY, 2))
    # and says more where there are more scrapes
    assert found[1].high - found[1].low < (found[15].high - found[15].low) / 2


def test_where_nobody_waits_next_to_nothing_is_realised_at_any_interval(tmp_path: Path) -> None:
    scenario = build("hbm_only8", 1, seconds=60)
    run = scenario.run()
    assert realised(scenario, run) == 0
    for every in EVERY:
        found = scraped(scenario, run, every, tmp_path)
        bound = present(found.bound)
        assert bound.point == 0
        assert 0 <= bound.high < savings.SAMPLED_SHARE * found.avoided.point
        assert not [one for one in found.reasons if "realised" in one.text]
