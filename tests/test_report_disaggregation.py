from __future__ import annotations

from contextlib import closing
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, rate, reader_of
from tests.serving import FACTS, IDLE, Load, ServingEngine, Site

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.audit import audit
from kvtally.agent.explain import explained
from kvtally.agent.rates import RateBook
from kvtally.agent.render.cost import cost_table
from kvtally.agent.replica import About
from kvtally.agent.report import Report, cost_report
from kvtally.agent.savings_report import savings_report
from kvtally.agent.settlement import settle_hours
from kvtally.agent.valuing import HANDED as UNKNOWN_ROLE
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from kvtally.agent.savings_report import SavingsReport

P, D = "10.0.0.1:8000", "10.0.0.2:8000"
PRICES = (
    rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU),  # a thousandth a second
    rate("dram", "0.01", "gib-hour", START - HOUR),
)
BOOK = RateBook(PRICES)
TRANSFERRED = "engines that decode what others prefilled are left out: what they load was handed to them"


def about(gpu: str, role: str, **more: Any) -> About:
    return About(**{"gpus": (gpu,), "sku": SKU, "mapping": "a test", "role": role, **more})


ABOUTS = {P: about("GPU-p", "prefill"), D: about("GPU-d", "decode")}


class Half(FakeEngine):
    """One of two engines that serve the same requests; without details, which would have to agree with its sources."""

    def __init__(self, name: str, each: Mapping[str, int]) -> None:
        super().__init__(f"{name}/0")
        self.each = each
        self.counts["running_requests"] = 1.0

    def serve_some(self) -> None:
        for name, more in self.each.items():
            self.counts[name] += more

    def reading(self) -> Reading:
        return super().reading()._replace(detail_names=(), details=())


# ten requests of 100 prompt tokens and 20 output tokens: P finds 40 of the 100 in its own prefix cache and generates
# one token that D generates again; D is handed 99 tokens and computes the last one
PREFILLS = {"prompt_tokens": 1000, "computed_tokens": 600, "hbm_tokens": 400, "generated_tokens": 10, "steps": 10}
DECODES = {"prompt_tokens": 1000, "computed_tokens": 10, "external_tokens": 990, "generated_tokens": 200, "steps": 20}


def pair(*, prefills: Mapping[str, int] = PREFILLS, decodes: Mapping[str, int] = DECODES) -> list[Half]:
    return [Half(P, prefills), Half(D, decodes)]


def ledger(
    folder: Path,
    engines: Sequence[FakeEngine],
    abouts: Mapping[str, About] = ABOUTS,
    *,
    ticks: Sequence[int] = (0, 20, 40, 60),
) -> str:
    path = new_ledger(folder)
    deployment = Deployment(path, abouts)
    for second in ticks:
        for engine in engines:
            if second and isinstance(engine, Half):
                engine.serve_some()
        deployment.scrape(START + second * SECOND, engines)
    deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates(PRICES)
    return path


def cost_of(path: str, by: Sequence[str] = ("model",), window: Window | None = None) -> Report:
    with closing(reader_of(path)) as reader:
        return cost_report(reader, window, by, BOOK, Payment())


def only(report: Report) -> dict[str, Any]:
    (group,) = report.groups
    return group


def nano(text: str) -> int:
    return int(Fraction(text) * 10**9)


def test_a_request_that_two_engines_serve_counts_once(tmp_path: Path) -> None:
    report = cost_of(ledger(tmp_path, pair()))
    group = only(report)
    # three intervals: P's prompts and D's answers
    assert group["tokens"] == {
        "prompt": 3000,
        "computed": 1800,
        "cached": {"hbm": 1200, "dram": 0, "disk": 0, "p2p": 0, "external": 0},
        "generated": 600,
    }
    assert report.findings == []


def test_prefill_is_the_time_of_the_one_engine_and_decode_that_of_the_other(tmp_path: Path) -> None:
    group = only(cost_of(ledger(tmp_path, pair())))
    seconds = group["engine_seconds"]
    assert {name: seconds[name] for name in ("prefill", "decode", "stall", "store", "occupied")} == {
        "prefill": 60.0,
        "decode": 60.0,
        "stall": 0.0,
        "store": 0.0,
        "occupied": 120.0,
    }
    assert group["engine_seconds_intervals"]["prefill"] == {"low": 60.0, "high": 60.0}
    assert (group["split_law"], group["split_scale"], group["basis"]["split"]) == ("pool", None, "MEASURED")
    # 0.06 USD each: over 3000 prompt tokens, and over 600 generated ones
    units = group["cost_per_million"]["fully_loaded"]
    assert (units["input"], units["output"], units["total"]) == ("20.000000000", "100.000000000", "33.333333333")
    assert units["input_computed"] == "33.333333333"  # 0.06 USD over 1800 tokens


