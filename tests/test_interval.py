from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.followed import follow

from kvtally.agent.interval import (
    ASLEEP_AT_END,
    ASLEEP_AT_START,
    BORN,
    BUSY_AT_END,
    BUSY_AT_START,
    GAUGES_UNKNOWN,
    IDENTITY_BROKEN,
    IDENTITY_OK,
    RESET,
    UNASKED,
    Interval,
    State,
    born,
    close,
    opened,
)
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES, index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.base import Kind

SECOND = 1_000_000_000
STARTED = 1000.0  # unix seconds: the engine's process start
SUMS = {kind: [q.name for q in quantities if q.type != "gauge"] for kind, quantities in QUANTITIES.items()}


def reading(kind: Kind = "engine", /, *, name: str = "x/0", absent: float | None = 0.0, **values: Any) -> Reading:
    """A reading with the values named, and `absent` for every other quantity."""
    fields = {key: values.pop(key) for key in Reading._fields if key in values}
    names = [quantity.name for quantity in QUANTITIES[kind]]
    assert set(values) <= set(names)
    return Reading(kind, name, fields.pop("attributes", {}), tuple(values.get(one, absent) for one in names), **fields)


def page(epoch: float | None = STARTED, **values: Any) -> Reading:
    """An engine's page; without computed tokens it offers no identity to check."""
    return reading("engine", epoch=epoch, **{"computed_tokens": None, **values})


def value(interval: Interval, name: str, kind: Kind = "engine") -> int | None:
    return interval.values[index(kind, name)]


def total(intervals: Sequence[Interval], name: str, kind: Kind = "engine") -> int:
    return sum(value(interval, name, kind) or 0 for interval in intervals)


def test_an_interval_holds_differences_of_counters_and_gauges_as_they_are_at_its_end() -> None:
    before = page(prompt_tokens=100.0, prefill_ns=1.25, running_requests=2.0, kv_usage_ppm=0.25)
    after = page(prompt_tokens=164.0, prefill_ns=2.0, running_requests=1.0, kv_usage_ppm=0.125)
    interval, state, findings = close(opened(before, 5 * SECOND), after, 7 * SECOND, missed=3)
    assert (interval.start_ns, interval.end_ns, interval.missed) == (5 * SECOND, 7 * SECOND, 3)
    assert value(interval, "prompt_tokens") == 64
    assert value(interval, "prefill_ns") == 750_000_000
    assert value(interval, "running_requests") == 1
    assert value(interval, "kv_usage_ppm") == 125_000
    assert (interval.details, interval.began_ns) == ((), None)
    assert (state.taken_at_ns, state.values, state.epoch) == (7 * SECOND, after.values, STARTED)
    assert findings == []


def test_flags_are_bits_of_their_own_and_stay_what_ledgers_hold() -> None:
    flags = (BUSY_AT_START, BUSY_AT_END, ASLEEP_AT_START, ASLEEP_AT_END, GAUGES_UNKNOWN, RESET, BORN)
    assert [*flags, IDENTITY_OK, IDENTITY_BROKEN] == [2**bit for bit in range(9)]


@pytest.mark.parametrize("taken_at_ns", [5 * SECOND, 4 * SECOND])
def test_a_scrape_that_is_not_later_than_the_one_before_is_refused(taken_at_ns: int) -> None:
    with pytest.raises(ValueError, match=f"scrape at {taken_at_ns} is not after 5000000000"):
        close(opened(page(), 5 * SECOND), page(), taken_at_ns)


# Cumulative counters as a page shows them: whole tokens, or seconds with all their digits.
tokens = st.integers(0, 2**53).map(float)
seconds = st.floats(0, 1e7)


@given(st.data())
def test_differences_over_any_partition_of_the_scrapes_add_up_to_the_difference_over_the_whole(
    data: st.DataObject,
) -> None:
    count = data.draw(st.integers(2, 8))
    columns = {
        name: sorted(data.draw(st.lists(kind, min_size=count, max_size=count)))
        for name, kind in (("prompt_tokens", tokens), ("request_ns", seconds), ("queue_ns", seconds))
    }
    readings = [page(**{name: column[at] for name, column in columns.items()}) for at in range(count)]
    inner = data.draw(st.sets(st.integers(1, count - 2))) if count > 2 else set()
    (whole,), _, _ = follow([readings[0], readings[-1]])
    parts, _, findings = follow([readings[0], *(readings[at] for at in sorted(inner)), readings[-1]])
    assert findings == []
    for name, column in columns.items():
        scale = 1 if name == "prompt_tokens" else 1e9
        assert total(parts, name) == value(whole, name) == round(column[-1] * scale) - round(column[0] * scale)


