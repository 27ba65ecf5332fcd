from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import call, copied
from tests.ledgers import HOUR, START, new_ledger, tell_story, url_of

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of, keep_rates
from kvtally.agent.config import Config
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.request_log import read_requests
from kvtally.agent.settlement import settle_hours

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call

CLOSED = ("--since", "1795409235.9", "--until", "1795409256.7")  # a phase of the packaged recording
THE_HOUR = ("--since", "2026-11-23T04:00Z", "--until", "2026-11-23T05:00Z")
TRUTH = 54.09 - 20.35  # engine-seconds that its reuse saved: the wall time of the same requests without, less with
LOG = str(Path(__file__).parent / "fixtures" / "requests" / "h100-llama8b.csv")  # the driver's, of the whole recording
ESTIMATE = {"low": "number", "point": "number", "high": "number"}
AMOUNTS = {"low": "amount", "point": "amount", "high": "amount"}
# CLI.md's answer, and what was added to it
ANSWER: dict[str, Any] = {
    "window": {"start": "text", "end": "text", "covered_seconds": "number"},
    "currency": "text",
    "method": {
        "version": "text",
        "rung": "text",
        "calibrations": [{**dict.fromkeys(("id", "fingerprint", "rung", "prior"), "any"), "evidence": "any"}],
    },
    "groups": [
        {
            "by": {"model": "text"},
            "status": "text",
            "reasons": ["text"],
            "reused_tokens": dict.fromkeys(("hbm", "dram", "disk", "p2p", "external"), "count"),
            "avoided_engine_seconds": ESTIMATE,
            "reuse_engine_seconds": {"stall": ESTIMATE, "store": ESTIMATE},
            "net_engine_seconds": ESTIMATE,
            "tiers": {
                "hbm": {
                    "status": "text",
                    "reasons": ["text"],
                    "tokens": "count",
                    "avoided_engine_seconds": ESTIMATE,
                    "net_engine_seconds": ESTIMATE,
                    "gross": AMOUNTS,
                    "holding": "amount",
                    "net": AMOUNTS,
                }
            },
            "gross": AMOUNTS,
            "reuse_cost": {"stall": "amount", "store": "amount"},
            "holding": "amount",
            "net": AMOUNTS,
            "realised": AMOUNTS,
            "capacity_bound_share": "number",
            "latency_seconds": "number",
            "engine_second": "amount",
            "rates": ["text"],
            "calibrations": ["text"],
            "basis": dict.fromkeys(("tokens", "engine_seconds", "money"), "text"),
        }
    ],
    "findings": [dict.fromkeys(("kind", "severity", "target", "start", "end", "message"), "text")],
}
KINDS: dict[str, Callable[[Any], bool]] = {
    "text": lambda value: isinstance(value, str),
    "number": lambda value: type(value) is float,
    "count": lambda value: type(value) is int and value >= 0,
    "amount": lambda value: (
        isinstance(value, str) and len(value.partition(".")[2]) == 9 and float(value) == float(value)
    ),
    "any": lambda _: True,
}


def differences(value: Any, shape: Any, path: str = "$") -> list[str]:
    """Where an answer is not as the contract has it; it may have more keys."""
    if isinstance(shape, dict):
        if not isinstance(value, dict) or not shape.keys() <= value.keys():
            return [f"{path}: {value} lacks {shape.keys()}"]
        return [each for key in shape for each in differences(value[key], shape[key], f"{path}.{key}")]
    if isinstance(shape, list):
        return [each for item in value for each in differences(item, shape[0], f"{path}[]")]
    return [] if KINDS[shape](value) else [f"{path}: {value!r} is no {shape}"]


def answer(call: Call, *arguments: str) -> dict[str, Any]:
    ran = call("savings", "--format", "json", *arguments)
    assert (ran.status, ran.err) == (0, "")
    found = json.loads(ran.out)
    assert isinstance(found, dict)
    return found


