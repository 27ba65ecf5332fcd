"""What PromQL expressions ask for, and what /metrics shows: enough of both to lay one beside the other."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export.counters import COUNTED, counters_of, labels_of, quantities_of
from kvtally.agent.export.figures import snapshot
from kvtally.agent.export.metrics import METRICS
from kvtally.agent.health import Health
from kvtally.agent.ledger.read import LedgerReader, Target
from kvtally.agent.pipeline import Tick
from kvtally.collectors.base import Scrape

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

HOUR_NS = 3600 * 10**9
WINDOWS = {"1h": HOUR_NS, "24h": 24 * HOUR_NS}
UP = {"up": {"job": set[str](), "instance": set[str]()}}
_METRIC = re.compile(r"\b(?:kvtally|process|up)(?:_\w+)?\b(?! *\()")
_SELECTOR = re.compile(r"\b(\w+)\{([^}]*)\}")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|on|ignoring|group_left|group_right) \(([^)]*)\)")
_STRING = re.compile(r'"[^"]*"')


def metrics_of(expr: str) -> set[str]:
    """The metrics that an expression names."""
    without_labels = _GROUPING.sub("", re.sub(r"\{[^}]*\}", "", _STRING.sub('""', expr)))
    return set(_METRIC.findall(without_labels))


def matchers(expr: str) -> Iterator[tuple[str, str, bool, str]]:
    """Every matcher: its metric, its label, whether its value is a literal that must be met, and that value."""
    for metric, inside in _SELECTOR.findall(expr):
        for label, operator, value in _MATCHER.findall(inside):
            yield metric, label, operator == "=" and not value.startswith("$"), value


def labels_named(expr: str) -> set[str]:
    """The labels by which an expression groups and matches."""
    return {label.strip() for inside in _GROUPING.findall(expr) for label in inside.split(",") if label.strip()}


@cache
def known_metrics(ledger: str) -> Mapping[str, Mapping[str, set[str]]]:
    """Metric to label to the values that it has in a ledger or by the code: all of /metrics, and `up`."""
    known: dict[str, dict[str, set[str]]] = {name: dict(labels) for name, labels in UP.items()}
    for name, labels in (*_figures(ledger), *_counters(), *_findings(), *_health()):
        found = known.setdefault(name, {})
        for label, value in labels.items():
            found.setdefault(label, set()).add(value)
    return known


def _figures(ledger: str) -> Iterator[tuple[str, Mapping[str, str]]]:
    with LedgerReader(ledger) as reader, reader.snapshot():
        taken = snapshot(reader, book_of(reader, Config()), Payment("on-demand", ""), WINDOWS)
    assert taken is not None
    for figure in taken.figures:
        yield METRICS[figure.metric].prometheus, figure.labels


def _counters() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Those of which the ledger has no target, by the table that makes them."""
    for kind in COUNTED:
        for counter in counters_of(kind, dict.fromkeys(quantities_of(kind), 1)):
            target = Target(1, kind, "", {}, ())
            yield METRICS[counter.metric].prometheus, {**labels_of(target), **dict(counter.labels)}


def _findings() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Whatever is wrong: the demo's ledger has nothing of it."""
    for window in WINDOWS:
        yield METRICS["findings"].prometheus, {"kind": "", "severity": "", "window": window}


def _health() -> Iterator[tuple[str, Mapping[str, str]]]:
    health = Health("/")
    health.add([Scrape("engine:e", 1, 0.0, ())], Tick((), ()))
    health._newest_ns, health._intervals = 1, {"engine": 1}
    for family in health.families(2, 1.0):
        name = f"{family.name}_total" if family.kind == "counter" else family.name
        for labels, _ in family.samples:
            yield name, {label: "" if label in {"source", "version"} else value for label, value in labels.items()}
        # a dashboard and an alert may ask for each outcome
        if name == "kvtally_scrapes_total":
            yield from ((name, {"outcome": outcome}) for outcome in ("no_data", "failed"))
