"""Read all sources of one tick side by side, with one deadline: no source holds up another."""

from __future__ import annotations

import threading
import time
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from kvtally.collectors.base import Collector, Scrape, scrape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Result = tuple["_Worker", int, Scrape]


class _Worker(threading.Thread):
    """Scrapes one collector whenever it is asked."""

    def __init__(self, collector: Collector, clock_ns: Callable[[], int], answers: SimpleQueue[Result]) -> None:
        super().__init__(name=collector.source, daemon=True)
        self.collector = collector
        self.busy = False
        self._closes = True
        self._clock_ns = clock_ns
        self._answers = answers
        self._asked: SimpleQueue[int | None] = SimpleQueue()
        self.start()

    def ask(self, tick: int) -> None:
        self.busy = True
        self._asked.put(tick)

    def end(self, *, closes: bool = True) -> None:
        """Read no more; `closes` the collector too, which only the thread that reads it may do."""
        self._closes = closes
        self._asked.put(None)

    def run(self) -> None:
        while (tick := self._asked.get()) is not None:
            result = scrape(self.collector, self._clock_ns)
            self.busy = False
            self._answers.put((self, tick, result))
        if self._closes:
            _close(self.collector)


def _close(collector: Collector) -> None:
    """Let a collector free what it holds, if it holds anything."""
    close: Callable[[], None] | None = getattr(collector, "close", None)
    if close is not None:
        close()


class Gatherer:
    """Keeps one thread for every source that may hang; the rest is read in the caller's thread.

    A source that is to be read no more is closed by the thread that read it, which may still wait for its answer.

    A lone engine is read in the caller's thread as well: its client is bounded in time, and nobody waits behind it.
    """

    def __init__(self, clock_ns: Callable[[], int]) -> None:
        self._clock_ns = clock_ns
        self._answers: SimpleQueue[Result] = SimpleQueue()
        self._workers: dict[str, _Worker] = {}
        self._inline: list[Collector] = []
        self._tick = 0

    def use(self, may_hang: Sequence[Collector], prompt: Sequence[Collector]) -> None:
        """Take these sources from the next tick on; `prompt` ones answer at once or fail."""
        kept = {id(collector) for collector in (*may_hang, *prompt)}
        for collector in self._inline:
            if id(collector) not in kept:
                _close(collector)
        self._inline = list(prompt)
        wanted = {collector.source: collector for collector in may_hang}
        if len(wanted) == 1 and not any(worker.busy for worker in self._workers.values()):
            self._inline += wanted.values()
            wanted = {}
        for source, worker in list(self._workers.items()):
            if wanted.get(source) is not worker.collector:
                self._workers.pop(source).end(closes=id(worker.collector) not in kept)
        for source, collector in wanted.items():
            if source not in self._workers:
                self._workers[source] = _Worker(collector, self._clock_ns, self._answers)

    def gather(self, timeout_seconds: float) -> list[Scrape]:
        """Read every source once; one that gives no answer in time has failed this tick."""
        self._tick += 1
        deadline = time.monotonic() + timeout_seconds
        waiting: dict[str, _Worker] = {}
        scrapes: list[Scrape] = []
        for source, worker in self._workers.items():
            if worker.busy:
                scrapes.append(self._late(source, "is still busy with an earlier scrape"))
            else:
                worker.ask(self._tick)
                waiting[source] = worker
        scrapes += [scrape(collector, self._clock_ns) for collector in self._inline]
        while waiting:
            try:
                # past the deadline, answers that lie ready still count
                worker, tick, result = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except Empty:
                break
            if tick == self._tick and waiting.pop(worker.collector.source, None) is not None:
                scrapes.append(result)
        scrapes += [self._late(source, f"gave no answer in {timeout_seconds:g} s") for source in waiting]
        # GPUs first: an engine's target row names their product
        return sorted(scrapes, key=lambda one: one.source != "nvml")

    def _late(self, source: str, why: str) -> Scrape:
        return Scrape(source, self._clock_ns(), 0.0, (), "failed", f"{source} {why}")

    def close(self) -> None:
        """End the threads and close every source; one that hangs ends with the process."""
        for worker in self._workers.values():
            worker.end()
        for collector in self._inline:
            _close(collector)