def nano(amount: str) -> int:
    """An amount as the integer that it stands for."""
    return int(amount.replace(".", ""))


def settled(url: str, hour_ns: int) -> None:
    """Settle an hour, as `kvtally run` does once it is over."""
    with LedgerReader(url) as reader:
        keep_rates(reader, Config())
        settle_hours(reader, [hour_ns], hour_ns + 2 * HOUR, book_of(reader, Config()), Payment())


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four hours of two engines (tests/ledgers.py) of whose model no shape is known."""
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path)
    return url_of(path)


# the answer


def test_the_answer_has_the_keys_and_types_of_the_contract(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED)
    assert differences(found, ANSWER) == []
    assert found["groups"][0]["calibrations"] == ["not stored"]


def test_a_difference_from_the_contract_would_be_seen(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger)
    found["groups"][0]["gross"]["low"] = "0.02"
    found["groups"][0]["tiers"]["hbm"]["tokens"] = 1.0
    del found["groups"][0]["realised"]
    assert len(differences(found, ANSWER)) == 1
    found["groups"][0]["realised"] = found["groups"][0]["net"]
    assert len(differences(found, ANSWER)) == 2


def test_a_phase_of_the_recording_saved_what_the_same_requests_took_longer_without_reuse(
    kvtally: Call, demo_ledger: str
) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED)
    (group,) = found["groups"]
    assert group["status"] == "ok"
    assert group["reused_tokens"] == {"hbm": 1_346_400, "dram": 0, "disk": 0, "p2p": 0, "external": 0}
    avoided = group["avoided_engine_seconds"]
    assert avoided["low"] < TRUTH < avoided["high"]
    assert abs(avoided["point"] / TRUTH - 1) < 0.05
    assert group["net_engine_seconds"] == avoided
    basis = {"tokens": "MEASURED", "tiers": None, "engine_seconds": "MODELLED", "money": "ASSUMED"}
    assert group["basis"] == basis
    # 2.69 USD / 3600 s
    assert group["engine_second"] == "0.000747222"
    assert abs(nano(group["gross"]["point"]) - avoided["point"] * 747_222) < 1000
    # with nothing stored and nothing held, all of it is net; cash is what fell into 9.5 % of the time
    assert group["net"]["point"] == group["gross"]["point"]
    assert 0 < nano(group["realised"]["point"]) < nano(group["net"]["point"])
    assert [rate.split(" ")[0] for rate in group["rates"]] == ["gpu", "server"]


def test_hours_add_up_to_the_whole(kvtally: Call, demo_ledger: str) -> None:
    (whole,) = answer(kvtally, "--ledger", demo_ledger)["groups"]
    groups = answer(kvtally, "--ledger", demo_ledger, "--by", "hour,replica")["groups"]
    assert [group["by"] for group in groups] == [
        {"hour": "2026-11-23T04:00:00.000Z", "replica": "h100-llama8b-on/0"},
    ]
    assert groups[0]["gross"] == whole["gross"]


def test_csv_has_a_line_for_each_group(kvtally: Call, demo_ledger: str) -> None:
    ran = kvtally("savings", "--ledger", demo_ledger, "--format", "csv", *CLOSED)
    (row,) = csv.DictReader(io.StringIO(ran.out))
    (group,) = answer(kvtally, "--ledger", demo_ledger, *CLOSED)["groups"]
    assert float(row["net_engine_seconds.point"]) == group["net_engine_seconds"]["point"]
    assert row["tiers.hbm.status"] == "ok"
    assert row["method.rung"] == "M1"


@pytest.mark.parametrize("columns", [80, 120])
def test_a_phase_of_the_recording_as_a_table_fits_the_terminal(
    columns: int, kvtally: Call, demo_ledger: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = kvtally("savings", "--ledger", demo_ledger, "--format", "table", *CLOSED)
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert [line for line in lines if len(line) > columns] == []
    assert lines[1].startswith("llama-8b: reuse saved 3")
    heads = [line.split("  ")[0] for line in lines if "90 % interval" in line]
    assert heads == ["tier", "engine time", "money, USD"]
    assert "llama-8b (LlamaForCausalLM 32x4096-ea2e02, bfloat16" in ran.out.replace("\n  ", " ")


def test_the_figures_can_be_followed_down(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED, "--explain")
    assert [one["by"] for one in found["explanations"]] == [{"model": "llama-8b"}]
    shown = kvtally("savings", "--ledger", demo_ledger, "--format", "table", "--explain", *CLOSED).out
    assert shown.index("llama-8b: reuse saved") < shown.index("the counters behind it")
    refused = kvtally("savings", "--ledger", demo_ledger, "--format", "csv", "--explain")
    assert (refused.status, refused.out) == (2, "")


# refusals


def test_a_model_without_a_shape_is_refused_with_what_lifts_it(kvtally: Call, story: str) -> None:
    found = answer(kvtally, "--ledger", story)
    (group,) = found["groups"]
    assert group["status"] == "insufficient_data"
    assert "model_config" in group["reasons"][0]
    assert group["avoided_engine_seconds"] is group["net_engine_seconds"] is group["gross"] is group["net"] is None
    assert group["reused_tokens"]["hbm"] > 0
    assert found["method"] == {"version": "1", "rung": None, "calibrations": []}
    shown = kvtally("savings", "--ledger", story, "--format", "table").out
    assert "NO FIGURE" in shown
    assert "avoided by reuse" not in shown


def test_a_window_of_few_requests_has_no_figure(kvtally: Call, demo_ledger: str) -> None:
    # the single requests of the recording come one a second or slower
    (group,) = answer(kvtally, "--ledger", demo_ledger, "--since", "1795409218.5", "--until", "1795409226.5")["groups"]
    assert group["status"] == "insufficient_data"
    assert any("a figure takes 20" in reason and "--since" in reason for reason in group["reasons"])


def test_without_a_price_there_are_seconds_and_no_money(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    (tmp_path / "kvtally.toml").write_text("[rates]\ndefault_card = false\n", encoding="utf-8")
    (group,) = answer(kvtally, "--ledger", demo_ledger, *CLOSED)["groups"]
    assert group["status"] == "ok"
    assert group["avoided_engine_seconds"]["point"] > 0
    assert group["gross"] is group["net"] is group["realised"] is group["engine_second"] is None
    assert group["rates"] == []
    assert "kvtally rates add gpu PRICE" in group["reasons"][-1]


def test_an_empty_window_is_no_error(kvtally: Call, demo_ledger: str) -> None:
    found = answer(kvtally, "--ledger", demo_ledger, "--since", "2026-12-01", "--until", "2026-12-02")
    assert found["groups"] == []
    shown = kvtally("savings", "--ledger", demo_ledger, "--since", "2026-12-01", "--format", "table").out
    assert shown.startswith("The ledger holds no interval of an engine in this window.")
    csv_of = ("savings", "--ledger", demo_ledger, "--format", "csv")
    header = kvtally(*csv_of, *CLOSED).out.partition("\n")[0]
    assert kvtally(*csv_of, "--since", "2026-12-01").out == f"{header}\n"


def test_a_ledger_without_an_interval_is_no_error(kvtally: Call, tmp_path: Path) -> None:
    url = url_of(new_ledger(tmp_path))
    assert answer(kvtally, "--ledger", url)["groups"] == []
    assert answer(kvtally, "--ledger", url, "--requests", LOG)["groups"] == []


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--ledger", "sqlite:///nowhere.db"), 3, "no ledger there"),
        (("--by", "colour"), 2, "choose from model"),
        (("--since", "yesterday"), 2, "is no time"),
        (("--calibration", "9"), 2, "the ledger holds none"),
        (("--calibration", "0"), 2, "0 is not in the range"),
        (("--requests", "nowhere.jsonl"), 2, "nowhere.jsonl' does not exist"),
        (("--replica", "a/0"), 2, "it goes with --requests"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    arguments: tuple[str, ...], status: int, words: str, kvtally: Call, demo_ledger: str
) -> None:
    ran = kvtally("savings", "--ledger", demo_ledger, *arguments)
    assert (ran.status, ran.out) == (status, "")
    assert words in ran.err
    assert ran.err.count("\n") == 1


# calibrations


@pytest.fixture(scope="module")
def kept(demo_ledger: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The recording's ledger with its hour settled by calibration 1, and calibration 2 of a part of it."""
    url = copied(demo_ledger, tmp_path_factory.mktemp("kept"))
    settled(url, START)
    ran = call("calibrate", "--ledger", url, "--fresh", "--until", "1795409257", "--format", "json")
    assert json.loads(ran.out)["calibrations"][0]["id"] == 2
    return url


