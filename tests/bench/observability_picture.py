"""Draws what the dashboard's queries gave as one HTML page, for looking at it where there is no Grafana.

    python -m tests.bench.observability --data panels.json
    python -m tests.bench.observability_picture panels.json > panels.html
    chromium --headless --screenshot=panels.png --window-size=1600,2400 file://$PWD/panels.html

It keeps to the dashboard's places, legends, units, stacks and bands, and is no rendering by Grafana.
"""

from __future__ import annotations

import html
import json
import re
import sys
from itertools import accumulate
from math import log10
from pathlib import Path
from typing import Any, NamedTuple

COLOURS = ("#7eb26d", "#eab839", "#6ed0e0", "#ef843c", "#e24d42", "#1f78c1", "#ba43a9", "#705da0", "#508642", "#cca300")
CELL_X, CELL_Y = 65, 34  # pixels of a column and of a unit of height
HEAD, FOOT, LEFT = 26, 34, 62
STYLE = """
body { background: #111217; color: #ccccdc; font: 12px sans-serif; margin: 8px; position: relative }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c2f33; box-sizing: border-box; overflow: hidden }
.row { position: absolute; font-size: 15px; font-weight: bold }
.title { font-weight: bold; padding: 5px 8px; white-space: nowrap }
.legend { padding: 0 8px; color: #9fa7b3; font-size: 11px; line-height: 14px; height: 30px; overflow: hidden }
.stat { font-size: 34px; padding: 14px 12px 4px } .name { padding: 0 12px; color: #9fa7b3 }
.bar { margin: 6px 10px; white-space: nowrap } .bar i { display: inline-block; height: 10px; margin-right: 6px }
"""


class Line(NamedTuple):
    """One series as it is drawn."""

    name: str
    points: tuple[tuple[float, float], ...]


def page(kept: list[dict[str, Any]]) -> str:
    """The page of what `tests.bench.observability --data` wrote."""
    parts, top = [], 0
    for one in kept:
        if "row" in one:
            parts.append(f'<div class="row" style="left:8px;top:{top + 10}px">{html.escape(one["row"])}</div>')
            continue
        place = one["panel"]["gridPos"]
        top = max(top, (place["y"] + place["h"]) * CELL_Y)
        parts.append(_panel(one["panel"], _lines(one["series"]), place))
    body = f'<body style="height:{top}px">{"".join(parts)}</body>'
    return f'<!doctype html><meta charset="utf-8"><style>{STYLE}</style>{body}'


def _lines(series: list[dict[str, Any]]) -> list[Line]:
    lines = []
    for one in series:
        name = one["legend"]
        for label in re.findall(r"\{\{(\w+)\}\}", name):
            name = name.replace(f"{{{{{label}}}}}", one["labels"].get(label, ""))
        lines.append(Line(name.strip(), tuple((at, float(value)) for at, value in one["values"])))
    return lines


def _panel(panel: dict[str, Any], lines: list[Line], place: dict[str, int]) -> str:
    width, height = place["w"] * CELL_X - 6, place["h"] * CELL_Y - 6
    box = f"left:{place['x'] * CELL_X + 8}px;top:{place['y'] * CELL_Y}px;width:{width}px;height:{height}px"
    unit = panel["fieldConfig"]["defaults"]["unit"]
    if panel["type"] == "stat":
        body = "".join(
            f'<div class="stat">{_shown(line.points[-1][1], unit)}</div>'
            f'<div class="name">{html.escape(line.name)}</div>'
            for line in lines
        )
    elif panel["type"] == "bargauge":
        body = _bars(lines, unit, width)
    else:
        body = _chart(panel, lines, unit, width, height)
    return f'<div class="panel" style="{box}"><div class="title">{html.escape(panel["title"])}</div>{body}</div>'


def _bars(lines: list[Line], unit: str, width: int) -> str:
    most = max((line.points[-1][1] for line in lines), default=0) or 1
    return "".join(
        f'<div class="bar"><i style="width:{max(1, line.points[-1][1] / most * (width - 260)):.0f}px;'
        f'background:{COLOURS[at % len(COLOURS)]}"></i>'
        f"{html.escape(line.name)} {_shown(line.points[-1][1], unit)}</div>"
        for at, line in enumerate(lines)
    )


class Frame(NamedTuple):
    """Where values lie on a chart: unix seconds from left to right, values from below to above."""

    start: float
    end: float
    low: float
    high: float
    across: float
    down: float
    is_log: bool

    def place(self, at: float, value: float) -> str:
        """A point as SVG has it."""
        x = LEFT + (at - self.start) / ((self.end - self.start) or 1.0) * self.across
        return f"{x:.1f},{8 + (self.high - self._scaled(value)) / (self.high - self.low) * self.down:.1f}"

    def points(self, line: Line) -> list[str]:
        """A series as SVG has it."""
        return [self.place(*point) for point in line.points]

    def ticks(self, unit: str) -> str:
        """Lines across, each with its value."""
        marks = []
        for step in range(5):
            at, y = self.high - (self.high - self.low) * step / 4, 8 + self.down * step / 4
            shown = _shown(10**at if self.is_log else at, unit)
            marks.append(f'<line x1="{LEFT}" x2="{LEFT + self.across}" y1="{y:.1f}" y2="{y:.1f}" stroke="#2c2f33"/>')
            marks.append(f'<text x="4" y="{y + 4:.1f}" fill="#9fa7b3" font-size="11">{shown}</text>')
        return "".join(marks)

    def _scaled(self, value: float) -> float:
        return log10(value) if self.is_log else value


