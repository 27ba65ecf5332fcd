from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.ledger.packing import chosen, packed, unpacked


def test_unknown_details_stay_unknown() -> None:
    assert packed(None) is None
    assert unpacked(None, 7) is None


@pytest.mark.parametrize(
    ("differences", "data"),
    [
        ((), b""),
        ((0, 0, 0), b""),
        ((5,), bytes([1, 5])),
        # a gap of 3 positions from before the first, then of 1
        ((0, 0, 127, 1), bytes([3, 127, 1, 1])),
        # 128 is 0 in its low seven bits, and one more byte with 1
        ((128,), bytes([1, 0x80, 1])),
        # 300 = 2 x 128 + 44
        ((300, 0, 1), bytes([1, 0x80 | 44, 2, 2, 1])),
    ],
)
def test_differences_are_pairs_of_gap_and_number_with_zeros_left_out(differences: tuple[int, ...], data: bytes) -> None:
    assert packed(differences) == data
    assert unpacked(data, len(differences)) == differences


def test_a_gap_of_more_than_127_positions_takes_two_bytes() -> None:
    differences = (0,) * 199 + (1,)
    assert packed(differences) == bytes([0x80 | (200 - 128), 1, 1])
    assert unpacked(packed(differences), 200) == differences


@given(st.lists(st.integers(0, 2**70) | st.just(0), max_size=200))
def test_what_is_packed_unpacks(differences: list[int]) -> None:
    assert unpacked(packed(differences), len(differences)) == tuple(differences)


@given(st.lists(st.integers(0, 2**70) | st.just(0), min_size=1, max_size=60), st.data())
def test_some_positions_are_told_as_when_all_are_unpacked(differences: list[int], data: st.DataObject) -> None:
    positions = sorted(data.draw(st.sets(st.integers(0, len(differences) - 1))))
    assert chosen(packed(differences), positions) == tuple(differences[position] for position in positions)


def test_of_unknown_details_and_of_positions_behind_their_end_nothing_is_told() -> None:
    assert chosen(None, [0, 5]) == (0, 0)
    assert chosen(packed((7, 0, 3)), [0, 5]) == (7, 0)
    # what is behind the last position asked for is not even read: here it would be no number at all
    assert chosen(bytes([1, 7, 1, 0x80]), [0]) == (7,)


@pytest.mark.parametrize(
    ("data", "length", "reason"),
    [
        (bytes([1]), 4, "middle of a number"),  # a gap without its number
        (bytes([1, 0x80]), 4, "middle of a number"),  # a number that goes on and does not
        (bytes([5, 1]), 4, "position 4, the target has 4"),
        (bytes([2, 1, 3, 1]), 4, "position 4, the target has 4"),
        (bytes([0, 1]), 4, "position -1"),
        (bytes([1, 1, 0, 1]), 4, "position 0"),
    ],
)
def test_data_that_cannot_be_is_refused(data: bytes, length: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        unpacked(data, length)


@given(st.binary(max_size=60), st.integers(0, 40))
def test_any_bytes_give_as_many_details_as_asked_for_or_a_value_error(data: bytes, length: int) -> None:
    try:
        found = unpacked(data, length)
    except ValueError:
        return
    assert found is not None
    assert len(found) == length
