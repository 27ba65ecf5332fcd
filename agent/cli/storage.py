"""`kvtally storage`."""

from __future__ import annotations

import click

from kvtally.agent.cli.cost import window_of
from kvtally.agent.cli.options import chosen_format, format_option, ledger_options, settings, window_options


@click.command(epilog="\b\nExample: the last hour\n  kvtally storage --since 1h")
@window_options
@format_option("table", "json")
@ledger_options
def storage(
    since: str | None, until: str | None, form: str | None, ledger: str | None, config_path: str | None
) -> None:
    """Show what loading KV took: bytes, seconds and bandwidth, by cache and by mount.

    A mount has two figures: what programs read through it, and what came from the device; the page cache served the
    difference. Without a window: as `kvtally cost`.
    """
    from kvtally.agent.ledger.read import LedgerReader  # noqa: PLC0415  # SQLAlchemy is loaded when a command needs it
    from kvtally.agent.storage_report import storage_report  # noqa: PLC0415  # as above

    _, url = settings(config_path, ledger)
    with LedgerReader(url) as reader, reader.snapshot():
        answer = storage_report(reader, window_of(reader.extent(), since, until))
    if chosen_format(form) == "json":
        from json import dumps  # noqa: PLC0415  # only here

        click.echo(dumps(answer, indent=2))
    else:
        from kvtally.agent.render.storage import storage_table  # noqa: PLC0415  # rich is loaded for a table only

        storage_table(answer)
