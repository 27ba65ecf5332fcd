from __future__ import annotations

import csv
import io
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import isolate

from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.render.calibration import calibration_table, calibrations_table, imported_lines
from kvtally.agent.render.comma_separated import SAVINGS_COLUMNS, flat, savings_rows_of
from kvtally.agent.render.savings import WORDING, savings_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

FINGERPRINT = (
    "llama-8b (LlamaForCausalLM, bfloat16, KV bfloat16) on 1 x NVIDIA H100 80GB HBM3, vLLM 0.25.1, 8192 tokens a step"
)


def seconds(low: float, point: float, high: float) -> dict[str, float]:
    return {"low": low, "point": point, "high": high}


def money(low: str, point: str, high: str) -> dict[str, str]:
    return {"low": low, "point": point, "high": high}


ZERO = "0.000000000"
NOTHING = seconds(0.0, 0.0, 0.0)
HBM: dict[str, Any] = {
    "status": "ok",
    "reasons": [],
    "tokens": 1_346_400,
    "avoided_engine_seconds": seconds(28.7, 32.6, 36.6),
    "net_engine_seconds": seconds(28.7, 32.6, 36.6),
    "gross": money("0.021433000", "0.024389000", "0.027345000"),
    "holding": ZERO,
    "net": money("0.021433000", "0.024389000", "0.027345000"),
}
GROUP: dict[str, Any] = {
    "by": {"model": "llama-8b"},
    "status": "ok",
    "reasons": [],
    "reused_tokens": {"hbm": 1_346_400, "dram": 0, "disk": 0, "p2p": 0, "external": 0},
    "avoided_engine_seconds": seconds(28.7, 32.6, 36.6),
    "reuse_engine_seconds": {"stall": NOTHING, "store": NOTHING},
    "net_engine_seconds": seconds(28.7, 32.6, 36.6),
    "tiers": {"hbm": HBM},
    "gross": money("0.021433000", "0.024389000", "0.027345000"),
    "reuse_cost": {"stall": ZERO, "store": ZERO},
    "holding": ZERO,
    "net": money("0.021433000", "0.024389000", "0.027345000"),
    "realised": money("0.001160000", "0.001319000", "0.001479000"),
    "capacity_bound_share": 0.095238,
    "latency_seconds": 0.0,
    "engine_second": "0.000747222",
    "rates": ["gpu NVIDIA H100 80GB HBM3 on-demand 2.69 USD/gpu-hour from 2026-09-01 (ASSUMED: packaged: a market)"],
    "calibrations": ["3"],
    "basis": {"tokens": "MEASURED", "tiers": None, "engine_seconds": "MODELLED", "money": "ASSUMED"},
}
LAW: dict[str, Any] = {
    "id": 3,
    "fingerprint": FINGERPRINT,
    "rung": "M1",
    "prior": "packaged",
    "evidence": {
        "start": "2026-11-23T04:46:46.962Z",
        "end": "2026-11-23T04:48:20.962Z",
        "source": "graphics",
        "windows": 42,
        "alone": 24,
        "probes": 0,
        "requests": 373,
        "steps": 4688,
        "occupied_seconds": 83.995,
    },
}
ANSWER: dict[str, Any] = {
    "window": {"start": "2026-11-23T04:47:15.962Z", "end": "2026-11-23T04:47:36.962Z", "covered_seconds": 21.0},
    "currency": "USD",
    "method": {"version": "1", "rung": "M1", "calibrations": [LAW]},
    "groups": [GROUP],
    "findings": [],
}
REFUSED: dict[str, Any] = {
    "status": "insufficient_data",
    "reasons": [
        'the shape of model llama-8b is not known: say so: engine = [{ url = "…", model_config = "/x/config.json" }]',
        "100% of the reused tokens lie in hours without a figure",
    ],
    **dict.fromkeys(("avoided_engine_seconds", "net_engine_seconds", "gross", "net", "realised", "holding")),
    "reuse_engine_seconds": {"stall": None, "store": None},
    "reuse_cost": {"stall": None, "store": None},
    **dict.fromkeys(("capacity_bound_share", "latency_seconds", "engine_second")),
    "tiers": {},
    "rates": [],
    "calibrations": [],
    "basis": {"tokens": "MEASURED", "tiers": None, "engine_seconds": None, "money": None},
}
TO_TYPE = 'kvtally rates add gpu PRICE --unit gpu-hour --sku "NVIDIA H20" --from 2026-11-23 --term on-demand'
NO_RATE = {
    "kind": "no_rate",
    "severity": "warning",
    "target": "engine/127.0.0.1:8000/0",
    "start": "2026-11-23T04:00:00.000Z",
    "end": "2026-11-23T05:00:00.000Z",
    "message": f"no rate for NVIDIA H20 (gpu, on-demand) on 2026-11-23T04:00:00Z: {TO_TYPE}",
}
RESTARTED = NO_RATE | {"kind": "engine_restarted", "severity": "info", "target": "", "message": "the engine restarted"}


