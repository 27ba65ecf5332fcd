from __future__ import annotations

import math

import pytest
from tests.present import present
from tests.replica_rows import FINGERPRINT, calibration

from kvtally.agent import savings
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.savings import EXACTLY_NOTHING, Estimate, Part, Reason, Seconds, loading_of, parts_of, seconds_of
from kvtally.agent.worth import NOTHING, Worth

ATTENTION = PARAMETERS.index("attention_efficiency")
OCCUPIED = 100.0


def by(**values: float) -> tuple[float, ...]:
    return tuple(values.get(name, 0.0) for name in PARAMETERS)


# 10 engine-seconds avoided of 50, by 1,000 tokens of HBM in 100 requests
PLAIN = NOTHING._replace(
    avoided=(10.0,) * 3,
    full=(50.0,) * 3,
    requests=100.0,
    steps=500.0,
    hbm_tokens=1000.0,
    computed_tokens=4000.0,
    worked_seconds=60.0,
    seconds=100.0,
    starved_seconds=0.0,
)
# 6 of them by 400 tokens of outer tiers, which took 0.5 s of loading and 0.25 s of storing
OUTER = PLAIN._replace(outer=(6.0,) * 3, hbm_tokens=600.0, external_tokens=400.0, loads=0.5, stores=0.25)
SURE = calibration(sd=0.0, number=1)


def seconds(worth: Worth, law: object = SURE, loading: str = "synchronous", *reasons: Reason) -> Seconds:
    return seconds_of([Part(law, worth, loading)], OCCUPIED, reasons)  # type: ignore[arg-type]  # literals of a test


def half(estimate: Estimate) -> float:
    return estimate.high - estimate.point


# --- how loads go


@pytest.mark.parametrize(
    ("connector", "caches", "expected"),
    [
        ("LMCacheConnectorV1", (), "synchronous"),
        ("LMCacheMPConnector", (), "asynchronous"),
        ("OffloadingConnector", (), "asynchronous"),
        ("NixlConnector", ("10.0.0.1:9000/lmcache",), "asynchronous"),
        ("SomebodysConnector", (), "unknown"),
        ("", (), "unknown"),
        ("", ("10.0.0.1:8000/0/kv_offload",), "asynchronous"),
        ("", ("10.0.0.9:8180/lmcache_mp",), "asynchronous"),
        ("", ("10.0.0.9:8180/lmcache_mp", "10.0.0.1:8000/0/kv_offload"), "asynchronous"),
        ("", ("10.0.0.1:8000/0/kv_offload", "10.0.0.1:9000/lmcache"), "unknown"),
        ("LMCacheConnectorV1", ("10.0.0.1:8000/0/kv_offload",), "synchronous"),
    ],
)
def test_a_connector_stops_the_engine_or_does_not(connector: str, caches: tuple[str, ...], expected: str) -> None:
    assert loading_of(connector, caches) == expected


# --- parts


def test_worths_under_one_law_are_added_and_others_stay_apart() -> None:
    first, second = calibration(number=1), calibration(number=2)
    found = parts_of(
        [
            (first, "synchronous", PLAIN),
            (second, "synchronous", PLAIN),
            (first, "synchronous", PLAIN),
            (first, "asynchronous", PLAIN),
        ]
    )
    assert [(part.calibration.id, part.loading, part.worth.avoided[1]) for part in found] == [
        *((1, "synchronous", 20.0), (2, "synchronous", 10.0), (1, "asynchronous", 10.0))
    ]


def test_laws_that_are_not_stored_are_told_apart_by_what_they_hold_for() -> None:
    one = calibration()
    other = one._replace(fingerprint=FINGERPRINT._replace(model="qwen"))
    assert len(parts_of([(one, "unknown", PLAIN), (other, "unknown", PLAIN), (one, "unknown", PLAIN)])) == 2


# --- the interval


