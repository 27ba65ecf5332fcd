from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, new_ledger, rate, reader_of
from tests.serving import FACTS, IDLE, NAME, Load, ServingEngine, Site

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.calibrating import keep, learn
from kvtally.agent.calibration import Calibration, calibration_of
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.agent.savings import Reason, parts_of, seconds_of
from kvtally.agent.savings_report import savings_report
from kvtally.agent.settlement import prune_before, settle_again, settle_hours
from kvtally.agent.valuing import NOT_CALIBRATED, Laws, settled_value, valued, values_of
from kvtally.agent.worth import NOTHING, added
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.agent.valuing import Valued
    from kvtally.agent.worth import Worth
    from kvtally.collectors.base import Reading

OTHER = "10.0.0.2:8000/0"
WHOLE = (START, START + 4 * HOUR)
PAYMENT = Payment()
PRICE = rate("gpu", "3.6", "gpu-hour", START - 1000 * HOUR, sku=SKU)
COUNTS = ("requests", "steps", "hbm_tokens", "external_tokens", "computed_tokens", "preemptions")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def site(path: str, *names: str, about: dict[str, About] | None = None, every: int = 30) -> Site:
    named = {name.partition("/")[0]: one for name, one in (about or {}).items()}
    made = Site(path, [ServingEngine(name) for name in names or (NAME,)], about=named, every=every)
    made.scrape(made.engines)
    return made


@pytest.fixture
def four_hours(path: str) -> Iterator[tuple[LedgerReader, Site]]:
    """Four hours of one engine under a load that changes by the hour, and a price."""
    made = site(path)
    for load in (Load(), Load(hbm=0.4), Load(requests=7), Load(prompt=(200, 3000))):
        made.serve(3600, load)
    made.close()
    with reader_of(path) as reader:
        reader.add_rates([PRICE])
        yield reader, made


def book_of(reader: LedgerReader) -> RateBook:
    return RateBook([one for _, one in reader.rates()])


def laws_of(reader: LedgerReader, **options: Any) -> Laws:
    return Laws(reader, reader.targets(), **options)


def valued_over(reader: LedgerReader, window: tuple[int, int], laws: Laws | None = None) -> list[Valued]:
    return valued(reader, window, laws or laws_of(reader), reader.targets())


def total(values: Iterable[Valued]) -> Worth:
    found = NOTHING
    for value in values:
        assert value.worth is not None
        found = added(found, value.worth)
    return found


def settled(reader: LedgerReader, *hours: int, **options: Any) -> list[int]:
    """Settle these hours after the start, an hour after the last of them."""
    now_ns = START + (max(hours) + 2) * HOUR
    return settle_hours(reader, [START + hour * HOUR for hour in hours], now_ns, book_of(reader), PAYMENT, **options)


