from __future__ import annotations

import sqlite3
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import event
from tests.ledgers import (
    HOUR,
    RATES,
    SECOND,
    SKU,
    START,
    STORY_END,
    Deployment,
    FakeEngine,
    FakeGpu,
    charges_of,
    new_ledger,
    rate,
    reader_of,
    tell_story,
)

from kvtally.agent.accounts import Payment, Window, facts_of
from kvtally.agent.audit import MOST, audit
from kvtally.agent.finding import Finding
from kvtally.agent.interval import IDENTITY_OK
from kvtally.agent.ledger.columns import quantity_columns
from kvtally.agent.ledger.errors import LedgerUnreachable
from kvtally.agent.price import Rate
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.settlement import due_hours, settle

if TYPE_CHECKING:
    from kvtally.agent.ledger.read import LedgerReader

PAYMENT = Payment()


def book_of(reader: LedgerReader) -> RateBook:
    return RateBook([one for _, one in reader.rates()])


def found(path: str) -> list[Finding]:
    with reader_of(path) as reader:
        return audit(reader, book_of(reader))


def kinds(path: str) -> set[str]:
    return {finding.kind for finding in found(path)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The story of tests.ledgers, every hour settled, one of them twice."""
    path = new_ledger(tmp_path_factory.mktemp("whole"))
    tell_story(path, seconds=60)
    with reader_of(path) as reader:
        for hour in due_hours(reader, STORY_END):
            settle(reader, hour, book_of(reader), PAYMENT)
        settle(reader, START + HOUR, book_of(reader), PAYMENT, reason="once more")
    return Path(path).read_bytes()


@pytest.fixture
def path(tmp_path: Path, whole: bytes) -> str:
    """A copy of it that a test may break."""
    place = tmp_path / "ledger.db"
    place.write_bytes(whole)
    return str(place)


def broken(path: str, *statements: str) -> None:
    """Do to a ledger what its triggers do not allow."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount > 0


def test_a_sound_ledger_has_no_findings(path: str) -> None:
    assert found(path) == []


def test_from_which_hour_on_intervals_are_whole_is_asked_once_for_all_charges(path: str) -> None:
    asked: list[str] = []
    with reader_of(path) as reader:
        assert len(charges_of(reader)) > 50
        event.listen(reader.connection, "before_cursor_execute", lambda _, __, statement, *___: asked.append(statement))
        audit(reader, book_of(reader))
    assert asked.count("SELECT min(engine_interval.start_ns) AS min_1 \nFROM engine_interval") == 1


def test_an_empty_ledger_has_no_findings(tmp_path: Path) -> None:
    assert found(new_ledger(tmp_path)) == []


# an engine interval of the first hour, by its rank in time, and one of the second engine that lies in the third
TENTH = "(SELECT start_ns FROM engine_interval WHERE target_id = 4 ORDER BY start_ns LIMIT 1 OFFSET 9)"
THAT = f"WHERE target_id = 4 AND start_ns = {TENTH}"
NEWEST = "(SELECT max(start_ns) FROM engine_interval WHERE target_id = 4)"
# the charge of the first engine's occupied GPU in the first hour
CHARGE = "WHERE id = (SELECT min(id) FROM charge WHERE target_id = 4 AND resource = 'gpu' AND state = 'occupied')"
SETTLED = f"WHERE period_start_ns = {START}"
ENTRY = "$.facts[1]"  # the first engine: GPUs that nobody holds come before

OTHER_VERSION = "INSERT INTO target SELECT 90, kind, name, '{}', detail_names FROM target WHERE id = 4"
INTERVAL = "INSERT INTO engine_interval (start_ns, target_id, length_ns, missed, flags)"
GPU_HOUR = "INSERT INTO gpu_hour (hour_ns, target_id, intervals, length_ns, missed, flags)"
IDLE = CHARGE.replace("occupied", "idle")

CASES = {
    "an interval that reaches into the next": (
        [f"UPDATE engine_interval SET length_ns = length_ns + 1 {THAT}"],
        {"intervals_overlap", "hour_wrong", "hour_overtaken"},
    ),
    "an interval of the same engine under another version": (
        [
            OTHER_VERSION,
            f"{INTERVAL} VALUES ({TENTH} + 1000, 90, 1000, 0, 0)",
        ],
        {"intervals_overlap", "hour_wrong", "hour_overtaken"},
    ),
    "an interval that is gone": (
        [f"DELETE FROM engine_interval {THAT}"],
        {"interval_missing", "hour_wrong", "hour_overtaken"},
    ),
    "the newest interval that is gone": (
        [f"DELETE FROM engine_interval WHERE target_id = 4 AND start_ns = {NEWEST}"],
        {"counters_out_of_step", "hour_wrong"},
    ),
    "counters that are older than the newest interval": (
        ["UPDATE counter_state SET taken_at_ns = taken_at_ns - 1 WHERE kind = 'gpu' AND name = 'GPU-b'"],
        {"counters_out_of_step"},
    ),
    "counters that are newer, with no clock that was set": (
        ["UPDATE counter_state SET taken_at_ns = taken_at_ns + 3600000000000 WHERE name = 'GPU-b'"],
        {"counters_out_of_step"},
    ),
    "an interval without a length": (
        [f"UPDATE engine_interval SET length_ns = 0 {THAT}"],
        {"quantity_impossible", "interval_missing", "hour_wrong", "hour_overtaken"},
    ),
    "a count below 0": (
        [f"UPDATE engine_interval SET preemptions = -1 {THAT}"],
        {"quantity_impossible", "hour_wrong"},
    ),
    "tokens by source that do not add up": (
        [f"UPDATE engine_interval SET computed_tokens = computed_tokens + 1 {THAT}"],
        {"identity_broken", "identity_flag_wrong", "hour_wrong"},
    ),
    "a sum that holds and reused tokens that the engine's own total denies": (
        [f"UPDATE engine_interval SET hbm_tokens = hbm_tokens - 1, computed_tokens = computed_tokens + 1 {THAT}"],
        {"identity_broken", "identity_flag_wrong", "hour_wrong"},
    ),
    "an interval that does not say that it was checked": (
        [f"UPDATE engine_interval SET flags = flags & ~{IDENTITY_OK} {THAT}"],
        {"identity_flag_wrong"},
    ),
    "details that end in the middle": (
        [f"UPDATE engine_interval SET details = x'0181' {THAT}"],
        {"details_unreadable"},
    ),
    "more details than the target has names": (
        [f"UPDATE engine_interval SET details = x'0401' {THAT}"],
        {"details_unreadable"},
    ),
    "an hourly sum": (["UPDATE gpu_hour SET energy_mj = energy_mj + 1 WHERE target_id = 2"], {"hour_wrong"}),
    "flags of an hour": (["UPDATE engine_hour SET flags = flags | 1024 WHERE target_id = 4"], {"hour_wrong"}),
    "an hour without its sums": (["DELETE FROM gpu_hour WHERE target_id = 3"], {"hour_wrong"}),
    "sums of an hour that has no interval": (
        [f"{GPU_HOUR} VALUES ({START - HOUR}, 1, 1, 1, 0, 0)"],
        {"hour_wrong"},
    ),
    "a revision that is gone": (
        [f"UPDATE settlement SET revision = 3 WHERE period_start_ns = {START + HOUR} AND revision = 2"],
        {"revision_missing", "charge_unsettled", "charge_quantity_wrong"},
    ),
    "a settlement of half an hour": (
        [f"UPDATE settlement SET period_end_ns = period_end_ns - 1800000000000 {SETTLED}"],
        {"settlement_wrong", "states_wrong"},
    ),
    "charges without a settlement": ([f"DELETE FROM settlement {SETTLED}"], {"charge_unsettled"}),
    "a charge that is gone": ([f"DELETE FROM charge {CHARGE}"], {"charge_quantity_wrong"}),
    "a charge for a nanosecond more": (
        [f"UPDATE charge SET quantity = quantity + 1 {CHARGE}"],
        {"charge_quantity_wrong"},
    ),
    "a charge in another state": ([f"UPDATE charge SET state = 'asleep' {CHARGE}"], {"charge_quantity_wrong"}),
    "an amount that is three nano-units too high": (
        [f"UPDATE charge SET amount_nano = amount_nano + 3 {CHARGE}"],
        {"charge_wrong"},
    ),
    "an amount that is moved from state to state": (
        [
            f"UPDATE charge SET amount_nano = amount_nano + 5 {CHARGE}",
            f"UPDATE charge SET amount_nano = amount_nano - 5 {IDLE}",
        ],
        {"charge_wrong"},
    ),
    "an amount below 0": (
        [f"UPDATE charge SET amount_nano = -1, quantity = 0 {CHARGE}"],
        {"charge_wrong", "charge_quantity_wrong"},
    ),
    "a charge at the price of another time": (
        [f"UPDATE charge SET rate_id = 2 {CHARGE}"],
        {"rate_wrong", "charge_wrong"},
    ),
    "a charge at the price of something else": ([f"UPDATE charge SET rate_id = 3 {CHARGE}"], {"rate_wrong"}),
    "a charge without a price": ([f"UPDATE charge SET rate_id = 99 {CHARGE}"], {"rate_wrong"}),
    "a charge for a replica that was not there": (
        [f"UPDATE charge SET target_id = 1 {CHARGE}"],
        {"charge_unfounded", "charge_quantity_wrong"},
    ),
    "a charge where the price was unknown": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.priced', json('false')) {SETTLED}"],
        {"charge_unfounded"},
    ),
    "states with more time than there is": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.state_ns.idle', 3600000000000) {SETTLED}"],
        {"states_wrong", "charge_quantity_wrong", "hour_overtaken"},
    ),
    "a state that cannot be": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.state_ns.dreaming', 0) {SETTLED}"],
        {"states_wrong"},
    ),
    "a share of prefill beyond the whole": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.split', json('[0.5, 0.7, 1.2, 1, 1, 9]')) {SETTLED}"],
        {"split_wrong"},
    ),
    "a share of prefill outside its interval": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.split', json('[0.5, 0.4, 0.6, 1, 1, 9]')) {SETTLED}"],
        {"split_wrong"},
    ),
    "a time beyond the hour": (
        [f"UPDATE settlement SET facts = json_set(facts, '{ENTRY}.end_ns', {START + HOUR + 1}) {SETTLED}"],
        {"states_wrong"},
    ),
    "free GPUs with less time than is charged": (
        [f"UPDATE settlement SET facts = json_set(facts, '$.facts[0].state_ns.unallocated', 1) {SETTLED}"],
        {"charge_quantity_wrong"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_audit_finds(path: str, case: str) -> None:
    statements, expected = CASES[case]
    broken(path, *statements)
    assert kinds(path) == expected


def test_a_finding_names_what_where_and_when(path: str) -> None:
    broken(path, f"UPDATE engine_interval SET hbm_tokens = NULL, preemptions = -7 {THAT}")
    with closing(sqlite3.connect(path)) as connection:
        query = f"SELECT start_ns, start_ns + length_ns FROM engine_interval {THAT}"
        span = connection.execute(query).fetchone()
    first = next(finding for finding in found(path) if finding.kind == "quantity_impossible")
    assert first[1:] == ("error", "engine/10.0.0.1:8000/0", *span, "preemptions cannot be")


def test_an_interval_after_one_that_lacked_a_family_need_not_be_checked(path: str) -> None:
    lacking = f"UPDATE engine_interval SET hbm_tokens = NULL, flags = flags & ~{IDENTITY_OK}"
    following = (
        f"UPDATE engine_interval SET hbm_tokens = hbm_tokens + 5, flags = flags & ~{IDENTITY_OK} WHERE target_id = 4 "
        f"AND start_ns = (SELECT min(start_ns) FROM engine_interval WHERE target_id = 4 AND start_ns > {TENTH})"
    )
    broken(path, f"{lacking} {THAT}", following)
    assert kinds(path) == {"hour_wrong"}
    broken(path, f"UPDATE engine_interval SET hbm_tokens = 0 {THAT}")
    assert kinds(path) == {"hour_wrong", "identity_broken", "identity_flag_wrong"}


def test_a_clock_that_was_set_forward_explains_a_gap_of_its_own_length_only(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU, mapping="a test")})
    at_ns = START
    for number in range(300):
        gpu.run(20, 3)
        engine.serve(computed=10)
        deployment.scrape(at_ns, [engine], [gpu])
        if number in {100, 200}:
            deployment.pipeline.skip(
                777 * SECOND, Finding("clock_set_forward", "warning", "", at_ns, at_ns + 777 * SECOND, "a step")
            )
            at_ns += 777 * SECOND
        at_ns += 20 * SECOND
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        for hour in due_hours(reader, at_ns + HOUR):
            settle(reader, hour, book_of(reader), PAYMENT)
    assert found(path) == []
    broken(path, "UPDATE finding SET end_ns = end_ns + 1 WHERE kind = 'clock_set_forward'")
    assert kinds(path) == {"interval_missing"}


