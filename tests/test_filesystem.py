from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import NoData, scrape
from kvtally.collectors.filesystem import (
    Backing,
    BlockDevices,
    CgroupIo,
    device_of,
    devices_of,
    disk_readings,
    parse_diskstats,
    parse_io_stat,
)
from kvtally.collectors.mounts import Mount, mount_of, parse_mountinfo
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# vda is a real line of Linux 6.18; sda has the 14 columns of 4.17, sdb the 18 of 5.4
DISKSTATS = """\
   7       0 loop0 3 0 20 1 0 0 0 0 0 1 1 0 0 0 0 0 0
 254       0 vda 47476 16935 4306250 27204 13562 87944 10243576 72675 2 21004 101219 4617 49 1264688 1288 1427 51
 254       1 vda1 47000 16935 4306000 27000 13562 87944 10243576 72675 2 21004 101219 4617 49 1264688 1288 1427 51
   8       0 sda 10 1 100 1000 20 2 200 2000 0 3 4
   8      16 sdb 30 1 300 3000 40 2 400 4000 0 3 4 0 0 0 0
   8      17 sdb1 30 1 300 3000
 253       0 dm-0 5 0 50 5 6 0 60 6 0 1 1 0 0 0 0 0 0
   9       0 md0 5 0 50 5 6 0 60 6 0 1 1 0 0 0 0 0 0
 252       0 zram0 5 0 50 5 6 0 60 6 0 1 1 0 0 0 0 0 0
"""
MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw,discard
28 27 254:1 /var/lib/kubelet/pods/1/volume /var/lib/kubelet/pods/1/volume rw - ext4 /dev/vda1 rw
30 27 253:0 / /mnt/kv\040cache rw,noatime shared:1 master:2 - xfs /dev/mapper/vg-kv rw
31 30 0:40 / /mnt/kv\040cache/far rw - nfs4 server:/export rw,vers=4.2
32 27 0:41 / /dev/shm rw - tmpfs tmpfs rw
33 27 0:42 /@data /pool rw - btrfs /dev/sdb1 rw
"""


class Machine:
    """A /proc and a /sys of our own making."""

    def __init__(self, root: Path) -> None:
        self.proc, self.sys = root / "proc", root / "sys"
        (self.proc / "self").mkdir(parents=True)
        for folder in ("block", "dev/block", "class/block", "devices"):
            (self.sys / folder).mkdir(parents=True)
        (self.proc / "self" / "mountinfo").write_text(MOUNTINFO)
        boot = self.proc / "sys" / "kernel" / "random" / "boot_id"
        boot.parent.mkdir(parents=True)
        boot.write_text("00000000-00ff-4b0e-9c57-0b0a2f1d7a11\n")
        self.diskstats(DISKSTATS)

    def diskstats(self, text: str) -> None:
        (self.proc / "diskstats").write_text(text)

    def disk(self, name: str, number: str, *, partitions: Mapping[str, str] = {}, on: Sequence[str] = ()) -> None:
        folder = self.sys / "devices" / name
        (folder / "slaves").mkdir(parents=True)
        (self.sys / "block" / name).symlink_to(folder)
        self._number(name, number, folder)
        for partition, its_number in partitions.items():
            (folder / partition).mkdir()
            (folder / partition / "partition").write_text("1\n")
            self._number(partition, its_number, folder / partition)
        for below in on:
            (folder / "slaves" / below).symlink_to((self.sys / "class" / "block" / below).resolve())

    def _number(self, name: str, number: str, folder: Path) -> None:
        (self.sys / "dev" / "block" / number).symlink_to(folder)
        (self.sys / "class" / "block" / name).symlink_to(folder)

    def collector(self, devices: Sequence[str] | None = None) -> BlockDevices:
        return BlockDevices(str(self.proc), str(self.sys), devices)

    def backing(self, path: str) -> Backing:
        return device_of(self.mount(path), str(self.sys))

    def mount(self, path: str) -> Mount:
        return mount_of(path, parse_mountinfo(MOUNTINFO))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One disk with a partition, two that carry a volume (one by a partition), and devices that are none."""
    made = Machine(tmp_path)
    made.disk("vda", "254:0", partitions={"vda1": "254:1"})
    made.disk("sda", "8:0")
    made.disk("sdb", "8:16", partitions={"sdb1": "8:17"})
    made.disk("loop0", "7:0")
    made.disk("md0", "9:0")
    made.disk("zram0", "252:0")
    made.disk("dm-0", "253:0", on=["sda", "sdb1"])
    (made.sys / "devices" / "dm-0" / "dm").mkdir()
    (made.sys / "devices" / "dm-0" / "dm" / "name").write_text("vg-kv\n")
    return made


