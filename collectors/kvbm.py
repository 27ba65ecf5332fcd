"""NVIDIA Dynamo's KV block manager (port 6880) as a cache reading."""

from __future__ import annotations

from kvtally.collectors.family import Family, TableMapping

# kvbm_matched_tokens 8192
# kvbm_onboard_blocks_d2d 12
_BLOCKS = "blocks of --kv-block-size tokens, which the page does not tell"
FAMILIES = (
    Family(
        "lookup_hit_tokens", "kvbm_matched_tokens", trap="what was found outside the GPU, whether or not it was loaded"
    ),
    Family("offloaded_device_to_host_blocks", "kvbm_offload_blocks_d2h", unit="blocks", trap=_BLOCKS),
    Family(
        "offloaded_host_to_disk_blocks",
        "kvbm_offload_blocks_h2d",
        unit="blocks",
        trap=f"h2d is host to disk here; {_BLOCKS}",
    ),
    Family("offloaded_device_to_disk_blocks", "kvbm_offload_blocks_d2d", unit="blocks", trap=_BLOCKS),
    Family("offloaded_device_to_object_blocks", "kvbm_offload_blocks_d2o", since="1.6.1", unit="blocks", trap=_BLOCKS),
    Family(
        "onboarded_host_to_device_blocks",
        "kvbm_onboard_blocks_h2d",
        unit="blocks",
        trap=f"h2d is host to device here; {_BLOCKS}",
    ),
    Family("onboarded_disk_to_device_blocks", "kvbm_onboard_blocks_d2d", unit="blocks", trap=_BLOCKS),
    Family("onboarded_object_to_device_blocks", "kvbm_onboard_blocks_o2d", since="1.6.1", unit="blocks", trap=_BLOCKS),
    Family("offloaded_object_bytes", "kvbm_offload_bytes_object", unit="bytes"),
    Family(
        "onboarded_object_bytes", "kvbm_onboard_bytes_object", unit="bytes", trap="of object stores alone, disks not"
    ),
)
NOT_READ = (
    ("kvbm_host_cache_hit_rate", "a ratio over a sliding window"),
    ("kvbm_disk_cache_hit_rate", "a ratio over a sliding window"),
    ("kvbm_object_cache_hit_rate", "a ratio over a sliding window"),
    ("kvbm_object_read_failures", "failures carry no tokens and no bytes"),
    ("kvbm_object_write_failures", "failures carry no tokens and no bytes"),
    ("dynamo_component_kvstats_gpu_prefix_cache_hit_rate", "a ratio; the engine's own families count the tokens"),
    ("dynamo_component_kvstats_active_blocks", "a gauge of blocks; the engine's own kv_usage is read"),
)


class KvbmMapping(TableMapping):
    """Reads the page that DYN_KVBM_METRICS=true opens at DYN_KVBM_METRICS_PORT; it has no labels."""

    def __init__(self) -> None:
        super().__init__("cache", FAMILIES, source="kvbm", suffix="/kvbm", attributes={"cache": "dynamo kvbm"})
