from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import call
from tests.ledgers import (
    HOUR,
    SECOND,
    SKU,
    START,
    STORY_END,
    Deployment,
    FakeEngine,
    FakeGpu,
    new_ledger,
    reader_of,
    tell_story,
    url_of,
)

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export.figures import Snapshot, snapshot
from kvtally.agent.export.metrics import METRICS, OPENCOST
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WINDOWS = {"1h": HOUR, "24h": 24 * HOUR}
FIRST, SECOND_ENGINE = "10.0.0.1:8000", "10.0.0.2:8000"
BOUNDS = ("low", "point", "high")


def taken(url: str, windows: Mapping[str, int] = WINDOWS, *, opencost: bool = False) -> Snapshot:
    with LedgerReader(url) as reader, reader.snapshot():
        found = snapshot(reader, book_of(reader, Config()), Payment(), windows, opencost=opencost)
    assert found is not None
    return found


def values(found: Snapshot, metric: str, **labels: str) -> dict[tuple[str, ...], float]:
    """The values of a metric with these labels, by what its other labels say."""
    return {
        tuple(value for name, value in one.labels.items() if name not in labels and value): one.value
        for one in found.figures
        if one.metric == metric and labels.items() <= one.labels.items()
    }


def value(found: Snapshot, metric: str, **labels: str) -> float | None:
    """The one value of a metric with these labels; None where there is none."""
    told = [one.value for one in found.figures if one.metric == metric and labels.items() <= one.labels.items()]
    assert len(told) < 2, told
    return told[0] if told else None


def answer(command: str, url: str, *options: str) -> Any:
    ran = call(command, "--ledger", url, "--format", "json", *options)
    assert ran.status == 0, ran.err
    return json.loads(ran.out)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four hours of two engines in two namespaces and three GPUs (tests/ledgers.py), at the operator's own prices."""
    path = new_ledger(tmp_path_factory.mktemp("figures"))
    tell_story(path)
    return url_of(path)


# money and savings: what the command line says


@pytest.mark.parametrize("window", WINDOWS)
def test_costs_of_a_window_are_those_of_the_command_line_to_the_digit(demo_ledger: str, window: str) -> None:
    found = taken(demo_ledger)
    told = answer("cost", demo_ledger, "--since", window)
    (group,) = told["groups"]
    for view, prices in group["cost_per_million"].items():
        shown = values(found, "cost_per_million", window=window, view=view, currency="USD", model="llama-8b")
        plain = {(group["basis"]["cost"], name): price for name, price in prices.items() if isinstance(price, str)}
        cached = {
            (group["basis"]["cost"], f"input_cached_{tier}"): price
            for tier, price in prices["input_cached"].items()
            if price is not None
        }
        assert shown == {key: float(price) for key, price in (plain | cached).items()}
        assert len(shown) > 4
    hours = told["window"]["covered_seconds"] / 3600
    assert value(found, "cost_per_hour", window=window) == float(group["cost"]["total"]) / hours
    reused = 1 - group["tokens"]["computed"] / group["tokens"]["prompt"]
    assert value(found, "reuse_ratio", window=window) == reused
    assert value(found, "coverage", window=window) == group["coverage"]


@pytest.mark.parametrize("window", WINDOWS)
def test_savings_of_a_window_are_those_of_the_command_line_to_the_digit(demo_ledger: str, window: str) -> None:
    found = taken(demo_ledger)
    told = answer("savings", demo_ledger, "--since", window)
    (group,) = told["groups"]
    for measure in ("gross", "net", "realised"):
        assert [value(found, "savings_amount", window=window, measure=measure, bound=bound) for bound in BOUNDS] == [
            float(group[measure][bound]) for bound in BOUNDS
        ]
    for measure, key in (("gross", "avoided_engine_seconds"), ("net", "net_engine_seconds")):
        assert [value(found, "savings_seconds", window=window, measure=measure, bound=bound) for bound in BOUNDS] == [
            group[key][bound] for bound in BOUNDS
        ]
    for tier, part in group["tiers"].items():
        shown = [value(found, "tier_savings_seconds", window=window, tier=tier, bound=bound) for bound in BOUNDS]
        assert shown == [part["net_engine_seconds"][bound] for bound in BOUNDS]
    assert value(found, "savings_status", window=window, status=group["status"]) == 1
    assert len(values(found, "savings_status", window=window)) == 1


