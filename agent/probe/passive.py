"""The requests of a log that tell how fast a prefill is, as well as a probe does (METHOD 4.3, M5)."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.request_log import Request


def passive_probes(
    requests: Sequence[Request],
    *,
    preempted: Iterable[tuple[float, float]] = (),
    most: int = 60,
    spread: int = 60,
) -> tuple[Request, ...]:
    """The `most` requests with most computed tokens, and `spread` of all by even steps of rank; each once, by time.

    Taken from those with a time to first token that is a prefill's: nothing came from outside HBM or, where that is
    unknown, less than a quarter of the prompt was cached; and no span of `preempted` (unix seconds in which the
    engine threw requests out of its batch) touches it. Queueing may still be in it.
    """
    spans = sorted(preempted)
    starts = [start for start, _ in spans]
    ends = list(accumulate((end for _, end in spans), max))

    def is_disturbed(sent: float, answered: float) -> bool:
        begun = bisect_left(starts, answered)
        return begun > 0 and ends[begun - 1] > sent

    facts = [
        (request.prompt_tokens - request.cached_tokens, request)
        for request in requests
        if request.cached_tokens is not None
        and request.ttft_seconds is not None
        and _is_computed_here(request.prompt_tokens, request.cached_tokens, request.outer_tokens)
        and not is_disturbed(request.at_seconds, request.at_seconds + request.ttft_seconds)
    ]
    facts.sort(key=lambda fact: -fact[0])
    count = len(facts)
    steps = max(spread - 1, 1)
    ranks = {*range(min(most, count)), *(step * (count - 1) // steps for step in range(spread) if count)}
    return tuple(sorted((facts[rank][1] for rank in ranks), key=lambda request: request.at_seconds))


def _is_computed_here(prompt: int, cached: int, outer: int | None) -> bool:
    return 4 * cached < prompt if outer is None else outer == 0
