from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError, scrape
from kvtally.collectors.gpfs import Answer, Gpfs, parse_fs_io_s, run

if TYPE_CHECKING:
    from collections.abc import Sequence

TOLD = (Path(__file__).parent / "fixtures" / "storage" / "mmpmon_fs_io_s.txt").read_text()


class Mmpmon:
    """What a command answers, and how it was asked."""

    def __init__(self, output: str = "", errors: str = "", status: int = 0, raises: Exception | None = None) -> None:
        self.asked: list[tuple[tuple[str, ...], str, float]] = []
        self._answer = Answer(status, output, errors)
        self._raises = raises

    def __call__(self, command: Sequence[str], request: str, timeout_seconds: float) -> Answer:
        self.asked.append((tuple(command), request, timeout_seconds))
        if self._raises is not None:
            raise self._raises
        return self._answer


def test_every_filesystem_of_the_node_is_a_reading_of_its_programs_bytes() -> None:
    mmpmon = Mmpmon(TOLD)
    scratch, project = Gpfs(runner=mmpmon).collect()
    assert mmpmon.asked == [(("/usr/lpp/mmfs/bin/mmpmon", "-p", "-s"), "fs_io_s\n", 5.0)]
    assert [reading.name for reading in (scratch, project)] == ["gpfs:scratch", "gpfs:project"]
    assert scratch.attributes == {"source": "mmpmon", "fs": "scratch", "node": "ib-pitzer-rw02.ten"}
    # the pagepool's bytes are among them, so that what the disks gave is unknown
    assert scratch.values == (None, 59420404, None, None, 18874626, None, 205607400434, 74839282351)
    assert project.values == (None, 0, None, None, 0, None, 0, 0)


def test_one_filesystem_is_read_where_one_is_asked_for() -> None:
    collector = Gpfs("project", runner=Mmpmon(TOLD))
    assert collector.source == "gpfs:project"
    assert [reading.name for reading in collector.collect()] == ["gpfs:project"]
    outcome = scrape(Gpfs("kv", runner=Mmpmon(TOLD)), lambda: 0)
    assert (outcome.outcome, outcome.reason) == ("no_data", "mmpmon tells of scratch, project and not of kv")


def test_answers_to_other_requests_are_left_out() -> None:
    assert parse_fs_io_s("_ver_ _n_ 1.2.3.4 _nn_ node1 _v_ 3 _lv_ 9 _vt_ 0\n") == []


# as IBM's table of return codes and its example of a node without a mount
NO_MOUNT = "_fs_io_s_ _n_ 199.18.1.8 _nn_ node1 _rc_ 1 _t_ 1066660148 _tu_ 407431 _cl_ - _fs_ -\n"


@pytest.mark.parametrize(
    ("mmpmon", "outcome", "reason"),
    [
        (Mmpmon(NO_MOUNT), "no_data", "no GPFS filesystem is mounted on this node"),
        (
            Mmpmon(TOLD.replace("_rc_ 0", "_rc_ 668", 1)),
            "failed",
            "mmpmon answered fs_io_s with return code 668",
        ),
        (Mmpmon(TOLD.replace("_rc_ 0", "", 1)), "failed", "mmpmon answered fs_io_s with return code None"),
        (Mmpmon(TOLD.replace("_br_", "_rb_")), "failed", "mmpmon answered fs_io_s in a form that is not known"),
        (Mmpmon(TOLD.replace("_wc_ 0", "_wc_ x")), "failed", "mmpmon answered fs_io_s in a form that is not known"),
        (Mmpmon(), "no_data", "mmpmon told nothing"),
        (
            Mmpmon(errors="mmfsd is not running\nand more\n", status=1),
            "no_data",
            "mmpmon ended with status 1: mmfsd is not running",
        ),
        (Mmpmon(status=255), "no_data", "mmpmon ended with status 255: it said nothing"),
        (Mmpmon(raises=FileNotFoundError()), "no_data", "there is no /usr/lpp/mmfs/bin/mmpmon here"),
        (Mmpmon(raises=PermissionError()), "no_data", "/usr/lpp/mmfs/bin/mmpmon may not be run"),
        (Mmpmon(raises=TimeoutError()), "failed", "mmpmon did not answer within 5 s"),
    ],
)
def test_what_cannot_be_told_has_a_reason_and_a_hint(mmpmon: Mmpmon, outcome: str, reason: str) -> None:
    told = scrape(Gpfs(runner=mmpmon), lambda: 0)
    if reason.endswith("not known"):
        assert (told.outcome, told.reason, told.hint) == (outcome, reason, "")
    else:
        assert (told.outcome, told.reason) == (outcome, reason)
        assert told.hint


def program(folder: Path, text: str) -> str:
    path = folder / "mmpmon"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_real_child_gets_the_request_and_gives_its_answer(tmp_path: Path) -> None:
    answers = program(tmp_path, f'read request; test "$request" = fs_io_s || exit 3; test "$*" = "-p -s" || exit 4\n'
    f"cat <<'END'\n{TOLD}END")  # fmt: skip
    assert [reading.name for reading in Gpfs(mmpmon=answers).collect()] == ["gpfs:scratch", "gpfs:project"]


def test_a_real_child_that_fails_or_is_not_there_is_no_data(tmp_path: Path) -> None:
    failing = program(tmp_path, "echo 'must be root' >&2; exit 1")
    assert scrape(Gpfs(mmpmon=failing), lambda: 0).reason == "mmpmon ended with status 1: must be root"
    assert scrape(Gpfs(mmpmon=f"{tmp_path}/none"), lambda: 0).reason == f"there is no {tmp_path}/none here"
    Path(failing).chmod(0o644)
    assert scrape(Gpfs(mmpmon=failing), lambda: 0).reason == f"{failing} may not be run"


def test_a_real_child_that_hangs_is_ended(tmp_path: Path) -> None:
    seconds = f"60.{os.getpid()}"  # tells it from other tests' sleepers
    hanging = program(tmp_path, f"exec sleep {seconds}")
    with pytest.raises(CollectError, match=r"did not answer within 0\.2 s"):
        Gpfs(mmpmon=hanging, timeout_seconds=0.2).collect()
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # others end meanwhile
            commands.append(path.read_bytes())
    assert commands
    assert not any(seconds.encode() in command for command in commands)


def test_what_a_child_says_in_another_encoding_is_no_failure() -> None:
    assert run(("printf", r"\377"), "", 5) == Answer(0, "\ufffd", "")
