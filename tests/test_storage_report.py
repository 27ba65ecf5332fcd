from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, START, new_ledger, reader_of, url_of

from kvtally.agent.accounts import Window
from kvtally.agent.interval import Interval, State, opened
from kvtally.agent.ledger.append import Closed, LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.storage_report import storage_report
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.command_line import Call

    from kvtally.collectors.base import Kind

# 32 layers x 8 heads x 128 x 2 (keys and values) x 2 bytes: 131,072 bytes of KV a token
SHAPE = json.dumps(
    {
        "architecture": "LlamaForCausalLM",
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "kv_dtype": "bfloat16",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "weight_dtype": "bfloat16",
    },
    sort_keys=True,
)
NFS = {"source": "nfs mountstats", "device": "10.0.0.7:/kv", "fstype": "nfs4", "mounts": "/kv", "paths": "/kv/cache"}
DISK = {"source": "diskstats", "mounts": "/"}
MP = {"cache": "lmcache multiprocess", "source": "lmcache", "engines": "10.0.0.1:8000"}
ENGINE = {"engine": "vllm", "model": "llama-8b", "shape": SHAPE}


class Book:
    """A ledger whose targets have intervals end to end."""

    def __init__(self, folder: Path) -> None:
        self.path = new_ledger(folder)
        self._states: dict[tuple[str, str], State] = {}
        self.target("engine", "10.0.0.1:8000/0", {"engine": "vllm"})

    def target(
        self, kind: Kind, name: str, attributes: Mapping[str, str], *, seconds: int = 20, **counted: int
    ) -> None:
        """Append an interval; times are given in nanoseconds, as the ledger has them."""
        names = [quantity.name for quantity in QUANTITIES[kind]]
        assert not counted.keys() - set(names)
        reading = Reading(kind, name, attributes, (0.0,) * len(names))
        with closing(LedgerWriter(connect(self.path), self.path)) as writer:
            if (kind, name) not in self._states:
                self._states[kind, name] = opened(reading, START)
                writer.append([Closed(reading, None, self._states[kind, name])])
            start_ns = self._states[kind, name].taken_at_ns
            end_ns = start_ns + seconds * SECOND
            interval = Interval(start_ns, end_ns, tuple(counted.get(each) for each in names), (), 0, 0, None)
            self._states[kind, name] = self._states[kind, name]._replace(taken_at_ns=end_ns)
            writer.append([Closed(reading, interval, self._states[kind, name])])

    def report(self, window: Window | None = None) -> dict[str, Any]:
        with closing(reader_of(self.path)) as reader:
            return storage_report(reader, window)

    def cache(self) -> dict[str, Any]:
        (one,) = self.report()["caches"]
        assert isinstance(one, dict)
        return one

    def mount(self, name: str = "/kv") -> dict[str, Any]:
        (one,) = [each for each in self.report()["mounts"] if each["name"] == name]
        assert isinstance(one, dict)
        return one


@pytest.fixture
def book(tmp_path: Path) -> Book:
    return Book(tmp_path)


def test_what_a_cache_counts_is_measured_and_its_bandwidth_follows(book: Book) -> None:
    book.target(
        "cache",
        "10.0.0.1:8080/lmcache_mp",
        MP,
        lookup_tokens=9000,
        lookup_hit_tokens=8000,
        dram_hit_tokens=5000,
        disk_hit_tokens=3000,
        load_bytes=8 * 10**9,
        load_ns=SECOND // 2,
        loads=40,
        storage_read_bytes=3 * 10**9,
        storage_read_ns=2 * SECOND,
    )
    assert book.cache() == {
        "name": "10.0.0.1:8080/lmcache_mp",
        "cache": "lmcache multiprocess",
        "engines": ["10.0.0.1:8000"],
        "tokens": {
            "looked_up": 9000,
            "found": 8000,
            "found_in_dram": 5000,
            "found_on_storage": 3000,
            "loaded": None,
            "stored": None,
        },
        "load": {
            "bytes": 8 * 10**9,
            "seconds": 0.5,
            "operations": 40,
            "gigabytes_per_second": 16.0,
            "mean_milliseconds": 12.5,
            "basis": "MEASURED",
        },
        "store": unknown(),
        "storage_read": {
            "bytes": 3 * 10**9,
            "seconds": 2.0,
            "operations": None,
            "gigabytes_per_second": 1.5,
            "mean_milliseconds": None,
            "basis": "MEASURED",
        },
        "storage_write": unknown(),
    }


def unknown() -> dict[str, None]:
    keys = ("bytes", "seconds", "operations", "gigabytes_per_second", "mean_milliseconds", "basis")
    return dict.fromkeys(keys)


