"""Reads a rate card, a TOML file of [[rate]] tables, and names the entry and the key where it is wrong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import msgspec

from kvtally.agent.price import (
    PACKAGED,
    UNITS,
    Basis,
    Rate,
    RateError,
    Resource,
    Term,
    checked,
    nano_to_text,
    owned_hourly_nano,
    parse_decimal,
    parse_price,
    parse_unit,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_FILE_BYTES_MAX = 16 << 20
_ENTRIES_MAX = 100_000
_SHOWN_CHARACTERS_MAX = 60
_KINDS = {"int": "an integer", "str": "a string", "array": "a list", "object": "a table"}
_DATES = "2026-01-01 or 2026-01-01T12:00:00Z"

_Number = str | int  # TOML floats arrive as they are written, so that 0.1 stays a tenth


class _Owned(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one unit was bought for, in place of a price; the arithmetic is price.owned_hourly_nano."""

    capex: _Number
    residual_share: _Number
    years: _Number
    interest: _Number
    opex_share: _Number


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One [[rate]]; a list of skus or terms gives a row for each."""

    resource: Resource
    term: Term | list[Term]
    unit: str
    currency: str
    since: Any = msgspec.field(name="from")
    sku: str | list[str] = ""
    site: str = ""
    price: _Number | None = None
    owned: _Owned | None = None
    until: Any = None
    basis: Basis = "MEASURED"
    source: str = ""
    note: str = ""
    committed: int | None = None
    pue: _Number | None = None


def read_rates(content: bytes, *, packaged: bool = False) -> tuple[Rate, ...]:
    """Return the rates of a card in the order of the file; RateError names the entry, counted from 0, and the key.

    Packaged rates are all ASSUMED and marked as packaged.
    """
    rates: list[Rate] = []
    for index, table in enumerate(_tables(content)):
        try:
            rates += _rows(_entry(table), packaged=packaged)
        except RateError as error:
            key = f".{error.field}" if error.field else ""
            raise RateError(f"rate[{index}]{key}", error.reason) from error
    return tuple(rates)


def packaged_rates() -> tuple[Rate, ...]:
    """Return the rates that come with the program: list prices with a dated public source, each ASSUMED."""
    return read_rates(Path(__file__).with_name("rate_card.toml").read_bytes(), packaged=True)


def owned_example() -> str:
    """Return a commented card for hardware of one's own, to edit and import."""
    return Path(__file__).with_name("rates_owned_example.toml").read_text("utf-8")


def instant_ns(field: str, value: object) -> int:
    """Return unix nanoseconds of a date or time, as TOML has it or as ISO 8601 text; UTC unless it says otherwise."""
    from datetime import UTC, date, datetime, time, timedelta  # noqa: PLC0415  # the daemon's tick has no need of it

    if isinstance(value, str):
        try:
            instant = datetime.fromisoformat(value)
        except ValueError:
            raise RateError(field, f'"{_shown(value)}" is no date: write {_DATES}') from None
    elif isinstance(value, datetime):
        instant = value
    elif isinstance(value, date):
        instant = datetime.combine(value, time())
    else:
        raise RateError(field, f"is no date: write {_DATES}")
    instant = instant.replace(tzinfo=UTC) if instant.tzinfo is None else instant
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1) * 1000


