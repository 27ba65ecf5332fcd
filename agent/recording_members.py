"""Walks the files of a recording where they lie, in a folder or inside an archive, and writes nothing to disk.

meta.json                                what was recorded
vllm/1795409206962.prom                  raw /metrics body at that unix millisecond; lmcache/ likewise
gpu.jsonl, host.jsonl, scrapes.jsonl     one JSON object a line, each with "t" in unix seconds

A packed recording holds the same under one top folder of any name.
"""

from __future__ import annotations

import gzip
import lzma
import re
import stat
import tarfile
import zlib
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path
    from typing import IO

    Members = Generator["Member", None, None]
    Opener = Callable[[], AbstractContextManager[BinaryIO]]

PAGE_LIMIT_BYTES = 16 << 20
LINE_FILES = ("gpu.jsonl", "host.jsonl", "scrapes.jsonl")
FORMS = "a recording is a folder, or one packed as .tar.xz, .tar.gz or .tar, with a meta.json in it"

_NAME = re.compile(
    r"(?:(?P<top>[^/]+)/)?"
    r"(?:(?P<file>meta\.json|gpu\.jsonl|host\.jsonl|scrapes\.jsonl)"
    r"|(?P<folder>(?P<source>vllm|lmcache)[^/]*)/(?P<milliseconds>[0-9]{1,13})\.prom)"
)
_HEADER_LIMIT_BYTES = 1 << 20  # tarfile reads long names and extended attributes into memory whole
_ATTRIBUTE_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class RecordingError(Exception):
    """A recording that cannot be read or written; `hint` says what to do about it."""

    def __init__(self, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.hint = hint


class PageName(NamedTuple):
    """What a page's file name tells; "lmcache" sorts before "vllm", so that its page is there before the engine's."""

    t_ns: int
    source: str
    folder: str


class Member(NamedTuple):
    """One file that belongs to a recording: `kind` is a page's name, or "meta.json" or one of LINE_FILES."""

    name: str
    top: str | None
    kind: str | PageName
    size_bytes: int
    open: Callable[[], IO[bytes]]

    def body(self) -> bytes:
        """All of it; RecordingError beyond 16 MiB."""
        self.check_size()
        with self.open() as file:
            body = file.read(self.size_bytes + 1)
        if len(body) != self.size_bytes:
            raise RecordingError(f"{self.name} changed while it was read", "leave the recording alone meanwhile")
        return body

    def check_size(self) -> None:
        """RecordingError beyond 16 MiB."""
        if self.size_bytes > PAGE_LIMIT_BYTES:
            raise RecordingError(f"{self.name} is larger than 16 MiB", "no page is: remove it")


def folder_members(folder: Path) -> Members:
    """The members of a folder: meta.json, the lines, then the pages in time order."""
    names = {entry.name for entry in folder.iterdir()}
    pages = []
    for name in names:
        if name.startswith(("vllm", "lmcache")) and (folder / name).is_dir():
            for entry in (folder / name).iterdir():
                page = f"{name}/{entry.name}"
                if (parsed := _parse(page)) is not None:
                    pages.append((parsed[1], page))
    for kind, name in (*((name, name) for name in ("meta.json", *LINE_FILES) if name in names), *sorted(pages)):
        place = folder / name
        status = place.stat()
        if not stat.S_ISREG(status.st_mode):
            raise RecordingError(f"{place} is no plain file", "remove it")
        yield Member(name, None, kind, status.st_size, partial(_open, place))


def archive_members(opener: Opener) -> Members:
    """The members of a tar, plain or compressed with xz or gzip, in its own order; each may be opened until the next.

    A checksum at the end is verified when all have been taken.
    """
    with opener() as file:
        file.seek(0)
        head = file.read(6)
        file.seek(0)
        with (
            _decompressed(file, head) as stream,
            tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictHeader) as archive,
        ):
            while (header := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                name = header.name.removeprefix("./")
                parsed = _parse(name)
                if parsed is None:
                    continue
                if not header.isreg():
                    raise RecordingError(
                        f"{name} is no plain file", "pack it with tar --dereference --hard-dereference"
                    )
                yield Member(name, *parsed, header.size, partial(_content, archive, header))
            while stream.read(1 << 16):
                pass


@contextmanager
def damage_named(origin: str) -> Iterator[None]:
    """Turn whatever reading a damaged, foreign or forbidden file raises into RecordingError."""
    try:
        yield
    except FileNotFoundError as error:
        raise RecordingError(f"{error.filename} does not exist", FORMS) from error
    except (tarfile.TarError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, EOFError, ValueError) as error:
        raise RecordingError(f"{origin} is no recording or is damaged: {error}", FORMS) from error
    except OSError as error:
        raise RecordingError(f"{origin} cannot be read: {error.strerror or error}", "check its permissions") from error


class _StrictHeader(tarfile.TarInfo):
    """A damaged header is an error: tarfile itself takes it for the end of the archive, and the rest is lost unseen."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictHeader:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf) and len(buf) == tarfile.BLOCKSIZE:
                raise  # the block of zeros that ends an archive
            raise tarfile.ReadError(str(error)) from error
        if header.size < 0 or (header.type in _ATTRIBUTE_TYPES and header.size > _HEADER_LIMIT_BYTES):
            raise tarfile.ReadError("header of impossible size")
        return header


def _parse(name: str) -> tuple[str | None, str | PageName] | None:
    """Top folder and kind of a member that belongs to a recording; a name that climbs out of it does not."""
    found = _NAME.fullmatch(name)
    if found is None or found["top"] == "..":
        return None
    if found["file"]:
        return found["top"], found["file"]
    return found["top"], PageName(int(found["milliseconds"]) * 1_000_000, found["source"], found["folder"])


def _open(place: Path) -> IO[bytes]:
    return place.open("rb")


def _content(archive: tarfile.TarFile, header: tarfile.TarInfo) -> IO[bytes]:
    content = archive.extractfile(header)
    if content is None:
        raise tarfile.ReadError(f"{header.name} has no content")
    return content


def _decompressed(file: BinaryIO, head: bytes) -> AbstractContextManager[IO[bytes]]:
    if head == b"\xfd7zXZ\x00":
        return lzma.open(file)
    if head.startswith(b"\x1f\x8b"):
        return cast("AbstractContextManager[IO[bytes]]", gzip.open(file))
    return nullcontext(file)