def test_every_form_of_diskstats_is_read_and_a_short_line_is_not() -> None:
    counts = parse_diskstats(DISKSTATS)
    assert counts["vda"] == (4306250, 47476, 27204, 10243576, 13562, 72675)
    assert counts["sda"] == (100, 10, 1000, 200, 20, 2000)
    assert counts["sdb"] == (300, 30, 3000, 400, 40, 4000)
    assert "sdb1" not in counts


def test_whole_disks_are_read_and_what_lies_on_them_is_left_out(machine: Machine) -> None:
    vda, sda, sdb = machine.collector().collect()
    assert [reading.name for reading in (vda, sda, sdb)] == ["vda", "sda", "sdb"]
    assert vda.kind == "filesystem"
    assert vda.epoch == 0xFF
    # 4306250 and 10243576 sectors of 512 bytes; 27.204 s and 72.675 s
    assert vda.values == (2204800000, 47476, 27.204, 5244710912, 13562, 72.675, None, None)
    assert len(vda.values) == len(QUANTITIES["filesystem"])


def test_a_disk_tells_which_mounts_lie_on_it(machine: Machine) -> None:
    attributes = [reading.attributes for reading in machine.collector().collect()]
    assert attributes == [
        {"source": "diskstats", "mounts": "/"},
        {"source": "diskstats", "mounts": "/mnt/kv cache"},
        {"source": "diskstats", "mounts": "/mnt/kv cache,/pool"},
    ]


def test_a_mount_that_comes_later_opens_no_new_target(machine: Machine) -> None:
    collector = machine.collector()
    before = [reading.attributes for reading in collector.collect()]
    (machine.proc / "self" / "mountinfo").write_text(MOUNTINFO + "40 27 8:0 / /new rw - ext4 /dev/sda rw\n")
    assert [reading.attributes for reading in collector.collect()] == before
    machine.diskstats(DISKSTATS + "   8      32 sdc 1 1 1 1 1 1 1 1 0 1 1\n")
    assert collector.collect()[1].attributes["mounts"] == "/mnt/kv cache,/new"


def test_in_a_container_parts_of_a_filesystem_are_its_mounts(machine: Machine) -> None:
    (machine.proc / "self" / "mountinfo").write_text("9 1 254:1 /srv/kv /kv rw - ext4 /dev/vda1 rw\n")
    assert machine.collector(["vda"]).collect()[0].attributes["mounts"] == "/kv"


def test_devices_that_are_named_are_read_whatever_they_are(machine: Machine) -> None:
    readings = machine.collector(["dm-0"]).collect()
    assert [(reading.name, reading.attributes["mounts"]) for reading in readings] == [("dm-0", "/mnt/kv cache")]
    with pytest.raises(NoData, match="no block device of nvme9n1 counts"):
        machine.collector(["nvme9n1"]).collect()


NVME = "259 {minor} {name} {reads} 0 {sectors} {time} 0 0 0 0 0 0 0\n"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        (0, 3 * 512),  # before Linux 6.3 the namespace counts nothing, and its paths carried one sector and two
        (7, 7 * 512),  # from then on it counts what its paths count
    ],
)
def test_a_multipath_namespace_is_one_disk(machine: Machine, own: int, expected: int) -> None:
    machine.disk("nvme0n1", "259:1")
    machine.disk("nvme0c0n1", "259:2")
    machine.disk("nvme0c1n1", "259:3")
    machine.diskstats(
        NVME.format(minor=1, name="nvme0n1", reads=own, sectors=own, time=own)
        + NVME.format(minor=2, name="nvme0c0n1", reads=1, sectors=1, time=4)
        + NVME.format(minor=3, name="nvme0c1n1", reads=2, sectors=2, time=6)
    )
    (reading,) = machine.collector().collect()
    assert (reading.name, reading.values[0]) == ("nvme0n1", expected)


def test_times_go_on_where_32_bits_end(machine: Machine) -> None:
    line = " 8 0 sda {reads} 0 8 {time} 0 0 0 0 0 0 0\n"
    collector = machine.collector(["sda"])
    seconds = []
    for reads, time in ((1, 4294967000), (2, 704), (3, 1704), (1, 500)):
        machine.diskstats(line.format(reads=reads, time=time))
        seconds.append(collector.collect()[0].values[2])
    # 4294967.000 s, and 1 s more (2**32 - 4294967000 = 296 ms, and 704), and 1 s; then the disk was plugged in anew
    assert seconds == [4294967.0, 4294968.0, 4294969.0, 0.5]