def test_a_sure_law_leaves_the_error_of_its_form_and_the_floor() -> None:
    found = seconds(PLAIN)
    form, floor = savings.DISCREPANCY * 10, savings.PREFILL_FLOOR * 50
    assert found.avoided.point == 10
    assert half(found.avoided) == pytest.approx(savings.Z90 * math.hypot(form, floor))
    assert found.avoided.low == pytest.approx(20 - found.avoided.high)


def test_every_cause_of_error_is_worked_out_by_hand() -> None:
    # logs known to 0.1: 8 and 6 engine-seconds per log: sd 1.0; couplings 11.5 to 9 apart: half of 2.5
    # 30 s of evidence beside three of belief leave 1/11 of the clock's doubt: 5 engine-seconds per log
    # 20 of 50 s are attention; of 100 requests 4 were preempted
    law = calibration(sd=0.1)
    worth = PLAIN._replace(
        avoided=(11.5, 9.5, 9.0),
        avoided_by=by(compute_efficiency=-8.0, gap_seconds=6.0),
        clock_by=(-5.0, 0.0, 0.0),
        attention_seconds=20.0,
        preemptions=4.0,
    )
    found = seconds(worth, law)
    assert found.avoided.point == 10
    left = 0.1 / savings.ATTENTION_DOUBT
    expected = {
        "calibration": 1.0,
        "coupling": 1.25,
        "clock": 5 * savings.CLOCK_ERROR * savings.CLOCK_WEIGHT_SECONDS / (savings.CLOCK_WEIGHT_SECONDS + 30),
        "form": savings.DISCREPANCY * 10,
        "attention": savings.ATTENTION_ERROR * left * 0.4 * 10,
        "preemptions": savings.PREEMPTION_ERROR * 0.04 * 10,
        "floor": savings.PREFILL_FLOOR * 50,
    }
    assert found.parts_sd == pytest.approx(expected)
    assert half(found.avoided) == pytest.approx(savings.Z90 * math.hypot(*expected.values()))


def test_errors_of_parameters_that_are_learned_together_go_together() -> None:
    # compute is known to 0.2 and moves against attention: 5^2 x 0.04 + 5^2 x 0.04 - 2 x 25 x 0.03
    law = calibration(sd=0.2)
    rows = [list(one) for one in law.covariance]
    rows[0][ATTENTION] = rows[ATTENTION][0] = -0.03
    tied = law._replace(covariance=tuple(tuple(one) for one in rows))
    worth = PLAIN._replace(avoided_by=by(compute_efficiency=5.0, attention_efficiency=5.0))
    assert seconds(worth, law).parts_sd["calibration"] == pytest.approx(math.sqrt(2.0))
    assert seconds(worth, tied).parts_sd["calibration"] == pytest.approx(math.sqrt(0.5))


def test_errors_of_two_laws_are_independent_and_that_of_their_form_is_not() -> None:
    worth = PLAIN._replace(avoided_by=by(compute_efficiency=8.0))
    parts = [Part(calibration(sd=0.1, number=number), worth, "synchronous") for number in (1, 2)]
    apart = seconds_of(parts, OCCUPIED)
    one = seconds_of(parts_of([(parts[0].calibration, "synchronous", worth)] * 2), OCCUPIED)
    assert apart.avoided.point == one.avoided.point == 20
    assert apart.parts_sd["calibration"] == pytest.approx(0.8 * math.sqrt(2))
    assert one.parts_sd["calibration"] == pytest.approx(1.6)
    assert apart.parts_sd["form"] == one.parts_sd["form"] == pytest.approx(savings.DISCREPANCY * 20)


def test_reuse_that_avoided_little_did_not_cost_time() -> None:
    found = seconds(PLAIN._replace(avoided=(0.5,) * 3))
    assert found.avoided.low == 0
    assert found.avoided.high > 0.5


def test_a_point_below_nothing_stays_in_its_interval() -> None:
    found = seconds(PLAIN._replace(avoided=(-0.5,) * 3))
    assert found.avoided.low == found.avoided.point == -0.5


