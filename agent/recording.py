"""Reads a recording, a folder or a packed one, as one stream of events in time order.

requests.jsonl and busy.jsonl in it are the truth that results are checked against: they are never read.
"""

from __future__ import annotations

import heapq
import os
import re
import zlib
from array import array
from contextlib import closing, nullcontext
from decimal import Decimal  # noqa: TC003  # msgspec resolves the annotations at run time
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, cast

import msgspec

from kvtally.agent.recording_members import (
    FORMS,
    LINE_FILES,
    Member,
    PageName,
    RecordingError,
    archive_members,
    damage_named,
    folder_members,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from importlib.resources.abc import Traversable

    from kvtally.agent.recording_members import Members

__all__ = ["Event", "Failure", "GpuLine", "HostLine", "Page", "Recording", "RecordingError", "open_recording"]

LINE_LIMIT_BYTES = 1 << 20
# Compressed pages, or lines of one file, held at once: several days of 5 s scrapes whose members lie in any order.
HELD_LIMIT_BYTES = 512 << 20
BLOCK_BYTES = 256 << 10
LAST_NS = 2**63 - 1


class Page(NamedTuple):
    """The raw body of one metrics page; `source` is "vllm" or "lmcache"."""

    t_ns: int
    source: str
    body: bytes


class Failure(NamedTuple):
    """A scrape that failed, from scrapes.jsonl."""

    t_ns: int
    source: str
    took_seconds: float
    error: str


class GpuLine(NamedTuple):
    """One line of gpu.jsonl."""

    t_ns: int
    line: dict[str, Any]


class HostLine(NamedTuple):
    """One line of host.jsonl."""

    t_ns: int
    line: dict[str, Any]


Event = Page | Failure | GpuLine | HostLine


class Recording:
    """A recording whose every line and member name has been checked; events() may be called any number of times.

    Opening reads it once, each events() once more. Lines are held compressed, about a tenth of their size. A page
    that lies before its turn in an archive waits compressed likewise, HELD_LIMIT_BYTES in all or RecordingError;
    none waits in a folder or in what `pack` wrote.

    name        the recording's own name
    meta        its meta.json
    missing     which of gpu.jsonl, host.jsonl, scrapes.jsonl and lmcache (pages) it has nothing of
    notes       what was tolerated, a sentence each
    page_count  number of pages
    first_ns    unix nanoseconds of the first page; last_ns of the last
    """

    def __init__(self, members: Callable[[], Members], origin: str) -> None:
        self.notes: tuple[str, ...] = ()
        self._members = members
        self._origin = origin
        self._pages: list[PageName] = []
        self._lines: dict[str, _Lines] = {}
        meta = self._index()
        if meta is None:
            raise RecordingError(f"{origin} is no recording: it holds no meta.json", FORMS)
        if not self._pages:
            raise RecordingError(f"{origin} holds no pages", "they lie in it as vllm/<unix milliseconds>.prom")
        self.meta = meta
        name = meta.get("name")
        self.name = name if name and isinstance(name, str) else re.sub(r"\.tar(\.\w+)?$", "", origin)
        with_lmcache = any(page.source == "lmcache" for page in self._pages)
        self.missing = (
            *(name for name in LINE_FILES if name not in self._lines),
            *(() if with_lmcache else ("lmcache",)),
        )
        self.page_count = len(self._pages)
        self.first_ns = self._pages[0].t_ns
        self.last_ns = self._pages[-1].t_ns

    def events(self) -> Iterator[Event]:
        """All events by time; at one instant GPU, host, failed scrapes, LMCache's page, the engine's page."""
        streams: list[Iterable[Event]] = [
            (GpuLine(t_ns, _decode(line)) for t_ns, line in self._lines.get("gpu.jsonl", ())),
            (HostLine(t_ns, _decode(line)) for t_ns, line in self._lines.get("host.jsonl", ())),
            (_failure(t_ns, line) for t_ns, line in self._lines.get("scrapes.jsonl", ())),
            self._page_events(),
        ]
        return heapq.merge(*streams, key=itemgetter(0))  # equal instants come in the order of the streams

    def _index(self) -> dict[str, Any] | None:
        meta = None
        seen: set[str | PageName] = set()
        tops: set[str | None] = set()
        with damage_named(self._origin), closing(self._members()) as members:
            for member in members:
                tops.add(member.top)
                if member.kind in seen or len(tops) > 1:
                    reason = f"{self._origin} holds more than one recording, or {member.name} twice"
                    raise RecordingError(reason, "pack each recording by itself")
                seen.add(member.kind)
                if isinstance(member.kind, PageName):
                    member.check_size()
                    if member.kind.t_ns > LAST_NS:
                        raise RecordingError(f"{member.name} is named for no instant", "pages carry unix milliseconds")
                    self._pages.append(member.kind)
                elif member.kind == "meta.json":
                    meta = _read_meta(member)
                else:
                    self._read_lines(member.kind, member)
        self._pages.sort()
        return meta

    def _read_lines(self, name: str, member: Member) -> None:
        lines = _Lines()
        count = 0
        with member.open() as file:
            for number, raw in enumerate(iter(lambda: file.readline(LINE_LIMIT_BYTES + 1), b""), 1):
                if len(raw) > LINE_LIMIT_BYTES:
                    raise RecordingError(f"{name} line {number} is longer than 1 MiB", "repair or remove the line")
                line = raw.strip()
                if not line:
                    continue
                try:
                    t_ns, is_event = _check_line(name, line)
                except (ValueError, ArithmeticError, RecursionError) as error:
                    if not raw.endswith(b"\n"):  # only the last line can lack its end
                        self.notes += (f"{name} line {number} is torn and was left out",)
                        break
                    raise RecordingError(f"{name} line {number}: {error}", "repair or remove the line") from error
                count += 1
                if is_event:
                    lines.add(t_ns, line)
                    _check_held(lines.held_bytes, self._origin)
        lines.close_block()
        if count:
            self._lines[name] = lines

    def _page_events(self) -> Iterator[Page]:
        awaited = iter(self._pages)
        turn = next(awaited, None)
        held: dict[PageName, bytes] = {}
        held_bytes = 0
        with damage_named(self._origin), closing(self._members()) as members:
            for member in members:
                page = member.kind
                if not isinstance(page, PageName):
                    continue
                body = member.body()
                if page != turn:
                    held[page] = zlib.compress(body, 1)
                    held_bytes += len(held[page])
                    _check_held(held_bytes, self._origin)
                    continue
                yield Page(page.t_ns, page.source, body)
                while (turn := next(awaited, None)) is not None and turn in held:
                    packed = held.pop(turn)
                    held_bytes -= len(packed)
                    yield Page(turn.t_ns, turn.source, zlib.decompress(packed))
                if turn is None:
                    return
        raise RecordingError(f"{self._origin} lost pages while it was read", "leave the recording alone meanwhile")


def open_recording(path: str | os.PathLike[str] | Traversable | BinaryIO) -> Recording:
    """Open a folder, a packed recording, a package resource or a seekable binary file; RecordingError if it is none.

    A file object stays open, and nobody else may move in it while events() runs.
    """
    if isinstance(path, str | os.PathLike):
        place = Path(path)
        if place.is_dir():
            return Recording(lambda: folder_members(place), place.resolve().name)
        return Recording(lambda: archive_members(lambda: place.open("rb")), place.name)
    if hasattr(path, "read"):
        file = cast("BinaryIO", path)
        name = Path(str(getattr(file, "name", "recording"))).name
        if not file.seekable():
            raise RecordingError(f"{name} cannot be read twice", "save it to a file first")
        return Recording(lambda: archive_members(lambda: nullcontext(file)), name)
    return Recording(lambda: archive_members(lambda: cast("BinaryIO", path.open("rb"))), path.name)


class _Stamp(msgspec.Struct):
    t: Decimal  # exact from the text; a float would be up to 119 ns off


class _ScrapeLine(_Stamp):
    source: str
    took_seconds: float
    error: str | None = None


class _Lines:
    """Lines in time order whatever order they came in, held in compressed blocks that are opened when due."""

    def __init__(self) -> None:
        self.held_bytes = 0
        self._blocks: list[tuple[array[int], bytes]] = []
        self._open: list[tuple[int, bytes]] = []
        self._open_bytes = 0

    def add(self, t_ns: int, line: bytes) -> None:
        self._open.append((t_ns, line))
        self._open_bytes += len(line)
        if self._open_bytes >= BLOCK_BYTES:
            self.close_block()

    def close_block(self) -> None:
        if self._open:
            packed = zlib.compress(b"\n".join(line for _, line in self._open), 1)
            self._blocks.append((array("q", (t_ns for t_ns, _ in self._open)), packed))
            self.held_bytes += len(packed)
            self._open = []
            self._open_bytes = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        waiting: list[tuple[int, int, int, bytes]] = []  # time, then the place in the file
        starts = sorted((min(times), number) for number, (times, _) in enumerate(self._blocks))
        for start_ns, number in starts:
            while waiting and waiting[0][0] < start_ns:
                t_ns, _, _, line = heapq.heappop(waiting)
                yield t_ns, line
            times, packed = self._blocks[number]
            for position, line in enumerate(zlib.decompress(packed).split(b"\n")):
                heapq.heappush(waiting, (times[position], number, position, line))
        while waiting:
            t_ns, _, _, line = heapq.heappop(waiting)
            yield t_ns, line


def _check_line(name: str, line: bytes) -> tuple[int, bool]:
    """Nanoseconds of a line, and whether it is an event: a scrape that went well is told by its page."""
    stamp: _Stamp = msgspec.json.decode(line, type=_ScrapeLine if name == "scrapes.jsonl" else _Stamp)
    _decode(line)
    if not stamp.t.is_finite() or not 0 <= stamp.t < LAST_NS // 10**9:
        raise ValueError("t is not in unix seconds")
    return round(stamp.t * 10**9), not isinstance(stamp, _ScrapeLine) or bool(stamp.error)


def _decode(line: bytes) -> dict[str, Any]:
    return msgspec.json.decode(line, type=dict[str, Any])


def _failure(t_ns: int, line: bytes) -> Failure:
    scrape = msgspec.json.decode(line, type=_ScrapeLine)
    return Failure(t_ns, scrape.source, scrape.took_seconds, scrape.error or "")


def _read_meta(member: Member) -> dict[str, Any]:
    try:
        return _decode(member.body())
    except (msgspec.DecodeError, RecursionError) as error:
        raise RecordingError(f"{member.name}: {error}", "meta.json is one JSON object") from error


def _check_held(held_bytes: int, origin: str) -> None:
    if held_bytes > HELD_LIMIT_BYTES:
        raise RecordingError(f"{origin} is too large to put in order in memory", "unpack it and give its folder")
