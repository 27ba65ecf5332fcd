"""What every collector gives: readings of its targets at one instant, or a reason why there are none."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Kind = Literal["engine", "cache", "gpu", "filesystem", "process", "gateway"]
Outcome = Literal["ok", "no_data", "failed"]


class NoData(Exception):  # noqa: N818  # it is an outcome, not an error
    """The source is not there (no GPU, no right to read, no such disk): a reason, not a failure."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class CollectError(Exception):
    """The source is there and could not be read; `hint` says what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class Reading(NamedTuple):
    """The cumulative counters and the gauges of one target at one instant.

    kind          which row of kvtally.collectors.quantities.QUANTITIES names the values
    name          unique within the kind, stable over restarts ("127.0.0.1:8000/0", a GPU's UUID, "vda")
    attributes    what the target is (model, version, sku ...); a change of any opens a new target in the ledger
    values        one per quantity of the kind, in the source's own unit; None where the source does not tell
    epoch         start marker of whatever counts (process start, unix seconds); another value means: counts began anew
    session       start marker of the collector that integrates; only quantities of type "integral" look at it
    detail_names  names of secondary counters (histogram buckets, rare families), constant for one target
    details       their cumulative values, as many as detail_names
    parts         for sums over things that come and go (processes of a tree): key -> values; `values` then holds
                  the gauges and None for the counters, and a part that vanishes keeps what it had counted
    """

    kind: Kind
    name: str
    attributes: Mapping[str, str]
    values: tuple[float | None, ...]
    epoch: float | None = None
    session: float | None = None
    detail_names: tuple[str, ...] = ()
    details: tuple[float, ...] = ()
    parts: Mapping[str, tuple[float | None, ...]] | None = None


class Scrape(NamedTuple):
    """One attempt to read one source: readings, or an outcome with its reason."""

    source: str
    taken_at_ns: int
    took_seconds: float
    readings: tuple[Reading, ...]
    outcome: Outcome = "ok"
    reason: str = ""
    hint: str = ""


class Collector(Protocol):
    """Reads one source. Raises NoData or CollectError (any OSError counts as the latter); never logs."""

    source: str

    def collect(self) -> tuple[Reading, ...]:
        """Read now; bounded in time and memory."""
        ...


def scrape(collector: Collector, clock_ns: Callable[[], int]) -> Scrape:
    """Time one collector, catch and classify what it raises: no source may stop another.

    `clock_ns` gives unix nanoseconds; the instant of a scrape is when its answer is complete,
    since counters are rendered at the end of a request rather than at its start.
    """
    began = time.perf_counter()
    try:
        readings = collector.collect()
    except NoData as nothing:
        return Scrape(
            collector.source, clock_ns(), time.perf_counter() - began, (), "no_data", str(nothing), nothing.hint
        )
    except CollectError as error:
        return Scrape(collector.source, clock_ns(), time.perf_counter() - began, (), "failed", str(error), error.hint)
    except Exception as error:  # noqa: BLE001  # an unforeseen fault in one source must not end the loop
        reason = f"{type(error).__name__}: {error}"
        return Scrape(collector.source, clock_ns(), time.perf_counter() - began, (), "failed", reason)
    return Scrape(collector.source, clock_ns(), time.perf_counter() - began, readings)
