from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, rate, reader_of, url_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.calibration import PARAMETERS, Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import Report, cost_report
from kvtally.agent.settlement import settle
from kvtally.agent.valuing import Valued
from kvtally.agent.worth import NOTHING, Worth
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.agent.savings import Loading

PRICES = (
    rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU),  # a thousandth a second
    rate("dram", "0.01", "gib-hour", START - HOUR),
)
SIZE = len(PARAMETERS)
FINGERPRINT = Fingerprint("llama-8b", "LlamaForCausalLM", "bfloat16", "bfloat16", SKU, 1, "0.25.1", 8192)
EVIDENCE = CalibrationEvidence(START, START + HOUR, "graphics", 240, 3, 0, 0, 1200, 50_000, 3100.5, 1.01, None)
COVARIANCE = tuple(tuple(0.01 * (row == column) for column in range(SIZE)) for row in range(SIZE))
LAW = Calibration(FINGERPRINT, "M1", (0.5,) * SIZE, COVARIANCE, 0.9, 30.0, EVIDENCE)
WORTH = NOTHING._replace(
    prefill=(1080.0, 1200.0, 1440.0),
    decode=2400.0,
    prefill_by=(-300.0, *(0.0,) * (SIZE - 1)),
    loads=300.0,
    stores=300.0,
)
SHAPE = json.dumps({"architecture": "LlamaForCausalLM", "weight_dtype": "bfloat16"})


class PlainEngine(FakeEngine):
    """An engine without details: they would have to agree with its tokens by source."""

    def reading(self) -> Reading:
        return super().reading()._replace(detail_names=(), details=())


class WithCache(FakeEngine):
    """The page of an outer cache tier that does not tell how many tokens it loads."""

    def reading(self) -> Reading:
        values = tuple(None if one.name == "loaded_tokens" else 0.0 for one in QUANTITIES["cache"])
        return Reading("cache", "127.0.0.1:8000/0", {"cache": "lmcache"}, values)


def told(
    path: str, worth: Worth | None, loading: Loading = "synchronous", *, hours: int = 1, stored: bool = True
) -> None:
    """Settle the first hours of a ledger with this worth in each."""
    with closing(reader_of(path)) as reader:
        law = LAW._replace(id=reader.add_calibration(LAW, START, "a test")) if stored else None
        target_id = next(target.id for target in reader.targets().values() if target.kind == "engine")
        for hour_ns in range(START, START + hours * HOUR, HOUR):
            value = Valued(hour_ns, target_id, worth, law, loading)
            settle(reader, hour_ns, RateBook(PRICES), Payment(), values=[value])


def ledger(
    folder: Path,
    *,
    external: int = 0,
    cache: bool = True,
    ticks: Sequence[int] = range(0, 3660, 20),
    shape: str = SHAPE,
    connector: str = "",
    dram_gib: str = "",
) -> str:
    """An engine that is busy all of an hour; each 20 s it computes 1000 tokens, finds 500 in HBM, generates 200."""
    path, engine = new_ledger(folder), PlainEngine()
    facts = {name: text for name, text in (("shape", shape), ("connector", connector)) if text}
    about = About(gpus=("GPU-a",), sku=SKU, facts=facts, dram_gib=dram_gib)
    deployment = Deployment(path, {"127.0.0.1:8000": about})
    engine.counts["running_requests"] = 1.0
    for second in ticks:
        engine.serve(computed=1000, hbm=500, generated=200, steps=100)
        engine.counts["prompt_tokens"] += external
        engine.counts["external_tokens"] += external
        deployment.scrape(START + second * SECOND, [engine, *([WithCache()] if cache else [])])
    deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates(PRICES)
    return path


def report_of(path: str, by: Sequence[str] = ("model",), hours: int = 1) -> Report:
    with closing(reader_of(path)) as reader:
        return cost_report(reader, Window(START, START + hours * HOUR), by, RateBook(PRICES), Payment())


def only(report: Report) -> dict[str, Any]:
    (group,) = report.groups
    return group


def kinds(report: Report) -> list[str]:
    return [finding.kind for finding in report.findings]


