"""Where a ledger lies: its URL, its file, its lock and its revision."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import time
from contextlib import suppress
from typing import IO, Self

from kvtally.agent.ledger.columns import HEAD_REVISION
from kvtally.agent.ledger.errors import LedgerBusy, LedgerError, LedgerRevision, LedgerUnreachable, explained

SQLITE = "sqlite:///"
_LOCK_TRIES, _LOCK_EVERY_SECONDS = 10, 0.02


def file_of(url: str) -> str:
    """The file of a SQLite URL; LedgerUnreachable for any other."""
    if not url.startswith(SQLITE) or url[len(SQLITE) :] in {"", ":memory:"}:
        scheme = url.split(":", 1)[0]
        raise LedgerUnreachable(
            f"{scheme}: no ledger that this version can write",
            "give a file as sqlite:///relative.db or sqlite:////absolute/path.db",
        )
    return os.path.expanduser(url[len(SQLITE) :])  # noqa: PTH111  # pathlib costs the daemon memory


def connect(path: str, busy_seconds: float = 2.0) -> sqlite3.Connection:
    """Open the file for writing in WAL mode; LedgerError says what is wrong with it.

    What is not a ledger, or one of a newer kvtally, stays as it is, byte for byte.
    """
    folder = os.path.dirname(path) or "."  # noqa: PTH120  # as above
    try:
        os.makedirs(folder, mode=0o750, exist_ok=True)  # noqa: PTH103  # as above
    except OSError as error:
        raise LedgerUnreachable(f"{folder}: {error.strerror}", "choose another place with --ledger") from error
    try:
        connection = sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)
    except sqlite3.Error as error:
        raise explained(path, error) from error
    try:
        is_current(connection, path)
        connection.execute("PRAGMA journal_mode=WAL").fetchone()
        connection.execute("PRAGMA synchronous=NORMAL")
        # half a MiB of pages is more than one transaction touches
        connection.execute("PRAGMA cache_size=-512")
        connection.execute("PRAGMA journal_size_limit=4194304")
    except sqlite3.Error as error:
        connection.close()
        raise explained(path, error) from error
    except LedgerError:
        connection.close()
        raise
    return connection


def check_whole(connection: sqlite3.Connection, path: str, seconds: float = 2.0) -> bool:
    """Look for damage, for about so long at most; whether all was looked at. LedgerUnreachable where there is some."""
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, 1000)
    try:
        (told,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if "interrupted" not in str(error):
            raise explained(path, error) from error
        return False
    except sqlite3.Error as error:
        raise explained(path, error) from error
    finally:
        connection.set_progress_handler(None, 0)
    if told != "ok":
        raise explained(path, sqlite3.DatabaseError(f"malformed: {' '.join(told.split())}"))
    return True


def place_of(path: str) -> tuple[int, int] | None:
    """Which file lies there: its device and inode; None if there is none. LedgerUnreachable if nobody can tell."""
    try:
        found = os.stat(path)  # noqa: PTH116  # as above
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise LedgerUnreachable(f"{path}: {error.strerror}", "nothing is lost: it is tried again") from error
    return found.st_dev, found.st_ino


def revision_of(connection: sqlite3.Connection, path: str) -> str | None:
    """The schema revision; None for an empty file."""
    try:
        if not connection.execute("SELECT 1 FROM sqlite_master WHERE name='alembic_version'").fetchone():
            if connection.execute("SELECT 1 FROM sqlite_master").fetchone():
                raise LedgerUnreachable(f"{path}: a database, but not a ledger of kvtally", "give another file")
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        raise explained(path, error) from error
    return None if row is None else str(row[0])


def is_current(connection: sqlite3.Connection, path: str) -> bool:
    """Whether the schema is ours; False if it can be brought up to date, LedgerRevision if it is newer."""
    revision = revision_of(connection, path)
    if revision is not None and revision > HEAD_REVISION:
        raise LedgerRevision(
            f"{path}: the ledger has revision {revision}, this kvtally knows {HEAD_REVISION}",
            "it was written by a newer kvtally: upgrade this one; nothing was touched",
        )
    return revision == HEAD_REVISION


def writer_of(path: str) -> str:
    """The number of the process that writes a ledger now, "unknown" where it is not told; "" where none does."""
    try:
        with open(_lock_of(path), encoding="ascii") as file:  # noqa: PTH123  # as above
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go of with the file, at once
            except OSError:
                return file.read(20).strip() or "unknown"
    except OSError:  # nobody has ever written it
        pass
    return ""


def _lock_of(path: str) -> str:
    return f"{os.path.realpath(path)}.lock"  # by the file's own name: a link to it is the same ledger


class WriterLock:
    """One process at a time writes a ledger: two would count every token twice."""

    def __init__(self, path: str) -> None:
        self._path = _lock_of(path)
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self._file = open(self._path, "a+", encoding="ascii")  # noqa: PTH123  # held until __exit__
        except OSError as error:
            raise LedgerUnreachable(f"{self._path}: {error.strerror}", "choose another place with --ledger") from error
        try:
            self._take(self._file)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read(20).strip() or "unknown"
            self._file.close()
            raise LedgerBusy(
                f"{self._path[:-5]}: process {holder} writes this ledger",
                "stop it first, or give another ledger with --ledger",
            ) from error
        self._file.truncate(0)
        self._file.write(f"{os.getpid()}\n")
        self._file.flush()
        return self

    @staticmethod
    def _take(file: IO[str]) -> None:
        """Take the lock; who only looks whether it is taken (`doctor`) holds it for an instant."""
        for _ in range(_LOCK_TRIES - 1):
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            time.sleep(_LOCK_EVERY_SECONDS)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
