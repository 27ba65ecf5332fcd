from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.interval import (
    ASLEEP_AT_END,
    ASLEEP_AT_START,
    BORN,
    BUSY_AT_END,
    BUSY_AT_START,
    GAUGES_UNKNOWN,
    IDENTITY_OK,
    RESET,
)
from kvtally.agent.states import STATES, EngineTime, State, engine_time

BUSY = BUSY_AT_START | BUSY_AT_END
ASLEEP = ASLEEP_AT_START | ASLEEP_AT_END
EVERY_FLAG = BUSY | ASLEEP | GAUGES_UNKNOWN | RESET | BORN | IDENTITY_OK


def test_the_states_are_those_of_the_type() -> None:
    assert sorted(STATES) == sorted(get_args(State))


@given(
    st.integers(1, 10**15),
    st.integers(0, EVERY_FLAG),
    st.none() | st.integers(0, 10**6),
    st.none() | st.integers(-(10**15), 10**15),
    st.none() | st.integers(-(10**15), 10**15),
)
def test_every_nanosecond_belongs_to_exactly_one_state(
    length_ns: int, flags: int, steps: int | None, working_ns: int | None, began_after_ns: int | None
) -> None:
    time = engine_time(length_ns, flags, steps, working_ns, began_after_ns)
    parts = [getattr(time, state) for state in STATES]
    assert sum(parts) == length_ns
    assert min(parts) >= 0


@pytest.mark.parametrize(
    ("flags", "steps", "working_ns", "time"),
    [
        # nothing ran or waited at either end, and no step was made
        (0, 0, 60, EngineTime(idle=100)),
        (0, 0, None, EngineTime(idle=100)),
        # something ran or waited at both ends: occupied, a long prefill without output too
        (BUSY, 7, 30, EngineTime(occupied=100)),
        (BUSY, 0, 0, EngineTime(occupied=100)),
        (BUSY, None, None, EngineTime(occupied=100)),
        # the gauges alone do not tell: the working time does
        (BUSY_AT_START, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        (BUSY_AT_END, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        (0, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        (0, 7, 130, EngineTime(occupied=100, modelled=True)),
        (0, 7, -1, EngineTime(idle=100, modelled=True)),
        # no step, so the device worked for somebody else
        (BUSY_AT_START, 0, 30, EngineTime(idle=100, modelled=True)),
        (GAUGES_UNKNOWN, 0, 30, EngineTime(idle=100, modelled=True)),
        # gauges that are not there are unknown, not 0
        (GAUGES_UNKNOWN, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        (GAUGES_UNKNOWN | BUSY, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        # an engine that worked for an unknown time
        (0, 7, None, EngineTime(occupied=100, modelled=True)),
        (0, None, None, EngineTime(occupied=100, modelled=True)),
        (0, None, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        # asleep goes before everything but what is not allocated
        (ASLEEP, 0, None, EngineTime(asleep=100)),
        (ASLEEP | BUSY, 0, None, EngineTime(asleep=100)),
        (ASLEEP_AT_START, 0, None, EngineTime(idle=100)),
        (ASLEEP_AT_END | BUSY_AT_START, 7, 30, EngineTime(occupied=30, idle=70, modelled=True)),
        (IDENTITY_OK, 0, None, EngineTime(idle=100)),
    ],
)
def test_an_interval_goes_to_the_state_that_its_ends_tell(
    flags: int, steps: int | None, working_ns: int | None, time: EngineTime
) -> None:
    assert engine_time(100, flags, steps, working_ns) == time


@pytest.mark.parametrize(
    ("flags", "steps", "working_ns", "began_after_ns", "time"),
    [
        # from the last sight of the old process to the start of the new one nobody held the engine
        (RESET, 0, None, 40, EngineTime(warm_up=60, unallocated=40, modelled=True)),
        (RESET | BUSY, 7, 20, 40, EngineTime(occupied=20, warm_up=40, unallocated=40, modelled=True)),
        (RESET, 7, 80, 40, EngineTime(occupied=60, unallocated=40, modelled=True)),
        (RESET, 7, None, 40, EngineTime(occupied=60, unallocated=40, modelled=True)),
        (RESET, 0, None, 140, EngineTime(unallocated=100, modelled=True)),
        # a restart at an unknown instant
        (RESET, 0, None, None, EngineTime(warm_up=100, modelled=True)),
        # an engine that started while it was watched: warm-up from its process start
        (BORN, 0, None, 0, EngineTime(warm_up=100, modelled=True)),
        (BORN | BUSY_AT_END, 7, 20, 0, EngineTime(occupied=20, warm_up=80, modelled=True)),
        (BORN, 7, 20, 40, EngineTime(occupied=20, warm_up=80, modelled=True)),
    ],
)
def test_the_time_around_a_start_is_warm_up_where_it_was_not_work(
    flags: int, steps: int, working_ns: int | None, began_after_ns: int | None, time: EngineTime
) -> None:
    assert engine_time(100, flags, steps, working_ns, began_after_ns) == time
