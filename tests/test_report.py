from __future__ import annotations

import tomllib
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, FakeGpu, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.finding import Finding, utc_text
from kvtally.agent.grouping import default_window, finding_json
from kvtally.agent.rate_file import packaged_rates
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import Report, cost_report
from kvtally.agent.settlement import settle
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from kvtally.agent.price import Rate

HELD = {"127.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU)}
PRICES = (rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU),)  # a thousandth a second


class Telling(FakeEngine):
    """An engine that tells some quantities in another way: None hides one."""

    def __init__(self, name: str = "127.0.0.1:8000/0", version: str = "0.25.1", **told: float | None) -> None:
        super().__init__(name, version)
        self.told = told

    def reading(self) -> Reading:
        values = tuple(self.told.get(name, value) for name, value in self.counts.items())
        return super().reading()._replace(values=values, detail_names=(), details=())


def load(engine: FakeEngine, busy: bool) -> None:
    """Twenty seconds of work, or none."""
    engine.counts["running_requests"] = 1.0 if busy else 0.0
    if busy:
        engine.serve(computed=1000, hbm=500, generated=200, steps=100, seconds=20.0)


def report_of(
    folder: Path,
    engines: Sequence[FakeEngine],
    *,
    work: Callable[[int], None] = lambda _: None,
    abouts: Mapping[str, About] = HELD,
    by: Sequence[str] = ("model",),
    prices: Sequence[Rate] = PRICES,
    window: Window | None = None,
    ticks: int = 4,
    interval_seconds: int = 20,
    gpus: Sequence[FakeGpu] = (),
) -> Report:
    """The cost of some intervals from START on; `work` moves the counters before each scrape but the first."""
    path = new_ledger(folder)
    deployment = Deployment(path, abouts, interval_seconds=interval_seconds)
    for number in range(ticks):
        if number:
            work(number)
        deployment.scrape(START + number * interval_seconds * SECOND, engines, gpus)
    deployment.close()
    with closing(reader_of(path)) as reader:
        return cost_report(reader, window, by, RateBook([*packaged_rates(), *prices]), Payment())


def only(report: Report) -> dict[str, Any]:
    (group,) = report.groups
    return group


def kinds(report: Report) -> list[str]:
    return [finding.kind for finding in report.findings]


def test_a_plain_ledger_is_worked_out_by_hand(tmp_path: Path) -> None:
    engine = FakeEngine()
    group = only(report_of(tmp_path, [engine], work=lambda number: load(engine, busy=number < 3)))
    # two intervals of 20 s at work, of which the second ends at work; the third begins so and ends idle
    assert group["tokens"] == {
        "prompt": 3000,
        "computed": 2000,
        "cached": {"hbm": 1000, "dram": 0, "disk": 0, "p2p": 0, "external": 0},
        "generated": 400,
    }
    assert group["engine_seconds"]["occupied"] == 40.0
    assert group["engine_seconds"]["idle"] == 20.0
    assert group["cost"]["total"] == "0.060000000"
    assert group["cost"]["of_which"]["idle"] == "0.020000000"
    # 0.06 / 3400 tokens and 0.04 / 3400 tokens
    assert group["cost_per_million"]["fully_loaded"]["total"] == "17.647058824"
    assert group["cost_per_million"]["active"]["total"] == "11.764705882"
    assert group["basis"] == {
        "tokens": "MEASURED",
        "tiers": None,
        "states": "MODELLED",
        "cost": "MEASURED",
        "active": "MODELLED",
        "split": None,
    }
    assert group["coverage"] == 1.0


def test_an_old_engine_has_its_computed_tokens_derived_from_lookups(tmp_path: Path) -> None:
    engine = Telling(version="0.12.0", computed_tokens=None, hbm_tokens=None, external_tokens=None)

    def work(_: int) -> None:
        load(engine, busy=True)
        engine.counts["prefix_hit_tokens"] += 500

    report = report_of(tmp_path, [engine], work=work)
    group = only(report)
    assert group["tokens"]["prompt"] == 4500
    assert group["tokens"]["computed"] == 3000
    assert group["tokens"]["cached"]["hbm"] == 1500
    assert group["tokens"]["cached"]["external"] == 0
    assert group["basis"]["tokens"] == "MODELLED"
    assert "tokens_derived" in kinds(report)


