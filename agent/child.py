"""Short-lived children of our own program: what needs SQLAlchemy or alembic runs there, and the daemon stays small."""

from __future__ import annotations

import os
import sys


class Child:
    """One `kvtally …` command in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "KVTALLY_CHILD": "1"}
        command = [sys.executable, "-m", "kvtally", *arguments]
        self.command = " ".join(command[3:])
        self._pid: int | None = os.posix_spawn(sys.executable, command, environment)
        self.status: int | None = None

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end."""
        return self._reap(0) or 0

    def _reap(self, options: int) -> int | None:
        if self._pid is not None:
            pid, status = os.waitpid(self._pid, options)
            if pid:
                self._pid = None
                self.status = os.waitstatus_to_exitcode(status)
        return self.status
