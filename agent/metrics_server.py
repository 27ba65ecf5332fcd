"""Serves /metrics, /-/healthy and /-/ready: the ledger's figures as of their last working out, and own health."""

# Why not http.server: it takes 6 MiB (email, html, ssl), a quarter of the daemon; socketserver takes a tenth of one.

from __future__ import annotations

import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.health import rendered

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.agent.health import Health

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
PLAIN = "text/plain; charset=utf-8"
_EOF = b"# EOF\n"
_HEAD_BYTES_MAX = 8192
_CLIENTS_MAX = 8
_CLIENT_SECONDS = 5.0
_FIGURES_SECONDS_MAX = 900.0  # older ones are left out: a scrape must not take them for figures of now
_BREATH_SECONDS = 0.1  # between two attempts to accept, where there is no file or no thread to be had


class Figures(NamedTuple):
    """What the ledger said at one instant (unix nanoseconds), as both pages."""

    at_ns: int
    text: bytes
    openmetrics: bytes


def packed(figures: Figures) -> bytes:
    """Figures as a child hands them over."""
    return b"%d %d\n" % (figures.at_ns, len(figures.text)) + figures.text + figures.openmetrics


def unpacked(content: bytes) -> Figures:
    """The figures that were packed; ValueError for anything else, as what was cut off."""
    head, _, pages = content.partition(b"\n")
    numbers = head.split()
    if len(numbers) != 2 or not content.endswith(_EOF):  # noqa: PLR2004  # instant and length
        raise ValueError("no figures, or not all of them")
    at_ns, length = (int(number) for number in numbers)
    return Figures(at_ns, pages[:length], pages[length:])


