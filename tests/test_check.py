from __future__ import annotations

import sqlite3
from contextlib import closing
from copy import deepcopy
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, FakeGpu, new_ledger, reader_of, tell_story

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.book import book_of, keep_rates
from kvtally.agent.check import answer_of, judged
from kvtally.agent.check.counters import coverage, fresh, hit_rates, reconciled, sources
from kvtally.agent.check.money import budgets, hourly, savings
from kvtally.agent.check.seen import Audited, Seen, Source, look
from kvtally.agent.check.verdict import Asked, Bound, Budget, Check, Found, money_text, worst
from kvtally.agent.config import Config
from kvtally.agent.replica import About
from kvtally.agent.settlement import settle_hours
from kvtally.agent.states import STATES

if TYPE_CHECKING:
    from pathlib import Path

MINUTE = 60 * SECOND
ZERO = "0.000000000"


def interval(low: str, high: str) -> dict[str, str]:
    return {"low": low, "high": high}


def units(total: str | None, output: str | None = "9.000000000") -> dict[str, Any]:
    return {
        "total": total,
        "input": "1.000000000",
        "input_computed": "2.000000000",
        "output": output,
        "intervals": {
            "input": interval("0.900000000", "1.100000000"),
            "input_computed": interval("1.900000000", "2.100000000"),
            "output": None if output is None else interval("8.500000000", "9.600000000"),
        },
    }


GROUP: dict[str, Any] = {
    "by": {"model": "llama-8b"},
    "tokens": {"prompt": 100_000, "computed": 40_000, "generated": 20_000},
    "engine_seconds": {"occupied": 2400.0, "idle": 1200.0, "asleep": 0.0, "warm_up": 0.0, "unallocated": 0.0},
    "cost": {
        "total": "3.000000000",
        "of_which": {"idle": "0.900000000", "asleep": "0.100000000", "warm_up": ZERO, "unallocated": ZERO},
    },
    "cost_per_million": {"fully_loaded": units("2.500000000"), "active": units("1.700000000")},
    "basis": {
        "tokens": "MEASURED",
        "states": "MODELLED",
        "cost": "MEASURED",
        "active": "MODELLED",
        "split": "MODELLED",
    },
    "coverage": 0.95,
}
FREE: dict[str, Any] = {  # GPUs that no engine held
    **GROUP,
    "by": {"model": None},
    "tokens": {"prompt": 0, "computed": 0, "generated": 0},
    "engine_seconds": {"occupied": 0.0, "idle": 0.0},
    "cost": {"total": "0.750000000", "of_which": {"idle": ZERO}},
    "cost_per_million": {"fully_loaded": units(None), "active": units(None)},
    "coverage": None,
}
SPAN = {"start": "2026-11-23T04:00:00.000Z", "end": "2026-11-23T05:00:00.000Z"}
ESTIMATE = tuple[str, str, str]


def cost(*groups: dict[str, Any], findings: tuple[dict[str, str], ...] = (), seconds: float = 3600.0) -> dict[str, Any]:
    window = {**SPAN, "covered_seconds": seconds}
    return {"window": window, "currency": "USD", "groups": [*groups], "findings": [*findings]}


def group(**parts: Any) -> dict[str, Any]:
    """The group with some of its parts replaced."""
    return {**deepcopy(GROUP), **parts}


def finding(kind: str, severity: str, target: str = "engine/a/0", message: str = "as it is") -> dict[str, str]:
    return {"kind": kind, "severity": severity, "target": target, "message": message, **SPAN}


def three(low: str, point: str, high: str) -> dict[str, str]:
    return {"low": low, "point": point, "high": high}


def tier(low: str, point: str, high: str, **parts: Any) -> dict[str, Any]:
    """A tier with a net in money; its seconds are others."""
    seconds = {"low": 10.5, "point": 20.25, "high": 30.0}
    values = {"status": "ok", "net": three(low, point, high), "net_engine_seconds": seconds, "holding": ZERO}
    return {**values, **parts}


def saved(*, status: str = "ok", reasons: tuple[str, ...] = (), **tiers: dict[str, Any]) -> dict[str, Any]:
    basis = {"engine_seconds": "MODELLED", "money": "ASSUMED"}
    one = {"by": {"model": "llama-8b"}, "status": status, "reasons": [*reasons], "tiers": tiers, "basis": basis}
    return {"currency": "USD", "groups": [one], "findings": []}


def seen(told: dict[str, Any], **parts: Any) -> Seen:
    base = Seen(told, None, None, None, (), is_live=True, newest_ns=START + HOUR, now_ns=START + HOUR)
    return base._replace(**parts)


