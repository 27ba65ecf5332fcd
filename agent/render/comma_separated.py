"""Answers as comma-separated values: one line a row, nested keys joined by dots, the same columns whatever is known."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

from kvtally.agent.words import OVERHEADS, PARTS, RESOURCES, TIERS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_INTERVAL = ("low", "point", "high")


def _under(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def _bounds_of(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(column for name in names for column in _under(name, ("low", "high")))


def _intervals_of(*names: str) -> tuple[str, ...]:
    return tuple(column for name in names for column in _under(name, _INTERVAL))


_WINDOW = _under("window", ("start", "end", "covered_seconds"))
_ESTIMATES = ("input_computed", "input", "output")
_UNIT_COSTS = (
    "total",
    "input_computed",
    *_under("input_cached", TIERS),
    "input",
    "output",
    *_under("intervals", _bounds_of((*_ESTIMATES, *_under("input_cached", TIERS[1:])))),
)
# of a group of the cost report, in their order, behind the window and what the groups are by
COST_COLUMNS = (
    "tokens.prompt",
    "tokens.computed",
    *_under("tokens.cached", TIERS),
    "tokens.generated",
    *_under("engine_seconds", (*PARTS, *OVERHEADS, "occupied")),
    *_under("engine_seconds_intervals", _bounds_of(PARTS)),
    *_intervals_of("prefill_share"),
    "split_law",
    "split_scale",
    "calibrations",
    "cost.total",
    *_under("cost", RESOURCES),
    *_under("cost.of_which", OVERHEADS),
    "cost.attributed.input_computed",
    *_under("cost.attributed.input_cached", TIERS),
    *_under("cost.attributed", ("orphan_holding", "orphan_copies", "output")),
    "orphan_holding",
    *_under("cost_per_million.fully_loaded", _UNIT_COSTS),
    *_under("cost_per_million.active", _UNIT_COSTS),
    *_under("basis", ("tokens", "tiers", "states", "cost", "active", "split")),
    "rates",
    "coverage",
)
# of a savings report, ahead of what the groups are by
_OF_SAVINGS = (
    *_WINDOW,
    "currency",
    *_under("method", ("version", "rung", *_under("requests", ("file", "replica", "requests", "counted")))),
)
_OF_A_TIER = (
    *("status", "reasons", "tokens"),
    *_intervals_of("avoided_engine_seconds", "net_engine_seconds", "gross"),
    "holding",
    *_intervals_of("net"),
)
# of a group of the savings report; a tier that does not apply is as empty as one that is unknown
SAVINGS_COLUMNS = (
    "status",
    "reasons",
    *_under("reused_tokens", TIERS),
    *_intervals_of(
        "avoided_engine_seconds", "reuse_engine_seconds.stall", "reuse_engine_seconds.store", "net_engine_seconds"
    ),
    *(column for tier in TIERS for column in _under(f"tiers.{tier}", _OF_A_TIER)),
    *_intervals_of("gross"),
    *_under("reuse_cost", ("stall", "store")),
    "holding",
    *_intervals_of("net", "realised"),
    "capacity_bound_share",
    "latency_seconds",
    "engine_second",
    "rates",
    "calibrations",
    *_under("basis", ("tokens", "tiers", "engine_seconds", "money")),
    "tiers_untold",
)
_MOVED = ("bytes", "seconds", "operations", "gigabytes_per_second", "mean_milliseconds")
# a line is a cache's or a mount's, as `kind` says: what the other kind has is empty
STORAGE_COLUMNS = (
    *_WINDOW,
    "kind",
    "name",
    "cache",
    "engines",
    *_under("tokens", ("looked_up", "found", "found_in_dram", "found_on_storage", "loaded", "stored")),
    *(
        column
        for way in ("load", "store", "storage_read", "storage_write")
        for column in _under(way, (*_MOVED, "basis"))
    ),
    "fstype",
    "mounts",
    "kv_paths",
    "app_bytes",
    "app_bytes_source",
    "device_bytes",
    "device_bytes_source",
    "page_cache_share",
    *_under("read", _MOVED),
    *_under("write", _MOVED),
    "mean_read_bytes_per_second",
)
# of a curve's point, and of what was measured: the last of them are of the latter alone
POINT_COLUMNS = (
    "prompt_tokens",
    "backend",
    "kind",
    "reuse",
    *_intervals_of("ttft_seconds", "cost_per_100m_tokens"),
    "ttft_basis",
    "cost_basis",
    "currency",
    "requests",
    "tier",
    *_intervals_of("predicted_seconds"),
    "error",
)
RATE_COLUMNS = (
    *("resource", "sku", "site", "term", "unit", "currency", "basis", "source", "note", "committed", "pue"),
    *("price", "valid_from", "valid_until"),
)


def cost_rows_of(answer: Mapping[str, Any], by: Iterable[str]) -> str:
    """A cost report by these dimensions: one line per group, with what holds for all of them on each."""
    return lines_of(_rows(answer), (*flat(_common(answer)), *_under("by", by), *COST_COLUMNS))


def savings_rows_of(answer: Mapping[str, Any], by: Iterable[str]) -> str:
    """A savings report by these dimensions: one line per group."""
    return lines_of(_rows(answer), (*_OF_SAVINGS, *_under("by", by), *SAVINGS_COLUMNS))


def storage_rows_of(answer: Mapping[str, Any]) -> str:
    """A report of what loading KV took: one line per cache, then one per mount or disk."""
    kinds = (("cache", "caches"), ("mount", "mounts"))
    rows = [{"window": answer["window"], "kind": kind, **one} for kind, key in kinds for one in answer[key]]
    return lines_of(rows, STORAGE_COLUMNS)


def _common(answer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in answer.items() if key not in {"groups", "findings"}}


def _rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{**_common(answer), **group} for group in answer["groups"]]


def lines_of(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows under a line of these columns; unknown is empty, and what has no column is left out.

    A key that has parts, as `cost` has, is no column where it is unknown: its parts are empty.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(row) for row in rows)
    return out.getvalue()


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A row with nested keys joined by dots, and several values of one cell parted by "; "."""
    row: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            row |= flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            row[f"{prefix}{key}"] = "; ".join(str(each) for each in item)
        else:
            row[f"{prefix}{key}"] = item
    return row
