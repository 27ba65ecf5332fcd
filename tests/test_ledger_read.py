from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import (
    DETAIL_NAMES,
    HOUR,
    SECOND,
    SKU,
    START,
    Deployment,
    FakeEngine,
    FakeGpu,
    new_ledger,
    rate,
    reader_of,
    steps_of,
    url_of,
)

from kvtally.agent.finding import Finding
from kvtally.agent.ledger import settled
from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.errors import LedgerBusy, LedgerUnreachable
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.read import LedgerReader, Target, replica_of
from kvtally.agent.price import Rate
from kvtally.agent.replica import About

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NAMES = ("10.0.0.1:8000", "10.0.0.2:8000")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def scraped(path: str, *ends: Sequence[int | None]) -> None:
    """Two engines that serve 10 prompt tokens a second, scraped at these seconds after START (None: no answer)."""
    deployment = Deployment(path, {name: About(gpus=(), mapping="a test") for name in NAMES})
    engines = [FakeEngine(f"{name}/0") for name in NAMES]
    before = 0
    for moments in zip(*ends, strict=True):
        at = max(moment for moment in moments if moment is not None)
        for engine in engines:
            engine.serve(computed=10 * (at - before))
        before = at
        answering = [None if moment is None else engine for engine, moment in zip(engines, moments, strict=True)]
        deployment.scrape(START + at * SECOND, answering)
    deployment.close()


