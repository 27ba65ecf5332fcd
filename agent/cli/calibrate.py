"""`kvtally calibrate`."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from kvtally.agent.cli.calibration_keeping import import_file, restate_from, show_list, tell
from kvtally.agent.cli.options import (
    chosen_format,
    echo_json,
    format_option,
    ledger_options,
    settings,
    window_of,
    window_options,
)
from kvtally.agent.cli.request_evidence import requests_option

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.accounts import Window
    from kvtally.agent.calibrating import Extra
    from kvtally.agent.cli.calibration_fit import Kindred
    from kvtally.agent.cli.calibration_probe import Where
    from kvtally.agent.config import Config
    from kvtally.agent.ledger.read import LedgerReader, Target


class Asked(NamedTuple):
    """Evidence that is asked for beyond the ledger's counters."""

    log_path: str | None
    probe: bool
    is_agreed: bool
    replica: str | None
    where: Where


@click.command(
    epilog="\b\nExample: learn anew from the last two hours, and a log of the requests\n"
    "  kvtally calibrate --since 2h --fresh --requests requests.jsonl"
)
@window_options
@requests_option
@click.option("--probe", is_flag=True, help="Send a few cold prompts to the engine while it idles; says so first.")
@click.option("--yes", "is_agreed", is_flag=True, help="Agree to what --probe asks.")
@click.option("--replica", metavar="NAME", help="Whose log or engine it is, where there are several.")
@click.option("--url", metavar="URL", help="Metrics page of the engine to probe. [default: by its replica's name]")
@click.option("--api-url", metavar="URL", help="Where its /v1 lies. [default: beside its metrics page]")
@click.option("--api-key-file", metavar="FILE", help="File that holds the API's key.")
@click.option("--api-key-variable", metavar="NAME", help="Environment variable that holds the API's key.")
@click.option("--fresh", is_flag=True, help="Begin with the packaged prior, not with an earlier calibration.")
@click.option(
    "--import",
    "import_path",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Use calibrations of another ledger, as --format json prints them.",
)
@click.option("--list", "listed", is_flag=True, help="Show those that the ledger holds.")
@click.option("--restate", metavar="TIME", help="Settle the settled hours from TIME on again, by the newest.")
@format_option("table", "json")
@ledger_options
def calibrate(
    since: str | None,
    until: str | None,
    log_path: str | None,
    probe: bool,
    is_agreed: bool,
    replica: str | None,
    url: str | None,
    api_url: str | None,
    api_key_file: str | None,
    api_key_variable: str | None,
    fresh: bool,
    import_path: str | None,
    listed: bool,
    restate: str | None,
    form: str | None,
    ledger: str | None,
    config_path: str | None,
) -> None:
    """Learn how fast these engines are from their own counters, and keep it for the savings.

    `kvtally run` does it by itself. Learns from what came since the newest calibration, the last day at most. Exit
    status 1 where the evidence cannot carry it.
    """
    from kvtally.agent.cli.calibration_probe import Where
    from kvtally.agent.ledger.read import LedgerReader

    _check_alone(import_path, restate, listed=listed)
    if replica is not None and not (log_path or probe):
        raise click.UsageError("--replica says whose log or engine it is: it goes with --requests or --probe")
    asked = Asked(log_path, probe, is_agreed, replica, Where(url, api_url, api_key_file, api_key_variable))
    config, ledger_url = settings(config_path, ledger)
    with LedgerReader(ledger_url) as reader:
        if listed:
            show_list(reader, chosen_format(form))
        elif import_path is not None:
            import_file(reader, import_path, chosen_format(form))
        elif restate is not None:
            restate_from(reader, config, restate)
        else:
            window = window_of(reader.extent(), since, until)
            sys.exit(_fit(reader, config, window, asked, chosen_format(form), fresh=fresh))


