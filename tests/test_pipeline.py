from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtally.agent.finding import Finding
from kvtally.agent.interval import BORN, RESET, Interval, State
from kvtally.agent.ledger.errors import LedgerBusy, LedgerError
from kvtally.agent.pipeline import Pipeline
from kvtally.collectors.base import Reading, Scrape
from kvtally.collectors.quantities import CACHE, ENGINE, FILESYSTEM, index

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvtally.agent.ledger.append import Closed
    from kvtally.agent.pipeline import Key

SECOND = 1_000_000_000
TICK = 5 * SECOND
STARTED = 100 * SECOND  # when this run of kvtally began
STEPPED = Finding("clock_set_forward", "warning", "", 0, 1, "the clock was set forward")


class Book:
    """A ledger in memory: as strict as the real one about what follows what, and it fails when told to."""

    def __init__(self) -> None:
        self.states: dict[Key, State] = {}
        self.intervals: list[tuple[Key, Interval]] = []
        self.findings: list[Finding] = []
        self.full = False
        self.unreadable = False

    def append(self, batch: Iterable[Closed], findings: Iterable[Finding] = ()) -> None:
        batch, findings = list(batch), list(findings)
        assert batch or findings
        if self.full:
            raise LedgerBusy("the ledger is locked")
        for reading, interval, state, found in batch:
            key = (reading.kind, reading.name)
            before = self.states.get(key)
            if interval is None or interval.began_ns == interval.start_ns:
                assert before is None, "a first scrape of what the ledger knows"
            else:
                assert before is not None
                assert before.taken_at_ns == interval.start_ns, "an interval that does not follow the one before"
            self.states[key] = state
            if interval is not None:
                assert interval.start_ns < interval.end_ns == state.taken_at_ns
                self.intervals.append((key, interval))
            self.findings += found
        self.findings += findings

    def skip(self, by_ns: int, finding: Finding) -> None:
        if self.full:
            raise LedgerBusy("the ledger is locked")
        self.findings.append(finding)
        self.states = {key: state._replace(taken_at_ns=state.taken_at_ns + by_ns) for key, state in self.states.items()}

    def recall(self, kind: str, name: str) -> State | None:
        if self.unreadable:
            raise LedgerBusy("the ledger is locked")
        return self.states.get((kind, name))

    def counted(self, name: str, quantity: str = "prompt_tokens") -> list[int | None]:
        at = index("engine", quantity)
        return [interval.values[at] for key, interval in self.intervals if key == ("engine", name)]

    def total(self, name: str) -> int:
        return sum(count or 0 for count in self.counted(name))

    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.findings]


def as_they_are(readings: Sequence[Reading]) -> Sequence[Reading]:
    return readings


def pipeline(book: Book, *, live: bool = False, started_ns: int = STARTED) -> Pipeline:
    return Pipeline(book, book.states, as_they_are, interval_ns=TICK if live else None, started_ns=started_ns)


def engine(name: str = "a/0", epoch: float | None = 1.0, **values: float) -> Reading:
    shown = tuple(values.get(quantity.name, None if quantity.name == "computed_tokens" else 0.0) for quantity in ENGINE)
    return Reading("engine", name, {}, shown, epoch)


def disk(reads: float) -> Reading:
    return Reading("filesystem", "vda", {}, (None, reads) + (None,) * (len(FILESYSTEM) - 2))


def ok(at: float, *readings: Reading, source: str = "vllm:a") -> Scrape:
    return Scrape(source, STARTED + round(at * SECOND), 0.0, readings)


def failed(at: float, source: str = "vllm:a", reason: str = "refused", outcome: Any = "failed") -> Scrape:
    return Scrape(source, STARTED + round(at * SECOND), 0.0, (), outcome, reason)


@pytest.fixture
def book() -> Book:
    return Book()


def test_the_first_scrape_opens_and_every_later_one_closes_an_interval(book: Book) -> None:
    run = pipeline(book)
    first = run.tick([ok(0, engine(prompt_tokens=100.0))])
    assert [one.interval for one in first.closed] == [None]
    second = run.tick([ok(5, engine(prompt_tokens=107.0))])
    assert second.closed[0].interval is not None
    assert (second.error, second.findings) == (None, ())
    assert book.counted("a/0") == [7]
    assert run.states == book.states


def test_a_tick_without_anything_to_write_writes_nothing(book: Book) -> None:
    run = pipeline(book)
    book.full = True  # it would fail
    assert run.tick([failed(0)]) == ((), (), None)
    assert run.tick([]) == ((), (), None)


def test_one_tick_is_one_transaction_over_all_sources(book: Book) -> None:
    run = pipeline(book)
    for at in (0, 5):
        tick = run.tick([ok(at, disk(at), source="diskstats"), ok(at + 1, engine("a/0"), engine("a/1"))])
        assert [(one.reading.kind, one.reading.name) for one in tick.closed] == [
            ("filesystem", "vda"),
            ("engine", "a/0"),
            ("engine", "a/1"),
        ]
    assert len(book.intervals) == 3


