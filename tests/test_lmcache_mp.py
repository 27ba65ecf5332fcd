from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError
from kvtally.collectors.lmcache_mp import FAMILIES, NOT_READ, LmcacheMpMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE
from kvtally.collectors.registry import reader_class, sources_on

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

FIXTURES = Path(__file__).parent / "fixtures"
COPYING = (FIXTURES / "pages" / "lmcache-mp-056" / "1795411521053.prom").read_text()
PAGES = FIXTURES / "recordings" / "lmcache-mp-dram-disk" / "lmcache"
NAMES = tuple(quantity.name for quantity in CACHE)


def read(page: str) -> Reading:
    (reading,) = PageMapper("10.0.0.1:8180", [LmcacheMpMapping()]).read(page.encode())
    return reading


def known(reading: Reading) -> dict[str, float]:
    return {name: value for name, value in zip(NAMES, reading.values, strict=True) if value is not None}


def details(reading: Reading) -> dict[str, float]:
    return dict(zip(reading.detail_names, reading.details, strict=True))


def sample(name: str, value: float, **labels: str) -> str:
    told = ",".join(f'{key}="{text}"' for key, text in {**labels, "otel_scope_name": "lmcache"}.items())
    return f"lmcache_mp_{name}{{{told}}} {value}\n"


def test_a_server_that_has_served_nothing_tells_what_it_holds_and_when_it_began() -> None:
    reading = read((PAGES / "1795411552665.prom").read_text())
    assert (reading.kind, reading.name, reading.epoch) == ("cache", "10.0.0.1:8180/lmcache_mp", 1795411523.41)
    assert reading.attributes == {"source": "lmcache_mp", "cache": "lmcache multiprocess"}
    assert known(reading) == {"used_bytes": 0}


def test_lookups_are_told_by_tier() -> None:
    """Read off the page by eye."""
    reading = read((PAGES / "1795411587707.prom").read_text())
    assert known(reading) == {
        "lookup_tokens": 78848,
        "lookup_hit_tokens": 43776,
        "dram_hit_tokens": 33792,
        "disk_hit_tokens": 9984,
        "used_bytes": 28311552,
    }
    assert reading.attributes["models"] == "models/small"
    told = details(reading)
    assert (told["l2_loaded_chunks"], told["l2_stored_chunks"], told["event_bus_dropped_events"]) == (39, 131, 0)
    assert told["l2_load_rates"] == 13
    assert told["l2_load_rates_mb_per_s"] == pytest.approx(32669.44, abs=0.01)


def test_a_server_that_copies_for_the_engine_counts_its_loads_and_stores() -> None:
    reading = read(COPYING)
    assert {name: known(reading)[name] for name in ("loads", "stores")} == {"loads": 9, "stores": 59}
    assert details(reading)["loaded_chunks"] == 27
    assert "loaded_tokens" not in known(reading)  # nothing tells how many tokens a chunk has


def test_copies_are_those_of_the_staging_phase_over_all_gpus() -> None:
    page = ""
    for name, moved in (("transfer_phase_bytes_total", 1000), ("transfer_phase_elapsed_seconds_total", 0.5)):
        for device in ("0", "1"):
            page += sample(name, moved, phase="staging", direction="h2d", device_index=device)
            page += sample(name, moved * 2, phase="staging", direction="d2h", device_index=device)
            page += sample(name, moved * 100, phase="kernel", direction="h2d", device_index=device)
    found = known(read(page))
    assert found == {"load_bytes": 2000, "load_ns": 1, "store_bytes": 4000, "store_ns": 2}  # seconds of both GPUs


@pytest.mark.parametrize("spelling", ["lmcache_mp_lookup_hit_l1_tokens_total", "lmcache_mp_lookup_hit_l1_total"])
def test_a_counter_is_read_with_its_unit_and_without(spelling: str) -> None:
    assert known(read(f'{spelling}{{model_name="m"}} 512\n')) == {"dram_hit_tokens": 512}


def test_where_both_spellings_are_there_one_counts() -> None:
    page = sample("lookup_hit_tokens_total", 512, model_name="m") + sample("lookup_hit_total", 512, model_name="m")
    assert known(read(page)) == {"lookup_hit_tokens": 512}


@pytest.mark.parametrize("name", ["lmcache_mp:l1_read_keys", "lmcache_mp_l1_read_keys_total"])
def test_early_releases_count_what_dram_served_in_keys(name: str) -> None:
    assert details(read(f"{name} 40.0\n")) == {"l1_read_chunks": 40}


def test_models_and_salts_are_parts_of_one_server() -> None:
    page = (
        sample("lookup_requested_tokens_total", 1000, model_name="models/a", cache_salt="")
        + sample("lookup_requested_tokens_total", 100, model_name="models/a", cache_salt="x")
        + sample("lookup_requested_tokens_total", 10, model_name="models/b", cache_salt="")
    )
    reading = read(page)
    assert (known(reading), reading.attributes["models"]) == ({"lookup_tokens": 1110}, "models/a,models/b")


def test_a_page_tells_that_it_is_such_a_server_and_not_lmcache_in_an_engine() -> None:
    assert sources_on(COPYING.encode()) == ("lmcache_mp",)
    assert sources_on(b"lmcache_mp:l1_read_keys 40.0\n") == ("lmcache_mp",)
    assert reader_class("lmcache_mp") is LmcacheMpMapping


def test_a_page_with_a_start_time_alone_holds_nothing() -> None:
    with pytest.raises(CollectError, match="no family that kvtally reads"):
        read("process_start_time_seconds 1.0\n")


def test_what_is_not_read_says_why() -> None:
    assert all(reason for _, reason in NOT_READ)
    assert not {name for name, _ in NOT_READ} & {family.sample for family in FAMILIES}