PREEMPTED = "29 preemptions in 381 requests: what they computed again is in no prompt counter: give the engine more KV"


def changed(**parts: Any) -> dict[str, Any]:
    """The answer with some parts of its group replaced."""
    copy = deepcopy(ANSWER)
    copy["groups"][0] |= deepcopy(parts)
    return copy


def with_an_outer_tier() -> dict[str, Any]:
    """Behind a connector that does not say what its tiers are, and preempted."""
    external = HBM | {
        "status": "not_proven",
        "reasons": ["its net interval contains zero"],
        "tokens": 558_092,
        "avoided_engine_seconds": seconds(11.2, 14.9, 18.6),
        "net_engine_seconds": seconds(-0.4, 4.6, 11.0),
        "gross": money("0.008300000", "0.011133600", "0.013900000"),
        "holding": "0.001000000",
        "net": money("-0.001300000", "0.002407000", "0.007200000"),
    }
    return changed(
        status="lower_bound",
        reasons=[PREEMPTED],
        reused_tokens={"hbm": 1_391_088, "dram": None, "disk": None, "p2p": None, "external": 558_092},
        reuse_engine_seconds={"stall": seconds(1.0, 1.4, 1.8), "store": seconds(4.5, 9.0, 10.8)},
        tiers={"hbm": HBM | {"status": "lower_bound", "reasons": [PREEMPTED]}, "external": external},
        reuse_cost={"stall": "0.001036000", "store": "0.006717000"},
        holding="0.001000000",
        latency_seconds=2.5,
    )


def not_proven() -> dict[str, Any]:
    return changed(
        status="not_proven",
        reasons=["the interval of net engine-seconds contains zero"],
        net_engine_seconds=seconds(-0.04, 1.2, 2.5),
        realised=None,
        capacity_bound_share=None,
    )


def dearer_than_nothing() -> dict[str, Any]:
    """Slow storage."""
    lost = money("-0.300000000", "-0.171861000", "-0.100000000")
    return changed(net_engine_seconds=seconds(-300.0, -230.0, -150.0), net=lost, realised=lost)


def held_for_more() -> dict[str, Any]:
    """A cache that is dearer than what it saves."""
    lost = money("-0.102000000", "-0.100000000", "-0.098000000")
    return changed(
        reasons=["what is held costs more than reuse saved: a smaller cache costs less"],
        holding="0.124386000",
        net=lost,
        realised=money("-0.124000000", "-0.123000000", "-0.122000000"),
    )


def nothing_reused() -> dict[str, Any]:
    tier = HBM | {"tokens": 0, "avoided_engine_seconds": NOTHING, "net_engine_seconds": NOTHING}
    zero = money(ZERO, ZERO, ZERO)
    held = money("-0.500000000", "-0.500000000", "-0.500000000")
    return changed(
        reasons=["nothing was reused, and what is held is charged all the same"],
        reused_tokens=dict.fromkeys(GROUP["reused_tokens"], 0),
        avoided_engine_seconds=NOTHING,
        net_engine_seconds=NOTHING,
        tiers={"hbm": tier | {"gross": zero, "net": zero}},
        gross=zero,
        holding="0.500000000",
        net=held,
        realised=held,
    )


