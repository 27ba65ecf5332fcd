from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from tests.simulator import traces
from tests.simulator.blocks import BlockPool, Tier
from tests.simulator.engine import Engine
from tests.simulator.laws import H100, LLAMA_8B, OUTSIDE, Batch, Device, Law, Parameters, Shape
from tests.simulator.pages import START, Recorded, View, page_bodies, record, worked_seconds
from tests.simulator.scenarios import NAMES, build
from tests.simulator.story import Config, Run
from tests.simulator.traces import SYSTEM, Request, Trace
from tests.simulator.truth import prefill_seconds, probes, truth_of, without_caches

from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config as Settings
from kvtally.collectors.exposition import PageReader
from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.vllm import VllmMapping

FIXTURES = Path(__file__).parent / "fixtures" / "pages"
LAW = Law(LLAMA_8B, H100, Parameters())
LMCACHE = Config(connector="LMCacheConnectorV1", dram_tokens=100_000, kv_tokens=30_000)
OFFLOADING = LMCACHE._replace(connector="OffloadingConnector", sync_loads=False, store_share=0.0)


def served(config: Config, *requests: Request, concurrency: int | None = None) -> Run:
    return Engine(config, LAW, Trace(requests, concurrency)).run()


def cold(arrival: float, prompt: int, output: int, path: int) -> Request:
    return Request(arrival, prompt, output, ((path, prompt + output),))


