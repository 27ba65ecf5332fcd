"""One engine core by discrete events: continuous batching, chunked prefill, prefix caches in three tiers, preemption.

A request's KV room is taken at admission, prompts in full; output takes its room token by token.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from typing import TYPE_CHECKING

import numpy as np
from tests.simulator.blocks import BlockPool
from tests.simulator.laws import Batch
from tests.simulator.outer import OuterTiers
from tests.simulator.story import Load, Lookup, Run, Served, Step, Store

if TYPE_CHECKING:
    from tests.simulator.laws import Law
    from tests.simulator.story import Config
    from tests.simulator.traces import Request, Trace

_SLACK_TOKENS = 64  # room that a request must leave at its admission


class _Live:
    """A request on its way."""

    __slots__ = (
        "arrival",
        "chunk",
        "disk",
        "done",
        "dram",
        "first",
        "generated",
        "hbm",
        "held",
        "index",
        "joined",
        "keys",
        "last",
        "phase",
        "preemptions",
        "request",
        "scheduled",
        "stored",
        "target",
    )

    def __init__(self, index: int, request: Request, arrival: float, block_tokens: int) -> None:
        self.index = index
        self.request = request
        self.arrival = arrival
        self.keys = request.keys(block_tokens)
        self.phase = "waiting"
        self.scheduled = self.first = math.nan
        self.hbm = self.dram = self.disk = 0
        self.done = self.held = self.stored = self.generated = self.preemptions = 0
        self.target = request.prompt
        self.chunk = 0  # tokens of the step that runs
        self.joined = 0  # the step after which it had `generated` tokens
        self.last = math.nan  # when it gave a token before it was preempted


class Engine:
    """Serves one trace once; `seed` decides what chance there is."""

    def __init__(self, config: Config, law: Law, trace: Trace, seed: int = 0) -> None:
        biggest = max((one.prompt + one.output for one in trace.requests), default=0)
        if biggest + _SLACK_TOKENS > config.kv_tokens:
            raise ValueError(f"a request of {biggest} tokens never fits into {config.kv_tokens}")
        self._config, self._law, self._requests = config, law, trace.requests
        self._chance = np.random.default_rng(seed + 7919)
        self._pool = BlockPool(config.kv_tokens, config.block_tokens, caches=config.hbm_cache)
        self._outer = OuterTiers(config, law.shape.kv_bytes, law.device.ranks)
        self._now = 0.0
        self._heat = self._drift = 0.0
        self._number = 0  # steps done
        self._decodes = self._context = 0
        self._channel_free = 0.0
        self._arrivals: list[tuple[float, int]] = []
        self._waiting: deque[_Live] = deque()
        self._loading: list[tuple[float, int, _Live]] = []
        self._prefilling: list[_Live] = []
        self._running: list[_Live] = []  # in the order of admission
        self._finishing: list[tuple[int, int, int, _Live]] = []
        self._aborts: list[tuple[float, int, _Live]] = []
        self._retried = 0
        self._steps: list[Step] = []
        self._served: list[Served] = []
        self._loads: list[Load] = []
        self._stores: list[Store] = []
        self._lookups: list[Lookup] = []
        self._late: list[tuple[float, float]] = []
        self._preempted: list[float] = []
        self._dram_chunks: list[tuple[float, int]] = []
        self._followers: dict[int, list[int]] = {}
        self._backlog: deque[int] = deque()
        self._submit(trace)

    def run(self) -> Run:
        """Serve everything."""
        while self._waiting or self._loading or self._running or self._arrivals:
            self._catch_up()
            chunks, stall = self._schedule()
            if chunks or self._decodes:
                self._execute(chunks, stall)
            elif (t := self._next_event()) is not None:
                self._now = max(self._now, t)
        return Run(
            tuple(self._steps),
            tuple(self._served),
            tuple(sorted(self._loads)),
            tuple(self._stores),
            tuple(self._lookups),
            tuple(self._late),
            tuple(self._preempted),
            tuple(self._dram_chunks),
            self._now,
        )

    # -- what comes and goes

    def _submit(self, trace: Trace) -> None:
        for index, one in enumerate(trace.requests):
            if trace.concurrency is not None:
                self._backlog.append(index)
            elif one.after is not None:
                self._followers.setdefault(one.after, []).append(index)
            else:
                self._arrivals.append((one.arrival, index))
        for _ in range(min(trace.concurrency or 0, len(self._backlog))):
            self._arrivals.append((0.0, self._backlog.popleft()))
        heapq.heapify(self._arrivals)

    def _next_event(self) -> float | None:
        times = [heap[0][0] for heap in (self._arrivals, self._loading) if heap]
        return min(times, default=None)

    def _catch_up(self) -> None:
        """Let in who has arrived and what was loaded, and let go who has left."""
        while self._arrivals and self._arrivals[0][0] <= self._now:
            arrival, index = heapq.heappop(self._arrivals)
            live = _Live(index, self._requests[index], arrival, self._config.block_tokens)
            self._waiting.append(live)
            if live.request.abort is not None:
                heapq.heappush(self._aborts, (arrival + live.request.abort, index, live))
        while self._loading and self._loading[0][0] <= self._now:
            _, _, live = heapq.heappop(self._loading)
            if live.phase == "loading":
                self._begin_prefill(live)
        while self._aborts and self._aborts[0][0] <= self._now:
            _, _, live = heapq.heappop(self._aborts)
            if live.phase != "done":
                self._abort(live)

    def _abort(self, live: _Live) -> None:
        if live.phase == "waiting":
            self._waiting.remove(live)
        elif live.phase == "loading":
            self._loading = [entry for entry in self._loading if entry[2] is not live]
            heapq.heapify(self._loading)
            self._pool.release(live.keys, live.held, live.held, live.target)
        else:
            self._leave(live)
        self._end(live, aborted=True)

    def _end(self, live: _Live, *, aborted: bool) -> None:
        live.phase = "done"
        one = live.request
        self._served.append(
            Served(
                live.index,
                live.arrival,
                live.scheduled,
                live.first,
                self._now,
                one.prompt,
                live.generated,
                live.hbm,
                live.dram,
                live.disk,
                live.preemptions,
                aborted,
            )
        )
        for index in self._followers.pop(live.index, ()):
            heapq.heappush(self._arrivals, (self._now + self._requests[index].arrival, index))
        if self._backlog:
            heapq.heappush(self._arrivals, (self._now, self._backlog.popleft()))

    def _leave(self, live: _Live) -> None:
        """Take a running request out of the batch and its KV out of use."""
        tokens = live.target
        if live.phase == "decode":
            steps = self._number - live.joined
            live.generated += steps
            live.joined = self._number
            tokens += steps
            self._decodes -= 1
            self._context -= live.request.prompt + live.generated
            live.done = live.request.prompt + live.generated - 1  # the last token's KV is not computed yet
        else:
            self._prefilling.remove(live)
        self._running.remove(live)
        full = live.done // self._config.block_tokens
        self._pool.release(live.keys, live.held, max(full, live.held), tokens)
        live.held = 0

    # -- scheduling

    def _schedule(self) -> tuple[list[_Live], float]:
        """Who prefills in the next step, and how long all wait for loads before it."""
        preempted = False
        while self._pool.used_tokens + self._decodes > self._config.kv_tokens and len(self._running) > 1:
            self._preempt()
            preempted = True
        budget = self._config.token_budget - self._decodes
        chunks: list[_Live] = []
        for live in self._prefilling:
            if budget <= 0:
                break
            budget -= self._take(live, budget, chunks)
        stall = 0.0
        self._retried = 0
        while self._waiting and budget > 0 and not preempted:
            if len(self._running) + len(self._loading) >= self._config.most_running:
                break
            live = self._waiting[0]
            found = self._pool.found(live.keys, min((live.target - 1) // self._config.block_tokens, len(live.keys)))
            if self._pool.room_for(live.keys, found, live.target) < _SLACK_TOKENS:
                self._retried = live.target
                break
            self._waiting.popleft()
            seconds = self._admit(live, found)
            if live.phase == "prefill":
                stall += seconds
                budget -= self._take(live, budget, chunks)
        return chunks, stall

    def _take(self, live: _Live, budget: int, chunks: list[_Live]) -> int:
        live.chunk = min(live.target - live.done, budget)
        chunks.append(live)
        return live.chunk

    def _admit(self, live: _Live, found: int) -> float:
        """Take room and what the tiers hold; the seconds that the whole batch has to wait for it."""
        config = self._config
        first = math.isnan(live.scheduled)
        hbm = found * config.block_tokens
        self._pool.admit(live.keys, found, live.target)
        live.held = found
        dram, disk, asked, hits = self._outer.found(live.keys, live.target, hbm)
        live.done = live.stored = hbm + dram + disk
        at = self._now
        self._lookups.append(Lookup(at, live.target, hbm, asked, hits, dram + disk, first))
        if first:
            live.scheduled = at
            live.hbm, live.dram, live.disk = hbm, dram, disk
        seconds = self._outer.load_seconds(dram, disk, self._chance)
        if seconds and not config.sync_loads:
            self._channel_free = max(self._channel_free, at) + seconds
            self._loads.append(Load(self._channel_free, dram + disk, dram, disk, seconds, first))
            live.phase = "loading"
            heapq.heappush(self._loading, (self._channel_free, live.index, live))
            return 0.0
        if seconds:
            self._loads.append(Load(at + seconds, dram + disk, dram, disk, seconds, first))
        self._begin_prefill(live)
        return seconds

    def _begin_prefill(self, live: _Live) -> None:
        live.phase = "prefill"
        live.held = self._pool.publish(live.keys, live.held, live.done // self._config.block_tokens)
        self._prefilling.append(live)
        self._running.append(live)

    def _preempt(self) -> None:
        """Throw out the request that came last; it begins anew, output so far included."""
        live = self._running[-1]
        if live.phase == "decode":
            live.last = self._now
        self._leave(live)
        live.phase = "waiting"
        live.preemptions += 1
        live.target = live.request.prompt + live.generated
        self._waiting.appendleft(live)
        self._preempted.append(self._now)

    # -- one step

    def _execute(self, chunks: list[_Live], stall: float) -> None:
        decodes, prefill = self._decodes, sum(live.chunk for live in chunks)
        products = sum(live.chunk * (live.done + live.chunk / 2) for live in chunks)
        batch = Batch(decodes + prefill, prefill, products, self._context, decodes + len(chunks), self._heat)
        time = self._law.step(batch)
        factor = self._disturbance()
        gpu, wall = time.gpu * factor, time.wall * factor
        marginal = wall if prefill else 0.0
        if prefill and decodes:
            alone = Batch(decodes, 0, 0.0, self._context, decodes, self._heat)
            marginal = (time.wall - self._law.step(alone).wall) * factor
        self._heat = 0.998 * self._heat + 0.002 * min(1.0, prefill / 2048)
        start, busy = self._now, self._now + stall
        rectangle = sum(live.chunk * (live.done + live.chunk) for live in chunks)
        stored = self._computed(chunks, busy + wall)
        self._now = busy + wall + stored
        self._number += 1
        self._pool.grow(decodes)
        self._context += decodes
        read = self._context  # of this step: what is here now, before new requests join
        observed, joined = self._outputs(chunks)
        shape, count = self._law.shape, self._law.device.ranks
        flop = 2 * shape.linear_parameters * batch.tokens + shape.attention_flop * (rectangle + read)
        self._finish()
        self._steps.append(
            Step(
                start,
                busy,
                gpu,
                self._now,
                decodes,
                decodes + joined,
                prefill,
                observed + decodes,
                len(self._running),
                len(self._waiting),
                len(self._loading),
                self._pool.used_tokens,
                marginal,
                stall,
                stored,
                time.tensor * factor,
                time.clock,
                flop / count,
                (shape.step_bytes + shape.kv_bytes * read) / count,
                self._retried,
            )
        )

    def _disturbance(self) -> float:
        apart = self._law.departures
        if not apart.jitter and not apart.drift:
            return 1.0
        self._drift = 0.999 * self._drift + math.sqrt(1 - 0.999**2) * apart.drift * self._chance.normal()
        return math.exp(self._drift + apart.jitter * self._chance.normal())

    def _computed(self, chunks: list[_Live], at: float) -> float:
        """Move prefills on, keep what they made, and store it; the seconds that the engine waits for that."""
        tokens = 0
        for live in chunks:
            live.done += live.chunk
            live.held = self._pool.publish(live.keys, live.held, live.done // self._config.block_tokens)
            tokens += self._outer.keep(live.keys, live.stored, min(live.done, live.request.prompt))
            live.stored = max(live.stored, live.done)
        if not tokens:
            return 0.0
        self._dram_chunks.append((at, self._outer.dram_chunks))
        seconds = self._outer.store_seconds(tokens)
        self._stores.append(Store(at + seconds, tokens, seconds))
        return self._config.store_share * seconds

    def _outputs(self, chunks: list[_Live]) -> tuple[int, int]:
        """Let ended prefills give their first token: prompt tokens and tokens that vLLM observes, and their number."""
        observed = joined = 0
        for live in chunks:
            if live.done < live.target:
                continue
            joined += 1
            observed += 1
            if math.isnan(live.first):
                live.first = self._now
                observed += live.request.prompt - live.hbm - live.dram - live.disk
            elif not math.isnan(live.last):
                self._late.append((self._now, self._now - live.last))
            self._prefilling.remove(live)
            live.phase = "decode"
            live.generated += 1
            live.joined = self._number
            self._decodes += 1
            self._context += live.request.prompt + live.generated
            until = self._number + live.request.output - live.generated
            heapq.heappush(self._finishing, (until, live.index, live.preemptions, live))
        return observed, joined

    def _finish(self) -> None:
        while self._finishing and self._finishing[0][0] <= self._number:
            _, _, preemptions, live = heapq.heappop(self._finishing)
            if live.phase == "decode" and live.preemptions == preemptions:
                self._leave(live)
                self._end(live, aborted=False)
