"""Options that several commands share, and what they mean."""

from __future__ import annotations

import math
import os
import re
import sys
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvtally.agent.config import Config

_LENGTH = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_NANO = 10**9
_LATEST_SECONDS = 2**63 // _NANO  # the year 2262: what 64 bits of nanoseconds hold
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Seconds(click.FloatRange):
    """A length of time: a number within the range, so neither NaN nor infinite."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what no clock can measure, then what is out of range."""
        number = click.FLOAT.convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no length of time", param, ctx)
        return super().convert(value, param, ctx)


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


def format_option(*forms: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--format; a table on a terminal, JSON elsewhere."""
    return click.option(
        "--format", "form", type=click.Choice(forms), help="How to print. [default: table on a terminal, else json]"
    )


def chosen_format(form: str | None) -> str:
    """The format asked for, or what suits standard output."""
    return form or ("table" if sys.stdout.isatty() else "json")


def settings(config_path: str | None, ledger: str | None) -> tuple[Config, str]:
    """The config and the ledger's URL; ConfigError if the config cannot be used."""
    from kvtally.agent.config import ledger_url, load  # noqa: PLC0415  # --help needs no config

    config = load(config_path, os.environ)
    return config, ledger_url(ledger, config, os.environ)


def length_ns(text: str) -> int | None:
    """A length of time such as 90m or 1.5h, in nanoseconds; None if it is none."""
    found = _LENGTH.fullmatch(text)
    return int(Decimal(found[1]) * _UNIT_SECONDS[found[2]] * _NANO) if found else None


def instant_ns(option: str, text: str, newest_ns: int) -> int:
    """A point in time as unix nanoseconds from 1970 to 2262; click.UsageError names the option if it is none."""
    back_ns = length_ns(text)
    if back_ns is not None:
        return max(newest_ns - back_ns, 0)  # before everything is everything
    at_ns = _unix_ns(text)
    if at_ns is None:
        at_ns = _calendar_ns(text)
    if at_ns is None:
        raise click.UsageError(f"{option} {text!r} is no time: give 2026-11-23T04:00Z, unix seconds, or 90m, 24h, 30d")
    if not 0 <= at_ns < _LATEST_SECONDS * _NANO:
        raise click.UsageError(f"{option} {text!r} does not lie between 1970 and 2262")
    return at_ns


def _unix_ns(text: str) -> int | None:
    try:
        number = Decimal(text)
    except InvalidOperation:
        return None
    if not number.is_finite():
        return None
    # far out, the exact product may be as large as memory: any instant that is refused does as well
    return int(number * _NANO) if -_LATEST_SECONDS < number < _LATEST_SECONDS else -1


def _calendar_ns(text: str) -> int | None:
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError:
        return None
    since = (parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)) - _EPOCH
    return (since.days * 86400 + since.seconds) * _NANO + since.microseconds * 1000