def only(checks: Any) -> Check:
    (one,) = checks
    assert isinstance(one, Check)
    return one


def per_million(text: str, tokens: Any = "total", view: str = "fully_loaded", **parts: Any) -> Check:
    asked = Asked(budgets=(Budget(Decimal(text), tokens),), view=view)
    return only(budgets(asked, cost(group(**parts))))


# what a million tokens cost


@pytest.mark.parametrize(
    ("budget", "state"),
    [("2.51", "ok"), ("2.5", "ok"), ("2.499999999", "failed"), ("0.000000001", "failed")],
)
def test_a_budget_is_exceeded_beyond_it_and_not_at_it(budget: str, state: str) -> None:
    one = per_million(budget)
    assert (one.state, one.warning) == (state, False)
    assert one.found == Found("2.500000000", "USD per million tokens")
    assert one.bound == Bound("at_most", f"{Decimal(budget):.9f}")


def test_an_exceeded_budget_says_by_what_and_where_to_look() -> None:
    one = per_million("2.4")
    assert one.message == "2.50 USD per million tokens, fully loaded, is above 2.40"
    assert one.hint == (
        "`kvtally cost` tells its parts; of 3.00 USD, 1.00 served nobody (idle, asleep, warm-up, unallocated)"
    )


def test_what_served_nobody_is_no_part_of_the_active_view() -> None:
    one = per_million("1.6", view="active")
    assert (one.message, one.hint) == (
        "1.70 USD per million tokens, active, is above 1.60",
        "`kvtally cost` tells its parts",
    )


@pytest.mark.parametrize(
    ("tokens", "point", "words"),
    [
        ("input", "1.000000000", "input tokens"),
        ("input_computed", "2.000000000", "computed input tokens"),
        ("output", "9.000000000", "output tokens"),
    ],
)
def test_a_budget_may_be_of_one_kind_of_tokens(tokens: str, point: str, words: str) -> None:
    one = per_million("100", tokens)
    assert one.found is not None
    assert (one.subject, one.found.point, one.found.unit) == (tokens, point, f"USD per million {words}")


# the output costs 9.00, 8.50 to 9.60
@pytest.mark.parametrize(
    ("budget", "state", "warning", "words"),
    [
        ("9.6", "ok", False, ""),
        ("9.59", "ok", True, "so it may be above it"),
        ("9", "ok", True, "so it may be above it"),
        ("8.99", "failed", False, "so it may be within it"),
        ("8.5", "failed", False, "so it may be within it"),
        ("8.49", "failed", False, ""),
    ],
)
def test_the_point_decides_and_an_interval_that_holds_the_bound_is_told(
    budget: str, state: str, warning: bool, words: str
) -> None:
    one = per_million(budget, "output")
    assert (one.state, one.warning) == (state, warning)
    assert ("its 90 % interval, 8.50 to 9.60, holds the bound" in one.message) is bool(words)
    assert words in one.message


def test_a_group_without_a_price_is_unknown_with_the_reason() -> None:
    told = cost(group(cost=None, cost_per_million=None), findings=(finding("no_rate", "warning", message="add it"),))
    one = only(budgets(Asked(budgets=(Budget(Decimal(1)),)), told))
    assert (one.state, one.found, one.message) == ("unknown", None, "no cost without a price: add it")


def test_a_group_is_not_told_what_another_replica_lacks() -> None:
    bare = group(by={"replica": "b/0"}, cost_per_million=None)
    lacking = (finding("no_rate", "warning", "engine/a/0", "of a"), finding("no_rate", "warning", "engine/b/0", "of b"))
    assert only(budgets(Asked(budgets=(Budget(Decimal(1)),)), cost(bare, findings=lacking))).message.endswith(": of b")


@pytest.mark.parametrize(
    ("tokens", "counts", "kinds", "message"),
    [
        ("total", {"prompt": 0, "generated": 0}, (), "no tokens in the window"),
        ("output", {"generated": 0}, (), "no output tokens in the window"),
        ("total", {"prompt": None, "generated": 5}, (), "how many tokens there were is not told"),
        ("input_computed", {"computed": None}, ("tokens_unknown",), "computed input tokens there were is not told: so"),
        ("output", {"generated": 5}, ("split_unknown",), "what output tokens cost is not told apart: so"),
    ],
)
def test_what_cannot_be_told_is_unknown_and_never_within(
    tokens: Any, counts: dict[str, int | None], kinds: tuple[str, ...], message: str
) -> None:
    nothing = {view: units(None) | {tokens: None} for view in ("fully_loaded", "active")}
    told = cost(
        group(tokens=counts, cost_per_million=nothing),
        findings=tuple(finding(kind, "info", message="so") for kind in kinds),
    )
    one = only(budgets(Asked(budgets=(Budget(Decimal(10**6), tokens),)), told))
    assert (one.state, one.found) == ("unknown", None)
    assert message in one.message


