"""Fetches a page by HTTP/1.1 GET over one kept connection, bounded in total time and in bytes."""  # noqa: A005  # always imported as kvtally.collectors.http

# Why not http.client or urllib3: their time-outs hold per socket operation, so that a server which sends a byte a
# second keeps them for ever, they put no bound on a body, and they cost 4 to 7 times the CPU and megabytes of memory.

from __future__ import annotations

import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from kvtally import __version__
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from threading import Thread
    from typing import Any

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:/[!-\"$->@-~]*)?(?:\?[!-\"$-~]*)?)(?:#[!-~]*)?",
    re.IGNORECASE,
)
_TARGET = re.compile(r"/[!-\"$-~]*")
_HEADER = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t -~]*)")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: .*)?")
_CHUNK_SIZE = re.compile(rb"([0-9a-fA-F]{1,15})[ \t]*(?:;.*)?")
_OWN_HEADERS = frozenset({"host", "connection", "accept-encoding", "content-length", "transfer-encoding"})
_BUFFER_BYTES = 128 * 1024
_HEAD_BYTES = 64 * 1024
_LINE_BYTES = 16 * 1024
_REDIRECTS = 3
_MOVED = frozenset({301, 302, 303, 307, 308})
_HINTS = {
    401: "the endpoint wants credentials: give them as a header in the configuration",
    403: "the endpoint refuses this client: check its access rules",
    404: "check the path of the URL: vLLM and LMCache serve their metrics at /metrics",
    503: "the server may still be starting",
}


class Response(NamedTuple):
    """A complete answer with status 200; `body` is unchunked and inflated."""

    status: int
    body: bytes
    content_type: str


