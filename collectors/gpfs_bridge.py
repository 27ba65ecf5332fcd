"""IBM Storage Scale (GPFS) by the pages of IBM's bridge to its performance monitoring (ZIMon), port 9250."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvtally.collectors.base import CollectError
from kvtally.collectors.family import Family, TableMapping
from kvtally.collectors.page import PageMapper

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvtally.collectors.base import Reading
    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Plan

# gpfs_fs_bytes_read{node="scale-11",gpfs_cluster_name="c1.local",gpfs_fs_name="localFS"} 73400320.0 1737638280000
_DISKS = "a disk that shows no value on a page makes the interval unknown"
FAMILIES = (
    Family(
        "read_bytes",
        "gpfs_fs_bytes_read",
        unit="bytes",
        trap="IBM says bytes read and no more; its latency formula sets disk waits against this sensor's read_ops",
    ),
    Family("read_bytes", "gpfs_ds_bytes_read", unit="bytes", trap=_DISKS),
    Family("write_bytes", "gpfs_fs_bytes_written", unit="bytes"),
    Family("write_bytes", "gpfs_ds_bytes_written", unit="bytes", trap=_DISKS),
    Family("reads", "gpfs_fs_read_ops", unit="operations"),
    Family("reads", "gpfs_ds_read_ops", unit="operations", trap=_DISKS),
    Family("writes", "gpfs_fs_write_ops", unit="operations"),
    Family("writes", "gpfs_ds_write_ops", unit="operations", trap=_DISKS),
    Family("app_read_bytes", "gpfs_fis_bytes_read", unit="bytes", trap="what programs read, the pagepool's among it"),
    Family("app_write_bytes", "gpfs_fis_bytes_written", unit="bytes"),
)
NOT_READ = (
    ("gpfs_fs_tot_disk_wait_rd", "the page does not tell its unit"),
    ("gpfs_ns_bytes_read", "all filesystems of a node together; gpfs_fs_bytes_read tells them apart"),
    ("gpfs_is_bytes_read", "all filesystems of a node together; gpfs_fis_bytes_read tells them apart"),
    ("gpfs_nsdds_bytes_read", "what an NSD server read for every client and every filesystem"),
    ("gpfs_afm_bytes_read", "what came from an AFM home is read once more from this cluster's disks"),
)
_DELTA = re.compile(
    rb"^# TYPE (gpfs_(?:fs|fis|ds)_(?:bytes_read|bytes_written|read_ops|write_ops)) gauge[ \r]*$", re.MULTILINE
)


class _BridgeMapping(TableMapping):
    """Names its targets by the page's sensors: two pages of one filesystem are two targets."""

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """Plans named "gpfs_fis/<filesystem>/<node>" for a page of GPFSFilesystemAPI."""
        sensors = sorted({one.name.split("_")[1] for one in series if one.name.startswith("gpfs_")})
        return super().compile("_".join((target, *sensors)), series, version, helps)


class StorageScaleBridge:
    """Reads the pages of IBM's bridge (:9250), one sensor each: /metrics_gpfs_filesystem, …_filesystemapi, …_disk.

    Without raw counters the bridge shows the change over a sensor's last period as a gauge. Pages that are missed
    would be missing from any sum of those, and nobody could say so: they are refused.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:  # noqa: ARG002  # nothing is held over time here
        mapping = _BridgeMapping(
            "filesystem",
            FAMILIES,
            source="storage scale bridge",
            by=("gpfs_fs_name", "node"),
            keyed=True,
            tells={"cluster": ("gpfs_cluster_name",), "fs": ("gpfs_fs_name",), "node": ("node",)},
        )
        self._mapper = PageMapper("gpfs", (mapping,))

    def read(self, body: bytes) -> tuple[Reading, ...]:
        """One reading per filesystem and node; CollectError where the page shows changes instead of counts."""
        delta = _DELTA.search(body)
        if delta is not None:
            raise CollectError(
                f"{delta[1].decode()} is the change over a sensor's period, not a count",
                "set rawCounters = True in the bridge's config.ini, or run it as of 8.0.8, which counts in any case",
            )
        return self._mapper.read(body)