def test_gpus_that_no_engine_held_are_told_once_whatever_the_budgets() -> None:
    asked = Asked(budgets=(Budget(Decimal(1)), Budget(Decimal(2), "output")))
    one = only(budgets(asked, cost(FREE)))
    assert (one.state, one.warning, one.found) == ("ok", True, Found("0.750000000", "USD"))
    assert "cost 0.75 USD, with no token to bear it" in one.message
    assert only(budgets(asked, cost({**FREE, "cost": None}))).state == "unknown"


def test_an_engine_that_idled_is_not_taken_for_gpus_that_nobody_held() -> None:
    seconds = {**GROUP["engine_seconds"], "occupied": 0.0, "idle": 3600.0}
    idle = {"engine_seconds": seconds, "cost_per_million": FREE["cost_per_million"]}
    told = cost(group(**idle, tokens=FREE["tokens"]))
    one = only(budgets(Asked(budgets=(Budget(Decimal(1)),)), told))
    assert (one.state, one.message.partition(",")[0]) == ("unknown", "no tokens in the window")
    assert only(coverage(Asked(), told)).state == "ok"


@pytest.mark.parametrize(
    ("tokens", "view", "bases", "expected"),
    [
        ("total", "fully_loaded", {}, "MEASURED"),
        ("total", "active", {}, "MODELLED"),
        ("output", "fully_loaded", {}, "MODELLED"),
        ("output", "fully_loaded", {"cost": "ASSUMED"}, "ASSUMED"),
        ("total", "fully_loaded", {"tokens": "MODELLED"}, "MODELLED"),
    ],
)
def test_the_basis_is_the_weakest_that_the_figure_stands_on(
    tokens: str, view: str, bases: dict[str, str], expected: str
) -> None:
    assert per_million("100", tokens, view, basis={**GROUP["basis"], **bases}).basis == expected
    assert worst([None]) is None


def test_every_group_has_a_line_for_every_budget() -> None:
    asked = Asked(budgets=(Budget(Decimal("2.4")), Budget(Decimal("9.7"), "output")))
    checks = list(budgets(asked, cost(group(), group(by={"model": "b"}))))
    assert [(one.by["model"], one.subject, one.state) for one in checks] == [
        ("llama-8b", "", "failed"),
        ("llama-8b", "output", "ok"),
        ("b", "", "failed"),
        ("b", "output", "ok"),
    ]
    assert list(budgets(Asked(), cost(FREE))) == []


# what an hour costs


@pytest.mark.parametrize(("limit", "state"), [("7.6", "ok"), ("7.5", "ok"), ("7.499999999", "failed")])
def test_an_hour_is_all_groups_together_over_the_time_that_is_covered(limit: str, state: str) -> None:
    # (3.00 + 0.75) in half an hour
    one = only(hourly(Asked(budget_hour=Decimal(limit)), cost(group(), FREE, seconds=1800.0)))
    assert (one.state, one.by, one.found) == (state, {}, Found("7.500000000", "USD per hour"))
    assert one.message == f"7.50 USD per hour is {'within' if state == 'ok' else 'above'} {limit.ljust(4, '0')}"


@pytest.mark.parametrize(("limit", "state"), [("4", "unknown"), ("2.99", "failed")])
def test_an_hour_of_which_a_part_has_no_price_is_never_within(limit: str, state: str) -> None:
    unpriced = group(by={"model": "b"}, cost=None)
    told = cost(group(), unpriced, findings=(finding("no_rate", "warning", message="add it"),))
    one = only(hourly(Asked(budget_hour=Decimal(limit)), told))
    assert (one.state, one.found) == (state, Found("3.000000000", "USD per hour"))
    assert ("add it" in one.message) is (state == "unknown")


def test_an_hour_without_any_price_or_time_is_unknown() -> None:
    asked = Asked(budget_hour=Decimal(1))
    assert only(hourly(asked, cost(group(cost=None)))).message == "no cost without a price: a price is missing"
    assert only(hourly(asked, cost(group(), seconds=0.0))).state == "unknown"
    assert list(hourly(Asked(), cost(group()))) == []


def test_a_bound_that_is_the_price_itself_is_not_exceeded_by_rounding() -> None:
    # 94 s of one GPU at 2.69 an hour, in whole nano-units
    told = cost(group(cost={"total": "0.070238889"}), seconds=94.0)
    one = only(hourly(Asked(budget_hour=Decimal("2.69")), told))
    assert (one.state, one.found) == ("ok", Found("2.690000004", "USD per hour"))
    assert one.message == "2.69 USD per hour is within 2.69"
    assert only(hourly(Asked(budget_hour=Decimal("2.689999")), told)).state == "failed"


