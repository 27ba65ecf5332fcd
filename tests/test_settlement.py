from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
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
    killed_at,
    new_ledger,
    rate,
    reader_of,
    tell_story,
)
from tests.serving import NAME, ServingEngine, Site

from kvtally.agent.accounts import Payment, Window, facts_of
from kvtally.agent.audit import audit
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.settlement import GRACE_NS, due_hours, prune_before, settle, settle_again, settle_hours

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtally.agent.ledger.read import LedgerReader

PAYMENT = Payment()
DAY = 24 * HOUR


def book_of(reader: LedgerReader) -> RateBook:
    return RateBook([one for _, one in reader.rates()])


def rows(path: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture
def story(tmp_path: Path) -> Iterator[LedgerReader]:
    path = new_ledger(tmp_path)
    tell_story(path)
    with reader_of(path) as reader:
        yield reader


def settle_all(reader: LedgerReader, now_ns: int = STORY_END) -> list[int]:
    due = due_hours(reader, now_ns)
    for hour in due:
        settle(reader, hour, book_of(reader), PAYMENT)
    return due


def one_engine(path: str, ends: range, *, gpu: bool = True) -> None:
    """An engine that is busy all the time, scraped at these seconds after START; it holds one GPU."""
    engine, device = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    about = About(gpus=("GPU-a",) if gpu else (), sku=SKU if gpu else "", mapping="a test")
    deployment = Deployment(path, {"10.0.0.1:8000": about}, interval_seconds=ends.step)
    engine.counts["running_requests"] = 1.0
    for second in ends:
        engine.serve(computed=900, hbm=100, generated=10, steps=10)
        device.run(ends.step, ends.step)
        deployment.scrape(START + second * SECOND, [engine], [device] if gpu else [])
    deployment.close()


def test_an_hour_of_a_busy_gpu_costs_its_price(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, range(-60, 3900, 30))
    with reader_of(path) as reader:
        reader.add_rates([rate("gpu", "2.69", "gpu-hour", START - DAY, sku=SKU)])
        assert settle(reader, START, book_of(reader), PAYMENT) == 1
    charges = rows(path, "SELECT target_id, account, resource, sku, state, quantity, unit, amount_nano FROM charge")
    engine_id = rows(path, "SELECT id FROM target WHERE kind = 'engine'")[0][0]
    assert charges == [(engine_id, "{}", "gpu", SKU, "occupied", HOUR, "gpu-ns", 2_690_000_000)]
    ((reason, intervals, facts),) = rows(path, "SELECT reason, intervals, facts FROM settlement")
    assert (reason, intervals) == ("hour closed", 120)
    assert json.loads(facts)["facts"][0]["state_ns"]["occupied"] == HOUR


def test_every_settled_hour_is_to_the_nano_unit_what_its_raw_intervals_make(story: LedgerReader) -> None:
    book = book_of(story)
    due = due_hours(story, STORY_END)
    assert due == [START + hour * HOUR for hour in range(4)]
    for hour in due:
        window = Window(hour, hour + HOUR)
        raw = facts_of(story, window, book, PAYMENT, use_settled=False)
        assert settle(story, hour, book, PAYMENT) == 1
        assert facts_of(story, window, book, PAYMENT) == raw
        assert any(one.split for one in raw)


def test_a_price_change_is_charged_at_its_nanosecond(story: LedgerReader) -> None:
    settle_all(story)
    free = [
        (charge["rate_id"], charge["quantity"], charge["amount_nano"])
        for charge in charges_of(story, START + HOUR, START + 2 * HOUR)
        if charge["target_id"] is None
    ]
    # 05:30:00.000000007; 2.690000001 x 1800.000000007 s and 3.333333333 x 1799.999999993 s, in nano-units
    assert free == [(1, 1_800_000_000_007, 1_345_000_001), (2, 1_799_999_999_993, 1_666_666_666)]


def test_settling_again_writes_a_revision_and_leaves_the_first_as_it_was(story: LedgerReader) -> None:
    settle_all(story)
    before = rows(story.path, "SELECT * FROM charge ORDER BY id"), rows(story.path, "SELECT * FROM settlement")
    story.add_rates([rate("gpu", "1.5", "gpu-hour", START, sku=SKU)])
    assert settle(story, START, book_of(story), PAYMENT, reason="a new price") == 2
    charges = rows(story.path, "SELECT * FROM charge ORDER BY id")
    settlements = rows(story.path, "SELECT * FROM settlement")
    assert charges[: len(before[0])] == before[0]
    assert set(before[1]) < set(settlements)
    revised = [row for row in settlements if row not in before[1]]
    assert [(row[0], row[1], row[3]) for row in revised] == [(START, 2, "a new price")]
    facts = facts_of(story, Window(START, START + HOUR), book_of(story), PAYMENT)
    free = next(one for one in facts if one.replica is None)
    # the newest revision answers: 2993.000641747 s of the free GPU at 1.5 an hour
    assert [line.amount_nano for line in free.lines or ()] == [1_247_083_601]


def test_a_new_price_settles_again_the_hours_that_it_concerns(story: LedgerReader) -> None:
    settle_all(story)
    story.add_rates([rate("gpu", "9.9", "gpu-hour", START + 2 * HOUR, sku=SKU)])
    assert settle_again(story, START + 2 * HOUR, book_of(story), PAYMENT) == (2, 0)
    revisions = rows(story.path, "SELECT period_start_ns, max(revision) FROM settlement GROUP BY 1 ORDER BY 1")
    assert [revision for _, revision in revisions] == [1, 1, 2, 2]
    assert audit(story, book_of(story)) == []


def test_hours_whose_intervals_have_aged_out_are_not_settled_again(story: LedgerReader) -> None:
    settle_all(story)
    assert prune_before(story, HOUR) != {}  # the newest interval ends after 08:14: what ended by 07:00 goes
    assert settle_again(story, START, book_of(story), PAYMENT) == (1, 3)
    assert rows(story.path, "SELECT period_start_ns FROM settlement WHERE revision = 2") == [(START + 3 * HOUR,)]


def test_an_hour_is_due_when_every_engine_is_two_minutes_past_it(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, range(-60, 3700, 30))  # to 05:01:30
    with reader_of(path) as reader:
        assert due_hours(reader, START + HOUR + 100 * SECOND) == [START - HOUR]
    one_engine_again(path, 3720)
    with reader_of(path) as reader:
        assert due_hours(reader, START + HOUR + 130 * SECOND) == [START - HOUR, START]


def one_engine_again(path: str, second: int) -> None:
    engine = FakeEngine("10.0.0.1:8000/0")
    engine.counts |= dict.fromkeys(("prompt_tokens", "computed_tokens"), 1e6) | {"running_requests": 1.0}
    about = About(gpus=("GPU-a",), sku=SKU, mapping="a test")
    deployment = Deployment(path, {"10.0.0.1:8000": about})
    deployment.scrape(START + second * SECOND, [engine])
    deployment.close()


def test_an_engine_that_is_gone_holds_an_hour_up_for_a_quarter_of_an_hour(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, range(0, 1800, 30))
    with reader_of(path) as reader:
        assert due_hours(reader, START + HOUR + GRACE_NS - 1) == []
        assert due_hours(reader, START + HOUR + GRACE_NS) == [START]
        assert due_hours(reader, START + 365 * DAY) == [START]  # of the year since nothing is there to settle


def test_nothing_is_due_in_an_empty_ledger(tmp_path: Path) -> None:
    with reader_of(new_ledger(tmp_path)) as reader:
        assert due_hours(reader, STORY_END) == []
        assert prune_before(reader, HOUR) == {}
        assert settle_again(reader, 0, RateBook([]), PAYMENT) == (0, 0)


def test_intervals_that_come_after_their_hour_was_settled_write_a_revision(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, range(0, 3000, 30))  # then its page does not answer
    with reader_of(path) as reader:
        reader.add_rates([rate("gpu", "2.69", "gpu-hour", START - DAY, sku=SKU)])
        assert settle_all(reader, START + 2 * HOUR + GRACE_NS) == [START]  # of 05:00 there is nothing to settle
        assert due_hours(reader, START + 2 * HOUR + GRACE_NS) == []
    one_engine_again(path, 9000)  # one interval from 04:49:30 to 06:30
    with reader_of(path) as reader:
        book = book_of(reader)
        assert [one.kind for one in audit(reader, book)] == ["hour_overtaken"]
        assert settle_all(reader, START + 9000 * SECOND) == [START, START + HOUR]
        assert due_hours(reader, START + 9000 * SECOND) == []
        assert audit(reader, book) == []
        facts = facts_of(reader, Window(START, START + 2 * HOUR), book, PAYMENT)
    assert [sum(one.state_ns.values()) for one in facts] == [HOUR, HOUR]
    # the first revision of 04:00 had 2970 s
    assert rows(
        path,
        "SELECT revision, sum(amount_nano), reason FROM charge JOIN settlement USING (period_start_ns, "
        "revision) GROUP BY period_start_ns, revision ORDER BY period_start_ns, revision",
    ) == [
        (1, 2_219_250_000, "hour closed"),
        (2, 2_690_000_000, "intervals of this hour came after it was settled"),
        (1, 2_690_000_000, "hour closed"),
    ]


def test_a_clock_that_was_set_back_settles_no_hour_twice(story: LedgerReader) -> None:
    now_ns = START + HOUR  # by the wall clock; the ledger's own time is three hours ahead
    assert settle_all(story, now_ns) == [START + hour * HOUR for hour in range(4)]
    assert due_hours(story, now_ns) == []


def test_prune_removes_only_raw_intervals_of_settled_hours_and_says_what(story: LedgerReader) -> None:
    book, window = book_of(story), Window(START, START + 4 * HOUR)
    for hour in (START, START + HOUR):
        settle(story, hour, book, PAYMENT)
    before = {table: set(rows(story.path, f"SELECT * FROM {table}")) for table in story.counts()}
    answers = facts_of(story, window, book, PAYMENT)
    removed = prune_before(story, SECOND)  # 06:00 is not settled: its intervals stay
    after = {table: set(rows(story.path, f"SELECT * FROM {table}")) for table in story.counts()}
    # an engine's interval lasts from 05:49:47 to 06:25:07: it stays, and a minute before it for its GPU's sake
    long_ns = rows(story.path, "SELECT start_ns FROM engine_interval ORDER BY length_ns DESC LIMIT 1")[0][0]
    assert long_ns // SECOND == START // SECOND + 6587
    edge = long_ns - 60 * SECOND
    changed = {table for table in before if before[table] != after[table]}
    assert changed == {"engine_interval", "gpu_interval", "prune_log"}
    for table in ("engine_interval", "gpu_interval"):
        assert after[table] == {row for row in before[table] if row[0] + row[2] > edge}
        assert removed[table] == len(before[table]) - len(after[table]) > 0
    assert after["prune_log"] == {(1, edge, json.dumps(removed, sort_keys=True))}
    assert facts_of(story, window, book, PAYMENT) == answers
    assert audit(story, book) == []
    assert story.raw_from() == edge
    assert story.whole_hours_from() == START + 2 * HOUR


def test_settled_hours_answer_when_not_one_raw_interval_is_left(story: LedgerReader) -> None:
    settle_all(story)
    book, window = book_of(story), Window(START, START + 4 * HOUR)
    answers = facts_of(story, window, book, PAYMENT)
    story.prune(STORY_END + HOUR)
    assert story.counts()["engine_interval"] == 0
    assert story.raw_from() is None
    assert story.extent() == (START, START + 5 * HOUR)
    assert facts_of(story, window, book, PAYMENT) == answers
    assert audit(story, book) == []


def test_an_engine_without_a_gpu_is_charged_for_its_server(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    one_engine(path, range(-30, 3900, 30), gpu=False)
    with reader_of(path) as reader:
        reader.add_rates([rate("server", "0.36", "server-hour", START - DAY, sku="cpu-host"), *RATES])
        settle(reader, START, book_of(reader), PAYMENT)
        assert audit(reader, book_of(reader)) == []
    charges = rows(path, "SELECT resource, sku, state, quantity, unit, amount_nano FROM charge")
    assert charges == [("server", "cpu-host", "occupied", HOUR, "server-ns", 360_000_000)]


def look_after(path: str) -> None:
    """What `kvtally run` has done every quarter of an hour: settle what is due, and prune."""
    with reader_of(path) as reader:
        settle_all(reader)
        prune_before(reader, HOUR)


def test_a_settlement_or_a_prune_that_is_killed_at_any_statement_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    statements = 0
    while killed_at(statements, lambda: look_after(path)):
        with reader_of(path) as reader:
            assert audit(reader, book_of(reader)) == []
        statements += 9
    assert statements > 27
    settled = rows(path, "SELECT period_start_ns, revision FROM settlement ORDER BY 1")
    assert settled == [(START + hour * HOUR, 1) for hour in range(4)]
    assert rows(path, "SELECT count(*) FROM prune_log") == [(1,)]
    with reader_of(path) as reader:
        assert audit(reader, book_of(reader)) == []


# -- what reuse was worth


def savings_of(reader: LedgerReader) -> dict[int, tuple[int, int | None, bool]]:
    """By hours after the start: revision, number of the calibration, and whether there is a figure."""
    return {
        (hour_ns - START) // HOUR: (one.revision, one.calibration_id, one.body["worth"] is not None)
        for (hour_ns, _), one in reader.savings(0, 2**62).items()
    }


def served(path: str, seconds: int) -> Site:
    site = Site(path, [ServingEngine(NAME)])
    site.scrape(site.engines)
    return site.serve(seconds)


def test_hours_are_settled_by_a_law_that_is_learned_and_stored_first(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    served(path, 2 * 3600 + 600).close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        due = due_hours(reader, START + 2 * HOUR + GRACE_NS)
        assert settle_hours(reader, due, START + 2 * HOUR + GRACE_NS, book_of(reader), PAYMENT) == [1, 1]
        assert savings_of(reader) == {0: (1, 1, True), 1: (1, 1, True)}
        assert settle_hours(reader, [], STORY_END, book_of(reader), PAYMENT) == []
        (law,) = reader.calibrations()
        assert audit(reader, book_of(reader)) == []
    assert (law.reason, law.calibration.evidence.end_ns) == ("first evidence", START + (2 * 3600 + 600) * SECOND)


def test_an_hour_that_intervals_come_to_later_is_valued_again_by_the_law_that_it_had(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    site = served(path, 3000)
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        settle_hours(reader, [START], START + HOUR + GRACE_NS, book_of(reader), PAYMENT)
        before = reader.savings(0, 2**62)
    site.serve(3600).close()
    with reader_of(path) as reader:
        (hour,) = due_hours(reader, site.at_ns)
        assert hour == START
        assert settle_hours(reader, [hour], site.at_ns, book_of(reader), PAYMENT) == [2]
        assert [one.id for one in reader.calibrations()] == [1, 2]  # an hour has passed: there is a newer one
        assert savings_of(reader) == {0: (2, 1, True)}
        after = reader.savings(0, 2**62)
    (first,), (second,) = before.values(), after.values()
    # 100 and 120 scrapes of four requests
    assert (first.body["worth"]["requests"], second.body["worth"]["requests"]) == (400.0, 480.0)


def test_engines_that_have_no_law_are_settled_all_the_same(story: LedgerReader) -> None:
    due = due_hours(story, STORY_END)
    facts = [facts_of(story, Window(hour, hour + HOUR), book_of(story), PAYMENT, use_settled=False) for hour in due]
    assert settle_hours(story, due, STORY_END, book_of(story), PAYMENT) == [1] * 4
    assert [facts_of(story, Window(hour, hour + HOUR), book_of(story), PAYMENT) for hour in due] == facts
    bodies = [one.body for one in story.savings(0, 2**62).values()]
    assert {body["worth"] for body in bodies} == {None}
    assert {reason[0] for body in bodies for reason in body["reasons"]} == {"the shape of model llama-8b is not known"}
    assert story.calibrations() == []
    assert audit(story, book_of(story)) == []


def test_settling_that_is_killed_at_any_statement_leaves_hours_whole_or_unsettled(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    served(path, 2 * 3600 + 600).close()

    def settle_them() -> None:
        with reader_of(path) as reader:
            now_ns = START + 2 * HOUR + GRACE_NS
            settle_hours(reader, due_hours(reader, now_ns), now_ns, book_of(reader), PAYMENT)

    with reader_of(path) as reader:
        reader.add_rates(RATES)
    statements = 0
    while killed_at(statements, settle_them):
        with reader_of(path) as reader:
            assert audit(reader, book_of(reader)) == []
            assert savings_of(reader).keys() == {(hour - START) // HOUR for hour in reader.settled_hours()}
        statements += 7
    assert statements > 14
    with reader_of(path) as reader:
        # the law is the same whenever the work begins anew
        assert savings_of(reader) == {0: (1, 1, True), 1: (1, 1, True)}
        assert len(reader.calibrations()) == 1
