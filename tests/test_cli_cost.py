from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import call, copied
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, tell_story, url_of

from kvtally.agent.grouping import DIMENSIONS
from kvtally.agent.ledger.columns import HEAD_REVISION
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.command_line import Call

CLOSED = ("--since", "1795409235.9", "--until", "1795409256.7")  # a phase of the packaged recording
RESOURCES = ("gpu", "server", "energy", "dram", "storage", "network", "platform", "unused_commitment")
STATES = ("occupied", "idle", "asleep", "warm_up", "unallocated")
AMOUNT = re.compile(r"\d+\.\d{9}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")

# CLI.md's answer, whole: what stands at each key. "amount": a decimal string of nine places; "| null": may be unknown
INTERVAL = {"low": "amount", "high": "amount"}
UNIT_COSTS = {
    "total": "amount | null",
    "input_computed": "amount | null",
    "input_cached": {"hbm": "amount"},
    "input": "amount | null",
    "output": "amount | null",
    "intervals": {"input_computed": INTERVAL, "input": INTERVAL, "output": INTERVAL, "input_cached": {}},
}
ATTRIBUTED = ("input_computed", "input_cached", "orphan_holding", "orphan_copies", "output")
BOUNDS = {"low": "float", "high": "float"}
ANSWER = {
    "window": {"start": "time", "end": "time", "covered_seconds": "float"},
    "currency": "text",
    "groups": [
        {
            "by": {"model": "text | null"},
            "tokens": {
                "prompt": "int | null",
                "computed": "int | null",
                "cached": dict.fromkeys(("hbm", "dram", "disk", "p2p", "external"), "int | null"),
                "generated": "int | null",
            },
            "engine_seconds": {
                **dict.fromkeys(("prefill", "decode", "stall", "store"), "float | null"),
                **dict.fromkeys((*STATES[1:], "occupied"), "float"),
            },
            "engine_seconds_intervals": dict.fromkeys(("prefill", "decode", "stall", "store"), BOUNDS),
            "prefill_share": {"low": "float", "point": "float", "high": "float"},
            "split_law": "text | null",
            "split_scale": "float | null",
            "calibrations": ["text"],
            "cost": {
                "total": "amount",
                **dict.fromkeys(RESOURCES, "amount"),
                "of_which": dict.fromkeys(STATES[1:], "amount"),
                "attributed": dict.fromkeys(ATTRIBUTED, "amount") | {"input_cached": {"hbm": "amount"}},
            },
            "orphan_holding": "amount | null",
            "cost_per_million": {"fully_loaded": UNIT_COSTS, "active": UNIT_COSTS},
            "basis": {
                "tokens": "basis",
                "tiers": "basis | null",
                "states": "basis",
                "cost": "basis | null",
                "active": "basis | null",
                "split": "basis | null",
            },
            "rates": ["text"],
            "coverage": "float | null",
        }
    ],
    "findings": [dict.fromkeys(("kind", "severity", "target", "start", "end", "message"), "text")],
}
KINDS: dict[str, Callable[[Any], bool]] = {
    "amount": lambda value: isinstance(value, str) and AMOUNT.fullmatch(value) is not None,
    "text": lambda value: isinstance(value, str),
    "time": lambda value: isinstance(value, str) and TIME.fullmatch(value) is not None,
    "int": lambda value: type(value) is int and value >= 0,
    "float": lambda value: type(value) is float and value >= 0,
    "basis": lambda value: value in {"MEASURED", "MODELLED", "ASSUMED"},
    "null": lambda value: value is None,
}


