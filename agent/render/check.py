"""What was checked, as a table, and as the lines that cron mails."""

from __future__ import annotations

from decimal import Decimal
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.finding import plural
from kvtally.agent.render.answer import name_of
from kvtally.agent.render.numbers import UNKNOWN, amount, between, count, seconds
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_WORDS = {"ok": "ok", "failed": "FAILED", "unknown": "unknown"}
_STYLE = {"failed": "bold red", "unknown": "yellow", "warning": "yellow"}
_PER = {"per million": "/M", "per hour": "/h"}
_SIDES = {"at_most": "at most", "at_least": "at least"}


def check_table(answer: Mapping[str, Any]) -> None:
    """Print every check as a line, and below them what failed, what is not known and what a person should know."""
    answer = printable(answer)
    screen = Screen()
    window = answer["window"]
    if window["start"] is not None:
        screen.say(f"{window['start']} to {window['end']}, {window['covered_seconds']:,.1f} s covered", style="dim")
    screen.print()
    sheet = Sheet("check", "of", "state", "found", "90 % interval", "bound", "basis", texts=2)
    for one in answer["checks"]:
        sheet.add(one["name"], _about(one), _word(one), _found(one), _interval(one), _bound(one), one["basis"] or "")
    screen.sheet(sheet, ("basis", "90 % interval"))
    told = [one for one in answer["checks"] if _word(one) != "ok"]
    for one, after in zip_longest(told, told[1:]):
        word = _word(one)
        screen.say(Text(f"{word} ", style=_STYLE[word.lower()]), f"{_named(one)}: {one['message']}", indent=2)
        if one["hint"] and (after is None or after["hint"] != one["hint"]):  # several that are mended alike
            screen.say(f"  {one['hint']}", style="dim", indent=2)
    screen.say(_verdict(answer))


def check_lines(answer: Mapping[str, Any], *, strict: bool = False) -> Iterator[str]:
    """A line for each failed check, and with `strict` for each that is not known."""
    for one in printable(answer)["checks"]:
        if one["state"] == "failed" or (strict and one["state"] == "unknown"):
            hint = f" ({one['hint']})" if one["hint"] else ""
            yield f"{one['state']} {_named(one)}: {one['message']}{hint}"


def _word(one: Mapping[str, Any]) -> str:
    return "warning" if one["warning"] else _WORDS[one["state"]]


def _about(one: Mapping[str, Any]) -> str:
    """What was checked: the group, and what of it."""
    name = name_of(one["by"]) if one["by"] or not one["subject"] else ""
    return " ".join(part for part in (name, one["subject"]) if part)


def _named(one: Mapping[str, Any]) -> str:
    return f"{one['name']} {_about(one)}"


def _verdict(answer: Mapping[str, Any]) -> Text:
    """How many of each, in words."""
    parts = [f"{answer[word]} {word}" for word in ("failed", "unknown") if answer[word]]
    parts += [plural(answer["warnings"], "warning")] if answer["warnings"] else []
    text = Text(f"{plural(len(answer['checks']), 'check')}: ")
    return text.append(", ".join(parts) or "all ok", _STYLE.get(answer["state"], "bold green"))


def _found(one: Mapping[str, Any]) -> str:
    found = one["found"]
    if found is None:
        return UNKNOWN
    short = found["unit"].partition(" ")[0] + next((to for of, to in _PER.items() if of in found["unit"]), "")
    is_money = isinstance(found["point"], str)
    return _value(found["point"], found["unit"]) + (f" {short}" if is_money else "")


def _interval(one: Mapping[str, Any]) -> str:
    found = one["found"]
    if found is None or found["low"] is None or found["low"] == found["high"]:
        return ""
    if isinstance(found["low"], str):
        return between(found["low"], found["high"])
    return f"{seconds(found['low'])} to {seconds(found['high'])}"


def _bound(one: Mapping[str, Any]) -> str:
    unit = "" if one["found"] is None else one["found"]["unit"]
    shown = ((_SIDES[side], value) for side, value in (one["bound"] or {}).items())
    return "".join(
        f"{side} {_as_given(value) if isinstance(value, str) else _value(value, unit)}" for side, value in shown
    )


def _as_given(amount_text: str) -> str:
    """A bound in money as a person wrote it, two places at least."""
    whole, _, places = amount_text.partition(".")
    return f"{int(whole):,}.{places.rstrip('0').ljust(2, '0')}"


def _value(value: str | float, unit: str) -> str:
    """A figure or a bound in its unit, as short as a table has it."""
    if unit == "share":
        return f"{value:.1%}"
    if unit in {"errors", "findings"}:
        return count(int(value))
    if unit in {"seconds", "engine-seconds"}:
        return f"{seconds(float(value))} s"
    return amount(value) if isinstance(value, str) else str(Decimal(value))
