"""The exporter that the environment asks for, and what the backend answered it, of which the SDK tells only a half."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.export.otlp_environment import MISSING, answer_seconds, protocol_of, push_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from opentelemetry.sdk.metrics.export import MetricExporter

# the SDK gets its session from there, and would not if it were given another
_CREDENTIALS = (
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER",
    "OTEL_PYTHON_EXPORTER_OTLP_HTTP_METRICS_CREDENTIAL_PROVIDER",
)


class Answer(NamedTuple):
    """What a backend answered to a request.

    refused     why it took nothing; "" if it took the request
    rejected    how many points it left out of one that it took; they are not to be sent again
    message     what it says about that, or beside it
    """

    refused: str = ""
    rejected: int = 0
    message: str = ""


class Exporter(NamedTuple):
    """What sends points.

    sends     OpenTelemetry's exporter
    answers   what the backend has answered so far, where that can be heard
    seconds   for how long a push may go on
    """

    sends: MetricExporter
    answers: list[Answer]
    seconds: float


class ExporterMissing(Exception):  # noqa: N818  # it is an answer: what to install
    """The protocol that the environment asks for is not there."""


def exporter_of(environ: Mapping[str, str] = os.environ) -> Exporter:
    """The exporter that OTEL_EXPORTER_OTLP_PROTOCOL asks for; ExporterMissing where there is none."""
    protocol, answers = protocol_of(environ), list[Answer]()
    if protocol == "grpc":
        sends = _grpc(answers, answer_seconds(environ))
    elif protocol == "http/protobuf":
        sends = _http(answers, answer_seconds(environ), environ)
    else:
        raise ExporterMissing(f"OTLP by {protocol} {MISSING}")
    return Exporter(sends, answers, push_seconds(environ))


def _http(answers: list[Answer], seconds: float, environ: Mapping[str, str]) -> MetricExporter:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415  # one of the two
        OTLPMetricExporter,
    )

    from kvtally.agent.export.otlp_http import HeardSession  # noqa: PLC0415  # as above

    session = None if any(environ.get(name) for name in _CREDENTIALS) else HeardSession(answers.append)
    return OTLPMetricExporter(timeout=seconds, session=session)


def _grpc(answers: list[Answer], seconds: float) -> MetricExporter:
    try:
        from kvtally.agent.export.otlp_grpc import HeardExporter  # noqa: PLC0415  # an extra
    except ImportError:
        raise ExporterMissing("OTLP over gRPC is not installed: pip install 'kvtally[grpc]'") from None
    with _without("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT"):  # it is read there whatever was given, and may be no number
        return HeardExporter(answers.append, seconds)


@contextmanager
def _without(name: str) -> Iterator[None]:
    before = os.environ.pop(name, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
