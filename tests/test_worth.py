from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.present import present
from tests.replica_rows import (
    SECOND,
    THETA,
    Asked,
    calibration,
    load,
    observed,
    people,
    round_machine,
    row,
    step_by_hand,
    told,
)

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.facts import Replica
from kvtally.agent.interval import BUSY_AT_START, RESET
from kvtally.agent.observed import CacheSpan
from kvtally.agent.steplaw.law import TILE_TOKENS
from kvtally.agent.steplaw.series import series_of
from kvtally.agent.steplaw.worth import Law, _parted, marginal, worth
from kvtally.agent.worth import NOTHING, Worth, added, hbm_alone, worth_of
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.observed import ObservedRow
    from kvtally.agent.steplaw.machine import Machine

MACHINE = round_machine()
# seconds of prefills of 1,400 tokens in steps of 1,000: chunk x (start + chunk / 2) products
FROM_0 = step_by_hand(1000, 1000 * 500) + step_by_hand(400, 400 * 1200)
FROM_200 = step_by_hand(1000, 1000 * 700) + step_by_hand(200, 200 * 1300)
FROM_600 = step_by_hand(800, 800 * 1000)


def valued(
    rows: Sequence[ObservedRow],
    law: Calibration | None = None,
    machine: Machine = MACHINE,
    *,
    tensor: Sequence[tuple[float, float, float, float]] = (),
    caches: Mapping[str, Sequence[CacheSpan]] | None = None,
    worked: Sequence[tuple[float, float, float]] | None = (),
    between: tuple[int, int] | None = None,
    connector: str = "",
) -> Worth:
    seen = observed(rows, tensor=tensor, caches=caches, worked=worked)
    replica = Replica(1, "r", "llama-8b", None, (), None, "on-demand", "", {}, connector=connector)
    series = series_of(seen._replace(replicas={1: replica}))
    start, end = between or (0, len(series.at) - 1)
    return worth(machine, series, start, end, law or calibration())


def mixture(seed: int = 0, seconds: int = 60) -> list[ObservedRow]:
    """An engine at work: every second some requests, with decodes beside."""
    rng = np.random.default_rng(seed)
    rows = []
    for at in range(seconds):
        requests = []
        for _ in range(int(rng.integers(1, 4))):
            prompt = int(np.exp(rng.uniform(np.log(100), np.log(6000))))
            hbm = int(prompt * rng.choice([0, 0.4, 0.8]) / 16) * 16
            outer = int((prompt - hbm) * rng.choice([0, 0, 0.5]) / 16) * 16
            requests.append(Asked(prompt, hbm, outer, generated=20, decode_seconds=0.5))
        rows.append(row(at, at + 1, requests, flags=BUSY_AT_START, running_requests=int(rng.integers(0, 4)), steps=40))
    return rows


# --- worked out by hand


def test_what_a_reused_prefix_avoided_is_the_difference_of_two_prefills() -> None:
    found = valued([row(0, 6, [Asked(1400, hbm=200)])])
    assert found.avoided == pytest.approx((FROM_0 - FROM_200,) * 3)
    assert found.full == pytest.approx((FROM_0,) * 3)
    assert found.outer == (0, 0, 0)
    assert found.prefill == pytest.approx((FROM_200,) * 3)
    assert found.law_seconds == pytest.approx(FROM_200)
    assert (found.requests, found.steps, found.hbm_tokens, found.computed_tokens) == (1, 1, 200, 1200)


def test_what_outer_tiers_avoided_is_what_they_added_to_hbm() -> None:
    # 200 tokens of HBM, 400 loaded: without the outer tiers it begins at 200, without any reuse at 0
    found = valued([row(0, 6, [Asked(1400, hbm=200, outer=400)])])
    assert found.avoided == pytest.approx((FROM_0 - FROM_600,) * 3)
    assert found.outer == pytest.approx((FROM_200 - FROM_600,) * 3)


BESIDE = load(MACHINE, people([1000.0], [0.0]), occupancy=1.0, decodes=100.0, context=50_000.0, steps=10.0, finals=1.0)
DECODES = step_by_hand(100, context=50_000)
BOTH = step_by_hand(1000, 900 * 450, 50_000), step_by_hand(200, 100 * 950, 50_000)


