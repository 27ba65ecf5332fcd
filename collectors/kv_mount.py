"""The filesystem under a KV cache: which mount holds its folder, and whatever counts that mount's bytes."""

from __future__ import annotations

import contextlib
import re
from typing import TYPE_CHECKING, NoReturn

from kvtally.collectors.base import CollectError, NoData, Reading
from kvtally.collectors.ceph import Ceph
from kvtally.collectors.filesystem import BlockDevices, device_of, devices_of
from kvtally.collectors.gpfs import MMPMON, Gpfs
from kvtally.collectors.lustre import Lustre
from kvtally.collectors.mounts import (
    MEMORY,
    Mount,
    mount_of,
    parse_mountinfo,
    process_of,
    read_of_process,
    without_links,
)
from kvtally.collectors.nfs import NFS, NfsMount

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvtally.collectors.base import Collector

    Pid = Callable[[], int | None] | int | None

CEPH_CLUSTER = re.compile(r"@([0-9a-f-]{36})\.")  # admin@0f1e2d3c-0001-4b0e-9c57-0b0a2f1d7a11.cephfs=/kv


class BlockMount:
    """Reads the block devices that a mount names, a partition or a volume, summed: what else lies on them counts too.

    What programs read from the page cache is not among it, and no device knows of it.
    """

    def __init__(self, mount: Mount, proc: str = "/proc", sys: str = "/sys") -> None:
        self.source = f"mount:{mount.mount_point}"
        self._name = mount.mount_point
        devices = devices_of(mount, sys)
        self._devices = BlockDevices(proc, sys, devices)
        self._attributes = {
            "source": "diskstats",
            "devices": ",".join(devices),
            "disks": ",".join(device_of(mount, sys).disks),
        }

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData if none of the devices counts."""
        readings = self._devices.collect()
        values = tuple(_sum(column) for column in zip(*(reading.values for reading in readings), strict=True))
        return (Reading("filesystem", self._name, self._attributes, values, readings[0].epoch),)


class UnseenMount:
    """Stands where nothing here counts a mount's bytes, and says so."""

    source = "mount"

    def __init__(self, reason: str, hint: str) -> None:
        self._reason = reason
        self._hint = hint

    def collect(self) -> NoReturn:
        """NoData, always."""
        raise NoData(self._reason, self._hint)


