from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from tests.command_line import call
from tests.focus_validator import billed, faults, rows_of
from tests.ledgers import SKU, START, Deployment, FakeEngine, FakeGpu, new_ledger, tell_story, url_of

from kvtally.agent.replica import About

if TYPE_CHECKING:
    from tests.command_line import Call, Ran


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path)
    url = url_of(path)
    assert call("ledger", "settle", "--quiet", "--ledger", url).status == 0
    return url


def cost(kvtally: Call, url: str, *window: str) -> str:
    (group,) = json.loads(kvtally("cost", "--ledger", url, "--format", "json", "--by", "", *window).out)["groups"]
    total = group["cost"]["total"]
    assert isinstance(total, str)
    return total


def refused(ran: Ran, *words: str) -> None:
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in ran.err


@pytest.mark.parametrize("window", [(), ("--since", "2h"), ("--since", "2026-11-23T05:12:34Z", "--until", "20m")])
def test_focus_prints_rows_that_add_up_to_what_cost_says(kvtally: Call, story: str, window: tuple[str, ...]) -> None:
    ran = kvtally("export", "focus", "--ledger", story, *window)
    assert (ran.status, ran.err) == (0, "")
    assert faults(ran.out) == []
    assert f"{billed(rows_of(ran.out)):.9f}" == cost(kvtally, story, *window)


def test_focus_names_who_charges_whom(kvtally: Call, story: str) -> None:
    ran = kvtally("export", "focus", "--ledger", story, "--provider", "Platform, team", "--account", "acme")
    row = rows_of(ran.out)[0]
    assert (row["ProviderName"], row["BillingAccountId"]) == ("Platform, team", "acme")


def test_focus_writes_a_file_whole(kvtally: Call, story: str, tmp_path: Path) -> None:
    printed = kvtally("export", "focus", "--ledger", story).out
    ran = kvtally("export", "focus", "--ledger", story, "--output", "out.csv")
    assert (ran.status, ran.out) == (0, "")
    assert ran.err == f"out.csv: {len(rows_of(printed))} rows\n"
    assert (tmp_path / "out.csv").read_bytes().decode() == printed


