from __future__ import annotations

import math

from kvtally.agent.interval import RESET, close, opened
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES


def test_the_last_bits_of_a_sum_in_another_order_are_neither_a_restart_nor_a_step_back() -> None:
    names = [quantity.name for quantity in QUANTITIES["engine"]]
    values: list[float | None] = [None] * len(names)
    for name in ("first_token_ns", "queue_ns", "prefill_ns"):
        values[names.index(name)] = 1234.5678
    lower = tuple(None if value is None else math.nextafter(value, 0) for value in values)
    before = Reading("engine", "e/0", {}, tuple(values))
    interval, state, findings = close(opened(before, 10), before._replace(values=lower), 20)
    assert findings == []
    assert not interval.flags & RESET
    assert interval.values[names.index("queue_ns")] == 0
    # the high-water mark stays, so that what follows is counted from there
    interval, _, _ = close(state, before, 30)
    assert interval.values[names.index("queue_ns")] == 0


def test_a_counter_that_is_not_to_be_read_at_first_gives_a_baseline_and_one_that_is_not_there_counts_from_nothing() -> (
    None
):
    names = [quantity.name for quantity in QUANTITIES["engine"]]
    unread, absent = names.index("prompt_tokens"), names.index("external_tokens")
    values: list[float | None] = [None] * len(names)
    values[unread] = math.nan
    first = Reading("engine", "e/0", {}, tuple(values), 1.0)
    values[unread], values[absent] = 1_000_000.0, 7.0
    interval, state, _ = close(opened(first, 10), first._replace(values=tuple(values)), 20)
    assert (interval.values[unread], interval.values[absent]) == (None, 7)
    values[unread] = 1_000_005.0
    interval, state, _ = close(state, first._replace(values=tuple(values)), 30)
    assert interval.values[unread] == 5
    values[unread] = math.nan
    interval, state, _ = close(state, first._replace(values=tuple(values)), 40)
    assert interval.values[unread] is None
    values[unread] = 1_000_009.0
    interval, state, _ = close(state, first._replace(values=tuple(values)), 50)
    assert interval.values[unread] == 4
