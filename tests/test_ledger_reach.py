from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.ledgers import HOUR, START, new_ledger, reader_of, steps_of

from kvtally.agent.ledger.reach import reach

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvtally.agent.ledger.read import LedgerReader

NAMES = ("a", "b", "c")
HOURS = range(6)


class Row(NamedTuple):
    """One row of `target`, and the hours in which intervals of it begin."""

    kind: str
    name: str
    hours: frozenset[int]


class Past(NamedTuple):
    """What there is of all targets; when each was last scraped is in half hours."""

    rows: tuple[Row, ...]
    scraped: dict[tuple[str, str], int]


ROWS = st.builds(
    Row, st.sampled_from(["engine", "engine", "gpu"]), st.sampled_from(NAMES), st.frozensets(st.sampled_from(HOURS))
)
SCRAPED = st.dictionaries(
    st.tuples(st.sampled_from(["engine", "gpu"]), st.sampled_from(NAMES)), st.integers(0, 2 * len(HOURS))
)
PASTS = st.builds(Past, st.lists(ROWS, max_size=7).map(tuple), SCRAPED)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerReader]:
    with reader_of(new_ledger(tmp_path_factory.mktemp("reach"))) as reader:
        yield reader


def write(reader: LedgerReader, past: Past) -> None:
    """Put a past into an empty ledger, in a transaction that is open."""
    execute = reader.connection.exec_driver_sql
    for number, row in enumerate(past.rows, 1):
        execute("INSERT INTO target VALUES (?, ?, ?, ?, '[]')", (number, row.kind, row.name, str(number)))
        for hour in row.hours:
            columns = "(hour_ns, target_id, intervals, length_ns, missed, flags)"
            values = (START + hour * HOUR, number)
            execute(f"INSERT INTO {row.kind}_hour {columns} VALUES (?, ?, 1, 1, 0, 0)", values)
    for (kind, name), halves in past.scraped.items():
        ids = [number for number, row in enumerate(past.rows, 1) if (row.kind, row.name) == (kind, name)]
        if ids:
            taken_at_ns = START + halves * HOUR // 2
            execute("INSERT INTO counter_state VALUES (?, ?, ?, ?, '{}')", (kind, name, ids[-1], taken_at_ns))


@given(PASTS, st.integers(-1, 2 * len(HOURS) + 1))
def test_it_is_the_earliest_of_each_engine_s_last_hours_before_the_instant(
    reader: LedgerReader, past: Past, halves: int
) -> None:
    at_ns = START + halves * HOUR // 2
    last: dict[str, int] = {}
    for row in past.rows:
        if row.kind == "engine" and past.scraped.get(("engine", row.name), -1) > halves:
            for hour in row.hours:
                if 2 * hour < halves:
                    last[row.name] = max(hour, last.get(row.name, hour))
    reader.connection.rollback()
    write(reader, past)
    expected = START + min(last.values()) * HOUR if last else at_ns
    assert reach(reader.connection, "engine", at_ns) == expected


def test_it_costs_the_same_after_a_long_past(tmp_path: Path) -> None:
    taken = []
    for hours in (3, 300):
        rows = tuple(Row("engine", name, frozenset(range(-hours, 1))) for name in NAMES)
        with reader_of(new_ledger(tmp_path, f"{hours}.db")) as reader:
            write(reader, Past(rows, {("engine", name): 2 for name in NAMES}))
            taken.append(steps_of(reader, partial(reach, reader.connection, "engine", START + 1)))
    assert taken[0] == taken[1] < 200