def test_what_is_attributed_is_the_total_to_the_nano_unit(tmp_path: Path) -> None:
    abouts = {P: about("GPU-p", "prefill", dram_gib="7"), D: about("GPU-d", "decode", dram_gib="11")}
    cost = only(cost_of(ledger(tmp_path, pair(), abouts, ticks=(0, 19, 40, 61))))["cost"]
    parts = cost["attributed"]
    names = ("input_computed", "orphan_holding", "orphan_copies", "output")
    total = sum(nano(parts[name]) for name in names) + sum(map(nano, parts["input_cached"].values()))
    assert total == nano(cost["total"])
    assert nano(cost["total"]) > 122_000_000


def test_both_engines_are_one_row_by_replica(tmp_path: Path) -> None:
    path = ledger(tmp_path, pair())
    report = cost_of(path, ["replica"])
    assert only(report)["by"] == {"replica": "llama-8b prefill+decode"}
    assert only(report)["cost"]["total"] == "0.120000000"


def test_the_table_says_that_no_law_divides_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost_table(cost_of(ledger(tmp_path, pair())).as_json())
    assert "prefill and decode: each by the engines that do nothing else" in capsys.readouterr().out


def test_a_group_that_is_named_is_the_row_by_replica(tmp_path: Path) -> None:
    abouts = {name: one._replace(group="pair-1") for name, one in ABOUTS.items()}
    assert only(cost_of(ledger(tmp_path, pair(), abouts), ["replica"]))["by"] == {"replica": "pair-1"}


def test_engines_in_other_places_are_no_pair(tmp_path: Path) -> None:
    abouts = {
        P: about("GPU-p", "prefill", labels={"namespace": "one"}),
        D: about("GPU-d", "decode", labels={"namespace": "two"}),
    }
    report = cost_of(ledger(tmp_path, pair(), abouts), ["replica"])
    assert [group["by"]["replica"] for group in report.groups] == [f"{P}/0", f"{D}/0"]
    assert [finding.kind for finding in report.findings] == ["decode_elsewhere", "prefill_elsewhere"]


def test_a_decode_engine_alone_has_no_price_of_input(tmp_path: Path) -> None:
    report = cost_of(ledger(tmp_path, pair()[1:], {D: ABOUTS[D]}))
    group = only(report)
    assert [finding.kind for finding in report.findings] == ["prefill_elsewhere"]
    assert "llama-8b" in report.findings[0].message
    assert (group["tokens"]["prompt"], group["tokens"]["generated"]) == (None, 600)
    units = group["cost_per_million"]["fully_loaded"]
    assert (units["input"], units["input_computed"], units["total"]) == (None, None, None)
    assert units["output"] == "100.000000000"


def test_a_prefill_engine_alone_has_no_price_of_output(tmp_path: Path) -> None:
    report = cost_of(ledger(tmp_path, pair()[:1], {P: ABOUTS[P]}))
    units = only(report)["cost_per_million"]["fully_loaded"]
    assert [finding.kind for finding in report.findings] == ["decode_elsewhere"]
    assert (units["input"], units["output"], units["total"]) == ("20.000000000", None, None)


def test_prompts_that_a_decode_engine_computed_itself_are_told(tmp_path: Path) -> None:
    decodes = {**DECODES, "computed_tokens": 200, "external_tokens": 800}
    report = cost_of(ledger(tmp_path, pair(decodes=decodes)))
    assert [finding.kind for finding in report.findings] == ["prefill_at_decode"]
    assert "computed 600 of their 3000 prompt tokens" in report.findings[0].message


def test_reuse_from_an_outer_tier_of_the_prefill_engine_is_still_reuse(tmp_path: Path) -> None:
    prefills = {**PREFILLS, "computed_tokens": 500, "external_tokens": 100}
    report = cost_of(ledger(tmp_path, pair(prefills=prefills)))
    assert only(report)["tokens"]["cached"]["external"] == 300
    # nothing here tells what it took
    assert [finding.kind for finding in report.findings] == ["stall_not_parted"]


class WithCache(FakeEngine):
    """The page of an outer tier beside an engine."""

    def reading(self) -> Reading:
        return Reading("cache", f"{D}/lmcache", {"cache": "lmcache in-process"}, (0.0,) * len(QUANTITIES["cache"]))


def test_what_a_connector_hands_on_is_no_tier_and_no_stall(tmp_path: Path) -> None:
    connector = {"connector": "LMCacheConnectorV1"}  # of which nobody could say what it took
    abouts = {name: one._replace(facts=connector) for name, one in ABOUTS.items()}
    path = ledger(tmp_path, [*pair(), WithCache()], abouts)
    report = cost_of(path)
    assert report.findings == []
    assert (only(report)["engine_seconds"]["stall"], only(report)["engine_seconds"]["store"]) == (0.0, 0.0)
    assert only(report)["cost_per_million"]["fully_loaded"]["input_cached"] == {"hbm": "0.000000000"}


