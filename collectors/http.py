"""Fetches pages by HTTP/1.1 GET over one kept connection, bounded in total time and in bytes."""

# Why not http.client or urllib3: their time-outs hold per socket operation, so that a server which sends a byte a
# second holds them for ever; they put no bound on a body; they cost 3 to 7 times the CPU, and memory.

from __future__ import annotations

import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from kvtally import __version__
from kvtally.collectors.access import Access, Credentials
from kvtally.collectors.base import CollectError
from kvtally.collectors.http_answer import Head, Stream, read_body, read_head
from kvtally.collectors.http_connection import Connector, Place, take_apart, without_query

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_TARGET = re.compile(r"/[!-\"$-~]*")
_MAX_REDIRECTS = 3
_OK = 200
_MOVED = frozenset({301, 302, 303, 307, 308})
_REFUSALS = frozenset({401, 403})
_HINTS = {
    400: "a server that speaks TLS may answer so to plain http: try https in the URL; IBM's Storage Scale bridge "
    "serves /metrics_gpfs_filesystem and no /metrics",
    404: "check the path of the URL: vLLM and LMCache serve their metrics at /metrics",
    503: "the server may still be starting",
}


class Response(NamedTuple):
    """A complete answer with status 200; `body` is unchunked and inflated."""

    status: int
    body: bytes
    content_type: str


class _Unanswered(Exception):  # noqa: N818  # not yet an error: a kept connection may have been closed meanwhile
    """The connection ended before a byte of the answer came."""


class OtherStatus(CollectError):  # noqa: N818  # says what came, as its callers ask
    """The server answered, with another status than 200."""


class _Refused(OtherStatus):  # not yet an error: a newer secret may be accepted
    """The server does not accept our credentials; those on disk may be newer."""


