from __future__ import annotations

import pytest

from kvtally.agent.finding import plural


@pytest.mark.parametrize(
    ("count", "word", "told"),
    [
        (0, "hour", "0 hours"),
        (1, "hour", "1 hour"),
        (2, "settled hour", "2 settled hours"),
        (1, "process", "1 process"),
        (3, "process", "3 processes"),
        (1000, "row", "1,000 rows"),
    ],
)
def test_a_count_agrees_with_its_noun(count: int, word: str, told: str) -> None:
    assert plural(count, word) == told
