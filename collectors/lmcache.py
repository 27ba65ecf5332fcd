"""LMCache's in-process families as cache readings, from the engine's page or from LMCache's internal API port."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from kvtally.collectors.exposition import Series
from kvtally.collectors.family import Family, TableMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.page import Helps, Plan

_FLUSH = "flushed every 10 s: shorter intervals show steps"
_RANKS = f"every worker counts the same tokens; {_FLUSH}"
_SLOWEST = f"each worker's own; the engine waits for the slowest; {_FLUSH}"
_REMOTE = "of the remote backend alone: a local disk and GDS tell none; size of the KV objects, not of what is on disk"

# Every tensor-parallel worker counts the same tokens under its own worker_id: the greatest is the truth, their sum
# is a multiple of it. Bytes are each worker's own shard and do add up.
#   lmcache:num_hit_tokens_total{model_name="…",role="worker",served_model_name="llama-8b",worker_id="0"} 482304.0
FAMILIES = (
    Family(
        "lookup_tokens",
        "lmcache:num_lookup_tokens_total",
        since="0.3.5",
        greatest=True,
        trap=f"a preempted request looks up again, what it generated included; {_RANKS}",
    ),
    Family(
        "lookup_hit_tokens",
        "lmcache:num_lookup_hits_total",
        since="0.3.5",
        greatest=True,
        trap=f"from token 0 on: those that HBM holds too are among them; whole chunks; {_RANKS}",
    ),
    Family("requested_tokens", "lmcache:num_requested_tokens_total", since="0.3.5", greatest=True, trap=_RANKS),
    Family(
        "loaded_tokens",
        "lmcache:num_hit_tokens_total",
        since="0.3.5",
        greatest=True,
        trap=f"whole chunks: may be more than what was needed beyond HBM; {_RANKS}",
    ),
    Family(
        "stored_tokens",
        "lmcache:num_stored_tokens_total",
        since="0.3.9",
        greatest=True,
        trap=f"those evicted since are among them; {_RANKS}",
    ),
    Family("loads", "lmcache:num_retrieve_requests_total", since="0.3.5", unit="requests", greatest=True, trap=_RANKS),
    Family("stores", "lmcache:num_store_requests_total", since="0.3.5", unit="requests", greatest=True, trap=_RANKS),
    Family("load_ns", "lmcache:time_to_retrieve_sum", since="0.3.5", unit="seconds", greatest=True, trap=_SLOWEST),
    Family("store_ns", "lmcache:time_to_store_sum", since="0.3.5", unit="seconds", greatest=True, trap=_SLOWEST),
    Family("used_bytes", "lmcache:local_cache_usage", since="0.3.5", unit="bytes", trap="DRAM alone"),
    Family("storage_read_bytes", "lmcache:num_remote_read_bytes_total", since="0.3.5", unit="bytes", trap=_REMOTE),
    Family(
        "storage_read_ns",
        "lmcache:remote_time_to_get_sum",
        since="0.3.5",
        unit="milliseconds",
        scale=1e-3,
        trap=_REMOTE,
    ),
    Family("storage_write_bytes", "lmcache:num_remote_write_bytes_total", since="0.3.5", unit="bytes", trap=_REMOTE),
    Family(
        "storage_write_ns",
        "lmcache:remote_time_to_put_sum",
        since="0.3.5",
        unit="milliseconds",
        scale=1e-3,
        trap=_REMOTE,
    ),
    Family("l2_hit_tokens", "lmcache:num_l2_hit_tokens_total", trap="in the docs of one commit, in no release"),
    Family("l3_hit_tokens", "lmcache:num_l3_hit_tokens_total", trap="as above"),
    Family("remote_hit_tokens", "lmcache:num_remote_hit_tokens_total", trap="as above"),
)
# (family, * for any ending; why it is not read)
NOT_READ = (
    ("lmcache:num_vllm_hit_tokens_total", "of requests that load something alone: no volume of hits"),
    ("lmcache:num_prompt_tokens_total", "as above: no volume of prompts"),
    ("lmcache:num_lookup_requests_total", "requests: tokens tell more"),
    ("lmcache:lookup_0_hit_requests_total", "as above"),
    ("lmcache:num_remote_read_requests_total", "operations of the remote backend: their bytes and seconds are read"),
    ("lmcache:num_remote_write_requests_total", "as above"),
    ("lmcache:remote_time_to_get_sync_sum", "remote_time_to_get with the waiting for a thread"),
    ("lmcache:retrieve_speed", "a histogram of rates: tokens and seconds are read"),
    ("lmcache:store_speed", "as above"),
    ("lmcache:p2p_transfer_speed", "as above"),
    ("lmcache:retrieve_hit_rate", "a rate since the last flush: not to be averaged"),
    ("lmcache:lookup_hit_rate", "as above"),
    ("lmcache:local_storage_usage", "what a local disk holds, where `used_bytes` is DRAM"),
    ("lmcache:remote_cache_usage", "no backend sets it"),
    ("lmcache:time_to_lookup", "seconds of asking, each worker's own: nothing is moved in them"),
    ("lmcache:retrieve_*_time", "parts of time_to_retrieve, which is read"),
    ("lmcache:store_*_time", "parts of time_to_store, which is read"),
    ("lmcache:remote_backend_batched_get_blocking_time", "the gets of remote_time_to_get once more, as they block"),
    ("lmcache:instrumented_connector_batched_get_time", "the gets of remote_time_to_get once more"),
    ("lmcache:p2p_time_to_transfer", "loads from a peer, which are among time_to_retrieve"),
    ("lmcache:num_p2p_*", "as above: their tokens are among num_hit_tokens"),
    ("lmcache:request_cache_lifespan", "minutes that KV lay: no tokens come of it"),
    ("lmcache:request_cache_hit_rate", "a ratio of each request: no tokens come of it"),
    ("lmcache:local_cpu_evict_*", "evictions, without tokens or bytes"),
    ("lmcache:local_cpu_hot_cache_count", "objects held at an instant: `used_bytes` has their bytes"),
    ("lmcache:local_cpu_keys_in_request_count", "objects in use at an instant"),
    ("lmcache:chunk_statistics_*", "a study of prompts that is off by default; chunks have no size on the page"),
    ("lmcache:lmcache_is_healthy", "health, no volume: `kvtally doctor` says so where it is 0"),
    ("lmcache:*_failed_count", "failures, without tokens or bytes"),
    ("lmcache:remote_ping_*", "health, no volume"),
    ("lmcache:num_slow_retrieval_by_*", "requests by a threshold: their seconds are read"),
    ("lmcache:*memory_objs_count", "objects at an instant: `used_bytes` has their bytes"),
    ("lmcache:pin_monitor_pinned_objects_count", "objects at an instant"),
    ("lmcache:forced_unpin_count_total", "health, no volume"),
    ("lmcache:storage_events_*_count", "events at an instant"),
    ("lmcache:connector_*_count", "requests and blocks at an instant"),
    ("lmcache:scheduler_unfinished_requests_count", "requests at an instant: the engine tells its own"),
    ("lmcache:kv_msg_queue_size", "a queue at an instant"),
    ("lmcache:remote_put_task_num", "a queue at an instant"),
    ("lmcache:periodic_threads_*", "LMCache's own threads"),
    ("lmcache:cache_controller_*", "LMCache's own controller: no engine's tokens"),
)

# lmcache:lmcache_is_healthy 0.0
_UNHEALTHY = re.compile(rb"^lmcache[:_]lmcache_is_healthy(?:\{[^}\n]*\})? 0(?:\.0*)?\s*$", re.MULTILINE)
# labels that name the model, the name under which it is served first; releases before 0.3.12 lack that one
_MODEL = ("served_model_name", "model_name")


def spelled(sample_name: str) -> str:
    """The sample's name with LMCache's own colon, which OpenMetrics without escaping=allow-utf-8 rewrites."""
    return "lmcache:" + sample_name[8:] if sample_name.startswith("lmcache_") else sample_name


def is_unhealthy(body: bytes) -> bool:
    """Whether a page says that LMCache is out of order: its lookups then find nothing, without another sign."""
    return _UNHEALTHY.search(body) is not None


class LmcacheMapping(TableMapping):
    """Reads LMCache's in-process families: one cache for each model on the page.

    The internal API has a port for the scheduler and one for each worker, and each shows its own process alone. Each
    is a page of its own and a cache of its own to the ledger; whoever joins them takes the greatest, as here.
    """

    def __init__(self) -> None:
        super().__init__(
            "cache",
            FAMILIES,
            source="lmcache",
            suffix="/lmcache",
            by=("model",),
            tells={"model": ("model",)},
            attributes={"cache": "lmcache in-process"},
            spelled=spelled,
        )

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        """One plan for each model that LMCache serves on this page."""
        named = [Series(one.name, {**one.labels, "model": _model(one)}) for one in series]
        return super().compile(target, named, version, helps)


def _model(series: Series) -> str:
    return next((model for label in _MODEL if (model := series.labels.get(label))), "")
