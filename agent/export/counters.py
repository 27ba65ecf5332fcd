"""Which sums of the ledger are which counter, and under which labels: what /metrics shows now and a backfill of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from kvtally.agent.ledger.columns import HOUR_NS
from kvtally.agent.ledger.read import Target
from kvtally.agent.price import NANO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvtally.collectors.base import Kind

LABELS = ("model", "cluster", "namespace", "tenant")
LENGTH = "length_ns"  # of the intervals themselves
EVER_NS = 2**62 // HOUR_NS * HOUR_NS  # on the hour: sums by the hour alone, whatever raw intervals have left
_SOURCES = {"computed": "computed_tokens", "hbm": "hbm_tokens", "external": "external_tokens"}
_MEASURES = {
    "graphics": "graphics_ns",
    "sm": "sm_ns",
    "tensor": "tensor_ns",
    "dram": "dram_ns",
    "utilization": "busy_ns",
}
_WAYS = ("load", "store", "storage_read", "storage_write")


class Counter(NamedTuple):
    """One counter of a kind of target: `metric` of kvtally.agent.export.metrics, and the sum that it shows.

    divisor     what turns the ledger's unit into the metric's
    labels      beside those of the target
    """

    metric: str
    quantity: str
    divisor: int = 1
    labels: tuple[tuple[str, str], ...] = ()


_BY_SOURCE = tuple(Counter("prompt_tokens", name, 1, (("source", source),)) for source, name in _SOURCES.items())
_UNTOLD = Counter("prompt_tokens", "prompt_tokens", 1, (("source", "untold"),))
_COUNTERS: Mapping[Kind, tuple[Counter, ...]] = {
    "engine": (
        *_BY_SOURCE,
        _UNTOLD,
        Counter("generated_tokens", "generated_tokens"),
        Counter("requests", "first_tokens"),
        Counter("first_token_seconds", "first_token_ns", NANO),
        Counter("watched_seconds", LENGTH, NANO),
    ),
    "gpu": (
        Counter("gpu_energy", "energy_mj", 1000),
        *(Counter("gpu_seconds", name, NANO, (("measure", measure),)) for measure, name in _MEASURES.items()),
        Counter("gpu_observed_seconds", "gpm_ns", NANO, (("measure", "gpm"),)),
        Counter("gpu_observed_seconds", "observed_ns", NANO, (("measure", "utilization"),)),
    ),
    "filesystem": (
        Counter("filesystem_bytes", "read_bytes", 1, (("side", "device"),)),
        Counter("filesystem_bytes", "app_read_bytes", 1, (("side", "app"),)),
    ),
    "cache": (
        *(Counter("cache_bytes", f"{way}_bytes", 1, (("way", way),)) for way in _WAYS),
        *(Counter("cache_seconds", f"{way}_ns", NANO, (("way", way),)) for way in _WAYS),
    ),
    "gateway": tuple(
        Counter("gateway_tokens", f"{kind}_tokens", 1, (("kind", kind),)) for kind in ("input", "cached", "output")
    ),
}
COUNTED: tuple[Kind, ...] = tuple(_COUNTERS)


def quantities_of(kind: Kind) -> tuple[str, ...]:
    """The quantities that counters of a kind show, without LENGTH."""
    return tuple(dict.fromkeys(one.quantity for one in _COUNTERS[kind] if one.quantity != LENGTH))


def counters_of(kind: Kind, told: Mapping[str, int | None]) -> list[Counter]:
    """The counters of targets whose sums are `told`: what is unknown has none.

    Prompt tokens are shown by source where the engine tells any, else whole: their sum is never counted twice.
    """
    left_out = {_UNTOLD} if any(told[one.quantity] is not None for one in _BY_SOURCE if kind == "engine") else set()
    return [
        one
        for one in _COUNTERS[kind]
        if one not in left_out and (one.quantity == LENGTH or told[one.quantity] is not None)
    ]


def labels_of(target: Target) -> dict[str, str]:
    """The labels of a target's counters; a new version of it is no new series."""
    about = target.attributes
    if target.kind == "engine":
        return {"replica": target.name, **{name: about.get(name, "") for name in LABELS}}
    if target.kind == "gpu":
        return {"gpu": target.name, "sku": about.get("sku", "")}
    if target.kind == "filesystem":
        return {"filesystem": target.name, "source": about.get("source", "")}
    return {target.kind: target.name}


def label_names() -> set[str]:
    """Every label that a counter may have."""
    own = {name for kind in COUNTED for name in labels_of(Target(0, kind, "", {}, ()))}
    return own | {name for counters in _COUNTERS.values() for one in counters for name, _ in one.labels}
