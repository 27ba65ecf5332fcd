"""Rows for warehouses: typed columns, their values as text, and a writer of comma-separated values (RFC 4180)."""

from __future__ import annotations

import csv
import os
import sys
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from decimal import Decimal, localcontext
from typing import IO, TYPE_CHECKING, Literal, NamedTuple, Protocol

from kvtally.agent.price import NANO, nano_to_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from fractions import Fraction

# what stands in a column: text; money, an integer of nano-units; number, an exact decimal of PLACES places; count, an
# integer; real, a float; instant, unix nanoseconds; flag, a truth. Each may be unknown: None
Kind = Literal["text", "money", "number", "count", "real", "instant", "flag"]
Value = str | int | float | Decimal | None
Row = tuple[Value, ...]

PLACES = 18
_DIGITS = 60  # more than any quantity of 64 bits with PLACES behind the point


class Column(NamedTuple):
    """One column of a table that leaves the ledger."""

    name: str
    kind: Kind


class Writer(Protocol):
    """Takes rows one by one, in the order of the columns that it was made with."""

    def write(self, row: Row) -> None:
        """Write one row."""

    def finish(self) -> None:
        """Write what is held; nothing may be written after it."""


class CsvWriter:
    """Writes a line of column names and then rows, in UTF-8; an unknown value is an empty field."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        self._file = file
        self._kinds = [column.kind for column in columns]
        self._lines = csv.writer(self, lineterminator="\r\n")
        self._lines.writerow([column.name for column in columns])

    def write(self, row: Row | str) -> None:
        """Write one row; the csv module hands its text back to the same name."""
        if isinstance(row, str):
            self._file.write(row.encode("utf-8", "backslashreplace"))
        else:
            self._lines.writerow([csv_text(kind, value) for kind, value in zip(self._kinds, row, strict=True)])

    def finish(self) -> None:
        """Hand everything to the system."""
        self._file.flush()


def csv_text(kind: Kind, value: Value) -> str:
    """One field, exact: an amount has nine places, an instant whole seconds, what is unknown is empty."""
    if value is None:
        return ""
    if kind == "money":
        return nano_to_text(int(value))
    if kind == "number":
        text = f"{value:f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    if kind == "instant":
        return second_text(int(value))
    if kind == "flag":
        return "true" if value else "false"
    return str(value)


def second_text(at_ns: int) -> str:
    """An instant as FOCUS writes it, 2026-11-23T04:00:00Z: parts of a second are cut off."""
    return datetime.fromtimestamp(at_ns // NANO, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def number(exact: Fraction) -> Decimal:
    """A quantity as a decimal of PLACES places, half to even."""
    with localcontext() as context:
        context.prec = _DIGITS
        return Decimal(round(exact * 10**PLACES)).scaleb(-PLACES)


@contextmanager
def opened(path: str | None) -> Iterator[IO[bytes]]:
    """A file to write, or standard output for None; the file is there whole or not at all. OSError if it cannot be.

    A device or a pipe is written to, and a link leads to what it names: neither is replaced.
    """
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if os.path.exists(path) and not os.path.isfile(path):  # noqa: PTH110, PTH113  # as below
        with open(path, "wb") as file:  # noqa: PTH123  # as below
            yield file
        return
    path = os.path.realpath(path)
    beside = f"{path}.part"
    try:
        with open(beside, "wb") as file:  # noqa: PTH123  # one open
            yield file
        os.replace(beside, path)  # noqa: PTH105  # as above
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)  # noqa: PTH108  # as above
        raise
