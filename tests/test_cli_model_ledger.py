from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import sys
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET

import pytest
from tests.command_line import DEMO, call, copied
from tests.ledgers import new_ledger, url_of
from tests.simulator.scenarios import build

from kvtally.agent.calibration import Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.cli.quantity import supposed_store_of
from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config
from kvtally.agent.interval import IDENTITY_BROKEN
from kvtally.agent.ledger.read import LedgerReader, replica_of
from kvtally.agent.model_report import points
from kvtally.agent.observed import fingerprint_of
from kvtally.agent.recording import open_recording
from kvtally.agent.render.comma_separated import POINT_COLUMNS, flat

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call

REQUESTS = Path(__file__).parent / "fixtures" / "requests" / "h100-llama8b.csv"
SVG = "{http://www.w3.org/2000/svg}"
H100 = "NVIDIA H100 80GB HBM3"
DISK = "disk=10TB@20GB/s,$300/TB"
MONTH = 730.5
pytestmark = pytest.mark.usefixtures("kvtally")
# a law that nobody has learned: what is shown of it does not change with what is learned
FIXED = Calibration(
    Fingerprint(
        "llama-8b", "LlamaForCausalLM", "bfloat16", "bfloat16", H100, 1, "0.25.1", 8192, "32x4096-ea2e02", is_eager=True
    ),
    "M1",
    (0.72, 0.70, 0.75, 0.60, 5e-4, 4e-4, 0.029, 4.0, 0.004),
    tuple(tuple(0.0016 if row == column else 0.0 for column in range(9)) for row in range(9)),
    0.9,
    30.0,
    CalibrationEvidence(1795400000 * 10**9, 1795403600 * 10**9, "graphics", 42, 24, 2, 0, 373, 4688, 84.0, 1.0, 0.05),
)


def asked(url: str, *arguments: str) -> dict[str, Any]:
    ran = call("model", *arguments, "--ledger", url, "--format", "json")
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def supposed(url: str, *arguments: str, store: str = DISK) -> dict[str, Any]:
    (found,) = asked(url, "--what-if", store, *arguments)["what_ifs"]
    assert isinstance(found, dict)
    return found


def rows_of(report: dict[str, Any], seen_by: str, prompt: int) -> dict[int, dict[str, Any]]:
    """Rows of one length by percents of reuse."""
    return {
        round(100 * row["reuse"]): row
        for row in report["measured"]
        if (row["seen_by"], row["prompt_tokens"]) == (seen_by, prompt)
    }


def with_law(url: str, folder: Path) -> str:
    """A copy of a ledger that holds the fixed law as calibration 1."""
    own = copied(url, folder)
    add_law(own, FIXED)
    return own


def add_law(url: str, law: Calibration) -> None:
    with LedgerReader(url) as reader:
        assert reader.add_calibration(law, 1795403600 * 10**9, "for a test") == 1