def test_a_settled_hour_is_divided_by_the_step_law_that_it_was_settled_with(tmp_path: Path) -> None:
    path = ledger(tmp_path, external=250, dram_gib="20")
    told(path, WORTH)
    report = report_of(path)
    group = only(report)
    # 3600 s less 300 of loading and 300 of storing leave 3000: a third of it prefill
    parts = ("prefill", "decode", "stall", "store", "occupied")
    assert {part: group["engine_seconds"][part] for part in parts} == {
        "prefill": 1000.0,
        "decode": 2000.0,
        "stall": 300.0,
        "store": 300.0,
        "occupied": 3600.0,
    }
    assert (group["split_law"], group["split_scale"], group["calibrations"]) == ("step law", 0.8333, ["1"])
    assert group["prefill_share"]["point"] == 0.2778
    assert group["engine_seconds_intervals"]["stall"] == {"low": 210.0, "high": 390.0}
    assert kinds(report) == []
    # 3.60 of GPU time, and 0.20 for holding: 20 GiB at 0.01
    assert group["cost"]["attributed"] == {
        "input_computed": "1.000000000",
        "input_cached": {"hbm": "0.000000000", "external": "0.800000000"},
        "orphan_holding": "0.000000000",
        "orphan_copies": "0.000000000",
        "output": "2.000000000",
    }
    units = group["cost_per_million"]["fully_loaded"]
    # 180 times 1000, 250 and 200 tokens, and 1750 in all
    assert units["input_computed"] == "5.555555556"
    assert units["input_cached"]["external"] == "17.777777778"
    assert units["output"] == "55.555555556"
    assert units["input"] == "5.714285714"


def test_what_an_outer_tier_costs_that_served_no_token_is_a_line_of_its_own(tmp_path: Path) -> None:
    path = ledger(tmp_path, dram_gib="20")
    told(path, WORTH._replace(loads=0.0))
    group = only(report_of(path))
    assert group["orphan_holding"] == "0.200000000"
    assert group["cost"]["attributed"]["input_cached"] == {"hbm": "0.000000000"}
    assert group["cost"]["attributed"]["orphan_copies"] == "0.300000000"
    assert group["cost_per_million"]["fully_loaded"]["input_cached"] == {"hbm": "0.000000000", "external": None}


def test_tiers_that_the_engine_tells_apart_have_a_price_each(tmp_path: Path) -> None:
    path = ledger(tmp_path, external=250, dram_gib="20")
    told(path, WORTH._replace(external_tokens=45_000.0, dram_tokens=29_999.6, disk_tokens=15_000.4))
    group = only(report_of(path))
    assert group["tokens"]["cached"] == {"hbm": 90_000, "dram": 30_000, "disk": 15_000, "p2p": 0, "external": 0}
    # two thirds of 0.6 and 0.2 for holding over 30,000 tokens; a third of 0.6 over 15,000
    cached = group["cost_per_million"]["fully_loaded"]["input_cached"]
    assert cached == {"hbm": "0.000000000", "dram": "20.000000000", "disk": "13.333333333"}


def test_loads_of_an_asynchronous_connector_take_no_engine_time(tmp_path: Path) -> None:
    path = ledger(tmp_path, external=250)
    told(path, WORTH, "asynchronous")
    group = only(report_of(path))
    assert (group["engine_seconds"]["prefill"], group["engine_seconds"]["stall"]) == (1200.0, 0.0)
    assert group["cost_per_million"]["active"]["input_cached"]["external"] == "0.000000000"


def test_an_unknown_connector_leaves_stall_and_store_inside_prefill_and_says_what_to_write(tmp_path: Path) -> None:
    path = ledger(tmp_path, external=250)
    told(path, WORTH, "unknown")
    report = report_of(path)
    group = only(report)
    assert group["engine_seconds"]["prefill"] == 1200.0
    assert group["engine_seconds"]["stall"] is group["engine_seconds"]["store"] is None
    assert group["engine_seconds_intervals"]["stall"] is group["cost"]["attributed"] is None
    assert group["cost_per_million"]["active"]["input_cached"]["external"] is None
    (finding,) = report.findings
    assert finding.kind == "stall_not_parted"
    assert 'connector = "LMCacheConnectorV1"' in finding.message


def test_a_connector_whose_seconds_nobody_reports_is_not_taken_to_be_free(tmp_path: Path) -> None:
    path = ledger(tmp_path, cache=False, connector="LMCacheConnectorV1")
    told(path, WORTH._replace(loads=0.0, stores=0.0))
    report = report_of(path)
    assert only(report)["engine_seconds"]["store"] is None
    (finding,) = report.findings
    assert (finding.kind, "no page of the tier" in finding.message) == ("stall_not_parted", True)


