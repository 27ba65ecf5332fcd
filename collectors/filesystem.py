"""Bytes that disks moved: block devices, a cgroup's share of them, and which disk a directory lies on."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.collectors.base import NoData, Reading
from kvtally.collectors.mounts import MEMORY, Mount, parse_mountinfo, process_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping

SECTOR_BYTES = 512  # of /proc/diskstats, whatever the device's own sector is
DISKSTATS_FIELDS = 14  # 18 since Linux 4.18, 20 since 5.5: discards and flushes follow
MILLISECONDS_WRAP = 2**32  # the kernel prints times as unsigned int: 50 days of summed waiting, soon over at depth 64
MOUNTS_NAMED = 8
UNTOLD = (None, None)  # a device does not know what programs read and wrote: page caches stand before it
# Their bytes are counted once more on the disks below, or are no disk's
NO_DISK = re.compile(r"(loop|z?ram|fd|sr|zd|md|dm-|drbd|bcache)\d")
NVME_PATH = re.compile(r"(nvme\d+)c\d+(n\d+)")  # one path to a multipath namespace, nvme0c1n1 to nvme0n1


class Backing(NamedTuple):
    """The whole disks under a mount; none, and the reason, where device counters cannot see its bytes."""

    disks: tuple[str, ...]
    reason: str = ""


# 254       0 vda 47476 16935 4306250 27204 13562 87944 10243576 72675 2 21004 101219 4617 49 1264688 1288 1427 51
# maj     min name reads merged sectors ms  writes merged sectors   ms  in flight ...
def parse_diskstats(text: str) -> dict[str, tuple[int, int, int, int, int, int]]:
    """Sectors, operations and milliseconds read, then written, by device; lines of another form are left out."""
    counts = {}
    for line in text.splitlines():
        fields = line.split()
        if len(fields) >= DISKSTATS_FIELDS:
            reads, _, sectors, milliseconds, writes, _, sectors_written, milliseconds_writing = map(int, fields[3:11])
            counts[fields[2]] = (sectors, reads, milliseconds, sectors_written, writes, milliseconds_writing)
    return counts


# 254:0 rbytes=6643712 wbytes=1286144 rios=402 wios=96 dbytes=0 dios=0
# 253:0
def parse_io_stat(text: str) -> dict[str, tuple[float | None, ...]]:
    """Values in the order of quantities.FILESYSTEM by MAJ:MIN; a device without keys has counted nothing yet."""
    devices: dict[str, tuple[float | None, ...]] = {}
    for line in text.splitlines():
        device, *pairs = line.split() or [""]
        counts = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
        if "rbytes" in counts:
            read, reads, written, writes = (int(counts.get(key, 0)) for key in ("rbytes", "rios", "wbytes", "wios"))
            devices[device] = (read, reads, None, written, writes, None, *UNTOLD)
    return devices


def device_of(mount: Mount, sys: str = "/sys") -> Backing:
    """The whole disks whose counters see a mount's bytes, or why there are none."""
    if mount.is_remote:
        return Backing((), f"{mount.fstype}: device counters do not see it")
    if mount.fstype in MEMORY:
        return Backing((), f"{mount.fstype}: lies in memory, on no device")
    found = set().union(*(_disks_below(device) for device in _devices(mount, sys)))
    disks = tuple(sorted(name for name in found if not NO_DISK.match(name)))
    if disks:
        return Backing(disks)
    if found:
        return Backing((), f"{', '.join(sorted(found))}: counted on the disk below, which it does not name")
    return Backing((), f"{mount.fstype}: its mount names no block device")


def devices_of(mount: Mount, sys: str = "/sys") -> tuple[str, ...]:
    """The block devices that a mount names, a partition or a volume, whose own counters are those of its bytes."""
    return tuple(sorted(folder.name for folder in _devices(mount, sys)))


def disk_readings(disks: Iterable[Mapping[str, Any]], epoch: float | None = None) -> tuple[Reading, ...]:
    """One reading a disk from recorded form (a line's "disks" in host.jsonl); `epoch` tells one boot from another."""
    return tuple(
        Reading(
            "filesystem",
            disk["device"],
            {"source": "diskstats"} | ({"mounts": disk["mount"]} if disk.get("mount") is not None else {}),
            (
                disk.get("read_bytes"),
                disk.get("reads"),
                _seconds(disk.get("read_milliseconds")),
                disk.get("write_bytes"),
                disk.get("writes"),
                _seconds(disk.get("write_milliseconds")),
                *UNTOLD,
            ),
            epoch,
        )
        for disk in disks
    )


