"""Panels as Grafana 10 and later read them: what they ask, how they draw it, and what their figure means."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
BAND_OPACITY = 25  # per cent
STACKED_OPACITY = 60

Look = Literal["lines", "stack", "stat", "bars", "states"]
_TYPES: dict[Look, str] = {
    "lines": "timeseries",
    "stack": "timeseries",
    "stat": "stat",
    "bars": "bargauge",
    "states": "state-timeline",
}
_INSTANT = ("stat", "bars")


class Query(NamedTuple):
    """One PromQL expression; `legend` names its series by their labels."""

    expr: str
    legend: str


class Panel(NamedTuple):
    """One panel.

    description   what the figure is, its basis, and where the CLI says the same
    unit          Grafana's id of it; amounts of money carry "none", since a ledger's currency is its own
    width         of 24 columns; panels of one line are as high as the highest of them
    interval      least step: figures from the ledger are worked out once a minute, and rates need several of them
    bands         pairs of series names (lower, upper) that are drawn as one band
    most          top of the axis; None: as high as the data
    is_log        for figures of which one is many times another
    """

    title: str
    description: str
    queries: tuple[Query, ...]
    unit: str
    look: Look = "lines"
    width: int = 8
    height: int = 8
    interval: str = "1m"
    bands: tuple[tuple[str, str], ...] = ()
    most: float | None = None
    is_log: bool = False


class Row(NamedTuple):
    """Panels under one title."""

    title: str
    panels: tuple[Panel, ...]


def panel_json(panel: Panel, number: int, position: dict[str, int]) -> dict[str, Any]:
    """A panel as it stands in the dashboard."""
    return {
        "id": number,
        "type": _TYPES[panel.look],
        "title": panel.title,
        "description": panel.description,
        "datasource": DATASOURCE,
        "gridPos": position,
        "interval": panel.interval,
        "targets": [_target(query, at, panel.look) for at, query in enumerate(panel.queries)],
        "fieldConfig": {"defaults": _defaults(panel), "overrides": _overrides(panel)},
        "options": _options(panel.look),
    }


def _target(query: Query, at: int, look: Look) -> dict[str, Any]:
    is_instant = look in _INSTANT
    return {
        "refId": chr(ord("A") + at),
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "instant": is_instant,
        "range": not is_instant,
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "noValue": "no data", "custom": _drawn(panel)}
    if panel.look in {"lines", "stack", "bars"}:
        defaults["color"] = {"mode": "palette-classic"}
    else:  # a figure that is not good or bad in itself has no traffic light
        defaults["color"] = {"mode": "fixed", "fixedColor": "text"}
    if panel.look == "stack" or panel.most is not None:
        defaults["min"] = 0
    if panel.most is not None:
        defaults["max"] = panel.most
    if panel.look == "states":
        defaults["mappings"] = [{"type": "value", "options": {"1": {"text": " ", "color": "blue", "index": 0}}}]
    if panel.unit == "none":
        defaults["decimals"] = 4
    return defaults


def _drawn(panel: Panel) -> dict[str, Any]:
    look = panel.look
    if look == "states":
        return {"fillOpacity": 70, "lineWidth": 0}
    if look not in {"lines", "stack"}:
        return {}
    scale: dict[str, Any] = {"scaleDistribution": {"type": "log", "log": 10}} if panel.is_log else {"axisSoftMin": 0}
    return {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": STACKED_OPACITY if look == "stack" else 0,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if look == "stack" else "none", "group": "A"},
        **scale,
    }


def _overrides(panel: Panel) -> list[dict[str, Any]]:
    """The edges of a band are no lines of their own: they are filled between, and stand in no legend."""
    overrides: list[dict[str, Any]] = []
    for lower, upper in panel.bands:
        edge = [
            {"id": "custom.lineWidth", "value": 0},
            {"id": "custom.hideFrom", "value": {"legend": True, "tooltip": False, "viz": False}},
        ]
        filled = [
            {"id": "custom.fillBelowTo", "value": lower},
            {"id": "custom.fillOpacity", "value": BAND_OPACITY},
        ]
        overrides.append({"matcher": {"id": "byName", "options": lower}, "properties": edge})
        overrides.append({"matcher": {"id": "byName", "options": upper}, "properties": [*edge, *filled]})
    return overrides


def _options(look: Look) -> dict[str, Any]:
    if look == "stat":
        return {
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "textMode": "value_and_name",
        }
    if look == "bars":
        return {
            "displayMode": "basic",
            "orientation": "horizontal",
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "showUnfilled": True,
            "valueMode": "color",
        }
    if look == "states":
        return {
            "mergeValues": True,
            "showValue": "never",
            "rowHeight": 0.8,
            "legend": {"showLegend": False, "displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "single", "sort": "none"},
        }
    return {
        "legend": {"showLegend": True, "displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull", "mean"]},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
