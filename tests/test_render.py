from __future__ import annotations

import csv
import io
import re
from copy import deepcopy
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import isolate

from kvtally.agent.price import nano_to_text
from kvtally.agent.render.comma_separated import COST_COLUMNS, cost_rows_of, flat, lines_of
from kvtally.agent.render.cost import cost_table
from kvtally.agent.render.listing import doctor_table
from kvtally.agent.render.numbers import amount, between, count, seconds, share
from kvtally.agent.render.recorded import banner, progress_of, what_next
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

ZERO = "0.000000000"


def interval(low: str, high: str) -> dict[str, str]:
    return {"low": low, "high": high}


def units(factor: str) -> dict[str, Any]:
    """Unit costs, all of them `factor` times those of the packaged recording."""

    def times(text: str) -> str:
        return nano_to_text(round(Decimal(text) * Decimal(factor) * 10**9))

    return {
        "total": times("0.024542422"),
        "input_computed": times("0.036531250"),
        "input_cached": {"hbm": ZERO},
        "input": times("0.011101217"),
        "output": times("1.163524655"),
        "intervals": {
            "input_computed": interval(times("0.030460826"), times("0.042601675")),
            "input": interval(times("0.009256520"), times("0.012945914")),
            "output": interval(times("1.007208478"), times("1.319840803")),
            "input_cached": {},
        },
    }


