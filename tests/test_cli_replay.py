from __future__ import annotations

import json
import os
import pty
import sqlite3
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.command_line import DEMO, replayed

if TYPE_CHECKING:
    from tests.command_line import Call

TOTALS = (2_828_558, 859_550, 1_969_008, 33_380)
SAID = (
    "h100-llama8b-on: 95 pages, 467 intervals, 2026-11-23T04:46:46.962Z to 2026-11-23T04:48:21.459Z\n"
    "the recording has no scrapes.jsonl: scrapes that failed are not known\n"
)
NEXT = "next: kvtally cost --ledger sqlite:///on.db\n      kvtally savings --ledger sqlite:///on.db\n"


def dump(path: Path) -> str:
    """What `sqlite3 FILE .dump` prints."""
    with closing(sqlite3.connect(path)) as connection:
        return "\n".join(connection.iterdump())


def engine_rows(path: Path) -> tuple[int, ...]:
    """How many engine intervals, and their tokens in all."""
    query = (
        "SELECT count(*), sum(prompt_tokens), sum(computed_tokens), sum(hbm_tokens), sum(generated_tokens) "
        "FROM engine_interval"
    )
    with closing(sqlite3.connect(path)) as connection:
        row = connection.execute(query).fetchone()
    assert isinstance(row, tuple)
    return row


def test_a_replay_says_what_it_read_and_prints_no_figure(kvtally: Call, tmp_path: Path) -> None:
    assert kvtally("replay", DEMO, "--ledger", "sqlite:///on.db") == (0, "", SAID + NEXT)
    assert engine_rows(tmp_path / "on.db") == (94, *TOTALS)


def test_a_replay_says_of_the_engine_how_it_was_run(kvtally: Call, tmp_path: Path) -> None:
    kvtally("replay", DEMO, "--ledger", "sqlite:///on.db")
    with closing(sqlite3.connect(tmp_path / "on.db")) as connection:
        ((text,),) = connection.execute("SELECT attributes FROM target WHERE kind = 'engine'").fetchall()
    told = json.loads(text)
    assert told["eager"] == "1"
    assert json.loads(told["shape"]) == {
        "architecture": "LlamaForCausalLM",
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "weight_dtype": "bfloat16",
        "kv_dtype": "bfloat16",
        "parameters": 8030261248,
    }
    # nobody gave it a budget, it has one GPU, and its cache is in HBM alone
    assert told.keys().isdisjoint({"token_budget", "tensor_parallel", "pipeline_parallel", "connector"})


def test_a_refusal_of_a_replayed_engine_is_lifted_by_what_it_says(kvtally: Call, tmp_path: Path) -> None:
    with tarfile.open(DEMO) as packed:
        packed.extractall(tmp_path, filter="data")
    folder = tmp_path / "h100-llama8b"
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(meta.pop("model")), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    kvtally("replay", str(folder), "--ledger", "sqlite:///before.db")
    refused = json.loads(kvtally("savings", "--ledger", "sqlite:///before.db", "--format", "json").out)["groups"][0]
    assert refused["reasons"][0] == (
        "the shape of model llama-8b is not known: say where its config.json lies, in kvtally.toml, in the [[engine]] "
        'with name = "h100-llama8b-on": model_config = "/models/x/config.json", and replay it into a new ledger'
    )
    setting = '[[engine]]\nurl = "http://anywhere"\nname = "h100-llama8b-on"\nmodel_config = "config.json"\n'
    (tmp_path / "kvtally.toml").write_text(setting, encoding="utf-8")
    assert kvtally("replay", str(folder), "--ledger", "sqlite:///after.db").status == 0
    told = json.loads(kvtally("savings", "--ledger", "sqlite:///after.db", "--format", "json").out)["groups"][0]
    assert told["status"] == "ok"


def test_replaying_twice_gives_the_same_ledger_to_the_byte_of_a_dump(kvtally: Call, tmp_path: Path) -> None:
    for name in ("one.db", "two.db"):
        assert kvtally("replay", DEMO, "--ledger", f"sqlite:///{name}").status == 0
    first = dump(tmp_path / "one.db")
    assert "INSERT INTO" in first
    assert first == dump(tmp_path / "two.db")
    assert str(tmp_path) not in first