def test_readings_are_described_a_scrape_at_a_time(book: Book) -> None:
    def described(readings: Sequence[Reading]) -> list[Reading]:
        return [one._replace(attributes={"of": str(len(readings))}) for one in readings]

    run = Pipeline(book, {}, described, interval_ns=None, started_ns=STARTED)
    tick = run.tick([ok(0, engine("a/0"), engine("a/1")), ok(0, engine("b/0"), source="vllm:b")])
    assert [one.reading.attributes["of"] for one in tick.closed] == ["2", "2", "1"]


def test_a_ledger_that_cannot_be_written_keeps_the_states_and_the_next_interval_covers_the_whole(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine(prompt_tokens=100.0))])
    before = dict(run.states)
    book.full = True
    for at, count in ((5, 110.0), (10, 130.0)):
        tick = run.tick([ok(at, engine(prompt_tokens=count))])
        assert isinstance(tick.error, LedgerError)
        assert (tick.closed, tick.findings) == ((), ())
    assert run.states == before
    book.full = False
    run.tick([ok(15, engine(prompt_tokens=131.0))])
    run.tick([ok(20, engine(prompt_tokens=132.0))])
    assert book.counted("a/0") == [31, 1]
    assert [(one.start_ns, one.end_ns, one.missed) for _, one in book.intervals] == [
        (STARTED, STARTED + 15 * SECOND, 2),
        (STARTED + 15 * SECOND, STARTED + 20 * SECOND, 0),
    ]


def test_a_first_scrape_that_could_not_be_written_is_still_the_baseline(book: Book) -> None:
    run = pipeline(book)
    book.full = True
    run.tick([ok(0, engine(prompt_tokens=100.0))])
    run.tick([ok(5, engine(prompt_tokens=110.0))])
    book.full = False
    tick = run.tick([ok(10, engine(prompt_tokens=111.0))])
    assert [None if one.interval is None else one.interval.start_ns for one in tick.closed] == [None, STARTED]
    assert book.counted("a/0") == [11]
    assert book.intervals[0][1].missed == 1
    run.tick([ok(15, engine(prompt_tokens=113.0))])
    assert book.counted("a/0") == [11, 2]


def test_an_unwritten_first_scrape_is_written_even_if_its_engine_is_gone(book: Book) -> None:
    run = pipeline(book)
    book.full = True
    run.tick([ok(0, engine(prompt_tokens=100.0))])
    book.full = False
    assert len(run.tick([failed(5)]).closed) == 1
    assert run.tick([failed(10)]).closed == ()
    assert run.states[("engine", "a/0")].taken_at_ns == STARTED


def test_an_engine_that_is_born_into_a_ledger_that_cannot_be_written_counts_whole_later(book: Book) -> None:
    run = pipeline(book)
    book.full = True
    run.tick([ok(5, engine(epoch=102.0, prompt_tokens=40.0))])
    book.full = False
    run.tick([ok(10, engine(epoch=102.0, prompt_tokens=50.0))])
    assert book.counted("a/0") == [50]
    assert book.intervals[0][1].start_ns == STARTED + 2 * SECOND


def test_an_engine_that_starts_while_kvtally_runs_is_counted_from_its_process_start(book: Book) -> None:
    run = pipeline(book)
    run.tick([failed(0)])
    run.tick([ok(5, engine(epoch=102.0, prompt_tokens=40.0))])
    ((_, interval),) = book.intervals
    assert interval.flags & BORN
    assert (interval.start_ns, book.counted("a/0")) == (STARTED + 2 * SECOND, [40])


@pytest.mark.parametrize("epoch", [99.5, None])
def test_an_engine_older_than_this_run_or_of_unknown_age_only_opens(book: Book, epoch: float | None) -> None:
    run = pipeline(book)
    run.tick([failed(0)])
    run.tick([ok(5, engine(epoch=epoch, prompt_tokens=40.0))])
    assert book.intervals == []


def lmcache(name: str = "a/lmcache", **counts: float) -> Reading:
    values = tuple(counts.get(quantity.name) for quantity in CACHE)
    return Reading("cache", name, {"cache": "lmcache"}, values, 50.0)


def replica(name: str, prompt_tokens: float) -> Reading:
    return engine(f"a/0/{name}", prompt_tokens=prompt_tokens)._replace(attributes={"replica": name})


