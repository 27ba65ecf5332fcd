"""From which tier cached tokens came, estimated from the lookups of the engine or of the cache behind it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.facts import VLLM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.facts import Replica

BY_LOOKUPS = "tokens_by_lookups"  # of a replica's work: its cached tokens whose tiers are told by shares
LEAST_SECONDS = 60.0  # a request's lookup and its load may fall into two scrapes


class TierTokens(NamedTuple):
    """External tokens by tier; what neither names is told apart by nobody."""

    dram: float
    disk: float


def estimated(external: float, dram_hits: float, disk_hits: float) -> TierTokens:
    """External tokens of a window of at least LEAST_SECONDS by tier; no more of them than the lookups found.

    The cache looks up from token 0, DRAM first: what it found and the engine did not load was in HBM, and that is the
    beginning, which DRAM found. Over a window in which requests are mixed this leans towards the disk.
    """
    found = dram_hits + disk_hits
    loaded = min(external, found)
    dram = min(loaded, max(0.0, dram_hits - (found - loaded)))
    return TierTokens(dram, loaded - dram)


def with_tiers(replica: Replica, work: Mapping[str, int | None]) -> Mapping[str, int | None]:
    """What a replica counted, with the cached tokens that its engine counts as one told apart: HBM's and external ones.

    TensorRT-LLM counts cached tokens when a request finishes, and what each tier had when one is scheduled: they differ
    by the requests in flight, so the shares of the tiers are what counts. The same work where nothing tells them.
    """
    prompt, computed = work.get("prompt_tokens"), work.get("computed_tokens")
    if replica.engine == VLLM or prompt is None or computed is None:
        return work  # vLLM names its sources: where they do not add up, that is a finding
    cached, own = prompt - computed, [work.get(name) for name in ("hbm_tokens", "external_tokens")]
    if None not in own and sum(tokens or 0 for tokens in own) == cached:
        return work
    hits, outer = (work.get(name) or 0 for name in ("prefix_hit_tokens", "external_hit_tokens"))
    if cached < 0 or (cached and not hits + outer):
        return work
    hbm = round(cached * hits / (hits + outer)) if cached else 0
    return {**work, "hbm_tokens": hbm, "external_tokens": cached - hbm, BY_LOOKUPS: cached}
