"""What programs read and wrote through IBM Storage Scale (GPFS) on this node, as mmpmon tells it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError, NoData, Reading

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

MMPMON = "/usr/lpp/mmfs/bin/mmpmon"
TIMEOUT_SECONDS = 5.0
REAPING_SECONDS = 1.0
COUNTS = ("_br_", "_bw_", "_rdc_", "_wc_")
NO_FILESYSTEM = "1"
NEEDS = "mmpmon needs root on the node itself and a running mmfsd: see `mmgetstate`"
ELSEWHERE = "name its path, or add the page of gpfs_exporter or of the Storage Scale bridge as a [[page]]"


class Answer(NamedTuple):
    """What a command left behind."""

    status: int
    output: str
    errors: str


def run(command: Sequence[str], request: str, timeout_seconds: float) -> Answer:
    """Run a command without a shell, with `request` as its input; TimeoutError when it takes longer."""
    import subprocess  # noqa: PLC0415  # loaded where there is a GPFS; a fixed command, no shell

    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace")
    try:
        output, errors = child.communicate(request, timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        child.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that the kernel holds is left to its end
            child.communicate(timeout=REAPING_SECONDS)
        raise TimeoutError from None
    return Answer(child.returncode, output, errors)


# _fs_io_s_ _n_ 10.22.0.106 _nn_ node1 _rc_ 0 _t_ 1579358234 _tu_ 53212 _cl_ gpfs.domain _fs_ scratch _d_ 48
#   _br_ 205607400434 _bw_ 74839282351 _oc_ 2377656 _cc_ 2201576 _rdc_ 59420404 _wc_ 18874626 _dir_ 40971 _iu_ 544768
def parse_fs_io_s(text: str) -> list[dict[str, str]]:
    """Answers to fs_io_s by mmpmon's own keys; lines of other requests are left out."""
    lines = (line.split() for line in text.splitlines())
    return [dict(zip(line[1::2], line[2::2], strict=False)) for line in lines if line[:1] == ["_fs_io_s_"]]


class Gpfs:
    """Reads every mounted filesystem of this node, or one, through mmpmon's fs_io_s.

    Bytes are those of all programs on the node, whether the disks gave them or the pagepool: device bytes stay
    unknown. Counts run since the mount or since somebody's last mmpmon reset.
    """

    def __init__(
        self,
        filesystem: str | None = None,
        mmpmon: str = MMPMON,
        *,
        runner: Callable[[Sequence[str], str, float], Answer] = run,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        self.source = "gpfs" if filesystem is None else f"gpfs:{filesystem}"
        self._filesystem = filesystem
        self._mmpmon = mmpmon
        self._runner = runner
        self._timeout_seconds = timeout_seconds

    def collect(self) -> tuple[Reading, ...]:
        """Read now; NoData where mmpmon may not or cannot tell, CollectError where it tells of a failure."""
        told = parse_fs_io_s(self._ask())
        if not told:
            raise NoData("mmpmon told nothing", NEEDS)
        for answer in told:
            status = answer.get("_rc_")
            if status == NO_FILESYSTEM:
                raise NoData("no GPFS filesystem is mounted on this node", "mount it: mmmount")
            if status != "0":
                raise CollectError(f"mmpmon answered fs_io_s with return code {status}", NEEDS)
        readings = tuple(_reading(answer) for answer in told if self._filesystem in {None, answer.get("_fs_")})
        if not readings:
            others = ", ".join(answer.get("_fs_", "?") for answer in told)
            raise NoData(f"mmpmon tells of {others} and not of {self._filesystem}", "mount it: mmmount")
        return readings

    def _ask(self) -> str:
        try:
            answer = self._runner((self._mmpmon, "-p", "-s"), "fs_io_s\n", self._timeout_seconds)
        except FileNotFoundError:
            raise NoData(f"there is no {self._mmpmon} here", ELSEWHERE) from None
        except PermissionError:
            raise NoData(f"{self._mmpmon} may not be run", NEEDS) from None
        except TimeoutError:
            raise CollectError(f"mmpmon did not answer within {self._timeout_seconds:g} s", NEEDS) from None
        if answer.status:
            said = (answer.errors or answer.output).strip().partition("\n")[0][:200]
            raise NoData(f"mmpmon ended with status {answer.status}: {said or 'it said nothing'}", NEEDS)
        return answer.output


def _reading(answer: Mapping[str, str]) -> Reading:
    try:
        read, written, reads, writes = (int(answer[key]) for key in COUNTS)
        attributes = {"source": "mmpmon", "fs": answer["_fs_"], "node": answer["_nn_"]}
    except (KeyError, ValueError):
        raise CollectError("mmpmon answered fs_io_s in a form that is not known") from None
    values = (None, reads, None, None, writes, None, read, written)
    return Reading("filesystem", f"gpfs:{answer['_fs_']}", attributes, values)