GROUP: dict[str, Any] = {
    "by": {"model": "llama-8b"},
    "tokens": {
        "prompt": 2_828_558,
        "computed": 859_550,
        "cached": {"hbm": 1_969_008, "dram": 0, "disk": 0, "p2p": 0, "external": 0},
        "generated": 33_380,
    },
    "engine_seconds": {
        "prefill": 29.5,
        "decode": 36.5,
        "stall": 0.0,
        "store": 0.0,
        "idle": 18.0,
        "asleep": 6.0,
        "warm_up": 3.0,
        "unallocated": 1.0,
        "occupied": 66.0,
    },
    "engine_seconds_intervals": {
        "prefill": {"low": 24.42, "high": 34.32},
        "decode": {"low": 31.68, "high": 41.58},
        "stall": {"low": 0.0, "high": 0.0},
        "store": {"low": 0.0, "high": 0.0},
    },
    "prefill_share": {"low": 0.37, "point": 0.45, "high": 0.52},
    "split_law": "step law",
    "split_scale": 0.98,
    "calibrations": ["3"],
    "cost": {
        "total": "0.070238889",
        "gpu": "0.070238889",
        **dict.fromkeys(("server", "energy", "dram", "storage", "network", "platform", "unused_commitment"), ZERO),
        "of_which": {
            "idle": "0.013450000",
            "asleep": "0.004483333",
            "warm_up": "0.002241667",
            "unallocated": "0.000747222",
        },
    },
    "orphan_holding": ZERO,
    "cost_per_million": {"fully_loaded": units("1"), "active": units("0.7")},
    "basis": {"tokens": "MEASURED", "tiers": None, "states": "MODELLED", "cost": "ASSUMED", "split": "MODELLED"},
    "rates": ["gpu NVIDIA H100 80GB HBM3 on-demand 2.69 USD/gpu-hour from 2026-09-01 (ASSUMED: packaged: a market)"],
    "coverage": 1.0,
}
ANSWER: dict[str, Any] = {
    "window": {"start": "2026-11-23T04:46:46.962Z", "end": "2026-11-23T04:48:20.962Z", "covered_seconds": 94.0},
    "currency": "USD",
    "groups": [GROUP],
    "findings": [],
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
BROKEN = NO_RATE | {
    "kind": "identity_broken",
    "severity": "error",
    "message": "prompt tokens by source do not add up: 1000 + 507 + 0 = 1507, not 1500; figures of this interval "
    "cannot be trusted",
}
TOLD = NO_RATE | {"kind": "engine_restarted", "severity": "info", "target": "", "message": "the engine restarted"}


def changed(answer: dict[str, Any], **parts: Any) -> dict[str, Any]:
    """The answer with some parts of its first group replaced."""
    copy = deepcopy(answer)
    copy["groups"][0] |= parts
    return copy


def without_price() -> dict[str, Any]:
    answer = changed(
        ANSWER,
        cost=None,
        orphan_holding=None,
        cost_per_million=None,
        rates=[],
        basis=GROUP["basis"] | {"cost": None, "tokens": "MODELLED"},
    )
    return answer | {"findings": [NO_RATE, BROKEN, TOLD]}


def without_split() -> dict[str, Any]:
    unknown: dict[str, Any] = dict.fromkeys(("input", "input_computed", "output"))
    unknown["intervals"] = dict.fromkeys(units("1")["intervals"]) | {"input_cached": {}}
    both = {view: each | unknown for view, each in GROUP["cost_per_million"].items()}
    times = GROUP["engine_seconds"] | {"prefill": None, "decode": None}
    return changed(
        ANSWER,
        prefill_share=None,
        split_law=None,
        split_scale=None,
        calibrations=[],
        cost_per_million=both,
        engine_seconds=times,
        engine_seconds_intervals=dict.fromkeys(GROUP["engine_seconds_intervals"]),
        basis=GROUP["basis"] | {"split": None},
    )


def with_an_outer_tier() -> dict[str, Any]:
    tokens = deepcopy(GROUP["tokens"])
    tokens["cached"] = {"hbm": 1_000_000, "dram": None, "disk": None, "p2p": None, "external": 969_008}
    both = deepcopy(GROUP["cost_per_million"])
    for view in both.values():
        view["input_cached"]["external"] = view["intervals"]["input_cached"]["external"] = None
    times = GROUP["engine_seconds"] | {"stall": None, "store": None}
    intervals = GROUP["engine_seconds_intervals"] | {"stall": None, "store": None}
    law: dict[str, Any] = {"split_law": "two costs", "split_scale": None, "calibrations": []}
    return changed(
        ANSWER, tokens=tokens, cost_per_million=both, engine_seconds=times, engine_seconds_intervals=intervals, **law
    )


def with_copies() -> dict[str, Any]:
    """Loading and storing told apart, storage that holds for nobody."""
    answer = with_an_outer_tier()
    group = answer["groups"][0]
    group["engine_seconds"] |= {"prefill": 20.5, "decode": 34.1, "stall": 1.4, "store": 10.0}
    group["engine_seconds_intervals"] = {
        "prefill": {"low": 17.2, "high": 23.9},
        "decode": {"low": 30.1, "high": 38.6},
        "stall": {"low": 1.0, "high": 1.8},
        "store": {"low": 5.0, "high": 12.0},
    }
    group |= {"split_law": "step law", "split_scale": 1.02, "calibrations": ["3", "not stored"]}
    group["tokens"]["cached"] |= {"dram": 969_008, "external": 0}
    for view in group["cost_per_million"].values():
        view["input_cached"] = {"hbm": ZERO, "dram": "0.018190780"}
        view["intervals"]["input_cached"] = {"dram": interval("0.010276960", "0.021426079")}
    group["orphan_holding"] = "0.001234567"
    return answer


def dear() -> dict[str, Any]:
    """A month of a fleet."""
    copy = changed(ANSWER, cost_per_million={"fully_loaded": units("123456"), "active": units("98765")})
    group = copy["groups"][0]
    group["cost"]["total"] = group["cost"]["gpu"] = "1234567.891000000"
    group["engine_seconds"] |= {"occupied": 12_345_678.0, "prefill": 5_555_555.5, "decode": 6_790_122.5}
    group["engine_seconds_intervals"] |= {
        "prefill": {"low": 4_567_900.9, "high": 6_419_752.6},
        "decode": {"low": 5_925_925.4, "high": 7_777_777.1},
    }
    group["tokens"] |= {"prompt": 987_654_321_012, "generated": 9_876_543_210}
    return copy


def several() -> dict[str, Any]:
    other = deepcopy(GROUP)
    other["by"] = {"model": None}
    other["tokens"] = dict.fromkeys(("prompt", "computed", "generated"), 0) | {"cached": GROUP["tokens"]["cached"]}
    for view in other["cost_per_million"].values():
        view.update(dict.fromkeys(("total", "input", "input_computed", "output")))
    other["cost"]["of_which"] = dict.fromkeys(("idle", "asleep", "warm_up"), ZERO) | {"unallocated": "0.070238889"}
    unpriced = without_price()["groups"][0] | {"by": {"model": "meta-llama/Llama-Instruct-quantised-to-death"}}
    return ANSWER | {"groups": [GROUP, unpriced, other], "findings": [NO_RATE]}


def by_hour() -> dict[str, Any]:
    groups = []
    for hour in (4, 5, 6):
        by = {"replica": "decode-pool-of-ours/a", "hour": f"2026-11-23T0{hour}:00:00.000Z", "day": "2026-11-23"}
        groups.append(GROUP | {"by": by})
    return ANSWER | {"groups": groups}


ANSWERS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "one": lambda: ANSWER,
    "no-price": without_price,
    "no-split": without_split,
    "outer-tier": with_an_outer_tier,
    "copies": with_copies,
    "dear": dear,
    "several": several,
    "by-hour": by_hour,
}