def test_lookups_beyond_the_prompts_leave_computed_tokens_unknown(tmp_path: Path) -> None:
    engine = Telling(version="0.12.0", computed_tokens=None, hbm_tokens=None, external_tokens=None)

    def work(_: int) -> None:
        load(engine, busy=True)
        engine.counts["prefix_hit_tokens"] += 1501  # more than the 1500 prompt tokens

    report = report_of(tmp_path, [engine], work=work)
    group = only(report)
    assert group["tokens"]["prompt"] == 4500
    assert group["tokens"]["computed"] is group["tokens"]["cached"]["hbm"] is None
    assert group["cost_per_million"]["fully_loaded"]["input_computed"] is None
    assert group["cost_per_million"]["fully_loaded"]["total"] is not None
    assert "tokens_unknown" in kinds(report)


def test_an_engine_that_counts_by_source_and_does_not_tell_is_not_derived(tmp_path: Path) -> None:
    engine = Telling(version="0.25.1", computed_tokens=None, hbm_tokens=None)

    def work(_: int) -> None:
        load(engine, busy=True)
        engine.counts["prefix_hit_tokens"] += 500

    report = report_of(tmp_path, [engine], work=work)
    assert only(report)["tokens"]["computed"] is None
    assert "tokens_unknown" in kinds(report)


def test_an_identity_that_is_broken_is_a_finding_with_the_numbers(tmp_path: Path) -> None:
    engine = Telling()

    def work(number: int) -> None:
        load(engine, busy=True)
        engine.counts["hbm_tokens"] += 7 if number == 2 else 0

    report = report_of(tmp_path, [engine], work=work)
    (finding,) = (finding for finding in report.findings if finding.kind == "identity_broken")
    assert (finding.start_ns, finding.end_ns) == (START, START + HOUR)
    assert finding.target == "engine/127.0.0.1:8000/0"
    assert finding.message.startswith(f"from {utc_text(START + 20 * SECOND)} on: ")
    assert "1000 + 507 + 0 = 1507, not 1500" in finding.message
    tokens = only(report)["tokens"]
    assert (tokens["prompt"], tokens["computed"], tokens["cached"]["hbm"]) == (
        4500,
        3000,
        1507,
    )  # as counted, not mended


def test_tokens_of_an_outer_tier_are_told_and_its_stall_is_not(tmp_path: Path) -> None:
    engine = Telling()

    def work(_: int) -> None:
        load(engine, busy=True)
        engine.counts["prompt_tokens"] += 300
        engine.counts["external_tokens"] += 300

    report = report_of(tmp_path, [engine], work=work)
    group = only(report)
    assert group["tokens"]["cached"] == {"hbm": 1500, "dram": None, "disk": None, "p2p": None, "external": 900}
    assert group["engine_seconds"]["stall"] is group["engine_seconds"]["store"] is None
    assert group["cost_per_million"]["fully_loaded"]["input_cached"] == {"hbm": "0.000000000", "external": None}
    assert "stall_not_parted" in kinds(report)


def test_an_outer_tier_that_is_there_and_gave_nothing_yet_still_takes_time(tmp_path: Path) -> None:
    class WithCache(FakeEngine):
        def reading(self) -> Reading:
            return Reading("cache", "127.0.0.1:8000/0", {"cache": "lmcache"}, (0.0,) * len(QUANTITIES["cache"]))

    engine = FakeEngine()
    report = report_of(tmp_path, [engine, WithCache()], work=lambda _: load(engine, busy=True))
    assert only(report)["engine_seconds"]["stall"] is None
    assert "stall_not_parted" in kinds(report)


