from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

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
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.host import process_reading
from kvtally.collectors.quantities import QUANTITIES, index

if TYPE_CHECKING:
    from collections.abc import Mapping

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
                sorted(
                    (*row[1:], *(column[2] for column in connection.execute(f"PRAGMA index_info({row[1]})")))
                    for row in connection.execute(f"PRAGMA index_list({name})")
                ),
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


class Added(NamedTuple):
    """What one revision adds to the ledger of the one before it."""

    tables: tuple[str, ...]
    columns: Mapping[Kind, tuple[str, ...]]
    indexes: Mapping[str, tuple[str, ...]] = MappingProxyType({})  # by table, on which columns


ADDED = {
    "0002": Added(("calibration", "saving"), {"gpu": ("busy_cycles",)}),
    "0003": Added(
        ("gateway_interval", "gateway_hour"),
        {
            "cache": (
                "dram_hit_tokens",
                "disk_hit_tokens",
                "storage_read_bytes",
                "storage_read_ns",
                "storage_write_bytes",
                "storage_write_ns",
            ),
            "filesystem": ("app_read_bytes", "app_write_bytes"),
        },
    ),
    "0004": Added(
        (),
        {"process": ("worker_cpu_ns",)},
        {"finding": ("end_ns", "start_ns")} | dict.fromkeys(HOURS, ("target_id", "hour_ns")),
    ),
}
OLD = ("0001", *sorted(ADDED)[:-1])  # whatever a kvtally before this one may have left


def tables_after(revision: str) -> set[str]:
    """Tables that later revisions add."""
    return {table for later, added in ADDED.items() if later > revision for table in added.tables}


def quantities_after(revision: str) -> dict[Kind, tuple[str, ...]]:
    """Quantities that later revisions add to tables which are there."""
    found: dict[Kind, tuple[str, ...]] = {}
    for later, added in ADDED.items():
        if later > revision:
            found |= {kind: (*found.get(kind, ()), *names) for kind, names in added.columns.items()}
    return found


def columns_after(revision: str) -> dict[str, tuple[str, ...]]:
    """The same by table."""
    added = quantities_after(revision).items()
    return {table: names for kind, names in added for table in (interval_table(kind), hour_table(kind))}


def at_revision(path: Path, revision: str) -> str:
    """An empty ledger as an older kvtally made it; its path."""
    config = Config()
    config.set_main_option("script_location", str(files("kvtally") / "migrations"))
    config.attributes["url"] = URL.create("sqlite", database=str(path))
    command.upgrade(config, revision)
    return str(path)


def aged(path: str, place: Path, revision: str = "0001") -> str:
    """The same ledger as kvtally of this revision would have left it: its tables, and states of what it counted."""
    old = at_revision(place, revision)
    with closing(sqlite3.connect(old)) as connection, connection:
        connection.execute("ATTACH ? AS new", (path,))
        for name, (columns, *_) in shape(old).items():
            names = ", ".join(column[1] for column in columns)
            connection.execute(f"INSERT INTO {name} ({names}) SELECT {names} FROM new.{name}")
        for kind, quantities in quantities_after(revision).items():
            unknown = ", ".join(f"'$.values.{name}'" for name in quantities)
            connection.execute(
                f"UPDATE counter_state SET state = json_remove(state, {unknown}) WHERE kind = ?", (kind,)
            )
        later = {index("process", name) for name in quantities_after(revision).get("process", ())}
        for name, text in connection.execute("SELECT name, state FROM counter_state WHERE kind = 'process'").fetchall():
            state = json.loads(text)
            for key, counts in state["parts"].items():
                state["parts"][key] = [count for at, count in enumerate(counts) if at not in later]
            connection.execute(
                "UPDATE counter_state SET state = ? WHERE kind = 'process' AND name = ?", (json.dumps(state), name)
            )
    return old


class Counters:
    """A cache or a filesystem: all that it counts grows at once, each quantity by its place in the readings' order."""

    def __init__(self, kind: Kind, name: str, epoch: float | None = None) -> None:
        self.kind, self.name, self._epoch = kind, name, epoch
        # it has counted long before anyone looks
        self._counts = {quantity.name: 1e6 for quantity in QUANTITIES[kind]}
        self.hidden: tuple[str, ...] = ()

    def grow(self, times: int) -> None:
        """Count on."""
        for place, name in enumerate(self._counts, 1):
            self._counts[name] += times * place

    def reading(self) -> Reading:
        """What is told of it now."""
        values = tuple(None if name in self.hidden else count for name, count in self._counts.items())
        return Reading(self.kind, self.name, {}, values, self._epoch)


