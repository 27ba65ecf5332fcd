"""Sends cold prompts to an idle engine, and keeps what the engine's own counters confirm (METHOD 4.1, M4)."""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING, Literal, NamedTuple

from kvtally.agent.probe.plan import DISCARDS_MAX, RUNS, SECONDS_MAX, warm_up_tokens
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtally.agent.probe.api import Answer, Served
    from kvtally.agent.probe.engine import Engine, Look

_QUIET_SECONDS = 1.0  # an engine's gauges are as old as its last step: a long prefill does not show in them at once
_IDLE_SECONDS = 10.0  # how long other requests are waited for between two prompts
_SETTLE_SECONDS = 3.0  # an engine may count a request some milliseconds after its answer
_LOOK_EVERY_SECONDS = 0.05
_MARGIN = 1.5  # on the time of the next prompt: attention grows with the square of its length
_CLOCK_SECONDS = 0.005  # two clocks time one answer
_BUSY_HINT = "probe it when nobody uses it, or give a log of its requests instead"
# Ids that every tokenizer has; and where the vocabulary is known those between the bytes and special tokens, which
# lie at its beginning, and special tokens that lie at its end.
_TOKEN_IDS = range(256, 1024)
_PLAIN_TOKEN_IDS = range(1024, 32_000)


class Probe(NamedTuple):
    """One cold prompt on an engine that did nothing else, and the seconds that it took to its first token.

    source  "engine": its own prefill time, by the difference of its counters; "ttft": as its client saw it
    """

    prompt_tokens: int
    seconds: float
    source: Literal["engine", "ttft"]


class Probed(NamedTuple):
    """What was measured, in that order; how many prompts were thrown away; and why it ended early, "" if it did not."""

    probes: tuple[Probe, ...]
    discarded: int
    stopped: str = ""


