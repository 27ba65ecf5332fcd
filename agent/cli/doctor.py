"""`kvtally doctor`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import chosen_format, echo_json, format_option, ledger_options, settings

if TYPE_CHECKING:
    from kvtally.agent.doctor import Checked


@click.command(epilog="\b\nExample:\n  kvtally doctor")
@format_option("table", "json")
@ledger_options
def doctor(form: str | None, ledger: str | None, config_path: str | None) -> None:
    """Look at every target: found or not, which version, what is missing and what to do.

    Exit status 1 if no engine can be metered, or the savings of one would be refused.
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
    answer = answer_of([*checked, _ledger(url)])
    if chosen_format(form) == "json":
        echo_json(answer)
    else:
        from kvtally.agent.render.listing import doctor_table

        doctor_table(answer)
    sys.exit(1 if not answer["metered_engines"] or answer["engines_without_savings"] else 0)


def _ledger(url: str) -> Checked:
    from contextlib import closing
    from pathlib import Path

    from kvtally.agent.doctor import Checked
    from kvtally.agent.ledger.errors import LedgerError
    from kvtally.agent.ledger.place import connect, file_of, is_current

    try:
        path = file_of(url)
        if not Path(path).exists():
            return Checked("ledger", "no_data", f"{path}: not there yet", (), "`kvtally run` makes it")
        with closing(connect(path)) as connection:
            current = is_current(connection, path)
    except LedgerError as error:
        return Checked("ledger", "failed", str(error), (), error.hint)
    return Checked(
        "ledger", "ok" if current else "partial", path, (), "" if current else "run `kvtally ledger upgrade`"
    )
