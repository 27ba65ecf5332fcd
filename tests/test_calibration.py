from __future__ import annotations

import json
from typing import Any

import pytest
from tests.replica_rows import EVIDENCE, FINGERPRINT, THETA, calibration

from kvtally.agent.calibration import PARAMETERS, CalibrationEvidence, Fingerprint, calibration_of


def body() -> dict[str, Any]:
    """What JSON leaves of a calibration."""
    found: dict[str, Any] = json.loads(json.dumps(calibration().as_json()))
    return found


def test_a_calibration_comes_back_from_json_as_it_was() -> None:
    told = calibration(rung="M3", sd=0.2, clock=0.87)._replace(
        evidence=EVIDENCE._replace(worked_ratio=None, single_error=None, notes=("a", "b")), prior="7"
    )
    back = calibration_of(json.loads(json.dumps(told.as_json())))
    assert back == told
    assert back.evidence.notes == ("a", "b")


def test_its_number_is_the_ledgers_and_not_in_its_json() -> None:
    assert "id" not in calibration(number=7).as_json()
    assert calibration_of(body(), 7).id == 7
    assert calibration_of(body()).id is None


def test_medians_are_kept_by_name() -> None:
    assert body()["medians"] == dict(zip(PARAMETERS, THETA, strict=True))
    shuffled = body()
    shuffled["medians"] = dict(reversed(shuffled["medians"].items()))
    assert calibration_of(shuffled).medians == THETA


@pytest.mark.parametrize("name", [*PARAMETERS[:2], "request_seconds"])
def test_a_body_without_a_parameter_is_no_calibration(name: str) -> None:
    wrong = body()
    del wrong["medians"][name]
    with pytest.raises(KeyError):
        calibration_of(wrong)


@pytest.mark.parametrize("key", ["fingerprint", "rung", "medians", "covariance", "clock", "evidence", "prior"])
def test_a_body_that_lacks_a_part_is_no_calibration(key: str) -> None:
    wrong = body()
    del wrong[key]
    with pytest.raises(KeyError):
        calibration_of(wrong)


@pytest.mark.parametrize("key", ["fingerprint", "evidence"])
def test_a_body_with_a_part_that_nobody_knows_is_no_calibration(key: str) -> None:
    wrong = body()
    wrong[key]["colour"] = "green"
    with pytest.raises(TypeError):
        calibration_of(wrong)


def test_a_covariance_of_another_size_is_no_calibration() -> None:
    short = body()
    short["covariance"].pop()
    with pytest.raises(ValueError, match="9 x 9"):
        calibration_of(short)
    narrow = body()
    narrow["covariance"][3].pop()
    with pytest.raises(ValueError, match="9 x 9"):
        calibration_of(narrow)


def test_a_value_that_is_no_number_is_no_calibration() -> None:
    for key, value in (("clock", "fast"), ("clock_weight_seconds", None)):
        with pytest.raises((TypeError, ValueError)):
            calibration_of(body() | {key: value})


def test_numbers_that_json_made_whole_are_read_as_floats() -> None:
    whole = body() | {"clock": 1, "clock_weight_seconds": 30}
    found = calibration_of(whole)
    assert isinstance(found.clock, float)
    assert isinstance(found.clock_weight_seconds, float)
    assert all(isinstance(value, float) for row in found.covariance for value in row)


def test_a_fingerprint_tells_people_what_it_holds_for() -> None:
    where = "1 x NVIDIA H100 80GB HBM3, vLLM 0.25.1"
    assert FINGERPRINT.text() == f"llama-8b (LlamaForCausalLM, bfloat16, KV bfloat16) on {where}, 1000 tokens a step"
    sized = FINGERPRINT._replace(sizes="32x4096-9d0e2f", is_eager=True)
    assert sized.text() == (
        "llama-8b (LlamaForCausalLM 32x4096-9d0e2f, bfloat16, KV bfloat16) on 1 x NVIDIA H100 80GB HBM3, vLLM 0.25.1, "
        "1000 tokens a step, eager"
    )
    bare = FINGERPRINT._replace(gpus=0, sku="", version="")
    assert bare.text() == "llama-8b (LlamaForCausalLM, bfloat16, KV bfloat16) on CPU, vLLM ?, 1000 tokens a step"


def test_whatever_a_law_depends_on_tells_two_fingerprints_apart() -> None:
    others = Fingerprint(
        "other", "MistralForCausalLM", "float16", "fp8", "NVIDIA H200", 2, "0.26.0", 2048, "1x2-3", is_eager=True
    )
    texts = {FINGERPRINT._replace(**{name: getattr(others, name)}).text() for name in Fingerprint._fields}
    assert len(texts) == len(Fingerprint._fields)
    assert FINGERPRINT.text() not in texts


def test_a_law_of_before_sizes_were_told_is_that_of_the_only_kind_it_can_be_of() -> None:
    small, big = FINGERPRINT._replace(sizes="28x3072-a"), FINGERPRINT._replace(sizes="40x5120-b", is_eager=True)
    elsewhere = small._replace(gpus=2)
    assert FINGERPRINT.completed({big, elsewhere, None}) == big
    assert (
        FINGERPRINT.completed({small, elsewhere, FINGERPRINT}) == small
    )  # one whose formulas are not known has no law
    # learned from both, as one: it is neither's
    assert FINGERPRINT.completed({small, big}) == FINGERPRINT
    assert FINGERPRINT.completed({elsewhere}) == FINGERPRINT
    assert small.completed({big}) == small


def test_a_body_of_before_sizes_were_told_is_a_calibration() -> None:
    old = body()
    del old["fingerprint"]["sizes"], old["fingerprint"]["is_eager"]
    assert calibration_of(old).fingerprint == FINGERPRINT


def test_evidence_has_no_notes_unless_told() -> None:
    assert EVIDENCE.notes == ()
    assert CalibrationEvidence._field_defaults == {"notes": ()}
