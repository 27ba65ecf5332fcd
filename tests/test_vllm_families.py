from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.family import release, sample_names
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE, ENGINE
from kvtally.collectors.vllm import VllmMapping
from kvtally.collectors.vllm_families import (
    CONNECTORS,
    FAMILIES,
    HISTOGRAMS,
    INFORMATION,
    NOT_READ,
    OFFLOAD,
    counters_of,
)

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading
    from kvtally.collectors.family import Family

MATRIX = Path(__file__).parent / "fixtures" / "pages" / "vllm-families.tsv"
# of versions that the matrix does not have, as they are registered
FURTHER = """
vllm:gpu_prefix_cache_hit_rate vllm:cpu_prefix_cache_hit_rate vllm:cpu_cache_usage_perc vllm:num_requests_swapped
vllm:kv_offload_config_info vllm:kv_offload_tiering_promotion_latency_seconds vllm:umbp_transfer_bytes_total
vllm:kv_offload_cpu_cache_usage_perc vllm:kv_offload_cpu_allocation_size vllm:kv_offload_stores_skipped
vllm:mooncake_bytes_transferred vllm:mooncake_xfer_time_seconds vllm:mooncake_num_descriptors
vllm:lmcache_mp_lookup_duration_seconds vllm_llmd_fs_metadata_cache_lookup_blocks vllm:sleep_mode_operations_in_flight
"""
ROWS = (*FAMILIES, *HISTOGRAMS, *OFFLOAD)
# every connector's name ends its target's, and each has its own quantities
START = 'process_start_time_seconds 17\nvllm:prompt_tokens_total{engine="0",model_name="m"} 5\n'


def is_read(family: str) -> bool:
    """Whether a sample of a family, as it is registered, is in the tables."""
    read = {INFORMATION, *sample_names(ROWS), *(name for one in CONNECTORS for name in one.information)}
    return any(family + ending in read for ending in ("", "_total", "_sum", "_count", "_bucket"))


def reasons(family: str) -> list[str]:
    return [why for pattern, why in NOT_READ if fnmatch(family, pattern)]


def known() -> list[str]:
    lines = MATRIX.read_text().splitlines()[1:]
    return [line.partition("\t")[0] for line in lines] + FURTHER.split()


@pytest.mark.parametrize("family", known())
def test_every_family_is_read_or_said_not_to_be_and_why(family: str) -> None:
    assert is_read(family) != bool(reasons(family))


@pytest.mark.parametrize("pattern", [pattern for pattern, _ in NOT_READ])
def test_a_family_that_is_not_read_exists(pattern: str) -> None:
    assert any(fnmatch(family, pattern) for family in known())


def test_every_quantity_of_an_engine_has_a_family() -> None:
    assert {quantity.name for quantity in ENGINE} <= {row.quantity for row in FAMILIES}


def test_rows_that_are_no_detail_are_quantities_of_their_kind() -> None:
    cache = {quantity.name for quantity in CACHE}
    details = {
        *("peer_read_bytes", "peer_read_ns", "peer_write_bytes", "lookup_ns", "lookup_wait_ns"),
        *("loaded_blocks", "stored_blocks", "failed_transfers", "expired_requests"),
    }
    assert {row.quantity for row in OFFLOAD} - cache == details


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.quantity} {row.since} {row.sample}")
def test_a_row_says_its_unit_and_versions_in_order(row: Family) -> None:
    since, until = release(row.since), release(row.until)
    assert row.unit
    assert (since is None) == (row.quantity == "lmcache_lookup_ns")  # LMCache brings it along
    assert since is None or (0, 8) <= since <= (0, 33)
    assert until is None or since is None or since <= until
    seconds = row.quantity.endswith("_ns")
    assert seconds == (row.unit == "seconds")
    assert row.quantity.endswith("_bytes") == (row.unit == "bytes")


def test_a_sample_that_has_had_two_units_had_each_in_other_versions() -> None:
    rows = [row for row in FAMILIES if row.sample.startswith("vllm:gpu_prefix_cache_")]
    assert [(row.sample[22:], row.unit, row.since, row.until) for row in rows] == [
        ("queries_total", "tokens", "0.9", "0.11"),
        ("queries_total", "blocks", "0.8", "0.8"),
        ("hits_total", "tokens", "0.9", "0.11"),
        ("hits_total", "blocks", "0.8", "0.8"),
    ]


# -- what connectors count


def caches(*lines: str) -> dict[str, Reading]:
    """The cache readings of a page with these lines: name{labels} value."""
    page = START
    for line in lines:
        name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()  # type: ignore[union-attr]  # a test's own lines
        rest = f",{labels}" if labels else ""
        page += f'vllm:{name}{{engine="0",model_name="m"{rest}}} {value}\n'
    found = PageMapper("h:1", [VllmMapping()]).read(page.encode())
    return {one.name: one for one in found if one.kind == "cache"}


