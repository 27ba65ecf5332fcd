from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ledgers import (
    HOUR,
    RATES,
    SECOND,
    SKU,
    START,
    Deployment,
    FakeEngine,
    FakeGpu,
    killed_at,
    new_ledger,
    reader_of,
)

from kvtally.agent.accounts import Payment
from kvtally.agent.audit import audit
from kvtally.agent.calibration import PARAMETERS, Calibration, CalibrationEvidence, Fingerprint
from kvtally.agent.ledger.errors import LedgerUnreachable
from kvtally.agent.ledger.settled import revisions
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.settlement import settle

if TYPE_CHECKING:
    from pathlib import Path

    from kvtally.agent.finding import Finding

LLAMA = Fingerprint("llama-8b", "LlamaForCausalLM", "bfloat16", "bfloat16", SKU, 1, "0.25.1", 8192)
EVIDENCE = CalibrationEvidence(
    START, START + HOUR, "graphics", 240, 3, 0, 0, 1200, 50_000, 3100.5, 1.01, None, ("a note",)
)
SIZE = len(PARAMETERS)
LAW = Calibration(
    LLAMA,
    "M1",
    tuple(0.1 * (number + 1) for number in range(SIZE)),
    tuple(tuple(0.01 * (row == column) for column in range(SIZE)) for row in range(SIZE)),
    0.88,
    30.0,
    EVIDENCE,
)
REVISED = LAW._replace(clock=0.9)


@pytest.fixture
def path(tmp_path: Path) -> str:
    return new_ledger(tmp_path)


def test_a_calibration_comes_back_as_it_was_written_with_its_number(path: str) -> None:
    with reader_of(path) as reader:
        assert reader.calibrations() == []
        number = reader.add_calibration(LAW, START + 5, "the daily fit")
    with reader_of(path) as reader:
        (found,) = reader.calibrations()
        assert reader.unreadable_calibrations() == []
    assert (found.id, found.made_at_ns, found.reason, found.prior_id) == (number, START + 5, "the daily fit", None)
    assert found.calibration == LAW._replace(id=number)


numbers = st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(codec="utf-8"), max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    medians=st.lists(numbers, min_size=SIZE, max_size=SIZE),
    covariance=st.lists(st.lists(numbers, min_size=SIZE, max_size=SIZE), min_size=SIZE, max_size=SIZE),
    note=texts,
    model=texts,
    ratio=st.none() | numbers,
    reason=texts,
)
def test_any_calibration_comes_back_to_the_last_bit(
    path: str,
    *,
    medians: list[float],
    covariance: list[list[float]],
    note: str,
    model: str,
    ratio: float | None,
    reason: str,
) -> None:
    law = LAW._replace(
        fingerprint=LLAMA._replace(model=model),
        medians=tuple(medians),
        covariance=tuple(map(tuple, covariance)),
        evidence=EVIDENCE._replace(notes=(note,), worked_ratio=ratio),
    )
    with reader_of(path) as reader:
        number = reader.add_calibration(law, START, reason)
        assert reader.add_calibration(law, START, reason) == number
        found = {one.id: one.calibration for one in reader.calibrations(law.fingerprint.text())}
    assert repr(found[number]) == repr(law._replace(id=number))  # repr: 0.0 is not -0.0


def test_the_same_calibration_is_written_once_whenever_and_why_ever_it_was_made(path: str) -> None:
    with reader_of(path) as reader, reader_of(path) as other:
        number = reader.add_calibration(LAW, START, "first")
        assert other.add_calibration(LAW, START + HOUR, "again") == number
        assert reader.add_calibration(LAW._replace(id=77), START, "first") == number  # a number is no part of a law
        assert [(one.id, one.reason) for one in reader.calibrations()] == [(number, "first")]
        later = LAW._replace(evidence=EVIDENCE._replace(end_ns=START + 2 * HOUR))
        others = [REVISED, later, LAW._replace(fingerprint=LLAMA._replace(gpus=2))]
        ids = [reader.add_calibration(one, START, "another") for one in others]
        assert len({number, *ids}) == 4


def test_calibrations_come_oldest_first_and_by_fingerprint(path: str) -> None:
    cpu = LLAMA._replace(sku="", gpus=0)
    with reader_of(path) as reader:
        newer = reader.add_calibration(LAW, START + 2, "newer")
        older = reader.add_calibration(REVISED, START + 1, "older, and written later: a recording that was replayed")
        elsewhere = reader.add_calibration(LAW._replace(fingerprint=cpu), START + 3, "on a CPU")
        assert [one.id for one in reader.calibrations()] == [older, newer, elsewhere]
        assert [one.id for one in reader.calibrations(LLAMA.text())] == [older, newer]
        assert [one.calibration.fingerprint for one in reader.calibrations(cpu.text())] == [cpu]
        assert reader.calibrations("a model that nobody knows") == []


