from __future__ import annotations

import sqlite3
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool
from tests.ledgers import killed_at, new_ledger, url_of

from kvtally.agent.ledger import schema
from kvtally.agent.ledger.append import hour_sql, insert_sql
from kvtally.agent.ledger.columns import HEAD_REVISION, KINDS, hour_table, interval_table
from kvtally.agent.ledger.errors import LedgerRevision
from kvtally.agent.ledger.upgrade import upgrade

if TYPE_CHECKING:
    from pathlib import Path

    from kvtally.collectors.base import Kind

IMMUTABLE = ("rate", "charge", "settlement", "finding", "prune_log")
INTERVALS = tuple(interval_table(kind) for kind in KINDS)
HOURS = tuple(hour_table(kind) for kind in KINDS)


def shape(path: str) -> dict[str, tuple[Any, ...]]:
    """Every table as SQLite knows it: columns, indexes, foreign keys, and whether it has row numbers."""
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'").fetchall()
        return {
            name: (
                connection.execute(f"PRAGMA table_xinfo({name})").fetchall(),
                sorted(row[2:] for row in connection.execute(f"PRAGMA index_list({name})")),
                sorted(row[2:] for row in connection.execute(f"PRAGMA foreign_key_list({name})")),
                "WITHOUT ROWID" in sql,
            )
            for name, sql in found
            if name != "alembic_version"
        }


def test_the_revisions_make_the_tables_of_the_schema(tmp_path: Path) -> None:
    migrated, drawn = new_ledger(tmp_path), str(tmp_path / "drawn.db")
    engine = create_engine(url_of(drawn), poolclass=NullPool)
    schema.metadata.create_all(engine)
    engine.dispose()
    assert shape(migrated) == shape(drawn)
    assert {name for name, (*_, without_rowid) in shape(migrated).items() if without_rowid} == {*INTERVALS, *HOURS}


def test_alembic_finds_nothing_to_change(tmp_path: Path) -> None:
    engine = create_engine(url_of(new_ledger(tmp_path)), poolclass=NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, schema.metadata) == []
        assert context.get_current_heads() == (HEAD_REVISION,)
    engine.dispose()


@pytest.mark.parametrize("kind", KINDS)
def test_the_hot_path_writes_every_column_of_its_tables(kind: Kind) -> None:
    def named(sql: str) -> list[str]:
        return [name.strip() for name in sql[sql.index("(") + 1 : sql.index(")")].split(",")]

    assert named(insert_sql(kind)) == list(schema.intervals[kind].columns.keys())
    assert named(hour_sql(kind)) == list(schema.hours[kind].columns.keys())
    assert insert_sql(kind).count("?") == len(schema.intervals[kind].columns)
    assert hour_sql(kind).count("?") == len(schema.hours[kind].columns)


FILLED = {
    "rate": "INSERT INTO rate (resource, sku, site, term, unit, price_nano, currency, valid_from_ns, basis, source, "
    "note) VALUES ('gpu', '', '', 'on-demand', 'gpu-hour', 1, 'USD', 0, 'MEASURED', '', '')",
    "charge": "INSERT INTO charge (period_start_ns, revision, account, resource, sku, state, quantity, unit, "
    "amount_nano) VALUES (0, 1, '{}', 'gpu', '', 'idle', 1, 'gpu-ns', 1)",
    "settlement": "INSERT INTO settlement VALUES (0, 1, 3600000000000, 'hour closed', 0, '{}')",
    "finding": "INSERT INTO finding (kind, severity, target, start_ns, end_ns, message) "
    "VALUES ('a', 'info', '', 0, 1, '')",
    "prune_log": "INSERT INTO prune_log (before_ns, removed) VALUES (0, '{}')",
} | {
    table: f"INSERT INTO {table} (start_ns, target_id, length_ns, missed, flags) VALUES (0, 1, 1, 0, 0)"
    for table in INTERVALS
}


@pytest.mark.parametrize("table", [*IMMUTABLE, *INTERVALS])
def test_written_rows_cannot_be_changed(tmp_path: Path, table: str) -> None:
    with closing(sqlite3.connect(new_ledger(tmp_path))) as connection:
        connection.execute(FILLED[table])
        for column in connection.execute(f"SELECT * FROM {table}").description:
            with pytest.raises(sqlite3.IntegrityError, match=f"{table}: "):
                connection.execute(f"UPDATE {table} SET {column[0]} = {column[0]}")


@pytest.mark.parametrize("table", IMMUTABLE)
def test_money_findings_and_notes_of_what_was_pruned_cannot_be_removed(tmp_path: Path, table: str) -> None:
    with closing(sqlite3.connect(new_ledger(tmp_path))) as connection:
        connection.execute(FILLED[table])
        with pytest.raises(sqlite3.IntegrityError, match=f"{table}: a written row never leaves"):
            connection.execute(f"DELETE FROM {table}")


def test_upgrading_twice_does_nothing_the_second_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    assert upgrade(url_of(str(path))) is True
    before = path.read_bytes()
    assert upgrade(url_of(str(path))) is False
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["a b.db", "100%.db", "what?.db", "a#b.db", "ü/ledger.db"])
def test_a_file_may_have_any_name(tmp_path: Path, name: str) -> None:
    assert upgrade(f"sqlite:///{tmp_path / name}") is True
    with closing(sqlite3.connect(tmp_path / name)) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(HEAD_REVISION,)]


def test_a_revision_that_no_kvtally_wrote_is_one_clear_error(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(LedgerRevision, match="0000") as caught:
        upgrade(url_of(path))
    assert "restore a copy" in caught.value.hint


def test_an_upgrade_that_is_killed_at_any_statement_leaves_nothing_half_made(tmp_path: Path) -> None:
    whole = shape(new_ledger(tmp_path, "whole.db"))
    died = []
    for statement in (*range(0, 60, 6), 1000):
        path = str(tmp_path / f"killed-{statement}.db")
        died.append(killed_at(statement, partial(upgrade, url_of(path))))
        with closing(sqlite3.connect(path)) as connection:
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        assert tables == 0 or not died[-1]
        assert upgrade(url_of(path)) is died[-1]
        assert shape(path) == whole
    assert died[0]
    assert sum(died) > 5
    assert not died[-1]