class BlockDevices:
    """Reads every whole disk of this host, or `devices` exactly as they are named.

    Left out, since their bytes are counted on a disk already: partitions, and whatever lies on other block devices
    (device mapper, RAID, loop). A multipath NVMe namespace is one disk; before Linux 6.3 it counts nothing itself,
    and its paths are summed. Mount points are told as they were when the set of devices last changed: a change of
    attributes opens a new target, and on a Kubernetes node mounts come and go with the pods.
    """

    source = "diskstats"

    def __init__(self, proc: str = "/proc", sys: str = "/sys", devices: Collection[str] | None = None) -> None:
        self._proc = proc
        self._sys = sys
        self._wanted = devices
        self._present: tuple[str, ...] = ()
        self._mounts: dict[str, str] = {}  # whole disk -> mount points, comma between
        self._turns: dict[tuple[str, int], tuple[int, int, int]] = {}
        self._boot: float | None = None

    def collect(self) -> tuple[Reading, ...]:
        """Read all disks now; NoData if none counts."""
        disks = self.sample()
        if self._boot is None:
            self._boot = _boot_marker(self._proc)
        return disk_readings(disks, self._boot)

    def sample(self) -> list[dict[str, Any]]:
        """Read all disks in recorded form."""
        try:
            counts = parse_diskstats(Path(self._proc, "diskstats").read_text(encoding="ascii"))
        except FileNotFoundError:
            raise NoData("this /proc has no diskstats") from None
        if tuple(counts) != self._present:
            self._mounts = self._find_disks(counts)
            self._present = tuple(counts)
        if not self._mounts:
            which = f"of {', '.join(sorted(self._wanted))}" if self._wanted is not None else "of this host"
            raise NoData(f"no block device {which} counts", "a network filesystem has a source of its own")
        disks = []
        for name, mounts in self._mounts.items():
            sectors, reads, reading, sectors_written, writes, writing = _own_or_paths(name, counts)
            disks.append(
                {
                    "device": name,
                    "read_bytes": sectors * SECTOR_BYTES,
                    "reads": reads,
                    "read_milliseconds": self._unwrapped((name, 0), reads, reading),
                    "write_bytes": sectors_written * SECTOR_BYTES,
                    "writes": writes,
                    "write_milliseconds": self._unwrapped((name, 1), writes, writing),
                    "mount": mounts,
                }
            )
        return disks

    def _find_disks(self, counts: Mapping[str, object]) -> dict[str, str]:
        if self._wanted is not None:
            disks = [name for name in counts if name in self._wanted]
        else:
            disks = [name for name in counts if _is_whole_disk(Path(self._sys, "block", name))]
        points: dict[str, list[str]] = {name: [] for name in disks}
        if disks:
            for mount in _principal_mounts(Path(self._proc, "self", "mountinfo").read_text("utf-8", "replace")):
                own = (folder.name for folder in _devices(mount, self._sys))
                for name in {*own, *device_of(mount, self._sys).disks}:
                    if name in points and mount.mount_point not in points[name]:
                        points[name].append(mount.mount_point)
        return {name: ",".join(sorted(mounted)[:MOUNTS_NAMED]) for name, mounted in points.items()}

    def _unwrapped(self, key: tuple[str, int], operations: int, milliseconds: int) -> int:
        """A time that goes on where the kernel's 32 bits begin again: it fell, the operations did not."""
        operations_before, before, turns = self._turns.get(key, (0, 0, 0))
        if operations < operations_before:
            turns = 0  # the device was taken away and came back
        elif milliseconds < before:
            turns += 1
        self._turns[key] = (operations, milliseconds, turns)
        return milliseconds + turns * MILLISECONDS_WRAP