def differences(value: Any, shape: Any, path: str = "$") -> list[str]:
    """Where an answer is not as CLI.md has it."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or list(value) != list(shape):
            return [f"{path}: {list(value) if isinstance(value, dict) else value}, not {list(shape)}"]
        return [each for key in shape for each in differences(value[key], shape[key], f"{path}.{key}")]
    if isinstance(shape, list):
        return [each for item in value for each in differences(item, shape[0], f"{path}[]")]
    return [] if any(KINDS[kind](value) for kind in shape.split(" | ")) else [f"{path}: {value!r} is no {shape}"]


def nano(amount: str) -> int:
    """An amount as the integer that the ledger holds."""
    return int(amount.replace(".", ""))


def answer(call: Call, *arguments: str) -> dict[str, Any]:
    ran = call("cost", "--format", "json", *arguments)
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def totals(groups: list[dict[str, Any]]) -> dict[str, int]:
    """Tokens, nano-units and nanoseconds of all groups, exactly."""
    sums: dict[str, int] = {}
    for group in groups:
        flat = {f"tokens.{name}": group["tokens"][name] for name in ("prompt", "computed", "generated")}
        flat |= {f"cached.{tier}": count for tier, count in group["tokens"]["cached"].items()}
        flat |= {f"cost.{name}": nano(group["cost"][name]) for name in ("total", *RESOURCES)}
        flat |= {f"of_which.{state}": nano(amount) for state, amount in group["cost"]["of_which"].items()}
        flat |= {f"seconds.{state}": round(group["engine_seconds"][state] * 1e9) for state in STATES}
        for name, amount in flat.items():
            sums[name] = sums.get(name, 0) + amount
    return sums


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four hours of two engines and three GPUs (tests/ledgers.py), nothing of it settled."""
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path)
    return url_of(path)


