"""`kvtally cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import (
    chosen_format,
    format_option,
    instant_ns,
    ledger_options,
    settings,
    window_options,
)

if TYPE_CHECKING:
    from kvtally.agent.accounts import Window
    from kvtally.agent.ledger.read import LedgerReader


@click.command(epilog="\b\nExample: cost by model of the last day\n  kvtally cost --since 24h --by model")
@click.option("--by", default="model", metavar="A,B", help="model, replica, cluster, namespace, tenant, hour, day.")
@window_options
@format_option
@ledger_options
def cost(
    by: str, since: str | None, until: str | None, form: str | None, ledger: str | None, config_path: str | None
) -> None:
    """Show the cost per million tokens and its parts.

    Without a window: the whole ledger if it spans less than a day, else the day before its newest interval.
    """
    from kvtally.agent.accounts import Payment  # noqa: PLC0415  # SQLAlchemy is loaded when a command needs it
    from kvtally.agent.book import book_of  # noqa: PLC0415  # as above
    from kvtally.agent.ledger.read import LedgerReader  # noqa: PLC0415  # as above
    from kvtally.agent.report import cost_report  # noqa: PLC0415  # as above

    dimensions = dimensions_of(by)
    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader:
        window = window_of(reader, since, until)
        payment = Payment(config.rates.term, config.rates.site)
        report = cost_report(reader, window, dimensions, book_of(reader, config), payment)
    show(report.as_json(), chosen_format(form))


def show(answer: dict[str, object], form: str) -> None:
    """Print a cost report."""
    if form == "json":
        from json import dumps  # noqa: PLC0415  # only here

        click.echo(dumps(answer, indent=2, ensure_ascii=False))
        return
    from kvtally.agent import render  # noqa: PLC0415  # rich is loaded for a table only

    if form == "csv":
        click.echo(render.cost_csv(answer), nl=False)
    else:
        render.cost_table(answer)


def dimensions_of(by: str) -> list[str]:
    """The dimensions named; click.BadParameter for an unknown one."""
    from kvtally.agent.report import DIMENSIONS  # noqa: PLC0415  # as above

    names = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            raise click.BadParameter(f"--by {name}: choose from {', '.join(DIMENSIONS)}")
    return names


def window_of(reader: LedgerReader, since: str | None, until: str | None) -> Window | None:
    """The window asked for; None for the default one."""
    from kvtally.agent.accounts import Window  # noqa: PLC0415  # as above

    if since is None and until is None:
        return None
    extent = reader.extent()
    if extent is None:
        return None
    start = extent[0] if since is None else instant_ns(since, extent[1])
    end = extent[1] if until is None else instant_ns(until, extent[1])
    if end <= start:
        raise click.BadParameter("--until must be later than --since")
    return Window(start, end)
