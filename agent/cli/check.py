"""`kvtally check`."""

from __future__ import annotations

import re
import sys
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.check import SKIPPABLE
from kvtally.agent.cli.options import (
    by_option,
    chosen_format,
    dimensions_of,
    echo_json,
    format_option,
    instant_ns,
    ledger_options,
    length_ns,
    settings,
    window_of,
    window_options,
)

if TYPE_CHECKING:
    from kvtally.agent.accounts import Window
    from kvtally.agent.check.verdict import Asked, Budget, Tokens

_BUDGET = re.compile(
    r"(?P<before>[A-Z]{3} ?)?(?P<amount>\d{1,9}(?:\.\d{1,9})?)(?P<after> ?[A-Z]{3})?/M(?::(?P<tokens>[a-z_]+))?"
)
_TOKENS: tuple[Tokens, ...] = ("total", "input", "input_computed", "output")
_AMOUNT = re.compile(r"\d{1,9}(?:\.\d{1,9})?")
_MOVING = {"hour", "day"}  # no group of one window is one of another's
_ANY = 2**63  # more rows than a ledger can hold


@click.command(
    epilog="\b\nExample: every hour, from cron\n"
    "  kvtally check --budget 2.50/M --window 1h --fresh 10m --quiet\n"
    "\b\nWhat a million output tokens may cost, model by model:\n"
    "  kvtally check --budget 12/M:output --by model --since 24h"
)
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    metavar="2.50/M",
    help="The most that a million tokens may cost: 2.50/M, 2.50/M:output, :input, :input_computed, 2.50USD/M. "
    "Repeatable.",
)
@click.option(
    "--view",
    type=click.Choice(["fully_loaded", "active"]),
    default="fully_loaded",
    show_default=True,
    help="Of the cost per million: with what served nobody, or without.",
)
@click.option("--budget-hour", metavar="30", help="The most that an hour may cost, all groups together.")
@click.option(
    "--hit-rate-min", type=click.FloatRange(0, 1), metavar="0.3", help="The least share of prompt tokens to be reused."
)
@click.option(
    "--hit-rate-drop",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="0.5",
    help="The share that the hit rate may lose against the window before, of the same length.",
)
@click.option(
    "--coverage-min",
    type=click.FloatRange(0, 1),
    default=0.9,
    show_default=True,
    help="The least share of the engines' time to be watched.",
)
@click.option("--fresh", metavar="10m", help="The greatest age of the newest scrape, by the clock.")
@click.option(
    "--audit/--no-audit", "audits", default=None, help="Audit the ledger too. [default: up to 200,000 intervals]"
)
@click.option(
    "--skip",
    multiple=True,
    type=click.Choice(SKIPPABLE),
    help="Leave a check out. Repeatable.",
)
@by_option
@click.option("--window", "length", metavar="1h", help="The length of the window, back from the newest interval.")
@window_options
@click.option("--strict", is_flag=True, help="What cannot be told fails, too.")
@click.option("--quiet", is_flag=True, help="Print a line for each failed check, and nothing else.")
@format_option("table", "json")
@ledger_options
def check(
    *,
    budgets: tuple[str, ...],
    view: str,
    budget_hour: str | None,
    hit_rate_min: float | None,
    hit_rate_drop: float | None,
    coverage_min: float,
    fresh: str | None,
    audits: bool | None,
    skip: tuple[str, ...],
    by: str,
    length: str | None,
    since: str | None,
    until: str | None,
    strict: bool,
    quiet: bool,
    form: str | None,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Check a window of the ledger: budgets, tiers that lose money, counters that do not reconcile.

    Exit status 1 if a check fails, in any group; what cannot be told is said and fails with --strict only. Budgets and
    hit rates are checked where they are given, the rest always. Without a window: as `kvtally cost`.
    """
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.check import answer_of, judged
    from kvtally.agent.check.seen import AUDITED_MOST, look
    from kvtally.agent.check.verdict import Asked
    from kvtally.agent.ledger.read import LedgerReader

    if quiet and form is not None:
        raise click.UsageError("--quiet has a form of its own: leave --format out")
    asked = Asked(
        tuple(dimensions_of(by)),
        tuple(_budget_of(text) for text in budgets),
        view,
        None if budget_hour is None else _amount_of("--budget-hour", budget_hour),
        hit_rate_min,
        hit_rate_drop,
        coverage_min,
        None if fresh is None else _length_of("--fresh", fresh),
        frozenset(skip),
    )
    if hit_rate_drop is not None and _MOVING.intersection(asked.by):
        raise click.UsageError("--hit-rate-drop compares groups of two windows: it does not go with --by hour or day")
    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader:
        window = _window_of(reader.extent(), length, since, until)
        payment = Payment(config.rates.term, config.rates.site)
        most = AUDITED_MOST if audits is None else _ANY if audits else -1
        seen = look(reader, window, asked, book_of(reader, config), payment, now_ns=time.time_ns(), audited_most=most)
    _check_currency(asked, seen.cost["currency"])
    answer = answer_of(judged(asked, seen), seen)
    _show(answer, "lines" if quiet else chosen_format(form), strict=strict)
    sys.exit(1 if answer["state"] == "failed" or (strict and answer["unknown"]) else 0)


def _show(answer: dict[str, Any], form: str, *, strict: bool) -> None:
    if form == "json":
        echo_json(answer)
        return
    from kvtally.agent.render.check import check_lines, check_table

    if form == "table":
        check_table(answer)
        return
    for line in check_lines(answer, strict=strict):
        click.echo(line)


def _window_of(
    extent: tuple[int, int] | None, length: str | None, since: str | None, until: str | None
) -> Window | None:
    """The window asked for; None for the default one. click.UsageError if it is none."""
    if length is None:
        return window_of(extent, since, until)
    if since is not None:
        raise click.UsageError("--window and --since both say where the window begins: give one")
    from kvtally.agent.accounts import Window

    newest_ns = extent[1] if extent else 0
    end_ns = newest_ns if until is None else instant_ns("--until", until, newest_ns)
    return Window(max(end_ns - _length_of("--window", length), 0), max(end_ns, 1))


def _length_of(option: str, text: str) -> int:
    """A length of time in nanoseconds; click.UsageError if it is none."""
    length = length_ns(text)
    if length is None:
        raise click.UsageError(f"{option} {text!r} is no length of time: give 10m, 1h or 7d")
    if not length:
        raise click.UsageError(f"{option} {text!r} must be more than 0")
    return length


def _amount_of(option: str, text: str) -> Decimal:
    """An amount above 0; click.UsageError if it is none."""
    if not _AMOUNT.fullmatch(text) or not Decimal(text):
        raise click.UsageError(f"{option} {text!r} is no amount: write it like 30 or 2.50")
    return Decimal(text)


def _budget_of(text: str) -> Budget:
    """A budget from 2.50/M, 2.50/M:output or 2.50USD/M; click.UsageError if it is none."""
    from kvtally.agent.check.verdict import Budget

    found = _BUDGET.fullmatch(text.strip())
    tokens = next((one for one in _TOKENS if found and one == (found["tokens"] or "total")), None)
    if found is None or tokens is None or (found["before"] and found["after"]):
        # the shell reads $2.50 as its own $2 and leaves .50
        raise click.UsageError(
            f"--budget {text!r} is no budget: write 2.50/M, 2.50/M:output (or input, input_computed) or 2.50USD/M"
        )
    return Budget(_amount_of("--budget", found["amount"]), tokens, (found["before"] or found["after"] or "").strip())


def _check_currency(asked: Asked, currency: str) -> None:
    """click.UsageError where a budget is in another currency than the ledger."""
    for budget in asked.budgets:
        if budget.currency and currency and budget.currency != currency:
            raise click.UsageError(f"--budget is in {budget.currency}, the ledger's prices are in {currency}")
