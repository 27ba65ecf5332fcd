from __future__ import annotations

import sqlite3
from contextlib import closing
from itertools import pairwise
from statistics import fmean
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ledgers import SECOND, SKU, START, STORY_END, new_ledger, reader_of, tell_story

from kvtally.agent.costing import working_ns
from kvtally.agent.interval import Interval, State
from kvtally.agent.ledger.append import Closed, LedgerWriter
from kvtally.agent.ledger.observed import at_each_instant, observed, replica_names
from kvtally.agent.ledger.place import connect
from kvtally.agent.observed import CacheSpan, Observed
from kvtally.agent.timeline import Span, Timeline
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from pathlib import Path

    from kvtally.collectors.base import Kind

HOST = "10.0.0.1:8000"
ENGINE = f"{HOST}/0"
NAMES = ("cached_tokens", "step_tokens_le_8", "step_tokens_le_inf")


class Row(NamedTuple):
    """One interval, seconds after START."""

    start: float
    end: float
    values: Mapping[str, int]
    details: tuple[int, ...] | None = ()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def at(seconds: float) -> int:
    return START + round(seconds * SECOND)


def write(
    path: str,
    kind: Kind,
    name: str,
    rows: Sequence[Row],
    attributes: Mapping[str, str] | None = None,
    *,
    names: tuple[str, ...] = (),
    opened: bool = True,
) -> None:
    """Append intervals that follow on each other; `opened`: the target is new to the ledger."""
    reading = Reading(kind, name, attributes or {}, (), detail_names=names)
    state = State(at(rows[0].start), (None,) * len(QUANTITIES[kind]), None, None, names, (0.0,) * len(names))
    with closing(LedgerWriter(connect(path), path)) as writer:
        if opened:
            writer.append([Closed(reading, None, state)])
        for row in rows:
            values = tuple(row.values.get(quantity.name) for quantity in QUANTITIES[kind])
            interval = Interval(at(row.start), at(row.end), values, row.details, 0, 0, None)
            writer.append([Closed(reading, interval, state._replace(taken_at_ns=at(row.end)))])


def ticks(until: int, every: int = 10, **values: int) -> list[Row]:
    return [Row(start, start + every, values) for start in range(0, until, every)]


def engine(
    path: str,
    until: int = 60,
    *,
    since: int = 0,
    name: str = ENGINE,
    gpus: str | None = "GPU-a",
    version: str = "0.25.1",
    opened: bool = True,
) -> None:
    """An engine with an interval of 10 s after the other, which holds these GPUs."""
    attributes = {"model": "llama-8b", "version": version} | ({} if gpus is None else {"gpus": gpus, "sku": SKU})
    rows = [row for row in ticks(until, prompt_tokens=100) if row.start >= since]
    write(path, "engine", name, rows, attributes, opened=opened)


def gpm(end: float, seconds: float, busy: float, **more: int) -> Row:
    """A GPU's interval of 10 s with means over the last `seconds`."""
    means = {"gpm_ns": round(seconds * SECOND), "graphics_ns": round(busy * SECOND)}
    return Row(end - 10, end, means | more)


def look(path: str, start: float, end: float, name: str = ENGINE) -> Observed:
    with reader_of(path) as reader:
        return observed(reader, at(start), at(end), reader.targets(), name)


def spans(found: Observed) -> list[tuple[float, float]]:
    return [((one.row.start_ns - START) / SECOND, (one.row.end_ns - START) / SECOND) for one in found.rows]


def seconds(line: Timeline | None, start: float, end: float) -> float | None:
    """The amount over a span that is known throughout, in seconds."""
    assert line is not None
    amount = line.over(at(start), at(end), least_known=1.0)
    return None if amount is None else amount / SECOND