def test_a_prefill_beside_decodes_costs_what_it_adds_to_their_steps() -> None:
    # 100 decodes that read 50,000 tokens run at all times and leave 900 tokens of a step: chunks of 900 and of 100
    # tokens, each in a step with the decodes that would have run anyway
    law = Law(np.array(THETA), 1.0)
    found = marginal(BESIDE, BESIDE.populations[0], law, np.zeros(1))
    assert found == pytest.approx([BOTH[0] + BOTH[1] - 2 * DECODES])
    # decodes that run half of the time leave 950 tokens: 50 of them and half of their context are in each step
    half = BESIDE._replace(told=BESIDE.told._replace(occupancy=np.array([0.5])))
    steps = step_by_hand(1000, 950 * 475, 25_000) + step_by_hand(100, 50 * 975, 25_000)
    assert marginal(half, half.populations[0], law, np.zeros(1)) == pytest.approx([steps - 2 * 0.5 * DECODES])


def test_prefills_that_share_a_step_share_its_overhead() -> None:
    # four of 100 tokens in one step
    shared = load(MACHINE, people([100.0] * 4, [0.0] * 4), packing=4.0)
    found = marginal(shared, shared.populations[0], Law(np.array(THETA), 1.0), np.zeros(4))
    assert found == pytest.approx(np.full(4, step_by_hand(400, 4 * 100 * 50) / 4))


def test_prefill_and_decode_share_what_they_save_by_running_together() -> None:
    # ten steps with output: one ends the prefill, and one without output held its first chunk: eight hold decodes alone
    prefill_seconds, decode_seconds = _parted(BESIDE, BESIDE.populations[0], Law(np.array(THETA), 1.0))
    alone = step_by_hand(900, 900 * 450), step_by_hand(100, 100 * 950)
    added = sum(BOTH) - 2 * DECODES
    middle = (sum(alone) + added) / 2
    assert added < sum(alone)
    assert prefill_seconds == pytest.approx((added, middle, sum(alone)))
    assert decode_seconds == pytest.approx(sum(BOTH) + 8 * DECODES - middle)


def test_prefill_without_decodes_beside_is_all_prefill() -> None:
    alone = valued([row(0, 6, [Asked(1000)], running_requests=1)])
    assert alone.prefill[0] == pytest.approx(alone.prefill[2])
    assert alone.decode == pytest.approx(0, abs=1e-9)
    busy = valued(mixture(3))
    assert 0 < busy.prefill[0] < busy.prefill[1] < busy.prefill[2]
    assert busy.decode > 0
    assert busy.law_seconds == pytest.approx(busy.prefill[1] + busy.decode)


def test_large_chunks_run_at_the_clock_under_load_and_small_ones_at_the_windows() -> None:
    # the tensor pipes of the window ran at 2,000 of 2,000 MHz, the law was learned at half of that: what 1,000 tokens
    # compute takes twice as long, 400 as long as ever
    found = valued([row(0, 6, [Asked(1400)])], calibration(clock=0.5), tensor=[(0, 6, 3.0, 2000.0)])
    large = step_by_hand(2 * 1000 + TILE_TOKENS, 2 * 1000 * 500)
    assert found.full == pytest.approx((large + step_by_hand(400, 400 * 1200),) * 3)


# --- counts and what they are known of


def test_rest_is_worth_nothing_and_its_seconds_count() -> None:
    found = valued([row(0, 6), row(6, 12)])
    assert found == NOTHING._replace(seconds=12.0, worked_seconds=6.0, starved_seconds=0.0)


def test_a_restart_is_valued_all_the_same() -> None:
    rows = [row(0, 6, [Asked(1400, hbm=200)]), row(6, 12, [Asked(1400, hbm=200)], flags=RESET), row(12, 18)]
    found = valued(rows)
    assert found.hbm_tokens == 400
    assert found.requests == 2
    assert found.avoided == pytest.approx((2 * (FROM_0 - FROM_200),) * 3)


