"""`kvtally demo`: the first look, from a recording that ships with the package."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

import click

RECORDING = "h100-llama8b.tar.xz"
BY = ("model",)


@click.command(epilog="\b\nExample:\n  kvtally demo")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
    help="How to print.",
)
def demo(form: str) -> None:
    """Replay a recording of a real H100 into a temporary ledger and show what its tokens cost and reuse saved."""
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.cli.cost import show
    from kvtally.agent.cli.replay import into_ledger
    from kvtally.agent.config import Config
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.recording import open_recording
    from kvtally.agent.report import cost_report
    from kvtally.agent.savings_report import savings_report

    recording = open_recording(files("kvtally.agent") / "demo" / RECORDING)
    with tempfile.TemporaryDirectory(prefix="kvtally-demo-") as folder:
        url = f"sqlite:///{Path(folder) / 'demo.db'}"
        done = into_ledger(recording, url, Config())
        with LedgerReader(url) as reader:
            book = book_of(reader, Config())
            report = cost_report(reader, None, BY, book, Payment())
            saved = savings_report(reader, None, BY, book, Payment()).as_json()
    source = {"kind": "RECORDED", "name": recording.name, "provenance": recording.meta.get("provenance")}
    answer = {"source": source, **report.as_json()}
    if form != "table":
        show({**answer, "savings": saved} if form == "json" else answer, BY, form)
        return
    from kvtally.agent.render.recorded import banner, savings_heading, what_next
    from kvtally.agent.render.savings import savings_table

    banner(recording.meta, done.end_ns - done.start_ns, done.start_ns)
    show(answer, BY, form)
    savings_heading()
    savings_table(saved, is_below_cost=True)
    what_next()
