"""What a person sees in a terminal: tables of the same values that JSON carries."""

from __future__ import annotations

import csv
import io
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Done = TypeVar("Done")

_UNKNOWN = "-"
_SEVERITY = {"info": "dim", "warning": "yellow", "error": "bold red"}
_STATES = ("prefill", "decode", "stall", "store", "idle", "asleep", "warm_up", "unallocated")
_TIERS = ("hbm", "dram", "disk", "p2p", "external")


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr, highlight=False)
    # a pipe has no width of its own: lines that a reader's terminal wraps are better than cut figures
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=110)


def amount(text: str | None) -> str:
    """An amount with four significant digits, never in scientific notation."""
    if text is None:
        return _UNKNOWN
    value = Decimal(text)
    if not value:
        return "0"
    places = max(2, 3 - value.adjusted())
    return f"{value:,.{places}f}"


def count(value: int | None) -> str:
    """An integer with thousands separated."""
    return _UNKNOWN if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """Seconds with one place."""
    return _UNKNOWN if value is None else f"{value:,.1f}"


def _share(part: float | None, whole: float | None) -> str:
    return _UNKNOWN if part is None or not whole else f"{part / whole:.1%}"


def cost_table(answer: Mapping[str, Any]) -> None:
    """Print a cost report."""
    console = _console()
    groups = answer["groups"]
    currency = answer["currency"]
    if not groups:
        console.print("The ledger holds no interval in this window. `kvtally doctor` says what is found here.")
        return
    window = answer["window"]
    console.print(f"[dim]{window['start']} to {window['end']}, {window['covered_seconds']:,.1f} s covered[/dim]")
    if len(groups) > 1:
        console.print(_overview(groups, currency))
    else:
        _detail(console, groups[0], currency)
    rates = sorted({rate for group in groups for rate in group["rates"]})
    for rate in rates:
        console.print(f"[dim]rate: {rate}[/dim]", soft_wrap=True)
    findings(console, answer["findings"])


def _label(by: Mapping[str, str | None]) -> str:
    return " ".join(value if value is not None else f"(no {key})" for key, value in by.items()) or "all"


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right", no_wrap=position > 0)
    return table


def _overview(groups: list[dict[str, Any]], currency: str) -> Table:
    table = _table(
        ", ".join(groups[0]["by"]),
        "prompt tokens",
        "reused",
        "generated",
        f"cost {currency}",
        "of which idle",
        f"{currency}/M tokens",
        "input",
        "output",
        "basis",
    )
    for group in groups:
        tokens, cost = group["tokens"], group["cost"]
        loaded = (group["cost_per_million"] or {}).get("fully_loaded", {})
        reused = None if tokens["computed"] is None or not tokens["prompt"] else tokens["prompt"] - tokens["computed"]
        table.add_row(
            _label(group["by"]),
            count(tokens["prompt"]),
            _share(reused, tokens["prompt"]),
            count(tokens["generated"]),
            amount(cost["total"] if cost else None),
            amount(cost["of_which"]["idle"] if cost else None),
            amount(loaded.get("total")),
            amount(loaded.get("input")),
            amount(loaded.get("output")),
            group["basis"]["cost"] or "no price",
        )
    return table


def _detail(console: Console, group: Mapping[str, Any], currency: str) -> None:
    console.print(_headline(group, currency))
    console.print(_tokens(group))
    console.print(_time(group, currency))
    _unit_costs(console, group, currency)


def _headline(group: Mapping[str, Any], currency: str) -> Text:
    """The one figure that most people come for."""
    text = Text(_label(group["by"]), style="bold")
    units, cost = group["cost_per_million"], group["cost"]
    if cost is None or units["fully_loaded"]["total"] is None:
        return text
    text.append(f": {amount(units['fully_loaded']['total'])} {currency} per million tokens")
    total, active = Decimal(cost["total"]), Decimal(units["active"]["total"])
    loaded = Decimal(units["fully_loaded"]["total"])
    if total:
        text.append(
            f" ({group['basis']['cost']}), {1 - active / loaded:.0%} of it for time that served nobody", "default"
        )
    return text


