"""Details of an interval as bytes: pairs of variable-length integers (gap to the next position, difference)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


_MORE = 128  # the bit of a byte that says: another follows


def packed(differences: Sequence[int] | None) -> bytes | None:
    """Pack non-negative differences; zeros cost nothing. None (unknown) stays None."""
    if differences is None:
        return None
    out = bytearray()
    last = -1
    for position, difference in enumerate(differences):
        if difference:
            for number in (position - last, difference):
                rest = number
                while rest >= _MORE:
                    out.append(rest % _MORE | _MORE)
                    rest >>= 7
                out.append(rest)
            last = position
    return bytes(out)


def unpacked(data: bytes | None, length: int) -> tuple[int, ...] | None:
    """Invert `packed` for `length` positions; ValueError if the data does not fit."""
    if data is None:
        return None
    numbers: list[int] = []
    number, shift = 0, 0
    for byte in data:
        number |= byte % _MORE << shift
        shift += 7
        if byte < _MORE:
            numbers.append(number)
            number, shift = 0, 0
    if shift or len(numbers) % 2:
        raise ValueError("details end in the middle of a number")
    differences = [0] * length
    position = -1
    for gap, difference in zip(numbers[::2], numbers[1::2], strict=True):
        position += gap
        if not gap or position >= length:
            raise ValueError(f"details have a position {position}, the target has {length}")
        differences[position] = difference
    return tuple(differences)


def chosen(data: bytes | None, positions: Sequence[int]) -> tuple[int, ...]:
    """The differences at these positions, which ascend; what is behind the last of them is not read. Unknown: 0."""
    found = dict.fromkeys(positions, 0)
    last = positions[-1] if positions else -1
    position, number, shift, is_gap = -1, 0, 0, True
    for byte in data or b"":
        number |= byte % _MORE << shift
        shift += 7
        if byte >= _MORE:
            continue
        if is_gap:
            position += number
            if position > last:
                break
        elif position in found:
            found[position] = number
        is_gap = not is_gap
        number, shift = 0, 0
    return tuple(found.values())
