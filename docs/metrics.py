"""Prints docs/metrics.md: what is read from every source, off the tables that the collectors themselves work by."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

from kvtally.collectors.dcgm import Field
from kvtally.collectors.family import Family
from kvtally.collectors.host_fields import HOST_FIELDS, HOST_NOT_READ
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import SOURCES, reader_class

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from types import ModuleType

INTRODUCTION = """\
# What is read

<!-- printed by docs/metrics.py; `just docs` writes it anew -->

Every source is turned into the same quantities, so that an interval of SGLang or of vLLM 0.12 reads as one of vLLM \
0.33. Where a quantity has several rows, the first that a page shows serves; a version is the first or the last that \
is known to serve it, and empty where nobody looked. A number behind a unit turns it into seconds, bytes or tokens. A \
name that is none of the quantities below is kept as a detail of an interval. What is not read, and why, stands \
below each source.
"""
# fields of a GPU's sample, which dcgm-exporter's table names -> the quantities that they are summed into
OF_A_SAMPLE = {
    "utilization_percent": ("busy_ns",),
    "memory_utilization_percent": ("memory_busy_ns",),
    "memory_used_bytes": ("memory_used_bytes",),
    "power_milliwatts": ("power_mw", "power_sampled_mj"),
    "energy_millijoules": ("energy_mj",),
    "sm_clock_mhz": ("sm_clock_mhz", "busy_cycles"),
    "clock_reasons": ("clock_reasons",),
    "graphics_util": ("graphics_ns",),
    "sm_util": ("sm_ns",),
    "any_tensor_util": ("tensor_ns",),
    "dram_bw_util": ("dram_ns",),
    "pcie_rx_mib_per_s": ("pcie_received_bytes",),
    "pcie_tx_mib_per_s": ("pcie_sent_bytes",),
}
HEAD = ("quantity", "source's name", "versions", "unit", "trap")


def page() -> str:
    """The page, as `just docs` writes it."""
    parts = [INTRODUCTION, "## Quantities\n"]
    for kind, quantities in QUANTITIES.items():
        own: list[Sequence[str]] = [(f"`{one.name}`", one.type, one.meaning) for one in quantities]
        parts.append(f"### {kind}\n\n{_table(('quantity', 'type', 'meaning'), own)}")
    parts.append("## Pages\n")
    for name, source in SOURCES.items():
        module = _with_tables(sys.modules[reader_class(name).__module__])
        rows = [row for table in _tables(module) for row in _rows(table)]
        parts.append(f"### {source.title}\n\n{_table(HEAD, rows)}{_left_out(getattr(module, 'NOT_READ', ()))}")
    parts.append("## This host\n")
    parts += [f"### {title}\n\n{_table(HEAD, _rows(table))}" for title, table in HOST_FIELDS.items()]
    return "\n".join([*parts, _left_out(HOST_NOT_READ).lstrip()])


def _with_tables(module: ModuleType) -> ModuleType:
    """A reader's module, or the one of its tables where that is another: vllm and vllm_families."""
    return sys.modules.get(f"{module.__name__}_families", module)


def _left_out(names: Mapping[str, str] | Iterable[tuple[str, str]]) -> str:
    rows = [(f"`{name}`", why) for name, why in dict(names).items()]
    return f"\nNot read:\n\n{_table(('source', 'why'), rows)}" if rows else ""


def _tables(module: ModuleType) -> Iterator[Sequence[Any]]:
    seen: set[int] = set()
    for value in vars(module).values():
        if _is_table(value) and id(value) not in seen:
            seen.add(id(value))
            yield value


def _is_table(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(isinstance(row, Family | Field) for row in value)


def _rows(table: Iterable[Family | Field]) -> Iterator[tuple[str, ...]]:
    for row in table:
        if isinstance(row, Field):
            for quantity in OF_A_SAMPLE[row.field]:
                unit = f"{row.unit}, a mean" if row.is_mean else row.unit
                yield f"`{quantity}`", f"`{row.sample}`", "", unit, row.trap
            continue
        more = "".join(f" plus `{name}{_labels(labels)}`" for name, labels in row.plus)
        less = "".join(f" less `{name}{_labels(labels)}`" for name, labels in row.less)
        scale = f"{row.scale:,.0f}" if row.scale > 1 else f"{row.scale:g}"
        unit = f"{row.unit} x {scale}" if row.scale != 1 else row.unit
        how = ", the greatest of its series" if row.greatest else ""
        told = f"`{row.sample}{_labels(row.labels)}`{more}{less}{how}"
        yield f"`{row.quantity}`", told, _versions(row), unit, row.trap


def _labels(labels: Any) -> str:
    pairs = [
        f'{name}=~"{value.pattern}"' if isinstance(value, re.Pattern) else f'{name}="{value}"'
        for name, value in labels.items()
    ]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def _versions(row: Family) -> str:
    if row.since and row.until:
        return f"{row.since} to {row.until}"
    return f"from {row.since}" if row.since else f"to {row.until}" if row.until else ""


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without the columns that would be empty."""
    body = list(rows)
    kept = [at for at, _ in enumerate(head) if any(row[at] for row in body)]
    every = (head, ["---"] * len(head), *map(_escaped, body))
    return "".join(f"| {' | '.join(cells[at] for at in kept)} |\n" for cells in every)


def _escaped(cells: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in cells]


if __name__ == "__main__":
    print(page(), end="")
