"""What a Lustre filesystem moved on this host: bytes that programs asked for, bytes that its servers sent and took."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kvtally.collectors.base import CollectError, NoData, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

DENIED = "run kvtally as root: since Lustre 2.12 these counts are in debugfs, where lctl get_param needs root too"
SUM = 6  # where the sum stands in a line


# snapshot_time             1510950459.772792457 secs.nsecs
# read_bytes                591036 samples [bytes] 4096 1048576 452705124352 458909478532677632
# ost_read                  591567 samples [usec] 58 2298702 10257217364 690745503006198
# open                      136 samples [regs]
def parse_stats(text: str) -> dict[str, tuple[int, int]]:
    """Samples and their sum by name, in the unit of the line; CollectError where it is no stats file of Lustre."""
    lines = [line.split() for line in text.splitlines()]
    if not any(fields[:1] == ["snapshot_time"] for fields in lines):
        raise CollectError("no stats file of Lustre: it does not tell when it was taken")
    try:
        return {fields[0]: (int(fields[1]), int(fields[SUM])) for fields in lines if len(fields) > SUM}
    except ValueError:
        raise CollectError("a stats file of Lustre in a form that is not known") from None


class Lustre:
    """Reads one filesystem: llite, where programs ask for bytes, and osc, where the servers' storage gives them.

    Parts are the mounts of this filesystem and its storage targets: both come and go. A line that is missing has
    counted nothing yet. Whoever writes to a stats file clears it (lctl set_param osc.*.stats=clear). What programs
    read through mmap() is among the servers' bytes alone.
    """

    def __init__(self, filesystem: str, proc: str = "/proc", sys: str = "/sys") -> None:
        self.source = f"lustre:{filesystem}"
        self._filesystem = filesystem
        self._roots = (f"{proc}/fs/lustre", f"{sys}/kernel/debug/lustre")
        name = re.escape(filesystem)
        # lustrefs-ffff88105db50000, and lustrefs-OST0000-osc-ffff88105db50000; a metadata server's end in -osc-MDT0000
        self._folders = {
            "llite": re.compile(rf"{name}-[0-9a-f]+"),
            "osc": re.compile(rf"{name}-OST[0-9a-f]+-osc-[0-9a-f]+"),
        }

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where it is not mounted or its counts may not be read."""
        mounts, targets = (dict(self._stats(kind)) for kind in ("llite", "osc"))
        if not mounts and not targets:
            raise NoData(f"Lustre tells nothing of a filesystem {self._filesystem} on this host", DENIED)
        # what the other kind counts is nothing here; where there is none of that kind, it is unknown
        no_app = (0, 0) if mounts else (None, None)
        no_device = (0,) * 6 if targets else (None,) * 6
        parts: dict[str, tuple[float | None, ...]] = {
            f"llite {name}": (*no_device, _sum(stats, "read_bytes"), _sum(stats, "write_bytes"))
            for name, stats in mounts.items()
        }
        for name, stats in targets.items():
            parts[f"osc {name}"] = (*_calls(stats, "read"), *_calls(stats, "write"), *no_app)
        attributes = {"source": "lustre llite and osc", "fs": self._filesystem}
        return (Reading("filesystem", f"lustre:{self._filesystem}", attributes, (None,) * 8, parts=parts),)

    def _stats(self, kind: str) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
        """Stats of the first place that shows any of a kind: /proc until Lustre 2.11, debugfs since."""
        for root in self._roots:
            folder = Path(root, kind)
            try:
                names = [name for name in sorted(os.listdir(folder)) if self._folders[kind].fullmatch(name)]  # noqa: PTH208  # names
                texts = [(name, _text(folder / name / "stats")) for name in names]
            except FileNotFoundError:
                continue
            except PermissionError:
                raise NoData(f"{folder} may not be read", DENIED) from None
            found = [(name, parse_stats(text)) for name, text in texts if text is not None]
            if found:
                yield from found
                return


def _text(path: Path) -> str | None:
    """A stats file; None for one that went since its folder was listed: the others count on."""
    try:
        return path.read_text(encoding="ascii")
    except FileNotFoundError:
        return None


def _sum(stats: Mapping[str, tuple[int, int]], name: str) -> int:
    return stats.get(name, (0, 0))[1]


def _calls(stats: Mapping[str, tuple[int, int]], way: str) -> tuple[float, float, float]:
    """Bytes, calls and seconds of one way over the network."""
    calls, microseconds = stats.get(f"ost_{way}", (0, 0))
    return _sum(stats, f"{way}_bytes"), calls, microseconds / 1e6