def test_an_interval_that_comes_after_its_hour_was_settled_is_told_until_it_is_settled_again(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=(), mapping="a test")})
    engine = FakeEngine("10.0.0.1:8000/0")
    for second in (0, 20):
        deployment.scrape(START + second * SECOND, [engine])
    with reader_of(path) as reader:
        reader.add_rates([rate("server", "1", "server-hour", START - HOUR, sku="cpu-host")])
        settle(reader, START, book_of(reader), PAYMENT)
        assert audit(reader, book_of(reader)) == []
        deployment.scrape(START + 40 * SECOND, [engine])
        deployment.close()
        (finding,) = audit(reader, book_of(reader))
        assert (finding.kind, finding.severity) == ("hour_overtaken", "warning")
        assert "20000000000 ns are settled, its intervals have 40000000000 ns" in finding.message
        settle(reader, START, book_of(reader), PAYMENT)
        assert audit(reader, book_of(reader)) == []


def test_a_price_that_was_superseded_since_is_told_as_long_as_it_can_be_changed(path: str) -> None:
    with reader_of(path) as reader:
        reader.add_rates([rate("gpu", "1", "gpu-hour", START + 3 * HOUR, sku=SKU)])
        book = book_of(reader)
        findings = audit(reader, book)
        assert {(one.kind, one.severity, one.start_ns) for one in findings} == {
            ("rate_superseded", "info", START + 3 * HOUR)
        }
        assert "kvtally ledger settle --again 2026-11-23T07:00:00.000Z" in findings[0].message
        reader.prune(STORY_END)
        assert audit(reader, book) == []