class Past:
    """A deployment of one engine with all that is beside it, watched from 04:00 on: by an older kvtally first."""

    def __init__(self) -> None:
        self.engine, self.gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
        self.cache = Counters("cache", "10.0.0.1:8000/lmcache")
        self.disk = Counters("filesystem", "vda", START / 1e9 - 600)
        self.cpu_seconds = {"vllm": 60.0, "VLLM::EngineCor": 600.0}

    def processes(self, seconds: int) -> Reading:
        """The engine's tree after so many more seconds, of which its server took a tenth and its core a half."""
        self.cpu_seconds["vllm"] += seconds / 10
        self.cpu_seconds["VLLM::EngineCor"] += seconds / 2
        named = enumerate(self.cpu_seconds.items(), 100)
        tree = [{"pid": pid, "comm": comm, "start_time": 5.0, "cpu_seconds": took} for pid, (comm, took) in named]
        return process_reading("10.0.0.1:8000", tree)

    def watch(self, path: str, seconds: range) -> None:
        deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU, mapping="a test")})
        for second in seconds:
            self.engine.serve(computed=300, hbm=500, generated=40, steps=20)
            self.gpu.run(seconds.step, seconds.step / 2)
            self.cache.grow(seconds.step)
            self.disk.grow(seconds.step)
            at_ns = START + second * SECOND
            tick = deployment.pipeline.tick(
                [
                    Scrape("nvml", at_ns - 2_000_000, 0.0, (self.gpu.reading(),)),
                    Scrape("engine:0", at_ns, 0.0, (self.engine.reading(), self.cache.reading())),
                    Scrape("disks", at_ns, 0.0, (self.disk.reading(),)),
                    Scrape("process:10.0.0.1:8000", at_ns, 0.0, (self.processes(seconds.step),)),
                ]
            )
            assert tick.error is None
        deployment.close()


@pytest.fixture(scope="module", params=OLD)
def revision(request: pytest.FixtureRequest) -> str:
    """Each revision before this one."""
    return str(request.param)


@pytest.fixture(scope="module")
def old_ledger(tmp_path_factory: pytest.TempPathFactory, revision: str) -> bytes:
    """A ledger of that revision with rows in every table; those of money come from nobody's arithmetic."""
    folder = tmp_path_factory.mktemp("old")
    watched = new_ledger(folder, "watched.db")
    Past().watch(watched, range(0, 4000, 20))
    path = aged(watched, folder / "ledger.db", revision)
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in {*IMMUTABLE} - tables_after(revision):
            connection.execute(FILLED[table])
    return Path(path).read_bytes()


@pytest.fixture
def old(tmp_path: Path, old_ledger: bytes) -> str:
    """A copy of it."""
    path = tmp_path / "ledger.db"
    path.write_bytes(old_ledger)
    return str(path)


