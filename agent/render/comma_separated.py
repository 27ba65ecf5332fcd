"""Answers as comma-separated values: one line a row, nested keys joined by dots."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_INTERVALS = {"avoided_engine_seconds", "net_engine_seconds", "gross", "net", "realised"}
_UNKNOWN = dict.fromkeys(("low", "point", "high"))
_TIERS = ("hbm", "dram", "disk", "p2p", "external")
_PARTS = ("prefill", "decode", "stall", "store")
_OVERHEADS = ("idle", "asleep", "warm_up", "unallocated")


def _under(prefix: str, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def _bounds_of(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(column for name in names for column in _under(name, ("low", "high")))


_ESTIMATES = ("input_computed", "input", "output")
_UNIT_COSTS = (
    "total",
    "input_computed",
    *_under("input_cached", _TIERS),
    "input",
    "output",
    *_under("intervals", _bounds_of((*_ESTIMATES, *_under("input_cached", _TIERS[1:])))),
)
_RESOURCES = ("gpu", "server", "energy", "dram", "storage", "network", "platform", "unused_commitment")
# of a group of the cost report, in their order, behind the window and what the groups are by: whatever is known of it
COST_COLUMNS = (
    "tokens.prompt",
    "tokens.computed",
    *_under("tokens.cached", _TIERS),
    "tokens.generated",
    *_under("engine_seconds", (*_PARTS, *_OVERHEADS, "occupied")),
    *_under("engine_seconds_intervals", _bounds_of(_PARTS)),
    *_under("prefill_share", ("low", "point", "high")),
    "split_law",
    "split_scale",
    "calibrations",
    "cost.total",
    *_under("cost", _RESOURCES),
    *_under("cost.of_which", _OVERHEADS),
    "cost.attributed.input_computed",
    *_under("cost.attributed.input_cached", _TIERS),
    *_under("cost.attributed", ("orphan_holding", "orphan_copies", "output")),
    "orphan_holding",
    *_under("cost_per_million.fully_loaded", _UNIT_COSTS),
    *_under("cost_per_million.active", _UNIT_COSTS),
    *_under("basis", ("tokens", "tiers", "states", "cost", "active", "split")),
    "rates",
    "coverage",
)
_OF_GROUP = {column.partition(".")[0] for column in COST_COLUMNS}


def rows_of(answer: Mapping[str, Any]) -> str:
    """A cost report: one line per group, with what holds for all of them on each; the same columns whatever is known.

    A key that has parts, as `cost` has, is no column where it is unknown: its parts are empty.
    """
    rows = [_flat(row) for row in _rows(answer)]
    leading = [column for row in rows for column in row if column.partition(".")[0] not in _OF_GROUP]
    return _written(rows, [*dict.fromkeys(leading), *COST_COLUMNS] if rows else [])


def _rows(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = {key: value for key, value in answer.items() if key not in {"groups", "findings"}}
    return [{**common, **group} for group in answer["groups"]]


def savings_rows_of(answer: Mapping[str, Any]) -> str:
    """A savings report: one line per group. An interval that is unknown has its three columns, empty."""
    method = {key: value for key, value in answer["method"].items() if key != "calibrations"}
    groups = [{key: _bounds(key, value) for key, value in group.items()} for group in answer["groups"]]
    return lines_of(_rows({**answer, "method": method, "groups": groups}))


def _bounds(key: str, value: Any) -> Any:
    if key == "reuse_engine_seconds":
        return {part: _UNKNOWN if each is None else each for part, each in value.items()}
    return _UNKNOWN if value is None and key in _INTERVALS else value


def lines_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under a line of their keys; unknown is empty, several values of one cell are parted by "; "."""
    flat = [_flat(row) for row in rows]
    return _written(flat, list(dict.fromkeys(column for row in flat for column in row)))


def _written(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    if columns:
        writer.writeheader()
    writer.writerows({column: row.get(column) for column in columns} for row in rows)
    return out.getvalue()


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        elif isinstance(item, list):
            flat[f"{prefix}{key}"] = "; ".join(str(each) for each in item)
        else:
            flat[f"{prefix}{key}"] = item
    return flat
