from __future__ import annotations

import sys
from collections import Counter
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, FakeGpu, new_ledger, reader_of
from tests.serving import FACTS, IDLE, LAW, NAME, Load, ServingEngine, Site
from tests.simulator.scenarios import build

from kvtally.agent.calibrating import DRIFT, _misfit, keep, learn, prior_of
from kvtally.agent.calibration import PARAMETERS
from kvtally.agent.cli.replay import into_ledger
from kvtally.agent.config import Config
from kvtally.agent.interval import RESET
from kvtally.agent.kin import kin_of
from kvtally.agent.replica import About
from kvtally.agent.steplaw.evidence import MOST_WINDOWS
from kvtally.collectors.quantities import index

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

    from kvtally.agent.calibrating import Learned
    from kvtally.agent.ledger.read import LedgerReader
    from kvtally.collectors.base import Reading

OTHER, THIRD = "10.0.0.2:8000/0", "10.0.0.3:8000/0"
HALF_HOUR = 1800
FOREVER = (0, 2**62)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def site(path: str, *names: str, every: int = 30, about: dict[str, About] | None = None) -> Site:
    named = {name.partition("/")[0]: one for name, one in (about or {}).items()}
    made = Site(path, [ServingEngine(name) for name in names or (NAME,)], about=named, every=every)
    made.scrape(made.engines)
    return made


def learned(path: str, span: tuple[int, int] = FOREVER) -> list[Learned]:
    with reader_of(path) as reader:
        return learn(reader, span, reader.targets(), reader.calibrations())


def kept(reader: LedgerReader, now_ns: int) -> list[int]:
    return keep(reader, now_ns, reader.targets())


# -- what a law is


def test_a_law_says_what_it_was_learned_from(path: str) -> None:
    site(path).serve(HALF_HOUR).close()
    (one,) = learned(path)
    law = one.calibration
    assert law is not None
    assert (one.replicas, one.reasons) == ((NAME,), ())
    assert (law.rung, law.prior, law.id) == ("M1", "packaged", None)
    told = law.evidence
    # 60 scrapes of 4 requests with 40 output tokens
    assert (told.requests, told.steps, told.occupied_seconds) == (240, 9600, 1800.0)
    assert (told.start_ns, told.end_ns) == (START, START + HALF_HOUR * SECOND)
    assert (told.source, told.probes) == ("graphics", 0)
    fingerprint = law.fingerprint
    assert (fingerprint.model, fingerprint.version, fingerprint.gpus) == ("llama-8b", "0.25.1", 1)
    assert (fingerprint.sku, fingerprint.token_budget) == (SKU, 8192)


def test_a_law_comes_near_the_one_that_served(path: str) -> None:
    site(path).serve(2 * HALF_HOUR, Load(hbm=0.3)).close()
    law = learned(path)[0].calibration
    assert law is not None
    true = LAW.parameters
    at = dict(zip(PARAMETERS, law.medians, strict=True))
    for name in ("compute_efficiency", "weight_bandwidth_efficiency"):
        assert at[name] == pytest.approx(getattr(true, name), rel=0.1)
    assert law.evidence.worked_ratio == pytest.approx(1.0, abs=0.02)


def test_replicas_of_one_kind_share_a_law(path: str) -> None:
    site(path, NAME, OTHER).serve(HALF_HOUR).close()
    (one,) = learned(path)
    assert one.replicas == (NAME, OTHER)
    assert len(one.target_ids) == 2
    assert one.calibration is not None
    assert one.calibration.evidence.requests == 480


def test_a_change_of_version_begins_another_law(path: str) -> None:
    made = site(path).serve(HALF_HOUR)
    made.engines[0].attributes = {**made.engines[0].attributes, "version": "0.26.0"}
    made.serve(900).close()
    found = {one.fingerprint.version: one for one in learned(path) if one.fingerprint is not None}
    assert {version: one.replicas for version, one in found.items()} == {"0.25.1": (NAME,), "0.26.0": (NAME,)}
    # the scrape that shows the new version closes an interval of it
    counts = [one.calibration.evidence.requests for one in found.values() if one.calibration is not None]
    assert counts == [240, 120]
    assert found["0.25.1"].target_ids.isdisjoint(found["0.26.0"].target_ids)