def test_energy_and_memory_are_charged_for_what_is_held_and_used(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    about = About(("GPU-a",), None, "a test", SKU, term="owned", dram_gib="1.1", storage_tib="0.333")
    deployment = Deployment(path, {"10.0.0.1:8000": about})
    for number in range(200):
        gpu.run(20, number % 20)
        engine.serve(computed=7 * number, steps=number % 3)
        deployment.scrape(START + number * 20 * SECOND, [engine], [gpu])
    deployment.close()
    since = START - 10 * HOUR
    owned = [
        rate("gpu", "1.470000007", "gpu-hour", since, sku=SKU, term="owned"),
        rate("energy", "0.0929", "kwh", since, term="owned"),
        rate("dram", "0.0123456", "gib-hour", since, term="owned"),
        rate("storage", "33.3", "tib-month", since, term="owned"),
        rate("storage", "44.4", "tib-month", START + 1234 * SECOND + 1, term="owned"),
    ]
    with reader_of(path) as reader:
        book = RateBook(owned)
        reader.add_rates(book.rates)
        settle(reader, START, book, PAYMENT)
        assert audit(reader, book) == []
        charged = {charge["resource"] for charge in charges_of(reader)}
    assert charged == {"gpu", "energy", "dram", "storage"}
    for resource in charged:
        broken(path, f"UPDATE charge SET amount_nano = amount_nano + 20 WHERE resource = '{resource}'")
        assert kinds(path) == {"charge_wrong"}
        broken(path, f"UPDATE charge SET amount_nano = amount_nano - 20 WHERE resource = '{resource}'")


def test_what_is_reserved_and_not_used_is_a_charge_without_a_time(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    about = About(("GPU-a",), None, "a test", SKU, term="reserved")
    deployment = Deployment(path, {"10.0.0.1:8000": about})
    for number in range(200):
        gpu.run(20, number % 20)
        engine.serve(computed=7 * number, steps=number % 3)
        deployment.scrape(START + number * 20 * SECOND, [engine], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates([rate("gpu", "1.9", "gpu-hour", START - HOUR, sku=SKU, term="reserved", committed=4)])
        book = book_of(reader)
        window = Window(START, START + HOUR)
        raw = facts_of(reader, window, book, PAYMENT)
        settle(reader, START, book, PAYMENT)
        assert facts_of(reader, window, book, PAYMENT) == raw
        assert audit(reader, book) == []
        unused = [charge for charge in charges_of(reader) if charge["state"] == "unused"]
    # three of four GPUs all the hour
    assert [(one["target_id"], one["quantity"], one["amount_nano"]) for one in unused] == [
        (None, 3 * HOUR, 5_700_000_000)
    ]
    broken(path, "UPDATE charge SET amount_nano = amount_nano + 4 WHERE state = 'unused'")
    assert kinds(path) == {"charge_wrong"}


def test_a_ledger_that_is_broken_throughout_says_so_in_a_page(path: str) -> None:
    broken(path, "UPDATE engine_interval SET preemptions = -1, steps = -1")
    findings = found(path)
    several = [finding for finding in findings if finding.kind == "quantity_impossible"]
    assert len(several) == MOST
    assert several[0].message == "preemptions, steps cannot be"
    cut = [finding for finding in findings if finding.kind == "audit_cut_short"]
    assert [finding.message for finding in cut] == [f"and more than {MOST} findings like the last ones"]


def test_a_ledger_that_cannot_be_read_to_its_end_is_an_error(path: str) -> None:
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT max(pageno) FROM dbstat WHERE name = 'gpu_interval' AND pagetype = 'leaf'"
        (number,) = connection.execute(query).fetchone()
    body = Path(path).read_bytes()
    Path(path).write_bytes(body[: (number - 1) * 4096] + b"\xff" * 4096 + body[number * 4096 :])
    with pytest.raises(LedgerUnreachable, match="damaged"):
        found(path)


def test_the_audit_holds_a_small_part_of_a_large_ledger(tmp_path: Path) -> None:
    path, count = new_ledger(tmp_path), 15_000
    names = quantity_columns("engine")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("INSERT INTO target VALUES (1, 'engine', 'x/0', '{}', '[]')")
        marks = ", ".join("?" * (7 + len(names)))
        rows = ((START + at, 1, 1, 0, 0, None, *[None] * len(names), b"") for at in range(count))
        connection.executemany(f"INSERT INTO engine_interval VALUES ({marks})", rows)
        head = "hour_ns, target_id, intervals, length_ns, missed, flags"
        connection.execute(f"INSERT INTO engine_hour ({head}) VALUES ({START}, 1, {count}, {count}, 0, 0)")
        connection.execute(f"INSERT INTO counter_state VALUES ('engine', 'x/0', 1, {START + count}, '{{}}')")
    with reader_of(path) as reader:
        book = RateBook(list[Rate]())
        audit(reader, book)  # what is loaded and compiled once
        tracemalloc.start()
        assert audit(reader, book) == []
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 3_000_000  # a thousand rows at a time; all of them are 10 MB
