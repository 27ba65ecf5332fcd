"""An explanation of a saving as a page of lines that a calculator can follow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.numbers import UNKNOWN
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_INTEGER = re.compile(r"(?<![\d.])\d{4,}")
_SIGNS = {" * ": " \N{MULTIPLICATION SIGN} ", " - ": " \N{MINUS SIGN} ", "sqrt(": "\N{SQUARE ROOT}("}
_GREEK = {
    "eta": "\N{GREEK SMALL LETTER ETA}",
    "kappa": "\N{GREEK SMALL LETTER KAPPA}",
    "beta": "\N{GREEK SMALL LETTER BETA}",
    "rho": "\N{GREEK SMALL LETTER RHO}",
    "Pi": "\N{GREEK CAPITAL LETTER PI}",
}
_GREEK_NAME = re.compile(rf"(?<![A-Za-z])({'|'.join(_GREEK)})(?![A-Za-z])")
_SYMBOL, _VALUE, _UNIT = 14, 15, 7  # columns of a line
_STEPS_MAX = 4  # columns of a request's steps
_SHORT = {
    "compute_efficiency": "linear, of peak",
    "attention_efficiency": "attention, of peak",
    "weight_bandwidth_efficiency": "weights, of peak",
    "kv_bandwidth_efficiency": "KV, of peak",
    "step_seconds": "each step, ms",
    "gap_seconds": "between steps, ms",
    "launch_seconds": "least step, ms",
    "sharpness": "of the handover",
    "request_seconds": "a request, ms",
}


def explain_table(explanations: Sequence[Mapping[str, Any]]) -> None:
    """Print explanations, one group after the other."""
    screen = Screen()
    for one in printable(list(explanations)):
        _head(screen, one)
        sections: list[tuple[str, Callable[[Screen, Any], None], Any]] = [
            ("the figure", _figure, one["figure"]),
            ("the counters behind it", _inputs, one["inputs"]),
            ("the requests, by the tokens that they reused", _classes, one["classes"]),
            ("one request of them, worked out", _request, one["request"]),
            ("the step law", _laws, one["laws"]),
            ("how sure it is", _errors, one["errors"]),
            ("whose work it is", _tiers, one["tiers"]),
            ("the money", _money, one["money"]),
        ]
        for number, (title, draw, part) in enumerate((each for each in sections if each[2]), 1):
            screen.say(f"{number}  {title}", style="bold")
            draw(screen, part)
            screen.print()


def grouped(text: str) -> str:
    """Numbers in a text with their thousands separated."""
    return _INTEGER.sub(lambda found: f"{int(found[0]):,}", text)


def typeset(text: str) -> str:
    """Symbols and formulas as they are written by hand."""
    for sign, written in _SIGNS.items():
        text = text.replace(sign, written)
    return _GREEK_NAME.sub(lambda found: _GREEK[found[0]], text)


def _head(screen: Screen, one: Mapping[str, Any]) -> None:
    name = " ".join(value or f"(no {dimension})" for dimension, value in one["by"].items()) or "all"
    screen.say(Text(name, style="bold"), f": {_headline(one)}")
    for replica in one["inputs"]["replicas"]:
        screen.say(
            f"{replica['name']}, scraped from {replica['first_scrape']} to {replica['last_scrape']}", style="dim"
        )
    for reason in one["reasons"]:
        screen.say(Text("why: ", style="yellow"), reason, indent=2)
    if one["gone"]:
        gone = one["gone"]
        screen.say(Text("note: ", style="yellow"), f"{gone['first']} to {gone['until']}: {gone['words']}", indent=2)
    screen.print()


def _headline(one: Mapping[str, Any]) -> str:
    """The figure in one line, as the section below works it out."""
    if not one["figure"]:
        return f"no figure, {one['status']}; what was counted is below"
    rows = [*one["figure"]["rows"], *(one["figure"]["interval"] or ())]
    values = {row["symbol"]: f"{float(row['value']):,.2f}" for row in rows}
    if "net" not in values:
        interval = f" ({values['W_low']} to {values['W_high']})" if "W_low" in values else ""
        return f"{values['W']} engine-seconds avoided{interval}, net not known, {one['status']}"
    if "W_low" not in values:
        return f"{values['W']} engine-seconds avoided, since nothing was reused; net {values['net']}, {one['status']}"
    return (
        f"{values['W']} engine-seconds avoided ({values['W_low']} to {values['W_high']}), net {values['net']} "
        f"({values['net_low']} to {values['net_high']}), {one['status']}"
    )


def _lines(screen: Screen, rows: Sequence[Mapping[str, str]]) -> None:
    """Lines with their values below each other; what is worked out has its formula and its numbers under it."""
    said = ("", "")
    for row in rows:
        about = (row["basis"], row["source"])
        if row["source"] and about != said:
            screen.say(f"  {row['basis']}, from {row['source']}", style="dim", indent=4)
        said = about
        basis = "" if row["source"] or not row["basis"] else f"  {row['basis']}"
        head = f"  {typeset(row['symbol']):<{_SYMBOL}} {grouped(row['value']):>{_VALUE}} {row['unit']:<{_UNIT}} "
        _hanging(screen, head, Text.assemble(typeset(row["words"]), (basis, "dim")))
        if row["formula"]:
            _formula(screen, row)


def _formula(screen: Screen, row: Mapping[str, str]) -> None:
    """In symbols and in numbers, on one line where there is room."""
    indent = _SYMBOL + 3
    both = [f"= {grouped(typeset(row[name]))}" for name in ("formula", "numbers")]
    together = "  ".join(both)
    for text in [together] if len(together) <= screen.width - indent else both:
        _hanging(screen, " " * indent, Text(text, style="dim"))


def _hanging(screen: Screen, head: str, text: Text) -> None:
    """A text behind a head, its further lines below the first one's beginning."""
    for number, line in enumerate(text.wrap(screen, max(screen.width - len(head), 1)) or [Text()]):
        line.rstrip()
        screen.print(Text.assemble(head if not number else " " * len(head), line), soft_wrap=True)


