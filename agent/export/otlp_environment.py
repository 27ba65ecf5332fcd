"""What the environment says of OTLP pushes: whether, how often, how and for how long, and what nobody understands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.config import Config

PROTOCOLS = ("http/protobuf", "grpc")
MISSING = "is not there: http/protobuf is, and grpc with kvtally[grpc]"
TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_INSECURE = ("OTEL_EXPORTER_OTLP_METRICS_INSECURE", "OTEL_EXPORTER_OTLP_INSECURE")
_PROTOCOL = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_DIGITS_MAX = 12


class _Length(NamedTuple):
    """A length of time in whole milliseconds, by the first of its variables that can be understood.

    A timeout of 0 has no end: `most` stands for it.
    """

    names: tuple[str, ...]
    default: int
    least: int
    most: int
    is_timeout: bool = True


# The defaults are the specification's, and so are milliseconds, which OpenTelemetry's own exporters for Python take for
# seconds. A tenth of a second leaves no time to answer: whoever writes 10 means seconds, and is told.
_INTERVAL = _Length(("OTEL_METRIC_EXPORT_INTERVAL",), 60_000, 1_000, 86_400_000, is_timeout=False)
_ANSWER = _Length(("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT"), 10_000, 100, 300_000)
_PUSH = _Length(("OTEL_METRIC_EXPORT_TIMEOUT",), 30_000, 100, 300_000)


def otlp_interval(config: Config, environ: Mapping[str, str]) -> float | None:
    """Seconds from one push to the next; None where no endpoint is named, or OpenTelemetry is switched off."""
    exporters = {one.strip() for one in environ.get("OTEL_METRICS_EXPORTER", "").split(",")} - {""}
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or (exporters and "otlp" not in exporters):
        return None
    if not (config.export.otlp.endpoint or any(environ.get(name) for name in _ENDPOINTS)):
        return None
    return _read(_INTERVAL, environ)[0]


def answer_seconds(environ: Mapping[str, str]) -> float:
    """For how long an exporter waits for the backend, its repetitions included; no longer than a push may take."""
    return min(_read(_ANSWER, environ)[0], push_seconds(environ))


def push_seconds(environ: Mapping[str, str]) -> float:
    """For how long a push may go on, whatever its exporter does."""
    return _read(_PUSH, environ)[0]


def protocol_of(environ: Mapping[str, str]) -> str:
    """The protocol that is asked for, one of PROTOCOLS or not."""
    return next((environ[name] for name in _PROTOCOL if environ.get(name)), PROTOCOLS[0])


def endpoint_fault(config: Config, environ: Mapping[str, str]) -> str:
    """Why nothing can be sent to the endpoint that is named; "" where something can, or none is."""
    name, endpoint = _endpoint(config, environ)
    if not endpoint or protocol_of(environ) != "http/protobuf" or endpoint.lower().startswith(("http://", "https://")):
        return ""
    return f"{name} begins with neither http:// nor https://: write {_with_scheme(endpoint)}"


def grpc_hint(config: Config, environ: Mapping[str, str]) -> str:
    """What may be wrong with a push that failed: to a bare host, gRPC speaks TLS. "" where that is not it."""
    endpoint = _endpoint(config, environ)[1]
    if protocol_of(environ) != "grpc" or "://" in endpoint or any(environ.get(name) for name in _INSECURE):
        return ""
    return f"without a scheme it is TLS: for none, write {_with_scheme(endpoint)} or set {_INSECURE[1]}=true"


def _endpoint(config: Config, environ: Mapping[str, str]) -> tuple[str, str]:
    """Where the endpoint is named, and what is named there."""
    named = ((name, environ.get(name, "").strip()) for name in _ENDPOINTS)
    return next((one for one in named if one[1]), ("export.otlp.endpoint", config.export.otlp.endpoint.strip()))


def _with_scheme(endpoint: str) -> str:
    """The endpoint over plain http, without a password that may stand in it."""
    return f"http://{endpoint.rpartition('://')[2].rpartition('@')[2]}"


def otlp_faults(config: Config, environ: Mapping[str, str]) -> list[str]:
    """What config and environment say of OpenTelemetry that nobody understands, and what holds instead."""
    faults = [fault for length in (_INTERVAL, _ANSWER, _PUSH) for fault in _read(length, environ)[1]]
    protocol = protocol_of(environ)
    if protocol not in PROTOCOLS:
        faults.append(f"OTLP by {protocol} {MISSING}: nothing can be sent")
    if unreachable := endpoint_fault(config, environ):
        faults.append(unreachable)
    temporality = environ.get(TEMPORALITY, "").strip().lower()
    if temporality not in {"", "cumulative", "delta", "lowmemory"}:
        faults.append(f"{TEMPORALITY}={temporality} is none of cumulative, delta, lowmemory: cumulative holds")
    return faults


def _read(length: _Length, environ: Mapping[str, str]) -> tuple[float, list[str]]:
    """Seconds, and what is wrong with the variables that were passed over."""
    wrong = []
    for name in length.names:
        text = environ.get(name, "").strip()
        number = int(text) if text.isdecimal() and len(text) <= _DIGITS_MAX else -1
        if number == 0 and length.is_timeout:
            number = length.most
        if length.least <= number <= length.most:
            break
        if text:
            wrong.append(f"{name}={text}")
    else:
        number = length.default
    span = f"is no whole number of milliseconds from {length.least} to {length.most}"
    return number / 1000, [f"{one} {span}: {number / 1000:g} s hold" for one in wrong]
