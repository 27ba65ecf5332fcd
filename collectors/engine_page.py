"""One engine's /metrics page: whose families it shows, which version it is; asks for what is read and no more."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Protocol

from kvtally.collectors.base import CollectError
from kvtally.collectors.http_connection import take_apart, without_query
from kvtally.collectors.page import PageMapper, SourceMapping
from kvtally.collectors.registry import SOURCES, reader_class, sources_on

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading
    from kvtally.collectors.http import Response

# a restricted page is compared with a whole one this often, since families may be born that it cannot show
RECHECK_SCRAPES = 720
_WORTHWHILE = 0.75  # a restricted page has at most this share of the whole one's bytes
_VERSION_BYTES = 4096
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,64}")
_VERSION_TRIES = 3  # an engine under load may answer late; a server without a version shall not be asked for ever


class Fetcher(Protocol):
    """A kept connection to one server (kvtally.collectors.http.Endpoint)."""

    url: str

    def get(self, target: str | None = None) -> Response:
        """GET the url's own path, or another path of the same server."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


# what an engine's page is taken for until it has been seen
_FIRST = ("vllm", "lmcache")


class EnginePage:
    """Reads one engine's server, and the families of its KV cache that stand on the same page.

    Which sources a page shows is looked up on whole pages that are new or have got or lost a line; one that shows none
    is taken for what it was before.
    `GET /metrics/?name[]=…` (with the slash) makes the engine render only what is asked for: less than half of the
    work for it. Whether the server understands is found out by comparing both pages.

    restrict  False: always take the whole page, until `allow_restricting` says otherwise
    version   the engine's version, if it shall not be asked for it
    """

    def __init__(
        self,
        name: str,
        endpoint: Fetcher,
        *,
        restrict: bool = True,
        version: str | None = None,
        recheck_scrapes: int = RECHECK_SCRAPES,
    ) -> None:
        self.source = f"engine:{name}"
        self.name = name
        self._endpoint = endpoint
        self._path = without_query(take_apart(endpoint.url).target).rstrip("/")
        self.sources: tuple[str, ...] = ()
        self._take_sources(_FIRST, version)
        self._may_restrict = restrict
        # TensorRT-LLM's page is /prometheus/metrics, its version stands beside the first of these
        self._version_target = f"{self._path.removesuffix('/metrics').removesuffix('/prometheus')}/version"
        self._asks_version = version is None
        self._recheck_scrapes = recheck_scrapes
        self._epoch: float | None = None
        self._target: str | None = None
        self._until_check = 0
        self._lines = 0
        self._version_tries = 0
        self._look_again()

    @property
    def url(self) -> str:
        """Of its page."""
        return self._endpoint.url

    @property
    def restricted(self) -> bool:
        """Whether the engine renders only what is read."""
        return self._target is not None

    def allow_restricting(self, *, allowed: bool) -> None:
        """Say anew whether it may be asked for the wanted families alone."""
        if allowed != self._may_restrict:
            self._may_restrict = allowed
            self._target, self._until_check = None, 0

    def collect(self) -> tuple[Reading, ...]:
        """Scrape once; CollectError if the page cannot be had or read."""
        try:
            body = self._fetch()
            readings = self.mapper.read(body)
        except CollectError:
            self._look_again()
            raise
        # a cache on the same page may tell none
        epoch = next((reading.epoch for reading in readings if reading.epoch is not None), None)
        if epoch is not None:
            if self._epoch not in {None, epoch}:
                self._look_again()
                if self._asks_version:
                    self.mapper.version = None
            self._epoch = epoch
        if self._version_tries:
            self._ask_version()
            readings = self.mapper.read(body)
        return readings

    def page(self) -> bytes:
        """The whole page as the engine gives it: what a recording keeps."""
        return self._endpoint.get().body

    def close(self) -> None:
        """Close the connection."""
        self._endpoint.close()

    def _look_again(self) -> None:
        """Take nothing for granted: another server may answer at this address now."""
        self._target = None
        self._until_check = 0
        self._version_tries = _VERSION_TRIES if self._asks_version else 0

    def _fetch(self) -> bytes:
        """Give a page; now and then a whole one, to decide what is asked for from the next scrape on."""
        if self._until_check:
            self._until_check -= 1
            body = self._endpoint.get(self._target).body
            if self._target is None and body.count(b"\n") != self._lines:
                self._see_sources(body)
            return body
        self._look_again()
        whole = self._endpoint.get().body
        self._see_sources(whole)
        self._target = self._restricted_target if self._can_restrict(whole) else None
        self._until_check = self._recheck_scrapes
        return whole

    def _see_sources(self, whole: bytes) -> None:
        """Read what this page shows from now on; another engine than before does not inherit its version."""
        self._lines = whole.count(b"\n")
        shown = sources_on(whole)
        if shown:
            version = self.mapper.version
            if self._asks_version and _engines(shown) != _engines(self.sources):
                version = None
                self._version_tries = _VERSION_TRIES
            self._take_sources(shown, version)

    def _take_sources(self, sources: tuple[str, ...], version: str | None) -> None:
        """Read these sources; LMCache's families join a page of vLLM's only once something is stored."""
        if "vllm" in sources:
            sources = tuple(name for name in SOURCES if name in {*sources, "lmcache"})
        if sources == self.sources:
            return
        self.sources = sources
        mappings: list[SourceMapping] = [reader_class(one)() for one in sources if not SOURCES[one].integrates]
        self.mapper = PageMapper(self.name, mappings, version)
        names = dict.fromkeys(name for mapping in mappings for name in mapping.names())
        wanted = "&".join(f"name[]={name}" for name in names)
        self._restricted_target = f"{self._path}/?{wanted}"

    def _can_restrict(self, whole: bytes) -> bool:
        """Whether a restricted page shows the same series and is smaller."""
        if not self._may_restrict:
            return False
        try:
            part = self._endpoint.get(self._restricted_target).body
            return len(part) <= _WORTHWHILE * len(whole) and self.mapper.series(part) == self.mapper.series(whole)
        except CollectError:
            return False

    def _ask_version(self) -> None:
        """Ask which version answers; what was known of this process stays where it does not tell."""
        self._version_tries -= 1
        try:
            version = json.loads(self._endpoint.get(self._version_target).body[:_VERSION_BYTES])["version"]
        except (CollectError, ValueError, KeyError, TypeError, RecursionError):
            return
        if isinstance(version, str) and _VERSION.fullmatch(version):
            self.mapper.version = version
            self._version_tries = 0


def _engines(sources: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in sources if SOURCES[name].is_engine)
