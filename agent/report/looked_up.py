"""External tokens of replica-hours by tier, from the lookups of the caches behind them: no step law is needed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.agent.disaggregation import DECODE
from kvtally.agent.joins import CacheTarget, caches_behind
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.lookups import Found, found_in_hours, found_in_span
from kvtally.agent.ledger.observed import cache_targets
from kvtally.agent.lookup_tiers import LEAST_SECONDS, TierTokens, estimated

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.agent.accounts import Part
    from kvtally.agent.facts import Facts
    from kvtally.agent.ledger.read import LedgerReader, Target

    Place = tuple[int, int]  # an hour, and a target: a replica's or a cache's

_WATCHED = 0.95  # of a replica's time, for which its cache must have been read
_STILL_NS = 60_000_000_000  # the newest time in which a cache moved nothing may not be in the ledger yet


class Behind:
    """The caches behind each engine of a ledger."""

    def __init__(self, targets: Mapping[int, Target]) -> None:
        self._caches = cache_targets(targets)
        self._engines = {target.name for target in targets.values() if target.kind == "engine"}
        self._of: dict[str, list[CacheTarget]] = {}

    def of(self, engine: str) -> list[CacheTarget]:
        """Those behind one engine."""
        if engine not in self._of:
            self._of[engine] = caches_behind(engine, self._caches, self._engines)
        return self._of[engine]


def tiers_looked_up(
    reader: LedgerReader, part: Part, facts: Sequence[Facts], behind: Behind
) -> dict[Place, TierTokens]:
    """Tiers of the replica-hours of a part, as far as a cache tells DRAM from storage there.

    A cache that several replicas share is shared by their external tokens.
    """
    loads = {
        (_hour(one), one.replica.target_id): one
        for one in facts
        if one.replica is not None and one.replica.role != DECODE and _external(one)
    }
    if not any(behind.of(_name(one)) for one in loads.values()):
        return {}
    told = found_in_hours(reader, part.hours) if part.hours else found_in_span(reader, *part.window)
    sharers: dict[tuple[int, str], int] = {}
    for (hour_ns, _), one in loads.items():
        for name in {cache.name for cache in behind.of(_name(one))}:
            sharers[hour_ns, name] = sharers.get((hour_ns, name), 0) + _external(one)
    tiers: dict[Place, TierTokens] = {}
    for place, one in loads.items():
        found = _by_name(told, place[0], behind.of(_name(one)))
        own = [_own(one, each, sharers[place[0], name]) for name, each in found.items() if _is_told(one, each)]
        if own:
            tiers[place] = max(own, key=sum)
    return tiers


def _is_told(one: Facts, found: Found) -> bool:
    """Whether the cache tells DRAM from storage, all along a time that is long enough."""
    length_ns = one.end_ns - one.start_ns
    return (
        None not in {found.dram, found.disk}
        and length_ns >= LEAST_SECONDS * 1e9
        and found.length_ns + _STILL_NS >= _WATCHED * length_ns
    )


def _own(one: Facts, found: Found, together: int) -> TierTokens:
    """A replica's tiers; `together` are the external tokens of all replicas that share the cache."""
    external = _external(one)
    share = external / together
    return estimated(external, (found.dram or 0) * share, (found.disk or 0) * share)


def _by_name(told: Mapping[Place, Found], hour_ns: int, caches: Sequence[CacheTarget]) -> dict[str, Found]:
    """What caches found in an hour: a change of attributes makes another target of the same one."""
    found: dict[str, Found] = {}
    for cache in caches:
        if (one := told.get((hour_ns, cache.id))) is not None:
            before = found.get(cache.name, Found(0, None, None))
            found[cache.name] = Found(
                before.length_ns + one.length_ns, _sum(before.dram, one.dram), _sum(before.disk, one.disk)
            )
    return found


def _sum(one: int | None, other: int | None) -> int | None:
    return other if one is None else one + (other or 0)


def _external(one: Facts) -> int:
    return one.work.get("external_tokens") or 0


def _name(one: Facts) -> str:
    return "" if one.replica is None else one.replica.name


def _hour(one: Facts) -> int:
    return one.period_ns - one.period_ns % HOUR_NS
