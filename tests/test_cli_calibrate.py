from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import copied
from tests.fake_vllm import DONE, TOKEN, FakeVllm, reply, usage
from tests.ledgers import START, new_ledger, tell_story, url_of
from tests.loopback import RUNNING
from tests.test_cli_savings import LOG, THE_HOUR, settled

from kvtally.agent.calibration import PARAMETERS, calibration_of
from kvtally.agent.cli.calibration_probe import named_by, page_of
from kvtally.agent.config import Config, Engine, complete
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.settled import revisions

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from tests.command_line import Call
    from tests.fake_vllm import Act, Sent

NAME = "h100-llama8b-on/0"
MODELS = [{"id": "llama-8b", "parent": None, "max_model_len": 4096}]
EARLY = ("--until", "1795409236")  # the recording's single requests
LATER = ("--since", "1795409236.97", "--until", "1795409257")  # 200 of them at concurrency 16
QUIET = ("--since", "1795409218.5", "--until", "1795409226.5")  # a few single requests


def learned(call: Call, url: str, *arguments: str) -> dict[str, Any]:
    """The one calibration that a call makes."""
    ran = call("calibrate", "--ledger", url, "--format", "json", *arguments)
    assert (ran.status, ran.err) == (0, ""), ran.err
    found = json.loads(ran.out)
    assert found["refused"] == []
    (law,) = found["calibrations"]
    assert isinstance(law, dict)
    return law


def refused(call: Call, url: str, *arguments: str) -> list[dict[str, Any]]:
    """What a call could not learn."""
    ran = call("calibrate", "--ledger", url, "--format", "json", *arguments)
    assert ran.status == 1
    found = json.loads(ran.out)
    assert found["calibrations"] == []
    return list(found["refused"])


@pytest.fixture
def url(demo_ledger: str, tmp_path: Path) -> str:
    """The packaged recording's ledger, to write."""
    return copied(demo_ledger, tmp_path)


# what is learned


def test_a_calibration_is_shown_with_its_evidence_and_kept(kvtally: Call, url: str) -> None:
    law = learned(kvtally, url)
    assert (law["id"], law["is_new"], law["rung"], law["prior"]) == (1, True, "M1", "packaged")
    assert law["replicas"] == [NAME]
    assert law["fingerprint"]["sku"] == "NVIDIA H100 80GB HBM3"
    assert law["window"] == {"start": "2026-11-23T04:46:46.962Z", "end": "2026-11-23T04:48:20.962Z"}
    evidence = law["evidence"]
    assert (evidence["requests"], evidence["steps"], evidence["source"]) == (373, 4688, "graphics")
    assert 0.9 < evidence["worked_ratio"] < 1.1
    assert [one["rung"] for one in law["further"]] == ["M3", "M4", "M5"]
    with LedgerReader(url) as reader:
        (stored,) = reader.calibrations()
    assert stored.reason == "calibrated by hand"
    assert stored.calibration == calibration_of(law, 1)


def test_each_parameter_stands_beside_its_prior_which_it_narrows(kvtally: Call, url: str) -> None:
    law = learned(kvtally, url)
    assert list(law["parameters"]) == list(PARAMETERS)
    for name, one in law["parameters"].items():
        assert one["low"] < one["median"] < one["high"]
        assert one["median"] == pytest.approx(law["medians"][name], rel=1e-5)
        # log-normal: as far up as down by ratio
        assert one["high"] / one["median"] == pytest.approx(one["median"] / one["low"], rel=1e-4)
        assert one["high"] / one["low"] <= one["prior"]["high"] / one["prior"]["low"] * 1.001
    # the packaged prior: 0.62, with a standard deviation of the log of 0.25
    prior = law["parameters"]["compute_efficiency"]["prior"]
    assert prior["median"] == 0.62
    assert prior["high"] == pytest.approx(0.62 * 1.5087, rel=1e-3)  # e^(1.645 x 0.25)


