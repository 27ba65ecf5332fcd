from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError
from kvtally.collectors.lmcache import NOT_READ, LmcacheMapping, is_unhealthy
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import CACHE
from kvtally.collectors.side_page import SidePage
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading
    from kvtally.collectors.http import Response

PAGES = Path(__file__).parent / "fixtures" / "pages"
RECORDED = (PAGES / "h100-v025-lmcache" / "1795409582483.prom").read_text()
NAMES = tuple(quantity.name for quantity in CACHE)

# Read off the page by eye. One H100, LMCache in DRAM: nothing went to a remote backend.
EXPECTED: dict[str, float | None] = {
    "lookup_tokens": 4483584,
    "lookup_hit_tokens": 2141440,
    "requested_tokens": 482304,
    "loaded_tokens": 482304,
    "stored_tokens": 2341376,
    "loads": 65,
    "stores": 596,
    "load_ns": 1.3861929219998501,
    "store_ns": 8.988765739000655,
    "load_bytes": None,
    "store_bytes": None,
    "used_bytes": 64424509440,
    "dram_hit_tokens": None,
    "disk_hit_tokens": None,
    "storage_read_bytes": 0,
    "storage_read_ns": None,
    "storage_write_bytes": 0,
    "storage_write_ns": None,
}


class Nowhere:
    """An endpoint that nobody asks."""

    url = ""

    def get(self, target: str | None = None) -> Response:
        raise CollectError(f"nothing is served at {target}")

    def close(self) -> None:
        pass


def read(page: str) -> tuple[Reading, ...]:
    return PageMapper("host:8000", [LmcacheMapping()], "0.25.1").read(page.encode())


def values(reading: Reading) -> dict[str, float | None]:
    return dict(zip(NAMES, reading.values, strict=True))


def sample(name: str, value: float | str, worker: int = 0, role: str = "worker", model: str = "m") -> str:
    labels = f'model_name="models/{model}",role="{role}",served_model_name="{model}",worker_id="{worker}"'
    return f"lmcache:{name}{{{labels}}} {value}\n"


def test_every_quantity_of_a_recorded_page_is_as_the_page_tells_it() -> None:
    (reading,) = read(RECORDED)
    assert values(reading) == EXPECTED
    assert (reading.kind, reading.name) == ("cache", "host:8000/lmcache")
    assert reading.attributes == {"source": "lmcache", "cache": "lmcache in-process", "model": "llama-8b"}
    assert (reading.epoch, reading.detail_names, reading.details) == (None, (), ())


def test_engine_and_cache_of_one_page_are_two_readings() -> None:
    readings = PageMapper("host:8000", [VllmMapping(), LmcacheMapping()]).read(RECORDED.encode())
    assert [(reading.kind, reading.name) for reading in readings] == [
        ("engine", "host:8000/0"),
        ("cache", "host:8000/lmcache"),
    ]
    assert values(readings[1]) == EXPECTED


def test_a_page_in_the_rewritten_spelling_gives_the_same_reading() -> None:
    rewritten = re.sub(r"^lmcache:", "lmcache_", RECORDED, flags=re.MULTILINE)
    assert read(rewritten) == read(RECORDED)


def test_families_of_the_multiprocess_server_are_not_mistaken_for_these() -> None:
    page = sample("num_lookup_tokens_total", 5) + "lmcache_mp_lookup_tokens_total 7\nlmcache_mp_num_lookups_total 9\n"
    assert values(read(page)[0])["lookup_tokens"] == 5
    assert not LmcacheMapping().wants("lmcache_mp_num_lookup_tokens_total")


@pytest.mark.parametrize(
    ("family", "quantity"),
    [
        ("num_lookup_tokens_total", "lookup_tokens"),
        ("num_lookup_hits_total", "lookup_hit_tokens"),
        ("num_requested_tokens_total", "requested_tokens"),
        ("num_hit_tokens_total", "loaded_tokens"),
        ("num_stored_tokens_total", "stored_tokens"),
        ("num_retrieve_requests_total", "loads"),
        ("num_store_requests_total", "stores"),
        ("time_to_retrieve_sum", "load_ns"),
        ("time_to_store_sum", "store_ns"),
    ],
)
def test_what_every_worker_counts_alike_is_counted_once(family: str, quantity: str) -> None:
    page = "".join(sample(family, count, worker) for worker, count in enumerate((256, 768, 512, 768)))
    (reading,) = read(page)
    assert values(reading) == dict.fromkeys(NAMES) | {quantity: 768}


@pytest.mark.parametrize(
    ("family", "quantity"),
    [
        ("num_remote_read_bytes_total", "storage_read_bytes"),
        ("num_remote_write_bytes_total", "storage_write_bytes"),
        ("local_cache_usage", "used_bytes"),
    ],
)
def test_bytes_of_the_workers_shards_add_up(family: str, quantity: str) -> None:
    page = "".join(sample(family, count, worker) for worker, count in enumerate((100, 200, 300, 400)))
    (reading,) = read(page)
    assert values(reading) == dict.fromkeys(NAMES) | {quantity: 1000}


