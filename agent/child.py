"""Short-lived children of our own program: what needs SQLAlchemy or alembic runs there, and the daemon stays small."""

from __future__ import annotations

import os
import signal
import sys


class Child:
    """One `kvtally …` command in a process of its own."""

    def __init__(self, *arguments: str, stdout: int | None = None, stderr: int | None = None) -> None:
        """Begin it, with file descriptors for what it prints; OSError if there is no process to be had."""
        command = [sys.executable, "-m", "kvtally", *arguments]
        self.command = " ".join(command[3:])
        actions = [(os.POSIX_SPAWN_DUP2, file, at) for file, at in ((stdout, 1), (stderr, 2)) if file is not None]
        self._pid: int | None = os.posix_spawn(sys.executable, command, os.environ, file_actions=actions)
        self.status: int | None = None
        self.cpu_seconds = 0.0  # known once it has ended

    def poll(self) -> int | None:
        """The exit status; None while it runs."""
        return self._reap(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end."""
        return self._reap(0) or 0

    def kill(self) -> None:
        """End it at once; `wait` reaps it."""
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)

    def _reap(self, options: int) -> int | None:
        if self._pid is not None:
            pid, status, used = os.wait4(self._pid, options)
            if pid:
                self._pid = None
                self.status = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = used.ru_utime + used.ru_stime
        return self.status
