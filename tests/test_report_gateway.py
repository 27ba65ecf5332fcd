from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.ledger.gateways import running, watched
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.settlement import settle
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.agent.finding import Finding

P, D = "10.0.0.1:8000", "10.0.0.2:8000"
BOOK = RateBook([rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU)])


class Engine(FakeEngine):
    """An engine that computes 1000 prompt tokens and generates 200 between two scrapes, with some requests at each."""

    def __init__(self, name: str = P, model: str = "llama-8b", in_hand: int = 0) -> None:
        super().__init__(f"{name}/0")
        self.attributes = {**self.attributes, "model": model}
        self.counts["running_requests"] = float(in_hand)

    def pass_time(self) -> None:
        self.serve(computed=1000, generated=200)


class Gateway:
    """A gateway of one model that tells so many tokens of ten requests between two scrapes."""

    def __init__(self, told: int = 1000, output: int = 200, model: str = "llama-8b", page: str = "epp:9090") -> None:
        self.name = f"{page}/llm-d/{model}"
        self.attributes = {"source": "llm-d", "model": model}
        self.counts = dict.fromkeys((quantity.name for quantity in QUANTITIES["gateway"]), 0.0)
        self.each = {"requests": 10, "input_tokens": told, "output_tokens": output}

    def pass_time(self) -> None:
        for name, more in self.each.items():
            self.counts[name] += more

    def reading(self) -> Reading:
        return Reading("gateway", self.name, self.attributes, tuple(self.counts.values()))


class Partly(Gateway):
    """A gateway whose page is scraped in some of the ticks only; what it counts before the first is in no interval."""

    def __init__(self, ticks: range, told: int = 1000) -> None:
        super().__init__(told)
        self.ticks, self.tick = ticks, 0

    def pass_time(self) -> None:
        super().pass_time()
        self.tick += 1


def found(
    folder: Path,
    targets: Sequence[Engine | Gateway],
    *,
    ticks: int = 11,
    every: int = 20,
    window: Window | None = None,
    roles: tuple[str, str] = ("", ""),
    apart_ns: int = 5_000_000,
    pruned: bool = False,
) -> list[Finding]:
    """What the cost report says of the gateway; the targets of a tick are scraped a moment after one another."""
    path = new_ledger(folder)
    abouts = {
        name: About(gpus=(f"GPU-{role}-{name}",), sku=SKU, role=role) for name, role in zip((P, D), roles, strict=True)
    }
    deployment = Deployment(path, abouts, interval_seconds=every)
    for tick in range(ticks):
        for one in targets if tick else ():
            one.pass_time()
        seen = [one for one in targets if not isinstance(one, Partly) or one.tick in one.ticks]
        deployment.scrape(START + tick * every * SECOND, seen, apart_ns=apart_ns)  # type: ignore[arg-type]  # a gateway reads as an engine does
    deployment.close()
    with closing(reader_of(path)) as reader:
        if pruned:
            reader.add_rates(BOOK.rates)
            for hour_ns in range(START, START + 3 * HOUR, HOUR):
                settle(reader, hour_ns, BOOK, Payment())
            assert reader.prune(START + 3 * HOUR)
        report = cost_report(reader, window, ["model"], BOOK, Payment())
    return [finding for finding in report.findings if finding.kind == "gateway_disagrees"]


def test_a_gateway_that_tells_the_same_is_not_mentioned(tmp_path: Path) -> None:
    assert found(tmp_path, [Engine(), Gateway()]) == []


def test_one_that_tells_other_tokens_is_named_with_both_figures(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, [Engine(), Gateway(told=900)])
    assert (finding.severity, finding.target) == ("warning", "gateway/epp:9090/llm-d/llama-8b")
    assert "tells 9000 input tokens of llama-8b, its engines 10000, where up to 200 " in finding.message
    assert "aborted" in finding.message


def test_it_does_not_matter_which_of_a_tick_is_scraped_first(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, [Gateway(told=900), Engine()])
    # the window begins with the engine, a moment after the gateway's first interval: that one is in neither figure
    assert "tells 8100 input tokens of llama-8b, its engines 9000, where up to 180 " in finding.message


def test_output_is_compared_on_its_own(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, [Engine(), Gateway(output=150)])
    assert "tells 1500 output tokens of llama-8b, its engines 2000" in finding.message


@pytest.mark.parametrize(("told", "findings"), [(980, 0), (979, 1), (1020, 0), (1021, 1)])
def test_two_percent_may_lie_between_them(tmp_path: Path, told: int, findings: int) -> None:
    assert len(found(tmp_path, [Engine(), Gateway(told=told)])) == findings


@pytest.mark.parametrize(("in_hand", "findings"), [(2, 1), (3, 0)])
def test_requests_in_hand_at_either_end_may_lie_between_them(tmp_path: Path, in_hand: int, findings: int) -> None:
    # 700 of 10,000 lie between them, of which 200 may; 2 requests of 93 tokens at both ends are 372, 3 are 558
    assert len(found(tmp_path, [Engine(in_hand=in_hand), Gateway(told=930)])) == findings


def test_only_the_models_of_a_gateway_are_compared(tmp_path: Path) -> None:
    assert found(tmp_path, [Engine(), Engine(D, "qwen"), Gateway()]) == []
    assert found(tmp_path, [Engine(), Gateway(model="qwen", told=5)]) == []


