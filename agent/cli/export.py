"""`kvtally export …`: the ledger for a FinOps warehouse, a data lake, and a Prometheus that was not there yet."""

from __future__ import annotations

import os
import re
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.cli.export_live import otlp, page
from kvtally.agent.cli.group import Group
from kvtally.agent.cli.options import ledger_options, length_ns, settings, window_of, window_options
from kvtally.agent.finding import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from kvtally.agent.config import Config
    from kvtally.agent.ledger.read import LedgerReader

_LABEL = re.compile(r"([a-zA-Z_][a-zA-Z0-9_]*)=(.*)", re.DOTALL)
_NANO = 10**9
_DAY_SECONDS = 86_400


def step_seconds(_: click.Context, param: click.Parameter, text: str) -> int:
    """Seconds of a step such as 60, 60s, 5m or 1h, from one to a day; click.BadParameter for another."""
    seconds, rest = divmod(length_ns(f"{text}s" if text.isdecimal() else text) or 0, _NANO)
    if rest or not 1 <= seconds <= _DAY_SECONDS:
        raise click.BadParameter(f"{text!r} is no step: give 60s, 5m or 1h, a day at most", param=param)
    return seconds


def named_labels(_: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, str]:
    """Labels by name; click.BadParameter for one that is no label, or that the series have already."""
    named: dict[str, str] = {}
    for text in texts:
        from kvtally.agent.export.counters import label_names

        found = _LABEL.fullmatch(text)
        if found is None or found[1].startswith("__"):
            raise click.BadParameter(f"{text!r} is no label: give NAME=VALUE, such as job=kvtally", param=param)
        if found[1] in label_names() | named.keys():
            raise click.BadParameter(f"{found[1]} is on every series already", param=param)
        named[found[1]] = found[2]
    return named


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """--output."""
    return click.option(
        "--output", metavar="FILE", help="Where to write; whole or not at all. [default: standard output]"
    )(command)


@click.group(cls=Group, epilog="\b\nExample:\n  kvtally export focus --since 30d --output november.csv")
def export() -> None:
    """Hand the ledger on: to FinOps tools, to a warehouse, to Prometheus."""


export.add_command(page)
export.add_command(otlp)