def _check_alone(import_path: str | None, restate: str | None, *, listed: bool) -> None:
    """click.UsageError where an option that learns nothing stands beside another one."""
    from click.core import ParameterSource

    context = click.get_current_context()
    modes = {"--list": listed, "--import": import_path is not None, "--restate": restate is not None}
    asked = [name for name, is_asked in modes.items() if is_asked]
    common = {"form", "ledger", "config_path", "listed", "import_path", "restate"}
    beside = [
        option.opts[-1]
        for option in context.command.params
        if option.name not in common and context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
    ]
    if asked and (len(asked) > 1 or beside):
        raise click.UsageError(f"{asked[0]} stands alone, without {(*asked[1:], *beside)[0]}")


def _fit(reader: LedgerReader, config: Config, window: Window | None, asked: Asked, form: str, *, fresh: bool) -> int:
    """Learn, keep and show: the exit status."""
    from kvtally.agent.cli.calibration_fit import evidence_for, learned_from, told
    from kvtally.agent.kin import known_laws

    targets = reader.targets()
    stored = known_laws(reader.calibrations(), targets)
    priors = [] if fresh else stored
    kinds = evidence_for(reader, targets, priors, window)
    kinds, extra = _beyond(reader, config, targets, kinds, asked)
    numbers = {one.id for one in stored}
    laws: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for one in kinds:
        found = learned_from(one, priors, extra)
        if found.calibration is None:
            fingerprint = found.fingerprint.text() if found.fingerprint else None
            reasons = [str(reason) for reason in found.reasons]
            refused.append({"fingerprint": fingerprint, "replicas": list(found.replicas), "reasons": reasons})
            continue
        number = reader.add_calibration(found.calibration, time.time_ns(), _why(asked))
        entry = {"id": number, "is_new": number not in numbers, "replicas": list(found.replicas)}
        laws.append(entry | told(one, found.calibration, priors))
    answer = {"ledger": reader.path, "calibrations": laws, "refused": refused}
    if form == "json":
        echo_json(answer)
    else:
        from kvtally.agent.render.calibration import calibration_table

        calibration_table(answer)
    return 1 if refused or not laws else 0


def _why(asked: Asked) -> str:
    with_what = [
        name for name, is_there in (("a log of requests", asked.log_path), ("probes", asked.probe)) if is_there
    ]
    return f"calibrated by hand with {' and '.join(with_what)}" if with_what else "calibrated by hand"


def _beyond(
    reader: LedgerReader, config: Config, targets: Mapping[int, Target], kinds: list[Kindred], asked: Asked
) -> tuple[list[Kindred], dict[str, Extra]]:
    """Evidence beyond the counters, and the kinds of replica that it is about: all where none is asked for."""
    from kvtally.agent.calibrating import NOTHING_EXTRA
    from kvtally.agent.cli.calibration_probe import named_by, probed
    from kvtally.agent.cli.request_evidence import log_of, replica_named

    if not kinds or not (asked.log_path or asked.probe):
        return kinds, {}
    kins = [one.kin for one in kinds]
    wanted = asked.replica
    if wanted is None and asked.where.url is not None:
        wanted = named_by(asked.where.url, kins, config)
    name = replica_named(kins, wanted, "--requests" if asked.log_path else "--probe")
    own = [one for one in kinds if name in {subject.name for subject in one.kin.subjects}]
    able = [one for one in own if one.kin.machine is not None and one.reason is None]
    if name is None or not able:
        return own, {}
    newest, extra = able[-1], NOTHING_EXTRA
    if asked.log_path is not None:
        log = log_of(asked.log_path, reader, newest.span_ns, targets, name)
        if log is not None:
            extra = log.extra
            if log.misfit:
                raise click.UsageError(f"--requests {log}. Nothing is learned from it")
            if not log.is_whole:
                tell(f"{log}: it tells of those that ran alone, and not of all")
    if asked.probe:
        probes = probed(newest.kin, name, asked.where, config, is_agreed=asked.is_agreed)
        extra = extra._replace(probes=(*extra.probes, *probes), rung=max(extra.rung, "M4"))
    return own, {name: extra}
