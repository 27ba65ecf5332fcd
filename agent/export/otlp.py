"""Pushes a snapshot by OTLP: the points are made by hand, since their counters begin with the ledger, not this process.

The SDK's own reader would give every counter the start of its process; here each push is a process of its own, and
the ledger remembers. All OTEL_* variables of resources and exporters are honoured by the SDK and its exporter.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Metric,
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
from kvtally.agent.export.metrics import DISK_READ, METRICS
from kvtally.agent.export.otlp_environment import TEMPORALITY
from kvtally.agent.export.otlp_exporter import Answer
from kvtally.agent.kubernetes import pod_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from kvtally.agent.export import metrics
    from kvtally.agent.export.figures import Figure, Snapshot
    from kvtally.agent.export.otlp_exporter import Exporter

# labels with a name in the semantic conventions; the others stand below kvtally.
_ATTRIBUTES = {
    "model": "gen_ai.request.model",
    "cluster": "k8s.cluster.name",
    "namespace": "k8s.namespace.name",
    "gpu": "hw.id",
    "sku": "hw.model",
}
_GPU_METRICS = frozenset(("gpu_energy", "gpu_seconds", "gpu_observed_seconds"))


_GRACE_SECONDS = 1.0  # for an exporter that is out of time to say why


class Sent(NamedTuple):
    """What a push did.

    points      how many there were
    ok          whether the backend took them
    reason      what the exporter said where it did not
    rejected    how many the backend left out of those that it took: they are not sent again
    message     what it says about that, or beside it
    """

    points: int
    ok: bool
    reason: str = ""
    rejected: int = 0
    message: str = ""


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
    by_metric: dict[metrics.Metric, list[Figure]] = {}
    for figure in snapshot.figures:
        if figure.metric in METRICS:
            about = DISK_READ if _is_of_disk(figure) else METRICS[figure.metric]
            by_metric.setdefault(about, []).append(figure)
    told = [_metric(about, figures, snapshot.start_ns, at_ns, last) for about, figures in by_metric.items()]
    scope = ScopeMetrics(InstrumentationScope("kvtally", __version__), told, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(
    about: metrics.Metric, figures: Sequence[Figure], ledger_ns: int, at_ns: int, last: LastSent | None
) -> Metric:
    if about.type == "gauge":
        points = [NumberDataPoint(_attributes(figure), 0, at_ns, figure.value) for figure in figures]
        return Metric(about.otel, about.meaning, about.unit, Gauge(points))
    # a clock that was set back must not make a point end before it begins
    start_ns = min(ledger_ns if last is None else last.at_ns, at_ns)
    points = [NumberDataPoint(_attributes(figure), start_ns, at_ns, _since(figure, last)) for figure in figures]
    temporality = AggregationTemporality.CUMULATIVE if last is None else AggregationTemporality.DELTA
    return Metric(about.otel, about.meaning, about.unit, Sum(points, temporality, is_monotonic=True))


def _since(figure: Figure, last: LastSent | None) -> float:
    """What a counter has counted since it was sent last; all of it where it has begun anew."""
    before = 0 if last is None else last.counters.get(key_of(figure), 0)
    return figure.value - before if 0 < before <= figure.value else figure.value


def key_of(figure: Figure) -> str:
    """A counter's identity, for remembering what was sent of it."""
    return "|".join([figure.metric, *(f"{name}={value}" for name, value in sorted(figure.labels.items()))])


def _is_of_disk(figure: Figure) -> bool:
    """Whether it counts a whole disk: mounts, which begin with a slash, are counted off /proc/diskstats once more."""
    about = figure.labels
    is_device = figure.metric == "filesystem_bytes" and about["side"] == "device"
    return is_device and about["source"] == "diskstats" and not about["filesystem"].startswith("/")


def _attributes(figure: Figure) -> dict[str, str]:
    if _is_of_disk(figure):
        return {"system.device": figure.labels["filesystem"], "disk.io.direction": "read"}
    told = {_ATTRIBUTES.get(name, f"kvtally.{name}"): value for name, value in figure.labels.items() if value}
    return {**told, "hw.type": "gpu"} if figure.metric in _GPU_METRICS else told


def push_snapshot(
    exporter: Exporter,
    snapshot: Snapshot,
    url: str,
    environ: Mapping[str, str] = os.environ,
    now_ns: Callable[[], int] = time.time_ns,
) -> Sent:
    """Send a snapshot, by the temporality that the environment prefers; OSError where deltas cannot be kept account of.

    For deltas, what was sent of every counter is kept beside the ledger, and renewed only by a push that was taken. One
    of which points were rejected was: the specification forbids to send it again, since the rest would count twice.
    lowmemory means deltas for what a program counts as it goes; what it reads off, as here, stays cumulative.
    """
    resource, at_ns = resource_of(environ), now_ns()
    if environ.get(TEMPORALITY, "").strip().lower() != "delta":
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


def push(exporter: Exporter, data: MetricsData) -> Sent:
    """Send the points; one that fails is no loss, since the next push carries the sums again."""
    points = sum(
        len(metric.data.data_points)
        for resource in data.resource_metrics
        for scope in resource.scope_metrics
        for metric in scope.metrics
    )
    with _complaints() as said:
        result = _result(exporter, data)
    if result is None:
        late = [f"it was not done within {exporter.seconds:g} s", *said[-1:]]
        return Sent(points, ok=False, reason=_line("; ".join(late)))
    exporter.sends.shutdown()
    answer = exporter.answers[-1] if exporter.answers else Answer()
    if result is MetricExportResult.SUCCESS and not answer.refused:
        return Sent(points, ok=True, rejected=answer.rejected, message=_line(answer.message))
    if isinstance(result, Exception):
        said = [str(result)]
    reasons = [answer.refused] if result is MetricExportResult.SUCCESS else [*said[:1], *said[-1:]]
    return Sent(points, ok=False, reason=_line("; ".join(dict.fromkeys(reasons)) or "it gave no reason"))


def _result(exporter: Exporter, data: MetricsData) -> MetricExportResult | Exception | None:
    """What came of it; None where it did not end in time.

    In a thread: a name that is being looked up, or an answer that comes a byte a second, heeds no exporter's timeout.
    """
    results: list[MetricExportResult | Exception] = []

    def export() -> None:
        try:
            results.append(exporter.sends.export(data))
        except Exception as error:  # noqa: BLE001  # whatever an exporter raises, its push has failed
            results.append(error)

    thread = threading.Thread(target=export, name="push", daemon=True)
    thread.start()
    thread.join(exporter.seconds + _GRACE_SECONDS)
    return results[0] if results else None


def _line(text: str) -> str:
    """What a stranger says, as one line that no terminal takes for orders."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())


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
