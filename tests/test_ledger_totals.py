from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ledgers import HOUR, SECOND, START, new_ledger, reader_of

from kvtally.agent.interval import Interval, opened
from kvtally.agent.ledger.append import Closed, LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.totals import Total, added, totals
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

NAMES = tuple(quantity.name for quantity in QUANTITIES["filesystem"])


class Span(NamedTuple):
    """An interval of a mount: its end follows its start, and the next one follows it."""

    length_ns: int
    read_bytes: int | None
    app_read_bytes: int | None


def fill(path: str, mounts: Mapping[str, Sequence[Span]], start_ns: int = START) -> None:
    """Append intervals end to end, from `start_ns` on."""
    with closing(LedgerWriter(connect(path), path)) as writer:
        for name, spans in mounts.items():
            reading = Reading("filesystem", name, {"source": "test"}, (0.0,) * len(NAMES))
            at_ns, state = start_ns, opened(reading, start_ns)
            writer.append([Closed(reading, None, state)])
            for span in spans:
                end_ns = at_ns + span.length_ns
                told = {"read_bytes": span.read_bytes, "app_read_bytes": span.app_read_bytes}
                values = tuple(told.get(each) for each in NAMES)
                interval = Interval(at_ns, end_ns, values, (), 0, 0, None)
                writer.append([Closed(reading, interval, state._replace(taken_at_ns=end_ns))])
                at_ns = end_ns


def told(path: str, start_ns: int, end_ns: int) -> dict[str, tuple[int, int | None, int | None]]:
    """Length, read_bytes and app_read_bytes of every mount in a window."""
    with closing(reader_of(path)) as reader:
        targets = reader.targets()
        return {
            targets[target_id].name: (one.length_ns, one.counted["read_bytes"], one.counted["app_read_bytes"])
            for target_id, one in totals(reader, "filesystem", start_ns, end_ns).items()
        }


SPANS = [Span(20 * 60 * SECOND, 10**at, None if at < 3 else 7) for at in range(9)]  # three hours in thirds


def test_whole_hours_and_their_edges_add_up_by_hand(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    fill(path, {"/kv": SPANS, "/old": SPANS[:1]})
    third = 20 * 60 * SECOND
    assert told(path, START, START + 3 * HOUR) == {
        "/kv": (3 * HOUR, 111_111_111, 42),
        "/old": (third, 1, None),
    }
    # the last third of the first hour, the second hour, and the first third of the third
    assert told(path, START + 2 * third, START + 2 * HOUR + third) == {"/kv": (5 * third, 1_111_100, 28)}
    # an interval belongs to where it starts; within one hour there is nothing but edges
    assert told(path, START + third - 1, START + third + 1) == {"/kv": (third, 10, None)}
    assert told(path, START + 9 * HOUR, START + 12 * HOUR) == {}


def test_hours_whose_intervals_have_aged_out_are_known_by_their_sums(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    fill(path, {"/kv": SPANS})
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DELETE FROM filesystem_interval WHERE start_ns < ?", (START + 2 * HOUR,))
    assert told(path, START, START + 3 * HOUR) == {"/kv": (3 * HOUR, 111_111_111, 42)}
    assert told(path, START + HOUR, START + 2 * HOUR) == {"/kv": (HOUR, 111_000, 21)}


def test_what_one_of_two_totals_knows_is_what_both_know_together() -> None:
    none, two = {"a": None, "b": None, "c": 1}, {"a": None, "b": 2, "c": 2}
    assert added(Total(1, none), Total(2, two)) == Total(3, {"a": None, "b": 2, "c": 3})
    assert added(Total(2, two), Total(1, none)) == Total(3, {"a": None, "b": 2, "c": 3})


counts = st.none() | st.integers(0, 2**40)
spans = st.lists(st.builds(Span, st.integers(1, 2 * HOUR), counts, counts), min_size=1, max_size=8)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["/a", "/b"]), spans, min_size=1), st.integers(0, HOUR), st.data())
def test_any_window_is_the_sum_of_the_intervals_that_start_in_it(
    mounts: Mapping[str, Sequence[Span]], offset_ns: int, data: st.DataObject
) -> None:
    from_ns = START + offset_ns
    longest = max(sum(span.length_ns for span in each) for each in mounts.values())
    edge = st.integers(from_ns - HOUR, from_ns + longest + HOUR)
    start_ns, end_ns = sorted((data.draw(edge), data.draw(edge)))
    expected: dict[str, tuple[int, int | None, int | None]] = {}
    for name, each in mounts.items():
        at_ns, inside = from_ns, []
        for span in each:
            inside += [span] if start_ns <= at_ns < end_ns else []
            at_ns += span.length_ns
        if inside:
            known = ([one for one in column if one is not None] for column in list(zip(*inside, strict=True))[1:])
            read, app = (sum(column) if column else None for column in known)
            expected[name] = (sum(span.length_ns for span in inside), read, app)
    with tempfile.TemporaryDirectory() as folder:
        path = new_ledger(Path(folder))
        fill(path, mounts, from_ns)
        assert told(path, start_ns, end_ns) == expected


@pytest.mark.parametrize("kind", ["cache", "gpu", "process", "gateway", "engine"])
def test_every_kind_can_be_asked_for(tmp_path: Path, kind: str) -> None:
    with closing(reader_of(new_ledger(tmp_path))) as reader:
        assert totals(reader, kind, START, START + 5 * HOUR) == {}  # type: ignore[arg-type]  # a kind
