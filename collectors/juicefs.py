"""JuiceFS's client (:9567): what programs read through the mount, and what came from the object store."""

from __future__ import annotations

from kvtally.collectors.family import Family, TableMapping

# juicefs_object_request_data_bytes{method="GET",mp="/kv",vol_name="kv"} 2.147483648e+09
_OBJECTS = "juicefs_object_request_data_bytes"
FAMILIES = (
    Family("read_bytes", _OBJECTS, {"method": "GET"}, unit="bytes", trap="less what its disk cache gave"),
    Family("write_bytes", _OBJECTS, {"method": "PUT"}, unit="bytes"),
    Family("app_read_bytes", "juicefs_fuse_read_size_bytes_sum", unit="bytes"),
    Family("app_write_bytes", "juicefs_fuse_written_size_bytes_sum", unit="bytes"),
)
NOT_READ = (("juicefs_blockcache_hit_bytes", "what programs read less what objects gave"),)


class JuicefsMapping(TableMapping):
    """One target per mount point."""

    def __init__(self) -> None:
        tells = {"mounts": ("mp",), "volume": ("vol_name",)}
        super().__init__("filesystem", FAMILIES, source="juicefs", by=("mp",), tells=tells, spelled=spelled)


def spelled(sample: str) -> str:
    """The client prefixes even the names that all processes share."""
    return sample.removeprefix("juicefs_") if sample.startswith("juicefs_process_") else sample