def test_a_gap_is_worth_nothing_and_tears_nothing() -> None:
    rows = [row(0, 6, [Asked(1400, hbm=200)]), row(3606, 3612, [Asked(1400, hbm=200)])]
    found = valued(rows)
    assert found.hbm_tokens == 400
    assert found.avoided == pytest.approx((2 * (FROM_0 - FROM_200),) * 3)


def test_requests_that_wait_for_capacity_bind_the_seconds_around_them() -> None:
    asked = [Asked(1400, hbm=200)]
    rows = [row(at, at + 1, asked, waiting_for_capacity=int(at in (1, 2))) for at in range(8)]
    found = valued(rows)
    assert found.starved_seconds == 2
    assert found.seconds == 8
    # scrapes see them wait at 2 s and 3 s: all of the second between, half of those around it
    assert found.bound == pytest.approx(2 * (FROM_0 - FROM_200))
    # each of those halves is all or nothing: a variance of a quarter of its square
    assert found.bound_variance == pytest.approx(2 * (FROM_0 - FROM_200) ** 2 / 4)
    assert found.bound_missed == pytest.approx(FROM_0 - FROM_200)
    assert valued([row(at, at + 1, asked, waiting_for_capacity=3) for at in range(8)]).bound == pytest.approx(
        8 * (FROM_0 - FROM_200), abs=1e-5
    )


def test_where_nothing_queued_nothing_was_missed_between_the_scrapes() -> None:
    asked = [Asked(1400, hbm=200)]
    found = valued([row(at, at + 5, asked, waiting_for_capacity=0) for at in range(0, 40, 5)])
    assert (found.bound, found.bound_variance, found.bound_missed) == (0, 0, 0)
    # requests that finish in 10 to 15 s had queued for one second in sum: by then a prefill of 2 s lies behind them
    served = [Asked(1400, hbm=200, prefill_seconds=2.0)]
    rows = [row(at, at + 5, served, waiting_for_capacity=0, queue_ns=SECOND * (at == 10)) for at in range(0, 40, 5)]
    found = valued(rows)
    assert found.bound == 0
    # 1 s laid over 7 to 13 s: a tenth of each of two intervals
    assert found.bound_missed == pytest.approx((3 / 6 + 3 / 6) / 5 * (FROM_0 - FROM_200))
    assert found.bound_variance == pytest.approx(2 * 0.1 * 0.9 * (FROM_0 - FROM_200) ** 2)


def test_a_wait_that_one_of_few_scrapes_sees_is_as_long_as_the_queue_seconds_let_it() -> None:
    # twelve requests wait at 15 s, and fewer and fewer: they queue for 6 s in sum, one second of waiting
    rows = [
        row(at, at + 15, [Asked(1400)], waiting_requests=n, waiting_for_capacity=n, queue_ns=queued * SECOND)
        for at, n, queued in ((0, 12, 0), (15, 0, 6), (30, 0, 0))
    ]
    found = valued(rows)
    # nobody saw who waited at 0 s: the first interval is as it ends
    assert 15 < present(found.starved_seconds) < 16.5
    preempted = [rows[0], row(15, 30, [Asked(1400)], queue_ns=6 * SECOND, preemptions=1), rows[2]]
    # what was preempted waits again and is in no queue seconds: half of the interval, as far as scrapes tell
    assert valued(preempted).starved_seconds == 15 + 7.5


def test_whether_capacity_was_short_is_unknown_where_the_engine_does_not_tell() -> None:
    found = valued([row(0, 6, [Asked(1400, hbm=200)], waiting_for_capacity=None)])
    assert found.starved_seconds is None
    assert found.bound == 0


def test_work_is_unknown_where_part_of_it_is() -> None:
    rows = [row(0, 6, [Asked(1400)]), row(6, 12, [Asked(1400)])]
    assert valued(rows, worked=[(0, 6, 1.0), (6, 12, 2.0)]).worked_seconds == pytest.approx(3)
    assert valued(rows, worked=[(0, 6, 1.0)]).worked_seconds is None
    assert valued(rows, worked=None).worked_seconds is None


