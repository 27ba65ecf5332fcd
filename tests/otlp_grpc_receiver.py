"""An OTLP backend over gRPC on loopback, of OpenTelemetry's own service: none of our code is in it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import grpc
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from tests.otlp_receiver import Push

if TYPE_CHECKING:
    from typing import Self


class OtlpGrpcReceiver(MetricsServiceServicer):
    """Takes every push; `rejected` is how many points it says that it left out, and why."""

    def __init__(self, port: int = 0) -> None:
        self.pushes: list[Push] = []
        self.rejected = (0, "")
        self._server = grpc.server(ThreadPoolExecutor(max_workers=1))
        add_MetricsServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]  # generated code
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port(f'127.0.0.1:{port}')}"
        self._server.start()

    def Export(self, request: Any, context: Any) -> ExportMetricsServiceResponse:  # noqa: N802  # the service's name
        headers = {pair.key: str(pair.value) for pair in context.invocation_metadata()}
        self.pushes.append(Push("Export", headers, request))
        message = ExportMetricsServiceResponse()
        message.partial_success.rejected_data_points, message.partial_success.error_message = self.rejected
        return message

    def close(self) -> None:
        self._server.stop(grace=None).wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
