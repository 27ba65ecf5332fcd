"""The terminal: its width, and tables that never cut a figure."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Sequence

_WORD, _GAP = 16, 3
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

    def say(self, *parts: str | Text, style: str = "") -> None:
        """Print one line and leave its wrapping to the terminal: what is to be copied stays whole."""
        self.print(Text.assemble(*parts), style=style, soft_wrap=True)

    def sheet(self, sheet: Sheet, droppable: Sequence[str] = ()) -> None:
        """Print a sheet and an empty line; where it is too wide, without the columns named, in their order.

        What is still too wide then is left to the terminal to wrap: nothing is cut.
        """
        without: list[str] = []
        while sheet.least_width(without) > self.width and len(without) < len(droppable):
            without.append(droppable[len(without)])
        least = sheet.least_width(without)
        (self if least <= self.width else Screen(width=least)).print(sheet.table(without))
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

    def least_width(self, without: Sequence[str]) -> int:
        """Characters across in which every figure is whole, and no text is squeezed below a word's length."""
        widths = []
        for at in self._kept(without):
            widest = max(cell_len(cells[at]) for cells in (self._heads, *self._rows))
            widths.append(min(widest, _WORD) if at < self._texts else widest)
        return sum(widths) + _GAP * (len(widths) - 1)

    def table(self, without: Sequence[str]) -> Table:
        """The table for rich to lay out."""
        table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        kept = self._kept(without)
        for at in kept:
            if at < self._texts:
                table.add_column(self._heads[at], overflow="fold")
            else:
                table.add_column(self._heads[at], justify="left" if at == 0 else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*(row[at] for at in kept))
        return table


def printable(value: Any) -> Any:
    """An answer with every character that could move a terminal's cursor shown as "?": names come from anywhere."""
    if isinstance(value, str):
        return "".join(each if each.isprintable() else "?" for each in value)
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [printable(item) for item in value]
    return value
