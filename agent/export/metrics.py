"""Every figure that /metrics and OTLP carry: its names, its unit, its type and what it means, in one table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

# counter   only grows, over restarts of kvtally and of what it reads: the ledger's sums of measured counters
# gauge     a figure of a window, or a cumulative one that a later price or calibration may correct downwards, which a
#           counter must never be
Type = Literal["counter", "gauge"]


class Metric(NamedTuple):
    """One metric. `prometheus` ends as its rules want (a counter in _total), `unit` is UCUM."""

    prometheus: str
    otel: str
    unit: str
    type: Type
    meaning: str
    labels: tuple[str, ...]


_REPLICA = "by replica, over the ledger's life"
_WINDOW = "of the window that its label names, back from the ledger's newest interval"

# labels of what is told by engine, and of what is told by group
_ENGINE = ("replica", "model", "cluster", "namespace", "tenant")
_GROUP = ("model", "cluster", "namespace", "tenant", "window")

METRICS: Mapping[str, Metric] = {
    "prompt_tokens": Metric(
        "kvtally_prompt_tokens_total",
        "kvtally.prompt.tokens",
        "{token}",
        "counter",
        f"Prompt tokens by where they came from: computed, hbm, external, or untold, {_REPLICA}",
        (*_ENGINE, "source"),
    ),
    "generated_tokens": Metric(
        "kvtally_generated_tokens_total",
        "kvtally.generated.tokens",
        "{token}",
        "counter",
        f"Output tokens, {_REPLICA}",
        _ENGINE,
    ),
    "requests": Metric(
        "kvtally_first_tokens_total",
        "kvtally.first_tokens",
        "{request}",
        "counter",
        f"Requests that gave their first token, {_REPLICA}",
        _ENGINE,
    ),
    "first_token_seconds": Metric(
        "kvtally_first_token_seconds_total",
        "kvtally.first_token.time",
        "s",
        "counter",
        f"Time to first token, summed over requests, {_REPLICA}",
        _ENGINE,
    ),
    "watched_seconds": Metric(
        "kvtally_watched_seconds_total",
        "kvtally.watched.time",
        "s",
        "counter",
        f"Seconds that intervals cover, {_REPLICA}",
        _ENGINE,
    ),
    "gpu_energy": Metric(
        "kvtally_gpu_energy_joules_total",
        "hw.energy",
        "J",
        "counter",
        "Energy of a GPU, by its counter",
        ("gpu", "sku"),
    ),
    "gpu_seconds": Metric(
        "kvtally_gpu_active_seconds_total",
        "kvtally.gpu.active.time",
        "s",
        "counter",
        "Utilisation x time by measure: graphics, sm, tensor, dram (GPM), utilization (utilization.gpu, which counts "
        "copies as work)",
        ("gpu", "sku", "measure"),
    ),
    "gpu_observed_seconds": Metric(
        "kvtally_gpu_observed_seconds_total",
        "kvtally.gpu.observed.time",
        "s",
        "counter",
        "Seconds over which kvtally_gpu_active_seconds_total was taken: their ratio is the mean utilisation",
        ("gpu", "sku", "measure"),
    ),
    "filesystem_bytes": Metric(
        "kvtally_filesystem_read_bytes_total",
        "kvtally.filesystem.read",
        "By",
        "counter",
        "Bytes read by side: device (or server), app (what programs asked for, a page cache's included)",
        ("filesystem", "source", "side"),
    ),
    "cache_bytes": Metric(
        "kvtally_cache_moved_bytes_total",
        "kvtally.cache.moved",
        "By",
        "counter",
        "KV bytes by way: load (to the engine), store, storage_read, storage_write",
        ("cache", "way"),
    ),
    "cache_seconds": Metric(
        "kvtally_cache_moved_seconds_total",
        "kvtally.cache.moved_time",
        "s",
        "counter",
        "Seconds of moving them, summed over what ran side by side",
        ("cache", "way"),
    ),
    "gateway_tokens": Metric(
        "kvtally_gateway_tokens_total",
        "kvtally.gateway.tokens",
        "{token}",
        "counter",
        "Tokens as a gateway saw them by kind: input, cached, output",
        ("gateway", "kind"),
    ),
    "ledger_cost": Metric(
        "kvtally_ledger_cost",
        "kvtally.ledger.cost",
        "{currency}",
        "gauge",
        "Cost over the ledger's life by resource; no counter, since a corrected price may lower it: use its difference",
        (*_ENGINE, "resource", "currency"),
    ),
    "ledger_seconds": Metric(
        "kvtally_ledger_engine_seconds",
        "kvtally.ledger.engine.time",
        "s",
        "gauge",
        "Engine-seconds over the ledger's life by state (undivided: no law parts it); a calibration may part them anew",
        (*_ENGINE, "state"),
    ),
    "ledger_state_cost": Metric(
        "kvtally_ledger_state_cost",
        "kvtally.ledger.state.cost",
        "{currency}",
        "gauge",
        "A second cut of the same cost: idle, asleep, warm_up, unallocated, and occupied for the rest",
        (*_ENGINE, "state", "currency"),
    ),
    "cached_tokens": Metric(
        "kvtally_ledger_cached_tokens",
        "kvtally.ledger.cached.tokens",
        "{token}",
        "gauge",
        "Reused prompt tokens over the ledger's life by tier; dram and disk may be estimated from a cache's lookups",
        (*_ENGINE, "tier"),
    ),
    "cost_per_million": Metric(
        "kvtally_cost_per_million_tokens",
        "kvtally.cost.per_million_tokens",
        "{currency}",
        "gauge",
        f"Cost of a million tokens {_WINDOW}; its label basis is the basis of the price, not that of a split by input "
        "and output",
        (*_GROUP, "view", "currency", "basis", "tokens"),
    ),
    "cost_per_hour": Metric(
        "kvtally_cost_per_hour",
        "kvtally.cost.per_hour",
        "{currency}/h",
        "gauge",
        f"Cost over the hours in which any engine was watched, so that groups add up, {_WINDOW}",
        (*_GROUP, "currency"),
    ),
    "reuse_ratio": Metric(
        "kvtally_reuse_ratio",
        "kvtally.reuse.ratio",
        "1",
        "gauge",
        f"Share of prompt tokens that were reused {_WINDOW}",
        _GROUP,
    ),
    "coverage": Metric(
        "kvtally_coverage_ratio",
        "kvtally.coverage",
        "1",
        "gauge",
        f"Share of the scrapes that were due {_WINDOW}",
        _GROUP,
    ),
    "savings_seconds": Metric(
        "kvtally_savings_engine_seconds",
        "kvtally.savings.engine.time",
        "s",
        "gauge",
        f"Engine-seconds that reuse avoided by measure (gross, net) and bound (low, point, high: 90 %) {_WINDOW}",
        (*_GROUP, "measure", "bound"),
    ),
    "savings_amount": Metric(
        "kvtally_savings_amount",
        "kvtally.savings.amount",
        "{currency}",
        "gauge",
        f"What reuse saved by measure (gross, net, realised) and bound (low, point, high: 90 %) {_WINDOW}",
        (*_GROUP, "measure", "bound", "currency"),
    ),
    "tier_savings_seconds": Metric(
        "kvtally_tier_savings_engine_seconds",
        "kvtally.tier.savings.engine.time",
        "s",
        "gauge",
        f"Net engine-seconds that a tier avoided {_WINDOW}",
        (*_GROUP, "tier", "bound"),
    ),
    "savings_status": Metric(
        "kvtally_savings_status",
        "kvtally.savings.status",
        "1",
        "gauge",
        f"1 for the status of the savings: ok, lower_bound, not_proven, insufficient_data, unreconciled {_WINDOW}",
        (*_GROUP, "status"),
    ),
    "findings": Metric(
        "kvtally_findings",
        "kvtally.findings",
        "{finding}",
        "gauge",
        f"Findings by kind and severity {_WINDOW}",
        ("kind", "severity", "window"),
    ),
}
# what OTLP makes of filesystem_bytes where a whole disk is meant, by the semantic conventions of system.disk.io
DISK_READ = METRICS["filesystem_bytes"]._replace(otel="system.disk.io", meaning="Disk bytes transferred.")
_OPENCOST = ("model_name", "model_version", "namespace", "workload_type")
# the same figures under the names and labels of OpenCost's inference cost, for setting the two side by side
OPENCOST: Mapping[str, Metric] = {
    "llm_cost_per_million_tokens": Metric(
        "llm_cost_per_million_tokens",
        "llm_cost_per_million_tokens",
        "{currency}",
        "gauge",
        "Cost of a million tokens over the first window, by OpenCost's names: allocation is fully loaded, usage active",
        (*_OPENCOST, "cost_basis", "phase", "allocation_method"),
    ),
    "llm_total_hourly_cost": Metric(
        "llm_total_hourly_cost",
        "llm_total_hourly_cost",
        "{currency}/h",
        "gauge",
        "Cost of an hour over the first window, by OpenCost's names: allocation has idle time in it, usage has not",
        (*_OPENCOST, "cost_basis"),
    ),
    "llm_cache_savings_fraction": Metric(
        "llm_cache_savings_fraction",
        "llm_cache_savings_fraction",
        "1",
        "gauge",
        "Share of prompt tokens reused from HBM, which OpenCost calls savings: no money follows from it",
        _OPENCOST,
    ),
}
