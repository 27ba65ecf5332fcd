"""Options that several commands share, what they mean, and the JSON that they ask for."""

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
    from collections.abc import Callable, Mapping

    from kvtally.agent.accounts import Window
    from kvtally.agent.config import Config

_LENGTH = re.compile(r"(\d{1,18}(?:\.\d{1,9})?)([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_NANO = 10**9
_LATEST_SECONDS = 2**63 // _NANO  # the year 2262: what 64 bits of nanoseconds hold
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Seconds(click.FloatRange):
    """A length of time, in seconds or as 15s, 10m, 1h: a number within the range, so neither NaN nor infinite."""

    name = "seconds"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse what no clock can measure, then what is out of range."""
        length = length_ns(value) if isinstance(value, str) else None
        try:
            number = float(value) if length is None else length / _NANO
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f"{value} is no length of time: give seconds, or 15s, 10m, 1h", param, ctx)
        return super().convert(number, param, ctx)


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


def by_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--by."""
    return click.option(
        "--by", default="model", metavar="A,B", help="model, replica, cluster, namespace, tenant, hour, day."
    )(command)


def interval_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--interval, between two scrapes of a live deployment."""
    return click.option(
        "--interval", type=Seconds(1, 300), metavar="SECONDS", help="Scrape this often (1 to 300). [default: 5]"
    )(command)


def format_option(*forms: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """--format; a table on a terminal, JSON elsewhere."""
    return click.option(
        "--format", "form", type=click.Choice(forms), help="How to print. [default: table on a terminal, else json]"
    )


def chosen_format(form: str | None) -> str:
    """The format asked for, or what suits standard output."""
    return form or ("table" if sys.stdout.isatty() else "json")


def echo_json(answer: Mapping[str, Any]) -> None:
    """Print an answer as JSON."""
    from json import dumps

    click.echo(dumps(answer, indent=2))


def settings(config_path: str | None, ledger: str | None) -> tuple[Config, str]:
    """The config and the ledger's URL; ConfigError if the config cannot be used."""
    from kvtally.agent.config import ledger_url, load

    config = load(config_path, os.environ)
    return config, ledger_url(ledger, config, os.environ)


def environment_with(interval: float | None) -> dict[str, str]:
    """The environment, in which --interval stands as the config's own key, before that of any file."""
    environment = dict(os.environ)
    if interval is not None:
        environment["KVTALLY_SCRAPE__INTERVAL_SECONDS"] = f"{interval:g}"
    return environment


def dimensions_of(by: str) -> list[str]:
    """The dimensions named; click.UsageError for an unknown one."""
    from kvtally.agent.grouping import DIMENSIONS

    names = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            raise click.UsageError(f"--by {name}: choose from {', '.join(DIMENSIONS)}")
    return list(dict.fromkeys(names))


def window_of(extent: tuple[int, int] | None, since: str | None, until: str | None) -> Window | None:
    """The window asked for, from what the ledger spans; None for the default one. click.UsageError if it is none."""
    from kvtally.agent.accounts import Window

    if since is None and until is None:
        return None
    oldest_ns, newest_ns = extent or (0, 0)
    start_ns = None if since is None else instant_ns("--since", since, newest_ns)
    end_ns = None if until is None else instant_ns("--until", until, newest_ns)
    if start_ns is not None and end_ns is not None and end_ns <= start_ns:
        raise click.UsageError("--until must be later than --since")
    if start_ns is None:
        start_ns = min(oldest_ns, end_ns or 0)
    # beyond what the ledger spans there is nothing: an empty answer, not an error
    return Window(start_ns, max(newest_ns, start_ns) if end_ns is None else end_ns)


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