def contents(path: str, revision: str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the tables that this revision has, by the columns that it has."""
    later = columns_after(revision)
    with closing(sqlite3.connect(path)) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        found: dict[str, list[tuple[Any, ...]]] = {}
        for name in names - tables_after(revision):
            rows = connection.execute(f"SELECT * FROM {name}")
            own = [at for at, (column, *_) in enumerate(rows.description) if column not in later.get(name, ())]
            found[name] = [tuple(row[at] for at in own) for row in rows]
        return found


def added_values(path: str, revision: str) -> set[Any]:
    """All that stands in an upgraded ledger's tables and columns of later revisions."""
    with closing(sqlite3.connect(path)) as connection:
        columns = [(table, name) for table, names in columns_after(revision).items() for name in names]
        columns += [(table, "*") for table in tables_after(revision)]
        return {
            value
            for table, names in columns
            for row in connection.execute(f"SELECT {names} FROM {table}")
            for value in row
        }


def test_a_ledger_of_an_older_revision_is_upgraded_in_place_and_no_row_is_touched(
    tmp_path: Path, old: str, revision: str
) -> None:
    before = contents(old, revision)
    assert before.pop("alembic_version") == [(revision,)]
    filled = {"target", "counter_state"} | {*IMMUTABLE} - tables_after(revision)
    filled |= {
        name(kind)
        for kind in ("engine", "cache", "gpu", "filesystem", "process")
        for name in (interval_table, hour_table)
    }
    assert {name for name, rows in before.items() if rows} == filled
    assert upgrade(url_of(old)) is True
    after = contents(old, revision)
    assert after.pop("alembic_version") == [(HEAD_REVISION,)]
    assert after == before
    assert added_values(old, revision) == ({None} if columns_after(revision) else set())
    assert shape(old) == shape(new_ledger(tmp_path, "new.db"))
    assert upgrade(url_of(old)) is False


def test_each_revision_adds_what_is_told_of_it_here(tmp_path: Path) -> None:
    drawn = {one: shape(at_revision(tmp_path / f"{one}.db", one)) for one in ("0001", *sorted(ADDED))}
    for before, later in zip(OLD, sorted(ADDED), strict=True):
        assert drawn[later].keys() - drawn[before].keys() == {*ADDED[later].tables}
        wider = {
            table: tuple(column[1] for column in columns[len(drawn[before][table][0]) :])
            for table, (columns, *_) in drawn[later].items()
            if table in drawn[before] and columns != drawn[before][table][0]
        }
        added = ADDED[later].columns.items()
        assert wider == {table: names for kind, names in added for table in (interval_table(kind), hour_table(kind))}
        indexed = {
            table: (*one[4:],)
            for table, (_, indexes, *_) in drawn[later].items()
            if table in drawn[before]
            for one in indexes
            if one not in drawn[before][table][1]
        }
        assert indexed == ADDED[later].indexes


@pytest.mark.parametrize("table", ["calibration", "saving"])
def test_what_an_upgrade_adds_never_changes_and_never_leaves(tmp_path: Path, table: str) -> None:
    path = at_revision(tmp_path / "ledger.db", "0001")
    upgrade(url_of(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(FILLED[table])
        for statement in (f"UPDATE {table} SET body = body", f"DELETE FROM {table}"):
            with pytest.raises(sqlite3.IntegrityError, match=f"{table}: "):
                connection.execute(statement)


def test_intervals_of_gateways_that_an_upgrade_makes_room_for_leave_and_never_change(tmp_path: Path) -> None:
    path = at_revision(tmp_path / "ledger.db", "0002")
    upgrade(url_of(path))
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(FILLED["gateway_interval"])
        with pytest.raises(sqlite3.IntegrityError, match="gateway_interval: intervals never change"):
            connection.execute("UPDATE gateway_interval SET requests = 1")
        connection.execute("DELETE FROM gateway_interval")
        assert connection.execute("SELECT count(*) FROM gateway_interval").fetchone() == (0,)


def test_an_upgrade_of_an_old_ledger_that_is_killed_at_any_statement_leaves_it_old_or_new(
    old: str, revision: str
) -> None:
    whole, before = Path(old).read_bytes(), contents(old, revision)
    upgrade(url_of(old))
    drawn = shape(old)
    died = []
    for statement in (*range(12), *range(12, 60, 4), 1000):
        for leftover in Path(old).parent.glob("ledger.db*"):
            leftover.unlink()
        Path(old).write_bytes(whole)
        died.append(killed_at(statement, partial(upgrade, url_of(old))))
        assert contents(old, revision)["alembic_version"] == [(revision if died[-1] else HEAD_REVISION,)]
        assert upgrade(url_of(old)) is died[-1]
        assert shape(old) == drawn
        assert contents(old, revision) == before | {"alembic_version": [(HEAD_REVISION,)]}
    assert sum(died) > 5
    assert not died[-1]


def test_a_writer_goes_on_after_an_upgrade_from_the_counters_before_it(tmp_path: Path, revision: str) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 1800, 20))
    path = aged(watched, tmp_path / "ledger.db", revision)
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


@pytest.mark.parametrize("kind", ["cache", "filesystem"])
def test_counters_of_a_source_that_the_state_before_lacks_begin_with_a_baseline(
    tmp_path: Path, revision: str, kind: Kind
) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 100, 20))
    path = aged(watched, tmp_path / "ledger.db", revision)
    upgrade(url_of(path))
    past.watch(path, range(100, 160, 20))
    names = {quantity.name: place for place, quantity in enumerate(QUANTITIES[kind], 1)}
    scales = {quantity.name: quantity.scale for quantity in QUANTITIES[kind]}
    added = quantities_after(revision).get(kind, ())
    with closing(sqlite3.connect(path)) as connection:
        connection.row_factory = sqlite3.Row
        rows = connection.execute(f"SELECT * FROM {interval_table(kind)} ORDER BY start_ns").fetchall()
        assert [row["flags"] for row in rows] == [0] * 7
        for name, place in names.items():
            if name != "used_bytes":
                # each grew by 20 x its place; four intervals were of the older kvtally, the fifth spans both
                grown = round(20 * place * scales[name])
                assert [row[name] for row in rows] == [None if name in added else grown] * 5 + [grown] * 2
        (hour,) = connection.execute(f"SELECT * FROM {hour_table(kind)}").fetchall()
        assert {name: hour[name] for name in added} == {name: 40 * names[name] * scales[name] for name in added}
        assert connection.execute("SELECT * FROM finding").fetchall() == []