def shown(
    answer: Mapping[str, Any], columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    cost_table(answer)
    return capsys.readouterr().out


@pytest.fixture(autouse=True)
def _isolated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


@pytest.mark.parametrize("columns", [80, 110])
@pytest.mark.parametrize("name", ANSWERS)
def test_a_cost_report_is_shown(
    name: str,
    columns: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    golden: Callable[[str, str], None],
) -> None:
    text = shown(ANSWERS[name](), columns, monkeypatch, capsys)
    to_type = [line for line in text.splitlines() if line.lstrip().startswith("kvtally ")]
    assert to_type == ([f"    {TO_TYPE}"] if name in {"no-price", "several"} else [])
    assert max(len(line) for line in text.splitlines() if line not in to_type) <= columns
    golden(f"cost-{name}-{columns}.txt", text)


FIGURE = re.compile(r"\d[\d,.]*\d|\d")


@pytest.mark.parametrize("name", ANSWERS)
def test_no_figure_is_cut_at_any_width(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = set(FIGURE.findall(shown(ANSWERS[name](), 300, monkeypatch, capsys).partition("rate:")[0]))
    for columns in (*range(20, 130, 5), 1):
        text = shown(ANSWERS[name](), columns, monkeypatch, capsys)
        assert "…" not in text
        if columns >= 50:  # below, instants and names are wrapped
            assert set(FIGURE.findall(text.partition("rate:")[0])) <= whole


def test_a_pipe_is_110_columns_wide() -> None:
    assert Screen().width == 110


def test_names_from_telemetry_are_text_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = changed(ANSWER, by={"model": "[red]a[/] :smile: \x1b[2J\x07 b\nc [/nothing]"})
    first = shown(answer, 110, monkeypatch, capsys).splitlines()[1]
    assert first.startswith("[red]a[/] :smile: ?[2J? b?c [/nothing]: 0.02454 USD")
    answer = answer | {"groups": answer["groups"] * 2}
    assert "[red]a[/] :smile: ?[2J? b?c [/nothing]" in shown(answer, 300, monkeypatch, capsys)


def test_what_can_move_a_cursor_is_taken_out_of_an_answer_and_nothing_else() -> None:
    assert printable({"a\x1b": ["b\r", {"c": "\u202eé日"}], "d": None, "e": 1.5}) == {
        "a?": ["b?", {"c": "?é日"}],
        "d": None,
        "e": 1.5,
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "-"),
        (ZERO, "0"),
        ("0.070238889", "0.07024"),
        ("0.011100000", "0.01110"),
        ("1.163524655", "1.164"),
        ("9.999600000", "10.00"),
        ("12.345678901", "12.35"),
        ("123.456000000", "123.5"),
        ("999.960000000", "1,000"),
        ("1234.600000000", "1,235"),
        ("1234567.891000000", "1,234,568"),
        ("123456789012345.000000001", "123,456,789,012,345"),
        ("0.000012346", "0.00001235"),
        ("0.000000123", "0.000000123"),
        ("0.000000001", "0.000000001"),
        ("-0.500000000", "-0.5000"),
    ],
)
def test_an_amount_has_four_significant_digits(text: str | None, expected: str) -> None:
    assert amount(text) == expected


