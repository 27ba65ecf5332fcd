"""OpenTelemetry's exporter over gRPC, which hands on what the backend answers: by itself it drops that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

from kvtally.agent.export.otlp_exporter import Answer

if TYPE_CHECKING:
    from collections.abc import Callable


class HeardExporter(OTLPMetricExporter):
    """Tells what is answered to each request that was taken."""

    def __init__(self, heard: Callable[[Answer], object], seconds: float) -> None:
        """Wait for an answer for so many seconds."""
        self._heard = heard
        super().__init__(timeout=seconds)

    @property
    def _client(self) -> Any:
        return self._heard_client

    @_client.setter
    def _client(self, client: Any) -> None:
        """Take the client of a channel: newer versions open another one when the backend was not there."""
        self._heard_client = client
        if client is not None:
            client.Export = self._telling(client.Export)

    def _telling(self, export: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **options: Any) -> Any:
            response = export(*arguments, **options)
            partial = response.partial_success
            self._heard(Answer("", partial.rejected_data_points, partial.error_message))
            return response

        return told
