"""Answers as comma-separated values: one line a row, nested keys joined by dots."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def rows_of(answer: Mapping[str, Any]) -> str:
    """A cost report: one line per group, with what holds for all of them on each."""
    common = {key: value for key, value in answer.items() if key not in {"groups", "findings"}}
    return lines_of([{**common, **group} for group in answer["groups"]])


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
