"""An outer tier whose clocks are not seen: LMCache's default, without PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import csv
import io
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
from tests.simulator.scenarios import build

if TYPE_CHECKING:
    from pathlib import Path

    from tests.command_line import Call
    from tests.simulator.pages import Recorded

TIMERS = re.compile(rb"^(?:# \w+ )?lmcache:time_to_.*\n", re.MULTILINE)
PAGES = re.compile(rb"^(?:# \w+ )?lmcache:.*\n", re.MULTILINE)


@pytest.fixture(scope="module")
def pages() -> Recorded:
    scenario = build("rag70", 1, seconds=90)
    return scenario.recorded()


def ledger_of(recorded: Recorded, kvtally: Call, folder: Path, left_out: re.Pattern[bytes] | None) -> str:
    files = {
        name: left_out.sub(b"", body) if left_out and name.endswith(".prom") else body
        for name, body in recorded.files.items()
    }
    url = f"sqlite:///{folder}/ledger.db"
    recorded._replace(files=files).write(folder / "recording")
    assert kvtally("replay", str(folder / "recording"), "--ledger", url, "--quiet").status == 0
    return url


def saved(kvtally: Call, url: str) -> dict[str, Any]:
    answer = json.loads(kvtally("savings", "--ledger", url, "--format", "json").out)
    (group,) = answer["groups"]
    result: dict[str, Any] = group
    return result


@pytest.mark.parametrize("left_out", [PAGES, TIMERS], ids=["its families", "its timers"])
def test_loading_and_storing_that_nothing_times_are_not_free(
    left_out: re.Pattern[bytes], pages: Recorded, kvtally: Call, tmp_path: Path
) -> None:
    url = ledger_of(pages, kvtally, tmp_path, left_out)
    group = saved(kvtally, url)
    assert group["reuse_engine_seconds"] == {"stall": None, "store": None}
    assert group["reuse_cost"] == {"stall": None, "store": None}
    assert group["net_engine_seconds"] is group["net"] is group["realised"] is None
    assert group["avoided_engine_seconds"]["point"] > 0
    assert group["gross"] is not None
    assert group["status"] == "not_proven"
    (reason,) = [one for one in group["reasons"] if "lmcache:time_to_retrieve, lmcache:time_to_store" in one]
    assert "export PROMETHEUS_MULTIPROC_DIR before `vllm serve`" in reason
    outer = group["tiers"]["external"]
    assert outer["avoided_engine_seconds"]["point"] > 0
    assert (outer["status"], outer["net_engine_seconds"], outer["net"]) == ("insufficient_data", None, None)
    hbm = group["tiers"]["hbm"]
    assert hbm["net_engine_seconds"] == hbm["avoided_engine_seconds"]
    assert hbm["net"] == hbm["gross"]


def test_every_answer_can_say_that_the_net_is_not_known(pages: Recorded, kvtally: Call, tmp_path: Path) -> None:
    url = ledger_of(pages, kvtally, tmp_path, PAGES)
    table = kvtally("savings", "--ledger", url, "--format", "table")
    assert table.err == ""
    assert "what it took is not known" in table.out.replace("\n  ", " ")
    lines = [line.split() for line in table.out.splitlines()]
    # seconds, then money
    assert [line[-1] for line in lines if line[:4] == ["-", "waiting", "for", "loads"]] == ["unknown", "unknown"]
    assert [line[-1] for line in lines if line[:2] == ["-", "storing"]] == ["unknown", "unknown"]
    explained = kvtally("savings", "--ledger", url, "--explain", "--format", "table")
    assert explained.err == ""
    assert "net not known" in explained.out
    assert "net_paid" not in explained.out
    checked = json.loads(kvtally("check", "--ledger", url, "--format", "json").out)
    states = {one["subject"]: one["state"] for one in checked["checks"] if one["name"] == "savings"}
    assert states == {"hbm": "ok", "external": "unknown"}
    (row,) = csv.DictReader(io.StringIO(kvtally("savings", "--ledger", url, "--format", "csv").out))
    assert row["net_engine_seconds.point"] == row["reuse_engine_seconds.stall.point"] == ""


def test_with_the_timers_the_net_is_known(pages: Recorded, kvtally: Call, tmp_path: Path) -> None:
    group = saved(kvtally, ledger_of(pages, kvtally, tmp_path, None))
    assert group["reuse_engine_seconds"]["stall"]["point"] > 0
    assert group["net_engine_seconds"]["point"] < group["avoided_engine_seconds"]["point"]
    assert not [one for one in group["reasons"] if "nothing tells how long" in one]
