from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from sqlalchemy import URL, create_engine
from sqlalchemy.pool import NullPool
from tests.command_line import DEMO
from tests.daemon_process import DaemonProcess, config_of
from tests.ledgers import (
    HOUR,
    RATES,
    SECOND,
    SKU,
    START,
    Deployment,
    FakeEngine,
    FakeGpu,
    killed_at,
    new_ledger,
    reader_of,
    url_of,
)
from tests.loopback import FakeEngine as Served

from kvtally.agent.accounts import Payment
from kvtally.agent.audit import audit
from kvtally.agent.ledger import schema
from kvtally.agent.ledger.append import hour_sql, insert_sql
from kvtally.agent.ledger.columns import HEAD_REVISION, KINDS, hour_table, interval_table
from kvtally.agent.ledger.errors import LedgerRevision
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.settlement import settle

if TYPE_CHECKING:
    from tests.command_line import Call

    from kvtally.collectors.base import Kind

IMMUTABLE = ("rate", "charge", "settlement", "finding", "prune_log", "calibration", "saving")
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

    # both name their columns: where a later revision added one, they stand in another order than in the table
    assert sorted(named(insert_sql(kind))) == sorted(schema.intervals[kind].columns.keys())
    assert sorted(named(hour_sql(kind))) == sorted(schema.hours[kind].columns.keys())
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
    "calibration": "INSERT INTO calibration (fingerprint, made_at_ns, start_ns, end_ns, rung, body, reason) "
    "VALUES ('a model', 1, 0, 1, 'M1', '{}', 'a test')",
    "saving": "INSERT INTO saving VALUES (0, 1, 1, NULL, '{}')",
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
def test_money_laws_findings_and_notes_of_what_was_pruned_cannot_be_removed(tmp_path: Path, table: str) -> None:
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


ADDED = {"calibration", "saving"}  # tables of revision 0002
NEW = "busy_cycles"  # its column of GPUs, the last one


def at_revision(path: Path, revision: str) -> str:
    """An empty ledger as an older kvtally made it; its path."""
    config = Config()
    config.set_main_option("script_location", str(files("kvtally") / "migrations"))
    config.attributes["url"] = URL.create("sqlite", database=str(path))
    command.upgrade(config, revision)
    return str(path)


def aged(path: str, place: Path) -> str:
    """The same ledger as kvtally of revision 0001 would have left it: its tables, and states of what it counted."""
    old = at_revision(place, "0001")
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("ATTACH ? AS new", (path,))
        for name, (columns, *_) in shape(old).items():
            names = ", ".join(column[1] for column in columns)
            connection.execute(f"INSERT INTO {name} ({names}) SELECT {names} FROM new.{name}")
        connection.execute(f"UPDATE counter_state SET state = json_remove(state, '$.values.{NEW}') WHERE kind = 'gpu'")
    return old


class Past:
    """A deployment of one engine and its GPU, which an older kvtally watched from 04:00 on and a newer one may."""

    def __init__(self) -> None:
        self.engine, self.gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")

    def watch(self, path: str, seconds: range) -> None:
        deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU, mapping="a test")})
        for second in seconds:
            self.engine.serve(computed=300, hbm=500, generated=40, steps=20)
            self.gpu.run(seconds.step, seconds.step / 2)
            deployment.scrape(START + second * SECOND, [self.engine], [self.gpu])
        deployment.close()


