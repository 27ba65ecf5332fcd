"""The savings report as tables."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any

from rich.text import Text

from kvtally.agent.render.answer import label, name_of, say_findings, tiers_line
from kvtally.agent.render.numbers import UNKNOWN, amount, between, count, seconds
from kvtally.agent.render.screen import Screen, Sheet, printable
from kvtally.agent.words import TIERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

WORDING = (
    "Avoided compute is the price of GPU time the reused tokens would have taken. It becomes cash only if capacity was "
    "short or was released."
)
SOURCES = {
    "graphics": "GPM graphics utilisation",
    "utilization": "utilization.gpu",
    "cpu": "CPU seconds of its processes",
}
RUNGS = {
    "M0": "the prior alone",
    "M1": "the engine's counters",
    "M2": "counters and a log of its requests",
    "M3": "counters with MFU metrics",
    "M4": "counters and cold prompts on an idle engine",
    "M5": "counters and a log with times to first token",
}
_WORDS = {
    "ok": "ok",
    "lower_bound": "lower bound",
    "not_proven": "not proven",
    "insufficient_data": "no figure",
    "unreconciled": "no figure",
}
_STYLE = {"ok": "bold green", "lower_bound": "bold green", "not_proven": "bold yellow"}
_NAMES = 3  # of groups, told beside a reason that they share
_REFUSED = {
    "insufficient_data": "what was seen cannot carry one",
    "unreconciled": "the engine's own counters contradict each other",
}


def savings_table(answer: Mapping[str, Any], *, is_below_cost: bool = False) -> None:
    """Print a savings report: one group in full, several as a line each.

    Below the cost of the same window, that window and its prices are not told again.
    """
    answer = printable(answer)
    screen = Screen()
    groups, currency = answer["groups"], answer["currency"]
    if not groups:
        screen.say("The ledger holds no interval of an engine in this window.")
        screen.say("`kvtally ledger info` says how far it reaches, `kvtally doctor` what is found here.")
        return
    window = answer["window"]
    if not is_below_cost:
        screen.say(f"{window['start']} to {window['end']}, {window['covered_seconds']:,.1f} s covered", style="dim")
    if len(groups) == 1:
        _detail(screen, groups[0], currency)
    else:
        _overview(screen, groups, currency)
    if any(group["gross"] for group in groups):
        screen.say(WORDING)
        screen.print()
    _laws(screen, answer)
    if is_below_cost:
        return
    for rate in sorted({rate for group in groups for rate in group["rates"]}):
        screen.say(f"rate: {rate}", style="dim", indent=2)
    told = " ".join(reason for group in groups for reason in group["reasons"])
    say_findings(screen, (one for one in answer["findings"] if one["message"] not in told))


def _laws(screen: Screen, answer: Mapping[str, Any]) -> None:
    """What the seconds stand on: the laws with their evidence, and the log of requests where there is one."""
    for law in answer["method"]["calibrations"]:
        screen.say(law_line(law), style="dim", indent=2)
    log = answer["method"].get("requests")
    if log:
        text = f"requests: {log['requests']:,} of {log['file']}, where the engine counted {log['counted']:,}"
        screen.say(text, style="dim", indent=2)


def law_line(law: Mapping[str, Any]) -> str:
    """A calibration as a report names it."""
    evidence = law["evidence"]
    name = "law (learned for this answer; `kvtally calibrate` keeps one)"
    if law["id"] is not None:
        name = f"law: calibration {law['id']}"
    return f"{name} of {law['fingerprint']}. {rung_text(law['rung'])}; {evidence_text(evidence)}"


def rung_text(rung: str) -> str:
    """A rung of METHOD 4.1, in words."""
    return f"Rung {rung}, {RUNGS.get(rung, 'unknown')}"


def evidence_text(evidence: Mapping[str, Any]) -> str:
    """What a law was learned from."""
    parts = [
        f"{evidence['start']} to {evidence['end']}",
        f"{evidence['windows']:,} windows",
        f"{evidence['requests']:,} requests",
        f"{evidence['alone']:,} spans of single requests",
        *([f"{evidence['probes']:,} probes"] if evidence["probes"] else []),
        f"{evidence['steps']:,} steps",
        f"seen over {evidence['occupied_seconds']:,.0f} s in which it worked",
        f"timed by {SOURCES.get(evidence['source'], 'no source')}",
    ]
    return ", ".join(parts)


def _span(estimate: Mapping[str, float] | None) -> str:
    return "" if estimate is None else f"{_seconds(estimate['low'])} to {_seconds(estimate['high'])}"


def _point(estimate: Mapping[str, float] | None) -> str:
    return UNKNOWN if estimate is None else _seconds(estimate["point"])


def _seconds(value: float) -> str:
    return seconds(round(value, 1) + 0.0)  # never -0.0


def _money(estimate: Mapping[str, str] | None) -> str:
    return UNKNOWN if estimate is None else amount(estimate["point"])


def _headline(group: Mapping[str, Any], currency: str) -> Text:
    """The one thing that most people come for, in words."""
    text = Text().append(f"{name_of(group['by'])}: ", "bold")
    status, net = group["status"], group["net_engine_seconds"]
    if status in _REFUSED:
        return text.append("NO FIGURE", "bold red").append(f", {_REFUSED[status]}")
    style = _STYLE[status]
    if net is None:
        text.append("NOT PROVEN", style)
        gross = group["avoided_engine_seconds"]
        text.append(f": reuse avoided {_point(gross)} engine-seconds ({_span(gross)}), what it took is not known")
    elif status == "not_proven":
        text.append("NOT PROVEN", style)
        text.append(f": the data fit anything from {_span(net)} engine-seconds net")
    elif not net["point"] and net["low"] == net["high"]:
        text.append("nothing was reused")
    elif net["high"] < 0:
        text.append(f"reuse cost {_seconds(-net['point'])} engine-seconds more than it saved", "bold red")
    elif group["net"] is not None and Decimal(group["net"]["high"]) < 0:
        text.append(f"reuse saved {_point(net)} engine-seconds ({_span(net)}), and cost more than that", "bold red")
    else:
        text.append(f"reuse saved {_point(net)} engine-seconds net", style)
        text.append(f" ({_span(net)})")
    if group["net"] is not None and status == "not_proven":
        text.append(f", {between(group['net']['low'], group['net']['high'])} {currency}")
    elif group["net"] is not None:
        realised = group["realised"]
        cash = "unknown" if realised is None else f"{_money(realised)} {currency}"
        is_loss = Decimal(group["net"]["point"]) < 0
        text.append(f"; {_money(group['net'])} {currency} net, {'realised' if is_loss else 'of it realised'} {cash}")
    return text


def _detail(screen: Screen, group: Mapping[str, Any], currency: str) -> None:
    screen.say(_headline(group, currency), indent=2)
    for reason in group["reasons"]:
        screen.say(Text("why: ", style="yellow"), reason, indent=2)
    screen.print()
    screen.sheet(_by_tier(group, currency), ("avoided s",))
    for name, tier in group["tiers"].items():
        for reason in tier["reasons"]:
            if reason not in group["reasons"]:
                screen.say(Text(f"{name}: ", style="yellow"), reason, indent=2)
    if group["reused_tokens"]["external"] and group["reused_tokens"]["dram"] is None:
        why = f": {group['tiers_untold']}" if group.get("tiers_untold") else ""
        screen.say(f"external: which of dram, disk and p2p served them is not told{why}", style="dim", indent=2)
    if group["basis"]["tiers"] is not None:
        screen.say(tiers_line(group["basis"]["tiers"]), style="dim", indent=2)
    screen.say(f"tokens {group['basis']['tokens']}{_bases([group])}", style="dim", indent=2)
    screen.print()
    if group["avoided_engine_seconds"] is not None:
        screen.sheet(_time(group))
    if group["gross"] is not None:
        screen.sheet(_cash(group, currency))
        screen.say(_price(group, currency), indent=2)


def _by_tier(group: Mapping[str, Any], currency: str) -> Sheet:
    """A line for each tier that served or could have served something."""
    tokens, tiers = group["reused_tokens"], group["tiers"]
    net = f"net {currency}" if group["gross"] is not None else ""
    sheet = Sheet("tier", "reused tokens", "status", "avoided s", "net s", "90 % interval", net)
    for name in TIERS:
        tier = tiers.get(name)
        if tier is None and not tokens[name] and name != "hbm":
            continue
        served = count(tokens[name])
        if tier is None:
            sheet.add(name, served, "no figure" if tokens[name] else "", UNKNOWN, UNKNOWN, "", "")
            continue
        seconds_net = tier["net_engine_seconds"]
        avoided, status = _point(tier["avoided_engine_seconds"]), _WORDS[tier["status"]]
        if seconds_net is None and tier["avoided_engine_seconds"] is not None:
            status = "net unknown"
        money = "" if tier["net"] is None else _money(tier["net"])
        sheet.add(name, served, status, avoided, _point(seconds_net), _span(seconds_net), money)
    return sheet


def _time(group: Mapping[str, Any]) -> Sheet:
    basis = group["basis"]["engine_seconds"]
    sheet = Sheet("engine time", "seconds", "90 % interval", "basis")
    cost = group["reuse_engine_seconds"]
    for name, estimate in (
        ("avoided by reuse (gross)", group["avoided_engine_seconds"]),
        ("- waiting for loads", cost["stall"]),
        ("- storing", cost["store"]),
        ("net", group["net_engine_seconds"]),
    ):
        span = _span(estimate) if estimate is not None and any(estimate.values()) else ""
        sheet.add(name, _point(estimate), span, "unknown" if estimate is None else basis)
    if group["latency_seconds"]:
        sheet.add("loads that only requests waited for", _seconds(group["latency_seconds"]), "", "MEASURED")
    return sheet


def _cash(group: Mapping[str, Any], currency: str) -> Sheet:
    basis = group["basis"]["money"]
    sheet = Sheet(f"money, {currency}", "amount", "90 % interval", "basis")

    def add(name: str, estimate: Mapping[str, str] | None) -> None:
        span = "" if estimate is None else between(estimate["low"], estimate["high"])
        sheet.add(name, _money(estimate), span, "unknown" if estimate is None else basis)

    add("gross", group["gross"])
    for name, key in (("- waiting for loads", "stall"), ("- storing", "store")):
        cost = group["reuse_cost"][key]
        if cost is None or Decimal(cost):
            sheet.add(name, amount(cost), "", "unknown" if cost is None else basis)
    sheet.add("- holding KV, hits or not", amount(group["holding"]), "", basis)
    add("net", group["net"])
    add("realised", group["realised"])
    return sheet


def _price(group: Mapping[str, Any], currency: str) -> str:
    """What an engine-second costs, and what part of it is cash."""
    share = group["capacity_bound_share"]
    short = "this engine does not tell when requests waited for capacity, so what is realised is unknown"
    if share is not None:
        short = f"requests waited for capacity {share:.1%} of the time, and only what was saved then is realised"
    return f"An engine-second costs {amount(group['engine_second'])} {currency}; {short}."


def _overview(screen: Screen, groups: Sequence[Mapping[str, Any]], currency: str) -> None:
    dimensions = tuple(groups[0]["by"])
    priced = [f"net {currency}", "realised"] if any(group["gross"] for group in groups) else ["", ""]
    figures = ("status", "reused tokens", "avoided s", "net s", "90 % interval", *priced)
    sheet = Sheet(*dimensions, *figures, texts=len(dimensions))
    for group in groups:
        reused = [value for value in group["reused_tokens"].values() if value is not None]
        net = group["net_engine_seconds"]
        money = ["", ""] if not priced[0] else [_money(group["net"]), _money(group["realised"])]
        sheet.add(
            *(label(dimension, value) for dimension, value in group["by"].items()),
            _WORDS[group["status"]],
            count(sum(reused)),
            _point(group["avoided_engine_seconds"]),
            _point(net),
            _span(net),
            *money,
        )
    screen.print()
    screen.sheet(sheet, ("realised", "avoided s", "reused tokens"))
    for names, reasons in _alike(groups):
        for reason in reasons:
            shown = ", ".join(names[:_NAMES]) + (f" and {len(names) - _NAMES} more" if len(names) > _NAMES else "")
            screen.say(Text(f"{shown}: ", style="yellow"), reason, indent=2)
    screen.say(f"tokens MEASURED{_bases(groups)}; tiers are in --format json", style="dim", indent=2)
    screen.print()


def _alike(groups: Iterable[Mapping[str, Any]]) -> list[tuple[list[str], tuple[str, ...]]]:
    """The reasons of groups, told once for all that have the same."""
    found: dict[tuple[str, ...], list[str]] = {}
    for group in groups:
        if group["reasons"]:
            found.setdefault(tuple(group["reasons"]), []).append(name_of(group["by"]))
    return [(names, reasons) for reasons, names in found.items()]


def _bases(groups: Iterable[Mapping[str, Any]]) -> str:
    groups = list(groups)
    told = ""
    for name, key in (("seconds", "engine_seconds"), ("money", "money")):
        bases = sorted({group["basis"][key] for group in groups} - {None})
        told += f", {name} {' and '.join(bases)}" if bases else ""
    return told
