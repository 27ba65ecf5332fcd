"""Reads small files that may be replaced at any time, without waiting for a pipe and without end."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple


class Mark(NamedTuple):
    """What changes when a file is written or replaced."""

    modified_ns: int
    size: int
    inode: int
    device: int


def mark_of(path: str) -> Mark:
    """Look at a file, through symbolic links; OSError where there is none."""
    return _mark(os.stat(path))  # noqa: PTH116  # one call on every scrape


def read_bounded(path: str, bytes_max: int) -> tuple[Mark, bytes]:
    """Mark and content of a file; OSError for one that cannot be read, is no plain file, or is larger."""
    with open(path, "rb", opener=_without_waiting) as file:
        mark = _mark(os.fstat(file.fileno()))
        content = file.read(bytes_max + 1)
    if len(content) > bytes_max:
        raise OSError(errno.EFBIG, f"it has more than {bytes_max} bytes")
    return mark, content


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe that nobody writes to would block for ever


def _mark(found: os.stat_result) -> Mark:
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is no file")
    return Mark(found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev)
