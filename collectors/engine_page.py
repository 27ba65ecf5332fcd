"""One engine's /metrics page: asks for what is read and no more, and knows which version it talks to."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Protocol

from kvtally.collectors.base import CollectError
from kvtally.collectors.http_connection import take_apart, without_query
from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.vllm import VllmMapping

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


class EnginePage:
    """Reads one vLLM API server, LMCache's in-process families on the same page included.

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
        self.source = f"vllm:{name}"
        self.name = name
        self._endpoint = endpoint
        mappings = (VllmMapping(), LmcacheMapping())
        self.mapper = PageMapper(name, mappings, version)
        path = without_query(take_apart(endpoint.url).target).rstrip("/")
        wanted = "&".join(f"name[]={sample}" for mapping in mappings for sample in mapping.names())
        self._restricted_target = f"{path}/?{wanted}"
        self._may_restrict = restrict
        self._version_target = f"{path.rpartition('/')[0]}/version"
        self._asks_version = version is None
        self._recheck_scrapes = recheck_scrapes
        self._epoch: float | None = None
        self._target: str | None = None
        self._until_check = 0
        self._version_tries = 0
        self._look_again()

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
        epoch = readings[0].epoch
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
            return self._endpoint.get(self._target).body
        self._look_again()
        whole = self._endpoint.get().body
        self._target = self._restricted_target if self._can_restrict(whole) else None
        self._until_check = self._recheck_scrapes
        return whole

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
