"""Options that several commands share, and what they mean."""

from __future__ import annotations

import os
import re
import sys
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.config import Config, ledger_url, load

if TYPE_CHECKING:
    from collections.abc import Callable

_RELATIVE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_NANO = 10**9


def ledger_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--ledger and --config."""
    command = click.option(
        "--config", "config_path", metavar="FILE", help="TOML config. [default: $KVTALLY_CONFIG, …]"
    )(command)
    return click.option(
        "--ledger", "ledger", metavar="URL", help="Where the ledger lies, such as sqlite:///on.db. [$KVTALLY_LEDGER]"
    )(command)


def window_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--since and --until."""
    command = click.option("--until", metavar="TIME", help="End of the window (exclusive), as --since.")(command)
    return click.option(
        "--since", metavar="TIME", help="ISO 8601, unix seconds, or back from the newest interval: 90m, 24h, 30d."
    )(command)


def format_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--format; a table on a terminal, JSON elsewhere."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv"]),
        default=None,
        help="[default: table on a terminal, else json]",
    )(command)


def chosen_format(form: str | None) -> str:
    """The format asked for, or what suits standard output."""
    return form or ("table" if sys.stdout.isatty() else "json")


def settings(config_path: str | None, ledger: str | None) -> tuple[Config, str]:
    """The config and the ledger's URL."""
    config = load(config_path, os.environ)
    return config, ledger_url(ledger, config, os.environ)


def instant_ns(text: str, newest_ns: int) -> int:
    """A point in time as unix nanoseconds; click.BadParameter for one that cannot be read."""
    relative = _RELATIVE.fullmatch(text)
    if relative:
        return newest_ns - int(Decimal(relative[1]) * _UNIT_SECONDS[relative[2]] * _NANO)
    try:
        number = Decimal(text)
        if number.is_finite():
            return int(number * _NANO)
    except InvalidOperation:
        pass
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            f"{text!r} is no time: give 2026-11-23T04:00:00Z, unix seconds, or 90m, 24h, 30d"
        ) from None
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=UTC)
    delta = parsed - datetime(1970, 1, 1, tzinfo=UTC)
    return (delta.days * 86400 + delta.seconds) * _NANO + delta.microseconds * 1000