@given(st.lists(st.tuples(st.none() | tokens, st.none() | seconds), min_size=1, max_size=12))
def test_a_counter_that_vanishes_returns_or_falls_counts_up_to_its_highest_value_once(
    shown: list[tuple[float | None, float | None]],
) -> None:
    readings = [page(prompt_tokens=count, request_ns=length) for count, length in shown]
    intervals, state, _ = follow(readings)
    for column, name, scale in ((0, "prompt_tokens", 1), (1, "request_ns", 1e9)):
        values = [one[column] for one in shown]
        known = [one for one in values if one is not None]
        # a family that the first page lacks had counted nothing
        counted = round(max(known) * scale) - round((values[0] or 0.0) * scale) if known else 0
        assert total(intervals, name) == counted
        assert all((value(interval, name) or 0) >= 0 for interval in intervals)
        assert state.values[index("engine", name)] == (max(known) if known else None)


def test_a_value_that_is_missing_is_unknown_in_its_interval_and_not_zero() -> None:
    intervals, _, findings = follow([page(prompt_tokens=10.0), page(prompt_tokens=None), page(prompt_tokens=25.0)])
    assert [one.missed for one in intervals] == [0, 0]
    assert [value(one, "prompt_tokens") for one in intervals] == [None, 15]
    assert findings == []


def test_a_gauge_that_is_missing_is_unknown_and_not_kept() -> None:
    intervals, state, _ = follow([page(kv_usage_ppm=0.5), page(kv_usage_ppm=None)])
    assert value(intervals[0], "kv_usage_ppm") is None
    assert state.values[index("engine", "kv_usage_ppm")] is None


def test_a_counter_that_goes_backwards_alone_is_unknown_and_found_once_until_it_passes_its_highest_value() -> None:
    shown = [100.0, 150.0, 40.0, 60.0, 149.0, 155.0, 160.0]
    intervals, _, findings = follow([page(prompt_tokens=one) for one in shown])
    assert [value(one, "prompt_tokens") for one in intervals] == [50, None, None, None, 5, 5]
    assert [(one.kind, one.severity, one.target) for one in findings] == [
        ("counter_backwards", "warning", "engine/x/0")
    ]
    assert (findings[0].start_ns, findings[0].end_ns) == (2001 * SECOND, 2002 * SECOND)
    assert findings[0].message.startswith("prompt_tokens went backwards")


