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


@click.command(epilog="\b\nExample: cost by model of the last day\n  kvtally cost --since 24h --by model")
@click.option("--by", default="model", metavar="A,B", help="model, replica, cluster, namespace, tenant, hour, day.")
@window_options
@format_option("table", "json", "csv")
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
    payment = Payment(config.rates.term, config.rates.site)
    with LedgerReader(url) as reader, reader.snapshot():
        window = window_of(reader.extent(), since, until)
        report = cost_report(reader, window, dimensions, book_of(reader, config), payment)
    show(report.as_json(), chosen_format(form))


def show(answer: dict[str, object], form: str) -> None:
    """Print a cost report."""
    if form == "json":
        from json import dumps  # noqa: PLC0415  # only here

        click.echo(dumps(answer, indent=2))
    elif form == "csv":
        from kvtally.agent.render.comma_separated import rows_of  # noqa: PLC0415  # only here

        click.echo(rows_of(answer), nl=False)
    else:
        from kvtally.agent.render.cost import cost_table  # noqa: PLC0415  # rich is loaded for a table only

        cost_table(answer)


def dimensions_of(by: str) -> list[str]:
    """The dimensions named; click.UsageError for an unknown one."""
    from kvtally.agent.grouping import DIMENSIONS  # noqa: PLC0415  # as above

    names = [name.strip() for name in by.split(",") if name.strip()]
    for name in names:
        if name not in DIMENSIONS:
            raise click.UsageError(f"--by {name}: choose from {', '.join(DIMENSIONS)}")
    return list(dict.fromkeys(names))


def window_of(extent: tuple[int, int] | None, since: str | None, until: str | None) -> Window | None:
    """The window asked for, from what the ledger spans; None for the default one. click.UsageError if it is none."""
    from kvtally.agent.accounts import Window  # noqa: PLC0415  # as above

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