def stored(book: Book, name: str = "a/lmcache") -> list[tuple[int, int | None]]:
    """Seconds after the start from which, and tokens that a cache stored."""
    at = index("cache", "stored_tokens")
    return [
        ((interval.start_ns - STARTED) // SECOND, interval.values[at])
        for key, interval in book.intervals
        if key == ("cache", name)
    ]


@pytest.mark.parametrize("before", [Scrape("page", STARTED, 0.0, (), "no_data", "nothing yet"), ok(0, engine())])
def test_a_cache_that_its_page_did_not_show_before_has_counted_everything_since(book: Book, before: Scrape) -> None:
    run = pipeline(book)
    run.tick([before])
    run.tick([ok(5, lmcache(stored_tokens=4096.0))._replace(source=before.source)])
    assert stored(book) == [(0, 4096)]
    assert book.intervals[-1][1].values[index("cache", "loaded_tokens")] is None


@pytest.mark.parametrize(
    "before",
    [
        Scrape("page", STARTED, 0.0, (), "failed", "no answer"),
        Scrape("another", STARTED, 0.0, (), "no_data", "nothing yet"),
        # of one alone on its page the name does not say which it is
        ok(0, lmcache("a", stored_tokens=1000.0))._replace(source="page"),
        ok(0, lmcache("a/lmcache/one", stored_tokens=1000.0))._replace(source="page"),
    ],
)
def test_a_cache_that_may_have_counted_unseen_only_opens(book: Book, before: Scrape) -> None:
    run = pipeline(book)
    run.tick([before])
    run.tick([ok(5, lmcache(stored_tokens=4096.0))._replace(source="page")])
    assert stored(book) == []
    run.tick([ok(10, lmcache(stored_tokens=5000.0))._replace(source="page")])
    assert stored(book) == [(5, 904)]


def test_a_cache_that_appears_while_the_ledger_cannot_be_written_counts_whole_later(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine())])
    book.full = True
    run.tick([ok(5, engine(), lmcache(stored_tokens=4096.0))])
    book.full = False
    run.tick([ok(10, engine(), lmcache(stored_tokens=5000.0))])
    assert stored(book) == [(0, 5000)]


def test_a_replica_of_rays_that_comes_while_its_node_is_watched_counts_from_then_on(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, replica("one", 700.0))])
    run.tick([ok(5, replica("one", 900.0), replica("two", 300.0))])
    assert (book.counted("a/0/one"), book.counted("a/0/two")) == ([200], [300])


def test_duplicate_and_late_scrapes_are_dropped_and_lose_nothing(book: Book) -> None:
    run = pipeline(book)
    for at, count in ((0, 0.0), (5, 10.0), (5, 10.0), (3, 6.0), (10, 12.0)):
        run.tick([ok(at, engine(prompt_tokens=count))])
    assert book.counted("a/0") == [10, 2]
    assert book.kinds() == []


def test_a_target_that_is_read_twice_in_one_tick_is_counted_once(book: Book) -> None:
    run = pipeline(book)
    same = engine(prompt_tokens=10.0)
    for scrapes in (
        [ok(0, engine())],
        [ok(5, same), ok(5, same, source="other")],
        [ok(10, engine(prompt_tokens=11.0)), ok(12, engine(prompt_tokens=14.0))],
    ):
        run.tick(scrapes)
    assert book.counted("a/0") == [10, 1, 3]


def test_a_first_scrape_that_the_ledger_has_passed_already_is_told_once(book: Book) -> None:
    pipeline(book).tick([ok(10, engine(prompt_tokens=5.0))])
    # a recording that is replayed again says so by itself
    pipeline(book).tick([ok(0, engine(prompt_tokens=1.0))])
    assert book.findings == []
    run = pipeline(book, live=True)
    run.tick([ok(0, engine(prompt_tokens=1.0))])
    run.tick([ok(5, engine(prompt_tokens=2.0))])
    run.tick([ok(11, engine(prompt_tokens=9.0))])
    (finding,) = book.findings
    assert (finding.kind, finding.target) == ("scrape_out_of_order", "engine/a/0")
    assert (finding.start_ns, finding.end_ns) == (STARTED, STARTED + 10 * SECOND)
    assert book.counted("a/0") == [4]


def test_live_the_cadence_tells_how_many_scrapes_were_due(book: Book) -> None:
    run = pipeline(book, live=True)
    for at in (0, 5.4, 10, 25, 32, 39.6):
        run.tick([ok(at, engine())])
    # 5.4, 4.6, 15, 7 and 7.6 seconds at one scrape every 5
    assert [one.missed for _, one in book.intervals] == [0, 0, 2, 0, 1]


def test_live_a_failed_scrape_is_missed_by_the_cadence_and_not_twice(book: Book) -> None:
    run = pipeline(book, live=True)
    for scrape in (ok(0, engine()), failed(5), ok(10, engine())):
        run.tick([scrape])
    assert [one.missed for _, one in book.intervals] == [1]