def test_what_came_since_is_learned_from_next_with_the_law_before_as_its_prior(kvtally: Call, url: str) -> None:
    first = learned(kvtally, url, *EARLY)
    second = learned(kvtally, url)
    assert (second["id"], second["prior"]) == (2, "1")
    assert second["window"]["start"] == first["window"]["end"]
    assert second["evidence"]["requests"] + first["evidence"]["requests"] == 373
    before = second["parameters"]["compute_efficiency"]["prior"]
    assert before["median"] == first["parameters"]["compute_efficiency"]["median"]


def test_where_nothing_came_since_there_is_nothing_to_learn(kvtally: Call, url: str) -> None:
    learned(kvtally, url)
    (one,) = refused(kvtally, url)
    assert "nothing came since the evidence of calibration 1" in one["reasons"][0]
    assert one["replicas"] == [NAME]


def test_a_fresh_one_begins_with_the_packaged_prior(kvtally: Call, url: str) -> None:
    learned(kvtally, url, *EARLY)
    assert learned(kvtally, url, *LATER)["prior"] == "1"
    fresh = learned(kvtally, url, *LATER, "--fresh")
    assert (fresh["id"], fresh["prior"]) == (3, "packaged")
    assert learned(kvtally, url, "--fresh")["evidence"]["requests"] == 373


def test_evidence_that_overlaps_is_no_prior(kvtally: Call, url: str) -> None:
    learned(kvtally, url)
    assert learned(kvtally, url, *LATER)["prior"] == "packaged"


def test_the_same_again_is_not_kept_twice(kvtally: Call, url: str) -> None:
    assert learned(kvtally, url, "--fresh")["is_new"]
    again = learned(kvtally, url, "--fresh")
    assert (again["id"], again["is_new"]) == (1, False)
    assert "held it already, as calibration 1" in " ".join(
        kvtally("calibrate", "--ledger", url, "--fresh", "--format", "table").out.split()
    )


def test_a_calibration_as_a_table_fits_the_terminal(kvtally: Call, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    ran = kvtally("calibrate", "--ledger", url, "--format", "table")
    assert (ran.status, ran.err) == (0, "")
    lines = ran.out.splitlines()
    assert lines[0].startswith("llama-8b (LlamaForCausalLM")
    assert [line for line in lines if len(line) > 80 and url.removeprefix("sqlite:///") not in line] == []
    assert sum(" to " in line and ", of peak" in line for line in lines) == 4
    assert "as calibration 1: it values what is settled next." in " ".join(ran.out.split())


# what is refused


def test_too_little_evidence_is_refused_with_what_lifts_it(kvtally: Call, url: str) -> None:
    (one,) = refused(kvtally, url, *QUIET)
    assert "too little was seen to learn the step law" in one["reasons"][0]
    assert "kvtally calibrate --probe" in one["reasons"][0]
    assert one["fingerprint"].startswith("llama-8b (LlamaForCausalLM")
    with LedgerReader(url) as reader:
        assert reader.calibrations() == []


def test_replicas_that_cannot_have_a_law_are_named_each(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    found = refused(kvtally, url_of(path))
    assert [one["replicas"] for one in found] == [["10.0.0.1:8000/0"], ["10.0.0.2:8000/0"]]
    assert all("model_config" in one["reasons"][0] for one in found)
    shown = kvtally("calibrate", "--ledger", url_of(path), "--format", "table")
    assert shown.status == 1
    assert shown.out.count("NO CALIBRATION") == 2


@pytest.mark.parametrize("arguments", [(), ("--since", "2026-12-01")])
def test_where_there_is_no_interval_there_is_nothing_to_learn(
    arguments: tuple[str, ...], kvtally: Call, url: str, tmp_path: Path
) -> None:
    own = url if arguments else url_of(new_ledger(tmp_path))
    assert refused(kvtally, own, *arguments) == []
    assert "nothing to learn from" in " ".join(
        kvtally("calibrate", "--ledger", own, *arguments, "--format", "table").out.split()
    )


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--ledger", "sqlite:///nowhere.db"), 3, "no ledger there"),
        (("--list", "--fresh"), 2, "--list stands alone, without --fresh"),
        (("--restate", "1h", "--list"), 2, "--list stands alone, without --restate"),
        (("--restate", "1h", "--since", "2h"), 2, "--restate stands alone, without --since"),
        (("--restate", "soon"), 2, "is no time"),
        (("--import", "nowhere.json"), 2, "does not exist"),
        (("--replica", "a/0"), 2, "it goes with --requests or --probe"),
        (("--requests", LOG, "--replica", "a/0"), 2, f"--replica a/0: the window holds {NAME}"),
        (("--probe",), 2, "without a terminal, agree with --yes"),
        (("--probe", "--yes", "--url", "ftp://x/"), 2, "ftp://x/"),
        (("--probe", "--yes", "--api-key-variable", "NO_SUCH_KEY"), 2, "$NO_SUCH_KEY"),
        (("--probe", "--yes", "--url", "http://127.0.0.1:9/metrics"), 3, "connection refused"),
    ],
)
def test_a_wrong_call_is_told_in_one_line(
    arguments: tuple[str, ...], status: int, words: str, kvtally: Call, url: str
) -> None:
    ran = kvtally("calibrate", "--ledger", url, *arguments)
    assert (ran.status, ran.out) == (status, "")
    assert words in ran.err
    assert ran.err.count("\n") == 1


