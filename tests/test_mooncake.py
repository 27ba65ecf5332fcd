from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.interval import close, opened
from kvtally.collectors.mooncake import NOT_READ, MooncakeMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE, index
from kvtally.collectors.registry import reader_class, sources_on

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

MASTER = """\
# HELP master_allocated_bytes Total memory bytes currently allocated across all segments
# TYPE master_allocated_bytes gauge
master_allocated_bytes 17179869184
master_total_capacity_bytes 68719476736
master_key_count 4096
# HELP mem_cache_hit_nums_ Total number of GetReplicaList results served from the memory pool
# TYPE mem_cache_hit_nums_ counter
mem_cache_hit_nums_ 900
file_cache_hit_nums_ 100
mem_cache_hit_bytes_total 943718400
file_cache_hit_bytes_total 104857600
valid_get_nums_ 1000
total_get_nums_ 1200
master_successful_evictions_total 3
master_evicted_size_bytes 12582912
"""
CLIENT = """\
# HELP mooncake_transfer_read_bytes Total bytes read
# TYPE mooncake_transfer_read_bytes counter
mooncake_transfer_read_bytes 1073741824
mooncake_transfer_write_bytes 2147483648
# HELP mooncake_transfer_batch_get_latency Batch Get transfer latency (us)
# TYPE mooncake_transfer_batch_get_latency histogram
mooncake_transfer_batch_get_latency_bucket{le="125"} 0
mooncake_transfer_batch_get_latency_bucket{le="+Inf"} 64
mooncake_transfer_batch_get_latency_sum 250000
mooncake_transfer_batch_get_latency_count 64
mooncake_transfer_get_latency_sum 50000
mooncake_transfer_get_latency_count 2
mooncake_transfer_batch_put_latency_sum 1500000
mooncake_transfer_batch_put_latency_count 128
mooncake_transfer_read_operation_bytes{op_name="batch_get_into"} 1073741824
mooncake_ssd_read_bytes_total 536870912
mooncake_ssd_write_bytes_total 268435456
mooncake_ssd_read_ops_total 512
mooncake_ssd_write_ops_total 256
mooncake_ssd_read_latency_us_sum 2000000
mooncake_ssd_read_latency_us_count 40
mooncake_ssd_write_latency_us_sum 4000000
"""


def read(page: str) -> Reading:
    (reading,) = PageMapper("store1:9003", [MooncakeMapping()]).read(page.encode())
    return reading


def known(page: str) -> dict[str, float]:
    values = zip((quantity.name for quantity in CACHE), read(page).values, strict=True)
    return {name: value for name, value in values if value is not None}


def test_a_client_tells_bytes_and_its_microseconds_become_seconds() -> None:
    assert known(CLIENT) == {
        "load_bytes": 1073741824,
        "store_bytes": 2147483648,
        "loads": 66,
        "stores": 128,
        "load_ns": pytest.approx(0.3),  # 250 ms in batches, 50 ms one by one
        "store_ns": 1.5,
        "storage_read_bytes": 536870912,
        "storage_read_ns": 2.0,
        "storage_write_bytes": 268435456,
        "storage_write_ns": 4.0,
    }


def test_the_master_s_look_ups_are_details_and_no_tokens() -> None:
    reading = read(MASTER)
    assert known(MASTER) == {"used_bytes": 17179869184}
    assert dict(zip(reading.detail_names, reading.details, strict=True)) == {
        "replica_lookups": 1200,
        "replica_lookup_hits": 1000,
        "replica_memory_hits": 900,
        "replica_file_hits": 100,
        "replica_memory_hit_bytes": 943718400,
        "replica_file_hit_bytes": 104857600,
        "evicted_bytes": 12582912,
        "evictions": 3,
    }
    assert (reading.name, reading.attributes["cache"]) == ("store1:9003/mooncake", "mooncake store")


def test_its_intervals_count_nanoseconds() -> None:
    later = CLIENT.replace("latency_us_sum 2000000", "latency_us_sum 2000250")
    interval, _, findings = close(opened(read(CLIENT), 1), read(later), 2)
    assert interval.values[index("cache", "storage_read_ns")] == 250_000
    assert findings == []


def test_both_pages_are_known_and_neither_is_another_s() -> None:
    assert [sources_on(page.encode()) for page in (MASTER, CLIENT)] == [("mooncake",), ("mooncake",)]
    assert reader_class("mooncake") is MooncakeMapping
    assert not any(MooncakeMapping().wants(name) for name, _ in NOT_READ)
