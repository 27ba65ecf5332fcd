"""`kvtally savings`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.cli.named import fits_nothing, laws_by
from kvtally.agent.cli.options import (
    by_option,
    chosen_format,
    dimensions_of,
    echo_json,
    format_option,
    ledger_options,
    settings,
    window_of,
    window_options,
)
from kvtally.agent.cli.request_evidence import requests_option

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.accounts import Window
    from kvtally.agent.cli.request_evidence import Log
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.savings_report import SavingsReport
    from kvtally.agent.valuing import Laws


@click.command(
    epilog="\b\nExample: what reuse saved in the last day, by model\n  kvtally savings --since 24h --by model"
)
@by_option
@window_options
@click.option(
    "--calibration",
    type=click.IntRange(min=1),
    metavar="N",
    help="Value all of it by this one (`kvtally calibrate --list`), settled hours too.",
)
@requests_option
@click.option("--replica", metavar="NAME", help="Whose log --requests is, where the window holds several.")
@click.option("--explain", is_flag=True, help="Follow the figures down to the counters, line by line.")
@format_option("table", "json", "csv")
@ledger_options
def savings(
    by: str,
    since: str | None,
    until: str | None,
    calibration: int | None,
    log_path: str | None,
    replica: str | None,
    explain: bool,
    form: str | None,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Show what KV reuse saved per tier: gross, net and realised, with 90 % intervals.

    Settled hours are told as they were settled, unless --calibration or --requests ask for them to be valued anew.
    Without a window: the whole ledger if it spans less than a day, else the day before its newest interval.
    """
    from kvtally.agent.accounts import Payment
    from kvtally.agent.book import book_of
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.savings_report import savings_report

    if replica is not None and log_path is None:
        raise click.UsageError("--replica says whose log it is: it goes with --requests")
    if explain and form == "csv":
        raise click.UsageError("--explain is a page or JSON: no CSV holds it")
    dimensions = dimensions_of(by)
    config, url = settings(config_path, ledger)
    payment = Payment(config.rates.term, config.rates.site)
    with LedgerReader(url) as reader, reader.snapshot():
        window = window_of(reader.extent(), since, until)
        targets = reader.targets()
        log = None if log_path is None else _log(reader, window, targets, log_path, replica)
        laws = _laws(reader, targets, calibration, log)
        report = savings_report(reader, window, dimensions, book_of(reader, config), payment, laws=laws)
        _check_used(report, calibration)
        answer = report.as_json()
        if log is not None:
            answer["method"]["requests"] = log.as_json()
        if explain:
            from kvtally.agent.explain import explained

            answer["explanations"] = explained(reader, report, laws)
    show(answer, dimensions, chosen_format(form))


def _log(
    reader: LedgerReader, window: Window | None, targets: Mapping[int, Target], path: str, replica: str | None
) -> Log | None:
    """The log that --requests names, None where it does not fit; click.UsageError where it lacks too many requests."""
    from kvtally.agent.cli.request_evidence import log_of
    from kvtally.agent.grouping import default_window

    extent = reader.extent()
    if extent is None:
        return None
    start_ns, end_ns = window or default_window(extent)
    span_ns = (max(start_ns, extent[0]), min(end_ns, extent[1]))
    log = log_of(path, reader, span_ns, targets, replica) if span_ns[0] < span_ns[1] else None
    if log is not None and log.misfit:
        click.echo(f"--requests {log}. It is left out: the figures are those of the counters alone", err=True)
        return None
    if log is not None and not log.is_whole:
        raise click.UsageError(f"--requests {log}: it takes nine tenths of them")
    return log


def _laws(reader: LedgerReader, targets: Mapping[int, Target], calibration: int | None, log: Log | None) -> Laws | None:
    """The laws to value by; None for those that the settled hours name."""
    if calibration is None and log is None:
        return None
    return laws_by(reader, targets, calibration, {} if log is None else {log.replica: log.extra})


def _check_used(report: SavingsReport, calibration: int | None) -> None:
    """click.UsageError where the calibration that was asked for fits nothing that the report is about."""
    used = {value.calibration.id for group in report.groups for value in group.values if value.calibration is not None}
    if calibration is not None and report.groups and calibration not in used:
        raise fits_nothing(calibration)


def show(answer: dict[str, Any], by: Sequence[str], form: str) -> None:
    """Print a savings report by these dimensions."""
    if form == "json":
        echo_json(answer)
    elif form == "csv":
        from kvtally.agent.render.comma_separated import savings_rows_of

        click.echo(savings_rows_of(answer, by), nl=False)
    else:
        from kvtally.agent.render.savings import savings_table

        savings_table(answer)
        if "explanations" in answer:
            click.echo()
            from kvtally.agent.render.explain import explain_table

            explain_table(answer["explanations"])
