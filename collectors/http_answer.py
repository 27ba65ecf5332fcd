"""Reads one HTTP/1.1 answer from a connection: status, headers and body, bounded in time and in bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError
from kvtally.collectors.http_connection import seconds_left

if TYPE_CHECKING:
    import socket

_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: .*)?")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
_BUFFER_BYTES = 128 * 1024  # an engine's page in one piece
_HEAD_BYTES = 64 * 1024
_LINE_BYTES = 16 * 1024


class Head(NamedTuple):
    """Status and headers of an answer; names in lower case, repeated ones joined by commas."""

    status: int
    keeps_alive: bool
    headers: dict[str, str]


class Stream:
    """The bytes of one connection, all received before the deadline of the running exchange (monotonic seconds)."""

    def __init__(self, connection: socket.socket) -> None:
        self.received = 0
        self._deadline = 0.0
        self._connection = connection
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0

    @property
    def is_drained(self) -> bool:
        """Whether all that was received has been taken."""
        return self._begin == self._end

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def send(self, request: bytes, deadline: float) -> None:
        """Begin an exchange; `received` counts the bytes of its answer."""
        self.received = 0
        self._deadline = deadline
        self._connection.settimeout(seconds_left(deadline))
        self._connection.sendall(request)

    def line(self) -> bytes:
        """Return a line without its end; EOFError if the stream ends first, CollectError if it is too long."""
        while True:
            found = self._buffer.find(b"\n", self._begin, self._end)
            if (self._end if found < 0 else found) - self._begin > _LINE_BYTES:
                raise CollectError(f"a line of the headers or between chunks has more than {_LINE_BYTES} bytes")
            if found >= 0:
                break
            if not self._fill():
                raise EOFError
        text = bytes(self._view[self._begin : found])
        self._begin = found + 1
        return text.removesuffix(b"\r")

    def lines(self) -> list[bytes]:
        """Return the lines up to an empty one: headers or trailers."""
        end = self._buffer.find(b"\r\n\r\n", self._begin, min(self._end, self._begin + _LINE_BYTES))
        if end > self._begin:
            # all of them are there, as nearly always: taken at one stroke
            together = bytes(self._view[self._begin : end]).split(b"\r\n")
            if all(together) and not any(b"\n" in line for line in together):
                self._begin = end + 4
                return together
        found: list[bytes] = []
        size = 0
        while line := self.line():
            size += len(line) + 2
            if size > _HEAD_BYTES:
                raise CollectError(f"more than {_HEAD_BYTES} bytes of headers")
            found.append(line)
        return found

    def take(self, count: int) -> memoryview:
        """Return up to `count` bytes, valid until the next call; none at the end of the stream."""
        if self.is_drained and not self._fill():
            return self._view[:0]
        begin = self._begin
        self._begin = min(begin + count, self._end)
        return self._view[begin : self._begin]

    def take_together(self, count: int) -> memoryview:
        """Return `count` bytes if the buffer holds so many and the stream does not end before, else fewer."""
        while self._end - self._begin < min(count, _BUFFER_BYTES) and self._fill():
            pass
        return self.take(count) if count else self._view[:0]

    def _fill(self) -> int:
        """Receive what is there, at least a byte; 0 at the end of the stream."""
        if self._begin:
            kept = self._end - self._begin
            self._buffer[:kept] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, kept
        self._connection.settimeout(seconds_left(self._deadline))
        count = self._connection.recv_into(self._view[self._end :])
        self._end += count
        self.received += count
        return count


def read_head(stream: Stream) -> Head:
    """Read status line and headers, passing over interim answers (1xx); EOFError if the stream ends before."""
    while True:
        first = stream.line()
        status = _STATUS_LINE.fullmatch(first)
        if status is None:
            raise CollectError(
                f"not an HTTP server: it answers {first[:60].decode('latin-1')!a}", "check the port of the URL"
            )
        headers: dict[str, str] = {}
        for line in stream.lines():
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise CollectError(f"malformed header in an answer with status {int(status[2])}")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if not status[2].startswith(b"1"):
            connection = headers.get("connection", "").lower()
            keeps_alive = "close" not in connection and (status[1] == b"1" or "keep-alive" in connection)
            return Head(int(status[2]), keeps_alive, headers)


def read_body(stream: Stream, headers: dict[str, str], max_bytes: int) -> tuple[bytes, bool]:
    """Return the body, and whether its end was marked, so that the connection can serve another request."""
    body = bytearray()
    is_marked = True
    coding = headers.get("transfer-encoding", "").lower()
    if coding == "chunked":
        _read_chunks(stream, body, max_bytes)
    elif coding:
        raise CollectError(f"unknown transfer encoding {coding[:40]!a}")
    elif "content-length" in headers:
        lengths = {length.strip() for length in headers["content-length"].split(",")}
        length = lengths.pop()
        if lengths or not re.fullmatch(r"[0-9]{1,18}", length):
            raise CollectError("malformed Content-Length")
        _check_size(int(length), max_bytes)
        whole = stream.take_together(int(length))
        if len(whole) == int(length) and "content-encoding" not in headers:
            return bytes(whole), is_marked  # an engine's page, copied once
        body += whole
        _read_exactly(stream, int(length) - len(whole), body, max_bytes)
    else:
        is_marked = False
        while piece := stream.take(max_bytes):
            _check_size(len(body) + len(piece), max_bytes)
            body += piece
    encoding = headers.get("content-encoding", "identity").lower()
    if encoding in {"gzip", "x-gzip"}:
        return _inflated(bytes(body), max_bytes), is_marked
    if encoding not in {"identity", ""}:
        raise CollectError(f"unknown content encoding {encoding[:40]!a}")
    return bytes(body), is_marked


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise CollectError(f"the body has more than {max_bytes} bytes")


def _read_exactly(stream: Stream, count: int, body: bytearray, max_bytes: int) -> None:
    """Append `count` bytes of the stream to the body."""
    end = len(body) + count
    _check_size(end, max_bytes)
    while len(body) < end:
        piece = stream.take(end - len(body))
        if not piece:
            raise CollectError(f"the body ends after {len(body)} of {end} bytes")
        body += piece


def _read_chunks(stream: Stream, body: bytearray, max_bytes: int) -> None:
    try:
        while True:
            size = _CHUNK_SIZE.fullmatch(stream.line())
            if size is None:
                raise CollectError(f"malformed chunk after {len(body)} bytes of the body")
            count = int(size[1], 16)
            if not count:
                break
            _read_exactly(stream, count, body, max_bytes)
            if stream.line():
                raise CollectError(f"malformed chunk after {len(body)} bytes of the body")
        stream.lines()  # trailers say nothing about a page
    except EOFError:
        raise CollectError(f"the body ends after {len(body)} bytes, in the middle of its chunks") from None


def _inflated(body: bytes, max_bytes: int) -> bytes:
    import zlib  # noqa: PLC0415  # only a server that ignores Accept-Encoding makes us need it

    inflater = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        inflated = inflater.decompress(body, max_bytes + 1)
    except zlib.error:
        raise CollectError("the gzip body is corrupt") from None
    _check_size(len(inflated), max_bytes)
    if not inflater.eof or inflater.unused_data:
        raise CollectError("the gzip body ends early, or another follows it")
    return inflated