def test_a_law_that_knows_attention_leaves_less_open() -> None:
    worth = PLAIN._replace(attention_seconds=25.0)
    blind = calibration(sd=1.0)
    wide = seconds(worth, blind).parts_sd["attention"]
    assert wide == pytest.approx(savings.ATTENTION_ERROR * 0.5 * 10)
    assert seconds(worth, calibration(sd=0.1)).parts_sd["attention"] < wide
    # MFU counters tell the attention work itself
    assert seconds(worth, blind._replace(rung="M3")).parts_sd["attention"] == 0


# --- nothing reused


def test_nothing_reused_is_exactly_nothing_and_what_holding_it_took_is_charged() -> None:
    worth = PLAIN._replace(
        avoided=(0.0,) * 3, hbm_tokens=0.0, stores=2.0, avoided_by=by(compute_efficiency=3.0), preemptions=50.0
    )
    found = seconds(worth)
    assert found.avoided == EXACTLY_NOTHING
    assert present(found.store).point == 2
    assert present(found.net).point == -2
    assert present(found.net).high < 0
    assert found.tiers["hbm"].avoided == EXACTLY_NOTHING
    assert found.tiers["external"].tokens == 0
    assert found.tiers["external"].avoided == EXACTLY_NOTHING
    assert present(found.tiers["external"].net).point == -2


def test_an_engine_without_any_reuse_has_a_figure_and_it_is_nothing() -> None:
    found = seconds(NOTHING._replace(requests=3.0, seconds=60.0))
    assert (found.status, found.avoided, found.net) == ("ok", EXACTLY_NOTHING, EXACTLY_NOTHING)
    assert found.reasons == ()
    assert list(found.tiers) == ["hbm"]


# --- what loading and storing cost


def test_loads_that_stop_the_engine_are_charged_with_what_their_timers_are_off() -> None:
    found = seconds(OUTER)
    low, high = savings.LOAD_RANGE
    assert found.stall == pytest.approx((low * 0.5, 0.5, high * 0.5))
    low, high = savings.STORE_RANGE
    assert found.store == pytest.approx((low * 0.25, 0.25, high * 0.25))
    assert found.latency == 0
    assert present(found.net).point == pytest.approx(10 - 0.5 - 0.25)


def test_loads_beside_the_engine_hold_up_requests_and_not_the_engine() -> None:
    found = seconds(OUTER, SURE, "asynchronous")
    assert found.stall == (0, 0, 0.5)
    assert found.store == (0, 0, 0.25)
    assert found.latency == 0.5
    assert present(found.net).point == 10
    assert present(found.net).low < found.avoided.low
    assert present(found.net).high == found.avoided.high


def test_loads_of_which_nobody_knows_how_they_go_are_charged_down_to_nothing() -> None:
    found = seconds(OUTER, SURE, "unknown")
    assert found.stall == pytest.approx((0, 0.5, savings.LOAD_RANGE[1] * 0.5))
    assert present(found.store).low == 0
    assert found.latency == 0


def test_the_errors_of_gain_and_costs_are_independent() -> None:
    found = seconds(OUTER)
    down = math.hypot(
        found.avoided.point - found.avoided.low,
        present(found.stall).high - 0.5,
        present(found.store).high - present(found.store).point,
    )
    up = math.hypot(
        half(found.avoided), 0.5 - present(found.stall).low, present(found.store).point - present(found.store).low
    )
    assert present(found.net).low == pytest.approx(9.25 - down)
    assert present(found.net).high == pytest.approx(9.25 + up)


def test_parts_that_load_differently_are_charged_each_in_its_way() -> None:
    parts = [Part(SURE, OUTER, "synchronous"), Part(SURE, OUTER, "asynchronous")]
    found = seconds_of(parts, OCCUPIED)
    assert present(found.stall).point == 0.5
    assert found.latency == 0.5
    assert found.avoided.point == 20


# --- statuses and refusals


def test_a_plain_figure_is_ok() -> None:
    found = seconds(PLAIN)
    assert (found.status, found.reasons) == ("ok", ())
    assert found.tiers["hbm"].status == "ok"


