from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtally.agent.interval import close, opened
from kvtally.collectors.base import Collector, Scrape, scrape
from kvtally.collectors.kv_mount import KvMount, collectors_for

STORAGE = Path(__file__).parent / "fixtures" / "storage"
FSID = "0f1e2d3c-0001-4b0e-9c57-0b0a2f1d7a11"
MOUNTINFO = f"""\
27 1 254:1 / / rw - ext4 /dev/vda1 rw
30 27 253:0 / /mnt/local rw - xfs /dev/mapper/vg-kv rw
31 27 253:0 /pods/1 /mnt/pod rw - xfs /dev/mapper/vg-kv rw
32 27 0:33 /sub /mnt/pool rw - btrfs /dev/sda rw
40 27 0:40 / /mnt/kv rw - nfs4 127.0.0.1:/ rw
41 27 0:40 / /mnt/kv2 rw - nfs4 127.0.0.1:/ rw
42 27 0:42 / /mnt/lustre rw - lustre 10.0.0.1@o2ib:10.0.0.2@o2ib:/work/of/kv rw
43 27 0:43 / /gpfs/new rw - gpfs scratch rw
44 27 0:44 / /gpfs/old rw - gpfs /dev/project rw
45 27 0:45 / /mnt/ceph rw - ceph kv@{FSID}.cephfs=/kv rw
46 27 0:46 / /mnt/ceph-old rw - ceph 10.0.0.1:6789,10.0.0.2:6789:/kv rw
47 27 0:47 / /dev/shm rw - tmpfs tmpfs rw
48 27 0:48 / /mnt/weka rw - wekafs backend/kv rw
49 27 0:49 / /mnt/juice rw - fuse.juicefs JuiceFS:kv rw
50 27 0:50 / /container rw - overlay overlay rw
"""
# two disks that carry a volume, and one with a partition; sda is a member of a btrfs too
DISKSTATS = """\
 254       0 vda 100 0 1000 10 200 0 2000 20 0 0 0
 254       1 vda1 10 0 100 1000 20 0 200 2000 0 0 0
   8       0 sda 5 0 50 500 6 0 60 600 0 0 0
   8      16 sdb 7 0 70 700 8 0 80 800 0 0 0
 253       0 dm-0 30 0 300 3000 40 0 400 4000 0 0 0
"""