class KvMount:
    """Reads the filesystem that holds the folders of KV caches, as the process `pid` sees them, or we.

    Every collect looks at the table of mounts: where another filesystem is mounted over a folder, it is read from
    then on, under its own name. `filesystem` is the same for mounts whose bytes are counted together, whoever sees
    them; "" where the folders could not be placed.
    """

    def __init__(
        self, paths: Sequence[str], pid: Pid = None, proc: str = "/proc", sys: str = "/sys", mmpmon: str = MMPMON
    ) -> None:
        self.paths = tuple(dict.fromkeys(paths))
        self.source = f"mount:{self.paths[0]}"
        self.filesystem = ""
        self._pid = pid
        self._proc = proc
        self._sys = sys
        self._mmpmon = mmpmon
        self._seen: tuple[str, int] | None = None
        self._mounts: tuple[Mount, ...] = ()
        self._counts: Collector = UnseenMount("not looked for yet", "")
        with contextlib.suppress(NoData, CollectError):  # every collect tells them
            self._follow()

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where nothing counts the bytes of this filesystem, with what does instead."""
        self._follow()
        readings = self._counts.collect()
        if len(readings) != 1:
            names = ", ".join(reading.name for reading in readings)
            raise CollectError(f"{self.source} does not tell which of {names} it is")
        attributes = {
            **readings[0].attributes,
            "mounts": ",".join(dict.fromkeys(mount.mount_point for mount in self._mounts)),
            "paths": ",".join(self.paths),
            "fstype": self._mounts[0].fstype,
        }
        return (readings[0]._replace(attributes=attributes),)

    def _follow(self) -> None:
        """Look which mounts hold the folders, if the table of mounts is another than before."""
        who = process_of(self._pid)
        text = read_of_process(self._proc, who, "mountinfo")
        seen = (who, hash(text))
        if seen == self._seen:
            return
        table = parse_mountinfo(text)
        mounts = tuple(dict.fromkeys(_holding(path, table, self._pid, self._proc) for path in self.paths))
        if len({_filesystem(mount, self._sys) for mount in mounts}) > 1:
            raise CollectError(
                f"{', '.join(self.paths)} lie on different filesystems since the mounts changed", "restart kvtally"
            )
        if mounts != self._mounts:
            self._counts = _counts_of(mounts[0], self._pid, self._proc, self._sys, self._mmpmon)
            self._mounts = mounts
            self.source = f"mount:{mounts[0].mount_point}"
            self.filesystem = _filesystem(mounts[0], self._sys)
        self._seen = seen


def collectors_for(
    paths: Iterable[str], pid: Pid = None, proc: str = "/proc", sys: str = "/sys", mmpmon: str = MMPMON
) -> list[KvMount]:
    """What reads the filesystems under KV caches, each filesystem once; a path that cannot be placed by itself."""
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        filesystem = path
        with contextlib.suppress(NoData, CollectError):
            table = parse_mountinfo(read_of_process(proc, process_of(pid), "mountinfo"))
            filesystem = _filesystem(_holding(path, table, pid, proc), sys)
        groups.setdefault(filesystem, []).append(path)
    return [KvMount(group, pid, proc, sys, mmpmon) for group in groups.values()]


def _holding(path: str, table: Sequence[Mount], pid: Pid, proc: str) -> Mount:
    root = "" if pid is None else f"{proc}/{process_of(pid)}/root"
    return mount_of(without_links(path, table, root), table)


def _filesystem(mount: Mount, sys: str) -> str:
    """What two mounts have in common whose bytes are counted together."""
    if mount.fstype == "lustre":
        return f"lustre {_lustre_name(mount)}"
    if mount.fstype == "gpfs":
        return f"gpfs {_gpfs_name(mount)}"
    if mount.fstype == "ceph":
        return f"ceph {_ceph_cluster(mount)}"
    backing = device_of(mount, sys)
    return f"devices {','.join(devices_of(mount, sys))}" if backing.disks else f"{mount.fstype} {mount.device}"


def _counts_of(mount: Mount, pid: Pid, proc: str, sys: str, mmpmon: str) -> Collector:
    if mount.fstype in NFS:
        return NfsMount(mount.mount_point, proc, pid)
    if mount.fstype == "lustre":
        return Lustre(_lustre_name(mount), proc, sys)
    if mount.fstype == "gpfs":
        return Gpfs(_gpfs_name(mount), mmpmon)
    if mount.fstype == "ceph":
        return Ceph(_ceph_cluster(mount), sys)
    backing = device_of(mount, sys)
    if backing.disks:
        return BlockMount(mount, proc, sys)
    return UnseenMount(f"{mount.mount_point} is {backing.reason}", _instead(mount))


def _instead(mount: Mount) -> str:
    """What tells of the bytes of a mount that nothing here counts."""
    if mount.fstype in MEMORY:
        return "what is read from it comes from this host's DRAM"
    if "weka" in mount.fstype:
        return "add the page of the WEKA exporter as a [[page]]"
    if mount.is_remote:
        return "if it has an exporter of its own, add that one's page as a [[page]]"
    return "give the KV cache a volume of its own; the engine's cgroup and the disks count its bytes among others"


# 10.0.0.1@o2ib:10.0.0.2@o2ib:/scratch/of/a/project
def _lustre_name(mount: Mount) -> str:
    return mount.source.rpartition(":/")[2].partition("/")[0]


# /dev/scratch of old, scratch now
def _gpfs_name(mount: Mount) -> str:
    return mount.source.rpartition("/")[2]


def _ceph_cluster(mount: Mount) -> str | None:
    """The cluster's fsid; None before Linux 5.17, where a mount names its monitors."""
    found = CEPH_CLUSTER.search(mount.source)
    return found[1] if found else None


def _sum(column: Iterable[float | None]) -> float | None:
    known = [value for value in column if value is not None]
    return sum(known) if known else None
