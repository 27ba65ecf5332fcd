from __future__ import annotations

import functools
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.ledgers import (
    HOUR,
    RATES,
    SECOND,
    SKU,
    START,
    STORY_END,
    Deployment,
    FakeEngine,
    FakeGpu,
    new_ledger,
    rate,
    reader_of,
    tell_story,
)

from kvtally.agent.accounts import (
    Part,
    Payment,
    Window,
    facts_in,
    facts_of,
    hour_of,
    on_hour,
    parts_of,
    settled_hours_of,
    widened,
)
from kvtally.agent.ledger import settled
from kvtally.agent.price import NANO
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.settlement import due_hours, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from kvtally.agent.facts import Facts
    from kvtally.agent.ledger.read import LedgerReader

PAYMENT = Payment()


def book_of(reader: LedgerReader) -> RateBook:
    return RateBook([one for _, one in reader.rates()])


def totals(facts: list[Facts]) -> dict[str, int]:
    """What a list of facts comes to: money, engine time, tokens."""
    lines = [line for one in facts for line in one.lines or ()]
    held = [one for one in facts if one.replica]
    return {
        "amount_nano": sum(line.amount_nano for line in lines),
        "engine_ns": sum(sum(one.state_ns.values()) for one in held),
        "free_ns": sum(sum(one.state_ns.values()) for one in facts if not one.replica),
        "prompt_tokens": sum(one.work["prompt_tokens"] or 0 for one in held),
        "generated_tokens": sum(one.work["generated_tokens"] or 0 for one in held),
    }


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LedgerReader]:
    """The story of tests.ledgers with its hours 04, 05 and 07 settled; 06 stays open."""
    path = new_ledger(tmp_path_factory.mktemp("story"))
    tell_story(path)
    with reader_of(path) as reader:
        for hour in (START, START + HOUR, START + 3 * HOUR):
            settle(reader, hour, book_of(reader), PAYMENT)
        yield reader


def test_an_instant_lies_in_the_hour_that_begins_before_it_or_with_it() -> None:
    assert (hour_of(START), hour_of(START - 1), hour_of(START + HOUR - 1)) == (START, START - HOUR, START)
    assert on_hour(START)
    assert not on_hour(START + 1)


@pytest.mark.parametrize(
    ("window", "raw_from", "expected"),
    [
        ((START + 5, START + HOUR + 5), START, (START + 5, START + HOUR + 5)),
        ((START + 5, START + HOUR + 5), START + HOUR, (START, START + HOUR + 5)),
        ((START + 5, START + HOUR + 5), START + 2 * HOUR, (START, START + 2 * HOUR)),
        ((START + 5, START + HOUR), START + HOUR, (START, START + HOUR)),
        ((START + 5, START + HOUR + 5), None, (START, START + 2 * HOUR)),
        # nothing is beyond the newest interval: its edge stays
        ((START + 5, START + 9 * HOUR + 5), None, (START, START + 9 * HOUR + 5)),
    ],
)
def test_a_window_is_widened_to_whole_hours_only_where_raw_intervals_have_aged_out(
    window: tuple[int, int], raw_from: int | None, expected: tuple[int, int]
) -> None:
    assert widened(Window(*window), raw_from, START + 9 * HOUR + 5) == Window(*expected)


@functools.cache
def story_path() -> str:
    """A story on which every hour is settled and nothing pruned; it stays for the run of this module's properties."""
    folder = tempfile.TemporaryDirectory(prefix="kvtally-story-")
    KEPT.append(folder)
    path = new_ledger(Path(folder.name))
    tell_story(path)
    with reader_of(path) as reader:
        for hour in due_hours(reader, STORY_END):
            settle(reader, hour, book_of(reader), PAYMENT)
    return path


KEPT: list[tempfile.TemporaryDirectory[str]] = []


@pytest.fixture(scope="module", autouse=True)
def _tidy() -> Iterator[None]:
    yield
    while KEPT:
        KEPT.pop().cleanup()


def edges() -> st.SearchStrategy[int]:
    """Instants of the story: anywhere, on a scrape's second, or on the hour."""
    anywhere = st.integers(START - HOUR, STORY_END + HOUR)
    seconds = st.integers(0, 5 * 3600).map(lambda second: START + second * SECOND)
    hours = st.integers(-1, 5).map(lambda hour: START + hour * HOUR)
    return anywhere | seconds | hours


