from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import new_ledger, url_of

from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.columns import HEAD_REVISION
from kvtally.agent.ledger.errors import (
    LedgerBusy,
    LedgerError,
    LedgerLost,
    LedgerRevision,
    LedgerUnreachable,
    explained,
)
from kvtally.agent.ledger.place import WriterLock, check_whole, connect, file_of, is_current, place_of, revision_of
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.upgrade import upgrade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PAGE = 4096


def write_with(path: str) -> None:
    connect(path, busy_seconds=0.1).close()


def upgrade_with(path: str) -> None:
    upgrade(url_of(path))


def read_with(path: str) -> None:
    LedgerReader(url_of(path)).close()


DOORS: tuple[Callable[[str], None], ...] = (write_with, upgrade_with, read_with)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("sqlite:///relative.db", "relative.db"),
        ("sqlite:////var/lib/kvtally/ledger.db", "/var/lib/kvtally/ledger.db"),
        ("sqlite:///~/ledger.db", str(Path("~/ledger.db").expanduser())),
        ("sqlite:///with space?and%.db", "with space?and%.db"),
    ],
)
def test_a_sqlite_url_is_a_file(url: str, path: str) -> None:
    assert file_of(url) == path


@pytest.mark.parametrize(
    ("url", "scheme"),
    [
        ("postgresql+psycopg://kvtally:secret@db/ledger", "postgresql+psycopg"),
        ("mysql://db/ledger", "mysql"),
        ("sqlite://", "sqlite"),
        ("sqlite:///", "sqlite"),
        ("sqlite:///:memory:", "sqlite"),
        ("/var/lib/ledger.db", "/var/lib/ledger.db"),
        ("", ""),
    ],
)
@pytest.mark.parametrize("door", [upgrade, LedgerReader, file_of])
def test_any_other_url_is_one_clear_error_that_keeps_its_password(
    url: str, scheme: str, door: Callable[[str], object]
) -> None:
    with pytest.raises(LedgerUnreachable) as caught:
        door(url)
    assert str(caught.value) == f"{scheme}: no ledger that this version can write"
    assert caught.value.hint == "give a file as sqlite:///relative.db or sqlite:////absolute/path.db"


def test_the_folder_of_a_new_ledger_is_made(tmp_path: Path) -> None:
    path = tmp_path / "not" / "yet" / "ledger.db"
    assert upgrade(url_of(str(path)))
    assert path.is_file()