def test_a_prior_is_the_packaged_one_or_a_calibration_that_is_there(path: str) -> None:
    with reader_of(path) as reader:
        first = reader.add_calibration(LAW, START, "first")
        second = reader.add_calibration(LAW._replace(prior=str(first)), START + 1, "second")
        assert [(one.prior_id, one.calibration.prior) for one in reader.calibrations()] == [
            (None, "packaged"),
            (first, str(first)),
        ]
        assert second != first
        with pytest.raises(LedgerUnreachable, match="FOREIGN KEY"):
            reader.add_calibration(LAW._replace(prior="99"), START + 2, "of a prior that was never written")
        assert len(reader.calibrations()) == 2


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_not_written(path: str, number: float) -> None:
    broken = [
        LAW._replace(medians=(number, *LAW.medians[1:])),
        LAW._replace(clock=number),
        LAW._replace(covariance=((number,) * SIZE, *LAW.covariance[1:])),
        LAW._replace(evidence=EVIDENCE._replace(single_error=number)),
    ]
    with reader_of(path) as reader:
        for law in broken:
            with pytest.raises(ValueError, match="not JSON compliant"):
                reader.add_calibration(law, START, "a fit that went wrong")
        assert reader.calibrations() == []
        saving = {"target_id": 1, "body": {"point": number}}
        with pytest.raises(ValueError, match="not JSON compliant"):
            reader.write_settlement(START, 1, reason="a", intervals=0, facts={}, charges=[], savings=[saving])
        assert reader.settled_hours() == {}
        reader.add_calibration(LAW, START, "a fit that went well")
        assert len(reader.calibrations()) == 1


BODY = LAW.as_json()


@pytest.mark.parametrize(
    "body",
    [
        json.dumps({**BODY, "evidence": {**BODY["evidence"], "moons": 3}}),
        json.dumps({**BODY, "fingerprint": {**BODY["fingerprint"], "adapters": 2}}),
        json.dumps({**BODY, "medians": {"other": 1.0}}),
        json.dumps({**BODY, "covariance": [[1.0]]}),
        json.dumps({key: value for key, value in BODY.items() if key != "clock"}),
        json.dumps({**BODY, "clock": None}),
        json.dumps({**BODY, "evidence": 5}),
        "[]",
        "3",
        "not JSON",
        "",
    ],
)
def test_a_calibration_that_cannot_be_read_is_left_out_and_told(path: str, body: str) -> None:
    with reader_of(path) as reader:
        known = reader.add_calibration(LAW, START, "a test")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(
            "INSERT INTO calibration (id, fingerprint, made_at_ns, start_ns, end_ns, rung, body, reason) "
            "VALUES (40, ?, 1, 2, 3, 'M9', ?, 'a newer kvtally')",
            (LLAMA.text(), body),
        )
    with reader_of(path) as reader:
        assert [one.id for one in reader.calibrations(LLAMA.text())] == [known]
        assert reader.unreadable_calibrations() == [40]


def settled(path: str) -> int:
    """An hour of an engine and its GPU, settled under a calibration with its savings, twice; the replica's id."""
    engine, gpu = FakeEngine("10.0.0.1:8000/0"), FakeGpu("GPU-a")
    deployment = Deployment(path, {"10.0.0.1:8000": About(gpus=("GPU-a",), sku=SKU, mapping="a test")})
    for number in range(200):
        engine.serve(computed=100, hbm=300, generated=10, steps=5)
        gpu.run(20, 10)
        deployment.scrape(START + number * 20 * SECOND, [engine], [gpu])
    deployment.close()
    with reader_of(path) as reader:
        reader.add_rates(RATES)
        settle(reader, START, RateBook(RATES), Payment())
        return next(target.id for target in reader.targets().values() if target.kind == "engine")


def write(path: str, revision: int, savings: list[dict[str, Any]], hour_ns: int = START) -> None:
    with reader_of(path) as reader:
        reader.write_settlement(
            hour_ns, revision, reason="a test", intervals=0, facts={"facts": []}, charges=[], savings=savings
        )


def test_savings_come_back_from_the_newest_settlement_of_each_hour(path: str) -> None:
    target_id = settled(path)
    with reader_of(path) as reader:
        law = reader.add_calibration(LAW, START, "a test")
        first, second = ({"target_id": target_id, "calibration_id": law, "body": {"point": one}} for one in (1.5, 2.5))
    unproven = {"target_id": target_id, "body": {"status": "insufficient_data"}}
    write(path, 2, [first])
    write(path, 3, [second])
    write(path, 1, [first], START + HOUR)
    write(path, 1, [unproven], START + 2 * HOUR)
    write(path, 1, [first], START + 3 * HOUR)
    write(path, 2, [], START + 3 * HOUR)  # what was once worth something, and by now is known not to have been
    with reader_of(path) as reader:
        assert reader.savings(START, START + 4 * HOUR) == {
            (START, target_id): (3, law, {"point": 2.5}),
            (START + HOUR, target_id): (1, law, {"point": 1.5}),
            (START + 2 * HOUR, target_id): (1, None, {"status": "insufficient_data"}),
        }
        assert set(reader.savings(START + 1, START + HOUR + 1)) == {(START + HOUR, target_id)}
        assert reader.savings(START + HOUR, START + HOUR) == {}
        assert reader.counts()["saving"] == 5


