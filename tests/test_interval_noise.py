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
