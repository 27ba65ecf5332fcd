"""What the ledger, the price list and the doctor know, as lines and tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.numbers import UNKNOWN, count
from kvtally.agent.render.screen import Screen, Sheet, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

_STATE = {"ok": "green", "no_data": "yellow", "failed": "bold red", "partial": "yellow"}


def ledger_table(answer: Mapping[str, Any]) -> None:
    """Print what `ledger info` knows."""
    answer = printable(answer)
    screen = Screen()
    size = f"{answer['bytes'] / 2**20:,.2f} MiB"
    screen.say(Text(answer["path"], style="bold"), f"  {size}, revision {answer['revision']}")
    if answer["start"] is None:
        screen.say("It holds no interval yet.")
    else:
        screen.say(f"{answer['start']} to {answer['end']}, in {answer['currency'] or 'no currency yet'}")
    screen.print()
    rows = Sheet("rows of", "count")
    for name, number in answer["rows"].items():
        if number:
            rows.add(name, count(number))
    screen.sheet(rows)
    if not answer["targets"]:
        return
    targets = Sheet("target", "kind", "model", "version", "GPUs", texts=4)
    for target in answer["targets"]:
        held = _gpus(target) if target["kind"] == "engine" else ""
        targets.add(target["name"], target["kind"], target.get("model", ""), target.get("version", ""), held)
    screen.sheet(targets)


def _gpus(target: Mapping[str, str]) -> str:
    uuids = target.get("gpus")
    return UNKNOWN if uuids is None else str(len([uuid for uuid in uuids.split(",") if uuid]))


def rates_table(rates: Sequence[Mapping[str, Any]]) -> None:
    """Print prices, and below them where each is written."""
    screen = Screen()
    rates = printable(list(rates))
    currencies = {rate["currency"] for rate in rates}
    common = currencies.pop() if len(currencies) == 1 else ""
    sheet = Sheet("rate", common or "price", "term", "from", "until", "basis", "#", texts=1)
    sources: dict[str, int] = {}
    for rate in rates:
        source = "; ".join(part for part in (rate["source"], rate["note"]) if part)
        number = sources.setdefault(source, len(sources) + 1) if source else 0
        whole, places = rate["price"].split(".")
        currency = "" if common else f" {rate['currency']}"
        price = f"{whole}.{places.rstrip('0').ljust(2, '0')}{currency}/{rate['unit']}"
        sheet.add(
            " ".join(part for part in (rate["resource"], rate["sku"], rate["site"]) if part),
            price + (f" x PUE {rate['pue']}" if rate["pue"] else ""),
            rate["term"],
            rate["valid_from"],
            rate["valid_until"] or "",
            rate["basis"],
            f"[{number}]" if number else "",
        )
    screen.sheet(sheet, ("basis",))
    for source, number in sources.items():
        screen.say(f"[{number}] {source}", style="dim", indent=5)


def doctor_table(answer: Mapping[str, Any]) -> None:
    """Print what the doctor found: a line for each target, and below it what is missing and what to do."""
    answer = printable(answer)
    screen = Screen()
    for one in answer["targets"]:
        state, target = Text(f"{one['state']:<8}", style=_STATE[one["state"]]), Text(one["target"], style="bold")
        screen.say(state, target, f"  {one['summary']}", indent=8)
        for warning in one["warnings"]:
            screen.say(" " * 8, Text("unsafe  ", style="bold red"), warning, indent=10)
        for missing in one["missing"]:
            screen.say(" " * 8, Text("missing ", style="yellow"), f"{missing['what']}: {missing['costs']}", indent=10)
            _say_hint(screen, missing["hint"])
        if one["counted"] and one["not_counted"]:
            screen.say(f"        not counted: {', '.join(one['not_counted'])}", style="dim", indent=10)
        if one["savings"] is not None:
            _say_savings(screen, one["savings"], {missing["what"] for missing in one["missing"]})
        if one["hint"]:
            screen.say(f"        {one['hint']}", style="dim", indent=8)
    screen.say(answer["verdict"])


def _say_savings(screen: Screen, savings: Mapping[str, Any], told: Collection[str]) -> None:
    """Which rung an engine's data reach, or why its savings cannot be told; `told` is said above, hint and all."""
    if not savings["due"]:
        for one in savings["refused"]:
            screen.say(" " * 8, Text("savings ", style="dim"), f"none of its own: {one['costs']}", indent=10)
            _say_hint(screen, one["hint"])
        return
    if savings["rung"] is None:
        again = [one["what"] for one in savings["refused"] if one["what"] in told]
        without = f" without {', '.join(again)}" if again else ""
        screen.say(" " * 8, Text("savings ", style="yellow"), f"cannot be told{without}", indent=10)
        for one in savings["refused"]:
            if one["what"] not in told:
                screen.say(f"          {one['what']}: {one['costs']}", indent=12)
                _say_hint(screen, one["hint"])
        return
    screen.say(" " * 8, Text("savings ", style="green"), f"rung {savings['rung']}", indent=10)
    for one in savings["above"]:
        screen.say(f"          {one['rung']} adds {one['adds']}: {one['hint']}", style="dim", indent=12)


def _say_hint(screen: Screen, hint: str) -> None:
    if hint:
        screen.say(f"            {hint}", style="dim", indent=12)