def test_tiers_that_are_told_apart_get_what_each_adds_and_sum_to_the_whole() -> None:
    asked = [Asked(1400, hbm=200, outer=400)]
    # of what was admitted, three parts came from the host and one from disk: 300 and 100 of 400 tokens
    one = told(row(0, 6, asked), admitted_host_tokens=600, admitted_disk_tokens=200)
    found = valued([one])
    assert (found.dram_tokens, found.disk_tokens, found.p2p_tokens) == (300, 100, 0)
    assert found.dram + found.disk == pytest.approx(found.outer[1])
    assert found.p2p == 0
    # the host's 300 tokens come first: from 500 on 900 tokens are left, in one step
    assert found.dram == pytest.approx(FROM_200 - step_by_hand(900, 900 * 950))


def test_admissions_that_name_no_tier_leave_it_unnamed() -> None:
    asked = [Asked(1400, hbm=200, outer=400)]
    found = valued([told(row(0, 6, asked), admitted_host_tokens=300, admitted_unspecified_tokens=300)])
    assert (found.dram_tokens, found.disk_tokens) == (200, 0)
    assert 0 < found.dram < found.outer[1]
    nothing = valued([told(row(0, 6, asked), admitted_unspecified_tokens=300)])
    assert (nothing.dram_tokens, nothing.dram, nothing.external_tokens) == (0, 0, 400)


def found_by(*spans: tuple[int, int, int | None, int | None]) -> dict[str, list[CacheSpan]]:
    """What a cache's lookups found in DRAM and on disk, from second to second."""
    return {
        "server/lmcache_mp": [
            CacheSpan(start * SECOND, end * SECOND, *(None,) * 6, dram, disk) for start, end, dram, disk in spans
        ]
    }


def test_tiers_that_the_engine_does_not_name_are_estimated_from_what_the_caches_lookups_found() -> None:
    rows = [row(0, 30, [Asked(1400, hbm=200, outer=400)]), row(30, 60, [Asked(1400, hbm=200, outer=400)])]
    # 1,200 found and 800 loaded: 400 were in HBM, and DRAM's 900 begin with these
    found = valued(rows, caches=found_by((0, 30, 500, 100), (30, 60, 400, 200)))
    assert (found.dram_tokens, found.disk_tokens, found.external_tokens) == (500, 300, 800)
    assert found.estimated_tokens == 800
    assert found.dram + found.disk == pytest.approx(found.outer[1])
    assert found.outer == valued(rows).outer


def test_a_window_of_less_than_a_minute_is_not_parted_by_lookups() -> None:
    found = valued([row(0, 59, [Asked(1400, outer=400)])], caches=found_by((0, 59, 300, 100)))
    assert (found.dram_tokens, found.disk_tokens, found.estimated_tokens) == (0, 0, 0)


def test_what_the_engine_names_is_not_estimated() -> None:
    asked = [Asked(1400, hbm=200, outer=400)]
    one = told(row(0, 60, asked), admitted_host_tokens=300, admitted_disk_tokens=100)
    found = valued([one], caches=found_by((0, 60, 0, 4000)))
    assert (found.dram_tokens, found.disk_tokens, found.estimated_tokens) == (300, 100, 0)
    # of what it leaves open, a quarter here, lookups may tell
    one = told(row(0, 60, asked), admitted_host_tokens=300, admitted_unspecified_tokens=100)
    found = valued([one], caches=found_by((0, 60, 0, 4000)))
    assert (found.dram_tokens, found.disk_tokens, found.estimated_tokens) == (300, 100, 100)


def test_lookups_tell_of_no_token_that_was_loaded_while_nobody_read_the_caches_page() -> None:
    rows = [row(0, 30, [Asked(1400, outer=400)]), row(30, 60, [Asked(1400, outer=200)])]
    found = valued(rows, caches=found_by((30, 60, 150, 50)))
    assert (found.dram_tokens, found.disk_tokens, found.external_tokens) == (150, 50, 600)


def test_a_cache_that_tells_no_tiers_or_finds_nothing_parts_nothing() -> None:
    rows = [row(0, 60, [Asked(1400, outer=400)])]
    for spans in ((0, 60, None, None), (0, 60, 100, None), (0, 60, 0, 0)):
        found = valued(rows, caches=found_by(spans))
        assert (found.dram_tokens, found.disk_tokens, found.estimated_tokens) == (0, 0, 0)