def test_a_replica_that_nothing_measures_takes_no_law_from_its_kind(path: str) -> None:
    # the GPU of the second is never sampled, though its product is known
    unseen = About(gpus=("GPU-unseen",), sku=SKU, mapping="a test", facts=FACTS)
    site(path, NAME, OTHER, about={OTHER: unseen}).serve(HALF_HOUR).close()
    found = {one.replicas: one for one in learned(path)}
    law = found[NAME,].calibration
    assert law is not None
    assert law.evidence.requests == 240
    assert found[OTHER,].calibration is None
    assert "nothing tells how long the engine worked" in found[OTHER,].reasons[0].text
    assert found[NAME,].fingerprint == found[OTHER,].fingerprint
    with reader_of(path) as reader:
        assert kept(reader, START + HOUR) == [1]


def without(reading: Reading, name: str) -> Reading:
    values = list(reading.values)
    values[index("engine", name)] = None
    return reading._replace(values=tuple(values))


def test_a_replica_that_lacks_a_counter_takes_no_law_from_its_kind(path: str) -> None:
    made = site(path, NAME, OTHER)
    made.serve(HALF_HOUR, shown=lambda reading: without(reading, "queue_ns") if reading.name == OTHER else reading)
    made.close()
    # the first scrape had it: only differences are unknown
    found = {one.replicas: one for one in learned(path)}
    assert found[NAME,].calibration is not None
    assert [reason.text for reason in found[OTHER,].reasons] == [
        "the page of vLLM 0.25.1 lacks vllm:request_queue_time_seconds_sum"
    ]


# -- what is no evidence


def is_sound(path: str) -> tuple[Any, Any]:
    """Which intervals may be learned from, and the flags of all."""
    with reader_of(path) as reader:
        ((subject,),) = [kin.subjects for kin in kin_of(reader, FOREVER, reader.targets())]
    return subject.series.sound[1:], np.array([one.row.flags for one in subject.observed.rows])


def test_the_interval_in_which_an_engine_restarts_is_counted_and_not_learned_from(path: str) -> None:
    made = site(path).serve(900)
    made.engines[0].restart((made.at_ns + 7 * SECOND) / 1e9)
    made.serve(900).close()
    sound, flags = is_sound(path)
    assert (~sound).sum() == 1
    assert flags[~sound][0] & RESET
    law = learned(path)[0].calibration
    assert law is not None
    assert law.evidence.requests == 240


def test_intervals_whose_counters_contradict_each_other_are_not_learned_from(path: str) -> None:
    def lying(reading: Reading) -> Reading:
        values = list(reading.values)
        at = index("engine", "hbm_tokens")
        values[at] = round((values[at] or 0.0) * 1.5)
        return reading._replace(values=tuple(values))

    site(path).serve(HALF_HOUR).serve(HALF_HOUR, shown=lying).close()
    sound, _ = is_sound(path)
    assert sound.tolist() == [True] * 60 + [False] * 60
    whole, half = (learned(path, span)[0].calibration for span in (FOREVER, (0, START + HALF_HOUR * SECOND)))
    assert whole is not None
    assert half is not None
    assert whole.medians == pytest.approx(half.medians, rel=0.05)


def test_an_interval_with_an_unknown_counter_is_not_learned_from(path: str) -> None:
    made = site(path).serve(900)
    made.serve(60, shown=lambda reading: without(reading, "prefill_ns"))
    made.serve(900).close()
    sound, _ = is_sound(path)
    assert np.flatnonzero(~sound).tolist() == [30, 31]


# -- how laws follow on each other


