"""Which mount holds a path, as the kernel tells it to one process."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError, NoData

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

NETWORK = frozenset(
    "9p afs beegfs ceph cifs glusterfs gpfs lustre nfs nfs4 orangefs pvfs2 smb3 smbfs virtiofs wekafs".split()  # noqa: SIM905  # a list of quoted names would fill a screen
)
MEMORY = frozenset(("devtmpfs", "hugetlbfs", "ramfs", "tmpfs"))
LINKS = 40  # as many as the kernel follows


class Mount(NamedTuple):
    """Where a directory's filesystem is mounted and what it lies on; `device` is MAJ:MIN, major 0 for none."""

    mount_point: str
    fstype: str
    source: str
    device: str
    root: str

    @property
    def is_remote(self) -> bool:
        """Whether a server or a program answers for it, which may take for ever."""
        return self.fstype in NETWORK or (self.fstype.startswith("fuse") and self.fstype != "fuseblk")


# 36 35 98:0 /kv /mnt/kv\040cache rw,noatime shared:1 - ext4 /dev/nvme0n1p1 rw,errors=continue
# id parent device root mount_point options optional... - fstype source options
def parse_mountinfo(text: str) -> list[Mount]:
    """Mounts in the order in which they were made."""
    mounts = []
    for line in text.splitlines():
        place, dash, filesystem = line.partition(" - ")
        fields, behind = place.split(), filesystem.split()
        if dash and len(fields) >= 5 and len(behind) >= 2:  # noqa: PLR2004  # columns of the sample above
            mounts.append(Mount(unescaped(fields[4]), behind[0], unescaped(behind[1]), fields[2], unescaped(fields[3])))
    return mounts


def mount_of(path: str, mounts: Iterable[Mount]) -> Mount:
    """The mount that holds an absolute path without symbolic links; CollectError if none of these does.

    Of mounts at the same point the last hides the others.
    """
    best: Mount | None = None
    for mount in mounts:
        point = mount.mount_point.rstrip("/")
        holds = path == point or path.startswith(f"{point}/")
        if holds and (best is None or len(mount.mount_point) >= len(best.mount_point)):
            best = mount
    if best is None:
        raise CollectError(f"no mount holds {path}", "give an absolute path, in the mount namespace of the engine")
    return best


def without_links(path: str, mounts: Sequence[Mount], root: str = "") -> str:
    """A path with its symbolic links followed, as a process sees it whose root directory is `root`.

    What is not there stays as it is written, and so does what lies below a remote mount: a server that does not
    answer holds whoever looks there. CollectError for a path that is not absolute.
    """
    if not path.startswith("/"):
        raise CollectError(f"{path} is not an absolute path", "name the folder of the KV cache from / on")
    todo = path.split("/")[::-1]
    found: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part == "..":
            del found[-1:]
        elif part not in {"", "."}:
            found.append(part)
            target = _link(root, "/" + "/".join(found), mounts)
            links += bool(target)
            if target and links <= LINKS:
                found = [] if target.startswith("/") else found[:-1]
                todo += target.split("/")[::-1]
    return "/" + "/".join(found)


def process_of(pid: Callable[[], int | None] | int | None) -> str:
    """The name under /proc of the process that `pid` means, ours for None; NoData where it is asked for and unknown."""
    if pid is None:
        return "self"
    known = pid() if callable(pid) else pid
    if known is None:
        raise NoData("the engine's process is not known")
    return str(known)


def unescaped(text: str) -> str:
    """The kernel's octal escapes in tables of mounts: blank, tab, newline, backslash and hash."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def read_of_process(proc: str, who: str, name: str) -> str:
    """A file of /proc/<who> that tells of its mounts; NoData where the process is gone or hidden."""
    try:
        return Path(proc, who, name).read_text("utf-8", "replace")
    except (FileNotFoundError, ProcessLookupError):
        raise NoData(f"process {who} is gone") from None
    except OSError as error:
        raise NoData(
            f"the mounts of process {who} may not be read: {error.strerror}",
            "the same user or CAP_SYS_PTRACE is needed, and in Kubernetes shareProcessNamespace: true",
        ) from None


def _link(root: str, path: str, mounts: Sequence[Mount]) -> str:
    if mount_of(path, mounts).is_remote:
        return ""
    try:
        return os.readlink(root + path)  # noqa: PTH115  # text: a Path would take "." and "//" out of it
    except OSError:
        return ""