def without_price() -> dict[str, Any]:
    names = ("gross", "net", "realised", "holding", "engine_second")
    answer = changed(
        **dict.fromkeys(names),
        reuse_cost={"stall": None, "store": None},
        reasons=[f"seconds are shown, money is not: {NO_RATE['message']}"],
        tiers={"hbm": HBM | dict.fromkeys(("gross", "net", "holding"))},
        rates=[],
        basis=GROUP["basis"] | {"money": None},
    )
    return answer | {"findings": [NO_RATE, RESTARTED]}


def by_a_log() -> dict[str, Any]:
    """Valued by a law of its own and with a log of the requests."""
    answer = deepcopy(ANSWER)
    answer["method"]["requests"] = {"file": "requests.csv", "replica": "a/0", "requests": 367, "counted": 373}
    answer["method"]["calibrations"][0] |= {"id": None, "rung": "M5"}
    answer["method"]["calibrations"][0]["evidence"]["probes"] = 12
    return answer


def several() -> dict[str, Any]:
    hours = [
        GROUP | {"by": {"model": name, "hour": f"2026-11-23T0{hour}:00:00.000Z"}} | parts
        for name, parts in (("llama-8b", {}), ("meta-llama/Llama-Instruct-quantised-to-death", REFUSED))
        for hour in (4, 5, 6, 7)
    ]
    return ANSWER | {"groups": hours}


ANSWERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "one": lambda: ANSWER,
    "outer-tier": with_an_outer_tier,
    "not-proven": not_proven,
    "dearer": dearer_than_nothing,
    "held-for-more": held_for_more,
    "nothing-reused": nothing_reused,
    "no-price": without_price,
    "refused": lambda: changed(**REFUSED) | {"method": {"version": "1", "rung": None, "calibrations": []}},
    "unreconciled": lambda: changed(**REFUSED | {"status": "unreconciled", "reasons": ["counters do not add up"]}),
    "log": by_a_log,
    "several": several,
}