def test_a_law_is_kept_often_while_it_is_young_and_then_four_times_a_day(path: str) -> None:
    made = site(path, every=60).serve(20 * 3600, Load(requests=1))
    made.close()
    written = {}
    with reader_of(path) as reader:
        for hour in range(1, 21):
            written[hour] = kept(reader, START + hour * HOUR)
        stored = reader.calibrations()
    # six hours hour by hour, and from then on every six hours
    assert {hour: ids for hour, ids in written.items() if ids} == {
        hour: [number] for number, hour in enumerate((1, 2, 3, 4, 5, 6, 12, 18), 1)
    }
    assert [one.reason for one in stored] == ["first evidence", *["new evidence"] * 7]
    assert [one.calibration.prior for one in stored] == ["packaged", "1", "2", "3", "4", "5", "6", "7"]
    spans = [(one.calibration.evidence.start_ns, one.calibration.evidence.end_ns) for one in stored]
    edges = [START + hour * HOUR for hour in (0, 1, 2, 3, 4, 5, 6, 12, 18)]
    assert spans == list(pairwise(edges))  # nothing is counted twice, and nothing left out
    assert [one.made_at_ns for one in stored] == edges[1:]


def test_a_long_chain_of_laws_never_knows_a_parameter_better_than_engines_drift(path: str) -> None:
    made = site(path, every=60).serve(8 * 3600, Load(requests=3))
    made.close()
    with reader_of(path) as reader:
        for hour in range(1, 9):
            kept(reader, START + hour * HOUR)
        stored = [one.calibration for one in reader.calibrations()]
    widths = [np.sqrt(np.diag(np.array(law.covariance))) for law in stored]
    assert (widths[-1] < widths[0]).any()  # it learns
    assert (widths[-1] > DRIFT / 4).all()  # and never is sure
    medians = np.array([law.medians[PARAMETERS.index("compute_efficiency")] for law in stored])
    assert np.abs(medians / LAW.parameters.compute_efficiency - 1).max() < 0.15


def test_an_hour_that_cannot_carry_a_law_is_learned_from_with_the_next(path: str) -> None:
    made = site(path).serve(3600, Load(requests=0)).serve(3600)
    made.close()
    with reader_of(path) as reader:
        assert kept(reader, START + HOUR) == []
        (number,) = kept(reader, START + 2 * HOUR)
        (stored,) = reader.calibrations()
    assert stored.id == number
    assert (stored.calibration.evidence.start_ns, stored.calibration.evidence.requests) == (START, 480)


def test_an_idle_hour_after_a_law_writes_none(path: str) -> None:
    made = site(path).serve(3600).serve(7200, IDLE)
    made.close()
    with reader_of(path) as reader:
        assert kept(reader, START + HOUR) == [1]
        assert kept(reader, START + 2 * HOUR) == []
        assert kept(reader, START + 3 * HOUR) == []


def test_nothing_is_kept_of_an_empty_ledger(path: str) -> None:
    with reader_of(path) as reader:
        assert kept(reader, START) == []


def test_a_law_is_kept_of_the_last_day_at_most(path: str) -> None:
    site(path, every=300).serve(30 * 3600, Load(requests=4)).close()
    with reader_of(path) as reader:
        kept(reader, START + 30 * HOUR)
        (one,) = reader.calibrations()
    assert one.calibration.evidence.start_ns == START + 6 * HOUR


def test_the_same_span_learned_twice_is_one_calibration(path: str) -> None:
    site(path).serve(HALF_HOUR).close()
    with reader_of(path) as reader:
        numbers = []
        for _ in range(2):
            (one,) = learn(reader, FOREVER, reader.targets(), reader.calibrations())
            assert one.calibration is not None
            numbers.append(reader.add_calibration(one.calibration, START, "asked for"))
        assert numbers == [1, 1]


