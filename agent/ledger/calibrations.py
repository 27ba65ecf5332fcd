"""Calibrations and savings in the ledger: written once, never changed, and read back as they were."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import insert, select
from sqlalchemy.dialects import sqlite

from kvtally.agent.calibration import Calibration, calibration_of
from kvtally.agent.ledger import schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sqlalchemy import Connection


class StoredCalibration(NamedTuple):
    """A calibration with its number in the ledger, when and why it was made, and the one that was its prior."""

    id: int
    made_at_ns: int
    reason: str
    prior_id: int | None
    calibration: Calibration


class StoredCalibrations(NamedTuple):
    """Those that this kvtally can read, oldest first, and the numbers of those that it cannot."""

    readable: list[StoredCalibration]
    unreadable: list[int]


class StoredSaving(NamedTuple):
    """What reuse was worth to one replica in one hour, as the hour's settlement of that revision found it."""

    revision: int
    calibration_id: int | None
    body: dict[str, Any]


def add(connection: Connection, calibration: Calibration, made_at_ns: int, reason: str) -> int:
    """Write a calibration, inside the caller's transaction; its number, or that of the row which says the same.

    ValueError for one that holds a number which is none (NaN or an infinity).
    """
    evidence = calibration.evidence
    same = {
        "fingerprint": calibration.fingerprint.text(),
        "start_ns": evidence.start_ns,
        "end_ns": evidence.end_ns,
        "body": as_text(calibration.as_json()),
    }
    # its prior is the packaged one, or has a number
    prior_id = int(calibration.prior) if calibration.prior.isdecimal() else None
    about = {"made_at_ns": made_at_ns, "prior_id": prior_id, "rung": calibration.rung, "reason": reason}
    table = schema.calibration
    # the unique key decides, so that of two writers of the same one finds the other's row
    connection.execute(sqlite.insert(table).values(**same, **about).on_conflict_do_nothing())
    query = select(table.c.id).where(*(table.c[name] == value for name, value in same.items()))
    return int(connection.execute(query).scalar_one())


def stored(connection: Connection, fingerprint: str | None = None) -> StoredCalibrations:
    """Every calibration, or those of one fingerprint (`Fingerprint.text()`)."""
    c = schema.calibration.c
    query = select(c.id, c.made_at_ns, c.reason, c.prior_id, c.body).order_by(c.made_at_ns, c.id)
    if fingerprint is not None:
        query = query.where(c.fingerprint == fingerprint)
    found = StoredCalibrations([], [])
    for number, made_at_ns, reason, prior_id, body in connection.execute(query):
        try:
            calibration = calibration_of(json.loads(body), number)
        except (KeyError, TypeError, ValueError):  # a newer kvtally may write more than this one knows
            found.unreadable.append(number)
        else:
            found.readable.append(StoredCalibration(number, made_at_ns, reason, prior_id, calibration))
    return found


def add_savings(connection: Connection, hour_ns: int, revision: int, savings: Iterable[Mapping[str, Any]]) -> None:
    """Write the savings of one settlement, inside its transaction.

    Each has a target_id, a body of plain values and, where a law was used, its calibration_id. ValueError as for `add`.
    """
    rows = [
        {
            "period_start_ns": hour_ns,
            "target_id": saving["target_id"],
            "revision": revision,
            "calibration_id": saving.get("calibration_id"),
            "body": as_text(saving["body"]),
        }
        for saving in savings
    ]
    if rows:
        connection.execute(insert(schema.saving), rows)


def savings(connection: Connection, revisions: Mapping[int, int]) -> dict[tuple[int, int], StoredSaving]:
    """Savings of these hours by hour and target, each hour's from its revision given."""
    if not revisions:
        return {}
    c = schema.saving.c
    query = select(c.period_start_ns, c.target_id, c.revision, c.calibration_id, c.body).where(
        c.period_start_ns >= min(revisions), c.period_start_ns <= max(revisions)
    )
    return {
        (hour_ns, target_id): StoredSaving(revision, calibration_id, json.loads(body))
        for hour_ns, target_id, revision, calibration_id, body in connection.execute(
            query.order_by(c.period_start_ns, c.target_id)
        )
        if revisions.get(hour_ns) == revision
    }


def as_text(body: object) -> str:
    """Plain values as JSON, the same values always as the same text; ValueError for a number that is none."""
    return json.dumps(body, sort_keys=True, allow_nan=False)