@given(st.integers(1, 10**24))
def test_an_amount_is_never_scientific_and_right_to_four_digits(nano: int) -> None:
    text = amount(nano_to_text(nano))
    assert re.fullmatch(r"\d{1,3}(,\d{3})*(\.\d{1,9})?", text)
    assert abs(Decimal(text.replace(",", "")) * 10**9 - nano) * 2000 <= nano


def test_other_figures() -> None:
    assert between("0.009256520", "0.012945914") == "0.009257 to 0.01295"
    assert [count(1_969_008), count(0), count(None)] == ["1,969,008", "0", "-"]
    assert [seconds(86_400.0), seconds(0.04), seconds(None)] == ["86,400.0", "0.0", "-"]
    assert [share(1.0, 3.0), share(0.0, 3.0), share(None, 3.0), share(1.0, 0.0), share(1.0, None)] == [
        "33.3%",
        "0.0%",
        "-",
        "-",
        "-",
    ]


def test_a_column_that_says_nothing_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    sheet = Sheet("name", "empty", "count")
    sheet.add("a", "", "1")
    sheet.add("bb", "", "20")
    Screen().sheet(sheet)
    assert capsys.readouterr().out == "name   count\n────────────\na          1\nbb        20\n\n"


def test_a_sheet_without_rows_shows_its_heads(capsys: pytest.CaptureFixture[str]) -> None:
    Screen().sheet(Sheet("name", "count"))
    assert capsys.readouterr().out.splitlines()[0] == "name   count"


def test_columns_are_left_out_in_the_order_given_until_the_rest_fits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = Sheet("name", "one", "two", "three")
    sheet.add("row", "1" * 10, "2" * 10, "3" * 10)
    heads = {}
    for columns in (43, 42, 30, 16, 5):
        monkeypatch.setenv("COLUMNS", str(columns))
        Screen().sheet(sheet, ("two", "one"))
        heads[columns] = capsys.readouterr().out.splitlines()[0].split()
    assert heads == {
        43: ["name", "one", "two", "three"],  # 4 + 3 x (3 + 10)
        42: ["name", "one", "three"],
        30: ["name", "one", "three"],
        16: ["name", "three"],
        5: ["name", "three"],
    }


def test_a_name_of_wide_characters_takes_its_width() -> None:
    sheet = Sheet("name", "count")
    sheet.add("日本", "1")
    assert sheet.least_width((), 0) == len("日本") * 2 + 3 + len("count")


def test_a_paragraph_is_wrapped_between_words_and_what_is_to_be_typed_is_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    Screen().say("one two three four five six seven: ", "kvtally rates add gpu PRICE --unit gpu-hour", indent=2)
    assert capsys.readouterr().out == (
        "one two three four five six\n  seven:\n    kvtally rates add gpu PRICE --unit gpu-hour\n"
    )


def test_csv_joins_nested_keys_and_keeps_unknown_apart_from_zero() -> None:
    rows: list[dict[str, Any]] = [{"a": {"b": {"c": 0}}, "d": [1, "x"]}]
    rows.append({"a": {"b": {"c": None}}, "e": 'say "hi", twice'})
    assert lines_of(rows, ("a.b.c", "d", "e")) == 'a.b.c,d,e\n0,1; x,\n,,"say ""hi"", twice"\n'
    assert lines_of([], ("a.b.c", "d")) == "a.b.c,d\n"
    # a key that has parts where it is known has no column of its own
    assert lines_of([{"a": None, "d": 1}], ("a.b.c", "d")) == "a.b.c,d\n,1\n"


def test_csv_of_an_answer_has_what_is_common_on_every_line() -> None:
    lines = cost_rows_of(several() | {"source": {"kind": "RECORDED"}}, ["model"]).splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("window.start,window.end,window.covered_seconds,currency,source.kind,by.model,tokens.")
    common = "2026-11-23T04:46:46.962Z,2026-11-23T04:48:20.962Z,94.0,USD,RECORDED,"
    assert all(line.startswith(common) for line in lines[1:])
    assert "findings" not in lines[0]