def test_an_engine_that_does_both_is_divided_as_ever(tmp_path: Path) -> None:
    abouts = {P: about("GPU-p", "both"), D: about("GPU-d", "")}
    group = only(cost_of(ledger(tmp_path, pair(), abouts)))
    assert group["tokens"]["prompt"] == 6000
    assert group["split_law"] is None


class Transfers(Half):
    """What the page of an engine tells of KV that it fetches from another."""

    def __init__(self, name: str, each: Mapping[str, int]) -> None:
        super().__init__(name, each)
        self.name = f"{name}/0/nixl"
        self.counts = dict.fromkeys((one.name for one in QUANTITIES["cache"]), 0.0)

    def reading(self) -> Reading:
        about = {"cache": "nixl", "transfer": "1"}
        return Reading("cache", self.name, about, tuple(self.counts.values()), self.epoch)


FETCHES = {"load_bytes": 10**9, "loads": 10}
ROLELESS = {P: about("GPU-p", ""), D: about("GPU-d", "")}


def test_an_engine_that_is_handed_kv_and_has_no_role_is_told_with_what_to_write(tmp_path: Path) -> None:
    # the prefill engine, too, shows the families, and moves nothing itself
    engines = [*pair(), Transfers(P, {}), Transfers(D, FETCHES)]
    report = cost_of(ledger(tmp_path, engines, ROLELESS))
    (finding,) = [one for one in report.findings if one.kind == "role_unknown"]
    assert (finding.severity, finding.target) == ("warning", f"engine/{D}/0")
    assert finding.message == (
        "KV came from other engines (nixl), 2970 tokens of it as far as it was no outer tier's, and no role is known: "
        "their prompts count here and where they were prefilled, and what was handed on counts as reuse. Say what they "
        f'do, in kvtally.toml, in the [[engine]] with url = "http://{D}/metrics": role = "decode" (or "prefill", or '
        '"both")'
    )


@pytest.mark.parametrize("decodes", ["decode", "both"])
def test_a_role_that_is_known_is_not_asked_for(tmp_path: Path, decodes: str) -> None:
    abouts = {P: about("GPU-p", "prefill"), D: about("GPU-d", decodes)}
    report = cost_of(ledger(tmp_path, [*pair(), Transfers(D, FETCHES)], abouts))
    assert "role_unknown" not in {finding.kind for finding in report.findings}


def test_engines_that_are_handed_nothing_need_no_role(tmp_path: Path) -> None:
    still = [Transfers(P, FETCHES), Transfers(D, {})]
    report = cost_of(ledger(tmp_path, [*pair(), *still], ROLELESS))
    assert "role_unknown" not in {finding.kind for finding in report.findings}


def test_a_settled_hour_says_the_same_and_its_audit_is_clean(tmp_path: Path) -> None:
    path = ledger(tmp_path, pair(), ticks=range(0, 3720, 60))
    hour = Window(START, START + HOUR)
    before = cost_of(path, ["replica"], hour).as_json()
    with closing(reader_of(path)) as reader:
        settle_hours(reader, [START], START + 2 * HOUR, BOOK, Payment())
        saved = reader.savings(START, START + HOUR)
        assert audit(reader, BOOK) == []
    assert [one.body["reasons"] for one in saved.values() if one.body["reasons"][0][0] == TRANSFERRED]
    assert cost_of(path, ["replica"], hour).as_json() == before
    assert before["groups"][0]["tokens"]["prompt"] == 60_000


# -- savings


class Serving(ServingEngine):
    """Serves a load of its own, whatever the others serve."""

    def __init__(self, name: str, load: Load) -> None:
        super().__init__(f"{name}/0")
        self.load = load

    def take(self, load: Load, chance: random.Random) -> float:
        return super().take(self.load if load is not IDLE else IDLE, chance)


def served(path: str, *engines: Serving, roles: Mapping[str, str]) -> list[Serving]:
    names = [engine.name.partition("/")[0] for engine in engines]
    known = {name: about(f"GPU-{at}", roles[name], facts=FACTS) for at, name in enumerate(names)}
    made = Site(path, engines, about=known)
    made.scrape(made.engines)
    made.serve(1800).serve(60, IDLE).close()
    return list(engines)


def savings_of(path: str, by: Sequence[str] = ("model",)) -> tuple[SavingsReport, list[dict[str, Any]]]:
    with closing(reader_of(path)) as reader, reader.snapshot():
        report = savings_report(reader, None, by, BOOK, Payment())
        return report, explained(reader, report)