# what reuse is worth


@pytest.mark.parametrize(
    ("net", "state", "warning"),
    [
        (("0.100000000", "0.200000000", "0.300000000"), "ok", False),
        (("-0.100000000", "0.200000000", "0.300000000"), "ok", True),
        ((ZERO, "0.200000000", "0.300000000"), "ok", True),
        (("-0.300000000", "-0.200000000", "0.100000000"), "ok", True),
        (("-0.300000000", "-0.200000000", ZERO), "ok", True),
        (("-0.300000000", "-0.200000000", "-0.000000001"), "failed", False),
        (("-0.500000000", "-0.500000000", "-0.500000000"), "failed", False),
        ((ZERO, ZERO, ZERO), "ok", False),
    ],
)
def test_a_tier_fails_where_its_whole_interval_is_a_loss(net: ESTIMATE, state: str, warning: bool) -> None:
    one = only(savings(saved(external=tier(*net))))
    assert (one.name, one.subject, one.state, one.warning) == ("savings", "external", state, warning)
    assert (one.found, one.bound) == (Found(net[1], "USD", net[0], net[2]), Bound("at_least", 0))
    assert one.basis == "ASSUMED"
    assert ("not proven" in one.message) is warning


def test_a_loss_names_what_makes_it_and_what_may_lessen_it() -> None:
    lost = tier("-0.300000000", "-0.200000000", "-0.100000000", holding="0.250000000", status="lower_bound")
    assert only(savings(saved(dram=lost))).message == (
        "net -0.20 USD (-0.30 to -0.10): reuse by dram costs more than it saves; holding it takes 0.25 USD; requests "
        "were preempted, and what they computed again is in no counter"
    )


def test_without_a_price_engine_seconds_decide() -> None:
    lost = {"low": -30.5, "point": -20.0, "high": -0.1}
    one = only(savings(saved(hbm=tier(ZERO, ZERO, ZERO, net=None, holding=None, net_engine_seconds=lost))))
    assert (one.state, one.basis) == ("failed", "MODELLED")
    assert one.found == Found(-20.0, "engine-seconds", -30.5, -0.1)
    assert one.message.startswith("net -20.00 engine-seconds (-30.50 to -0.10): ")


@pytest.mark.parametrize("status", ["insufficient_data", "unreconciled"])
def test_a_refused_group_is_unknown_with_its_first_reason(status: str) -> None:
    told = saved(status=status, reasons=("too little was seen", "and more"), hbm=tier(ZERO, ZERO, ZERO, net=None))
    one = only(savings(told))
    assert (one.state, one.message, one.hint) == (
        "unknown",
        "no figure: too little was seen",
        "`kvtally savings` tells all 2 reasons",
    )


def test_every_tier_is_judged_by_itself() -> None:
    told = saved(
        hbm=tier("1.000000000", "2.000000000", "3.000000000"),
        external=tier("-2.000000000", "-1.500000000", "-1.000000000"),
    )
    assert [(one.subject, one.state) for one in savings(told)] == [("hbm", "ok"), ("external", "failed")]


# hit rates: 60,000 of 100,000 prompt tokens were reused


def reuse(prompt: int | None, computed: int | None, **by: str) -> dict[str, Any]:
    return group(by=by or {"model": "llama-8b"}, tokens={"prompt": prompt, "computed": computed, "generated": 1})


@pytest.mark.parametrize(("least", "state"), [(0.59, "ok"), (0.6, "ok"), (0.61, "failed")])
def test_a_hit_rate_fails_below_its_bound(least: float, state: str) -> None:
    one = only(hit_rates(Asked(hit_rate_min=least), seen(cost(group(), FREE))))
    assert (one.state, one.found, one.bound) == (state, Found(0.6, "share"), Bound("at_least", least))


@pytest.mark.parametrize(
    ("prompt", "computed"), [(9_999, 9_999), (0, 0), (None, None), (100_000, None)], ids=["few", "none", "", "untold"]
)
def test_few_tokens_have_no_hit_rate(prompt: int | None, computed: int | None) -> None:
    told = seen(cost(reuse(prompt, computed)), before=cost(group()))
    states = [one.state for one in hit_rates(Asked(hit_rate_min=0.5, hit_rate_drop=0.5), told)]
    assert states == ["unknown", "unknown"]
    assert only(hit_rates(Asked(hit_rate_min=1.0), seen(cost(reuse(10_000, 1))))).state == "failed"


