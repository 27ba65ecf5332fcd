from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.explain import explained
from kvtally.agent.ledger.read import Target, replica_of
from kvtally.agent.rates import RateBook
from kvtally.agent.render.answer import tiers_line
from kvtally.agent.render.cost import cost_table
from kvtally.agent.render.savings import savings_table
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.report.fold import _unknown_loading
from kvtally.agent.savings_report import Group, group_json, savings_report
from kvtally.agent.settlement import settle
from kvtally.agent.valuing import Valued
from kvtally.agent.worth import NOTHING
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.agent.worth import Worth

PRICES = (rate("server", "3.60", "server-hour", START - HOUR, sku="cpu-host"),)
ENGINES = ("10.0.0.1:8000/0", "10.0.0.2:8000/0")


class Server(FakeEngine):
    """An LMCache server; a family that it does not show is None."""

    def __init__(self, *, tells: bool = True) -> None:
        super().__init__("10.0.0.9:8180/lmcache_mp")
        self.attributes = {"engines": "10.0.0.1:8000,10.0.0.2:8000"}
        self.tells = tells
        self.found: dict[str, float] = {"dram_hit_tokens": 0.0, "disk_hit_tokens": 0.0}

    def reading(self) -> Reading:
        told = self.found if self.tells else {}
        return Reading(
            "cache", self.name, self.attributes, tuple(told.get(q.name) for q in QUANTITIES["cache"]), self.epoch
        )


NAMED = ("step_tokens_le_1", "admitted_disk_tokens", "admitted_host_tokens", "admitted_unspecified_tokens", "more")