def test_the_columns_of_a_cost_report_do_not_depend_on_what_is_known() -> None:
    whole = several()
    unpriced = {**whole["groups"][0], "cost": None, "orphan_holding": None, "cost_per_million": None}
    unpriced |= {"prefill_share": None, "engine_seconds_intervals": dict.fromkeys(("prefill", "decode"))}
    headers = {
        cost_rows_of({**whole, "groups": groups}, ["model"]).splitlines()[0]
        for groups in (whole["groups"], [unpriced], [*whole["groups"], unpriced], [GROUP], [])
    }
    (header,) = headers
    columns = header.split(",")
    assert columns[:5] == ["window.start", "window.end", "window.covered_seconds", "currency", "by.model"]
    assert columns[5:] == list(COST_COLUMNS)
    assert len(set(columns)) == len(columns)
    (row,) = csv.DictReader(io.StringIO(cost_rows_of({**whole, "groups": [unpriced]}, ["model"])))
    assert {row[column] for column in columns if column.startswith("cost")} == {""}


def test_no_key_of_a_group_is_without_its_column() -> None:
    """A key that has parts where it is known is a column by its parts alone."""
    parted = {column.rpartition(".")[0] for column in COST_COLUMNS}
    assert {column for column in flat(GROUP) if not column.startswith("by.")} <= {*COST_COLUMNS, *parted}


@pytest.mark.parametrize(
    ("coverage", "count", "told"),
    [
        (1.0, 1, "94.0 s covered\n"),
        (0.9999, 1, "94.0 s covered\n"),
        (None, 1, "94.0 s covered\n"),
        (0.932, 1, "94.0 s covered, 93.2% of the scrapes\n"),
        (0.932, 2, "94.0 s covered, at least 93.2% of the scrapes\n"),
    ],
)
def test_the_header_says_how_much_of_the_time_was_scraped(
    coverage: float | None, count: int, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    whole = several()
    first = {**whole["groups"][0], "coverage": coverage}
    rest = [{**group, "coverage": 1.0} for group in whole["groups"][1:count]]
    cost_table({**whole, "groups": [first, *rest]})
    assert capsys.readouterr().out.startswith(f"2026-11-23T04:46:46.962Z to 2026-11-23T04:48:20.962Z, {told}")


def test_a_recording_without_a_gpu_or_a_version_still_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    banner({"engine": "vllm", "gpus": []}, 60 * 10**9, 1_795_406_400 * 10**9)
    banner({}, 1_400_000_000, 0)
    banner({"gpus": [{"uuid": "GPU-a"}, {"name": "NVIDIA\x1b H100"}], "engine_version": "0.32.0"}, 0, 0)
    assert capsys.readouterr().out == (
        "RECORDED on no GPU, vllm, 2026-11-23, 60 s. Not live.\n"
        "RECORDED on no GPU, engine, 1970-01-01, 1 s. Not live.\n"
        "RECORDED on GPU-a, NVIDIA? H100, engine 0.32.0, 1970-01-01, 0 s. Not live.\n"
    )


def test_the_next_commands_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    what_next()
    assert capsys.readouterr().out.count("\n  kvtally ") == 5


def test_progress_gives_what_the_task_gives_and_nothing_to_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    def task(progress: Callable[[int], None]) -> str:
        for at_ns in range(120):
            progress(at_ns)
        return "done"

    assert progress_of("[a]", task) == "done"
    assert capsys.readouterr().out == ""


def test_a_doctor_that_found_nothing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    target: dict[str, Any] = {"target": "engine", "state": "failed", "summary": "none", "missing": [], "hint": ""}
    target |= {"savings": None, "counted": [], "not_counted": [], "warnings": []}
    doctor_table({"targets": [target], "metered_engines": 0, "verdict": "Nothing can be metered here yet."})
    assert capsys.readouterr().out == "failed  engine  none\nNothing can be metered here yet.\n"