# a log of requests


def test_a_log_raises_the_rung(kvtally: Call, url: str) -> None:
    without = learned(kvtally, url)
    law = learned(kvtally, url, "--fresh", "--requests", LOG)
    assert (law["id"], law["rung"], law["evidence"]["probes"]) == (2, "M5", 2)
    assert law["evidence"]["single_error"] < without["evidence"]["single_error"]
    assert law["further"] == []
    with LedgerReader(url) as reader:
        assert reader.calibrations()[-1].reason == "calibrated by hand with a log of requests"


def test_a_log_without_times_to_first_token_tells_the_pairs(kvtally: Call, url: str, tmp_path: Path) -> None:
    lines = Path(LOG).read_text(encoding="utf-8").splitlines()
    (tmp_path / "pairs.csv").write_text("\n".join(line.rpartition(",")[0] for line in lines), encoding="utf-8")
    law = learned(kvtally, url, "--requests", "pairs.csv")
    assert (law["rung"], law["evidence"]["probes"]) == ("M2", 0)
    assert [one["rung"] for one in law["further"]] == ["M3", "M4", "M5"]


def test_a_log_of_some_requests_tells_of_those_alone(kvtally: Call, url: str, tmp_path: Path) -> None:
    lines = Path(LOG).read_text(encoding="utf-8").splitlines()
    told = [line for line in lines[1:] if ",5789,4928," in line or ",7016,6336," in line]
    (tmp_path / "some.csv").write_text("\n".join([lines[0], *told]), encoding="utf-8")
    ran = kvtally("calibrate", "--ledger", url, "--requests", "some.csv", "--format", "json")
    assert ran.status == 0
    assert "it tells of those that ran alone, and not of all" in ran.err
    (law,) = json.loads(ran.out)["calibrations"]
    assert (law["rung"], law["evidence"]["probes"]) == ("M4", 2)


# a list, and an import


def test_the_list_tells_of_each(kvtally: Call, url: str) -> None:
    assert json.loads(kvtally("calibrate", "--list", "--ledger", url, "--format", "json").out)["calibrations"] == []
    learned(kvtally, url, *EARLY)
    learned(kvtally, url)
    found = json.loads(kvtally("calibrate", "--list", "--ledger", url, "--format", "json").out)
    assert [(one["id"], one["prior"], one["reason"]) for one in found["calibrations"]] == [
        (1, "packaged", "calibrated by hand"),
        (2, "1", "calibrated by hand"),
    ]
    assert found["unreadable"] == []
    shown = kvtally("calibrate", "--list", "--ledger", url, "--format", "table").out
    assert "llama-8b (LlamaForCausalLM" in shown


