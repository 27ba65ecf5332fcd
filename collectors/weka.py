"""WEKA by its exporter's page (:8150): rates of each filesystem, held over time and summed."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from kvtally.collectors.base import CollectError, Reading
from kvtally.collectors.exposition import PageReader
from kvtally.collectors.family import Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvtally.collectors.exposition import Layout

HELD_SECONDS = 120.0  # a rate is a mean over a minute: past two, nobody knows what was read
MAX_FILESYSTEMS = 512

# weka_fs_stats{cluster="smith-22",fs_id="2",fs_name="org1fs1",stat="READ_BYTES",unit="bytespersec"} 3.887e+09
# weka_stats{category="ops",cluster="c",host_name="h",node_id="NodeId<1>",…,stat="READ_BYTES",unit="bytespersec"} 4e6 1…
_OF_FILESYSTEM, _OF_NODE = "weka_fs_stats", "weka_stats"
_MEAN = "a gauge: the mean of the last minute, taken for the time since the page before, two minutes at most"
_WAIT = f"the mean wait of an operation, times their rate; {_MEAN}"
FAMILIES = (
    Family("read_bytes", _OF_FILESYSTEM, {"stat": "READ_BYTES"}, unit="bytes/s", trap=_MEAN),
    Family("reads", _OF_FILESYSTEM, {"stat": "READS"}, unit="operations/s", trap=_MEAN),
    Family("read_ns", _OF_FILESYSTEM, {"stat": "READ_LATENCY"}, unit="microseconds", scale=1e-6, trap=_WAIT),
    Family("write_bytes", _OF_FILESYSTEM, {"stat": "WRITE_BYTES"}, unit="bytes/s", trap=_MEAN),
    Family("writes", _OF_FILESYSTEM, {"stat": "WRITES"}, unit="operations/s", trap=_MEAN),
    Family("write_ns", _OF_FILESYSTEM, {"stat": "WRITE_LATENCY"}, unit="microseconds", scale=1e-6, trap=_WAIT),
)
NOT_READ = (
    ("weka_stats", "read where the page has no weka_fs_stats, summed over nodes: else the same bytes once more"),
    ("weka_overview_activity_read_bytespersec", "the whole cluster's rate once more"),
    ("weka_blocksize", "a histogram of sizes in a gauge: it is neither a count nor a rate"),
)
_STATS = tuple(str(row.labels["stat"]) for row in FAMILIES)
_TIMES = {"READ_LATENCY": "READS", "WRITE_LATENCY": "WRITES"}
_BASIS = "gauge of a rate held over time"

Key = tuple[str, str]  # cluster and filesystem


class _Sums:
    """What is summed for one filesystem; None for what its page never told."""

    def __init__(self, key: Key) -> None:
        cluster, filesystem = key
        self.attributes = {"source": "weka", "basis": _BASIS, "cluster": cluster}
        if filesystem:
            self.attributes["fs"] = filesystem
        self.totals: list[float | None] = [None] * len(FAMILIES)

    def add(self, stats: Mapping[str, float], seconds: float) -> None:
        for place, (row, stat) in enumerate(zip(FAMILIES, _STATS, strict=True)):
            times = stats.get(_TIMES[stat]) if stat in _TIMES else 1.0
            if stat in stats and times is not None:
                self.totals[place] = (self.totals[place] or 0.0) + stats[stat] * times * row.scale * seconds


class WekaReader:
    """Reads the pages of one WEKA exporter; its sums begin at zero with it, which their epoch tells.

    Where the page shows filesystems, each is a target; else the nodes' rates are added up for the cluster.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds that only go forward."""
        self._clock = clock
        self._epoch = clock()
        self._last: float | None = None
        self._filesystems = PageReader(_OF_FILESYSTEM.__eq__)
        self._nodes: PageReader | None = None
        self._sums: dict[Key, _Sums] = {}

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """What has been summed so far, a reading per filesystem; CollectError where the page tells of none."""
        told = self._told(body)
        now = self._clock()
        seconds = 0.0 if self._last is None else min(now - self._last, HELD_SECONDS)
        self._last = now
        for key, stats in told.items():
            if key not in self._sums and len(self._sums) >= MAX_FILESYSTEMS:
                raise CollectError(f"the exporter shows more than {MAX_FILESYSTEMS} filesystems")
            self._sums.setdefault(key, _Sums(key)).add(stats, seconds)
        if not self._sums:
            raise CollectError(
                "the page shows no rate of any filesystem",
                "name READ_BYTES and WRITE_BYTES under stats: ops: in the exporter's export.yml",
            )
        return tuple(
            Reading(
                "filesystem",
                "weka:" + "/".join(filter(None, key)),
                one.attributes,
                (*one.totals, None, None),
                self._epoch,
            )
            for key, one in self._sums.items()
        )

    def _told(self, body: bytes) -> dict[Key, dict[str, float]]:
        """The page's rates; those of nodes as long as no filesystem has been seen."""
        told = _rates(*self._filesystems.read(body))
        if told:
            self._nodes = None
        elif not any(filesystem for _, filesystem in self._sums):
            self._nodes = self._nodes or PageReader(_OF_NODE.__eq__)
            try:
                told = _rates(*self._nodes.read(body))
            except CollectError as error:
                # one series for each of several minutes
                raise CollectError(str(error), "set datapoints_per_collect: 1 in the exporter's export.yml") from None
        return told


def _rates(layout: Layout, values: tuple[float, ...]) -> dict[Key, dict[str, float]]:
    """Statistics by filesystem, those of several nodes added up."""
    told: dict[Key, dict[str, float]] = {}
    for key, stat, value in _counted(layout, values):
        stats = told.setdefault(key, {})
        stats[stat] = stats.get(stat, 0.0) + value
    return told


def _counted(layout: Layout, values: tuple[float, ...]) -> Iterator[tuple[Key, str, float]]:
    for one, value in zip(layout.series, values, strict=True):
        stat = one.labels.get("stat", "")
        if stat not in _STATS or not math.isfinite(value) or value < 0:
            continue
        if one.name == _OF_NODE and (one.labels.get("category") != "ops" or stat in _TIMES):
            continue  # a sum of the nodes' means is no mean
        yield (one.labels.get("cluster", ""), one.labels.get("fs_name", "")), stat, value
