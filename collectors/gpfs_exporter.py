"""IBM Storage Scale (GPFS) on one node by the page of treydock's gpfs_exporter (:9303), which asks mmpmon."""

from __future__ import annotations

from kvtally.collectors.family import Family, TableMapping

_CACHED = "the pagepool's reads are among them; since the mount or an `mmpmon reset`"
# gpfs_perf_read_bytes_total{fs="scratch"} 2.05607400434e+11
# gpfs_perf_operations_total{fs="scratch",operation="reads"} 59420404
FAMILIES = (
    Family("app_read_bytes", "gpfs_perf_read_bytes_total", unit="bytes", trap=_CACHED),
    Family("app_read_bytes", "gpfs_perf_read_bytes", unit="bytes", trap=_CACHED),
    Family("app_write_bytes", "gpfs_perf_write_bytes_total", unit="bytes"),
    Family("app_write_bytes", "gpfs_perf_write_bytes", unit="bytes"),
    Family("reads", "gpfs_perf_operations_total", {"operation": "reads"}, unit="operations", trap="calls of programs"),
    Family("reads", "gpfs_perf_operations", {"operation": "reads"}, unit="operations"),
    Family(
        "writes", "gpfs_perf_operations_total", {"operation": "writes"}, unit="operations", trap="calls of programs"
    ),
    Family("writes", "gpfs_perf_operations", {"operation": "writes"}, unit="operations"),
)
NOT_READ = (("gpfs_perf_info", "names the node, which the page's own name tells"),)


class GpfsExporterMapping(TableMapping):
    """Reads treydock's gpfs_exporter: one node, one target per filesystem."""

    def __init__(self) -> None:
        super().__init__(
            "filesystem",
            FAMILIES,
            source="gpfs_exporter",
            by=("fs",),
            keyed=True,
            tells={"fs": ("fs",), "node": ("nodename",)},
        )