@pytest.fixture(scope="module")
def settled_story(story: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same with its closed hours settled."""
    url = copied(story, tmp_path_factory.mktemp("settled"))
    assert call("ledger", "settle", "--ledger", url).status == 0
    return url


@pytest.mark.parametrize("window", [(), CLOSED])
def test_the_answer_has_the_keys_and_types_of_the_contract(
    window: tuple[str, ...], kvtally: Call, demo_ledger: str
) -> None:
    assert differences(answer(kvtally, "--ledger", demo_ledger, *window), ANSWER) == []


def test_where_no_law_can_be_fitted_its_figures_are_null_under_the_same_keys(kvtally: Call, tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine()
    deployment = Deployment(path, {"127.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU)})
    engine.counts["running_requests"] = 1.0
    for number in range(3):  # nothing tells how long this engine worked, or what its model looks like
        deployment.scrape(START + number * 20 * SECOND, [engine])
        engine.serve(computed=60, hbm=40, generated=10)
    deployment.close()
    found = answer(kvtally, "--ledger", url_of(path))
    (group,) = found["groups"]
    assert group["prefill_share"] is group["basis"]["split"] is group["split_law"] is group["split_scale"] is None
    assert group["engine_seconds"]["prefill"] is group["engine_seconds"]["decode"] is None
    assert group["cost"]["attributed"] is None
    for units in group["cost_per_million"].values():
        assert units["total"] is not None
        assert units["input"] is units["input_computed"] is units["output"] is None
        assert units["intervals"] == {"input_computed": None, "input": None, "output": None, "input_cached": {}}
    assert sorted(finding["kind"] for finding in found["findings"]) == ["split_unknown", "step_law_lacking"]
    bounds = {"low": 0.0, "high": 0.0}
    group["prefill_share"] = {"low": 0.0, "point": 0.0, "high": 0.0}
    group["engine_seconds_intervals"] = dict.fromkeys(group["engine_seconds_intervals"], bounds)
    group["cost"]["attributed"] = dict.fromkeys(ATTRIBUTED, "0.000000000") | {"input_cached": {"hbm": "0.000000000"}}
    for units in group["cost_per_million"].values():
        interval = {"low": "0.000000000", "high": "0.000000000"}
        units["intervals"] = dict.fromkeys(units["intervals"], interval) | {"input_cached": {}}
    assert differences(found, ANSWER) == []


def test_a_difference_from_the_contract_would_be_seen(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger)
    found["groups"][0]["cost"]["gpu"] = "0.07"
    found["groups"][0]["tokens"]["prompt"] = 1.0
    del found["findings"]
    assert len(differences(found, ANSWER)) == 1
    assert len(differences(found | {"findings": []}, ANSWER)) == 2


@pytest.mark.parametrize("form", ["whole", "phase", "story", "story by hour"])
def test_the_parts_of_an_answer_add_up(form: str, kvtally: Call, demo_ledger: str, story: str) -> None:
    arguments = {
        "whole": ("--ledger", demo_ledger),
        "phase": ("--ledger", demo_ledger, *CLOSED),
        "story": ("--ledger", story, "--by", "replica"),
        "story by hour": ("--ledger", story, "--by", "hour"),
    }[form]
    for group in answer(kvtally, *arguments)["groups"]:
        cost, tokens, seconds = group["cost"], group["tokens"], group["engine_seconds"]
        assert sum(nano(cost[resource]) for resource in RESOURCES) == nano(cost["total"])
        assert sum(nano(amount) for amount in cost["of_which"].values()) <= nano(cost["total"])
        assert tokens["computed"] + sum(tokens["cached"].values()) == tokens["prompt"]
        parts = [round(seconds[name] * 1e9) for name in ("prefill", "decode", "stall", "store")]
        assert sum(parts) == round(seconds["occupied"] * 1e9)
        if seconds["occupied"]:
            known = cost["attributed"]
            amounts = [known["input_computed"], known["output"], known["orphan_holding"], known["orphan_copies"]]
            assert sum(map(nano, [*amounts, *known["input_cached"].values()])) == nano(cost["total"])


def test_the_whole_recording_is_what_its_engine_counted_in_94_seconds(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger)
    (group,) = found["groups"]
    assert group["by"] == {"model": "llama-8b"}
    assert group["tokens"] == {
        "prompt": 2_828_558,
        "computed": 859_550,
        "cached": {"hbm": 1_969_008, "dram": 0, "disk": 0, "p2p": 0, "external": 0},
        "generated": 33_380,
    }
    assert found["window"] == {
        "start": "2026-11-23T04:46:46.962Z",
        "end": "2026-11-23T04:48:20.962Z",
        "covered_seconds": 94.0,
    }
    # 94 s x 2.69 USD / 3600 s
    assert group["cost"]["total"] == group["cost"]["gpu"] == "0.070238889"
    # 0.070238889 USD / (2,828,558 + 33,380) tokens x 1,000,000
    assert group["cost_per_million"]["fully_loaded"]["total"] == "0.024542422"
    assert group["basis"] == {
        "tokens": "MEASURED",
        "tiers": None,
        "states": "MODELLED",
        "cost": "ASSUMED",
        "active": "MODELLED",
        "split": "MODELLED",
    }
    assert group["coverage"] == 1.0
    assert found["findings"] == []


def test_a_phase_of_the_recording_has_its_requests_tokens_and_its_21_seconds(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED)
    (group,) = found["groups"]
    assert group["tokens"]["prompt"] == 1_563_221
    assert group["tokens"]["computed"] == 216_821
    assert group["tokens"]["cached"]["hbm"] == 1_346_400
    assert group["tokens"]["generated"] == 17_958
    assert found["window"] == {
        "start": "2026-11-23T04:47:15.962Z",
        "end": "2026-11-23T04:47:36.962Z",
        "covered_seconds": 21.0,
    }
    # 21 s x 2.69 / 3600 = 0.01569166..; which nano-unit it is, the running total at both ends decides
    ends = (1_795_409_235_962_000_000, 1_795_409_256_962_000_000)
    start, end = (round(Fraction(2_690_000_000, 3600 * 10**9) * at_ns) for at_ns in ends)
    assert end - start in {15_691_666, 15_691_667}
    assert nano(group["cost"]["total"]) == end - start
    # about 29 % by the marginal view (METHOD section 6); half of what prefill and decode share comes on top
    assert group["split_law"] == "step law"
    assert group["prefill_share"]["low"] < 0.29 < group["prefill_share"]["high"]
    assert abs(group["prefill_share"]["point"] - 0.29) < 0.06
    assert 0.8 < group["split_scale"] < 1.25


def test_plain_sqlite_gives_the_same_sums(demo_ledger: str) -> None:
    query = (
        "SELECT sum(prompt_tokens), sum(computed_tokens), sum(hbm_tokens), sum(generated_tokens) FROM engine_interval "
        "WHERE start_ns >= ? AND start_ns < ?"
    )
    with sqlite3.connect(demo_ledger.removeprefix("sqlite:///")) as connection:
        whole = connection.execute(query, (0, 2**63 - 1)).fetchone()
        phase = connection.execute(query, (1_795_409_235_900_000_000, 1_795_409_256_700_000_000)).fetchone()
    connection.close()
    assert whole == (2_828_558, 859_550, 1_969_008, 33_380)
    assert phase == (1_563_221, 216_821, 1_346_400, 17_958)


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("by", [*DIMENSIONS, "model,hour", "namespace,hour", ",".join(DIMENSIONS)])
def test_groups_add_up_to_the_whole_exactly(
    by: str, settled: bool, kvtally: Call, story: str, settled_story: str
) -> None:
    url = settled_story if settled else story
    whole = answer(kvtally, "--ledger", url, "--by", "")
    parts = answer(kvtally, "--ledger", url, "--by", by)
    assert whole["groups"][0]["by"] == {}
    assert len({json.dumps(group["by"]) for group in parts["groups"]}) == len(parts["groups"]) >= 1
    assert totals(parts["groups"]) == totals(whole["groups"])
    assert {key: parts[key] for key in ("window", "currency", "findings")} == {
        key: whole[key] for key in ("window", "currency", "findings")
    }


def test_a_settled_ledger_says_what_the_intervals_said(kvtally: Call, story: str, settled_story: str) -> None:
    before = answer(kvtally, "--ledger", story, "--by", "replica,hour")
    after = answer(kvtally, "--ledger", settled_story, "--by", "replica,hour")
    assert totals(after["groups"]) == totals(before["groups"])
    assert [group["by"] for group in after["groups"]] == [group["by"] for group in before["groups"]]


@pytest.mark.parametrize("cut", ["2026-11-23T05:00:00Z", "2026-11-23T05:30:00Z", "2026-11-23T06:13:20.5Z"])
def test_two_windows_that_meet_add_up_to_the_one_around_them(cut: str, kvtally: Call, story: str) -> None:
    both = [
        *answer(kvtally, "--ledger", story, "--until", cut, "--by", "")["groups"],
        *answer(kvtally, "--ledger", story, "--since", cut, "--by", "")["groups"],
    ]
    tokens = {name: count for name, count in totals(both).items() if name.startswith(("tokens", "cached"))}
    whole = totals(answer(kvtally, "--ledger", story, "--by", "")["groups"])
    assert tokens == {name: count for name, count in whole.items() if name in tokens}


def test_a_gpu_that_no_engine_holds_is_a_group_without_a_model(kvtally: Call, story: str) -> None:
    groups = answer(kvtally, "--ledger", story, "--by", "model")["groups"]
    assert [group["by"]["model"] for group in groups] == ["llama-8b", None]
    free = groups[1]
    assert free["tokens"]["prompt"] == 0
    assert free["cost"]["of_which"]["unallocated"] == free["cost"]["total"] != "0.000000000"
    assert "(no model)" in kvtally("cost", "--ledger", story, "--by", "model", "--format", "table").out


def test_labels_that_nobody_gave_are_null(kvtally: Call, story: str) -> None:
    groups = answer(kvtally, "--ledger", story, "--by", "namespace,tenant")["groups"]
    assert [group["by"] for group in groups] == [
        {"namespace": "one", "tenant": None},
        {"namespace": "two", "tenant": None},
        {"namespace": None, "tenant": None},
    ]


@pytest.mark.parametrize(
    ("arguments", "intervals"),
    [
        ((), 94),
        (("--since", "10s"), 10),
        (("--since", "24h"), 94),
        (("--since", "30s", "--until", "10s"), 20),
        (("--since", "2026-11-23T04:46:46.962Z"), 94),
        (("--since", "2026-11-23T04:46:46.963Z"), 93),
        (("--until", "2026-11-23T05:46:47.5+01:00"), 1),
        (("--since", "1795409206.962", "--until", "1795409207.962"), 1),
        (("--since", "2020-01-01", "--until", "2200-01-01"), 94),
        (("--since", "0"), 94),
    ],
)
def test_an_interval_belongs_to_the_window_in_which_it_starts(
    arguments: tuple[str, ...], intervals: int, kvtally: Call, demo_ledger: str
) -> None:
    assert answer(kvtally, "--ledger", demo_ledger, *arguments)["window"]["covered_seconds"] == intervals


@pytest.mark.parametrize("arguments", [("--since", "2027-01-01"), ("--until", "2025-01-01")])
def test_a_window_with_nothing_in_it_is_an_empty_answer(
    arguments: tuple[str, ...], kvtally: Call, demo_ledger: str
) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *arguments)
    assert (found["groups"], found["findings"], found["window"]["covered_seconds"]) == ([], [], 0.0)
    told = kvtally("cost", "--ledger", demo_ledger, "--format", "table", *arguments).out
    assert told.startswith("The ledger holds no interval in this window. `kvtally doctor` says")
    header = kvtally("cost", "--ledger", demo_ledger, "--format", "csv").out.partition("\n")[0]
    assert kvtally("cost", "--ledger", demo_ledger, "--format", "csv", *arguments) == (0, f"{header}\n", "")


@pytest.fixture(scope="module")
def thirty_hours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 intervals of half an hour, 100 prompt tokens each, from 04:00 on one day to 10:00 on the next."""
    path = new_ledger(tmp_path_factory.mktemp("long"))
    deployment = Deployment(path, {"127.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU)}, interval_seconds=1800)
    engine = FakeEngine()
    for number in range(61):
        deployment.scrape(START + number * HOUR // 2, [engine])
        engine.serve(computed=60, hbm=40, generated=10)
    deployment.close()
    return url_of(path)


def test_without_a_window_a_long_ledger_shows_its_last_24_hours(kvtally: Call, thirty_hours: str) -> None:
    found = answer(kvtally, "--ledger", thirty_hours, "--by", "hour")
    assert found["window"] == {
        "start": "2026-11-23T10:00:00.000Z",
        "end": "2026-11-24T10:00:00.000Z",
        "covered_seconds": 86400.0,
    }
    assert len(found["groups"]) == 24
    assert found["groups"][0]["by"] == {"hour": "2026-11-23T10:00:00.000Z"}
    assert totals(found["groups"])["tokens.prompt"] == 4800


def test_a_long_ledger_by_day_has_a_group_for_each(kvtally: Call, thirty_hours: str) -> None:
    groups = answer(kvtally, "--ledger", thirty_hours, "--since", "30h", "--by", "day")["groups"]
    assert [(group["by"]["day"][:10], group["tokens"]["prompt"]) for group in groups] == [
        ("2026-11-23", 4000),
        ("2026-11-24", 2000),
    ]


def test_csv_has_a_line_for_each_group_with_the_values_of_json(kvtally: Call, story: str) -> None:
    found = answer(kvtally, "--ledger", story, "--by", "replica,hour")
    shown = kvtally("cost", "--ledger", story, "--by", "replica,hour", "--format", "csv").out
    rows = list(csv.DictReader(io.StringIO(shown)))
    assert len(rows) == len(found["groups"])
    for row, group in zip(rows, found["groups"], strict=True):
        assert row["by.replica"] == (group["by"]["replica"] or "")
        assert row["window.start"] == found["window"]["start"]
        assert row["currency"] == "USD"
        assert int(row["tokens.cached.hbm"]) == group["tokens"]["cached"]["hbm"]
        assert row["cost.of_which.idle"] == group["cost"]["of_which"]["idle"]
        assert row["cost_per_million.active.output"] == (group["cost_per_million"]["active"]["output"] or "")
        assert row["rates"] == "; ".join(group["rates"])


def test_an_empty_ledger_is_an_empty_answer(kvtally: Call) -> None:
    assert kvtally("ledger", "upgrade", "--ledger", "sqlite:///empty.db").status == 0
    found = answer(kvtally, "--ledger", "sqlite:///empty.db", "--since", "24h")
    assert found["window"] == {"start": None, "end": None, "covered_seconds": 0.0}
    assert (found["currency"], found["groups"], found["findings"]) == ("USD", [], [])
    assert kvtally("cost", "--ledger", "sqlite:///empty.db", "--since", "soon").status == 2


@pytest.mark.parametrize(
    ("revision", "told"),
    [
        (
            "9999",
            f"the ledger has revision 9999, this kvtally knows {HEAD_REVISION} (it was written by a newer kvtally",
        ),
        ("0000", f"the ledger has revision 0000, this kvtally knows {HEAD_REVISION} (run `kvtally ledger upgrade`)"),
    ],
)
def test_a_ledger_of_another_version_is_left_alone(
    revision: str, told: str, kvtally: Call, demo_ledger: str, tmp_path: Path
) -> None:
    url = copied(demo_ledger, tmp_path)
    with sqlite3.connect(url.removeprefix("sqlite:///")) as connection:
        connection.execute("UPDATE alembic_version SET version_num = ?", (revision,))
    connection.close()
    status, out, err = kvtally("cost", "--ledger", url)
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert told in err


def test_a_config_sets_how_free_gpus_are_paid_for(kvtally: Call, story: str, tmp_path: Path) -> None:
    (tmp_path / "kvtally.toml").write_text('[rates]\nterm = "spot"\n', encoding="utf-8")
    free = answer(kvtally, "--ledger", story, "--by", "model")["groups"][1]
    assert free["cost"] is None  # no spot price is known