def test_a_settled_hour_names_the_calibration_that_it_was_settled_with(kvtally: Call, kept: str) -> None:
    found = answer(kvtally, "--ledger", kept, *THE_HOUR)
    assert [law["id"] for law in found["method"]["calibrations"]] == [1]
    assert found["groups"][0]["calibrations"] == ["1"]
    shown = kvtally("savings", "--ledger", kept, *THE_HOUR, "--format", "table").out
    assert "law: calibration 1 of llama-8b" in shown


def test_another_calibration_may_be_asked_for(kvtally: Call, kept: str) -> None:
    first, second = (answer(kvtally, "--ledger", kept, *THE_HOUR, "--calibration", number) for number in "12")
    assert [law["id"] for law in second["method"]["calibrations"]] == [2]
    points = [found["groups"][0]["avoided_engine_seconds"]["point"] for found in (first, second)]
    assert points[0] != points[1]
    assert abs(points[1] / points[0] - 1) < 0.1
    assert first["groups"] == answer(kvtally, "--ledger", kept, *THE_HOUR)["groups"]


def test_a_calibration_of_another_engine_is_not_used(kvtally: Call, kept: str, story: str, tmp_path: Path) -> None:
    laws = tmp_path / "laws.json"
    laws.write_text(kvtally("calibrate", "--list", "--ledger", kept, "--format", "json").out, encoding="utf-8")
    url = copied(story, tmp_path)
    assert kvtally("calibrate", "--import", str(laws), "--ledger", url).status == 0
    ran = kvtally("savings", "--ledger", url, "--calibration", "1")
    assert (ran.status, ran.out) == (2, "")
    assert "no replica in the window has its fingerprint" in ran.err