def test_what_one_ledger_learned_another_uses(kvtally: Call, url: str, demo_ledger: str, tmp_path: Path) -> None:
    learned(kvtally, url, *EARLY)
    learned(kvtally, url)
    exported = kvtally("calibrate", "--list", "--ledger", url, "--format", "json").out
    (tmp_path / "laws.json").write_text(exported, encoding="utf-8")
    (tmp_path / "other").mkdir()
    other = copied(demo_ledger, tmp_path / "other")
    ran = kvtally("calibrate", "--import", "laws.json", "--ledger", other, "--format", "json")
    assert ran.status == 0
    assert [(one["id"], one["is_new"], one["fits"]) for one in json.loads(ran.out)["imported"]] == [
        (1, True, True),
        (2, True, True),
    ]
    with LedgerReader(url) as reader, LedgerReader(other) as importer:
        own, theirs = reader.calibrations()[-1], importer.calibrations()[-1]
    # the number of its prior is another ledger's, and would name something else here
    assert theirs.calibration == own.calibration._replace(prior="imported")
    assert (theirs.reason, theirs.prior_id) == ("imported", None)
    used = json.loads(kvtally("savings", "--ledger", other, "--format", "json").out)
    assert [law["id"] for law in used["method"]["calibrations"]] == [2]
    again = kvtally("calibrate", "--import", "laws.json", "--ledger", other, "--format", "table").out
    assert again.count("was there already") == 2


def test_one_calibration_alone_may_be_imported(kvtally: Call, url: str, tmp_path: Path) -> None:
    law = learned(kvtally, url)
    del law["id"], law["text"], law["parameters"]
    (tmp_path / "law.json").write_text(json.dumps(law), encoding="utf-8")
    path = url_of(new_ledger(tmp_path))
    ran = kvtally("calibrate", "--import", "law.json", "--ledger", path, "--format", "table")
    assert ran.status == 0
    assert "no engine of this ledger has this fingerprint" in " ".join(ran.out.split())


def edited(**parts: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(law: dict[str, Any]) -> dict[str, Any]:
        for path, value in parts.items():
            table = law
            *folders, name = path.split("__")
            for folder in folders:
                table = table[folder]
            table[name] = value
        return law

    return edit


def skewed(law: dict[str, Any]) -> dict[str, Any]:
    law["covariance"][0][1] += 0.5
    return law


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda law: [law["medians"]], "has no evidence"),
        (lambda _: [], "holds no calibration"),
        (lambda _: {"calibrations": 7}, "holds no calibration"),
        (lambda _: "text", "holds no calibration"),
        (lambda _: [3], "cannot be used"),
        (edited(evidence={}), "it has no notes"),
        (edited(fingerprint=None), "cannot be used"),
        (edited(fingerprint__gpus="1"), "its gpus is no count"),
        (edited(fingerprint__token_budget=True), "its token_budget is no count"),
        (edited(fingerprint__model=None), "its model is no text"),
        (edited(fingerprint__sizes=7), "its sizes is no text"),
        (edited(fingerprint__is_eager="yes"), "its is_eager is no boolean"),
        (edited(evidence__start_ns=1.5), "its start_ns is no count"),
        (edited(evidence__occupied_seconds=float("nan")), "not finite"),
        (edited(evidence__surprise=1), "surprise"),
        (edited(rung="M9"), "its rung M9 is none of"),
        (edited(medians__step_seconds=0.0), "is not above 0"),
        (edited(medians__step_seconds=float("inf")), "is not above 0"),
        (edited(medians__compute_efficiency=50.0), "its compute_efficiency cannot be"),
        (edited(clock=float("nan")), "is not above 0"),
        (edited(covariance=[[0.1]]), "9 x 9"),
        (edited(covariance=[[0.1] * 9] * 9), None),
        (skewed, "its covariance is none"),
    ],
)
def test_a_file_that_holds_no_calibration_is_refused_whole(
    change: Callable[[dict[str, Any]], Any], words: str | None, kvtally: Call, url: str, tmp_path: Path
) -> None:
    law = learned(kvtally, url)
    own = url_of(new_ledger(tmp_path))
    (tmp_path / "law.json").write_text(json.dumps(change(law)), encoding="utf-8")
    ran = kvtally("calibrate", "--import", "law.json", "--ledger", own)
    with LedgerReader(own) as reader:
        assert len(reader.calibrations()) == (words is None)
    assert ran.status == (0 if words is None else 2)
    if words is not None:
        assert words in ran.err
        assert ran.err.count("\n") == 1
        assert ran.out == ""