def test_in_a_replay_scrapes_that_failed_or_lacked_the_target_are_missed(book: Book) -> None:
    run = pipeline(book)
    for scrape in (
        ok(0, engine("a/0"), engine("a/1")),
        failed(5),
        failed(10, outcome="no_data"),
        ok(15, engine("a/1")),  # a page that lacks one rank
        ok(20, engine("a/0"), engine("a/1")),
        ok(25, engine("a/0"), engine("a/1")),
        ok(99, engine("a/0"), engine("a/1")),  # however long it took
    ):
        run.tick([scrape])
    missed = {name: [one.missed for key, one in book.intervals if key[1] == name] for name in ("a/0", "a/1")}
    assert missed == {"a/0": [3, 0, 0], "a/1": [2, 0, 0, 0]}


def test_in_a_replay_a_page_that_lacks_a_target_is_missed_by_it_and_by_no_other(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine("a/0"), engine("a/1")), ok(0, engine("b/0"), source="vllm:b")])
    run.tick([ok(5, engine("a/1")), ok(5, engine("b/0"), source="vllm:b")])
    run.tick([ok(10, engine("a/0"), engine("a/1")), ok(10, engine("b/0"), source="vllm:b")])
    missed = {name: [one.missed for key, one in book.intervals if key[1] == name] for name in ("a/0", "a/1", "b/0")}
    assert missed == {"a/0": [1], "a/1": [0, 0], "b/0": [0, 0]}


def test_a_source_that_fails_leaves_the_others_as_they_are(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine(prompt_tokens=1.0)), ok(0, engine("b/0"), source="vllm:b")])
    run.tick([failed(5), ok(5, engine("b/0", prompt_tokens=8.0), source="vllm:b")])
    run.tick([ok(10, engine(prompt_tokens=4.0)), ok(10, engine("b/0", prompt_tokens=9.0), source="vllm:b")])
    assert book.counted("a/0") == [3]
    assert book.counted("b/0") == [8, 1]
    missed = {(key[1], one.end_ns // SECOND - 100): one.missed for key, one in book.intervals}
    assert missed == {("b/0", 5): 0, ("a/0", 10): 1, ("b/0", 10): 0}
    assert [finding.target for finding in book.findings] == ["vllm:a"]


def test_scrapes_that_failed_are_one_finding_with_their_span_and_first_reason_once_it_is_over(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine())])
    run.tick([failed(5, reason="connection refused")])
    run.tick([failed(10, reason="timed out")])
    run.tick([ok(17.5, engine())])
    run.tick([ok(20, engine())])
    (finding,) = book.findings
    assert (finding.kind, finding.severity, finding.target) == ("scrapes_failed", "info", "vllm:a")
    assert (finding.start_ns, finding.end_ns) == (STARTED + 5 * SECOND, STARTED + 17 * SECOND + SECOND // 2)
    assert finding.message.startswith("it could not be read for 12.5 s (connection refused); counters are cumulative")


def test_a_source_that_comes_back_restarted_is_not_said_to_have_kept_its_counts(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine(prompt_tokens=7.0))])
    run.tick([failed(5)])
    run.tick([ok(10, engine(epoch=108.0, prompt_tokens=2.0))])
    messages = {finding.kind: finding.message for finding in book.findings}
    assert messages["scrapes_failed"] == "it could not be read for 5.0 s (refused); it restarted meanwhile"


def test_a_pause_of_kvtally_ends_where_it_began_again_although_the_engine_is_back_later(book: Book) -> None:
    pipeline(book, live=True).tick([ok(0, engine(prompt_tokens=5.0))])
    run = pipeline(book, live=True, started_ns=STARTED + 6 * SECOND)
    run.tick([failed(7)])
    run.tick([ok(40, engine(epoch=135.0, prompt_tokens=2.0))])
    (finding,) = (one for one in book.findings if one.kind == "not_watched")
    assert (finding.start_ns, finding.end_ns) == (STARTED, STARTED + 6 * SECOND)
    assert finding.message == "no kvtally ran for 6.0 s; the engine restarted meanwhile"


def test_a_source_that_has_no_data_is_no_failure(book: Book) -> None:
    run = pipeline(book)
    run.tick([failed(0, outcome="no_data")])
    run.tick([ok(5, engine())])
    assert book.findings == []


def test_findings_of_a_tick_that_could_not_be_written_are_written_later_and_once(book: Book) -> None:
    pipeline(book).tick([ok(0, engine(), engine("a/1"))])
    run = pipeline(book, live=True)
    run.tick([failed(25)])
    book.full = True
    run.tick([ok(30, engine())], [STEPPED])
    run.tick([ok(35, engine())])
    book.full = False
    run.tick([ok(40, engine())])
    run.tick([ok(45, engine())])
    assert sorted(book.kinds()) == ["clock_set_forward", "not_watched", "scrapes_failed"]
    spans = {finding.kind: (finding.start_ns, finding.end_ns) for finding in book.findings}
    assert spans["not_watched"] == (STARTED, STARTED + 30 * SECOND)
    assert spans["scrapes_failed"] == (STARTED + 25 * SECOND, STARTED + 40 * SECOND)