def test_pages_of_one_cache_that_repeat_each_other_count_once() -> None:
    rows = [row(0, 60, [Asked(1400, outer=400)])]
    caches = found_by((0, 60, 300, 100)) | {"server/other": found_by((0, 60, 100, 20))["server/lmcache_mp"]}
    found = valued(rows, caches=caches)
    assert (found.dram_tokens, found.disk_tokens) == (300, 100)


def test_loads_and_stores_of_the_span_are_its_own() -> None:
    spans = [CacheSpan(0, 6 * SECOND, 2 * SECOND, SECOND, None, None, None, None)]
    rows = [row(at, at + 2, [Asked(1400, outer=200)], waiting_for_capacity=int(at == 0)) for at in (0, 2, 4)]
    whole = valued(rows, caches={"lmcache": spans})
    assert [whole.loads, whole.stores] == pytest.approx([2, 1])
    last = valued(rows, caches={"lmcache": spans}, between=(2, 3))
    assert [last.loads, last.stores] == pytest.approx([2 / 3, 1 / 3])
    assert 0 < whole.bound_loads < present(whole.loads)
    assert whole.bound_loads / present(whole.loads) == pytest.approx(whole.bound_stores / present(whole.stores))


def test_an_outer_tier_whose_clocks_are_not_seen_took_an_unknown_time() -> None:
    rows = [row(at, at + 30, [Asked(1400, outer=200)]) for at in (0, 30)]
    assert (valued(rows).loads, valued(rows).stores) == (None, None)
    for load_ns, store_ns, loads, stores in ((None, SECOND, None, 2.0), (SECOND, None, 2.0, None)):
        spans = [CacheSpan(at * SECOND, (at + 30) * SECOND, load_ns, store_ns, 9, 9, 9, 9) for at in (0, 30)]
        found = valued(rows, caches={"lmcache": spans})
        assert (found.loads, found.stores) == (loads, stores)


def test_a_tier_that_loaded_nothing_held_nothing_up_but_may_have_stored() -> None:
    rows = [row(at, at + 30, [Asked(1400, hbm=200)]) for at in (0, 30)]
    assert (valued(rows).loads, valued(rows).stores) == (0, 0)
    for connector, stores in (("", 0.0), ("NixlConnector", 0.0), ("LMCacheConnectorV1", None)):
        found = valued(rows, connector=connector)
        assert (found.loads, found.stores) == (0, stores)


def test_a_cache_that_falls_silent_leaves_unknown_what_it_did_from_then_on() -> None:
    rows = [row(at, at + 30, [Asked(1400, outer=200)]) for at in range(0, 600, 30)]
    spans = [CacheSpan(at * SECOND, (at + 30) * SECOND, SECOND, SECOND, *[None] * 4) for at in range(0, 300, 30)]
    assert valued(rows, caches={"lmcache": spans}).loads is None
    before = valued(rows, caches={"lmcache": spans}, between=(0, 10))
    assert (before.loads, before.stores) == pytest.approx((10, 10))


def test_attentions_share_grows_with_the_prompt() -> None:
    # FLOP of a token and its context: 1e10 and 1e5 x 1,400 / 2
    found = valued([row(0, 6, [Asked(1400, hbm=200)])])
    ratio = 1e5 * 1400 / 2 / 1e10
    assert found.attention_seconds == pytest.approx(FROM_0 * ratio / (1 + ratio))


# --- what the error needs


@pytest.mark.parametrize("place", range(len(PARAMETERS)), ids=PARAMETERS)
def test_derivatives_are_those_of_the_figures(place: int) -> None:
    # with sharing and couplings the mixed one is what is derived
    rows = mixture(5, 20)
    found = valued(rows)
    width = 0.01
    sides = []
    for sign in (1, -1):
        theta = list(THETA)
        theta[place] *= math.exp(sign * width)
        sides.append(valued(rows, calibration(theta)))
    up, down = sides
    for by, name in ((found.avoided_by, "avoided"), (found.outer_by, "outer"), (found.full_by, "full")):
        slope = (getattr(up, name)[1] - getattr(down, name)[1]) / (2 * width)
        assert by[place] == pytest.approx(slope, rel=0.02, abs=2e-3 * found.full[1]), name
    slope = (up.prefill[1] - down.prefill[1]) / (2 * width)
    assert found.prefill_by[place] == pytest.approx(slope, rel=0.02, abs=2e-3 * found.full[1])
    slope = (up.decode - down.decode) / (2 * width)
    assert found.decode_by[place] == pytest.approx(slope, rel=0.02, abs=2e-3 * found.decode)


