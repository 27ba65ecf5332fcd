"""The forward model's curves as one SVG file: time to first token and cost against reuse, a row for each prompt."""

from __future__ import annotations

import math
import textwrap
from html import escape
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.model_report.measured import near

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

_WIDTH = 1080
_LEFT, _PANEL_WIDTH, _PANEL_STEP = 76, 420, 530
_TOP, _PANEL_HEIGHT, _ROW_STEP = 122, 230, 320
_LEGEND_GAP, _CHARACTER_WIDTH = 62, 6.5
_LINE_HEIGHT = 16
_CAPTION_CHARACTERS = 165
_TICKS_MAX = 9
# colours that are told apart without red and green; a second round is dashed
_NO_CACHE, _BOUND, _DRAM = "#333333", "#8a8a8a", "#d55e00"
_STORAGE = ("#e69f00", "#0072b2", "#009e73", "#56b4e9", "#8f5fbf")
_NOTE = "Logarithmic axes. A band is the range that the law leaves; the fine dots are a tenth of no cache."
_DASHES = ("", "7 4", "2 3")
_MARKED = "A mark is the median of what was measured, of about this prompt length."
_SEEN = {"engine": "measured at the engine", "client": "measured at a client"}


class _Style(NamedTuple):
    name: str
    colour: str
    dash: str


