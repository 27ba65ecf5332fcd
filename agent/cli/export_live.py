"""`kvtally export page` and `kvtally export otlp`: what `kvtally run` calls for its exporters, and cron may too."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import ledger_options, length_ns, settings
from kvtally.agent.finding import plural

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.config import Config
    from kvtally.agent.export.figures import Snapshot


@click.command(
    epilog="\b\nExample: into a file for node_exporter's textfile collector\n  kvtally export page > kvtally.prom"
)
@click.option("--packed", is_flag=True, hidden=True, help="Both formats with their instant, as `run` takes them.")
@ledger_options
def page(*, packed: bool, ledger: str | None, config_path: str | None) -> None:
    """Print the figures of /metrics in Prometheus' text format, as they are now in the ledger."""
    from kvtally.agent.export.prometheus import openmetrics_page, text_page

    config, url = settings(config_path, ledger)
    taken = _snapshot(config, url)
    if not packed:
        click.echo(text_page(taken), nl=False)
        return
    import time

    from kvtally.agent import metrics_server

    figures = metrics_server.Figures(time.time_ns(), text_page(taken), openmetrics_page(taken))
    click.echo(metrics_server.packed(figures), nl=False)


@click.command(epilog="\b\nExample: once, to the backend that OTEL_EXPORTER_OTLP_ENDPOINT names\n  kvtally export otlp")
@ledger_options
def otlp(ledger: str | None, config_path: str | None) -> None:
    """Push the ledger's figures to an OpenTelemetry backend, once.

    The OTEL_* environment variables say where to and how. Exit status 3 if the backend does not take them, or not all.
    """
    from kvtally.agent.export.otlp import push_snapshot
    from kvtally.agent.export.otlp_environment import endpoint_fault, grpc_hint, otlp_faults, otlp_interval
    from kvtally.agent.export.otlp_exporter import ExporterMissing, exporter_of
    from kvtally.agent.failure import UNREACHABLE

    config, url = settings(config_path, ledger)
    if otlp_interval(config, os.environ) is None:
        raise click.UsageError(
            "nothing is pushed: set OTEL_EXPORTER_OTLP_ENDPOINT or export.otlp.endpoint, and neither OTEL_SDK_DISABLED"
            " nor another OTEL_METRICS_EXPORTER than otlp"
        )
    if fault := endpoint_fault(config, os.environ):
        raise click.ClickException(fault)
    taken = _snapshot(config, url)
    if taken is None:
        click.echo("the ledger holds no interval yet", err=True)
        return
    try:
        with _endpoint(config.export.otlp.endpoint):
            exporter = exporter_of()
            for fault in otlp_faults(config, os.environ):
                click.echo(fault, err=True)
            sent = push_snapshot(exporter, taken, url)
    except ExporterMissing as error:
        raise click.ClickException(str(error)) from error
    if not sent.ok:
        hint = grpc_hint(config, os.environ)
        click.echo(f"the backend did not take them: {sent.reason}{hint and f' ({hint})'}", err=True)
        sys.exit(UNREACHABLE)
    if sent.rejected:
        words = f"the backend rejected {sent.rejected} of {plural(sent.points, 'point')}"
        click.echo(f"{words}: {sent.message or 'it gave no reason'}", err=True)
        sys.exit(UNREACHABLE)
    beside = f"; the backend says: {sent.message}" if sent.message else ""
    click.echo(f"{plural(sent.points, 'point')} sent{beside}", err=True)


@contextmanager
def _endpoint(given: str) -> Iterator[None]:
    """The config's endpoint as the SDK takes it, where the environment names none."""
    before = os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not given or before:
        yield
        return
    os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = given
    try:
        yield
    finally:
        del os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"]
        if before is not None:
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = before


def _snapshot(config: Config, url: str) -> Snapshot | None:
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.export.figures import snapshot
    from kvtally.agent.ledger.read import LedgerReader

    windows = {name: length for name in config.export.windows if (length := length_ns(name))}
    with LedgerReader(url) as reader, reader.snapshot():
        book = book_of(reader, config)
        payment = Payment(config.rates.term, config.rates.site)
        return snapshot(reader, book, payment, windows, opencost=config.export.opencost)
