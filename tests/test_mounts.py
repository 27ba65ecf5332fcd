from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.base import CollectError, NoData
from kvtally.collectors.mounts import (
    Mount,
    mount_of,
    parse_mountinfo,
    process_of,
    read_of_process,
    without_links,
)

if TYPE_CHECKING:
    from pathlib import Path

MOUNTINFO = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw,discard
30 27 253:0 / /mnt/kv\040cache rw,noatime shared:1 master:2 - xfs /dev/mapper/vg-kv rw
31 30 0:40 / /mnt/kv\040cache/far rw - nfs4 server:/export rw,vers=4.2
32 27 0:41 / /dev/shm rw - tmpfs tmpfs rw
"""
TABLE = parse_mountinfo(MOUNTINFO)


def test_the_longest_mount_point_holds_a_path() -> None:
    assert mount_of("/mnt/kv cache/x", TABLE) == Mount("/mnt/kv cache", "xfs", "/dev/mapper/vg-kv", "253:0", "/")
    assert mount_of("/mnt/kv cache", TABLE).fstype == "xfs"
    assert mount_of("/mnt/kv cache/far/a", TABLE).source == "server:/export"
    assert mount_of("/mnt/kv caches", TABLE).mount_point == "/"
    assert mount_of("/", TABLE).mount_point == "/"


def test_of_two_mounts_at_one_point_the_later_holds() -> None:
    text = "1 0 8:1 / /kv rw - ext4 /dev/sda1 rw\n2 1 8:2 / /kv rw - xfs /dev/sda2 rw\n"
    assert mount_of("/kv/x", parse_mountinfo(text)).device == "8:2"


def test_a_path_on_no_mount_is_an_error_with_a_hint() -> None:
    with pytest.raises(CollectError, match="no mount holds kv/x") as caught:
        mount_of("kv/x", TABLE)
    assert "absolute path" in caught.value.hint


def test_mount_lines_of_another_form_are_left_out() -> None:
    assert parse_mountinfo("\nnonsense\n1 2 3:4 / /a rw shared:1\n") == []


@pytest.mark.parametrize(
    ("fstype", "remote"),
    [("nfs4", True), ("wekafs", True), ("fuse.juicefs", True), ("fuseblk", False), ("xfs", False), ("tmpfs", False)],
)
def test_a_mount_is_remote_where_a_server_or_a_program_answers(fstype: str, remote: bool) -> None:
    assert Mount("/kv", fstype, "source", "0:40", "/").is_remote is remote


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root directory whose /var/kv is a link to a link to a folder."""
    (tmp_path / "data" / "kv").mkdir(parents=True)
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "kv").symlink_to("/opt/kv")
    (tmp_path / "opt").symlink_to("data/.")
    return tmp_path


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/var/kv/cache", "/data/kv/cache"),  # an absolute link stays below the root, /opt is a link to data
        ("/var/kv/../x", "/data/x"),
        ("/../var//./kv/", "/data/kv"),
        ("/not/there", "/not/there"),
        ("/", "/"),
    ],
)
def test_links_are_followed_as_a_process_with_that_root_sees_them(root: Path, path: str, expected: str) -> None:
    assert without_links(path, TABLE, str(root)) == expected


def test_a_ring_of_links_ends(root: Path) -> None:
    (root / "ring").symlink_to("/ring")
    assert without_links("/ring/x", TABLE, str(root)) == "/ring/x"


def test_nothing_below_a_remote_mount_is_touched(root: Path) -> None:
    far = root / "mnt" / "kv cache" / "far"
    far.mkdir(parents=True)
    (far / "link").symlink_to("/data")
    assert without_links("/mnt/kv cache/far/link/x", TABLE, str(root)) == "/mnt/kv cache/far/link/x"


def test_without_a_root_links_are_those_of_this_process(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    assert without_links(f"{tmp_path}/link/x", TABLE) == os.path.realpath(f"{tmp_path}/kv/x")


def test_a_path_that_is_not_absolute_is_an_error() -> None:
    with pytest.raises(CollectError, match="kv/x is not an absolute path"):
        without_links("kv/x", TABLE)


def test_a_process_is_ours_a_number_or_asked_for() -> None:
    assert process_of(None) == "self"
    assert process_of(77) == process_of(lambda: 77) == "77"
    with pytest.raises(NoData, match="the engine's process is not known"):
        process_of(lambda: None)


def test_what_may_not_be_read_of_a_process_is_no_data_with_a_reason(tmp_path: Path) -> None:
    with pytest.raises(NoData, match="process 77 is gone"):
        read_of_process(str(tmp_path), "77", "mountinfo")
    (tmp_path / "77" / "mountinfo").mkdir(parents=True)  # reading a folder fails for every user
    with pytest.raises(NoData, match="the mounts of process 77 may not be read: Is a directory") as caught:
        read_of_process(str(tmp_path), "77", "mountinfo")
    assert "CAP_SYS_PTRACE" in caught.value.hint