def _with_interval(units: Mapping[str, Any], key: str) -> str:
    """A unit cost with its 90 % interval."""
    interval = units["intervals"][key]
    if interval is None:
        return amount(units[key])
    return f"{amount(units[key])} [{amount(interval['low'])}, {amount(interval['high'])}]"


def _tokens(group: Mapping[str, Any]) -> Table:
    tokens, basis = group["tokens"], group["basis"]["tokens"]
    table = _table("tokens", "count", "of prompt", "basis")
    table.add_row("prompt", count(tokens["prompt"]), "", basis)
    table.add_row("  computed", count(tokens["computed"]), _share(tokens["computed"], tokens["prompt"]), basis)
    for tier in _TIERS:
        value = tokens["cached"][tier]
        if value:
            table.add_row(f"  reused from {tier}", count(value), _share(value, tokens["prompt"]), basis)
    table.add_row("generated", count(tokens["generated"]), "", basis)
    return table


def _time(group: Mapping[str, Any], currency: str) -> Table:
    times, cost, basis = group["engine_seconds"], group["cost"], group["basis"]
    total = sum(times[state] or 0.0 for state in ("occupied", "idle", "asleep", "warm_up", "unallocated"))
    table = _table("engine time", "seconds", "share", f"cost {currency}", "basis")
    overhead = cost["of_which"] if cost else {}
    occupied = None if not cost else str(Decimal(cost["total"]) - sum(Decimal(each) for each in overhead.values()))
    table.add_row(
        "occupied", seconds(times["occupied"]), _share(times["occupied"], total), amount(occupied), basis["states"]
    )
    shares = group["prefill_share"]
    if shares and times["occupied"]:
        low, high = shares["low"] * times["occupied"], shares["high"] * times["occupied"]
        for name, (least, most) in {
            "prefill": (low, high),
            "decode": (times["occupied"] - high, times["occupied"] - low),
        }.items():
            span = f"{seconds(times[name])} [{seconds(least)}, {seconds(most)}]"
            table.add_row(f"  {name}", span, _share(times[name], total), "", "MODELLED 90 %")
    else:
        table.add_row("  prefill, decode", _UNKNOWN, "", "", "not told apart")
    for state in ("idle", "asleep", "warm_up", "unallocated"):
        if times[state] or state == "idle":
            table.add_row(
                state.replace("_", "-"),
                seconds(times[state]),
                _share(times[state], total),
                amount(overhead.get(state)),
                "",
            )
    table.add_row("total", seconds(total), "", amount(cost["total"] if cost else None), basis["cost"] or "no price")
    return table


def _unit_costs(console: Console, group: Mapping[str, Any], currency: str) -> None:
    units = group["cost_per_million"]
    if units is None:
        return
    table = _table(f"{currency}/M tokens", "fully loaded", "active only", "basis")
    basis = group["basis"]
    split = f"{basis['split']} 90 % x {basis['cost']}" if basis["split"] else _UNKNOWN
    loaded, active = units["fully_loaded"], units["active"]
    table.add_row("all tokens", amount(loaded["total"]), amount(active["total"]), basis["cost"])
    for key, name in (("input", "input, reused or not"), ("input_computed", "  computed input"), ("output", "output")):
        table.add_row(name, _with_interval(loaded, key), _with_interval(active, key), split)
    console.print(table)


def findings(console: Console, found: list[dict[str, str]]) -> None:
    """Print findings, one paragraph each."""
    for one in found:
        where = f" [{one['target']}]" if one["target"] else ""
        text = Text(f"{one['severity']}: ", style=_SEVERITY[one["severity"]])
        text.append(f"{one['message']}{where}", style="")
        console.print(text, soft_wrap=True)


