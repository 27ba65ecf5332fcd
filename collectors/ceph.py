"""What the kernel's CephFS client moved; its format is known from the kernel's source, not from a running cluster."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kvtally.collectors.base import CollectError, NoData, Reading

# 0f1e2d3c-0001-4b0e-9c57-0b0a2f1d7a11.client4115
CLIENT = re.compile(r"([0-9a-f-]{36})\.client\d+")
COLUMNS = 6
DENIED = "run kvtally as root, with the host's /sys/kernel/debug: CephFS tells its counts there alone"


# item          total       avg_sz(bytes)   min_sz(bytes)   max_sz(bytes)  total_sz(bytes)
# ----------------------------------------------------------------------------------------
# read          0           0               0               0               0
# write         5           4194304         4194304         4194304         20971520
def parse_size(text: str) -> tuple[int, int, int, int]:
    """Bytes read, reads, bytes written, writes of metrics/size; CollectError for a table of another form."""
    head, *rows = [line.split() for line in text.splitlines()] or [[]]
    counts = {fields[0]: fields for fields in rows if len(fields) == COLUMNS}
    try:
        if (head[1], head[-1]) != ("total", "total_sz(bytes)"):
            raise CollectError("CephFS tells sizes under heads that are not known")
        (reads, read), (writes, written) = ((int(counts[way][1]), int(counts[way][-1])) for way in ("read", "write"))
    except (KeyError, IndexError, ValueError):
        raise CollectError("CephFS tells sizes in a form that is not known") from None
    return read, reads, written, writes


class Ceph:
    """Reads the kernel's clients of one cluster, or of every cluster, one reading a cluster.

    Unverified: no running cluster was at hand. Bytes are those of requests to the storage daemons, so that the page
    cache's are not among them. Parts are clients, one for each mount with options of its own; they begin anew.
    """

    def __init__(self, fsid: str | None = None, sys: str = "/sys") -> None:
        self.source = "ceph" if fsid is None else f"ceph:{fsid}"
        self._fsid = fsid
        self._folder = Path(sys, "kernel", "debug", "ceph")

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where there is no client or debugfs may not be read."""
        clusters: dict[str, dict[str, tuple[float | None, ...]]] = {}
        try:
            for name in sorted(os.listdir(self._folder)):  # noqa: PTH208  # names
                client = CLIENT.fullmatch(name)
                if client is not None and self._fsid in {None, client[1]}:
                    read, reads, written, writes = self._size(name)
                    values = (read, reads, None, written, writes, None, None, None)
                    clusters.setdefault(client[1], {})[name] = values
        except PermissionError:
            raise NoData(f"{self._folder} may not be read", DENIED) from None
        except FileNotFoundError:
            clusters = {}
        if not clusters:
            raise NoData("the kernel has no CephFS client" + (f" of {self._fsid}" if self._fsid else ""), DENIED)
        return tuple(
            Reading("filesystem", f"ceph:{fsid}", {"source": "ceph metrics", "fsid": fsid}, (None,) * 8, parts=parts)
            for fsid, parts in clusters.items()
        )

    def _size(self, name: str) -> tuple[int, int, int, int]:
        try:
            return parse_size((self._folder / name / "metrics" / "size").read_text(encoding="ascii"))
        except (FileNotFoundError, NotADirectoryError):
            raise NoData("this kernel's CephFS does not tell sizes", "it does from Linux 5.14 on") from None
