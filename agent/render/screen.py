"""The terminal: its width, and tables that never cut a figure."""

from __future__ import annotations

import os
import re
import sys
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

TO_COPY = re.compile(r"(?<=:) (kvtally rates add .*|engine = \[.*)$")
_GAP = 3
_TEXT, _WORD = 16, 10  # characters of a text that are worth leaving out a column, and those that are worth a wide line
PIPE_COLUMNS = 110  # a pipe has no width of its own: lines that wrap later are better than figures left out


class Screen(Console):
    """Standard output (or error), on which text is text: no markup, no emoji, no colours of its own choice."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        if width is None and "COLUMNS" not in os.environ and not (sys.stderr if stderr else sys.stdout).isatty():
            width = PIPE_COLUMNS
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False, width=width)

    def on_broken_pipe(self) -> None:
        """Leave it to the command line, which ends quietly; rich would exit with status 1, which says "no"."""
        raise BrokenPipeError

    def say(self, *parts: str | Text, style: str = "", indent: int = 0) -> None:
        """Print a paragraph, wrapped between words and indented from its second line on.

        A line to type or a file's line that ends it stands by itself, whole, so that it can be copied.
        """
        text = Text.assemble(*parts, style=style)
        to_copy = TO_COPY.search(text.plain)
        if to_copy is not None:
            text.truncate(to_copy.start())
        for number, line in enumerate(text.wrap(self, max(self.width - indent, 1))):
            line.rstrip()
            self.print(Text(" " * indent if number else "") + line, soft_wrap=True)
        if to_copy is not None:
            self.print(Text(f"{' ' * (indent + 2)}{to_copy[1]}"), soft_wrap=True)

    def sheet(self, sheet: Sheet, droppable: Sequence[str] = ()) -> None:
        """Print a sheet and an empty line; where it is too wide, without the columns named, in their order.

        What is still too wide then is left to the terminal to wrap: nothing is cut.
        """
        without: list[str] = []
        while sheet.least_width(without, _TEXT) > self.width and len(without) < len(droppable):
            without.append(droppable[len(without)])
        width = max(self.width, sheet.least_width(without, _WORD))
        (self if width == self.width else Screen(width=width)).print(sheet.table(without, width, self))
        self.print()


class Sheet:
    """Rows under heads: the first column is a name, the first `texts` may wrap, and figures never do."""

    def __init__(self, *heads: str, texts: int = 0) -> None:
        self._heads = heads
        self._texts = texts
        self._rows: list[tuple[str, ...]] = []

    def add(self, *cells: str) -> None:
        """Add a row, a cell for each head."""
        self._rows.append(cells)

    def _kept(self, without: Sequence[str]) -> list[int]:
        """Positions of the columns to show: those that no row has anything in are left out, too."""
        filled = [any(cells) for cells in zip(*self._rows, strict=True)] or [True] * len(self._heads)
        return [at for at, head in enumerate(self._heads) if filled[at] and head not in without]

    def least_width(self, without: Sequence[str], text: int) -> int:
        """Characters across in which every figure is whole, and what may wrap has `text` of them or all it needs."""
        kept = self._kept(without)
        widths = (min(self._widest(at), text) if at < self._texts else self._widest(at) for at in kept)
        return sum(widths) + _GAP * (len(kept) - 1)

    def _widest(self, at: int) -> int:
        return max(cell_len(line) for cells in (self._heads, *self._rows) for line in cells[at].split("\n"))

    def table(self, without: Sequence[str], width: int, console: Console) -> Table:
        """The table for rich to draw: what the figures leave of the width goes to the texts, from the left."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        kept = self._kept(without)
        spare = width - self.least_width(without, _WORD)
        columns: list[list[str]] = []
        for at in kept:
            table.add_column(self._heads[at], justify="left" if at < max(self._texts, 1) else "right", no_wrap=True)
            cells = [row[at] for row in self._rows]
            if at < self._texts:
                least = min(self._widest(at), _WORD)
                more = max(min(self._widest(at) - least, spare), 0)
                spare -= more
                cells = [_folded(cell, least + more, console) for cell in cells]
            columns.append(cells)
        for row in zip(*columns, strict=True):
            table.add_row(*row)
        return table


def _folded(cell: str, width: int, console: Console) -> str:
    """A text in lines of that width, broken between words where it can be."""
    return "\n".join(line.plain.rstrip() for line in Text(cell).wrap(console, width, overflow="fold"))


def printable(value: Any) -> Any:
    """An answer with every character that could move a terminal's cursor shown as "?": names come from anywhere."""
    if isinstance(value, str):
        return "".join(each if each.isprintable() else "?" for each in value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value
