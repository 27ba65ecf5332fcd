"""What clients send: documents, chats, agents and the like, by the clock (open loop) or one after another (closed)."""

from __future__ import annotations

import math
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    Chance = np.random.Generator

_PATH_BITS = 24  # blocks of one path
SYSTEM = 0  # the path of a system prompt that all share


class Request(NamedTuple):
    """One request.

    arrival  seconds; behind another request (`after`, its place in the trace) seconds since that one's end
    spans    (path, end): up to token `end` the content is that of the path, which stands for all before it too;
             the last one covers prompt and output
    abort    seconds from arrival at which the client leaves
    """

    arrival: float
    prompt: int
    output: int
    spans: tuple[tuple[int, int], ...]
    after: int | None = None
    abort: float | None = None

    def keys(self, block_tokens: int) -> list[int]:
        """One key for each full block of prompt and output."""
        keys: list[int] = []
        for path, end in self.spans:
            keys += range((path << _PATH_BITS) + len(keys), (path << _PATH_BITS) + end // block_tokens)
        return keys


class Trace(NamedTuple):
    """Requests; with `concurrency` they come in order, so many at a time, whatever their arrivals say."""

    requests: tuple[Request, ...]
    concurrency: int | None = None


def closed(trace: Trace, concurrency: int) -> Trace:
    """The same requests, the next one as soon as one has ended."""
    return Trace(tuple(one._replace(arrival=0.0, after=None) for one in trace.requests), concurrency)


def mixed(*traces: Trace) -> Trace:
    """Several loads on one engine; their paths are kept apart, but for the system prompt."""
    requests: list[Request] = []
    for number, trace in enumerate(traces):
        base, behind = (number + 1) << 30, len(requests)
        for one in trace.requests:
            spans = tuple((path if path == SYSTEM else base + path, end) for path, end in one.spans)
            after = None if one.after is None else behind + one.after
            requests.append(one._replace(spans=spans, after=after))
    return Trace(tuple(requests))


def documents(
    chance: Chance,
    seconds: float,
    rate: float,
    count_of: int,
    tokens: float,
    *,
    zipf: float = 0.6,
    question: float = 200,
    output: float = 150,
    system: int = 512,
) -> Trace:
    """Questions about shared documents, some asked for more often than others; `rate` a second."""
    sizes = np.maximum(256, chance.lognormal(math.log(tokens), 0.5, count_of)).astype(int)
    weights = 1 / np.arange(1, count_of + 1) ** zipf
    picked = (
        int(one) for one in chance.choice(count_of, size=int(2 * rate * seconds) + 100, p=weights / weights.sum())
    )
    unique = count(1 + count_of)
    requests = []
    for t in _poisson(chance, seconds, rate):
        document = next(picked)
        shared = system + int(sizes[document])
        prompt = shared + max(16, int(chance.exponential(question)))
        made = 1 + int(chance.exponential(output))
        spans = ((SYSTEM, system), (1 + document, shared), (next(unique), prompt + made))
        requests.append(Request(t, prompt, made, spans))
    return Trace(tuple(requests))


def chats(
    chance: Chance,
    seconds: float,
    rate: float,
    turns: float,
    *,
    turn_tokens: float = 200,
    output: float = 200,
    think_seconds: float = 30,
    first: float = 0,
    system: int = 1024,
    burst: float = 1.0,
    most_tokens: int = 100_000,
) -> Trace:
    """Sessions that send their whole history each turn; agents are the ones with a long `first` message.

    rate   new sessions a second; with `burst` > 1, `burst` times as many in one minute of five and a quarter else
    """
    requests: list[Request] = []
    for session, begun in enumerate(_poisson(chance, seconds, rate, burst), 1):
        history = system + (int(chance.exponential(first)) if first else 0)
        for turn in range(1 + int(chance.geometric(1 / turns))):
            prompt = history + max(16, int(chance.lognormal(math.log(turn_tokens), 0.7)))
            made = 1 + int(chance.exponential(output))
            if prompt + made > most_tokens:
                break
            arrival = float(chance.exponential(think_seconds)) if turn else begun
            spans = ((SYSTEM, system), (session, prompt + made))
            requests.append(Request(arrival, prompt, made, spans, len(requests) - 1 if turn else None))
            history = prompt + made
    return Trace(tuple(requests))


def singles(prompts: Iterable[int], apart_seconds: float, output: int = 8) -> Trace:
    """Cold prompts, one at a time: what a probe sends."""
    return Trace(
        tuple(
            Request(number * apart_seconds, prompt, output, ((1 + number, prompt + output),))
            for number, prompt in enumerate(prompts)
        )
    )


def impatient(chance: Chance, trace: Trace, share: float, seconds: float) -> Trace:
    """The same, where a share of the clients leaves after a while (exponential, `seconds` in the mean)."""
    return trace._replace(
        requests=tuple(
            one._replace(abort=float(chance.exponential(seconds))) if chance.random() < share else one
            for one in trace.requests
        )
    )


def _poisson(chance: Chance, seconds: float, rate: float, burst: float = 1.0) -> Iterable[float]:
    t = 0.0
    while True:
        now = rate if burst == 1.0 else rate * (burst if (t // 60) % 5 == 0 else 0.25)
        t += float(chance.exponential(1 / now))
        if t > seconds:
            return
        yield t
