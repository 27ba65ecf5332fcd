"""Quantities as people write them: 8GB/s, 100TB, $300/TB-month, 0,50,100."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, NamedTuple

import click

from kvtally.agent.forward import Backend
from kvtally.agent.forward_cost.cost import MONTH_HOURS, Holding, Store
from kvtally.agent.price import HOURS_PER_YEAR, parse_decimal

if TYPE_CHECKING:
    from kvtally.agent.forward import Kind

_PREFIXES = {"": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5}
_NUMBER = r"\d{1,12}(?:\.\d{1,9})?"
_BYTES = re.compile(rf"({_NUMBER})?\s*([kMGTP]?)(i?)B")
_SECONDS = re.compile(rf"({_NUMBER})(ms|s)")
_BIG = Decimal(10) ** 24
_STORE_FORM = (
    "write NAME=8GB/s,$300/TB or NAME=200GB/s,$1000/128GB or NAME=20GB/s,$145/TB-month, and ,5ms for a latency"
)
_SUPPOSED_FORM = "write NAME=10TB@20GB/s,$300/TB or NAME=10TB@20GB/s,$145/TB-month, and ,5ms for a latency"


def bytes_of(option: str, text: str) -> int:
    """A number of bytes such as 100TB, 128 GiB or TB; click.UsageError if it is none."""
    found = _BYTES.fullmatch(text.strip())
    if found is None:
        raise click.UsageError(f"{option} {text!r} is no number of bytes: write 100TB or 64GiB")
    base = 1024 if found[3] else 1000
    size = Decimal(found[1] or 1) * base ** _PREFIXES[found[2]]
    if not 1 <= size <= _BIG:
        raise click.UsageError(f"{option} {text!r} is no size that can be had")
    return int(size)


class _Spec(NamedTuple):
    """A store as it was asked for, and the form in which one is written there."""

    option: str
    text: str
    form: str

    def fault(self, what: str = "") -> click.UsageError:
        """What is wrong with it, quoted as it was written."""
        return click.UsageError(f"{self.option} {self.text!r}: {what and f'{what}; '}{self.form}")


def store_of(option: str, text: str, kind: Kind, capacity_bytes: int, life_years: Decimal) -> Store:
    """A backend with its price from NAME=BANDWIDTH,PRICE[,LATENCY]; click.UsageError or RateError."""
    name, _, told = text.partition("=")
    return _store(_Spec(option, text, _STORE_FORM), (name, told), kind, capacity_bytes, life_years)


def supposed_store_of(option: str, text: str, life_years: Decimal) -> Store:
    """A store of its own size from NAME=CAPACITY@BANDWIDTH,PRICE[,LATENCY]; click.UsageError or RateError."""
    spec = _Spec(option, text, _SUPPOSED_FORM)
    name, _, rest = text.partition("=")
    capacity, at, told = rest.partition("@")
    if not at:
        raise spec.fault()
    return _store(spec, (name, told), "storage", bytes_of(option, capacity), life_years)


def _store(spec: _Spec, parted: tuple[str, str], kind: Kind, capacity_bytes: int, life_years: Decimal) -> Store:
    """A store by its name and by BANDWIDTH,PRICE[,LATENCY]."""
    name, told = parted
    parts = [part.strip() for part in told.split(",")]
    if not name.strip() or len(parts) not in {2, 3}:
        raise spec.fault()
    speed, per, second = parts[0].rpartition("/")
    if not per or second != "s":
        raise spec.fault(f"{parts[0]!r} is no bandwidth")
    latency = 0.0 if len(parts) == 2 else _seconds_of(spec.option, parts[2])  # noqa: PLR2004  # without a latency
    backend = Backend(name.strip(), kind, float(bytes_of(spec.option, speed)), latency)
    return Store(backend, _holding_of(spec, parts[1], life_years), capacity_bytes)


def _seconds_of(option: str, text: str) -> float:
    found = _SECONDS.fullmatch(text)
    if found is None:
        raise click.UsageError(f"{option}: {text!r} is no latency: write 5ms or 0.2s")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


# $300/TB is bought and lasts for its life; $145/TB-month is rented
def _holding_of(spec: _Spec, text: str, life_years: Decimal) -> Holding:
    amount, slash, size = text.lstrip("$€£ ").partition("/")
    if not slash:
        raise spec.fault(f"{text!r} is no price of a size")
    is_rented = size.endswith("-month")
    hours = MONTH_HOURS if is_rented else life_years * HOURS_PER_YEAR
    return Holding(parse_decimal(spec.option, amount), bytes_of(spec.option, size.removesuffix("-month")), hours)


def positive(option: str, value: float, most: float = math.inf) -> float:
    """A number above 0; click.UsageError otherwise."""
    if not 0 < value <= most or not math.isfinite(value):
        limit = "" if math.isinf(most) else f" and at most {most:g}"
        raise click.UsageError(f"{option} {value:g} must be more than 0{limit}")
    return value


def numbers_of(option: str, text: str) -> tuple[float, ...]:
    """Numbers parted by commas; click.UsageError."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} {text!r}: write numbers with commas between them") from None
    if not all(math.isfinite(each) for each in found):
        raise click.UsageError(f"{option} {text!r} holds a number that is not finite")
    return found


def counts_of(option: str, text: str, most: int) -> tuple[int, ...]:
    """Different whole numbers from 2 up, as written or with a k for thousands; click.UsageError."""
    found = []
    for part in text.split(","):
        digits = re.fullmatch(r"(\d{1,9})(k?)", part.strip())
        number = int(digits[1]) * (1000 if digits[2] else 1) if digits else 0
        if not 2 <= number <= most:  # noqa: PLR2004  # one token is always computed
            raise click.UsageError(f"{option} {part.strip()!r} is no number of tokens from 2 to {most:,}")
        found.append(number)
    return tuple(dict.fromkeys(found))


def shares_of(option: str, text: str) -> tuple[float, ...]:
    """Different shares, in rising order, from percents parted by commas; click.UsageError."""
    found = numbers_of(option, text.replace("%", ""))
    if not all(0 <= each <= 100 for each in found):  # noqa: PLR2004  # percent
        raise click.UsageError(f"{option} {text!r}: reuse lies between 0 and 100 percent")
    return tuple(sorted({each / 100 for each in found}))