def spans(reader: LedgerReader, start: int, end: int) -> list[tuple[int, int, int]]:
    """(engine, start, end) in seconds after START."""
    names = {target.id: NAMES.index(target.name.split("/")[0]) for target in reader.targets().values()}
    rows = reader.engine_rows(START + start * SECOND, START + end * SECOND)
    return [(names[row.target_id], (row.start_ns - START) // SECOND, (row.end_ns - START) // SECOND) for row in rows]


def test_rows_that_touch_a_window_are_found_and_those_that_end_or_begin_at_its_edges_are_not(path: str) -> None:
    scraped(path, [0, 10, 20, 30], [0, 10, 20, 30])
    with reader_of(path) as reader:
        assert spans(reader, 10, 20) == [(0, 10, 20), (1, 10, 20)]
        assert spans(reader, 9, 21) == [(at, s, s + 10) for s in (0, 10, 20) for at in (0, 1)]
        assert spans(reader, 30, 90) == []
        assert spans(reader, -90, 0) == []


def test_an_interval_that_began_hours_before_a_window_is_found(path: str) -> None:
    hours = 7 * 3600
    scraped(path, [0, 10, hours, hours + 10], [0, 10, None, hours + 10])
    with reader_of(path) as reader:
        assert spans(reader, 3600, 3601) == [(0, 10, hours), (1, 10, hours + 10)]
        assert spans(reader, hours, hours + 1) == [(1, 10, hours + 10), (0, hours, hours + 10)]


def test_a_target_that_ended_before_a_window_is_not_looked_for(path: str) -> None:
    scraped(path, [0, 10, 20, 9000, 9010], [0, 10, None, None, None])
    with reader_of(path) as reader:
        assert spans(reader, 9005, 9006) == [(0, 9000, 9010)]
        assert spans(reader, 30, 40) == [(0, 20, 9000)]


def test_rows_carry_what_was_counted(path: str) -> None:
    scraped(path, [0, 10], [0, 10])
    with reader_of(path) as reader:
        row = next(reader.engine_rows(START, START + SECOND))
    assert (row.missed, row.began_ns) == (0, None)
    assert row.value("prompt_tokens") == row.value("computed_tokens") == 100
    assert row.value("hbm_tokens") == 0
    assert row.work()[0] == 100


def test_the_extent_of_a_ledger(path: str) -> None:
    with reader_of(path) as reader:
        assert reader.extent() is None
        assert reader.raw_from() is None
        assert reader.whole_hours_from() is None
        assert reader.pruned_before() is None
    scraped(path, [5, 15, 7200], [5, 15, 25])
    with reader_of(path) as reader:
        assert reader.extent() == (START + 5 * SECOND, START + 7200 * SECOND)
        assert reader.raw_from() == START + 5 * SECOND
        assert reader.whole_hours_from() == START


def test_pruned_intervals_are_known_to_have_been(path: str) -> None:
    scraped(path, range(0, 9000, 30), range(0, 9000, 30))
    with reader_of(path) as reader:
        before = reader.counts()["engine_interval"]
        removed = reader.prune(START + HOUR)
        # a minute is left for the sake of what crosses the edge: 3540 s in steps of 30, of two engines
        assert removed == {"engine_interval": 2 * 118}
        assert reader.counts()["engine_interval"] == before - 2 * 118
        assert reader.pruned_before() == reader.raw_from() == START + HOUR - 60 * SECOND
        assert reader.whole_hours_from() == START + HOUR
        assert reader.extent() == (START, START + 8970 * SECOND)
        assert reader.prune(START + HOUR) == {}
        assert reader.counts()["prune_log"] == 1


def test_hourly_sums_and_what_began_in_each_hour(path: str) -> None:
    scraped(path, range(0, 7300, 100), range(0, 7300, 100))
    with reader_of(path) as reader:
        rows = list(reader.hour_sums("engine", START, START + 3 * HOUR))
        assert [(row["hour_ns"], row["intervals"], row["prompt_tokens"]) for row in rows] == [
            (START, 36, 36_000),
            (START, 36, 36_000),
            (START + HOUR, 36, 36_000),
            (START + HOUR, 36, 36_000),
        ]
        assert reader.begun(START, START + 3 * HOUR) == {START: 72, START + HOUR: 72}
        assert reader.begun(START + 1, START + HOUR) == {}


def test_what_gpus_and_processes_say_reaches_over_a_window_and_back_to_where_it_began(path: str) -> None:
    deployment = Deployment(path, {})
    gpu = FakeGpu("GPU-a")
    for second in (0, 10, 20, 20_000, 20_010):
        gpu.run(10, 5)
        deployment.scrape(START + second * SECOND, [], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        targets = reader.targets()
        (present,) = reader.evidence(START + 10_000 * SECOND, START + 10_001 * SECOND, targets).present
        assert (present.uuid, present.sku) == ("GPU-a", SKU)
        # GPUs are read 2 ms before the engines here
        assert [(a - START) // SECOND for a, _ in present.spans] == [19]
        evidence = reader.evidence(START, START + 15 * SECOND, targets)
        assert evidence.graphics["GPU-a"].over(START + 5 * SECOND, START + 15 * SECOND) == pytest.approx(5e9)
        assert reader.evidence(START + 30_000 * SECOND, START + 30_001 * SECOND, targets).present == ()


def test_findings_come_oldest_first_and_only_those_that_touch_the_window(path: str) -> None:
    found = [
        Finding("b", "info", "engine/x", START + 10, START + 20, "second"),
        Finding("a", "error", "", START, START + 5, "first"),
        Finding("c", "warning", "", START + 30, START + 30, "third"),
    ]
    with closing(LedgerWriter(connect(path), path)) as writer:
        writer.append([], found)
        writer.append([], found)  # the same again is not told twice
    with reader_of(path) as reader:
        assert reader.findings(0, 2**62) == [found[1], found[0], found[2]]
        assert reader.findings(START + 5, START + 11) == [found[1], found[0]]
        assert reader.findings(START + 30, START + 31) == [found[2]]
        assert reader.findings(0, 2**62, limit=1) == [found[1]]


@pytest.mark.parametrize(
    ("ask", "most"),
    [
        (lambda reader: reader.extent(), 100),
        (lambda reader: reader.findings(START + 9 * HOUR, START + 10 * HOUR), 1000),
    ],
    ids=["the extent", "the findings of a window"],
)
def test_what_a_report_asks_first_costs_the_same_after_a_long_past(
    path: str, ask: Callable[[LedgerReader], object], most: int
) -> None:
    hours = (
        "INSERT INTO engine_hour (hour_ns, target_id, intervals, length_ns, missed, flags) VALUES (?, 1, 1, 1, 0, 0)"
    )
    told = "INSERT INTO finding (kind, severity, target, start_ns, end_ns, message) VALUES ('a', 'info', '', ?, ?, '')"
    taken = []
    with reader_of(path) as reader:
        reader.connection.exec_driver_sql("PRAGMA foreign_keys=OFF")
        for past in (range(10), range(-5000, 0)):
            starts = [START + hour * HOUR for hour in past]
            reader.connection.exec_driver_sql(hours, [(start_ns,) for start_ns in starts])
            reader.connection.exec_driver_sql(told, [(start_ns, start_ns + SECOND) for start_ns in starts])
            taken.append(steps_of(reader, partial(ask, reader)))
    assert taken[0] == taken[1] < most


def test_rates_come_back_as_they_were_written(path: str) -> None:
    energy = Rate(
        "energy", "", "hall 1", "owned", "kwh", 92_900_000, "EUR", 5, 9, "ASSUMED", "a bill", "n", None, Decimal("1.54")
    )
    card = [energy, rate("gpu", "2.69", "gpu-hour", START, sku=SKU, committed=8)]
    with reader_of(path) as reader:
        reader.add_rates(card)
        reader.add_rates([])
        assert reader.rates() == [(1, energy), (2, card[1])]
        assert isinstance(reader.rates()[0][1].pue, Decimal)


def test_of_rates_that_cannot_all_be_written_none_is(path: str) -> None:
    broken = rate("gpu", "1", "gpu-hour", START)._replace(price_nano=None)  # type: ignore[arg-type]
    with reader_of(path) as reader:
        with pytest.raises(LedgerUnreachable, match="NOT NULL"):
            reader.add_rates([rate("gpu", "1", "gpu-hour", START), broken])
        assert reader.rates() == []
        reader.add_rates([rate("gpu", "1", "gpu-hour", START)])
        assert len(reader.rates()) == 1


def test_of_a_settlement_whose_charges_cannot_be_written_nothing_is(path: str) -> None:
    charge = {"period_start_ns": START, "revision": 1, "target_id": None, "account": "{}", "resource": "gpu", "sku": ""}
    charge |= {
        "state": "idle",
        "quantity": 1,
        "unit": "gpu-ns",
        "rate_id": 77,
        "amount_nano": 1,
    }  # there is no such rate
    with reader_of(path) as reader:
        with pytest.raises(LedgerUnreachable, match="FOREIGN KEY"):
            reader.write_settlement(START, 1, reason="hour closed", intervals=0, facts={"facts": []}, charges=[charge])
        assert settled.revisions(reader, 0, 2**62) == {}
        assert reader.settled_hours() == {}


def test_the_newest_revision_of_a_settlement_answers(path: str) -> None:
    with reader_of(path) as reader:
        for revision, intervals in ((1, 7), (2, 9)):
            facts: dict[str, object] = {"facts": []}
            reader.write_settlement(START, revision, reason="test", intervals=intervals, facts=facts, charges=[])
        assert settled.revisions(reader, START, START + 1) == {START: 2}
        assert settled.revisions(reader, START + 1, START + HOUR) == {}
        assert reader.settled_hours() == {START: 9}


def test_charges_are_known_by_their_rates(path: str) -> None:
    charge = {"period_start_ns": START, "revision": 1, "target_id": None, "account": "{}", "resource": "gpu", "sku": ""}
    charge |= {"state": "idle", "quantity": 1, "unit": "gpu-ns", "rate_id": 2, "amount_nano": 1}
    with reader_of(path) as reader:
        reader.add_rates([rate("gpu", price, "gpu-hour", START) for price in ("1", "2", "3")])
        assert not reader.has_charges_at({1, 2, 3})
        reader.write_settlement(START, 1, reason="test", intervals=0, facts={"facts": []}, charges=[charge])
        assert reader.has_charges_at({2})
        assert reader.has_charges_at({1, 2})
        assert not reader.has_charges_at({1, 3})
        assert not reader.has_charges_at(())


def test_a_snapshot_does_not_see_what_is_written_meanwhile(path: str) -> None:
    scraped(path, [0, 10], [0, 10])
    with reader_of(path) as reader, closing(LedgerWriter(connect(path), path)) as writer:
        with reader.snapshot():
            assert reader.findings(0, 2**62) == []
            writer.append([], [Finding("a", "info", "", START, START, "meanwhile")])
            assert reader.findings(0, 2**62) == []
        assert len(reader.findings(0, 2**62)) == 1


def test_a_write_that_another_process_keeps_waiting_is_refused_in_bounded_time(path: str) -> None:
    with reader_of(path) as reader, closing(sqlite3.connect(path, isolation_level=None)) as other:
        reader.connection.exec_driver_sql("PRAGMA busy_timeout=100")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerBusy, match="locked by another process"):
            reader.add_rates([rate("gpu", "1", "gpu-hour", START)])
        other.execute("ROLLBACK")
        reader.add_rates([rate("gpu", "1", "gpu-hour", START)])


def test_a_page_overwritten_in_the_middle_is_one_clear_error(path: str) -> None:
    scraped(path, range(0, 9000, 10), range(0, 9000, 10))
    whole = Path(path).read_bytes()
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT pageno FROM dbstat WHERE name = 'engine_interval' AND pagetype = 'leaf' ORDER BY path LIMIT 1"
        (number,) = connection.execute(query).fetchone()
    damaged = whole[: (number - 1) * 4096] + b"\xff" * 4096 + whole[number * 4096 :]
    Path(path).write_bytes(damaged)
    with reader_of(path) as reader, pytest.raises(LedgerUnreachable, match="damaged") as caught:
        list(reader.engine_rows(START, START + 9000 * SECOND))
    assert ".recover" in caught.value.hint
    assert Path(path).read_bytes() == damaged


def test_targets_and_the_replicas_that_they_describe(path: str) -> None:
    about = About(
        gpus=("GPU-a", "GPU-b"), sku=SKU, mapping="config", labels={"tenant": "t"}, dram_gib="1.5", site="hall"
    )
    deployment = Deployment(path, {NAMES[0]: about})
    deployment.scrape(START, [FakeEngine(f"{NAMES[0]}/0")])
    deployment.close()
    with reader_of(path) as reader:
        ((number, target),) = reader.targets().items()
    assert (target.id, target.kind, target.name, target.detail_names) == (
        number,
        "engine",
        f"{NAMES[0]}/0",
        DETAIL_NAMES,
    )
    replica = replica_of(target)
    assert (replica.gpus, replica.gpu_units, replica.sku) == (("GPU-a", "GPU-b"), Fraction(2), SKU)
    assert (replica.model, replica.version, replica.term, replica.site) == ("llama-8b", "0.25.1", "on-demand", "hall")
    assert (replica.labels, replica.mapping) == ({"tenant": "t"}, "config")
    assert (replica.dram_gib, replica.storage_tib) == (Fraction(3, 2), Fraction(0))


def test_how_a_replica_is_run_comes_back_from_its_target(path: str) -> None:
    facts = {
        "shape": '{"architecture":"LlamaForCausalLM"}',
        "token_budget": "2048",
        "tensor_parallel": "4",
        "pipeline_parallel": "2",
        "eager": "1",
        "connector": "LMCacheConnectorV1",
    }
    deployment = Deployment(path, {NAMES[0]: About(gpus=(), facts=facts)})
    deployment.scrape(START, [FakeEngine(f"{NAMES[0]}/0")])
    deployment.close()
    with reader_of(path) as reader:
        (target,) = reader.targets().values()
    replica = replica_of(target)
    assert (replica.shape, replica.token_budget) == ('{"architecture":"LlamaForCausalLM"}', 2048)
    assert (replica.tensor_parallel, replica.pipeline_parallel, replica.eager) == (4, 2, True)
    assert replica.connector == "LMCacheConnectorV1"


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"shape": "", "token_budget": "", "tensor_parallel": "", "pipeline_parallel": "", "eager": "", "connector": ""},
        {"shape": "[1]", "token_budget": "8k", "tensor_parallel": "0", "pipeline_parallel": "-1", "eager": "yes"},
        {"shape": '{"a":', "token_budget": "9" * 5000, "tensor_parallel": "\u0662", "pipeline_parallel": "2.0"},
        {"shape": "[" * 100_000, "token_budget": "0"},
    ],
)
def test_of_a_target_that_tells_nothing_usable_the_defaults_hold(attributes: dict[str, str]) -> None:
    replica = replica_of(Target(1, "engine", "x/0", attributes, ()))
    assert (replica.shape, replica.token_budget, replica.eager, replica.connector) == ("", None, False, "")
    assert (replica.tensor_parallel, replica.pipeline_parallel) == (1, 1)