# it was 80 %, and may lose half of that
@pytest.mark.parametrize(("computed", "state"), [(60_000, "ok"), (60_001, "failed"), (100_000, "failed")])
def test_a_hit_rate_collapses_against_the_window_before(computed: int, state: str) -> None:
    told = seen(cost(reuse(100_000, computed)), before=cost(reuse(50_000, 10_000)))
    one = only(hit_rates(Asked(hit_rate_drop=0.5), told))
    assert (one.state, one.subject, one.bound) == (state, "change", Bound("at_least", 0.4))
    assert one.message.endswith("in the window before 80.0%")


def test_there_is_no_collapse_without_a_hit_rate_before() -> None:
    asked, now = Asked(hit_rate_drop=0.5), cost(reuse(100_000, 100_000))
    assert only(hit_rates(asked, seen(now))).state == "unknown"
    assert only(hit_rates(asked, seen(now, before=cost(reuse(9_999, 0))))).state == "unknown"
    assert only(hit_rates(asked, seen(now, before=cost(reuse(100_000, 10, model="b"))))).state == "unknown"


def test_next_to_nothing_cannot_collapse() -> None:
    now, asked = cost(reuse(100_000, 100_000)), Asked(hit_rate_drop=0.5)
    assert only(hit_rates(asked, seen(now, before=cost(reuse(100_000, 90_001))))).state == "ok"
    assert only(hit_rates(asked, seen(now, before=cost(reuse(100_000, 90_000))))).state == "failed"


# counters that reconcile

BROKEN = finding("identity_broken", "error", message="they do not add up")


@pytest.mark.parametrize(
    "one",
    [
        BROKEN,
        finding("too_many_targets", "error", "vllm:0"),
        finding("counter_backwards", "warning"),
        finding("counter_impossible", "warning"),
    ],
    ids=lambda one: one["kind"],
)
def test_counters_that_contradict_themselves_fail(one: dict[str, str]) -> None:
    check = only(reconciled(seen(cost(group(), findings=(one,)))))
    assert (check.state, check.subject, check.found) == ("failed", one["target"], Found(1, "errors"))
    assert check.message == f"{one['kind']} at 2026-11-23T04:00:00.000Z: {one['message']}"


@pytest.mark.parametrize("kind", ["gateway_disagrees", "hour_overtaken", "tokens_lost", "tokens_unknown"])
def test_what_only_raises_a_doubt_is_a_warning(kind: str) -> None:
    doubt, sound = reconciled(seen(cost(group(), findings=(finding(kind, "warning"),))))
    assert (doubt.state, doubt.warning, doubt.bound) == ("ok", True, None)
    assert (sound.state, sound.warning, sound.found) == ("ok", False, Found(0, "errors"))


def test_what_has_nothing_to_do_with_reconciling_is_left_out() -> None:
    others = (finding("no_rate", "warning"), finding("engine_restarted", "info"), finding("step_law_misfit", "warning"))
    assert only(reconciled(seen(cost(group(), findings=others)))).state == "ok"


def test_what_the_ledger_noted_and_the_audit_finds_again_counts_once() -> None:
    later = {**BROKEN, "start": "2026-11-23T04:30:00.000Z"}
    audited = Audited(99, (BROKEN, later, finding("hour_wrong", "error", message="sums differ")))
    checks = list(reconciled(seen(cost(group(), findings=(BROKEN,)), audited=audited)))
    assert [(one.found.point, one.message) for one in checks if one.found] == [
        (2, "identity_broken at 2026-11-23T04:00:00.000Z, and 1 more like it: they do not add up"),
        (1, "hour_wrong at 2026-11-23T04:00:00.000Z: sums differ"),
    ]


def test_it_says_whether_the_ledger_was_audited() -> None:
    assert "an audit of 1,234 intervals" in only(reconciled(seen(cost(group()), audited=Audited(1234, ())))).message
    assert "was not audited" in only(reconciled(seen(cost(group())))).message


def test_savings_that_are_refused_as_unreconciled_fail_once() -> None:
    refused = saved(status="unreconciled", reasons=("counters do not add up",))
    one = only(reconciled(seen(cost(group()), savings=refused)))
    assert (one.state, one.by, one.message) == ("failed", {"model": "llama-8b"}, "counters do not add up")
    assert only(reconciled(seen(cost(group(), findings=(BROKEN,)), savings=refused))).subject == "engine/a/0"


# coverage and sources


@pytest.mark.parametrize(("least", "state"), [(0.94, "ok"), (0.95, "ok"), (0.951, "failed")])
def test_coverage_fails_below_its_bound_and_says_why(least: float, state: str) -> None:
    told = cost(group(), FREE, findings=(finding("not_watched", "info", message="no kvtally ran"),))
    one = only(coverage(Asked(coverage_min=least), told))
    assert (one.state, one.found, one.bound) == (state, Found(0.95, "share"), Bound("at_least", least))
    assert ("no kvtally ran" in one.message) is (state == "failed")


