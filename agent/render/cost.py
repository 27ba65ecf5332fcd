"""The cost report as tables."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.answer import label, name_of, say_findings, tiers_line
from kvtally.agent.render.numbers import UNKNOWN, amount, between, count, seconds, share
from kvtally.agent.render.screen import Screen, Sheet, printable
from kvtally.agent.words import OVERHEADS, PARTS, TIERS, TOLD_APART

if TYPE_CHECKING:
    from collections.abc import Mapping


def cost_table(answer: Mapping[str, Any]) -> None:
    """Print a cost report: one group in full, several as a line each."""
    answer = printable(answer)
    screen = Screen()
    groups, currency = answer["groups"], answer["currency"]
    if not groups:
        screen.say("The ledger holds no interval in this window. `kvtally doctor` says what is found here.")
        return
    window = answer["window"]
    covered = f"{window['covered_seconds']:,.1f} s covered{_scraped(groups)}"
    screen.say(f"{window['start']} to {window['end']}, {covered}", style="dim")
    if len(groups) == 1:
        _detail(screen, groups[0], currency)
    else:
        _overview(screen, groups, currency)
    for rate in sorted({rate for group in groups for rate in group["rates"]}):
        screen.say(f"rate: {rate}", style="dim", indent=2)
    say_findings(screen, answer["findings"])


def _scraped(groups: list[dict[str, Any]]) -> str:
    """How much of the time between the first and the last scrape was scraped, where some was not: the least of all."""
    least = min((group["coverage"] for group in groups if group["coverage"] is not None), default=1.0)
    shown = share(least, 1.0)
    if shown == share(1.0, 1.0):
        return ""
    return f", {'at least ' if len(groups) > 1 else ''}{shown} of the scrapes"


def _priced(currency: str, basis: str | None) -> str:
    """The head of a column of money: in what, and on what basis the price stands."""
    return f"{currency}, {basis}" if basis else currency or "cost"


def _overview(screen: Screen, groups: list[dict[str, Any]], currency: str) -> None:
    bases = {group["basis"]["cost"] for group in groups}
    common = bases.pop() if len(bases) == 1 else None
    dimensions = tuple(groups[0]["by"])
    figures = ["prompt", "reused", "generated", _priced(currency, common), "for nobody"]
    figures += [f"{currency}/M", "input", "output", *([] if common else ["price"])]
    sheet = Sheet(*dimensions, *figures, texts=len(dimensions))
    for group in groups:
        tokens, cost = group["tokens"], group["cost"]
        loaded = (group["cost_per_million"] or {}).get("fully_loaded", {})
        reused = None if tokens["computed"] is None or not tokens["prompt"] else tokens["prompt"] - tokens["computed"]
        sheet.add(
            *(label(dimension, value) for dimension, value in group["by"].items()),
            count(tokens["prompt"]),
            share(reused, tokens["prompt"]),
            count(tokens["generated"]),
            amount(cost["total"] if cost else None),
            _unserved(cost),
            amount(loaded.get("total")),
            amount(loaded.get("input")),
            amount(loaded.get("output")),
            *([] if common else [group["basis"]["cost"] or "none"]),
        )
    screen.print()
    screen.sheet(sheet, ("for nobody", "generated", "reused", "prompt"))
    note = (
        f"{currency}/M: per million tokens, fully loaded; input and output are MODELLED, their 90 % intervals are in "
    )
    note += "--format json"
    if any(value is None for group in groups for value in group["by"].values()):
        note += "; (no ...): without this label, or a GPU that no engine holds"
    screen.say(note, style="dim", indent=2)


def _unserved(cost: Mapping[str, Any] | None) -> str:
    """The share of the cost that served nobody: idle, asleep, warming up or held by no engine."""
    if not cost:
        return UNKNOWN
    total = Decimal(cost["total"])
    return share(float(sum(Decimal(cost["of_which"][state]) for state in OVERHEADS)), float(total))


def _detail(screen: Screen, group: Mapping[str, Any], currency: str) -> None:
    screen.print(_headline(group, currency))
    screen.print()
    screen.sheet(_tokens(group), ("of prompt",))
    if group["basis"]["tiers"] is not None:
        screen.say(tiers_line(group["basis"]["tiers"]), style="dim", indent=2)
    screen.sheet(_time(group, currency), ("90 % interval", "share"))
    if group["cost_per_million"] is not None:
        screen.sheet(_unit_costs(group, currency), ("90 % interval", "active"))
    if group["split_law"] is not None:
        screen.say(_law(group), style="dim", indent=2)


def _law(group: Mapping[str, Any]) -> str:
    """What divides prefill from decode."""
    if group["split_law"] == "two costs":
        return "prefill and decode: by the law of two costs, a step's and a token's"
    if group["split_law"] == "pool":
        return "prefill and decode: each by the engines that do nothing else"
    laws = ", ".join(group["calibrations"])
    return f"prefill and decode: by the step law (calibration {laws}), scaled by {group['split_scale']:.2f}"


def _headline(group: Mapping[str, Any], currency: str) -> Text:
    """The one figure that most people come for."""
    text = Text(name_of(group["by"]), style="bold")
    units, cost = group["cost_per_million"], group["cost"]
    if cost is None:
        return text.append(": no price, so tokens and seconds only", "default")
    per_million = units["fully_loaded"]["total"]
    if per_million is None:
        return text.append(f": {amount(cost['total'])} {currency}, price {group['basis']['cost']}, and no token")
    text.append(f": {amount(per_million)} {currency} per million tokens")
    return text.append(f", price {group['basis']['cost']}; {_unserved(cost)} served nobody", "default")


def _tokens(group: Mapping[str, Any]) -> Sheet:
    tokens, basis = group["tokens"], group["basis"]["tokens"]  # of what is computed and reused: the rest is counted
    tiers_basis = group["basis"]["tiers"]
    sheet = Sheet("tokens", "count", "of prompt", "basis")
    sheet.add("prompt", count(tokens["prompt"]), "", "MEASURED")
    sheet.add("  computed", count(tokens["computed"]), share(tokens["computed"], tokens["prompt"]), basis)
    for tier in TIERS:
        value = tokens["cached"][tier]
        if value:
            how = tiers_basis or basis if tier in TOLD_APART else basis
            sheet.add(f"  reused from {tier}", count(value), share(value, tokens["prompt"]), how)
    sheet.add("generated", count(tokens["generated"]), "", "MEASURED")
    return sheet


def _time(group: Mapping[str, Any], currency: str) -> Sheet:
    times, cost, basis = group["engine_seconds"], group["cost"], group["basis"]
    total = sum(times[state] for state in ("occupied", *OVERHEADS))
    overhead = cost["of_which"] if cost else {}
    occupied = None if not cost else str(Decimal(cost["total"]) - sum(Decimal(each) for each in overhead.values()))
    sheet = Sheet("engine time", "seconds", "90 % interval", "share", "basis", _priced(currency, basis["cost"]))

    def add(name: str, value: float | None, interval: str, how: str, money: str) -> None:
        sheet.add(name, seconds(value), interval, share(value, total), how, money)

    add("occupied", times["occupied"], "", basis["states"], amount(occupied) if cost else "")
    for part in PARTS if group["prefill_share"] else ():
        bounds = group["engine_seconds_intervals"][part]
        if bounds is None:
            sheet.add(f"  {part}", UNKNOWN, "", "", "unknown", "")
        elif bounds["high"] or part in {"prefill", "decode"}:
            interval = f"{seconds(bounds['low'])} to {seconds(bounds['high'])}"
            add(f"  {part}", times[part], interval, "MODELLED", "")
    if times["occupied"] and not group["prefill_share"]:
        sheet.add("  prefill, decode", UNKNOWN, "", "", "unknown", "")
    for state in OVERHEADS:
        if times[state] or state == "idle":
            money = amount(overhead[state]) if cost else ""
            add(state.replace("_", "-"), times[state], "", basis["states"], money)
    sheet.add("total", seconds(total), "", "", "MEASURED", amount(cost["total"]) if cost else "")
    return sheet


def _unit_costs(group: Mapping[str, Any], currency: str) -> Sheet:
    units, basis = group["cost_per_million"], group["basis"]
    loaded, active = units["fully_loaded"], units["active"]
    sheet = Sheet(f"{currency}/M, price {basis['cost']}", "fully loaded", "90 % interval", "active", "basis")
    sheet.add("all tokens", amount(loaded["total"]), "", amount(active["total"]), basis["states"])

    def add(key: str, name: str) -> None:
        interval = loaded["intervals"][key]
        span = between(interval["low"], interval["high"]) if interval else ""
        how = basis["split"] if loaded[key] is not None else "unknown"
        sheet.add(name, amount(loaded[key]), span, amount(active[key]), how or "unknown")

    add("input", "input, reused or not")
    add("input_computed", "  computed")
    for tier, price in loaded["input_cached"].items():
        interval = loaded["intervals"]["input_cached"].get(tier)
        span = between(interval["low"], interval["high"]) if interval else ""
        # HBM: what it takes is room, which is in the batch
        known = "unknown" if price is None else "defined" if tier == "hbm" else "MODELLED"
        sheet.add(f"  reused: {tier}", amount(price), span, amount(active["input_cached"][tier]), known)
    add("output", "output")
    if Decimal(group["orphan_holding"]):
        sheet.add(f"orphan holding, {currency}", amount(group["orphan_holding"]), "", "", basis["cost"])
    return sheet