def changed(url: str, *statements: str) -> None:
    """Do to a ledger what its triggers do not allow."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount > 0


@pytest.fixture(scope="module")
def backlog(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ledger of a simulated engine with LMCache in front of a disk, which stalls it; the fixed law is in it."""
    url = simulated(tmp_path_factory, "backlog8")
    add_law(url, FIXED)
    return url


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A ledger of a simulated engine without a GPU, with a law."""
    url = simulated(tmp_path_factory, "cpu")
    with LedgerReader(url) as reader:
        (engine,) = (target for target in reader.targets().values() if target.kind == "engine")
    fingerprint = fingerprint_of(replica_of(engine))
    assert fingerprint is not None
    add_law(url, FIXED._replace(fingerprint=fingerprint, medians=(*FIXED.medians[:6], 2e-3, 4.0, 0.004)))
    return url


def simulated(folders: pytest.TempPathFactory, name: str) -> str:
    url = f"sqlite:///{folders.mktemp(name)}/ledger.db"
    into_ledger(build(name, 1, seconds=60.0).recorded().open(), url, Config())
    return url


# -- measured and calibrated


def test_what_a_real_engine_measured_lies_on_its_own_law(demo_ledger: str) -> None:
    report = asked(demo_ledger, "--calibrated", "--measured")
    rows = rows_of(report, "engine", 30_720)
    assert sorted(rows) == [0, 50, 75, 90, 100]
    for row in rows.values():
        assert abs(row["error"]) < 0.08
        assert row["predicted_seconds"]["low"] < row["seconds"]["point"] < row["predicted_seconds"]["high"]
        assert (row["basis"], row["predicted_basis"]) == ("MEASURED", "MODELLED")
    assert rows[100]["seconds"]["point"] == pytest.approx(0.035, abs=0.001)
    assert all(abs(row["saved"]["error"]) < 0.08 for reuse, row in rows.items() if reuse)
    assert [prompt["prompt_tokens"] for prompt in report["prompts"]] == [30_720]
    assert any("57 more requests" in each and "--requests FILE" in each for each in report["findings"])
    assert any("the law has learned from requests of this span" in each for each in report["findings"])


def test_a_log_of_its_clients_tells_of_more_requests_and_what_they_wait_beyond(demo_ledger: str) -> None:
    report = asked(demo_ledger, "--calibrated", "--measured", "--requests", str(REQUESTS))
    rows = rows_of(report, "client", 8192)
    assert sorted(rows) == [0, 25, 50, 75, 90, 100]
    assert all(abs(row["saved"]["error"]) < 0.10 for reuse, row in rows.items() if reuse)
    # of 30,720 tokens in HBM the engine computes 16 in 35 ms; the client waits 53 ms longer
    engine, client = (rows_of(report, seen_by, 30_720)[100] for seen_by in ("engine", "client"))
    assert client["seconds"]["point"] - engine["seconds"]["point"] == pytest.approx(0.053, abs=0.003)
    assert client["error"] < -0.5
    assert any("at a client a first token takes" in each for each in report["findings"])
    assert not any("more requests ran one at a time" in each for each in report["findings"])


def test_the_deployment_is_what_the_ledger_says(demo_ledger: str) -> None:
    report = asked(demo_ledger, "--calibrated", "--prompt", "8k")
    assert report["model"]["name"] == "llama-8b"
    assert (report["model"]["hardware"], report["model"]["kv_bytes_per_token"]) == (f"1 x {H100}", 131_072)
    assert report["deployment"]["replicas"] == ["h100-llama8b-on/0"]
    assert report["deployment"]["calibration"]["fingerprint"] == FIXED.fingerprint.text()
    assert report["measured"] is None
    basis = {each["name"]: each["basis"] for each in report["inputs"]}
    assert {basis[name] for name in ("step law", "compute efficiency", "t0, beside prefill and load")} == {"MODELLED"}
    assert (basis["GPU"], basis["price of a GPU"]) == ("SOURCE", "ASSUMED")
    assert report["basis"] == {"ttft": "MODELLED", "break_even": "MODELLED", "cost": "ASSUMED", "claims": "MODELLED"}


def test_without_a_calibration_the_packaged_law_stands_beside_the_points(demo_ledger: str) -> None:
    report = asked(demo_ledger, "--measured", "--first-token-seconds", "0.01")
    assert report["deployment"]["calibration"] is None
    basis = {each["name"]: each["basis"] for each in report["inputs"]}
    assert (basis["compute efficiency"], basis["t0, beside prefill and load"]) == ("ASSUMED", "GIVEN")
    # 0.55 of the peak and all active parameters are slower than this engine
    assert rows_of(report, "engine", 30_720)[0]["error"] > 0.2


def test_the_same_efficiencies_are_taken_elsewhere_less_surely(demo_ledger: str, tmp_path: Path) -> None:
    url = with_law(demo_ledger, tmp_path)
    here, there = (
        asked(url, "--calibrated", "--prompt", "32k", *more) for more in ((), ("--gpu", "H200", "--gpus", "4"))
    )
    spans = [report["prompts"][0]["curves"][0]["points"][0]["ttft_seconds"] for report in (here, there)]
    # four times the peak, and all-reduces: 32 layers x 2 x (10 us a step + 4 x 4096 B x 3/4 / 350 GB/s a token)
    assert 3.0 < spans[0]["point"] / spans[1]["point"] < 4.0
    widths = [span["high"] / span["low"] for span in spans]
    assert widths[1] > 1.05 * widths[0]
    assert any(each.startswith("scaled, MODELLED: the law was learned on 1 x") for each in there["findings"])
    assert there["model"]["hardware"] == "4 x NVIDIA H200"
    assert not any("scaled" in each for each in here["findings"])
    again = asked(url, "--calibrated", "--prompt", "32k", "--gpu", "H100", "--gpus", "1", "--model", "llama-8b")
    assert again["prompts"] == here["prompts"]


def test_a_stored_law_is_used_by_its_number(demo_ledger: str, tmp_path: Path) -> None:
    url = with_law(demo_ledger, tmp_path)
    report = asked(url, "--calibrated", "--calibration", "1", "--measured", "--first-token-seconds", "0.2")
    assert report["deployment"]["calibration"]["id"] == 1
    # it was learned before the window: its error is that of a forecast
    assert not any("has learned from requests of this span" in each for each in report["findings"])
    assert [each["value"] for each in report["inputs"] if each["name"].startswith("t0")] == ["0.2 s"]


def test_an_engine_without_a_gpu_has_its_law_and_its_hosts_price(kvtally: Call, on_cpu: str) -> None:
    report = asked(on_cpu, "--calibrated", "--measured", "--host-price", "0.5")
    assert report["model"]["hardware"] == "a CPU"
    cost = report["prompts"][0]["curves"][0]["points"][0]
    seconds = float(cost["ttft_seconds"]["point"])
    # one request of n tokens after the other, at 0.5 an hour
    expected = 0.5 / 3600 * seconds / report["prompts"][0]["prompt_tokens"] * 1e8
    assert float(cost["cost_per_100m_tokens"]["point"]) == pytest.approx(expected, rel=1e-6)
    unpriced = asked(on_cpu, "--calibrated", "--prompt", "1k")
    assert unpriced["basis"]["cost"] is None
    assert any("give --host-price" in each for each in unpriced["findings"])
    ran = kvtally("model", "--measured", "--ledger", on_cpu)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "add --calibrated" in ran.err


def test_points_are_rows_of_figures_as_well(kvtally: Call, demo_ledger: str) -> None:
    words = ("model", "--calibrated", "--measured", "--ledger", demo_ledger, "--format")
    ran = kvtally(*words, "csv")
    rows = [row for row in csv.DictReader(io.StringIO(ran.out)) if row["kind"] == "measured"]
    assert [*rows[0]] == [*POINT_COLUMNS]
    keys = {name for row in points(json.loads(kvtally(*words, "json").out)) for name in flat(row)}
    assert keys - {"cost_per_100m_tokens"} == set(POINT_COLUMNS)
    assert {row["backend"] for row in rows} == {"measured at the engine"}
    full = next(row for row in rows if row["prompt_tokens"] == "30720" and float(row["reuse"]) > 0.99)
    assert (full["ttft_basis"], full["requests"], full["tier"]) == ("MEASURED", "1", "hbm")
    assert float(full["ttft_seconds.point"]) == pytest.approx(0.035, abs=0.001)
    assert full["cost_per_100m_tokens.point"] == ""


def test_points_are_marks_on_the_chart(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    arguments = ("--calibrated", "--measured", "--requests", str(REQUESTS), "--prompt", "8k,30720", "--svg", str(path))
    assert kvtally("model", *arguments, "--ledger", demo_ledger, "--format", "csv").status == 0
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    shown = {"".join(each.itertext()) for each in root.iter(f"{SVG}text")}
    assert {"measured at the engine", "measured at a client"} <= shown
    panels = list(root.iter(f"{SVG}g"))
    marks = [[each for each in panel.iter() if each.get("class") == "mark"] for panel in panels]
    circles = [[each for each in found if each.tag == f"{SVG}circle"] for found in marks]
    assert [bool(found) for found in marks] == [True, False, True, False]  # times have marks, costs none
    at_30k = sorted(float(each.get("cx", "")) for each in circles[2])
    assert at_30k == pytest.approx([0, 210, 315, 378, 420], abs=0.5)  # of 420 pixels
    assert all(0 <= float(each.get("cy", "")) <= 230 for found in circles for each in found)


def test_the_ledgers_answer_is_shown_as_a_table(
    kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    url = with_law(demo_ledger, tmp_path)
    arguments = ("--calibrated", "--measured", "--requests", str(REQUESTS), "--what-if", DISK, "--extra-reuse", "60%")
    ran = kvtally("model", *arguments, "--prompt", "8k", "--reuse", "0,100", "--ledger", url, "--format", "table")
    assert (ran.status, ran.err) == (0, "")
    golden("model-ledger-110.txt", ran.out)


# -- what if


def test_a_store_for_nothing_reused_beyond_hbm_costs_its_holding(demo_ledger: str) -> None:
    found = supposed(demo_ledger)
    assert set(found["gross_engine_seconds"].values()) == {0.0}
    assert set(found["stall_engine_seconds"].values()) == {0.0}
    assert (found["tokens"]["external"], found["tokens"]["extra"]) == (0, 0)
    # 3,000 USD over 3 years of 8,766 hours
    assert float(found["holding"]) == pytest.approx(3000 / (3 * 8766) * found["window"]["hours"], rel=1e-4)
    assert found["verdict"] == "does not pay"
    # half of the time that writing 859,550 tokens of 131,072 B at 20 GB/s takes
    assert found["store_engine_seconds"]["point"] == pytest.approx(0.5 * 859_550 * 131_072 / 20e9)
    assert any("--extra-reuse 20%" in each for each in found["assumptions"])


def test_the_present_tiers_hits_cost_their_loading_at_the_new_bandwidth(backlog: str) -> None:
    found = supposed(backlog)
    tokens = found["tokens"]
    assert tokens["external"] > 10_000
    assert found["loading"] == "synchronous"
    assert found["stall_engine_seconds"]["point"] == pytest.approx(tokens["external"] * 131_072 / 20e9, rel=1e-4)
    assert found["gross_engine_seconds"]["point"] > 0
    assert any("come from this store instead" in each for each in found["assumptions"])
    assert any("as the present tier's does" in each for each in found["assumptions"])
    assert found["basis"] == {
        "tokens": "MEASURED",
        "extra_reuse": None,
        "engine_seconds": "MODELLED",
        "money": "ASSUMED",
    }


def test_the_net_is_what_is_left_of_the_gross(backlog: str) -> None:
    found = supposed(backlog, "--extra-reuse", "20%", "--gpu-price", "3.6", "--life-years", "4")
    seconds = found["gross_engine_seconds"]["point"]
    for cost in ("stall_engine_seconds", "store_engine_seconds"):
        seconds -= found[cost]["point"]
    assert found["net_engine_seconds"]["point"] == pytest.approx(seconds)
    costs = sum(float(each) for each in found["reuse_cost"].values())
    net = float(found["net"]["point"])
    assert net == pytest.approx(float(found["gross"]["point"]) - costs - float(found["holding"]), abs=3e-9)
    # at 3.6 an hour a second is worth a thousandth
    assert net == pytest.approx(seconds / 1000 - float(found["holding"]), abs=3e-9)
    month = MONTH / found["window"]["hours"]
    assert float(found["net_per_month"]["point"]) == pytest.approx(net * month, rel=1e-4)
    for figure in ("gross_engine_seconds", "net_engine_seconds", "stall_engine_seconds", "store_engine_seconds"):
        assert found[figure]["low"] < found[figure]["point"] < found[figure]["high"]
    assert found["basis"]["money"] == "MODELLED"
    assert found["basis"]["extra_reuse"] == "ASSUMED"


def test_more_reuse_more_bandwidth_and_loads_that_hide_save_more(backlog: str) -> None:
    def net(*more: str, store: str = DISK) -> float:
        return float(supposed(backlog, *more, store=store)["net_engine_seconds"]["point"])

    plain = net("--extra-reuse", "20%")
    assert net() < plain < net("--extra-reuse", "40%")
    assert net("--extra-reuse", "20%", store="disk=10TB@2GB/s,$300/TB") < plain
    assert net("--extra-reuse", "20%", store="disk=10TB@20GB/s,$300/TB,50ms") < plain
    hidden = supposed(backlog, "--extra-reuse", "20%", "--overlap")
    assert hidden["net_engine_seconds"]["point"] == hidden["gross_engine_seconds"]["point"] > plain
    assert hidden["stall_engine_seconds"]["point"] == 0 < hidden["stall_engine_seconds"]["high"]
    assert hidden["loading"] == "asynchronous"


def test_a_dearer_or_larger_store_holds_more_and_others_share_it(backlog: str) -> None:
    plain = supposed(backlog)
    twice = supposed(backlog, store="disk=20TB@20GB/s,$300/TB")
    shared = supposed(backlog, "--replicas", "10")
    rented = supposed(backlog, store="disk=10TB@20GB/s,$145/TB-month")
    held = float(plain["holding"])
    assert float(twice["holding"]) == pytest.approx(2 * held, rel=1e-5)
    assert float(shared["holding"]) == pytest.approx(held / 10, rel=1e-5)
    assert float(rented["holding"]) == pytest.approx(1450 / MONTH * plain["window"]["hours"], rel=1e-4)
    assert twice["capacity_tokens"] == pytest.approx(20e12 / 131_072, abs=1)
    assert plain["working_set"]["fits"]
    small = supposed(backlog, store="disk=1GB@20GB/s,$300/TB")
    assert not small["working_set"]["fits"]
    # 1 GB holds 7,629 tokens of those that are computed in the window
    share = 7629.4 / small["working_set"]["computed_tokens"]
    assert small["working_set"]["kept_hours"] == pytest.approx(share * small["window"]["hours"], rel=1e-3)


def test_at_the_reuse_from_which_it_pays_nothing_is_left_and_nothing_lacks(demo_ledger: str) -> None:
    pays = supposed(demo_ledger)["pays_from"]
    assert 0 < pays["extra_reuse"] < 1
    there = supposed(demo_ledger, "--extra-reuse", f"{100 * pays['extra_reuse']:.6f}")
    assert abs(float(there["net"]["point"])) < 0.05 * float(there["gross"]["point"])
    loaded = there["tokens"]["extra"] * MONTH / there["window"]["hours"]
    assert pays["tokens_per_month"] == pytest.approx(loaded, rel=1e-3)
    assert pays["reuses_per_month_of_a_held_token"] == pytest.approx(loaded / there["capacity_tokens"], rel=1e-3)
    dear = supposed(demo_ledger, store="disk=10TB@20GB/s,$300000/TB")["pays_from"]
    assert set(dear.values()) == {None}


def test_a_supposed_store_is_a_curve_among_the_others(demo_ledger: str) -> None:
    report = asked(demo_ledger, "--what-if", DISK, "--what-if", "tape=1PB@1GB/s,$10/TB", "--prompt", "8k")
    assert [each["name"] for each in report["what_ifs"]] == ["disk", "tape"]
    assert [each["backend"] for each in report["prompts"][0]["curves"]][:3] == ["no cache", "disk", "tape"]
    assert next(store for store in report["stores"] if store["name"] == "tape")["capacity_bytes"] == 10**15


def test_without_a_price_there_are_seconds_and_no_verdict(kvtally: Call, backlog: str) -> None:
    ran = kvtally("rates", "list", "--ledger", backlog)
    assert ran.status == 0
    own = Path.cwd() / "kvtally.toml"
    own.write_text("[rates]\ndefault_card = false\n", encoding="utf-8")
    found = supposed(backlog, "--extra-reuse", "20%", "--config", str(own))
    assert found["net_engine_seconds"]["point"] > 0
    assert (found["net"], found["verdict"], found["pays_from"], found["basis"]["money"]) == (None, None, None, None)
    shown = kvtally("model", "--what-if", DISK, "--config", str(own), "--ledger", backlog, "--format", "table")
    assert (shown.status, shown.err) == (0, "")


def test_counters_that_do_not_add_up_carry_no_what_if(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    url = with_law(demo_ledger, tmp_path)
    changed(url, f"UPDATE engine_interval SET flags = flags | {IDENTITY_BROKEN}")
    found = supposed(url, "--extra-reuse", "20%")
    assert (found["status"], found["net"], found["gross_engine_seconds"]) == ("unreconciled", None, None)
    assert any("kvtally ledger audit" in each for each in found["reasons"])
    table = kvtally("model", "--what-if", DISK, "--ledger", url, "--format", "table").out
    assert "unreconciled: the engine's own counters do not add up" in " ".join(table.split())


def test_too_few_requests_carry_no_what_if(demo_ledger: str, tmp_path: Path) -> None:
    found = supposed(with_law(demo_ledger, tmp_path), "--extra-reuse", "20%", "--until", "2026-11-23T04:46:49Z")
    assert (found["status"], found["net"], found["verdict"]) == ("insufficient_data", None, None)
    assert any("requests, a figure takes 20" in each for each in found["reasons"])


# -- what a ledger cannot carry, and wrong calls


@pytest.mark.parametrize(
    ("statements", "said"),
    [
        (
            ("UPDATE target SET attributes = json_remove(attributes, '$.shape')",),
            "the shape of model llama-8b is not known",
        ),
        (("UPDATE target SET attributes = json_remove(attributes, '$.gpus')",), "replica mapping unknown"),
        (("DELETE FROM gpu_interval",), "nothing tells how long the engine worked"),
        (("DELETE FROM engine_interval", "DELETE FROM engine_hour"), "holds no engine interval"),
    ],
)
def test_a_ledger_that_tells_too_little_is_an_answer(
    kvtally: Call, demo_ledger: str, tmp_path: Path, statements: tuple[str, ...], said: str
) -> None:
    url = copied(demo_ledger, tmp_path)
    changed(url, *statements)
    for flag in (("--calibrated",), ("--measured",), ("--what-if", DISK)):
        ran = kvtally("model", *flag, "--ledger", url)
        assert (ran.status, ran.out, ran.err.count("\n")) == (1, "", 1)
        assert said in ran.err


def test_an_empty_ledger_and_none_are_told_apart(kvtally: Call, tmp_path: Path) -> None:
    empty = kvtally("model", "--calibrated", "--ledger", url_of(new_ledger(tmp_path)))
    assert (empty.status, empty.out) == (1, "")
    assert "the ledger holds no engine interval" in empty.err
    none = kvtally("model", "--calibrated", "--ledger", url_of(str(tmp_path / "none.db")))
    assert (none.status, none.out) == (3, "")


def test_of_several_kinds_one_is_to_be_named(kvtally: Call, on_cpu: str, tmp_path: Path) -> None:
    url = copied(on_cpu, tmp_path)
    into_ledger(open_recording(DEMO), url, Config())
    ran = kvtally("model", "--calibrated", "--ledger", url)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "h100-llama8b-on/0, simulated-cpu-1/0: add --replica NAME" in ran.err
    for more in (("--replica", "simulated-cpu-1/0"), ("--calibration", "1")):
        report = asked(url, "--calibrated", *more, "--prompt", "1k")
        assert report["deployment"]["replicas"] == ["simulated-cpu-1/0"]
    report = asked(url, "--calibrated", "--replica", "h100-llama8b-on/0", "--prompt", "1k")
    assert report["deployment"]["replicas"] == ["h100-llama8b-on/0"]
    ran = kvtally("model", "--calibrated", "--calibration", "1", "--replica", "h100-llama8b-on/0", "--ledger", url)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "--calibration 1: no replica in the window has its fingerprint (`kvtally calibrate --list`)" in ran.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--ledger goes with --calibrated or --measured or --what-if"),
        (("--model", "llama-8b", "--since", "1h"), "goes with --calibrated or"),
        (("--measured", "--calibration", "1"), "--calibration goes with --calibrated or --what-if"),
        (("--calibrated", "--requests", str(REQUESTS)), "--requests goes with --measured"),
        (("--calibrated", "--extra-reuse", "20%"), "--extra-reuse goes with --what-if"),
        (("--calibrated", "--calibration", "7"), "--calibration 7: the ledger holds none (`kvtally calibrate --list`)"),
        (("--calibrated", "--replica", "x/0"), "--replica x/0: the window holds h100-llama8b-on/0"),
        (("--calibrated", "--model", "llama-70b"), "--model llama-70b is not what the replica serves: llama-8b"),
        (("--calibrated", "--model", "gpt-9"), "neither a config.json nor one of"),
        (("--calibrated", "--kv-dtype", "fp8"), "--kv-dtype: the ledger knows"),
        (("--calibrated", "--efficiency", "0.5"), "--efficiency is of the packaged law"),
        (("--calibrated", "--all-reduce"), "--all-reduce is of the packaged law"),
        (("--calibrated", "--gpu", "H1000"), "--gpu 'H1000' is not in the table"),
        (("--measured", "--gpus", "2"), "what it would be elsewhere, --calibrated tells alone"),
        (("--calibrated", "--measured", "--gpu", "A100"), "--calibrated tells alone"),
        (("--what-if", DISK, "--gpus", "8"), "--calibrated tells alone"),
        (("--calibrated", "--currency", "EUR"), "the ledger's prices are in USD: add --gpu-price"),
        (("--calibrated", "--currency", "euro"), "no ISO 4217 code"),
        (("--calibrated", "--since", "yesterday"), "--since 'yesterday' is no time"),
        (("--what-if", "disk"), "write NAME=10TB@20GB/s,$300/TB"),
        (("--what-if", "disk=20GB/s,$300/TB"), "write NAME=10TB@20GB/s,$300/TB"),
        (("--what-if", "disk=lots@20GB/s,$300/TB"), "--what-if 'lots' is no number of bytes"),
        (("--what-if", "disk=10TB@20GB/s"), "--what-if 'disk=10TB@20GB/s': write NAME=10TB@20GB/s,$300/TB or"),
        (
            ("--what-if", "disk=10TB@20GB,$300/TB"),
            "--what-if 'disk=10TB@20GB,$300/TB': '20GB' is no bandwidth; write NAME=10TB@20GB/s",
        ),
        (("--what-if", "disk=10TB@20GB/s,$300"), "'$300' is no price of a size; write NAME=10TB@20GB/s"),
        (("--what-if", DISK, "--what-if", DISK), "two stores have the same name"),
        (("--what-if", DISK, "--extra-reuse", "10,20"), "one share of what was computed"),
        (("--what-if", DISK, "--extra-reuse", "120"), "reuse lies between 0 and 100"),
        (("--measured", "--requests", str(Path(__file__))), "a CSV file begins with a line such as"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    kvtally: Call, demo_ledger: str, arguments: tuple[str, ...], said: str
) -> None:
    ran = kvtally("model", *arguments, "--ledger", demo_ledger)
    assert (ran.status, ran.out) == (2, "")
    assert said in ran.err
    assert ran.err.count("\n") == 1


def test_without_a_ledger_a_model_must_be_named(kvtally: Call) -> None:
    ran = kvtally("model")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "--model NAME, or a ledger's own: --calibrated, --measured" in ran.err


def test_a_window_without_intervals_and_a_log_of_another_time_say_so(
    kvtally: Call, demo_ledger: str, tmp_path: Path
) -> None:
    ran = kvtally("model", "--calibrated", "--since", "2026-11-24T00:00Z", "--ledger", demo_ledger)
    assert (ran.status, ran.out) == (1, "")
    assert "no engine interval in the window" in ran.err
    log = tmp_path / "old.csv"
    log.write_text("time,prompt_tokens,cached_tokens,ttft_ms\n2020-01-01T00:00:00Z,100,0,5\n", encoding="utf-8")
    ran = kvtally("model", "--measured", "--requests", str(log), "--ledger", demo_ledger)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "is its time UTC or has a zone" in ran.err


def test_a_store_of_its_own_size_is_read_as_it_is_written() -> None:
    store = supposed_store_of("--what-if", "my disk=1.5TB@20GB/s,$145/TB-month,5ms", Decimal(3))
    assert (store.backend.name, store.backend.kind) == ("my disk", "storage")
    assert (store.capacity_bytes, store.backend.bandwidth_bytes_per_second) == (15 * 10**11, 20e9)
    assert store.backend.latency_seconds == 0.005
    assert float(store.hourly()) == pytest.approx(1.5 * 145 / MONTH)


def test_without_a_ledger_neither_numpy_nor_sql_is_loaded() -> None:
    program = (
        "import sys\n"
        "from kvtally.agent.cli import main\n"
        "try:\n    main(['model', '--model', 'llama-8b', '--format', 'json'])\n"
        "except SystemExit:\n    print('LOADED', *sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert loaded & {"numpy", "sqlalchemy", "rich"} == set()
    assert "kvtally.agent.model_report.report" in loaded
