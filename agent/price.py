"""What a price is: its row, its units, and money as text and as integers."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation, localcontext
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from collections.abc import Mapping

Resource = Literal["gpu", "server", "energy", "dram", "storage", "network", "platform"]
Term = Literal["on-demand", "spot", "reserved", "owned"]
Basis = Literal["MEASURED", "ASSUMED"]

NANO = 1_000_000_000
HOUR_NS = 3600 * NANO
DAY_NS = 24 * HOUR_NS
MILLIJOULES_PER_KWH = 3_600_000_000
FOREVER_NS = 2**63 - 1
HOURS_PER_YEAR = 8766
DEFAULT_PUE = Decimal("1.54")
PACKAGED = "packaged: "

_HOUR = Fraction(1)
_MONTH = Fraction(HOURS_PER_YEAR, 12)
# Hours that one unit lasts; None: the quantity is what was used, however long it took. The first unit is the usual one.
UNITS: Mapping[Resource, Mapping[str, Fraction | None]] = {
    "gpu": {"gpu-hour": _HOUR, "gpu-month": _MONTH},
    "server": {"server-hour": _HOUR, "server-month": _MONTH},
    "energy": {"kwh": None},
    "dram": {"gib-hour": _HOUR, "gib-month": _MONTH},
    "storage": {"tib-month": _MONTH, "tib-hour": _HOUR},
    "network": {"gib": None},
    "platform": {"service-hour": _HOUR, "service-month": _MONTH},
}

_PRICE_MAX = 10**9  # in nano-units it still fits the ledger's 64-bit integers
_CAPEX_MAX = 10**13
_NUMBER_CHARACTERS_MAX = 64
_SHOWN_CHARACTERS_MAX = 60
_COMMITTED_MAX = 10**9
_YEARS_MAX = 100
_PUE_MAX = 10
_CHARACTERS_MAX = {"sku": 200, "site": 200, "source": 2000, "note": 2000}


class RateError(ValueError):
    """A price that cannot be right: `field` names the key as a rate file spells it, `reason` what to do."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Rate(NamedTuple):
    """The price of one unit of a resource from an instant on.

    resource        what is paid for
    sku             exact product name; "" is any
    site            where; "" is anywhere
    term            how it is paid for
    unit            one of UNITS[resource]
    price_nano      1e-9 currency units per unit
    currency        ISO 4217
    valid_from_ns   first instant with this price (unix nanoseconds)
    valid_until_ns  first instant without it; None: until a later row of the same key supersedes it
    basis           MEASURED: stated by the operator; ASSUMED: packaged, or marked so
    source          where the price was read; packaged rows begin with PACKAGED
    note            free text
    committed       units paid for whether used or not (reserved only)
    pue             factor on metered kWh (energy only)
    """

    resource: Resource
    sku: str
    site: str
    term: Term
    unit: str
    price_nano: int
    currency: str
    valid_from_ns: int
    valid_until_ns: int | None = None
    basis: Basis = "MEASURED"
    source: str = ""
    note: str = ""
    committed: int | None = None
    pue: Decimal | None = None

    @property
    def packaged(self) -> bool:
        """Whether the row came with the program rather than from the operator."""
        return self.source.startswith(PACKAGED)


def is_used_up(resource: Resource) -> bool:
    """Tell a resource whose quantity is what was used (kWh, GiB of network) from one that is held over time."""
    return None in UNITS[resource].values()


def checked(rate: Rate) -> Rate:
    """Return the rate in its one spelling ("*" is "", an energy rate has a PUE); raise RateError if it is wrong."""
    for field, value, allowed in (
        ("resource", rate.resource, get_args(Resource)),
        ("term", rate.term, get_args(Term)),
        ("basis", rate.basis, get_args(Basis)),
    ):
        if value not in allowed:
            raise RateError(field, f"{value!r} is none of {', '.join(allowed)}")
    if rate.unit != parse_unit(rate.resource, rate.unit):
        raise RateError("unit", f"{rate.unit!r} is not in lower case")
    _check_texts(rate)
    if not 0 <= rate.price_nano <= _PRICE_MAX * NANO:
        raise RateError("price", f"must lie between 0 and {_PRICE_MAX}")
    if not 0 <= rate.valid_from_ns < FOREVER_NS:
        raise RateError("from", "must lie between 1970 and 2262")
    if rate.valid_until_ns is not None and not rate.valid_from_ns < rate.valid_until_ns <= FOREVER_NS:
        raise RateError("until", "must be later than `from`: it is the first instant without this price")
    if rate.committed is not None:
        if rate.term != "reserved" or is_used_up(rate.resource):
            raise RateError("committed", "belongs to a reserved resource that is held over time")
        if not 0 < rate.committed <= _COMMITTED_MAX:
            raise RateError("committed", f"must lie between 1 and {_COMMITTED_MAX}")
    return _with_pue(rate._replace(sku="" if rate.sku == "*" else rate.sku, site="" if rate.site == "*" else rate.site))


def parse_decimal(field: str, text: str) -> Decimal:
    """Read a number from 0 up, exactly as written; RateError otherwise."""
    if len(text) > _NUMBER_CHARACTERS_MAX:
        raise RateError(field, f"a number has at most {_NUMBER_CHARACTERS_MAX} characters")
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise RateError(field, f"{text!r} is not a number: write it like 2.69") from None
    if not value.is_finite() or value < 0:
        raise RateError(field, f"{text} is not a number from 0 up")
    return value


