"""`kvtally doctor`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import chosen_format, echo_json, format_option, ledger_options, settings

if TYPE_CHECKING:
    from kvtally.agent.doctor import Checked, Kept


@click.command(epilog="\b\nExample:\n  kvtally doctor")
@format_option("table", "json")
@ledger_options
def doctor(form: str | None, ledger: str | None, config_path: str | None) -> None:
    """Look at every target: found or not, which version, what is missing and what to do.

    Exit status 1 if no engine can be metered, or one cannot, or the savings of one would be refused.
    """
    from kvtally.agent.doctor import answer_of, examine
    from kvtally.agent.look import look_around, open_nvml
    from kvtally.agent.sources import Sources

    config, url = settings(config_path, ledger)
    nvml = open_nvml(config)
    sources = Sources(config, nvml)
    try:
        found = look_around(config, nvml)
        sources.take(found)
        pages = set(sources.engines)
        others = [one for one in sources.may_hang if one not in pages]
        others += sources.prompt
        checked = examine(config, sources, found, time.time_ns, others)
    finally:
        sources.close()
    own, kept = _ledger(url, time.time_ns())
    answer = answer_of([*checked, own], kept)
    if chosen_format(form) == "json":
        echo_json(answer)
    else:
        from kvtally.agent.render.listing import doctor_table

        doctor_table(answer)
    is_short = answer["engines_failed"] or answer["engines_without_savings"]
    sys.exit(1 if not answer["metered_engines"] or is_short else 0)


def _ledger(url: str, now_ns: int) -> tuple[Checked, Kept]:
    """The state of the ledger, and what it holds."""
    from contextlib import closing
    from pathlib import Path

    from kvtally.agent.doctor import Checked, Kept
    from kvtally.agent.finding import plural
    from kvtally.agent.ledger.errors import LedgerError
    from kvtally.agent.ledger.place import check_whole, connect, file_of, is_current, writer_of
    from kvtally.agent.ledger.read import LedgerReader

    nothing = Kept("", None)
    try:
        path = file_of(url)
        if not Path(path).exists():
            return Checked("ledger", "no_data", f"{path}: not there yet", (), "`kvtally run` makes it"), nothing
        with closing(connect(path)) as connection:
            check_whole(connection, path)
            if not is_current(connection, path):
                return Checked("ledger", "partial", path, (), "run `kvtally ledger upgrade`"), nothing
        with LedgerReader(url) as reader, reader.snapshot():
            extent, laws = reader.extent(), reader.calibrations()
    except LedgerError as error:
        return Checked("ledger", "failed", str(error), (), error.hint), nothing
    kept = Kept(writer_of(path), extent[1] if extent else None)
    told = [path, f"process {kept.writer} writes it" if kept.writer else "nobody writes it now"]
    told.append("no interval yet" if kept.newest_ns is None else f"newest interval {_age(now_ns - kept.newest_ns)} old")
    told.append(plural(len(laws), "calibration") if laws else "no calibration kept")
    return Checked("ledger", "ok", ", ".join(told)), kept


def _age(age_ns: int) -> str:
    """How long ago something was, in the largest unit that it fills."""
    from kvtally.agent.finding import plural

    seconds = max(0, age_ns) // 10**9
    of = next((one for one in ((86_400, "day"), (3600, "hour"), (60, "minute")) if seconds >= one[0]), (1, "second"))
    return plural(seconds // of[0], of[1])