def test_bytes_that_a_cache_does_not_count_are_modelled_from_its_tokens_and_the_models_shape(book: Book) -> None:
    book.target("engine", "10.0.0.1:8000/0", ENGINE)
    about = {"cache": "lmcache in-process", "source": "lmcache"}
    book.target(
        "cache", "10.0.0.1:8000/lmcache", about, loaded_tokens=1000, load_ns=SECOND // 100, disk_hit_tokens=10, loads=2
    )
    cache = book.cache()
    assert cache["engines"] == ["10.0.0.1:8000"]  # of the same page
    # 131,072,000 bytes in 10 ms
    assert cache["load"] == {
        "bytes": 131_072_000,
        "seconds": 0.01,
        "operations": 2,
        "gigabytes_per_second": 13.1072,
        "mean_milliseconds": 5.0,
        "basis": "MODELLED",
    }
    assert (cache["storage_read"]["bytes"], cache["storage_read"]["basis"]) == (1_310_720, "MODELLED")
    assert cache["store"]["bytes"] is None


@pytest.mark.parametrize("engines", ["10.0.0.1:8000,10.0.0.2:8000", "nobody:8000"])
def test_nothing_is_modelled_where_the_bytes_of_a_token_are_not_known_or_differ(book: Book, engines: str) -> None:
    book.target("engine", "10.0.0.1:8000/0", ENGINE)
    narrow = SHAPE.replace('"kv_dtype": "bfloat16"', '"kv_dtype": "fp8"')
    book.target("engine", "10.0.0.2:8000/0", ENGINE | {"shape": narrow})
    book.target("cache", "h:8080/lmcache_mp", MP | {"engines": engines}, loaded_tokens=1000, load_ns=SECOND)
    load = book.cache()["load"]
    assert (load["bytes"], load["seconds"], load["basis"]) == (None, 1.0, None)


def test_what_a_mount_gave_from_a_page_cache_is_what_programs_read_and_the_device_did_not(book: Book) -> None:
    book.target(
        "filesystem",
        "/kv",
        NFS,
        app_read_bytes=10**9,
        read_bytes=25 * 10**7,
        reads=50,
        read_ns=SECOND // 10,
        write_bytes=100,
        writes=1,
    )
    assert book.mount() == {
        "name": "/kv",
        "fstype": "nfs4",
        "mounts": "/kv",
        "kv_paths": ["/kv/cache"],
        "app_bytes": 10**9,
        "app_bytes_source": "nfs mountstats",
        "device_bytes": 25 * 10**7,
        "device_bytes_source": "nfs mountstats",
        "page_cache_share": 0.75,
        "read": {
            "bytes": 25 * 10**7,
            "seconds": 0.1,
            "operations": 50,
            "gigabytes_per_second": 2.5,
            "mean_milliseconds": 2.0,
        },
        "write": {
            "bytes": 100,
            "seconds": None,
            "operations": 1,
            "gigabytes_per_second": None,
            "mean_milliseconds": None,
        },
        "mean_read_bytes_per_second": 12_500_000,
    }


def test_a_cache_that_counts_its_own_reads_tells_them_of_the_one_mount_that_holds_kv(book: Book) -> None:
    book.target("cache", "h:8080/lmcache_mp", MP, storage_read_bytes=400)
    book.target("filesystem", "/kv", NFS, app_read_bytes=1000, read_bytes=100)
    book.target("filesystem", "vda", DISK, read_bytes=5000)
    mount, disk = book.mount(), book.mount("vda")
    assert (mount["app_bytes"], mount["app_bytes_source"]) == (400, "the cache's own counter")
    assert mount["page_cache_share"] == 0.75
    assert (disk["app_bytes"], disk["app_bytes_source"], disk["page_cache_share"]) == (None, None, None)
    # of two mounts nobody knows which of them a cache read
    book.target("filesystem", "/kv2", NFS | {"mounts": "/kv2", "paths": "/kv2"}, app_read_bytes=2000, read_bytes=100)
    mount = book.mount()
    assert (mount["app_bytes"], mount["app_bytes_source"], mount["page_cache_share"]) == (1000, "nfs mountstats", 0.9)


def test_a_cache_that_counts_no_reads_leaves_the_word_to_the_filesystem(book: Book) -> None:
    """LMCache in-process counts its remote store alone: its 0 says nothing of a local disk."""
    book.target("cache", "h:8000/lmcache", MP, storage_read_bytes=0)
    book.target("filesystem", "/kv", NFS, app_read_bytes=1000, read_bytes=400)
    mount = book.mount()
    assert (mount["app_bytes"], mount["page_cache_share"]) == (1000, 0.6)


