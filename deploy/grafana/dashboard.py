"""Prints deploy/grafana/kvtally.json, the Grafana dashboard.

python -m deploy.grafana.dashboard > deploy/grafana/kvtally.json
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from deploy.grafana.panels import DATASOURCE, panel_json
from deploy.grafana.rows import ROWS

if TYPE_CHECKING:
    from deploy.grafana.panels import Panel, Row

SCHEMA_VERSION = 38  # Grafana 10.0's own; a later Grafana brings an older one up to its own, never down
COLUMNS = 24
ALL = ".*"  # matches a label that is not there, too
# variables in the order in which they stand on the page: name, what a person reads, where its values are found
FOUND = (
    ("model", "model", "label_values(kvtally_coverage_ratio, model)"),
    ("cluster", "cluster", "label_values(kvtally_coverage_ratio, cluster)"),
    ("namespace", "namespace", "label_values(kvtally_coverage_ratio, namespace)"),
    ("tenant", "tenant", "label_values(kvtally_coverage_ratio, tenant)"),
    ("instance", "kvtally", "label_values(kvtally_build_info, instance)"),
)
WINDOW = ("window", "window of costs and savings", "label_values(kvtally_coverage_ratio, window)")
CURRENCY = ("currency", "currency of savings", "label_values(kvtally_ledger_cost, currency)")


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    return {
        "uid": "kvtally",
        "title": "kvtally: what a million tokens cost, and what KV reuse saved",
        "description": "Costs, savings and what they stand on, as `kvtally cost` and `kvtally savings` say them.",
        "tags": ["kvtally", "llm", "cost"],
        "schemaVersion": SCHEMA_VERSION,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "1m",
        "time": {"from": "now-6h", "to": "now"},
        "timepicker": {},
        "timezone": "",
        "annotations": {"list": []},
        "links": [],
        "templating": {"list": _variables()},
        "panels": _laid_out(),
    }


def _variables() -> list[dict[str, Any]]:
    source = {
        "name": "datasource",
        "label": "Prometheus",
        "type": "datasource",
        "query": "prometheus",
        "current": {},
        "options": [],
        "refresh": 1,
        "regex": "",
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "skipUrlSync": False,
    }
    every = {"text": "All", "value": "$__all"}
    found = [_found(*one) | {"includeAll": True, "multi": True, "allValue": ALL, "current": every} for one in FOUND]
    window = _found(*WINDOW) | {"current": {"text": "1h", "value": "1h"}}
    return [source, *found, window, _found(*CURRENCY) | {"current": {}}]  # the first there is


def _found(name: str, label: str, query: str) -> dict[str, Any]:
    """A variable whose values are those of a label."""
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": DATASOURCE,
        "definition": query,
        "query": {"query": query, "refId": "StandardVariableQuery"},
        "options": [],
        "refresh": 2,  # whenever the time range changes
        "regex": "",
        "sort": 1,
        "hide": 0,
        "includeAll": False,
        "multi": False,
        "skipUrlSync": False,
    }


def _laid_out() -> list[dict[str, Any]]:
    """Rows from top to bottom, their panels from left to right."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in ROWS:
        place = {"h": 1, "w": COLUMNS, "x": 0, "y": y}
        title = {"id": len(panels) + 1, "type": "row", "title": row.title, "collapsed": False, "panels": []}
        panels.append({**title, "gridPos": place})
        y += 1
        for line in _lines(row):
            x, height = 0, max(panel.height for panel in line)
            for panel in line:
                place = {"h": height, "w": panel.width, "x": x, "y": y}
                panels.append(panel_json(panel, len(panels) + 1, place))
                x += panel.width
            y += height
    return panels


def _lines(row: Row) -> list[list[Panel]]:
    """A row's panels by the lines in which they have room."""
    lines: list[list[Panel]] = [[]]
    for panel in row.panels:
        if sum(one.width for one in lines[-1]) + panel.width > COLUMNS:
            lines.append([])
        lines[-1].append(panel)
    return lines


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=2, ensure_ascii=False))