class _Place(NamedTuple):
    """A URL taken apart."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class _Head(NamedTuple):
    """Status and headers of an answer; names in lower case, repeated ones joined by commas."""

    status: int
    minor_version: int
    headers: dict[str, str]

    @property
    def keeps_alive(self) -> bool:
        connection = self.headers.get("connection", "").lower()
        return "close" not in connection and (self.minor_version == 1 or "keep-alive" in connection)


class _Stale(Exception):  # noqa: N818  # not an error: the server had closed the kept connection
    """The connection ended before a byte of the answer came."""


class _Stream:
    """The bytes of one connection, each of them received before the deadline of the exchange (monotonic seconds)."""

    def __init__(self, connection: socket.socket) -> None:
        self.deadline = 0.0
        self._connection = connection
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._begin = self._end = 0

    @property
    def is_drained(self) -> bool:
        return self._begin == self._end

    def close(self) -> None:
        self._connection.close()

    def send(self, request: bytes) -> None:
        self._connection.settimeout(_remaining(self.deadline))
        self._connection.sendall(request)

    def _fill(self) -> int:
        """Receive what is there, at least a byte; 0 at the end of the stream."""
        if self._begin:
            kept = self._end - self._begin
            self._buffer[:kept] = self._buffer[self._begin : self._end]
            self._begin, self._end = 0, kept
        self._connection.settimeout(_remaining(self.deadline))
        count = self._connection.recv_into(self._view[self._end :])
        self._end += count
        return count

    def line(self) -> bytes:
        """Return a line without its end; EOFError if the stream ends first, CollectError if it is too long."""
        while (found := self._buffer.find(b"\n", self._begin, self._end)) < 0:
            if self._end - self._begin > _LINE_BYTES:
                raise CollectError(f"a header or chunk line has more than {_LINE_BYTES} bytes")
            if not self._fill():
                raise EOFError
        text = bytes(self._view[self._begin : found])
        self._begin = found + 1
        return text.removesuffix(b"\r")

    def take(self, count: int) -> memoryview:
        """Return up to `count` bytes, valid until the next call; none at the end of the stream."""
        if self.is_drained and not self._fill():
            return self._view[:0]
        begin = self._begin
        self._begin = min(begin + count, self._end)
        return self._view[begin : self._begin]


class Endpoint:
    """One server and one kept connection to it; not for use by two threads at once.

    timeout_seconds  bounds a whole `get`: look-up, connection, redirects, headers and body
    max_bytes        bounds a body, both as sent and inflated
    headers          are sent along, to this host and port only, and stand in no message
    ca_file          certificates to trust for https, instead of the system's
    resolve          is called as socket.getaddrinfo is

    Proxy settings of the environment are ignored. ValueError for a URL or header that cannot be sent as it is,
    and for a URL with credentials.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 2.0,
        max_bytes: int = 16 * 2**20,
        headers: Mapping[str, str] | None = None,
        ca_file: str | None = None,
        resolve: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        self.url = url
        self._place = _take_apart(url)
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._head = _request_head(self._place, headers or {})
        self._ca_file = ca_file
        self._resolve = resolve
        self._look_up: tuple[Thread, list[Any]] | None = None
        self._stream: _Stream | None = None
        self._doing = ""

    def close(self) -> None:
        """Close the connection; a later `get` opens another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def get(self, target: str | None = None) -> Response:
        """Fetch a path with its query, by default the URL's; CollectError for anything but a complete answer 200."""
        if target is None:
            target = self._place.target
        elif not _TARGET.fullmatch(target):
            raise ValueError("the target of a request is a path of printable ASCII characters that begins with /")
        answered = False
        try:
            response = self._follow(target, time.monotonic() + self._timeout_seconds)
            answered = True
        except TimeoutError:
            reason = f"timed out after {self._timeout_seconds:g} s while {self._doing} {self._place.origin}"
            raise CollectError(reason, "a busy server answers late: see whether a longer time-out helps") from None
        except OSError as error:
            raise _refusal(error, self._place, self._doing) from None
        else:
            return response
        finally:
            if not answered:
                self.close()

    def _follow(self, target: str, deadline: float) -> Response:
        visited = [target]
        while True:
            head, body = self._exchange(target, deadline)
            location = head.headers.get("location")
            if head.status not in _MOVED or location is None:
                return Response(head.status, body, head.headers.get("content-type", ""))
            target = _redirected(self._place, target, location)
            if target in visited:
                raise CollectError(f"redirect loop at {self._place.origin}{_path(target)}")
            if len(visited) > _REDIRECTS:
                raise CollectError(f"more than {_REDIRECTS} redirects from {self._place.origin}{_path(visited[0])}")
            visited.append(target)

    def _exchange(self, target: str, deadline: float) -> tuple[_Head, bytes]:
        """Send one request and read its answer, once more if the kept connection proves to be closed."""
        if self._stream is not None:
            try:
                return self._attempt(self._stream, target, deadline)
            except _Stale:
                self.close()
        self._stream = _Stream(self._connect(deadline))
        try:
            return self._attempt(self._stream, target, deadline)
        except _Stale:
            raise CollectError(f"{self._place.origin} closed the connection without an answer") from None

    def _attempt(self, stream: _Stream, target: str, deadline: float) -> tuple[_Head, bytes]:
        stream.deadline = deadline
        self._doing = "waiting for an answer of"
        try:
            stream.send(b"GET %s HTTP/1.1\r\n%s" % (target.encode("ascii"), self._head))
            head = _read_head(stream)
        except (_Stale, BrokenPipeError, ConnectionResetError):
            if stream.is_drained:
                raise _Stale from None
            raise
        except EOFError:
            raise CollectError(f"the headers of {self._place.origin} end early") from None
        self._doing = "reading the answer of"
        moved = head.status in _MOVED and "location" in head.headers
        if head.status != 200 and not moved:  # noqa: PLR2004  # the status of success
            raise CollectError(
                f"HTTP {head.status} from {self._place.origin}{_path(target)}",
                _HINTS.get(head.status, "see the log of the server"),
            )
        body, is_delimited = _read_body(stream, head, self._max_bytes)
        if not (is_delimited and head.keeps_alive and stream.is_drained):
            self.close()
        return head, body

    def _connect(self, deadline: float) -> socket.socket:
        self._doing = "looking up"
        addresses = self._addresses(deadline)
        self._doing = "connecting to"
        failure = OSError("no address")
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = socket.socket(family, kind, protocol)
            try:
                # An address that swallows packets must not use up the time of those behind it.
                connection.settimeout(_remaining(deadline) / (len(addresses) - index))
                connection.connect(address)
                if self._place.scheme == "https":
                    return self._secured(connection, deadline)
            except BaseException as error:
                connection.close()
                if not isinstance(error, OSError):
                    raise
                failure = error
            else:
                return connection
        raise failure

    def _secured(self, connection: socket.socket, deadline: float) -> socket.socket:
        import ssl  # noqa: PLC0415  # 3 MB that only https needs

        connection.settimeout(_remaining(deadline))
        context = ssl.create_default_context(cafile=self._ca_file)
        return context.wrap_socket(connection, server_hostname=self._place.host)

    def _addresses(self, deadline: float) -> list[Any]:
        """Resolve the host; in a thread if it is a name, since no look-up can be given a time-out."""
        place = self._place
        if ":" in place.host or re.fullmatch(r"[0-9.]+", place.host):
            return self._resolve(place.host, place.port, 0, socket.SOCK_STREAM)
        if self._look_up is None:  # else one from an earlier `get` still runs: threads must not pile up
            import threading  # noqa: PLC0415  # only names need it

            found: list[Any] = []
            thread = threading.Thread(target=self._look_up_into, args=(found,), daemon=True)
            self._look_up = (thread, found)
            thread.start()
        thread, found = self._look_up
        thread.join(_remaining(deadline))
        if thread.is_alive():
            raise TimeoutError
        self._look_up = None
        if isinstance(found[0], Exception):
            raise found[0]
        return list(found[0])

    def _look_up_into(self, found: list[Any]) -> None:
        try:
            found.append(self._resolve(self._place.host, self._place.port, 0, socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            found.append(error if isinstance(error, OSError) else socket.gaierror(str(error)))


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise TimeoutError
    return remaining


def _take_apart(url: str) -> _Place:
    if "@" in re.split(r"[/?#]", url.partition("://")[2] or url)[0]:
        raise ValueError("credentials in a URL are refused, they end up in logs: give them as a header")
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"not a URL of the form http://host:port/path: {ascii(url.partition('?')[0][:100])}")
    scheme = match["scheme"].lower()
    port = int(match["port"] or (443 if scheme == "https" else 80))
    if not 0 < port < 2**16:
        raise ValueError(f"no such port: {port}")
    target = match["target"]
    return _Place(scheme, match["host"].strip("[]").lower(), port, target if target.startswith("/") else f"/{target}")


def _path(target: str) -> str:
    return target.partition("?")[0]  # a query may hold a token


def _request_head(place: _Place, headers: Mapping[str, str]) -> bytes:
    """All of a request but its first line."""
    is_default_port = place.port == (443 if place.scheme == "https" else 80)
    lines = {
        "host": place.origin.rpartition(":")[0] if is_default_port else place.origin,
        "user-agent": f"kvtally/{__version__}",
        "accept": "text/plain;version=0.0.4",
        "accept-encoding": "identity",  # gzip costs the server more than the loopback saves
    }
    for name, value in headers.items():
        if not _HEADER.fullmatch(f"{name}: {value}"):
            raise ValueError(f"the header {ascii(name[:40])} cannot be sent: its name or value holds other characters")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"the header {name} is set by kvtally itself")
        lines[name.lower()] = value
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("ascii") + b"\r\n"