def _figure(screen: Screen, figure: Mapping[str, Any]) -> None:
    screen.say(
        typeset("W = \N{GREEK CAPITAL LETTER SIGMA} over requests of PF(n, 0) - PF(n, r): ")
        + "engine-seconds that prefills of n tokens would have added with "
        "nothing reused, less those that they added behind r reused tokens. Every line is worked out from the lines "
        "above it as they are printed.",
        indent=2,
    )
    _lines(screen, figure["rows"])
    if figure["interval"]:
        screen.say("  its 90 % interval", style="dim")
        _lines(screen, figure["interval"])


def _inputs(screen: Screen, inputs: Mapping[str, Any]) -> None:
    screen.say("  MEASURED: how much each grew, and what it showed at the first and the last scrape", style="dim")
    for one in inputs["counters"]:
        name = f"{one['name']}, s" if one["unit"] == "s" else one["name"]
        ends = "" if one["first"] is None else f"  {_counted(one['first'])} to {_counted(one['last'])}"
        screen.say(f"  {name:<40} {_counted(one['difference']):>15}{ends}")
        screen.say(f"    {one['counter']}", style="dim", indent=6)


def _counted(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value == round(value) else f"{value:,.3f}"


def _classes(screen: Screen, classes: Mapping[str, Any]) -> None:
    heads = ("reused tokens", "requests", "prompt", "reused", "no reuse, s", "as it was, s", "avoided, s", "share")
    sheet = Sheet(*heads, texts=1)
    names = ("requests", "mean_prompt_tokens", "mean_reused_tokens", "nothing", "actual", "avoided")
    for row in classes["rows"]:
        share = UNKNOWN if row["share"] is None else f"{float(row['share']):.1%}"
        sheet.add(_class(row), *(UNKNOWN if row[name] is None else grouped(row[name]) for name in names), share)
    total = classes["total"]
    sheet.add("all: W_m", total["requests"], "", "", *(grouped(total[name]) for name in names[3:]), "")
    screen.sheet(sheet, ("share", "prompt", "reused"))
    screen.say(f"Prompt and reused are means. {classes['couplings']}")


def _class(row: Mapping[str, Any]) -> str:
    if row["name"]:
        return str(row["name"])
    if row["reused_below"] is None:
        return "none"
    return f"{row['reused_from']:,}-{row['reused_below'] - 1:,}"


def _request(screen: Screen, request: Mapping[str, Any]) -> None:
    window = request["window"]
    screen.say(
        f"From the middle of the class that avoided most: {request['prompt_tokens']:,} prompt tokens, "
        f"{request['reused_tokens']:,} of them reused, between {window['start']} and {window['end']}."
    )
    _lines(screen, request["inputs"])
    screen.say("  the step that decodes would have taken without it", style="dim")
    _lines(screen, request["decode"])
    screen.print()
    _steps(screen, request)
    _lines(screen, request["total"])


def _steps(screen: Screen, request: Mapping[str, Any]) -> None:
    """The steps side by side: a formula in each row, a step in each column."""
    columns: list[tuple[str, Mapping[str, Any]]] = []
    for name, side in (("no reuse", "without_reuse"), ("as it was", "as_it_was")):
        steps = request[side]["steps"]
        numbered = [(f"{name} {number}/{len(steps)}", step) for number, step in enumerate(steps, 1)]
        columns += numbered
    left_out = len(columns) - _STEPS_MAX
    if left_out > 0:
        without = len(request["without_reuse"]["steps"])
        chosen = sorted({0, without - 1, without, len(columns) - 1})
        left_out = len(columns) - len(chosen)
        columns = [columns[at] for at in chosen]
    sheet = Sheet("step", "formula", *(name for name, _ in columns), texts=2)
    for at, row in enumerate(columns[0][1]["rows"]):
        formulas = dict.fromkeys(step["rows"][at]["formula"] for _, step in columns)
        formula = " or ".join(formulas) or row["words"]
        sheet.add(row["symbol"], typeset(formula), *(grouped(step["rows"][at]["value"]) for _, step in columns))
    screen.sheet(sheet)
    if left_out > 0:
        screen.say(f"  {left_out} steps more are in --format json", style="dim")
    words = ", ".join(
        f"{row['symbol']} {row['words']}" for row in columns[0][1]["rows"] if row["symbol"] != row["words"]
    )
    screen.say(f"  {words}; tokens and seconds", style="dim", indent=2)


def _laws(screen: Screen, laws: Sequence[Mapping[str, Any]]) -> None:
    for law in laws:
        evidence = law["evidence"]
        number = "not stored" if law["id"] is None else law["id"]
        prior = "the packaged prior" if law["prior"] == "packaged" else f"calibration {law['prior']} as its prior"
        screen.say(f"calibration {number}, rung {law['rung']}, from {prior}: {law['fingerprint']}")
        screen.say(
            f"learned from {evidence['start']} to {evidence['end']}: {evidence['windows']} windows by "
            f"{evidence['source']} seconds, {evidence['alone']} with requests alone, {evidence['probes']} probes; "
            f"{evidence['requests']:,} requests, {evidence['steps']:,} steps, "
            f"seen over {evidence['occupied_seconds']:,.1f} s in which it worked"
        )
        fitted = []
        if law["worked_ratio"] is not None:
            fitted.append(f"it gives {law['worked_ratio']:.3f} of the seconds measured in its windows")
        if law["single_error"] is not None:
            fitted.append(f"requests alone differ from it by {law['single_error']:.1%} (root mean square)")
        if fitted:
            screen.say("; ".join(fitted))
        heads = ("parameter", "median", "90 % interval", "before", "90 % interval", "narrowed", "1 sd moves W")
        sheet = Sheet(*heads, texts=1)
        for one in law["parameters"]:
            scale = 1000.0 if one["unit"] == "s" else 1.0
            now, was = _belief(one, scale), ("", "") if one["prior"] is None else _belief(one["prior"], scale)
            narrowed = "" if one["narrowed"] is None else f"{one['narrowed']} x"
            name = f"{typeset(one['symbol'])}  {_SHORT.get(one['name'], one['meaning'])}"
            sheet.add(name, *now, *was, narrowed, f"{float(one['moves']):.3f} s")
        screen.print()
        screen.sheet(sheet, ("narrowed", "before"))
        for one in law["parameters"]:
            if one["name"] == "kv_bandwidth_efficiency" and float(one["median"]) > 1:
                screen.say(f"  {typeset(one['symbol'])}: {one['meaning']}", style="dim", indent=2)


def _belief(belief: Mapping[str, Any], scale: float) -> tuple[str, str]:
    """A median and the interval around it, three digits each."""
    low, median, high = (f"{float(belief[name]) * scale:.3g}" for name in ("low", "median", "high"))
    return median, f"{low}-{high}"


def _errors(screen: Screen, errors: Mapping[str, Any]) -> None:
    _lines(screen, errors["rows"])
    if errors["tiers"]:
        _tier_errors(screen, errors["tiers"])
    largest = errors["largest"]
    share = float(errors["shares"][largest["cause"]])
    screen.say(
        f"The largest is {largest['cause']}, {largest['words']}: {share:.0%} of the variance. "
        f"What makes it less: {largest['less_by']}."
    )


def _tier_errors(screen: Screen, rows: Sequence[Mapping[str, str]]) -> None:
    """Causes down, W_hbm and W_out across: the formulas are those of W."""
    values = {row["symbol"]: grouped(row["value"]) for row in rows}
    sides = [side for side in ("hbm", "out") if f"W_{side}" in values]
    causes = [name.removesuffix(f"_{sides[0]}") for name in values if name.endswith(f"_{sides[0]}")]
    screen.print()
    sheet = Sheet("the same of the tiers, s", *(f"W_{side}" for side in sides))
    for cause in causes:
        name = "they avoided" if cause == "W" else cause
        sheet.add(name, *(values[f"{cause}_{side}"] for side in sides))
    screen.sheet(sheet)


def _tiers(screen: Screen, tiers: Mapping[str, Any]) -> None:
    _lines(screen, tiers["rows"])
    if tiers["interval"]:
        screen.say("  their 90 % intervals", style="dim")
        _lines(screen, tiers["interval"])
    for note in tiers["notes"]:
        screen.say(f"  {note}", style="dim", indent=2)
    found = tiers["attributions"]
    if not found:
        return
    screen.print()
    sheet = Sheet("net engine-seconds", "serving tier", "last in", "Shapley")
    for tier in found["serving"]:
        sheet.add(tier, *(found[how][tier] for how in ("serving", "last_in", "shapley")))
    totals = [sum(float(part) for part in found[how].values()) for how in ("serving", "last_in", "shapley")]
    sheet.add("sum", *(f"{total:.4f}" for total in totals))
    screen.sheet(sheet)
    if tiers["substitutes"]:
        screen.say(
            "Serving and Shapley differ by more than 25 %: the tiers are substitutes. Most of what one serves the "
            "other would have served, so what would be lost without it is what it adds last in."
        )


def _money(screen: Screen, money: Mapping[str, Any]) -> None:
    _lines(screen, money["rows"])
    screen.say(money["meaning"])
