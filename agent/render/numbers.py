"""Figures as a person reads them."""

from __future__ import annotations

from decimal import Context, Decimal

UNKNOWN = "-"
_FOUR_DIGITS = Context(prec=4)
_PLACES_MAX = 9  # what an amount has


def amount(text: str | None) -> str:
    """An amount with four significant digits, all of those before the point and nine places at most."""
    if text is None:
        return UNKNOWN
    value = Decimal(text)
    if not value:
        return "0"
    places = 3 - _FOUR_DIGITS.create_decimal(value).adjusted()
    return f"{value:,.{min(max(places, 0), _PLACES_MAX)}f}"


def between(low: str, high: str) -> str:
    """An interval of amounts."""
    return f"{amount(low)} to {amount(high)}"


def count(value: int | None) -> str:
    """An integer with thousands separated."""
    return UNKNOWN if value is None else f"{value:,}"


def seconds(value: float | None) -> str:
    """Seconds with one place."""
    return UNKNOWN if value is None else f"{value:,.1f}"


def share(part: float | None, whole: float | None) -> str:
    """A part of a whole in percent."""
    return UNKNOWN if part is None or not whole else f"{part / whole:.1%}"