def parse_price(text: str) -> int:
    """Read a price such as "2.69" as nano-units; RateError if negative, no number, or finer than nine places."""
    price = parse_decimal("price", text)
    if price > _PRICE_MAX:
        raise RateError("price", f"{text} is more than {_PRICE_MAX}")
    # Below a nano-unit the exponent may be astronomical, and an exact fraction of it as large as memory.
    nano = Fraction(price) * NANO if not price or price.adjusted() >= -9 else Fraction(1, 2)  # noqa: PLR2004  # 1e-9
    if nano.denominator != 1:
        raise RateError("price", f"{text} has more than nine decimal places")
    return nano.numerator


def parse_unit(resource: Resource, text: str) -> str:
    """Read a unit in its one spelling; RateError names the units that the resource has."""
    unit = text.strip().lower()
    if unit not in UNITS[resource]:
        raise RateError(
            "unit", f"{text[:_SHOWN_CHARACTERS_MAX]!r} is no unit of {resource}: write {' or '.join(UNITS[resource])}"
        )
    return unit


def nano_to_text(amount_nano: int) -> str:
    """Write nano-units as a decimal string of nine places, exact: 70_200_000 is "0.070200000"."""
    whole, places = divmod(abs(amount_nano), NANO)
    return f"{'-' if amount_nano < 0 else ''}{whole}.{places:09d}"


def rate_text(rate: Rate) -> str:
    """Name a rate as it stands beside a figure: what, price, since when, basis and source."""
    whole, places = nano_to_text(rate.price_nano).split(".")
    price = f"{whole}.{places.rstrip('0').ljust(2, '0')}"
    name = " ".join(part for part in (rate.resource, rate.sku, rate.site, rate.term) if part)
    pue = f" x PUE {rate.pue}" if rate.pue is not None else ""
    source = f": {rate.source}" if rate.source else ""
    since = instant_text(rate.valid_from_ns)
    return f"{name} {price} {rate.currency}/{rate.unit}{pue} from {since} ({rate.basis}{source})"


def instant_text(at_ns: int) -> str:
    """Write unix nanoseconds as `--from` takes them: a date at midnight UTC, else ISO 8601 down to microseconds."""
    from datetime import UTC, datetime  # noqa: PLC0415  # the daemon's tick has no need of it

    instant = datetime.fromtimestamp(at_ns // NANO, UTC)
    if not at_ns % DAY_NS:
        return instant.date().isoformat()
    return instant.replace(microsecond=at_ns % NANO // 1000, tzinfo=None).isoformat() + "Z"


def owned_hourly_nano(
    capex: Decimal, residual_share: Decimal, years: Decimal, interest: Decimal, opex_share: Decimal
) -> int:
    """Return nano-units per hour of a thing bought for `capex`: recovery of what it loses, and yearly upkeep.

    residual_share  of capex, what it is worth after `years`; interest per year; opex_share of capex per year.
    Raises RateError.
    """
    for field, value, maximum in (
        ("capex", capex, _CAPEX_MAX),
        ("residual_share", residual_share, 1),
        ("years", years, _YEARS_MAX),
        ("interest", interest, 1),
        ("opex_share", opex_share, 1),
    ):
        if not value.is_finite() or not 0 <= value <= maximum:
            raise RateError(field, f"{value} is not between 0 and {maximum}")
    if not years:
        raise RateError("years", "must be more than 0")
    with localcontext() as context:
        context.prec = 60
        growth = (1 + interest) ** years
        recovery = interest * growth / (growth - 1) if growth != 1 else 1 / years
        yearly = (capex - capex * residual_share / growth) * recovery + opex_share * capex
        hourly = yearly / HOURS_PER_YEAR
        if hourly > _PRICE_MAX:
            raise RateError("capex", f"over {years} years makes more than {_PRICE_MAX} an hour")
        return int((hourly * NANO).to_integral_value())


def _check_texts(rate: Rate) -> None:
    letters = rate.currency.isascii() and rate.currency.isalpha() and rate.currency.isupper()
    if not letters or len(rate.currency) != len("USD"):
        raise RateError("currency", f"{rate.currency[:_SHOWN_CHARACTERS_MAX]!r} is not an ISO 4217 code such as USD")
    for field, maximum in _CHARACTERS_MAX.items():
        text = getattr(rate, field)
        if len(text) > maximum or not text.isprintable():
            raise RateError(field, f"must be one line of at most {maximum} printable characters")


def _with_pue(rate: Rate) -> Rate:
    if rate.resource != "energy":
        if rate.pue is not None:
            raise RateError("pue", f"belongs to energy, not to {rate.resource}")
        return rate
    if rate.pue is None:
        note = f"{rate.note}; PUE {DEFAULT_PUE} assumed".removeprefix("; ")
        return rate._replace(pue=DEFAULT_PUE, basis="ASSUMED", note=note)
    if not rate.pue.is_finite() or not 1 <= rate.pue <= _PUE_MAX:
        raise RateError("pue", f"{rate.pue} is not between 1 and {_PUE_MAX}")
    return rate
