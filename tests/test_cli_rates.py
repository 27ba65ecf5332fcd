from __future__ import annotations

import csv
import io
import json
import shlex
import sqlite3
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import copied
from tests.ledgers import START, Deployment, FakeEngine, FakeGpu, new_ledger, tell_story, url_of

from kvtally.agent.render.comma_separated import RATE_COLUMNS
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call

# the form of a rate in CLI.md, letter by letter
CONTRACT = 'kvtally rates add gpu 2.69 --unit gpu-hour --sku "NVIDIA H100 80GB HBM3" --from 2026-01-01 --term on-demand'


def words(line: str, price: str = "2.69") -> list[str]:
    """A line to type, as a shell hands it over."""
    name, *rest = shlex.split(line.replace("PRICE", price).replace("2.69", price))
    assert name == "kvtally"
    return rest


def cost(call: Call, url: str, *arguments: str) -> dict[str, Any]:
    found = json.loads(call("cost", "--ledger", url, *arguments).out)
    assert isinstance(found, dict)
    return found


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query).fetchall()


def test_the_packaged_prices_are_listed_as_assumed_with_or_without_a_ledger(kvtally: Call, demo_ledger: str) -> None:
    rates = json.loads(kvtally("rates", "list").out)["rates"]
    assert json.loads(kvtally("rates", "list", "--ledger", demo_ledger).out)["rates"] == rates
    assert {rate["basis"] for rate in rates} == {"ASSUMED"}
    assert rates[0] | {"source": "", "note": ""} == {
        "resource": "gpu",
        "sku": "NVIDIA H100 80GB HBM3",
        "site": "",
        "term": "on-demand",
        "unit": "gpu-hour",
        "price": "2.690000000",
        "currency": "USD",
        "valid_from": "2026-09-01",
        "valid_until": None,
        "basis": "ASSUMED",
        "source": "",
        "note": "",
        "committed": None,
        "pue": None,
    }
    assert rates[0]["source"].startswith("packaged: RunPod")


def test_prices_are_listed_as_csv_and_as_a_table(kvtally: Call, golden: Callable[[str, str], None]) -> None:
    kvtally(*words(CONTRACT))
    kvtally("rates", "add", "energy", "0.0929", "--term", "owned", "--pue", "1.2", "--from", "2026-01-01T08:30")
    kvtally("rates", "add", "dram", "0.01", "--site", "fra1", "--from", "2026-01-01", "--until", "2026-07-01")
    lines = list(csv.DictReader(io.StringIO(kvtally("rates", "list", "--format", "csv").out)))
    assert [(line["resource"], line["price"], line["basis"]) for line in lines[-3:]] == [
        ("gpu", "2.690000000", "MEASURED"),
        ("energy", "0.092900000", "MEASURED"),
        ("dram", "0.010000000", "MEASURED"),
    ]
    assert (lines[-2]["pue"], lines[-2]["valid_from"]) == ("1.2", "2026-01-01T08:30:00Z")
    assert (lines[-1]["site"], lines[-1]["valid_until"]) == ("fra1", "2026-07-01")
    golden("rates-list.txt", kvtally("rates", "list", "--format", "table").out)


def test_a_card_of_the_config_is_listed_before_any_ledger_is_there(kvtally: Call) -> None:
    Path("card.toml").write_text(kvtally("rates", "example").out, encoding="utf-8")
    Path("kvtally.toml").write_text('[rates]\ncard = "card.toml"\ndefault_card = false\n', encoding="utf-8")
    rates = json.loads(kvtally("rates", "list").out)["rates"]
    assert [(rate["resource"], rate["term"]) for rate in rates] == [("gpu", "owned"), ("energy", "owned")]


def test_a_rate_in_the_form_of_the_contract_turns_assumed_money_into_measured(
    kvtally: Call, demo_ledger: str, tmp_path: Path
) -> None:
    url = copied(demo_ledger, tmp_path)
    before = cost(kvtally, url)["groups"][0]
    status, out, err = kvtally(*words(CONTRACT), "--ledger", url)
    assert (status, out) == (0, "")
    assert err == (
        "added: gpu NVIDIA H100 80GB HBM3 on-demand 2.69 USD/gpu-hour from 2026-01-01 (MEASURED: operator)\n"
    )
    after = cost(kvtally, url)["groups"][0]
    assert (before["basis"]["cost"], after["basis"]["cost"]) == ("ASSUMED", "MEASURED")
    assert after["cost"] == before["cost"]
    assert err == f"added: {after['rates'][0]}\n"


