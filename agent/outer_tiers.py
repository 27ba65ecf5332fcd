"""External tokens of replica-hours by tier without a step law: as the engine names them, else as a cache found them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.disaggregation import DECODE
from kvtally.agent.facts import VLLM
from kvtally.agent.joins import CacheTarget, caches_behind
from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.lookups import Admitted, Found, admitted_in_hours, found_in_hours, found_in_span
from kvtally.agent.ledger.observed import cache_targets
from kvtally.agent.lookup_tiers import BY_LOOKUPS, LEAST_SECONDS, TierTokens, estimated
from kvtally.agent.worth import A_TOKEN

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from kvtally.agent.accounts import Part
    from kvtally.agent.facts import Facts
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.ledger.settled import Parted
    from kvtally.agent.worth import Worth

    Place = tuple[int, int]  # an hour, and a target: a replica's or a cache's

_WATCHED = 0.95  # of a replica's time, for which its cache must have been read
_STILL_NS = 60_000_000_000  # the newest time in which a cache moved nothing may not be in the ledger yet
TOO_SHORT = f"the window is shorter than {LEAST_SECONDS:.0f} s"


class OuterTiers(NamedTuple):
    """External tokens of a replica-hour by tier; what none names is told apart by nobody, and `why` may say why.

    estimated   of them, how many lookups tell: the engine itself names the others as it counts them
    """

    dram: float
    disk: float
    p2p: float
    estimated: float
    why: str = ""

    def named(self) -> dict[str, float]:
        """Tokens by tier."""
        return {"dram": self.dram, "disk": self.disk, "p2p": self.p2p}


def is_apart(worth: Worth | Parted) -> bool:
    """Whether a law's hour has its external tokens by tier."""
    return bool(worth.dram_tokens or worth.disk_tokens or worth.p2p_tokens)


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


def outer_tiers(
    reader: LedgerReader,
    part: Part,
    facts: Sequence[Facts],
    behind: Behind,
    targets: Mapping[int, Target],
    *,
    parted: Collection[Place] = (),
) -> dict[Place, OuterTiers]:
    """Tiers of the replica-hours of a part, as far as their engine or a cache behind it tells DRAM from storage.

    What an engine names is never a cache's to tell: lookups part only what it leaves open. A cache that several
    replicas share is shared by their external tokens. `parted` are the replica-hours that a law parts already.
    """
    loads = {
        (_hour(one), one.replica.target_id): one
        for one in facts
        if one.replica is not None and one.replica.role != DECODE and _external(one)
    }
    asked = loads.keys() - set(parted)
    if not asked:
        return {}
    admitted = admitted_in_hours(reader, part.window, asked, targets)
    tiers = {place: _named(loads[place], admitted.get(place)) for place in asked}
    tiers = {place: one for place, one in tiers.items() if sum(one.named().values())}
    open_to_lookups = {place for place in asked if place in admitted or not _names_its_own(targets[place[1]])}
    for place, found in _looked_up(reader, part, loads, tiers, behind, asked=open_to_lookups).items():
        own = tiers.get(place, OuterTiers(0.0, 0.0, 0.0, 0.0))
        tiers[place] = found._replace(
            dram=own.dram + found.dram,
            disk=own.disk + found.disk,
            p2p=own.p2p,
            estimated=own.estimated + found.estimated,
        )
    return tiers


def _names_its_own(target: Target) -> bool:
    """Whether an engine that is not vLLM names its tiers itself: an hour whose details are gone stays untold.

    vLLM names those of its own offloading alone, and leaves open what a connector loads.
    """
    return target.attributes.get("engine", VLLM) != VLLM and "admitted_host_tokens" in target.detail_names


def _named(one: Facts, admitted: Admitted | None) -> OuterTiers:
    """The external tokens as the engine names them.

    Admission and first token differ by the requests in flight: the shares are what counts.
    """
    total = 0 if admitted is None else sum(admitted)
    if admitted is None or not total:
        return OuterTiers(0.0, 0.0, 0.0, 0.0)
    dram, disk, p2p = (_external(one) * tokens / total for tokens in admitted[:3])
    return OuterTiers(dram, disk, p2p, dram + disk + p2p if one.work.get(BY_LOOKUPS) else 0.0)


def _looked_up(
    reader: LedgerReader,
    part: Part,
    loads: Mapping[Place, Facts],
    named: Mapping[Place, OuterTiers],
    behind: Behind,
    *,
    asked: Collection[Place],
) -> dict[Place, OuterTiers]:
    """What the lookups of caches tell of that which the engines do not name, in the replica-hours that are asked."""
    rest = {place: _external(loads[place]) - sum(_tiers(named, place)) for place in asked}
    rest = {place: tokens for place, tokens in rest.items() if tokens >= A_TOKEN}
    if not any(behind.of(_name(loads[place])) for place in rest):
        return {}
    told = found_in_hours(reader, part.hours) if part.hours else found_in_span(reader, *part.window)
    sharers: dict[tuple[int, str], int] = {}
    for (hour_ns, _), one in loads.items():
        for name in {cache.name for cache in behind.of(_name(one))}:
            sharers[hour_ns, name] = sharers.get((hour_ns, name), 0) + _external(one)
    tiers: dict[Place, OuterTiers] = {}
    for place, tokens in rest.items():
        one = loads[place]
        found = {
            name: each
            for name, each in _by_name(told, place[0], behind.of(_name(one))).items()
            if None not in {each.dram, each.disk}
        }
        own = [
            _own(tokens, each, _external(one) / sharers[place[0], name])
            for name, each in found.items()
            if _is_watched(one, each)
        ]
        if own:
            best = max(own, key=sum)
            tiers[place] = OuterTiers(best.dram, best.disk, 0.0, sum(best))
        elif found and _is_short(one):
            tiers[place] = OuterTiers(0.0, 0.0, 0.0, 0.0, TOO_SHORT)
    return tiers


def _tiers(named: Mapping[Place, OuterTiers], place: Place) -> tuple[float, ...]:
    return tuple(named[place].named().values()) if place in named else ()


def _is_short(one: Facts) -> bool:
    """Whether a request's lookup and its load may fall to either side of this time's ends."""
    return one.end_ns - one.start_ns < LEAST_SECONDS * 1e9


def _is_watched(one: Facts, found: Found) -> bool:
    """Whether the cache was read all along a time that is long enough."""
    return not _is_short(one) and found.length_ns + _STILL_NS >= _WATCHED * (one.end_ns - one.start_ns)


def _own(tokens: float, found: Found, share: float) -> TierTokens:
    """So many of a replica's tokens by tier; `share` of what the cache found is its."""
    return estimated(tokens, (found.dram or 0) * share, (found.disk or 0) * share)


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