def test_without_an_outer_tier_there_is_no_stall(tmp_path: Path) -> None:
    engine = FakeEngine()
    report = report_of(tmp_path, [engine], work=lambda _: load(engine, busy=True))
    assert only(report)["engine_seconds"]["stall"] == only(report)["engine_seconds"]["store"] == 0.0
    assert "stall_not_parted" not in kinds(report)


def test_an_engine_whose_gpus_are_unknown_has_tokens_and_seconds_and_toml_to_write(tmp_path: Path) -> None:
    engine = FakeEngine()
    abouts = {"127.0.0.1:8000": About(mapping="its process is not to be seen here")}
    report = report_of(tmp_path, [engine], work=lambda _: load(engine, busy=True), abouts=abouts)
    group = only(report)
    assert group["cost"] is group["cost_per_million"] is group["basis"]["cost"] is None
    assert (group["tokens"]["prompt"], group["engine_seconds"]["occupied"]) == (4500, 60.0)
    (finding,) = (finding for finding in report.findings if finding.kind == "replica_mapping_unknown")
    assert "its process is not to be seen here" in finding.message
    where, _, toml = finding.message.partition('"http://127.0.0.1:8000/metrics": ')
    assert where.endswith("Name them in kvtally.toml, in the [[engine]] with url = ")
    # the setting alone: a table would be the second of its kind where the file has one already
    assert tomllib.loads(toml) == {"gpus": ["GPU-…"]}


def test_money_of_a_group_is_unknown_where_one_of_its_replicas_has_none(tmp_path: Path) -> None:
    engines = [FakeEngine(), FakeEngine("127.0.0.1:8001/0")]
    report = report_of(tmp_path, engines, work=lambda _: load(engines[0], busy=True))
    assert only(report)["cost"] is None
    assert only(report)["tokens"]["prompt"] == 4500


def test_each_group_has_its_own_money(tmp_path: Path) -> None:
    engines = [FakeEngine(), FakeEngine("127.0.0.1:8001/0")]
    groups = report_of(tmp_path, engines, work=lambda _: load(engines[0], busy=True), by=["replica"]).groups
    assert [group["by"] for group in groups] == [{"replica": "127.0.0.1:8000/0"}, {"replica": "127.0.0.1:8001/0"}]
    assert [group["cost"] is None for group in groups] == [False, True]


def test_a_scrape_that_failed_lowers_coverage_and_loses_no_token(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, HELD)
    engine = FakeEngine()
    for number in range(6):
        if number:
            load(engine, busy=True)
        deployment.scrape(START + number * 20 * SECOND, [None if number == 2 else engine])
    deployment.close()
    with closing(reader_of(path)) as reader:
        report = cost_report(reader, None, ["model"], RateBook(PRICES), Payment())
    # 100 s, of which the 40 s around the missing scrape count half
    assert only(report)["coverage"] == 0.8
    assert only(report)["tokens"]["prompt"] == 7500
    assert report.covered_ns == 100 * SECOND


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((), "ASSUMED"),
        (PRICES, "MEASURED"),
        ((PRICES[0]._replace(basis="ASSUMED"),), "ASSUMED"),
        ((*PRICES, rate("server", "0.5", "server-hour", START - HOUR, sku="gpu-host")), "MEASURED"),
        (
            (*PRICES, rate("server", "0.5", "server-hour", START - HOUR, sku="gpu-host", basis="ASSUMED")),
            "ASSUMED",
        ),
    ],
)
def test_money_is_measured_where_every_price_in_it_is(own: tuple[Rate, ...], expected: str, tmp_path: Path) -> None:
    engine = FakeEngine()
    group = only(report_of(tmp_path, [engine], work=lambda _: load(engine, busy=True), prices=own))
    assert group["basis"]["cost"] == expected
    assert any("server gpu-host" in text for text in group["rates"])  # 0 or not, it is named


