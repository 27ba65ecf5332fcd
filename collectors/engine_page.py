"""One engine's /metrics page: asks for what is read and no more, and knows which version it talks to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol
from urllib.parse import quote

from kvtally.collectors.base import CollectError
from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading
    from kvtally.collectors.http import Response

# a restricted page is compared with a whole one this often, since families may be born that it cannot show
RECHECK_SCRAPES = 720
_VERSION_BYTES = 4096


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

    `GET /metrics/?name[]=…` (with the slash) makes the engine render only what is asked for: a sixth of the work for
    it (PERFORMANCE section 2). Whether the server understands is found out by comparing both pages.
    """

    def __init__(self, name: str, endpoint: Fetcher, *, restrict: bool = True, version: str | None = None) -> None:
        self.source = f"vllm:{name}"
        self.name = name
        self._endpoint = endpoint
        self._mappings = (VllmMapping(), LmcacheMapping())
        self.mapper = PageMapper(name, self._mappings, version)
        self._restrict = restrict
        self._target: str | None = None
        self._until_check = 0
        self._epoch: float | None = None
        self._version_known = version is not None

    @property
    def restricted(self) -> bool:
        """Whether the engine renders only what is read."""
        return self._target is not None

    def collect(self) -> tuple[Reading, ...]:
        """Scrape once."""
        if not self._version_known:
            self._ask_version()
        if self._restrict and self._until_check == 0:
            readings = self._compare()
        else:
            self._until_check -= 1
            try:
                readings = self.mapper.read(self._endpoint.get(self._target).body)
            except CollectError:
                if self._target is None:
                    raise
                # another server may answer at this address now: begin again with the whole page
                self._target, self._until_check = None, 0
                raise
        epoch = readings[0].epoch
        if epoch != self._epoch:
            if self._epoch is not None:
                # the process changed: its version may have too, and this page is already read under the old one
                self._version_known = False
                self._target, self._until_check = None, 0
            self._epoch = epoch
        return readings

    def page(self) -> bytes:
        """The whole page as the engine gives it: what a recording keeps."""
        return self._endpoint.get().body

    def close(self) -> None:
        """Close the connection."""
        self._endpoint.close()

    def _ask_version(self) -> None:
        try:
            answer = json.loads(self._endpoint.get("/version").body[:_VERSION_BYTES])
            version = answer["version"]
        except (CollectError, ValueError, KeyError, TypeError):
            version = None
        self.mapper.version = version if isinstance(version, str) else None
        self._version_known = True

    def _compare(self) -> tuple[Reading, ...]:
        """Read a whole page; from the next scrape on ask for the wanted names alone if the answer is as good."""
        self._until_check = RECHECK_SCRAPES
        self._target = None
        whole = self._endpoint.get().body
        names = "&".join(f"name[]={quote(name)}" for mapping in self._mappings for name in mapping.names())
        target = f"/metrics/?{names}"
        try:
            part = self._endpoint.get(target).body
            if len(part) < len(whole) and self.mapper.series(part) == self.mapper.series(whole):
                self._target = target
        except CollectError:
            pass  # this server does not restrict: the whole page it is
        return self.mapper.read(whole)
