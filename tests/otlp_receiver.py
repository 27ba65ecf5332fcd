"""An OTLP backend on loopback that reads metrics by OpenTelemetry's own message classes: none of our code is in it."""

from __future__ import annotations

import gzip
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from ssl import SSLContext
    from typing import Self


class Point(NamedTuple):
    """One number of a metric."""

    attributes: Mapping[str, str]
    start_ns: int
    at_ns: int
    value: float


class Push(NamedTuple):
    """One request that was taken."""

    path: str
    headers: Mapping[str, str]
    message: Any

    @property
    def resource(self) -> dict[str, str]:
        (one,) = self.message.resource_metrics
        return _attributes(one.resource.attributes)

    @property
    def metrics(self) -> dict[str, Any]:
        """The metrics by name."""
        (resource,) = self.message.resource_metrics
        (scope,) = resource.scope_metrics
        return {metric.name: metric for metric in scope.metrics}

    def points(self, metric: str) -> list[Point]:
        one = self.metrics[metric]
        data = one.sum if one.HasField("sum") else one.gauge
        return [
            Point(
                _attributes(each.attributes),
                each.start_time_unix_nano,
                each.time_unix_nano,
                each.as_int if each.HasField("as_int") else each.as_double,
            )
            for each in data.data_points
        ]


def _attributes(pairs: Any) -> dict[str, str]:
    return {pair.key: pair.value.string_value for pair in pairs}


class OtlpReceiver:
    """Takes every push, or answers with `status`.

    location    where the answer says that the place is now
    rejected    how many points it says that it left out, and why
    body        what it answers in the place of a message
    kind        what it says that its answer is
    trickles    how many seconds pass between two bytes of its answer, which does not end while it is open
    """

    def __init__(self, port: int = 0, context: SSLContext | None = None) -> None:
        self.pushes: list[Push] = []
        self.status = 200
        self.location = ""
        self.rejected = (0, "")
        self.body: bytes | None = None
        self.kind = "application/x-protobuf"
        self.trickles: float | None = None
        self.is_closed = threading.Event()
        self._server = _Server(("127.0.0.1", port), self)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.endpoint = f"{'http' if context is None else 'https'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    def values(self, metric: str) -> list[float]:
        """The values of a metric in the newest push."""
        return [point.value for point in self.pushes[-1].points(metric)]

    def close(self) -> None:
        self.is_closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # one that trickles need not be waited for

    def __init__(self, address: tuple[str, int], receiver: OtlpReceiver) -> None:
        self.receiver = receiver
        super().__init__(address, _Handler)


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        receiver = self.server.receiver
        while receiver.trickles is not None and not receiver.is_closed.wait(receiver.trickles):
            self.wfile.write(b"H")
        if receiver.status == 200:
            headers = {name.lower(): value for name, value in self.headers.items()}
            receiver.pushes.append(Push(self.path, headers, ExportMetricsServiceRequest.FromString(body)))
        message = ExportMetricsServiceResponse()
        message.partial_success.rejected_data_points, message.partial_success.error_message = receiver.rejected
        answer = message.SerializeToString() if receiver.body is None else receiver.body
        self.send_response(receiver.status)
        if receiver.location:
            self.send_header("Location", receiver.location)
        self.send_header("Content-Type", receiver.kind)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the library's name
        """Nothing."""


@contextmanager
def free_port() -> Iterator[int]:
    """A port at which nobody listens, and which nobody else is given meanwhile."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