def test_a_replay_into_the_same_ledger_counts_nothing_twice(kvtally: Call, tmp_path: Path) -> None:
    kvtally("replay", DEMO, "--ledger", "sqlite:///on.db")
    before = dump(tmp_path / "on.db")
    status, _, err = kvtally("replay", DEMO, "--ledger", "sqlite:///on.db")
    assert status == 0
    assert "95 scrapes left out: in the ledger already\n" in err
    assert dump(tmp_path / "on.db") == before


@pytest.mark.parametrize(("interval", "rows"), [("0.5", 94), ("5", 19), ("15", 7), ("3600", 1)])
def test_longer_intervals_have_the_same_tokens_and_money(
    interval: str, rows: int, kvtally: Call, tmp_path: Path
) -> None:
    assert kvtally("replay", DEMO, "--interval", interval, "--ledger", "sqlite:///on.db").status == 0
    assert engine_rows(tmp_path / "on.db") == (rows, *TOTALS)  # the last one may be shorter: 94 s are 18 x 5 and 4
    found = json.loads(kvtally("cost", "--ledger", "sqlite:///on.db").out)
    assert found["window"]["covered_seconds"] == 94.0
    assert found["groups"][0]["cost"]["total"] == "0.070238889"


def test_an_unpacked_recording_gives_what_the_packed_one_does(kvtally: Call, tmp_path: Path, demo_ledger: str) -> None:
    with tarfile.open(DEMO) as packed:
        packed.extractall(tmp_path, filter="data")
    assert kvtally("replay", str(tmp_path / "h100-llama8b"), "--ledger", "sqlite:///on.db").status == 0
    assert engine_rows(tmp_path / "on.db")[1:] == TOTALS
    with closing(sqlite3.connect(demo_ledger.removeprefix("sqlite:///"))) as packed_ledger:
        expected = packed_ledger.execute("SELECT * FROM engine_interval ORDER BY start_ns").fetchall()
    with closing(sqlite3.connect(tmp_path / "on.db")) as unpacked_ledger:
        assert unpacked_ledger.execute("SELECT * FROM engine_interval ORDER BY start_ns").fetchall() == expected


def test_a_damaged_recording_is_one_line(kvtally: Call, tmp_path: Path) -> None:
    (tmp_path / "cut.tar.xz").write_bytes(Path(DEMO).read_bytes()[:30_000])
    status, out, err = kvtally("replay", "cut.tar.xz", "--ledger", "sqlite:///on.db")
    assert (status, out, err.count("\n")) == (3, "", 1)
    assert err.startswith("kvtally: cut.tar.xz")


def test_a_folder_without_pages_is_no_recording(kvtally: Call, tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text('{"name": "empty"}', encoding="utf-8")
    status, _, err = kvtally("replay", ".", "--ledger", "sqlite:///on.db")
    assert (status, err.count("\n")) == (3, 1)
    assert "holds no pages (they lie in it as vllm/<unix milliseconds>.prom)" in err


def test_a_ledger_that_somebody_writes_is_left_to_him(kvtally: Call, tmp_path: Path) -> None:
    replayed(tmp_path / "on.db")
    holder = (
        "import sys; from kvtally.agent.ledger.place import WriterLock\n"
        "with WriterLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", holder, str(tmp_path / "on.db")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        status, out, err = kvtally("replay", DEMO, "--ledger", "sqlite:///on.db")
        process.communicate()
    assert (status, out) == (3, "")
    assert err == (
        f"kvtally: {tmp_path}/on.db: process {process.pid} writes this ledger "
        "(stop it first, or give another ledger with --ledger)\n"
    )


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_on_a_terminal_unless_it_is_not_wanted(quiet: bool, tmp_path: Path) -> None:
    terminal, screen = pty.openpty()
    words = [sys.executable, "-m", "kvtally", "replay", DEMO, "--ledger", f"sqlite:///{tmp_path}/on.db"]
    words += ["--quiet"] if quiet else []
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(words, stderr=screen, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(screen)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # the other side is closed
                break
            shown += part
    os.close(terminal)
    assert process.returncode == 0
    assert b"h100-llama8b-on: 95 pages" in shown
    assert (b"\x1b[2K" in shown) is not quiet  # a line that is written again and again