class CgroupIo:
    """Reads the disk bytes of one cgroup (v2): that of `pid`, or our own.

    Parts are devices, MAJ:MIN; those that lie on others are left out, since the kernel counts the same bytes on both.
    """

    source = "cgroup"

    def __init__(
        self, pid: Callable[[], int | None] | int | None = None, proc: str = "/proc", sys: str = "/sys"
    ) -> None:
        self._pid = pid
        self._proc = proc
        self._sys = sys

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where there is no cgroup v2 or it does not count I/O."""
        path = self._path()
        try:
            text = Path(f"{self._sys}/fs/cgroup{path}/io.stat").read_text(encoding="ascii")
        except FileNotFoundError:
            raise NoData(
                f"cgroup {path} does not count I/O", "enable the io controller: systemd IOAccounting=yes on its unit"
            ) from None
        parts = {device: counts for device, counts in parse_io_stat(text).items() if self._is_bottom(device)}
        nothing_yet: dict[str, tuple[float | None, ...]] = {"none": (0, 0, None, 0, 0, None, *UNTOLD)}
        values = (None,) * len(nothing_yet["none"])
        return (Reading("filesystem", f"cgroup:{path}", {"source": "cgroup"}, values, parts=parts or nothing_yet),)

    # 0::/kubepods.slice/kubepods-pod1.slice/cri-containerd-ab12.scope
    def _path(self) -> str:
        who = process_of(self._pid)
        try:
            lines = Path(self._proc, who, "cgroup").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            raise NoData(f"process {who} is gone") from None
        path = next((line[len("0::") :] for line in lines if line.startswith("0::")), None)
        if path is None or not Path(self._sys, "fs", "cgroup", "cgroup.controllers").exists():
            raise NoData("this host has no cgroup v2 at /sys/fs/cgroup", "boot with systemd.unified_cgroup_hierarchy=1")
        if path.startswith("/.."):
            raise NoData(
                f"the cgroup of process {who} lies outside this container's view",
                "mount the host's /sys/fs/cgroup and use its cgroup namespace",
            )
        return path

    def _is_bottom(self, device: str) -> bool:
        folder = Path(self._sys, "dev", "block", device).resolve()
        return not NO_DISK.match(folder.name) and not _entries(folder / "slaves")


def _is_whole_disk(folder: Path) -> bool:
    """Whether /sys/block/<name> is there (partitions are not) and no other block device carries it."""
    if NO_DISK.match(folder.name) or NVME_PATH.fullmatch(folder.name) or not folder.exists():
        return False
    return not _entries(folder / "slaves")


def _own_or_paths(name: str, counts: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    own = counts[name]
    if any(own):
        return own
    paths = [values for path, values in counts.items() if NVME_PATH.sub(r"\1\2", path) == name]
    return tuple(map(sum, zip(*paths, strict=True)))


def _principal_mounts(mountinfo_text: str) -> list[Mount]:
    """Mounts of whole filesystems; of one that shows only parts of itself (in a container), those."""
    mounts = parse_mountinfo(mountinfo_text)
    whole = {mount.device for mount in mounts if mount.root == "/"}
    return [mount for mount in mounts if mount.root == "/" or mount.device not in whole]


def _devices(mount: Mount, sys: str) -> list[Path]:
    """Sysfs folders of the block devices that a mount names; btrfs names one of several by path."""
    by_number = Path(sys, "dev", "block", mount.device)
    if by_number.exists():
        return [by_number.resolve()]
    if not mount.source.startswith("/dev/"):
        return []
    name = os.path.basename(mount.source)  # noqa: PTH119  # text, not a path of this host
    if mount.source.startswith("/dev/mapper/"):
        labels = Path(sys, "block").glob("dm-*/dm/name")
        name = next((label.parts[-3] for label in labels if label.read_text(encoding="utf-8").strip() == name), name)
    names = {name}
    for folder in Path(sys, "fs", "btrfs").glob("*/devices"):
        members = _entries(folder)
        if name in members:
            names.update(members)
    folders = (Path(sys, "class", "block", each) for each in sorted(names))
    return [folder.resolve() for folder in folders if folder.exists()]


def _disks_below(folder: Path, depth: int = 8) -> set[str]:
    """Whole disks that a device's bytes reach: its disk if it is a partition, else those that carry it."""
    if (folder / "partition").exists():
        folder = folder.parent
    carriers = _entries(folder / "slaves")
    if not carriers or not depth:
        return {folder.name}
    return set().union(*(_disks_below((folder / "slaves" / name).resolve(), depth - 1) for name in carriers))


def _entries(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


# 3f0c1c9e-6d0e-4b0e-9c57-0b0a2f1d7a11
def _boot_marker(proc: str) -> float | None:
    """A number that is another after every boot; the time of the boot is none, since a stepped clock moves it."""
    try:
        text = Path(proc, "sys", "kernel", "random", "boot_id").read_text(encoding="ascii")
    except OSError:
        return None
    digits = text.strip().replace("-", "")[:12]  # 48 bits, which a float holds exactly
    return float(int(digits, 16)) if re.fullmatch(r"[0-9a-f]{12}", digits) else None
