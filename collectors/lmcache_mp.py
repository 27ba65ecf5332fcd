"""LMCache's multiprocess server (`lmcache server`) as one cache reading: lookups by tier, copies, what DRAM holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps, Labels, Plan

_NO_LABELS: Labels = {}
_LOADS: Labels = {"phase": "staging", "direction": "h2d"}
_STORES: Labels = {"phase": "staging", "direction": "d2h"}
_MODELS_MAX = 16

_BUS = "a lower bound where event_bus_dropped_events moves"
_WHOLE = f"from token 0 on: those that HBM holds too are among them; whole chunks; {_BUS}"
_STAGING = "between host and GPU, phase staging alone: kernel moves the same bytes again and waits for the engine"
_COPIES = "of --supported-transfer-mode lmcache_driven: an engine that copies for itself is not counted"
_CHUNKS = "chunks: the page does not tell their tokens; shown once one was counted"
_RATE = "a mean of rates, one a request and adapter: no bytes come of it"


def _rows(
    quantity: str,
    stem: str,
    unit: str,
    *,
    labels: Labels = _NO_LABELS,
    since: str = "",
    until: str = "",
    trap: str = "",
) -> Iterator[Family]:
    """A counter as exporters of OpenTelemetry spell it: with its unit, or without."""
    for suffix in (f"_{unit}_total", "_total"):
        yield Family(quantity, f"lmcache_mp_{stem}{suffix}", labels, since, until, unit, trap=trap)


def _rates(quantity: str, stem: str, since: str) -> Iterator[Family]:
    """A histogram of GB/s as its count and its sum, this in MB/s."""
    for suffix in ("_GB_per_second", ""):
        yield Family(f"{quantity}_rates", f"lmcache_mp_{stem}{suffix}_count", since=since, unit="samples", trap=_RATE)
        yield Family(
            f"{quantity}_rates_mb_per_s",
            f"lmcache_mp_{stem}{suffix}_sum",
            since=since,
            unit="GB/s",
            scale=1e3,
            trap=_RATE,
        )


# A family is shown once it has counted something. Series by model and cache salt, by device and by adapter are parts.
#   lmcache_mp_lookup_hit_l1_tokens_total{cache_salt="",model_name="models/small",otel_scope_name="…"} 33792.0
#   lmcache_mp_transfer_phase_bytes_total{device_index="0",direction="h2d",phase="staging",otel_scope_name="…"} 1.5e+09
FAMILIES = (
    *_rows(
        "lookup_tokens",
        "lookup_requested",
        "tokens",
        since="0.4.7",
        trap=f"whole chunks of lookups that ended; one that gives up early counts 0; {_BUS}",
    ),
    *_rows("lookup_hit_tokens", "lookup_hit", "tokens", since="0.4.7", trap=_WHOLE),
    *_rows("dram_hit_tokens", "lookup_hit_l1", "tokens", since="0.5.5", trap=_WHOLE),
    *_rows(
        "disk_hit_tokens",
        "lookup_hit_l2",
        "tokens",
        since="0.5.5",
        trap=f"of any L2 adapter, another host's memory among them; behind what L1 has; {_BUS}",
    ),
    *_rows("loads", "num_finished_retrieves", "requests", since="0.5.6", trap=f"one for each GPU; {_COPIES}"),
    *_rows("stores", "num_finished_stores", "requests", since="0.5.6", trap=f"one for each GPU; {_COPIES}"),
    *_rows("load_bytes", "transfer_phase_bytes", "bytes", labels=_LOADS, since="0.5.6", trap=_STAGING),
    *_rows("store_bytes", "transfer_phase_bytes", "bytes", labels=_STORES, since="0.5.6", trap=_STAGING),
    *_rows(
        "load_ns",
        "transfer_phase_elapsed",
        "seconds",
        labels=_LOADS,
        since="0.5.6",
        trap=f"summed over GPUs that copy side by side; {_STAGING}",
    ),
    *_rows(
        "store_ns",
        "transfer_phase_elapsed",
        "seconds",
        labels=_STORES,
        since="0.5.6",
        trap=f"summed over GPUs that copy side by side; {_STAGING}",
    ),
    Family("used_bytes", "lmcache_mp_l1_memory_usage_bytes", since="0.4.7", unit="bytes", trap="DRAM alone"),
    Family("used_bytes", "lmcache_mp_l1_memory_usage", since="0.4.7", unit="bytes", trap="DRAM alone"),
    *_rows("event_bus_dropped_events", "event_bus_dropped", "events", trap="lost before they were counted"),
    *_rows("loaded_chunks", "num_chunks_loaded", "chunks", since="0.4.7", trap=_CHUNKS),
    *_rows("l1_read_chunks", "l1_read", "chunks", since="0.4.7", trap=_CHUNKS),
    *_rows("l1_read_chunks", "l1_read", "keys", since="0.4.4", until="0.4.4", trap=_CHUNKS),
    Family("l1_read_chunks", "lmcache_mp_l1_read_keys", since="0.3.15", until="0.4.1", unit="keys", trap=_CHUNKS),
    *_rows("l1_written_chunks", "l1_write", "chunks", since="0.4.7", trap=_CHUNKS),
    *_rows("l1_written_chunks", "l1_write", "keys", since="0.4.4", until="0.4.4", trap=_CHUNKS),
    Family("l1_written_chunks", "lmcache_mp_l1_write_keys", since="0.3.15", until="0.4.1", unit="keys", trap=_CHUNKS),
    *_rows("l2_loaded_chunks", "l2_prefetch_load_completed", "chunks", since="0.4.7", trap=_CHUNKS),
    *_rows("l2_stored_chunks", "l2_store_completed_objects", "chunks", since="0.4.7", trap=_CHUNKS),
    *_rates("l2_load", "l2_load_throughput", "0.4.7"),
    *_rates("l2_store", "l2_store_throughput", "0.4.7"),
)
# (family, * for any ending; why it is not read)
NOT_READ = (
    ("lmcache_mp_l2_usage_bytes", "a gauge, and `used_bytes` is DRAM: the filesystem tells what lies there"),
    ("lmcache_mp_l1_usage_ratio", "`used_bytes` over what --l1-size-gb says"),
    ("lmcache_mp_l0_l1_load_throughput_GB_per_second", "a histogram of rates: transfer_phase_bytes and _elapsed tell"),
    ("lmcache_mp_l0_l1_store_throughput_GB_per_second", "as above"),
    ("lmcache_mp_transfer_staging_throughput_GB_per_second", "as above"),
    ("lmcache_mp_lookup_hit_l1_keys_total", "keys, one a chunk, rank and group of layers: tokens are read"),
    ("lmcache_mp_lookup_hit_l2_keys_total", "as above"),
    ("lmcache_mp_lookups_requests_total", "requests: tokens tell more"),
    ("lmcache_mp_lookup_prompt_tokens_total", "prompts that the engine counts itself"),
    ("lmcache_mp_lookup_request_hit_tokens_total", "hits of the engine's own cache are among them"),
    ("lmcache_mp_l0_block_lifetime_seconds", "of the engine's own blocks: how long, not how many tokens"),
    ("lmcache_mp_l2_prefetch_failure_chunks_total", "the lookup's hits leave them out already"),
    ("lmcache_mp_lookup_early_exit*", "lookups that gave up: their tokens are in no count"),
    ("lmcache_mp_l1_staging_bytes", "bytes of writes under way, which are among `used_bytes`"),
    ("lmcache_mp_inflight_load_memory_usage_bytes", "room for loads under way, which is among `used_bytes`"),
    ("lmcache_mp_l1_evicted_chunks_total", "chunks that left: what is held is in `used_bytes`"),
    ("lmcache_mp_l2_evicted_objects*", "chunks that left: the filesystem tells what lies there"),
    ("lmcache_mp_l2_load_completed_requests_total", "operations: the chunks are read, their bytes are not on the page"),
    ("lmcache_mp_l2_store_completed_requests_total", "as above"),
    ("lmcache_mp_l2_*_submitted_*", "what was asked for: what was done is read"),
    ("lmcache_mp_l2_prefetch_lookup_*", "what L2 was asked for: lookup_hit_l2 is what it had"),
    ("lmcache_mp_num_submitted_*", "what was asked for: what was done is read"),
    ("lmcache_mp_l0_block_*_gap_seconds", "of the engine's own blocks: how long, not how many tokens"),
    ("lmcache_mp_l0_block_idle_before_evict_seconds", "as above"),
    ("lmcache_mp_l1_chunk_*_seconds", "how long chunks lie and rest, not how many tokens they served"),
    ("lmcache_mp_real_reuse_gap_*", "how long, and how many accesses, between two reads of a chunk: no tokens"),
    ("lmcache_mp_l1_allocation_failure_chunks_total", "chunks that were not stored: no cost and no saving"),
    ("lmcache_mp_l1_eviction_loop_*", "health, no volume"),
    ("lmcache_mp_event_bus_drain_lag_seconds", "the delay of the counts; what was dropped is read"),
    ("lmcache_mp_event_bus_queue_depth", "as above"),
    ("lmcache_mp_kv_events_log_depth", "records at an instant"),
    ("lmcache_mp_num_inflight_*", "operations at an instant"),
    ("lmcache_mp_active_*_jobs", "operations at an instant"),
    ("lmcache_mp_l2_*_adapters", "how many stores there are"),
)


def spelled(sample_name: str) -> str:
    """The sample's name with an underscore behind `lmcache_mp`, where releases up to 0.4.1 have a colon."""
    return "lmcache_mp_" + sample_name[11:] if sample_name.startswith("lmcache_mp:") else sample_name


class LmcacheMpMapping(TableMapping):
    """Reads a multiprocess server: one cache a server, whatever models it serves.

    Not one a model: its model names are paths ("models/small") where the engine's are served names, so that nothing
    could be joined by them; copies, DRAM and L2 carry no model at all; and several engines of one model share one
    series. Which models it serves is an attribute.
    """

    def __init__(self) -> None:
        super().__init__(
            "cache",
            FAMILIES,
            source="lmcache_mp",
            suffix="/lmcache_mp",
            attributes={"cache": "lmcache multiprocess"},
            spelled=spelled,
        )

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One plan for the server; a page with a start time alone has none."""
        plans = super().compile(target, series, version, helps)
        models = sorted({model for one in series if (model := one.labels.get("model_name"))})
        for plan in plans if models else ():
            plan.attributes["models"] = ",".join(models[:_MODELS_MAX])
        return plans