def test_the_scheduler_s_share_is_neither_lost_nor_counted_twice() -> None:
    page = (
        sample("num_lookup_tokens_total", 4096, 0, "scheduler")
        + sample("num_lookup_tokens_total", 0, 0, "worker")
        + sample("num_hit_tokens_total", 1024, 0, "worker")
        + sample("num_hit_tokens_total", 1024, 1, "worker")
        + sample("num_hit_tokens_total", 0, 0, "scheduler")
    )
    (reading,) = read(page)
    assert (values(reading)["lookup_tokens"], values(reading)["loaded_tokens"]) == (4096, 1024)


def test_old_releases_without_role_and_served_name_are_read_by_their_model_name() -> None:
    (reading,) = read('lmcache:num_lookup_tokens_total{model_name="models/m",worker_id="0"} 5\n')
    assert (reading.name, reading.attributes["model"]) == ("host:8000/lmcache", "models/m")
    assert values(reading)["lookup_tokens"] == 5


def test_two_models_are_two_caches() -> None:
    first, second = read(sample("num_hit_tokens_total", 3, model="a") + sample("num_hit_tokens_total", 4, model="b"))
    assert (first.name, values(first)["loaded_tokens"]) == ("host:8000/lmcache/a", 3)
    assert (second.name, values(second)["loaded_tokens"]) == ("host:8000/lmcache/b", 4)


def test_a_series_belongs_to_one_model_only() -> None:
    page = sample("local_cache_usage", 10, model="m") + 'lmcache:local_cache_usage{model_name="models/m"} 7\n'
    first, second = read(page)
    assert (first.attributes["model"], values(first)["used_bytes"]) == ("m", 10)
    assert (second.attributes["model"], values(second)["used_bytes"]) == ("models/m", 7)


@pytest.mark.parametrize("bad", ["NaN", "+Inf"])
def test_one_worker_that_tells_no_number_makes_its_quantity_unknown(bad: str) -> None:
    page = (
        sample("num_hit_tokens_total", 3, 0) + sample("num_hit_tokens_total", bad, 1) + sample("time_to_store_sum", 2)
    )
    found = values(read(page)[0])
    assert math.isnan(found["loaded_tokens"] or 0)
    assert found | {"loaded_tokens": None} == dict.fromkeys(NAMES) | {"store_ns": 2}


def test_an_engine_without_lmcache_has_no_cache_reading() -> None:
    page = (PAGES / "cpu-v016" / "1795410049451.prom").read_text()
    with pytest.raises(CollectError, match="no family that kvtally reads"):
        read(page)
    readings = PageMapper("host:8000", [VllmMapping(), LmcacheMapping()]).read(page.encode())
    assert [reading.kind for reading in readings] == ["engine"]


def test_a_restricted_scrape_asks_for_every_sample_that_the_recorded_page_is_read_for() -> None:
    asked = set(LmcacheMapping().names())
    kept = [line for line in RECORDED.splitlines() if re.split(r"[ {]", line)[0] in asked]
    assert len(kept) == 12
    assert read("\n".join(kept) + "\n") == read(RECORDED)


def test_milliseconds_at_a_remote_backend_become_seconds_that_add_up_over_workers() -> None:
    page = "".join(
        sample("remote_time_to_get_sum", 1500, worker) + sample("remote_time_to_put_sum", 250, worker)
        for worker in range(2)
    )
    found = values(read(page)[0])
    assert (found["storage_read_ns"], found["storage_write_ns"]) == (3.0, 0.5)  # seconds: the ledger makes ns of them


def test_a_worker_s_internal_port_is_a_page_of_its_own_that_tells_when_its_process_began() -> None:
    page = sample("num_hit_tokens_total", 512, 1) + "process_start_time_seconds 1.79541152341e+09\n"
    (reading,) = SidePage("10.0.0.1:7001", Nowhere()).read(page.encode())
    assert (reading.name, reading.epoch) == ("10.0.0.1:7001/lmcache", 1795411523.41)
    assert values(reading)["loaded_tokens"] == 512


def test_every_family_that_is_not_read_says_why_and_is_not_read() -> None:
    read_here = set(LmcacheMapping().names())
    assert all(reason for _, reason in NOT_READ)
    assert not read_here & {name for name, _ in NOT_READ}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("lmcache:lmcache_is_healthy 0.0\n", True),
        ('lmcache:lmcache_is_healthy{pid="12"} 1.0\nlmcache:lmcache_is_healthy{pid="13"} 0.0\n', True),
        ("lmcache_lmcache_is_healthy 0\n", True),
        ("lmcache:lmcache_is_healthy 1.0\n", False),
        ("# HELP lmcache:lmcache_is_healthy The health status of LMCache (1=healthy, 0=unhealthy) 0\n", False),
        ("lmcache:num_hit_tokens_total 0.0\n", False),
        ("", False),
    ],
)
def test_a_page_says_whether_lmcache_is_out_of_order(lines: str, expected: bool) -> None:
    assert is_unhealthy(f"vllm:prompt_tokens_total 5.0\n{lines}".encode()) is expected
