from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import copied
from tests.ledgers import HOUR, SKU, START, Deployment, FakeEngine, new_ledger, tell_story, url_of

from kvtally.agent.ledger.columns import HEAD_REVISION
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call

FOUR, FIVE = START, START + HOUR


def rows(url: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        return connection.execute(query).fetchall()


def change(url: str, *statements: str) -> None:
    """What somebody does to a ledger behind kvtally's back."""
    with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


@pytest.fixture
def story(tmp_path: Path) -> str:
    """Four hours of two engines and three GPUs (tests/ledgers.py), nothing of it settled."""
    path = new_ledger(tmp_path)
    tell_story(path)
    return url_of(path)


def test_info_tells_what_a_ledger_holds(kvtally: Call, demo_ledger: str) -> None:
    found = json.loads(kvtally("ledger", "info", "--ledger", demo_ledger).out)
    path = Path(demo_ledger.removeprefix("sqlite:///"))
    assert found["path"] == str(path)
    assert found["bytes"] == path.stat().st_size
    assert (found["revision"], found["currency"]) == (HEAD_REVISION, "USD")
    assert (found["start"], found["end"]) == ("2026-11-23T04:46:46.962Z", "2026-11-23T04:48:20.962Z")
    assert (found["rows"]["engine_interval"], found["rows"]["charge"]) == (94, 0)
    (engine,) = (target for target in found["targets"] if target["kind"] == "engine")
    assert engine["name"] == "h100-llama8b-on/0"
    assert (engine["model"], engine["version"], engine["sku"]) == ("llama-8b", "0.25.1", "NVIDIA H100 80GB HBM3")


def test_info_is_shown_as_a_table(kvtally: Call, demo_ledger: str, golden: Callable[[str, str], None]) -> None:
    shown = kvtally("ledger", "info", "--ledger", demo_ledger, "--format", "table").out
    path = demo_ledger.removeprefix("sqlite:///")
    assert path in shown.splitlines()[0]
    golden("ledger-info.txt", re.sub(r"\d\.\d\d MiB", "0.00 MiB", shown.replace(path, "/LEDGER.db")))


def test_upgrade_makes_a_ledger_and_says_when_there_was_nothing_to_do(kvtally: Call) -> None:
    where = ("--ledger", "sqlite:///new.db")
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{Path.cwd()}/new.db: created\n")
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{Path.cwd()}/new.db: was up to date\n")
    found = json.loads(kvtally("ledger", "info", *where).out)
    assert (found["start"], found["end"], found["targets"]) == (None, None, [])
    assert "It holds no interval yet." in kvtally("ledger", "info", "--format", "table", *where).out


def test_the_ledger_lies_where_the_environment_says(kvtally: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kvtally("ledger", "upgrade").err.endswith("state/kvtally/ledger.db: created\n")
    monkeypatch.setenv("KVTALLY_LEDGER", "sqlite:///mine.db")
    assert kvtally("ledger", "upgrade").err.endswith("/mine.db: created\n")
    assert kvtally("ledger", "upgrade", "--ledger", "sqlite:///other.db").err.endswith("/other.db: created\n")


def test_an_audit_of_a_sound_ledger_is_yes(kvtally: Call, demo_ledger: str, story: str) -> None:
    assert kvtally("ledger", "audit", "--ledger", demo_ledger, "--format", "table") == (
        0,
        "467 intervals checked, findings: none\n",
        "",
    )
    kvtally("ledger", "settle", "--ledger", story)
    status, out, _ = kvtally("ledger", "audit", "--ledger", story)
    assert (status, json.loads(out)["findings"]) == (0, [])


def test_an_audit_of_a_ledger_that_was_changed_is_no(kvtally: Call, demo_ledger: str, tmp_path: Path) -> None:
    url = copied(demo_ledger, tmp_path)
    change(url, "UPDATE engine_hour SET prompt_tokens = prompt_tokens + 1")
    status, out, err = kvtally("ledger", "audit", "--ledger", url)
    assert (status, err) == (1, "")
    (finding,) = json.loads(out)["findings"]
    assert set(finding) == {"kind", "severity", "target", "start", "end", "message"}
    status, out, _ = kvtally("ledger", "audit", "--ledger", url, "--format", "table")
    assert status == 1
    assert finding["message"] in out
    assert out.endswith("467 intervals checked, findings: 1\n")


def test_settling_writes_every_closed_hour_once(kvtally: Call, story: str) -> None:
    first = kvtally("ledger", "settle", "--ledger", story)
    assert (first.status, first.out) == (0, "")
    settled = rows(story, "SELECT period_start_ns, revision, reason FROM settlement ORDER BY 1")
    assert settled[:3] == [(START + number * HOUR, 1, "hour closed") for number in range(3)]
    assert first.err == f"{len(settled)} hours settled\n"
    assert kvtally("ledger", "settle", "--quiet", "--ledger", story) == (0, "", "")
    assert rows(story, "SELECT period_start_ns, revision, reason FROM settlement ORDER BY 1") == settled


@pytest.mark.parametrize("when", ["2026-11-23T05:17:30Z", "1795410000", f"{FIVE // 10**9}.5"])
def test_an_hour_is_settled_again_as_a_new_revision(when: str, kvtally: Call, story: str) -> None:
    kvtally("ledger", "settle", "--ledger", story)
    before = rows(story, "SELECT * FROM charge ORDER BY id")
    words = ("ledger", "settle", "--again", when, "--reason", "the invoice came", "--ledger", story)
    assert kvtally(*words) == (0, "", "1 hour settled\n")
    query = "SELECT period_start_ns, revision FROM settlement WHERE reason = 'the invoice came'"
    assert rows(story, query) == [(FIVE, 2)]
    after = rows(story, "SELECT * FROM charge ORDER BY id")
    assert after[: len(before)] == before
    assert len(after) > len(before)


@pytest.mark.parametrize("when", ["2020-01-01", "2027-01-01"])
def test_an_hour_that_is_not_settled_is_not_settled_again(when: str, kvtally: Call, story: str) -> None:
    kvtally("ledger", "settle", "--ledger", story)
    before = rows(story, "SELECT count(*) FROM settlement")
    status, out, err = kvtally("ledger", "settle", "--again", when, "--ledger", story)
    assert (status, out) == (2, "")
    assert f"--again {when}: the hour from {when}T00:00:00.000Z is not settled" in err
    assert rows(story, "SELECT count(*) FROM settlement") == before


def test_an_empty_ledger_has_nothing_to_settle_or_to_prune(kvtally: Call) -> None:
    kvtally("ledger", "upgrade")
    assert kvtally("ledger", "settle", "--prune") == (0, "", "0 hours settled\n")
    assert kvtally("ledger", "settle", "--again", "1h").status == 2
    assert kvtally("ledger", "prune") == (0, "", "nothing is that old and settled\n")


def test_pruning_removes_old_intervals_of_settled_hours_and_nothing_of_the_answer(
    kvtally: Call, tmp_path: Path
) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"127.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU)}, interval_seconds=1800)
    engine = FakeEngine()
    for number in range(61):  # 60 half hours, from 04:00 on one day to 10:00 on the next
        deployment.scrape(START + number * HOUR // 2, [engine])
        engine.serve(computed=60, hbm=40, generated=10)
    deployment.close()
    url = url_of(path)
    words = ("ledger", "prune", "--days", "1", "--ledger", url)
    assert kvtally(*words).err == "nothing is that old and settled\n"
    kvtally("ledger", "settle", "--ledger", url)
    before = json.loads(kvtally("cost", "--since", "30h", "--by", "hour", "--ledger", url).out)["groups"]
    # 10:00 is a day before the newest interval's end; the interval that ends there and then is kept as well
    assert kvtally(*words) == (0, "", "engine_interval: 11 rows removed\n")
    assert rows(url, "SELECT count(*) FROM engine_interval") == [(49,)]
    assert json.loads(kvtally("cost", "--since", "30h", "--by", "hour", "--ledger", url).out)["groups"] == before
    assert kvtally(*words).err == "nothing is that old and settled\n"
    assert kvtally("ledger", "audit", "--ledger", url).status == 0
