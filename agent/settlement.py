"""Settle hours: their charges are written once, from the intervals and prices that are known then."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from kvtally.agent.accounts import Payment, Window, facts_of, hour_of
from kvtally.agent.ledger import settled
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.price import FOREVER_NS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from kvtally.agent.facts import Facts
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.price import Rate
    from kvtally.agent.rates import RateBook
    from kvtally.agent.valuing import Valued

GRACE_NS = 15 * 60 * 1_000_000_000
EVIDENCE_NS = 2 * 60 * 1_000_000_000  # what GPUs say about the hour's last interval comes up to a minute later
CLOSED = "hour closed"
CAME_LATER = "intervals of this hour came after it was settled"


def due_hours(reader: LedgerReader, now_ns: int) -> list[int]:
    """Hours to settle: every target has an interval that ends after them, or 15 minutes have passed.

    And those that were settled, and that intervals reach into which came later.
    """
    extent = reader.extent()
    if extent is None:
        return []
    ends = reader.state_ends()
    engines = [end for (kind, _), end in ends.items() if kind == "engine"]
    # a target that is gone for good holds nothing up beyond the grace
    reached = max(min(engines, default=0) - EVIDENCE_NS, now_ns - GRACE_NS)
    # and after the last scrape of all nothing is there to settle, however long ago that was
    reached = min(reached, hour_of(max(ends.values(), default=extent[1]) - 1) + HOUR_NS)
    done = reader.settled_hours()
    due = {hour for hour in range(hour_of(extent[0]), hour_of(reached), HOUR_NS) if hour not in done}
    return sorted(due | _overtaken(reader, done))


def _overtaken(reader: LedgerReader, done: Mapping[int, int]) -> set[int]:
    """Settled hours that later intervals reach into; those whose raw intervals have left stay as they are."""
    whole_from = reader.whole_hours_from()
    if whole_from is None:
        return set()
    overtaken: set[int] = set()
    for hour, begun in reader.begun(0, FOREVER_NS).items():
        if begun > done.get(hour, begun):
            until = max((row.end_ns for row in reader.engine_rows(hour, hour + HOUR_NS)), default=hour + HOUR_NS)
            overtaken |= {one for one in range(hour, until, HOUR_NS) if one in done and one >= whole_from}
    return overtaken


def settle_hours(
    reader: LedgerReader,
    hours: Sequence[int],
    now_ns: int,
    book: RateBook,
    payment: Payment,
    *,
    reason: str = CLOSED,
    restates: bool = False,
) -> list[int]:
    """Settle hours with what reuse was worth in each, by laws that are stored first: the revisions written.

    An hour that was settled before keeps its law, unless this `restates` it by the newest one.
    """
    if not hours:
        return []
    from kvtally.agent.calibrating import keep  # noqa: PLC0415  # numpy is loaded only where there is work for it
    from kvtally.agent.valuing import Laws, valued  # noqa: PLC0415  # as above

    targets = reader.targets()
    keep(reader, now_ns, targets)
    laws = Laws(reader, targets, learns=False)
    revisions: list[int] = []
    for hour in hours:
        before = {} if restates else reader.savings(hour, hour + HOUR_NS)
        own = laws.frozen(saving.calibration_id for saving in before.values()) if before else laws
        values = valued(reader, (hour, hour + HOUR_NS), own, targets)
        revisions.append(settle(reader, hour, book, payment, reason=reason, values=values))
    return revisions


def settle(
    reader: LedgerReader,
    hour_ns: int,
    book: RateBook,
    payment: Payment,
    *,
    reason: str = CLOSED,
    values: Iterable[Valued] = (),
) -> int:
    """Settle one hour, or settle it again: returns the revision written. The ledger must hold the book's rates.

    `values` are what reuse was worth in the hour, by laws that the ledger holds.
    """
    begun = reader.begun(hour_ns, hour_ns + HOUR_NS).get(hour_ns, 0)
    facts = facts_of(reader, Window(hour_ns, hour_ns + HOUR_NS), book, payment, use_settled=False)
    revision = settled.revisions(reader, hour_ns, hour_ns + 1).get(hour_ns, 0) + 1
    # a packaged price of 0 takes on the ledger's currency, so that is no part of the key
    ids = {rate._replace(currency=""): rate_id for rate_id, rate in reader.rates()}
    charges = [charge for one in facts for charge in _charges(one, hour_ns, revision, ids)]
    body = {"facts": [_entry(one) for one in facts]}
    why = CAME_LATER if revision > 1 and reason == CLOSED else reason
    reader.write_settlement(
        hour_ns, revision, reason=why, intervals=begun, facts=body, charges=charges, savings=map(_saving, values)
    )
    return revision


def _saving(value: Valued) -> dict[str, Any]:
    calibration_id = None if value.calibration is None else value.calibration.id
    return {"target_id": value.target_id, "calibration_id": calibration_id, "body": value.as_json()}


def _sku(facts: Facts) -> str:
    """What tells apart GPUs that nobody holds; replicas are told apart by their id."""
    return facts.lines[0].sku if facts.replica is None and facts.lines else ""


def _entry(facts: Facts) -> dict[str, Any]:
    return {
        "target_id": facts.replica.target_id if facts.replica else None,
        "sku": _sku(facts),
        "state_ns": dict(facts.state_ns),
        "priced": facts.lines is not None,
        "split": None if facts.split is None else list(facts.split),
        "start_ns": facts.start_ns,
        "end_ns": facts.end_ns,
        "covered_ns": facts.covered_ns,
        "modelled": facts.modelled,
        "findings": [list(finding) for finding in facts.findings],
    }


def _charges(facts: Facts, hour_ns: int, revision: int, ids: dict[Rate, int]) -> list[dict[str, Any]]:
    replica = facts.replica
    return [
        {
            "period_start_ns": hour_ns,
            "revision": revision,
            "target_id": replica.target_id if replica else None,
            "account": json.dumps(dict(replica.labels) if replica else {}, sort_keys=True),
            "resource": line.resource,
            "sku": line.sku,
            "state": line.state,
            "quantity": line.quantity,
            "unit": line.unit,
            "rate_id": ids[line.rate._replace(currency="")],
            "amount_nano": line.amount_nano,
        }
        for line in facts.lines or ()
    ]


def prune_before(reader: LedgerReader, keep_ns: int) -> dict[str, int]:
    """Remove raw intervals older than `keep_ns` before the newest one, as far as their hours are settled."""
    extent = reader.extent()
    raw_from = reader.raw_from()
    if extent is None or raw_from is None:
        return {}
    limit = hour_of(extent[1] - keep_ns)
    done = settled.revisions(reader, hour_of(raw_from), limit)
    before = hour_of(raw_from)
    while before in done:
        before += HOUR_NS
    return reader.prune(before) if before > raw_from else {}


def settle_again(reader: LedgerReader, from_ns: int, book: RateBook, payment: Payment) -> tuple[int, int]:
    """Settle again the hours from `from_ns` on, for a new price: (settled again, aged out and left as they are)."""
    extent, whole_from = reader.extent(), reader.whole_hours_from()
    if extent is None:
        return 0, 0
    hours = [hour for hour in settled.revisions(reader, 0, extent[1]) if hour + HOUR_NS > from_ns]
    kept = [hour for hour in hours if whole_from is not None and hour >= whole_from]
    settle_hours(reader, kept, extent[1], book, payment, reason="a price was added")
    return len(kept), len(hours) - len(kept)