@pytest.fixture(scope="module")
def first_ledger(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A ledger of revision 0001 with rows in every table; those of money come from nobody's arithmetic."""
    folder = tmp_path_factory.mktemp("old")
    watched = new_ledger(folder, "watched.db")
    Past().watch(watched, range(0, 4000, 20))
    path = aged(watched, folder / "ledger.db")
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("rate", "charge", "settlement", "finding", "prune_log"):
            connection.execute(FILLED[table])
    return Path(path).read_bytes()


@pytest.fixture
def old(tmp_path: Path, first_ledger: bytes) -> str:
    """A copy of it."""
    path = tmp_path / "ledger.db"
    path.write_bytes(first_ledger)
    return str(path)


def contents(path: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table but those that revision 0002 adds, without its column, which must hold nothing."""
    with closing(sqlite3.connect(path)) as connection:
        found: dict[str, list[tuple[Any, ...]]] = {}
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        for name in names - ADDED:
            rows = connection.execute(f"SELECT * FROM {name}")
            is_wider = rows.description[-1][0] == NEW
            found[name] = rows.fetchall()
            if is_wider:
                assert {row[-1] for row in found[name]} <= {None}
                found[name] = [row[:-1] for row in found[name]]
        return found


def test_a_ledger_of_the_first_revision_is_upgraded_in_place_and_no_row_is_touched(tmp_path: Path, old: str) -> None:
    before = contents(old)
    assert before.pop("alembic_version") == [("0001",)]
    filled = {"target", "counter_state", "engine_interval", "engine_hour", "gpu_interval", "gpu_hour", "rate", "charge"}
    assert {name for name, rows in before.items() if rows} == filled | {"settlement", "finding", "prune_log"}
    assert upgrade(url_of(old)) is True
    after = contents(old)
    assert after.pop("alembic_version") == [(HEAD_REVISION,)]
    assert after == before
    assert shape(old) == shape(new_ledger(tmp_path, "new.db"))
    assert upgrade(url_of(old)) is False


@pytest.mark.parametrize("table", sorted(ADDED))
def test_what_an_upgrade_adds_is_as_immutable_as_in_a_new_ledger(old: str, table: str) -> None:
    upgrade(url_of(old))
    with closing(sqlite3.connect(old)) as connection:
        connection.execute(FILLED[table])
        for statement in (f"UPDATE {table} SET body = body", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table}: "):
                connection.execute(statement)


def test_an_upgrade_of_an_old_ledger_that_is_killed_at_any_statement_leaves_it_old_or_new(old: str) -> None:
    whole, before = Path(old).read_bytes(), contents(old)
    upgrade(url_of(old))
    drawn = shape(old)
    died = []
    for statement in (*range(30), 1000):
        for leftover in Path(old).parent.glob("ledger.db*"):
            leftover.unlink()
        Path(old).write_bytes(whole)
        died.append(killed_at(statement, partial(upgrade, url_of(old))))
        assert contents(old)["alembic_version"] == ([("0001",)] if died[-1] else [(HEAD_REVISION,)])
        assert upgrade(url_of(old)) is died[-1]
        assert shape(old) == drawn
        assert contents(old) == before | {"alembic_version": [(HEAD_REVISION,)]}
    assert sum(died) > 5
    assert not died[-1]


def test_a_writer_goes_on_after_an_upgrade_from_the_counters_before_it(tmp_path: Path) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 1800, 20))
    path = aged(watched, tmp_path / "ledger.db")
    upgrade(url_of(path))
    past.watch(path, range(1800, 4000, 20))
    with reader_of(path) as reader:
        rows = list(reader.engine_rows(START, START + 2 * HOUR))
        assert {row.value("hbm_tokens") for row in rows} == {500}
        assert [row.start_ns for row in rows] == [START + second * SECOND for second in range(0, 3980, 20)]
        reader.add_rates(RATES)
        book = RateBook(RATES)
        settle(reader, START, book, Payment())
        assert audit(reader, book) == []
        assert reader.calibrations() == []
        assert reader.savings(0, 2**62) == {}


@pytest.mark.parametrize(
    ("is_restarted", "first"),
    [
        (True, 16_500_000_000),  # the collector began at zero, so all that it shows is of this interval
        (False, None),  # as in a replay that goes on: what was summed before is nobody's, and the first is a baseline
    ],
)
def test_a_quantity_that_the_state_before_lacks_is_counted_from_there_and_is_no_reset(
    tmp_path: Path, is_restarted: bool, first: int | None
) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 100, 20))
    path = aged(watched, tmp_path / "ledger.db")
    upgrade(url_of(path))
    if is_restarted:
        past.gpu.restart()
    past.watch(path, range(100, 160, 20))
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(f"SELECT flags, busy_ns, energy_mj, {NEW} FROM gpu_interval ORDER BY start_ns")
        # 20 s of 80 W and 10 s of another 500 W; 10 s at 1650 MHz
        told = (0, 10 * SECOND, 6_600_000)
        assert rows.fetchall() == [(*told, None)] * 4 + [(*told, first)] + [(*told, 16_500_000_000)] * 2
        assert connection.execute("SELECT * FROM finding").fetchall() == []
        # GPUs are sampled a moment before 04:00
        hours = connection.execute(f"SELECT intervals, {NEW} FROM gpu_hour ORDER BY hour_ns").fetchall()
        assert hours == [(1, None), (6, (first or 0) + 33_000_000_000)]


def test_questions_to_an_old_ledger_say_what_to_do_and_the_upgrade_does_it(kvtally: Call, old: str) -> None:
    where = ("--ledger", url_of(old))
    before = Path(old).read_bytes()
    status, out, err = kvtally("cost", *where)
    assert (status, out) == (3, "")
    assert "the ledger has revision 0001, this kvtally knows 0002 (run `kvtally ledger upgrade`)" in err
    assert Path(old).read_bytes() == before
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{old}: upgraded\n")
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{old}: was up to date\n")
    found = json.loads(kvtally("ledger", "info", *where).out)
    assert (found["revision"], found["rows"]["engine_interval"]) == ("0002", 199)


def test_a_replay_brings_an_old_ledger_up_to_date(kvtally: Call, tmp_path: Path) -> None:
    path = at_revision(tmp_path / "ledger.db", "0001")
    assert kvtally("replay", DEMO, "--ledger", url_of(path)).status == 0
    with reader_of(path) as reader:
        assert reader.counts()["engine_interval"] == 94


def test_a_daemon_brings_an_old_ledger_up_to_date_and_writes_on(old: str) -> None:
    before = contents(old)
    with Served() as engine, DaemonProcess(Path(old).parent, config_of([engine.name]), "--once") as daemon:
        assert daemon.process.wait(30) == 0
        assert daemon.knows(engine.name)
    after = contents(old)
    assert after["alembic_version"] == [(HEAD_REVISION,)]
    for name in ("engine_interval", "target", "charge", "settlement"):
        assert after[name][: len(before[name])] == before[name]
    assert len(after["engine_interval"]) > len(before["engine_interval"])
