"""Writes a recording as it happens, so that a kill -9 costs at most the line being written, and packs one."""

from __future__ import annotations

import errno
import lzma
import os
import tarfile
from contextlib import contextmanager, suppress
from decimal import Decimal
from io import FileIO
from typing import TYPE_CHECKING, Any

import msgspec

from kvtally.agent.recording import LINE_LIMIT_BYTES, open_recording
from kvtally.agent.recording_members import PAGE_LIMIT_BYTES, PageName, RecordingError, folder_members

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path
    from typing import Self

SOURCES = ("vllm", "lmcache")
# Pages differ little from the page before, so 1 MiB of window finds what 64 MiB would, and reading one back takes
# 1 MiB of memory. A day of 86 kB pages packs in two minutes; the highest setting takes five and saves an eighth.
_FILTER = {
    "id": lzma.FILTER_LZMA2,
    "preset": 6,
    "dict_size": 1 << 20,
    "lc": 4,
    "pb": 0,
    "mf": lzma.MF_HC4,
    "nice_len": 273,
    "depth": 4,
}


class RecordingWriter:
    """Writes into a new or empty folder; every method raises RecordingError where it cannot (a full disk).

    Each call has handed its data to the kernel when it returns, and a call that raises leaves no torn line behind.
    """

    def __init__(self, folder: Path, meta: Mapping[str, Any]) -> None:
        self._folder = folder
        self._meta = dict(meta)
        self._files: dict[str, FileIO] = {}
        with _written(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise RecordingError(f"{folder} is not empty", "name a new folder for each recording")
        self.update_meta()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def page(self, source: str, t_ns: int, body: bytes) -> None:
        """Write one page's raw body; where its millisecond is taken (the clock went back) it gets the next free one."""
        if source not in SOURCES:
            raise ValueError(f"{source} is no source of pages")
        if len(body) > PAGE_LIMIT_BYTES:
            raise RecordingError(f"the page of {source} is larger than 16 MiB", "look at what answers there")
        milliseconds = t_ns // 1_000_000
        folder = self._folder / source
        with _written(folder):
            folder.mkdir(exist_ok=True)
            while (place := folder / f"{milliseconds}.prom").exists():
                milliseconds += 1
        _replace(place, body)

    def scrape_ok(self, t_ns: int, source: str, took_seconds: float) -> None:
        """Note that a scrape went well."""
        self._append("scrapes.jsonl", _scrape_line(t_ns, source, took_seconds, None))

    def failure(self, t_ns: int, source: str, took_seconds: float, error: str) -> None:
        """Note that a scrape failed."""
        self._append("scrapes.jsonl", _scrape_line(t_ns, source, took_seconds, error or "failed"))

    def gpu(self, line: Mapping[str, Any]) -> None:
        """Write one line of gpu.jsonl; its "t" is unix seconds (a Decimal is written exactly)."""
        self._append("gpu.jsonl", line)

    def host(self, line: Mapping[str, Any]) -> None:
        """Write one line of host.jsonl; its "t" is unix seconds (a Decimal is written exactly)."""
        self._append("host.jsonl", line)

    def update_meta(self, **fields: Any) -> None:
        """Add or replace keys of meta.json; a reader sees the old or the new whole."""
        self._meta |= fields
        _replace(self._folder / "meta.json", msgspec.json.format(msgspec.json.encode(self._meta), indent=1) + b"\n")

    def close(self) -> None:
        """Close the files; may be called twice."""
        while self._files:
            self._files.popitem()[1].close()

    def _append(self, name: str, line: Mapping[str, Any]) -> None:
        if not isinstance(line.get("t"), int | float | Decimal):
            raise TypeError(f"a line of {name} needs t, unix seconds")
        rest = memoryview(msgspec.json.Encoder(decimal_format="number").encode(line) + b"\n")
        if len(rest) > LINE_LIMIT_BYTES:
            raise RecordingError(f"a line of {name} is longer than 1 MiB", "watch fewer processes")
        place = self._folder / name
        with _written(place):
            file = self._files.get(name)
            if file is None:
                file = self._files[name] = FileIO(place, "a")
            whole_bytes = file.seek(0, os.SEEK_END)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                with suppress(OSError):  # the first error is the one to tell
                    file.truncate(whole_bytes)
                raise


def pack(folder: Path, destination: Path) -> None:
    """Pack a folder as NAME.tar.xz in the order that reads in one pass: meta.json, lines, then pages by time.

    The same folder gives the same bytes: times are the recording's own, no user is named, and what readers never
    read (requests.jsonl, busy.jsonl, files of others) stays out. RecordingError where it cannot.
    """
    if not destination.name.endswith(".tar.xz"):
        raise RecordingError(f"{destination} is no .tar.xz", "recordings are packed as NAME.tar.xz")
    if not folder.is_dir():
        raise RecordingError(f"{folder} is no folder", "name the folder of a recording")
    first_ns = open_recording(folder).first_ns
    top = destination.name.removesuffix(".tar.xz")
    part = destination.with_name(f".{destination.name}.part")
    with _written(destination):
        try:
            with (
                lzma.open(part, "wb", format=lzma.FORMAT_XZ, filters=[_FILTER]) as stream,
                tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
            ):
                for member in folder_members(folder):
                    header = tarfile.TarInfo(f"{top}/{member.name}")
                    t_ns = member.kind.t_ns if isinstance(member.kind, PageName) else first_ns
                    header.mtime = t_ns // 10**9
                    header.size = member.size_bytes  # lines written since then stay out
                    with member.open() as file:
                        archive.addfile(header, file)
            part.replace(destination)
        finally:
            part.unlink(missing_ok=True)


def _scrape_line(t_ns: int, source: str, took_seconds: float, error: str | None) -> dict[str, Any]:
    return {"t": Decimal(t_ns).scaleb(-9), "source": source, "took_seconds": took_seconds, "error": error}


def _replace(place: Path, data: bytes) -> None:
    part = place.with_name(f".{place.name}.part")  # no reader takes it for a page
    with _written(place):
        try:
            part.write_bytes(data)
            part.replace(place)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _written(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "make room; what was written before is whole" if full else "check the path and its permissions"
        raise RecordingError(f"{place} cannot be written: {error.strerror or error}", hint) from error