# a log of requests


def test_with_a_log_the_pairs_are_exact_and_the_figure_is_about_the_same(kvtally: Call, demo_ledger: str) -> None:
    (without,) = answer(kvtally, "--ledger", demo_ledger, *CLOSED)["groups"]
    found = answer(kvtally, "--ledger", demo_ledger, *CLOSED, "--requests", LOG)
    (group,) = found["groups"]
    assert found["method"]["requests"] == {
        "file": LOG,
        "replica": "h100-llama8b-on/0",
        "requests": 200,
        "counted": 200,
    }
    points = [one["avoided_engine_seconds"]["point"] for one in (without, group)]
    assert 0 < abs(points[1] / points[0] - 1) < 0.03
    avoided = group["avoided_engine_seconds"]
    assert avoided["low"] < TRUTH < avoided["high"]
    assert f"requests: 200 of {LOG}" in " ".join(
        kvtally("savings", "--ledger", demo_ledger, *CLOSED, "--requests", LOG, "--format", "table").out.split()
    )


@pytest.mark.parametrize("late", [-2.5, -0.5, 0.5, 1.0, 2.5])
def test_the_clock_of_a_log_changes_no_figure(late: float, kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    with open(LOG, encoding="utf-8") as lines:  # noqa: PTH123  # LOG is text for the command line
        header, *rows = csv.reader(lines)
    at = header.index("time")
    shifted = [[f"{float(cell) + late:.4f}" if place == at else cell for place, cell in enumerate(one)] for one in rows]
    (tmp_path / "late.csv").write_text("\n".join(map(",".join, [header, *shifted])), encoding="utf-8")
    figures = [answer(kvtally, "--ledger", demo_ledger, "--requests", log)["groups"][0] for log in (LOG, "late.csv")]
    exact, found = (one["avoided_engine_seconds"] for one in figures)
    assert [found[name] / exact[name] for name in ("low", "point", "high")] == pytest.approx([1, 1, 1], abs=0.001)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda at, prompt, cached: (at + prompt % 30, prompt, cached),
            "its tokens in other intervals than h100-llama8b-on/0",
        ),
        (lambda at, prompt, _: (at, prompt, 0), "fewer of the prompts' tokens were reused than h100-llama8b-on/0"),
    ],
)
def test_a_log_that_does_not_fit_the_counters_is_left_out_and_why_is_said(
    change: Callable[[float, int, int], tuple[float, int, int]],
    words: str,
    kvtally: Call,
    demo_ledger: str,
    tmp_path: Path,
) -> None:
    with open(LOG, "rb") as lines:  # noqa: PTH123  # LOG is text for the command line
        requests = read_requests(lines).requests
    rows = [change(one.at_seconds, one.prompt_tokens, one.cached_tokens or 0) for one in requests]
    told = "\n".join(f"{at:.4f},{prompt},{cached}" for at, prompt, cached in rows)
    (tmp_path / "odd.csv").write_text(f"time,prompt_tokens,cached_tokens\n{told}\n", encoding="utf-8")
    ran = kvtally("savings", "--format", "json", "--ledger", demo_ledger, "--requests", "odd.csv")
    assert ran.status == 0
    assert words in ran.err
    assert ran.err.endswith("It is left out: the figures are those of the counters alone\n")
    found = json.loads(ran.out)
    assert "requests" not in found["method"]
    assert found["groups"] == answer(kvtally, "--ledger", demo_ledger)["groups"]
    ran = kvtally("calibrate", "--ledger", copied(demo_ledger, tmp_path), "--requests", "odd.csv")
    assert (ran.status, ran.out) == (2, "")
    assert words in ran.err


