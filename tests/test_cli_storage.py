from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config
from kvtally.agent.recording import open_recording
from kvtally.agent.render.comma_separated import STORAGE_COLUMNS, flat

if TYPE_CHECKING:
    from tests.command_line import Call

FIXTURES = Path(__file__).parent / "fixtures"
DRAM_AND_DISK = FIXTURES / "recordings" / "lmcache-mp-dram-disk"
IN_PROCESS = FIXTURES / "recordings" / "h100-lmcache-in-process"


def replayed(recording: Path, folder: Path) -> str:
    url = f"sqlite:///{folder / 'replayed.db'}"
    into_ledger(open_recording(str(recording)), url, Config())
    return url


def test_a_recording_with_a_server_of_lmcache_shows_which_tier_found_the_tokens(tmp_path: Path, kvtally: Call) -> None:
    status, out, _ = kvtally("storage", "--ledger", replayed(DRAM_AND_DISK, tmp_path))
    assert status == 0
    (cache,) = json.loads(out)["caches"]
    assert (cache["cache"], cache["engines"]) == ("lmcache multiprocess", ["lmcache-mp-dram-disk"])
    tokens = cache["tokens"]
    # off the pages: the last's counters less the first's
    assert (tokens["looked_up"], tokens["found"]) == (78_848, 43_776)
    assert (tokens["found_in_dram"], tokens["found_on_storage"]) == (33_792, 9_984)
    assert tokens["found_in_dram"] + tokens["found_on_storage"] == tokens["found"]
    table = kvtally("storage", "--ledger", f"sqlite:///{tmp_path}/replayed.db", "--format", "table").out
    assert "None of them tells of KV that it moved." in table


def test_loads_of_an_engine_on_an_h100_show_the_bandwidth_of_its_link(tmp_path: Path, kvtally: Call) -> None:
    """LMCache in vLLM's process counts tokens and seconds, and no bytes of DRAM: those are modelled."""
    status, out, _ = kvtally("storage", "--ledger", replayed(IN_PROCESS, tmp_path))
    assert status == 0
    (cache,) = json.loads(out)["caches"]
    # 482,304 tokens of 131,072 bytes in 1.386 s: PCIe 5.0 gives 53 GB/s at best
    assert cache["load"] == {
        "bytes": 63_216_549_888,
        "seconds": pytest.approx(1.386193, abs=1e-6),
        "operations": 65,
        "gigabytes_per_second": 45.6044,
        "mean_milliseconds": 21.326,
        "basis": "MODELLED",
    }
    assert (cache["tokens"]["loaded"], cache["tokens"]["found_in_dram"]) == (482_304, None)


@pytest.mark.parametrize("recording", [DRAM_AND_DISK, IN_PROCESS])
def test_csv_has_a_line_for_every_cache_and_mount_and_the_same_columns(
    recording: Path, tmp_path: Path, kvtally: Call
) -> None:
    words = ("storage", "--ledger", replayed(recording, tmp_path), "--format")
    answer = json.loads(kvtally(*words, "json").out)
    header, *lines = csv.reader(io.StringIO(kvtally(*words, "csv").out))
    assert header == [*STORAGE_COLUMNS]
    told = [dict(zip(header, line, strict=True)) for line in lines]
    rows = [*(("cache", one) for one in answer["caches"]), *(("mount", one) for one in answer["mounts"])]
    assert [(row["kind"], row["name"]) for row in told] == [(kind, one["name"]) for kind, one in rows]
    for row, (_, one) in zip(told, rows, strict=True):
        assert {name: row[name] for name in flat(one)} == {
            name: "" if value is None else str(value) for name, value in flat(one).items()
        }
        assert row["window.end"] == answer["window"]["end"]
    assert kvtally(*words, "csv", "--since", "2030-01-01").out.splitlines() == [",".join(header)]