def test_a_device_that_gave_more_than_was_asked_for_is_a_finding_and_no_share(book: Book) -> None:
    book.target("filesystem", "/kv", NFS, app_read_bytes=1000, read_bytes=1001)
    assert book.mount()["page_cache_share"] is None
    (finding,) = book.report()["findings"]
    assert (finding["kind"], finding["target"]) == ("more_read_than_asked", "filesystem//kv")
    assert finding["message"].startswith("1,001 bytes came from the device and programs asked for 1,000: ")


@pytest.mark.parametrize(
    ("counted", "app", "device", "share"),
    [
        ({}, None, None, None),
        ({"app_read_bytes": 1000}, 1000, None, None),
        ({"read_bytes": 1000}, None, 1000, None),
        ({"app_read_bytes": 0, "read_bytes": 0}, 0, 0, None),
        ({"app_read_bytes": 1000, "read_bytes": 0}, 1000, 0, 1.0),
        ({"app_read_bytes": 1000, "read_bytes": 1000}, 1000, 1000, 0.0),
    ],
)
def test_what_is_not_known_is_null_and_never_0(
    book: Book, counted: dict[str, int], app: int | None, device: int | None, share: float | None
) -> None:
    book.target("filesystem", "/kv", NFS, **counted)
    mount = book.mount()
    assert (mount["app_bytes"], mount["device_bytes"], mount["page_cache_share"]) == (app, device, share)
    assert (mount["app_bytes_source"] is None) == (app is None)
    assert (mount["device_bytes_source"] is None) == (device is None)
    assert book.report()["findings"] == []


def test_a_target_whose_attributes_changed_is_one_line_with_the_sum(book: Book) -> None:
    book.target("engine", "10.0.0.1:8000/0", {"engine": "vllm"})  # a window ends with the engines' last interval
    book.target("filesystem", "/kv", NFS, read_bytes=100)
    book.target("filesystem", "/kv", NFS | {"paths": "/kv/cache,/kv/more"}, read_bytes=11)
    mount = book.mount()
    assert (mount["device_bytes"], mount["kv_paths"]) == (111, ["/kv/cache", "/kv/more"])


def test_a_window_takes_what_starts_in_it(book: Book) -> None:
    book.target("filesystem", "/kv", NFS, seconds=3600, read_bytes=100)
    book.target("filesystem", "/kv", NFS | {"paths": "/kv"}, read_bytes=11)
    report = book.report(Window(START + HOUR, START + 2 * HOUR))
    assert [one["device_bytes"] for one in report["mounts"]] == [11]
    assert report["window"]["start"] == "2026-11-23T05:00:00.000Z"


def test_a_ledger_without_an_interval_tells_nothing(tmp_path: Path, kvtally: Call) -> None:
    path = new_ledger(tmp_path, "empty.db")
    with closing(reader_of(path)) as reader:
        report = storage_report(reader, None)
    assert (report["caches"], report["mounts"], report["window"]["start"]) == ([], [], None)
    status, out, _ = kvtally("storage", "--ledger", url_of(path), "--format", "table")
    assert (status, out) == (0, "The ledger holds no interval yet.\n")


@pytest.mark.parametrize("columns", [80, 110])
def test_what_was_moved_is_shown(
    book: Book, kvtally: Call, golden: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    book.target("engine", "10.0.0.1:8000/0", ENGINE)
    book.target(
        "cache",
        "10.0.0.1:8080/lmcache_mp",
        MP,
        lookup_tokens=9_000_000,
        lookup_hit_tokens=8_000_000,
        dram_hit_tokens=5_000_000,
        disk_hit_tokens=3_000_000,
        storage_read_bytes=412 * 10**9,
        storage_read_ns=60 * SECOND,
    )
    book.target(
        "cache",
        "10.0.0.1:8000/lmcache",
        {"cache": "lmcache in-process", "source": "lmcache"},
        loaded_tokens=482_304,
        load_ns=1_386_192_922,
        loads=65,
    )
    book.target(
        "filesystem", "/kv", NFS, app_read_bytes=412 * 10**9, read_bytes=50 * 10**9, reads=400, read_ns=9 * SECOND
    )
    book.target("filesystem", "vda", DISK, read_bytes=12_935_168)
    monkeypatch.setenv("COLUMNS", str(columns))
    status, out, err = kvtally("storage", "--ledger", url_of(book.path), "--format", "table")
    assert (status, err) == (0, "")
    golden(f"storage-{columns}.txt", out)
