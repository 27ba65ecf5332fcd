"""What options name in a ledger, a replica or a calibration: a wrong call where it is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from kvtally.agent.calibrating import Extra
    from kvtally.agent.kin import Kin
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.valuing import Laws

_LIST = "(`kvtally calibrate --list`)"


def replicas_in(kinds: Iterable[Kin], asked: str | None) -> list[str]:
    """The names of a window's replicas; click.UsageError where the one that --replica names is none of them."""
    names = sorted({subject.name for kin in kinds for subject in kin.subjects})
    if asked is not None and asked not in names:
        raise click.UsageError(f"--replica {asked}: the window holds {', '.join(names) or 'none'}")
    return names


def laws_by(
    reader: LedgerReader,
    targets: Mapping[int, Target],
    calibration: int | None,
    extra: Mapping[str, Extra] | None = None,
) -> Laws:
    """The laws of the ledger, or the one that --calibration names; click.UsageError where the ledger lacks it."""
    from kvtally.agent.valuing import Laws

    laws = Laws(reader, targets, only=calibration, extra=extra)
    if calibration is not None and not laws.stored:
        numbers = ", ".join(str(one.id) for one in reader.calibrations()) or "none"
        raise click.UsageError(f"--calibration {calibration}: the ledger holds {numbers} {_LIST}")
    return laws


def fits_nothing(calibration: int) -> click.UsageError:
    """What is wrong with a --calibration of other replicas than those of the window."""
    return click.UsageError(f"--calibration {calibration}: no replica in the window has its fingerprint {_LIST}")