class Host:
    """A /proc and a /sys of our own making, with every kind of mount."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.proc, self.sys = root / "proc", root / "sys"
        for path in ("block", "dev/block", "class/block"):
            (self.sys / path).mkdir(parents=True)
        self.process("self")
        (self.proc / "diskstats").write_text(DISKSTATS)
        boot = self.proc / "sys" / "kernel" / "random"
        boot.mkdir(parents=True)
        (boot / "boot_id").write_text("00000000-00ff-4b0e-9c57-0b0a2f1d7a11\n")
        for name, number in (("vda", "254:0"), ("sda", "8:0"), ("sdb", "8:16"), ("dm-0", "253:0")):
            folder = self.sys / "devices" / name
            (folder / "slaves").mkdir(parents=True)
            (self.sys / "block" / name).symlink_to(folder)
            self.link(name, number, folder)
        (self.sys / "devices" / "vda" / "vda1").mkdir()
        (self.sys / "devices" / "vda" / "vda1" / "partition").write_text("1\n")
        self.link("vda1", "254:1", self.sys / "devices" / "vda" / "vda1")
        for below in ("sda", "sdb"):
            (self.sys / "devices" / "dm-0" / "slaves" / below).symlink_to(self.sys / "devices" / below)
        members = self.sys / "fs" / "btrfs" / "0f1e" / "devices"
        members.mkdir(parents=True)
        for name in ("sda", "sdb"):
            (members / name).symlink_to(self.sys / "devices" / name)
        self.file("sys/kernel/debug/lustre/llite/work-ffff81032792f800/stats", "lustre_llite_stats.txt")
        self.file("sys/kernel/debug/lustre/osc/work-OST0000-osc-ffff81032792f800/stats", "lustre_osc_stats.txt")
        self.file(f"sys/kernel/debug/ceph/{FSID}.client4115/metrics/size", "ceph_metrics_size.txt")
        mmpmon = root / "mmpmon"
        mmpmon.write_text(f"#!/bin/sh\nexec cat {STORAGE}/mmpmon_fs_io_s.txt\n")
        mmpmon.chmod(0o755)
        self.outside = (str(self.proc), str(self.sys), str(mmpmon))

    def link(self, name: str, number: str, folder: Path) -> None:
        (self.sys / "dev" / "block" / number).symlink_to(folder)
        (self.sys / "class" / "block" / name).symlink_to(folder)

    def process(self, who: str, mountinfo: str = MOUNTINFO) -> None:
        (self.proc / who).mkdir(parents=True, exist_ok=True)
        (self.proc / who / "mountinfo").write_text(mountinfo)
        (self.proc / who / "mountstats").write_text((STORAGE / "mountstats_linux_6.1.txt").read_text())

    def file(self, path: str, fixture: str) -> None:
        place = self.root / path
        place.parent.mkdir(parents=True)
        place.write_text((STORAGE / fixture).read_text())

    def collector(self, path: str, pid: int | None = None) -> KvMount:
        return KvMount((path,), pid, *self.outside)

    def collectors(self, *paths: str) -> list[tuple[str, tuple[str, ...]]]:
        return [(each.source, each.paths) for each in collectors_for(paths, None, *self.outside)]

    def scrape(self, path: str) -> Scrape:
        return scrape(self.collector(path), lambda: 0)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("path", "name", "source", "fstype"),
    [
        ("/mnt/kv/cache", "/mnt/kv", "nfs mountstats", "nfs4"),
        ("/mnt/lustre/cache", "lustre:work", "lustre llite and osc", "lustre"),
        ("/gpfs/new/cache", "gpfs:scratch", "mmpmon", "gpfs"),
        ("/gpfs/old/cache", "gpfs:project", "mmpmon", "gpfs"),
        ("/mnt/ceph/cache", f"ceph:{FSID}", "ceph metrics", "ceph"),
        ("/mnt/ceph-old/cache", f"ceph:{FSID}", "ceph metrics", "ceph"),
        ("/mnt/local/cache", "/mnt/local", "diskstats", "xfs"),
        ("/srv/cache", "/", "diskstats", "ext4"),
    ],
)
def test_a_path_leads_to_what_counts_its_mount(host: Host, path: str, name: str, source: str, fstype: str) -> None:
    collector: Collector = host.collector(path)
    (reading,) = collector.collect()
    point = path.removesuffix("cache").rstrip("/") if path != "/srv/cache" else "/"
    assert collector.source == f"mount:{point}"
    assert (reading.kind, reading.name) == ("filesystem", name)
    told = reading.attributes
    assert (told["source"], told["mounts"], told["paths"], told["fstype"]) == (source, point, path, fstype)


@pytest.mark.parametrize(
    ("path", "reason", "hint"),
    [
        ("/dev/shm/kv", "/dev/shm is tmpfs: lies in memory, on no device", "DRAM"),
        ("/mnt/weka/kv", "/mnt/weka is wekafs: device counters do not see it", "WEKA exporter as a [[page]]"),
        ("/mnt/juice/kv", "/mnt/juice is fuse.juicefs: device counters do not see it", "[[page]]"),
        ("/container/kv", "/container is overlay: its mount names no block device", "a volume of its own"),
    ],
)
def test_what_nothing_counts_is_no_data_with_what_does_instead(host: Host, path: str, reason: str, hint: str) -> None:
    outcome = host.scrape(path)
    assert (outcome.source, outcome.outcome, outcome.reason) == (f"mount:{path[:-3]}", "no_data", reason)
    assert hint in outcome.hint


def test_a_path_that_lies_nowhere_is_an_error_at_every_collect(host: Host) -> None:
    outcome = host.scrape("kv/cache")
    assert (outcome.source, outcome.outcome) == ("mount:kv/cache", "failed")
    assert outcome.reason == "kv/cache is not an absolute path"


def test_a_volume_counts_by_itself_and_tells_the_disks_below(host: Host) -> None:
    (reading,) = host.collector("/mnt/local/kv").collect()
    # dm-0: 300 sectors in 30 reads and 3 s, 400 in 40 writes and 4 s
    assert reading.values == (153600, 30, 3.0, 204800, 40, 4.0, None, None)
    assert (reading.attributes["devices"], reading.attributes["disks"]) == ("dm-0", "sda,sdb")
    assert reading.epoch == 0xFF  # counts begin anew at a boot


def test_a_partition_counts_without_the_rest_of_its_disk(host: Host) -> None:
    (reading,) = host.collector("/srv/kv").collect()
    assert reading.values == (51200, 10, 1.0, 102400, 20, 2.0, None, None)
    assert (reading.attributes["devices"], reading.attributes["disks"]) == ("vda1", "vda")


def test_a_filesystem_on_several_devices_is_their_sum(host: Host) -> None:
    (reading,) = host.collector("/mnt/pool/kv").collect()
    # sda and sdb: 50 + 70 sectors in 5 + 7 reads and 0.5 + 0.7 s, 60 + 80 in 6 + 8 writes and 0.6 + 0.8 s
    assert reading.values == pytest.approx((61440, 12, 1.2, 71680, 14, 1.4, None, None))
    assert reading.attributes["devices"] == "sda,sdb"


def test_paths_on_one_filesystem_are_one_collector(host: Host) -> None:
    assert host.collectors(
        "/mnt/kv/a", "/mnt/local/a", "/mnt/kv2/b", "/mnt/kv/a", "/mnt/pod/b", "/mnt/kv/c", "odd"
    ) == [
        ("mount:/mnt/kv", ("/mnt/kv/a", "/mnt/kv2/b", "/mnt/kv/c")),
        ("mount:/mnt/local", ("/mnt/local/a", "/mnt/pod/b")),
        ("mount:odd", ("odd",)),
    ]
    (reading,) = collectors_for(["/mnt/kv/a", "/mnt/kv2/b"], None, *host.outside)[0].collect()
    assert reading.name == "/mnt/kv"
    assert (reading.attributes["mounts"], reading.attributes["paths"]) == ("/mnt/kv,/mnt/kv2", "/mnt/kv/a,/mnt/kv2/b")


def test_no_path_is_no_collector(host: Host) -> None:
    assert host.collectors() == []


def test_a_link_leads_to_the_mount_where_the_folder_really_is(host: Host, tmp_path: Path) -> None:
    (tmp_path / "kv").symlink_to("/mnt/kv/cache")
    assert host.collector(f"{tmp_path}/kv").source == "mount:/mnt/kv"


def test_an_engines_paths_are_seen_with_its_mounts_and_its_root(host: Host) -> None:
    root = host.root / "container"
    root.mkdir()
    (root / "cache").symlink_to("/kv")
    host.process("77", "9 1 0:50 / / rw - overlay overlay rw\n10 9 0:40 / /kv rw - nfs4 127.0.0.1:/ rw\n")
    (host.proc / "77" / "root").symlink_to(root)
    text = (host.proc / "77" / "mountstats").read_text()
    (host.proc / "77" / "mountstats").write_text(text.replace("mounted on /mnt/kv with", "mounted on /kv with"))
    (reading,) = host.collector("/cache/x", 77).collect()
    assert (reading.name, reading.attributes["paths"], reading.values[1]) == ("/kv", "/cache/x", 1540)


def test_an_engine_that_is_gone_or_not_known_is_no_data_until_it_is_back(host: Host) -> None:
    pids: list[int | None] = [None]
    collector = KvMount(("/mnt/kv/a",), lambda: pids[0], *host.outside)
    assert scrape(collector, lambda: 0).reason == "the engine's process is not known"
    pids[0] = 77
    assert scrape(collector, lambda: 0).reason == "process 77 is gone"
    assert collector.source == "mount:/mnt/kv/a"
    host.process("77")
    assert scrape(collector, lambda: 0).readings[0].name == "/mnt/kv"
    assert collector.source == "mount:/mnt/kv"


def test_a_filesystem_mounted_over_the_folder_is_read_from_then_on(host: Host) -> None:
    collector = host.collector("/mnt/late/kv")
    assert collector.collect()[0].name == "/"
    host.process("self", MOUNTINFO + "60 27 0:43 / /mnt/late rw - gpfs scratch rw\n")
    assert collector.collect()[0].name == "gpfs:scratch"
    assert collector.source == "mount:/mnt/late"
    host.process("self")
    assert collector.collect()[0].name == "/"


def test_a_mount_elsewhere_does_not_begin_the_counts_anew(host: Host) -> None:
    collector = host.collector("/srv/kv")
    state = opened(collector.collect()[0], 10)
    host.process("self", MOUNTINFO + "60 27 0:60 / /elsewhere rw - tmpfs tmpfs rw\n")
    (host.proc / "diskstats").write_text(DISKSTATS.replace("vda1 10 0 100", "vda1 11 0 108"))
    assert close(state, collector.collect()[0], 20)[0].values == (4096, 1, 0, 0, 0, 0, None, None)


def test_folders_that_mounts_have_parted_are_an_error(host: Host) -> None:
    (collector,) = collectors_for(["/srv/a", "/srv/b"], None, *host.outside)
    host.process("self", MOUNTINFO + "60 27 0:43 / /srv/b rw - gpfs scratch rw\n")
    outcome = scrape(collector, lambda: 0)
    assert outcome.reason == "/srv/a, /srv/b lie on different filesystems since the mounts changed"
    host.process("self")
    assert scrape(collector, lambda: 0).outcome == "ok"


def test_a_mount_that_does_not_name_its_cluster_is_read_only_where_there_is_one(host: Host) -> None:
    host.file(f"sys/kernel/debug/ceph/{FSID.replace('0001', '0002')}.client9/metrics/size", "ceph_metrics_size.txt")
    outcome = host.scrape("/mnt/ceph-old/kv")
    assert outcome.outcome == "failed"
    assert outcome.reason.startswith(f"mount:/mnt/ceph-old does not tell which of ceph:{FSID}, ceph:")
    assert host.scrape("/mnt/ceph/kv").outcome == "ok"


def test_the_mount_under_a_folder_of_this_machine_is_found(tmp_path: Path) -> None:
    collector = KvMount((str(tmp_path),))
    before = scrape(collector, lambda: 0)
    if before.outcome != "ok":
        assert before.reason
        pytest.skip(f"nothing counts here: {before.reason}")
    with (tmp_path / "written").open("wb") as file:
        file.write(b"x" * (4 << 20))
        file.flush()
        os.fsync(file.fileno())
    after = collector.collect()[0]
    assert (after.values[3] or 0) - (before.readings[0].values[3] or 0) >= 4 << 20
