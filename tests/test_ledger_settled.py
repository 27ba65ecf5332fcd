from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import HOUR, RATES, SECOND, START, charges_of, new_ledger, rate, reader_of, tell_story

from kvtally.agent.accounts import Payment, Window, facts_of
from kvtally.agent.facts import WORK
from kvtally.agent.ledger import settled
from kvtally.agent.rates import RateBook
from kvtally.agent.settlement import settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.ledger.read import LedgerReader

HOURS = {START: 2, START + HOUR: 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The story of tests.ledgers with three hours settled, the first twice: at a dearer price."""
    path = new_ledger(tmp_path_factory.mktemp("settled"))
    tell_story(path)
    with reader_of(path) as reader:
        book = RateBook(RATES)
        for hour in (START, START + HOUR, START + 2 * HOUR):
            settle(reader, hour, book, Payment())
        reader.add_rates([rate("server", "1.4", "server-hour", START - HOUR, sku="gpu-host")])
        settle(reader, START, RateBook([one for _, one in reader.rates()]), Payment())
    return path


@pytest.fixture
def reader(path: str) -> Iterator[LedgerReader]:
    with reader_of(path) as reader:
        yield reader


def test_revisions_are_the_newest_in_the_order_of_hours(reader: LedgerReader) -> None:
    assert list(settled.revisions(reader, START, START + 2 * HOUR).items()) == list(HOURS.items())
    assert settled.revisions(reader, START + 1, START + HOUR) == {}


def test_what_is_summed_is_what_the_charges_of_the_newest_revisions_come_to(reader: LedgerReader) -> None:
    newest = [
        charge
        for charge in charges_of(reader, START, START + 2 * HOUR)
        if charge["revision"] == HOURS[charge["period_start_ns"]]
    ]
    assert [tuple(row) for row in settled.charges(reader, HOURS)] == [
        tuple(
            charge[name]
            for name in (
                *("period_start_ns", "revision", "target_id", "resource", "sku", "state", "quantity", "unit"),
                *("rate_id", "amount_nano"),
            )
        )
        for charge in newest
    ]
    sums: dict[tuple[int | None, str, str, int], int] = {}
    worked: dict[tuple[int, int], int] = {}
    for charge in newest:
        key = (charge["target_id"], charge["resource"], charge["state"], charge["rate_id"])
        sums[key] = sums.get(key, 0) + charge["amount_nano"]
        if charge["target_id"] is not None and charge["state"] == "occupied" and charge["resource"] != "server":
            place = (charge["period_start_ns"], charge["target_id"])
            worked[place] = worked.get(place, 0) + charge["amount_nano"]
    assert {row[:-1]: row[-1] for row in settled.charged(reader, HOURS)} == sums
    assert settled.charged_for(reader, HOURS, "occupied", ["server"]) == worked
    assert len(worked) == 4  # two replicas in two hours


def test_entries_and_work_are_those_of_the_facts(reader: LedgerReader) -> None:
    book = RateBook([one for _, one in reader.rates()])
    facts = [one for one in facts_of(reader, Window(START, START + 2 * HOUR), book, Payment()) if one.replica]
    entries = [(hour, entry) for hour, entry in settled.entries(reader, HOURS) if entry.target_id is not None]
    assert [(hour, entry.target_id) for hour, entry in entries] == [
        (one.period_ns, one.replica.target_id) for one in facts if one.replica
    ]
    assert [entry.state_ns for _, entry in entries] == [one.state_ns for one in facts]
    work = settled.work(reader, HOURS)
    assert [work[hour, entry.target_id] for hour, entry in entries if entry.target_id] == [one.work for one in facts]
    assert all(tuple(row) == WORK for row in work.values())


def test_a_saving_that_cannot_be_read_parts_nothing(path: str) -> None:
    bodies = [
        {"worth": None, "loading": "synchronous", "reasons": [["why", "what to do", True]], "is_broken": False},
        {"worth": {"prefill": [1.0, 2.0, 3.0]}, "loading": "synchronous", "reasons": []},
    ]
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = [(START + 2 * HOUR, number + 1, 1, None, json.dumps(body)) for number, body in enumerate(bodies)]
        connection.executemany("INSERT INTO saving VALUES (?, ?, ?, ?, ?)", rows)
    with reader_of(path) as reader:
        found = list(settled.savings(reader, {START + 2 * HOUR: 1}))
        assert list(settled.savings(reader, HOURS)) == []
    assert [(hour, target, number) for hour, target, number, _ in found] == [
        (START + 2 * HOUR, 1, None),
        (START + 2 * HOUR, 2, None),
    ]
    assert found[0][3] == settled.Saving(None, "synchronous", [("why", "what to do", True)])
    assert found[1][3] == settled.Saving(None, "unknown", [])


def test_no_time_has_no_settled_hour(reader: LedgerReader) -> None:
    assert settled.revisions(reader, START - 9 * SECOND, START - SECOND) == {}