def shown(
    answer: dict[str, Any], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    savings_table(answer)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def of_no_terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_as_a_table(
    name: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golden: Callable[[str, str], None],
) -> None:
    golden(f"savings-{name}-{columns}.txt", shown(ANSWERS[name](), columns, monkeypatch, capsys))


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "several"])
def test_what_is_no_line_to_copy_fits_into_80_columns(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(ANSWERS[name](), 80, monkeypatch, capsys).splitlines()
    assert [line for line in lines if len(line) > 80 and "kvtally rates add" not in line] == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("one", "reuse saved 32.6 engine-seconds net (28.7 to 36.6); 0.02439 USD net, of it realised 0.001319 USD"),
        ("outer-tier", "reuse saved 32.6 engine-seconds net"),
        ("not-proven", "NOT PROVEN: the data fit anything from 0.0 to 2.5 engine-seconds net, 0.02143 to 0.02734 USD"),
        ("dearer", "reuse cost 230.0 engine-seconds more than it saved; -0.1719 USD net, realised -0.1719 USD"),
        (
            "held-for-more",
            "reuse saved 32.6 engine-seconds (28.7 to 36.6), and cost more than that; -0.1000 USD net, realised",
        ),
        ("nothing-reused", "nothing was reused; -0.5000 USD net"),
        ("no-price", "reuse saved 32.6 engine-seconds net (28.7 to 36.6)"),
        ("refused", "NO FIGURE, what was seen cannot carry one"),
        ("unreconciled", "NO FIGURE, the engine's own counters contradict each other"),
    ],
)
def test_the_headline_says_the_status_in_words(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shown(ANSWERS[name](), 200, monkeypatch, capsys).splitlines()[1].startswith(f"llama-8b: {words}")


def test_a_reason_of_all_is_not_told_again_for_each_tier(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(with_an_outer_tier(), 200, monkeypatch, capsys)
    assert text.count("29 preemptions") == 1
    assert text.count("external: its net interval contains zero") == 1


@pytest.mark.parametrize("name", ANSWERS)
def test_money_never_stands_without_the_sentence_that_says_what_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = ANSWERS[name]()
    text = shown(answer, 300, monkeypatch, capsys)
    assert (WORDING in text) == any(group["gross"] is not None for group in answer["groups"])


def test_a_refusal_shows_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(ANSWERS["refused"](), 120, monkeypatch, capsys)
    assert "hbm        1,346,400   no figure           -       -" in text
    assert "money" not in text
    assert "32.6" not in text


def test_a_missing_price_is_told_once_with_its_line_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = shown(ANSWERS["no-price"](), 80, monkeypatch, capsys).splitlines()
    assert lines.count(f"    {TO_TYPE}") == 1
    assert lines[-1] == "info: the engine restarted"


def test_groups_that_are_refused_alike_are_told_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(several(), 400, monkeypatch, capsys)
    assert text.count("lie in hours without a figure") == 1
    assert "2026-11-23 06:00 and 1 more: 100% of the reused tokens" in text


def test_a_window_without_an_interval_says_where_to_look(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(ANSWER | {"groups": []}, 80, monkeypatch, capsys)
    assert text.startswith("The ledger holds no interval of an engine in this window.")
    assert "`kvtally ledger info`" in text


def test_below_a_cost_report_its_window_and_prices_are_not_told_again(capsys: pytest.CaptureFixture[str]) -> None:
    savings_table(ANSWER, is_below_cost=True)
    text = capsys.readouterr().out
    assert text.startswith("llama-8b: reuse saved")
    assert "rate:" not in text
    assert "law: calibration 3" in text


def test_a_name_cannot_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    savings_table(changed(by={"model": "\x1b[2Jevil"}, reasons=["\x07beep"]))
    text = capsys.readouterr().out
    assert "?[2Jevil" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_csv_has_the_columns_of_an_interval_even_where_it_is_unknown() -> None:
    answer = several()
    rows = list(csv.DictReader(io.StringIO(savings_rows_of(answer, ["model", "hour"]))))
    assert len(rows) == 8
    assert rows[0]["net_engine_seconds.point"] == "32.6"
    assert rows[0]["tiers.hbm.net.low"] == "0.021433000"
    assert rows[-1]["net_engine_seconds.point"] == rows[-1]["reuse_engine_seconds.stall.low"] == ""
    assert rows[-1]["reasons"].endswith("; 100% of the reused tokens lie in hours without a figure")
    names = rows[0].keys()
    assert {"method.rung", "calibrations", "rates", "basis.money"} <= names
    assert {"net", "gross", "realised", "avoided_engine_seconds", "method.calibrations"} & names == set()


def test_csv_of_a_refusal_alone_has_the_same_columns() -> None:
    (row,) = csv.DictReader(io.StringIO(savings_rows_of(changed(**REFUSED), ["model"])))
    assert {row[f"{name}.{bound}"] for name in ("net", "gross") for bound in ("low", "point", "high")} == {""}


def test_the_columns_of_a_savings_report_do_not_depend_on_what_is_known() -> None:
    empty = ANSWER | {"groups": [], "method": {"version": "1", "rung": None, "calibrations": []}}
    answers = [*(make() for name, make in ANSWERS.items() if name != "several"), empty]
    (header,) = {savings_rows_of(answer, ["model"]).splitlines()[0] for answer in answers}
    columns = header.split(",")
    assert columns[:3] == [f"window.{name}" for name in ("start", "end", "covered_seconds")]
    assert columns[3:6] == ["currency", "method.version", "method.rung"]
    assert columns[6:10] == [f"method.requests.{name}" for name in ("file", "replica", "requests", "counted")]
    assert columns[10:] == ["by.model", *SAVINGS_COLUMNS]
    assert len(set(columns)) == len(columns)
    assert savings_rows_of(empty, ["model"]) == f"{header}\n"
    assert ",by.tenant,by.day,status," in savings_rows_of(empty, ["tenant", "day"])


@pytest.mark.parametrize("name", ANSWERS)
def test_no_key_of_a_group_is_without_its_column(name: str) -> None:
    """A key that has parts where it is known is a column by its parts alone."""
    parted = {column.rpartition(".")[0] for column in SAVINGS_COLUMNS}
    found = {column for group in ANSWERS[name]()["groups"] for column in flat(group)}
    assert {column for column in found if not column.startswith("by.")} <= {*SAVINGS_COLUMNS, *parted}


# calibrations


def parameter(median: float, unit: str) -> dict[str, Any]:
    own = {"low": median / 1.25, "median": median, "high": median * 1.25}
    return {"unit": unit, **own, "prior": {"low": median / 2, "median": median, "high": median * 2}}


LEARNED: dict[str, Any] = {
    "id": 3,
    "is_new": True,
    "replicas": ["a/0", "b/0"],
    "rung": "M1",
    "prior": "packaged",
    "text": FINGERPRINT,
    "window": {"start": "2026-11-23T04:46:46.962Z", "end": "2026-11-23T04:48:20.962Z"},
    "evidence": {
        "source": "graphics",
        "windows": 42,
        "singles": 24,
        "saturated": 3,
        "probes": 0,
        "requests": 373,
        "steps": 4688,
        "occupied_seconds": 83.995,
        "worked_ratio": 1.00312,
        "single_error": 0.0501,
        "notes": [],
    },
    "parameters": {
        name: parameter(0.0042, "s") if name.endswith("seconds") else parameter(0.75, "") for name in PARAMETERS
    },
    "further": [{"rung": "M4", "how": "kvtally calibrate --probe: cold prompts"}],
}
LISTED: dict[str, Any] = LEARNED | {"made_at": "2026-11-23T10:09:11.000Z", "reason": "new evidence"}


@pytest.mark.parametrize("columns", [80, 120])
def test_what_was_learned_and_what_was_not_as_tables(
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golden: Callable[[str, str], None],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    again = LEARNED | {"id": 4, "is_new": False, "prior": "3", "rung": "M5", "further": []}
    unfit = {"worked_ratio": None, "single_error": None, "notes": ["4688 steps were counted in which 0.0 s: look"]}
    again["evidence"] = LEARNED["evidence"] | unfit | {"probes": 14}
    unknown = {"fingerprint": None, "replicas": ["c/0"], "reasons": ["replica mapping unknown (two GPUs): write it"]}
    known = {"fingerprint": FINGERPRINT, "replicas": ["d/0"], "reasons": ["too little was seen: wait"]}
    calibration_table({"ledger": "l.db", "calibrations": [LEARNED, again], "refused": [unknown, known]})
    calibrations_table({"calibrations": [LISTED, LISTED | {"id": 4, "text": "another"}], "unreadable": [5, 6]})
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if len(line) > columns] == []
    golden(f"calibrations-{columns}.txt", text)


def test_seconds_of_a_law_are_told_in_milliseconds(capsys: pytest.CaptureFixture[str]) -> None:
    calibration_table({"ledger": "l.db", "calibrations": [LEARNED], "refused": []})
    lines = capsys.readouterr().out.splitlines()
    # 0.0042 s, 0.0042 / 1.25 = 0.00336 and 0.0042 x 1.25 = 0.00525
    words = ["between", "two", "steps,", "ms", "4.20", "3.36", "to", "5.25", "2.10", "to", "8.40"]
    assert words in [line.split() for line in lines]


def test_nothing_to_learn_from_and_nothing_kept_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    calibration_table({"ledger": "l.db", "calibrations": [], "refused": []})
    calibrations_table({"calibrations": [], "unreadable": []})
    text = " ".join(capsys.readouterr().out.split())
    assert "holds no interval of an engine in this window, so there is nothing to learn from" in text
    assert "holds no calibration. `kvtally calibrate` makes one" in text


def test_an_import_says_whether_it_is_new_and_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    about = {"rung": "M1", "text": "x"}
    imported_lines(
        [
            {"id": 1, "is_new": True, "fits": True} | about,
            {"id": 2, "is_new": False, "fits": True} | about,
            {"id": 3, "is_new": True, "fits": False} | about,
        ]
    )
    assert capsys.readouterr().out.splitlines() == [
        "calibration 1 (M1) of x: imported, and used from now on",
        "calibration 2 (M1) of x: was there already",
        "calibration 3 (M1) of x: imported, and used from now on; no engine of this ledger has this fingerprint",
    ]
