from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.calculator import agrees, calculated, redo
from tests.command_line import copied
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, rate, reader_of
from tests.present import present
from tests.replica_rows import calibration as known_law
from tests.replica_rows import observed
from tests.serving import FACTS, NAME, PLAIN, Load, ServingEngine, Site

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.attribution import last_in, serving, shapley
from kvtally.agent.book import book_of, keep_rates
from kvtally.agent.calibrating import Extra
from kvtally.agent.calibration import PARAMETERS, Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.config import Config
from kvtally.agent.explain import explained, inputs, pieces
from kvtally.agent.explain.figure import CAUSES, Couplings, error_budget, interval_lines, seconds_lines
from kvtally.agent.explain.request import worked_request
from kvtally.agent.explain.tiers import gained_by, tier_lines, tiers_json
from kvtally.agent.hardware import gpu_of
from kvtally.agent.ledger.raw_counters import raw_counters
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.model_shape import shape_of
from kvtally.agent.observed import CacheSpan
from kvtally.agent.rates import RateBook
from kvtally.agent.render.explain import explain_table
from kvtally.agent.replica import About
from kvtally.agent.savings import Part, Seconds, seconds_of, with_held
from kvtally.agent.savings_report import SavingsReport, savings_report
from kvtally.agent.settlement import settle_hours
from kvtally.agent.steplaw.chunks import chunked
from kvtally.agent.steplaw.explained import Example
from kvtally.agent.steplaw.law import GAP, Steps, packaged_prior, prefill_seconds, working_seconds
from kvtally.agent.steplaw.machine import machine
from kvtally.agent.steplaw.series import Logged
from kvtally.agent.valuing import Laws
from kvtally.agent.worth import NOTHING as NO_WORTH
from kvtally.agent.worth import Worth
from kvtally.collectors import lmcache, lmcache_mp, vllm_families

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.collectors.family import Family

RATES = (
    rate("gpu", "3.6", "gpu-hour", START - HOUR, sku=SKU),
    rate("dram", "0.72", "gib-hour", START - HOUR),
)
OUTER = Load(hbm=0.4, external=0.3, load_seconds=0.06, store_seconds=0.1)
MARKS = (("without_reuse", "PF_0"), ("as_it_was", "PF_r"))


def asked(
    url: str, window: Window | None = None, by: Sequence[str] = ("model",), rates: Sequence[Any] = ()
) -> tuple[SavingsReport, list[dict[str, Any]]]:
    with LedgerReader(url) as reader, reader.snapshot():
        book = RateBook([*rates]) if rates else book_of(reader, Config())
        report = savings_report(reader, window, by, book, Payment())
        return report, explained(reader, report)


def site(path: Path, load: Load = PLAIN, *, connector: str = "", dram_gib: str = "", seconds: int = 1800) -> str:
    """Half an hour of an engine with a cache tier beside it; the ledger's URL."""
    facts = FACTS | ({"connector": connector} if connector else {})
    known = About(gpus=("GPU-0",), sku=SKU, mapping="a test", dram_gib=dram_gib, facts=facts)
    about = {NAME.partition("/")[0]: known}
    ledger = new_ledger(path)
    made = Site(ledger, about=about, caches=True)
    made.scrape(made.engines)
    made.serve(seconds, load).close()
    return f"sqlite:///{ledger}"


@pytest.fixture(scope="module")
def demo(demo_ledger: str) -> tuple[SavingsReport, dict[str, Any]]:
    report, (explanation,) = asked(demo_ledger)
    return report, explanation


@pytest.fixture(scope="module")
def outer(tmp_path_factory: pytest.TempPathFactory) -> tuple[SavingsReport, dict[str, Any]]:
    url = site(tmp_path_factory.mktemp("outer"), OUTER, connector="LMCacheConnectorV1", dram_gib="2")
    report, (explanation,) = asked(url, rates=RATES)
    return report, explanation


def values(rows: Sequence[dict[str, str]]) -> dict[str, float]:
    return {row["symbol"]: float(row["value"]) for row in rows}


# -- the calculator


@pytest.mark.parametrize("source", ["demo", "outer"])
def test_every_line_is_what_a_calculator_gives_from_the_lines_before_it(
    source: str, request: pytest.FixtureRequest
) -> None:
    _, one = request.getfixturevalue(source)
    figure = redo(one["figure"]["rows"])
    errors = redo(one["errors"]["tiers"], redo(one["errors"]["rows"], figure))
    known = redo(one["figure"]["interval"], figure)
    if one["tiers"]:
        rows = redo(one["tiers"]["rows"])
        assert {name: errors[name] for name in ("W_hbm", "W_out")} == {name: rows[name] for name in ("W_hbm", "W_out")}
        known = redo(one["tiers"]["interval"], known | rows)
    assert {name: known[name] for name in known if name.startswith("sd")} == {
        name: errors[name] for name in errors if name in {"sd", "sd_hbm", "sd_out"}
    }
    redo(one["money"]["rows"], known)
    request_of = one["request"]
    before = redo(request_of["decode"], redo(request_of["inputs"]))
    for side, name in MARKS:
        added = [redo(step["rows"], before)["adds"] for step in request_of[side]["steps"]]
        assert agrees(math.fsum(map(float, added)), request_of[side]["seconds"])
        assert redo(request_of["total"])[name] == request_of[side]["seconds"]


