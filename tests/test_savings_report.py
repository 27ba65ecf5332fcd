from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, new_ledger, rate, reader_of
from tests.present import present
from tests.serving import FACTS, NAME, SHAPE, Load, ServingEngine, Site
from tests.simulator.pages import START as RECORDED
from tests.simulator.pages import Recorded
from tests.simulator.scenarios import build

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.calibrating import keep
from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.savings_report import savings_report
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate
    from kvtally.agent.savings_report import Group, SavingsReport
    from kvtally.collectors.base import Reading

PAGES = Path(__file__).parent / "fixtures" / "pages"
HALF_HOUR = 1800
OTHER = "10.0.0.2:8000/0"
# 3.6 USD an hour: an engine second costs 1,000,000 nano-USD
RATES = (
    rate("gpu", "3.6", "gpu-hour", START - HOUR, sku=SKU),
    rate("dram", "0.72", "gib-hour", START - HOUR),
)
REFUSED = {"insufficient_data", "unreconciled"}
HBM_UNREAD = 'vllm:prompt_tokens_by_source_total{source="local_cache_hit"} could not be read in a part of this time'


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def asked(
    path: str, by: Sequence[str] = ("model",), window: Window | None = None, rates: Sequence[Rate] = RATES
) -> SavingsReport:
    with reader_of(path) as reader:
        return report_of(reader, by, window, rates)


def report_of(
    reader: LedgerReader, by: Sequence[str] = (), window: Window | None = None, rates: Sequence[Rate] = RATES
) -> SavingsReport:
    return savings_report(reader, window, by, RateBook([*rates]), Payment())


def only_group(report: SavingsReport) -> tuple[Group, dict[str, Any]]:
    (group,), (answer,) = report.groups, report.as_json()["groups"]
    return group, answer


def assert_nothing_shown(answer: dict[str, Any]) -> None:
    """What a refused group must not show: any second and any amount."""
    names = ("avoided_engine_seconds", "net_engine_seconds", "gross", "holding", "net", "realised", "latency_seconds")
    assert {answer[name] for name in names} == {None}
    assert {*answer["reuse_engine_seconds"].values(), *answer["reuse_cost"].values(), answer["engine_second"]} == {None}
    assert {tier[name] for tier in answer["tiers"].values() for name in ("avoided_engine_seconds", "net")} <= {None}
    assert (answer["basis"]["engine_seconds"], answer["basis"]["money"]) == (None, None)


def site(path: str, *names: str, about: About | None = None, sku: str = SKU, caches: bool = False) -> Site:
    engines = [ServingEngine(name) for name in names or (NAME,)]
    made = Site(path, engines, about={} if about is None else {NAME.partition("/")[0]: about}, sku=sku, caches=caches)
    made.scrape(made.engines)
    return made


def known(**changes: Any) -> About:
    """All that there is to know of the first engine, but for what is changed."""
    return About(**{"gpus": ("GPU-0",), "sku": SKU, "mapping": "a test", "facts": FACTS, **changes})


# -- what refuses


OTHER_SHAPE = {"shape": json.dumps({**SHAPE, "architecture": "FutureForCausalLM", "num_hidden_layers": 0})}
UNKNOWN = [
    pytest.param(known(facts={}), SKU, "the shape of model llama-8b is not known", "model_config", id="no shape"),
    pytest.param(known(facts=OTHER_SHAPE), SKU, "FutureForCausalLM", "", id="an architecture that nobody knows"),
    pytest.param(
        known(sku="NVIDIA GB999"), "NVIDIA GB999", "no datasheet row for GPU NVIDIA GB999", "issue", id="a new GPU"
    ),
    pytest.param(known(sku=""), "", "the product of GPU GPU-0 is not known", "nvidia-smi -L", id="no product"),
    pytest.param(
        About(mapping="no process of it is found here", facts=FACTS),
        SKU,
        "replica mapping unknown (no process of it is found here)",
        'in kvtally.toml, in the [[engine]] with url = "http://10.0.0.1:8000/metrics": gpus = ["GPU-…"]',
        id="no mapping",
    ),
    pytest.param(
        known(gpus=()), SKU, "nothing tells how long the engine worked", "kvtally doctor", id="no CPU seconds"
    ),
]


