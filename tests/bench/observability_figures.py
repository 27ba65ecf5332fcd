"""Every figure of `kvtally cost` and `kvtally savings` beside what PromQL answers for the same window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.observability_ledger import NANO

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.bench.observability_ledger import GrowingLedger
    from tests.bench.observability_servers import Server

DIMENSIONS = "model,cluster,namespace,tenant"
# panels that make one figure of several kvtallys', with the gauge that one kvtally has of it
OF_ALL = {
    "Cost of a million tokens": "kvtally_cost_per_million_tokens",
    "Cost of a million tokens: total, input, output": "kvtally_cost_per_million_tokens",
    "Cost of a million prompt tokens: computed, or cached by tier": "kvtally_cost_per_million_tokens",
    "Fully loaded, and active time alone": "kvtally_cost_per_million_tokens",
    "Cost of an hour": "kvtally_cost_per_hour",
    "Reused prompt tokens": "kvtally_reuse_ratio",
}
APART = Decimal("1e-9")  # of a figure: it is multiplied by a weight, and divided by it
SHOWN = ('tokens="total"', 'measure="net"', 'source="hbm"', 'state="idle"')


class Figure(NamedTuple):
    """One figure of the CLI, and the PromQL that gives the same."""

    expr: str
    told: Decimal


class Run(NamedTuple):
    """What was scraped, from when to when (unix seconds), by whom, and an instant on the way."""

    ledger: GrowingLedger
    servers: Sequence[Server]
    start: float
    midway: float
    end: float


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _kvtally(*words: str) -> Any:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("KVTALLY")}
    command = [sys.executable, "-m", "kvtally", *words, "--format", "json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)


def window_faults(run: Run) -> list[str]:
    """Gauges of the window 1h, and what is cumulative: the whole recording lies in that hour."""
    words = ("--ledger", run.ledger.url, "--since", "1h", "--by", DIMENSIONS)
    cost, savings = _kvtally("cost", *words), _kvtally("savings", *words)
    figures = [figure for group in cost["groups"] for figure in (*_costs(group), *_sums(group))]
    figures += [figure for group in savings["groups"] for figure in _savings(group)]
    say(f"\n{len(figures)} figures of `kvtally cost` and `kvtally savings` --since 1h --by {DIMENSIONS}; among them")
    faults = []
    for figure in figures:
        values = [server.value(figure.expr, run.end) for server in run.servers]
        if any(value != figure.told for value in values):
            faults.append(f"{figure.expr}: kvtally {figure.told}, {values}")
        if any(word in figure.expr for word in SHOWN):
            _beside(figure, values[0])
    return faults


def _costs(group: Mapping[str, Any]) -> Iterator[Figure]:
    by = _selected(group["by"])
    for view in ("fully_loaded", "active"):
        prices = group["cost_per_million"][view]
        told = {name: prices[name] for name in ("total", "input", "input_computed", "output")}
        told |= {f"input_cached_{tier}": price for tier, price in (prices["input_cached"] or {}).items()}
        for tokens, price in told.items():
            if price is not None:
                chosen = f'{by},window="1h",view="{view}",tokens="{tokens}"'
                yield Figure(f"kvtally_cost_per_million_tokens{{{chosen}}}", Decimal(price))
    yield Figure(f'kvtally_coverage_ratio{{{by},window="1h"}}', Decimal(repr(group["coverage"])))


def _sums(group: Mapping[str, Any]) -> Iterator[Figure]:
    by, tokens, cost = _selected(group["by"]), group["tokens"], group["cost"]
    yield from _counted(group)
    for tier, count in tokens["cached"].items():
        if count is not None:
            yield Figure(f'kvtally_ledger_cached_tokens{{{by},tier="{tier}"}}', Decimal(count))
    for resource, amount in cost.items():
        if isinstance(amount, str) and resource != "total":
            yield Figure(f'kvtally_ledger_cost{{{by},resource="{resource}"}}', Decimal(amount))
    for state, amount in cost["of_which"].items():
        yield Figure(f'kvtally_ledger_state_cost{{{by},state="{state}"}}', Decimal(amount))
    for state, seconds in group["engine_seconds"].items():
        if seconds is not None and state != "occupied":  # the sum of others
            yield Figure(f'kvtally_ledger_engine_seconds{{{by},state="{state}"}}', Decimal(repr(seconds)))


def _savings(group: Mapping[str, Any]) -> Iterator[Figure]:
    by = f'{_selected(group["by"])},window="1h"'
    yield Figure(f'kvtally_savings_status{{{by},status="{group["status"]}"}}', Decimal(1))
    for measure in ("gross", "net", "realised"):
        for bound, amount in (group[measure] or {}).items():
            yield Figure(f'kvtally_savings_amount{{{by},measure="{measure}",bound="{bound}"}}', Decimal(amount))
    for measure, name in (("gross", "avoided_engine_seconds"), ("net", "net_engine_seconds")):
        for bound, seconds in (group[name] or {}).items():
            chosen = f'{by},measure="{measure}",bound="{bound}"'
            yield Figure(f"kvtally_savings_engine_seconds{{{chosen}}}", Decimal(repr(seconds)))
    for tier, told in group["tiers"].items():
        for bound, seconds in (told["net_engine_seconds"] or {}).items():
            chosen = f'{by},tier="{tier}",bound="{bound}"'
            yield Figure(f"kvtally_tier_savings_engine_seconds{{{chosen}}}", Decimal(repr(seconds)))


def part_faults(run: Run) -> Iterator[str]:
    """Differences of two scrapes beside `kvtally cost` of the window between them, which is each server's own.

    Tokens and money alone: how time divides is learned from what a window holds, and may be learned better from more.
    """
    for server in run.servers:
        instants = (run.midway, run.end)
        watched = [server.value("sum(kvtally_watched_seconds_total)", at) or Decimal(0) for at in instants]
        edges = [f"{run.ledger.first_ns / Decimal(NANO) + seconds:.9f}" for seconds in watched]
        words = ("--ledger", run.ledger.url, "--since", edges[0], "--until", edges[1], "--by", DIMENSIONS)
        (group,) = _kvtally("cost", *words)["groups"]
        say(f"\n{server.name}, between two scrapes, beside `kvtally cost --since {edges[0]} --until {edges[1]}`")
        for figure in _counted(group):
            begun, ended = (server.value(figure.expr, at) for at in instants)
            moved = None if begun is None or ended is None else round(ended - begun, 9)  # floats of nano-units
            _beside(figure, moved)
            if moved != figure.told:
                yield f"{server.name}: {figure.expr} grew by {moved}, kvtally {figure.told}"


def fleet_faults(targets: Sequence[tuple[str, str]], run: Run) -> Iterator[str]:
    """What panels say of all kvtallys beside what the only one here says; `targets` are titles and queries."""
    say("\nof all kvtallys, beside the only one's own")
    for title, expr in targets:
        if title not in OF_ALL:
            continue
        metric = OF_ALL[title]
        for server in run.servers:
            answers = server.instant(expr, run.end)
            if not answers:
                yield f"{server.name}: {title} gives nothing at the end: {expr}"
            for one in answers:
                labels = {name: value for name, value in one.labels.items() if name != "__name__"} | {"window": "1h"}
                if metric == "kvtally_cost_per_million_tokens":
                    labels = {"view": "fully_loaded", "tokens": "total", **labels}
                own = server.value(f"{metric}{{{_selected(labels)}}}", run.end)
                found = Decimal(one.values[0][1])
                say(f"  {server.name:<16} {title:<62} {labels.get('tokens', ''):<22} {found:.9f}  own {own}")
                if own is None or abs(found - own) > APART * abs(own):
                    yield f"{server.name}: {title} {labels}: {found}, own {own}"


def _counted(group: Mapping[str, Any]) -> Iterator[Figure]:
    by, tokens = _selected(group["by"]), group["tokens"]
    for source, count in {"computed": tokens["computed"], "hbm": tokens["cached"]["hbm"]}.items():
        yield Figure(f'kvtally_prompt_tokens_total{{{by},source="{source}"}}', Decimal(count))
    yield Figure(f"kvtally_generated_tokens_total{{{by}}}", Decimal(tokens["generated"]))
    yield Figure(f"sum(kvtally_ledger_cost{{{by}}})", Decimal(group["cost"]["total"]))


def _selected(by: Mapping[str, str | None]) -> str:
    return ",".join(f'{name}="{value or ""}"' for name, value in by.items())


def _beside(figure: Figure, value: Decimal | None) -> None:
    shown = figure.expr.replace(',cluster="",namespace="",tenant=""', "")
    given = "none" if value is None else f"{value.normalize():f}"
    say(f"  {shown:<92} {given:>14}  kvtally {figure.told}")