def test_the_tree_of_an_engine_that_was_watched_before_tells_its_workers_after_a_baseline(
    tmp_path: Path, revision: str
) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 100, 20))
    path = aged(watched, tmp_path / "ledger.db", revision)
    upgrade(url_of(path))
    past.watch(path, range(100, 160, 20))
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute("SELECT flags, cpu_ns, worker_cpu_ns FROM process_interval ORDER BY start_ns")
        before, since = (0, 12 * SECOND, None), (0, 12 * SECOND, 10 * SECOND)
        assert rows.fetchall() == [before] * 4 + [(0, None, None)] + [since] * 2
        assert connection.execute("SELECT intervals, cpu_ns, worker_cpu_ns FROM process_hour").fetchall() == [
            (7, 72 * SECOND, 20 * SECOND)
        ]
        assert connection.execute("SELECT * FROM finding").fetchall() == []
    with reader_of(path) as reader:
        worked = reader.evidence(START, START + HOUR, reader.targets()).cpu["10.0.0.1:8000"]
    # of the whole tree before the upgrade, and of its core after it
    assert worked.over(START, START + 20 * SECOND) == 12 * SECOND
    assert worked.over(START + 100 * SECOND, START + 120 * SECOND) == 10 * SECOND


def test_bytes_of_a_backend_that_were_told_as_loads_before_are_storage_s_from_there_on(tmp_path: Path) -> None:
    watched = new_ledger(tmp_path, "watched.db")
    past = Past()
    past.watch(watched, range(0, 60, 20))
    path = aged(watched, tmp_path / "ledger.db", "0002")
    upgrade(url_of(path))
    past.cache.hidden = ("load_bytes", "store_bytes")
    past.watch(path, range(60, 120, 20))
    with closing(sqlite3.connect(path)) as connection:
        rows = connection.execute(
            "SELECT flags, load_bytes, storage_read_bytes FROM cache_interval ORDER BY start_ns"
        ).fetchall()
        # the tenth quantity and the fifteenth
        assert rows == [(0, 200, None), (0, 200, None), (0, None, None), (0, None, 300), (0, None, 300)]
        assert connection.execute("SELECT * FROM finding").fetchall() == []


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
        rows = connection.execute("SELECT flags, busy_ns, energy_mj, busy_cycles FROM gpu_interval ORDER BY start_ns")
        # 20 s of 80 W and 10 s of another 500 W; 10 s at 1650 MHz
        told = (0, 10 * SECOND, 6_600_000)
        assert rows.fetchall() == [(*told, None)] * 4 + [(*told, first)] + [(*told, 16_500_000_000)] * 2
        assert connection.execute("SELECT * FROM finding").fetchall() == []
        # GPUs are sampled a moment before 04:00
        hours = connection.execute("SELECT intervals, busy_cycles FROM gpu_hour ORDER BY hour_ns").fetchall()
        assert hours == [(1, None), (6, (first or 0) + 33_000_000_000)]


def test_questions_to_an_old_ledger_say_what_to_do_and_the_upgrade_does_it(
    kvtally: Call, old: str, revision: str
) -> None:
    where = ("--ledger", url_of(old))
    before = Path(old).read_bytes()
    status, out, err = kvtally("cost", *where)
    assert (status, out) == (3, "")
    expected = f"the ledger has revision {revision}, this kvtally knows {HEAD_REVISION} (run `kvtally ledger upgrade`)"
    assert expected in err
    assert Path(old).read_bytes() == before
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{old}: upgraded\n")
    assert kvtally("ledger", "upgrade", *where) == (0, "", f"{old}: was up to date\n")
    found = json.loads(kvtally("ledger", "info", *where).out)
    assert (found["revision"], found["rows"]["engine_interval"]) == (HEAD_REVISION, 199)


def test_a_replay_brings_an_old_ledger_up_to_date(kvtally: Call, tmp_path: Path, revision: str) -> None:
    path = at_revision(tmp_path / "ledger.db", revision)
    assert kvtally("replay", DEMO, "--ledger", url_of(path)).status == 0
    with reader_of(path) as reader:
        assert reader.counts()["engine_interval"] == 94


def test_a_daemon_brings_an_old_ledger_up_to_date_and_writes_on(old: str, revision: str) -> None:
    before = contents(old, revision)
    with Served() as engine, DaemonProcess(Path(old).parent, config_of([engine.name]), "--once") as daemon:
        assert daemon.process.wait(30) == 0
        assert daemon.knows(engine.name)
    after = contents(old, revision)
    assert after["alembic_version"] == [(HEAD_REVISION,)]
    for name in ("engine_interval", "target", "charge", "settlement"):
        assert after[name][: len(before[name])] == before[name]
    assert len(after["engine_interval"]) > len(before["engine_interval"])
