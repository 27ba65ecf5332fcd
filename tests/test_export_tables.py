from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.command_line import copied
from tests.ledgers import (
    HOUR,
    RATES,
    SECOND,
    SKU,
    START,
    STORY_END,
    charges_of,
    new_ledger,
    rate,
    reader_of,
    tell_story,
)

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.book import book_of, keep_rates
from kvtally.agent.config import Config
from kvtally.agent.export.tables import TABLES, window_from
from kvtally.agent.ledger.export_rows import charges_settled, hour_from, hours_begun, intervals_begun, savings_settled
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.rates import RateBook
from kvtally.agent.report import cost_report
from kvtally.agent.settlement import due_hours, settle, settle_hours
from kvtally.collectors.quantities import ENGINE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAYMENT = Payment()
EVER = Window(0, STORY_END)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The story, its first four hours settled, the second of them twice."""
    path = new_ledger(tmp_path_factory.mktemp("tables"))
    tell_story(path)
    with reader_of(path) as reader:
        for hour in due_hours(reader, STORY_END):
            settle(reader, hour, RateBook(RATES), PAYMENT)
        reader.add_rates([rate("gpu", "5.38", "gpu-hour", START + HOUR + SECOND, sku=SKU)])
        settle_hours(
            reader, [START + HOUR], STORY_END, book_of(reader, Config()), PAYMENT, reason="dearer", restates=True
        )
    return path


@pytest.fixture
def story(path: str) -> Iterator[LedgerReader]:
    with reader_of(path) as reader:
        yield reader


def table(reader: LedgerReader, name: str, window: Window = EVER) -> list[dict[str, Any]]:
    (one,) = [each for each in TABLES if each.name == name]
    names = [column.name for column in one.columns]
    assert len(names) == len(set(names))
    return [dict(zip(names, row, strict=True)) for row in one.rows(reader, window, reader.targets())]


def asked(path: str, query: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()


def test_every_engine_interval_is_a_row_with_its_replica(story: LedgerReader, path: str) -> None:
    rows = table(story, "engine_interval")
    sums = ", ".join(f"sum({one.name})" for one in ENGINE)
    (expected,) = asked(path, f"SELECT count(*), sum(length_ns), {sums} FROM engine_interval")
    told = [len(rows), *(sum(row[name] or 0 for row in rows) for name in ("length_ns", *(one.name for one in ENGINE)))]
    assert told == list(expected)
    assert told[0] > 1000
    first = rows[0]
    assert [first[name] for name in ("replica", "model", "cluster", "namespace", "version", "sku", "gpus")] == [
        "10.0.0.1:8000/0",
        "llama-8b",
        None,
        "one",
        "0.25.1",
        SKU,
        "GPU-a",
    ]
    assert all(row["end"] - row["start"] == row["length_ns"] and row["start"] == row["start_ns"] for row in rows)
    assert [row["start"] for row in rows] == sorted(row["start"] for row in rows)


def test_an_interval_is_in_the_window_in_which_it_starts(story: LedgerReader) -> None:
    whole = table(story, "engine_interval")
    edge = whole[500]["start"]
    parts = [table(story, "engine_interval", window) for window in (Window(0, edge), Window(edge, STORY_END))]
    assert [len(part) for part in parts] == [500, len(whole) - 500]
    assert parts[0] + parts[1] == whole


def test_settled_charges_are_those_of_the_newest_revision(story: LedgerReader) -> None:
    rows = table(story, "charge")
    newest = [one for one in charges_of(story) if one["period_start_ns"] != START + HOUR or one["revision"] == 2]
    assert len(newest) < len(charges_of(story))
    assert [row["amount"] for row in rows] == [one["amount_nano"] for one in newest]
    assert {(row["start"], row["revision"]) for row in rows if row["revision"] != 1} == {(START + HOUR, 2)}


def test_charges_of_settled_hours_are_what_they_cost(story: LedgerReader) -> None:
    window = Window(START + HOUR, START + 3 * HOUR)
    rows = table(story, "charge", window)
    (group,) = cost_report(story, window, (), book_of(story, Config()), PAYMENT).groups
    assert f"{sum(row['amount'] for row in rows) / 10**9:.9f}" == group["cost"]["total"]


def test_a_charge_has_its_price_and_who_bears_it(story: LedgerReader) -> None:
    rows = [row for row in table(story, "charge") if row["start"] == START and row["resource"] == "gpu"]
    free = [row for row in rows if row["replica"] is None]
    assert [(row["state"], row["sku"], row["namespace"], row["end"]) for row in free] == [
        ("unallocated", SKU, None, START + HOUR)
    ]
    assert {row["namespace"] for row in rows} == {None, "one", "two"}
    assert {(row["price"], row["price_unit"], row["currency"], row["term"], row["basis"]) for row in rows} == {
        (2_690_000_001, "gpu-hour", "USD", "on-demand", "MEASURED")
    }
    for row in rows:
        assert row["unit"] == "gpu-ns"
        assert abs(row["quantity"] * row["price"] / HOUR - row["amount"]) < 10


def test_savings_carry_what_the_settlement_found(demo_ledger: str, tmp_path: Path) -> None:
    with LedgerReader(copied(demo_ledger, tmp_path)) as reader:
        extent = reader.extent()
        assert extent is not None
        hour = extent[0] - extent[0] % HOUR
        keep_rates(reader, Config())
        assert table(reader, "saving", Window(0, hour + HOUR)) == []
        settle_hours(reader, [hour], hour + 2 * HOUR, book_of(reader, Config()), PAYMENT)
        (row,) = table(reader, "saving", Window(0, hour + HOUR))
        ((_, saving),) = reader.savings(hour, hour + HOUR).items()
        (law,) = reader.calibrations()
    worth = saving.body["worth"]
    assert json.loads(row["body"]) == saving.body
    assert row["calibration_id"] == saving.calibration_id == law.id
    assert [row[f"avoided_{part}"] for part in ("together", "mixed", "apart")] == worth["avoided"]
    assert [row[f"prefill_{part}"] for part in ("low", "point", "high")] == worth["prefill"]
    assert (row["hbm_tokens"], row["decode"]) == (worth["hbm_tokens"], worth["decode"])
    assert (row["start"], row["end"], row["revision"], row["is_broken"]) == (hour, hour + HOUR, 1, False)


def test_a_saving_that_was_refused_has_no_figures(story: LedgerReader) -> None:
    rows = table(story, "saving")
    assert len(rows) == 2  # of the hour that was settled whole, with its savings
    for row in rows:
        assert row["calibration_id"] is None
        assert {row[name] for name in ("avoided_mixed", "prefill_point", "decode", "estimated_tokens")} == {None}
        assert json.loads(row["body"])["reasons"]


@pytest.mark.parametrize("name", [one.name for one in TABLES])
def test_an_empty_ledger_has_empty_tables(tmp_path: Path, name: str) -> None:
    with reader_of(new_ledger(tmp_path)) as reader:
        assert table(reader, name, window_from(reader, None)) == []


def test_without_a_window_it_is_the_whole_of_a_short_ledger(story: LedgerReader) -> None:
    assert window_from(story, None) == Window(*(story.extent() or ()))
    assert window_from(story, Window(1, 2)) == Window(1, 2)


# what the ledger gives


def test_rows_come_with_the_columns_that_were_asked_for(story: LedgerReader) -> None:
    rows = list(intervals_begun(story, "gpu", 0, STORY_END, ("energy_mj", "missed")))
    first = rows[0]
    assert (len(first), first[2], first[4]) == (5, pytest.approx(20 * SECOND, rel=0.01), 0)
    hours = list(hours_begun(story, "gpu", 0, STORY_END, ("energy_mj",)))
    assert len(hours) == 3 * 5
    assert sum(row[3] for row in hours) == sum(row[3] for row in rows)
    assert sum(row[2] for row in hours) == sum(row[2] for row in rows)


def test_what_was_settled_twice_comes_once(story: LedgerReader) -> None:
    hour = (START + HOUR, START + 2 * HOUR)
    assert {row[1] for row in charges_settled(story, *hour)} == {2}
    assert {row[2] for row in savings_settled(story, *hour)} == {2}
    assert list(charges_settled(story, START + 100 * HOUR, START + 101 * HOUR)) == []


def test_raw_intervals_tell_from_the_first_whole_hour_on(path: str, tmp_path: Path) -> None:
    with LedgerReader(copied(f"sqlite:///{path}", tmp_path)) as reader:
        assert hour_from(reader, START, STORY_END) == START
        assert reader.prune(START + 90 * 60 * SECOND)
        raw_from_ns = reader.raw_from()
        assert raw_from_ns is not None
        assert START + HOUR < raw_from_ns < START + 2 * HOUR
        assert hour_from(reader, START, STORY_END) == START + 2 * HOUR
        assert hour_from(reader, START, START + HOUR) == START + HOUR  # none of it is there
        assert hour_from(reader, START + 3 * HOUR, STORY_END) == START + 3 * HOUR
        assert hour_from(reader, raw_from_ns + 1, STORY_END) == raw_from_ns + 1
        assert reader.prune(STORY_END + HOUR)
        assert hour_from(reader, START, STORY_END) == STORY_END