def test_few_requests_are_no_figure() -> None:
    found = seconds(PLAIN._replace(requests=savings.LEAST_REQUESTS - 1.0))
    assert found.status == "insufficient_data"
    assert found.tiers["hbm"].status == "insufficient_data"
    assert any(f"{savings.LEAST_REQUESTS - 1} requests" in reason.text and reason.refuses for reason in found.reasons)
    assert seconds(PLAIN._replace(requests=float(savings.LEAST_REQUESTS))).status == "ok"


def test_loads_that_nobody_can_place_refuse_where_they_matter() -> None:
    much = savings.UNKNOWN_LOADING * OCCUPIED + 0.1
    found = seconds(OUTER._replace(loads=much), SURE, "unknown")
    assert found.status == "insufficient_data"
    assert any("connector" in reason.hint for reason in found.reasons)
    assert seconds(OUTER._replace(loads=much), SURE, "synchronous").status != "insufficient_data"
    assert seconds(OUTER._replace(loads=much - 0.2), SURE, "unknown").status != "insufficient_data"


def test_a_wide_interval_proves_nothing() -> None:
    worth = PLAIN._replace(avoided_by=by(compute_efficiency=10.0))
    # 10 s x 0.3 x 1.645: half of the estimate
    found = seconds(worth, calibration(sd=0.3))
    assert found.status == "not_proven"
    assert any("of the estimate" in reason.text for reason in found.reasons)
    assert found.tiers["hbm"].status == "not_proven"
    # the same next to a window in which it weighs nothing
    assert seconds_of([Part(calibration(sd=0.3), worth, "synchronous")], 10_000.0).status == "ok"


def test_a_net_interval_with_zero_in_it_proves_nothing() -> None:
    found = seconds(OUTER._replace(loads=9.0))
    assert present(found.net).holds(0.0)
    assert found.status == "not_proven"
    assert any("zero" in reason.text for reason in found.reasons)
    assert found.tiers["hbm"].status == "ok"
    assert found.tiers["external"].status == "not_proven" or not present(found.tiers["external"].net).holds(0.0)


def test_loads_that_take_longer_than_they_save_are_a_loss_that_is_proven() -> None:
    found = seconds(OUTER._replace(loads=40.0))
    assert present(found.net).high < 0
    assert found.status == "ok"


def test_many_preemptions_make_a_figure_a_lower_bound() -> None:
    many = savings.MANY_PREEMPTIONS * 100 + 1
    found = seconds(PLAIN._replace(preemptions=many))
    assert found.status == "lower_bound"
    assert found.tiers["hbm"].status == "lower_bound"
    assert any("preemptions" in reason.text and not reason.refuses for reason in found.reasons)
    assert seconds(PLAIN._replace(preemptions=many - 1.0)).status == "ok"


def test_what_is_known_beforehand_and_refuses_decides() -> None:
    refusal = Reason("the model is not known", "say where its config lies", refuses=True)
    found = seconds(PLAIN, SURE, "synchronous", refusal)
    assert found.status == "insufficient_data"
    assert found.reasons[0] is refusal
    remark = Reason("two hours are missing")
    assert seconds(PLAIN, SURE, "synchronous", remark).status == "ok"


def test_a_reason_reads_with_its_hint() -> None:
    assert str(Reason("too short", "ask for more")) == "too short: ask for more"
    assert str(Reason("too short")) == "too short"


# --- costs that nothing tells


@pytest.mark.parametrize("loading", ["synchronous", "asynchronous", "unknown"])
@pytest.mark.parametrize("untold", ["loads", "stores"])
def test_a_cost_that_nothing_tells_leaves_no_net_and_all_that_is_known(untold: str, loading: str) -> None:
    worth = OUTER._replace(**{untold: None}, starved_seconds=20.0)  # type: ignore[arg-type]  # one of two floats
    found = seconds(worth, SURE, loading)
    known = seconds(OUTER, SURE, loading)
    assert (found.stall is None, found.store is None) == (untold == "loads", untold == "stores")
    assert found.net is found.bound is None
    assert found.capacity_bound_share == 0.2
    assert (found.avoided, found.status) == (known.avoided, "not_proven")
    assert found.tiers["hbm"] == known.tiers["hbm"]
    outer = found.tiers["external"]
    assert (outer.net, outer.avoided, outer.status) == (None, known.tiers["external"].avoided, "insufficient_data")
    assert (found.latency is None) is (untold == "loads" and loading == "asynchronous")


