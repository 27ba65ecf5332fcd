"""`kvtally export page` and `kvtally export otlp`: what `kvtally run` calls for its exporters, and cron may too."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import ledger_options, settings

if TYPE_CHECKING:
    from kvtally.agent.config import Config
    from kvtally.agent.export.figures import Snapshot

_NANO = 10**9


@click.command(epilog="\b\nExample: into a file for node_exporter's textfile collector\n  kvtally export page --text")
@click.option("--text", is_flag=True, help="Print the page alone, in Prometheus' text format.")
@ledger_options
def page(*, text: bool, ledger: str | None, config_path: str | None) -> None:
    """Print the figures of /metrics, as they are now in the ledger."""
    from kvtally.agent.export.prometheus import openmetrics_page, text_page  # noqa: PLC0415  # as for every command

    config, url = settings(config_path, ledger)
    taken = _snapshot(config, url)
    if text:
        click.echo(text_page(taken), nl=False)
        return
    import time  # noqa: PLC0415  # only here

    from kvtally.agent.metrics_server import Figures, packed  # noqa: PLC0415  # as above

    click.echo(packed(Figures(time.time_ns(), text_page(taken), openmetrics_page(taken))), nl=False)


@click.command(epilog="\b\nExample: once, to the backend that OTEL_EXPORTER_OTLP_ENDPOINT names\n  kvtally export otlp")
@ledger_options
def otlp(ledger: str | None, config_path: str | None) -> None:
    """Push the ledger's figures to an OpenTelemetry backend, once.

    The OTEL_* environment variables say where to and how. Exit status 3 if the backend does not take them.
    """
    from kvtally.agent.export.otlp import ExporterMissing, exporter_of, push_snapshot  # noqa: PLC0415  # as above

    config, url = settings(config_path, ledger)
    if config.export.otlp.endpoint and not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = config.export.otlp.endpoint
    taken = _snapshot(config, url)
    if taken is None:
        click.echo("the ledger holds no interval yet", err=True)
        return
    try:
        sent = push_snapshot(exporter_of(), taken, url)
    except ExporterMissing as error:
        raise click.ClickException(str(error)) from error
    if not sent.ok:
        click.echo(f"the backend did not take them: {sent.reason}", err=True)
        sys.exit(3)
    click.echo(f"{sent.points} points sent", err=True)


def _snapshot(config: Config, url: str) -> Snapshot | None:
    from kvtally.agent.accounts import Payment  # noqa: PLC0415  # SQLAlchemy is loaded when a command needs it
    from kvtally.agent.book import book_of  # noqa: PLC0415  # as above
    from kvtally.agent.export.figures import snapshot  # noqa: PLC0415  # as above
    from kvtally.agent.ledger.read import LedgerReader  # noqa: PLC0415  # as above

    windows = {name: round(window_seconds(name) * _NANO) for name in config.export.windows}
    with LedgerReader(url) as reader, reader.snapshot():
        book = book_of(reader, config)
        payment = Payment(config.rates.term, config.rates.site)
        return snapshot(reader, book, payment, windows, opencost=config.export.opencost)


def window_seconds(text: str) -> float:
    """Seconds of a length of time such as 90m."""
    return float(text[:-1]) * {"m": 60, "h": 3600, "d": 86400}[text[-1]]
