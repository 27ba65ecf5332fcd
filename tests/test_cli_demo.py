from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.command_line import replayed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.command_line import Call


@pytest.mark.parametrize("columns", [80, 110])
def test_the_first_screen(
    columns: int, kvtally: Call, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None]
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = kvtally("demo")
    assert (status, err) == (0, "")
    golden(f"demo-{columns}.txt", out)


def test_it_says_first_that_it_was_recorded_and_where_and_last_what_to_type(kvtally: Call) -> None:
    lines = kvtally("demo").out.splitlines()
    assert lines[0] == "RECORDED on NVIDIA H100 80GB HBM3, vllm 0.25.1, 2026-11-23, 94 s. Not live."
    assert "ASSUMED" in lines[2]
    assert lines[-6] == "These figures were RECORDED. Your own, beside a running vLLM:"
    assert [line.split("#")[0].strip() for line in lines[-5:]] == [
        "kvtally doctor",
        "kvtally run &",
        "kvtally cost",
        "kvtally savings",
        "kvtally rates add --help",
    ]


def test_below_the_cost_stands_what_reuse_saved(kvtally: Call) -> None:
    lines = kvtally("demo").out.splitlines()
    heading = lines.index("RECORDED What KV reuse saved in it:")
    assert lines[heading + 1].startswith("llama-8b: reuse saved ")
    assert all(line < heading for line, text in enumerate(lines) if text.startswith(("rate:", "prompt ")))


def test_its_json_is_that_of_cost_with_the_source_named_and_the_savings(kvtally: Call, tmp_path: Path) -> None:
    shown = json.loads(kvtally("demo", "--format", "json").out)
    source = shown.pop("source")
    assert source == {
        "kind": "RECORDED",
        "name": "h100-llama8b-on",
        "provenance": "one NVIDIA H100 80GB HBM3, vLLM 0.25.1, Llama-8B shape with dummy weights, 2026-11-23, "
        "recorded by the kvtally project",
    }
    url = replayed(tmp_path / "on.db")
    assert shown.pop("savings") == json.loads(kvtally("savings", "--ledger", url).out)
    assert shown == json.loads(kvtally("cost", "--ledger", url).out)


def test_its_csv_names_the_source_on_the_line(kvtally: Call) -> None:
    (line,) = csv.DictReader(io.StringIO(kvtally("demo", "--format", "csv").out))
    assert (line["source.kind"], line["cost.total"]) == ("RECORDED", "0.070238889")


def test_it_uses_no_ledger_and_no_config_of_ours_and_leaves_nothing_behind(
    kvtally: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setenv("KVTALLY_LEDGER", "sqlite:///mine.db")
    Path("kvtally.toml").write_text("this is no config", encoding="utf-8")
    assert kvtally("demo").status == 0
    assert list(temporary.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kvtally.toml", "temporary"]