def test_of_two_parts_one_cost_that_nothing_tells_is_enough() -> None:
    other = OUTER._replace(loads=None)
    found = seconds_of([Part(SURE, OUTER, "synchronous"), Part(SURE, other, "asynchronous")], OCCUPIED)
    assert (found.stall, found.net, found.latency) == (None, None, None)


def test_a_connector_that_stores_unseen_has_a_tier_without_a_net() -> None:
    found = seconds(PLAIN._replace(stores=None))
    assert found.tiers["hbm"].status == "ok"
    assert found.tiers["external"][:3] == (0.0, EXACTLY_NOTHING, None)


@pytest.mark.parametrize(
    ("connector", "timers", "hint"),
    [
        ("LMCacheConnectorV1", "lmcache:time_to_retrieve, lmcache:time_to_store", "PROMETHEUS_MULTIPROC_DIR"),
        ("LMCacheMPConnector", "of LMCache's server", "[[page]]"),
        ("OffloadingConnector", "vllm:kv_offload_load_time, vllm:kv_offload_store_time", "0.24"),
        ("MooncakeStoreConnector", "of Mooncake", "[[page]]"),
        ("HiCache", "of the outer tier", "doctor"),
        ("", "of the outer tier", "doctor"),
    ],
)
def test_the_timers_that_are_missing_are_named_with_what_lifts_it(connector: str, timers: str, hint: str) -> None:
    reason = savings.untimed(OUTER._replace(loads=None, stores=None), connector)
    assert reason is not None
    assert reason.text.startswith("nothing tells how long loading and storing KV took, so the net is not known")
    assert timers in reason.text
    assert hint in reason.hint
    assert not reason.refuses
    assert savings.untimed(OUTER, connector) is None
    only = savings.untimed(OUTER._replace(stores=None), connector)
    assert only is not None
    assert "how long storing KV" in only.text


# --- capacity


def test_what_fell_into_time_of_want_is_bound() -> None:
    # a quarter of the avoided, half of the loads and none of the stores
    worth = OUTER._replace(starved_seconds=20.0, bound=2.5, bound_loads=0.25, bound_stores=0.0)
    found = seconds(worth)
    assert found.capacity_bound_share == 0.2
    assert found.bound is not None
    assert found.bound.point == pytest.approx(2.5 - 0.25)
    down = math.hypot(0.25 * (10 - found.avoided.low), 0.5 * (present(found.stall).high - 0.5))
    assert found.bound.point - found.bound.low == pytest.approx(down)


def test_what_scrapes_leave_open_of_who_waits_widens_what_is_realised() -> None:
    # 4 of 10 avoided seconds, known to 1 by the scrapes; by the queue seconds 2 more may have been missed
    worth = PLAIN._replace(starved_seconds=20.0, bound=4.0, bound_variance=1.0, bound_missed=2.0)
    found = seconds(worth)
    by_law = 0.4 * half(found.avoided)
    bound = present(found.bound)
    assert bound.point == pytest.approx(4)
    assert bound.point - bound.low == pytest.approx(math.hypot(by_law, savings.Z90))
    assert half(bound) == pytest.approx(math.hypot(by_law, savings.Z90))
    # no more than there was, and no more than was missed
    far = present(seconds(worth._replace(bound_variance=100.0)).bound)
    assert far.low == 0
    assert half(far) == pytest.approx(math.hypot(by_law, 2))
    most = present(seconds(worth._replace(bound=9.9, bound_variance=100.0, bound_missed=50.0)).bound)
    assert most.high == present(found.net).high


