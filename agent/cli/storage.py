"""`kvtally storage`."""

from __future__ import annotations

import click

from kvtally.agent.cli.options import (
    chosen_format,
    echo_json,
    format_option,
    ledger_options,
    settings,
    window_of,
    window_options,
)


@click.command(epilog="\b\nExample: the last hour\n  kvtally storage --since 1h")
@window_options
@format_option("table", "json", "csv")
@ledger_options
def storage(
    since: str | None, until: str | None, form: str | None, ledger: str | None, config_path: str | None
) -> None:
    """Show what loading KV took: bytes, seconds and bandwidth, by cache and by mount.

    A mount has two figures: what programs read through it, and what came from the device; the page cache served the
    difference. Without a window: as `kvtally cost`.
    """
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.storage_report import storage_report

    _, url = settings(config_path, ledger)
    with LedgerReader(url) as reader, reader.snapshot():
        answer = storage_report(reader, window_of(reader.extent(), since, until))
    form = chosen_format(form)
    if form == "json":
        echo_json(answer)
    elif form == "csv":
        from kvtally.agent.render.comma_separated import storage_rows_of

        click.echo(storage_rows_of(answer), nl=False)
    else:
        from kvtally.agent.render.storage import storage_table

        storage_table(answer)