def _redirected(place: _Place, target: str, location: str) -> str:
    """Return the target that a redirect names; CollectError unless it is on the same host and port."""
    path = _path(target)
    if location.startswith("//"):
        url = f"{place.scheme}:{location}"
    elif location.startswith("/"):
        url = f"{place.scheme}://{place.origin}{location}"
    elif "://" in location:
        url = location
    else:
        base = path if location.startswith("?") else path.rpartition("/")[0] + "/"
        url = f"{place.scheme}://{place.origin}{base}{location}"
    try:
        other = _take_apart(url)
    except ValueError:
        raise CollectError(f"{place.origin}{path} redirects to a place that is no URL") from None
    if other[:3] != place[:3]:
        raise CollectError(
            f"{place.origin}{path} redirects to {other.scheme}://{other.origin}{_path(other.target)}: not followed",
            "if this is the right place, configure it as the URL",
        )
    return other.target


def _read_head(stream: _Stream) -> _Head:
    """Read status line and headers, passing over interim answers (1xx)."""
    try:
        first = stream.line()
    except EOFError:
        if stream.is_drained:
            raise _Stale from None
        raise
    size = len(first)
    while True:
        status = _STATUS_LINE.fullmatch(first)
        if status is None:
            shown = ascii(first[:60].decode("latin-1"))
            raise CollectError(f"not an HTTP server: it answers {shown}", "check the port of the URL")
        headers: dict[str, str] = {}
        while line := stream.line():
            size += len(line)
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon or size > _HEAD_BYTES:
                raise CollectError("malformed header" if not colon else f"more than {_HEAD_BYTES} bytes of headers")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if not status[2].startswith(b"1"):
            return _Head(int(status[2]), int(status[1]), headers)
        first = stream.line()
        size += len(first)


