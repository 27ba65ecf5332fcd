"""A snapshot as the pages that Prometheus reads: text and OpenMetrics, rendered by its own client library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest as text_of
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_of
from prometheus_client.registry import Collector

from kvtally.agent.export.metrics import METRICS, OPENCOST

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from prometheus_client import Metric as Rendered

    from kvtally.agent.export.figures import Figure, Snapshot

NANO = 10**9


def text_page(snapshot: Snapshot | None) -> bytes:
    """The page in the text format 0.0.4; empty for a ledger without intervals."""
    return text_of(_registry(snapshot, with_created=False))


def openmetrics_page(snapshot: Snapshot | None) -> bytes:
    """The page in OpenMetrics 1.0, which tells when the counters began; ends with # EOF."""
    page: bytes = openmetrics_of(_registry(snapshot, with_created=True))  # type: ignore[no-untyped-call]  # the library
    return page


class _Figures(Collector):
    """Gives what a snapshot holds, metric by metric."""

    def __init__(self, snapshot: Snapshot | None, *, with_created: bool) -> None:
        self._snapshot = snapshot
        self._with_created = with_created

    def collect(self) -> Iterable[Rendered]:
        if self._snapshot is None:
            return
        created = self._snapshot.start_ns / NANO if self._with_created else None
        by_metric: dict[str, list[Figure]] = {}
        for figure in self._snapshot.figures:
            by_metric.setdefault(figure.metric, []).append(figure)
        for name, metric in {**METRICS, **OPENCOST}.items():
            if name in by_metric:
                yield _family(metric.prometheus, metric.type, metric.meaning, by_metric[name], created)


def _registry(snapshot: Snapshot | None, *, with_created: bool) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Figures(snapshot, with_created=with_created))
    return registry


def _family(name: str, kind: str, meaning: str, figures: Sequence[Figure], created: float | None) -> Rendered:
    if kind != "counter":
        gauge = GaugeMetricFamily(name, meaning)
        for figure in figures:
            gauge.add_sample(name, _labels(figure), figure.value)
        return gauge
    counter = CounterMetricFamily(name.removesuffix("_total"), meaning)
    for figure in figures:
        labels = _labels(figure)
        counter.add_sample(name, labels, figure.value)
        if created is not None:
            counter.add_sample(f"{counter.name}_created", labels, created)
    return counter


def _labels(figure: Figure) -> dict[str, str]:
    """Without the empty ones: under honor_labels, namespace="" would take away what the scraper knows of the target."""
    return {name: value for name, value in figure.labels.items() if value}