def test_focus_as_parquet_holds_the_same(kvtally: Call, story: str) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet`")
    told = rows_of(kvtally("export", "focus", "--ledger", story).out)
    ran = kvtally("export", "focus", "--ledger", story, "--format", "parquet", "--output", "out.parquet")
    assert ran.status == 0
    table = parquet.read_table("out.parquet")
    assert table.column_names == list(told[0])
    assert [f"{cost:.9f}" for cost in table.column("BilledCost").to_pylist()] == [row["BilledCost"] for row in told]
    assert [f"{at:%Y-%m-%dT%H:%M:%SZ}" for at in table.column("ChargePeriodStart").to_pylist()] == [
        row["ChargePeriodStart"] for row in told
    ]
    assert [value if value is not None else "" for value in table.column("Tags").to_pylist()] == [
        row["Tags"] for row in told
    ]


def test_focus_says_how_much_has_no_price(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",), sku="NVIDIA Z9", mapping="a test")})
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a", "NVIDIA Z9")
    for second in (0, 20):
        deployment.scrape(START + second * 10**9, [engine], [gpu])
    deployment.close()
    ran = kvtally("export", "focus", "--ledger", url_of(path))
    assert (ran.status, rows_of(ran.out)) == (0, [])
    assert ran.err == "hours of engines and GPUs without a price, and so without a row: 1 (`kvtally cost` says why)\n"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("focus", "--format", "parquet"), "give --output FILE"),
        (("focus", "--provider", " "), "--provider is a name"),
        (("focus", "--account", ""), "--account is a name"),
        (("focus", "--format", "xlsx"), "'xlsx' is not one of 'csv', 'parquet'"),
        (("focus", "--since", "yesterday"), "'yesterday' is no time"),
        (("parquet",), "Missing argument 'FOLDER'"),
        (("openmetrics", "--step", "0"), "'0' is no step"),
        (("openmetrics", "--step", "0.5s"), "'0.5s' is no step"),
        (("openmetrics", "--step", "25h"), "'25h' is no step"),
        (("openmetrics", "--label", "job"), "'job' is no label"),
        (("openmetrics", "--label", "1st=x"), "'1st=x' is no label"),
        (("openmetrics", "--label", "__name__=x"), "'__name__=x' is no label"),
        (("openmetrics", "--label", "replica=x"), "replica is on every series already"),
        (("openmetrics", "--label", "job=x", "--label", "job=y"), "job is on every series already"),
    ],
)
def test_a_wrong_call_says_what_to_give(kvtally: Call, story: str, arguments: tuple[str, ...], word: str) -> None:
    refused(kvtally("export", *arguments, "--ledger", story), word, f"kvtally export {arguments[0]} --help")


@pytest.mark.parametrize("arguments", [("focus", "--format", "parquet", "--output", "x.parquet"), ("parquet", "lake")])
def test_without_pyarrow_parquet_says_what_to_install(
    kvtally: Call, story: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    refused(kvtally("export", *arguments, "--ledger", story), "pip install 'kvtally[parquet]'")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [("focus",), ("parquet", "lake"), ("openmetrics",)])
def test_without_a_ledger_it_is_unreachable(kvtally: Call, command: tuple[str, ...]) -> None:
    ran = kvtally("export", *command, "--ledger", "sqlite:///nowhere.db")
    assert (ran.status, ran.out) == (3, "")
    assert "no ledger there" in ran.err
    assert not Path("lake").exists()


@pytest.mark.parametrize("command", ["focus", "openmetrics"])
def test_where_nothing_can_be_written_it_says_so(kvtally: Call, story: str, command: str) -> None:
    ran = kvtally("export", command, "--ledger", story, "--output", "nowhere/out")
    assert (ran.status, ran.err.count("\n")) == (3, 1)
    assert "No such file or directory" in ran.err


def test_parquet_writes_a_file_for_each_table(kvtally: Call, story: str, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet`")
    ran = kvtally("export", "parquet", "a/lake", "--ledger", story, "--since", "2026-11-23")
    assert (ran.status, ran.out) == (0, "")
    counts = {
        path.name: parquet.ParquetFile(path).metadata.num_rows for path in sorted((tmp_path / "a/lake").iterdir())
    }
    assert [f"a/lake/{name}: {rows:,} rows" for name, rows in counts.items()] == sorted(ran.err.splitlines())
    assert list(counts) == ["charge.parquet", "engine_interval.parquet", "saving.parquet"]
    assert min(counts.values()) > 0
    table = parquet.read_table(tmp_path / "a/lake/charge.parquet")
    assert {str(table.schema.field(name).type) for name in ("amount", "price")} == {"decimal128(38, 9)"}
    assert set(table.column("sku").to_pylist()) >= {SKU}


def test_openmetrics_is_read_by_the_client_library_of_prometheus(kvtally: Call, story: str) -> None:
    ran = kvtally("export", "openmetrics", "--ledger", story, "--step", "5m", "--label", "job=kvtally")
    assert (ran.status, ran.err) == (0, "")
    families = list(text_string_to_metric_families(ran.out))  # type: ignore[no-untyped-call]  # the library
    assert [family.name for family in families][:2] == ["kvtally_prompt_tokens", "kvtally_generated_tokens"]
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["job"] for sample in samples} == {"kvtally"}
    assert {float(sample.timestamp or 1) % 300 for sample in samples} == {0.0}


def test_openmetrics_writes_a_file_whole(kvtally: Call, story: str, tmp_path: Path) -> None:
    printed = kvtally("export", "openmetrics", "--ledger", story, "--step", "1h").out
    assert kvtally("export", "openmetrics", "--ledger", story, "--step", "60m", "--output", "out.om").status == 0
    assert (tmp_path / "out.om").read_text(encoding="utf-8") == printed