def test_a_log_that_lacks_most_requests_cannot_stand_for_them(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    lines = Path(LOG).read_text(encoding="utf-8").splitlines()
    (tmp_path / "half.csv").write_text("\n".join([lines[0], *lines[1::2]]), encoding="utf-8")
    ran = kvtally("savings", "--ledger", demo_ledger, "--requests", "half.csv")
    assert (ran.status, ran.out) == (2, "")
    assert "it takes nine tenths of them" in ran.err
    assert "counted 373" in ran.err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["2020-01-01T00:00:00Z,100,0,5"], "no request of the log is of the window"),
        (["not a time,100,0,5"] * 5, "lines of the log cannot be read"),
        ([f"{1_795_409_236 + number / 100:.2f},100,0,5" for number in range(900)], "give its own alone"),
    ],
)
def test_a_log_of_something_else_is_refused(
    rows: list[str], words: str, kvtally: Call, demo_ledger: str, tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_text("\n".join(["time,prompt_tokens,cached_tokens,ttft_ms", *rows]), encoding="utf-8")
    ran = kvtally("savings", "--ledger", demo_ledger, "--requests", "log.csv")
    assert (ran.status, ran.out) == (2, "")
    assert words in ran.err
    assert ran.err.count("\n") == 1


def test_a_log_is_of_one_replica(kvtally: Call, story: str) -> None:
    ran = kvtally("savings", "--ledger", story, "--requests", LOG)
    assert ran.status == 2
    assert "10.0.0.1:8000/0, 10.0.0.2:8000/0: add --replica NAME" in ran.err
    ran = kvtally("savings", "--ledger", story, "--requests", LOG, "--replica", "c/0")
    assert "--replica c/0: the window holds 10.0.0.1:8000/0" in ran.err
