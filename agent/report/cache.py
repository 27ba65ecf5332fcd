"""What caches say they loaded against what their engines reused from outer tiers."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.accounts import replicas_of
from kvtally.agent.disaggregation import DECODE, ROLE
from kvtally.agent.facts import among
from kvtally.agent.finding import Finding
from kvtally.agent.ledger.totals import handed, totals
from kvtally.agent.outer_tiers import Behind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from kvtally.agent.accounts import Window
    from kvtally.agent.facts import Replica
    from kvtally.agent.ledger.read import LedgerReader, Target
    from kvtally.agent.ledger.totals import Total

TOLERANCE = 0.05  # of the larger of the two
LEAST_TOKENS = 10_000
LEAST_NS = 60_000_000_000  # a load and the first token after it may fall into two scrapes
_WATCHED = 0.95  # of the longer of the two times, for the shorter one to be the same time
_STILL_NS = 60_000_000_000  # the newest time in which a cache moved nothing may not be in the ledger yet


class _Shared(NamedTuple):
    """Engines that share caches, and these by their names: the targets of each."""

    engines: frozenset[str]
    caches: dict[str, list[int]]


def cache_findings(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Finding]:
    """Where caches and the engines in front of them tell different tokens for the same time."""
    replicas = list(replicas_of(targets).values())
    behind = Behind(targets)
    if window.end_ns - window.start_ns < LEAST_NS or not any(behind.of(one.name) for one in replicas):
        return
    engines, caches = totals(reader, "engine", *window), totals(reader, "cache", *window)
    shared = _shared(replicas, behind, caches)
    for one in shared:
        is_alone = all(one is other or not one.engines & other.engines for other in shared)
        own = [replica for replica in replicas if replica.name in one.engines and replica.target_id in engines]
        if is_alone and not any(replica.role == DECODE for replica in own):
            yield from _disagreement(one, own, engines, caches, window)


def role_findings(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Finding]:
    """Engines that others hand KV to and whose role nobody tells: what they do of a request may count twice."""
    found = handed(reader, *window, targets)
    if not found:
        return
    first = min(found, key=lambda one: one.replica.name)
    ways, tokens = ", ".join(sorted({way for one in found for way in one.caches})), sum(one.tokens for one in found)
    message = (
        f"KV came from other engines ({ways}), {tokens} tokens of it as far as it was no outer tier's, and no role is "
        "known: their prompts count here and where they were prefilled, and what was handed on counts as reuse. Say "
        f"what they do, {first.replica.in_config(ROLE)}"
    )
    where = f"engine/{among(one.replica.name for one in found)}"
    yield Finding("role_unknown", "warning", where, window.start_ns, window.end_ns, message)


def _shared(replicas: list[Replica], behind: Behind, caches: Mapping[int, Total]) -> list[_Shared]:
    """Caches that tell what they loaded, by the engines that they are behind."""
    served: dict[str, set[str]] = {}
    ids: dict[str, set[int]] = {}
    for replica in replicas:
        for cache in behind.of(replica.name):
            if cache.id in caches and caches[cache.id].counted["loaded_tokens"] is not None:
                served.setdefault(cache.name, set()).add(replica.name)
                ids.setdefault(cache.name, set()).add(cache.id)
    found: dict[frozenset[str], _Shared] = {}
    for name in sorted(served):
        engines = frozenset(served[name])
        found.setdefault(engines, _Shared(engines, {})).caches[name] = sorted(ids[name])
    return list(found.values())


def _disagreement(
    shared: _Shared, own: list[Replica], engines: Mapping[int, Total], caches: Mapping[int, Total], window: Window
) -> Iterator[Finding]:
    """Pages of several workers repeat each other: of several caches the one with the most stands for all."""
    counts = [engines[one.target_id].counted["external_tokens"] for one in own]
    if not own or None in counts:
        return
    reused = sum(count or 0 for count in counts)
    loads = {name: sum(caches[one].counted["loaded_tokens"] or 0 for one in ids) for name, ids in shared.caches.items()}
    name = max(loads, key=lambda each: loads[each])
    loaded, most = loads[name], max(loads[name], reused)
    lengths: dict[str, int] = {}
    for one in own:
        lengths[one.name] = lengths.get(one.name, 0) + engines[one.target_id].length_ns
    watched = sum(caches[one].length_ns for one in shared.caches[name])
    if most < LEAST_TOKENS or abs(loaded - reused) <= TOLERANCE * most:
        return
    if not all(_is_same(length_ns, watched) for length_ns in lengths.values()):
        return
    tells = "its engine" if len(lengths) == 1 else f"its {len(lengths)} engines"
    message = (
        f"{name} tells {loaded} tokens loaded, {tells} {reused} from outer tiers. Usual reasons: requests that were "
        "preempted are looked up and loaded again, a cache loads whole chunks where an engine counts the tokens that "
        "it needed, and requests were aborted before their first token"
    )
    yield Finding("cache_disagrees", "info", f"engine/{among(lengths)}", window.start_ns, window.end_ns, message)


def _is_same(engine_ns: int, cache_ns: int) -> bool:
    """Whether both were read over the same time, as far as its length tells."""
    return cache_ns + _STILL_NS >= _WATCHED * engine_ns and engine_ns + _STILL_NS >= _WATCHED * cache_ns
