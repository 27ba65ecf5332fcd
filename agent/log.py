"""Log lines as key=value text or as JSON objects, one a line, on standard error."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Level = Literal["debug", "info", "warning", "error"]
_LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
REPEAT_SECONDS = 60.0
_REMEMBERED = 1000


class Log:
    """Writes lines, and the same complaint once a minute at most: a source that is down says so without a flood."""

    def __init__(
        self,
        form: Literal["text", "json"] = "text",
        least: Level = "info",
        write: Callable[[str], object] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._form = form
        self._least = _LEVELS.index(least)
        self._write = write or _to_stderr
        self._clock = clock
        self._said: dict[str, float] = {}

    def line(self, level: Level, message: str, **fields: object) -> None:
        """Write one line; fields that are None are left out."""
        if _LEVELS.index(level) < self._least:
            return
        now = self._clock()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        known = {key: value for key, value in fields.items() if value is not None}
        if self._form == "json":
            body = {"time": stamp, "level": level, "message": message, **known}
            self._write(json.dumps(body, default=str) + "\n")
            return
        pairs = "".join(f" {key}={_quoted(value)}" for key, value in known.items())
        self._write(f"{stamp} {level:<7} {_one_line(message)}{pairs}\n")

    def complain(self, level: Level, message: str, **fields: object) -> None:
        """Write a line unless the same message was written within the last minute."""
        now = self._clock()
        # a clock that was set back says nothing about how long ago it was
        if 0 <= now - self._said.get(message, -REPEAT_SECONDS) < REPEAT_SECONDS:
            return
        self._said.pop(message, None)  # to the end: the first is the one that was said longest ago
        if len(self._said) >= _REMEMBERED:
            del self._said[next(iter(self._said))]
        self._said[message] = now
        self.line(level, message, **fields)


def _to_stderr(text: str) -> None:
    # a log on a full disk, or a reader that has gone, ends no program that counts
    with suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\r", " ")


def _quoted(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return json.dumps(text) if not text or any(mark in text for mark in ' "=\n\r') else text