def test_the_derivative_by_the_clock_is_that_of_the_figures() -> None:
    rows = mixture(6, 20)
    found, faster = valued(rows), valued(rows, calibration(clock=1.05))
    for slot, name in enumerate(("avoided", "outer", "full")):
        slope = (getattr(faster, name)[1] - getattr(found, name)[1]) / 0.05
        assert found.clock_by[slot] == pytest.approx(slope, rel=1e-6)
    assert found.clock_by[0] < 0


def test_an_engine_that_counts_its_attention_leaves_less_open() -> None:
    machine = round_machine(attention_flop=1e7)
    requests = [Asked(300, hbm=112), Asked(6000, hbm=5008)] * 4
    plain = row(0, 6, requests)
    open_ = valued([plain], machine=machine)
    assert open_.avoided[0] != open_.avoided[2]
    # linear layers, output matrix, and chunks as rectangles to their end
    products = sum(chunk * end for one in requests for chunk, end in chunks(one))
    flop = 1e10 * sum(one.computed for one in requests) + 2 * 128_256 * 1000 * len(requests) + 1e7 * products
    known = valued([told(plain, estimated_gflop=round(flop / 1e9))], machine=machine)
    spread = [max(one.avoided) - min(one.avoided) for one in (open_, known)]
    # a quarter of the range stays open, around where the counter points
    assert spread[1] <= spread[0] / 2
    assert spread[1] > 0
    low, high = sorted((open_.avoided[0], open_.avoided[2]))
    assert low <= known.avoided[1] <= high


def chunks(one: Asked) -> list[tuple[int, int]]:
    """(tokens, context at the end) of a request's chunks in steps of 1,000."""
    begin = one.hbm + one.outer
    return [(min(1000, one.prompt - at), min(at + 1000, one.prompt)) for at in range(begin, one.prompt, 1000)]


# --- worths are values that add up


def test_a_worth_comes_back_from_json_as_it_was() -> None:
    found = valued([told(one, admitted_host_tokens=10, admitted_disk_tokens=4) for one in mixture(1, 12)])
    text = json.dumps(found.as_json())
    back = worth_of(json.loads(text))
    assert type(back) is Worth
    for name, one, other in zip(Worth._fields, found, back, strict=True):
        assert other == (one if one is None else pytest.approx(one, rel=1e-8)), name
    # what was rounded once is not rounded again
    assert json.dumps(back.as_json()) == text


def test_what_is_unknown_comes_back_unknown() -> None:
    unknown = NOTHING._replace(worked_seconds=None, starved_seconds=None, loads=None, stores=None)
    assert worth_of(json.loads(json.dumps(unknown.as_json()))) == unknown


def test_a_worth_from_before_tiers_were_estimated_has_none_that_is() -> None:
    body = NOTHING._replace(external_tokens=7.0).as_json()
    for later in ("estimated_tokens", "bound_variance", "bound_missed"):
        del body[later]
    assert worth_of(body) == NOTHING._replace(external_tokens=7.0, estimated_tokens=0.0)


def test_what_lacks_a_part_is_no_worth() -> None:
    body = NOTHING.as_json()
    del body["outer_by"]
    with pytest.raises(KeyError):
        worth_of(body)