@pytest.mark.parametrize(("about", "sku", "reason", "hint"), UNKNOWN)
def test_a_replica_without_a_law_has_no_figure_and_a_reason(
    path: str, about: About, sku: str, reason: str, hint: str
) -> None:
    site(path, about=about, sku=sku).serve(HALF_HOUR).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    (told,) = [one for one in group.reasons if reason in one.text]
    assert hint in told.hint
    assert answer["reused_tokens"]["hbm"] > 500_000  # counted all the same


def test_without_a_gpu_sample_nothing_tells_how_long_the_engine_worked(path: str) -> None:
    site(path, about=known()).serve(HALF_HOUR, seen=()).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    assert "neither GPM nor utilization.gpu of its GPUs, nor CPU seconds" in group.reasons[0].text


def test_too_little_evidence_says_how_much_there_was(path: str) -> None:
    site(path).serve(120).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    # four scrapes of four requests with 40 output tokens each
    assert group.reasons[0].text.startswith(
        "too little was seen to learn the step law: 16 requests, 640 steps and 120 s"
    )
    assert "kvtally calibrate --probe" in group.reasons[0].hint


def test_two_engines_on_one_gpu_have_no_figure(path: str) -> None:
    made = Site(path, [ServingEngine(NAME), ServingEngine(OTHER)], about={OTHER.partition("/")[0]: known()})
    made.scrape(made.engines)
    made.serve(HALF_HOUR).close()
    report = asked(path, ["replica"])
    assert [group.status for group in report.groups] == ["insufficient_data"] * 2
    for group, other in zip(report.groups, (OTHER, NAME), strict=True):
        (reason,) = [one for one in group.reasons if "held by" in one.text]
        assert reason.text == f"GPU-0 is held by {other} too: the seconds of these engines cannot be told apart"
        assert reason.hint == "give each engine GPUs of its own"


def test_engines_that_hold_a_gpu_one_after_the_other_do_not_share_it(path: str) -> None:
    made = Site(path, [ServingEngine(NAME), ServingEngine(OTHER)], about={OTHER.partition("/")[0]: known()})
    first, second = made.engines
    made.gpus[OTHER] = made.gpus[NAME]
    made.scrape([first])
    made.serve(HALF_HOUR, only=[first])
    made.at_ns += 60 * SECOND
    made.scrape([second])
    made.serve(HALF_HOUR, only=[second]).close()
    report = asked(path, ["replica"])
    assert [(group.by["replica"], group.status) for group in report.groups] == [(NAME, "ok"), (OTHER, "ok")]


def test_an_engine_that_does_not_tell_tokens_by_source_has_no_figure(path: str) -> None:
    (page,) = (PAGES / "cpu-v012").glob("*.prom")
    pages = {f"vllm/{round(RECORDED * 1e3) + 15_000 * number}.prom": page.read_bytes() for number in range(3)}
    lines = [
        {"t": RECORDED + t, "disks": [], "processes": [{"pid": 7, "comm": "x", "start_time": 1.0, "cpu_seconds": t}]}
        for t in range(0, 46, 15)
    ]
    meta = {"name": "old", "engine": "vllm", "engine_version": "0.12.0", "gpus": [], "model": SHAPE}
    host = "".join(json.dumps(line) + "\n" for line in lines).encode()
    recorded = Recorded("old", {"meta.json": json.dumps(meta).encode(), "host.jsonl": host, **pages})
    into_ledger(recorded.open(), f"sqlite:///{path}", Config())
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    (reason,) = group.reasons
    assert reason.text == "vLLM 0.12.0 does not tell vllm:prompt_tokens_by_source_total"
    assert reason.hint == "vLLM 0.16 and later count what the savings need"
    assert answer["reused_tokens"] == {"hbm": None, "dram": None, "disk": None, "p2p": None, "external": None}


def test_what_else_fills_the_gpu_is_not_taken_for_the_engine(path: str) -> None:
    # a model of 70B by its config, and it answers ten times as fast as one could
    shape = {
        **SHAPE,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
    }
    site(path, about=known(facts={**FACTS, "shape": json.dumps(shape)})).serve(HALF_HOUR).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    (reason,) = [one for one in group.reasons if "cannot be" in one.text]
    assert "efficiency" in reason.text
    assert "kvtally doctor" in reason.hint


