from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.followed import follow

from kvtally.agent.interval import Interval, close, opened
from kvtally.agent.ledger.append import decoded, encoded
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES, index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.base import Kind

SECOND = 1_000_000_000
Pair = tuple[float | None, float | None]


def tree(**parts: Pair | None) -> Reading:
    """A process tree: CPU seconds and bytes read of each process."""
    counted = {key: (pair[0], None, None, pair[1], None, None, None, None) for key, pair in parts.items() if pair}
    return Reading("process", "x/0", {}, (*(None,) * 6, float(len(counted)), 4096.0), parts=counted)


def value(interval: Interval, name: str, kind: Kind = "process") -> int | None:
    return interval.values[index(kind, name)]


def total(intervals: Sequence[Interval], name: str) -> int:
    return sum(value(interval, name) or 0 for interval in intervals)


def test_processes_that_come_count_whole_and_those_that_go_keep_what_they_had_counted() -> None:
    readings = [
        tree(a=(100.0, 5.0)),
        tree(a=(101.5, 5.0), b=(0.25, 8.0)),
        tree(b=(0.5, 9.0)),
        tree(b=(0.5, 9.0), c=(0.0, 0.0)),
    ]
    intervals, _, findings = follow(readings)
    assert [value(one, "cpu_ns") for one in intervals] == [1_750_000_000, 250_000_000, 0]
    assert [value(one, "read_bytes") for one in intervals] == [8, 1, 0]
    assert [value(one, "processes") for one in intervals] == [2, 1, 2]
    assert value(intervals[0], "resident_bytes") == 4096
    assert findings == []


def test_counters_that_no_process_tells_are_unknown() -> None:
    (interval,), _, _ = follow([tree(a=(1.0, None)), tree(a=(2.0, None))])
    assert value(interval, "cpu_ns") == SECOND
    assert value(interval, "read_bytes") is None
    assert value(interval, "write_bytes") is None


def test_one_process_that_may_not_be_read_makes_the_sum_of_all_unknown() -> None:
    intervals, _, _ = follow([tree(a=(1.0, 3.0), b=(1.0, None))] * 2 + [tree(a=(1.0, 9.0))])
    assert [value(one, "read_bytes") for one in intervals] == [None, 6]
    assert [value(one, "cpu_ns") for one in intervals] == [0, 0]


def test_a_process_that_becomes_readable_gives_a_baseline() -> None:
    readings = [tree(a=(1.0, None)), tree(a=(1.0, 5000.0)), tree(a=(1.0, 5002.0))]
    intervals, _, _ = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [None, 2]


def test_a_value_that_one_process_lacks_once_is_counted_later() -> None:
    readings = [tree(a=(1.0, 10.0), b=(1.0, 10.0)), tree(a=(1.0, None), b=(1.0, 12.0)), tree(a=(1.0, 15.0))]
    intervals, _, _ = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [2, 5]


def test_a_counter_of_one_process_that_falls_alone_is_not_counted_twice() -> None:
    readings = [tree(a=(4.0, 10.0)), tree(a=(5.0, 3.0)), tree(a=(5.0, 11.0))]
    intervals, _, _ = follow(readings)
    assert [value(one, "cpu_ns") for one in intervals] == [SECOND, 0]
    assert [value(one, "read_bytes") for one in intervals] == [None, 1]


def test_a_part_whose_counters_fall_together_began_anew() -> None:
    # a cgroup is made again under its old name when its service restarts
    (interval,), _, _ = follow([tree(a=(4.0, 10.0)), tree(a=(0.5, 3.0))])
    assert value(interval, "cpu_ns") == 500_000_000
    assert value(interval, "read_bytes") == 3


def test_a_part_that_began_anew_counts_whole_what_it_tells_only_later() -> None:
    names = ("read_bytes", "reads", "write_bytes")
    shown = [(90.0, 9.0, 5.0), (10.0, 1.0, None), (10.0, 1.0, 3.0)]
    readings = [
        Reading("filesystem", "x", {}, (None,) * 8, parts={"a": (read, reads, None, wrote, *(None,) * 4)})
        for read, reads, wrote in shown
    ]
    intervals, _, _ = follow(readings)
    assert [[value(one, name, "filesystem") for name in names] for one in intervals] == [[10, 1, None], [0, 0, 3]]


