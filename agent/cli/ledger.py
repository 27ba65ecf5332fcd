"""`kvtally ledger …`."""

from __future__ import annotations

import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.group import Group
from kvtally.agent.cli.options import chosen_format, echo_json, format_option, instant_ns, ledger_options, settings
from kvtally.agent.finding import plural, utc_text

if TYPE_CHECKING:
    from collections.abc import Mapping

_DAY_NS = 86_400_000_000_000


@click.group(cls=Group, epilog="\b\nExample:\n  kvtally ledger info")
def ledger() -> None:
    """Look after the ledger."""


@ledger.command(epilog="\b\nExample:\n  kvtally ledger info")
@format_option("table", "json")
@ledger_options
def info(form: str | None, ledger: str | None, config_path: str | None) -> None:
    """Show where the ledger lies, what it holds and how far it reaches."""
    from kvtally.agent.book import book_of
    from kvtally.agent.ledger.columns import HEAD_REVISION
    from kvtally.agent.ledger.read import LedgerReader

    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader, reader.snapshot():
        extent = reader.extent()
        path = Path(reader.path)
        answer = {
            "path": str(path),
            "revision": HEAD_REVISION,
            "bytes": path.stat().st_size,
            "currency": book_of(reader, config).currency or None,
            "start": utc_text(extent[0]) if extent else None,
            "end": utc_text(extent[1]) if extent else None,
            "rows": reader.counts(),
            "targets": [{"kind": one.kind, "name": one.name, **one.attributes} for one in reader.targets().values()],
        }
    if chosen_format(form) == "json":
        echo_json(answer)
        return
    from kvtally.agent.render.listing import ledger_table

    ledger_table(answer)


@ledger.command(epilog="\b\nExample:\n  kvtally ledger upgrade --ledger sqlite:////var/lib/kvtally/ledger.db")
@ledger_options
def upgrade(ledger: str | None, config_path: str | None) -> None:
    """Create the ledger, or bring an older one up to date."""
    from kvtally.agent.book import keep_rates
    from kvtally.agent.ledger.place import connect, file_of, revision_of
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.ledger.upgrade import upgrade as bring_up_to_date

    config, url = settings(config_path, ledger)
    with closing(connect(file_of(url))) as connection:
        is_new = revision_of(connection, file_of(url)) is None
    done = bring_up_to_date(url)
    with LedgerReader(url) as reader:
        keep_rates(reader, config)
        what = "created" if is_new else "upgraded" if done else "was up to date"
        click.echo(f"{reader.path}: {what}", err=True)


@ledger.command(epilog="\b\nExample:\n  kvtally ledger audit")
@format_option("table", "json")
@ledger_options
def audit(form: str | None, ledger: str | None, config_path: str | None) -> None:
    """Check every invariant of the ledger; exit status 1 if one is violated."""
    from kvtally.agent.audit import audit as violated
    from kvtally.agent.book import book_of
    from kvtally.agent.grouping import finding_json
    from kvtally.agent.ledger.read import LedgerReader

    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader:
        findings = violated(reader, book_of(reader, config))
        intervals = sum(rows for table, rows in reader.counts().items() if table.endswith("_interval"))
    if chosen_format(form) == "json":
        echo_json({"intervals": intervals, "findings": [finding_json(one) for one in findings]})
    else:
        for one in findings:
            click.echo(f"{one.severity:<8}{one.kind}: {one.message} [{one.target}]")
        click.echo(f"{intervals:,} intervals checked, findings: {len(findings) or 'none'}")
    sys.exit(1 if findings else 0)


@ledger.command(epilog="\b\nExample:\n  kvtally ledger settle")
@click.option("--again", metavar="TIME", help="Settle the hour of this time again, as a new revision.")
@click.option("--reason", default="settled again by hand", help="Why, for the ledger.")
@click.option("--prune", is_flag=True, help="Then remove raw intervals beyond ledger.retention_days.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@ledger_options
def settle(
    again: str | None, reason: str, prune: bool, quiet: bool, ledger: str | None, config_path: str | None
) -> None:
    """Write the charges of every hour that is over. `kvtally run` does this by itself."""
    from kvtally.agent.accounts import Payment, hour_of
    from kvtally.agent.book import book_of, keep_rates
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.settlement import CLOSED, due_hours, prune_before, settle_hours

    config, url = settings(config_path, ledger)
    payment = Payment(config.rates.term, config.rates.site)
    with LedgerReader(url) as reader:
        keep_rates(reader, config)
        book = book_of(reader, config)
        extent = reader.extent()
        now_ns = time.time_ns()
        if again is None:
            hours, why = due_hours(reader, now_ns), CLOSED
        else:
            hours, why = [hour_of(instant_ns("--again", again, extent[1] if extent else 0))], reason
            if hours[0] not in reader.settled_hours():
                raise click.UsageError(f"--again {again}: the hour from {utc_text(hours[0])} is not settled")
        settle_hours(reader, hours, now_ns, book, payment, reason=why, restates=again is not None)
        removed = prune_before(reader, config.ledger.retention_days * _DAY_NS) if prune else {}
    if not quiet:
        click.echo(f"{plural(len(hours), 'hour')} settled", err=True)
        _tell_removed(removed)


@ledger.command(epilog="\b\nExample:\n  kvtally ledger prune --days 90")
@click.option(
    "--days", type=click.IntRange(min=1), help="Keep this many days of raw intervals. [ledger.retention_days]"
)
@ledger_options
def prune(days: int | None, ledger: str | None, config_path: str | None) -> None:
    """Remove old raw intervals of settled hours; charges and hourly sums stay, and so does a note of what went."""
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.settlement import prune_before

    config, url = settings(config_path, ledger)
    with LedgerReader(url) as reader:
        removed = prune_before(reader, (days or config.ledger.retention_days) * _DAY_NS)
    _tell_removed(removed)
    if not removed:
        click.echo("nothing is that old and settled", err=True)


def _tell_removed(removed: Mapping[str, int]) -> None:
    for table, rows in removed.items():
        click.echo(f"{table}: {plural(rows, 'row')} removed", err=True)