@pytest.mark.parametrize(
    ("connector", "load_seconds", "status"),
    [
        ("", 2.0, "insufficient_data"),
        ("HomeMadeConnector", 2.0, "insufficient_data"),
        ("LMCacheConnectorV1", 2.0, "ok"),
        ("", 0.05, "ok"),
    ],
)
def test_seconds_of_loading_need_a_connector_whose_way_is_known(
    path: str, connector: str, load_seconds: float, status: str
) -> None:
    facts = {**FACTS, "connector": connector} if connector else FACTS
    load = Load(hbm=0.4, external=0.4, load_seconds=load_seconds)
    site(path, about=known(facts=facts), caches=True).serve(HALF_HOUR, load).close()
    group, answer = only_group(asked(path))
    assert group.status == answer["status"] == status
    told = [reason for reason in group.reasons if "nothing tells whether the engine waited for it" in reason.text]
    assert len(told) == (status == "insufficient_data")
    if told:
        assert_nothing_shown(answer)
        assert told[0].text.startswith("120.0 s went into loading KV")  # 60 scrapes of two seconds
        assert 'connector = "LMCacheConnectorV1"' in told[0].hint


def test_a_window_of_few_requests_has_no_figure_though_the_law_is_known(path: str) -> None:
    site(path).serve(HALF_HOUR).close()
    short, longer = (Window(START + 600 * SECOND, START + (600 + 30 * scrapes) * SECOND) for scrapes in (4, 5))
    group, answer = only_group(asked(path, window=short))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    assert [str(reason) for reason in group.reasons] == [
        "the window holds 16 requests, a figure takes 20: ask for a longer window (--since)"
    ]
    assert only_group(asked(path, window=longer))[0].status == "ok"


@pytest.mark.parametrize(("preempted", "status"), [(1, "lower_bound"), (0, "ok")])
def test_many_preemptions_make_a_figure_a_lower_bound(path: str, preempted: int, status: str) -> None:
    site(path).serve(HALF_HOUR, Load(preempted=preempted)).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == status
    assert answer["tiers"]["hbm"]["status"] == status
    assert answer["tiers"]["hbm"]["reasons"] == [one for one in answer["reasons"] if "preemptions" in one]
    assert answer["net_engine_seconds"]["point"] > 0
    assert len([one for one in group.reasons if one.text.startswith("60 preemptions in 240 requests")]) == preempted


# -- counters that cannot be trusted


def changed(reading: Reading, name: str, value: float | None) -> Reading:
    values = list(reading.values)
    values[index("engine", name)] = value
    return reading._replace(values=tuple(values))


def test_counters_that_contradict_each_other_are_unreconciled(path: str) -> None:
    def lying(reading: Reading) -> Reading:
        return changed(reading, "hbm_tokens", round((reading.values[index("engine", "hbm_tokens")] or 0) * 1.5))

    site(path).serve(HALF_HOUR).serve(HALF_HOUR, shown=lying).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "unreconciled"
    assert_nothing_shown(answer)
    assert answer["tiers"]["hbm"]["status"] == "unreconciled"
    assert "counters do not add up" in group.reasons[0].text
    assert "kvtally ledger audit" in group.reasons[0].hint
    before = Window(START, START + HALF_HOUR * SECOND)
    assert only_group(asked(path, window=before))[0].status == "ok"


NOT_A_NUMBER = float("nan")


def test_a_counter_that_shows_no_number_any_more_leaves_no_figure(path: str) -> None:
    made = site(path).serve(HALF_HOUR)
    made.serve(HALF_HOUR, shown=lambda reading: changed(reading, "hbm_tokens", NOT_A_NUMBER)).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    assert HBM_UNREAD in group.reasons[0].text
    before = Window(START, START + HALF_HOUR * SECOND)
    assert only_group(asked(path, window=before))[0].status == "ok"