def test_worths_are_added_place_by_place_and_what_one_does_not_know_the_sum_does_not() -> None:
    one = NOTHING._replace(avoided=(3.0, 2.0, 1.0), stores=1.0, worked_seconds=4.0, starved_seconds=2.0)
    other = NOTHING._replace(avoided=(0.5, 0.5, 0.5), stores=2.0, worked_seconds=None, starved_seconds=1.0)
    found = added(one, other)
    assert found == NOTHING._replace(avoided=(3.5, 2.5, 1.5), stores=3.0, worked_seconds=None, starved_seconds=3.0)
    assert added(one, NOTHING) == one


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50), st.lists(st.integers(1, 39), min_size=1, max_size=3, unique=True))
def test_a_span_is_worth_what_its_parts_are_worth(seed: int, edges: list[int]) -> None:
    rows = mixture(seed, 40)
    whole = valued(rows)
    parts = [valued(rows, between=pair) for pair in pairwise([0, *sorted(edges), 40])]
    total = parts[0]
    for part in parts[1:]:
        total = added(total, part)
    # counts to the last token; seconds by the law as far as windows that are cut elsewhere see the same load
    for name in ("requests", "steps", "hbm_tokens", "external_tokens", "computed_tokens", "seconds", "starved_seconds"):
        assert getattr(total, name) == pytest.approx(getattr(whole, name)), name
    for name in ("avoided", "outer", "full"):
        assert getattr(total, name)[1] == pytest.approx(getattr(whole, name)[1], rel=0.08, abs=0.02), name


def test_a_span_that_is_cut_between_two_windows_is_worth_exactly_its_parts() -> None:
    # three quiet seconds between two busy stretches: no window holds both
    rows = [*mixture(2, 10), row(10, 14), *(shifted(one, 14) for one in mixture(4, 10))]
    rows[9] = rows[9]._replace(row=rows[9].row._replace(values=quiet(rows[9])))
    whole = valued(rows)
    parts = added(valued(rows, between=(0, 11)), valued(rows, between=(11, 21)))
    for name in Worth._fields:
        one, other = getattr(whole, name), getattr(parts, name)
        if name in {"avoided", "outer", "full"}:
            # together and apart; in between, other requests are shuffled
            assert other[::2] == pytest.approx(one[::2], rel=1e-9), name
            assert other[1] == pytest.approx(one[1], rel=0.02), name
        elif isinstance(one, float) and not name.startswith(("bound", "decode")):
            assert other == pytest.approx(one, rel=0.03, abs=1e-9), name


def shifted(one: ObservedRow, seconds: int) -> ObservedRow:
    by = seconds * SECOND
    return one._replace(row=one.row._replace(start_ns=one.row.start_ns + by, end_ns=one.row.end_ns + by))


def quiet(one: ObservedRow) -> tuple[int | None, ...]:
    """The row's values with nothing running at its end."""
    values = list(one.row.values)
    values[index("engine", "running_requests")] = 0
    return tuple(values)


def test_without_its_outer_tiers_a_worth_is_what_hbm_served() -> None:
    by = tuple(float(at) for at, _ in enumerate(PARAMETERS))
    whole = NOTHING._replace(
        avoided=(4.0, 8.0, 12.0),
        outer=(1.0, 2.0, 6.0),
        full=(9.0, 9.0, 9.0),
        avoided_by=by,
        outer_by=tuple(one / 4 for one in by),
        clock_by=(3.0, 1.0, 5.0),
        bound=4.0,
        bound_variance=16.0,
        bound_missed=2.0,
        hbm_tokens=7.0,
    )
    parts = ("dram", "disk", "p2p", "external_tokens", "dram_tokens", "disk_tokens", "p2p_tokens", "estimated_tokens")
    whole_of_all = dict.fromkeys((*parts, "loads", "stores", "bound_loads", "bound_stores"), 5.0)
    # three quarters of what was avoided are HBM's, and so much of what fell into time of waiting
    assert hbm_alone(Worth(**{**whole._asdict(), **whole_of_all})) == whole._replace(
        avoided=(3.0, 6.0, 6.0),
        outer=(0.0, 0.0, 0.0),
        avoided_by=tuple(one * 3 / 4 for one in by),
        outer_by=(0.0,) * len(by),
        clock_by=(2.0, 0.0, 5.0),
        bound=3.0,
        bound_variance=9.0,
        bound_missed=1.5,
    )
    assert hbm_alone(NOTHING) == NOTHING