def test_intervals_that_start_in_the_window_are_there_and_whole(path: str) -> None:
    engine(path)
    assert spans(look(path, 10, 30)) == [(10, 20), (20, 30)]
    assert spans(look(path, 9, 11)) == [(10, 20)]
    assert spans(look(path, 11, 20)) == []
    assert look(path, 100, 200) == Observed({}, (), None, None, None, "", {})
    assert look(path, 0, 60, "10.0.0.9:8000/0") == Observed({}, (), None, None, None, "", {})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(-20, 90), min_size=2, max_size=6))
def test_windows_that_follow_on_each_other_share_out_the_intervals_and_lose_none(path: str, cuts: list[int]) -> None:
    with reader_of(path) as reader:
        is_empty = reader.extent() is None
    if is_empty:
        engine(path)
        write(path, "cache", f"{HOST}/lmcache", ticks(60, load_ns=7))
    edges = sorted(cuts)
    whole = look(path, edges[0], edges[-1])
    parts = [look(path, start, end) for start, end in pairwise(edges)]
    assert [row for part in parts for row in part.rows] == list(whole.rows)
    assert [span for part in parts for spans in part.caches.values() for span in spans] == [
        span for spans in whole.caches.values() for span in spans
    ]


def test_a_row_has_its_quantities_and_its_details_by_name(path: str) -> None:
    rows = [
        Row(0, 10, {"prompt_tokens": 500, "steps": 3}, (400, 0, 3)),
        Row(10, 20, {}, None),
        Row(20, 30, {"prompt_tokens": 0}, (0, 0, 0)),
    ]
    write(path, "engine", ENGINE, rows, {"gpus": ""}, names=NAMES)
    first, unknown, still = look(path, 0, 60).rows
    assert (first.row.value("prompt_tokens"), first.row.value("steps"), first.row.value("generated_tokens")) == (
        500,
        3,
        None,
    )
    assert (first.row.start_ns, first.row.end_ns, first.row.missed, first.row.flags) == (START, at(10), 0, 0)
    assert first.details == {"cached_tokens": 400, "step_tokens_le_8": 0, "step_tokens_le_inf": 3}
    assert unknown.details is None
    assert still.details == dict.fromkeys(NAMES, 0)


def test_details_that_are_damaged_are_unknown(path: str) -> None:
    write(path, "engine", ENGINE, [Row(0, 10, {}, (1, 2, 3))], {"gpus": ""}, names=NAMES)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("DROP TRIGGER engine_interval_no_update")
        connection.execute("UPDATE engine_interval SET details = x'0181'")
    assert [one.details for one in look(path, 0, 10).rows] == [None]


def test_a_new_version_opens_another_row_of_the_same_replica_with_details_of_its_own(path: str) -> None:
    about = {"model": "llama-8b", "gpus": ""}
    write(path, "engine", ENGINE, [Row(0, 10, {}, (5,))], about | {"version": "0.24.0"}, names=NAMES[:1])
    write(
        path, "engine", ENGINE, [Row(10, 20, {}, (5, 0, 0))], about | {"version": "0.25.1"}, names=NAMES, opened=False
    )
    engine(path, name="10.0.0.2:8000/0")
    found = look(path, 0, 20)
    assert [found.replicas[one.row.target_id].version for one in found.rows] == ["0.24.0", "0.25.1"]
    assert [one.details for one in found.rows] == [
        {"cached_tokens": 5},
        {"cached_tokens": 5, "step_tokens_le_8": 0, "step_tokens_le_inf": 0},
    ]
    assert len(found.replicas) == 2
    assert {replica.name for replica in found.replicas.values()} == {ENGINE}
    assert [replica.version for replica in look(path, 10, 20).replicas.values()] == ["0.25.1"]


def test_the_names_of_replicas_are_those_whose_intervals_start_in_the_span(path: str) -> None:
    engine(path, 30, name=f"{HOST}/1")
    engine(path, 30)
    engine(path, 60, since=30, version="0.26.0", opened=False)
    with reader_of(path) as reader:
        targets = reader.targets()
        assert replica_names(reader, at(0), at(30), targets) == [ENGINE, f"{HOST}/1"]
        assert replica_names(reader, at(21), at(60), targets) == [ENGINE]
        assert replica_names(reader, at(60), at(90), targets) == []