@pytest.mark.parametrize(("factor", "found"), [(0.79, True), (0.81, False), (1.24, False), (1.26, True)])
def test_a_law_that_says_much_more_or_less_than_was_occupied_does_not_fit(
    factor: float, found: bool, tmp_path: Path
) -> None:
    path = ledger(tmp_path, cache=False)
    told(path, WORTH._replace(prefill=(1200 / factor,) * 3, decode=2400 / factor, loads=0.0, stores=0.0))
    report = report_of(path)
    assert only(report)["split_scale"] == factor
    assert only(report)["engine_seconds"]["prefill"] == pytest.approx(1200.0)
    assert kinds(report) == (["step_law_misfit"] if found else [])
    if found:
        assert report.findings[0].target == "engine/127.0.0.1:8000/0"
        assert (report.findings[0].severity, f"{factor:.2f} times" in report.findings[0].message) == ("warning", True)


@pytest.mark.parametrize("lacks", ["a worth", "its calibration"])
def test_an_hour_settled_without_a_law_says_so_and_stays_as_it_was(lacks: str, tmp_path: Path) -> None:
    path = ledger(tmp_path, cache=False)
    told(path, None if lacks == "a worth" else WORTH, stored=lacks == "a worth")
    report = report_of(path)
    group = only(report)
    assert (group["split_law"], group["split_scale"], group["calibrations"]) == (None, None, [])
    assert group["engine_seconds"]["prefill"] is group["cost"]["attributed"] is None
    assert kinds(report) == ["split_unknown", "step_law_lacking"]
    assert "ledger settle --again" in report.findings[1].message


def test_without_a_shape_the_report_says_where_to_write_it(tmp_path: Path) -> None:
    report = report_of(ledger(tmp_path, cache=False, shape=""))
    (finding,) = (finding for finding in report.findings if finding.kind == "step_law_lacking")
    assert "the shape of model llama-8b is not known" in finding.message
    assert 'model_config = "/models/x/config.json"' in finding.message


def test_time_in_which_no_interval_began_is_divided_as_that_of_the_one_that_lasted(tmp_path: Path) -> None:
    path = ledger(tmp_path, cache=False, ticks=(0, 3600, 4 * 3600))
    told(path, WORTH._replace(loads=0.0, stores=0.0), hours=1)
    with closing(reader_of(path)) as reader:
        target_id = next(iter(reader.targets()))
        law = LAW._replace(id=1)
        own = Valued(START + HOUR, target_id, WORTH._replace(prefill=(1800.0,) * 3, decode=1800.0), law, "unknown")
        settle(reader, START + HOUR, RateBook(PRICES), Payment(), values=[own])
        settle(reader, START + 2 * HOUR, RateBook(PRICES), Payment())
    groups = report_of(path, ["hour"], hours=3).groups
    assert [group["engine_seconds"]["prefill"] for group in groups[:2]] == [1200.0, 1800.0]
    whole = only(report_of(path, ["model"], hours=3))
    assert whole["split_law"] == "step law"
    assert whole["engine_seconds"]["prefill"] == 1200.0 + 1800.0 + 1800.0


def test_hours_add_up_to_the_whole_to_the_nanosecond_and_the_nano_unit(tmp_path: Path) -> None:
    path = ledger(tmp_path, external=251, ticks=range(7, 4 * 3600, 20))
    told(path, WORTH._replace(prefill=(1000.1, 1234.5678, 1300.7), decode=2345.6789, loads=17.123456789), hours=3)
    whole, hours = only(report_of(path, hours=3)), report_of(path, ["hour"], hours=3).groups
    assert len(hours) == 3
    for part in ("prefill", "decode", "stall", "store", "occupied"):
        assert round(whole["engine_seconds"][part] * 1e9) == sum(
            round(group["engine_seconds"][part] * 1e9) for group in hours
        )
    for amount in ("input_computed", "output"):
        assert nano(whole["cost"]["attributed"][amount]) == sum(
            nano(group["cost"]["attributed"][amount]) for group in hours
        )
    attributed = whole["cost"]["attributed"]
    parts = [attributed[name] for name in ("input_computed", "output", "orphan_holding", "orphan_copies")]
    assert sum(map(nano, [*parts, *attributed["input_cached"].values()])) == nano(whole["cost"]["total"])


def nano(text: str) -> int:
    return int(text.replace(".", ""))


def test_numpy_is_not_loaded_for_hours_that_were_settled(tmp_path: Path) -> None:
    path = ledger(tmp_path, cache=False)
    told(path, WORTH)
    until = str((START + HOUR) // SECOND)
    code = (
        "import sys; from kvtally.agent.cli import main; "
        f"assert main(['cost', '--ledger', '{url_of(path)}', '--until', '{until}', '--format', 'json']) in (0, None); "
        "sys.exit('numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["groups"][0]["split_law"] == "step law"
