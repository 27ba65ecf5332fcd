"""What in-process LMCache 0.5.1 shows of a simulated run on the engine's page: flushed every 10 s, by each worker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tests.simulator.families import Events, Family, Sample, counter, histogram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.simulator.families import Array
    from tests.simulator.laws import Law
    from tests.simulator.story import Config, Run

FLUSH_SECONDS = 10.0
_PHASE = 3.7  # when its thread wakes, in seconds of the run
TIME_EDGES = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)


def lmcache_families(run: Run, config: Config, law: Law, model: str, instants: Array) -> list[Family]:
    """Its counters and clocks; bytes of disk reads stand under remote reads, each worker's own shard."""
    loads, stores, lookups = run.loads, run.stores, run.lookups
    loaded, stored, asked = ([one.at for one in rows] for rows in (loads, stores, lookups))
    workers = law.device.ranks
    shard = law.shape.kv_bytes / workers
    outside = [one for one in lookups if one.external_tokens]
    written = config.disk_tokens > 0
    found = {
        "num_retrieve_requests": Events(loaded),
        "num_store_requests": Events(stored),
        "num_lookup_requests": Events(asked),
        "num_requested_tokens": Events((one.at for one in outside), (one.external_tokens for one in outside)),
        "num_hit_tokens": Events(loaded, (one.tokens for one in loads)),
        "num_stored_tokens": Events(stored, (one.tokens for one in stores)),
        "num_lookup_tokens": Events(asked, (one.chunk_tokens for one in lookups)),
        "num_lookup_hits": Events(asked, (one.chunk_hit_tokens for one in lookups)),
        "num_remote_read_bytes": Events(loaded, (one.disk_tokens * shard for one in loads)),
        "num_remote_write_bytes": Events(stored, (one.tokens * shard * written for one in stores)),
    }
    labels = [
        {"model_name": f"models/{model}", "role": "worker", "served_model_name": model, "worker_id": str(worker)}
        for worker in range(workers)
    ]
    families: list[Family] = []
    clocks = {
        "time_to_retrieve": Events(loaded, (one.seconds for one in loads)),
        "time_to_store": Events(stored, (one.seconds for one in stores)),
    }
    for name, events in clocks.items():
        flushed = events.flushed(FLUSH_SECONDS, _PHASE)
        parts = [histogram(f"lmcache:{name}", own, flushed, TIME_EDGES, instants) for own in labels]
        families.append(_joined(parts))
    for name, events in found.items():
        flushed = events.flushed(FLUSH_SECONDS, _PHASE)
        full = f"lmcache:{name}_total"
        families.append(Family(full, "counter", tuple(counter(full, own, flushed, instants) for own in labels)))
    used = _used(run, instants) * config.chunk_tokens * shard
    gauge = (Sample("lmcache:local_cache_usage", own, used) for own in labels)
    families.append(Family("lmcache:local_cache_usage", "gauge", tuple(gauge)))
    return families


def _joined(parts: Sequence[Family]) -> Family:
    return Family(parts[0].name, parts[0].type, tuple(sample for part in parts for sample in part.samples))


def _used(run: Run, instants: Array) -> Array:
    """Chunks in DRAM at the last flush."""
    times = np.array([at for at, _ in run.dram_chunks])
    counts = np.array([0.0, *(count for _, count in run.dram_chunks)])
    told = np.floor((instants - _PHASE) / FLUSH_SECONDS) * FLUSH_SECONDS + _PHASE
    return counts[np.searchsorted(times, told, side="right")]
