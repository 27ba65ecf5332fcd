from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, FakeGpu, new_ledger, rate, reader_of

from kvtally.agent.accounts import Payment, Window, facts_of
from kvtally.agent.audit import audit
from kvtally.agent.facts import EngineRow, Replica
from kvtally.agent.interval import RESET
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.settlement import settle
from kvtally.agent.sharing import NOBODY, Part, Sharing, told
from kvtally.collectors.quantities import ENGINE

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.agent.facts import Facts

ONE, TWO, THREE = "10.0.0.1:8000/0", "10.0.0.2:8000/0", "10.0.0.3:8000/0"
PRICES = (
    rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU),
    rate("server", "0.80", "server-hour", START - HOUR, sku="gpu-host"),
)
PAYMENT = Payment()
HALF = Fraction(1, 2)


def replica(name: str, *gpus: str, slices: Fraction | None = None) -> Replica:
    return Replica(1, name, "llama-8b", "0.25.1", gpus, SKU, "on-demand", "", {}, slices=slices)


def row(start_ns: int, end_ns: int, began_ns: int | None = None) -> EngineRow:
    flags = 0 if began_ns is None else RESET
    return EngineRow(1, start_ns, end_ns, 0, flags, began_ns, (None,) * len(ENGINE))


def test_engines_that_hold_a_gpu_at_the_same_time_have_equal_parts_of_it_just_then() -> None:
    one, two = replica(ONE, "GPU-a"), replica(TWO, "GPU-a")
    sharing = Sharing([(one, row(0, 10)), (one, row(10, 40)), (two, row(20, 60))])
    assert sharing.parts(one, 0, 40) == [Part(0, 20, Fraction(1)), Part(20, 40, HALF)]
    assert sharing.parts(two, 20, 60) == [Part(20, 40, HALF), Part(40, 60, Fraction(1))]
    assert sharing.others(one, 0, 40) == {"GPU-a": (TWO,)}
    assert sharing.others(one, 0, 20) == {}
    assert sharing.others(two, 40, 60) == {}


def test_of_several_gpus_only_the_shared_one_is_parted() -> None:
    one = replica(ONE, "GPU-a", "GPU-b")
    sharing = Sharing([(one, row(0, 10)), (replica(TWO, "GPU-b"), row(0, 10)), (replica(THREE, "GPU-b"), row(0, 5))])
    assert sharing.parts(one, 0, 10) == [Part(0, 5, Fraction(4, 3)), Part(5, 10, Fraction(3, 2))]
    assert sharing.others(one, 0, 10) == {"GPU-b": (TWO, THREE)}
    assert told(sharing.others(one, 0, 10)) == f"GPU-b is held by {TWO}, {THREE} too"


def test_engines_that_follow_on_each_other_do_not_share() -> None:
    one, two = replica(ONE, "GPU-a"), replica(TWO, "GPU-a")
    sharing = Sharing([(one, row(0, 10)), (two, row(10, 20)), (one, row(20, 30))])
    assert sharing.others(one, 0, 30) == sharing.others(two, 0, 30) == {}
    assert sharing.parts(two, 10, 20) == [Part(10, 20, Fraction(1))]


def test_an_engine_between_two_processes_leaves_its_gpu_to_whoever_took_it() -> None:
    one, two = replica(ONE, "GPU-a"), replica(TWO, "GPU-a")
    sharing = Sharing([(one, row(0, 10)), (one, row(10, 50, began_ns=40)), (two, row(20, 30))])
    assert sharing.others(one, 0, 50) == {}
    assert sharing.parts(one, 0, 50) == [Part(0, 20, Fraction(1)), Part(20, 30, Fraction(0)), Part(30, 50, Fraction(1))]
    assert sharing.parts(two, 20, 30) == [Part(20, 30, Fraction(1))]


def test_engines_that_restart_together_are_charged_for_one_gpu_between_their_processes() -> None:
    one, two = replica(ONE, "GPU-a"), replica(TWO, "GPU-a")
    rows = [(one, row(0, 10)), (one, row(10, 50, began_ns=40)), (two, row(0, 10)), (two, row(10, 50, began_ns=30))]
    sharing = Sharing(rows)
    # neither runs until 30, then the second alone until 40
    assert sharing.parts(one, 0, 50) == [Part(0, 30, HALF), Part(30, 40, Fraction(0)), Part(40, 50, HALF)]
    assert sharing.parts(two, 0, 50) == [Part(0, 30, HALF), Part(30, 40, Fraction(1)), Part(40, 50, HALF)]


