from __future__ import annotations

import re
from itertools import pairwise

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.bench.page_server import EndlessReplay, recorded_pages

FIRST = b"""# HELP served_total Tokens.
# TYPE served_total counter
served_total{engine="0"} 10.0
# HELP running Requests.
# TYPE running gauge
running 3.0
# HELP wait_seconds Waiting.
# TYPE wait_seconds histogram
wait_seconds_bucket{le="1"} 1.0
wait_seconds_sum 0.1
wait_seconds_count 1.0
"""
SECOND = re.sub(rb"0.1", b"0.3", re.sub(rb" 10.0", b" 14.0", re.sub(rb" 3.0", b" 0.0", FIRST)))


def values(page: bytes) -> dict[tuple[str, str], float]:
    return {
        (sample.name, str(sample.labels)): sample.value
        for family in text_string_to_metric_families(page.decode())
        for sample in family.samples
    }


def test_the_increments_of_a_round_come_again_on_top_of_what_was_counted() -> None:
    replay = EndlessReplay([FIRST, SECOND])
    # one increment: 4 tokens and 0.2 s; the gauge is that of the page a round begins with
    third = values(replay.page(2))
    assert replay.page(0) == FIRST
    assert third["served_total", "{'engine': '0'}"] == 18.0
    assert third["wait_seconds_sum", "{}"] == 0.5
    assert third["running", "{}"] == 3.0


def test_a_restricted_page_holds_the_named_samples_and_their_families_comments() -> None:
    page = EndlessReplay([FIRST, SECOND]).page(0, frozenset({"wait_seconds_sum", "running"}))
    assert page == (
        b"# HELP running Requests.\n# TYPE running gauge\nrunning 3.0\n"
        b"# HELP wait_seconds Waiting.\n# TYPE wait_seconds histogram\nwait_seconds_sum 0.1\n"
    )


def test_a_recording_whose_series_change_is_refused() -> None:
    with pytest.raises(ValueError, match="page 1"):
        EndlessReplay([FIRST, FIRST.replace(b'"0"', b'"1"')])


def test_no_counter_of_the_recording_ever_goes_back() -> None:
    pages = recorded_pages()
    replay = EndlessReplay(pages)
    assert replay.page(5) == pages[5]
    gauges = {
        sample.name
        for family in text_string_to_metric_families(pages[0].decode())
        for sample in family.samples
        if family.type == "gauge"
    }
    # around the end of the first and of the second round
    shown = [values(replay.page(number)) for number in (0, 1, 88, 89, 90, 177, 178, 179)]
    for before, after in pairwise(shown):
        assert all(after[key] >= value for key, value in before.items() if key[0] not in gauges)
