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
    # one look into the index for each row of `target`: joined and grouped, every hour before the instant would be read
    of_row = (
        select(func.max(hour.hour_ns))
        .where(hour.target_id == target.id, hour.hour_ns < at_ns)
        .correlate(schema.target)
        .scalar_subquery()
    )
    of_target = (
        select(func.max(of_row))
        .where(target.kind == state.kind, target.name == state.name)
        .correlate(schema.counter_state)
        .scalar_subquery()
    )
    first = connection.execute(
        select(func.min(of_target)).where(state.kind == kind, state.taken_at_ns > at_ns)
    ).scalar()
    return at_ns if first is None else first