def test_a_page_with_ever_new_targets_is_told_once_and_those_that_are_known_go_on(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.SOURCE_TARGETS_MAX", 3)
    flow = pipeline(book)
    for number in range(10):
        readings = [engine("a/0", prompt_tokens=float(number)), *(engine(f"new/{number}-{each}") for each in range(2))]
        flow.tick([ok(number, *readings)])
    assert len(flow.states) == 3
    assert [one.kind for one in book.findings] == ["too_many_targets"]
    assert sum(interval.values[0] or 0 for (_, name), interval in book.intervals if name == "a/0") == 9


def test_a_page_with_ever_new_targets_takes_no_room_from_others(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.SOURCE_TARGETS_MAX", 3)
    flow = pipeline(book)
    for number in range(10):
        bad = ok(number, *(engine(f"bad/{number}-{each}") for each in range(5)), source="vllm:bad")
        late = [ok(number, engine("late/0", prompt_tokens=float(number)), source="vllm:late")] if number > 5 else []
        flow.tick([bad, *late])
    assert len(flow.states) == 4
    assert [(one.kind, one.target) for one in book.findings] == [("too_many_targets", "vllm:bad")]
    assert book.counted("late/0") == [1, 1, 1]


def test_engines_that_come_and_go_make_room_and_one_that_comes_back_goes_on_from_the_ledger(
    book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.TARGETS_MAX", 3)
    flow = pipeline(book)
    hour = 3600.0
    for at in range(0, 200, 5):  # a pod that lives on, and one that is another every 20 hours
        pods = [engine("a/0", prompt_tokens=float(at)), engine(f"b{at // 20}/0", prompt_tokens=float(at % 20))]
        flow.tick([ok(at * hour, one, source=f"vllm:{one.name}") for one in pods])
        assert len(flow.states) <= 3
    assert book.findings == []
    assert book.total("a/0") == 195
    assert [book.total(f"b{each}/0") for each in range(10)] == [15] * 10
    flow.tick([ok(200 * hour, engine("b0/0", prompt_tokens=50.0), source="vllm:b0/0")])
    assert book.total("b0/0") == 50


def test_a_page_whose_targets_come_and_go_makes_room_for_its_own(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.SOURCE_TARGETS_MAX", 30)
    flow = pipeline(book)
    for at in range(200):  # a new replica every hour, two at a time: 26 within a day
        replicas = [engine(f"a/{each}/0", prompt_tokens=float(at - each)) for each in (at - 1, at)]
        flow.tick([ok(at * 3600.0, *replicas)])
    assert sum(book.total(f"a/{each}/0") for each in range(200)) >= 190
    assert len(flow.states) <= 30


def test_sources_that_come_and_go_leave_nothing_behind(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.TARGETS_MAX", 10)
    flow = pipeline(book)
    for at in range(500):  # an hour each
        page = ok(at * 3600.0, source=f"vllm:{at}")
        flow.tick([page, failed(at * 3600.0, f"lmcache:{at}"), failed(at * 3600.0, "always")])
        assert max(len(flow._watched), len(flow._down)) < 40
    assert "always" in flow._down


def test_nothing_is_forgotten_while_the_ledger_cannot_be_written(book: Book, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.pipeline.TARGETS_MAX", 1)
    flow = pipeline(book)
    flow.tick([ok(0, engine())])
    book.full = True
    for at in range(1, 60):
        flow.tick([ok(at * 3600.0, engine(prompt_tokens=float(at)))])
    book.full = False
    flow.tick([ok(60 * 3600.0, engine(prompt_tokens=60.0))])
    assert book.counted("a/0") == [60]
    assert book.intervals[0][1].missed == 59


def test_a_target_whose_state_cannot_be_asked_for_waits_and_the_others_go_on(book: Book) -> None:
    pipeline(book).tick([ok(0, engine("a/0", prompt_tokens=5.0), engine("b/0"))])
    known = {("engine", "b/0"): book.states["engine", "b/0"]}
    flow = Pipeline(book, known, as_they_are, interval_ns=None, started_ns=STARTED)
    book.unreadable = True
    tick = flow.tick([ok(5, engine("a/0", prompt_tokens=6.0), engine("b/0", prompt_tokens=1.0))])
    assert isinstance(tick.error, LedgerBusy)
    assert [one.reading.name for one in tick.closed] == ["b/0"]
    book.unreadable = False
    tick = flow.tick([ok(10, engine("a/0", prompt_tokens=8.0), engine("b/0", prompt_tokens=2.0))])
    assert tick.error is None
    assert (book.counted("a/0"), book.counted("b/0")) == ([3], [1, 1])


def test_a_cache_of_which_only_the_ledger_knows_a_wider_name_is_not_counted_from_its_beginning(book: Book) -> None:
    pipeline(book).tick([ok(0, cache(7))])
    flow = Pipeline(book, {}, as_they_are, interval_ns=None, started_ns=STARTED)
    flow.tick([ok(5)])
    closer = cache(9)._replace(name="a/lmcache/0")
    tick = flow.tick([ok(10, closer)])
    assert [one.interval for one in tick.closed] == [None]


def test_findings_alone_are_written_too(book: Book) -> None:
    tick = pipeline(book).tick([], [STEPPED])
    assert (tick.findings, book.findings) == ((STEPPED,), [STEPPED])


def test_what_a_run_finds_after_a_pause_of_kvtally_is_one_long_interval_that_says_so(book: Book) -> None:
    pipeline(book, live=True).tick([ok(0, engine(prompt_tokens=5.0)), ok(0, disk(1.0), source="diskstats")])
    run = pipeline(book, live=True, started_ns=STARTED + 3600 * SECOND)
    run.tick([ok(3600, engine(prompt_tokens=905.0)), ok(3600, disk(2.0), source="diskstats")])
    assert book.counted("a/0") == [900]
    assert [one.missed for _, one in book.intervals] == [719, 719]
    (finding,) = book.findings  # for the engine only
    assert (finding.kind, finding.target) == ("not_watched", "engine/a/0")
    assert (finding.start_ns, finding.end_ns) == (STARTED, STARTED + 3600 * SECOND)
    assert finding.message.startswith("no kvtally ran for 3600.0 s")


@pytest.mark.parametrize(("live", "at"), [(True, 5), (False, 3600)])
def test_a_restart_of_kvtally_between_two_scrapes_is_no_pause(book: Book, live: bool, at: float) -> None:
    pipeline(book, live=live).tick([ok(0, engine(prompt_tokens=5.0))])
    pipeline(book, live=live).tick([ok(at, engine(prompt_tokens=6.0))])
    assert book.counted("a/0") == [1]
    assert book.findings == []


def test_a_step_of_the_clock_is_left_out_of_every_open_interval(book: Book) -> None:
    run = pipeline(book, live=True)
    run.tick([ok(0, engine(prompt_tokens=1.0)), ok(0, engine("b/0"), source="vllm:b")])
    run.skip(3600 * SECOND, STEPPED)
    run.tick([ok(3605, engine(prompt_tokens=3.0)), ok(3605, engine("b/0"), source="vllm:b")])
    assert [(one.end_ns - one.start_ns, one.missed) for _, one in book.intervals] == [(5 * SECOND, 0)] * 2
    assert book.counted("a/0") == [2]
    assert book.findings == [STEPPED]


def test_a_step_of_the_clock_that_could_not_be_written_changes_nothing(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine())])
    before = dict(run.states)
    book.full = True
    with pytest.raises(LedgerBusy):
        run.skip(3600 * SECOND, STEPPED)
    assert run.states == before


def test_a_step_of_the_clock_moves_a_first_scrape_that_is_not_written_yet(book: Book) -> None:
    run = pipeline(book)
    book.full = True
    run.tick([ok(0, engine())])
    book.full = False
    run.skip(3600 * SECOND, STEPPED)
    run.tick([ok(3605, engine(prompt_tokens=3.0))])
    assert [(one.end_ns - one.start_ns) for _, one in book.intervals] == [5 * SECOND]


def test_an_engine_that_restarts_while_the_ledger_cannot_be_written_loses_what_only_memory_had(book: Book) -> None:
    run = pipeline(book)
    run.tick([ok(0, engine(prompt_tokens=10.0, running_requests=1.0))])
    book.full = True
    run.tick([ok(5, engine(prompt_tokens=30.0))])
    run.tick([ok(10, engine(epoch=109.0, prompt_tokens=4.0))])
    book.full = False
    run.tick([ok(15, engine(epoch=109.0, prompt_tokens=6.0))])
    assert book.counted("a/0") == [6]
    (finding,) = book.findings
    assert (finding.kind, finding.start_ns, finding.end_ns) == ("tokens_lost", STARTED, STARTED + 10 * SECOND)


class Engine:
    """An engine as it is: what it has counted, what the pipeline may have seen of it, what is lost for good."""

    def __init__(self, name: str, epoch: float, count: int) -> None:
        self.name = name
        self.epoch = epoch
        self.count = count  # in this life
        self.baseline: int | None = None  # of the first scrape that is not forgotten
        self.due = 0  # counted since the last scrape that was written
        self.lost = 0
        self.written = 0

    def reading(self) -> Reading:
        return engine(self.name, self.epoch, prompt_tokens=float(self.count), generated_tokens=float(self.count))


class Deployment(RuleBasedStateMachine):
    """Engines, a ledger and a kvtally, each of which fails, restarts and returns as it likes.

    What is written must be what was counted since the first scrape, less what died with its engine unwritten.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.book = Book()
        self.engines: list[Engine] = []
        self.known: dict[str, bool] = {}  # name -> whether its first scrape is in the ledger
        self.skipped = 0
        self.restart_kvtally()

    @rule(remembered=st.integers(0, 3))
    def restart_kvtally(self, remembered: int = 3) -> None:
        """Begin anew with the states of so many engines; those of the others are asked for."""
        self.now += 1
        states = dict([*self.book.states.items()][:remembered])
        self.run = Pipeline(self.book, states, as_they_are, interval_ns=TICK, started_ns=round(self.now * SECOND))
        self.started = self.now
        for one in self.engines:
            if not self.known.get(one.name):
                self.known.pop(one.name, None)  # a first scrape that only memory had is forgotten
                one.baseline, one.due = None, 0

    @precondition(lambda self: len(self.engines) < 3)
    @rule(count=st.integers(0, 100), late=st.booleans())
    def add_engine(self, count: int, late: bool) -> None:
        """Put an engine there: one that kvtally sees start, or one that is older than it."""
        self.now += 2
        epoch = self.now - 1 if late else 1.0 + len(self.engines)
        self.engines.append(Engine(f"{'abc'[len(self.engines)]}/0", epoch, count))

    @precondition(lambda self: self.engines)
    @rule(which=st.integers(0, 2), by=st.integers(1, 1000))
    def serve(self, which: int, by: int) -> None:
        one = self.engines[which % len(self.engines)]
        one.count += by
        if one.baseline is not None:
            one.due += by

    @precondition(lambda self: self.engines)
    @rule(which=st.integers(0, 2), count=st.integers(0, 50))
    def restart_engine(self, which: int, count: int) -> None:
        one = self.engines[which % len(self.engines)]
        self.now += 1
        one.epoch = self.now - 0.5
        if one.baseline is not None:
            one.lost += one.due
            one.due = count
        one.count = count

    @rule(full=st.booleans())
    def change_disk(self, full: bool) -> None:
        self.book.full = full

    @rule(broken=st.sets(st.integers(0, 2)), again=st.booleans())
    def tick(self, broken: set[int], again: bool) -> None:
        self.now += 5
        scrapes: list[Scrape] = []
        for at, one in enumerate(self.engines):
            source = f"vllm:{one.name}"
            if at in broken:
                scrapes.append(Scrape(source, round(self.now * SECOND), 0.0, (), "failed", "refused"))
                continue
            scrapes.append(Scrape(source, round(self.now * SECOND), 0.0, (one.reading(),)))
            scrapes += scrapes[-1:] if again else []
            if one.baseline is None:
                # everything that an engine counted which started in this run is ours
                ours = self.started <= one.epoch
                one.baseline = 0 if ours else one.count
                one.due = one.count if ours else 0
                self.known[one.name] = False
        result = self.run.tick(scrapes)
        assert self.book.full or result.error is None
        assert result.error or not (self.book.full and any(scrape.readings for scrape in scrapes))
        if self.book.full:
            for at, one in enumerate(self.engines):
                # nothing of a birth is kept but that it will be found again
                if at not in broken and not self.known[one.name] and one.baseline == 0 and self.started <= one.epoch:
                    one.baseline = None
            return
        for at, one in enumerate(self.engines):
            if one.name in self.known:
                self.known[one.name] = True
            if at not in broken:
                one.written += one.due
                one.due = 0

    @precondition(lambda self: not self.book.full)
    @rule(hours=st.integers(1, 5))
    def step_clock(self, hours: int) -> None:
        self.run.skip(hours * 3600 * SECOND, STEPPED)
        self.now += hours * 3600
        self.skipped += hours * 3600

    @invariant()
    def what_is_written_is_what_was_counted(self) -> None:
        for one in self.engines:
            for quantity in ("prompt_tokens", "generated_tokens"):
                counted = self.book.counted(one.name, quantity)
                assert None not in counted
                assert sum(count or 0 for count in counted) == one.written, one.name

    @invariant()
    def intervals_of_a_target_do_not_overlap_and_leave_out_only_steps_of_the_clock(self) -> None:
        for one in self.engines:
            own = [interval for key, interval in self.book.intervals if key[1] == one.name]
            gaps = [after.start_ns - before.end_ns for before, after in pairwise(own)]
            assert all(gap >= 0 for gap in gaps)
            assert sum(gaps) <= self.skipped * SECOND
            if not self.skipped:
                assert not any(gaps)

    @invariant()
    def every_restart_that_lost_something_is_a_finding(self) -> None:
        for one in self.engines:
            resets = sum(bool(interval.flags & RESET) for key, interval in self.book.intervals if key[1] == one.name)
            told = [
                finding
                for finding in self.book.findings
                if finding.kind in {"tokens_lost", "engine_restarted"} and finding.target == f"engine/{one.name}"
            ]
            assert len(told) == resets


TestDeployment = Deployment.TestCase
TestDeployment.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def cache(loaded: float) -> Reading:
    return Reading("cache", "a/lmcache", {}, tuple(loaded if one.name == "loaded_tokens" else 0.0 for one in CACHE))


LOADED = index("cache", "loaded_tokens")


@pytest.mark.parametrize("live", [True, False])
def test_a_cache_that_moves_nothing_closes_one_interval_up_to_the_scrape_before_it_moves(
    book: Book, live: bool
) -> None:
    flow = pipeline(book, live=live)
    for tick, loaded in enumerate((7, 7, 7, 7, 9, 9, 12)):
        flow.tick([ok(5 * tick, cache(loaded))])
    rows = [(one.start_ns, one.end_ns, one.values[LOADED], one.missed) for _, one in book.intervals]
    assert rows == [
        (STARTED, STARTED + 15 * SECOND, 0, 0),
        (STARTED + 15 * SECOND, STARTED + 20 * SECOND, 2, 0),
        (STARTED + 20 * SECOND, STARTED + 25 * SECOND, 0, 0),
        (STARTED + 25 * SECOND, STARTED + 30 * SECOND, 3, 0),
    ]


def test_a_cache_that_moves_nothing_for_long_closes_an_interval_a_minute(book: Book) -> None:
    flow = pipeline(book, live=True)
    for tick in range(26):
        flow.tick([ok(5 * tick, cache(7))])
    assert [(one.start_ns - STARTED, one.end_ns - STARTED, one.missed) for _, one in book.intervals] == [
        (0, 60 * SECOND, 0),
        (60 * SECOND, 120 * SECOND, 0),
    ]


def test_scrapes_that_failed_while_a_cache_was_still_are_missed(book: Book) -> None:
    flow = pipeline(book, live=True)
    flow.tick([ok(0, cache(7))])
    flow.tick([ok(5, cache(7))])
    flow.tick([failed(10)])
    flow.tick([ok(15, cache(7))])
    flow.tick([ok(20, cache(8))])
    assert [(one.end_ns - STARTED, one.missed) for _, one in book.intervals] == [(15 * SECOND, 1), (20 * SECOND, 0)]


def test_a_still_cache_that_could_not_be_written_is_written_whole_later(book: Book) -> None:
    flow = pipeline(book, live=True)
    flow.tick([ok(0, cache(7))])
    flow.tick([ok(5, cache(7))])
    book.full = True
    flow.tick([ok(10, cache(9))])
    book.full = False
    flow.tick([ok(15, cache(10))])
    assert sum(one.values[LOADED] or 0 for _, one in book.intervals) == 3
    assert [one.start_ns for _, one in book.intervals][1:] == [one.end_ns for _, one in book.intervals][:-1]
    assert book.intervals[-1][1].end_ns == STARTED + 15 * SECOND


def test_a_step_of_the_clock_while_a_cache_is_still_is_left_out_of_its_interval_too(book: Book) -> None:
    flow = pipeline(book, live=True)
    for tick in range(3):
        flow.tick([ok(5 * tick, cache(7))])
    flow.skip(3600 * SECOND, STEPPED)
    flow.tick([ok(3615, cache(9))])
    rows = [(one.start_ns - STARTED, one.end_ns - STARTED, one.values[LOADED], one.missed) for _, one in book.intervals]
    hour = 3600 * SECOND
    assert rows == [(hour, hour + 10 * SECOND, 0, 0), (hour + 10 * SECOND, hour + 15 * SECOND, 2, 0)]


@pytest.mark.parametrize("after", [2.0, None])
def test_a_still_cache_whose_server_restarts_counts_its_old_sums_once(book: Book, after: float | None) -> None:
    # seen on a real LMCache server that was killed: families of the new one are absent until they have counted
    flow = pipeline(book, live=True)
    for tick in range(3):
        flow.tick([ok(5 * tick, cache(7)._replace(epoch=1.0))])
    again = cache(0)._replace(epoch=2.0)
    flow.tick([ok(15, again._replace(values=tuple(after if at == LOADED else 0.0 for at in range(len(CACHE)))))])
    flow.tick([ok(20, cache(3)._replace(epoch=2.0))])
    counted = [(one.end_ns - STARTED, one.values[LOADED]) for _, one in book.intervals]
    assert counted[0] == (10 * SECOND, 0)
    assert sum(value or 0 for _, value in counted) == 3
