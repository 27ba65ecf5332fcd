"""From an exposition page to readings: mappings are compiled once per page layout, then only numbers move."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvtally.collectors.base import CollectError, Kind, Reading
from kvtally.collectors.exposition import Layout, PageReader, Series
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    # sample name -> every series of that name: its place on the page and its labels
    Samples = Mapping[str, Sequence[tuple[int, Mapping[str, str]]]]

# label -> its value, or a pattern that matches the whole of it
Labels = Mapping[str, str | re.Pattern[str]]
# HELP text of a family by the name that its comment gives it; "" where the page has none
Helps = Callable[[str], str]

# A page's values are followed by these two, for a bucket without one below it and a quantity without a series.
_ZERO, _UNKNOWN = -2, -1


class Pick(NamedTuple):
    """Which series of a page make one quantity: (their sum, or the greatest, less the sum of others) x scale."""

    positions: tuple[int, ...]
    greatest: bool = False
    scale: float = 1.0
    less: tuple[int, ...] = ()

    @property
    def is_plain(self) -> bool:
        """Whether it is one series as it stands."""
        return len(self.positions) == 1 and self.scale == 1 and not self.less

    def of(self, page: Sequence[float | None]) -> float | None:
        """Its value on a page; one part that is unknown makes it so."""
        known = [part for position in self.positions if (part := page[position]) is not None]
        off = [part for position in self.less if (part := page[position]) is not None]
        if len(known) < len(self.positions) or len(off) < len(self.less):
            return None
        # without a series of its own it is zero
        return ((max(known, default=0.0) if self.greatest else sum(known)) - sum(off)) * self.scale


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
        *,
        details: Sequence[Detail] = (),
        epoch: int | None = None,
    ) -> None:
        self.kind = kind
        self.name = name
        self.attributes = dict(attributes)
        self._epoch = _UNKNOWN if epoch is None else epoch
        self._simple = tuple(pick.positions[0] if pick and pick.is_plain else _UNKNOWN for pick in picks)
        self._joined = tuple((slot, pick) for slot, pick in enumerate(picks) if pick and not pick.is_plain)
        self._shown = tuple(
            slot
            for slot, (pick, quantity) in enumerate(zip(picks, QUANTITIES[kind], strict=False))
            if pick is not None and quantity.type == "counter"
        )
        self._detail_names = tuple(detail.name for detail in details)
        self._counted = tuple(detail.position for detail in details)
        self._below = tuple(_ZERO if detail.below is None else detail.below for detail in details)
        self._scales = tuple(detail.scale for detail in details)

    def read(self, page: Sequence[float | None], *, has_unknown: bool = False) -> Reading:
        """Take the reading; one unknown count makes all details unknown, which is said by having none of them.

        With `has_unknown` a counter that is shown without a number is NaN, and not None as one that is not shown:
        what is not there has counted nothing, what cannot be read has.
        """
        values = [page[position] for position in self._simple]
        for slot, pick in self._joined:
            values[slot] = pick.of(page)
        if has_unknown:
            for slot in self._shown:
                values[slot] = math.nan if values[slot] is None else values[slot]
        details = [
            (count - below) * scale
            for at, under, scale in zip(self._counted, self._below, self._scales, strict=True)
            if (count := page[at]) is not None and (below := page[under]) is not None
        ]
        return Reading(
            self.kind,
            self.name,
            self.attributes,
            tuple(values),
            page[self._epoch],
            detail_names=self._detail_names,
            details=tuple(details) if len(details) == len(self._detail_names) else (),
        )


class NothingToRead(CollectError):  # noqa: N818  # it is what the page shows, not a fault of it
    """The page is sound, and shows none of the families that are asked for."""


class SourceMapping(Protocol):
    """Knows the series of one source."""

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read."""
        ...

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read, in the source's own spelling: what a restricted scrape asks for."""
        ...

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """Plans for the targets that this page shows; `version` is the engine's, None where nobody told."""
        ...


class PageMapper:
    """Turns the pages of one endpoint into readings; keeps nothing of a page but its layout."""

    def __init__(self, target: str, mappings: Sequence[SourceMapping], version: str | None = None) -> None:
        self.target = target
        self._mappings = mappings
        self._version = version
        self._reader = PageReader(self._wants)
        self._layout: Layout | None = None
        self._plans: list[Plan] = []

    def _wants(self, sample_name: str) -> bool:
        return any(mapping.wants(sample_name) for mapping in self._mappings)

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
        layout, _ = PageReader(self._wants).read(body)
        return frozenset((one.name, tuple(sorted(one.labels.items()))) for one in layout.series)

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """Readings of all targets on the page; CollectError if it cannot be read, NothingToRead if it shows none."""
        layout, values = self._reader.read(body)
        if layout is not self._layout:
            self._plans = [
                plan
                for mapping in self._mappings
                for plan in mapping.compile(self.target, layout.series, self._version, lambda name: _help(body, name))
            ]
            tell_apart(self._plans)
            self._layout = layout
        if not self._plans:
            raise NothingToRead(
                f"{self.target}: the page holds no family that kvtally reads",
                "is this an engine's /metrics? vLLM shows none with --disable-log-stats",
            )
        known: Sequence[float | None] = values
        # NaN and infinity are unknown, and one of them makes the whole sum so
        has_unknown = not math.isfinite(sum(values))
        if has_unknown:
            known = [value if math.isfinite(value) else None for value in values]
        page = (*known, 0.0, None)
        return tuple(plan.read(page, has_unknown=has_unknown) for plan in self._plans)


def tell_apart(targets: Iterable[Plan | Reading]) -> None:
    """Raise CollectError where two targets have one name: the counts of one would be taken for the other's."""
    seen: set[tuple[Kind, str]] = set()
    for one in targets:
        if (one.kind, one.name) in seen:
            raise CollectError(f"the page shows two targets of the name {one.name}")
        seen.add((one.kind, one.name))


def positions(samples: Samples, name: str, labels: Labels | None = None) -> tuple[int, ...]:
    """Where samples of this name with these labels (others may be there too) stand on the page."""
    wanted = (labels or {}).items()
    return tuple(
        at
        for at, found in samples.get(name, ())
        if all(_is_told(found.get(label, ""), value) for label, value in wanted)
    )


def _is_told(value: str, wanted: str | re.Pattern[str]) -> bool:
    return value == wanted if isinstance(wanted, str) else wanted.fullmatch(value) is not None


# # HELP vllm:gpu_prefix_cache_hits_total GPU prefix cache hits, in terms of number of cached blocks.
def _help(body: bytes, name: str) -> str:
    """What a page says of a family in its HELP comment."""
    found = re.search(rb"^# HELP %b (.*)$" % re.escape(name.encode()), body, re.MULTILINE)
    return "" if found is None else found[1].decode("utf-8", "replace")


def bucket_details(samples: Samples, sample_name: str, prefix: str) -> list[Detail]:
    """The buckets of a histogram as plain (not cumulative) counts, named `<prefix>_le_<bound>`.

    None of them where a bound is unreadable or there twice: nobody could say which count belongs to which.
    """
    found: dict[float, int] = {}
    for at, labels in samples.get(sample_name, ()):
        try:
            bound = float(labels.get("le", ""))
        except ValueError:
            return []
        if bound in found or math.isnan(bound):
            return []
        found[bound] = at
    details: list[Detail] = []
    below: int | None = None
    for bound, at in sorted(found.items()):
        details.append(Detail(f"{prefix}_le_{bound:.15g}", at, below))
        below = at
    return details