def cost_csv(answer: Mapping[str, Any]) -> str:
    """A cost report as CSV: one row per group, nested keys joined by dots."""
    rows = [_flat({**group, "currency": answer["currency"], "window": answer["window"]}) for group in answer["groups"]]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat[f"{prefix}{key}"] = "; ".join(str(each) for each in item)
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def ledger_table(answer: Mapping[str, Any]) -> None:
    """Print what `ledger info` knows."""
    console = _console()
    console.print(
        f"{answer['path']}  revision {answer['revision']}  {answer['bytes'] / 2**20:,.2f} MiB", soft_wrap=True
    )
    console.print(f"from {answer['start'] or _UNKNOWN} to {answer['end'] or _UNKNOWN}")
    table = _table("rows of", "count")
    for name, rows in answer["rows"].items():
        if rows:
            table.add_row(name, count(rows))
    console.print(table)
    targets = _table("target", "kind", "model", "version", "GPUs")
    for target in answer["targets"]:
        gpus = target.get("gpus", _UNKNOWN)
        held = str(len([uuid for uuid in gpus.split(",") if uuid])) if gpus != _UNKNOWN else _UNKNOWN
        held = held if target["kind"] == "engine" else ""
        targets.add_row(target["name"], target["kind"], target.get("model", ""), target.get("version", ""), held)
    console.print(targets)


def recorded_banner(meta: Mapping[str, Any], length_seconds: float, start_ns: int) -> None:
    """Say at the top of every screen of the demo that nothing here is live."""
    from kvtally.agent.finding import utc_text  # noqa: PLC0415  # the demo alone needs it

    gpus = ", ".join(str(gpu.get("name", gpu.get("uuid"))) for gpu in meta.get("gpus") or []) or "no GPU"
    engine = f"{meta.get('engine', 'engine')} {meta.get('engine_version', '')}".strip()
    text = Text("RECORDED", style="bold black on yellow")
    text.append(f"  {gpus}, {engine}, {utc_text(start_ns)[:10]}, {length_seconds:.0f} s of real traffic. Not live.")
    _console().print(text)


def what_next() -> None:
    """What to type after the demo."""
    console = _console()
    console.print()
    console.print("These figures were [bold]RECORDED[/bold]. Your own, beside a running vLLM:")
    console.print("  kvtally run &          [dim]# finds engines and GPUs on this host[/dim]")
    console.print("  kvtally cost           [dim]# what a million of your tokens costs[/dim]")
    console.print("  kvtally rates add gpu PRICE --unit gpu-hour --sku NAME --from DATE   [dim]# your own price[/dim]")


def progress_of(name: str, task: Callable[[Callable[[int], None]], Done]) -> Done:
    """Run a replay with a line that moves."""
    from kvtally.agent.finding import utc_text  # noqa: PLC0415  # as above

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=_console(stderr=True), transient=True) as progress:
        bar = progress.add_task(name)
        seen = 0

        def show(at_ns: int) -> None:
            nonlocal seen
            seen += 1
            if not seen % 50:
                progress.update(bar, description=f"{name}: {seen:,} pages, at {utc_text(at_ns)}")

        return task(show)


def rates_table(rows: list[tuple[int, str, str]]) -> None:
    """Print rates: id, text, note."""
    table = _table("id", "rate", "note")
    for rate_id, text, note in rows:
        table.add_row(str(rate_id), text, note)
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "left", False
    _console().print(table)


def doctor_table(answer: Mapping[str, Any]) -> None:
    """Print what the doctor found."""
    console = _console()
    style = {"ok": "green", "no_data": "yellow", "failed": "bold red", "partial": "yellow"}
    for one in answer["targets"]:
        line = Text(f"{one['state']:<8}", style=style[one["state"]])
        line.append(f"{one['target']}", style="bold")
        line.append(f"  {one['summary']}")
        console.print(line, soft_wrap=True)
        for missing in one["missing"]:
            console.print(f"        [yellow]missing[/yellow] {missing['what']}: {missing['costs']}", soft_wrap=True)
            if missing["hint"]:
                console.print(f"                {missing['hint']}", soft_wrap=True, style="dim")
        if one["hint"]:
            console.print(f"        {one['hint']}", soft_wrap=True, style="dim")
    console.print(answer["verdict"], soft_wrap=True)