def test_another_collector_in_the_same_boot_goes_on_and_another_boot_begins_anew(machine: Machine) -> None:
    before = machine.collector(["vda"]).collect()[0]
    interval, state, _ = close(opened(before, 10), machine.collector(["vda"]).collect()[0], 20)
    assert interval.values == (0, 0, 0, 0, 0, 0, None, None)
    (machine.proc / "sys" / "kernel" / "random" / "boot_id").write_text("11111111-00ff-4b0e-9c57-0b0a2f1d7a11\n")
    interval, _, _ = close(state, machine.collector(["vda"]).collect()[0], 30)
    assert interval.values[0] == before.values[0]


def test_no_disk_is_no_data(machine: Machine) -> None:
    machine.diskstats("   7       0 loop0 3 0 20 1 0 0 0 0 0 1 1\n")
    assert scrape(machine.collector(), lambda: 0).reason == "no block device of this host counts"
    (machine.proc / "diskstats").unlink()
    assert scrape(machine.collector(), lambda: 0).outcome == "no_data"


def test_live_and_recorded_forms_give_the_same_reading(machine: Machine) -> None:
    collector = machine.collector()
    assert disk_readings(collector.sample(), 255.0) == collector.collect()


def test_an_early_recording_tells_bytes_only() -> None:
    (reading,) = disk_readings([{"device": "vdb", "read_bytes": 127950848, "write_bytes": 0}])
    assert (reading.name, reading.attributes, reading.epoch) == ("vdb", {"source": "diskstats"}, None)
    assert reading.values == (127950848, None, None, 0, None, None, None, None)


def test_a_volume_lies_on_every_disk_that_carries_it(machine: Machine) -> None:
    assert machine.backing("/mnt/kv cache/x") == Backing(("sda", "sdb"))
    assert machine.backing("/data") == Backing(("vda",))


def test_btrfs_has_no_number_and_lies_on_all_its_members(machine: Machine) -> None:
    assert machine.backing("/pool/x") == Backing(("sdb",))
    members = machine.sys / "fs" / "btrfs" / "0f1e" / "devices"
    members.mkdir(parents=True)
    for name in ("sdb1", "vda1"):
        (members / name).symlink_to(machine.sys / "class" / "block" / name)
    assert machine.backing("/pool/x") == Backing(("sdb", "vda"))


def test_a_mount_names_a_partition_or_a_volume_whose_counters_are_its_own(machine: Machine) -> None:
    sys = str(machine.sys)
    assert devices_of(machine.mount("/data"), sys) == ("vda1",)
    assert devices_of(machine.mount("/mnt/kv cache"), sys) == ("dm-0",)
    assert devices_of(machine.mount("/pool"), sys) == ("sdb1",)
    assert devices_of(machine.mount("/dev/shm"), sys) == ()


def test_a_mapped_device_without_number_is_found_by_its_label(machine: Machine) -> None:
    mount = Mount("/kv", "btrfs", "/dev/mapper/vg-kv", "0:50", "/")
    assert device_of(mount, str(machine.sys)) == Backing(("sda", "sdb"))


@pytest.mark.parametrize(
    ("fstype", "source", "device", "reason"),
    [
        ("nfs4", "server:/export", "0:40", "nfs4: device counters do not see it"),
        ("lustre", "10.0.0.1@o2ib:/fs", "0:41", "lustre: device counters do not see it"),
        ("gpfs", "scale1", "0:42", "gpfs: device counters do not see it"),
        ("fuse.juicefs", "JuiceFS:kv", "0:43", "fuse.juicefs: device counters do not see it"),
        ("tmpfs", "tmpfs", "0:44", "tmpfs: lies in memory, on no device"),
        ("overlay", "overlay", "0:45", "overlay: its mount names no block device"),
        ("zfs", "tank/kv", "0:46", "zfs: its mount names no block device"),
        ("squashfs", "/dev/loop0", "7:0", "loop0: counted on the disk below, which it does not name"),
    ],
)
def test_a_mount_without_a_disk_says_why(machine: Machine, fstype: str, source: str, device: str, reason: str) -> None:
    assert device_of(Mount("/kv", fstype, source, device, "/"), str(machine.sys)) == Backing((), reason)


IO_STAT = """\
254:0 rbytes=6643712 wbytes=1286144 rios=402 wios=96 dbytes=0 dios=0
8:0 rbytes=1000 wbytes=10 rios=4 wios=1 dbytes=0 dios=0
253:0 rbytes=1000 wbytes=10 rios=4 wios=1 dbytes=0 dios=0
8:16
"""