def told(reading: Reading) -> dict[str, float | None]:
    names = (quantity.name for quantity in CACHE)
    return {name: value for name, value in zip(names, reading.values, strict=True) if value is not None}


def details(reading: Reading) -> dict[str, float]:
    return dict(zip(reading.detail_names, reading.details, strict=True))


TIERING = (
    'kv_offload_tiering_read_bytes_total{tier="1:fs"} 4096',
    'kv_offload_tiering_read_time_total{tier="1:fs"} 0.5',
    'kv_offload_tiering_write_bytes_total{tier="1:fs"} 8192',
    'kv_offload_tiering_write_time_total{tier="1:fs"} 1.5',
)


def test_a_tier_on_storage_tells_what_it_read_and_how_long() -> None:
    (cache,) = caches(*TIERING).values()
    assert told(cache) == {
        "storage_read_bytes": 4096,
        "storage_read_ns": 0.5,
        "storage_write_bytes": 8192,
        "storage_write_ns": 1.5,
    }
    assert cache.name == "h:1/0/kv_offload"


def test_tiers_on_storage_are_added_up_and_peers_and_the_primary_are_not_among_them() -> None:
    (cache,) = caches(
        *TIERING,
        'kv_offload_tiering_read_bytes_total{tier="2:obj"} 100',
        'kv_offload_tiering_read_time_total{tier="2:obj"} 0.25',
        'kv_offload_tiering_read_bytes_total{tier="3:p2p"} 7',
        'kv_offload_tiering_read_time_total{tier="3:p2p"} 0.125',
        'kv_offload_tiering_write_bytes_total{tier="0:primary"} 1000000',
    ).values()
    assert told(cache)["storage_read_bytes"] == 4196
    assert told(cache)["storage_read_ns"] == 0.75
    assert told(cache)["storage_write_bytes"] == 8192
    assert details(cache) == {"peer_read_bytes": 7, "peer_read_ns": 125_000_000}


def test_the_time_of_reads_is_unknown_where_a_tier_does_not_tell_it() -> None:
    (cache,) = caches(*TIERING, 'kv_offload_tiering_read_bytes_total{tier="2:obj"} 100').values()
    assert told(cache) == {"storage_read_bytes": 4196, "storage_write_bytes": 8192, "storage_write_ns": 1.5}


def test_a_second_offloading_connector_is_a_cache_of_its_own_and_never_added_to_the_first() -> None:
    found = caches(
        'kv_offload_total_bytes_total{transfer_type="CPU_to_GPU"} 1000',
        'kv_offload_total_bytes_total{transfer_type="GPU_to_CPU"} 2000',
        'kv_offload_total_bytes_sharedstorage_total{transfer_type="SHARED_STORAGE_to_GPU"} 30',
        'kv_offload_total_time_sharedstorage_total{transfer_type="SHARED_STORAGE_to_GPU"} 0.5',
        'kv_offload_total_bytes_sharedstorage_total{transfer_type="GPU_to_SHARED_STORAGE"} 50',
        'kv_offload_size_sharedstorage_count{transfer_type="GPU_to_SHARED_STORAGE"} 3',
    )
    assert list(found) == ["h:1/0/kv_offload", "h:1/0/sharedstorage/kv_offload"]
    assert told(found["h:1/0/kv_offload"]) == {"load_bytes": 1000, "store_bytes": 2000}
    assert told(found["h:1/0/sharedstorage/kv_offload"]) == {
        "load_bytes": 30,
        "load_ns": 0.5,
        "store_bytes": 50,
        "stores": 3,
        "storage_read_bytes": 30,
        "storage_read_ns": 0.5,
        "storage_write_bytes": 50,
    }


def test_a_second_connector_since_0_24_reads_storage_where_its_name_says_so() -> None:
    found = caches(
        "kv_offload_load_bytes_total 1000",
        "kv_offload_load_bytes_sharedstorage_total 30",
        "kv_offload_load_bytes_other_total 4",
    )
    assert told(found["h:1/0/kv_offload"]) == {"load_bytes": 1000}
    assert told(found["h:1/0/sharedstorage/kv_offload"]) == {"load_bytes": 30, "storage_read_bytes": 30}
    assert told(found["h:1/0/other/kv_offload"]) == {"load_bytes": 4}


def test_transfers_between_pods_are_a_cache_that_says_so() -> None:
    (cache,) = caches(
        "nixl_bytes_transferred_sum 4096",
        "nixl_bytes_transferred_count 3",
        "nixl_xfer_time_seconds_sum 0.25",
        "nixl_xfer_time_seconds_count 3",
        "nixl_num_failed_transfers_total 1",
        "nixl_num_kv_expired_reqs_total 2",
    ).values()
    assert (cache.name, cache.epoch) == ("h:1/0/nixl", 17)
    assert cache.attributes == {"cache": "nixl", "model": "m", "transfer": "1"}
    assert told(cache) == {"load_bytes": 4096, "load_ns": 0.25, "loads": 3}
    assert details(cache) == {"failed_transfers": 1, "expired_requests": 2}


