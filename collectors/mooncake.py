"""Mooncake's store as cache readings: a client's transfers and SSD, a master's look-ups."""

from __future__ import annotations

from kvtally.collectors.family import Family, TableMapping

# of a client (its own HTTP server, --enable_http_server): mooncake_transfer_read_bytes 1073741824
# of the master (:9003):                                   mem_cache_hit_bytes_total 536870912
_GET, _PUT = "mooncake_transfer_get_latency", "mooncake_transfer_put_latency"
_BATCH_GET, _BATCH_PUT = "mooncake_transfer_batch_get_latency", "mooncake_transfer_batch_put_latency"
_REPLICAS = "answers to GetReplicaList, which a reader may ask for and not use: no hits of requests or tokens"
FAMILIES = (
    Family("load_bytes", "mooncake_transfer_read_bytes", unit="bytes", trap="whoever asked: this client's engine"),
    Family("store_bytes", "mooncake_transfer_write_bytes", unit="bytes"),
    Family("loads", f"{_BATCH_GET}_count", unit="operations", plus=((f"{_GET}_count", {}),)),
    Family("stores", f"{_BATCH_PUT}_count", unit="operations", plus=((f"{_PUT}_count", {}),)),
    Family("load_ns", f"{_BATCH_GET}_sum", unit="microseconds", scale=1e-6, plus=((f"{_GET}_sum", {}),)),
    Family("store_ns", f"{_BATCH_PUT}_sum", unit="microseconds", scale=1e-6, plus=((f"{_PUT}_sum", {}),)),
    Family("storage_read_bytes", "mooncake_ssd_read_bytes_total", unit="bytes"),
    Family("storage_read_ns", "mooncake_ssd_read_latency_us_sum", unit="microseconds", scale=1e-6, trap="per batch"),
    Family("storage_write_bytes", "mooncake_ssd_write_bytes_total", unit="bytes"),
    Family("storage_write_ns", "mooncake_ssd_write_latency_us_sum", unit="microseconds", scale=1e-6, trap="per batch"),
    Family("used_bytes", "master_allocated_bytes", unit="bytes", trap="memory of all segments of the cluster"),
    Family("storage_read_keys", "mooncake_ssd_read_ops_total", unit="keys"),
    Family("storage_write_keys", "mooncake_ssd_write_ops_total", unit="keys"),
    Family("replica_lookups", "total_get_nums_", unit="lookups", trap=_REPLICAS),
    Family("replica_lookup_hits", "valid_get_nums_", unit="lookups", trap=_REPLICAS),
    Family("replica_memory_hits", "mem_cache_hit_nums_", unit="lookups", trap=_REPLICAS),
    Family("replica_file_hits", "file_cache_hit_nums_", unit="lookups", trap=_REPLICAS),
    Family("replica_memory_hit_bytes", "mem_cache_hit_bytes_total", unit="bytes", trap=_REPLICAS),
    Family("replica_file_hit_bytes", "file_cache_hit_bytes_total", unit="bytes", trap=_REPLICAS),
    Family("evicted_bytes", "master_evicted_size_bytes", unit="bytes"),
    Family("evictions", "master_successful_evictions_total", unit="operations"),
)
NOT_READ = (
    ("master_key_count", "objects, where the cache's used_bytes are bytes"),
    ("master_allocated_file_size_bytes", "used_bytes are those of memory"),
    ("mem_cache_nums_", "objects, where the cache's used_bytes are bytes"),
    ("mooncake_transfer_read_operation_bytes", "mooncake_transfer_read_bytes once more, by interface"),
    ("mooncake_ssd_total_bytes_total", "the sum of reads and writes, which are read"),
    ("mooncake_ssd_read_latency_summary_us", "quantiles do not add up"),
    ("mooncake_client_rpc_latency", "calls to the master move no KV"),
)


class MooncakeMapping(TableMapping):
    """Reads a client's page or the master's, each under the name of its page."""

    def __init__(self) -> None:
        super().__init__(
            "cache", FAMILIES, source="mooncake", suffix="/mooncake", attributes={"cache": "mooncake store"}
        )