@settings(max_examples=30, deadline=None)
# from inside the interval across 06:00, from inside the one across 07:00, and to the end of the former
@example([START + 6900 * SECOND, START + 3 * HOUR])
@example([START + 10_500 * SECOND, START + 4 * HOUR])
@example([START + HOUR + 7, START + 8700 * SECOND])
@given(st.tuples(edges(), edges()).map(sorted).filter(lambda pair: pair[0] < pair[1]))
def test_any_window_over_settled_hours_and_raw_edges_is_what_raw_intervals_alone_make(pair: list[int]) -> None:
    window = Window(*pair)
    with reader_of(story_path()) as reader:
        book = book_of(reader)
        mixed = facts_of(reader, window, book, PAYMENT)
        raw = facts_of(reader, window, book, PAYMENT, use_settled=False)
    # the law that parts prefill from decode is fitted to the hours that are asked for together
    assert [one._replace(split=None) for one in mixed] == [one._replace(split=None) for one in raw]


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=2, max_size=6, unique=True).map(sorted))
def test_windows_between_hours_add_up_to_the_whole(hours: list[int]) -> None:
    instants = [START + hour * HOUR for hour in hours]
    with reader_of(story_path()) as reader:
        book = book_of(reader)

        def asked(start_ns: int, end_ns: int) -> dict[str, int]:
            return totals(facts_of(reader, Window(start_ns, end_ns), book, PAYMENT, use_settled=False))

        parts = [asked(start, end) for start, end in pairwise(instants)]
        whole = asked(instants[0], instants[-1])
    assert {key: sum(part[key] for part in parts) for key in whole} == whole


def test_some_hours_settled_and_some_not_are_the_whole_raw_window(story: LedgerReader) -> None:
    window, book = Window(START, START + 4 * HOUR), book_of(story)
    assert set(settled.revisions(story, *window)) == {START, START + HOUR, START + 3 * HOUR}
    mixed = facts_of(story, window, book, PAYMENT)
    assert totals(mixed) == totals(facts_of(story, window, book, PAYMENT, use_settled=False))