def test_two_engines_on_one_mig_instance_part_its_share() -> None:
    one, two = (replica(name, "MIG-a", slices=Fraction(1, 7)) for name in (ONE, TWO))
    sharing = Sharing([(one, row(0, 10)), (two, row(0, 10))])
    assert sharing.parts(one, 0, 10) == [Part(0, 10, Fraction(1, 14))]


def test_where_no_two_engines_name_a_gpu_nothing_is_shared() -> None:
    one = replica(ONE, "GPU-a")
    assert not NOBODY
    assert not Sharing([(one, row(0, 10)), (replica(TWO, "GPU-b"), row(0, 10))])
    assert NOBODY.parts(one, 3, 7) == [Part(3, 7, Fraction(1))]
    assert NOBODY.parts(replica(ONE), 3, 7) == [Part(3, 7, Fraction(0))]


@given(
    st.lists(
        st.tuples(
            st.sampled_from([ONE, TWO, THREE]),
            st.sets(st.sampled_from("abc"), min_size=1),
            st.integers(0, 30),
            st.integers(1, 20),
            st.none() | st.integers(0, 20),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 49),
)
def test_at_any_instant_those_that_hold_a_gpu_are_charged_for_one(
    held: Sequence[tuple[str, set[str], int, int, int | None]], at: int
) -> None:
    rows: list[tuple[Replica, EngineRow]] = []
    gpus: dict[str, tuple[str, ...]] = {}
    reached: dict[str, int] = {}
    for name, letters, gap, length, began in held:
        start = reached.get(name, 0) + gap
        own = gpus.setdefault(name, tuple(sorted(f"GPU-{letter}" for letter in letters)))
        rows.append((replica(name, *own), row(start, start + length, None if began is None else start + began)))
        reached[name] = start + length
    sharing = Sharing(rows)
    here = {one.name: one for one, interval in rows if interval.start_ns <= at < interval.end_ns}
    charged = sum((sharing.parts(one, at, at + 1)[0].units for one in here.values()), Fraction(0))
    assert charged == len({uuid for one in here.values() for uuid in one.gpus or ()})


class Shared:
    """Two engines on GPU-a, the second there from 04:20 to 04:40 only; every minute is scraped."""

    def __init__(self, folder: Path, gpus: Sequence[FakeGpu], abouts: dict[str, About]) -> None:
        self.path = new_ledger(folder)
        self.engines = [FakeEngine(name) for name in (ONE, TWO)]
        self.gpus = gpus
        self.deployment = Deployment(self.path, abouts, interval_seconds=60)

    def run(self, *, second: range = range(20, 41), minutes: int = 64) -> Shared:
        first, other = self.engines
        for engine in self.engines:
            engine.counts["running_requests"] = 1.0
        for minute in range(minutes):
            for gpu in self.gpus:
                gpu.run(60, 30)
            engines = [first, other] if minute in second else [first]
            for engine in engines:
                engine.serve(computed=600, hbm=200, generated=60, steps=60, seconds=24)
            self.deployment.scrape(START + minute * 60 * SECOND, engines, self.gpus)
        self.deployment.close()
        return self

    def facts(self) -> dict[str | None, Facts]:
        with reader_of(self.path) as reader:
            reader.add_rates(PRICES)
            book = RateBook([one for _, one in reader.rates()])
            raw = facts_of(reader, Window(START, START + HOUR), book, PAYMENT)
            settle(reader, START, book, PAYMENT)
            assert facts_of(reader, Window(START, START + HOUR), book, PAYMENT) == raw
            assert audit(reader, book) == []
        return {one.replica and one.replica.name: one for one in raw}


def about(*gpus: str) -> About:
    return About(gpus=gpus, mapping="a test")


def spent(facts: Facts, resource: str = "gpu") -> int:
    return sum(line.amount_nano for line in facts.lines or () if line.resource == resource)


def test_a_gpu_that_two_engines_share_is_paid_for_once(tmp_path: Path) -> None:
    shared = Shared(tmp_path, [FakeGpu("GPU-a")], {"10.0.0.1:8000": about("GPU-a"), "10.0.0.2:8000": about("GPU-a")})
    facts = shared.run().facts()
    # 3.60 an hour: 40 minutes alone and 20 minutes half are 50, and the other 20 half are 10
    assert {name: spent(one) for name, one in facts.items()} == {ONE: 3_000_000_000, TWO: 600_000_000}
    # of a host with one GPU, likewise; each span of time is rounded by itself
    assert spent(facts[ONE], "server") == pytest.approx(666_666_667, abs=1)
    assert spent(facts[TWO], "server") == pytest.approx(133_333_333, abs=1)
    assert [finding.kind for finding in facts[ONE].findings] == ["gpu_shared"]
    assert facts[ONE].findings[0].message == (
        f"GPU-a is held by {TWO} too: for that time each is charged an equal part of the price, and what their work is "
        "worth is not told apart; give each engine GPUs of its own"
    )
    assert facts[TWO].modelled


def test_the_seconds_of_a_shared_gpu_are_nobodys_working_time(tmp_path: Path) -> None:
    shared = Shared(tmp_path, [FakeGpu("GPU-a")], {"10.0.0.1:8000": about("GPU-a"), "10.0.0.2:8000": about("GPU-a")})
    for engine in shared.engines:
        engine.counts["kv_usage_ppm"] = 0.0
    first, other = shared.engines
    for minute in range(64):
        shared.gpus[0].run(60, 55)
        busy = minute % 2 == 0
        first.counts["running_requests"] = other.counts["running_requests"] = float(busy)
        first.serve(computed=10, generated=2, steps=2, seconds=6)
        other.serve(computed=600, generated=60, steps=60, seconds=48)
        shared.deployment.scrape(START + minute * 60 * SECOND, shared.engines, shared.gpus)
    shared.deployment.close()
    facts = shared.facts()
    # the GPU worked for 55 s of every minute; the requests of one engine took 6 s of it, those of the other 48
    assert facts[ONE].state_ns["occupied"] == 60 * 6 * SECOND
    assert facts[TWO].state_ns["occupied"] == 60 * 48 * SECOND
    assert facts[ONE].split is facts[TWO].split is None


def test_a_shared_gpu_is_told_in_the_report_and_its_cost_is_modelled(tmp_path: Path) -> None:
    shared = Shared(tmp_path, [FakeGpu("GPU-a")], {"10.0.0.1:8000": about("GPU-a"), "10.0.0.2:8000": about("GPU-a")})
    shared.run()
    with reader_of(shared.path) as reader:
        reader.add_rates(PRICES)
        book = RateBook([one for _, one in reader.rates()])
        report = cost_report(reader, Window(START, START + HOUR), ["model"], book, PAYMENT)
        alone = cost_report(reader, Window(START, START + 1200 * SECOND), ["model"], book, PAYMENT)
    (group,) = report.groups
    assert {finding.target for finding in report.findings if finding.kind == "gpu_shared"} == {
        f"engine/{ONE}",
        f"engine/{TWO}",
    }
    assert (group["basis"]["cost"], group["basis"]["active"]) == ("MODELLED", "MODELLED")
    assert alone.groups[0]["basis"]["cost"] == "MEASURED"


def cut(uuid: str, share: str, profile: str = "") -> FakeGpu:
    """A MIG instance, or (without a profile) what of GPU-a is in none."""
    gpu = FakeGpu(uuid, f"{SKU} MIG {profile}" if profile else SKU)
    gpu.attributes |= {"mig": "1", "share": share} | ({"parent": "GPU-a"} if profile else {})
    return gpu


def test_mig_instances_cost_their_shares_and_what_nobody_holds_is_unallocated(tmp_path: Path) -> None:
    gpus = [cut("GPU-a", "5/14"), cut("MIG-one", "1/7", "1g.10gb"), cut("MIG-two", "1/2", "3g.40gb")]
    shared = Shared(tmp_path, gpus, {"10.0.0.1:8000": about("MIG-one"), "10.0.0.2:8000": about("MIG-two")})
    facts = shared.run(second=range(31)).facts()
    hour = {name: spent(one) for name, one in facts.items()}
    # a seventh of 3.60, and a half of it for half an hour
    assert (hour[ONE], hour[TWO]) == (514_285_714, 900_000_000)
    assert spent(facts[ONE], "server") == 114_285_714
    # 5/14 all the hour, and MIG-two from 04:32 on: what begins within its own minute of the engine's last is held
    assert hour[None] == pytest.approx(3_600_000_000 * (5 / 14 + 1 / 2 * 28 / 60), abs=2_000)
    assert facts[ONE].findings == ()
    assert {line.sku for one in facts.values() for line in one.lines or () if line.resource == "gpu"} == {SKU}


def test_all_of_a_gpu_that_is_cut_comes_to_its_price(tmp_path: Path) -> None:
    gpus = [cut("GPU-a", "0"), cut("MIG-one", "7/15", "3g.40gb"), cut("MIG-two", "8/15", "4g.40gb")]
    shared = Shared(tmp_path, gpus, {"10.0.0.1:8000": about("MIG-one"), "10.0.0.2:8000": about("MIG-two")})
    facts = shared.run(second=range(64)).facts()
    assert {name: spent(one) for name, one in facts.items()} == {ONE: 1_680_000_000, TWO: 1_920_000_000}


def test_an_engine_on_a_gpu_that_is_cut_has_to_name_its_instance(tmp_path: Path) -> None:
    gpus = [cut("GPU-a", "6/7"), cut("MIG-one", "1/7", "1g.10gb")]
    shared = Shared(tmp_path, gpus, {"10.0.0.1:8000": about("GPU-a")})
    (facts,) = shared.run(second=range(0)).facts().values()  # nothing is called free: it may be that engine's own
    assert facts.lines is None
    (finding,) = facts.findings
    assert finding.kind == "replica_mapping_unknown"
    assert "GPU-a is cut into MIG instances: name the one that it holds, MIG-…" in finding.message


def test_energy_of_owned_mig_instances_is_said_to_be_unmetered(tmp_path: Path) -> None:
    gpus = [cut("GPU-a", "6/7"), cut("MIG-one", "1/7", "1g.10gb")]
    counts = cast("dict[str, float | None]", gpus[1].counts)
    counts |= {"energy_mj": None, "power_sampled_mj": None}
    own = about("MIG-one")._replace(term="owned")
    shared = Shared(tmp_path, gpus, {"10.0.0.1:8000": own})
    first = shared.engines[0]
    for minute in range(64):
        gpus[0].run(60, 30)
        first.serve(computed=10, generated=2, steps=2, seconds=6)
        shared.deployment.scrape(START + minute * 60 * SECOND, [first], gpus)
    shared.deployment.close()
    with reader_of(shared.path) as reader:
        owned = rate("gpu", "3.60", "gpu-hour", START - HOUR, sku=SKU)._replace(term="owned")
        (facts, *_) = [
            one
            for one in facts_of(reader, Window(START, START + HOUR), RateBook([owned]), PAYMENT)
            if one.replica is not None
        ]
    assert [finding.kind for finding in facts.findings] == ["energy_unknown"]
    assert "which of their MIG instances draws the power" in facts.findings[0].message


def test_gpus_of_a_page_that_no_engine_here_holds_are_not_paid_for_here(tmp_path: Path) -> None:
    gpus = [FakeGpu("GPU-a"), FakeGpu("GPU-b"), FakeGpu("GPU-c")]
    for gpu in gpus:
        gpu.attributes["source"] = "dcgm"
    shared = Shared(tmp_path, gpus, {"10.0.0.1:8000": about("GPU-a"), "10.0.0.2:8000": about("GPU-b")})
    facts = shared.run(second=range(31)).facts()
    # GPU-b was an engine's and then nobody's; GPU-c never was one's that is seen here
    assert facts[None].state_ns["unallocated"] == pytest.approx(28 * 60 * SECOND, abs=SECOND)
    # a third of the host: the page shows all its GPUs
    assert spent(facts[ONE], "server") == pytest.approx(266_666_667, abs=1)
