"""A page beside the engines': an LMCache server, a gateway, an exporter of GPUs or filesystems; it tells what it is."""

from __future__ import annotations

import re
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.page import NothingToRead, PageMapper, tell_apart
from kvtally.collectors.registry import SOURCES, reader_class, sources_on, titles

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from kvtally.collectors.base import Kind, Reading
    from kvtally.collectors.engine_page import Fetcher

# python_gc_objects_collected_total{generation="0"} 8177.0: what a server's libraries show before it has counted
_OF_ANYBODY = "#|python_|process_|target_info|otel_scope_"
_OF_SOMEBODY = re.compile(rb"\n(?!%b)[^\n]" % _OF_ANYBODY.encode())
_LATER = "some families are not there before they have counted something"


class Reader(Protocol):
    """Reads the pages of one source."""

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """Readings of the page's targets; CollectError if it shows none."""
        ...


class SidePage:
    """Reads one page that is no engine's, by whatever sources it shows.

    serves   gives the names of the engines that caches of these sources serve. A cache's reading carries them, since
             nothing on the page joins the two: model labels differ from the engine's
    leave_out  kinds of readings that another source gives already
    """

    def __init__(
        self,
        name: str,
        endpoint: Fetcher,
        serves: Callable[[Sequence[str]], Sequence[str]] = lambda _: (),
        *,
        leave_out: Collection[Kind] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.source = f"page:{name}"
        self.name = name
        self.engines: tuple[str, ...] = ()
        self._serves = serves
        self._endpoint = endpoint
        self._clock = clock
        self._leave_out = frozenset(leave_out)
        self._readers: dict[str, Reader] = {}
        self._told: dict[str, tuple[Mapping[str, str], dict[str, str]]] = {}

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources that it has shown."""
        return tuple(self._readers)

    def collect(self) -> tuple[Reading, ...]:
        """Scrape once; NoData while nothing is counted, CollectError if the page cannot be had or read."""
        return self.read(self._endpoint.get().body)

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """The readings of a page; a source that was there and is not gives none, and fails no other."""
        shown = sources_on(body)
        if not shown:
            raise self._nothing(body)
        if all(SOURCES[name].is_engine for name in shown):
            raise CollectError(
                f"{self.name}: this is an engine's page ({titles(shown)})",
                "list it under [[engine]], not under [[page]]",
            )
        self._join(shown)
        own = [name for name in shown if not SOURCES[name].is_engine]
        readings: list[Reading] = []
        for name in own:
            with suppress(NothingToRead):
                readings += self._reader(name).read(body)
        if not readings:
            raise NoData(f"{self.name}: {titles(own)} has counted nothing yet", _LATER)
        if len(own) > 1:
            tell_apart(readings)
        return self._described(readings)

    def page(self) -> bytes:
        """The whole page as it is: what a recording keeps; `engines` are then those that it serves."""
        body = self._endpoint.get().body
        self._join(sources_on(body))
        return body

    def close(self) -> None:
        """Close the connection."""
        self._endpoint.close()

    def _join(self, shown: Sequence[str]) -> None:
        engines = tuple(self._serves(shown))
        if engines != self.engines:
            self.engines = engines
            self._told.clear()

    def _nothing(self, body: bytes) -> NoData | CollectError:
        """What is to be said of a page without a source: LMCache's own server shows none before its first lookup."""
        if self._readers:
            return NoData(f"{self.name}: {titles(self._readers)} has counted nothing since it began anew", _LATER)
        known = f"it reads those of {titles(name for name, one in SOURCES.items() if not one.is_engine)}"
        reason = f"{self.name}: the page holds no family that kvtally reads"
        if _OF_SOMEBODY.search(b"\n" + body):
            return CollectError(reason, known)
        return NoData(f"{reason} yet", f"{_LATER}; {known}")

    def _reader(self, name: str) -> Reader:
        if name not in self._readers:
            made = reader_class(name)
            self._readers[name] = made(self._clock) if SOURCES[name].integrates else PageMapper(self.name, (made(),))
        return self._readers[name]

    def _described(self, readings: Sequence[Reading]) -> tuple[Reading, ...]:
        """Caches' readings with the engines that they serve; the same attributes object while nothing changes."""
        before, self._told = self._told, {}
        found: list[Reading] = []
        for reading in readings:
            if reading.kind in self._leave_out:
                continue
            if reading.kind == "cache" and self.engines:
                made = before.get(reading.name)
                if made is None or made[0] != reading.attributes:
                    made = (reading.attributes, {**reading.attributes, "engines": ",".join(self.engines)})
                self._told[reading.name] = made
                found.append(reading._replace(attributes=made[1]))
            else:
                found.append(reading)
        return tuple(found)
