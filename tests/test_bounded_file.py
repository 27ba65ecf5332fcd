from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtally.collectors.bounded_file import mark_of, read_bounded


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_a_file_is_read_whole_with_its_mark(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    mark, content = read_bounded(str(path), 5)
    assert (content, mark.size, mark.modified_ns) == (b"12345", 5, path.stat().st_mtime_ns)
    assert mark_of(str(path)) == mark


def test_an_empty_file_has_no_content(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert read_bounded(str(tmp_path / "file"), 5)[1] == b""


def test_a_file_that_is_larger_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123456")
    with pytest.raises(OSError, match="it has more than 5 bytes"):
        read_bounded(str(tmp_path / "file"), 5)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    opened = open_files()
    for path in (tmp_path / "pipe", tmp_path, tmp_path / "missing"):
        with pytest.raises(OSError, match=r"it is no file|Is a directory|No such file"):
            read_bounded(str(path), 5)
        with pytest.raises(OSError, match=r"it is no file|No such file"):
            mark_of(str(path))
    assert open_files() == opened


def test_another_file_under_the_same_name_has_another_mark(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_text("same")
        os.utime(path, ns=(0, 0))
    before = mark_of(str(one))
    two.replace(one)
    assert mark_of(str(one)) != before


def test_a_link_has_the_mark_of_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    assert mark_of(str(tmp_path / "link")) == mark_of(str(tmp_path / "file"))