@pytest.mark.parametrize(
    ("attributes", "role", "group"),
    [
        ({}, "", ""),
        ({"role": "prefill", "group": "pair-1"}, "prefill", "pair-1"),
        ({"role": "decode"}, "decode", ""),
        ({"role": "both"}, "both", ""),
        ({"role": "encode"}, "", ""),  # of a later kvtally: nothing is made of it
    ],
)
def test_the_role_and_the_group_of_a_replica(attributes: dict[str, str], role: str, group: str) -> None:
    replica = replica_of(Target(1, "engine", "x/0", attributes, ()))
    assert (replica.role, replica.group) == (role, group)


@pytest.mark.parametrize(("gpus", "expected"), [({}, None), ({"gpus": ""}, ()), ({"gpus": "GPU-a"}, ("GPU-a",))])
def test_no_gpu_is_something_else_than_an_unknown_one(gpus: dict[str, str], expected: tuple[str, ...] | None) -> None:
    assert replica_of(Target(1, "engine", "x/0", gpus, ())).gpus == expected


def test_every_table_is_counted(path: str) -> None:
    scraped(path, [0, 10], [0, 10])
    with reader_of(path) as reader:
        counts = reader.counts()
        assert reader.state_ends() == {("engine", f"{name}/0"): START + 10 * SECOND for name in NAMES}
    assert {name: count for name, count in counts.items() if count} == {
        "target": 2,
        "engine_interval": 2,
        "engine_hour": 2,
        "counter_state": 2,
    }


def test_a_reader_leaves_no_file_behind_and_changes_nothing(tmp_path: Path, path: str) -> None:
    scraped(path, [0, 10], [0, 10])
    before = Path(path).read_bytes()
    with LedgerReader(url_of(path)) as reader:
        json.dumps(reader.counts())
    assert Path(path).read_bytes() == before
    assert [one.name for one in tmp_path.iterdir()] == ["ledger.db"]
