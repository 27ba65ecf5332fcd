"""Requests that ran alone on an engine: what they computed, and the seconds to their first token, as measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvtally.agent.steplaw.windows import chosen, describe, singles

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvtally.agent.request_log import Request
    from kvtally.agent.steplaw.machine import Machine
    from kvtally.agent.steplaw.series import Series
    from kvtally.agent.steplaw.windows import Described, Windows

    Array = NDArray[np.float64]


class Alone(NamedTuple):
    """One request.

    outer_tokens    what of the reused tokens came from outside HBM; None where that is not told
    seconds         to its first token: on the engine from its scheduling on, at a client from its sending on
    copies_seconds  of loading from and storing to the outer tiers meanwhile, as these report them
    """

    prompt_tokens: float
    reused_tokens: float
    outer_tokens: float | None
    seconds: float
    copies_seconds: float


class AtEngine(NamedTuple):
    """What the counters tell: requests that had a span between two scrapes for themselves.

    together    requests that ran one at a time as well, but of which two scrapes see several: nothing tells which of
                them reused what
    """

    requests: tuple[Alone, ...]
    together: int


def at_engine(machine: Machine, series: Series, start_ns: int, end_ns: int) -> AtEngine:
    """By the engine's own prefill seconds."""
    windows, told = _alone(machine, series, start_ns, end_ns)
    prompt, hbm, outer = (
        series.over(name, windows.start, windows.end) for name in ("prompt_tokens", "hbm_tokens", "external_tokens")
    )
    copies = told.loads + told.stores
    is_one = np.round(told.first) == 1
    found = [
        Alone(
            float(prompt[at]), float(hbm[at] + outer[at]), float(outer[at]), float(told.prefill[at]), float(copies[at])
        )
        for at in np.flatnonzero(is_one & (told.prefill > 0))
    ]
    return AtEngine(tuple(found), round(float(told.first[~is_one].sum())))


def at_client(
    machine: Machine, series: Series, start_ns: int, end_ns: int, requests: Sequence[Request]
) -> tuple[Alone, ...]:
    """By a log of the clients: its requests in spans in which they ran one at a time, where it holds all of them."""
    windows, told = _alone(machine, series, start_ns, end_ns)
    ordered = sorted(requests, key=_first_token_at)
    at = np.array([_first_token_at(one) for one in ordered]) - series.epoch_ns / 1e9
    first, last = (np.searchsorted(at, series.at[edge], "right") for edge in (windows.start, windows.end))
    hbm, outer = (series.over(name, windows.start, windows.end) for name in ("hbm_tokens", "external_tokens"))
    found: list[Alone] = []
    for place in np.flatnonzero(last - first == np.round(told.first)).tolist():
        inside = [_placed(one, float(hbm[place]), float(outer[place])) for one in ordered[first[place] : last[place]]]
        found += _shared(inside, float(told.loads[place]), float(told.stores[place]))
    return tuple(found)


def _first_token_at(request: Request) -> float:
    return request.at_seconds + (request.ttft_seconds or 0.0)


def _placed(request: Request, hbm: float, outer: float) -> Request:
    """A request with what of its reuse came from outside HBM, where its log or the engine's counts of the span say."""
    if request.outer_tokens is not None or (hbm and outer):
        return request
    return request._replace(outer_tokens=request.cached_tokens if outer else 0)


def _shared(requests: Sequence[Request], loads: float, stores: float) -> list[Alone]:
    """Requests with their parts of the loading, by loaded tokens, and of the storing, by computed ones."""
    loaded = [(one.cached_tokens if one.outer_tokens is None else one.outer_tokens) or 0 for one in requests]
    computed = [one.prompt_tokens - (one.cached_tokens or 0) for one in requests]
    return [
        Alone(
            one.prompt_tokens,
            one.cached_tokens,
            one.outer_tokens,
            one.ttft_seconds,
            loads * part / max(sum(loaded), 1) + stores * rest / max(sum(computed), 1),
        )
        for one, part, rest in zip(requests, loaded, computed, strict=True)
        if one.cached_tokens is not None and one.ttft_seconds is not None
    ]


def _alone(machine: Machine, series: Series, start_ns: int, end_ns: int) -> tuple[Windows, Described]:
    """Spans of [start_ns, end_ns) whose requests ran one at a time."""
    instants = series.instants_ns
    first = int(np.searchsorted(instants, start_ns, "left"))
    last = min(int(np.searchsorted(instants, end_ns, "left")), len(instants) - 1)
    windows = singles(series, first, max(first, last)) if first < len(instants) else singles(series, 0, 0)
    told = describe(machine, series, windows, 1.0)
    windows = chosen(windows, told.is_alone)
    return windows, describe(machine, series, windows, 1.0)
