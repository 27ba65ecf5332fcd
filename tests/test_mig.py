from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.collectors.mig import gigabytes_of, part_of, shares, slices_of

PROFILES = ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb", "1c.3g.40gb", "2c.4g.40gb", "nonsense")


@pytest.mark.parametrize(
    ("profile", "gigabytes", "slices", "expected"),
    [
        ("1g.10gb", 79.6, 7, "1/7"),  # a seventh of the compute, an eighth of the memory
        ("1g.20gb", 79.6, 7, "1/4"),  # two eighths of the memory
        ("1g.10gb", 39.6, 7, "1/4"),  # the same words on a GPU of 40 GB
        ("2g.20gb", 79.6, 7, "2/7"),
        ("3g.40gb", 79.6, 7, "1/2"),
        ("4g.40gb", 79.6, 7, "4/7"),
        ("7g.80gb", 79.6, 7, "1"),
        ("1g.18gb", 140.4, 7, "1/7"),  # H200
        ("1g.35gb", 140.4, 7, "1/4"),
        ("1g.6gb", 24.0, 4, "1/4"),  # A30: four slices of either
        ("2g.12gb", 24.0, 4, "1/2"),
        ("3g.40gb", None, 7, "1/2"),  # memory as is usual for the compute
        ("1g.10gb+me", 79.6, 7, "1/7"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 79.6, 7, "1/2"),
        ("1c.3g.40gb", 79.6, 7, "1/6"),  # a third of a half
        ("2c.4g.40gb", 79.6, 7, "2/7"),
    ],
)
def test_an_instance_is_the_greater_of_its_parts_of_compute_and_memory(
    profile: str, gigabytes: float | None, slices: int, expected: str
) -> None:
    assert part_of(profile, gigabytes, slices) == Fraction(expected)


@pytest.mark.parametrize("profile", ["", "1g", "9g.10gb", "g.10gb", "NVIDIA H100 80GB HBM3", "4c.3g.40gb", "7g.10gb5"])
def test_a_profile_that_cannot_be_read_is_no_part(profile: str) -> None:
    assert part_of(profile, 79.6) is None


def test_a_profile_of_more_slices_than_the_gpu_has_is_no_part() -> None:
    assert part_of("7g.24gb", 24.0, 4) is None


def test_parts_that_come_to_more_than_the_gpu_are_scaled() -> None:
    # 1/2 + 4/7 = 15/14
    each, rest = shares([part_of("3g.40gb", 79.6), part_of("4g.40gb", 79.6)])
    assert each == [Fraction(7, 15), Fraction(8, 15)]
    assert rest == 0


def test_what_is_in_no_instance_is_the_rest() -> None:
    each, rest = shares([part_of("1g.10gb", 79.6), part_of("2g.20gb", 79.6)])
    assert (each, rest) == ([Fraction(1, 7), Fraction(2, 7)], Fraction(4, 7))
    assert shares([]) == ([], Fraction(1))
    assert shares([None, Fraction(1, 4)]) == ([None, Fraction(1, 4)], Fraction(3, 4))


@given(st.lists(st.sampled_from(PROFILES), max_size=7), st.sampled_from([None, 39.6, 79.6, 140.4]))
def test_the_shares_of_a_gpu_and_its_rest_are_the_gpu(profiles: list[str], gigabytes: float | None) -> None:
    each, rest = shares([part_of(profile, gigabytes) for profile in profiles])
    known = [share for share in each if share is not None]
    assert sum(known) + rest == 1
    assert all(share > 0 for share in known)
    assert rest >= 0
    assert len(each) - len(known) == profiles.count("nonsense")


@pytest.mark.parametrize(
    ("product", "gigabytes", "slices"),
    [
        ("NVIDIA H100 80GB HBM3", 80, 7),
        ("NVIDIA A100-SXM4-40GB", 40, 7),
        ("NVIDIA H100 NVL", 94, 7),
        ("NVIDIA H200", 141, 7),
        ("NVIDIA H200 NVL", 141, 7),
        ("NVIDIA GH200 480GB", 96, 7),
        ("NVIDIA B200", 180, 7),
        ("NVIDIA A30", None, 4),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", None, 4),
        ("", None, 7),
    ],
)
def test_a_products_name_tells_its_memory_and_slices(product: str, gigabytes: float | None, slices: int) -> None:
    assert (gigabytes_of(product), slices_of(product)) == (gigabytes, slices)