def test_parts_kept_by_a_kvtally_with_other_quantities_give_a_baseline() -> None:
    state = opened(tree(a=(4.0, 10.0)), 2000 * SECOND)._replace(parts={"a": (4.0, None, None)})
    intervals, _, _ = follow([tree(a=(5.0, 10.0)), tree(a=(6.0, 11.0))], state)
    assert [value(one, "cpu_ns") for one in intervals] == [None, SECOND]
    assert [value(one, "read_bytes") for one in intervals] == [None, 1]


def test_a_part_that_is_new_is_not_the_whole_of_what_others_of_such_a_state_counted() -> None:
    state = opened(tree(a=(4.0, 10.0)), 2000 * SECOND)._replace(parts={"a": (4.0, None, None)})
    intervals, _, _ = follow([tree(a=(24.0, 10.0), b=(2.0, 1.0)), tree(a=(25.0, 11.0), b=(3.0, 1.0))], state)
    assert [value(one, "cpu_ns") for one in intervals] == [None, 2 * SECOND]


@given(
    st.dictionaries(
        st.sampled_from("abcde"),
        st.tuples(
            st.integers(0, 5),
            st.lists(st.none() | st.integers(0, 10**12), min_size=1, max_size=6),
        ),
        max_size=5,
    )
)
def test_every_process_counts_from_its_birth_or_the_first_scrape_to_its_last_value(
    lives: dict[str, tuple[int, list[int | None]]],
) -> None:
    """A life: the scrape at which the process appears, and what each scrape from there on reads of it."""
    moments = 12
    shown: list[dict[str, tuple[float | None, float | None]]] = [{} for _ in range(moments)]
    expected = 0
    for key, (first, increments) in lives.items():
        counted, before = 0, 0
        for offset, increment in enumerate(increments):
            readable = increment is not None or offset == 0  # what was never read is another test
            counted += increment or 0
            shown[first + offset][key] = (counted / 100, float(counted)) if readable else (counted / 100, None)
            if readable:
                before = counted
        expected += before - (increments[0] or 0 if first == 0 else 0)
    intervals, _, _ = follow([tree(**one) for one in shown])
    assert total(intervals, "read_bytes") == expected