def test_the_case_of_a_model_does_not_matter(tmp_path: Path) -> None:
    assert len(found(tmp_path, [Engine(model="Llama-8B"), Gateway(told=900)])) == 1


@pytest.mark.parametrize(("told", "findings"), [(500, 0), (1500, 1)])
def test_adapters_that_a_gateway_counts_apart_may_be_the_rest_of_the_engines(
    tmp_path: Path, told: int, findings: int
) -> None:
    gateways = [Gateway(told=told, output=200), Gateway(model="an-adapter", told=10, output=0)]
    assert len(found(tmp_path, [Engine(), *gateways])) == findings


def test_several_gateways_of_a_model_add_up(tmp_path: Path) -> None:
    halves = [Gateway(told=500, output=100, page=page) for page in ("epp-1:9090", "epp-2:9090")]
    assert found(tmp_path, [Engine(), *halves]) == []


def test_the_time_before_a_gateway_was_scraped_is_not_compared(tmp_path: Path) -> None:
    assert found(tmp_path, [Engine(), Partly(range(5, 99))]) == []
    (finding,) = found(tmp_path, [Engine(), Partly(range(5, 99), told=900)])
    # baseline with the sixth of eleven scrapes: five intervals
    assert "tells 4500 input tokens of llama-8b, its engines 5000" in finding.message


def test_the_time_after_a_gateway_was_scraped_is_not_compared(tmp_path: Path) -> None:
    assert found(tmp_path, [Engine(), Partly(range(7))]) == []
    (finding,) = found(tmp_path, [Engine(), Partly(range(7), told=900)])
    assert "tells 5400 input tokens of llama-8b, its engines 6000" in finding.message


def test_prompts_are_compared_with_prefill_engines_and_answers_with_decode_engines(tmp_path: Path) -> None:
    pair = [Engine(P), Engine(D)]
    assert found(tmp_path, [*pair, Gateway()], roles=("prefill", "decode")) == []
    assert len(found(tmp_path, [*pair, Gateway()], roles=("", ""))) == 2


def test_what_a_prefill_engine_elsewhere_counts_is_not_missed(tmp_path: Path) -> None:
    assert found(tmp_path, [Engine(D), Gateway(told=5000)], roles=("", "decode")) == []
    # nothing says that the other engine prefills for it
    pair = [Engine(P), Engine(D)]
    assert found(tmp_path, [*pair, Gateway(told=5000, output=400)], roles=("", "decode")) == []


@pytest.mark.parametrize("pruned", [False, True])
def test_whole_hours_are_compared_by_their_sums(tmp_path: Path, pruned: bool) -> None:
    window = Window(START + HOUR // 2, START + 2 * HOUR)
    (finding,) = found(
        tmp_path, [Engine(), Gateway(told=900)], ticks=60 * 4 + 1, every=60, window=window, apart_ns=1000, pruned=pruned
    )
    # 90 minutes of it; where raw intervals are gone the window is widened to two hours
    told, counted = (108_000, 120_000) if pruned else (81_000, 90_000)
    assert f"tells {told} input tokens of llama-8b, its engines {counted}" in finding.message


def aged(folder: Path, gateway: Gateway) -> list[Finding]:
    """What is said of five hours of which three have aged out."""
    window = Window(START, START + 5 * HOUR)
    return found(folder, [Engine(), gateway], ticks=301, every=60, window=window, apart_ns=1000, pruned=True)


def test_where_raw_intervals_are_gone_hours_in_which_a_gateway_was_scraped_throughout_count(tmp_path: Path) -> None:
    # from 01:10 to 04:09: the first hour is a part
    assert aged(tmp_path, Partly(range(70, 250))) == []
    (finding,) = aged(tmp_path, Partly(range(70, 250), told=900))
    # 129 intervals begin from 02:00 to 04:08
    assert "tells 116100 input tokens of llama-8b, its engines 129000" in finding.message
    assert finding.start_ns == START + 2 * HOUR


def test_where_raw_intervals_are_gone_parts_of_hours_are_not_compared(tmp_path: Path) -> None:
    assert aged(tmp_path, Partly(range(70, 130), told=900)) == []
    (finding,) = aged(tmp_path, Partly(range(121), told=900))
    # from the first minute on: two hours
    assert "tells 108000 input tokens of llama-8b, its engines 120000" in finding.message


def test_a_gateway_that_was_never_scraped_twice_was_not_watched(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {P: About(gpus=("GPU-a",), sku=SKU)})
    deployment.scrape(START, [Engine(in_hand=2), Gateway()])  # type: ignore[list-item]  # as above
    deployment.scrape(START + 20 * SECOND, [Engine(in_hand=3)])
    deployment.scrape(START + 40 * SECOND, [Engine(in_hand=7)])
    deployment.close()
    with closing(reader_of(path)) as reader:
        ids = {target.kind: target.id for target in reader.targets().values()}
        assert watched(reader, [ids["gateway"]], START, START + HOUR) is None
        # what runs at the end of the first and of the last interval
        assert running(reader, [ids["engine"]], START, START + 60 * SECOND) == 3 + 7
        assert running(reader, [ids["engine"]], START, START + 20 * SECOND) == 3 + 3
        assert running(reader, [ids["engine"]], START - HOUR, START + 60 * SECOND) == 7
