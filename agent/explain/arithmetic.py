"""Arithmetic that a reader can redo: every result is computed from its inputs as they are printed."""

from __future__ import annotations

import ast
import math
import operator
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_OPERATORS: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_FUNCTIONS: Mapping[str, Callable[..., float]] = {"max": max, "min": min, "sqrt": math.sqrt}
_NAME = re.compile(r"(?<![\w.])[^\W\d]\w*")
_PLAIN_MAX = 1e10  # what is larger is written with an exponent
_DIGITS = 5


class Row(NamedTuple):
    """One line: a symbol with its value as printed, the words for it, and how it was worked out.

    formula, numbers   in symbols, and with the printed values in their place (+ - * / ^ and functions); both empty for
                       an input
    """

    symbol: str
    words: str
    value: str
    unit: str = ""
    formula: str = ""
    numbers: str = ""
    basis: str = ""
    source: str = ""


class Worked:
    """Lines that build on each other, each computed from the printed values of those before it."""

    def __init__(self, known: Mapping[str, str] | None = None) -> None:
        """`known` are values that were printed elsewhere, by symbol."""
        self.rows: list[Row] = []
        self._printed: dict[str, str] = dict(known or {})

    def __getitem__(self, symbol: str) -> float:
        """The printed value of a symbol."""
        return float(self._printed[symbol])

    def printed(self) -> dict[str, str]:
        """Every symbol with its value as printed."""
        return dict(self._printed)

    def given(self, symbol: str, words: str, value: float, places: int | None = None, /, **about: str) -> None:
        """An input, rounded to so many places; None: five significant digits."""
        self._add(Row(symbol, words, rounded(value, places), **about))

    def result(self, symbol: str, words: str, formula: str, places: int | None = None, /, **about: str) -> None:
        """A line that is worked out: `formula` in symbols that were printed before."""
        value = rounded(evaluated(formula, {name: float(text) for name, text in self._printed.items()}), places)
        self._add(Row(symbol, words, value, formula=formula, numbers=substituted(formula, self._printed), **about))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        self._printed[row.symbol] = row.value

    def as_json(self) -> list[dict[str, str]]:
        """The lines as plain values."""
        return [row._asdict() for row in self.rows]


def rounded(value: float, places: int | None = None) -> str:
    """A number as it prints, without separators; places None: five significant digits."""
    if places is not None:
        text = f"{value:.{places}f}"
        return text.removeprefix("-") if not float(text) else text
    if not value:
        return "0"
    if abs(value) >= _PLAIN_MAX or abs(value) < 1e-4:  # noqa: PLR2004  # beyond this zeros hide the figure
        mantissa, exponent = f"{value:.{_DIGITS - 1}e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.{max(_DIGITS - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def evaluated(formula: str, values: Mapping[str, float]) -> float:
    """What a formula gives; KeyError for a symbol without a value."""
    return _value(ast.parse(formula.replace("^", "**"), mode="eval").body, values)


def _value(node: ast.expr, values: Mapping[str, float]) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return float(number)
        case ast.Name(id=name):
            return values[name]
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, values)
        case ast.BinOp(left=left, op=sign, right=right):
            return float(_OPERATORS[type(sign)](_value(left, values), _value(right, values)))
        case ast.Call(func=ast.Name(id=name), args=arguments):
            return _FUNCTIONS[name](*(_value(one, values) for one in arguments))
    raise ValueError(f"no arithmetic: {ast.dump(node)}")


def substituted(formula: str, printed: Mapping[str, str]) -> str:
    """A formula with the printed values in place of its symbols."""

    def value(found: re.Match[str]) -> str:
        text = printed.get(found[0], found[0])
        return f"({text})" if text.startswith("-") else text

    return _NAME.sub(value, formula)


def rows_of(rows: list[dict[str, Any]]) -> list[Row]:
    """Invert `Worked.as_json`."""
    return [Row(**row) for row in rows]