def test_a_file_that_is_no_json_is_refused(kvtally: Call, url: str, tmp_path: Path) -> None:
    (tmp_path / "law.json").write_bytes(b"\xff{")
    ran = kvtally("calibrate", "--import", "law.json", "--ledger", url)
    assert (ran.status, ran.out) == (2, "")
    assert "is not JSON, as `kvtally calibrate --format json` prints it" in ran.err


# settling again


def test_settled_hours_are_settled_again_by_the_newest(kvtally: Call, url: str) -> None:
    settled(url, START)

    def used() -> list[int]:
        found = json.loads(kvtally("savings", "--ledger", url, "--format", "json", *THE_HOUR).out)
        return [law["id"] for law in found["method"]["calibrations"]]

    assert learned(kvtally, url, *EARLY, "--fresh")["id"] == 2
    assert used() == [1]
    ran = kvtally("calibrate", "--restate", "2026-11-23T05:00Z", "--ledger", url)
    assert (ran.status, ran.err) == (0, "0 hours settled again by the newest calibration\n")
    ran = kvtally("calibrate", "--restate", "2026-11-23T04:30Z", "--ledger", url)
    assert (ran.status, ran.out, ran.err) == (0, "", "1 hour settled again by the newest calibration\n")
    assert used() == [2]
    with LedgerReader(url) as reader:
        assert revisions(reader, 0, 2**62) == {START: 2}


def test_a_ledger_without_settled_hours_has_none_to_settle_again(kvtally: Call, tmp_path: Path) -> None:
    ran = kvtally("calibrate", "--restate", "0", "--ledger", url_of(new_ledger(tmp_path)))
    assert (ran.status, ran.err) == (0, "0 hours settled again by the newest calibration\n")


# probes