def _chart(panel: dict[str, Any], lines: list[Line], unit: str, width: int, height: int) -> str:
    drawing, overrides = panel["fieldConfig"]["defaults"]["custom"], panel["fieldConfig"]["overrides"]
    is_states = panel["type"] == "state-timeline"
    is_stack = drawing.get("stacking", {}).get("mode") == "normal"
    drawn = _stacked(lines) if is_stack else lines
    edges = {one["matcher"]["options"] for one in overrides}
    frame = _frame(drawn, width, height, rows=len(lines) * is_states, is_log="scaleDistribution" in drawing)
    shapes = ["" if is_states else frame.ticks(unit), *_bands(overrides, drawn, frame)]
    for at, line in reversed(list(enumerate(drawn))):
        colour = COLOURS[at % len(COLOURS)]
        if is_states:
            row = " ".join(frame.place(moment, at + 0.5) for moment, _ in line.points)
            shapes.append(f'<polyline points="{row}" stroke="{colour}" stroke-width="22" fill="none"/>')
        elif line.name not in edges:
            shapes.append(_shape(frame.points(line), colour, frame.place(0, 0) if is_stack else None))
    legend = "&emsp;".join(
        f'<span style="color:{COLOURS[at % len(COLOURS)]}">■</span> {html.escape(line.name)} '
        + ("" if is_states else _shown(line.points[-1][1], unit))
        for at, line in enumerate(lines)
        if line.name not in edges
    )
    size = f'width="{width}" height="{frame.down + 20}"'
    return f'<svg {size}>{"".join(shapes)}</svg><div class="legend">{legend}</div>'


def _frame(drawn: list[Line], width: int, height: int, *, rows: int, is_log: bool) -> Frame:
    instants = [at for line in drawn for at, _ in line.points] or [0.0]
    values = [log10(value) if is_log else value for line in drawn for _, value in line.points] or [0.0]
    low, high = min(values) if is_log else min(0.0, *values, 0.0), max(values)
    room = (high - low) * 0.05 or 1.0
    low, high = (0.0, float(rows)) if rows else (low - room * is_log, high + room)
    return Frame(min(instants), max(instants), low, high, width - LEFT - 12, height - HEAD - FOOT - 24, is_log)


def _bands(overrides: list[dict[str, Any]], drawn: list[Line], frame: Frame) -> list[str]:
    named = {line.name: line for line in drawn}
    filled = [
        (named[property_["value"]], named[one["matcher"]["options"]])
        for one in overrides
        for property_ in one["properties"]
        if property_["id"] == "custom.fillBelowTo" and {property_["value"], one["matcher"]["options"]} <= set(named)
    ]
    return [
        f'<polygon points="{" ".join([*frame.points(upper), *reversed(frame.points(lower))])}" '
        f'fill="{COLOURS[at]}" fill-opacity="0.25"/>'
        for at, (lower, upper) in enumerate(filled)
    ]


def _stacked(lines: list[Line]) -> list[Line]:
    values = [dict(line.points) for line in lines]
    instants = sorted({at for one in values for at in one})
    sums = {at: list(accumulate(one.get(at, 0.0) for one in values)) for at in instants}
    return [Line(line.name, tuple((at, sums[at][number]) for at in instants)) for number, line in enumerate(lines)]


def _shape(points: list[str], colour: str, ground: str | None) -> str:
    line = f'<polyline points="{" ".join(points)}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
    if ground is None:
        return line
    y = ground.partition(",")[2]
    first, last = points[0].partition(",")[0], points[-1].partition(",")[0]
    return f'<polygon points="{first},{y} {" ".join(points)} {last},{y}" fill="{colour}"/>{line}'


def _shown(value: float, unit: str) -> str:
    if unit == "percentunit":
        return f"{value * 100:.1f} %"
    if unit == "none":
        return f"{value:.4f}"
    suffix = {"s": " s", "Bps": "B/s", "bytes": "B", "watt": "W", "joule": "J"}.get(unit, "")
    for power, prefix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= power and unit != "s":
            return f"{value / power:.2f}{prefix}{suffix}"
    return f"{value:.3g}{suffix if suffix.startswith(' ') or not suffix else f' {suffix}'}"


if __name__ == "__main__":
    sys.stdout.write(page(json.loads(Path(sys.argv[1]).read_text())))
