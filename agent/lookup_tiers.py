"""From which tier external tokens came, estimated from the lookups of the cache behind the engine."""

from __future__ import annotations

from typing import NamedTuple

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
