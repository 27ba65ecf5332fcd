"""Where to begin reading intervals, so that one which crosses an instant is found without reading all before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select

from kvtally.agent.ledger import schema

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from kvtally.collectors.base import Kind


def reach(connection: Connection, kind: Kind, at_ns: int) -> int:
    """An instant from which on every interval of the kind that crosses `at_ns` begins.

    A target's intervals follow on each other, so only its last before the instant can cross it, and its hourly sums
    tell the hour in which that began. A target whose newest interval ends before the instant has none that does.
    """
    hour, target, state = schema.hours[kind].c, schema.target.c, schema.counter_state.c
    last = (
        select(func.max(hour.hour_ns).label("hour_ns"))
        .join_from(schema.hours[kind], schema.target, hour.target_id == target.id)
        .join(schema.counter_state, (state.kind == target.kind) & (state.name == target.name))
        .where(hour.hour_ns < at_ns, state.taken_at_ns > at_ns)
        .group_by(target.name)
        .subquery()
    )
    first = connection.execute(select(func.min(last.c.hour_ns))).scalar()
    return at_ns if first is None else first
