"""Tables of what a source serves: which samples make a quantity, since when, in what unit, with what trap."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError
from kvtally.collectors.page import Detail, Pick, Plan, positions
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from kvtally.collectors.base import Kind
    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Labels, Samples

_START = "process_start_time_seconds"
_ANY: Labels = {}
_MAX_TARGETS = 512  # of one page: each becomes a target of the ledger


class Family(NamedTuple):
    """One way in which a source serves one quantity; of several rows for a quantity the first that a page shows serves.

    quantity    of the source's kind; any other name is a detail of its intervals, and left out where several series
                would have to be added up
    sample      name on the wire, as the source itself spells it
    labels      which of the series: a label's value, or a compiled pattern that matches all of it
    since, until  first and last version that are known to serve it; "" where it is not known, or where it still does
    unit        of the wire
    scale       from there to the unit in which a reading carries the quantity (seconds, bytes, tokens); of a detail: to
                the unit in its name
    greatest    several series tell the same: the greatest of them counts. Else they are parts, and add up
    repeated    labels of ranks that repeat each other's count: of series that differ in these alone one is read
    plus        samples and labels of further parts, where they are there
    less        samples and labels of what is taken off; a row serves only where it is there
    zero_beside   a sample beside which an absent series is zero, since the source makes a series with its first count
    trap        what the number is not
    """

    quantity: str
    sample: str
    labels: Labels = _ANY
    since: str = ""
    until: str = ""
    unit: str = "tokens"
    scale: float = 1.0
    greatest: bool = False
    repeated: tuple[str, ...] = ()
    plus: tuple[tuple[str, Labels], ...] = ()
    less: tuple[tuple[str, Labels], ...] = ()
    zero_beside: str = ""
    trap: str = ""


class TableMapping:
    """Reads the series of one source by its table; one target for each combination of the labels in `by`.

    kind        of its readings
    source      value of the attribute "source"
    suffix      behind the page's name in a target's name: "/lmcache"
    by          labels that tell one target from another; a series that lacks them belongs to the only target there is
    keyed       a target is named by these labels also where it is the only one
    tells       attribute -> labels, the first of which that is there gives its value
    attributes  that hold for every target
    spelled     turns a sample's name on the page into the name in the table
    """

    def __init__(
        self,
        kind: Kind,
        families: Sequence[Family],
        *,
        source: str,
        suffix: str = "",
        by: Sequence[str] = (),
        keyed: bool = False,
        tells: Mapping[str, Sequence[str]] = {},
        attributes: Mapping[str, str] = {},
        spelled: Callable[[str], str] = str,
    ) -> None:
        self._kind = kind
        self._rows: dict[str, list[Family]] = {}
        for family in families:
            self._rows.setdefault(family.quantity, []).append(family)
        self._names = frozenset(sample_names(families))
        self._about = {"source": source, **attributes}
        self._suffix = suffix
        self._by = tuple(by)
        self._keyed = keyed
        self._tells = tells
        self._spelled = spelled

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read."""
        return (name := self._spelled(sample_name)) in self._names or name == _START

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read."""
        return (*sorted(self._names), _START)

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:  # noqa: ARG002  # the engine's version is not this source's
        """One plan for each target that the page shows."""
        start = next((at for at, one in enumerate(series) if self._spelled(one.name) == _START), None)
        groups = self._groups(series)
        kind, counted = self._kind, {quantity.name for quantity in QUANTITIES[self._kind]}
        plans: list[Plan] = []
        for key, samples in sorted(groups.items()):
            own = key if self._keyed or len(groups) > 1 else ()
            name = "/".join((f"{target}{self._suffix}", *filter(None, own)))
            picks = [chosen(self._rows.get(quantity.name, ()), samples) for quantity in QUANTITIES[kind]]
            details = [
                Detail(name, pick.positions[0], next(iter(pick.less), None), pick.scale)
                for name, rows in self._rows.items()
                if name not in counted and (pick := chosen(rows, samples)) and _is_detail(pick)
            ]
            plans.append(Plan(kind, name, self._attributes(samples), picks, details=details, epoch=start))
        return plans

    def _groups(self, series: Sequence[Series]) -> dict[tuple[str, ...], Samples]:
        groups: dict[tuple[str, ...], dict[str, list[tuple[int, Mapping[str, str]]]]] = {}
        shared: list[tuple[int, str, Mapping[str, str]]] = []
        for at, one in enumerate(series):
            name = self._spelled(one.name)
            if name not in self._names:
                continue
            key = tuple(one.labels.get(label, "") for label in self._by)
            if any(key) or not self._by:
                groups.setdefault(key, {}).setdefault(name, []).append((at, one.labels))
            else:
                shared.append((at, name, one.labels))
        if not groups and shared:
            groups[("",) * len(self._by)] = {}
        if len(groups) == 1:
            own = next(iter(groups.values()))
            for at, name, labels in shared:
                own.setdefault(name, []).append((at, labels))
        if len(groups) > _MAX_TARGETS:
            raise CollectError(f"the page shows {len(groups)} targets of one source, the limit is {_MAX_TARGETS}")
        return dict(groups)

    def _attributes(self, samples: Samples) -> dict[str, str]:
        every = [labels for found in samples.values() for _, labels in found]
        told = {
            attribute: next((labels[name] for name in names for labels in every if labels.get(name)), "")
            for attribute, names in self._tells.items()
        }
        return {**self._about, **{attribute: value for attribute, value in told.items() if value}}


def _is_detail(pick: Pick) -> bool:
    """Whether it is one series, or the difference of two: all that a detail can be."""
    return len(pick.positions) == 1 and len(pick.less) <= 1


def sample_names(families: Iterable[Family]) -> list[str]:
    """Every sample that a table reads, each once."""
    rows = list(families)
    further = [name for row in rows for name, _ in (*row.plus, *row.less)] + [row.zero_beside for row in rows]
    return [name for name in dict.fromkeys([row.sample for row in rows] + further) if name]


def chosen(rows: Iterable[Family], samples: Samples) -> Pick | None:
    """The first row that the samples of one target can serve, as the places to take it from."""
    for row in rows:
        parts = [_told_once(row, samples, *one) for one in ((row.sample, row.labels), *row.plus)]
        off = tuple(at for one in row.less for at in _told_once(row, samples, *one))
        if parts[0] and (off or not row.less):
            return Pick(sum(parts, ()), row.greatest, row.scale, off)
        if row.zero_beside in samples and not off:
            return Pick(sum(parts, ()), row.greatest, row.scale)
    return None


def release(version: str | None) -> tuple[int, int] | None:
    """Major and minor of "0.25.1" or "v0.17.0+cpu"; None where it is not told."""
    found = re.match(r"v?(\d+)\.(\d+)", version or "")
    return (int(found[1]), int(found[2])) if found else None


def unit_told(rows: Sequence[Family], known: tuple[int, int] | None, text: str) -> str | None:
    """The unit of a sample that has had several, each a row: by the release, else by the one that its HELP text names.

    None where neither says it: then nobody knows what its numbers are.
    """
    for row in rows:
        first, last = release(row.since), release(row.until)
        if known is not None and (first is None or first <= known) and (last is None or known <= last):
            return row.unit
    named = {row.unit for row in rows if row.unit in text}
    return named.pop() if len(named) == 1 else None


def _told_once(row: Family, samples: Samples, sample: str, labels: Labels) -> tuple[int, ...]:
    """Where a sample of a row stands on the page, one place for all ranks that repeat each other."""
    found = positions(samples, sample, labels)
    if not row.repeated or len(found) < 2:  # noqa: PLR2004  # one repeats nothing
        return found
    of_ranks: dict[frozenset[tuple[str, str]], tuple[tuple[str, ...], int]] = {}
    for at, told in samples[sample]:
        if at in found:
            rank = tuple(told.get(label, "").zfill(8) for label in row.repeated)
            shared = frozenset((label, value) for label, value in told.items() if label not in row.repeated)
            of_ranks[shared] = min(of_ranks.get(shared, (rank, at)), (rank, at))
    return tuple(at for _, at in of_ranks.values())