def test_a_law_whose_evidence_overlaps_is_no_prior(path: str) -> None:
    site(path).serve(3600).close()
    with reader_of(path) as reader:
        targets = reader.targets()
        (first,) = learn(reader, (START, START + HALF_HOUR * SECOND), targets)
        assert first.calibration is not None
        reader.add_calibration(first.calibration, START, "a test")
        stored = reader.calibrations()
        after, across = (
            learn(reader, (START + begin * SECOND, START + HOUR), targets, stored)[0].calibration
            for begin in (HALF_HOUR, HALF_HOUR - 30)
        )
    assert after is not None
    assert across is not None
    assert (after.prior, across.prior) == ("1", "packaged")


def test_a_law_from_before_sizes_were_told_is_gone_on_from(path: str) -> None:
    site(path).serve(3 * 3600).close()
    with reader_of(path) as reader:
        (first,) = learn(reader, (START, START + HALF_HOUR * SECOND), reader.targets())
        assert first.calibration is not None
        old = first.calibration.fingerprint._replace(sizes="")
        assert old != first.calibration.fingerprint
        reader.add_calibration(first.calibration._replace(fingerprint=old), START, "a kvtally of before")
        (number,) = kept(reader, START + 3 * HOUR)
        (new,) = (one for one in reader.calibrations() if one.id == number)
    assert (new.calibration.prior, new.calibration.fingerprint) == ("1", first.calibration.fingerprint)


def test_a_prior_grows_with_the_weeks_and_by_what_engines_drift(path: str) -> None:
    site(path).serve(HALF_HOUR).close()
    with reader_of(path) as reader:
        (kin,) = kin_of(reader, FOREVER, reader.targets())
        kept(reader, START + HOUR)
        stored = reader.calibrations()
    assert kin.machine is not None
    assert kin.fingerprint is not None
    law = stored[0].calibration
    later = law.evidence.end_ns + 14 * 24 * HOUR
    prior, name = prior_of(kin.machine, kin.fingerprint, stored, later)
    assert name == "1"
    assert tuple(prior.medians) == law.medians
    own = np.array(law.covariance)
    # 1.5 a week; no parameter drifts by more than its packaged prior allows
    assert np.diag(prior.covariance) == pytest.approx(2.25 * np.diag(own) + 0.03**2)
    assert prior.covariance - np.diag(np.diag(prior.covariance)) == pytest.approx(2.25 * (own - np.diag(np.diag(own))))
    assert prior_of(kin.machine, kin.fingerprint, stored, law.evidence.end_ns - 1)[1] == "packaged"
    other = kin.fingerprint._replace(version="0.26.0")
    assert prior_of(kin.machine, other, stored, later)[1] == "packaged"


def test_little_evidence_is_enough_where_there_is_a_prior(path: str) -> None:
    site(path).serve(3600).serve(120).close()
    with reader_of(path) as reader:
        kept(reader, START + HOUR)
        span = (START + HOUR, START + 2 * HOUR)
        (alone,) = learn(reader, span, reader.targets())
        (behind,) = learn(reader, span, reader.targets(), reader.calibrations())
    assert alone.calibration is None
    assert behind.calibration is not None
    assert behind.calibration.evidence.requests == 16


def test_a_law_of_a_cpu_is_stored(tmp_path: Path) -> None:
    found = []
    for seed in range(1, 9):  # a CPU's law is often refused: take the first that is not
        (tmp_path / str(seed)).mkdir()
        path = new_ledger(tmp_path / str(seed))
        into_ledger(build("cpu", seed, seconds=200).recorded().open(), f"sqlite:///{path}", Config())
        with reader_of(path) as reader:
            kept(reader, START + HOUR)
            found = reader.calibrations()
        if found:
            break
    (one,) = found
    law = one.calibration
    assert (law.fingerprint.gpus, law.fingerprint.sku, law.evidence.source) == (0, "", "cpu")
    assert (law.clock, law.clock_weight_seconds) == (1.0, 1e9)


# -- work