HANDED = Load(hbm=0.0, external=0.999)


def test_transfers_are_no_savings_and_the_prefill_engines_reuse_is(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engines = (Serving(P, Load(hbm=0.7, output=1)), Serving(D, HANDED))
    prefill, decode = served(path, *engines, roles={P: "prefill", D: "decode"})
    report, (explanation,) = savings_of(path, ["replica"])
    (group,) = report.as_json()["groups"]
    assert group["by"] == {"replica": "llama-8b prefill+decode"}
    assert group["reused_tokens"] == {
        "hbm": int(prefill.counts["hbm_tokens"]),
        "dram": 0,
        "disk": 0,
        "p2p": 0,
        "external": 0,
    }
    assert TRANSFERRED in group["reasons"]
    avoided = group["avoided_engine_seconds"]
    assert group["status"] in {"ok", "not_proven"}
    assert avoided["low"] <= prefill.avoided <= avoided["high"]
    assert decode.counts["external_tokens"] > 0
    assert set(group["tiers"]) == {"hbm"}
    assert nano(group["gross"]["point"]) == pytest.approx(avoided["point"] * 1_000_000, abs=1)
    # the explanation's inputs are those of the prefill engine alone
    assert [one["name"] for one in explanation["inputs"]["replicas"]] == [prefill.name]


def test_a_decode_engine_alone_has_no_savings_and_says_why(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    served(path, Serving(D, HANDED), roles={D: "decode"})
    report, (explanation,) = savings_of(path)
    (group,) = report.as_json()["groups"]
    assert (group["status"], group["reasons"]) == ("insufficient_data", [TRANSFERRED])
    assert (group["avoided_engine_seconds"], group["gross"], group["tiers"]) == (None, None, {})
    assert explanation["status"] == "insufficient_data"


class Fetching(Serving):
    """What the page of the decode engine tells of its transfers, beside it."""

    def __init__(self) -> None:
        super().__init__(D, IDLE)
        self.name = f"{D}/0/nixl"
        self.transfers = Transfers(D, FETCHES)

    def take(self, load: Load, chance: random.Random) -> float:
        if load is not IDLE:
            self.transfers.serve_some()
        return super().take(IDLE, chance)

    def reading(self) -> Reading:
        return self.transfers.reading()


def decoded(path: str, role: str, *, caches: bool = False) -> tuple[Serving, dict[str, Any]]:
    """An engine that finds a third in HBM and loads a third, with its transfers; its savings."""
    engine = Serving(D, Load(hbm=0.33, external=0.33))
    made = Site(path, [engine, Fetching()], about={D: about("GPU-0", role, facts=FACTS)}, caches=caches)
    made.scrape(made.engines)
    made.serve(1800).serve(60, IDLE).close()
    report, _ = savings_of(path)
    (group,) = report.as_json()["groups"]
    return engine, group


def test_what_is_handed_to_an_engine_without_a_role_is_no_saving_and_what_hbm_served_is(tmp_path: Path) -> None:
    engine, both = decoded(new_ledger(tmp_path, "both.db"), "both")
    assert set(both["tiers"]) == {"hbm", "external"}
    _, group = decoded(new_ledger(tmp_path), "")
    hbm = int(engine.counts["hbm_tokens"])
    assert group["reused_tokens"] == {"hbm": hbm, "dram": 0, "disk": 0, "p2p": 0, "external": 0}
    assert set(group["tiers"]) == {"hbm"}
    assert group["avoided_engine_seconds"] == both["tiers"]["hbm"]["avoided_engine_seconds"]
    assert group["avoided_engine_seconds"]["point"] < 0.9 * both["avoided_engine_seconds"]["point"]
    assert [str(reason) for reason in group["reasons"] if "its role is not known" in reason] == [str(UNKNOWN_ROLE)]


def test_loads_of_an_engine_with_an_outer_tier_of_its_own_stay_reuse(tmp_path: Path) -> None:
    engine, group = decoded(new_ledger(tmp_path), "", caches=True)
    assert group["reused_tokens"]["external"] == int(engine.counts["external_tokens"])
    assert str(UNKNOWN_ROLE) not in group["reasons"]


def test_what_was_handed_stays_no_saving_when_its_hour_is_settled(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    _, before = decoded(path, "")
    with closing(reader_of(path)) as reader:
        reader.add_rates(PRICES)
        settle_hours(reader, [START - START % HOUR], START + 2 * HOUR, BOOK, Payment())
    report, _ = savings_of(path)
    (after,) = report.as_json()["groups"]
    assert after["reused_tokens"] == before["reused_tokens"]
    assert str(UNKNOWN_ROLE) in after["reasons"]
