"""What a test takes to be told: the value, or the test fails."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def present(value: Value | None) -> Value:
    """The value, which must not be unknown."""
    assert value is not None
    return value