def test_a_gpus_means_cover_the_time_before_their_sample_however_long_before_the_interval(path: str) -> None:
    engine(path)
    rows = [Row(0, 10, {}), gpm(20, 20, 8), Row(20, 30, {}), gpm(40, 20, 2)]
    write(path, "gpu", "GPU-a", rows)
    found = look(path, 0, 60)
    assert found.source == "graphics"
    assert seconds(found.worked, 0, 20) == 8
    assert seconds(found.worked, 0, 10) == seconds(found.worked, 10, 20) == 4
    assert seconds(found.worked, 10, 30) == 5
    assert seconds(found.worked, 40, 50) is None
    # what is measured a while after the window is what happened in it
    assert seconds(look(path, 0, 10).worked, 0, 10) == 4


def test_what_gpus_say_reaches_as_far_as_the_last_interval(path: str) -> None:
    rows = [Row(0, 10, {}), Row(10, 910, {})]  # a page that did not answer for a quarter of an hour
    write(path, "engine", ENGINE, rows, {"gpus": "GPU-a", "sku": SKU})
    write(path, "gpu", "GPU-a", [gpm(end, 10, 3) for end in range(10, 920, 10)])
    assert seconds(look(path, 0, 11).worked, 10, 910) == 270


def test_of_several_gpus_the_busiest_counts_at_each_instant(path: str) -> None:
    engine(path, gpus="GPU-a,GPU-b")
    write(path, "gpu", "GPU-a", [gpm(10, 10, 5), gpm(20, 10, 1)])
    write(path, "gpu", "GPU-b", [gpm(15, 10, 8)])
    write(path, "gpu", "GPU-c", [gpm(10, 10, 10), gpm(20, 10, 10)])  # somebody else's
    found = look(path, 0, 60)
    # 0-5 a alone at 0.5; 5-15 b at 0.8, a below; 15-20 a alone at 0.1
    assert seconds(found.worked, 0, 5) == 2.5
    assert seconds(found.worked, 5, 15) == 8
    assert seconds(found.worked, 15, 20) == 0.5
    assert seconds(found.worked, 0, 20) == 11


def test_an_engine_that_moves_to_another_gpu_is_not_charged_with_what_its_old_one_does_next(path: str) -> None:
    engine(path, 30)
    engine(path, 60, since=30, gpus="GPU-b", opened=False)
    write(path, "gpu", "GPU-a", [gpm(end, 10, 9) for end in range(10, 70, 10)])
    write(path, "gpu", "GPU-b", [gpm(10, 10, 2), gpm(20, 10, 2), gpm(35, 10, 2)._replace(start=20), gpm(45, 10, 2)])
    found = look(path, 0, 60)
    assert len(found.replicas) == 2
    assert seconds(found.worked, 0, 30) == 27
    assert seconds(found.worked, 30, 45) == 3  # 25-30 of b's mean is not ours


def test_where_no_gpu_has_gpm_utilization_stands_in_over_the_time_in_which_it_was_sampled(path: str) -> None:
    engine(path, gpus="GPU-a,GPU-b")
    whole = {"observed_ns": 10 * SECOND, "busy_ns": 4 * SECOND}
    late = {"observed_ns": 5 * SECOND, "busy_ns": 5 * SECOND}  # the collector began in the middle
    write(path, "gpu", "GPU-a", [Row(0, 10, whole), Row(10, 20, whole)])
    write(path, "gpu", "GPU-b", [Row(0, 10, late), Row(10, 20, {"observed_ns": 0, "busy_ns": 0})])
    found = look(path, 0, 60)
    assert found.source == "utilization"
    assert (found.tensor, found.clocked) == (None, None)
    assert seconds(found.worked, 0, 5) == 2
    assert seconds(found.worked, 5, 10) == 5
    assert seconds(found.worked, 10, 20) == 4


