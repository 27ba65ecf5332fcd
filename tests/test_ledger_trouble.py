from __future__ import annotations

import os
import resource
import sqlite3
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.daemon_process import DaemonProcess, config_of, kvtally
from tests.ledgers import new_ledger
from tests.loopback import FakeEngine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Trouble:
    """A daemon that has begun to count, and whose ledger a test gets at."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.engine = stack.enter_context(FakeEngine())
        self.daemon = stack.enter_context(DaemonProcess(folder, config_of([self.engine.name])))
        self.daemon.wait_until("the first scrape", lambda: self.daemon.knows(self.engine.name))
        self.wait_for_row()

    def wait_for_row(self) -> None:
        """Serve, and wait for an interval that is written from now on."""
        before = len(self.daemon.rows(self.engine.name))
        self.engine.serve(100, 40, 7)
        self.daemon.wait_until("an interval", lambda: len(self.daemon.rows(self.engine.name)) > before)

    def last(self, scrapes: int) -> None:
        """Let the trouble last for so many scrapes, with traffic all the while."""
        for _ in range(scrapes):
            self.engine.serve(1000, 400, 70)
            self.engine.wait_for_scrapes()

    def check(self) -> None:
        """Nothing was lost: one interval covers the time in which none could be written."""
        self.wait_for_row()
        assert self.daemon.stop() == 0
        assert self.daemon.tokens(self.engine.name) == self.engine.served
        rows = self.daemon.rows(self.engine.name)
        assert self.daemon.gaps() == []
        assert max(row.missed for row in rows) >= 1
        assert max(row.tokens.prompt for row in rows) >= 2000
        assert "Traceback" not in self.daemon.log()


@pytest.fixture
def trouble(tmp_path: Path) -> Iterator[Trouble]:
    with ExitStack() as stack:
        yield Trouble(tmp_path, stack)


def test_a_locked_ledger_is_told_once_and_the_next_interval_covers_the_time(trouble: Trouble) -> None:
    with closing(sqlite3.connect(trouble.daemon.ledger, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        trouble.last(scrapes=8)  # five ticks of a second share a transaction
        other.execute("ROLLBACK")
    trouble.check()
    (line,) = trouble.daemon.lines(" error ")
    assert f"{trouble.daemon.ledger}: locked by another process" in line
    assert "hint=" in line


def test_a_disk_that_takes_no_more_is_told_once_and_the_next_interval_covers_the_time(trouble: Trouble) -> None:
    log = trouble.daemon.ledger.with_name("ledger.db-wal")
    limits = resource.prlimit(trouble.daemon.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(trouble.daemon.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, limits[1]))
    trouble.last(scrapes=8)  # five ticks of a second share a transaction
    resource.prlimit(trouble.daemon.pid, resource.RLIMIT_FSIZE, limits)
    trouble.check()
    (line,) = trouble.daemon.lines(" error ")
    assert f"{trouble.daemon.ledger}: the disk " in line
    assert "hint=" in line


def test_a_ledger_that_is_taken_away_ends_the_run_and_the_next_one_goes_on_from_the_copy(trouble: Trouble) -> None:
    daemon = trouble.daemon
    kept = daemon.ledger.with_name("kept.db")
    with closing(sqlite3.connect(daemon.ledger)) as connection:
        connection.execute("VACUUM INTO ?", (str(kept),))
    for path in daemon.ledger.parent.glob("ledger.db*"):
        path.unlink()
    trouble.last(scrapes=1)
    assert daemon.process.wait(30) == 3
    assert "the ledger was moved or removed while it was written" in daemon.log().splitlines()[-1]
    kept.rename(daemon.ledger)
    trouble.engine.serve(1000, 400, 70)
    daemon.start()
    trouble.wait_for_row()
    assert daemon.stop() == 0
    assert daemon.tokens(trouble.engine.name) == trouble.engine.served
    assert "Traceback" not in daemon.log()


def test_a_second_run_by_another_name_of_the_ledger_is_refused(trouble: Trouble) -> None:
    link = trouble.daemon.ledger.with_name("link.db")
    link.symlink_to(trouble.daemon.ledger)
    second = kvtally("run", "--ledger", f"sqlite:///{link}")
    assert second.returncode == 3
    assert f"process {trouble.daemon.pid} writes this ledger" in second.stderr


def newer(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")


def damaged(ledger: Path) -> None:
    with ledger.open("r+b") as file:
        file.write(b"no database at all" * 100)


def damaged_within(ledger: Path) -> None:
    """Two pages of what is asked for rarely: the hours before the newest."""
    with ledger.open("r+b") as file:
        file.seek(ledger.stat().st_size * 2 // 3 // 4096 * 4096)
        file.write(b"\xa5" * 8192)


def cut_off(ledger: Path) -> None:
    os.truncate(ledger, ledger.stat().st_size // 2)


def somebody_elses(ledger: Path) -> None:
    ledger.unlink()
    with closing(sqlite3.connect(ledger)) as connection, connection:
        connection.execute("CREATE TABLE bookmarks (url TEXT)")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (newer, "written by a newer kvtally"),
        (damaged, "damaged or not a SQLite database"),
        (damaged_within, "damaged or not a SQLite database"),
        (cut_off, "damaged or not a SQLite database"),
        (somebody_elses, "not a ledger of kvtally"),
    ],
)
def test_a_ledger_that_cannot_be_used_is_refused_in_one_line_and_not_touched(
    tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    ledger = Path(new_ledger(tmp_path))
    spoil(ledger)
    before = ledger.read_bytes()
    done = kvtally("run", "--ledger", f"sqlite:///{ledger}")
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert str(ledger) in line
    assert words in line
    assert ledger.read_bytes() == before
