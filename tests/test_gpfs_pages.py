from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import CollectError
from kvtally.collectors.gpfs_bridge import NOT_READ, StorageScaleBridge
from kvtally.collectors.gpfs_cluster import GpfsClusterMapping
from kvtally.collectors.gpfs_exporter import GpfsExporterMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.quantities import FILESYSTEM, index
from kvtally.collectors.registry import SOURCES, reader_class, sources_on

if TYPE_CHECKING:
    from kvtally.collectors.base import Reading

# treydock/gpfs_exporter, the page that its own test expects (collectors/mmpmon_test.go @ e38b801)
EXPORTER = """\
# HELP gpfs_perf_info GPFS client information
# TYPE gpfs_perf_info gauge
gpfs_perf_info{fs="project",nodename="ib-pitzer-rw02.ten"} 1
gpfs_perf_info{fs="scratch",nodename="ib-pitzer-rw02.ten"} 1
# HELP gpfs_perf_operations_total GPFS operationgs reported by mmpmon
# TYPE gpfs_perf_operations_total counter
gpfs_perf_operations_total{fs="project",operation="closes"} 513
gpfs_perf_operations_total{fs="project",operation="opens"} 513
gpfs_perf_operations_total{fs="project",operation="reads"} 0
gpfs_perf_operations_total{fs="project",operation="writes"} 0
gpfs_perf_operations_total{fs="scratch",operation="closes"} 2201576
gpfs_perf_operations_total{fs="scratch",operation="opens"} 2377656
gpfs_perf_operations_total{fs="scratch",operation="reads"} 59420404
gpfs_perf_operations_total{fs="scratch",operation="writes"} 18874626
# HELP gpfs_perf_read_bytes_total GPFS read bytes
# TYPE gpfs_perf_read_bytes_total counter
gpfs_perf_read_bytes_total{fs="project"} 0
gpfs_perf_read_bytes_total{fs="scratch"} 2.05607400434e+11
# HELP gpfs_perf_write_bytes_total GPFS write bytes
# TYPE gpfs_perf_write_bytes_total counter
gpfs_perf_write_bytes_total{fs="project"} 0
gpfs_perf_write_bytes_total{fs="scratch"} 7.4839282351e+10
"""
# its earlier releases name no _total, and the node with every count
EXPORTER_BEFORE = """\
gpfs_perf_operations{fs="scratch",nodename="rw02",operation="reads"} 59420404
gpfs_perf_operations{fs="scratch",nodename="rw02",operation="writes"} 18874626
gpfs_perf_read_bytes{fs="scratch",nodename="rw02"} 2.05607400434e+11
gpfs_perf_write_bytes{fs="scratch",nodename="rw02"} 7.4839282351e+10
"""
# plazonic/gpfs-exporter: one page for all nodes of a cluster, a blank between labels, explicit timestamps
CLUSTER = """\
# HELP gpfs_bytes_read GPFS bytes read
# TYPE gpfs_bytes_read counter
gpfs_bytes_read{fs="tiger2.gpfs", host="tiger-i23g14"} 3401130516933 1536005985350
gpfs_bytes_read{fs="tiger2.gpfs", host="tiger-i23g15"} 17 1536005985351
gpfs_bytes_write{fs="tiger2.gpfs", host="tiger-i23g14"} 525742920053 1536005985350
gpfs_bytes_write{fs="tiger2.gpfs", host="tiger-i23g15"} 0 1536005985351
gpfs_requests_read{fs="tiger2.gpfs", host="tiger-i23g14"} 1776360 1536005985350
gpfs_requests_write{fs="tiger2.gpfs", host="tiger-i23g14"} 5527815 1536005985350
gpfs_requests_open{fs="tiger2.gpfs", host="tiger-i23g14"} 14848149 1536005985350
"""
CLUSTER_LABELS = 'gpfs_cluster_name="c1.vmlocal",gpfs_fs_name="localFS"'


def bridge_page(sensor: str, kind: str = "counter", read: float = 73400320.0, at: int = 1737638280) -> str:
    """As the bridge's /metrics_gpfs_filesystem shows two nodes: values as floats, with the instant of the sensor."""
    labels = [f'node="scale-1{number}",{CLUSTER_LABELS}' for number in (1, 2)]
    return f"""\
# HELP gpfs_{sensor}_bytes_read Number of bytes read
# TYPE gpfs_{sensor}_bytes_read {kind}
gpfs_{sensor}_bytes_read{{{labels[0]}}} {read} {at}000
gpfs_{sensor}_bytes_read{{{labels[1]}}} 0.0 {at}000
# HELP gpfs_{sensor}_bytes_written Number of bytes written
# TYPE gpfs_{sensor}_bytes_written {kind}
gpfs_{sensor}_bytes_written{{{labels[0]}}} 1048576.0 {at}000
# TYPE gpfs_{sensor}_max_disk_wait_rd gauge
gpfs_{sensor}_max_disk_wait_rd{{{labels[0]}}} 0.5 {at}000
"""


def known(reading: Reading) -> dict[str, float]:
    values = zip((quantity.name for quantity in FILESYSTEM), reading.values, strict=True)
    return {name: value for name, value in values if value is not None}


