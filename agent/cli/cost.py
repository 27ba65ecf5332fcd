"""`kvtally cost`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import (
    by_option,
    chosen_format,
    dimensions_of,
    echo_json,
    format_option,
    ledger_options,
    settings,
    window_of,
    window_options,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


@click.command(epilog="\b\nExample: cost by model of the last day\n  kvtally cost --since 24h --by model")
@by_option
@window_options
@format_option("table", "json", "csv")
@ledger_options
def cost(
    by: str, since: str | None, until: str | None, form: str | None, ledger: str | None, config_path: str | None
) -> None:
    """Show the cost per million tokens and its parts.

    Without a window: the whole ledger if it spans less than a day, else the day before its newest interval.
    """
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.report import cost_report

    dimensions = dimensions_of(by)
    config, url = settings(config_path, ledger)
    payment = Payment(config.rates.term, config.rates.site)
    with LedgerReader(url) as reader, reader.snapshot():
        window = window_of(reader.extent(), since, until)
        report = cost_report(reader, window, dimensions, book_of(reader, config), payment)
    show(report.as_json(), dimensions, chosen_format(form))


def show(answer: dict[str, object], by: Sequence[str], form: str) -> None:
    """Print a cost report by these dimensions."""
    if form == "json":
        echo_json(answer)
    elif form == "csv":
        from kvtally.agent.render.comma_separated import cost_rows_of

        click.echo(cost_rows_of(answer, by), nl=False)
    else:
        from kvtally.agent.render.cost import cost_table

        cost_table(answer)