@contextmanager
def counting(names: set[str]) -> Iterator[Counter[str]]:
    """How often functions of these names of the step law are called inside."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_name in names and "/steplaw/" in frame.f_code.co_filename:
            calls[frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def test_a_day_of_scrapes_is_fitted_with_as_much_work_as_an_hour(path: str) -> None:
    site(path, every=15).serve(24 * 3600, Load(requests=1)).close()
    works = []
    with reader_of(path) as reader:
        targets = reader.targets()
        for hours in (1, 24):
            with counting({"residuals", "evidence_of", "populations"}) as calls:
                (one,) = learn(reader, (START, START + hours * HOUR), targets)
            assert one.calibration is not None
            evidence = one.calibration.evidence
            # of 240 or 5760 scrapes as many windows and as many single requests are looked at
            assert evidence.windows <= 2 * MOST_WINDOWS
            assert evidence.requests == hours * 240
            works.append(calls)
    for calls in works:
        # at most 40 iterations, each with a column for each of 11 unknowns and up to 8 steps; mostly one step is enough
        assert 0 < calls["residuals"] < 40 * 12
        assert (calls["evidence_of"], calls["populations"]) == (1, 1)


def test_each_law_that_is_due_is_fitted_once(path: str) -> None:
    made = site(path, NAME, OTHER, THIRD)
    for number, engine in enumerate(made.engines):
        engine.attributes = {**engine.attributes, "version": f"0.2{number + 5}.0"}
    made.serve(HALF_HOUR).close()
    with reader_of(path) as reader, counting({"fit"}) as calls:
        assert kept(reader, START + HOUR) == [1, 2, 3]
    assert calls["fit"] == 3


# -- flags: a law that does not meet what was measured


class OddGpu(FakeGpu):
    """A GPU that tells another share of its time than it worked for its engine: times `factor`, and `beside`."""

    def __init__(self, name: str, factor: float, beside: float) -> None:
        super().__init__(name)
        self.factor, self.beside = factor, beside

    def run(self, seconds: float, busy: float, *, mean: bool = True) -> None:
        super().run(seconds, busy * self.factor + seconds * self.beside, mean=mean)


def odd(path: str, factor: float = 1.0, beside: float = 0.0) -> list[Learned]:
    made = site(path)
    made.gpus[NAME] = OddGpu(made.gpus[NAME].name, factor, beside)
    made.serve(HALF_HOUR, Load(requests=1, hbm=0.3)).close()
    return learned(path)


def test_a_gpu_that_rests_while_steps_are_counted_is_flagged(path: str) -> None:
    (one,) = odd(path, factor=0.0)
    (reason,) = one.reasons
    # 60 scrapes of a request of 40 output tokens
    assert reason.text == "2400 steps were counted in which 0.0 s of work were measured"
    assert not reason.refuses
    assert one.calibration is not None
    assert one.calibration.evidence.notes == (str(reason),)


def test_work_that_no_law_explains_is_flagged(path: str) -> None:
    (one,) = odd(path, factor=5.0)
    texts = [reason.text for reason in one.reasons if not reason.refuses]
    assert texts == ["by the law the engine would have worked 87% of what was measured"]


def test_a_law_that_requests_alone_do_not_obey_is_flagged(path: str) -> None:
    (one,) = odd(path, beside=0.1)
    texts = [reason.text for reason in one.reasons if not reason.refuses]
    assert texts[1] == "requests that ran alone took 50% more or less than by the law"


@pytest.mark.parametrize(
    ("gpus", "where"), [(1, "for another process on its GPUs"), (0, "whether all its processes are seen")]
)
def test_an_engine_without_a_gpu_is_not_told_to_look_at_its_gpus(path: str, gpus: int, where: str) -> None:
    site(path).serve(HALF_HOUR).close()
    (one,) = learned(path)
    assert one.calibration is not None
    (reason,) = _misfit(one.calibration.evidence._replace(worked_ratio=1.5), gpus)
    assert where in reason.hint


def test_a_law_that_fits_has_no_flag(path: str) -> None:
    (one,) = odd(path)
    assert one.calibration is not None
    assert (one.reasons, one.calibration.evidence.notes) == ((), ())
