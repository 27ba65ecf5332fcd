"""A pocket calculator for tests: what is printed, worked out again by other code than the one that printed it."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_WRITTEN = {
    "\N{MULTIPLICATION SIGN}": "*",
    "\N{MINUS SIGN}": "-",
    "\N{SQUARE ROOT}": "sqrt",
    "^": "**",
}
_KEYS = {"sqrt": math.sqrt, "max": max, "min": min}


def calculated(text: str, symbols: Mapping[str, str] | None = None) -> float:
    """What an expression gives, as it stands in JSON or on the screen; `symbols` by their printed values."""
    for written, key in _WRITTEN.items():
        text = text.replace(written, key)
    numbers = {name: float(value.replace(",", "")) for name, value in (symbols or {}).items()}
    plain = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return float(eval(plain, {"__builtins__": {}}, {**_KEYS, **numbers}))


def agrees(value: float, printed: str) -> bool:
    """Whether a result rounds to what was printed."""
    number = Decimal(printed.replace(",", ""))
    exponent = number.as_tuple().exponent
    assert isinstance(exponent, int)
    return abs(value - float(number)) <= 0.5 * 10.0**exponent * (1 + 1e-6)


def redo(rows: Sequence[Mapping[str, str]], known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Work every row out again, from its symbols and from its numbers; the values by symbol."""
    values = dict(known or {})
    for row in rows:
        if row["formula"]:
            for result in (calculated(row["formula"], values), calculated(row["numbers"])):
                assert agrees(result, row["value"]), (row, result)
        values[row["symbol"]] = row["value"]
    return values
