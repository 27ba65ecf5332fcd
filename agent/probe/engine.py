"""An engine as a probe meets it: what it serves, what its counters say, and completions."""

from __future__ import annotations

import math
import socket
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.probe.api import ANSWER_SECONDS, Answer, Api, Served
from kvtally.collectors.access import Access
from kvtally.collectors.http import Endpoint
from kvtally.collectors.http_connection import without_query
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import index
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtally.collectors.base import Reading

_PAGE_SECONDS = 5.0


class Look(NamedTuple):
    """What an engine's page says, all its ranks together; None where it does not tell."""

    running: float | None
    waiting: float | None
    awake: float | None
    first_tokens: float | None
    finished: float | None
    prompt_tokens: float | None
    hbm_tokens: float | None
    external_tokens: float | None
    prefill_seconds: float | None
    epoch: float | None


class Engine:
    """One engine's counters and completions; not for two threads at once. CollectError as its parts raise it.

    url             its metrics page; ValueError if it is none
    api_url         what /v1 lies below; by default the page's server
    key             is sent to the API as a bearer token, and stands in no message
    answer_seconds  bounds one completion
    ca_file         certificate authorities to trust for https, instead of the system's
    resolve         is called as socket.getaddrinfo is
    """

    def __init__(
        self,
        url: str,
        *,
        api_url: str | None = None,
        key: str = "",
        answer_seconds: float = ANSWER_SECONDS,
        ca_file: str | None = None,
        resolve: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        base = without_query(url if api_url is None else api_url).rstrip("/")
        self._api = Api(
            base.removesuffix("/metrics" if api_url is None else "/v1"),
            key=key,
            answer_seconds=answer_seconds,
            ca_file=ca_file,
            resolve=resolve,
        )
        self._page = Endpoint(url, timeout_seconds=_PAGE_SECONDS, access=Access(ca_file=ca_file or ""), resolve=resolve)
        self._mapper = PageMapper(self._api.url, (VllmMapping(),))

    @property
    def api_url(self) -> str:
        """Where prompts are sent to, without /v1."""
        return self._api.url

    def close(self) -> None:
        """Close the kept connection."""
        self._page.close()

    def served(self, model: str | None = None) -> Served:
        """The model of this name; by default the first that is no adapter of another."""
        return self._api.served(model)

    def complete(self, model: str, token_ids: Sequence[int], seconds_max: float = math.inf) -> Answer:
        """Send a prompt that no cache can know, and wait for its one token."""
        return self._api.complete(model, token_ids, seconds_max)

    def look(self) -> Look:
        """What the page says now."""
        readings = self._mapper.read(self._page.get().body)
        engines = [reading for reading in readings if reading.kind == "engine"]
        return Look(
            _total(engines, "running_requests"),
            _total(engines, "waiting_requests"),
            _total(engines, "awake"),
            _total(engines, "first_tokens"),
            _total(engines, "finished_requests"),
            _total(engines, "prompt_tokens"),
            _total(engines, "hbm_tokens"),
            _total(engines, "external_tokens"),
            _total(engines, "prefill_ns"),  # a reading has the page's own unit: seconds
            engines[0].epoch if engines else None,
        )


def _total(engines: Sequence[Reading], name: str) -> float | None:
    """The sum of a quantity over all ranks; None if one of them does not tell."""
    values = [engine.values[index("engine", name)] for engine in engines]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return sum(known) if known and len(known) == len(values) else None