def test_utilization_is_not_mixed_with_gpm(path: str) -> None:
    engine(path)
    sampled = {"observed_ns": 10 * SECOND, "busy_ns": 10 * SECOND}
    write(path, "gpu", "GPU-a", [Row(0, 10, sampled), gpm(20, 10, 3, **sampled)])
    found = look(path, 0, 60)
    assert found.source == "graphics"
    assert seconds(found.worked, 10, 20) == 3
    assert seconds(found.worked, 0, 10) is None


def test_tensor_work_and_its_clock_are_known_at_the_same_times(path: str) -> None:
    engine(path, gpus="GPU-a,GPU-b")
    rows = [
        gpm(10, 10, 9, tensor_ns=4 * SECOND, sm_clock_mhz=1500),
        gpm(20, 10, 9, tensor_ns=4 * SECOND),  # no clock
        gpm(30, 10, 9, sm_clock_mhz=1500),  # no tensor pipe
        Row(30, 40, {"tensor_ns": SECOND, "sm_clock_mhz": 1500}),  # no time over which
    ]
    write(path, "gpu", "GPU-a", rows)
    write(path, "gpu", "GPU-b", [gpm(10, 5, 1, tensor_ns=1 * SECOND, sm_clock_mhz=900)])
    found = look(path, 0, 60)
    assert seconds(found.worked, 0, 30) == 27
    # 0-5 a alone: 2 s at 1500 MHz; 5-10 the mean of a's 2 s at 1500 and b's 1 s at 900
    assert seconds(found.tensor, 0, 5) == 2
    assert seconds(found.clocked, 0, 5) == 3000
    assert seconds(found.tensor, 5, 10) == pytest.approx(1.5)
    assert seconds(found.clocked, 5, 10) == pytest.approx((3000 + 900) / 2)
    for line in (found.tensor, found.clocked):
        assert line is not None
        assert line.over(at(10), at(40), least_known=0.01) is None


def test_the_clock_of_tensor_work_is_that_under_load_although_the_interval_ends_at_rest(path: str) -> None:
    engine(path)
    tensor = {"tensor_ns": 4 * SECOND, "sm_clock_mhz": 1965}  # as it was when the load had passed
    rows = [
        gpm(10, 10, 9, **tensor, busy_ns=5 * SECOND, busy_cycles=8_250_000_000),  # 5 s at 1650 MHz
        gpm(20, 10, 9, **tensor, busy_ns=0, busy_cycles=0),  # no sample saw it at work: the gauge is all there is
        gpm(30, 10, 9, **tensor, busy_ns=5 * SECOND),  # written before cycles were counted
        gpm(40, 10, 9, tensor_ns=4 * SECOND, busy_ns=5 * SECOND, busy_cycles=7_500_000_000),  # no gauge at its end
    ]
    write(path, "gpu", "GPU-a", rows)
    clocked = look(path, 0, 60).clocked
    assert [seconds(clocked, end - 10, end) for end in (10, 20, 30, 40)] == [4 * 1650, 4 * 1965, 4 * 1965, 4 * 1500]


def test_an_engine_without_a_gpu_works_by_its_processes_and_only_the_first_rank_has_them(path: str) -> None:
    for rank in (0, 1):
        engine(path, name=f"{HOST}/{rank}", gpus="")
    engine(path, name="10.0.0.2:8000/0", gpus="")
    write(path, "process", HOST, [Row(0, 10, {"cpu_ns": 30 * SECOND}), Row(10, 20, {"cpu_ns": 0}), Row(20, 30, {})])
    write(path, "gpu", "GPU-a", [gpm(10, 10, 9)])
    found = look(path, 0, 60)
    assert (found.source, found.tensor, found.clocked) == ("cpu", None, None)
    assert seconds(found.worked, 0, 10) == 30  # four cores may work three seconds each
    assert seconds(found.worked, 5, 15) == 15
    assert seconds(found.worked, 20, 30) is None
    with reader_of(path) as reader:
        evidence = reader.evidence(at(0), at(60), reader.targets())
    assert found.worked is not None
    for one in found.rows:
        replica = found.replicas[one.row.target_id]
        assert found.worked.over(one.row.start_ns, one.row.end_ns) == working_ns(one.row, replica, evidence)
    for name in (f"{HOST}/1", "10.0.0.2:8000/0"):
        assert (look(path, 0, 60, name).worked, look(path, 0, 60, name).source) == (None, "")