def test_where_a_loss_fell_into_time_of_want_more_want_is_more_of_a_loss() -> None:
    worth = OUTER._replace(stores=20.0, starved_seconds=20.0, bound_variance=1.0, bound_missed=2.0)
    found = seconds(worth)
    bound, net = present(found.bound), present(found.net)
    assert (bound.point, bound.high) == (0, 0)
    assert bound.low == pytest.approx(net.point / 10 * savings.Z90)


@pytest.mark.parametrize(("bound", "variance", "told"), [(4.0, 0.7, False), (4.0, 4.0, True), (0.0, 0.01, False)])
def test_too_few_scrapes_are_told_where_they_leave_much_open(bound: float, variance: float, told: bool) -> None:
    worth = PLAIN._replace(starved_seconds=20.0, bound=bound, bound_variance=variance, bound_missed=5.0)
    found = seconds(worth)
    assert bool([one for one in found.reasons if "few scrapes saw" in one.text]) is told
    assert found.status == "ok"


def test_without_any_want_nothing_is_bound() -> None:
    assert seconds(OUTER).bound == EXACTLY_NOTHING
    assert seconds(OUTER).capacity_bound_share == 0


def test_where_nothing_tells_of_want_what_is_bound_is_unknown() -> None:
    found = seconds(OUTER._replace(starved_seconds=None))
    assert found.bound is None
    assert found.capacity_bound_share is None
    one_of_two = seconds_of(
        [Part(SURE, OUTER, "synchronous"), Part(SURE, OUTER._replace(starved_seconds=None), "synchronous")], OCCUPIED
    )
    assert one_of_two.bound is None


# --- tiers


def test_outer_tiers_that_are_told_apart_keep_their_proportions_and_sum_to_the_whole() -> None:
    worth = OUTER._replace(dram=4.5, disk=1.5, dram_tokens=300.0, disk_tokens=100.0)
    found = seconds(worth)
    assert list(found.tiers) == ["hbm", "dram", "disk"]
    assert found.tiers["hbm"].avoided.point == pytest.approx(4)
    assert found.tiers["dram"].avoided.point == pytest.approx(4.5)
    assert found.tiers["disk"].avoided.point == pytest.approx(1.5)
    # what loading and storing cost is theirs by tokens: 0.75 s by 3 to 1
    assert present(found.tiers["dram"].net).point == pytest.approx(4.5 - 0.5625)
    assert present(found.tiers["disk"].net).point == pytest.approx(1.5 - 0.1875)
    assert found.tiers["hbm"].net == found.tiers["hbm"].avoided


def test_what_is_told_apart_in_part_leaves_the_rest_together() -> None:
    worth = OUTER._replace(dram=2.0, dram_tokens=150.0)
    found = seconds(worth)
    assert list(found.tiers) == ["hbm", "dram", "external"]
    assert found.tiers["external"].tokens == 250
    assert found.tiers["external"].avoided.point == pytest.approx(4)
    assert found.tiers["dram"].avoided.point == pytest.approx(2)


def test_a_rest_of_few_tokens_never_owes_what_the_couplings_differ_by() -> None:
    # the parts are of the middle coupling (6.2), the whole is the mean of the three (6.0): one token is not told apart
    worth = OUTER._replace(
        outer=(5.6, 6.2, 6.2), dram=4.7, disk=1.49, dram_tokens=299.0, disk_tokens=100.0, external_tokens=400.0
    )
    found = seconds(worth)
    assert sum(tier.avoided.point for tier in found.tiers.values()) == pytest.approx(10)
    for name, tier in found.tiers.items():
        assert tier.avoided.low <= tier.avoided.point <= tier.avoided.high, name
        assert present(tier.net).low <= present(tier.net).point <= present(tier.net).high, name
    assert found.tiers["external"].avoided.point >= 0
    assert found.tiers["external"].avoided.point < 0.1


def test_an_estimate_holds_what_lies_in_it() -> None:
    one = Estimate(-1.0, 2.0, 3.0)
    assert one.holds(-1)
    assert one.holds(3)
    assert not one.holds(3.1)
    assert not one.holds(-1.1)