def prefill(seconds_per_token: float) -> Act:
    """Take so long for a prompt, as an engine does, and 10 ms."""

    def act(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        prompt = len(sent.json["prompt"])
        seconds = 0.01 + seconds_per_token * prompt
        time.sleep(seconds)
        vllm.count(prompt, seconds=seconds)
        reply(connection, TOKEN, usage(prompt), DONE)
        return True

    return act


def test_probes_raise_the_rung_and_lift_too_little_evidence(
    kvtally: Call, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ITS_KEY", "sk-1")
    with FakeVllm(*[prefill(23e-6)] * 15, models=MODELS) as vllm:
        page = f"{vllm.url}/metrics"
        ran = kvtally(
            *("calibrate", "--ledger", url, "--format", "json", *QUIET, "--probe", "--yes", "--url", page),
            *("--api-key-variable", "ITS_KEY"),
        )
        sent = vllm.completions
    assert ran.status == 0, ran.err
    # 512 x (4095/512)^(i/6), each twice, after one to warm up: what the fake's model takes
    lengths = (512, 724, 1024, 1448, 2048, 2896, 4095)
    assert sorted(len(one.json["prompt"]) for one in sent) == sorted([*lengths, *lengths, 1448])
    assert {one.headers["authorization"] for one in sent} == {"Bearer sk-1"}
    assert max(token for one in sent for token in one.json["prompt"]) >= 1024  # the ledger knows the vocabulary
    assert f"15 prompts with 26,942 tokens in all to llama-8b at {vllm.url}" in ran.err
    assert "by the engine's own clock" in ran.err
    (law,) = json.loads(ran.out)["calibrations"]
    assert (law["rung"], law["evidence"]["probes"]) == ("M4", 14)
    # 23 us a token, as the recording's own H100 takes: the law that was learned from all of it says the same
    without = learned(kvtally, url, "--fresh")
    own, other = (one["parameters"]["compute_efficiency"] for one in (law, without))
    assert own["low"] < other["median"] < own["high"]
    with LedgerReader(url) as reader:
        assert reader.calibrations()[0].reason == "calibrated by hand with probes"


def test_without_agreement_nothing_is_sent(demo_ledger: str, tmp_path: Path) -> None:
    url = copied(demo_ledger, tmp_path)
    terminal, screen = pty.openpty()
    with FakeVllm(models=MODELS) as vllm:
        words = [
            sys.executable,
            "-m",
            "kvtally",
            "calibrate",
            "--ledger",
            url,
            "--probe",
            "--url",
            f"{vllm.url}/metrics",
        ]
        environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
        with subprocess.Popen(words, stdin=screen, stderr=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
            os.write(terminal, b"n\n")
            _, told = process.communicate()
        os.close(screen)
        os.close(terminal)
        assert process.returncode == 1
        assert b"Send them? [y/N]: nothing was sent" in told
        assert b"No user's text is read or sent" in told
        assert vllm.completions == []


@pytest.mark.parametrize("page", ["/metrics", "/", ""])
def test_a_busy_engine_is_sent_nothing_whether_its_page_is_named_or_its_address_alone(
    page: str, kvtally: Call, url: str
) -> None:
    with FakeVllm(models=MODELS) as vllm:
        vllm.counters.set(RUNNING, 3)
        ran = kvtally("calibrate", "--ledger", url, "--probe", "--yes", "--url", f"{vllm.url}{page}")
        assert vllm.completions == []
    assert ran.status == 3
    assert "the engine is not idle: 3 requests run" in ran.err


def test_an_engine_that_can_have_no_law_is_sent_nothing(kvtally: Call, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    with FakeVllm(models=MODELS) as vllm:
        where = ("--probe", "--yes", "--replica", "10.0.0.1:8000/0", "--url", f"{vllm.url}/metrics")
        (one,) = refused(kvtally, url_of(path), *where)
        assert vllm.requests == []
    assert one["replicas"] == ["10.0.0.1:8000/0"]


def test_an_engine_of_another_model_is_sent_nothing(kvtally: Call, url: str) -> None:
    with FakeVllm() as vllm:
        ran = kvtally("calibrate", "--ledger", url, "--probe", "--yes", "--url", f"{vllm.url}/metrics")
        assert vllm.completions == []
    assert (ran.status, ran.out) == (3, "")
    assert "does not list llama-8b" in ran.err


def test_the_page_of_a_replica_is_its_engine_s(demo_ledger: str) -> None:
    from kvtally.agent.kin import kin_of  # noqa: PLC0415  # numpy

    config = Config(engines=(complete(Engine("https://gpu-7:8443/metrics", name="h100-llama8b-on"), Config()),))
    assert page_of(NAME, config) == "https://gpu-7:8443/metrics"
    assert page_of("10.0.0.1:8000/1", config) == "http://10.0.0.1:8000/metrics"
    with LedgerReader(demo_ledger) as reader:
        extent = reader.extent()
        assert extent is not None
        kinds = kin_of(reader, extent, reader.targets())
    assert named_by("https://gpu-7:8443/metrics", kinds, config) == NAME
    assert named_by("http://gpu-7:8443", kinds, config) == NAME
    assert named_by("http://elsewhere/metrics", kinds, config) is None