def test_not_a_number_on_a_page_is_no_number_in_an_answer(path: str) -> None:
    recorded = build("hbm_only8", 3, seconds=240).recorded()
    line = re.compile(rb'(vllm:prompt_tokens_by_source_total\{[^}]*source="local_cache_hit"[^}]*\}) \S+')
    pages = sorted(name for name in recorded.files if name.endswith(".prom"))
    spoilt = {name: line.sub(rb"\1 NaN", recorded.files[name]) for name in pages[len(pages) // 2 :]}
    assert all(body.count(b" NaN") == 1 for body in spoilt.values())
    into_ledger(recorded._replace(files={**recorded.files, **spoilt}).open(), f"sqlite:///{path}", Config())
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    assert HBM_UNREAD in group.reasons[0].text
    assert "NaN" not in json.dumps(answer)


def test_a_counter_that_shows_no_number_for_a_moment_has_counted_meanwhile(path: str) -> None:
    made = site(path).serve(900)
    made.serve(60, shown=lambda reading: changed(reading, "hbm_tokens", NOT_A_NUMBER))
    made.serve(900).close()
    group, answer = only_group(asked(path))
    (engine,) = made.engines
    assert answer["status"] == "ok"
    assert answer["reused_tokens"]["hbm"] == engine.counts["hbm_tokens"]
    assert group.seconds is not None
    assert group.seconds.tiers["hbm"].tokens == engine.counts["hbm_tokens"]
    assert group.seconds.avoided.holds(engine.avoided)


def test_a_counter_that_shows_no_number_for_long_leaves_no_figure_though_it_comes_back(path: str) -> None:
    made = site(path).serve(900)
    made.serve(120, shown=lambda reading: changed(reading, "hbm_tokens", NOT_A_NUMBER))
    made.serve(900).close()
    group, answer = only_group(asked(path))
    # what the requests of 120 s reused is in one interval of 30 s: no window can hold both
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    assert HBM_UNREAD in group.reasons[0].text


def test_a_counter_that_began_anew_while_it_showed_no_number_leaves_no_figure(path: str) -> None:
    made = site(path).serve(900)
    made.serve(300, shown=lambda reading: changed(reading, "hbm_tokens", NOT_A_NUMBER))
    made.engines[0].restart((made.at_ns + 5 * SECOND) / 1e9)
    made.serve(900).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert HBM_UNREAD in group.reasons[0].text


def test_of_an_hour_whose_reuse_is_not_known_all_prompts_may_have_been_reused(path: str) -> None:
    made = site(path, NAME, OTHER)
    silent = made.engines[1].name

    def quiet(reading: Reading) -> Reading:
        return changed(reading, "hbm_tokens", NOT_A_NUMBER) if reading.name == silent else reading

    made.serve(HALF_HOUR, shown=quiet).close()
    group, answer = only_group(asked(path))
    assert answer["status"] == "insufficient_data"
    assert_nothing_shown(answer)
    first, second = (engine.counts for engine in made.engines)
    share = second["prompt_tokens"] / (second["prompt_tokens"] + first["hbm_tokens"])
    assert f"{share:.0%} of the reused tokens lie in hours without a figure" in [one.text for one in group.reasons]
    statuses = {one.by["replica"]: one.status for one in asked(path, ["replica"]).groups}
    assert statuses == {NAME: "ok", OTHER: "insufficient_data"}


# -- money


def test_the_parts_of_the_money_add_up_to_the_nano_unit(path: str) -> None:
    about = known(facts={**FACTS, "connector": "LMCacheConnectorV1"}, dram_gib="100")
    load = Load(hbm=0.4, external=0.4, load_seconds=0.05, store_seconds=0.02)
    site(path, about=about, caches=True).serve(HALF_HOUR, load).close()
    group, answer = only_group(asked(path))
    money, seconds = group.money, group.seconds
    assert money is not None
    assert seconds is not None
    # 3.6 USD an hour; 100 GiB x 0.72 USD x half an hour
    assert money.rate_nano == 1_000_000
    assert money.holding == 36_000_000_000
    assert money.gross.point == present(money.net).point + present(money.stall) + present(money.store) + money.holding
    assert money.gross.point == round(Fraction(seconds.avoided.point) * 1_000_000)
    assert (present(money.stall), present(money.store)) == (
        round(present(seconds.stall).point * 1e6),
        round(present(seconds.store).point * 1e6),
    )
    assert present(seconds.stall).point == pytest.approx(60 * 0.05)
    assert present(seconds.store).point == pytest.approx(60 * 0.02)
    tiers = money.tiers.values()
    assert sum(tier.gross.point for tier in tiers) == money.gross.point
    assert sum(present(tier.net).point for tier in tiers) == present(money.net).point
    assert answer["holding"] == "36.000000000"


def test_without_a_price_the_seconds_are_shown_and_the_money_is_not(path: str) -> None:
    site(path).serve(HALF_HOUR).close()
    late = rate("gpu", "3.6", "gpu-hour", START + 600 * SECOND, sku=SKU)
    group, answer = only_group(asked(path, rates=[late]))
    assert answer["status"] == "ok"
    assert answer["net_engine_seconds"]["point"] > 0
    names = ("gross", "holding", "net", "realised", "engine_second")
    assert {answer[name] for name in names} == {None}
    assert answer["tiers"]["hbm"]["net"] is None
    assert (answer["basis"]["engine_seconds"], answer["basis"]["money"]) == ("MODELLED", None)
    assert "seconds are shown, money is not: no rate for NVIDIA H100 80GB HBM3" in group.reasons[-1].text


def test_reuse_that_costs_more_than_it_saves_has_a_negative_net(path: str) -> None:
    facts = {**FACTS, "connector": "LMCacheConnectorV1"}
    load = Load(hbm=0.0, external=0.2, load_seconds=0.5, store_seconds=3.0)
    site(path, about=known(facts=facts), caches=True).serve(HALF_HOUR, load).close()
    group, answer = only_group(asked(path))
    assert group.seconds is not None
    assert group.money is not None
    assert group.seconds.avoided.point > 0
    assert present(group.seconds.net).high < 0
    assert present(group.money.net).point < 0
    assert answer["status"] == "ok"  # it is proven, to be a loss
    assert answer["net"]["point"].startswith("-")
    assert answer["reasons"][0].startswith("loading and storing took more of the engine than reuse avoided")


def test_without_hits_nothing_was_saved_and_what_holds_the_cache_is_charged(path: str) -> None:
    site(path, about=known(dram_gib="100")).serve(HALF_HOUR, Load(hbm=0.0)).close()
    _, answer = only_group(asked(path))
    nothing = {"low": 0.0, "point": 0.0, "high": 0.0}
    assert answer["status"] == "ok"
    assert answer["avoided_engine_seconds"] == answer["net_engine_seconds"] == nothing
    assert answer["gross"] == {"low": "0.000000000", "point": "0.000000000", "high": "0.000000000"}
    assert answer["holding"] == "36.000000000"
    assert answer["net"] == {"low": "-36.000000000", "point": "-36.000000000", "high": "-36.000000000"}
    assert answer["reasons"] == ["nothing was reused, and what is held is charged all the same"]
    assert answer["tiers"]["dram"]["reasons"] == ["it served nothing, and what is held for it is charged all the same"]


@pytest.mark.parametrize(("times", "status"), [(0.5, "ok"), (1.0, "not_proven"), (2.0, "ok")])
def test_what_is_held_counts_in_whether_a_net_is_proven(path: str, times: float, status: str) -> None:
    site(path, about=known(dram_gib="1")).serve(HALF_HOUR).close()
    gross = present(only_group(asked(path))[0].money).gross.point
    # a GiB for half an hour: so many times what reuse saved
    held = rate("dram", f"{2 * times * gross / 1e9:.9f}", "gib-hour", START - HOUR)
    _, answer = only_group(asked(path, rates=[RATES[0], held]))
    low, high = Decimal(answer["net"]["low"]), Decimal(answer["net"]["high"])
    assert answer["status"] == status
    assert (low <= 0 <= high) == (status == "not_proven")
    assert answer["net_engine_seconds"]["low"] > 0
    told = [reason for reason in answer["reasons"] if "what is held costs" in reason]
    assert len(told) == (times >= 1)
    assert answer["tiers"]["hbm"]["status"] == "ok"


def test_only_what_was_saved_while_capacity_was_short_is_realised(path: str) -> None:
    made = site(path, about=known(dram_gib="1"))
    made.serve(900, Load(starved=True)).serve(900).close()
    half = only_group(asked(path))[0]
    assert half.money is not None
    assert half.seconds is not None
    assert half.money.realised is not None
    assert half.seconds.capacity_bound_share == pytest.approx(0.5, abs=0.02)
    assert half.money.realised.point == pytest.approx(half.money.gross.point / 2 - half.money.holding, rel=0.1)
    short = only_group(asked(path, window=Window(START, START + 840 * SECOND)))[0].money
    calm = only_group(asked(path, window=Window(START + 930 * SECOND, START + 1800 * SECOND)))[0].money
    assert short is not None
    assert calm is not None
    assert short.realised == short.net
    assert calm.realised is not None
    assert calm.realised.point == -calm.holding


def test_time_that_no_interval_covers_does_not_make_an_engine_second_cheaper(path: str) -> None:
    made = site(path)
    made.serve(900)
    versions = made.engines[0].attributes
    made.engines[0].attributes = {**versions, "version": "0.25.2"}
    made.serve(900)
    made.engines[0].attributes = versions  # rolled back: intervals of this target lie on either side of the other's
    made.serve(900).close()
    report = asked(path, ["replica"])
    group, _ = only_group(report)
    assert group.money is not None
    assert group.money.rate_nano == 1_000_000


# -- groups


def totals(group: Group) -> tuple[int, int, int]:
    """Tokens by tier, and holding, of a group."""
    tokens = [sum(one.work[f"{name}_tokens"] or 0 for one in group.facts) for name in ("hbm", "external")]
    assert group.money is not None
    return tokens[0], tokens[1], group.money.holding


def test_groups_of_any_kind_add_up_to_the_whole(path: str) -> None:
    about = {
        NAME.partition("/")[0]: known(labels={"tenant": "one"}, dram_gib="8"),
        OTHER.partition("/")[0]: known(gpus=("GPU-1",), labels={"tenant": "two"}),
    }
    made = Site(path, [ServingEngine(NAME), ServingEngine(OTHER)], about=about)
    made.scrape(made.engines)
    made.serve(5400).serve(1800, only=made.engines[:1]).close()
    with reader_of(path) as reader:
        keep(reader, START + 2 * HOUR, reader.targets())
    whole = asked(path, []).groups[0]
    assert whole.seconds is not None
    assert whole.money is not None
    assert whole.status == "ok"
    for by, count in (
        (["model"], 1),
        (["replica"], 2),
        (["hour"], 2),
        (["day"], 1),
        (["replica", "hour"], 4),
        (["tenant"], 2),
    ):
        groups = asked(path, by).groups
        assert len(groups) == count
        for place in range(3):
            assert sum(totals(group)[place] for group in groups) == totals(whole)[place]
        seconds = [group.seconds for group in groups if group.seconds is not None]
        assert sum(one.avoided.point for one in seconds) == pytest.approx(whole.seconds.avoided.point, rel=1e-12)
        assert sum(present(one.latency) for one in seconds) == present(whole.seconds.latency)
        moneys = [group.money for group in groups if group.money is not None]
        assert len(moneys) == len(seconds) == count
        # each group rounds its own amount once
        assert abs(sum(one.gross.point for one in moneys) - whole.money.gross.point) <= count
        assert abs(sum(present(one.net).point for one in moneys) - present(whole.money.net).point) <= 2 * count


def test_a_group_of_several_prices_pays_each_second_its_own(path: str) -> None:
    made = site(path)
    made.serve(7200).close()
    rates = [
        RATES[0]._replace(valid_until_ns=START + HOUR),
        rate("gpu", "36", "gpu-hour", START + HOUR, sku=SKU),
    ]
    first, second = asked(path, ["hour"], rates=rates).groups
    whole = asked(path, [], rates=rates).groups[0]
    assert first.money is not None
    assert second.money is not None
    assert whole.money is not None
    assert [one.rate_nano for one in (first.money, second.money)] == [1_000_000, 10_000_000]
    assert abs(first.money.gross.point + second.money.gross.point - whole.money.gross.point) <= 2


def test_a_ledger_without_an_interval_has_no_group(path: str) -> None:
    report = asked(path)
    assert (report.window, report.groups) == (None, ())
    assert report.as_json()["method"]["rung"] is None


def test_an_idle_window_saved_nothing(path: str) -> None:
    made = site(path).serve(HALF_HOUR)
    made.serve(600, Load(requests=0)).close()
    idle = Window(START + (HALF_HOUR + 30) * SECOND, START + (HALF_HOUR + 600) * SECOND)
    group, answer = only_group(asked(path, window=idle))
    assert group.status == "ok"
    assert answer["avoided_engine_seconds"] == {"low": 0.0, "point": 0.0, "high": 0.0}
    assert answer["reused_tokens"]["hbm"] == 0