def test_a_process_whose_count_falls_alone_is_a_finding_that_names_it_once_until_it_recovers() -> None:
    shown = [(1.0, 1000.0), (1.0, 500.0), (1.0, 600.0), (1.0, 1001.0), (1.0, 7.0)]
    intervals, state, findings = follow([tree(a=one, b=(1.0, 10.0 * at)) for at, one in enumerate(shown)])
    # what b reads counts all along
    assert [value(one, "read_bytes") for one in intervals] == [10, 10, 11, 10]
    assert [(one.kind, one.severity, one.target, one.start_ns // SECOND) for one in findings] == [
        ("counter_backwards", "warning", "process/x/0", 2000),
        ("counter_backwards", "warning", "process/x/0", 2003),
    ]
    assert findings[0].message.startswith("read_bytes of a went backwards although its process did not restart")
    assert state.behind == {"read_bytes of a": "counter_backwards"}


def test_a_fall_of_another_process_while_one_is_behind_is_a_finding_of_its_own() -> None:
    readings = [
        tree(a=(1.0, 9.0), b=(1.0, 9.0)),
        tree(a=(1.0, 5.0), b=(1.0, 9.0)),
        tree(a=(1.0, 5.0), b=(1.0, 4.0)),
    ]
    intervals, _, findings = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [0, None]
    assert [one.message.split(" went ")[0] for one in findings] == ["read_bytes of a", "read_bytes of b"]


@pytest.mark.parametrize("absurd", [math.inf, 1e300, 2.0**63])
def test_a_process_that_shows_more_than_can_be_is_a_finding_and_counts_once_it_is_itself_again(absurd: float) -> None:
    readings = [tree(a=(1.0, 3.0)), tree(a=(1.0, absurd), b=(0.0, absurd)), tree(a=(1.0, 8.0), b=(0.0, 4.0))]
    intervals, _, findings = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [None, 9]
    assert [one.kind for one in findings] == ["counter_impossible"] * 2


def test_seconds_that_no_number_of_nanoseconds_holds_are_unknown() -> None:
    intervals, _, findings = follow(
        [tree(a=(1e300, 1.0)), tree(a=(1e300, 2.0)), tree(a=(5.0, 3.0)), tree(a=(6.0, 3.0))]
    )
    assert [value(one, "cpu_ns") for one in intervals] == [None, None, SECOND]
    assert [one.kind for one in findings] == ["counter_impossible"]


def test_a_count_that_is_not_a_number_is_as_one_that_is_missing() -> None:
    readings = [tree(a=(1.0, 3.0)), tree(a=(1.0, math.nan)), tree(a=(1.0, 8.0))]
    intervals, _, findings = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [None, 5]
    assert findings == []


def test_a_sum_of_parts_beyond_64_bits_is_unknown_and_the_next_is_counted_from_there() -> None:
    many = 2.0**62
    readings = [tree(), tree(a=(0.0, many), b=(0.0, many)), tree(a=(0.0, many), b=(0.0, many + 1024))]
    intervals, _, _ = follow(readings)
    assert [value(one, "read_bytes") for one in intervals] == [None, 1024]


def test_the_last_bits_of_a_parts_sum_may_fall() -> None:
    lower = math.nextafter(1234.5678, 0)
    intervals, _, findings = follow([tree(a=(1234.5678, 0.0)), tree(a=(lower, 0.0)), tree(a=(1235.5678, 0.0))])
    assert [value(one, "cpu_ns") for one in intervals] == [0, SECOND]
    assert findings == []


def test_gauges_of_a_sum_that_can_be_no_number_are_unknown() -> None:
    before, after = tree(a=(1.0, 1.0)), tree(a=(1.0, 1.0))
    (interval,), _, _ = follow([before, after._replace(values=(*(None,) * 6, math.inf, math.nan))])
    assert (value(interval, "processes"), value(interval, "resident_bytes")) == (None, None)


def mounts(**parts: Pair) -> Reading:
    """A filesystem: bytes that programs read and wrote through each mount."""
    counted = {key: (*(None,) * 6, *pair) for key, pair in parts.items()}
    return Reading("filesystem", "lustre:work", {}, (None,) * 8, parts=counted)


def test_a_mount_that_can_be_told_to_begin_anew_did_where_one_count_falls_and_none_rises() -> None:
    readings = [mounts(a=(900.0, 0.0), b=(5.0, 5.0)), mounts(a=(40.0, 0.0), b=(6.0, 5.0)), mounts(a=(41.0, 0.0))]
    intervals, _, findings = follow(readings)
    assert [value(one, "app_read_bytes", "filesystem") for one in intervals] == [41, 1]
    assert findings == []


def test_a_mounts_count_that_falls_while_its_other_rises_went_backwards_and_resets_nothing_when_both_rest() -> None:
    readings = [mounts(a=(900.0, 1.0)), mounts(a=(40.0, 2.0)), mounts(a=(40.0, 2.0)), mounts(a=(901.0, 2.0))]
    intervals, _, findings = follow(readings)
    assert [value(one, "app_read_bytes", "filesystem") for one in intervals] == [None, None, 1]
    assert [one.kind for one in findings] == ["counter_backwards"]


# A life: the scrape at which a process appears, and the bytes that each scrape from there on shows.
lives_of_bytes = st.dictionaries(
    st.sampled_from("abcde"),
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 10**12), min_size=1, max_size=6)),
    max_size=5,
)