def seconds_of(**states: float) -> dict[str, Any]:
    return {**GROUP["engine_seconds"], **dict.fromkeys(STATES, 0.0), **states}


def failed_for(seconds: int, target: str = "engine:a") -> dict[str, str]:
    end = f"2026-11-23T04:{seconds // 60:02}:{seconds % 60:02}.000Z"
    return {**finding("scrapes_failed", "info", target, f"for {seconds} s"), "start": SPAN["start"], "end": end}


@pytest.mark.parametrize(
    ("failed", "by", "states", "share"),
    [
        # a restart: 60 s of it loading, all of them asked for in vain
        (failed_for(90), {"model": "m"}, {"occupied": 240.0, "warm_up": 60.0}, 1.0),
        # the engine did not restart: 60 s are not watched
        (failed_for(90), {"model": "m"}, {"occupied": 300.0}, 0.8),
        # kvtally did not run for most of it
        (failed_for(30), {"model": "m"}, {"occupied": 200.0, "warm_up": 60.0, "unallocated": 40.0}, 0.9),
        (failed_for(90), {"replica": "a/0"}, {"occupied": 240.0, "warm_up": 60.0}, 1.0),
        (failed_for(90, "nvml"), {"model": "m"}, {"occupied": 240.0, "warm_up": 60.0}, 0.8),
        (failed_for(90, "engine:ab"), {"replica": "a/0"}, {"occupied": 240.0, "warm_up": 60.0}, 0.8),
    ],
)
def test_the_time_in_which_an_engine_is_down_or_starts_is_not_missed(
    failed: dict[str, str], by: dict[str, str], states: dict[str, float], share: float
) -> None:
    told = cost(group(by=by, coverage=0.8, engine_seconds=seconds_of(**states)), findings=(failed,))
    one = only(coverage(Asked(coverage_min=0.95), told))
    assert (one.state, one.found) == ("ok" if share == 1 else "failed", Found(share, "share"))
    assert ("down or starting" in one.message) is (share > 0.8)


def test_what_lasted_longest_is_the_reason_for_what_was_not_watched() -> None:
    told = cost(group(coverage=0.5), findings=(failed_for(20), failed_for(45), failed_for(60, "nvml"), failed_for(30)))
    assert only(coverage(Asked(), told)).message.endswith(": for 45 s")


def test_an_engine_that_was_never_watched_has_no_coverage() -> None:
    assert only(coverage(Asked(), cost(group(coverage=None)))).state == "unknown"


NEWEST = START + HOUR


@pytest.mark.parametrize(
    ("behind_seconds", "interval_seconds", "state", "bound"),
    [(120, 5, "ok", 120.0), (121, 5, "failed", 120.0), (180, 60, "ok", 180.0), (181, 60, "failed", 180.0)],
)
def test_an_engine_is_gone_after_two_minutes_and_three_intervals(
    behind_seconds: int, interval_seconds: int, state: str, bound: float
) -> None:
    source = Source("a/0", NEWEST - behind_seconds * SECOND, interval_seconds * SECOND)
    one = only(sources(seen(cost(group()), sources=(source,), newest_ns=NEWEST)))
    assert (one.state, one.found, one.bound) == (
        state,
        Found(float(behind_seconds), "seconds"),
        Bound("at_most", bound),
    )
    assert one.subject == ("engine/a/0" if state == "failed" else "")


def test_each_engine_that_is_gone_has_its_line_and_the_others_none() -> None:
    told = [Source("a/0", NEWEST - HOUR, SECOND), Source("b/0", NEWEST, SECOND), Source("c/0", NEWEST - HOUR, SECOND)]
    checks = list(sources(seen(cost(group()), sources=tuple(told), newest_ns=NEWEST)))
    assert [(one.subject, one.state) for one in checks] == [("engine/a/0", "failed"), ("engine/c/0", "failed")]


def test_a_window_that_ended_long_ago_says_nothing_of_what_is_gone_now() -> None:
    gone = (Source("a/0", START, SECOND),)
    assert list(sources(seen(cost(group()), sources=gone, newest_ns=NEWEST, is_live=False))) == []


