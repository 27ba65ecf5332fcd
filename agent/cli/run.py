"""`kvtally run`."""

from __future__ import annotations

import os
import sys

import click

from kvtally.agent.cli.options import environment_with, interval_option, ledger_options


@click.command(epilog="\b\nExample: beside an engine, with nothing configured\n  kvtally run")
@click.option("--once", is_flag=True, help="Close one interval and exit.")
@interval_option
@ledger_options
def run(once: bool, interval: float | None, ledger: str | None, config_path: str | None) -> None:
    """Find engines, GPUs and disks on this host, scrape them, and keep the ledger.

    Stops on SIGTERM. A kill -9 loses nothing: the next run goes on from the last counters in the ledger.
    """
    from kvtally.agent.config import ledger_url, load

    environment = environment_with(interval)
    # read here, so that a mistake is told before anything starts
    url = ledger_url(ledger, load(config_path, environment), environment)
    # glibc keeps large pages and a heap for each thread for good, unless it is told otherwise
    environment = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20), **environment}
    # the same process goes on without this command line: the daemon stays a fifth smaller
    program = [sys.executable, "-m", "kvtally.agent.sidecar", url, config_path or "", "once" if once else ""]
    os.execve(sys.executable, program, environment)  # noqa: S606  # our own interpreter, no shell
