"""The forward model's answer as tables."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.price import HOURS_PER_YEAR
from kvtally.agent.render.numbers import UNKNOWN, amount, count
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_MEGA = 1e6
_GIGA = 1e9
_TERA = 1e12
_PLACES_MAX = 9


def model_table(report: Mapping[str, Any]) -> None:
    """Print a model report."""
    report = printable(report)
    screen = Screen()
    _head(screen, report)
    if report.get("measured"):
        _measured(screen, report["measured"])
    for answer in report.get("what_ifs", ()):
        _what_if(screen, answer, report["currency"])
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
        f" on {model['hardware']}: {_parameters(model['parameters'])} parameters, "
        f"{count(model['kv_bytes_per_token'])} B of KV a token",
    )
    if "deployment" in report:
        own = report["deployment"]
        window = own["window"]
        screen.say(f"of the ledger: {', '.join(own['replicas'])}, {window['start']} to {window['end']}")
    screen.print()


def _parameters(number: float) -> str:
    return f"{number / _GIGA:,.1f} G" if number >= _GIGA / 10 else f"{number / _MEGA:,.1f} M"


_TIERS = {"none": "", "hbm": "HBM", "outer": "outer", "both": "both", "unknown": "?"}


def _measured(screen: Screen, rows: Sequence[Mapping[str, Any]]) -> None:
    """What was measured beside what the law says, and what reuse took off beside what it would have."""
    copies = ", with the loading and storing that the outer tiers report" * any(row["copies_seconds"] for row in rows)
    screen.say(
        "seconds to first token as measured (medians, MEASURED), at the engine from scheduling on, at a client from "
        f"sending on; and by the law (MODELLED){copies}",
        style="bold",
    )
    heads = ("prompt", "reuse", "reused from", "seen at", "requests", "measured", "by the law", "error")
    sheet = Sheet(*heads, "reuse saved", "by the law", "error")
    for row in rows:
        saved = row["saved"]
        sheet.add(
            count(row["prompt_tokens"]),
            f"{row['reuse']:.1%}",
            _TIERS[row["tier"]],
            row["seen_by"],
            count(row["requests"]),
            significant(row["seconds"]["point"]),
            _interval(row["predicted_seconds"]),
            f"{row['error']:+.1%}",
            *(("", "", "") if saved is None else _saved(saved)),
        )
    screen.sheet(sheet, droppable=("reused from", "requests"))


def _saved(saved: Mapping[str, Any]) -> tuple[str, str, str]:
    error = UNKNOWN if saved["error"] is None else f"{saved['error']:+.1%}"
    return significant(saved["seconds"]), significant(saved["predicted_seconds"]), error


def _what_if(screen: Screen, answer: Mapping[str, Any], currency: str) -> None:
    """A store that is not there: its figures, line by line."""
    window = answer["window"]
    screen.say(
        f"what if: {answer['name']}, {_size(answer)} at {answer['bandwidth_bytes_per_second'] / _GIGA:,.3g} GB/s, "
        f"under the reuse of {', '.join(answer['replicas'])} from {window['start']} to {window['end']}",
        style="bold",
    )
    if answer["basis"] is None:
        screen.say(Text(f"{answer['status']}: ", style="yellow"), "; ".join(answer["reasons"]), indent=2)
        screen.print()
        return
    sheet = Sheet("", "engine-seconds", currency, "basis")
    for name, seconds, money, basis in _what_if_lines(answer):
        sheet.add(name, seconds, money, basis)
    screen.sheet(sheet)
    for line in _verdict_lines(answer, currency):
        screen.say(line, indent=2)
    for reason in answer["reasons"]:
        screen.say(Text(f"{answer['status']}: ", style="yellow"), reason, indent=2)
    for assumption in answer["assumptions"]:
        screen.say(Text("assumed: ", style="dim"), assumption, indent=2)
    screen.print()


def _size(answer: Mapping[str, Any]) -> str:
    return f"{answer['capacity_bytes'] / _TERA:,.4g} TB ({answer['capacity_tokens'] / 1e6:,.0f} M tokens)"


def _what_if_lines(answer: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    basis = answer["basis"]
    cost = answer["reuse_cost"] or {}
    money = basis["money"] or ""
    return [
        ("prefill avoided", _interval(answer["gross_engine_seconds"]), _amounts(answer["gross"]), "MODELLED"),
        ("loading", _interval(answer["stall_engine_seconds"]), amount(cost.get("stall")), "MODELLED"),
        ("storing", _interval(answer["store_engine_seconds"]), amount(cost.get("store")), "MODELLED"),
        ("holding it", "", amount(answer["holding"]), money),
        ("net", _interval(answer["net_engine_seconds"]), _amounts(answer["net"]), money or "MODELLED"),
        ("net, a month of this", "", _amounts(answer["net_per_month"]), money),
    ]


def _amounts(bounds: Mapping[str, str] | None) -> str:
    if bounds is None:
        return UNKNOWN
    return f"{amount(bounds['point'])} ({amount(bounds['low'])} to {amount(bounds['high'])})"


def _verdict_lines(answer: Mapping[str, Any], currency: str) -> list[str]:
    """Whether it pays, from what reuse on, and whether the tokens fit."""
    tokens, kept = answer["tokens"], answer["working_set"]
    seen = f"{count(tokens['computed'])} computed, {count(tokens['hbm'])} reused from HBM"
    outer = f"{count(tokens['external'])} from outside it (MEASURED)"
    lines = [f"tokens: {seen}, {outer}; {count(tokens['extra'])} more supposed (ASSUMED)"]
    if answer["verdict"] is not None:
        words = {"pays": "it pays", "does not pay": "it does not pay", "not sure": "it is not sure that it pays"}
        lines.append(f"{words[answer['verdict']]}, by the 90 % interval of the net in {currency}")
    if answer["pays_from"] is not None:
        lines.append(_pays_from(answer["pays_from"]))
    if kept["kept_hours"] is not None:
        fits = "fits" if kept["fits"] else "does not fit"
        lines.append(
            f"all that would be computed in the window {fits}: {count(kept['computed_tokens'])} tokens at most are "
            f"new; at that pace it holds what was computed in {kept['kept_hours']:,.3g} h"
        )
    return lines


def _pays_from(pays: Mapping[str, float | None]) -> str:
    tokens = pays["tokens_per_month"]
    if tokens is None:
        return "no share of the computed tokens, turned into hits, would pay for it"
    share = (
        "with the reuse that there is" if not pays["extra_reuse"] else f"from {pays['extra_reuse']:.1%} extra reuse on"
    )
    return (
        f"it pays for itself {share}: {tokens / 1e6:,.4g} M loaded tokens a month, "
        f"{significant(pays['reuses_per_month_of_a_held_token'])} reuses of each token that it can hold"
    )


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
    _curves(screen, prompt, "ttft_seconds")
    if basis["cost"]:
        screen.say(f"{tokens}, {report['currency']} per 100M tokens by reuse, {basis['cost']}", style="bold")
        _curves(screen, prompt, "cost_per_100m_tokens")


def _curves(screen: Screen, prompt: Mapping[str, Any], key: str) -> None:
    """A figure for each backend and reuse, its range behind it, or below it where the terminal is narrow."""
    reuses = [point["reuse"] for point in prompt["curves"][0]["points"]]
    beside, below = (Sheet("backend", *(f"{100 * reuse:.4g} %" for reuse in reuses)) for _ in range(2))
    for curve in prompt["curves"]:
        figures = [{end: float(text) for end, text in point[key].items()} for point in curve["points"]]
        cells = [_interval(figure) for figure in figures]
        beside.add(curve["backend"], *cells)
        # 0.622 (0.496 to 0.834) takes two lines of half the width
        halves = [cell.rstrip(")").replace(" to ", "-").partition(" (") for cell in cells]
        below.add(curve["backend"], *(f"{point}\n{span}" if span else point for point, _, span in halves))
    screen.sheet(beside if beside.least_width((), 0) <= screen.width else below)


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
    screen.say(
        f"what holds the KV, and how often a month a prompt of so many tokens must be reused to pay for it "
        f"({report['basis']['cost']})",
        style="bold",
    )
    sheet = Sheet("store", "holds", currency, "over", f"{currency}/h", *(f"at {count(length)}" for length in lengths))
    for store in report["stores"]:
        rows = [row for row in report["reuses_per_month"] if row["backend"] == store["name"]]
        held = f"{store['capacity_bytes'] / _TERA:,.4g} TB, {store['tokens_held'] / 1e6:,.0f} M tokens"
        reuses = [UNKNOWN if row["reuses"] is None else significant(row["reuses"]["point"]) for row in rows]
        sheet.add(
            store["name"], held, amount(store["price"]), _time(store["price_hours"]), amount(store["hourly"]), *reuses
        )
    screen.sheet(sheet, droppable=("holds", "over"))


def _time(hours: float) -> str:
    years = hours / HOURS_PER_YEAR
    return f"{years * 12:.3g} mo" if years < 1 else f"{years:.3g} y"


def _claims(screen: Screen, report: Mapping[str, Any]) -> None:
    screen.say(f"what is often claimed, by these inputs ({report['basis']['claims']})", style="bold")
    for claim, says in dict.fromkeys((each["claim"], each["says"]) for each in report["claims"]):
        rows = [each for each in report["claims"] if each["claim"] == claim]
        unit = f"{report['currency']}{rows[0]['unit']}" if rows[0]["unit"].startswith("/") else rows[0]["unit"]
        screen.say(f'"{says}"')
        sheet = Sheet("backend", "when", "prompt", "holds", unit, texts=2)
        for row in rows:
            prompt = count(row["prompt_tokens"])
            sheet.add(row["backend"], row["condition"], prompt, _verdict(row), _interval(row["figure"]))
        screen.sheet(sheet, droppable=("when",))


def _verdict(claim: Mapping[str, Any]) -> str:
    """Whether a claim holds; "probably" where an end of the range says otherwise."""
    if claim["holds"] is None:
        return "unknown"
    if claim["is_sure"]:
        return "yes" if claim["holds"] else "no"
    return "probably" if claim["holds"] else "probably not"
