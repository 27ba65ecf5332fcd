"""The counters of /metrics as they were at every step of a window: text for `promtool tsdb create-blocks-from`."""

from __future__ import annotations

import tempfile
from array import array
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import hour_of, widened
from kvtally.agent.export.counters import COUNTED, EVER_NS, LENGTH, Counter, counters_of, labels_of, quantities_of
from kvtally.agent.export.metrics import METRICS
from kvtally.agent.grouping import default_window
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.export_rows import hour_from, hours_begun, intervals_begun
from kvtally.agent.ledger.totals import totals
from kvtally.agent.price import NANO

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from kvtally.agent.accounts import Window
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.ledger.totals import Total
    from kvtally.collectors.base import Kind

Labels = tuple[tuple[str, str], ...]

_BLOCK_VALUES = 1_000_000  # held at a time: 8 MB
_LEAST_STEPS = 64  # of a block, however many series there are
_NOTHING = -1  # no interval ended in this step


class Series(NamedTuple):
    """One series: its labels, and what it had counted before the window, in the ledger's unit."""

    counter: Counter
    labels: Labels
    base: int


def backfill(
    reader: LedgerReader, window: Window | None, step_seconds: int, more: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Lines of the counters over a window, families together and each series in order of time; ends with # EOF.

    A counter has counted since the ledger began, as /metrics shows it. There is a sample at every step in which an
    interval ended; without a window, the default one of CLI.md. `more`: labels that every series gets.
    """
    extent = reader.extent()
    if extent is not None:
        targets = reader.targets()
        asked = widened(window or default_window(extent), reader.raw_from(), extent[1])
        # other targets than engines may have been read before the first and after the last of them
        began_ns = hour_of(extent[0])
        start_ns = began_ns if asked.start_ns <= extent[0] else asked.start_ns
        end_ns = EVER_NS if asked.end_ns >= extent[1] else asked.end_ns
        for kind in COUNTED if start_ns < min(end_ns, extent[1]) else ():
            own = {number: labels_of(target) for number, target in targets.items() if target.kind == kind}
            series, plan = _series(reader, kind, own, began_ns, start_ns)
            if series:
                with tempfile.TemporaryFile() as spool:
                    steps = _Steps(len(series), start_ns, step_seconds * NANO, spool)
                    for row in _counted(reader, kind, start_ns, end_ns):
                        steps.add(row, plan[row[0]])
                    steps.finish()
                    yield from _lines(series, steps, more or {})
    yield "# EOF\n"


def _series(
    reader: LedgerReader, kind: Kind, own: Mapping[int, Mapping[str, str]], began_ns: int, start_ns: int
) -> tuple[list[Series], dict[int, tuple[tuple[int, int], ...]]]:
    """The series of a kind in the order in which they print, and by target those that its rows count for.

    For each of those: which it is, and where in a row its count stands.
    """
    before = totals(reader, kind, began_ns, start_ns)
    places = {name: place for place, name in enumerate((*quantities_of(kind), LENGTH), 3)}
    bases: dict[tuple[Counter, Labels], int] = {}
    wanted: dict[int, list[tuple[Counter, Labels]]] = {number: [] for number in own}
    for number, total in totals(reader, kind, began_ns, EVER_NS).items():
        for counter in counters_of(kind, total.counted):
            key = (counter, (*own[number].items(), *counter.labels))
            bases[key] = bases.get(key, 0) + (_sum(before[number], counter) if number in before else 0)
            wanted[number].append(key)
    order = list(METRICS)
    keys = sorted(bases, key=lambda key: (order.index(key[0].metric), key[1]))
    which = {key: at for at, key in enumerate(keys)}
    plan = {
        number: tuple((which[key], places[key[0].quantity]) for key in counted) for number, counted in wanted.items()
    }
    return [Series(*key, bases[key]) for key in keys], plan


def _sum(total: Total, counter: Counter) -> int:
    return total.length_ns if counter.quantity == LENGTH else total.counted[counter.quantity] or 0


def _counted(reader: LedgerReader, kind: Kind, start_ns: int, end_ns: int) -> Iterator[Any]:
    """(target, start, length, …, LENGTH) of what counted in a window by its start; by the hour where intervals left."""
    names = quantities_of(kind)
    raw_ns = hour_from(reader, start_ns, end_ns)
    for row in hours_begun(reader, kind, start_ns, raw_ns, names):
        yield (row[0], row[1], HOUR_NS, *row[3:], row[2])
    for row in intervals_begun(reader, kind, raw_ns, end_ns, names):
        yield (*row, row[2])


def _lines(series: Sequence[Series], steps: _Steps, more: Mapping[str, str]) -> Iterator[str]:
    shown = ""
    for at, one in enumerate(series):
        metric = METRICS[one.counter.metric]
        name = metric.prometheus
        labels = ",".join(f'{key}="{_escaped(value)}"' for key, value in (*one.labels, *more.items()))
        counted, divisor = one.base, one.counter.divisor
        for at_ns, count in steps.of(at):
            if name != shown:
                shown, family = name, name.removesuffix("_total")
                yield f"# HELP {family} {_escaped(metric.meaning)}\n# TYPE {family} counter\n"
            counted += count
            value = counted if divisor == 1 else counted / divisor
            yield f"{name}{{{labels}}} {value} {at_ns // NANO}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


class _Steps:
    """What every series counted in each step, kept in a file: a block of steps at a time is in memory."""

    def __init__(self, series: int, start_ns: int, step_ns: int, spool: IO[bytes]) -> None:
        self._first_ns, self._step_ns = start_ns - start_ns % step_ns, step_ns
        self._spool = spool
        self._series = series
        self._length = max(_LEAST_STEPS, _BLOCK_VALUES // series)  # steps of a block
        self._block = self._empty()
        self._is_empty = True
        self._number = 0
        self._written: list[int] = []  # numbers of the blocks in the file
        self._later: dict[tuple[int, int], int] = {}  # (step, series) beyond the block: of long intervals
        self._begun: set[int] = set()

    def add(self, row: Any, plan: Iterable[tuple[int, int]]) -> None:
        """Count one row for the series of its plan; rows come in the order of their starts."""
        start_ns, length_ns = row[1:3]
        first = (start_ns - self._first_ns) // self._step_ns
        while first >= (self._number + 1) * self._length:
            self._write()
        step = -(-(start_ns + length_ns - self._first_ns) // self._step_ns)
        for at, place in plan:
            if at not in self._begun:
                self._begun.add(at)
                self._keep(first, at, 0)
            self._keep(step, at, row[place] or 0)

    def finish(self) -> None:
        """Put everything into the file."""
        while self._later or not self._is_empty:
            self._write()

    def of(self, at: int) -> Iterator[tuple[int, int]]:
        """(unix nanoseconds, what was counted) of the steps of one series in which something ended."""
        length = self._length * self._block.itemsize
        for place, number in enumerate(self._written):
            self._spool.seek((place * self._series + at) * length)
            for step, count in enumerate(array("q", self._spool.read(length)), number * self._length):
                if count != _NOTHING:
                    yield self._first_ns + step * self._step_ns, count

    def _empty(self) -> array[int]:
        return array("q", [_NOTHING]) * (self._length * self._series)

    def _keep(self, step: int, at: int, count: int) -> None:
        place = step - self._number * self._length
        if place >= self._length:
            self._later[step, at] = self._later.get((step, at), 0) + count
            return
        place += at * self._length
        self._block[place] = max(self._block[place], 0) + count
        self._is_empty = False

    def _write(self) -> None:
        """Put the block into the file if it holds anything, and begin the next one with what is kept of it."""
        if not self._is_empty:
            self._spool.write(self._block)
            self._written.append(self._number)
            self._block = self._empty()
            self._is_empty = True
        self._number += 1
        due = [key for key in self._later if key[0] < (self._number + 1) * self._length]
        for step, at in due:
            self._keep(step, at, self._later.pop((step, at)))
