"""`kvtally run`."""

from __future__ import annotations

import os

import click

from kvtally.agent.cli.options import ledger_options


@click.command(epilog="\b\nExample: beside an engine, with nothing configured\n  kvtally run")
@click.option("--once", is_flag=True, help="Close one interval and exit.")
@click.option(
    "--interval", "interval", type=float, metavar="SECONDS", help="Scrape this often (1 to 300). [default: 5]"
)
@ledger_options
def run(once: bool, interval: float | None, ledger: str | None, config_path: str | None) -> None:
    """Find engines, GPUs and disks on this host, scrape them, and keep the ledger.

    Stops on SIGTERM. A kill -9 loses nothing: the next run goes on from the last counters in the ledger.
    """
    from kvtally.agent.config import ledger_url, load  # noqa: PLC0415  # --help needs none of it
    from kvtally.agent.daemon import Daemon  # noqa: PLC0415  # as above
    from kvtally.agent.log import Log  # noqa: PLC0415  # as above

    environment = dict(os.environ)
    if interval is not None:
        environment["KVTALLY_SCRAPE__INTERVAL_SECONDS"] = f"{interval:g}"
    config = load(config_path, environment)
    url = ledger_url(ledger, config, environment)
    log = Log(config.log.format, config.log.level)
    Daemon(config, url, log, config_path).run(once=once)
