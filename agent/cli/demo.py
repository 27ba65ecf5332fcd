"""`kvtally demo`: the first look, from a recording that ships with the package."""

from __future__ import annotations

import tempfile
from importlib.resources import files
from pathlib import Path

import click

RECORDING = "h100-llama8b.tar.xz"


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
    """Replay a recording of a real H100 into a temporary ledger and show what its tokens cost."""
    from kvtally.agent.accounts import Payment  # noqa: PLC0415  # --help needs none of it
    from kvtally.agent.book import book_of  # noqa: PLC0415  # as above
    from kvtally.agent.cli.cost import show  # noqa: PLC0415  # as above
    from kvtally.agent.cli.replay import into_ledger  # noqa: PLC0415  # as above
    from kvtally.agent.config import Config  # noqa: PLC0415  # as above
    from kvtally.agent.ledger.read import LedgerReader  # noqa: PLC0415  # as above
    from kvtally.agent.recording import open_recording  # noqa: PLC0415  # as above
    from kvtally.agent.report import cost_report  # noqa: PLC0415  # as above

    recording = open_recording(files("kvtally.agent") / "demo" / RECORDING)
    with tempfile.TemporaryDirectory(prefix="kvtally-demo-") as folder:
        url = f"sqlite:///{Path(folder) / 'demo.db'}"
        done = into_ledger(recording, url, Config())
        with LedgerReader(url) as reader:
            report = cost_report(reader, None, ["model"], book_of(reader, Config()), Payment())
    source = {"kind": "RECORDED", "name": recording.name, "provenance": recording.meta.get("provenance")}
    answer = {"source": source, **report.as_json()}
    if form != "table":
        show(answer, form)
        return
    from kvtally.agent.render.recorded import banner, what_next  # noqa: PLC0415  # rich is loaded for a table only

    banner(recording.meta, done.end_ns - done.start_ns, done.start_ns)
    show(answer, form)
    what_next()