class Naming(FakeEngine):
    """An engine that names the tiers of the tokens that it admits."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name)
        self.attributes |= {"engine": kind} if kind else {}
        self.admitted = [0.0, 0.0, 0.0]

    def admit(self, tokens: tuple[int, int, int]) -> None:
        self.admitted = [before + more for before, more in zip(self.admitted, tokens, strict=True)]

    def reading(self) -> Reading:
        host, disk, unspecified = self.admitted
        details = (self.counts["steps"], disk, host, unspecified, self.counts["steps"])
        return super().reading()._replace(detail_names=NAMED, details=details)


def ledger(
    folder: Path,
    loads: Sequence[tuple[int, int]] = ((400, 0),) * 3,
    *,
    seconds: int = 60,
    found: tuple[int, int] = (500, 100),
    tells: bool = True,
    watched_from: int = 0,
    connector: str = "LMCacheMPConnector",
    admits: tuple[int, int, int] | None = None,
    kind: str = "",
) -> str:
    """Each tick the two engines load so many tokens, and the server finds so many in DRAM and on disk.

    `admits`: so many of the first engine's are said to come from the host, from disk and from no named tier.
    """
    path, server = new_ledger(folder), Server(tells=tells)
    engines = [FakeEngine(ENGINES[0]) if admits is None else Naming(ENGINES[0], kind), FakeEngine(ENGINES[1])]
    abouts = {one.name.partition("/")[0]: About(gpus=(), facts={"connector": connector}) for one in engines}
    deployment = Deployment(path, abouts, interval_seconds=seconds)
    deployment.scrape(START, [*engines, server] if watched_from == 0 else engines)
    for number, loaded in enumerate(loads, 1):
        for engine, tokens in zip(engines, loaded, strict=True):
            engine.serve(computed=1000, hbm=200, generated=10, steps=10)
            engine.counts["external_tokens"] += tokens
            engine.counts["prompt_tokens"] += tokens
            if isinstance(engine, Naming) and admits is not None:
                engine.admit(admits)
        server.found["dram_hit_tokens"] += found[0]
        server.found["disk_hit_tokens"] += found[1]
        watched = [server] if number >= watched_from else []
        deployment.scrape(START + number * seconds * SECOND, [*engines, *watched])
    deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates(PRICES)
    return path


def groups(path: str, by: Sequence[str] = (), end_ns: int = START + HOUR) -> list[dict[str, Any]]:
    with closing(reader_of(path)) as reader:
        return list(cost_report(reader, Window(START, end_ns), by, RateBook(PRICES), Payment()).groups)


def cached(group: dict[str, Any]) -> tuple[int | None, ...]:
    return tuple(group["tokens"]["cached"][tier] for tier in ("dram", "disk", "p2p", "external"))


def test_without_a_step_law_external_tokens_are_parted_by_what_lookups_found(tmp_path: Path) -> None:
    (group,) = groups(ledger(tmp_path))
    # 1,800 found and 1,200 loaded: 600 were in HBM, and of DRAM's 1,500 they are the first
    assert cached(group) == (900, 300, 0, 0)
    assert group["basis"]["tiers"] == "MODELLED"
    assert group["basis"]["tokens"] == "MEASURED"


def test_a_settled_hour_is_parted_alike(tmp_path: Path) -> None:
    path = ledger(tmp_path)
    with closing(reader_of(path)) as reader:
        settle(reader, START, RateBook(PRICES), Payment(), values=[])
    (group,) = groups(path)
    assert cached(group) == (900, 300, 0, 0)
    assert group["basis"]["tiers"] == "MODELLED"


def test_engines_that_share_a_server_share_what_it_found_by_their_external_tokens(tmp_path: Path) -> None:
    first, second = groups(ledger(tmp_path, [(300, 100)] * 3), ("replica",))
    # of 1,500 and 300 found the first has three quarters: 1,125 and 225 for 900 tokens, so that 450 were in HBM
    assert cached(first) == (675, 225, 0, 0)
    assert cached(second) == (225, 75, 0, 0)


def test_what_is_beyond_the_lookups_stays_external(tmp_path: Path) -> None:
    (group,) = groups(ledger(tmp_path, found=(100, 50)))
    assert cached(group) == (300, 150, 0, 750)


@pytest.mark.parametrize(
    "more",
    [{"tells": False}, {"loads": ((400, 0),), "seconds": 59}, {"watched_from": 5, "loads": ((400, 0),) * 6}],
    ids=["no tiers", "less than a minute", "not watched"],
)
def test_where_lookups_cannot_tell_nothing_is_parted(tmp_path: Path, more: dict[str, Any]) -> None:
    (group,) = groups(ledger(tmp_path, **more))
    assert cached(group)[:3] == (None, None, None)
    assert group["tokens"]["cached"]["external"] > 0
    assert group["basis"]["tiers"] is None


def savings(path: str, end_ns: int = START + HOUR) -> dict[str, Any]:
    with closing(reader_of(path)) as reader:
        report = savings_report(reader, Window(START, end_ns), (), RateBook(PRICES), Payment())
    return dict(report.as_json()["groups"][0])


@pytest.mark.parametrize("kind", ["", "sglang"])
def test_what_the_engine_names_is_its_own_to_tell_in_costs_and_savings_alike(tmp_path: Path, kind: str) -> None:
    # three parts from the host and one from disk, of 1,200; the server would say all is on disk
    path = ledger(tmp_path, found=(0, 4000), admits=(30, 10, 0), kind=kind)
    (cost,), saved = groups(path), savings(path)
    assert cached(cost) == (900, 300, 0, 0)
    assert cost["basis"]["tiers"] == saved["basis"]["tiers"] == "MEASURED"
    assert saved["reused_tokens"] == cost["tokens"]["cached"]
    assert saved["status"] == "insufficient_data"


def test_an_engine_that_names_tiers_needs_no_minute_and_no_cache(tmp_path: Path) -> None:
    path = ledger(tmp_path, ((400, 0),), seconds=20, tells=False, admits=(400, 0, 0), kind="sglang")
    (cost,) = groups(path)
    assert cached(cost) == (400, 0, 0, 0)
    assert savings(path)["reused_tokens"] == cost["tokens"]["cached"]


def test_of_what_the_engine_leaves_open_lookups_may_tell(tmp_path: Path) -> None:
    # half of 1,200 is of no named tier, and of these the server tells
    path = ledger(tmp_path, found=(0, 4000), admits=(100, 0, 100))
    (cost,) = groups(path)
    assert cached(cost) == (600, 600, 0, 0)
    assert cost["basis"]["tiers"] == "MODELLED"
    assert savings(path)["reused_tokens"] == cost["tokens"]["cached"]
    assert savings(path)["basis"]["tiers"] == "MODELLED"


def test_a_settled_hour_has_the_tiers_that_its_engine_names(tmp_path: Path) -> None:
    path = ledger(tmp_path, found=(0, 4000), admits=(30, 10, 0), kind="sglang")
    with closing(reader_of(path)) as reader:
        settle(reader, START, RateBook(PRICES), Payment(), values=[])
    (cost,) = groups(path)
    assert cached(cost) == (900, 300, 0, 0)
    assert savings(path)["reused_tokens"] == cost["tokens"]["cached"]


def test_where_an_engines_own_details_are_gone_no_lookups_stand_in_for_them(tmp_path: Path) -> None:
    path = ledger(tmp_path, admits=(30, 10, 0), kind="sglang")
    with closing(reader_of(path)) as reader:
        settle(reader, START, RateBook(PRICES), Payment(), values=[])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM engine_interval")
    (cost,) = groups(path)
    assert cached(cost) == (None, None, None, 1200)


class Lumping(Naming):
    """An engine that counts its cached tokens as one, and what each tier had by when requests are scheduled."""

    def __init__(self) -> None:
        super().__init__(ENGINES[0], "tensorrt-llm")

    def reading(self) -> Reading:
        told = self.counts | {"hbm_tokens": None, "external_tokens": None}
        return super().reading()._replace(values=tuple(told.values()))


def lumped(folder: Path) -> str:
    """Two requests of 1,000 tokens, 800 of them cached; a third that is scheduled has not finished."""
    path, engine = new_ledger(folder), Lumping()
    deployment = Deployment(path, {ENGINES[0].partition("/")[0]: About(gpus=())}, interval_seconds=20)
    deployment.scrape(START, [engine])
    engine.serve(computed=400, hbm=1600, generated=20, steps=10)
    engine.counts["prefix_hit_tokens"] += 3 * 320
    engine.counts["external_hit_tokens"] += 3 * 480
    engine.admit((3 * 300, 3 * 180, 0))
    deployment.scrape(START + 20 * SECOND, [engine])
    deployment.close()
    with closing(reader_of(path)) as reader:
        reader.add_rates(PRICES)
    return path


@pytest.mark.parametrize("is_settled", [False, True])
def test_cached_tokens_that_are_counted_as_one_are_parted_by_the_shares_of_the_lookups(
    tmp_path: Path, *, is_settled: bool
) -> None:
    path = lumped(tmp_path)
    if is_settled:
        with closing(reader_of(path)) as reader:
            settle(reader, START, RateBook(PRICES), Payment(), values=[])
    (cost,), saved = groups(path), savings(path)
    # 1,600: 32 of 80 in HBM, 30 on the host, 18 on disk
    told = {"hbm": 640, "dram": 600, "disk": 360, "p2p": 0, "external": 0}
    assert (cost["tokens"]["prompt"], cost["tokens"]["computed"]) == (2000, 400)
    assert cost["tokens"]["cached"] == saved["reused_tokens"] == told
    for one in (cost, saved):
        assert (one["basis"]["tokens"], one["basis"]["tiers"]) == ("MODELLED", "MODELLED")


def test_a_report_says_whose_tiers_are_told_by_lookups(tmp_path: Path) -> None:
    with closing(reader_of(lumped(tmp_path))) as reader:
        report = cost_report(reader, Window(START, START + HOUR), (), RateBook(PRICES), Payment())
    (message,) = [one.message for one in report.findings if one.kind == "tiers_by_lookups"]
    assert message.startswith("TensorRT-LLM counts cached tokens as one")


def test_without_the_details_the_outer_tiers_of_such_an_engine_stay_together(tmp_path: Path) -> None:
    path = lumped(tmp_path)
    with closing(reader_of(path)) as reader:
        settle(reader, START, RateBook(PRICES), Payment(), values=[])
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM engine_interval")
    (cost,) = groups(path)
    assert cost["tokens"]["cached"] == {"hbm": 640, "dram": None, "disk": None, "p2p": None, "external": 960}
    assert cost["basis"]["tokens"] == "MODELLED"


def test_savings_without_a_law_have_the_tiers_of_lookups_too(tmp_path: Path) -> None:
    path = ledger(tmp_path)
    saved = savings(path)
    assert saved["reused_tokens"] == groups(path)[0]["tokens"]["cached"]
    assert saved["reused_tokens"]["disk"] == 300
    assert saved["basis"]["tiers"] == "MODELLED"
    assert saved["tiers_untold"] is None


@pytest.mark.parametrize(
    ("kind", "counters"),
    [
        (
            "sglang",
            [
                "sglang:prompt_tokens_total",
                "sglang:prompt_tokens_total less sglang:cached_tokens_total",
                'sglang:cached_tokens_total{cache_source="device"}',
                'sglang:cached_tokens_total{cache_source="host"}',
                "steps",
            ],
        ),
        ("another", ["prompt_tokens", "computed_tokens", "hbm_tokens", "admitted_host_tokens", "steps"]),
        (
            "",
            [
                "vllm:prompt_tokens_total",
                'vllm:prompt_tokens_by_source_total{source="local_compute"}',
                'vllm:prompt_tokens_by_source_total{source="local_cache_hit"}',
                'vllm:prompt_tokens_cached_by_source_total{source="host"}',
                "vllm:iteration_tokens_total_count",
            ],
        ),
    ],
)
def test_an_explanation_names_the_counters_of_the_engine_that_it_is_of(
    tmp_path: Path, kind: str, counters: list[str]
) -> None:
    path = ledger(tmp_path, admits=(30, 10, 0), kind=kind)
    with closing(reader_of(path)) as reader, reader.snapshot():
        report = savings_report(reader, Window(START, START + HOUR), ("replica",), RateBook(PRICES), Payment())
        first = explained(reader, report)[0]
    assert first["by"] == {"replica": ENGINES[0]}
    shown = {one["counter"] for one in first["inputs"]["counters"]}
    assert set(counters) <= shown
    assert kind == "" or not any("vllm" in counter for counter in shown)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("sglang", "nothing tells whether SGLang waits for what it loads"),
        ("", f'name it in kvtally.toml, in the [[engine]] with url = "http://{ENGINES[0][:-2]}/metrics": connector = '),
    ],
)
def test_only_of_vllm_a_connector_is_asked_for(kind: str, reason: str) -> None:
    found = str(_unknown_loading(replica_of(Target(1, "engine", ENGINES[0], {"engine": kind}, ()))))
    assert reason in found
    assert kind == "" or "connector" not in found


def test_reasons_of_a_group_of_several_name_the_replicas(tmp_path: Path) -> None:
    path = ledger(tmp_path)
    (reason,) = [text for text in savings(path)["reasons"] if "how long the engine worked" in text]
    assert reason.startswith(f"{ENGINES[0]}, {ENGINES[1]}: nothing tells how long")
    with closing(reader_of(path)) as reader:
        report = savings_report(reader, Window(START, START + HOUR), ("replica",), RateBook(PRICES), Payment())
    assert any(text.startswith("nothing tells how long") for text in report.as_json()["groups"][0]["reasons"])


def test_savings_say_that_a_window_is_too_short_for_lookups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ledger(tmp_path, ((400, 0),), seconds=59)
    assert savings(path)["tiers_untold"] == "the window is shorter than 60 s"
    with closing(reader_of(path)) as reader:
        report = savings_report(reader, Window(START, START + HOUR), (), RateBook(PRICES), Payment())
    savings_table(report.as_json())
    shown = " ".join(capsys.readouterr().out.split())
    assert "which of dram, disk and p2p served them is not told: the window is shorter than 60 s" in shown


def test_a_cache_that_tells_no_tiers_is_not_told_to_want_a_longer_window(tmp_path: Path) -> None:
    assert savings(ledger(tmp_path, ((400, 0),), seconds=59, tells=False))["tiers_untold"] is None


def test_loads_of_an_lmcache_server_are_no_stall_named_or_not(tmp_path: Path) -> None:
    for number, connector in enumerate(("LMCacheMPConnector", "")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (group,) = groups(ledger(folder, connector=connector))
        assert (group["engine_seconds"]["stall"], group["engine_seconds"]["store"]) == (0.0, 0.0)


def test_the_table_says_that_tiers_are_estimated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ledger(tmp_path)
    with closing(reader_of(path)) as reader:
        cost_table(cost_report(reader, Window(START, START + HOUR), (), RateBook(PRICES), Payment()).as_json())
    shown = " ".join(capsys.readouterr().out.split())
    assert "dram, disk: MODELLED, by where lookups found the tokens, less what HBM held of them" in shown


@pytest.mark.parametrize(
    ("worth", "basis"),
    [
        (NOTHING, None),
        (NOTHING._replace(external_tokens=9.0), None),
        (NOTHING._replace(external_tokens=9.0, dram_tokens=9.0), "MEASURED"),
        (NOTHING._replace(external_tokens=9.0, dram_tokens=4.0, disk_tokens=5.0, estimated_tokens=5.0), "MODELLED"),
    ],
)
def test_the_savings_say_on_what_their_tiers_stand(worth: Worth, basis: str | None) -> None:
    value = Valued(START, 1, worth, None, "asynchronous")
    told = group_json(Group({}, (), (value,), None, None, ()))
    assert told["basis"]["tiers"] == basis
    assert "MODELLED" in tiers_line("MODELLED")
    assert "MEASURED" in tiers_line("MEASURED")
