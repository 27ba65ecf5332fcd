"""LMCache's families (in-process, on the engine's page) as a cache reading."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.page import Pick, Plan, positions
from kvtally.collectors.quantities import CACHE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.exposition import Series

# Every tensor-parallel worker counts the same tokens under its own worker_id: the greatest is the truth, their sum
# is a multiple of it. Bytes are each worker's own shard and do add up.
#   lmcache:num_hit_tokens_total{model_name="…",role="worker",served_model_name="llama-8b",worker_id="0"} 482304.0
_COUNTED: Mapping[str, tuple[str, bool]] = {
    "lookup_tokens": ("lmcache:num_lookup_tokens_total", True),
    "lookup_hit_tokens": ("lmcache:num_lookup_hits_total", True),
    "requested_tokens": ("lmcache:num_requested_tokens_total", True),
    "loaded_tokens": ("lmcache:num_hit_tokens_total", True),
    "stored_tokens": ("lmcache:num_stored_tokens_total", True),
    "loads": ("lmcache:num_retrieve_requests_total", True),
    "stores": ("lmcache:num_store_requests_total", True),
    "load_ns": ("lmcache:time_to_retrieve_sum", True),
    "store_ns": ("lmcache:time_to_store_sum", True),
    "load_bytes": ("lmcache:num_remote_read_bytes_total", False),
    "store_bytes": ("lmcache:num_remote_write_bytes_total", False),
    "used_bytes": ("lmcache:local_cache_usage", False),
}


def spelled(sample_name: str) -> str:
    """The sample's name with LMCache's own colon, which OpenMetrics without escaping=allow-utf-8 rewrites."""
    return "lmcache:" + sample_name[8:] if sample_name.startswith("lmcache_") else sample_name


class LmcacheMapping:
    """Reads LMCache's in-process families; they are flushed every 10 s, so shorter intervals show steps."""

    def __init__(self) -> None:
        self._names = frozenset(name for name, _ in _COUNTED.values())

    def wants(self, sample_name: str) -> bool:
        """Whether a sample of this name is read, in either spelling."""
        return spelled(sample_name) in self._names

    def names(self) -> tuple[str, ...]:
        """Every sample name that is read."""
        return tuple(sorted(self._names))

    def compile(self, target: str, series: Sequence[Series], version: str | None) -> list[Plan]:  # noqa: ARG002  # the engine's version, not LMCache's
        """One cache plan per model that LMCache serves on this page."""
        owned: dict[str, dict[str, list[tuple[int, Mapping[str, str]]]]] = {}
        for at, one in enumerate(series):
            name = spelled(one.name)
            if name in self._names:
                model = one.labels.get("served_model_name") or one.labels.get("model_name", "")
                owned.setdefault(model, {}).setdefault(name, []).append((at, one.labels))
        plans: list[Plan] = []
        for model, own in sorted(owned.items()):
            picks: list[Pick | None] = []
            for quantity in CACHE:
                name, greatest = _COUNTED.get(quantity.name, ("", True))
                found = positions(own, name)
                picks.append(Pick(found, greatest) if found else None)
            about = {"cache": "lmcache in-process", "model": model}
            name = f"{target}/lmcache" if len(owned) == 1 else f"{target}/lmcache/{model}"
            plans.append(Plan("cache", name, about, picks))
        return plans
