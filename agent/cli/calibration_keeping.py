"""What `kvtally calibrate` does with calibrations that are there: list, import, and settle again by them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from kvtally.agent.cli.options import echo_json, instant_ns
from kvtally.agent.finding import plural, utc_text

if TYPE_CHECKING:
    from kvtally.agent.config import Config
    from kvtally.agent.ledger.read import LedgerReader


def show_list(reader: LedgerReader, form: str) -> None:
    """Print every calibration of the ledger."""
    answer = {
        "calibrations": [
            {
                "id": one.id,
                "made_at": utc_text(one.made_at_ns),
                "reason": one.reason,
                "text": one.calibration.fingerprint.text(),
                "window": {
                    "start": utc_text(one.calibration.evidence.start_ns),
                    "end": utc_text(one.calibration.evidence.end_ns),
                },
                **one.calibration.as_json(),
            }
            for one in reader.calibrations()
        ],
        "unreadable": reader.unreadable_calibrations(),
    }
    if form == "json":
        echo_json(answer)
        return
    from kvtally.agent.render.calibration import calibrations_table

    calibrations_table(answer)


def import_file(reader: LedgerReader, path: str, form: str) -> None:
    """Keep the calibrations of a file, and print their numbers. click.UsageError where it holds none."""
    from kvtally.agent.cli.calibration_file import read_calibrations
    from kvtally.agent.ledger.read import replica_of
    from kvtally.agent.observed import fingerprint_of

    calibrations = read_calibrations(path)
    engines = [target for target in reader.targets().values() if target.kind == "engine"]
    here = {fingerprint_of(replica_of(target)) for target in engines}
    stored = {one.id for one in reader.calibrations()}
    imported = []
    for one in calibrations:
        number = reader.add_calibration(one, time.time_ns(), "imported")
        about = {"is_new": number not in stored, "fits": one.fingerprint.completed(here) in here}
        imported.append({"id": number, "text": one.fingerprint.text(), "rung": one.rung, **about})
    if form == "json":
        echo_json({"ledger": reader.path, "imported": imported})
        return
    from kvtally.agent.render.calibration import imported_lines

    imported_lines(imported)


def restate_from(reader: LedgerReader, config: Config, text: str) -> None:
    """Settle settled hours again by the newest laws; those whose raw intervals have left stay as they are."""
    from kvtally.agent.accounts import Payment, hour_of
    from kvtally.agent.book import book_of, keep_rates
    from kvtally.agent.settlement import settle_hours

    extent = reader.extent()
    from_ns = hour_of(instant_ns("--restate", text, extent[1] if extent else 0))
    whole_from = reader.whole_hours_from()
    hours = [hour for hour in reader.settled_hours() if hour >= from_ns]
    kept = [hour for hour in hours if whole_from is not None and hour >= whole_from]
    if extent is not None and kept:
        keep_rates(reader, config)
        payment = Payment(config.rates.term, config.rates.site)
        why = "restated by the newest calibration"
        settle_hours(reader, kept, extent[1], book_of(reader, config), payment, reason=why, restates=True)
    tell(f"{plural(len(kept), 'hour')} settled again by the newest calibration")
    if len(hours) > len(kept):
        tell(f"{len(hours) - len(kept)} more stay as they are: their raw intervals have left")


def tell(text: str) -> None:
    """Say something beside the answer."""
    click.echo(text, err=True)