def test_a_window_ends_with_the_ledger_and_is_cut_where_the_ledger_begins(story: str) -> None:
    found = taken(story, {"90m": 90 * 60 * SECOND, "30d": 720 * HOUR})
    for window, since in (("90m", "90m"), ("30d", "30d")):
        told = answer("cost", story, "--since", since, "--by", "namespace")
        for group in told["groups"]:
            if group["by"]["namespace"] is None:
                continue
            shown = value(
                found,
                "cost_per_million",
                window=window,
                view="fully_loaded",
                tokens="total",
                namespace=group["by"]["namespace"],
            )
            assert shown == float(group["cost_per_million"]["fully_loaded"]["total"])


def test_costs_of_the_ledgers_life_add_up_to_the_command_lines_total_in_both_cuts(story: str) -> None:
    found = taken(story)
    told = answer("cost", story, "--since", "365d", "--by", "replica")
    for group in told["groups"]:
        replica = group["by"]["replica"] or ""
        by_resource = values(found, "ledger_cost", replica=replica, currency="USD")
        by_state = values(found, "ledger_state_cost", replica=replica, currency="USD")
        total = float(group["cost"]["total"])
        assert sum(by_resource.values()) == pytest.approx(total, abs=1e-9)
        assert sum(by_state.values()) == pytest.approx(total, abs=1e-9)
        for state, amount in group["cost"]["of_which"].items():
            assert value(found, "ledger_state_cost", replica=replica, state=state) == float(amount)


def test_a_gpu_that_no_engine_holds_is_told_under_a_name_of_its_own(story: str) -> None:
    found = taken(story)
    nobody = value(found, "ledger_state_cost", model="unallocated", state="unallocated")
    told = answer("cost", story, "--since", "365d", "--by", "replica")
    (group,) = (group for group in told["groups"] if group["by"]["replica"] is None)
    assert nobody == float(group["cost"]["total"]) > 0