def test_another_price_is_another_cost(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    url = copied(demo_ledger, tmp_path)
    assert kvtally(*words(CONTRACT, "3.60"), "--ledger", url).status == 0
    # 94 s x 3.60 / 3600 = 94 x 0.001
    assert cost(kvtally, url)["groups"][0]["cost"]["total"] == "0.094000000"


def test_a_rate_that_is_there_already_is_not_added_again(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    url = copied(demo_ledger, tmp_path)
    kvtally(*words(CONTRACT), "--ledger", url)
    before = rows(url, "SELECT count(*) FROM rate")
    assert kvtally(*words(CONTRACT), "--ledger", url).err.startswith("was there: gpu NVIDIA H100 80GB HBM3 ")
    assert rows(url, "SELECT count(*) FROM rate") == before


def test_a_product_that_no_gpu_of_the_ledger_is_gets_a_note(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    url = copied(demo_ledger, tmp_path)
    words = ("--unit", "gpu-hour", "--from", "2026-01-01", "--ledger", url)
    wrong = kvtally("rates", "add", "gpu", "2.10", "--sku", "NVIDIA H100", *words)
    assert wrong.status == 0
    assert wrong.err.splitlines()[1] == (
        """note: no GPU of this ledger is a "NVIDIA H100": it has 'NVIDIA H100 80GB HBM3'"""
    )
    assert "note" not in kvtally("rates", "add", "gpu", "2.10", "--sku", "NVIDIA H100 80GB HBM3", *words).err
    assert "note" not in kvtally("rates", "add", "gpu", "2.11", *words).err


def test_settled_hours_that_a_rate_concerns_get_a_revision_beside_the_old(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)  # 04:10 to 08:15, two engines and three GPUs
    url = url_of(path)
    kvtally("ledger", "settle", "--ledger", url)
    settled = rows(url, "SELECT period_start_ns, revision FROM settlement ORDER BY 1")
    assert {revision for _, revision in settled} == {1}
    charged = rows(url, "SELECT * FROM charge WHERE revision = 1 ORDER BY id")
    before = cost(kvtally, url, "--by", "hour")["groups"]
    line = 'kvtally rates add gpu 2.69 --sku "NVIDIA H100 80GB HBM3" --from 2026-11-23T06:00Z'
    err = kvtally(*words(line, "9"), "--ledger", url).err
    later = [hour for hour, _ in settled if hour >= START + 2 * 3600 * 10**9]
    assert len(later) > 1
    assert err.endswith(f"\n{len(later)} hours settled again at the new price\n")
    revised = rows(url, "SELECT period_start_ns FROM settlement WHERE reason = 'a price was added' ORDER BY 1")
    assert [hour for (hour,) in revised] == later
    assert rows(url, "SELECT * FROM charge WHERE revision = 1 ORDER BY id") == charged
    after = cost(kvtally, url, "--by", "hour")["groups"]
    assert float(after[2]["cost"]["gpu"]) > float(before[2]["cost"]["gpu"])
    assert after[2]["cost"]["server"] == before[2]["cost"]["server"]


def test_an_hour_that_is_settled_again_is_told_as_one(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    url = url_of(path)
    kvtally("ledger", "settle", "--ledger", url)
    newest = rows(url, "SELECT max(period_start_ns) FROM settlement")[0][0] // 10**9
    since = datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%dT%H:%MZ")
    ran = kvtally("rates", "add", "gpu", "9", "--sku", "NVIDIA H100 80GB HBM3", "--from", since, "--ledger", url)
    assert (ran.status, ran.out) == (0, "")
    assert ran.err.splitlines()[1:] == ["1 hour settled again at the new price"]


def test_csv_has_a_column_for_every_key_of_a_rate(kvtally: Call) -> None:
    rates = json.loads(kvtally("rates", "list").out)["rates"]
    header, *lines = csv.reader(io.StringIO(kvtally("rates", "list", "--format", "csv").out))
    assert header == [*RATE_COLUMNS]
    assert len(lines) == len(rates)
    assert {name for rate in rates for name in rate} == set(header)


def test_a_second_currency_is_refused_before_anything_is_written(
    kvtally: Call, demo_ledger: str, tmp_path: Path
) -> None:
    url = copied(demo_ledger, tmp_path)
    kvtally(*words(CONTRACT), "--ledger", url)
    before = rows(url, "SELECT * FROM rate")
    status, out, err = kvtally(*words(CONTRACT), "--currency", "EUR", "--ledger", url)
    assert (status, out) == (2, "")
    assert err == "kvtally: currency: EUR beside USD: a ledger has one currency\n"
    assert rows(url, "SELECT * FROM rate") == before


def test_charges_at_packaged_prices_keep_a_ledger_in_their_currency(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"127.0.0.1:8000": About(gpus=("GPU-a",), sku="NVIDIA H200")}, interval_seconds=1800)
    engine = FakeEngine()
    for number in range(4):
        deployment.scrape(START + number * 1800 * 10**9, [engine])
        engine.serve(computed=60, generated=10)
    deployment.close()
    url = url_of(path)
    kvtally("ledger", "settle", "--ledger", url)
    first_hour = rows(url, f"SELECT sum(amount_nano) FROM charge WHERE period_start_ns = {START}")
    assert first_hour == [(3_590_000_000,)]  # an H200's price
    status, _, err = kvtally("rates", "add", "gpu", "2", "--from", "2027-01-01", "--currency", "EUR", "--ledger", url)
    assert status == 2
    assert err == "kvtally: currency: this ledger holds charges in another: begin a new ledger for EUR\n"


def test_an_unused_ledger_takes_any_currency_and_leaves_packaged_prices_out(kvtally: Call) -> None:
    assert kvtally("rates", "add", "gpu", "2", "--from", "2026-01-01", "--currency", "EUR").status == 0
    rates = json.loads(kvtally("rates", "list").out)["rates"]
    assert {rate["currency"] for rate in rates} == {"EUR"}
    assert [rate["price"] for rate in rates if rate["resource"] == "gpu"] == ["2.000000000"]
    assert json.loads(kvtally("ledger", "info").out)["currency"] == "EUR"


def test_the_owned_example_is_imported_as_it_is_printed(kvtally: Call) -> None:
    Path("owned.toml").write_text(kvtally("rates", "example").out, encoding="utf-8")
    status, out, err = kvtally("rates", "import", "owned.toml")
    assert (status, out) == (0, "")
    gpu, energy = err.splitlines()
    # (38750 - 3875/1.08^5) x 0.08 x 1.08^5 / (1.08^5 - 1) + 3875, over 8766 hours
    assert gpu.startswith("added: gpu NVIDIA H100 80GB HBM3 owned 1.47383")
    assert gpu.endswith("(ASSUMED: quote of August 2024 for a node of 8 H100 SXM: 310,000 USD)")
    assert energy.startswith("added: energy owned 0.0929 USD/kwh x PUE 1.54 from 2026-01-01 (ASSUMED: US industrial")
    assert kvtally("rates", "import", "owned.toml").err.count("was there: ") == 2


@pytest.mark.parametrize(
    ("card", "told"),
    [
        ("", "kvtally: rate: is missing: begin every entry with [[rate]]\n"),
        ("[[rate]]\nresource = 'gpu'\n", "kvtally: rate[0].term: is missing\n"),
        ("\0", "kvtally: file: is not TOML: "),
    ],
)
def test_a_card_that_is_wrong_adds_nothing(card: str, told: str, kvtally: Call) -> None:
    Path("card.toml").write_text(card, encoding="utf-8")
    status, out, err = kvtally("rates", "import", "card.toml")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(told)
    assert not Path("state").exists()


@pytest.mark.parametrize(
    ("about", "resource"),
    [
        (About(gpus=("GPU-a",), sku="NVIDIA H20"), "gpu"),
        (About(gpus=("GPU-a",), sku='NVIDIA "H20" $(touch x) `y` \\ it\'s !1'), "gpu"),
        (About(gpus=("GPU-a", "GPU-b"), sku="NVIDIA H100 80GB HBM3", term="reserved", site="fra 1"), "gpu"),
        (About(gpus=(), site="rack '7'"), "server"),
        (About(gpus=("GPU-a",), sku="NVIDIA L40S", dram_gib="64", storage_tib="2", site="x"), ""),
    ],
)
def test_a_missing_price_comes_with_the_line_to_type_and_typed_it_makes_the_money_appear(
    about: About, resource: str, kvtally: Call, tmp_path: Path
) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"127.0.0.1:8000": about}, interval_seconds=600)
    engine = FakeEngine()
    gpus = [FakeGpu(uuid, about.sku) for uuid in about.gpus or ()]
    for number in range(4):
        deployment.scrape(START + 7_000_000 + number * 600 * 10**9, [engine], gpus)
        engine.serve(computed=1000, generated=200)
        for gpu in gpus:
            gpu.run(600, 300)
    deployment.close()
    url = url_of(path)
    found = cost(kvtally, url)
    (group,) = found["groups"]
    if not resource:  # a packaged price: nothing is missing
        assert group["cost"]["total"] == "0.395000000"  # 30 min x 0.79
        return
    assert group["cost"] is group["cost_per_million"] is group["basis"]["cost"] is None
    assert group["tokens"]["prompt"] == 3000
    assert group["engine_seconds"]["idle"] + group["engine_seconds"]["occupied"] == 1800
    (finding,) = (finding for finding in found["findings"] if finding["kind"] == "no_rate")
    assert "no rate for " in finding["message"]
    line = finding["message"][finding["message"].index("kvtally rates add") :]
    assert line in kvtally("cost", "--ledger", url, "--format", "table").out
    assert kvtally(*words(line, "1.80"), "--ledger", url).status == 0
    (group,) = cost(kvtally, url)["groups"]
    assert group["cost"][resource] == group["cost"]["total"] == f"{0.9 * max(len(about.gpus or ()), 1):.9f}"  # 30 min
    assert group["basis"]["cost"] == "MEASURED"
