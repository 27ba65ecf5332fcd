from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.identity import Check, Identity, check, version_of
from kvtally.collectors.quantities import ENGINE, index

SOURCES = ("prompt_tokens", "computed_tokens", "hbm_tokens", "external_tokens")
UNCHECKED = Check(Identity.UNCHECKED)
OK = Check(Identity.OK)


def checked(version: str | None, counts: tuple[int | None, ...], **details: int | None) -> Check:
    """Check prompt, computed, hbm and external tokens; a detail of None makes all details unknown."""
    values: list[int | None] = [None] * len(ENGINE)
    for name, count in zip(SOURCES, counts, strict=True):
        values[index("engine", name)] = count
    known = [one for one in details.values() if one is not None]
    return check(version, values, tuple(details), known if len(known) == len(details) else None)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.25.1", (0, 25)),
        ("v0.17.0+cpu", (0, 17)),
        ("0.9", (0, 9)),
        ("1.0.0rc1", (1, 0)),
        ("0.11.1.dev3+g0123", (0, 11)),
        ("0.8.5.post1", (0, 8)),
        ("0.1.dev1+g0123abc", None),  # built from a checkout without tags
        ("dev", None),
        ("7", None),
        ("", None),
        (None, None),
    ],
)
def test_a_version_is_its_first_two_numbers(text: str | None, version: tuple[int, int] | None) -> None:
    assert version_of(text) == version


@pytest.mark.parametrize("version", ["0.20.0", "0.25.1", "0.33.0", "1.0"])
def test_since_020_tokens_by_source_add_up_to_prompt_tokens(version: str) -> None:
    assert checked(version, (100, 40, 50, 10), cached_tokens=60) == OK
    assert checked(version, (0, 0, 0, 0)) == OK


def test_a_breach_names_the_numbers() -> None:
    found = checked("0.25.1", (100, 40, 50, 9))
    assert found.state is Identity.BROKEN
    assert found.message.startswith("prompt tokens by source do not add up: 40 + 50 + 9 = 99, not 100; ")


def test_reused_tokens_that_differ_from_the_engines_own_total_are_a_breach_that_names_the_numbers() -> None:
    found = checked("0.25.1", (100, 40, 50, 10), cached_tokens=59)
    assert found == Check(Identity.BROKEN, "reused tokens by source are 60, the engine's own total says 59")


# By hand, vLLM 0.17: three prompts of 64, 32 and 16 tokens. The first is computed whole; the second and third are
# wholly in the cache, so that the last token of each is computed again and shown once more, under local_cache_hit.
# prompt = 112; cached_total = 46 (31 + 15); computed = 112 - 46 = 66; local_cache_hit = 46 + 2; recomputed = 2
@pytest.mark.parametrize("version", ["0.17.0", None])
def test_an_engine_of_017_adds_up_once_the_recomputed_tokens_are_off_its_hits(version: str | None) -> None:
    assert checked(version, (112, 66, 48 - 2, 0), cached_tokens=46, recomputed_tokens=2) == OK


@pytest.mark.parametrize("version", ["0.17.0", None])
def test_an_engine_of_017_that_counts_a_token_twice_beyond_those_is_wrong(version: str | None) -> None:
    found = checked(version, (112, 66, 47, 0), cached_tokens=46, recomputed_tokens=2)
    assert found.state is Identity.BROKEN
    assert "66 + 47 + 0 = 113, not 112" in found.message


def test_an_engine_of_017_whose_reused_tokens_are_not_its_total_is_wrong() -> None:
    found = checked("0.17.0", (112, 66, 46, 0), cached_tokens=48, recomputed_tokens=2)
    assert found == Check(Identity.BROKEN, "reused tokens by source are 46, the engine's own total says 48")


def test_where_nobody_tells_the_version_the_families_that_are_there_must_add_up() -> None:
    assert checked(None, (112, 66, 46, 0)) == OK
    assert checked(None, (112, 66, 48, 0)).state is Identity.BROKEN


def test_a_build_that_calls_itself_0_1_dev_is_checked_as_one_without_a_version() -> None:
    assert checked("0.1.dev1+g0123abc", (112, 66, 46, 0)) == OK


@pytest.mark.parametrize("version", ["0.15.0", "0.16.0", "0.19.1"])
def test_an_engine_before_020_that_shows_no_recomputed_tokens_is_unchecked(version: str) -> None:
    assert checked(version, (112, 66, 48, 0)) == UNCHECKED


def test_unknown_details_of_a_clean_engine_leave_the_sum_to_check() -> None:
    assert checked("0.25.1", (100, 40, 50, 10), cached_tokens=None) == OK
    assert checked("0.25.1", (100, 40, 50, 9), cached_tokens=None).state is Identity.BROKEN


@pytest.mark.parametrize("missing", range(4))
@pytest.mark.parametrize("version", ["0.12.0", "0.25.1", None])
def test_an_engine_that_does_not_tell_tokens_by_source_is_unchecked(version: str | None, missing: int) -> None:
    counts: list[int | None] = [100, 40, 50, 10]
    counts[missing] = None
    assert checked(version, tuple(counts)) == UNCHECKED


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.integers(-3, 3), st.integers(-3, 3))
def test_any_token_too_many_or_too_few_is_a_breach(
    computed: int, hbm: int, external: int, wrong: int, cached_wrong: int
) -> None:
    prompt = computed + hbm + external + wrong
    found = checked("0.25.1", (prompt, computed, hbm, external), cached_tokens=hbm + external + cached_wrong)
    assert (found.state is Identity.OK) == (wrong == cached_wrong == 0)
    assert bool(found.message) == (found.state is Identity.BROKEN)
