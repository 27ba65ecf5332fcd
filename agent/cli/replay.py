"""`kvtally replay`, and what `demo` shares with it."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import Seconds, ledger_options, settings
from kvtally.agent.finding import plural, utc_text

if TYPE_CHECKING:
    from kvtally.agent.config import Config
    from kvtally.agent.recording import Recording
    from kvtally.agent.replay import Replayed


@click.command(
    epilog="\b\nExample:\n  kvtally replay h100.tar.xz --ledger sqlite:///h100.db\n  kvtally savings --ledger sqlite:///h100.db"
)
@click.argument("recording", metavar="DIR|FILE.tar.xz")
@click.option(
    "--interval",
    type=Seconds(min=0, max=86400),
    default=0.0,
    metavar="SECONDS",
    help="Join scrapes to intervals of at least this length.",
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@ledger_options
def replay(recording: str, interval: float, quiet: bool, ledger: str | None, config_path: str | None) -> None:
    """Feed a recording into a ledger, on the recording's own clock.

    An [[engine]] of the config with the recording's name says what the recording does not, such as model_config; its
    url is not asked. What the ledger holds already stays as it was told: use a new one.
    """
    from kvtally.agent.recording import open_recording

    config, url = settings(config_path, ledger)
    opened = open_recording(recording)
    done = into_ledger(opened, url, config, interval_seconds=interval, progress=not quiet and sys.stderr.isatty())
    click.echo(
        f"{opened.name}: {plural(done.pages, 'page')}, {plural(done.intervals, 'interval')}, "
        f"{utc_text(done.start_ns)} to {utc_text(done.end_ns)}",
        err=True,
    )
    if done.skipped:
        click.echo(f"{plural(done.skipped, 'scrape')} left out: in the ledger already", err=True)
    for name in opened.missing:
        if name != "lmcache" or opened.meta.get("lmcache_version"):
            click.echo(f"the recording has no {name}: {LACKING.get(name, 'what it would tell is unknown')}", err=True)
    if done.unread:
        click.echo(f"{plural(done.unread, 'page')} beside the engine's with nothing that kvtally reads", err=True)
    for note in opened.notes:
        click.echo(note, err=True)
    for finding in done.findings:
        if finding.severity != "info":
            click.echo(f"{finding.severity}: {finding.message} [{finding.target}]", err=True)
    where = f" --ledger {ledger}" if ledger else ""
    click.echo(f"next: kvtally cost{where}\n      kvtally savings{where}", err=True)


LACKING = {
    "gpu.jsonl": "no GPU seconds, so input and output have no price of their own",
    "host.jsonl": "no CPU seconds and no disk bytes",
    "scrapes.jsonl": "scrapes that failed are not known",
    "lmcache": "no page of an LMCache server of its own",
}


def into_ledger(
    recording: Recording, url: str, config: Config, *, interval_seconds: float = 0.0, progress: bool = False
) -> Replayed:
    """Replay into the ledger at `url`, made if it is not there, and settle its closed hours."""
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of, keep_rates
    from kvtally.agent.ledger.append import LedgerWriter
    from kvtally.agent.ledger.place import WriterLock, connect, file_of
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.ledger.upgrade import upgrade
    from kvtally.agent.replay import Replay
    from kvtally.agent.settlement import due_hours, settle_hours

    upgrade(url)
    path = file_of(url)
    with WriterLock(path):
        with LedgerReader(url) as reader:
            keep_rates(reader, config)
        with closing(LedgerWriter(connect(path), path)) as writer:
            engine = next((one for one in config.engines if one.name == recording.name), None)
            task = Replay(recording, writer, interval_ns=round(interval_seconds * 1e9), engine=engine)
            if progress:
                from kvtally.agent.render.recorded import progress_of

                done = progress_of(recording.name, task.run)
            else:
                done = task.run()
        with LedgerReader(url) as reader:
            book = book_of(reader, config)
            payment = Payment(config.rates.term, config.rates.site)
            settle_hours(reader, due_hours(reader, done.end_ns), done.end_ns, book, payment)
    return done
