"""What an NFS mount moved: bytes that programs asked for, bytes that crossed the network, and how long calls took."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError, NoData, Reading
from kvtally.collectors.mounts import process_of, read_of_process, unescaped

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

NFS = frozenset(("nfs", "nfs4"))
WANTED = ("bytes", "READ", "READ_PLUS", "WRITE")  # NFS 4.2 may read by READ_PLUS, where a kernel is built so
UNDERFLOW = 2**63  # above it a time that the kernel took below zero, printed without a sign: 18446744073709551615


class NfsCounts(NamedTuple):
    """One mount in mountstats; `values` in the order of quantities.FILESYSTEM, bytes and seconds."""

    mount_point: str
    device: str
    fstype: str
    values: tuple[float | None, ...]


# device 192.168.1.1:/srv/test mounted on /mnt/nfs/test with fstype nfs4 statvers=1.1
# 	bytes:	1207640230 0 0 0 1210214218 0 295483 0
# 	        READ: 1298 1298 0 207680 1210292152 6 79386 79407
def parse_mountstats(text: str) -> list[NfsCounts]:
    """NFS mounts in the order in which they were made; CollectError for counts of another form."""
    blocks: list[tuple[str, dict[str, list[str]]]] = []
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        if not line[:1].isspace():
            lines = {}
            blocks.append((line, lines))
        else:
            name, _, counts = line.strip().partition(":")
            if name in WANTED:
                lines[name] = counts.split()
    found = []
    for head, lines in blocks:
        named, _, kind = head.removeprefix("device ").rpartition(" with fstype ")
        device, _, point = named.partition(" mounted on ")
        fstype = kind.partition(" ")[0]
        if fstype in NFS:
            found.append(NfsCounts(unescaped(point), unescaped(device), fstype, _values(unescaped(point), lines)))
    return found


class NfsMount:
    """Reads one NFS mount of the process `pid`, or of ours.

    The time of an operation is its whole time, from the call to the last byte: it holds the wait for a slot too.
    Pages that were read through mmap() cross the network and are no program's bytes. With O_DIRECT a program's bytes
    are those that it asked for: a read at the end of a file counts whole. Counts begin anew at a mount.
    """

    def __init__(
        self, mount_point: str, proc: str = "/proc", pid: Callable[[], int | None] | int | None = None
    ) -> None:
        self.source = f"nfs:{mount_point}"
        self._mount_point = mount_point
        self._proc = proc
        self._pid = pid

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData if nothing of NFS is mounted there, or the process is not to be seen."""
        text = read_of_process(self._proc, process_of(self._pid), "mountstats")
        here = [counts for counts in parse_mountstats(text) if counts.mount_point == self._mount_point]
        if not here:
            raise NoData(
                f"no NFS is mounted at {self._mount_point}",
                "a mount point counts as the engine names it; kvtally sees the engine's where it sees its process",
            )
        point, device, fstype, values = here[-1]  # of mounts at one point the last hides the others
        attributes = {"source": "nfs mountstats", "device": device, "mounts": point, "fstype": fstype}
        return (Reading("filesystem", point, attributes, values),)


# bytes: by read() and write(), the same with O_DIRECT, from and to the server; then pages, those of mmap() too
# READ:  operations, transmissions, time-outs, bytes sent, bytes received, ms queued, ms to the answer, ms in all
def _values(point: str, lines: Mapping[str, Sequence[str]]) -> tuple[float | None, ...]:
    try:
        read, written, read_direct, written_direct, from_server, to_server = map(int, lines["bytes"][:6])
        reads, reading = _calls(lines["READ"])
        reads_plus, reading_plus = _calls(lines.get("READ_PLUS", ("0",) * 8))
        writes, writing = _calls(lines["WRITE"])
    except (KeyError, IndexError, ValueError):
        raise CollectError(f"mountstats tells of {point} in a form that is not known") from None
    return (
        *(from_server, reads + reads_plus, _seconds(reading + reading_plus)),
        *(to_server, writes, _seconds(writing)),
        *(read + read_direct, written + written_direct),
    )


def _calls(fields: Sequence[str]) -> tuple[int, int]:
    """Operations and the milliseconds that they took in all."""
    return int(fields[0]), int(fields[7])


def _seconds(milliseconds: int) -> float | None:
    return milliseconds / 1000 if milliseconds < UNDERFLOW else None
