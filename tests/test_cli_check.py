from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import copied
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, FakeGpu, new_ledger, rate, tell_story, url_of

from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.render.check import check_lines, check_table
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.command_line import Call

CLOSED = ("--since", "1795409235.9", "--until", "1795409256.7")  # a phase of the packaged recording
CHECK = {
    "name": str,
    "by": dict,
    "subject": str,
    "state": str,
    "warning": bool,
    "found": dict | None,
    "bound": dict | None,
    "basis": str | None,
    "message": str,
    "hint": str,
}


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four hours of two engines and a free GPU (tests/ledgers.py), of whose model no shape is known."""
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path)
    return url_of(path)


@pytest.fixture(scope="module")
def broken(story: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with one interval of its last hour changed afterwards."""
    url = copied(story, tmp_path_factory.mktemp("broken"))
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        last = "(SELECT max(start_ns) FROM engine_interval WHERE computed_tokens > 0)"
        changed = f"UPDATE engine_interval SET computed_tokens = computed_tokens + 1 WHERE start_ns = {last}"
        assert connection.execute(changed).rowcount == 1
    return url


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An hour in which three quarters of the prompts were reused, half an hour in which a tenth was."""
    path = new_ledger(tmp_path_factory.mktemp("collapsed"))
    deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",))})
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    for number in range(0, 5400, 20):
        reused = 750 if number <= 3640 else 100
        engine.serve(computed=1000 - reused, hbm=reused, generated=10, steps=5, seconds=1.0)
        gpu.run(20, 1)
        deployment.scrape(START + number * SECOND, [engine], [gpu])
    deployment.close()
    return url_of(path)


def answer(call: Call, *arguments: str, status: int = 0) -> dict[str, Any]:
    ran = call("check", "--format", "json", *arguments)
    assert (ran.status, ran.err) == (status, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def states(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    return [(one["name"], one["subject"], one["state"]) for one in found["checks"]]


# the answer


def test_the_answer_has_its_keys_and_types(kvtally: Call, demo_ledger: str) -> None:
    found = answer(
        kvtally, "--ledger", demo_ledger, "--budget", "2.50/M", "--budget-hour", "30", "--hit-rate-drop", "0.5"
    )
    assert found.keys() == {"window", "currency", "state", "failed", "unknown", "warnings", "checks"}
    assert found["checks"]
    for one in found["checks"]:
        assert one.keys() == CHECK.keys()
        assert [key for key, kind in CHECK.items() if not isinstance(one[key], kind)] == []
        assert one["state"] in {"ok", "failed", "unknown"}


@pytest.mark.parametrize("view", ["fully_loaded", "active"])
@pytest.mark.parametrize("window", [(), CLOSED], ids=["whole", "phase"])
def test_figures_agree_with_cost_to_the_digit(
    kvtally: Call, demo_ledger: str, window: tuple[str, ...], view: str
) -> None:
    where = ("--ledger", demo_ledger, *window)
    budgets = [word for kind in ("", ":input", ":input_computed", ":output") for word in ("--budget", f"9/M{kind}")]
    found = answer(kvtally, *where, *budgets, "--budget-hour", "9", "--view", view)
    cost = json.loads(kvtally("cost", "--format", "json", *where).out)
    group = cost["groups"][0]
    units = group["cost_per_million"][view]
    assert found["window"] == cost["window"]
    told = [one["found"] for one in found["checks"] if one["name"] == "budget"]
    assert [one["point"] for one in told] == [units[name] for name in ("total", "input", "input_computed", "output")]
    assert [(one["low"], one["high"]) for one in told[1:]] == [
        (units["intervals"][name]["low"], units["intervals"][name]["high"])
        for name in ("input", "input_computed", "output")
    ]
    total, hours = Fraction(group["cost"]["total"]), Fraction(cost["window"]["covered_seconds"]) / 3600
    hour = next(one["found"]["point"] for one in found["checks"] if one["name"] == "hourly")
    assert hour == f"{float(total / hours):.9f}"


def test_figures_agree_with_savings_to_the_digit(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED)
    net = json.loads(kvtally("savings", "--format", "json", "--ledger", demo_ledger, *CLOSED).out)
    told = [one["found"] for one in found["checks"] if one["name"] == "savings"]
    tiers = net["groups"][0]["tiers"]
    assert told == [{"unit": "USD", **tiers[name]["net"]} for name in tiers]
    assert len(told) == 1


def test_a_window_is_counted_back_from_the_newest_interval_or_from_until(kvtally: Call, story: str) -> None:
    where = ("--ledger", story, "--skip", "savings", "--no-audit")
    hour = answer(kvtally, *where, "--window", "1h")
    assert hour["window"] == answer(kvtally, *where, "--since", "1h")["window"]
    assert hour["window"]["start"] == "2026-11-23T07:14:47.002Z"
    before = answer(
        kvtally, "--ledger", story, "--window", "30m", "--until", "2026-11-23T06:00Z", "--coverage-min", "0"
    )
    assert before["window"]["start"][:16] == "2026-11-23T05:30"
    assert before["window"]["end"][:16] == "2026-11-23T06:00"


# the exit status


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((), 0),
        (("--budget", "0.03/M"), 0),
        (("--budget", "0.02/M"), 1),
        (("--budget", "0.02/M", "--view", "active"), 0),
        (("--budget", "1/M:output"), 1),
        (("--budget", "0.03/M", "--budget", "1/M:output"), 1),
        (("--budget-hour", "2.69"), 0),
        (("--budget-hour", "2.68"), 1),
        (("--hit-rate-min", "0.69"), 0),
        (("--hit-rate-min", "0.7"), 1),
        (("--hit-rate-drop", "0.5"), 0),  # there is no window before: unknown
        (("--hit-rate-drop", "0.5", "--strict"), 1),
        (("--strict",), 0),
        (("--fresh", "10m"), 1),
        (("--fresh", "5000w"), 0),
    ],
)
def test_the_exit_status_says_whether_it_is_all_well(
    kvtally: Call, demo_ledger: str, arguments: tuple[str, ...], status: int
) -> None:
    ran = kvtally("check", "--ledger", demo_ledger, "--skip", "savings", "--no-audit", *arguments)
    assert (ran.status, ran.err) == (status, "")


def test_a_window_with_nothing_in_it_is_unknown(kvtally: Call, demo_ledger: str) -> None:
    later = ("--ledger", demo_ledger, "--since", "2027-01-01", "--budget", "1/M")
    assert states(answer(kvtally, *later)) == [("window", "", "unknown")]
    assert kvtally("check", *later, "--strict").status == 1


def test_an_empty_ledger_is_unknown_and_stale(kvtally: Call, tmp_path: Path) -> None:
    empty = url_of(new_ledger(tmp_path))
    assert states(answer(kvtally, "--ledger", empty, "--window", "1h")) == [("window", "", "unknown")]
    stale = answer(kvtally, "--ledger", empty, "--fresh", "1h", status=1)
    assert states(stale) == [("window", "", "unknown"), ("fresh", "", "failed")]


def test_without_a_ledger_the_status_is_3(kvtally: Call) -> None:
    ran = kvtally("check", "--ledger", "sqlite:///none.db", "--quiet")
    assert (ran.status, ran.out) == (3, "")
    assert ran.err.startswith("kvtally: ")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--budget", "2.50"), "--budget '2.50' is no budget: write 2.50/M"),
        (("--budget", ".50/M"), "is no budget"),  # $2.50/M, after the shell
        (("--budget", "2.50/M:cached"), "is no budget"),
        (("--budget", "-1/M"), "is no budget"),
        (("--budget", "USD2.50EUR/M"), "is no budget"),
        (("--budget", "1e3/M"), "is no budget"),
        (("--budget", "0/M"), "--budget '0' is no amount"),
        (("--budget", "2.50EUR/M"), "--budget is in EUR, the ledger's prices are in USD"),
        (("--budget-hour", "0"), "--budget-hour '0' is no amount"),
        (("--budget-hour", "thirty"), "is no amount"),
        (("--window", "1"), "--window '1' is no length of time"),
        (("--window", "2026-11-23"), "is no length of time"),
        (("--window", ""), "is no length of time"),
        (("--window", "0h"), "--window '0h' must be more than 0"),
        (("--window", "1h", "--since", "1h"), "--window and --since"),
        (("--fresh", "ten minutes"), "--fresh 'ten minutes' is no length of time"),
        (("--by", "colour"), "--by colour"),
        (("--hit-rate-drop", "0.5", "--by", "model,hour"), "--hit-rate-drop compares"),
        (("--hit-rate-min", "30"), "--hit-rate-min"),
        (("--quiet", "--format", "json"), "--quiet"),
        (("--skip", "budget"), "--skip"),
    ],
)
def test_a_wrong_call_is_said_to_be_one(kvtally: Call, demo_ledger: str, arguments: tuple[str, ...], told: str) -> None:
    ran = kvtally("check", "--ledger", demo_ledger, *arguments)
    assert (ran.status, ran.out) == (2, "")
    assert told in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("budget", ["0.03USD/M", "0.03 USD/M", "USD 0.03/M", "USD0.03/M:total"])
def test_a_budget_may_name_the_currency(kvtally: Call, demo_ledger: str, budget: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, "--budget", budget)
    assert found["checks"][0]["bound"] == {"at_most": "0.030000000"}


# what it finds


def test_any_group_that_fails_fails_it(kvtally: Call, story: str) -> None:
    where = ("--ledger", story, "--window", "1h", "--by", "replica", "--budget", "0.37/M")
    found = answer(kvtally, *where, status=1)
    budgets = [(one["by"]["replica"], one["state"]) for one in found["checks"] if one["name"] == "budget"]
    # 0.3756 and 0.3674: what each costs stands in `kvtally cost`
    assert budgets == [("10.0.0.1:8000/0", "failed"), ("10.0.0.2:8000/0", "ok"), (None, "ok")]


def test_all_together_holds_the_gpus_that_nobody_held(kvtally: Call, story: str) -> None:
    where = ("--ledger", story, "--window", "1h", "--budget", "0.4/M")
    assert [one["warning"] for one in answer(kvtally, *where)["checks"][:2]] == [False, True]
    together = answer(kvtally, *where, "--by", "", status=1)["checks"][0]
    assert (together["by"], together["state"]) == ({}, "failed")


def test_counters_that_do_not_reconcile_fail_their_window_alone(kvtally: Call, broken: str) -> None:
    found = answer(kvtally, "--ledger", broken, "--window", "1h", status=1)
    failed = {one["message"].partition(" ")[0] for one in found["checks"] if one["state"] == "failed"}
    assert failed == {"identity_broken", "identity_flag_wrong", "hour_wrong"}
    earlier = ("--ledger", broken, "--since", "2026-11-23T04:00Z", "--until", "2026-11-23T06:00Z")
    assert kvtally("check", *earlier, "--coverage-min", "0.5").status == 0
    for without in (("--no-audit",), ("--skip", "reconcile")):
        assert kvtally("check", "--ledger", broken, "--window", "1h", *without).status == 0


def test_a_hit_rate_that_collapsed_fails(kvtally: Call, collapsed: str) -> None:
    where = ("--ledger", collapsed, "--window", "29m")
    found = answer(kvtally, *where, "--hit-rate-drop", "0.8", "--hit-rate-min", "0.1", status=1)
    rates = [one for one in found["checks"] if one["name"] == "hit-rate"]
    assert [(one["state"], one["found"]["point"]) for one in rates] == [("ok", 0.1), ("failed", 0.1)]
    assert rates[1]["bound"] == {"at_least": 0.15}  # a fifth of 75 %
    assert kvtally("check", *where, "--hit-rate-drop", "0.9").status == 0


def test_time_that_nobody_watched_fails(kvtally: Call, story: str) -> None:
    where = ("--ledger", story, "--skip", "savings", "--no-audit")
    found = answer(kvtally, *where, status=1)
    failed = [one for one in found["checks"] if one["state"] == "failed"]
    assert [(one["name"], one["found"]["point"]) for one in failed] == [("coverage", 0.84673)]
    assert kvtally("check", *where, "--coverage-min", "0.84").status == 0
    assert kvtally("check", *where, "--skip", "coverage").status == 0


def test_a_tier_that_holds_more_than_it_earns_fails(kvtally: Call, tmp_path: Path, demo_ledger: str) -> None:
    url = copied(demo_ledger, tmp_path)
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        held = """UPDATE target SET attributes = json_set(attributes, '$.dram_gib', '512') WHERE kind = 'engine'"""
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        assert connection.execute(held).rowcount == 1
    with LedgerReader(url) as reader:
        reader.add_rates([rate("dram", "0.01", "gib-hour", START - 1000 * HOUR)])
    found = answer(kvtally, "--ledger", url, status=1)
    savings = {one["subject"]: one for one in found["checks"] if one["name"] == "savings"}
    assert [(tier, one["state"]) for tier, one in savings.items()] == [("hbm", "ok"), ("dram", "failed")]
    # 512 GiB at 0.01 an hour for the 94 s of the recording
    assert savings["dram"]["found"] == {
        "point": "-0.133688889",
        "unit": "USD",
        "low": "-0.133688889",
        "high": "-0.133688889",
    }


# what a person sees


def test_quiet_says_nothing_where_all_is_well(kvtally: Call, demo_ledger: str) -> None:
    ran = kvtally("check", "--ledger", demo_ledger, "--quiet", "--hit-rate-drop", "0.5", "--budget", "1/M")
    assert (ran.status, ran.out, ran.err) == (0, "", "")


def test_quiet_is_a_line_for_each_failed_check(kvtally: Call, broken: str, golden: Callable[[str, str], None]) -> None:
    where = ("--ledger", broken, "--window", "1h", "--budget", "0.3/M", "--budget", "9/M:output", "--quiet")
    ran = kvtally("check", *where)
    assert (ran.status, ran.err) == (1, "")
    golden("check-quiet.txt", ran.out)
    # of whose model no shape is known: no savings
    strict = kvtally("check", *where, "--strict").out.splitlines()
    assert [line.partition(":")[0] for line in strict if line not in ran.out.splitlines()] == [
        "unknown savings llama-8b"
    ]


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("name", ["recording", "story", "broken"])
def test_the_table(
    name: str, columns: int, kvtally: Call, request: pytest.FixtureRequest, golden: Callable[[str, str], None]
) -> None:
    request.getfixturevalue("monkeypatch").setenv("COLUMNS", str(columns))
    url: str = request.getfixturevalue({"recording": "demo_ledger"}.get(name, name))
    asked = ("--budget", "0.3/M", "--budget", "9/M:output", "--budget-hour", "30", "--hit-rate-min", "0.3")
    if name == "recording":
        asked = ("--budget", "0.02/M", "--budget", "1.20/M:output", "--budget-hour", "30", "--hit-rate-drop", "0.5")
    window = () if name == "recording" else ("--window", "1h")
    ran = kvtally("check", "--format", "table", "--ledger", url, *window, *asked)
    golden(f"check-{name}-{columns}.txt", ran.out)


def test_names_from_a_page_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    one = {
        "name": "budget",
        "by": {"model": "a\x1b[2Jb\nc"},
        "subject": "",
        "state": "failed",
        "warning": False,
        "found": None,
        "bound": None,
        "basis": None,
        "message": "m",
        "hint": "",
    }
    told = {"window": {"start": None}, "currency": "", "state": "failed", "failed": 1, "unknown": 0, "warnings": 0}
    assert list(check_lines({**told, "checks": [one]})) == ["failed budget a?[2Jb?c: m"]
    check_table({**told, "checks": [one]})
    assert "\x1b[2J" not in capsys.readouterr().out