def test_an_engine_without_a_gpu_works_by_the_processes_that_compute_wherever_these_are_told(path: str) -> None:
    engine(path, gpus="")
    rows = [
        Row(0, 10, {"cpu_ns": 40 * SECOND, "worker_cpu_ns": 9 * SECOND}),  # 31 s in the server and the core
        Row(10, 20, {"cpu_ns": 5 * SECOND, "worker_cpu_ns": 0}),
        Row(20, 30, {"cpu_ns": 7 * SECOND}),  # no titles
        Row(30, 40, {"cpu_ns": 2 * SECOND, "worker_cpu_ns": 600 * SECOND}),  # a core whose workers have died
    ]
    write(path, "process", HOST, rows)
    found = look(path, 0, 60)
    assert [seconds(found.worked, start, start + 10) for start in (0, 10, 20, 30)] == [9, 0, 7, 2]


@pytest.mark.parametrize("gpus", [None, "GPU-unseen", "GPU-blind"])
def test_an_engine_whose_gpus_are_unknown_or_tell_nothing_has_no_working_time(path: str, gpus: str | None) -> None:
    engine(path, gpus=gpus)
    write(path, "process", HOST, ticks(60, cpu_ns=5 * SECOND))
    write(path, "gpu", "GPU-a", [gpm(10, 10, 9)])
    write(path, "gpu", "GPU-blind", [Row(0, 10, {"energy_mj": 5}), Row(10, 20, {"gpm_ns": 0, "graphics_ns": 0})])
    found = look(path, 0, 60)
    assert len(found.rows) == 6
    assert (found.worked, found.tensor, found.clocked, found.source) == (None, None, None, "")


def test_work_before_the_mapping_was_known_stays_unknown(path: str) -> None:
    engine(path, 20, gpus=None)
    engine(path, 60, since=20, opened=False)
    write(path, "gpu", "GPU-a", [gpm(end, 10, 9) for end in range(10, 70, 10)])
    found = look(path, 0, 60)
    assert seconds(found.worked, 0, 20) is None
    assert seconds(found.worked, 20, 60) == 36