@pytest.mark.parametrize(
    ("age_seconds", "state"), [(0, "ok"), (600, "ok"), (601, "failed"), (-600, "ok"), (-601, "unknown")]
)
def test_a_ledger_is_stale_by_the_clock_and_only_where_that_was_asked(age_seconds: int, state: str) -> None:
    told = seen(cost(group()), newest_ns=NEWEST, now_ns=NEWEST + age_seconds * SECOND)
    one = only(fresh(Asked(fresh_ns=600 * SECOND), told))
    assert (one.state, one.found, one.bound) == (state, Found(float(age_seconds), "seconds"), Bound("at_most", 600.0))
    assert list(fresh(Asked(), told)) == []


# all of them


def test_the_checks_come_in_one_order_and_what_is_skipped_is_left_out() -> None:
    asked = Asked(
        budgets=(Budget(Decimal(3)),), budget_hour=Decimal(3), hit_rate_min=0.1, fresh_ns=MINUTE, coverage_min=0.9
    )
    told = seen(cost(group()), savings=saved(hbm=tier("1.0", "2.0", "3.0")), sources=(Source("a/0", NEWEST, SECOND),))
    names = ["budget", "hourly", "savings", "hit-rate", "reconcile", "coverage", "sources", "fresh"]
    assert [one.name for one in judged(asked, told)] == names
    skipped = asked._replace(skipped=frozenset({"reconcile", "coverage", "sources"}))
    left = [name for name in names if name not in skipped.skipped]
    assert [one.name for one in judged(skipped, told)] == left


def test_an_empty_window_is_unknown_and_an_empty_ledger_stale() -> None:
    window, stale = judged(Asked(budgets=(Budget(Decimal(3)),), fresh_ns=MINUTE), seen(cost(), newest_ns=None))
    assert (window.name, window.state) == ("window", "unknown")
    assert (stale.name, stale.state, stale.found) == ("fresh", "failed", None)


@pytest.mark.parametrize(
    ("states", "state"),
    [(["ok", "ok"], "ok"), (["ok", "unknown"], "unknown"), (["unknown", "failed"], "failed"), ([], "ok")],
)
def test_an_answer_is_as_good_as_its_worst_check(states: list[Any], state: str) -> None:
    checks = [Check("budget", {}, one, "") for one in states]
    answer = answer_of(checks, seen(cost(group())))
    assert (answer["state"], answer["failed"], answer["unknown"], answer["warnings"]) == (
        state,
        states.count("failed"),
        states.count("unknown"),
        0,
    )


@pytest.mark.parametrize(
    ("amount", "text"),
    [("2.500000000", "2.50"), ("0.024542422", "0.024542422"), ("-0.1", "-0.10"), ("30", "30.00"), ("0", "0.00")],
)
def test_an_amount_is_told_with_all_of_its_digits(amount: str, text: str) -> None:
    assert money_text(amount) == text


# what is looked at


def looked(path: str, asked: Asked = Asked(), window: Window | None = None, **more: Any) -> Seen:  # noqa: B008  # frozen
    with reader_of(path) as reader:
        return look(reader, window, asked, book_of(reader, Config()), Payment(), now_ns=NEWEST, **more)


ABOUT = {"10.0.0.1:8000": About(gpus=("GPU-a",)), "10.0.0.2:8000": About(gpus=("GPU-b",))}


def deployed(path: str, *, minutes: int, silent_from: int, step_seconds: int = 20) -> None:
    """Two engines and a GPU; the second engine, and with `silent_from` below 0 the first too, falls silent."""
    deployment = Deployment(path, ABOUT, interval_seconds=step_seconds)
    engines, gpu = [FakeEngine("10.0.0.1:8000/0"), FakeEngine("10.0.0.2:8000/0")], FakeGpu("GPU-a")
    for number in range(0, minutes * 60, step_seconds):
        for engine in engines:
            engine.serve(computed=100, hbm=300, generated=10, steps=5, seconds=1.0)
        gpu.run(step_seconds, 1)
        silent = number >= abs(silent_from) * 60
        answering = [None if silent and silent_from < 0 else engines[0], None if silent else engines[1]]
        deployment.scrape(START + number * SECOND, answering, [gpu])
    deployment.close()


def test_an_engine_that_fell_silent_is_told_by_the_others_that_go_on(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=30, silent_from=20)
    told = looked(path)
    # the last scrapes are at 29:40, and of the second engine at 19:40
    assert told.newest_ns == START + 1780 * SECOND
    assert told.sources == (
        Source("10.0.0.1:8000/0", START + 1780 * SECOND, 20 * SECOND),
        Source("10.0.0.2:8000/0", START + 1180 * SECOND, 20 * SECOND),
    )
    one = only(sources(told))
    assert (one.subject, one.state, one.found) == ("engine/10.0.0.2:8000/0", "failed", Found(600.0, "seconds"))


