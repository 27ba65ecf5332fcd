from __future__ import annotations

import pytest

from kvtally.agent.interval import RESET, close, opened
from kvtally.collectors.base import CollectError, Reading
from kvtally.collectors.quantities import FILESYSTEM, index
from kvtally.collectors.registry import SOURCES, reader_class, sources_on
from kvtally.collectors.weka import WekaReader

GB = 10**9


class Clock:
    """Shows what it is set to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def page(fs: str = "org1fs1", read: float = 3.887e9, reads: float = 59315.97, latency: float = 1958.06) -> str:
    """As WEKA's exporter shows a filesystem under random reads (smith-22, 4.4)."""
    labels = f'cluster="smith-22",fs_id="2",fs_name="{fs}"'
    return f"""\
weka_fs_stats{{{labels},stat="READS",unit="iops"}} {reads}
weka_fs_stats{{{labels},stat="READ_BYTES",unit="bytespersec"}} {read}
weka_fs_stats{{{labels},stat="READ_LATENCY",unit="microsecs"}} {latency}
weka_fs_stats{{{labels},stat="THROUGHPUT",unit="bytespersec"}} {read}
weka_fs_stats{{{labels},stat="WRITES",unit="iops"}} 0.0
weka_fs_stats{{{labels},stat="WRITE_BYTES",unit="bytespersec"}} 0.0
"""


def node_page(*rates: float) -> str:
    """An exporter that shows no filesystems: rates by node, with the instant of the statistic."""
    return "".join(
        f'weka_stats{{category="ops",cluster="c",host_name="h",host_role="server",node_id="NodeId<{node}>",'
        f'node_role="FRONTEND",stat="READ_BYTES",unit="bytespersec"}} {rate} 1629127380000\n'
        f'weka_stats{{category="ops",cluster="c",host_name="h",host_role="server",node_id="NodeId<{node}>",'
        f'node_role="FRONTEND",stat="READ_LATENCY",unit="microsecs"}} 500.0 1629127380000\n'
        f'weka_stats{{category="object_storage",cluster="c",host_name="h",host_role="server",node_id="NodeId<{node}>",'
        f'node_role="FRONTEND",stat="READ_BYTES",unit="bytespersec"}} 7e9 1629127380000\n'
        for node, rate in enumerate(rates)
    )


def known(reading: Reading) -> dict[str, float]:
    values = zip((quantity.name for quantity in FILESYSTEM), reading.values, strict=True)
    return {name: value for name, value in values if value is not None}


def test_a_rate_stands_for_the_time_since_the_page_before() -> None:
    clock = Clock()
    reader = WekaReader(clock)
    (first,) = reader.read(page().encode())
    assert set(known(first).values()) == {0}
    clock.now += 10
    reader.read(page(read=2 * GB, reads=1000, latency=500).encode())
    clock.now += 5
    (reading,) = reader.read(page(read=4 * GB, reads=3000, latency=200).encode())
    assert known(reading) == {
        "read_bytes": 40 * GB,  # 10 s of 2 GB/s, 5 s of 4
        "reads": 25000,  # 10 s of 1000, 5 s of 3000
        "read_ns": pytest.approx(5 + 3),  # 1000/s of 0.5 ms: half a second of waiting each second; then 3000 of 0.2 ms
        "write_bytes": 0,
        "writes": 0,
    }
    assert (reading.kind, reading.name) == ("filesystem", "weka:smith-22/org1fs1")
    assert reading.attributes == {
        "source": "weka",
        "basis": "gauge of a rate held over time",
        "cluster": "smith-22",
        "fs": "org1fs1",
    }


def test_a_rate_is_held_over_two_minutes_of_silence_and_no_more() -> None:
    clock = Clock()
    reader = WekaReader(clock)
    reader.read(page().encode())
    clock.now += 3600
    (reading,) = reader.read(page(read=1 * GB).encode())
    assert known(reading)["read_bytes"] == 120 * GB


def test_a_filesystem_that_is_not_on_a_page_keeps_its_sum() -> None:
    clock = Clock()
    reader = WekaReader(clock)
    reader.read((page("a") + page("b")).encode())
    clock.now += 1
    reader.read(page("a", read=5).encode())
    clock.now += 1
    first, second = reader.read((page("a", read=7) + page("b", read=11)).encode())
    assert (known(first)["read_bytes"], known(second)["read_bytes"]) == (12, 11)


def test_a_value_that_is_no_number_is_no_rate() -> None:
    clock = Clock()
    reader = WekaReader(clock)
    reader.read(page().encode())
    clock.now += 1
    (reading,) = reader.read(page(read=float("nan"), reads=-1, latency=100).encode())
    assert (known(reading)["read_bytes"], known(reading)["reads"], known(reading)["read_ns"]) == (0, 0, 0)


def test_after_a_restart_of_kvtally_the_sums_begin_anew_and_nothing_goes_backwards() -> None:
    at = index("filesystem", "read_bytes")
    clock = Clock()
    before = WekaReader(clock)
    before.read(page().encode())
    clock.now += 60
    (old,) = before.read(page(read=2 * GB).encode())
    clock.now += 10
    after = WekaReader(clock)
    after.read(page().encode())
    clock.now += 5
    (new,) = after.read(page(read=3 * GB).encode())
    interval, _, findings = close(opened(old, 1), new, 2)
    assert old.values[at] == 120 * GB
    assert interval.values[at] == 15 * GB
    assert interval.flags & RESET
    assert findings == []


def test_where_no_filesystem_is_told_the_nodes_rates_add_up_for_the_cluster() -> None:
    clock = Clock()
    reader = WekaReader(clock)
    reader.read(node_page(1.0, 2.0).encode())
    clock.now += 10
    (reading,) = reader.read(node_page(4e6, 1e6).encode())
    assert reading.name == "weka:c"
    assert known(reading) == {"read_bytes": 50e6}  # a mean wait of two nodes is no mean, and their tiering is no read


def test_where_filesystems_are_told_the_nodes_tell_the_same_bytes_once_more() -> None:
    reader = WekaReader(Clock())
    (reading,) = reader.read((node_page(5.0) + page()).encode())
    assert reading.name == "weka:smith-22/org1fs1"
    (reading,) = reader.read(node_page(5.0).encode())
    assert reading.name == "weka:smith-22/org1fs1"


def test_several_minutes_of_one_node_are_refused_with_the_setting_that_mends_it() -> None:
    with pytest.raises(CollectError, match="duplicate series") as refused:
        WekaReader(Clock()).read((node_page(5.0) + node_page(6.0)).encode())
    assert "datapoints_per_collect: 1" in refused.value.hint


def test_a_page_without_rates_says_what_to_add_to_the_exporter() -> None:
    with pytest.raises(CollectError, match="no rate") as refused:
        WekaReader(Clock()).read(b'weka_stats{category="cpu",cluster="c",stat="CPU_UTILIZATION",unit="%"} 5\n')
    assert "READ_BYTES" in refused.value.hint


def test_the_registry_hands_it_a_clock() -> None:
    assert sources_on(page().encode()) == ("weka",) == sources_on(node_page(1.0).encode())
    assert SOURCES["weka"].integrates
    assert reader_class("weka") is WekaReader
