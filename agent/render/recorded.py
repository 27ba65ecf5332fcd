"""Recordings on a terminal: where a demo's figures come from, and how far a replay is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from kvtally.agent.finding import utc_text
from kvtally.agent.render.screen import Screen, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Done = TypeVar("Done")
_PAGES_PER_UPDATE = 50


def banner(meta: Mapping[str, Any], length_ns: int, start_ns: int) -> None:
    """Say at the top of the demo that nothing here is live: GPU, engine, day and seconds of the recording."""
    meta = printable(dict(meta))
    gpus = ", ".join(str(gpu.get("name", gpu.get("uuid"))) for gpu in meta.get("gpus") or []) or "no GPU"
    engine = f"{meta.get('engine', 'engine')} {meta.get('engine_version', '')}".strip()
    about = f"{gpus}, {engine}, {utc_text(start_ns)[:10]}, {length_ns / 1e9:.0f} s"
    Screen().say(Text("RECORDED", style="bold black on yellow"), f" on {about}. Not live.")


def savings_heading() -> None:
    """Say once more, above the savings, that nothing here is live."""
    screen = Screen()
    screen.print()
    screen.say(Text("RECORDED", style="bold black on yellow"), " What KV reuse saved in it:")


def what_next() -> None:
    """What to type after the demo."""
    screen = Screen()
    screen.print()
    screen.say("These figures were ", Text("RECORDED", style="bold"), ". Your own, beside a running vLLM:")
    for command, why in (
        ("kvtally doctor", "what is found here"),
        ("kvtally run &", "keeps the ledger"),
        ("kvtally cost", "what a million of your tokens costs"),
        ("kvtally savings", "what KV reuse saves you, and which tier"),
        ("kvtally rates add --help", "your own price in place of the ASSUMED one"),
    ):
        screen.say(f"  {command:<26}", Text(f"# {why}", style="dim"))


def progress_of(name: str, task: Callable[[Callable[[int], None]], Done]) -> Done:
    """Run a replay with a line on stderr that moves."""
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=Screen(stderr=True), transient=True) as progress:
        bar = progress.add_task(name)
        seen = 0

        def show(at_ns: int) -> None:
            nonlocal seen
            seen += 1
            if not seen % _PAGES_PER_UPDATE:
                progress.update(bar, description=f"{name}: {seen:,} pages, at {utc_text(at_ns)}")

        return task(show)