class _Axis(NamedTuple):
    """A logarithmic scale over the height of a panel."""

    low: float
    high: float

    def place(self, value: float) -> float:
        """Pixels from the panel's top."""
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return _PANEL_HEIGHT * (1 - share)

    def ticks(self) -> list[float]:
        """Steps of 1, 2 and 5, or decades alone where these would crowd."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1, 2, 5), (1, 3), (1,)):
            found = [step * 10.0**decade for decade in decades for step in steps]
            found = [each for each in found if self.low * 0.999 <= each <= self.high * 1.001]
            if len(found) <= _TICKS_MAX:
                break
        return found


class _Panel(NamedTuple):
    """Where a figure is found in a point, and what its axis says."""

    key: str
    label: str


def chart(report: Mapping[str, Any]) -> str:
    """The whole file."""
    model, currency = report["model"], report["currency"]
    panels = [_Panel("ttft_seconds", f"time to first token (s), {report['basis']['ttft']}")]
    if report["basis"]["cost"] and _is_positive(report):
        panels.append(_Panel("cost_per_100m_tokens", f"{currency} per 100M tokens, prices {report['basis']['cost']}"))
    styles = _styles(report["prompts"][0]["curves"])
    measured = report.get("measured") or []
    legend = list(_legend(styles, [name for name in _SEEN if any(row["seen_by"] == name for row in measured)]))
    top = _TOP + _LINE_HEIGHT * legend[-1].row
    caption = _caption(report)
    below = top + _ROW_STEP * len(report["prompts"]) - _LINE_HEIGHT
    height = below + _LINE_HEIGHT * len(caption) + 16
    title = f"{model['name']} on {model['hardware']}: what reused KV saves"
    note = f"{_NOTE} {_MARKED}" if measured else _NOTE
    body = [
        f"<title>{_text(title)}</title>",
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{_LEFT}" y="34" class="title">{_text(title)}</text>',
        f'<text x="{_LEFT}" y="56" class="note">{note}</text>',
        *(entry.drawn for entry in legend),
    ]
    for row, prompt in enumerate(report["prompts"]):
        for column, panel in enumerate(panels):
            x, y = _LEFT + column * _PANEL_STEP, top + row * _ROW_STEP
            marks = near(measured, prompt["prompt_tokens"]) if panel.key == "ttft_seconds" else []
            body += [f'<g transform="translate({x},{y})">', *_panel(panel, prompt, styles, marks), "</g>"]
    for number, line in enumerate(caption):
        body.append(f'<text x="{_LEFT}" y="{below + _LINE_HEIGHT * number}" class="note">{_text(line)}</text>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}">'
    )
    return "\n".join([head, _CSS, *body, "</svg>", ""])


_CSS = """<style>
text { font-family: Helvetica, Arial, sans-serif; font-size: 12px; fill: #222222; }
.title { font-size: 18px; font-weight: bold; }
.head { font-size: 13px; font-weight: bold; }
.note { font-size: 11px; fill: #555555; }
.grid { stroke: #e3e3e3; stroke-width: 1; }
.frame { fill: none; stroke: #777777; stroke-width: 1; }
.tenth { stroke: #333333; stroke-width: 1; stroke-dasharray: 2 4; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.mark { fill: #ffffff; stroke: #111111; stroke-width: 1.6; }
</style>"""


def _text(text: str) -> str:
    """Text that XML can hold: names come from anywhere."""
    return escape("".join(each if each.isprintable() else "?" for each in text))


def _is_positive(report: Mapping[str, Any]) -> bool:
    """Whether a logarithmic axis can show the cost."""
    return all(value > 0 for prompt in report["prompts"] for value in _values(prompt, "cost_per_100m_tokens"))


def _values(prompt: Mapping[str, Any], key: str) -> Iterator[float]:
    for curve in prompt["curves"]:
        for point in curve["points"]:
            yield from (float(value) for value in point[key].values())


def _styles(curves: Sequence[Mapping[str, Any]]) -> list[_Style]:
    """A colour and a dash for each backend, in their order."""
    found, seen = [], {"storage": 0, "dram": 0}
    for curve in curves:
        kind = curve["kind"]
        number = seen.get(kind, 0)
        if kind == "none":
            colour, dash = _NO_CACHE, ""
        elif kind == "bound":
            colour, dash = _BOUND, _DASHES[1]
        else:
            choice = _STORAGE if kind == "storage" else (_DRAM,)
            colour, dash = choice[number % len(choice)], _DASHES[number // len(choice) % len(_DASHES)]
            seen[kind] = number + 1
        found.append(_Style(curve["backend"], colour, dash))
    return found


def _dashed(style: _Style) -> str:
    return f' stroke-dasharray="{style.dash}"' if style.dash else ""


class _Entry(NamedTuple):
    row: int
    drawn: str


def _legend(styles: Sequence[_Style], seen: Sequence[str]) -> Iterator[_Entry]:
    """As many names in a row as the longest of them allows: the curves', then the marks'."""
    names = [style.name for style in styles] + [_SEEN[name] for name in seen]
    step = _LEGEND_GAP + _CHARACTER_WIDTH * max(len(name) for name in names)
    in_a_row = max(int((_WIDTH - _LEFT) / step), 1)
    for number, name in enumerate(names):
        row = number // in_a_row
        x, y = _LEFT + number % in_a_row * step, 78 + row * _LINE_HEIGHT
        if number < len(styles):
            style = styles[number]
            sign = f'<path d="M{x:g} {y - 4}h28" class="curve" stroke="{style.colour}"{_dashed(style)}/>'
        else:
            sign = _mark(seen[number - len(styles)], x + 14, y - 4)
        yield _Entry(row, f'{sign}<text x="{x + 36:g}" y="{y}">{_text(name)}</text>')


def _mark(seen_by: str, x: float, y: float) -> str:
    """A circle for what the engine saw, a diamond for what a client did."""
    if seen_by == "engine":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" class="mark"/>'
    return f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" class="mark"/>'


def _panel(
    panel: _Panel, prompt: Mapping[str, Any], styles: Sequence[_Style], marks: Sequence[Mapping[str, Any]]
) -> Iterator[str]:
    """One figure of one prompt length: grid, bands, curves, marks, axes."""
    axis = _axis_of([*_values(prompt, panel.key), *(row["seconds"]["point"] for row in marks)])
    yield f'<text x="0" y="-10" class="head">{prompt["prompt_tokens"]:,} prompt tokens</text>'
    yield from _grid(axis)
    none = float(prompt["curves"][0]["points"][0][panel.key]["point"])
    if none / 10 >= axis.low:
        yield f'<path d="M0 {axis.place(none / 10):.1f}h{_PANEL_WIDTH}" class="tenth"/>'
    for curve, style in zip(prompt["curves"], styles, strict=True):
        yield _band(curve["points"], panel.key, axis, style)
    for curve, style in zip(prompt["curves"], styles, strict=True):
        line = _line(curve["points"], lambda point: float(point[panel.key]["point"]), axis)
        yield f'<path d="M{line}" class="curve" stroke="{style.colour}"{_dashed(style)}/>'
    for row in marks:
        yield _mark(row["seen_by"], _PANEL_WIDTH * row["reuse"], axis.place(row["seconds"]["point"]))
    yield f'<rect width="{_PANEL_WIDTH}" height="{_PANEL_HEIGHT}" class="frame"/>'
    middle = _PANEL_WIDTH / 2
    yield f'<text x="{middle:g}" y="{_PANEL_HEIGHT + 38}" text-anchor="middle">reused share of the prompt (%)</text>'
    turned = f'transform="translate(-52,{_PANEL_HEIGHT / 2:g}) rotate(-90)"'
    yield f'<text {turned} text-anchor="middle">{_text(panel.label)}</text>'


def _axis_of(values: Sequence[float]) -> _Axis:
    """From the step of 1, 2 or 5 under the least value to that above the largest."""
    return _Axis(_step(min(values), math.floor), _step(max(values) * 1.02, math.ceil))


def _step(value: float, to: Callable[[float], int]) -> float:
    """The nearest 1, 2 or 5 of a decade, downwards or upwards."""
    decade = 10.0 ** math.floor(math.log10(value))
    steps = [step * decade for step in (1.0, 2.0, 5.0, 10.0)]
    return (
        max(each for each in steps if each <= value)
        if to is math.floor
        else min(each for each in steps if each >= value)
    )


def _grid(axis: _Axis) -> Iterator[str]:
    for tick in axis.ticks():
        y = axis.place(tick)
        yield f'<path d="M0 {y:.1f}h{_PANEL_WIDTH}" class="grid"/>'
        yield f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{tick:,.10g}</text>'
    for percent in range(0, 101, 20):
        x = _PANEL_WIDTH * percent / 100
        yield f'<path d="M{x:g} 0v{_PANEL_HEIGHT}" class="grid"/>'
        yield f'<text x="{x:g}" y="{_PANEL_HEIGHT + 18}" text-anchor="middle">{percent}</text>'


def _line(points: Sequence[Mapping[str, Any]], figure: Callable[[Mapping[str, Any]], float], axis: _Axis) -> str:
    return " ".join(f"{_PANEL_WIDTH * point['reuse']:.1f},{axis.place(figure(point)):.1f}" for point in points)


def _band(points: Sequence[Mapping[str, Any]], key: str, axis: _Axis, style: _Style) -> str:
    upper = _line(points, lambda point: float(point[key]["high"]), axis)
    lower = _line(points[::-1], lambda point: float(point[key]["low"]), axis)
    return f'<path d="M{upper} {lower}z" fill="{style.colour}" fill-opacity="0.10" stroke="none"/>'


def _caption(report: Mapping[str, Any]) -> list[str]:
    """Every input with its basis, and the sources."""
    told = "; ".join(f"{each['name']}: {each['value']} ({each['basis']})" for each in report["inputs"])
    sources = "; ".join(dict.fromkeys(each["source"] for each in report["inputs"] if each["source"]))
    basis = report["basis"]
    bases = f"Time to first token {basis['ttft']}, cost by prices {basis['cost'] or 'that are unknown'}."
    return [line for text in (bases, told, f"Sources: {sources}") for line in textwrap.wrap(text, _CAPTION_CHARACTERS)]