def _read_body(stream: _Stream, head: _Head, max_bytes: int) -> tuple[bytes, bool]:
    """Return the body, and whether its end was marked, so that the connection can serve another request."""
    body = bytearray()
    is_delimited = True
    coding = head.headers.get("transfer-encoding", "").lower()
    lengths = {length.strip() for length in head.headers.get("content-length", "").split(",")}
    if coding == "chunked":
        _read_chunks(stream, body, max_bytes)
    elif coding:
        raise CollectError(f"unknown transfer encoding {ascii(coding[:40])}")
    elif lengths != {""}:
        length = lengths.pop()
        if lengths or not re.fullmatch(r"[0-9]{1,18}", length):
            raise CollectError("malformed Content-Length")
        _read_exactly(stream, int(length), body, max_bytes)
    else:
        is_delimited = False
        while piece := stream.take(max_bytes):
            _check_size(len(body) + len(piece), max_bytes)
            body += piece
    encoding = head.headers.get("content-encoding", "identity").lower()
    if encoding in {"gzip", "x-gzip"}:
        return _inflated(bytes(body), max_bytes), is_delimited
    if encoding not in {"identity", ""}:
        raise CollectError(f"unknown content encoding {ascii(encoding[:40])}")
    return bytes(body), is_delimited


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise CollectError(f"the body has more than {max_bytes} bytes")


def _read_exactly(stream: _Stream, count: int, body: bytearray, max_bytes: int) -> None:
    """Append `count` bytes of the stream to the body."""
    end = len(body) + count
    _check_size(end, max_bytes)
    while len(body) < end:
        piece = stream.take(end - len(body))
        if not piece:
            raise CollectError(f"the body ends after {len(body)} of {end} bytes")
        body += piece


def _read_chunks(stream: _Stream, body: bytearray, max_bytes: int) -> None:
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
        trailer_bytes = 0
        while line := stream.line():
            trailer_bytes += len(line)
            if trailer_bytes > _HEAD_BYTES:
                raise CollectError(f"more than {_HEAD_BYTES} bytes of trailers")
    except EOFError:
        raise CollectError(f"the body ends after {len(body)} bytes, in the middle of its chunks") from None


def _inflated(body: bytes, max_bytes: int) -> bytes:
    import zlib  # noqa: PLC0415  # no server sends gzip unasked but a broken one

    inflated = bytearray()
    try:
        while body:
            member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            inflated += member.decompress(body, max_bytes + 1 - len(inflated))
            _check_size(len(inflated), max_bytes)
            if not member.eof:
                raise CollectError("the gzip body ends early")
            body = member.unused_data
    except zlib.error:
        raise CollectError("the gzip body is corrupt") from None
    return bytes(inflated)


def _refusal(error: OSError, place: _Place, doing: str) -> CollectError:
    if isinstance(error, ConnectionRefusedError):
        return CollectError(
            f"connection refused: nothing listens on {place.origin}",
            "start the server, or correct the host and port of the URL",
        )
    if isinstance(error, socket.gaierror):
        return CollectError(f"no address for the host {place.host}", "check the spelling of the URL and the DNS")
    if mistrust := getattr(error, "verify_message", ""):
        return CollectError(
            f"the certificate of {place.origin} is not trusted: {mistrust}",
            "name the file of its certificate authority in the configuration",
        )
    return CollectError(f"{error.strerror or error} while {doing} {place.origin}")