@export.command(epilog="\b\nExample: what the last 30 days cost\n  kvtally export focus --since 30d --output focus.csv")
@window_options
@click.option(
    "--format", "form", type=click.Choice(["csv", "parquet"]), default="csv", show_default=True, help="Of the rows."
)
@click.option("--provider", default="kvtally", show_default=True, help="Who makes the GPUs available, as FOCUS asks.")
@click.option("--account", default="kvtally", show_default=True, help="The billing account that is charged.")
@output_option
@ledger_options
def focus(
    since: str | None,
    until: str | None,
    form: str,
    provider: str,
    account: str,
    output: str | None,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Write every charge as a row of the FOCUS 1.2 cost and usage dataset.

    BilledCost adds up to what `kvtally cost` says of the same window, to the last digit. What reuse saved stands in
    columns of its own (x_…) and is in no cost. Without a window: as `kvtally cost`.
    """
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.export.focus import FocusCharges, Issuer
    from kvtally.agent.export.focus_columns import COLUMNS, FOCUS_VERSION
    from kvtally.agent.export.rows import CsvWriter, Writer, opened

    for option, value in (("--provider", provider), ("--account", account)):
        if not value.strip():
            raise click.UsageError(f"{option} is a name")
    if form == "parquet" and output is None:
        raise click.UsageError("Parquet is no text for a terminal or a pipe: give --output FILE")
    with _opened(ledger, config_path) as (reader, config), _arrow_asked():
        window = window_of(reader.extent(), since, until)
        payment = Payment(config.rates.term, config.rates.site)
        charges = FocusCharges(reader, book_of(reader, config), payment, Issuer(provider, account))
        with opened(output) as file:
            writer: Writer
            if form == "parquet":
                from kvtally.agent.export.parquet import ParquetWriter

                writer = ParquetWriter(file, COLUMNS, {"focus_version": FOCUS_VERSION})
            else:
                writer = CsvWriter(file, COLUMNS)
            rows = 0
            for rows, row in enumerate(charges.rows(window), 1):  # noqa: B007  # their count, 0 for none
                writer.write(row)
            writer.finish()
    _tell(output, rows)
    if charges.unpriced:
        told = f"hours of engines and GPUs without a price, and so without a row: {charges.unpriced}"
        click.echo(f"{told} (`kvtally cost` says why)", err=True)


@export.command(epilog="\b\nExample: the last 30 days for a warehouse\n  kvtally export parquet lake --since 30d")
@click.argument("folder", type=click.Path(file_okay=False))
@window_options
@ledger_options
def parquet(folder: str, since: str | None, until: str | None, ledger: str | None, config_path: str | None) -> None:
    """Write the ledger's own rows into FOLDER: engine_interval, charge and saving, each a file of typed columns.

    Intervals and settled hours that start in the window. Without a window: as `kvtally cost`. Needs pyarrow
    (pip install 'kvtally[parquet]').
    """
    from kvtally.agent.export.parquet import ParquetWriter, check_installed
    from kvtally.agent.export.rows import opened
    from kvtally.agent.export.tables import TABLES, window_from

    with _opened(ledger, config_path) as (reader, _), _arrow_asked():
        check_installed()
        window = window_from(reader, window_of(reader.extent(), since, until))
        targets = reader.targets()
        Path(folder).mkdir(parents=True, exist_ok=True)
        for table in TABLES:
            path = os.path.join(folder, f"{table.name}.parquet")  # noqa: PTH118  # one join
            rows = 0
            with opened(path) as file:
                writer = ParquetWriter(file, table.columns)
                for rows, row in enumerate(table.rows(reader, window, targets), 1):  # noqa: B007  # as above
                    writer.write(row)
                writer.finish()
            _tell(path, rows)


@export.command(
    epilog="\b\nExample: what Prometheus missed\n  kvtally export openmetrics --since 30d --output backfill.om\n"
    "  promtool tsdb create-blocks-from openmetrics backfill.om data/"
)
@window_options
@click.option(
    "--step", callback=step_seconds, default="60s", show_default=True, metavar="TIME", help="Time between samples."
)
@click.option(
    "--label",
    "labels",
    callback=named_labels,
    multiple=True,
    metavar="NAME=VALUE",
    help="A label for every series, such as the job of a scrape. Repeatable.",
)
@output_option
@ledger_options
def openmetrics(
    since: str | None,
    until: str | None,
    step: int,
    labels: dict[str, str],
    output: str | None,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Write the counters of /metrics as they were, for `promtool tsdb create-blocks-from openmetrics`.

    They have counted since the ledger began, whatever the window. Without a window: as `kvtally cost`.
    """
    from kvtally.agent.export.openmetrics import backfill
    from kvtally.agent.export.rows import opened

    with _opened(ledger, config_path) as (reader, _):
        window = window_of(reader.extent(), since, until)
        with opened(output) as file:
            for line in backfill(reader, window, step, labels):
                file.write(line.encode("utf-8", "backslashreplace"))


@contextmanager
def _opened(ledger: str | None, config_path: str | None) -> Iterator[tuple[LedgerReader, Config]]:
    """The ledger as it is at this instant, and the config."""
    from kvtally.agent.ledger.read import LedgerReader

    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader, reader.snapshot():
        yield reader, config


@contextmanager
def _arrow_asked() -> Iterator[None]:
    """What is missing for Parquet is a wrong call, not a defect."""
    from kvtally.agent.export.parquet import ParquetMissing

    try:
        yield
    except ParquetMissing as error:
        raise click.UsageError(str(error)) from None


def _tell(path: str | None, rows: int) -> None:
    if path is not None:
        click.echo(f"{path}: {plural(rows, 'row')}", err=True)
