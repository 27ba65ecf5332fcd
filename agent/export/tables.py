"""The ledger's own rows with the labels of their replicas, as tables of typed columns: intervals, charges, savings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from kvtally.agent.accounts import Window
from kvtally.agent.export.counters import LABELS
from kvtally.agent.export.rows import Column
from kvtally.agent.grouping import default_window
from kvtally.agent.ledger.columns import HOUR_NS, INTERVAL_HEAD, quantity_columns
from kvtally.agent.ledger.export_rows import charges_settled, intervals_begun, savings_settled
from kvtally.agent.worth import NOTHING, Worth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from kvtally.agent.export.rows import Row, Value
    from kvtally.agent.ledger.read import LedgerReader, Target

_QUANTITIES = quantity_columns("engine")
_HEAD = INTERVAL_HEAD[3:]  # missed, flags, began_ns
# a worth's single figures, and those of which there are three; lists of derivatives stay in the body
_SINGLE = tuple(name for name in Worth._fields if not isinstance(getattr(NOTHING, name), tuple))
_COUPLINGS, _VIEWS = ("together", "mixed", "apart"), ("low", "point", "high")
_TRIPLE = {"avoided": _COUPLINGS, "outer": _COUPLINGS, "full": _COUPLINGS, "prefill": _VIEWS}

_REPLICA = tuple(Column(name, "text") for name in ("replica", *LABELS))


class Table(NamedTuple):
    """One table: its name, its columns, and what gives its rows for a window."""

    name: str
    columns: tuple[Column, ...]
    rows: Callable[[LedgerReader, Window, Mapping[int, Target]], Iterator[Row]]


def window_from(reader: LedgerReader, window: Window | None) -> Window:
    """The window asked for; the default one of CLI.md for None, and an empty one for a ledger without intervals."""
    extent = reader.extent()
    if window is not None or extent is None:
        return window or Window(0, 0)
    return default_window(extent)


def _engine_intervals(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Row]:
    names = (*_HEAD, *_QUANTITIES)
    for target_id, start_ns, length_ns, *values in intervals_begun(reader, "engine", *window, names):
        about = targets[target_id].attributes
        more = (about.get("version"), about.get("sku"), about.get("gpus"))
        yield (start_ns, start_ns + length_ns, *_labels(targets, target_id), *more, start_ns, length_ns, *values)


def _charges(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Row]:
    rates = dict(reader.rates())
    for row in charges_settled(reader, *window):
        hour_ns, revision, target_id, _, *line, rate_id, amount_nano = row
        rate = rates[rate_id]
        price = (rate_id, rate.price_nano, rate.unit, rate.currency, rate.term, rate.basis, amount_nano)
        yield (hour_ns, hour_ns + HOUR_NS, revision, *_labels(targets, target_id), *line, *price)


def _savings(reader: LedgerReader, window: Window, targets: Mapping[int, Target]) -> Iterator[Row]:
    for hour_ns, target_id, revision, calibration_id, text in savings_settled(reader, *window):
        body: dict[str, Any] = json.loads(text)
        head = (hour_ns, hour_ns + HOUR_NS, revision, *_labels(targets, target_id), calibration_id)
        told = (body.get("loading"), body.get("is_broken"), body.get("has_outer"))
        yield (*head, *told, *_worth(body.get("worth") or {}), text)


def _worth(told: Mapping[str, Any]) -> Iterator[Value]:
    for name in _TRIPLE:
        yield from told.get(name) or (None, None, None)
    for name in _SINGLE:
        yield told.get(name)


def _labels(targets: Mapping[int, Target], target_id: int | None) -> tuple[Value, ...]:
    """The replica's name and labels; unknown where none holds what is charged."""
    if target_id is None:
        return (None,) * len(_REPLICA)
    target = targets[target_id]
    return (target.name, *(target.attributes.get(name) or None for name in LABELS))


TABLES = (
    Table(
        "engine_interval",
        (
            Column("start", "instant"),
            Column("end", "instant"),
            *_REPLICA,
            *(Column(name, "text") for name in ("version", "sku", "gpus")),
            *(Column(name, "count") for name in ("start_ns", "length_ns", *_HEAD, *_QUANTITIES)),
        ),
        _engine_intervals,
    ),
    Table(
        "charge",
        (
            Column("start", "instant"),
            Column("end", "instant"),
            Column("revision", "count"),
            *_REPLICA,
            *(Column(name, "text") for name in ("resource", "sku", "state")),
            Column("quantity", "count"),
            Column("unit", "text"),
            Column("rate_id", "count"),
            Column("price", "money"),
            *(Column(name, "text") for name in ("price_unit", "currency", "term", "basis")),
            Column("amount", "money"),
        ),
        _charges,
    ),
    Table(
        "saving",
        (
            Column("start", "instant"),
            Column("end", "instant"),
            Column("revision", "count"),
            *_REPLICA,
            Column("calibration_id", "count"),
            Column("loading", "text"),
            *(Column(name, "flag") for name in ("is_broken", "has_outer")),
            *(Column(f"{name}_{part}", "real") for name, parts in _TRIPLE.items() for part in parts),
            *(Column(name, "real") for name in _SINGLE),
            Column("body", "text"),
        ),
        _savings,
    ),
)