def test_a_second_fall_after_a_recovery_is_found_again() -> None:
    _, _, findings = follow([page(steps=one) for one in (9.0, 5.0, 10.0, 5.0)])
    assert [(one.kind, one.start_ns // SECOND) for one in findings] == [
        ("counter_backwards", 2000),
        ("counter_backwards", 2002),
    ]


@pytest.mark.parametrize("absurd", [1e300, 2.0**63, -1.0])
def test_a_number_that_nothing_can_have_counted_is_unknown_and_spoils_no_later_interval(absurd: float) -> None:
    intervals, _, findings = follow([page(steps=None), page(steps=absurd), page(steps=7.0), page(steps=9.0)])
    assert [value(one, "steps") for one in intervals] == [None, 7, 2]
    assert [one.kind for one in findings] == ["counter_backwards" if absurd < 0 else "counter_impossible"]


def test_a_number_too_large_for_its_unit_is_unknown_whether_it_is_a_counter_or_a_gauge() -> None:
    # 1e10 seconds are 1e19 ns, more than 64 bits hold; 1e13 as a share is 1e19 ppm
    (interval,), _, _ = follow([page(), page(request_ns=1e10, kv_usage_ppm=1e13, running_requests=-1e300)])
    assert value(interval, "request_ns") is None
    assert value(interval, "kv_usage_ppm") is None
    assert value(interval, "running_requests") is None


def test_seconds_that_no_number_of_nanoseconds_holds_are_unknown_from_the_first_page_on() -> None:
    intervals, _, findings = follow([page(request_ns=one) for one in (1e300, 1e300, 5.0, 6.0)])
    assert [value(one, "request_ns") for one in intervals] == [None, None, SECOND]
    assert [one.kind for one in findings] == ["counter_impossible"]


def test_tokens_that_stand_at_what_cannot_be_are_unknown_until_they_come_down() -> None:
    intervals, _, findings = follow([page(prompt_tokens=one) for one in (1e300, 1e300, 500.0, 1500.0)])
    assert [value(one, "prompt_tokens") for one in intervals] == [None, None, 1000]
    assert [one.kind for one in findings] == ["counter_impossible"]


def test_a_gauge_that_is_not_a_number_is_unknown() -> None:
    (interval,), _, _ = follow([page(), page(kv_usage_ppm=math.nan)])
    assert value(interval, "kv_usage_ppm") is None


@pytest.mark.parametrize("name", ["running_requests", "steps"])
def test_the_largest_number_of_64_bits_is_known_and_the_next_is_not(name: str) -> None:
    below = math.nextafter(2.0**63, 0)
    shown = [page(), page(**{name: below}), page(**{name: 2.0**63})]
    assert value(close(opened(shown[0], 0), shown[1], 1)[0], name) == int(below)
    assert value(close(opened(shown[0], 0), shown[2], 1)[0], name) is None


def test_a_sum_whose_last_bits_fall_is_the_same_sum_in_another_order() -> None:
    total_seconds = 12345.678
    lower = math.nextafter(math.nextafter(total_seconds, 0), 0)
    readings = [
        page(None, request_ns=one, queue_ns=one, prefill_ns=one)
        for one in (total_seconds, lower, total_seconds, total_seconds + 1)
    ]
    intervals, _, findings = follow(readings)
    assert [value(one, "request_ns") for one in intervals] == [0, 0, SECOND]
    assert [one.flags & RESET for one in intervals] == [0, 0, 0]
    assert findings == []


@pytest.mark.parametrize("lower", [1e12 - 1, 1e12 * (1 - 1e-11)])
def test_a_token_less_in_a_thousand_billion_is_a_fall(lower: float) -> None:
    intervals, _, findings = follow([page(steps=1e12), page(steps=lower), page(steps=1e12 + 1)])
    assert [value(one, "steps") for one in intervals] == [None, 1]
    assert [one.kind for one in findings] == ["counter_backwards"]


def test_counters_beyond_64_bits_still_count_while_their_difference_fits() -> None:
    (interval,), _, findings = follow([page(request_ns=2.0**34), page(request_ns=2.0**34 + 64)])
    assert value(interval, "request_ns") == 64 * SECOND  # both scale without rounding
    assert findings == []


def test_another_start_of_the_process_makes_the_new_counts_the_difference() -> None:
    before = page(prompt_tokens=100.0, steps=50.0, prefill_ns=3.0)
    # the new process has already counted more than the old one: only its start tells
    after = page(2000.25, prompt_tokens=120.0, steps=7.0, prefill_ns=0.5)
    interval, state, findings = close(opened(before, 2000 * SECOND), after, 2001 * SECOND)
    assert [value(interval, name) for name in ("prompt_tokens", "steps", "prefill_ns")] == [120, 7, 500_000_000]
    assert interval.flags & RESET
    assert interval.began_ns == 2_000_250_000_000
    assert state.epoch == 2000.25
    assert [one.kind for one in findings] == ["engine_restarted"]


@pytest.mark.parametrize("epoch", [1999.9, 2000.0, 2001.0, 2002.0])
def test_a_start_outside_the_interval_is_a_reset_at_an_unknown_instant(epoch: float) -> None:
    interval, _, findings = close(opened(page(), 2000 * SECOND), page(epoch, steps=3.0), 2001 * SECOND)
    assert interval.flags & RESET
    assert interval.began_ns is None
    assert value(interval, "steps") == 3
    assert (findings[0].start_ns, findings[0].end_ns) == (2000 * SECOND, 2001 * SECOND)


@given(
    st.lists(
        st.tuples(st.booleans(), st.lists(st.integers(0, 10**12), min_size=1, max_size=4).map(sorted)),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_over_restarts_every_life_counts_up_to_its_last_scrape(lives: list[tuple[bool, list[int]]], told: bool) -> None:
    """Each life is the counts that its scrapes show; `told`: the page tells the process start."""
    readings, expected, before = [], 0, 0
    for number, (_, counts) in enumerate(lives):
        # without a start marker, a restart shows only where counts fall
        alive = told or number == 0 or counts[0] < before
        if not alive:
            counts[:] = [count + before for count in counts]
            expected -= before
        readings += [
            page(STARTED + number if told else None, prompt_tokens=float(one), generated_tokens=float(one))
            for one in counts
        ]
        expected += counts[-1]
        before = counts[-1]
    expected -= lives[0][1][0]
    intervals, _, _ = follow(readings)
    assert total(intervals, "prompt_tokens") == total(intervals, "generated_tokens") == expected


def test_without_a_start_marker_two_counters_that_fall_together_are_a_restart() -> None:
    before = page(None, prompt_tokens=100.0, generated_tokens=80.0, steps=10.0)
    after = page(None, prompt_tokens=5.0, generated_tokens=90.0, steps=3.0)
    interval, _, findings = close(opened(before, 2000 * SECOND), after, 2001 * SECOND)
    assert [value(interval, name) for name in ("prompt_tokens", "generated_tokens", "steps")] == [5, 90, 3]
    assert interval.flags & RESET
    assert interval.began_ns is None
    assert [one.kind for one in findings] == ["engine_restarted"]


def test_without_a_start_marker_one_counter_that_falls_and_one_that_vanishes_are_no_restart() -> None:
    before = page(None, prompt_tokens=100.0, steps=10.0)
    interval, _, findings = close(opened(before, 0), page(None, prompt_tokens=5.0, steps=None), SECOND)
    assert not interval.flags & RESET
    assert value(interval, "prompt_tokens") is None
    assert [one.kind for one in findings] == ["counter_backwards"]


def test_gauges_that_fall_are_no_restart() -> None:
    before = page(None, running_requests=9.0, waiting_requests=9.0, kv_usage_ppm=0.9)
    interval, _, findings = close(opened(before, 0), page(None), SECOND)
    assert not interval.flags & RESET
    assert findings == []


def test_while_the_start_marker_stays_counters_that_fall_together_are_no_restart() -> None:
    before = page(prompt_tokens=100.0, steps=10.0)
    interval, _, findings = close(opened(before, 0), page(prompt_tokens=5.0, steps=1.0), SECOND)
    assert not interval.flags & RESET
    assert value(interval, "prompt_tokens") is None
    assert [one.kind for one in findings] == ["counter_backwards"] * 2


def test_a_page_that_once_lacks_the_start_marker_does_not_hide_a_restart() -> None:
    readings = [page(prompt_tokens=100.0), page(None, prompt_tokens=110.0), page(2001.5, prompt_tokens=300.0)]
    intervals, _, findings = follow(readings)
    assert [value(one, "prompt_tokens") for one in intervals] == [10, 300]
    assert [one.flags & RESET for one in intervals] == [0, RESET]
    assert [one.kind for one in findings] == ["tokens_lost"]


def test_a_start_marker_that_comes_late_is_learned() -> None:
    readings = [page(None, steps=5.0), page(STARTED, steps=6.0), page(1500.0, steps=9.0)]
    intervals, state, _ = follow(readings)
    assert [value(one, "steps") for one in intervals] == [1, 9]
    assert state.epoch == 1500.0


def test_a_restart_into_an_engine_that_tells_no_start_forgets_the_old_one() -> None:
    readings = [page(STARTED, steps=5.0, prompt_tokens=9.0), page(None, steps=1.0, prompt_tokens=1.0)]
    _, state, (finding,) = follow(readings)
    assert finding.kind == "engine_restarted"
    assert state.epoch is None


def test_a_family_that_a_restarted_engine_lacks_counts_from_zero_when_it_comes() -> None:
    readings = [page(preemptions=40.0), page(1500.0, preemptions=None), page(1500.0, preemptions=3.0)]
    intervals, _, _ = follow(readings)
    assert [value(one, "preemptions") for one in intervals] == [None, 3]


def test_an_engine_that_restarts_at_work_loses_tokens_from_its_last_scrape_to_its_new_start() -> None:
    busy = opened(page(waiting_requests=1.0), 2000 * SECOND)
    _, _, (finding,) = close(busy, page(2000.5), 2003 * SECOND)
    assert (finding.kind, finding.severity) == ("tokens_lost", "warning")
    # a process start is told up to a second early
    assert (finding.start_ns, finding.end_ns) == (2000 * SECOND, 2_001_500_000_000)
    assert "what it served in the 1.5 s from 1970-01-01T00:33:20.000Z is in no interval" in finding.message


@pytest.mark.parametrize("counter", ["steps", "generated_tokens", "prompt_tokens"])
def test_an_engine_that_worked_between_the_last_two_scrapes_was_at_work(counter: str) -> None:
    unknown = {"steps": None, counter: 4.0}
    _, _, findings = follow([page(), page(**unknown), page(1500.0)])
    assert [one.kind for one in findings] == ["tokens_lost"]


def test_an_engine_that_was_idle_at_the_last_two_scrapes_restarted_without_a_known_loss() -> None:
    readings = [page(steps=4.0, running_requests=1.0), page(steps=4.0), page(1500.0)]
    _, _, (finding,) = follow(readings)
    assert (finding.kind, finding.severity) == ("engine_restarted", "info")


@pytest.mark.parametrize(
    ("before", "after", "flags"),
    [
        ({}, {}, 0),
        ({"running_requests": 1.0}, {}, BUSY_AT_START),
        ({}, {"waiting_requests": 1.0}, BUSY_AT_END),
        ({"awake": 0.0}, {}, ASLEEP_AT_START),
        ({}, {"awake": 0.0}, ASLEEP_AT_END),
        ({"running_requests": None}, {}, GAUGES_UNKNOWN),
        ({}, {"waiting_requests": None}, GAUGES_UNKNOWN),
        ({}, {"running_requests": None, "waiting_requests": 2.0}, BUSY_AT_END),
        ({}, {"running_requests": None, "waiting_requests": None, "awake": None}, GAUGES_UNKNOWN),
        ({"running_requests": None}, {"running_requests": None}, GAUGES_UNKNOWN),
        ({"awake": 0.0}, {"awake": 0.0}, ASLEEP_AT_START | ASLEEP_AT_END),
    ],
)
def test_the_gauges_at_both_ends_say_what_the_engine_did(
    before: dict[str, float | None], after: dict[str, float | None], flags: int
) -> None:
    shown = {"awake": 1.0}
    (interval,), _, _ = follow([page(**{**shown, **before}), page(**{**shown, **after})])
    assert interval.flags == flags


SOURCES = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")


def sourced(prompt: float | None, computed: float | None, hbm: float | None, external: float | None) -> Reading:
    shown = dict(zip(SOURCES, (prompt, computed, hbm, external), strict=True))
    return page(attributes={"version": "0.25.1"}, **shown)


def test_the_identity_of_every_interval_is_checked_and_a_breach_is_a_finding_on_it() -> None:
    readings = [sourced(0.0, 0.0, 0.0, 0.0), sourced(10.0, 4.0, 5.0, 1.0), sourced(20.0, 9.0, 5.0, 1.0)]
    intervals, _, (finding,) = follow(readings)
    assert [one.flags & (IDENTITY_OK | IDENTITY_BROKEN) for one in intervals] == [IDENTITY_OK, IDENTITY_BROKEN]
    assert (finding.kind, finding.severity) == ("identity_broken", "error")
    assert (finding.start_ns, finding.end_ns) == (0, 3600 * SECOND)
    assert finding.message.startswith("from 1970-01-01T00:33:21.000Z on: ")
    assert "5 + 0 + 0 = 5, not 10" in finding.message


def test_a_family_that_returns_with_more_time_than_the_others_breaks_no_identity() -> None:
    readings = [
        sourced(0.0, 0.0, 0.0, 0.0),
        sourced(10.0, 10.0, None, 0.0),
        sourced(20.0, 15.0, 5.0, 0.0),
        sourced(30.0, 20.0, 10.0, 0.0),
    ]
    intervals, _, findings = follow(readings)
    assert findings == []
    assert [one.flags & (IDENTITY_OK | IDENTITY_BROKEN) for one in intervals] == [0, 0, IDENTITY_OK]
    assert [value(one, "hbm_tokens") for one in intervals] == [None, 5, 5]


def test_the_identity_is_checked_again_as_soon_as_the_engine_restarts() -> None:
    readings = [sourced(0.0, 0.0, 0.0, 0.0), sourced(10.0, 10.0, None, 0.0), sourced(3.0, 2.0, 1.0, 0.0)]
    intervals, _, _ = follow([*readings[:2], readings[2]._replace(epoch=1500.0)])
    assert intervals[1].flags & IDENTITY_OK


def test_an_engine_that_started_while_it_was_watched_counts_whole_from_its_process_start() -> None:
    first = page(2000.5, prompt_tokens=30.0, running_requests=2.0, detail_names=("le_1",), details=(6.0,))
    found = born(first, 2003 * SECOND, 2000 * SECOND)
    assert found is not None
    interval, state, findings = found
    assert (interval.start_ns, interval.end_ns) == (2_000_500_000_000, 2003 * SECOND)
    assert interval.began_ns == interval.start_ns
    assert interval.flags & (BORN | RESET | BUSY_AT_START | BUSY_AT_END) == BORN | BUSY_AT_END
    assert value(interval, "prompt_tokens") == 30
    assert interval.details == (6,)
    assert (state.taken_at_ns, state.epoch, state.moved) == (2003 * SECOND, 2000.5, True)
    assert findings == []
    later, _, _ = close(state, page(2000.5, prompt_tokens=31.0), 2004 * SECOND)
    assert value(later, "prompt_tokens") == 1


def test_a_family_that_a_new_engine_shows_late_counts_whole() -> None:
    found = born(page(2000.5, preemptions=None), 2003 * SECOND, 2000 * SECOND)
    assert found is not None
    assert value(found[0], "preemptions") is None
    later, _, _ = close(found[1], page(2000.5, preemptions=2.0), 2004 * SECOND)
    assert value(later, "preemptions") == 2


@pytest.mark.parametrize(
    ("first", "watched_since_ns"),
    [
        (page(1999.999), 2000 * SECOND),  # older than the watch
        (page(2003.0), 2000 * SECOND),  # its start is not before its first scrape
        (page(None), 2000 * SECOND),
        (reading("cache", epoch=2001.0), 2000 * SECOND),
    ],
)
def test_an_engine_that_may_have_worked_unseen_is_only_opened(first: Reading, watched_since_ns: int) -> None:
    assert born(first, 2003 * SECOND, watched_since_ns) is None


def test_an_engine_that_started_in_the_instant_of_the_watch_is_born() -> None:
    assert born(page(2000.0), 2003 * SECOND, 2000 * SECOND) is not None


def detailed(names: str, *details: float, epoch: float = STARTED) -> Reading:
    return page(epoch, detail_names=tuple(names.split()), details=details)


def test_details_are_differences_too() -> None:
    (interval,), state, _ = follow([detailed("a b", 5.0, 1.0), detailed("a b", 7.0, 1.0)])
    assert interval.details == (2, 0)
    assert (state.detail_names, state.details) == (("a", "b"), (7.0, 1.0))


def test_details_count_from_zero_after_a_restart() -> None:
    (interval,), _, _ = follow([detailed("a b", 5.0, 1.0), detailed("a b", 7.0, 0.0, epoch=1500.0)])
    assert interval.details == (7, 0)


def test_a_detail_that_a_page_shows_for_the_first_time_gives_a_baseline() -> None:
    readings = [detailed("a b", 5.0, 1.0), detailed("b c", 4.0, 90.0), detailed("b c", 4.0, 91.0)]
    intervals, _, _ = follow(readings)
    assert [one.details for one in intervals] == [(3, 0), (0, 1)]


def test_details_that_the_first_page_does_not_tell_give_a_baseline_later() -> None:
    intervals, _, _ = follow([detailed("a b"), detailed("a b", 9.0, 2.0), detailed("a b", 9.0, 3.0)])
    assert [one.details for one in intervals] == [(0, 0), (0, 1)]


def test_details_that_a_page_does_not_tell_are_unknown_and_counted_when_it_tells_them_again() -> None:
    intervals, _, findings = follow([detailed("a b", 5.0, 1.0), detailed("a b"), detailed("a b", 9.0, 2.0)])
    assert [one.details for one in intervals] == [None, (4, 1)]
    assert findings == []


def test_details_that_go_backwards_are_unknown_and_counted_up_to_their_highest_value_once() -> None:
    readings = [detailed("a b", *pair) for pair in ((5.0, 1.0), (3.0, 2.0), (6.0, 2.0))]
    intervals, _, findings = follow(readings)
    assert [one.details for one in intervals] == [None, (1, 1)]
    assert [one.kind for one in findings] == ["counter_backwards"]


@pytest.mark.parametrize("absurd", [math.inf, -math.inf, math.nan])
def test_details_that_are_no_numbers_are_as_those_that_a_page_does_not_tell(absurd: float) -> None:
    readings = [detailed("a b", 5.0, 1.0), detailed("a b", absurd, 1.0), detailed("a b", 9.0, 2.0)]
    intervals, _, findings = follow(readings)
    assert [one.details for one in intervals] == [None, (4, 1)]
    assert findings == []
    # nor are they a baseline
    intervals, _, _ = follow([*readings[1:], detailed("a b", 9.0, 3.0)])
    assert [one.details for one in intervals] == [(0, 0), (0, 1)]


def test_a_page_that_contradicts_itself_right_after_a_restart_has_unknown_details() -> None:
    (interval,), _, _ = follow([detailed("a", 5.0), detailed("a", -1.0, epoch=1500.0)])
    assert interval.details is None


def dropping(*details: float | None, epoch: float = STARTED) -> Reading:
    """The page of an LMCache server that has dropped so many events; None: none yet, so that it does not say so."""
    told = tuple(one for one in details if one is not None)
    return reading("cache", epoch=epoch, detail_names=("event_bus_dropped_events",)[: len(told)], details=told)


@pytest.mark.parametrize(
    ("pages", "dropped"),
    [
        ([dropping(5.0), dropping(5.0)], 0),
        ([dropping(5.0), dropping(6.0)], 1),
        ([dropping(None), dropping(None)], 0),
        ([dropping(None), dropping(2.0)], 1),  # the family is there once it has counted
        ([dropping(5.0), dropping(0.0, epoch=1500.0)], 0),
        ([dropping(5.0), dropping(3.0, epoch=1500.0)], 1),  # all since its restart
    ],
)
def test_a_cache_that_drops_events_is_told_of_for_the_hour(pages: list[Reading], dropped: int) -> None:
    _, _, findings = follow(pages)
    # from 2000 s after the epoch on: in its first hour
    assert [(one.kind, one.severity, one.target, one.start_ns, one.end_ns) for one in findings] == (
        [("cache_events_dropped", "warning", "cache/x/0", 0, 3600 * SECOND)] * dropped
    )
    assert all("a lower bound" in one.message for one in findings)


def test_an_hour_in_which_a_cache_drops_events_twice_has_the_same_finding_twice_which_the_ledger_keeps_once() -> None:
    _, _, (first, second) = follow([dropping(1.0), dropping(2.0), dropping(3.0)])
    assert first == second


@given(st.lists(st.none() | st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=8))
def test_details_add_up_over_pages_that_lack_them_or_show_them_falling(shown: list[list[int] | None]) -> None:
    readings = [detailed("a b", 3.0, 4.0), *(detailed("a b", *map(float, one or ())) for one in shown)]
    intervals, _, _ = follow(readings)
    reached = [3, 4]
    for one in shown:
        if one and one[0] >= reached[0] and one[1] >= reached[1]:
            reached = one
    counted = [sum(one.details[at] for one in intervals if one.details is not None) for at in (0, 1)]
    assert counted == [reached[0] - 3, reached[1] - 4]


def test_lmcache_that_is_reset_counts_anew_while_the_engine_counts_on() -> None:
    caches = [
        reading("cache", lookup_tokens=one, loaded_tokens=one / 2, used_bytes=7.0) for one in (800.0, 900.0, 40.0)
    ]
    engines = [page(prompt_tokens=one) for one in (800.0, 900.0, 940.0)]
    intervals, _, findings = follow(caches)
    assert [value(one, "lookup_tokens", "cache") for one in intervals] == [100, 40]
    assert [value(one, "loaded_tokens", "cache") for one in intervals] == [50, 20]
    assert [one.flags for one in intervals] == [0, RESET]
    assert findings == []  # no engine restarted
    assert [value(one, "prompt_tokens") for one in follow(engines)[0]] == [100, 40]


def test_families_that_tick_at_different_moments_each_count_once() -> None:
    readings = [
        page(prefix_query_tokens=64.0),  # admitted
        page(prefix_query_tokens=64.0, prompt_tokens=64.0, first_tokens=1.0),  # first token
        page(prefix_query_tokens=64.0, prompt_tokens=64.0, first_tokens=1.0, finished_requests=1.0, prefill_ns=0.5),
    ]
    intervals, _, findings = follow([page(), *readings])
    assert [value(one, "prefix_query_tokens") for one in intervals] == [64, 0, 0]
    assert [value(one, "prompt_tokens") for one in intervals] == [0, 64, 0]
    assert [value(one, "prefill_ns") for one in intervals] == [0, 0, 500_000_000]
    assert findings == []


def gpu(session: float = 1.0, **values: Any) -> Reading:
    return reading("gpu", name="GPU-a", absent=None, session=session, **values)


def test_a_new_session_of_the_collector_counts_its_own_sums_whole_and_the_devices_counter_on() -> None:
    before = gpu(1.0, energy_mj=1000.0, graphics_ns=50.0, gpm_ns=60.0)
    after = gpu(2.0, energy_mj=1700.0, graphics_ns=1.5, gpm_ns=70.0)
    (interval,), _, findings = follow([before, after])
    assert value(interval, "energy_mj", "gpu") == 700
    assert value(interval, "graphics_ns", "gpu") == 1_500_000_000
    assert value(interval, "gpm_ns", "gpu") == 70_000_000_000  # though it has passed the old sum
    assert not interval.flags & RESET
    assert findings == []


def test_sums_that_a_new_session_has_not_begun_yet_count_whole_when_they_come() -> None:
    readings = [gpu(1.0, graphics_ns=50.0), gpu(2.0), gpu(2.0, graphics_ns=1.5), gpu(2.0, graphics_ns=2.0)]
    intervals, _, findings = follow(readings)
    assert [value(one, "graphics_ns", "gpu") for one in intervals] == [None, 1_500_000_000, 500_000_000]
    assert findings == []


def test_a_collectors_sum_that_falls_within_its_session_began_anew() -> None:
    intervals, _, findings = follow([gpu(graphics_ns=50.0), gpu(graphics_ns=2.0), gpu(graphics_ns=3.0)])
    assert [value(one, "graphics_ns", "gpu") for one in intervals] == [2 * SECOND, SECOND]
    assert findings == []


def test_an_energy_counter_that_fell_while_the_collector_was_away_counts_from_the_drivers_loading() -> None:
    before, after = gpu(1.0, energy_mj=9e12, busy_ns=80.0), gpu(2.0, energy_mj=5000.0, busy_ns=1.0)
    (interval,), _, findings = follow([before, after])
    assert value(interval, "energy_mj", "gpu") == 5000
    assert value(interval, "busy_ns", "gpu") == SECOND
    assert interval.flags & RESET
    assert findings == []


def test_an_energy_counter_that_falls_under_an_open_handle_lies() -> None:
    intervals, _, findings = follow([gpu(energy_mj=9e12), gpu(energy_mj=0.0), gpu(energy_mj=9e12 + 7)])
    assert [value(one, "energy_mj", "gpu") for one in intervals] == [None, 7]
    assert [one.target for one in findings] == ["gpu/GPU-a"]


def asked(state: State, *names: str) -> State:
    """A state of a kvtally that did not know these quantities."""
    unknown = {index("engine", name) for name in names}
    return state._replace(values=tuple(UNASKED if at in unknown else one for at, one in enumerate(state.values)))


def test_a_quantity_that_the_kvtally_before_did_not_ask_for_gives_a_baseline_and_not_its_whole_life() -> None:
    state = asked(opened(page(preemptions=9e9), 2000 * SECOND), "preemptions")
    readings = [page(preemptions=None), page(preemptions=9e9), page(preemptions=9e9 + 2)]
    intervals, kept, findings = follow(readings, state)
    assert [value(one, "preemptions") for one in intervals] == [None, None, 2]
    assert kept.values == readings[-1].values
    assert findings == []


def test_a_quantity_that_was_not_asked_for_counts_whole_for_an_engine_that_has_restarted() -> None:
    state = asked(opened(page(preemptions=50.0), 2000 * SECOND), "preemptions")
    (interval,), _, _ = follow([page(1500.0, preemptions=4.0)], state)
    assert value(interval, "preemptions") == 4


def test_no_value_of_an_interval_is_ever_nan() -> None:
    state = asked(opened(page(), 2000 * SECOND), *SUMS["engine"])
    (interval,), _, _ = follow([page()], state)
    assert all(value(interval, name) is None for name in SUMS["engine"])
    assert not any(isinstance(one, float) or (one is not None and math.isnan(one)) for one in interval.values)


# -- sources that can be told to begin anew while they run


RESETTABLE: list[tuple[Kind, tuple[str, str, str]]] = [
    ("cache", ("lookup_tokens", "lookup_hit_tokens", "stores")),
    ("filesystem", ("read_bytes", "reads", "write_bytes")),
    ("gateway", ("requests", "input_tokens", "output_tokens")),
]


def counted(kind: Kind, names: Sequence[str], counts: Sequence[float | None]) -> Reading:
    return reading(kind, name="page/x", absent=None, epoch=STARTED, **dict(zip(names, counts, strict=True)))


@pytest.mark.parametrize(("kind", "names"), RESETTABLE)
@given(
    before=st.lists(st.integers(0, 10**6), min_size=3, max_size=3),
    after=st.lists(st.lists(st.integers(0, 1000), min_size=3, max_size=3), min_size=1, max_size=4),
)
def test_a_reset_loses_and_doubles_nothing_beyond_what_came_between_the_last_scrape_and_it(
    kind: Kind, names: tuple[str, str, str], before: list[int], after: list[list[int]]
) -> None:
    """Counts run to `before`, are set to zero, and grow by `after`; each life's scrapes are what the page shows."""
    lives = [[sum(steps) for steps in zip(*after[: number + 1], strict=True)] for number in range(len(after))]
    fallen = sum(new < old for new, old in zip(lives[0], before, strict=True))
    risen = sum(new > old for new, old in zip(lives[0], before, strict=True))
    shown = [[0, 0, 0], before, *lives]
    intervals, _, findings = follow([counted(kind, names, [float(one) for one in counts]) for counts in shown])
    if fallen > 1 or (fallen == 1 and not risen):
        for place, name in enumerate(names):
            assert total(intervals, name, kind) == before[place] + lives[-1][place]
        assert findings == []
        assert [bool(one.flags & RESET) for one in intervals] == [False, True] + [False] * (len(lives) - 1)
    else:
        # nothing tells it from a counter that lies: never more than was counted
        assert not any(one.flags & RESET for one in intervals)
        assert all(total(intervals, name, kind) <= before[at] + lives[-1][at] for at, name in enumerate(names))


@pytest.mark.parametrize(("kind", "names"), RESETTABLE)
def test_one_counter_that_falls_while_another_rises_went_backwards(kind: Kind, names: tuple[str, str, str]) -> None:
    shown = [(100.0, 100.0, 5.0), (50.0, 130.0, 5.0), (50.0, 130.0, 5.0), (60.0, 140.0, 5.0)]
    intervals, _, findings = follow([counted(kind, names, one) for one in shown])
    assert [value(one, names[0], kind) for one in intervals] == [None, None, None]
    # the counter that stays below its highest value is no fall of its own, and resets nothing when all else rests
    assert [value(one, names[1], kind) for one in intervals] == [30, 0, 10]
    assert [one.kind for one in findings] == ["counter_backwards"]


@pytest.mark.parametrize(("kind", "names"), RESETTABLE)
def test_a_source_with_one_count_that_falls_began_anew(kind: Kind, names: tuple[str, str, str]) -> None:
    intervals, _, findings = follow([counted(kind, names, one) for one in ((100.0, None, None), (7.0, None, None))])
    assert (value(intervals[0], names[0], kind), findings) == (7, [])
    assert intervals[0].flags & RESET


def test_counters_of_an_engine_that_fall_under_the_same_start_are_no_reset() -> None:
    intervals, _, findings = follow([page(steps=100.0, prompt_tokens=50.0), page(steps=1.0, prompt_tokens=5.0)])
    assert not intervals[0].flags & RESET
    assert [one.kind for one in findings] == ["counter_backwards"] * 2


def test_details_begin_anew_with_their_counters() -> None:
    told: dict[str, Any] = {"detail_names": ("chunks",), "epoch": STARTED}
    before = reading("cache", lookup_tokens=10.0, stores=9.0, details=(5.0,), **told)
    after = reading("cache", lookup_tokens=4.0, stores=2.0, details=(3.0,), **told)
    (interval,), _, _ = follow([before, after])
    assert (value(interval, "lookup_tokens", "cache"), interval.details) == (4, (3,))