class MetricsServer:
    """One thread that accepts, and one for each of at most eight clients; nothing is kept between requests."""

    def __init__(
        self,
        host: str,
        port: int,
        health: Health,
        now_ns: Callable[[], int] = time.time_ns,
        *,
        figures_seconds: float = _FIGURES_SECONDS_MAX,
    ) -> None:
        """`figures_seconds`: how old figures may be to be shown. OSError where the address cannot be had."""
        self.figures: Figures | None = None
        self.asked_at: float | None = None  # by the steady clock: when /metrics was asked for last
        self._health = health
        self._now_ns = now_ns
        self._figures_seconds = figures_seconds
        self._server = _Server((host, port), self)
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop accepting; a client that is being served is served."""
        self._server.stop()
        self._thread.join()

    def page(self, *, openmetrics: bool) -> bytes:
        """The whole page."""
        self.asked_at = time.monotonic()
        figures, now_ns = self.figures, self._now_ns()
        age_seconds = None if figures is None else max(0.0, (now_ns - figures.at_ns) / 1e9)
        if age_seconds is not None and age_seconds > self._figures_seconds:
            figures = None
        own = rendered(self._health.families(now_ns, age_seconds), openmetrics=openmetrics).encode()
        if not openmetrics:
            return own if figures is None else figures.text + own
        return (b"" if figures is None else figures.openmetrics.removesuffix(_EOF)) + own + _EOF

    @property
    def is_ready(self) -> bool:
        """Whether the ledger has taken what was read."""
        return self._health.is_ready

    @property
    def is_alive(self) -> bool:
        """Whether sources are still being read."""
        return self._health.is_alive


def prefers_openmetrics(accept: str) -> bool:
    """Whether an Accept header asks for OpenMetrics before the text format: by weight, then by place."""
    weights: dict[str, float] = {}
    for choice in accept.lower().split(","):
        kind, *parameters = (part.strip() for part in choice.split(";"))
        if kind in {"application/openmetrics-text", "text/plain"}:
            weights[kind] = max(weights.get(kind, 0.0), _weight(parameters))
    first = max(weights, key=lambda kind: weights[kind], default="text/plain")  # of equal ones that which came first
    return first == "application/openmetrics-text" and weights[first] > 0


def _weight(parameters: list[str]) -> float:
    given = next((one[2:] for one in parameters if one.startswith("q=")), "1")
    try:
        return float(given)
    except ValueError:
        return 0.0


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], pages: MetricsServer) -> None:
        self.pages = pages
        self._free = threading.BoundedSemaphore(_CLIENTS_MAX)
        self._is_stopped = False
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        if self.server_address[0] == "::" and socket.has_dualstack_ipv6():
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()

    def serve(self) -> None:
        """Accept until `stop`; the library's own loop would wake twice a second to see whether it shall."""
        while not self._is_stopped:
            try:
                request, address = self.get_request()
            except OSError:
                time.sleep(0 if self._is_stopped else _BREATH_SECONDS)
                continue
            self.process_request(request, address)

    def stop(self) -> None:
        """End `serve`, and close the address."""
        self._is_stopped = True
        self.socket.shutdown(socket.SHUT_RDWR)
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)  # a ninth client: the next scrape may find room
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no thread is to be had
            self._free.release()
            self.shutdown_request(request)
            time.sleep(_BREATH_SECONDS)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that went away is its own affair."""


class _Handler(socketserver.StreamRequestHandler):
    """One request a connection, by HTTP/1.0: nobody holds a thread for longer."""

    server: _Server
    timeout = _CLIENT_SECONDS

    def handle(self) -> None:
        """Answer a GET or HEAD of one of the addresses; the rest of what a client may send is not read."""
        request = self._head()
        if request is None:
            return
        method, target, accept = request
        if method not in {b"GET", b"HEAD"}:
            allow = b"Allow: GET, HEAD\r\n"
            self._answer(b"405 Method Not Allowed", b"GET and HEAD alone\n", with_body=True, more=allow)
            return
        path, with_body = _path(target), method == b"GET"
        pages = self.server.pages
        if path == b"/metrics":
            openmetrics = prefers_openmetrics(accept.decode("latin-1"))
            kind = OPENMETRICS if openmetrics else TEXT
            self._answer(b"200 OK", pages.page(openmetrics=openmetrics), kind, with_body=with_body)
        elif path == b"/-/healthy" and pages.is_alive:
            self._answer(b"200 OK", b"kvtally is healthy.\n", with_body=with_body)
        elif path == b"/-/healthy":
            self._answer(b"503 Service Unavailable", b"Nothing is read any more.\n", with_body=with_body)
        elif path == b"/-/ready" and pages.is_ready:
            self._answer(b"200 OK", b"kvtally is ready.\n", with_body=with_body)
        elif path == b"/-/ready":
            self._answer(b"503 Service Unavailable", b"No interval is written yet.\n", with_body=with_body)
        elif path == b"/":
            self._answer(b"200 OK", b"kvtally: /metrics /-/healthy /-/ready\n", with_body=with_body)
        else:
            self._answer(b"404 Not Found", b"there are /metrics, /-/healthy and /-/ready\n", with_body=with_body)

    # GET /metrics HTTP/1.1 | Host: 127.0.0.1:9478 | Accept: application/openmetrics-text;version=1.0.0,… | (empty)
    def _head(self) -> tuple[bytes, bytes, bytes] | None:
        """Method, target and what is accepted; None for no request, or one that takes too long or is too large."""
        ends_at, head = time.monotonic() + _CLIENT_SECONDS, b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            left_seconds = ends_at - time.monotonic()
            if left_seconds <= 0 or len(head) > _HEAD_BYTES_MAX:
                return None
            self.request.settimeout(left_seconds)  # of the whole head: a byte a second gets nobody further
            received = self.request.recv(_HEAD_BYTES_MAX)
            if not received:
                return None
            head += received
        self.request.settimeout(_CLIENT_SECONDS)
        lines = head.splitlines()
        words = lines[0].split()
        accept = b",".join(line[7:] for line in lines[1:] if line[:7].lower() == b"accept:")
        return (words[0], words[1], accept.lower()) if len(words) > 1 else None

    def _answer(self, status: bytes, body: bytes, kind: str = PLAIN, *, with_body: bool, more: bytes = b"") -> None:
        head = f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        self.wfile.write(b"HTTP/1.0 " + status + b"\r\n" + more + head + (body if with_body else b""))


# /metrics?name[]=x | http://127.0.0.1:9478/metrics, as it is said to a proxy
def _path(target: bytes) -> bytes:
    """The path of a request's target, which may name this server before it, whatever it calls it."""
    scheme, mark, rest = target.partition(b"?")[0].partition(b"://")
    if mark and scheme.lower() in {b"http", b"https"}:
        return b"/" + rest.partition(b"/")[2]
    return target.partition(b"?")[0]
