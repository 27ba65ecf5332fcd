"""The real `kvtally run` as a child process of a test, and what its ledger holds."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.loopback import Tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Self

CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("KVTALLY_")}


class Row(NamedTuple):
    """One engine interval."""

    start_ns: int
    end_ns: int
    missed: int
    flags: int
    began_ns: int | None
    tokens: Tokens


class DaemonProcess:
    """`kvtally run` on a ledger and a config of a test's own; its log is kept over restarts."""

    def __init__(self, folder: Path, config: str, *options: str) -> None:
        self.folder = folder
        self.ledger = folder / "ledger.db"
        self.url = f"sqlite:///{self.ledger}"
        self._log = folder / "kvtally.log"
        self._config = folder / "kvtally.toml"
        self._config.write_text(config, encoding="utf-8")
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, **environment: str) -> Self:
        command = [sys.executable, "-m", "kvtally", "run", "--ledger", self.url, "--config", str(self._config)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._options],
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=CLEAN | environment,
                cwd=self.folder,
            )
        return self

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None
        return self._process

    @property
    def pid(self) -> int:
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self, within_seconds: float = 30.0) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_seconds)

    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    def lines(self, *words: str) -> list[str]:
        """Log lines that hold all these words."""
        return [line for line in self.log().splitlines() if all(word in line for word in words)]

    def wait_until(self, what: str, holds: Callable[[], object], within_seconds: float = 30.0) -> None:
        """Wait until something holds; fails with the log if it does not, or if the daemon ends before."""
        deadline = time.monotonic() + within_seconds
        while not holds():
            assert self.process.poll() is None, f"the daemon ended before {what}:\n{self.log()}"
            assert time.monotonic() < deadline, f"not within {within_seconds:g} s: {what}\n{self.log()}"
            time.sleep(0.02)

    def query(self, sql: str, *values: object) -> list[tuple[Any, ...]]:
        """Rows of the ledger, read beside the daemon; none while there is no ledger."""
        if not self.ledger.exists():
            return []
        with contextlib.closing(sqlite3.connect(f"file:{self.ledger}?mode=ro", uri=True, timeout=10)) as connection:
            try:
                return connection.execute(sql, values).fetchall()
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):
                    return []
                raise

    def wait_for_write(self, within_seconds: float = 30.0) -> None:
        """Return as soon as anything is committed to the ledger."""
        deadline = time.monotonic() + within_seconds
        with contextlib.closing(sqlite3.connect(self.ledger, timeout=10)) as connection:
            before = connection.execute("PRAGMA data_version").fetchone()
            while connection.execute("PRAGMA data_version").fetchone() == before:
                assert time.monotonic() < deadline, f"nothing is written:\n{self.log()}"
                time.sleep(0.0005)

    def knows(self, name: str) -> bool:
        """Whether the first scrape of an engine is in the ledger."""
        return bool(self.query("SELECT 1 FROM counter_state WHERE kind = 'engine' AND name = ?", f"{name}/0"))

    def rows(self, name: str) -> list[Row]:
        """The intervals of one engine, in order."""
        rows = self.query(
            "SELECT start_ns, start_ns + length_ns, missed, flags, began_ns, "
            "prompt_tokens, hbm_tokens, generated_tokens "
            "FROM engine_interval JOIN target ON target.id = target_id WHERE name = ? ORDER BY start_ns",
            f"{name}/0",
        )
        return [
            Row(start_ns, end_ns, missed, flags, began_ns, Tokens(*tokens))
            for start_ns, end_ns, missed, flags, began_ns, *tokens in rows
        ]

    def gaps(self) -> list[tuple[str, int]]:
        """Where intervals of a target do not begin where the one before ended: its name and nanoseconds."""
        found = []
        for kind in ("engine", "process", "filesystem"):
            rows = self.query(
                f"SELECT name, start_ns, start_ns + length_ns FROM {kind}_interval "
                "JOIN target ON target.id = target_id ORDER BY name, start_ns"
            )
            found += [
                (name, start_ns - end_ns)
                for (before, _, end_ns), (name, start_ns, _) in itertools.pairwise(rows)
                if name == before and start_ns != end_ns
            ]
        return found

    def tokens(self, name: str) -> Tokens:
        """What an engine's intervals add up to."""
        query = (
            "SELECT sum(prompt_tokens), sum(hbm_tokens), sum(generated_tokens) "
            "FROM engine_interval JOIN target ON target.id = target_id WHERE name = ?"
        )
        (row,) = self.query(query, f"{name}/0")
        return Tokens(*row)

    def findings(self, *kinds: str) -> list[tuple[str, str, int, int]]:
        """Kind, target, start and end of findings of these kinds, in order."""
        rows = self.query("SELECT kind, target, start_ns, end_ns FROM finding ORDER BY start_ns")
        return [(kind, target, start, end) for kind, target, start, end in rows if kind in kinds]

    def cost(self, *options: str) -> dict[str, Any]:
        """What `kvtally cost` says."""
        done = kvtally("cost", "--ledger", self.url, "--format", "json", *options)
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


def kvtally(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "kvtally", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=CLEAN,
        timeout=60,
    )


def config_of(names: Sequence[str], scrape: str = "discover = false") -> str:
    """A config with these engines and no GPU, which says more of how to scrape."""
    engines = "".join(f'[[engine]]\nurl = "http://{name}"\n' for name in names)
    quiet = '[gpu]\nenabled = false\n[export.prometheus]\nlisten = ""\n'
    return f"[scrape]\ninterval_seconds = 1\n{scrape}\n{quiet}{engines}"