@pytest.mark.parametrize("source", ["demo", "outer"])
def test_every_formula_on_the_screen_gives_the_figure_above_it(
    source: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    explain_table([request.getfixturevalue(source)[1]])
    shown = capsys.readouterr().out.splitlines()
    redone = 0
    symbols: dict[str, str] = {}
    for above, line in pairwise(shown):
        value = re.match(r"  (\w+) +([\d,.e-]+) ", above)
        if value:
            symbols[value[1]] = value[2]
        if line.strip().startswith("= "):
            assert value is not None, line
            formula, numbers = line.strip().removeprefix("= ").split("  = ")
            assert agrees(calculated(numbers), value[2]), (above, line)
            assert agrees(calculated(formula, symbols), value[2]), (above, line)
            redone += 1
        if line.startswith("adds "):
            before = shown[: shown.index(line) + 1]
            redone += _steps_redone(
                before[max(at for at, each in enumerate(before) if each.startswith("step ")) :], symbols
            )
    assert redone > 40


def _steps_redone(table: Sequence[str], known: dict[str, str]) -> int:
    """The cells of the table of steps that have a formula, worked out again."""
    done = 0
    columns: list[dict[str, str]] = [dict(known) for _ in re.split(r" {2,}", table[0].strip())[2:]]
    assert columns
    for line in table[2:]:
        symbol, formula, *cells = re.split(r" {2,}", line.strip())
        for column, cell in zip(columns, cells, strict=True):
            if symbol not in {"s", "c"}:
                assert agrees(calculated(formula, column), cell), (line, column)
                done += 1
            column[symbol] = cell
    return done


# -- the figure


@pytest.mark.parametrize("source", ["demo", "outer"])
def test_it_ends_at_the_figures_of_the_report(source: str, request: pytest.FixtureRequest) -> None:
    report, one = request.getfixturevalue(source)
    (group,) = report.as_json()["groups"]
    shown = values([*one["figure"]["rows"], *one["figure"]["interval"]])
    money = values(one["money"]["rows"])
    for name, estimate in (("W", group["avoided_engine_seconds"]), ("net", group["net_engine_seconds"])):
        assert shown[name] == pytest.approx(estimate["point"], rel=1e-4)
        assert shown[f"{name}_low"] == pytest.approx(estimate["low"], rel=1e-4)
        assert shown[f"{name}_high"] == pytest.approx(estimate["high"], rel=1e-4)
    assert money["gross"] == pytest.approx(float(group["gross"]["point"]), rel=1e-4)
    assert money["net_paid"] == pytest.approx(float(group["net"]["point"]), rel=1e-4)
    assert money["holding"] == pytest.approx(float(group["holding"]), rel=1e-4)
    assert money["realised"] == pytest.approx(float(group["realised"]["point"]), rel=1e-3, abs=1e-6)
    assert money["rate"] == pytest.approx(float(group["engine_second"]), rel=1e-6)
    near = 2e-4 * float(group["gross"]["high"])
    for name, symbol in (("gross", "gross"), ("net", "net_paid"), ("realised", "realised")):
        for end in ("low", "high"):
            assert money[f"{symbol}_{end}"] == pytest.approx(float(group[name][end]), abs=near)


def test_the_interval_that_decides_a_tier_is_worked_out(outer: tuple[SavingsReport, dict[str, Any]]) -> None:
    report, one = outer
    tiers = report.as_json()["groups"][0]["tiers"]
    shown, money = values(one["tiers"]["interval"]), values(one["money"]["rows"])
    hbm, external = (tiers[name]["net_engine_seconds"] for name in ("hbm", "external"))
    assert (shown["W_hbm_low"], shown["W_hbm_high"]) == pytest.approx((hbm["low"], hbm["high"]), abs=1e-3)
    gained = tiers["external"]["avoided_engine_seconds"]
    assert (shown["W_out_low"], shown["W_out_high"]) == pytest.approx((gained["low"], gained["high"]), abs=1e-3)
    for name, end in (("low", "low"), ("net", "point"), ("high", "high")):
        assert shown[f"{name}_external"] == pytest.approx(external[end], abs=1e-3)
    for name in ("hbm", "external"):
        for symbol, end in (("least", "low"), ("paid", "point"), ("most", "high")):
            assert money[f"{symbol}_{name}"] == pytest.approx(float(tiers[name]["net"][end]), abs=2e-6)
    assert money["held_external"] == pytest.approx(2 * 0.72 * 0.5, rel=1e-3)
    sides = [row["symbol"].rpartition("_")[0] for row in one["errors"]["tiers"] if row["symbol"].endswith("_out")]
    assert sides == ["W", *(f"sd_{cause}" for cause in CAUSES), "sd"]


APART = NO_WORTH._replace(
    avoided=(40.0, 41.0, 43.0),
    outer=(14.0, 15.0, 16.0),
    full=(120.0,) * 3,
    dram=9.0,
    disk=6.0,
    loads=3.0,
    stores=2.0,
    requests=100.0,
    hbm_tokens=500_000.0,
    external_tokens=300_000.0,
    dram_tokens=200_000.0,
    disk_tokens=100_000.0,
    computed_tokens=1e6,
)


def told_of(worth: Worth, held: Sequence[str] = ()) -> tuple[Seconds, dict[str, str], dict[str, str]]:
    """Its figures, and what is printed of them all and of the tiers."""
    parts = [Part(known_law(sd=0.03), worth, "synchronous")]
    seconds = with_held(seconds_of(parts, 60.0), held)
    lines = seconds_lines(seconds, Couplings(worth.avoided, None), parts)
    known, sd, sds = redo(lines.as_json()), None, {}
    if worth.hbm_tokens:
        gained = gained_by(seconds)
        errors = error_budget(seconds, parts, lines, gained)
        redone = redo(errors["tiers"], redo(errors["rows"], known))
        sd, sds = redone["sd"], {side: redone[f"sd_{side}"] for side in gained}
    known = redo(interval_lines(seconds, sd, lines).as_json(), known)
    rows = tiers_json(seconds, "synchronous", None)
    assert rows is not None
    known |= redo(rows["rows"])
    return seconds, known, redo(tier_lines(seconds, known, sds).as_json(), known)


def test_of_several_outer_tiers_each_has_an_interval_of_its_own() -> None:
    seconds, _, shown = told_of(APART, ["external"])
    for name in ("dram", "disk"):
        net = present(seconds.tiers[name].net)
        told = tuple(float(shown[f"{end}_{name}"]) for end in ("low", "net", "high"))
        assert told == pytest.approx(net, abs=1e-3)
    # 15 s, of which 200,000 of 300,000 tokens came from DRAM: 9 of 15, less two thirds of 3 + 2
    assert float(shown["net_dram"]) == pytest.approx(9 - 10 / 3, abs=1e-3)
    assert "net_external" not in shown  # nothing came from it, and nothing was put there


def test_where_nobody_timed_the_loads_what_was_avoided_keeps_its_interval() -> None:
    seconds, known, shown = told_of(APART._replace(loads=None))
    assert seconds.net is None
    assert not {"net", "net_low", "stall"} & {*known}
    assert (float(known["W_low"]), float(known["W_high"])) == pytest.approx(seconds.avoided[::2], abs=1e-3)
    hbm = seconds.tiers["hbm"].avoided
    assert (float(shown["W_hbm_low"]), float(shown["W_hbm_high"])) == pytest.approx(hbm[::2], abs=1e-3)
    assert not {"net_dram", "net_disk"} & {*shown}


def test_stores_without_a_hit_have_the_interval_of_what_they_cost() -> None:
    unused = NO_WORTH._replace(full=APART.full, stores=2.0, requests=100.0, computed_tokens=1e6)
    seconds, known, shown = told_of(unused)
    # half of 2 s to 1.2 times
    assert [float(known[name]) for name in ("net_low", "net", "net_high")] == [-2.4, -2.0, -1.0]
    assert [float(shown[name]) for name in ("low_external", "net_external", "high_external")] == [-2.4, -2.0, -1.0]
    assert present(seconds.net) == pytest.approx((-2.4, -2.0, -1.0))


def test_the_classes_are_all_requests_and_sum_to_what_was_avoided(demo: tuple[SavingsReport, dict[str, Any]]) -> None:
    report, one = demo
    rows, total = one["classes"]["rows"], one["classes"]["total"]
    (group,) = report.groups
    (value,) = group.values
    assert value.worth is not None
    assert 2 <= len(rows) <= 8
    assert float(total["requests"]) == 373  # vllm:time_to_first_token_seconds_count
    for name in ("nothing", "actual", "avoided"):
        assert agrees(math.fsum(float(row[name]) for row in rows), total[name])
    for row in rows:
        assert agrees(float(row["nothing"]) - float(row["actual"]), row["avoided"])
    assert float(total["avoided"]) == pytest.approx(value.worth.avoided[1], abs=0.001)
    assert total["avoided"] == next(row["value"] for row in one["figure"]["rows"] if row["symbol"] == "W_m")
    assert float(total["nothing"]) == pytest.approx(value.worth.full[1], abs=0.001)
    for row, following in pairwise(rows[1:]):
        assert row["reused_below"] <= following["reused_from"]
    tokens = sum(float(row["requests"]) * float(row["mean_reused_tokens"]) for row in rows)
    assert tokens == pytest.approx(1_969_008, rel=2e-3)


def test_without_reuse_nothing_was_avoided_and_nothing_is_worked_out(tmp_path: Path) -> None:
    _, (one,) = asked(site(tmp_path, Load(hbm=0.0), dram_gib="2"), rates=RATES)
    assert values(one["figure"]["rows"]) == {"W": 0, "stall": 0, "store": 0, "net": 0}
    assert (one["request"], one["errors"], one["figure"]["interval"]) == (None, None, None)
    assert values(one["money"]["rows"])["net_paid"] == pytest.approx(-values(one["money"]["rows"])["holding"])
    assert one["classes"]["total"]["avoided"] == "0.0000"


def test_where_mfu_counters_place_the_truth_between_the_couplings_w_lies_there(
    demo: tuple[SavingsReport, dict[str, Any]],
) -> None:
    seconds = demo[0].groups[0].seconds
    assert seconds is not None
    lines = seconds_lines(seconds, Couplings((40.0, 42.5, 44.0), 0.25), [])
    # a quarter of the way from apart to together: 44 - 0.25 x 4
    assert values(lines.as_json())["W"] == 43.0
    redo(lines.as_json())


def test_a_log_of_the_requests_leaves_one_coupling_and_classes_of_real_requests(settled: str) -> None:
    with LedgerReader(settled) as reader, reader.snapshot():
        extent = reader.extent()
        assert extent is not None
        # about what the counters saw; the law is the stored one
        times = np.linspace(extent[0] / 1e9 + 1, extent[1] / 1e9 - 1, 373)
        log = Logged(times, np.full(373, 7584.0), np.full(373, 5279.0), np.full(373, math.nan))
        laws = Laws(reader, reader.targets(), extra={"h100-llama8b-on/0": Extra(logged=log, rung="M2")})
        report = savings_report(reader, None, ["model"], book_of(reader, Config()), Payment(), laws=laws)
        (one,) = explained(reader, report, laws)
    (row,) = one["classes"]["rows"]
    assert (row["reused_from"], row["reused_below"], row["mean_prompt_tokens"]) == (4096, 8192, "7584")
    assert [line["symbol"] for line in one["figure"]["rows"]][:2] == ["W_m", "W"]
    figure = redo(one["figure"]["rows"])
    assert row["avoided"] == figure["W"]
    redo(one["errors"]["rows"], figure)
    assert one["request"]["inputs"][0]["source"] == "the log of requests"
    assert "A log of the requests" in one["classes"]["couplings"]


def test_engines_of_one_group_are_told_together_and_each_on_its_own(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    made = Site(ledger, [ServingEngine(NAME), ServingEngine("10.0.0.2:8000/0")])
    made.scrape(made.engines)
    made.serve(1800).close()
    _, (both,) = asked(f"sqlite:///{ledger}", rates=RATES)
    _, each = asked(f"sqlite:///{ledger}", by=("replica",), rates=RATES)
    assert [one["name"] for one in both["inputs"]["replicas"]] == ["10.0.0.1:8000/0", "10.0.0.2:8000/0"]
    counters = [
        {counter["counter"]: counter for counter in one["inputs"]["counters"]}["vllm:prompt_tokens_total"]
        for one in (both, *each)
    ]
    assert counters[0]["difference"] == counters[1]["difference"] + counters[2]["difference"]
    assert (counters[0]["first"], counters[1]["first"]) == (None, 0)
    assert len(both["laws"]) == 1  # replicas of a kind share one
    avoided = [values(one["figure"]["rows"])["W"] for one in (both, *each)]
    assert avoided[0] == pytest.approx(avoided[1] + avoided[2], rel=1e-4)
    assert float(both["classes"]["total"]["requests"]) == 480
    # of every four requests that came to each engine in half a minute, what their own law says: METHOD 3
    truth = sum(engine.avoided for engine in made.engines)
    assert avoided[0] == pytest.approx(truth, rel=0.1)


def test_a_group_without_a_figure_shows_what_was_counted_and_why(demo_ledger: str) -> None:
    with LedgerReader(demo_ledger) as reader:
        extent = reader.extent()
    assert extent is not None
    _, (one,) = asked(demo_ledger, Window(extent[0] + 4 * SECOND, extent[0] + 7 * SECOND))
    assert one["status"] == "insufficient_data"
    assert one["reasons"]
    assert {one[name] for name in ("figure", "request", "money")} == {None}
    assert [each["name"] for each in one["inputs"]["counters"]][:3] == ["prompt tokens", "computed", "reused from HBM"]


# -- the counters


def test_the_counters_are_named_as_the_collector_reads_them() -> None:
    def spelled(family: Family) -> str:
        told = ",".join(f'{label}="{text}"' for label, text in family.labels.items())
        return f"{family.sample}{{{told}}}" if told else family.sample

    def told(families: Sequence[Family], named: Sequence[tuple[str, str]]) -> list[str]:
        read = {(family.quantity, spelled(family)) for family in families}
        return [f"{quantity}: {counter}" for quantity, counter in named if (quantity, counter) not in read]

    ours = [
        (quantity, counter) for table in (inputs.ENGINE, inputs.DETAILS) for quantity, (_, counter) in table.items()
    ]
    assert told(vllm_families.FAMILIES, ours) == []
    assert told(vllm_families.HISTOGRAMS, [(quantity, one[1]) for quantity, one in inputs.HISTOGRAMS.items()]) == []
    assert told(vllm_families.OFFLOAD, list(inputs._OFFLOAD.items())) == []


def test_the_clocks_of_lmcache_are_named_as_its_collectors_read_them() -> None:
    assert {one.quantity: one.sample for one in lmcache.FAMILIES if one.quantity in inputs._LMCACHE} == inputs._LMCACHE
    for quantity, counter in inputs._LMCACHE_MP.items():
        family = next(one for one in lmcache_mp.FAMILIES if one.quantity == quantity)
        told = ",".join(f'{label}="{text}"' for label, text in sorted(family.labels.items()))
        assert counter == f"{family.sample}{{{told}}}"


def test_of_pages_of_a_cache_that_repeat_each_other_the_one_with_the_most_counts() -> None:
    def span(start: int, load_ns: int | None, store_ns: int | None) -> CacheSpan:
        return CacheSpan(start, start + 10, load_ns, store_ns, None, None, None, None)

    # the internal ports of two workers of one engine, which load side by side
    first = [span(0, 700, 40), span(10, 100, None), span(20, 9000, 9000)]
    second = [span(0, 300, 50), span(10, 450, 5)]
    engine = observed([], caches={"host:1/lmcache": first, "host:2/lmcache": second})
    assert pieces._cache_totals(engine, 0, 20) == {"load_ns": 800, "store_ns": 55}
    assert pieces._cache_totals(engine, 40, 60) == {}


def test_a_counter_has_its_value_at_both_ends(demo: tuple[SavingsReport, dict[str, Any]]) -> None:
    counters = {one["counter"]: one for one in demo[1]["inputs"]["counters"]}
    hbm = counters['vllm:prompt_tokens_by_source_total{source="local_cache_hit"}']
    assert (hbm["first"], hbm["last"], hbm["difference"], hbm["basis"]) == (0, 1_969_008, 1_969_008, "MEASURED")
    assert counters["vllm:request_prompt_tokens_bucket"]["difference"] == 367  # of finished requests
    work = counters["NVML_GPM_METRIC_GRAPHICS_UTIL over time, the busiest GPU"]
    assert work["name"] == "the GPUs worked, known over 93.0 s"
    assert demo[1]["inputs"]["replicas"] == [
        {
            "name": "h100-llama8b-on/0",
            "first_scrape": "2026-11-23T04:46:46.962Z",
            "last_scrape": "2026-11-23T04:48:20.962Z",
        }
    ]


@pytest.fixture
def counted(tmp_path: Path) -> str:
    """An engine that serves 900 computed and 100 reused tokens every 20 s, six times, from 5,000 on."""
    path = new_ledger(tmp_path)
    engine = FakeEngine()
    engine.counts["computed_tokens"] = 5000.0
    deployment = Deployment(path, {"127.0.0.1:8000": About(gpus=(), mapping="a test")})
    for number in range(7):
        if number:
            engine.serve(computed=900, hbm=100, seconds=0.1)
        deployment.scrape(START + number * 20 * SECOND, [engine])
    deployment.close()
    return path


def test_raw_counters_inside_the_ledger_are_the_last_ones_less_what_came_since(counted: str) -> None:
    with reader_of(counted) as reader:
        found = raw_counters(reader, "engine", "127.0.0.1:8000/0", START + 20 * SECOND, START + 80 * SECOND)
    assert found["computed_tokens"] == (5900, 8600)
    assert found["hbm_tokens"] == (100, 400)
    assert found["prefill_ns"] == (25_000_000, 100_000_000)
    assert "running_requests" not in found  # a gauge


def test_raw_counters_from_before_a_restart_are_not_known(counted: str) -> None:
    engine = FakeEngine()
    deployment = Deployment(counted, {"127.0.0.1:8000": About(gpus=(), mapping="a test")})
    engine.restart(START / 1e9 + 130)
    for number in (7, 8, 9):
        deployment.scrape(START + number * 20 * SECOND, [engine])
        engine.serve(computed=10)
    deployment.close()
    with reader_of(counted) as reader:
        name = "127.0.0.1:8000/0"
        assert raw_counters(reader, "engine", name, START, START + 80 * SECOND) == {}
        after = raw_counters(reader, "engine", name, START + 140 * SECOND, START + 180 * SECOND)
        assert after["computed_tokens"] == (0, 20)
        assert raw_counters(reader, "engine", "nobody/0", START, START + HOUR) == {}


# -- one request


DENSE = {
    "architecture": "LlamaForCausalLM",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128_256,
    "weight_dtype": "bfloat16",
    "kv_dtype": "bfloat16",
}
EXPERTS = DENSE | {"architecture": "MixtralForCausalLM", "num_local_experts": 8, "num_experts_per_tok": 2}


def example(config: dict[str, Any], gpus: int, prompt: float, reused: float, *, occupancy: float) -> Example:
    made = machine(shape_of(config), gpu_of(SKU) if gpus else None, gpus, token_budget=4096)
    medians = tuple(packaged_prior(made).medians.tolist())
    fingerprint = Fingerprint("m", "a", "bfloat16", "bfloat16", SKU if gpus else "", gpus, "0.25.1", 4096)
    evidence = CalibrationEvidence(START, START + HOUR, "graphics", 1, 1, 0, 0, 1, 1, 1.0, None, None)
    nothing = tuple((0.0,) * len(PARAMETERS) for _ in PARAMETERS)
    law = Calibration(fingerprint, "M1", medians, nothing, 0.88, 10.0, evidence)
    return Example(
        made, law, START, START + SECOND, prompt, reused, 0.0, 12.0, 60_000.0, occupancy, 3.0, 4084.0, 1.02, 0.88
    )


@pytest.mark.parametrize(
    ("config", "gpus", "prompt", "reused", "occupancy"),
    [
        pytest.param(DENSE, 1, 30_000.0, 20_000.0, 0.75, id="several chunks"),
        pytest.param(DENSE, 1, 900.0, 800.0, 0.0, id="small, and no decodes"),
        pytest.param(EXPERTS, 2, 9_000.0, 8_990.0, 0.5, id="experts on two GPUs"),
        pytest.param(DENSE, 0, 700.0, 512.0, 1.0, id="a CPU"),
    ],
)
def test_a_request_that_is_worked_out_by_hand_takes_what_the_law_says(
    config: dict[str, Any], gpus: int, prompt: float, reused: float, occupancy: float
) -> None:
    one = example(config, gpus, prompt, reused, occupancy=occupancy)
    worked = worked_request(one, is_logged=True)
    made, theta = one.machine, np.array(one.calibration.medians)
    room = max(4096 - occupancy * 12, 256)
    decode = working_seconds(made, theta, Steps(np.array([12.0]), 0.0, 60_000.0, 1.02))[0] + theta[GAP]
    for side, begin in (("without_reuse", 0.0), ("as_it_was", reused)):
        parts = chunked(np.array([prompt]), np.array([begin]), np.array([room]), np.array([3.0]))
        clock = np.where(parts.tokens < 2048, 1.02, 0.88)
        tokens = parts.tokens * parts.sharing + occupancy * 12
        steps = Steps(tokens, parts.products * parts.sharing, np.full(len(tokens), occupancy * 60_000.0), clock)
        takes = prefill_seconds(working_seconds(made, theta, steps), theta)
        truth = float(((takes - occupancy * decode) / parts.sharing).sum())
        assert len(worked[side]["steps"]) == len(tokens)
        assert float(worked[side]["seconds"]) == pytest.approx(truth, rel=1e-4, abs=1e-6)
        before = redo(worked["decode"], redo(worked["inputs"]))
        for step in worked[side]["steps"]:
            redo(step["rows"], before)


def test_the_request_is_of_the_class_that_avoided_most_and_takes_what_the_law_says(
    demo: tuple[SavingsReport, dict[str, Any]],
) -> None:
    one = demo[1]["request"]
    best = max(demo[1]["classes"]["rows"], key=lambda row: float(row["avoided"]))
    assert best["reused_from"] <= one["reused_tokens"] < best["reused_below"]
    assert one["reused_tokens"] < one["prompt_tokens"]
    # its tokens are whole here, and were not in the law's own evaluation
    assert float(one["total"][-1]["value"]) == pytest.approx(one["unrounded_seconds"], rel=2e-3)
    sources = {row["symbol"]: (row["basis"], row["source"]) for row in one["inputs"]}
    assert sources["Pi"][0] == "ASSUMED"
    assert "H100 datasheet" in sources["Pi"][1]
    assert sources["P"] == ("MEASURED", "the model's config.json")


def test_the_steps_of_a_long_prompt_are_all_in_the_answer_and_four_on_the_screen(
    demo: tuple[SavingsReport, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    one = example(DENSE, 1, 30_000.0, 15_000.0, occupancy=0.5)
    explain_table([demo[1] | {"request": worked_request(one, is_logged=False)}])
    shown = capsys.readouterr().out
    head = next(line for line in shown.splitlines() if line.startswith("step "))
    assert re.split(r" {2,}", head.strip())[2:] == ["no reuse 1/8", "no reuse 8/8", "as it was 1/4", "as it was 4/4"]
    assert "8 steps more are in --format json" in shown


# -- the law, its error, the tiers


def test_each_parameter_stands_beside_its_prior(demo: tuple[SavingsReport, dict[str, Any]]) -> None:
    report, one = demo
    (law,) = one["laws"]
    calibration = report.groups[0].values[0].calibration
    assert calibration is not None
    first = law["parameters"][0]
    sd = math.sqrt(calibration.covariance[0][0])
    assert (first["name"], first["symbol"]) == ("compute_efficiency", "eta")
    assert float(first["median"]) == pytest.approx(calibration.medians[0], rel=1e-4)
    assert float(first["high"]) == pytest.approx(calibration.medians[0] * math.exp(1.645 * sd), rel=1e-4)
    # METHOD 4.2 and the packaged prior: 0.62, and 0.25 of its log
    assert first["prior"] == {"low": "0.41095", "median": "0.62000", "high": "0.93540"}
    assert float(first["narrowed"]) == pytest.approx(0.25 / sd, abs=0.06)
    worth = report.groups[0].values[0].worth
    assert worth is not None
    assert float(first["moves"]) == pytest.approx(worth.avoided_by[0] * sd, abs=1e-3)
    assert (law["prior"], law["id"], law["evidence"]["source"]) == ("packaged", None, "graphics")


def test_an_efficiency_above_the_peak_says_how_that_can_be(
    demo: tuple[SavingsReport, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    law = demo[1]["laws"][0]
    words = "above 1 where decodes share a prefix's reading"
    for median, times in (("1.1200", 1), ("0.9700", 0)):
        rows = [one | {"median": median} if "kv" in one["name"] else one for one in law["parameters"]]
        explain_table([demo[1] | {"laws": [law | {"parameters": rows}], "request": None}])
        assert " ".join(capsys.readouterr().out.split()).count(words) == times


def test_the_error_is_told_by_cause_with_the_largest_one_named(demo: tuple[SavingsReport, dict[str, Any]]) -> None:
    report, one = demo
    seconds = report.groups[0].seconds
    assert seconds is not None
    shown = values(one["errors"]["rows"])
    for cause, sd in seconds.parts_sd.items():
        assert shown[f"sd_{cause}"] == pytest.approx(sd, abs=2e-4)
    assert sum(map(float, one["errors"]["shares"].values())) == pytest.approx(1, abs=0.005)
    largest = max(seconds.parts_sd, key=lambda cause: seconds.parts_sd[cause])
    assert one["errors"]["largest"]["cause"] == largest
    assert one["errors"]["largest"]["less_by"]
    (gradient,) = one["errors"]["gradients"]
    g, covariance = np.array([*gradient["by_log_of"].values()]), np.array(gradient["covariance_of_logs"])
    assert math.sqrt(g @ covariance @ g) == pytest.approx(shown["sd_calibration"], abs=1e-3)


def test_hbm_alone_is_not_shared_out(demo: tuple[SavingsReport, dict[str, Any]]) -> None:
    assert demo[1]["tiers"] is None


def test_tiers_that_stand_in_for_each_other_are_called_so(outer: tuple[SavingsReport, dict[str, Any]]) -> None:
    report, one = outer
    shown, found = values(one["tiers"]["rows"]), one["tiers"]["attributions"]
    (group,) = report.as_json()["groups"]
    # 60 scrapes of 0.06 s, over the tokens that were loaded: without HBM as much again for each of its tokens
    assert shown["stall"] == pytest.approx(3.6, rel=0.02)
    assert shown["v_out"] == pytest.approx(
        shown["W_hbm"] + shown["W_out"] - shown["stall"] * (1 + shown["R_hbm"] / shown["R_out"]) - shown["store"],
        abs=0.01,
    )
    assert float(found["serving"]["hbm"]) == pytest.approx(
        group["tiers"]["hbm"]["net_engine_seconds"]["point"], abs=1e-3
    )
    worth = {
        frozenset[str](): 0.0,
        frozenset({"hbm"}): shown["v_hbm"],
        frozenset({"external"}): shown["v_out"],
        frozenset({"hbm", "external"}): shown["v_all"],
    }
    for how, parts in (("serving", serving), ("last_in", last_in), ("shapley", shapley)):
        truth = parts(("hbm", "external"), worth.__getitem__)
        assert {tier: float(text) for tier, text in found[how].items()} == pytest.approx(truth, abs=1e-3)
    assert shown["last_out"] == pytest.approx(float(found["last_in"]["external"]), abs=1e-3)
    assert shown["shapley_hbm"] == pytest.approx(float(found["shapley"]["hbm"]), abs=1e-3)
    assert one["tiers"]["substitutes"] is True


def test_loads_that_nobody_timed_leave_the_outer_tiers_worth_alone_unknown(tmp_path: Path) -> None:
    _, (one,) = asked(site(tmp_path, Load(hbm=0.4, external=0.3), connector="LMCacheConnectorV1"), rates=RATES)
    assert one["tiers"]["attributions"] is None
    assert "nothing tells how long the loads took" in one["tiers"]["notes"][0]


def test_loads_that_the_engine_does_not_wait_for_cost_it_nothing_alone_either(tmp_path: Path) -> None:
    _, (one,) = asked(site(tmp_path, OUTER, connector="LMCacheMPConnector"), rates=RATES)
    shown = values(one["tiers"]["rows"])
    assert shown["stall"] == 0
    assert shown["v_out"] == pytest.approx(shown["v_all"], abs=1e-3)
    assert [row["formula"] for row in one["figure"]["rows"] if row["symbol"] == "stall"] == ["0 * loads"]


# -- the money


def test_stores_without_a_hit_are_a_loss_with_an_interval_in_money_too(tmp_path: Path) -> None:
    load = Load(hbm=0.0, store_seconds=0.1, starved=True)
    report, (one,) = asked(site(tmp_path, load, connector="LMCacheConnectorV1"), rates=RATES)
    (group,) = report.as_json()["groups"]
    assert group["reused_tokens"]["external"] == 0
    known = redo(one["figure"]["interval"], redo(one["figure"]["rows"]))
    known = redo(one["tiers"]["interval"], known | redo(one["tiers"]["rows"]))
    money = values(one["money"]["rows"])
    redo(one["money"]["rows"], known)
    assert Decimal(group["net"]["high"]) < 0
    near = -2e-4 * float(group["net"]["low"])
    for name, symbol in (("net", "net_paid"), ("realised", "realised")):
        for end in ("low", "high"):
            assert money[f"{symbol}_{end}"] == pytest.approx(float(group[name][end]), abs=near)


def test_the_money_names_its_prices_and_what_holding_costs(outer: tuple[SavingsReport, dict[str, Any]]) -> None:
    money = outer[1]["money"]
    shown = values(money["rows"])
    assert shown["rate"] == pytest.approx(0.001)  # 3.6 USD an hour
    assert shown["holding"] == pytest.approx(2 * 0.72 * 0.5, rel=1e-3)  # 2 GiB for half an hour
    assert money["prices"] == [f"gpu {SKU} on-demand 3.60 USD/gpu-hour from 2026-11-23T03:00:00Z (MEASURED)"]
    assert money["holding"][0]["price"].startswith("dram on-demand 0.72 USD/gib-hour")
    assert "cash only if capacity was short" in money["meaning"]


def test_without_a_price_there_is_no_money_to_explain(tmp_path: Path) -> None:
    _, (one,) = asked(site(tmp_path), rates=RATES[1:])
    assert one["money"] is None
    assert one["figure"] is not None


def test_engines_that_cost_differently_have_a_mean_rate(tmp_path: Path) -> None:
    ledger = new_ledger(tmp_path)
    made = Site(ledger)
    made.scrape(made.engines)
    made.serve(1800).close()
    dearer = rate("gpu", "7.2", "gpu-hour", START + 900 * SECOND, sku=SKU)
    _, (one,) = asked(f"sqlite:///{ledger}", by=("model",), rates=[RATES[0], dearer])
    shown = values(one["money"]["rows"])
    assert shown["spent"] == pytest.approx(3.6 / 4 + 7.2 / 4)
    assert shown["rate"] == pytest.approx(0.0015)
    redo(one["money"]["rows"], redo(one["figure"]["interval"], redo(one["figure"]["rows"])))


# -- long spans


@pytest.fixture
def settled(demo_ledger: str, tmp_path: Path) -> str:
    """The demo's ledger with its hour settled."""
    url = copied(demo_ledger, tmp_path)
    with LedgerReader(url) as reader:
        extent = reader.extent()
        assert extent is not None
        hour = extent[0] - extent[0] % HOUR
        keep_rates(reader, Config())
        settle_hours(reader, [hour], hour + 2 * HOUR, book_of(reader, Config()), Payment())
    return url


def test_a_settled_hour_is_taken_apart_as_long_as_its_intervals_are_there(
    settled: str, demo: tuple[SavingsReport, dict[str, Any]]
) -> None:
    report, (one,) = asked(settled)
    assert report.groups[0].values[0].calibration is not None
    assert report.groups[0].values[0].calibration.id == 1
    assert one["gone"] is None
    assert one["classes"]["rows"] == demo[1]["classes"]["rows"]
    assert one["laws"][0]["id"] == 1


def test_of_an_hour_whose_intervals_have_left_the_settled_sums_are_told(
    settled: str, demo: tuple[SavingsReport, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    with LedgerReader(settled) as reader:
        extent = reader.extent()
        assert extent is not None
        assert reader.prune(extent[1] + HOUR)
    _, (one,) = asked(settled)
    assert one["status"] == demo[1]["status"]
    assert one["gone"]["hours"] == 1
    (row,) = one["classes"]["rows"]
    assert (row["name"], row["requests"]) == ("1 settled hour, as they were settled", None)
    assert float(row["avoided"]) == pytest.approx(float(demo[1]["classes"]["total"]["avoided"]), abs=2e-4)
    assert one["request"] is None
    counters = {each["counter"]: each for each in one["inputs"]["counters"]}
    assert counters["vllm:prompt_tokens_total"]["difference"] == 2_828_558
    assert counters["vllm:prompt_tokens_total"]["first"] is None
    figure = redo(one["figure"]["rows"])
    redo(one["figure"]["interval"], figure)
    redo(one["errors"]["rows"], figure)
    explain_table([one])
    assert "raw intervals have left the ledger" in capsys.readouterr().out


# -- the page


@pytest.mark.parametrize("columns", [80, 100])
@pytest.mark.parametrize("source", ["demo", "outer"])
def test_no_line_is_wider_than_the_screen(
    columns: int,
    source: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    explain_table([request.getfixturevalue(source)[1]])
    shown = capsys.readouterr().out
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= columns
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown  # nothing is cut
    titles = [line for line in shown.splitlines() if re.match(r"\d  \w", line)]
    assert titles[0] == "1  the figure"
    assert titles[-1].endswith("the money")


def test_it_is_plain_json(outer: tuple[SavingsReport, dict[str, Any]]) -> None:
    assert json.loads(json.dumps(outer[1], allow_nan=False)) == outer[1]