def used(reader: LedgerReader) -> dict[int, set[int | None]]:
    """The numbers of the calibrations behind each settled hour's newest savings, by hours after the start."""
    found: dict[int, set[int | None]] = {}
    for (hour_ns, _), saving in reader.savings(0, 2**62).items():
        found.setdefault((hour_ns - START) // HOUR, set()).add(saving.calibration_id)
    return found


def shifted(law: Calibration, factor: float) -> Calibration:
    """Another law: everything slower by a factor."""
    return law._replace(medians=tuple(median / factor for median in law.medians), id=None)


# -- what an hour is worth


def test_the_interval_holds_what_reuse_saved(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, made = four_hours
    values = valued_over(reader, WHOLE)
    assert [value.hour_ns for value in values] == [START + hour * HOUR for hour in range(4)]
    parts = parts_of((v.calibration, v.loading, v.worth) for v in values if v.worth and v.calibration)
    seconds = seconds_of(parts, 4 * 3600.0)
    assert seconds.status == "ok"
    assert seconds.avoided.holds(made.engines[0].avoided)
    assert seconds.avoided.point == pytest.approx(made.engines[0].avoided, rel=0.15)


def test_hours_add_up_to_any_window(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, made = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    whole = total(valued_over(reader, WHOLE))
    counts = made.engines[0].counts
    for name in ("hbm_tokens", "external_tokens", "computed_tokens", "steps", "preemptions"):
        assert getattr(whole, name) == counts[name]
    assert whole.requests == counts["first_tokens"]
    for cuts in ([1, 2, 3], [2], [0.5, 2.25, 3.1], [0.01, 0.02, 3.99]):
        edges = [START, *(START + round(cut * 120) * 30 * SECOND for cut in cuts), START + 4 * HOUR]
        parts = [total(valued_over(reader, window)) for window in pairwise(edges)]
        for name in COUNTS:
            assert sum(getattr(part, name) for part in parts) == getattr(whole, name)
        assert sum(part.seconds for part in parts) == pytest.approx(whole.seconds, rel=1e-9)
        # windows of the fit are cut at the edges: METHOD 5, invariant 2
        assert sum(part.avoided[1] for part in parts) == pytest.approx(whole.avoided[1], rel=0.01)
        assert sum(part.prefill[1] for part in parts) == pytest.approx(whole.prefill[1], rel=0.01)
        assert sum(part.worked_seconds or 0.0 for part in parts) == pytest.approx(whole.worked_seconds, rel=1e-9)


def test_an_interval_is_worth_something_in_the_window_in_which_it_starts(
    four_hours: tuple[LedgerReader, Site],
) -> None:
    reader, _ = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    at = START + HOUR + 10 * SECOND  # inside an interval of 30 s
    before, after = (total(valued_over(reader, window)) for window in ((START, at), (at, WHOLE[1])))
    assert before.requests == (120 + 1) * 4
    assert before.requests + after.requests == total(valued_over(reader, WHOLE)).requests
    assert before.seconds == 3630.0
    assert valued_over(reader, (at, at + SECOND)) == []


def test_the_same_window_is_worth_the_same_twice(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    assert valued_over(reader, WHOLE) == valued_over(reader, WHOLE)


def test_a_restart_inside_a_window_loses_nothing_that_was_counted(path: str) -> None:
    made = site(path).serve(1800)
    (engine,) = made.engines
    before = engine.counts["hbm_tokens"]
    engine.restart((made.at_ns + 7 * SECOND) / 1e9)
    made.serve(1800).close()
    with reader_of(path) as reader:
        worth = total(valued_over(reader, WHOLE))
    assert worth.hbm_tokens == before + engine.counts["hbm_tokens"]
    assert worth.requests == 480
    assert sum(worth.avoided) / 3 == pytest.approx(engine.avoided, rel=0.15)


def test_a_version_that_changes_inside_an_hour_has_a_value_of_its_own(path: str) -> None:
    made = site(path).serve(1800)
    made.engines[0].attributes = {**made.engines[0].attributes, "version": "0.26.0"}
    made.serve(1500).close()
    with reader_of(path) as reader:
        keep(reader, START + HOUR, reader.targets())
        first, second = valued_over(reader, WHOLE)
    assert first.hour_ns == second.hour_ns == START
    assert first.target_id != second.target_id
    assert first.calibration is not None
    assert second.calibration is not None
    assert (first.calibration.id, second.calibration.id) == (1, 2)
    assert (first.calibration.fingerprint.version, second.calibration.fingerprint.version) == ("0.25.1", "0.26.0")
    assert first.worth is not None
    assert second.worth is not None
    assert (first.worth.requests, second.worth.requests) == (240, 200)


def test_two_replicas_of_one_kind_are_valued_by_one_law(path: str) -> None:
    made = site(path, NAME, OTHER).serve(1800)
    made.close()
    with reader_of(path) as reader:
        keep(reader, START + HOUR, reader.targets())
        values = valued_over(reader, WHOLE)
        assert {value.calibration.id for value in values if value.calibration is not None} == {1}
        assert len({value.target_id for value in values}) == len(values) == 2
    worth = total(values)
    assert sum(worth.avoided) / 3 == pytest.approx(sum(engine.avoided for engine in made.engines), rel=0.15)


def test_a_kind_that_was_gone_by_the_end_of_a_long_window_is_learned_from_its_own_last_day(path: str) -> None:
    made = site(path, every=300).serve(4 * 3600)
    made.engines[0].attributes = {**made.engines[0].attributes, "version": "0.26.0"}
    made.serve(40 * 3600).close()
    with reader_of(path) as reader:
        values = valued_over(reader, (START, START + 44 * HOUR))
    laws = {value.calibration.fingerprint.version: value.calibration for value in values if value.calibration}
    assert all(value.worth is not None for value in values)
    assert set(laws) == {"0.25.1", "0.26.0"}
    assert laws["0.25.1"].evidence.end_ns == START + 4 * HOUR


def test_of_two_replicas_of_one_kind_the_one_that_can_be_valued_is(path: str) -> None:
    unseen = About(gpus=("GPU-unseen",), sku=SKU, mapping="a test", facts=FACTS)
    # the one without a law has the name that comes first
    site(path, NAME, OTHER, about={NAME: unseen}).serve(1800).close()
    with reader_of(path) as reader:
        first, second = sorted(valued_over(reader, WHOLE), key=lambda value: value.target_id)
    assert first.worth is None
    assert "nothing tells how long the engine worked" in first.reasons[0].text
    assert second.worth is not None


def without(reading: Reading, name: str) -> Reading:
    values = list(reading.values)
    values[index("engine", name)] = None
    return reading._replace(values=tuple(values))


def test_a_stored_law_gives_no_figure_to_a_page_that_lacks_a_counter(path: str) -> None:
    made = site(path).serve(3600)
    made.serve(3600, shown=lambda reading: without(reading, "external_tokens")).close()
    with reader_of(path) as reader:
        keep(reader, START + HOUR, reader.targets())
        first, second = valued_over(reader, WHOLE)
        (alone,) = valued_over(reader, (START + HOUR + 900 * SECOND, WHOLE[1]))
    assert first.worth is not None
    assert second.worth is alone.worth is None
    external = 'vllm:prompt_tokens_by_source_total{source="external_kv_transfer"}'
    assert second.reasons[0].text.startswith(f"{external} could not be read in a part of this time, ")
    assert second.reasons[0].hint == (
        "look for what is missing from the engine's page, is no number there, or falls without a restart"
    )
    assert [reason.text for reason in alone.reasons] == [f"the page of vLLM 0.25.1 lacks {external}"]


# -- which law


def test_a_law_of_before_sizes_were_told_is_used_by_its_only_kind(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    (learned,) = learn(reader, WHOLE, reader.targets())
    assert learned.calibration is not None
    own = learned.calibration.fingerprint
    number = reader.add_calibration(
        learned.calibration._replace(fingerprint=own._replace(sizes="")), START, "of an older kvtally"
    )
    laws = laws_of(reader, learns=False)
    values = valued_over(reader, WHOLE, laws)
    assert {value.calibration.id for value in values if value.calibration} == {number}
    assert all(value.worth is not None for value in values)
    found = laws.numbered(number)
    assert found is not None
    assert found.fingerprint == own


def test_the_newest_law_of_a_kind_is_used_and_another_one_where_it_is_asked_for(
    four_hours: tuple[LedgerReader, Site],
) -> None:
    reader, _ = four_hours
    targets = reader.targets()
    keep(reader, START + 4 * HOUR, targets)
    first = reader.calibrations()[0].calibration
    assert reader.add_calibration(shifted(first, 1.25), START, "a test") == 2
    newest, asked = (total(valued_over(reader, WHOLE, laws)) for laws in (laws_of(reader), laws_of(reader, only=1)))
    values = valued_over(reader, WHOLE, laws_of(reader, only=1))
    assert {value.calibration.id for value in values if value.calibration is not None} == {1}
    assert newest.avoided[1] != pytest.approx(asked.avoided[1], rel=0.05)
    report = savings_report(reader, Window(*WHOLE), [], book_of(reader), PAYMENT, laws=laws_of(reader, only=1))
    assert report.as_json()["groups"][0]["calibrations"] == ["1"]
    # a number that is not there leaves what the ledger itself would learn
    free = valued_over(reader, WHOLE, laws_of(reader, only=77))
    assert {value.calibration.id for value in free if value.calibration is not None} == {None}


def test_what_a_stored_law_does_not_fit_is_said_wherever_it_is_used(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    first = reader.calibrations()[0].calibration
    odd = first._replace(evidence=first.evidence._replace(notes=("the windows do not fit: look",)))
    reader.add_calibration(odd, START, "a test")
    values = valued_over(reader, WHOLE, laws_of(reader))
    assert {value.reasons for value in values} == {(Reason("the windows do not fit: look"),)}
    assert all(value.worth is not None for value in values)
    assert {value.reasons for value in valued_over(reader, WHOLE, laws_of(reader, only=1))} == {()}


def test_where_nothing_is_learned_an_hour_without_a_stored_law_has_none(
    four_hours: tuple[LedgerReader, Site],
) -> None:
    reader, _ = four_hours
    values = valued_over(reader, (START, START + HOUR), laws_of(reader, learns=False))
    assert [(value.worth, value.reasons) for value in values] == [(None, (NOT_CALIBRATED,))]


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_a_period_keeps_the_law_that_it_had_whichever_it_was(four_hours: tuple[LedgerReader, Site], asked: int) -> None:
    reader, _ = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    first = reader.calibrations()[0].calibration
    for factor in (1.1, 1.2):
        reader.add_calibration(shifted(first, factor), START, "a test")
    laws = laws_of(reader)
    # as a settlement gives them: one after the other, and some hours had none
    kept = laws.frozen(number for number in (None, asked))
    values = valued_over(reader, WHOLE, kept)
    assert {value.calibration.id for value in values if value.calibration is not None} == {asked}
    assert {one.calibration.id for one in valued_over(reader, WHOLE, laws) if one.calibration is not None} == {3}


def test_a_newer_calibration_that_cannot_be_read_is_left_out(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    law = reader.calibrations()[0].calibration
    body = {**law.as_json(), "evidence": {**law.evidence._asdict(), "moons": 3}}
    with closing(sqlite3.connect(reader.path)) as connection, connection:
        connection.execute(
            "INSERT INTO calibration (id, fingerprint, made_at_ns, start_ns, end_ns, rung, body, reason) "
            "VALUES (40, ?, 1, 2, 3, 'M9', ?, 'a newer kvtally')",
            (law.fingerprint.text(), json.dumps(body)),
        )
    values = valued_over(reader, WHOLE)
    assert {value.calibration.id for value in values if value.calibration is not None} == {1}
    assert settled(reader, 0) == [1]
    assert used(reader) == {0: {1}}


def test_a_law_of_another_ledger_values_this_one(four_hours: tuple[LedgerReader, Site], tmp_path: Path) -> None:
    reader, _ = four_hours
    keep(reader, START + 4 * HOUR, reader.targets())
    law = reader.calibrations()[0].calibration
    there = total(valued_over(reader, (START, START + HOUR)))
    (tmp_path / "other").mkdir()
    other = new_ledger(tmp_path / "other")
    made = site(other).serve(120)
    made.close()
    with reader_of(other) as short:
        assert [value.worth for value in valued_over(short, WHOLE)] == [None]  # 16 requests
        written = json.loads(json.dumps(law.as_json()))
        assert short.add_calibration(calibration_of(written)._replace(prior="imported"), START, "imported") == 1
        (value,) = valued_over(short, WHOLE)
        assert value.calibration is not None
        assert (value.calibration.id, value.calibration.medians) == (1, law.medians)
        assert value.worth is not None
        assert value.worth.requests == 16
    # the same load, 1/30 of the time
    assert value.worth.avoided[1] == pytest.approx(there.avoided[1] / 30, rel=0.4)


# -- settled hours


def numbers(values: Sequence[Valued]) -> list[int | None]:
    return [None if value.calibration is None else value.calibration.id for value in values]


def test_settled_hours_answer_as_they_were_settled(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    assert settled(reader, 0, 1, 2) == [1, 1, 1]
    hours = [START + hour * HOUR for hour in range(3)]
    stored = values_of(reader, WHOLE, reader.targets(), laws_of(reader), hours)
    raw = values_of(reader, WHOLE, reader.targets(), laws_of(reader), [])
    assert numbers(stored) == numbers(raw) == [1] * 4
    for one, other in zip(sorted(stored), sorted(raw), strict=True):
        assert one.worth is not None
        assert other.worth is not None
        assert one.worth.hbm_tokens == other.worth.hbm_tokens
        assert one.worth.avoided == pytest.approx(other.worth.avoided, rel=1e-8)


def test_a_newer_law_changes_no_settled_hour(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    settled(reader, 0, 1)
    before = savings_report(reader, Window(START, START + 2 * HOUR), ["hour"], book_of(reader), PAYMENT)
    first = reader.calibrations()[0].calibration
    newer = reader.add_calibration(shifted(first, 1.25), START + 2 * HOUR, "a test")
    after = savings_report(reader, Window(START, START + 3 * HOUR), ["hour"], book_of(reader), PAYMENT)
    assert after.groups[:2] == before.groups
    assert [group["calibrations"] for group in after.as_json()["groups"]] == [["1"], ["1"], [str(newer)]]


def test_a_new_price_settles_an_hour_again_by_the_law_that_it_had(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    settled(reader, 0, 1)
    first = reader.calibrations()[0].calibration
    for factor in (1.1, 1.2):
        reader.add_calibration(shifted(first, factor), START, "a test")
    settled(reader, 1, restates=True)
    assert used(reader) == {0: {1}, 1: {3}}
    reader.add_calibration(shifted(first, 1.3), START, "a test")
    window = Window(START, START + 2 * HOUR)
    before = savings_report(reader, window, ["hour"], book_of(reader), PAYMENT)
    reader.add_rates([rate("gpu", "7.2", "gpu-hour", START, sku=SKU)])
    assert settle_again(reader, START, book_of(reader), PAYMENT) == (2, 0)
    assert used(reader) == {0: {1}, 1: {3}}
    after = savings_report(reader, window, ["hour"], book_of(reader), PAYMENT)
    for one, other in zip(before.groups, after.groups, strict=True):
        assert one.seconds == other.seconds
        assert one.money is not None
        assert other.money is not None
        assert [money.rate_nano for money in (one.money, other.money)] == [1_000_000, 2_000_000]
        assert other.money.gross.point == pytest.approx(2 * one.money.gross.point, abs=1)


def test_an_hour_that_is_restated_takes_the_newest_law(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    settled(reader, 0, 1)
    newer = reader.add_calibration(shifted(reader.calibrations()[0].calibration, 1.25), START, "a test")
    assert settled(reader, 0, restates=True, reason="a better calibration") == [2]
    assert used(reader) == {0: {newer}, 1: {1}}
    assert settled(reader, 1) == [2]
    assert used(reader) == {0: {newer}, 1: {1}}


def test_an_hour_that_was_settled_without_a_law_is_worked_out_once_there_is_one(path: str) -> None:
    made = site(path).serve(3600 - 120, IDLE).serve(120)  # 16 requests in the first hour: too few
    made.serve(3600).close()
    with reader_of(path) as reader:
        reader.add_rates([PRICE])
        settle_hours(reader, [START], START + HOUR, book_of(reader), PAYMENT)
        assert reader.calibrations() == []
        assert used(reader) == {0: {None}}
        early = savings_report(reader, Window(START, START + HOUR), [], book_of(reader), PAYMENT)
        settle_hours(reader, [START + HOUR], START + 2 * HOUR, book_of(reader), PAYMENT)
        report = savings_report(reader, Window(START, START + 2 * HOUR), [], book_of(reader), PAYMENT)
        values = values_of(reader, WHOLE, reader.targets(), laws_of(reader), [START, START + HOUR])
    # a report learns from all that the ledger holds by now
    assert early.groups[0].seconds is not None
    assert report.groups[0].status == "ok"
    assert sorted(numbers(values), key=str) == [1, 1]
    assert total(values).requests == 496


def test_a_replica_that_had_no_law_when_its_hour_was_settled_gets_a_figure_later(path: str) -> None:
    made = site(path, NAME, OTHER)
    late = made.engines[1]
    late.attributes = {**late.attributes, "version": "0.26.0"}
    made.serve(3600 - 120, only=made.engines[:1])
    made.scrape([late])
    made.serve(120).serve(3600).close()
    with reader_of(path) as reader:
        reader.add_rates([PRICE])
        settle_hours(reader, [START], START + HOUR, book_of(reader), PAYMENT)
        assert used(reader) == {0: {1, None}}
        settle_hours(reader, [START + HOUR], START + 2 * HOUR, book_of(reader), PAYMENT)
        values = values_of(reader, WHOLE, reader.targets(), laws_of(reader), [START, START + HOUR])
        report = savings_report(reader, Window(START, START + HOUR), ["replica"], book_of(reader), PAYMENT)
    assert all(value.worth is not None for value in values)
    first = [value for value in values if value.hour_ns == START]
    assert len(first) == 2
    assert 1 in numbers(first)  # what was settled stays as it was
    assert [group.by["replica"] for group in report.groups] == [NAME, OTHER]
    assert all(group.seconds is not None for group in report.groups)


def test_settled_hours_answer_when_their_intervals_have_aged_out(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    settled(reader, 0, 1, 2)
    window = Window(START, START + 3 * HOUR)
    before = savings_report(reader, window, ["hour"], book_of(reader), PAYMENT)
    assert prune_before(reader, HOUR) != {}
    raw_from = reader.raw_from()
    assert raw_from is not None
    assert raw_from > START + 2 * HOUR
    assert savings_report(reader, window, ["hour"], book_of(reader), PAYMENT).groups == before.groups
    assert [group.status for group in before.groups] == ["ok"] * 3


def test_what_aged_out_without_a_law_has_no_figure_and_says_so(path: str) -> None:
    made = site(path).serve(3600 - 120, IDLE).serve(120).serve(7200, IDLE)
    made.close()
    with reader_of(path) as reader:
        reader.add_rates([PRICE])
        hours = [START, START + HOUR]
        settle_hours(reader, hours, START + 2 * HOUR, book_of(reader), PAYMENT)
        prune_before(reader, 0)
        report = savings_report(reader, Window(START, START + HOUR), [], book_of(reader), PAYMENT)
    (group,) = report.groups
    assert group.status == "insufficient_data"
    texts = [reason.text for reason in group.reasons]
    assert "no calibration was there when the hour was settled" in texts
    assert "100% of the reused tokens lie in hours without a figure" in texts


def test_a_settled_hour_keeps_that_nothing_told_what_loading_and_storing_took(path: str) -> None:
    site(path).serve(3600, Load(hbm=0.4, external=0.3)).serve(7200, IDLE).close()
    with reader_of(path) as reader:
        reader.add_rates([PRICE])
        keep(reader, START + HOUR, reader.targets())
        window = Window(START, START + HOUR)
        before = savings_report(reader, window, [], book_of(reader), PAYMENT)
        settled(reader, 0)
        prune_before(reader, 0)
        after = savings_report(reader, window, [], book_of(reader), PAYMENT)
        cost = cost_report(reader, window, [], book_of(reader), PAYMENT)
    for report in (before, after):
        (group,) = report.as_json()["groups"]
        assert group["status"] == "not_proven"
        assert group["net_engine_seconds"] is group["net"] is group["realised"] is None
        assert group["gross"] is not None
        assert [one for one in group["reasons"] if one.startswith("nothing tells how long loading and storing KV took")]
    (costs,) = cost.as_json()["groups"]
    assert costs["engine_seconds"]["stall"] is costs["engine_seconds"]["store"] is None


def test_what_a_settlement_keeps_of_a_value_comes_back(four_hours: tuple[LedgerReader, Site]) -> None:
    reader, _ = four_hours
    (value,) = valued_over(reader, (START, START + HOUR))
    assert value.calibration is not None
    assert value.worth is not None
    body = json.loads(json.dumps(value.as_json(), allow_nan=False))
    back = settled_value(value.hour_ns, value.target_id, body, value.calibration)
    assert back._replace(worth=None) == value._replace(worth=None)
    assert back.worth is not None
    assert back.worth.as_json() == value.worth.as_json()
    # without its calibration a worth has no interval, so it is no figure
    assert settled_value(value.hour_ns, value.target_id, body, None).worth is None
    with pytest.raises(KeyError):
        settled_value(value.hour_ns, value.target_id, {"worth": {}, "loading": "unknown"}, value.calibration)


def test_two_engines_that_swap_a_gpu_are_told_apart_in_each_hour(path: str) -> None:
    held = About(gpus=("GPU-0",), sku=SKU, mapping="a test", facts=FACTS)
    made = site(path, NAME, OTHER, about={OTHER: held})
    first, second = made.engines
    made.gpus[second.name] = made.gpus[first.name]
    made.serve(1800, only=[first])
    made.at_ns += 30 * SECOND
    # both answered once at the start: the second's first interval reaches back to it
    made.serve(1800, only=[second]).close()
    with reader_of(path) as reader:
        values = valued_over(reader, WHOLE)
        found = learn(reader, WHOLE, reader.targets())
    assert {value.worth for value in values} == {None}
    assert {one.calibration for one in found} == {None}
    assert {reason.text for one in found for reason in one.reasons} == {
        f"GPU-0 is held by {second.name} too: the seconds of these engines cannot be told apart",
        f"GPU-0 is held by {first.name} too: the seconds of these engines cannot be told apart",
    }