def _tables(content: bytes) -> list[Any]:
    import tomllib  # noqa: PLC0415  # only who reads a card needs it

    if len(content) > _FILE_BYTES_MAX:
        raise RateError("file", f"is larger than {_FILE_BYTES_MAX >> 20} MiB: this is no rate card")
    try:
        tables = tomllib.loads(content.decode("utf-8-sig"), parse_float=str)
    except UnicodeDecodeError as error:
        raise RateError("file", f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise RateError("file", "is nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or an integer with too many digits
        raise RateError("file", f"is not TOML: {error}") from error
    entries = tables.pop("rate", None)
    if tables:
        raise RateError(_shown(next(iter(tables))), "unknown key: a rate card has [[rate]] tables only")
    if not isinstance(entries, list) or not entries:
        raise RateError("rate", "is missing: begin every entry with [[rate]]")
    if len(entries) > _ENTRIES_MAX:
        raise RateError("rate", f"has more than {_ENTRIES_MAX} entries")
    return entries


def _entry(table: Any) -> _Entry:
    """Decode one table; what msgspec says ("Expected `int | null`, got `str` - at `$.committed`") by key."""
    try:
        return msgspec.convert(table, _Entry)
    except msgspec.ValidationError as error:
        what, _, at = str(error).partition(" - at `$")
    path = at.strip(".`")
    if what.startswith("Invalid enum value"):
        allowed = get_args({"resource": Resource, "term": Term, "basis": Basis}[path.partition("[")[0]])
        raise RateError(path, f"{_shown(what.removeprefix('Invalid enum value '))} is none of {', '.join(allowed)}")
    field = re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", what, re.DOTALL)
    if field is None:
        kinds = what.split("`")[1].split(" | ")
        raise RateError(path, f"expected {' or '.join(_KINDS[kind] for kind in kinds if kind in _KINDS)}")
    inside = f"{path}." if path else ""
    if field[1] == "missing required":
        raise RateError(inside + field[2], "is missing")
    known = [each.encode_name for each in msgspec.structs.fields(_Owned if path else _Entry)]
    raise RateError(inside + _shown(field[2]), f"unknown key; known here: {', '.join(known)}")


def _rows(entry: _Entry, *, packaged: bool) -> Iterator[Rate]:
    unit = parse_unit(entry.resource, entry.unit)
    price_nano, note = _price(entry, unit)
    source = entry.source
    if packaged:
        source = PACKAGED + source
    elif source.startswith(PACKAGED):
        raise RateError("source", f'"{PACKAGED}" marks what comes with kvtally: say where this price is from')
    skus = entry.sku if isinstance(entry.sku, list) else [entry.sku]
    terms = entry.term if isinstance(entry.term, list) else [entry.term]
    for field, names in (("sku", skus), ("term", terms)):
        if not names:
            raise RateError(field, "is an empty list")
    for sku in skus:
        for term in terms:
            rate = Rate(
                resource=entry.resource,
                sku=sku,
                site=entry.site,
                term=term,
                unit=unit,
                price_nano=price_nano,
                currency=entry.currency,
                valid_from_ns=instant_ns("from", entry.since),
                valid_until_ns=None if entry.until is None else instant_ns("until", entry.until),
                basis="ASSUMED" if packaged else entry.basis,
                source=source,
                note=note,
                committed=entry.committed,
                pue=None if entry.pue is None else parse_decimal("pue", str(entry.pue)),
            )
            yield checked(rate)


def _price(entry: _Entry, unit: str) -> tuple[int, str]:
    """The price as stated, or worked out of what the thing was bought for; and the note, which then says so."""
    owned = entry.owned
    if (entry.price is None) == (owned is None):
        raise RateError("price", "give a price, or a [rate.owned] table in its place: one of the two")
    if owned is None:
        return parse_price(str(entry.price)), entry.note
    if entry.term != "owned":
        raise RateError("owned", 'goes with term = "owned"')
    if UNITS[entry.resource][unit] != 1:
        raise RateError("unit", f"a [rate.owned] table gives a price per hour, and {unit} is no hour")
    numbers = {name: str(getattr(owned, name)) for name in _Owned.__struct_fields__}
    try:
        price_nano = owned_hourly_nano(**{name: parse_decimal(name, text) for name, text in numbers.items()})
    except RateError as error:
        raise RateError(f"owned.{error.field}", error.reason) from error
    worked_out = ", ".join(f"{name} {text}" for name, text in numbers.items())
    note = f"{entry.note}; {nano_to_text(price_nano)} an hour of {worked_out}".removeprefix("; ")
    return price_nano, note


def _shown(text: str) -> str:
    """Text from the file for a message of one line."""
    return "".join(each if each.isprintable() else "?" for each in text[:_SHOWN_CHARACTERS_MAX])
