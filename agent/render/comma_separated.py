"""Answers as comma-separated values: one line a row, nested keys joined by dots."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_INTERVALS = {"avoided_engine_seconds", "net_engine_seconds", "gross", "net", "realised"}
_UNKNOWN = dict.fromkeys(("low", "point", "high"))


def rows_of(answer: Mapping[str, Any]) -> str:
    """A cost report: one line per group, with what holds for all of them on each."""
    common = {key: value for key, value in answer.items() if key not in {"groups", "findings"}}
    return lines_of([{**common, **group} for group in answer["groups"]])


def savings_rows_of(answer: Mapping[str, Any]) -> str:
    """A savings report: one line per group. An interval that is unknown has its three columns, empty."""
    method = {key: value for key, value in answer["method"].items() if key != "calibrations"}
    groups = [{key: _bounds(key, value) for key, value in group.items()} for group in answer["groups"]]
    return rows_of({**answer, "method": method, "groups": groups})


def _bounds(key: str, value: Any) -> Any:
    if key == "reuse_engine_seconds":
        return {part: _UNKNOWN if each is None else each for part, each in value.items()}
    return _UNKNOWN if value is None and key in _INTERVALS else value


def lines_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under a line of their keys; unknown is empty, several values of one cell are parted by "; "."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(column for row in flat for column in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    if columns:
        writer.writeheader()
    writer.writerows(flat)
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
