"""From an exposition page to readings: mappings are compiled once per page layout, then only numbers move."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from kvtally.collectors.base import CollectError, Kind, Reading
from kvtally.collectors.exposition import Layout, PageReader, Series

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Pick(NamedTuple):
    """Which series of a page make one quantity: their values are summed, or the greatest is taken."""

    positions: tuple[int, ...]
    greatest: bool = False


class Detail(NamedTuple):
    """One secondary counter: (value - value of the bucket below) x scale."""

    name: str
    position: int
    below: int | None = None
    scale: float = 1


class Plan:
    """How one target's reading is taken from the values of one layout."""

    def __init__(
        self,
        kind: Kind,
        name: str,
        attributes: Mapping[str, str],
        picks: Sequence[Pick | None],
        details: Sequence[Detail] = (),
        epoch: int | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.attributes = dict(attributes)
        self._epoch = epoch
        self._simple = tuple(pick.positions[0] if pick and len(pick.positions) == 1 else -1 for pick in picks)
        self._joined = tuple((slot, pick) for slot, pick in enumerate(picks) if pick and len(pick.positions) > 1)
        self._detail_names = tuple(detail.name for detail in details)
        self._details = tuple((detail.position, detail.below, detail.scale) for detail in details)

    def read(self, page: tuple[Any, ...]) -> Reading:
        """Take the reading; `page` ends with None, which position -1 finds for a quantity that has no series."""
        values: list[float | None] = [page[position] for position in self._simple]
        for slot, pick in self._joined:
            parts = [page[position] for position in pick.positions]
            known = [part for part in parts if part is not None]
            values[slot] = (max(known) if pick.greatest else sum(known)) if len(known) == len(parts) else None
        details = [page[at] * scale if below is None else page[at] - page[below] for at, below, scale in self._details]
        epoch = None if self._epoch is None else page[self._epoch]
        return Reading(
            self.kind, self.name, self.attributes, tuple(values), epoch, None, self._detail_names, tuple(details)
        )


class SourceMapping(Protocol):
    """Knows the series of one source."""

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read."""
        ...

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read, in the source's own spelling: what a restricted scrape asks for."""
        ...

    def compile(self, target: str, series: Sequence[Series], version: str | None) -> list[Plan]:
        """Plans for the targets that this page shows."""
        ...


class PageMapper:
    """Turns the pages of one endpoint into readings; keeps nothing of a page but its layout."""

    def __init__(self, target: str, mappings: Sequence[SourceMapping], version: str | None = None) -> None:
        self.target = target
        self._mappings = mappings
        self._version = version
        self._reader = PageReader(lambda name: any(mapping.wants(name) for mapping in mappings))
        self._layout: Layout | None = None
        self._plans: list[Plan] = []

    @property
    def version(self) -> str | None:
        """The engine's version as told to us; None when nobody told."""
        return self._version

    @version.setter
    def version(self, version: str | None) -> None:
        if version != self._version:
            self._version = version
            self._layout = None

    def series(self, body: bytes) -> frozenset[tuple[str, tuple[tuple[str, str], ...]]]:
        """The wanted series of a page as a set: to compare a restricted page with a whole one."""
        layout, _ = PageReader(lambda name: any(mapping.wants(name) for mapping in self._mappings)).read(body)
        return frozenset((one.name, tuple(sorted(one.labels.items()))) for one in layout.series)

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """Readings of all targets on the page; CollectError if it shows none."""
        layout, values = self._reader.read(body)
        if layout is not self._layout:
            self._plans = [
                plan
                for mapping in self._mappings
                for plan in mapping.compile(self.target, layout.series, self._version)
            ]
            self._layout = layout
        if not self._plans:
            raise CollectError(
                f"{self.target}: the page holds no family that kvtally reads",
                "is this an engine's /metrics? vLLM shows none with --disable-log-stats",
            )
        page: tuple[float | None, ...] = values
        if not math.isfinite(sum(values)):
            # NaN and infinity are unknown, and one of them makes the whole sum so
            page = tuple(value if math.isfinite(value) else None for value in values)
        page = (*page, None)
        return tuple(plan.read(page) for plan in self._plans)


def positions(series: Sequence[Series], name: str, labels: Mapping[str, str]) -> tuple[int, ...]:
    """Where samples of this name with these labels (others may be there too) stand on the page."""
    return tuple(
        at
        for at, one in enumerate(series)
        if one.name == name and all(one.labels.get(key) == value for key, value in labels.items())
    )


def bucket_details(
    series: Sequence[Series], sample_name: str, labels: Mapping[str, str], prefix: str
) -> list[Detail]:
    """The buckets of a histogram as plain (not cumulative) counts, named `<prefix>_le_<bound>`."""
    found = [(float(series[at].labels["le"]), at) for at in positions(series, sample_name, labels)]
    details: list[Detail] = []
    below: int | None = None
    for bound, at in sorted(found):
        details.append(Detail(f"{prefix}_le_{bound:g}", at, below))
        below = at
    return details