def values(body: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    layout, numbers = PageReader(lambda _: True).read(body)
    return {
        (one.name, tuple(sorted(one.labels.items()))): value for one, value in zip(layout.series, numbers, strict=True)
    }


def total(body: bytes, name: str, **labels: str) -> float:
    return sum(
        value for (found, has), value in values(body).items() if found == name and labels.items() <= dict(has).items()
    )


def last_page(run: Run, config: Config) -> bytes:
    return page_bodies(run, config, LAW, View(), np.array([run.end + 30.0]))[0]


# -- the law


def test_a_step_of_the_family_is_worked_out_by_hand() -> None:
    # 2 x (1000 x (2 x 10 + 2 x 5) x 100 + 3 x 1000 x 3000) = 24e6 weights; 8000 FLOP a product; 4000 B of KV a token
    shape = Shape("round", 2, 1000, 3000, 10, 5, 100, 12_000)
    device = Device("round", 1e12, 1e10)
    law = Law(shape, device, Parameters(0.5, 0.25, 0.8, 0.5, 1e-3, 2e-3, 3e-3, 2.0, 0.0, 0.8))
    # compute 2 x 24e6 x 100 / (1e12 x 0.5 x 0.8) = 12 ms; weights 2 x 36e6 / (1e10 x 0.8) = 9 ms: together 15 ms
    # attention 8000 x 25,000 / (1e12 x 0.25 x 0.8) = 1 ms; KV 4000 x 10,000 / (1e10 x 0.5) = 8 ms; 1 ms a step
    time = law.step(Batch(100, 80, 25_000, 10_000, 21))
    assert time.gpu == pytest.approx(0.025)
    assert time.wall == pytest.approx(0.027)


def test_a_small_step_with_prefill_takes_at_least_its_launches() -> None:
    decodes, prefill = LAW.step(Batch(1, 0, 0, 0, 1)), LAW.step(Batch(1, 1, 1, 0, 1))
    assert decodes.wall == pytest.approx(decodes.gpu + 1e-3)
    law = Law(LLAMA_8B, H100, Parameters(launch_seconds=0.5))
    assert law.step(Batch(1, 1, 1, 0, 1)).wall == pytest.approx(0.501)
    assert law.step(Batch(1, 1, 1, 0, 1)).gpu == pytest.approx(prefill.gpu)


@pytest.mark.parametrize("name", OUTSIDE)
def test_laws_outside_the_family_differ_from_it(name: str) -> None:
    batch = Batch(4100, 4000, 4000 * 50_000, 100_000, 101, heat=0.6)
    law = Law(LLAMA_8B, H100, Parameters(), OUTSIDE[name])
    differs = abs(law.step(batch).gpu / LAW.step(batch).gpu - 1) > 1e-3
    assert differs or law.departures.jitter  # chance is the engine's
    steps = [Engine(LMCACHE, one, traces.singles((9000,), 1.0)).run().column("gpu").sum() for one in (LAW, law)]
    assert steps[0] != steps[1]


# -- caches


def test_a_block_that_two_requests_hold_is_counted_once_and_stays_when_one_goes() -> None:
    pool = BlockPool(100, 10, caches=True)
    pool.admit([1, 2, 3], 0, 35)
    held = pool.publish([1, 2, 3], 0, 3)
    assert (held, pool.used_tokens) == (3, 35)
    assert pool.found([1, 2, 3, 4], 4) == 3
    pool.admit([1, 2, 3], 3, 40)
    assert pool.used_tokens == 45
    pool.release([1, 2, 3], 3, 3, 40)
    assert pool.used_tokens == 35
    pool.release([1, 2, 3], 3, 3, 35)
    assert (pool.used_tokens, pool.found([1, 2, 3], 3)) == (0, 3)
    pool.admit([], 0, 81)  # leaves room for one idle block: a prefix's tail goes first
    assert pool.found([1, 2, 3], 3) == 1


def test_a_tier_lets_go_of_what_was_not_used_for_longest() -> None:
    tier = Tier(2)
    assert [tier.touch(key) for key in (1, 2, 1, 3)] == [True, True, False, True]
    assert [key in tier for key in (1, 2, 3)] == [True, False, True]


def test_requests_share_the_keys_of_what_they_share() -> None:
    first = Request(0, 100, 30, ((SYSTEM, 33), (7, 75), (8, 130)))
    second = Request(0, 90, 5, ((SYSTEM, 33), (7, 75), (9, 95)))
    keys, others = first.keys(10), second.keys(10)
    assert (len(keys), len(others)) == (13, 9)
    assert [one == other for one, other in zip(keys, others, strict=False)] == [True] * 7 + [False] * 2


@pytest.mark.parametrize(("config", "cached"), [(LMCACHE._replace(connector=""), 4096 - 32), (LMCACHE, 4095)])
def test_at_least_one_prompt_token_is_computed(config: Config, cached: int) -> None:
    run = served(config, cold(0, 4096, 1, 1), cold(5, 4096, 1, 1))
    assert [one.cached for one in run.served] == [0, cached]


def test_what_left_the_engine_is_loaded_from_dram_and_then_from_disk() -> None:
    config = LMCACHE._replace(kv_tokens=9000, dram_tokens=10_240, disk_tokens=100_000)
    prompts = (cold(0, 4096, 1, 1), cold(5, 8192, 1, 2), cold(10, 4096, 1, 1), cold(15, 8192, 1, 2))
    run = served(config, *prompts)
    assert [(one.hbm, one.dram, one.disk) for one in run.served] == [
        (0, 0, 0),
        (0, 0, 0),
        # the second left room for 25 blocks in HBM and for 24 chunks in DRAM: the first's last 8, less one token
        (800, 2047, 1248),
        # of the second HBM kept 153 blocks beside the first's 4097 tokens, and DRAM had what was missing
        (4896, 3295, 0),
    ]


# -- steps


def test_a_step_without_output_is_not_observed() -> None:
    run = served(Config(), cold(0, 20_000, 4, 1))
    assert [(step.prefill, step.decodes, step.output_tokens) for step in run.steps] == [
        (8192, 0, 0),
        (8192, 0, 0),
        (3616, 0, 20_001),
        (0, 1, 1),
        (0, 1, 1),
        (0, 1, 1),
    ]
    page = last_page(run, Config())
    assert total(page, "vllm:iteration_tokens_total_count") == 4
    assert total(page, "vllm:iteration_tokens_total_sum") == 20_004
    assert total(page, "vllm:iteration_tokens_total_bucket", le="1.0") == 3
    assert total(page, "vllm:generation_tokens_total") == 4


def test_decodes_go_first_and_leave_the_rest_of_the_budget_to_prefill() -> None:
    run = served(Config(token_budget=1000), cold(0, 500, 50, 1), cold(0.02, 2500, 2, 2))
    mixed = [(step.decodes, step.prefill) for step in run.steps if step.prefill]
    assert mixed == [(0, 500), (1, 999), (1, 999), (1, 502)]


def test_prefill_is_worth_what_it_adds_to_the_step() -> None:
    run = served(Config(), cold(0, 500, 50, 1), cold(0.02, 2500, 2, 2))
    alone, mixed = (step for step in run.steps if step.prefill)
    assert alone.marginal == pytest.approx(LAW.step(Batch(500, 500, 125_000, 0, 1)).wall)
    context = 500 + run.steps.index(mixed)
    decode = LAW.step(Batch(1, 0, 0, context, 1)).wall
    both = LAW.step(Batch(2501, 2500, 2500 * 1250, context, 2)).wall
    assert mixed.marginal == pytest.approx(both - decode)
    assert prefill_seconds(run) == pytest.approx(alone.marginal + mixed.marginal)


@pytest.mark.parametrize("config", [LMCACHE, OFFLOADING])
def test_a_synchronous_load_stalls_everyone_and_an_asynchronous_one_nobody_else(config: Config) -> None:
    evicting = cold(1, 29_500, 1, 2)
    run = served(config._replace(dram_bytes_per_second=2e9), cold(0, 8000, 1, 1), evicting, cold(4, 300, 400, 3),
                 cold(4.5, 8000, 1, 1))  # fmt: skip
    again = run.served[-1] if run.served[-1].number == 3 else run.served[-2]
    assert again.dram > 7000
    (load,) = run.loads
    assert load.seconds > 0.4
    stalls = [step.stall for step in run.steps if step.stall]
    during = [step for step in run.steps if load.at - load.seconds < step.end <= load.at and step.decodes]
    if config.sync_loads:
        assert stalls == [load.seconds]
        assert not during
        assert again.first - again.scheduled > load.seconds
    else:
        assert not stalls
        assert len(during) > 20
        assert any(step.deferred for step in during)
        assert sum(step.stored for step in run.steps) == 0.0


def test_a_store_is_waited_for_as_far_as_the_configuration_says() -> None:
    for share in (0.0, 0.25, 1.0):
        run = served(LMCACHE._replace(store_share=share), cold(0, 8192, 1, 1))
        (store,) = run.stores
        assert store.tokens == 8192
        assert store.seconds == pytest.approx(8192 * 131_072 / 40e9)
        assert run.steps[0].stored == pytest.approx(share * store.seconds)


def test_what_preemption_computes_anew_is_in_no_prompt_counter() -> None:
    config = Config(kv_tokens=3000, hbm_cache=False)
    run = served(config, *(cold(0.01 * number, 800, 400, 1 + number) for number in range(3)))
    assert len(run.preempted) > 0
    first, *_, last = sorted(run.served)
    assert (first.preemptions, last.preemptions) == (0, len(run.preempted))  # the last one in is the first one out
    assert sum(step.prefill for step in run.steps) > 2400 + 800 * len(run.preempted)
    page = last_page(run, config)
    assert total(page, "vllm:prompt_tokens_total") == 2400
    assert total(page, "vllm:prompt_tokens_by_source_total") == 2400
    assert total(page, "vllm:request_prefill_kv_computed_tokens_sum") == 2400
    assert total(page, "vllm:num_preemptions_total") == len(run.preempted)
    assert total(page, "vllm:generation_tokens_total") == 1200
    assert total(page, "vllm:inter_token_latency_seconds_count") == 1200 - 3
    gaps = sum(one.end - one.first for one in run.served)
    assert total(page, "vllm:inter_token_latency_seconds_sum") == pytest.approx(gaps)


def test_an_aborted_request_is_counted_only_as_far_as_it_came() -> None:
    leaving = (cold(0, 1000, 500, 1)._replace(abort=1.0), cold(2, 20_000, 5, 2)._replace(abort=0.01))
    run = served(Config(), *leaving, cold(4, 300, 20, 3))
    early, never, whole = run.served
    assert (early.aborted, never.aborted, whole.aborted) == (True, True, False)
    assert 50 < early.generated < 500
    page = last_page(run, Config())
    assert total(page, "vllm:prompt_tokens_total") == 1300
    assert total(page, "vllm:generation_tokens_total") == early.generated + 20
    assert total(page, "vllm:request_success_total") == 1
    assert total(page, "vllm:time_to_first_token_seconds_count") == 2
    assert total(page, "vllm:num_requests_running") == 0
    assert run.steps[-1].kv_used == 0


def test_in_a_closed_loop_the_next_request_comes_when_one_has_ended() -> None:
    run = served(Config(), *(cold(0, 1000, 10, 1 + number) for number in range(5)), concurrency=2)
    ends = sorted(one.end for one in run.served)
    assert [one.arrival for one in sorted(run.served)] == [0, 0, *ends[:3]]


def test_a_turn_comes_after_the_one_before_has_ended() -> None:
    turns = Request(0, 100, 200, ((1, 300),)), Request(2.5, 400, 5, ((1, 405),), after=0)
    first, second = served(Config(), *turns).served
    assert second.arrival == first.end + 2.5
    assert second.hbm == 288  # whole blocks of what it and its answer were


# -- pages


def test_gauges_keep_what_the_last_step_with_output_left() -> None:
    run = served(Config(), cold(0, 20_000, 1, 1))
    middle = (run.steps[0].start + run.steps[2].end) / 2
    during, after = page_bodies(run, Config(), LAW, View(), np.array([middle, run.end]))
    assert total(during, "vllm:num_requests_running") == 0
    assert worked_seconds(run, np.array([middle]))[0] > 0.1
    assert total(after, "vllm:prompt_tokens_total") == 20_000


def read_series(body: bytes) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
    mappings = (VllmMapping(), LmcacheMapping())
    layout, _ = PageReader(lambda name: any(one.wants(name) for one in mappings)).read(body)
    unlike = {"model_name", "served_model_name"}
    return {
        (one.name, tuple(sorted(pair for pair in one.labels.items() if pair[0] not in unlike)))
        for one in layout.series
        if one.name not in {"vllm:cache_config_info", "vllm:prompt_tokens_created"}
    }


@pytest.mark.parametrize(
    ("config", "fixture", "longest"), [(LMCACHE, "h100-v025-lmcache", 32_768), (Config(), "cpu-v032", 4096)]
)
def test_pages_hold_the_series_of_real_ones(config: Config, fixture: str, longest: int) -> None:
    (real,) = (FIXTURES / fixture).glob("*.prom")
    run = served(config, cold(0, 1000, 10, 1))
    view = View(longest_context=longest)
    assert read_series(page_bodies(run, config, LAW, view, np.array([1.0]))[0]) == read_series(real.read_bytes())


def test_lmcache_tells_at_its_flushes_only() -> None:
    run = served(LMCACHE, *(cold(number / 2, 600, 1, 1 + number) for number in range(40)))
    instants = np.arange(0.0, 31.0)
    pages = page_bodies(run, LMCACHE, LAW, View(), instants)
    told = [total(page, "lmcache:num_stored_tokens_total") for page in pages]
    assert [at for at in range(1, len(told)) if told[at] != told[at - 1]] == [4, 14, 24]
    assert told[-1] == 40 * 512


def test_gpu_samples_hold_the_seconds_that_the_gpu_worked() -> None:
    scenario = build("mixed8", 1, seconds=20)
    run = scenario.run()
    lines = [json.loads(line) for line in scenario.recorded(run).files["gpu.jsonl"].splitlines()]
    times = [line["t"] for line in lines]
    shares = [line["gpus"][0]["gpm"]["graphics_util"] / 100 for line in lines]
    assert sum(share * 1.0 for share in shares) == pytest.approx(run.column("gpu").sum(), abs=1e-3)
    assert set(np.round(np.diff(times), 3)) == {1.0}
    assert max(shares) <= 1.0
    assert times[0] < START < times[-1] - run.end + 2


SMALL = {"rag70_async": 60, "slow8": 60, "preempt8": 40, "impatient8": 30, "cpu": 60}


@pytest.mark.parametrize("name", SMALL)
def test_a_replay_of_the_pages_finds_exactly_the_tokens_that_were_served(name: str, tmp_path: Path) -> None:
    scenario = build(name, 2, seconds=SMALL[name])
    run = scenario.run()
    truth = truth_of(scenario, run)
    recorded = scenario.recorded(run)
    assert_pages_hold(recorded)
    done = into_ledger(recorded.open(), f"sqlite:///{tmp_path}/ledger.db", Settings())
    assert not [finding for finding in done.findings if finding.severity != "info"]
    columns = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens", "generated_tokens", "steps")
    with closing(sqlite3.connect(tmp_path / "ledger.db")) as ledger:
        sums = ", ".join(f"sum({column})" for column in (*columns, "preemptions"))
        found = ledger.execute(f"SELECT {sums} FROM engine_interval").fetchone()
        load_ns = ledger.execute("SELECT sum(load_ns) FROM cache_interval").fetchone()[0]
    outer = truth.dram_tokens + truth.disk_tokens
    steps = sum(step.output_tokens > 0 for step in run.steps)
    tokens = (truth.prompt_tokens, truth.computed_tokens, truth.hbm_tokens, outer, truth.generated_tokens)
    assert found == (*tokens, steps, truth.preemptions)
    assert truth.prompt_tokens == truth.computed_tokens + truth.hbm_tokens + outer
    if scenario.config.connector:
        assert load_ns == pytest.approx(truth.load_seconds * 1e9, abs=2)
    else:
        assert load_ns is None


def assert_pages_hold(recorded: Recorded) -> None:
    """Assert that no counter goes back, and that prompt tokens by source are all prompt tokens on every page."""
    before: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for name, body in recorded.files.items():
        if name.endswith(".prom"):
            page = values(body)
            counters = {
                key: value for key, value in page.items() if key[0].endswith(("_total", "_sum", "_count", "_bucket"))
            }
            assert all(value >= before.get(key, 0.0) for key, value in counters.items())
            before = counters
            by_source = sum(value for key, value in page.items() if key[0] == "vllm:prompt_tokens_by_source_total")
            (prompts,) = (value for key, value in page.items() if key[0] == "vllm:prompt_tokens_total")
            assert by_source == prompts
    assert before


def test_a_folder_holds_what_is_in_memory(tmp_path: Path) -> None:
    run = served(LMCACHE, cold(0, 1000, 3, 1))
    recorded = record("one", run, LMCACHE, LAW)
    folder = recorded.write(tmp_path / "one")
    found = {str(place.relative_to(folder)): place.read_bytes() for place in folder.rglob("*") if place.is_file()}
    assert found == recorded.files
    assert recorded.open().page_count == len(list((folder / "vllm").iterdir()))


# -- truth


def test_without_hits_nothing_was_saved() -> None:
    truth = truth_of(build("misses8", 1, seconds=30))
    assert (truth.gross_all, truth.gross_outer, truth.makespan_all) == (0.0, 0.0, 0.0)
    scenario = build("rag70", 1, seconds=30)
    off = truth_of(scenario._replace(config=without_caches(scenario.config)))
    assert off.prefill_seconds > 0
    assert (off.gross_all, off.gross_outer, off.hbm_tokens, off.dram_tokens) == (0.0, 0.0, 0, 0)


def test_hbm_alone_leaves_nothing_to_outer_tiers() -> None:
    truth = truth_of(build("hbm_only8", 1, seconds=60))
    assert truth.gross_all > 0
    assert truth.gross_outer == 0.0


@pytest.mark.parametrize("law", ["family", "joint", "additive"])
def test_of_a_backlog_the_makespan_says_what_marginal_seconds_say(law: str) -> None:
    scenario = build("backlog8", 3, law, seconds=150)
    truth = truth_of(scenario)
    assert truth.gross_all > 20
    assert truth.makespan_all == pytest.approx(truth.net_all, rel=0.06)


def test_marginal_seconds_are_what_the_formula_of_the_method_gives_for_the_mean_batch() -> None:
    scenario = build("hbm_only8", 1, seconds=120)
    law = scenario.law
    for config in (scenario.config, without_caches(scenario.config)):
        run = Engine(config, law, scenario.trace).run()
        busy = run.column("decodes")[run.column("prefill") > 0]
        share, decodes = float(np.mean(busy > 0)), round(float(busy[busy > 0].mean()))
        context = decodes * round(float(np.mean([one.prompt + one.generated / 2 for one in run.served])))
        total = 0.0
        for one in run.served:
            for done in range(one.cached, one.prompt, 8192):
                size = min(8192, one.prompt - done)
                products = size * (done + size / 2)
                mixed = law.step(Batch(decodes + size, size, products, context, decodes + 1)).wall
                total += share * (mixed - law.step(Batch(decodes, 0, 0, context, decodes)).wall)
                total += (1 - share) * law.step(Batch(size, size, products, 0, 1)).wall
        assert prefill_seconds(run) == pytest.approx(total, rel=0.03)


def test_slow_storage_can_cost_more_than_it_saves() -> None:
    truth = truth_of(build("slow8", 1, seconds=200))
    assert truth.gross_outer > 0
    assert truth.net_outer < 0


def test_a_probe_reads_the_law_on_an_idle_engine() -> None:
    (short, seconds), (longer, more) = probes(LMCACHE, LAW, traces.singles((512, 16_384), 60.0), 0)
    assert (short, longer) == (512, 16_384)
    assert seconds == pytest.approx(LAW.step(Batch(512, 512, 512 * 256, 0, 1)).wall + 3e-3)
    halves = [LAW.step(Batch(8192, 8192, 8192 * middle, 0, 1)).wall for middle in (4096, 12_288)]
    assert more == pytest.approx(sum(halves) + 3e-3)


def test_probes_lie_beside_a_recording_where_they_are_asked_for() -> None:
    scenario = build("chat8", 1, seconds=5)
    run = scenario.run()
    assert "probes.jsonl" not in scenario.recorded(run).files
    lines = scenario.recorded(run, probed=True).files["probes.jsonl"].splitlines()
    assert [json.loads(line)["prompt_tokens"] for line in lines] == [512, 1024, 2048, 4096, 8192, 16_384, 32_768]


def test_the_same_seed_gives_the_same_recording_and_another_one_another() -> None:
    first, again, other = (build("chat8", seed, "stress", seconds=20).recorded() for seed in (1, 1, 2))
    assert first.files == again.files
    assert first.files["requests.jsonl"] != other.files["requests.jsonl"]


@pytest.mark.parametrize("name", NAMES)
def test_every_scenario_serves_all_of_its_requests(name: str) -> None:
    for law in ("family", "stress"):
        scenario = build(name, 1, law, seconds=12, mfu=True)
        run = scenario.run()
        assert sorted(one.number for one in run.served) == [*range(len(scenario.trace.requests))]
        assert "--enable-mfu-metrics" in json.loads(scenario.recorded(run).files["meta.json"])["engine_args"]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="never fits"):
        served(Config(kv_tokens=1000), cold(0, 990, 1, 1))