def test_states_are_all_of_the_time_with_a_law_and_without(story: str, tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    versions(path, ("0.25.1", True))
    for url in (story, url_of(path)):
        found = taken(url)
        told = answer("cost", url, "--since", "365d", "--by", "replica")
        for group in told["groups"]:
            seconds = group["engine_seconds"]
            whole = sum(seconds[state] for state in ("occupied", "idle", "asleep", "warm_up", "unallocated"))
            shown = values(found, "ledger_seconds", replica=group["by"]["replica"] or "")
            assert sum(shown.values()) == pytest.approx(whole)
            assert any("undivided" in key for key in shown) == (seconds["prefill"] is None)
    assert any("undivided" in key for key in values(taken(url_of(path)), "ledger_seconds"))


# counters: what the ledger adds up to


def test_counters_are_the_sums_of_the_ledger(story: str) -> None:
    found = taken(story)
    with closing(sqlite3.connect(story.removeprefix("sqlite:///"))) as ledger:
        rows = ledger.execute(
            "SELECT name, sum(computed_tokens), sum(hbm_tokens), sum(generated_tokens), sum(length_ns)"
            " FROM engine_interval JOIN target ON target.id = target_id GROUP BY name ORDER BY name"
        ).fetchall()
        energy = ledger.execute("SELECT sum(energy_mj) FROM gpu_interval").fetchone()[0]
    assert [row[0] for row in rows] == [f"{FIRST}/0", f"{SECOND_ENGINE}/0"]
    for name, computed, hbm, generated, length_ns in rows:
        assert value(found, "prompt_tokens", replica=name, source="computed") == computed
        assert value(found, "prompt_tokens", replica=name, source="hbm") == hbm
        assert value(found, "generated_tokens", replica=name) == generated
        assert value(found, "watched_seconds", replica=name) == length_ns / 1e9
    assert sum(values(found, "gpu_energy").values()) == pytest.approx(energy / 1000)


def test_no_series_is_told_twice(story: str, demo_ledger: str) -> None:
    for url in (story, demo_ledger):
        keys = [(one.metric, *sorted(one.labels.items())) for one in taken(url, opencost=True).figures]
        assert len(keys) == len(set(keys)) > 50


def test_figures_have_the_labels_that_their_metric_names(story: str, demo_ledger: str) -> None:
    every = {**METRICS, **OPENCOST}
    for url in (story, demo_ledger):
        for one in taken(url, opencost=True).figures:
            assert set(one.labels) == set(every[one.metric].labels), one


def test_what_is_unknown_is_left_out(story: str) -> None:
    found = taken(story)
    # the story's engines count no first tokens, its GPUs no tensor activity; of its model no shape is known
    assert values(found, "cache_bytes") == {}
    assert values(found, "savings_amount") == {}
    assert {key[-1] for key in values(found, "savings_status")} != {"ok"}
    assert all(one.value == one.value for one in found.figures)  # no NaN


def test_a_ledger_without_intervals_has_no_figures(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with reader_of(path) as reader:
        assert snapshot(reader, book_of(reader, Config()), Payment(), WINDOWS) is None


def versions(path: str, *of: tuple[str, bool]) -> None:
    """An engine that is replaced by other versions, which prompt 100 tokens each and say or not how many are new."""
    deployment = Deployment(path, {FIRST: About(gpus=(), mapping="a test")}, interval_seconds=10)
    at_ns = START
    for version, tells in of:
        engine = FakeEngine(f"{FIRST}/0", version, epoch=at_ns / 1e9 - 5)
        engine.counts["running_requests"] = 1.0
        for _ in range(2):
            deployment.scrape(at_ns, [_silent(engine, tells=tells)])
            engine.serve(computed=60, hbm=40, generated=7)
            at_ns += 10 * SECOND
        deployment.scrape(at_ns, [_silent(engine, tells=tells)])
        at_ns += 10 * SECOND
    deployment.close()


class _Silent(FakeEngine):
    """Tells nothing of where its prompts come from."""

    def reading(self) -> Any:
        told = super().reading()
        hidden = {"computed_tokens", "hbm_tokens", "external_tokens"}
        return told._replace(values=tuple(None if name in hidden else self.counts[name] for name in self.counts))


def _silent(engine: FakeEngine, *, tells: bool) -> FakeEngine:
    if tells:
        return engine
    silent = _Silent(engine.name, engine.attributes["version"], engine.epoch)
    silent.counts = engine.counts
    return silent


def test_a_version_that_does_not_tell_sources_keeps_its_tokens_beside_one_that_does(tmp_path: Path) -> None:
    before = new_ledger(tmp_path, "before.db")
    versions(before, ("0.8.0", False))
    untold = values(taken(url_of(before)), "prompt_tokens")
    assert list(untold.values()) == [200]
    after = new_ledger(tmp_path, "after.db")
    versions(after, ("0.8.0", False), ("0.25.1", True))
    told = values(taken(url_of(after)), "prompt_tokens", replica=f"{FIRST}/0", model="llama-8b")
    with closing(sqlite3.connect(after)) as ledger:
        prompts = ledger.execute("SELECT sum(prompt_tokens) FROM engine_interval").fetchone()[0]
    assert told["untold",] == next(iter(untold.values()))
    assert told["computed",] > 0
    assert sum(told.values()) == prompts


def test_counters_and_their_start_stay_when_raw_intervals_have_aged_out(story: str, tmp_path: Path) -> None:
    path = tmp_path / "pruned.db"
    with closing(sqlite3.connect(story.removeprefix("sqlite:///"))) as whole, closing(sqlite3.connect(path)) as copy:
        whole.backup(copy)
    url = f"sqlite:///{path}"
    before = taken(url)
    for until_ns in (START + HOUR + 600 * SECOND, STORY_END - 300 * SECOND, STORY_END + HOUR):
        with LedgerReader(url) as reader:
            assert reader.prune(until_ns)
        after = taken(url)
        assert after.start_ns == before.start_ns == START
        counters = [
            {
                (one.metric, *one.labels.items()): one.value
                for one in each.figures
                if METRICS[one.metric].type == "counter"
            }
            for each in (before, after)
        ]
        assert counters[0] == counters[1]


# OpenCost


def test_opencosts_gauges_are_there_where_they_are_asked_for(demo_ledger: str) -> None:
    assert not {one.metric for one in taken(demo_ledger).figures} & OPENCOST.keys()
    found = taken(demo_ledger, opencost=True)
    assert {one.metric for one in found.figures} >= OPENCOST.keys()
    (group,) = answer("cost", demo_ledger, "--since", "1h")["groups"]
    for basis, view in (("allocation", "fully_loaded"), ("usage", "active")):
        prices = group["cost_per_million"][view]
        for phase, ours in (("", "total"), ("prompt", "input"), ("generation", "output")):
            shown = value(found, "llm_cost_per_million_tokens", cost_basis=basis, phase=phase)
            assert shown == float(prices[ours])
    hourly = value(found, "llm_total_hourly_cost", cost_basis="allocation")
    used = value(found, "llm_total_hourly_cost", cost_basis="usage")
    assert hourly == value(found, "cost_per_hour", window="1h")
    idle = float(group["cost"]["of_which"]["idle"]) / float(group["cost"]["total"])
    assert used == pytest.approx(hourly * (1 - idle))  # type: ignore[operator]  # both are there
    tokens = group["tokens"]
    assert value(found, "llm_cache_savings_fraction") == tokens["cached"]["hbm"] / tokens["prompt"]


def test_opencosts_labels_are_its_own(story: str) -> None:
    found = taken(story, opencost=True)
    for metric, names in (
        ("llm_total_hourly_cost", {"cost_basis"}),
        ("llm_cost_per_million_tokens", {"cost_basis", "phase", "allocation_method"}),
        ("llm_cache_savings_fraction", set()),
    ):
        told = [one.labels for one in found.figures if one.metric == metric]
        assert {one["namespace"] for one in told} == {"one", "two"}
        for labels in told:
            assert labels.keys() == {"model_name", "model_version", "namespace", "workload_type", *names}
            assert (labels["model_name"], labels["workload_type"]) == ("llama-8b", "inference")


def test_tenants_of_a_model_are_one_to_opencost(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    abouts = {
        name: About(gpus=(uuid,), sku=SKU, labels={"namespace": "one", "tenant": tenant}, mapping="config")
        for name, uuid, tenant in ((FIRST, "GPU-a", "red"), (SECOND_ENGINE, "GPU-b", "blue"))
    }
    deployment = Deployment(path, abouts)
    engines = [FakeEngine(f"{FIRST}/0"), FakeEngine(f"{SECOND_ENGINE}/0")]
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b")]
    for number in range(4):
        for engine, gpu in zip(engines, gpus, strict=True):
            engine.serve(computed=1000, hbm=500, generated=50)
            gpu.run(20, 10)
        deployment.scrape(START + number * 20 * SECOND, engines, gpus)
    deployment.close()
    found = taken(url_of(path), opencost=True)
    hours = values(found, "cost_per_hour", window="1h", currency="USD")
    assert len(hours) == 2
    shown = value(found, "llm_total_hourly_cost", namespace="one", cost_basis="allocation")
    assert shown == pytest.approx(sum(hours.values()))
