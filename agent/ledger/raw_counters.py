"""Raw counters at both ends of a span, from the last ones that the ledger keeps and the differences since."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from sqlalchemy import and_, case, func, select

from kvtally.agent.interval import RESET
from kvtally.agent.ledger import schema
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.collectors.base import Kind


def raw_counters(
    reader: LedgerReader, kind: Kind, name: str, start_ns: int, end_ns: int
) -> Mapping[str, tuple[int, int]]:
    """Counters of a target at the start and the end of a span, by quantity, in the quantity's own integer unit.

    Only those that the ledger can tell: no restart and no gap in what is known of them from the start on.
    """
    state, c = schema.counter_state.c, schema.intervals[kind].c
    kept = reader.connection.execute(
        select(state.taken_at_ns, state.state).where(state.kind == kind, state.name == name)
    ).one_or_none()
    if kept is None:
        return {}
    body = json.loads(kept.state)
    if body.get("parts") is not None:
        return {}
    counted = [one for one in QUANTITIES[kind] if one.type == "counter" and body["values"].get(one.name) is not None]
    inside = and_(c.start_ns >= start_ns, c.start_ns < end_ns)
    own = select(schema.target.c.id).where(schema.target.c.kind == kind, schema.target.c.name == name)
    columns = [func.count(), func.min(c.start_ns), func.max(c.start_ns + c.length_ns), func.sum(c.length_ns)]
    columns += [func.sum(case((c.flags.op("&")(RESET) != 0, 1), else_=0))]
    for one in counted:
        column = c[one.name]
        columns += [func.count(column), func.sum(case((inside, column))), func.sum(case((~inside, column)))]
    rows = select(*columns).where(c.target_id.in_(own), c.start_ns >= start_ns)
    intervals, first_ns, last_ns, length_ns, resets, *sums = reader.connection.execute(rows).one()
    if not intervals or resets or last_ns != kept.taken_at_ns or length_ns != last_ns - first_ns:
        return {}
    found: dict[str, tuple[int, int]] = {}
    for place, one in enumerate(counted):
        known, within, after = sums[3 * place : 3 * place + 3]
        if known == intervals:
            end = round(body["values"][one.name] * one.scale) - (after or 0)
            found[one.name] = (end - (within or 0), end)
    return found