def measure(
    engine: Engine,
    served: Served,
    lengths: Sequence[int],
    *,
    vocabulary: int | None = None,
    seconds_max: float = SECONDS_MAX,
    told: Callable[[Probe], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> Probed:
    """Send a prompt to warm up, then every length RUNS times, shortest first, each of them to the idle engine.

    CollectError if nothing could be measured; what ends it later is told in `stopped`. `told` hears of every probe.
    `vocabulary` is the number of token ids; without it those are sent that every model has.
    """
    run = _Run(engine, served.model, _token_ids(vocabulary), deadline=clock() + seconds_max, clock=clock, sleep=sleep)
    probes: list[Probe] = []
    stopped = ""
    try:
        run.check_quiet()
        run.probe(warm_up_tokens(lengths))
        for length in sorted(lengths) * RUNS:
            probes.append(run.probe(length))
            if told is not None:
                told(probes[-1])
    except CollectError as error:
        if not probes:
            raise
        stopped = str(error)
    return Probed(tuple(probes), run.discarded, stopped)


class _Run:
    def __init__(
        self,
        engine: Engine,
        model: str,
        token_ids: range,
        *,
        deadline: float,
        clock: Callable[[], float],
        sleep: Callable[[float], None],
    ) -> None:
        self.discarded = 0
        self._engine = engine
        self._model = model
        self._token_ids = token_ids
        self._deadline = deadline
        self._clock = clock
        self._sleep = sleep
        self._seconds_per_token = 0.0  # of the last prompt
        self._chance = random.SystemRandom()

    def check_quiet(self) -> None:
        """CollectError unless the engine has no request now and a while later, and had none in between."""
        before = self.await_idle(0)
        self._sleep(_QUIET_SECONDS)
        came = _more(before.first_tokens, self.await_idle(0).first_tokens)
        if came:
            raise CollectError("the engine is not idle: requests come all the time", _BUSY_HINT)

    def await_idle(self, seconds: float) -> Look:
        """A look at the engine while it has no request; CollectError if it has one for so long, or sleeps."""
        until = min(self._clock() + seconds, self._deadline)
        while True:
            look = self._engine.look()
            if None in {look.running, look.waiting, look.first_tokens, look.prompt_tokens}:
                raise CollectError("the engine's page does not tell whether it is idle", "vLLM's own /metrics does")
            if look.awake == 0:
                raise CollectError("the engine sleeps", "wake it up first")
            if not look.running and not look.waiting:
                return look
            if self._clock() >= until:
                raise CollectError(
                    f"the engine is not idle: {look.running:.0f} requests run and {look.waiting:.0f} wait",
                    _BUSY_HINT,
                )
            self._sleep(_LOOK_EVERY_SECONDS)

    def probe(self, length: int) -> Probe:
        """One length, again if it was disturbed; CollectError if that comes too often, or time is up."""
        while True:
            before = self.await_idle(_IDLE_SECONDS)
            left = self._deadline - self._clock()
            if left <= _MARGIN * self._seconds_per_token * length:
                raise CollectError(f"time is up: a prompt of {length:,} tokens would take too long")
            prompt = self._chance.choices(self._token_ids, k=length)
            answer = self._engine.complete(self._model, prompt, left)
            self._seconds_per_token = answer.ttft_seconds / length
            after = self._settled(before)
            fault = _fault(length, before, answer, after)
            if not fault:
                return _probe_of(length, before, answer, after)
            self.discarded += 1
            if self.discarded > DISCARDS_MAX:
                raise CollectError(f"{self.discarded} prompts were disturbed, the last since {fault}")

    def _settled(self, before: Look) -> Look:
        """A look after the engine has counted the prompt, or has had time enough to do so."""
        until = self._clock() + _SETTLE_SECONDS
        while True:
            after = self._engine.look()
            is_counted = _more(before.first_tokens, after.first_tokens) != 0 and not after.running
            if (is_counted and _more(before.finished, after.finished) != 0) or self._clock() >= until:
                return after
            self._sleep(_LOOK_EVERY_SECONDS)


def _token_ids(vocabulary: int | None) -> range:
    if vocabulary is None:
        return _TOKEN_IDS
    if vocabulary <= 2 * _PLAIN_TOKEN_IDS.start:
        return range(vocabulary // 4, max(vocabulary, 1))
    return range(_PLAIN_TOKEN_IDS.start, min(vocabulary, _PLAIN_TOKEN_IDS.stop))


def _more(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _fault(length: int, before: Look, answer: Answer, after: Look) -> str:
    """Why a prompt does not count, "" if it does; CollectError if it was another engine's."""
    first, finished = _more(before.first_tokens, after.first_tokens), _more(before.finished, after.finished)
    prompt, prefill = (
        _more(before.prompt_tokens, after.prompt_tokens),
        _more(before.prefill_seconds, after.prefill_seconds),
    )
    if before.epoch != after.epoch or first is None or first < 0:
        raise CollectError("the engine was restarted", "or several engines share its address: name one of them")
    if not first:
        return "the page did not count it: it may be another engine's"
    reused = (_more(before.hbm_tokens, after.hbm_tokens), _more(before.external_tokens, after.external_tokens))
    if first != 1 or (finished is not None and finished != 1) or after.running or after.waiting:
        return "other requests came meanwhile"
    if prompt != length or answer.prompt_tokens not in {None, length}:
        return f"the engine did not count {length:,} prompt tokens"
    if any((*reused, answer.cached_tokens)):
        return "a part of it came from a cache"
    if prefill is not None and not 0 <= prefill <= answer.ttft_seconds + _CLOCK_SECONDS:
        return "the engine's prefill time is longer than the whole answer took"
    return ""


def _probe_of(length: int, before: Look, answer: Answer, after: Look) -> Probe:
    prefill = _more(before.prefill_seconds, after.prefill_seconds)
    return Probe(length, prefill, "engine") if prefill else Probe(length, answer.ttft_seconds, "ttft")
