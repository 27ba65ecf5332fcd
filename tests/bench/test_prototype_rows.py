from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pytest
from tests.bench.prototype_rows import recorded_rows
from tests.bench.scores import Result, scores, table

from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config

if TYPE_CHECKING:
    from pathlib import Path

_COUNTERS = (
    *(
        "prompt",
        "c",
        "dev",
        "host",
        "disk",
        "gen",
        "it_sum",
        "pf_t",
        "dec_t",
        "q_t",
        "ttft_s",
        "ttft_n",
        "fin_n",
        "pre",
    ),
    *("flops", "rbytes", "util", "load_s", "load_b_dram", "load_b_disk", "store_b", "n_ret", "itl_s", "itl_n"),
    *("g_run", "g_wait", "g_kv"),
)


class Model(NamedTuple):
    P: float = 8.03e9
    L: int = 32
    q: int = 32
    kv: int = 8
    d: int = 128
    hid: int = 4096
    tp: int = 1
    kvb: int = 131_072


def row(t: float, steps: int = 0, **counted: float) -> dict[str, object]:
    edges = np.zeros(14)
    edges[0] = steps
    few = np.zeros(18)
    few[9] = counted.get("fin_n", 0)  # all prompts and computed parts lie in (500, 1000]
    return dict.fromkeys(_COUNTERS, 0.0) | counted | {"t": t, "it_h": edges, "n_h": few, "c_h": few}


# arrival, prompt, cached, output, preemptions, seconds to the first token, found in HBM: in the order of finishes
LOG = np.array([[1.0, 900, 256, 5, 0, 1.0, 256], [0.0, 1000, 0, 90, 0, 0.5, 0], [3.0, 1000, 512, 9, 1, 1.0, 0]])
ROWS = [
    row(0.0),
    row(5.0, 60, prompt=2900, c=2132, dev=512, host=256, gen=70, ttft_n=3, ttft_s=2.5, fin_n=1, util=4.0, load_s=0.1,
        load_b_dram=256 * 131_072, n_ret=1, it_sum=2202, pre=1),
    row(10.0, 90, prompt=2900, c=2132, dev=512, host=256, gen=104, ttft_n=3, ttft_s=2.5, fin_n=3, util=6.5, load_s=0.1,
        load_b_dram=256 * 131_072, n_ret=1, it_sum=2236, pre=1),
]  # fmt: skip


@pytest.mark.parametrize("sync", [True, False])
def test_rows_of_the_prototype_reach_the_ledger_as_they_are(sync: bool, tmp_path: Path) -> None:
    recorded = recorded_rows("rows", ROWS, LOG, Model(), {"kv_cap": 400_000}, sync=sync)
    into_ledger(recorded.open(), f"sqlite:///{tmp_path}/ledger.db", Config())
    wanted = "prompt_tokens computed_tokens hbm_tokens external_tokens generated_tokens steps step_tokens first_tokens"
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger:
        engine = ledger.execute(f"SELECT {', '.join(f'sum({one})' for one in wanted.split())} FROM engine_interval")
        # of 768 cached tokens HBM gave 512: 256 to the first, the rest to the one that was preempted
        assert engine.fetchone() == (2900, 2132, 512, 256, 104, 90, 2236, 3)
        assert ledger.execute("SELECT sum(load_ns) FROM cache_interval").fetchone() == (100_000_000,)
        graphics = ledger.execute("SELECT sum(graphics_ns), sum(gpm_ns) FROM gpu_interval").fetchone()
        assert graphics == (6_500_000_000, 10_000_000_000)


def test_a_log_and_probes_are_written_where_they_are_given() -> None:
    bare = recorded_rows("rows", ROWS, LOG, Model(), {"kv_cap": 400_000}, sync=True)
    assert not {"requests.jsonl", "probes.jsonl"} & set(bare.files)
    told = recorded_rows("rows", ROWS, LOG, Model(), {"kv_cap": 400_000}, sync=True, shown=LOG,
                         probes=(np.array([512.0]), np.array([0.25])))  # fmt: skip
    lines = [json.loads(line) for line in told.files["requests.jsonl"].splitlines()]
    assert [line["usage"]["prompt_tokens_details"]["cached_tokens"] for line in lines] == [0, 256, 512]
    assert json.loads(told.files["probes.jsonl"]) == {"prompt_tokens": 512, "seconds": 0.25}


def test_errors_are_in_percent_of_the_truth_and_coverage_counts_intervals_that_hold_it() -> None:
    cases = [(100.0, 80.0, 90.0, 99.0), (100.0, 90.0, 110.0, 130.0)]
    found = [Result("x", "load", seed, "M1", "all", truth, 500.0, *given) for seed, (truth, *given) in enumerate(cases)]
    (score,) = scores(found)
    assert (score.cases, score.bias, score.rmse, score.coverage) == (2, 0.0, 10.0, 50.0)
    assert score.half_width == pytest.approx((9.5 + 20) / 2)
    (small,) = scores([one._replace(truth=1.0, low=0.0, point=6.0, high=11.0) for one in found])
    assert (small.small, small.bias, small.coverage) == (True, 1.0, 100.0)
    assert "of the seconds without caches" in table([small])
