"""What was sent last over OTLP, kept beside the ledger: deltas are counted from it."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.ledger.place import file_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping


class LastSent(NamedTuple):
    """What was sent last.

    ledger_ns   start of the ledger that it was of
    at_ns       when (unix nanoseconds)
    counters    every counter's value then
    """

    ledger_ns: int
    at_ns: int
    counters: Mapping[str, float]


class Kept:
    """Where it is remembered what was sent: a small file beside the ledger."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    @classmethod
    def beside(cls, url: str) -> Kept:
        """The file of the ledger at this URL."""
        return cls(f"{file_of(url)}.otlp")

    def read(self, ledger_ns: int) -> LastSent:
        """What was sent last of this ledger; nothing, where the file is not there or not whole: then all is sent."""
        never = LastSent(ledger_ns, ledger_ns, {})
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
            # a count stays one: a series must not turn from whole numbers to others
            counters = {
                str(key): value if type(value) is int else float(value) for key, value in body["counters"].items()
            }
            sent = LastSent(int(body["ledger_ns"]), int(body["at_ns"]), counters)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return never
        return sent if sent.ledger_ns == ledger_ns else never

    @contextmanager
    def renewed(self, sent: LastSent) -> Iterator[Callable[[], object]]:
        """Write what is about to be sent beside the file, and give what puts it in its place once it was taken.

        OSError where it cannot be written: before anything is sent, since the next push would send it once more.
        """
        draft = self._path.with_name(f"{self._path.name}-new")
        draft.write_text(json.dumps(sent._asdict()), encoding="utf-8")
        try:
            yield lambda: draft.replace(self._path)
        finally:
            draft.unlink(missing_ok=True)