def test_a_ledger_is_written_ahead_and_found_current(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with closing(connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (1,)  # NORMAL
        assert is_current(connection, path)


def test_an_empty_file_becomes_a_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    with closing(connect(str(path))) as connection:
        assert revision_of(connection, str(path)) is None
        assert not is_current(connection, str(path))
    assert upgrade(url_of(str(path)))
    LedgerReader(url_of(str(path))).close()


def test_an_empty_file_is_no_ledger_to_read(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    path.touch()
    with pytest.raises(LedgerUnreachable, match="not a ledger of kvtally"):
        read_with(str(path))


def random_bytes(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 64)


def a_few_bytes(path: Path) -> None:
    path.write_bytes(b"ledger")


def overwritten_header(path: Path) -> None:
    path.write_bytes(b"\xff" * PAGE + Path(new_ledger(path.parent, "whole")).read_bytes()[PAGE:])


def overwritten_schema(path: Path) -> None:
    """SQLite's own words stand, what follows them does not."""
    whole = Path(new_ledger(path.parent, "whole")).read_bytes()
    path.write_bytes(whole[:100] + b"\xa5" * (PAGE - 100) + whole[PAGE:])


def truncated(path: Path) -> None:
    path.write_bytes(Path(new_ledger(path.parent, "whole")).read_bytes()[: PAGE + 700])


def of_somebody_else(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE songs (name TEXT)")


def a_web_page(path: Path) -> None:
    path.write_text("<!doctype html><title>502</title>" * 40, encoding="utf-8")


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (random_bytes, "damaged or not a SQLite database"),
        (a_few_bytes, "damaged or not a SQLite database"),
        (a_web_page, "damaged or not a SQLite database"),
        (overwritten_header, "damaged or not a SQLite database"),
        (overwritten_schema, "damaged or not a SQLite database"),
        (truncated, "damaged or not a SQLite database"),
        (of_somebody_else, "not a ledger of kvtally"),
    ],
)
def test_what_is_no_ledger_is_one_clear_error_and_stays_as_it_is(
    tmp_path: Path, damage: Callable[[Path], None], words: str, door: Callable[[str], None]
) -> None:
    path = tmp_path / "ledger.db"
    damage(path)
    before = path.read_bytes()
    with pytest.raises(LedgerUnreachable) as caught:
        door(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert words in str(caught.value)
    assert caught.value.hint
    assert path.read_bytes() == before
    assert {one.name for one in tmp_path.iterdir()} <= {"ledger.db", "whole"}


@pytest.mark.parametrize("door", DOORS)
def test_a_ledger_of_a_newer_kvtally_is_refused_and_stays_as_it_is(tmp_path: Path, door: Callable[[str], None]) -> None:
    path = new_ledger(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    before = Path(path).read_bytes()
    with pytest.raises(LedgerRevision, match=f"has revision 9999, this kvtally knows {HEAD_REVISION}") as caught:
        door(path)
    assert "upgrade this one" in caught.value.hint
    assert Path(path).read_bytes() == before


def test_an_older_ledger_is_read_only_once_it_is_brought_up_to_date(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '0000'")
    with pytest.raises(LedgerRevision) as caught:
        read_with(path)
    assert caught.value.hint == "run `kvtally ledger upgrade`"


@pytest.mark.parametrize("door", DOORS)
def test_a_folder_is_no_ledger(tmp_path: Path, door: Callable[[str], None]) -> None:
    with pytest.raises(LedgerUnreachable, match="cannot be opened") as caught:
        door(str(tmp_path))
    assert "it must be a file" in caught.value.hint


@pytest.mark.parametrize("door", DOORS[:2])
def test_a_folder_that_is_a_file_is_named(tmp_path: Path, door: Callable[[str], None]) -> None:
    (tmp_path / "folder").touch()
    with pytest.raises(LedgerUnreachable, match="folder: ") as caught:
        door(str(tmp_path / "folder" / "ledger.db"))
    assert "--ledger" in caught.value.hint


def test_a_ledger_that_is_not_there_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LedgerUnreachable, match="no ledger there") as caught:
        read_with(str(tmp_path / "ledger.db"))
    assert "kvtally run" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_database_that_somebody_holds_for_himself_is_busy(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA journal_mode=DELETE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(LedgerBusy, match="locked by another process") as caught:
            write_with(path)
    assert "nothing is lost" in caught.value.hint
    write_with(path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that any user may enter: pytest's own are closed to all but one."""
    folder = Path(tempfile.mkdtemp(prefix="kvtally-place-"))
    folder.chmod(0o755)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def as_nobody(act: Callable[[], object]) -> str:
    """What a user without rights is told: the error's class, message and hint."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            act()
            answer = "done"
        except LedgerError as error:
            answer = f"{type(error).__name__}|{error}|{error.hint}"
        except BaseException as error:  # noqa: BLE001  # whatever it is, the parent shall see it
            answer = f"a traceback: {error!r}"
        os.write(send, answer.encode())
        os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def test_a_folder_without_the_right_to_write_is_one_clear_error(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    path = str(open_folder / "ledger.db")
    refused = f"LedgerUnreachable|{path}: cannot be opened|it must be a file in a folder that exists, both of them"
    assert as_nobody(lambda: upgrade_with(path)).startswith(refused)
    below = str(open_folder / "below" / "ledger.db")
    said = as_nobody(lambda: upgrade_with(below))
    assert said == f"LedgerUnreachable|{open_folder}/below: Permission denied|choose another place with --ledger"

    def lock() -> None:
        with WriterLock(path):
            pass

    said = as_nobody(lock)
    assert said == f"LedgerUnreachable|{path}.lock: Permission denied|choose another place with --ledger"


def test_a_file_without_the_right_to_write_is_one_clear_error(open_folder: Path) -> None:
    path = new_ledger(open_folder)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    os.chmod(path, 0o444)  # noqa: PTH101  # the path is a text everywhere here
    open_folder.chmod(0o555)
    before = Path(path).read_bytes()

    def append() -> None:
        connection = connect(path)
        try:
            LedgerWriter(connection, path).append([], [])
        finally:
            connection.close()

    said = as_nobody(append)
    assert said == f"LedgerUnreachable|{path}: read-only|give kvtally's user the right to write the file and its folder"
    assert as_nobody(lambda: read_with(path)) == "done"
    assert Path(path).read_bytes() == before


def test_a_file_without_the_right_to_read_is_one_clear_error(open_folder: Path) -> None:
    path = new_ledger(open_folder)
    os.chmod(path, 0o000)  # noqa: PTH101  # as above
    for door in DOORS:
        assert as_nobody(partial(door, path)).startswith(f"LedgerUnreachable|{path}: cannot be opened|")


def test_the_lock_names_the_process_that_holds_it(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    program = "import sys, time; from kvtally.agent.ledger.place import WriterLock\n"
    program += f"with WriterLock({path!r}): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(LedgerBusy) as caught, WriterLock(path):
            pass
        holder.kill()
    assert str(caught.value) == f"{path}: process {holder.pid} writes this ledger"
    assert "--ledger" in caught.value.hint
    with WriterLock(path):  # a dead process holds nothing
        pass


def test_the_lock_can_be_taken_again_once_it_is_given_back(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    for _ in range(2):
        with WriterLock(path):
            assert Path(f"{path}.lock").read_text(encoding="ascii") == f"{os.getpid()}\n"


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        ("database is locked", LedgerBusy, "locked"),
        ("database or disk is full", LedgerUnreachable, "the disk is full"),
        ("attempt to write a readonly database", LedgerUnreachable, "read-only"),
        ("database disk image is malformed", LedgerUnreachable, "damaged"),
        ("file is not a database", LedgerUnreachable, "damaged"),
        ("unable to open database file", LedgerUnreachable, "cannot be opened"),
        ("disk I/O error", LedgerUnreachable, "the disk does not answer"),
        ("no such table: target", LedgerUnreachable, "tables are not those of its revision (no such table: target)"),
        ("no such column: flags", LedgerUnreachable, "tables are not those of its revision (no such column: flags)"),
        ("NOT NULL constraint failed: rate.unit", LedgerUnreachable, "NOT NULL constraint failed: rate.unit"),
    ],
)
def test_what_sqlite_says_becomes_what_where_and_what_to_do(said: str, kind: type[LedgerError], words: str) -> None:
    error = explained("/var/ledger.db", sqlite3.OperationalError(said))
    assert type(error) is kind
    assert str(error).startswith("/var/ledger.db: ")
    assert words in str(error)
    assert error.hint
    assert "ledger audit" not in error.hint  # which would meet the same error


def test_a_check_of_a_large_ledger_ends_in_time_and_tells_nothing(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with closing(sqlite3.connect(path)) as connection, connection:
        for table in ("one", "two"):
            connection.execute(f"CREATE TABLE {table} (text)")
            connection.executemany(f"INSERT INTO {table} VALUES (?)", [("x" * 1000,)] * 5000)
    with closing(connect(path)) as connection:
        assert check_whole(connection, path)
        assert not check_whole(connection, path, seconds=0)
        assert connection.execute("SELECT count(*) FROM two").fetchone() == (5000,)
    with Path(path).open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\xa5" * 4096)
    with closing(connect(path)) as connection, pytest.raises(LedgerUnreachable, match="damaged"):
        check_whole(connection, path)


def test_a_place_that_cannot_be_asked_for_a_while_is_no_ledger_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = new_ledger(tmp_path)
    assert place_of(path) is not None
    assert place_of(f"{path}.none") is None

    def stale(*_: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(LedgerUnreachable, match="Stale file handle") as found:
        place_of(path)
    assert not isinstance(found.value, LedgerLost)


def test_who_only_looks_whether_a_ledger_is_written_keeps_no_run_from_starting(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    with Path(f"{path}.lock").open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        timer = threading.Timer(0.05, fcntl.flock, (looking, fcntl.LOCK_UN))
        timer.start()
        with WriterLock(path):
            pass
        timer.join()
