"""Calibrations in a file (`--import FILE`), as `kvtally calibrate` prints them in JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import click

from kvtally.agent.words import RUNGS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.calibration import Calibration

BYTES_MAX = 16 << 20
_TEXTS = ("model", "architecture", "weight_dtype", "kv_dtype", "sku", "version", "sizes")
_KINDS = {**dict.fromkeys(_TEXTS, (str, "text")), "is_eager": (bool, "boolean")}
_COUNTS = ("gpus", "token_budget")
_EVIDENCE_COUNTS = ("start_ns", "end_ns", "windows", "singles", "saturated", "probes", "requests", "steps")
_SYMMETRIC = 1e-6  # relative: figures are printed with nine digits


def read_calibrations(path: str) -> list[Calibration]:
    """The calibrations of a file: one, or those of an answer of `kvtally calibrate`. click.UsageError names faults."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123  # one read
            body = json.loads(file.read(BYTES_MAX + 1)[:BYTES_MAX])
    except (ValueError, RecursionError):
        raise click.UsageError(
            f"--import {path}: is not JSON, as `kvtally calibrate --format json` prints it"
        ) from None
    found = body.get("calibrations", [body]) if isinstance(body, dict) else body
    if not isinstance(found, list) or not found:
        raise click.UsageError(f"--import {path}: holds no calibration")
    return [_checked(path, number, one) for number, one in enumerate(found, 1)]


def _checked(path: str, number: int, body: Any) -> Calibration:
    from kvtally.agent.calibration import calibration_of

    try:
        calibration = calibration_of(body)
        fault = next(_faults(calibration), "")
    except KeyError as error:
        fault = f"it has no {error.args[0]}"
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        fault = str(error)
    if fault:
        raise click.UsageError(f"--import {path}: calibration {number} cannot be used: {' '.join(fault.split())}")
    # the number of its prior is another ledger's
    return calibration if calibration.prior == "packaged" else calibration._replace(prior="imported")


def _faults(calibration: Calibration) -> Iterator[str]:
    """What is wrong with a calibration that has every part."""
    about, evidence = calibration.fingerprint._asdict(), calibration.evidence._asdict()
    for name, (kind, called) in _KINDS.items():
        if not isinstance(about[name], kind):
            yield f"its {name} is no {called}"
    for name, value in [
        *((name, about[name]) for name in _COUNTS),
        *((one, evidence[one]) for one in _EVIDENCE_COUNTS),
    ]:
        if type(value) is not int or not 0 <= value < 2**63:
            yield f"its {name} is no count"
    if calibration.rung not in RUNGS:
        yield f"its rung {calibration.rung} is none of {', '.join(RUNGS)}"
    if not isinstance(evidence["source"], str) or not all(isinstance(note, str) for note in evidence["notes"]):
        yield "its evidence is no evidence"
    if not all(math.isfinite(value) and value > 0 for value in (*calibration.medians, calibration.clock)):
        yield "a median or its clock is not above 0"
    numbers = [value for row in calibration.covariance for value in row]
    known = [evidence[name] for name in ("worked_ratio", "single_error") if evidence[name] is not None]
    if not all(math.isfinite(value) for value in (*numbers, *known, evidence["occupied_seconds"])):
        yield "a number of it is not finite"
    if not calibration.clock_weight_seconds >= 0:
        yield "its clock's weight is below 0"
    yield from _skewed(calibration.covariance)
    yield from _unbelievable(calibration)


def _unbelievable(calibration: Calibration) -> Iterator[str]:
    """Parameters that a fit would be refused for."""
    from kvtally.agent.steplaw.fit import beyond_belief

    if calibration.fingerprint.gpus and (names := beyond_belief(calibration.medians)):
        yield f"its {', '.join(names)} cannot be"


def _skewed(covariance: tuple[tuple[float, ...], ...]) -> Iterator[str]:
    """Whether a matrix cannot be a covariance."""
    for at, row in enumerate(covariance):
        for beside, value in enumerate(row):
            most = math.sqrt(max(row[at], 0.0) * max(covariance[beside][beside], 0.0))
            if (
                row[at] <= 0
                or abs(value) > most * (1 + _SYMMETRIC)
                or abs(value - covariance[beside][at]) > most * _SYMMETRIC
            ):
                yield "its covariance is none"
                return