@given(lives_of_bytes)
def test_whatever_bytes_fall_each_process_counts_up_to_its_highest_once_and_each_fall_is_found(
    lives: dict[str, tuple[int, list[int]]],
) -> None:
    """CPU seconds never fall, so that no process began anew."""
    shown: list[dict[str, Pair]] = [{} for _ in range(12)]
    counted = falls = 0
    for key, (first, numbers) in lives.items():
        for offset, number in enumerate(numbers):
            shown[first + offset][key] = (float(offset), float(number))
        counted += max(numbers) - (numbers[0] if first == 0 else 0)
        below = [number < max(numbers[: at + 1]) for at, number in enumerate(numbers)]
        falls += sum(now and not before for before, now in pairwise(below))
    intervals, _, findings = follow([tree(**one) for one in shown])
    assert total(intervals, "read_bytes") == counted
    assert all((value(one, "read_bytes") or 0) >= 0 for one in intervals)
    assert [one.kind for one in findings] == ["counter_backwards"] * falls


@given(
    st.dictionaries(
        st.sampled_from("abc"),
        st.tuples(
            st.integers(0, 3),
            st.lists(st.lists(st.integers(0, 1000), min_size=1, max_size=3), min_size=1, max_size=3),
        ),
        max_size=3,
    )
)
def test_a_part_that_begins_anew_counts_every_life_up_to_its_last_scrape(
    parts: dict[str, tuple[int, list[list[int]]]],
) -> None:
    """Both counts of a part grow by what each scrape of a life adds, and begin anew below what the life before had."""
    shown: list[dict[str, Pair]] = [{} for _ in range(12)]
    counted = 0
    for key, (first, lives) in parts.items():
        at, before = first, 0
        for number, added in enumerate(lives):
            # a life that begins no lower than the one before ended is no new one to anybody
            begins = added[0] if number == 0 else min(added[0], before - 1)
            if begins < 0:
                break
            counts = [begins + sum(added[1 : upto + 1]) for upto in range(len(added))]
            for count in counts:
                shown[at][key] = (float(count), float(count))
                at += 1
            counted += counts[-1] - (begins if at == len(counts) and first == 0 else 0)
            before = counts[-1]
    intervals, _, findings = follow([tree(**one) for one in shown])
    assert total(intervals, "read_bytes") == counted
    assert total(intervals, "cpu_ns") == counted * SECOND
    assert findings == []


anything = st.none() | st.floats() | st.sampled_from([0.0, 1.0, 2.0**63, 1e300, -1.0])


@st.composite
def strange_readings(draw: st.DrawFn) -> list[Reading]:
    """Scrapes of one target whose parts come and go and show what they please."""
    kind: Kind = draw(st.sampled_from(["process", "filesystem"]))
    quantities = QUANTITIES[kind]
    numbers = st.tuples(*[anything] * len(quantities))
    gauges = st.tuples(*[anything if one.type == "gauge" else st.none() for one in quantities])
    keys = st.dictionaries(st.sampled_from("abc"), numbers, max_size=3)
    count = draw(st.integers(2, 5))
    return [Reading(kind, "x/0", {}, draw(gauges), parts=draw(keys)) for _ in range(count)]


@given(strange_readings())
def test_whatever_parts_show_nothing_raises_and_every_value_is_a_number_of_64_bits_or_unknown(
    readings: list[Reading],
) -> None:
    intervals, _, _ = follow(readings)
    for interval in intervals:
        for quantity, number in zip(QUANTITIES[readings[0].kind], interval.values, strict=True):
            assert number is None or (type(number) is int and abs(number) < 2**63)
            assert quantity.type == "gauge" or (number or 0) >= 0


@given(strange_readings())
def test_a_kvtally_that_restarts_counts_parts_on_as_if_it_had_not(readings: list[Reading]) -> None:
    kind = readings[0].kind
    staying = leaving = opened(readings[0], 0)
    for at, one in enumerate(readings[1:], start=1):
        leaving = decoded(kind, leaving.taken_at_ns, encoded(kind, leaving), ())
        interval, staying, findings = close(staying, one, at)
        assert close(leaving, one, at)[::2] == (interval, findings)
        leaving = close(leaving, one, at)[1]
