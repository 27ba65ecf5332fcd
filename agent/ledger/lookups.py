"""Hour by hour, what tells tiers apart: what engines say they admitted from each, and what caches' lookups found."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, select

from kvtally.agent.ledger import schema
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.packing import chosen

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from kvtally.agent.ledger.read import LedgerReader, Target


class Found(NamedTuple):
    """Of one cache target in one hour: the length of its intervals, and the tokens; None where it does not tell."""

    length_ns: int
    dram: int | None
    disk: int | None


class Admitted(NamedTuple):
    """Of one engine target in one hour: tokens of admitted prompts by the outer tier that had them."""

    dram: int
    disk: int
    p2p: int
    unspecified: int


# in the order of Admitted
_ADMITTED = ("admitted_host_tokens", "admitted_disk_tokens", "admitted_p2p_tokens", "admitted_unspecified_tokens")


def admitted_in_hours(
    reader: LedgerReader,
    window_ns: tuple[int, int],
    places: Collection[tuple[int, int]],
    targets: Mapping[int, Target],
) -> Mapping[tuple[int, int], Admitted]:
    """By (hour, engine target) of `places`, from the raw intervals that start in [start, end); only details tell."""
    where = {
        target_id: sorted((names.index(name), slot) for slot, name in enumerate(_ADMITTED) if name in names)
        for target_id in {target_id for _, target_id in places}
        if any(name in (names := targets[target_id].detail_names) for name in _ADMITTED)
    }
    if not where:
        return {}
    c = schema.intervals["engine"].c
    query = select(c.start_ns - c.start_ns % HOUR_NS, c.target_id, c.details).where(
        c.start_ns >= window_ns[0], c.start_ns < window_ns[1], c.target_id.in_(list(where)), c.details != b""
    )
    sums: dict[tuple[int, int], list[int]] = {}
    for hour_ns, target_id, details in reader.connection.execute(query):
        if (hour_ns, target_id) not in places:
            continue
        own = sums.setdefault((hour_ns, target_id), [0] * len(_ADMITTED))
        differences = chosen(details, [position for position, _ in where[target_id]])
        for (_, slot), difference in zip(where[target_id], differences, strict=True):
            own[slot] += difference
    return {place: Admitted(*own) for place, own in sums.items()}


def found_in_hours(reader: LedgerReader, hours: Collection[int]) -> Mapping[tuple[int, int], Found]:
    """By (hour, cache target), from the hours' sums."""
    c = schema.hours["cache"].c
    query = select(c.hour_ns, c.target_id, c.length_ns, c.dram_hit_tokens, c.disk_hit_tokens)
    rows = reader.connection.execute(query.where(c.hour_ns >= min(hours), c.hour_ns <= max(hours))).all()
    return {(row[0], row[1]): Found(*row[2:]) for row in rows if row[0] in hours}


def found_in_span(reader: LedgerReader, start_ns: int, end_ns: int) -> Mapping[tuple[int, int], Found]:
    """By (hour, cache target), from the intervals that start in [start_ns, end_ns)."""
    c = schema.intervals["cache"].c
    hour_ns = (c.start_ns - c.start_ns % HOUR_NS).label("hour_ns")
    sums = (func.sum(column) for column in (c.length_ns, c.dram_hit_tokens, c.disk_hit_tokens))
    query = select(hour_ns, c.target_id, *sums).where(c.start_ns >= start_ns, c.start_ns < end_ns)
    rows = reader.connection.execute(query.group_by(hour_ns, c.target_id)).all()
    return {(row[0], row[1]): Found(int(row[2]), _whole(row[3]), _whole(row[4])) for row in rows}


def _whole(amount: object) -> int | None:
    """A sum as an integer: of some databases it is a decimal number."""
    return None if amount is None else int(str(amount))
