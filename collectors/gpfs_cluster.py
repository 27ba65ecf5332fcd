"""IBM Storage Scale (GPFS) on all nodes of a cluster by the page of plazonic's gpfs-exporter, which asks mmpmon."""

from __future__ import annotations

from kvtally.collectors.family import Family, TableMapping

_CACHED = "the pagepool's reads are among them; since the mount or an `mmpmon reset`"
# gpfs_bytes_read{fs="tiger2.gpfs", host="tiger-i23g14"} 3401130516933 1536005985350
FAMILIES = (
    Family("app_read_bytes", "gpfs_bytes_read", unit="bytes", trap=_CACHED),
    Family("app_write_bytes", "gpfs_bytes_write", unit="bytes"),
    Family("reads", "gpfs_requests_read", unit="operations", trap="calls of programs"),
    Family("writes", "gpfs_requests_write", unit="operations", trap="calls of programs"),
)
NOT_READ = (("gpfs_inode_updates", "metadata carries no bytes"),)


class GpfsClusterMapping(TableMapping):
    """Reads plazonic's gpfs-exporter: all nodes of a cluster, one target per filesystem and node."""

    def __init__(self) -> None:
        super().__init__(
            "filesystem",
            FAMILIES,
            source="gpfs-exporter",
            by=("fs", "host"),
            keyed=True,
            tells={"fs": ("fs",), "node": ("host",)},
        )
