"""The HTTP session of an OTLP exporter: it follows no redirect, and hands on what the backend answers."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import requests
from google.protobuf import json_format  # type: ignore[import-untyped]  # it has no types
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # as above
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse

from kvtally.agent.export.otlp_exporter import Answer

if TYPE_CHECKING:
    from collections.abc import Callable

_SHOWN_BYTES = 80


class HeardSession(requests.Session):
    """Tells what is answered to each request."""

    def __init__(self, heard: Callable[[Answer], object]) -> None:
        super().__init__()
        self._heard = heard

    def request(self, method: str, url: str | bytes, *arguments: Any, **options: Any) -> requests.Response:
        """Send one; what it raises is the exporter's."""
        # By the session's own, a certificate that OTEL_* names would give way to REQUESTS_CA_BUNDLE, which is there for
        # other hosts. A redirect counts as sent with the SDK; followed, a POST would become a GET.
        options = {"verify": self.verify, **options, "allow_redirects": False}
        response = super().request(method, url, *arguments, **options)
        self._heard(_answer(response))
        return response


def _answer(response: requests.Response) -> Answer:
    if not HTTPStatus.OK <= response.status_code < HTTPStatus.MULTIPLE_CHOICES:
        place = response.headers.get("Location")
        elsewhere = "" if place is None else f", Location: {place} (no redirect is followed)"
        return Answer(f"{response.status_code} {response.reason}{elsewhere}")
    kind = response.headers.get("Content-Type", "")
    message = None if response.content and kind.lower().startswith("text/html") else _message(response.content)
    if message is None:  # a login page, or a server of something else: what it did with the points nobody knows
        shown = response.content[:_SHOWN_BYTES].decode(errors="replace")
        return Answer(f"{response.status_code} {kind or 'of no type'}, which is no answer of OTLP's: {shown}")
    return Answer("", message.partial_success.rejected_data_points, message.partial_success.error_message)


def _message(body: bytes) -> ExportMetricsServiceResponse | None:
    """What OTLP answers, of which nothing at all is a case; None for anything else."""
    message = ExportMetricsServiceResponse()
    try:
        message.ParseFromString(body)
    except DecodeError:
        message.Clear()
        try:  # some answer in JSON whatever they are sent
            json_format.Parse(body, message)
        except (json_format.ParseError, ValueError):  # the second: not UTF-8
            return None
    return message