def test_hours_and_days_are_named_by_their_start(tmp_path: Path) -> None:
    engine = FakeEngine()
    arguments: dict[str, Any] = {"by": ["day", "hour"], "ticks": 4, "interval_seconds": 3600}
    report = report_of(tmp_path, [engine], work=lambda _: load(engine, busy=True), **arguments)
    assert [group["by"] for group in report.groups] == [
        {"day": "2026-11-23T00:00:00.000Z", "hour": f"2026-11-23T0{hour}:00:00.000Z"} for hour in (4, 5, 6)
    ]


def test_an_hour_too_short_for_a_law_borrows_its_replicas(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, HELD)
    engine, gpu = FakeEngine(), FakeGpu("GPU-a")
    engine.counts["running_requests"] = 1.0
    for number in range(184):  # 04:00 to 05:01: the second hour has three intervals
        deployment.scrape(START + number * 20 * SECOND, [engine], [gpu])
        steps, computed = 100 + number % 7 * 30, 3000 * (1 + number % 5)
        engine.serve(computed=computed, generated=100, steps=steps, seconds=1.0)
        gpu.run(20, steps * 0.02 + computed * 0.0005)
    deployment.close()
    book = RateBook([*packaged_rates(), *PRICES])
    with closing(reader_of(path)) as reader:
        reader.add_rates(book.rates)
        settle(reader, START, book, Payment())
        alone = cost_report(reader, Window(START + HOUR, START + HOUR + 60 * SECOND), ["hour"], book, Payment())
        both = cost_report(reader, None, ["hour"], book, Payment())
    assert only(alone)["prefill_share"] is None
    assert "split_unknown" in kinds(alone)
    first, second = both.groups
    # its intervals: 250, 280 and 100 steps of 20 ms; 3000, 6000 and 9000 tokens of 0.5 ms
    assert second["prefill_share"]["point"] == pytest.approx(9 / (9 + 12.6), abs=0.0001)
    assert second["prefill_share"]["low"] < second["prefill_share"]["point"] < second["prefill_share"]["high"]
    assert first["basis"]["split"] == second["basis"]["split"] == "MODELLED"
    assert "split_unknown" not in kinds(both)


def test_the_default_window_is_everything_or_the_last_day() -> None:
    assert default_window((START, START + 24 * HOUR - 1)) == (START, START + 24 * HOUR - 1)
    assert default_window((START, START + 24 * HOUR)) == (START, START + 24 * HOUR)
    assert default_window((START, START + 24 * HOUR + 1)) == (START + 1, START + 24 * HOUR + 1)


def test_an_empty_ledger_has_no_window(tmp_path: Path) -> None:
    with closing(reader_of(new_ledger(tmp_path))) as reader:
        report = cost_report(reader, None, ["model"], RateBook(PRICES), Payment())
    assert report == Report(None, 0, "USD", [], [])
    assert report.as_json() == {
        "window": {"start": None, "end": None, "covered_seconds": 0.0},
        "currency": "USD",
        "groups": [],
        "findings": [],
    }


def test_what_holds_for_a_whole_target_is_told_once_however_many_hours_it_spans(tmp_path: Path) -> None:
    engine = FakeEngine()
    abouts = {"127.0.0.1:8000": About(gpus=("GPU-a",), sku="NVIDIA H20")}
    arguments: dict[str, Any] = {"abouts": abouts, "ticks": 5, "interval_seconds": 3600}
    report = report_of(tmp_path, [engine], work=lambda _: load(engine, busy=True), **arguments)
    (finding,) = (finding for finding in report.findings if finding.kind == "no_rate")
    assert (finding.start_ns, finding.end_ns) == (START, START + 4 * HOUR)
    assert "no rate for NVIDIA H20 (gpu, on-demand) on 2026-11-23T04:00:00Z" in finding.message


def test_a_finding_prints_with_its_span_as_text() -> None:
    assert finding_json(Finding("no_rate", "warning", "engine/a", START, START + HOUR, "say")) == {
        "kind": "no_rate",
        "severity": "warning",
        "target": "engine/a",
        "start": "2026-11-23T04:00:00.000Z",
        "end": "2026-11-23T05:00:00.000Z",
        "message": "say",
    }