class Endpoint:
    """One server and one kept connection to it; not for two threads at once.

    timeout_seconds  bounds a whole `get`: look-up, connection, redirects, headers and body
    max_bytes        bounds a body, as it is sent and inflated
    access           credentials, sent to this host and port only and standing in no message, and settings of TLS
    resolve          is called as socket.getaddrinfo is

    Proxy settings of the environment are ignored. ValueError for what is no URL, and for one that holds credentials.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout_seconds: float = 2.0,
        max_bytes: int = 16 * 2**20,
        access: Access | None = None,
        resolve: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        self.url = url
        self._place = take_apart(url)
        self._timeout_seconds = timeout_seconds
        self._max_bytes = max_bytes
        self._headers = _headers(self._place)
        self._access = access or Access()
        self._credentials = Credentials(self._access)
        self._connector = Connector(self._place, self._access, resolve)
        self._stream: Stream | None = None
        self._doing = ""

    def close(self) -> None:
        """Close the connection; a later `get` opens another."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def get(self, target: str | None = None) -> Response:
        """Fetch a path with its query, by default the URL's; CollectError for all but a complete answer 200."""
        if target is None:
            target = self._place.target
        elif not _TARGET.fullmatch(target):
            raise ValueError("a target is a path of printable ASCII characters that begins with /")
        is_answered = False
        try:
            response = self._admitted(target, time.monotonic() + self._timeout_seconds)
            is_answered = True
        except TimeoutError:
            reason = f"timed out after {self._timeout_seconds:g} s while {self._doing} {self._place.origin}"
            raise CollectError(reason, "a busy server answers late: see whether a longer time-out helps") from None
        except ConnectionRefusedError:
            reason = f"connection refused: nothing listens on {self._place.origin}"
            raise CollectError(reason, "start the server, or correct the host and port of the URL") from None
        except OSError as error:
            raise CollectError(f"{error.strerror or error} while {self._doing} {self._place.origin}") from None
        finally:
            if not is_answered:
                self.close()
        return response

    def _admitted(self, target: str, deadline: float) -> Response:
        """Follow, and once more with the credentials that have come to lie on disk meanwhile."""
        try:
            return self._follow(target, deadline)
        except _Refused:
            self.close()  # the rest of its answer is unread
            if not self._credentials.renew():
                raise
            return self._follow(target, deadline)

    def _follow(self, target: str, deadline: float) -> Response:
        visited = [target]
        while True:
            head, body = self._exchange(target, deadline)
            if head.status == _OK:
                return Response(head.status, body, head.headers.get("content-type", ""))
            target = _redirected(self._place, target, head.headers["location"])
            if target in visited:
                raise CollectError(f"redirect loop at {self._place.origin}{without_query(target)}")
            if len(visited) > _MAX_REDIRECTS:
                first = without_query(visited[0])
                raise CollectError(f"more than {_MAX_REDIRECTS} redirects from {self._place.origin}{first}")
            visited.append(target)

    def _exchange(self, target: str, deadline: float) -> tuple[Head, bytes]:
        """Send one request and read its answer, once more if the kept connection proves to be closed."""
        if self._stream is not None:
            try:
                return self._attempt(self._stream, target, deadline)
            except _Unanswered:
                self.close()
        self._doing = "connecting to"
        self._stream = Stream(self._connector.connect(deadline))
        try:
            return self._attempt(self._stream, target, deadline)
        except _Unanswered:
            # a server of TLS 1.3 may hang up so on a client without a certificate
            hint = "it may want access.cert_file and access.key_file" if self._place.scheme == "https" else ""
            raise CollectError(f"{self._place.origin} closed the connection without an answer", hint) from None

    def _attempt(self, stream: Stream, target: str, deadline: float) -> tuple[Head, bytes]:
        """Return head and body of a 200 or of a redirect; CollectError for another status."""
        self._doing = "waiting for the answer of"
        lines = (target.encode("ascii"), self._headers, self._credentials.line())
        try:
            stream.send(b"GET %s HTTP/1.1\r\n%s%s\r\n" % lines, deadline)
            head = read_head(stream)
        except TimeoutError:
            raise
        except (OSError, EOFError) as error:
            if isinstance(error, OSError) and (fault := self._connector.fault(error)):
                raise fault from None
            if not stream.received:
                raise _Unanswered from None
            if isinstance(error, OSError):
                raise
            raise CollectError(f"the headers of {self._place.origin} end early") from None
        if head.status != _OK and not (head.status in _MOVED and "location" in head.headers):
            reason = f"HTTP {head.status} from {self._place.origin}{without_query(target)}"
            if head.status in _REFUSALS:
                raise _Refused(reason, self._access.refusal_hint(head.status))
            raise OtherStatus(reason, _HINTS.get(head.status, "see the log of the server"))
        self._doing = "reading the answer of"
        body, is_marked = read_body(stream, head.headers, self._max_bytes)
        if not (is_marked and head.keeps_alive and stream.is_drained):
            self.close()
        return head, body


def _headers(place: Place) -> bytes:
    """The headers of every request, credentials apart."""
    lines = {
        "Host": place.authority,
        "User-Agent": f"kvtally/{__version__}",
        "Accept": "text/plain;version=0.0.4",
        "Accept-Encoding": "identity",  # gzip costs the server more than it saves on a loopback
    }
    return "".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode("ascii")


def _redirected(place: Place, target: str, location: str) -> str:
    """Return the target that a redirect names; CollectError unless it is on the same host and port."""
    path = without_query(target)
    if location.startswith("//"):
        url = f"{place.scheme}:{location}"
    elif location.startswith("/"):
        url = f"{place.scheme}://{place.origin}{location}"
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", location):
        url = location
    else:
        base = path if location.startswith("?") else path.rpartition("/")[0] + "/"
        url = f"{place.scheme}://{place.origin}{base}{location}"
    try:
        other = take_apart(url)
    except ValueError:
        raise CollectError(f"{place.origin}{path} redirects to a place that is no URL") from None
    if other[:3] != place[:3]:
        raise CollectError(
            f"{place.origin}{path} redirects to {other.scheme}://{other.origin}{without_query(other.target)}, "
            "which is not followed",
            "if it is the right place, configure it as the URL",
        )
    return other.target