class Cgroup:
    """A cgroup v2 tree beside a machine."""

    def __init__(self, machine: Machine, pid: str, membership: str) -> None:
        self.machine = machine
        self.root = machine.sys / "fs" / "cgroup"
        self.root.mkdir(parents=True)
        (self.root / "cgroup.controllers").write_text("cpu io memory\n")
        (machine.proc / pid).mkdir(exist_ok=True)
        (machine.proc / pid / "cgroup").write_text(membership)

    def io(self, path: str, text: str) -> None:
        (self.root / path).mkdir(parents=True, exist_ok=True)
        (self.root / path / "io.stat").write_text(text)

    def reader(self, pid: int | None = None) -> CgroupIo:
        return CgroupIo(pid, str(self.machine.proc), str(self.machine.sys))


def test_a_device_without_keys_has_counted_nothing_yet() -> None:
    assert parse_io_stat("\n253:0 \n(unknown) x\n8:0 rbytes=1 rios=2 wbytes=3 wios=4\n") == {
        "8:0": (1, 2, None, 3, 4, None, None, None)
    }


def test_a_cgroup_is_summed_over_disks_and_not_over_what_lies_on_them(machine: Machine) -> None:
    cgroup = Cgroup(machine, "77", "0::/pods/engine.scope\n")
    cgroup.io("pods/engine.scope", IO_STAT)
    (reading,) = cgroup.reader(77).collect()
    assert (reading.kind, reading.name) == ("filesystem", "cgroup:/pods/engine.scope")
    assert reading.attributes == {"source": "cgroup"}
    assert reading.values == (None,) * 8
    assert reading.parts == {
        "254:0": (6643712, 402, None, 1286144, 96, None, None, None),
        "8:0": (1000, 4, None, 10, 1, None, None, None),
    }


def test_a_cgroup_that_has_done_nothing_counts_zero_and_no_time(machine: Machine) -> None:
    cgroup = Cgroup(machine, "self", "0::/\n")
    cgroup.io("", "")
    reader = cgroup.reader()
    before = opened(reader.collect()[0], 10)
    assert close(before, reader.collect()[0], 20)[0].values == (0, 0, None, 0, 0, None, None, None)
    cgroup.io("", IO_STAT)
    assert close(before, reader.collect()[0], 20)[0].values == (6644712, 406, None, 1286154, 97, None, None, None)


def test_the_pid_may_be_asked_for_at_every_collect(machine: Machine) -> None:
    cgroup = Cgroup(machine, "77", "0::/a\n")
    cgroup.io("a", IO_STAT)
    pids = iter([77, None])
    reader = CgroupIo(lambda: next(pids), str(machine.proc), str(machine.sys))
    assert reader.collect()[0].name == "cgroup:/a"
    assert scrape(reader, lambda: 0).reason == "the engine's process is not known"


@pytest.mark.parametrize(
    ("membership", "reason"),
    [
        ("0::/off\n", "cgroup /off does not count I/O"),
        ("7:blkio:/x\n1:cpu:/x\n", "this host has no cgroup v2 at /sys/fs/cgroup"),
        ("0::/../other.scope\n", "the cgroup of process 77 lies outside this container's view"),
    ],
)
def test_what_cannot_be_counted_is_no_data(machine: Machine, membership: str, reason: str) -> None:
    outcome = scrape(Cgroup(machine, "77", membership).reader(77), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", reason)
    assert outcome.hint


def test_a_hybrid_hierarchy_is_not_v2(machine: Machine) -> None:
    cgroup = Cgroup(machine, "77", "7:blkio:/x\n0::/\n")
    (cgroup.root / "cgroup.controllers").unlink()
    assert scrape(cgroup.reader(77), lambda: 0).reason == "this host has no cgroup v2 at /sys/fs/cgroup"


def test_a_process_that_has_gone_has_no_cgroup(machine: Machine) -> None:
    outcome = scrape(Cgroup(machine, "77", "0::/a\n").reader(78), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "process 78 is gone")


def test_the_disks_of_this_machine_are_read(tmp_path: Path) -> None:
    if not any(not name.startswith(("loop", "ram", "zram")) for name in os.listdir("/sys/block")):  # noqa: PTH208  # names
        pytest.skip("no disk here")
    collector = BlockDevices()
    try:
        before = {reading.name: reading for reading in collector.collect()}
    except NoData:
        pytest.skip("no disk counts here")
    with (tmp_path / "written").open("wb") as file:
        file.write(b"x" * (4 << 20))
        file.flush()
        os.fsync(file.fileno())
    after = {reading.name: reading for reading in collector.collect()}
    assert before.keys() == after.keys()
    assert {reading.epoch for reading in before.values()} == {reading.epoch for reading in after.values()}
    backing = device_of(mount_of(str(tmp_path.resolve()), parse_mountinfo(Path("/proc/self/mountinfo").read_text())))
    if not backing.disks:
        assert backing.reason
        return
    written = sum((after[name].values[3] or 0) - (before[name].values[3] or 0) for name in backing.disks)
    assert written >= 4 << 20
