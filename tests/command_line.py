"""The command line as tests call it: in this process, with its streams and its exit status."""

from __future__ import annotations

import io
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from importlib.resources import files
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvtally.agent.cli import main
from kvtally.agent.cli.demo import RECORDING
from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config
from kvtally.agent.recording import open_recording

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

DEMO = str(files("kvtally.agent") / "demo" / RECORDING)


class Ran(NamedTuple):
    """What a call gave."""

    status: int
    out: str
    err: str


class Call(Protocol):
    """Calls the command line."""

    def __call__(self, *arguments: str) -> Ran: ...


def call(*arguments: str) -> Ran:
    """Run `kvtally ARGUMENTS`; an error that it does not explain is raised here."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = [io.TextIOWrapper(each, encoding="utf-8", write_through=True) for each in (out, err)]
    status: object = None
    with redirect_stdout(streams[0]), redirect_stderr(streams[1]):
        try:
            main(list(arguments))
        except SystemExit as end:
            status = end.code
    assert isinstance(status, int), "main() ends the process"
    return Ran(status, out.getvalue().decode(), err.getvalue().decode())


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Leave nothing of this machine's kvtally to be found."""
    of_the_terminal = {"COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    for name in [name for name in os.environ if name.startswith("KVTALLY_") or name in of_the_terminal]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(folder / "state"))
    monkeypatch.chdir(folder)


def replayed(path: Path) -> str:
    """A new ledger with the packaged recording; its URL."""
    url = f"sqlite:///{path}"
    into_ledger(open_recording(DEMO), url, Config())
    return url


def copied(url: str, folder: Path) -> str:
    """A ledger of one's own to write; its URL."""
    path = folder / "copy.db"
    shutil.copyfile(url.removeprefix("sqlite:///"), path)
    return f"sqlite:///{path}"