def test_several_replicas_have_a_saving_each(path: str) -> None:
    target_id = settled(path)
    with reader_of(path) as reader:
        others = [other for other in reader.targets() if other != target_id]
    write(path, 2, [{"target_id": one, "body": {"of": one}} for one in (target_id, *others)])
    with reader_of(path) as reader:
        found = reader.savings(START, START + HOUR)
    assert {key[1]: saving.body for key, saving in found.items()} == {one: {"of": one} for one in (target_id, *others)}


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"calibration_id": 99}, id="a calibration that is not there"),
        pytest.param({"target_id": 99}, id="a replica that is not there"),
    ],
)
def test_a_saving_without_its_grounds_is_refused_with_its_whole_settlement(path: str, wrong: dict[str, int]) -> None:
    target_id = settled(path)
    with pytest.raises(LedgerUnreachable, match="FOREIGN KEY"):
        write(path, 2, [{"target_id": target_id, "body": {}, **wrong}])
    with reader_of(path) as reader:
        assert revisions(reader, START, START + 1) == {START: 1}
        assert reader.savings(0, 2**62) == {}


def test_one_replica_has_one_saving_in_a_settlement(path: str) -> None:
    target_id = settled(path)
    with pytest.raises(LedgerUnreachable, match="UNIQUE"):
        write(path, 2, [{"target_id": target_id, "body": {"point": one}} for one in (1, 2)])
    with reader_of(path) as reader:
        assert revisions(reader, START, START + 1) == {START: 1}


def test_a_settlement_that_is_killed_at_any_statement_is_there_with_its_savings_or_not_at_all(path: str) -> None:
    target_id = settled(path)
    died = []
    for statement in range(20):
        hour_ns = START + (statement + 1) * HOUR
        saving = {"target_id": target_id, "body": {"point": statement}}
        died.append(killed_at(statement, partial(write, path, 1, [saving], hour_ns)))
        with reader_of(path) as reader:
            assert (hour_ns in reader.settled_hours()) is ((hour_ns, target_id) in reader.savings(0, 2**62))
            assert (hour_ns in reader.settled_hours()) is not died[-1]
    assert died[0]
    assert not died[-1]


def test_pruning_leaves_calibrations_and_savings(path: str) -> None:
    target_id = settled(path)
    with reader_of(path) as reader:
        law = reader.add_calibration(LAW, START, "a test")
        write(path, 2, [{"target_id": target_id, "calibration_id": law, "body": {"point": 1.5}}])
        before = reader.calibrations(), reader.savings(0, 2**62)
        assert "engine_interval" in reader.prune(START + 2 * HOUR)
        assert (reader.calibrations(), reader.savings(0, 2**62)) == before
        assert len(before[0]) == len(before[1]) == 1


def audited(path: str) -> list[Finding]:
    with reader_of(path) as reader:
        return audit(reader, RateBook(RATES))


def broken(path: str, *statements: str) -> None:
    """Do to a ledger what its triggers do not allow."""
    with closing(sqlite3.connect(path)) as connection, connection:
        for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            assert connection.execute(statement).rowcount > 0


def saved(path: str) -> int:
    """A settled hour to which two savings were added, under a calibration and under none; the replica's id."""
    target_id = settled(path)
    with reader_of(path) as reader:
        law = reader.add_calibration(LAW, START, "a test")
        other = next(other for other in reader.targets() if other != target_id)
    with closing(sqlite3.connect(path)) as connection, connection:
        rows = [(START, target_id, 1, law, "{}"), (START, other, 1, None, "{}")]
        connection.executemany("INSERT INTO saving VALUES (?, ?, ?, ?, ?)", rows)
    return target_id


def test_savings_with_their_settlement_and_calibration_are_sound(path: str) -> None:
    saved(path)
    assert audited(path) == []


def test_the_audit_finds_a_saving_whose_calibration_is_gone(path: str) -> None:
    saved(path)
    broken(path, "DELETE FROM calibration")
    (finding,) = audited(path)
    assert (finding.kind, finding.severity, finding.target) == ("saving_unfounded", "error", "engine/10.0.0.1:8000/0")
    assert (finding.start_ns, finding.end_ns) == (START, START + HOUR)
    assert "names calibration 1, which is not there" in finding.message


def test_the_audit_finds_savings_whose_settlement_is_not_there(path: str) -> None:
    target_id = saved(path)
    broken(path, f"UPDATE saving SET revision = 2 WHERE target_id = {target_id}")
    (finding,) = audited(path)
    assert (finding.kind, finding.severity, finding.target) == ("saving_unsettled", "error", "engine/10.0.0.1:8000/0")
    assert "a saving belongs to revision 2, which is not there" in finding.message
    broken(path, f"UPDATE saving SET period_start_ns = {START + HOUR}, revision = 1")
    assert [one.kind for one in audited(path)] == ["saving_unsettled", "saving_unsettled"]