def test_a_window_parts_into_settled_hours_of_a_day_and_what_lies_between(story: LedgerReader) -> None:
    hours = [START + number * HOUR for number in range(4)]
    assert parts_of(story, Window(START + HOUR // 2, START + 5 * HOUR)) == [
        (Window(START + HOUR // 2, hours[1]), {}),
        (Window(hours[1], hours[2]), {hours[1]: 1}),
        (Window(hours[2], hours[3]), {}),
        (Window(hours[3], START + 4 * HOUR), {hours[3]: 1}),
        (Window(START + 4 * HOUR, START + 5 * HOUR), {}),
    ]
    assert settled_hours_of(story, Window(START, START + 4 * HOUR)) == [hours[0], hours[1], hours[3]]


def test_settled_hours_of_two_days_are_two_parts(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    evening = START + 19 * HOUR  # 23:00
    with reader_of(path) as reader:
        for hour in (evening, evening + HOUR, evening + 2 * HOUR):
            settle(reader, hour, RateBook([]), PAYMENT)
        settle(reader, evening, RateBook([]), PAYMENT)
        assert parts_of(reader, Window(evening, evening + 3 * HOUR)) == [
            (Window(evening, evening + HOUR), {evening: 2}),
            (Window(evening + HOUR, evening + 3 * HOUR), {evening + HOUR: 1, evening + 2 * HOUR: 1}),
        ]


def test_settled_facts_can_do_without_their_lines(story: LedgerReader) -> None:
    part, targets = Part(Window(START, START + HOUR), {START: 1}), story.targets()
    whole = facts_in(story, part, book_of(story), PAYMENT, targets)
    bare = facts_in(story, part, book_of(story), PAYMENT, targets, with_lines=False)
    assert all(one.lines for one in whole)
    assert bare == [one._replace(lines=()) for one in whole]


def test_the_states_of_an_hour_make_the_time_of_its_intervals_and_free_gpus_their_own(story: LedgerReader) -> None:
    facts = facts_of(story, Window(START + 3 * HOUR, START + 4 * HOUR), book_of(story), PAYMENT)
    assert [one.replica and one.replica.name for one in facts] == [None, "10.0.0.1:8000/0", "10.0.0.2:8000/0"]
    # GPU-c is there all the hour and nobody's; both replicas have all of theirs
    assert [sum(one.state_ns.values()) for one in facts] == [HOUR, HOUR, HOUR]
    # 3.333333333 for the free GPU; for each replica that, and a third of the host at 0.7
    amounts = [sum(line.amount_nano for line in one.lines or ()) for one in facts]
    assert amounts == [3_333_333_333, 3_566_666_667, 3_566_666_667]


def deployed(path: str, gpus: tuple[str, ...] | None = ("GPU-a",), *, seconds: int = 60) -> Deployment:
    about = About(gpus=gpus, sku=SKU if gpus else "", mapping="a test")
    return Deployment(path, {"10.0.0.1:8000": about}, interval_seconds=seconds)


def test_an_hour_in_which_no_interval_begins_has_no_tokens_rather_than_unknown_ones(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine("10.0.0.1:8000/0")
    deployment = deployed(path)
    deployment.scrape(START + 1800 * SECOND, [engine])
    engine.serve(computed=700, hbm=300, generated=50, steps=51)
    deployment.scrape(START + 2 * HOUR + 1800 * SECOND, [engine])  # two hours in one interval
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        book, window = book_of(reader), Window(START, START + 3 * HOUR)
        raw = facts_of(reader, window, book, PAYMENT, use_settled=False)
        for hour in due_hours(reader, START + 4 * HOUR):
            settle(reader, hour, book, PAYMENT)
        settled = facts_of(reader, window, book, PAYMENT)
    assert [one.work["prompt_tokens"] for one in raw] == [1000, 0, 0]
    assert [sum(one.state_ns.values()) for one in raw] == [HOUR // 2, HOUR, HOUR // 2]
    assert settled == raw


def test_a_gpu_is_free_only_where_no_engine_could_hold_it(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine("10.0.0.1:8000/0")
    gpu = FakeGpu("GPU-z")
    deployment = deployed(path, None)  # which GPUs the engine holds is unknown
    for number in range(150):
        gpu.run(60, 0)
        # from 05:00 on the engine is gone
        deployment.scrape(START + number * 60 * SECOND, [engine] if number <= 60 else [], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        facts = facts_of(reader, Window(START, START + 2 * HOUR), book_of(reader), PAYMENT)
    assert [(one.period_ns, one.replica is None) for one in facts] == [(START, False), (START + HOUR, True)]
    engine_facts, free = facts
    assert engine_facts.lines is None
    assert [finding.kind for finding in engine_facts.findings] == ["replica_mapping_unknown"]
    assert free.state_ns == {"unallocated": HOUR}


def test_an_engine_that_cannot_be_read_still_holds_its_gpu(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine("10.0.0.1:8000/0")
    gpu = FakeGpu("GPU-a")
    deployment = deployed(path)
    for number in range(100):
        gpu.run(60, 0)
        deployment.scrape(START + number * 60 * SECOND, [None if 10 < number < 90 else engine], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        book = book_of(reader)
        # a window inside the one long interval: the interval is not its own, and the GPU is not free either
        assert facts_of(reader, Window(START + 1200 * SECOND, START + 4800 * SECOND), book, PAYMENT) == []
        whole = facts_of(reader, Window(START, START + 99 * 60 * SECOND), book, PAYMENT)
    assert [one.replica and one.replica.name for one in whole] == ["10.0.0.1:8000/0"] * 2


def test_a_gpu_is_held_around_its_engines_last_interval_whichever_hour_asks(tmp_path: Path) -> None:
    path, engine, gpu = new_ledger(tmp_path), FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    deployment = deployed(path, seconds=10)
    for second in range(3400, 3700, 10):
        gpu.run(10, 0)
        # the engine's last interval ends at 04:59:50; GPU intervals go on from 04:59:50 to 05:00 and beyond
        deployment.scrape(START + second * SECOND, [engine] if second <= 3590 else [], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        book = book_of(reader)
        both = facts_of(reader, Window(START, START + 2 * HOUR), book, PAYMENT, use_settled=False)
        for hour in (START, START + HOUR):
            settle(reader, hour, book, PAYMENT)
        assert facts_of(reader, Window(START, START + 2 * HOUR), book, PAYMENT) == both
    free = [one for one in both if one.replica is None]
    # GPUs are read 2 ms before engines: the interval from 04:59:59.998 begins within its own 10 s of 04:59:50
    assert [(one.period_ns, one.state_ns) for one in free] == [(START + HOUR, {"unallocated": 80 * SECOND})]


def test_what_was_found_in_a_settled_hour_is_still_told(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine("10.0.0.1:8000/0")
    deployment = deployed(path)
    for number in range(70):
        deployment.scrape(START + number * 60 * SECOND, [engine])
    deployment.close()
    with reader_of(path) as reader:  # a ledger without any price
        window, book = Window(START, START + HOUR), RateBook([])
        settle(reader, START, book, PAYMENT)
        (facts,) = facts_of(reader, window, book, PAYMENT)
    assert facts.lines is None
    assert [finding.kind for finding in facts.findings] == ["no_rate"]
    assert "kvtally rates add gpu" in facts.findings[0].message


def test_every_host_whose_gpus_a_page_shows_is_paid_for_whole(tmp_path: Path) -> None:
    """Two hosts of two GPUs, whose exporters are scraped into one ledger; a host costs 4.00 an hour beside its GPUs."""
    engines = [FakeEngine(f"10.0.0.{host}:8000/0") for host in (1, 2)]
    gpus = [FakeGpu(f"GPU-{host}-{number}") for host in (1, 2) for number in (0, 1)]
    abouts = {}
    for host, engine, own in ((1, engines[0], gpus[:2]), (2, engines[1], gpus[2:])):
        abouts[engine.name.partition("/")[0]] = About(gpus=tuple(gpu.name for gpu in own), mapping="config")
        for gpu in own:
            gpu.attributes |= {"source": "dcgm", "host": f"node-{host}"}
    path = new_ledger(tmp_path)
    deployment = Deployment(path, abouts, interval_seconds=60)
    for minute in range(61):
        for gpu in gpus:
            gpu.run(60, 30)
        deployment.scrape(START + minute * 60 * SECOND, engines, gpus)
    deployment.close()
    prices = [
        rate("gpu", "1", "gpu-hour", START - HOUR, sku=SKU),
        rate("server", "4", "server-hour", START - HOUR, sku="gpu-host"),
    ]
    with reader_of(path) as reader:
        facts = facts_of(reader, Window(START, START + HOUR), RateBook(prices), PAYMENT)
    spent = [(line.resource, line.amount_nano) for one in facts for line in one.lines or ()]
    assert spent == [("gpu", 2 * NANO), ("server", 4 * NANO)] * 2


@pytest.mark.parametrize(("shown", "paid"), [({}, 3), ({"shown": "node"}, 1)])
def test_gpus_of_a_node_that_a_pod_is_shown_are_others_unless_its_engine_held_them(
    tmp_path: Path, shown: dict[str, str], paid: int
) -> None:
    engine, gpus = FakeEngine(), [FakeGpu(f"GPU-{number}") for number in range(3)]
    for gpu in gpus:
        gpu.attributes |= shown
    path = new_ledger(tmp_path)
    about = About(gpus=(gpus[0].name,), mapping="config")
    deployment = Deployment(path, {engine.name.partition("/")[0]: about}, interval_seconds=60)
    for minute in range(61):
        engine.serve(computed=60)
        for gpu in gpus:
            gpu.run(60, 30)
        # the engine ends after half an hour: its own GPU is unallocated from then on
        deployment.scrape(START + minute * 60 * SECOND, [engine] if minute <= 30 else [], gpus)
    deployment.close()
    prices = [rate("gpu", "1", "gpu-hour", START - HOUR, sku=SKU)]
    with reader_of(path) as reader:
        facts = facts_of(reader, Window(START, START + HOUR), RateBook(prices), PAYMENT)
    # the minutes on either side of the engine's end count as held
    spent = sum(line.amount_nano for one in facts for line in one.lines or ())
    assert spent / NANO == pytest.approx(paid - 2 / 60, abs=1e-5)
