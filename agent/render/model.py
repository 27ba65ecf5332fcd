"""The forward model's answer as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.numbers import UNKNOWN, amount, count
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_GIGA = 1e9
_TERA = 1e12
_PLACES_MAX = 9


def model_table(report: Mapping[str, Any]) -> None:
    """Print a model report."""
    report = printable(report)
    screen = Screen()
    _head(screen, report)
    for prompt in report["prompts"]:
        _prompt(screen, prompt, report)
    _break_even(screen, report)
    _stores(screen, report)
    _claims(screen, report)
    _inputs(screen, report["inputs"])
    for finding in report["findings"]:
        screen.say(Text("note: ", style="yellow"), finding, indent=2)


def significant(value: float | None) -> str:
    """A figure with three significant digits, and all of those before the point."""
    if value is None:
        return UNKNOWN
    places = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(places, 0), _PLACES_MAX)}f}"


def _interval(figure: Mapping[str, float | None] | None, scale: float = 1.0) -> str:
    """A point with its range behind it, where that shows."""
    if figure is None:
        return UNKNOWN
    low, point, high = (None if end is None else end / scale for end in figure.values())
    shown = significant(point)
    if shown == significant(low) == significant(high):
        return shown
    return f"{shown} ({significant(low)} to {significant(high)})"


def _head(screen: Screen, report: Mapping[str, Any]) -> None:
    model = report["model"]
    screen.say(
        Text(model["name"], style="bold"),
        f" on {model['gpus']} x {model['gpu']}: {model['parameters'] / _GIGA:,.1f} G parameters, "
        f"{count(model['kv_bytes_per_token'])} B of KV a token",
    )
    screen.print()


def _inputs(screen: Screen, inputs: Sequence[Mapping[str, str]]) -> None:
    """Every input with its basis, and below them where each was read."""
    screen.say("from these inputs", style="bold")
    sheet = Sheet("input", "value", "basis", "#", texts=2)
    sources: dict[str, int] = {}
    for each in inputs:
        number = sources.setdefault(each["source"], len(sources) + 1) if each["source"] else 0
        sheet.add(each["name"], each["value"], each["basis"], f"[{number}]" if number else "")
    screen.sheet(sheet)
    for source, number in sources.items():
        screen.say(f"[{number}] {source}", style="dim", indent=5)


def _prompt(screen: Screen, prompt: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    tokens = f"{count(prompt['prompt_tokens'])} prompt tokens ({prompt['kv_bytes'] / _GIGA:,.2f} GB of KV)"
    basis = report["basis"]
    screen.say(f"{tokens}, seconds to first token by reuse, {basis['ttft']}", style="bold")
    screen.sheet(_curves(prompt, "ttft_seconds"))
    if basis["cost"]:
        screen.say(f"{tokens}, {report['currency']} per 100M tokens by reuse, {basis['cost']}", style="bold")
        screen.sheet(_curves(prompt, "cost_per_100m_tokens"))


def _curves(prompt: Mapping[str, Any], key: str) -> Sheet:
    reuses = [point["reuse"] for point in prompt["curves"][0]["points"]]
    sheet = Sheet("backend", *(f"{reuse:.4g} %" for reuse in (100 * reuse for reuse in reuses)))
    for curve in prompt["curves"]:
        figures = [point[key] for point in curve["points"]]
        sheet.add(curve["backend"], *(_interval({end: float(text) for end, text in each.items()}) for each in figures))
    return sheet


def _break_even(screen: Screen, report: Mapping[str, Any]) -> None:
    screen.say(
        f"break-even bandwidth in GB/s into the replica, {report['basis']['break_even']}: "
        "a load that is slower takes longer than computing",
        style="bold",
    )
    sheet = Sheet("prefix", "of the whole prefix", "of its last token")
    for row in report["break_even"]:
        tokens = "1 token: the limit" if row["prefix_tokens"] == 1 else f"{count(row['prefix_tokens'])} tokens"
        figures = (row["bytes_per_second"], row["last_token_bytes_per_second"])
        sheet.add(tokens, *(_interval(figure, _GIGA) for figure in figures))
    screen.sheet(sheet)


def _stores(screen: Screen, report: Mapping[str, Any]) -> None:
    currency, lengths = report["currency"], [prompt["prompt_tokens"] for prompt in report["prompts"]]
    screen.say(f"what holds the KV, and the reuses a month that pay for it ({report['basis']['cost']})", style="bold")
    sheet = Sheet("store", "holds", f"{currency}", "an hour", *(f"at {count(length)}" for length in lengths))
    for store in report["stores"]:
        rows = [row for row in report["reuses_per_month"] if row["backend"] == store["name"]]
        held = f"{store['capacity_bytes'] / _TERA:,.4g} TB, {store['tokens_held'] / 1e6:,.0f} M tokens"
        reuses = [UNKNOWN if row["reuses"] is None else significant(row["reuses"]["point"]) for row in rows]
        sheet.add(store["name"], held, amount(store["price"]), amount(store["hourly"]), *reuses)
    screen.sheet(sheet)


def _claims(screen: Screen, report: Mapping[str, Any]) -> None:
    screen.say(f"what the article claims, by these inputs ({report['basis']['claims']})", style="bold")
    for claim, says in dict.fromkeys((each["claim"], each["says"]) for each in report["claims"]):
        rows = [each for each in report["claims"] if each["claim"] == claim]
        unit = f"{report['currency']}{rows[0]['unit']}" if rows[0]["unit"].startswith("/") else rows[0]["unit"]
        screen.say(f'"{says}"')
        sheet = Sheet("backend", "when", "prompt", "holds", unit, texts=2)
        for row in rows:
            prompt = count(row["prompt_tokens"])
            sheet.add(row["backend"], row["condition"], prompt, _verdict(row), _interval(row["figure"]))
        screen.sheet(sheet)


def _verdict(claim: Mapping[str, Any]) -> str:
    """Whether a claim holds; "probably" where an end of the range says otherwise."""
    if claim["holds"] is None:
        return "unknown"
    if claim["is_sure"]:
        return "yes" if claim["holds"] else "no"
    return "probably" if claim["holds"] else "probably not"
