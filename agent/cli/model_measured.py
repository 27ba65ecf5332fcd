"""`kvtally model --measured`: what an engine and its clients saw, beside what a law says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.cli.request_evidence import requests_of
from kvtally.agent.model_report.measured import client_seconds, measured_rows, points_of
from kvtally.agent.steplaw.alone import at_client, at_engine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.calibration import Calibration
    from kvtally.agent.forward import LawRange
    from kvtally.agent.model_report.deployment import Deployment
    from kvtally.agent.model_report.measured import Point
    from kvtally.agent.steplaw.alone import Alone


def measured_beside(
    deployment: Deployment, laws: LawRange, path: str | None, law: Calibration | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """What the engine measured and, with a log of theirs at `path`, its clients; and what to know of it, in words.

    `law` is the calibration behind the laws, if one is.
    """
    stalls = deployment.loading() != "asynchronous"
    seen = [at_engine(deployment.machine, one.series, *deployment.window_ns) for one in deployment.subjects]
    points = points_of("engine", (one for each in seen for one in each.requests), laws, stalls=stalls)
    together = sum(each.together for each in seen)
    findings = []
    if path is not None:
        points += points_of("client", _at_client(path, deployment), laws, stalls=stalls)
        findings.append(_beyond(points))
    elif together and points:
        findings.append(
            f"{together} more requests ran one at a time, but several between two scrapes: --requests FILE tells "
            "which of them reused what"
        )
    if points and law is not None and _is_learned_from(law, deployment):
        findings.append(
            "the law has learned from requests of this span, those that ran alone among them: the errors are what its "
            "fit leaves, not those of a forecast (--calibration N: by an earlier one)"
        )
    if not points:
        findings.append(
            "no request had the engine for itself between two scrapes, so nothing is measured: --requests FILE"
        )
    return measured_rows(points), findings


def _is_learned_from(law: Calibration, deployment: Deployment) -> bool:
    """Whether the law's evidence overlaps the window."""
    start_ns, end_ns = deployment.seen_ns
    return law.evidence.start_ns < end_ns and law.evidence.end_ns > start_ns


def _at_client(path: str, deployment: Deployment) -> list[Alone]:
    """Requests of a log that ran alone."""
    if len(deployment.names) > 1:
        raise click.UsageError(
            f"--requests is of one replica, here are {', '.join(deployment.names)}: add --replica NAME"
        )
    requests = requests_of(path, deployment.window_ns)
    found = [
        one
        for subject in deployment.subjects
        for one in at_client(deployment.machine, subject.series, *deployment.window_ns, requests)
    ]
    if not found:
        text = "no request of the log, with cached tokens and a time to first token, ran alone in the window"
        raise click.UsageError(
            f"--requests {path}: {text}: is its time UTC or has a zone, and does it hold all of them?"
        )
    return found


def _beyond(points: Sequence[Point]) -> str:
    return (
        f"at a client a first token takes {client_seconds(points):.3g} s more than the law says (median): tokenising, "
        "HTTP and the way there and back, which are not the engine's; what reuse saves is free of it"
    )
