"""What targets of a kind counted in a window, added up: whole hours from their sums, the edges from raw intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, select

from kvtally.agent.joins import caches_behind, is_transfer, transfers_of
from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HOUR_NS, sum_columns
from kvtally.agent.ledger.observed import cache_targets
from kvtally.agent.ledger.read import replica_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.collectors.base import Kind


class Total(NamedTuple):
    """What one target counted.

    length_ns   of its intervals that start in the window
    counted     sums by quantity; None where no interval knew it
    """

    length_ns: int
    counted: Mapping[str, int | None]


class Handed(NamedTuple):
    """KV that other engines handed to one whose role nobody tells.

    tokens      that it loaded through its connector, all of them
    caches      what the transfers are called
    has_outer   an outer tier of its own is behind it: some of the tokens may be that one's
    """

    replica: Replica
    tokens: int
    caches: tuple[str, ...]
    has_outer: bool


def handed(reader: LedgerReader, start_ns: int, end_ns: int, targets: Mapping[int, Target]) -> list[Handed]:
    """What was handed to engines without a role in the intervals that start in [start_ns, end_ns).

    The engine that moves KV counts it, the other one does not: who has loaded tokens and counts transfers was handed
    them.
    """
    caches = cache_targets(targets)
    if not any(is_transfer(one.attributes) for one in caches):
        return []
    moved, counted = totals(reader, "cache", start_ns, end_ns), totals(reader, "engine", start_ns, end_ns)
    engines = {target.name for target in targets.values() if target.kind == "engine"}
    found = []
    for replica in (replica_of(targets[target_id]) for target_id in sorted(counted)):
        tokens = counted[replica.target_id].counted["external_tokens"]
        ways = [
            one.attributes.get("cache", one.name)
            for one in transfers_of(replica.name, caches, engines)
            if one.id in moved and (moved[one.id].counted["load_bytes"] or moved[one.id].counted["loads"])
        ]
        if tokens and ways and not replica.role:
            has_outer = bool(caches_behind(replica.name, caches, engines))
            found.append(Handed(replica, tokens, tuple(sorted(set(ways))), has_outer))
    return found


def totals(reader: LedgerReader, kind: Kind, start_ns: int, end_ns: int) -> dict[int, Total]:
    """Sums of the intervals that start in [start_ns, end_ns), by target id; an unknown difference adds nothing."""
    first_ns, last_ns = -(-start_ns // HOUR_NS) * HOUR_NS, end_ns // HOUR_NS * HOUR_NS
    if first_ns >= last_ns:
        return _raw(reader, kind, start_ns, end_ns)
    hour = schema.hours[kind].c
    columns = [func.sum(hour[name]) for name in sum_columns(kind)]
    query = select(hour.target_id, func.sum(hour.length_ns), *columns)
    query = query.where(hour.hour_ns >= first_ns, hour.hour_ns < last_ns).group_by(hour.target_id)
    found = {row[0]: _total(kind, row[1], row[2:]) for row in reader.connection.execute(query)}
    for edge in ((start_ns, first_ns), (last_ns, end_ns)):
        for target_id, total in _raw(reader, kind, *edge).items():
            found[target_id] = added(found[target_id], total) if target_id in found else total
    return found


def added(one: Total, other: Total) -> Total:
    """Both together; what only one of them knows is what it knows."""
    counted = {
        name: value if (more := other.counted[name]) is None else (value or 0) + more
        for name, value in one.counted.items()
    }
    return Total(one.length_ns + other.length_ns, counted)


def _raw(reader: LedgerReader, kind: Kind, start_ns: int, end_ns: int) -> dict[int, Total]:
    c = schema.intervals[kind].c
    query = select(c.target_id, func.sum(c.length_ns), *(func.sum(c[name]) for name in sum_columns(kind)))
    query = query.where(c.start_ns >= start_ns, c.start_ns < end_ns).group_by(c.target_id)
    return {row[0]: _total(kind, row[1], row[2:]) for row in reader.connection.execute(query)}


def _total(kind: Kind, length_ns: int, sums: tuple[int | None, ...]) -> Total:
    return Total(int(length_ns), dict(zip(sum_columns(kind), sums, strict=True)))
