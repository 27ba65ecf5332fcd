from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.rates import RateBook
from kvtally.agent.render.answer import tiers_line
from kvtally.agent.render.cost import cost_table
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.savings_report import Group, group_json
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
        self.found = {"dram_hit_tokens": 0.0, "disk_hit_tokens": 0.0}

    def reading(self) -> Reading:
        told = self.found if self.tells else {}
        return Reading(
            "cache", self.name, self.attributes, tuple(told.get(q.name) for q in QUANTITIES["cache"]), self.epoch
        )


def ledger(
    folder: Path,
    loads: Sequence[tuple[int, int]] = ((400, 0),) * 3,
    *,
    seconds: int = 60,
    found: tuple[int, int] = (500, 100),
    tells: bool = True,
    watched_from: int = 0,
    connector: str = "LMCacheMPConnector",
) -> str:
    """Each tick the two engines load so many tokens, and the server finds so many in DRAM and on disk."""
    path, server = new_ledger(folder), Server(tells=tells)
    engines = [FakeEngine(name) for name in ENGINES]
    abouts = {one.name.partition("/")[0]: About(gpus=(), facts={"connector": connector}) for one in engines}
    deployment = Deployment(path, abouts, interval_seconds=seconds)
    deployment.scrape(START, [*engines, server] if watched_from == 0 else engines)
    for number, loaded in enumerate(loads, 1):
        for engine, tokens in zip(engines, loaded, strict=True):
            engine.serve(computed=1000, hbm=200, generated=10, steps=10)
            engine.counts["external_tokens"] += tokens
            engine.counts["prompt_tokens"] += tokens
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
    assert "dram, disk: MODELLED, by where the cache's lookups found the tokens, less what HBM held of them" in shown


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
