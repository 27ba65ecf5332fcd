"""What settled hours hold, read fast: a month of a fleet is a hundred thousand rows of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from sqlalchemy import func, select, tuple_

from kvtally.agent.facts import WORK
from kvtally.agent.finding import Severity  # noqa: TC001  # msgspec looks the types up when it decodes
from kvtally.agent.ledger import schema

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from kvtally.agent.ledger.read import LedgerReader


class Entry(msgspec.Struct, gc=False):
    """What a settlement keeps of one replica, or (target_id None) of GPUs that none holds."""

    target_id: int | None
    sku: str
    state_ns: dict[str, int]
    priced: bool
    split: tuple[float, float, float, float, float, int] | None
    start_ns: int
    end_ns: int
    covered_ns: float
    modelled: bool
    findings: list[tuple[str, Severity, str, int, int, str]]


class _Body(msgspec.Struct, gc=False):
    facts: list[Entry]


class Parted(msgspec.Struct, gc=False):
    """Of the worth of one replica's hour, what parts its occupied time (kvtally.agent.worth.Worth, by its names)."""

    prefill: tuple[float, float, float]
    decode: float
    prefill_by: tuple[float, ...]
    decode_by: tuple[float, ...]
    loads: float | None
    stores: float | None
    external_tokens: float
    dram_tokens: float
    disk_tokens: float
    p2p_tokens: float
    estimated_tokens: float = 0.0


class Saving(msgspec.Struct, gc=False):
    """The part of a saving's body that the cost asks for."""

    worth: Parted | None
    loading: str
    reasons: list[tuple[str, str, bool]]


def revisions(reader: LedgerReader, start_ns: int, end_ns: int) -> dict[int, int]:
    """Hours settled in [start_ns, end_ns), in order, each with its newest revision."""
    c = schema.settlement.c
    query = select(c.period_start_ns, c.revision).where(c.period_start_ns >= start_ns, c.period_start_ns < end_ns)
    rows = reader.connection.execute(query.order_by(c.period_start_ns, c.revision))
    return {hour_ns: revision for hour_ns, revision in rows}  # noqa: C416  # a Row is no pair for dict()


def entries(reader: LedgerReader, hours: dict[int, int]) -> Iterator[tuple[int, Entry]]:
    """(hour, what was settled of a replica in it) of the revisions given."""
    c = schema.settlement.c
    query = select(c.period_start_ns, c.revision, c.facts).where(*_within(c, hours)).order_by(c.period_start_ns)
    decode = msgspec.json.Decoder(_Body).decode
    for hour_ns, revision, facts in reader.connection.execute(query):
        if hours.get(hour_ns) == revision:
            for entry in decode(facts).facts:
                yield hour_ns, entry


def charges(reader: LedgerReader, hours: dict[int, int]) -> Iterator[Any]:
    """(hour, revision, target, resource, sku, state, quantity, unit, rate, nano-units) of the hours' revisions."""
    c = schema.charge.c
    columns = (c.period_start_ns, c.revision, c.target_id, c.resource, c.sku, c.state, c.quantity, c.unit)
    query = select(*columns, c.rate_id, c.amount_nano).where(*_within(c, hours)).order_by(c.period_start_ns, c.id)
    for row in reader.connection.execute(query).all():
        if hours.get(row[0]) == row[1]:
            yield row


def charged(reader: LedgerReader, hours: dict[int, int]) -> Iterator[tuple[int | None, str, str, int, int]]:
    """(target, resource, state, rate, nano-units) of the hours' revisions, summed over the hours."""
    c = schema.charge.c
    alike = (c.target_id, c.resource, c.state, c.rate_id)
    query = select(*alike, func.sum(c.amount_nano)).where(*_within(c, hours), _newest(c, hours)).group_by(*alike)
    yield from reader.connection.execute(query)


def charged_for(
    reader: LedgerReader, hours: dict[int, int], state: str, without: Collection[str]
) -> dict[tuple[int, int], int]:
    """Nano-units of one state by hour and target, `without` some resources."""
    c = schema.charge.c
    query = select(c.period_start_ns, c.target_id, func.sum(c.amount_nano)).where(
        *_within(c, hours), _newest(c, hours), c.state == state, c.resource.not_in(without), c.target_id.is_not(None)
    )
    rows = reader.connection.execute(query.group_by(c.period_start_ns, c.target_id)).all()
    return {(hour_ns, target_id): amount_nano for hour_ns, target_id, amount_nano in rows}


def work(reader: LedgerReader, hours: dict[int, int]) -> dict[tuple[int, int], dict[str, int | None]]:
    """The quantities of facts.WORK by hour and target."""
    c = schema.hours["engine"].c
    start_ns, end_ns = min(hours), max(hours)
    query = select(c.hour_ns, c.target_id, *(c[name] for name in WORK)).where(c.hour_ns.between(start_ns, end_ns))
    return {(row[0], row[1]): dict(zip(WORK, row[2:], strict=True)) for row in reader.connection.execute(query).all()}


def savings(reader: LedgerReader, hours: dict[int, int]) -> Iterator[tuple[int, int, int | None, Saving]]:
    """(hour, target, calibration, what the revision found) of the revisions given."""
    c = schema.saving.c
    query = select(c.period_start_ns, c.revision, c.target_id, c.calibration_id, c.body).where(*_within(c, hours))
    decode = msgspec.json.Decoder(Saving).decode
    for hour_ns, revision, target_id, calibration_id, body in reader.connection.execute(query).all():
        if hours.get(hour_ns) == revision:
            try:
                saving = decode(body)
            except msgspec.ValidationError:  # not one of ours, or of a later kvtally: it parts nothing
                saving = Saving(None, "unknown", [])
            yield hour_ns, target_id, calibration_id, saving


def _within(columns: Any, hours: dict[int, int]) -> tuple[Any, ...]:
    return columns.period_start_ns >= min(hours), columns.period_start_ns <= max(hours)


def _newest(columns: Any, hours: dict[int, int]) -> Any:
    return tuple_(columns.period_start_ns, columns.revision).in_(list(hours.items()))
