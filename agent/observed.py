"""What the calibration and the savings look at: one replica's intervals with their details, and its GPUs' evidence."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.calibration import Fingerprint
from kvtally.agent.hardware import gpu_of
from kvtally.agent.model_shape import UnknownArchitecture, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.agent.facts import EngineRow, Replica
    from kvtally.agent.timeline import Timeline

_GIB = 1 << 30
# vLLM's own where nobody tells it (--max-num-batched-tokens), by the memory of a GPU (0.32, API server): ASSUMED
_BUDGETS = ((160 * _GIB, 16384), (70 * _GIB, 8192))
_SMALL_BUDGET = 2048


class ObservedRow(NamedTuple):
    """One engine interval; `details` are differences by name, None where the interval does not know them."""

    row: EngineRow
    details: Mapping[str, int] | None


class CacheSpan(NamedTuple):
    """What an outer cache tier did in [start_ns, end_ns): nanoseconds and tokens; None where it does not tell.

    dram_hit_tokens, disk_hit_tokens    found by lookups from token 0 on: what HBM holds too is among them
    """

    start_ns: int
    end_ns: int
    load_ns: int | None
    store_ns: int | None
    loaded_tokens: int | None
    stored_tokens: int | None
    load_bytes: int | None
    store_bytes: int | None
    dram_hit_tokens: int | None = None
    disk_hit_tokens: int | None = None


class Observed(NamedTuple):
    """One replica over a span of time.

    replicas    its target rows by id: a change of version or GPUs in the span opens another
    rows        in time order, of any of these targets
    worked      nanoseconds of GPM graphics utilisation over time, the busiest GPU at each instant; on an engine without
                a GPU the CPU nanoseconds of its workers (Evidence.cpu); None where neither is known
    tensor      nanoseconds of tensor-pipe utilisation over time, and
    clocked     the same times the SM clock in MHz: together they give the clock under load; None without GPM
    source      "graphics" (GPM), "utilization" (utilization.gpu, where no GPM is), "cpu" or "" for none
    caches      by the name of the cache target: what it did, in time order
    """

    replicas: Mapping[int, Replica]
    rows: tuple[ObservedRow, ...]
    worked: Timeline | None
    tensor: Timeline | None
    clocked: Timeline | None
    source: str
    caches: Mapping[str, tuple[CacheSpan, ...]]


def fingerprint_of(replica: Replica) -> Fingerprint | None:
    """What a replica's law holds for; None where its GPUs, their product, or the model's shape or types are unknown."""
    if replica.gpus is None or (replica.gpus and not replica.sku):
        return None
    shape = json.loads(replica.shape) if replica.shape else {}
    architecture, weight_dtype = shape.get("architecture"), shape.get("weight_dtype")
    if not architecture or not weight_dtype:
        return None
    quantization = shape.get("quantization")
    try:
        sizes = shape_of(shape).sizes
    except UnknownArchitecture:  # there is no law for it, and what it lacks is said where one would be learned
        sizes = ""
    return Fingerprint(
        replica.model,
        architecture,
        f"{weight_dtype}+{quantization}" if quantization else weight_dtype,
        shape.get("kv_dtype") or weight_dtype,
        replica.sku or "",
        len(replica.gpus),
        replica.version or "",
        replica.token_budget or default_token_budget(replica.sku or ""),
        sizes,
        replica.eager,
    )


def default_token_budget(sku: str) -> int:
    """Most tokens of a step where the engine's arguments do not say."""
    gpu = gpu_of(sku)
    if gpu is None or "A100" in sku:
        return _SMALL_BUDGET
    return next((budget for least, budget in _BUDGETS if gpu.memory_bytes >= least), _SMALL_BUDGET)