def test_engines_that_all_fell_silent_are_told_by_the_gpus(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=30, silent_from=-20)
    assert [one.state for one in sources(looked(path))] == ["failed", "failed"]


def test_an_engine_that_had_left_before_the_window_is_not_missed(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=30, silent_from=10)
    later = Window(START + 20 * MINUTE, START + 1780 * SECOND)
    told = looked(path, window=later)
    assert [one.name for one in told.sources] == ["10.0.0.1:8000/0"]
    assert only(sources(told)).state == "ok"
    before = looked(path, window=Window(START, START + 20 * MINUTE))
    assert (len(before.sources), before.is_live, list(sources(before))) == (2, False, [])


def test_slow_scrapes_have_three_of_their_own_intervals(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=60, silent_from=50, step_seconds=120)
    told = looked(path)
    assert [one.interval_ns for one in told.sources] == [120 * SECOND, 120 * SECOND]
    # the last scrapes are at 58:00 and 48:00
    one = only(sources(told))
    assert (one.state, one.found, one.bound) == ("failed", Found(600.0, "seconds"), Bound("at_most", 360.0))


def test_the_window_before_is_the_one_that_ends_where_this_begins(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=30, silent_from=30)
    window = Window(START + 20 * MINUTE, START + 1780 * SECOND)
    assert looked(path, window=window).before is None
    told = looked(path, Asked(hit_rate_drop=0.5), window)
    assert told.before is not None
    assert told.before["window"]["start"] == "2026-11-23T04:10:20.000Z"
    assert told.before["window"]["end"] == "2026-11-23T04:20:00.000Z"
    # 29 intervals of two engines, each with 400 prompt tokens of which 100 were computed
    assert told.before["groups"][0]["tokens"]["prompt"] == 2 * 29 * 400


@pytest.mark.parametrize("window", [None, Window(0, START + HOUR), Window(START, START + MINUTE)])
def test_the_first_window_has_none_before_it(tmp_path: Path, window: Window | None) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=2, silent_from=2)
    told = looked(path, Asked(hit_rate_drop=0.5), window)
    assert (told.cost["groups"][0]["tokens"]["prompt"] > 0, told.before) == (True, None)


def test_where_only_hours_are_left_the_window_before_ends_with_the_hour(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path, seconds=60)
    with reader_of(path) as reader:
        keep_rates(reader, Config())
        hours = [START + number * HOUR for number in range(4)]
        settle_hours(reader, hours, START + 6 * HOUR, book_of(reader, Config()), Payment())
        assert reader.prune(START + 3 * HOUR)
    # 06:30 to 06:45 is told by its hour, and the 15 minutes before that by the hour from 05:00 on
    window = Window(START + 150 * MINUTE, START + 165 * MINUTE)
    told = looked(path, Asked(hit_rate_drop=0.5), window)
    assert told.before is not None
    spans = [(each["window"]["start"][11:19], each["window"]["end"][11:19]) for each in (told.before, told.cost)]
    assert spans == [("05:00:00", "06:00:00"), ("06:00:00", "07:00:00")]


def test_an_empty_ledger_has_nothing_to_look_at(tmp_path: Path) -> None:
    told = looked(new_ledger(tmp_path), Asked(hit_rate_drop=0.5))
    assert (told.cost["groups"], told.before, told.audited, told.sources, told.newest_ns) == ([], None, None, (), None)


def test_what_is_skipped_is_not_asked_for(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployed(path, minutes=2, silent_from=2)
    told = looked(path, Asked(skipped=frozenset({"savings", "reconcile"})))
    assert (told.savings, told.audited) == (None, None)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four hours of two engines of which one interval of the first hour was changed afterwards."""
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path, seconds=60)
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        first = "(SELECT min(start_ns) FROM engine_interval WHERE computed_tokens > 1)"
        changed = f"UPDATE engine_interval SET computed_tokens = computed_tokens - 1 WHERE start_ns = {first}"
        assert connection.execute(changed).rowcount == 1
    return path


def test_an_audit_is_of_the_window_and_not_of_what_lies_outside(story: str) -> None:
    inside, outside = Window(START, START + HOUR), Window(START + 2 * HOUR, START + 3 * HOUR)
    audited = looked(story, window=inside).audited
    assert audited is not None
    assert {one["kind"] for one in audited.findings} == {"identity_broken", "identity_flag_wrong", "hour_wrong"}
    assert looked(story, window=outside).audited == Audited(audited.intervals, ())


def test_a_ledger_of_more_intervals_than_wanted_is_not_audited(story: str) -> None:
    audited = looked(story).audited
    assert audited is not None
    assert looked(story, audited_most=audited.intervals).audited == audited
    assert looked(story, audited_most=audited.intervals - 1).audited is None
