"""A log of requests beside a replica's counters: exact pairs, and requests that ran alone (METHOD 4.1, M2 and M5)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from kvtally.agent.probe.passive import passive_probes
from kvtally.agent.steplaw.evidence import Probe
from kvtally.agent.steplaw.series import Logged
from kvtally.agent.steplaw.windows import singles

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvtally.agent.request_log import Request
    from kvtally.agent.steplaw.series import Series

    Flags = NDArray[np.bool_]

# of a time to first token as its client saw it (METHOD 4.3), with the way to the client and back; ASSUMED
TTFT_ERROR, TTFT_FLOOR_SECONDS = 0.12, 0.015
LEAST_COMPUTED = 512  # tokens: of a shorter prefill, the time to first token tells the rest of the request


def logged_of(requests: Iterable[Request]) -> Logged:
    """The requests whose reuse is told; one without a time to first token stands where it was sent.

    On the log's clock, and in its own order where two have the same time: `laid` makes of it what an engine counted.
    """
    rows = sorted(
        (
            (
                one.at_seconds + (one.ttft_seconds or 0.0),
                one.prompt_tokens,
                one.cached_tokens,
                math.nan if one.outer_tokens is None else one.outer_tokens,
            )
            for one in requests
            if one.cached_tokens is not None
        ),
        key=lambda row: row[0],
    )
    first_token, prompt, reused, outer = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return Logged(first_token, prompt, reused, outer)


def counted(series: Series, start_ns: int, end_ns: int) -> float:
    """First tokens that the engine counted from one unix time to another, by its nearest scrapes inside."""
    at = series.at + series.epoch_ns / 1e9
    first = int(np.searchsorted(at, start_ns / 1e9, "left"))
    last = int(np.searchsorted(at, end_ns / 1e9, "right")) - 1
    total = series.totals["first_tokens"]
    return float(total[last] - total[first]) if first < last else 0.0


def ran_alone(series: Series, requests: Sequence[Request]) -> tuple[Request, ...]:
    """Requests with which the engine had nothing else to do, by its counters at the scrapes around each.

    It rested at the scrape before, counted one first token until the scrape behind, and had no other request then.
    """
    epoch = series.epoch_ns / 1e9
    sent = np.array([one.at_seconds for one in requests]) - epoch
    answered = sent + np.array([one.ttft_seconds or np.nan for one in requests])
    before = np.searchsorted(series.at, sent, "right") - 1
    behind = np.searchsorted(series.at, answered, "left")
    known = (before >= 0) & (behind < len(series.at)) & ~np.isnan(answered)
    a, b = np.where(known, before, 0), np.where(known, behind, 0)
    broken = np.cumsum(~series.sound)
    others = series.over("finished_requests", a, b) + series.running[b] + series.waiting[b]
    alone = (
        known
        & series.quiet[a]
        & (broken[b] == broken[a])
        & (np.round(series.over("first_tokens", a, b)) == 1)
        & (np.round(others) <= 1)
    )
    return tuple(one for one, is_alone in zip(requests, alone, strict=True) if is_alone)


def probes_of(series: Series, requests: Sequence[Request]) -> tuple[Probe, ...]:
    """Facts of the requests that ran alone and whose prefill was no load from an outer tier.

    Without those of which the engine's own prefill seconds tell already: one fact is not to count twice.
    """
    windows = singles(series, 0, len(series.at) - 1)
    epoch = series.epoch_ns / 1e9
    found = []
    for one in passive_probes(ran_alone(series, _with_outer(series, requests))):
        cached, ttft = one.cached_tokens or 0, one.ttft_seconds or 0.0
        if one.prompt_tokens - cached < LEAST_COMPUTED:
            continue
        sent = one.at_seconds - epoch
        if not ((series.at[windows.start] <= sent) & (series.at[windows.end] >= sent + ttft)).any():
            found.append(Probe(one.prompt_tokens, cached, ttft, math.hypot(TTFT_ERROR, TTFT_FLOOR_SECONDS / ttft)))
    return tuple(found)


def _with_outer(series: Series, requests: Sequence[Request]) -> Sequence[Request]:
    """Where the engine counted no token from outside HBM, no request had one."""
    outer = series.totals["external_tokens"]
    return requests if outer[-1] > outer[0] else [one._replace(outer_tokens=0) for one in requests]