def test_every_interval_of_a_whole_story_worked_as_long_as_the_costing_says(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    tell_story(path)
    with reader_of(path) as reader:
        targets = reader.targets()
        evidence = reader.evidence(START, STORY_END, targets)
        for name in replica_names(reader, START, STORY_END, targets):
            found = observed(reader, START, STORY_END, targets, name)
            assert found.worked is not None
            worked = [found.worked.over(one.row.start_ns, one.row.end_ns) for one in found.rows]
            assert worked == [working_ns(one.row, found.replicas[one.row.target_id], evidence) for one in found.rows]
            assert sum(one or 0 for one in worked) > 1000 * SECOND


def test_caches_are_those_of_the_engines_host_each_by_its_name(path: str) -> None:
    engine(path)
    engine(path, name=f"{HOST}/1")
    moved = {"load_ns": 1, "store_ns": 2, "loaded_tokens": 3, "stored_tokens": 4, "load_bytes": 5, "store_bytes": 6}
    write(path, "cache", f"{HOST}/lmcache", [Row(0, 10, moved), Row(10, 20, {"load_ns": 7})])
    write(path, "cache", f"{HOST}/lmcache/worker-1", [Row(5, 15, {"store_ns": 8})])
    write(path, "cache", f"{HOST}/0/kv_offload", [Row(0, 10, {"load_bytes": 9})])
    write(path, "cache", f"{HOST}/1/kv_offload", [Row(0, 10, {"load_bytes": 10})])
    write(path, "cache", "10.0.0.2:8000/lmcache", [Row(0, 10, moved)])
    shared = {
        f"{HOST}/lmcache": (
            CacheSpan(at(0), at(10), 1, 2, 3, 4, 5, 6),
            CacheSpan(at(10), at(20), 7, None, None, None, None, None),
        ),
        f"{HOST}/lmcache/worker-1": (CacheSpan(at(5), at(15), None, 8, None, None, None, None),),
    }
    own = {f"{HOST}/0/kv_offload": (CacheSpan(at(0), at(10), None, None, None, None, 9, None),)}
    other = {f"{HOST}/1/kv_offload": (CacheSpan(at(0), at(10), None, None, None, None, 10, None),)}
    assert look(path, 0, 60).caches == shared | own
    assert look(path, 0, 60, f"{HOST}/1").caches == shared | other
    assert look(path, 1, 10).caches == {f"{HOST}/lmcache/worker-1": shared[f"{HOST}/lmcache/worker-1"]}


def test_a_server_of_its_own_is_behind_the_engines_that_its_page_is_said_to_serve(path: str) -> None:
    engine(path)
    engine(path, name="10.0.0.2:8000/0")
    engine(path, name="10.0.0.3:8000/0")
    found = Row(0, 10, {"dram_hit_tokens": 5, "disk_hit_tokens": 6})
    write(path, "cache", "10.0.0.9:8180/lmcache_mp", [found], {"engines": f"{HOST},10.0.0.2:8000"})
    write(path, "cache", f"{HOST}/0/nixl", [Row(0, 10, {"load_ns": 9})], {"transfer": "1"})
    server = {"10.0.0.9:8180/lmcache_mp": (CacheSpan(at(0), at(10), *(None,) * 6, 5, 6),)}
    assert look(path, 0, 60).caches == look(path, 0, 60, "10.0.0.2:8000/0").caches == server
    assert look(path, 0, 60, "10.0.0.3:8000/0").caches == {}


def test_a_cache_that_becomes_another_target_keeps_its_name_and_its_order(path: str) -> None:
    engine(path)
    write(path, "cache", f"{HOST}/lmcache", [Row(0, 10, {"load_ns": 1})], {"model": "a"})
    write(path, "cache", f"{HOST}/lmcache", [Row(10, 20, {"load_ns": 2})], {"model": "b"}, opened=False)
    write(path, "cache", f"{HOST}/lmcache", [Row(20, 30, {"load_ns": 3})], {"model": "a"}, opened=False)
    (found,) = look(path, 0, 60).caches.values()
    assert [span.load_ns for span in found] == [1, 2, 3]


lines = st.lists(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(0, 1000)), max_size=5), max_size=4
)


@settings(deadline=None)
@given(drawn=lines, of_all=st.sampled_from([max, fmean]))
def test_between_any_two_edges_the_rates_that_are_known_there_are_joined(
    drawn: list[list[tuple[int, int, int]]], of_all: Callable[[Collection[float]], float]
) -> None:
    sources = [[Span(start, start + length, amount) for start, length, amount in one] for one in drawn]
    timelines = [Timeline(source) for source in sources]
    joined = Timeline(at_each_instant(sources, of_all))
    for instant in range(95):
        # an instant is as long as the finest span here
        rates = [rate for line in timelines if (rate := line.over(instant, instant + 1)) is not None]
        found = joined.over(instant, instant + 1)
        if rates:
            assert found == pytest.approx(of_all(rates))
        else:
            assert found is None


@given(drawn=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.integers(0, 1000)), max_size=8))
def test_one_source_alone_stays_what_it_is(drawn: list[tuple[int, int, int]]) -> None:
    spans = [Span(start, start + length, amount) for start, length, amount in drawn]
    alone, joined = Timeline(spans), Timeline(at_each_instant([spans], max))
    for start in range(0, 95, 7):
        expected = alone.over(start, start + 13)
        assert joined.over(start, start + 13) == (None if expected is None else pytest.approx(expected))