def test_mooncakes_store_tells_whole_batches_and_its_transfers_are_another_cache() -> None:
    found = caches(
        'mooncake_store_operation_bytes_total{operation="load_get",status="ok"} 1024',
        'mooncake_store_operation_bytes_total{operation="load_get",status="partial_failure"} 99',
        'mooncake_store_operation_bytes_total{operation="save_put",status="ok"} 2048',
        'mooncake_store_operation_time_seconds_sum{operation="load_get",status="ok"} 0.5',
        'mooncake_store_operation_time_seconds_sum{operation="lookup_exists",status="ok"} 77',
        'mooncake_store_operation_total{operation="load_get",status="ok"} 2',
        "mooncake_bytes_transferred_sum 11",
    )
    assert list(found) == ["h:1/0/mooncake_store", "h:1/0/mooncake"]
    store, transfers = found.values()
    assert told(store) == {
        "loads": 2,
        "load_ns": 0.5,
        "load_bytes": 1024,
        "store_bytes": 2048,
        "storage_read_bytes": 1024,
        "storage_read_ns": 0.5,
        "storage_write_bytes": 2048,
    }
    assert "transfer" not in store.attributes
    assert (told(transfers), transfers.attributes["transfer"]) == ({"load_bytes": 11}, "1")


def test_a_3fs_connector_tells_times_and_operations() -> None:
    (cache,) = caches(
        "hf3fs_load_duration_seconds_sum 1.5",
        "hf3fs_load_duration_seconds_count 3",
        "hf3fs_save_duration_seconds_sum 2.5",
        "hf3fs_save_duration_seconds_count 4",
    ).values()
    assert told(cache) == {"loads": 3, "load_ns": 1.5, "stores": 4, "store_ns": 2.5}


@pytest.mark.parametrize("phase", ["", '{phase="completed"}'])
def test_simple_offloading_counts_blocks_which_stay_blocks(phase: str) -> None:
    (cache,) = caches(
        f"simple_kv_offload_load_blocks_total{phase} 5",
        'simple_kv_offload_load_blocks_total{phase="issued"} 6' if phase else "num_preemptions_total 0",
        'simple_kv_offload_save_outcomes_total{outcome="stored"} 7',
        'simple_kv_offload_save_outcomes_total{outcome="dropped_cpu_full"} 8',
        'simple_kv_offload_info{backend="disk",capacity_blocks="64",lazy_offload="false",page_cache="true"} 1',
    ).values()
    assert (told(cache), details(cache)) == ({}, {"loaded_blocks": 5, "stored_blocks": 7})
    assert cache.attributes == {
        "cache": "vllm kv_offload",
        "model": "m",
        "backend": "disk",
        "capacity_blocks": "64",
        "lazy_offload": "false",
        "page_cache": "true",
    }


def test_the_room_of_the_offloading_tier_is_told_by_its_labels() -> None:
    (cache,) = caches(
        "kv_offload_load_bytes_total 5",
        'kv_offload_config_info{cpu_kv_cache_size_bytes="1048576",cpu_kv_cache_size_tokens="8192",tier="primary"} 1',
        "kv_offload_lookup_sync_delay_seconds_sum 0.5",
        "kv_offload_lookup_async_delay_seconds_sum 0.25",
    ).values()
    assert cache.attributes["cpu_kv_cache_size_bytes"] == "1048576"
    assert cache.attributes["cpu_kv_cache_size_tokens"] == "8192"
    assert details(cache) == {"lookup_ns": 500_000_000, "lookup_wait_ns": 250_000_000}


def test_labels_alone_are_no_cache() -> None:
    assert caches('kv_offload_config_info{cpu_num_chunks="64"} 1') == {}


def test_time_spent_asking_lmcache_and_what_sparse_decoding_fetches_are_details_of_the_engine() -> None:
    page = START + (
        'vllm:lmcache_mp_lookup_duration_seconds_sum{engine="0",model_name="m"} 0.5\n'
        'vllm:hisparse_host_to_device_bytes_total{engine="0",model_name="m"} 77\n'
    )
    (reading,) = PageMapper("h:1", [VllmMapping()]).read(page.encode())
    assert details(reading) == {"lmcache_lookup_ns": 500_000_000, "hisparse_load_bytes": 77}


def test_quantities_are_told_by_the_counters_of_the_newest_page() -> None:
    by_source = "vllm:prompt_tokens_by_source_total"
    assert counters_of(["hbm_tokens"]) == [f'{by_source}{{source="local_cache_hit"}}']
    assert counters_of(["computed_tokens", "steps", "hbm_tokens"]) == [by_source, "vllm:iteration_tokens_total_count"]
    assert counters_of(["prefill_ns", "step_tokens"]) == [
        "vllm:request_prefill_time_seconds_sum",
        "vllm:iteration_tokens_total_sum",
    ]
    assert counters_of(["no quantity"]) == ["no quantity"]
