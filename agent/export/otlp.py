"""Pushes a snapshot by OTLP: the points are made by hand, since their counters begin with the ledger, not this process.

The SDK's own reader would give every counter the start of its process; here each push is a process of its own, and
the ledger remembers. All OTEL_* variables of resources and exporters are honoured by the SDK and its exporter.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from kvtally import __version__
from kvtally.agent.export.last_sent import Kept, LastSent
from kvtally.agent.export.metrics import METRICS
from kvtally.agent.kubernetes import pod_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvtally.agent.export.figures import Figure, Snapshot

# labels with a name in the semantic conventions; the others stand below kvtally.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "cluster": "k8s.cluster.name",
    "namespace": "k8s.namespace.name",
    "gpu": "hw.id",
    "sku": "hw.model",
}
_GPU_METRICS = frozenset(("gpu_energy", "gpu_seconds", "gpu_observed_seconds"))


class Sent(NamedTuple):
    """What a push did, and what the exporter said where it failed."""

    points: int
    ok: bool
    reason: str = ""


class ExporterMissing(Exception):  # noqa: N818  # it is an answer: what to install
    """The protocol that the environment asks for is not there."""


def exporter_of(environ: Mapping[str, str] = os.environ) -> MetricExporter:
    """The exporter that OTEL_EXPORTER_OTLP_PROTOCOL asks for; ExporterMissing where there is none."""
    names = ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = next((environ[name] for name in names if environ.get(name)), "http/protobuf")
    if protocol == "grpc":
        try:
            from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import (  # noqa: PLC0415  # an extra
                OTLPMetricExporter as GrpcExporter,
            )
        except ImportError:
            raise ExporterMissing("OTLP over gRPC is not installed: pip install 'kvtally[grpc]'") from None
        return GrpcExporter()
    if protocol != "http/protobuf":
        raise ExporterMissing(f"OTLP by {protocol} is not there: http/protobuf is, and grpc with kvtally[grpc]")
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import (  # noqa: PLC0415  # one of the two
        OTLPMetricExporter,
    )

    return OTLPMetricExporter()


def resource_of(environ: Mapping[str, str] = os.environ) -> Resource:
    """What is told of this kvtally: its host and pod, and what OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say.

    The instance is the pod or the host, not the process: a restart begins no new series.
    """
    pod, host = pod_of(environ), socket.gethostname()
    named = {"service.name": environ.get("OTEL_SERVICE_NAME") or "kvtally", "service.version": __version__}
    named |= {"host.name": host, "service.instance.id": host}
    if pod is not None:
        named |= {"k8s.namespace.name": pod.namespace, "k8s.pod.name": pod.name, "k8s.node.name": pod.node}
        if pod.name:
            named["service.instance.id"] = f"{pod.namespace}/{pod.name}".lstrip("/")
    given = _given(environ) - ({"service.name"} if environ.get("OTEL_SERVICE_NAME") else set())
    mine = Resource({name: value for name, value in named.items() if value and name not in given})
    return Resource.create({}).merge(mine)  # the SDK reads OTEL_RESOURCE_ATTRIBUTES


def _given(environ: Mapping[str, str]) -> set[str]:
    """Names of the attributes that the operator's environment gives."""
    pairs = (pair.partition("=") for pair in environ.get("OTEL_RESOURCE_ATTRIBUTES", "").split(","))
    return {name.strip() for name, equals, _ in pairs if equals}


def metrics_data(snapshot: Snapshot, resource: Resource, at_ns: int, last: LastSent | None = None) -> MetricsData:
    """The points of a snapshot at an instant, cumulative since the ledger's start; with `last`, deltas since then.

    Gauges are the same in both.
    """
    by_metric: dict[str, list[Figure]] = {}
    for figure in snapshot.figures:
        if figure.metric in METRICS:
            by_metric.setdefault(figure.metric, []).append(figure)
    metrics = [_metric(name, figures, snapshot.start_ns, at_ns, last) for name, figures in by_metric.items()]
    scope = ScopeMetrics(InstrumentationScope("kvtally", __version__), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(name: str, figures: Sequence[Figure], ledger_ns: int, at_ns: int, last: LastSent | None) -> Metric:
    about = METRICS[name]
    if about.type == "gauge":
        points = [NumberDataPoint(_attributes(name, figure), 0, at_ns, figure.value) for figure in figures]
        return Metric(about.otel, about.meaning, about.unit, Gauge(points))
    # a clock that was set back must not make a point end before it begins
    start_ns = min(ledger_ns if last is None else last.at_ns, at_ns)
    points = [NumberDataPoint(_attributes(name, figure), start_ns, at_ns, _since(figure, last)) for figure in figures]
    temporality = AggregationTemporality.CUMULATIVE if last is None else AggregationTemporality.DELTA
    return Metric(about.otel, about.meaning, about.unit, Sum(points, temporality, is_monotonic=True))


def _since(figure: Figure, last: LastSent | None) -> float:
    """What a counter has counted since it was sent last; all of it where it has begun anew."""
    before = 0.0 if last is None else last.counters.get(key_of(figure), 0.0)
    return figure.value - before if 0 < before <= figure.value else figure.value


def key_of(figure: Figure) -> str:
    """A counter's identity, for remembering what was sent of it."""
    return "|".join([figure.metric, *(f"{name}={value}" for name, value in sorted(figure.labels.items()))])


def _attributes(metric: str, figure: Figure) -> dict[str, str]:
    told = {_ATTRIBUTES.get(name, f"kvtally.{name}"): value for name, value in figure.labels.items() if value}
    return {**told, "hw.type": "gpu"} if metric in _GPU_METRICS else told


def push_snapshot(
    exporter: MetricExporter,
    snapshot: Snapshot,
    url: str,
    environ: Mapping[str, str] = os.environ,
    now_ns: Callable[[], int] = time.time_ns,
) -> Sent:
    """Send a snapshot, by the temporality that the environment prefers; OSError where deltas cannot be kept account of.

    For deltas, what was sent of every counter is kept beside the ledger, and renewed only by a push that was taken.
    lowmemory means deltas for what a program counts as it goes; what it reads off, as here, stays cumulative.
    """
    resource, at_ns = resource_of(environ), now_ns()
    if environ.get("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "").strip().lower() != "delta":
        return push(exporter, metrics_data(snapshot, resource, at_ns))
    kept = Kept.beside(url)
    last = kept.read(snapshot.start_ns)
    counters = {key_of(one): one.value for one in snapshot.figures if _is_counter(one)}
    with kept.renewed(LastSent(snapshot.start_ns, at_ns, counters)) as keep:
        sent = push(exporter, metrics_data(snapshot, resource, at_ns, last))
        if sent.ok:
            keep()
    return sent


def _is_counter(figure: Figure) -> bool:
    return figure.metric in METRICS and METRICS[figure.metric].type == "counter"


def push(exporter: MetricExporter, data: MetricsData) -> Sent:
    """Send the points; one that fails is no loss, since the next push carries the sums again."""
    points = sum(
        len(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )
    with _complaints() as said:
        result = exporter.export(data)
    exporter.shutdown()
    reason = "; ".join(dict.fromkeys((said[0], said[-1]))) if said else "it gave no reason"
    return Sent(points, result is MetricExportResult.SUCCESS, reason)


@contextmanager
def _complaints() -> Iterator[list[str]]:
    """What OpenTelemetry logs meanwhile: the result alone does not say why."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]  # a one-line handler
    logger = logging.getLogger("opentelemetry")
    propagated, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