def bridge(page: str) -> tuple[Reading, ...]:
    return StorageScaleBridge().read(page.encode())


SCRATCH = {"app_read_bytes": 205607400434, "reads": 59420404, "app_write_bytes": 74839282351, "writes": 18874626}


def test_gpfs_exporter_tells_what_programs_read_through_each_filesystem() -> None:
    project, scratch = PageMapper("node7:9303", [GpfsExporterMapping()]).read(EXPORTER.encode())
    assert known(scratch) == SCRATCH
    assert known(project) == dict.fromkeys(SCRATCH, 0)
    assert (scratch.kind, scratch.name) == ("filesystem", "node7:9303/scratch")
    assert scratch.attributes == {"source": "gpfs_exporter", "fs": "scratch"}


def test_its_earlier_names_give_the_same_under_the_same_name() -> None:
    (scratch,) = PageMapper("node7:9303", [GpfsExporterMapping()]).read(EXPORTER_BEFORE.encode())
    assert known(scratch) == SCRATCH
    assert scratch.name == "node7:9303/scratch"
    assert scratch.attributes["node"] == "rw02"


def test_a_cluster_s_page_gives_every_node_its_own_target() -> None:
    first, second = PageMapper("mon:9001", [GpfsClusterMapping()]).read(CLUSTER.encode())
    assert first.name == "mon:9001/tiger2.gpfs/tiger-i23g14"
    assert known(first) == {
        "app_read_bytes": 3401130516933,
        "app_write_bytes": 525742920053,
        "reads": 1776360,
        "writes": 5527815,
    }
    assert known(second) == {"app_read_bytes": 17, "app_write_bytes": 0}
    assert second.attributes == {"source": "gpfs-exporter", "fs": "tiger2.gpfs", "node": "tiger-i23g15"}


@pytest.mark.parametrize(
    ("sensor", "expected"),
    [
        ("fs", {"read_bytes": 73400320, "write_bytes": 1048576}),
        ("ds", {"read_bytes": 73400320, "write_bytes": 1048576}),
        ("fis", {"app_read_bytes": 73400320, "app_write_bytes": 1048576}),
    ],
)
def test_the_bridge_s_sensors_tell_the_disks_or_the_programs_side(sensor: str, expected: dict[str, float]) -> None:
    first, second = bridge(bridge_page(sensor))
    assert known(first) == expected
    assert (first.name, second.name) == (f"gpfs_{sensor}/localFS/scale-11", f"gpfs_{sensor}/localFS/scale-12")
    assert first.attributes == {
        "source": "storage scale bridge",
        "cluster": "c1.vmlocal",
        "fs": "localFS",
        "node": "scale-11",
    }


def test_disks_of_a_filesystem_add_up() -> None:
    page = "".join(
        f'gpfs_ds_bytes_read{{node="a",{CLUSTER_LABELS},gpfs_disk_name="nsd{disk}"}} {read}.0 1737638280000\n'
        for disk, read in ((1, 100), (2, 23))
    )
    (reading,) = bridge(page)
    assert known(reading) == {"read_bytes": 123}


def test_a_sensor_that_has_not_run_again_adds_nothing() -> None:
    reader = StorageScaleBridge()
    pages = [bridge_page("fs"), bridge_page("fs"), bridge_page("fs", read=73400420.0, at=1737638290)]
    before, same, after = (reader.read(page.encode())[0] for page in pages)
    still, state, _ = close(opened(before, 1), same, 2)
    moved, _, findings = close(state, after, 3)
    at = index("filesystem", "read_bytes")
    assert (still.values[at], moved.values[at], findings) == (0, 100, [])


def test_changes_over_a_sensor_s_period_are_refused_with_the_setting_that_mends_it() -> None:
    with pytest.raises(CollectError, match="gpfs_fs_bytes_read is the change over a sensor's period") as refused:
        bridge(bridge_page("fs", "gauge"))
    assert "rawCounters = True" in refused.value.hint


def test_each_page_is_known_as_its_own() -> None:
    pages = (EXPORTER, EXPORTER_BEFORE, CLUSTER, bridge_page("fs"), bridge_page("fis"), bridge_page("ds"))
    assert [sources_on(page.encode()) for page in pages] == [
        ("gpfs_exporter",),
        ("gpfs_exporter",),
        ("gpfs_cluster",),
        ("gpfs_bridge",),
        ("gpfs_bridge",),
        ("gpfs_bridge",),
    ]
    # gpfs_exporter's mmdf shows the size of a filesystem under a name that begins like the bridge's
    assert sources_on(b'gpfs_fs_size_bytes{fs="scratch"} 9\n') == ()
    assert SOURCES["gpfs_bridge"].integrates
    assert reader_class("gpfs_bridge") is StorageScaleBridge


def test_what_is_not_read_is_on_no_table() -> None:
    assert not any(
        mapping.wants(name) for mapping in (GpfsExporterMapping(), GpfsClusterMapping()) for name, _ in NOT_READ
    )
    with pytest.raises(CollectError, match="no family that kvtally reads"):
        bridge("".join(f'{name}{{node="a"}} 5\n' for name, _ in NOT_READ))
