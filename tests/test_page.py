from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.collectors.base import CollectError
from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.page import Detail, NothingToRead, PageMapper, Pick, Plan, bucket_details, positions
from kvtally.collectors.quantities import index
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from kvtally.collectors.exposition import Series
    from kvtally.collectors.page import Helps

PAGES = Path(__file__).parent / "fixtures" / "pages"
CONSECUTIVE = sorted(PAGES.glob("h100-lmcache-in-process/*.prom"))


class Doors:
    """A source of doors: one target per house, how often each door was opened; counts how often it is compiled."""

    def __init__(self) -> None:
        self.versions: list[str | None] = []

    def wants(self, sample_name: str) -> bool:
        return sample_name == "opened"

    def names(self) -> tuple[str, ...]:
        return ("opened",)

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:  # noqa: ARG002  # doors need no help
        self.versions.append(version)
        return [
            Plan("process", f"{target}/{one.labels['house']}", {"version": str(version)}, [Pick((at,))])
            for at, one in enumerate(series)
        ]


def opened(**counts: float | str) -> bytes:
    return "".join(f'opened{{house="{house}"}} {count}\nclosed 1\n' for house, count in counts.items()).encode()


def read(mapper: PageMapper, page: bytes) -> list[tuple[str, float | None]]:
    return [(reading.name, reading.values[0]) for reading in mapper.read(page)]


def test_a_mapping_is_compiled_once_per_layout() -> None:
    doors = Doors()
    mapper = PageMapper("street", [doors])
    for count in range(5):
        assert read(mapper, opened(a=count, b=2)) == [("street/a", count), ("street/b", 2)]
    assert doors.versions == [None]


def test_a_series_that_appears_or_goes_is_read_at_once() -> None:
    doors = Doors()
    mapper = PageMapper("street", [doors])
    assert read(mapper, opened(a=1)) == [("street/a", 1)]
    assert read(mapper, opened(a=2, b=7)) == [("street/a", 2), ("street/b", 7)]
    assert read(mapper, opened(b=8)) == [("street/b", 8)]
    assert len(doors.versions) == 3


def test_what_is_not_wanted_may_come_and_go_without_compiling() -> None:
    doors = Doors()
    mapper = PageMapper("street", [doors])
    mapper.read(opened(a=1))
    assert read(mapper, b"# HELP windows\nwindows 3\n" + opened(a=2) + b"roofs 1\n") == [("street/a", 2)]
    assert len(doors.versions) == 1


def test_another_version_compiles_again_and_the_same_one_does_not() -> None:
    doors = Doors()
    mapper = PageMapper("street", [doors], "1")
    mapper.read(opened(a=1))
    mapper.version = "1"
    mapper.read(opened(a=1))
    assert doors.versions == ["1"]
    mapper.version = "2"
    (reading,) = mapper.read(opened(a=1))
    assert doors.versions == ["1", "2"]
    assert (mapper.version, reading.attributes) == ("2", {"version": "2"})


def test_a_page_without_any_target_is_an_error_each_time_until_one_comes() -> None:
    mapper = PageMapper("street", [Doors()])
    for _ in range(2):
        with pytest.raises(CollectError, match="street: the page holds no family") as error:
            mapper.read(b"closed 1\n")
        assert "--disable-log-stats" in error.value.hint
    assert read(mapper, opened(a=1)) == [("street/a", 1)]


def test_a_page_that_shows_nothing_is_told_from_one_that_cannot_be_read() -> None:
    with pytest.raises(NothingToRead):
        PageMapper("street", [Doors()]).read(b"closed 1\n")
    with pytest.raises(CollectError) as error:
        PageMapper("street", [Doors()]).read(opened(a=1) + opened(a=1))
    assert not isinstance(error.value, NothingToRead)


def test_two_targets_of_one_name_are_an_error_for_their_counts_would_be_mixed() -> None:
    mapper = PageMapper("street", [Doors(), Doors()])
    for _ in range(2):
        with pytest.raises(CollectError, match="the page shows two targets of the name street/a"):
            mapper.read(opened(a=1))


class Helped(Doors):
    """Doors that keep what the page says of some families."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self._names = names
        self.told: list[str] = []

    def compile(self, target: str, series: Sequence[Series], version: str | None, helps: Helps) -> list[Plan]:
        self.told = [helps(name) for name in self._names]
        return super().compile(target, series, version, helps)


def test_a_mapping_is_told_what_the_page_says_of_a_family_and_nothing_where_it_says_nothing() -> None:
    doors = Helped("opened", "open", "op.ned", "closed", "windows")
    page = (
        b"# HELP opened_twice Not this one.\n# HELP opened How often, in units of \\\\ a door:\\na lot \xc2\xb5.\n"
        b"# TYPE opened counter\n# HELP closed \n#HELP windows No.\n" + opened(a=1)
    )
    PageMapper("street", [doors]).read(page)
    assert doors.told == ["How often, in units of \\\\ a door:\\na lot \u00b5.", "", "", "", ""]


def test_what_a_page_says_is_of_the_page_that_is_compiled() -> None:
    doors = Helped("opened")
    mapper = PageMapper("street", [doors])
    mapper.read(b"# HELP opened Doors.\n" + opened(a=1))
    mapper.read(b"# HELP opened Gates.\n" + opened(a=1, b=1))
    assert doors.told == ["Gates."]


def test_a_page_of_another_program_is_an_error() -> None:
    page = b"# TYPE node_load1 gauge\nnode_load1 0.5\nprocess_start_time_seconds 17\n"
    with pytest.raises(CollectError, match="no family that kvtally reads"):
        PageMapper("host:9100", [VllmMapping(), LmcacheMapping()]).read(page)


def shown(found: list[tuple[str, float | None]]) -> list[tuple[str, float | str | None]]:
    """NaN equals nothing, itself included: its name does."""
    return [(name, "NaN" if value is not None and math.isnan(value) else value) for name, value in found]


@pytest.mark.parametrize("bad", ["NaN", "nan", "+Inf", "-Inf"])
def test_a_value_that_is_no_number_is_unknown_and_leaves_the_others(bad: str) -> None:
    mapper = PageMapper("street", [Doors()])
    assert shown(read(mapper, opened(a=bad, b=2))) == [("street/a", "NaN"), ("street/b", 2)]
    assert read(mapper, opened(a=1, b=2)) == [("street/a", 1), ("street/b", 2)]


def test_opposite_infinities_do_not_hide_each_other() -> None:
    assert shown(read(PageMapper("street", [Doors()]), opened(a="+Inf", b="-Inf", c=0))) == [
        ("street/a", "NaN"),
        ("street/b", "NaN"),
        ("street/c", 0),
    ]


def test_a_gauge_that_is_no_number_is_as_one_that_is_not_there() -> None:
    picks = [None] * index("engine", "running_requests") + [Pick((2,))]
    reading = Plan("engine", "e", {}, picks).read(PAGE, has_unknown=True)
    assert reading.values[-1] is None


def test_finite_values_whose_sum_is_not_are_all_known() -> None:
    assert read(PageMapper("street", [Doors()]), opened(a=1.5e308, b=1.5e308)) == [
        ("street/a", 1.5e308),
        ("street/b", 1.5e308),
    ]


PAGE = (3.0, 5.0, None, 11.0, 0.0, None)  # four values of a page, then zero and unknown


def test_a_plan_sums_or_takes_the_greatest_and_knows_nothing_without_every_part() -> None:
    picks = [Pick((0,)), Pick((0, 1)), Pick((0, 1), greatest=True), Pick((0, 2)), Pick((2, 1), greatest=True), None]
    reading = Plan("engine", "e", {}, picks).read(PAGE)
    assert reading.values == (3, 8, 5, None, None, None)


def test_a_plan_takes_off_scales_and_counts_nothing_as_zero() -> None:
    picks = [
        Pick((3,), less=(0, 1)),
        Pick((0, 3), greatest=True, less=(1,), scale=0.5),
        Pick((1,), scale=1e-3),
        Pick((3,), less=(1, 2)),
        Pick((2,), less=(1,)),
        Pick(()),
        Pick((), greatest=True),
        Pick((), less=(1,)),
    ]
    assert Plan("engine", "e", {}, picks).read(PAGE).values == (3, 3, 0.005, None, None, 0, 0, -5)


NUMBERS = st.one_of(st.none(), st.integers(-(2**40), 2**40).map(float))


@given(
    st.lists(NUMBERS, min_size=1, max_size=8),
    st.lists(st.integers(0, 7), max_size=5),
    st.lists(st.integers(0, 7), max_size=5),
    st.booleans(),
    st.sampled_from([1.0, 1e-3, 512.0, 2.0**20]),
)
def test_a_pick_is_known_by_all_its_parts_and_is_what_they_make(
    numbers: list[float | None], ones: list[int], others: list[int], greatest: bool, scale: float
) -> None:
    own, off = ([at for at in chosen if at < len(numbers)] for chosen in (ones, others))
    page = (*numbers, 0.0, None)
    expected: float | None = None
    if all(numbers[at] is not None for at in own + off):
        expected = 0.0
        for at in own:
            number = numbers[at] or 0.0
            expected = (number if at == own[0] else max(expected, number)) if greatest else expected + number
        for at in off:
            expected -= numbers[at] or 0.0
        expected *= scale
    pick = Pick(tuple(own), greatest, scale, tuple(off))
    assert pick.of(page) == expected
    # the short way of a plan is no other way
    assert Plan("engine", "e", {}, [pick]).read(page).values == (expected,)
    read = Plan("engine", "e", {}, [pick]).read(page, has_unknown=True).values[0]
    assert read is not None
    assert math.isnan(read) if expected is None else read == expected


def test_the_epoch_of_a_plan_is_a_value_of_the_page() -> None:
    assert Plan("engine", "e", {}, [], epoch=3).read(PAGE).epoch == 11
    assert Plan("engine", "e", {}, [], epoch=2).read(PAGE).epoch is None
    assert Plan("engine", "e", {}, []).read(PAGE).epoch is None


def test_details_are_scaled_differences_to_the_bucket_below() -> None:
    details = [Detail("plain", 3), Detail("difference", 3, below=1), Detail("scaled", 1, below=0, scale=0.5)]
    reading = Plan("engine", "e", {}, [], details=details).read(PAGE)
    assert (reading.detail_names, reading.details) == (("plain", "difference", "scaled"), (11, 6, 1))


@pytest.mark.parametrize("unknown", [Detail("bad", 2), Detail("bad", 1, below=2), Detail("bad", 2, below=1)])
def test_one_unknown_detail_makes_all_unknown_and_keeps_their_names(unknown: Detail) -> None:
    reading = Plan("engine", "e", {}, [Pick((0,))], details=[Detail("good", 0), unknown]).read(PAGE)
    assert (reading.values, reading.detail_names, reading.details) == ((3,), ("good", "bad"), ())


def test_positions_are_those_of_a_name_with_at_least_the_labels_asked_for() -> None:
    samples = {"n": [(4, {"a": "1", "b": "2"}), (7, {"a": "1"}), (9, {})], "other": [(1, {"a": "1"})]}
    assert positions(samples, "n") == (4, 7, 9)
    assert positions(samples, "n", {"a": "1"}) == (4, 7)
    assert positions(samples, "n", {"a": "1", "b": "2"}) == (4,)
    assert positions(samples, "n", {"a": "2"}) == ()
    assert positions(samples, "absent") == ()
    assert positions(samples, "n", {"b": ""}) == (7, 9)


def test_positions_are_found_by_a_pattern_that_matches_the_whole_of_a_label() -> None:
    samples = {"n": [(4, {"tier": "l2"}), (7, {"tier": "l20"}), (9, {"tier": "disk"}), (11, {}), (12, {"tier": "l3"})]}
    assert positions(samples, "n", {"tier": re.compile("l[23]|disk")}) == (4, 9, 12)
    assert positions(samples, "n", {"tier": re.compile("l2|")}) == (4, 11)
    assert positions(samples, "n", {"tier": re.compile("l.*"), "role": ""}) == (4, 7, 12)
    assert positions(samples, "n", {"tier": re.compile("l2"), "role": "a"}) == ()


@given(
    st.dictionaries(st.floats(0, 1e12, allow_subnormal=False), st.integers(0, 10**9), max_size=30),
    st.integers(0, 10**9),
    st.randoms(use_true_random=False),
)
def test_plain_bucket_counts_are_sorted_by_bound_and_add_up_whatever_order_the_page_has(
    counts: dict[float, int], beyond: int, chance: random.Random
) -> None:
    plain = [*sorted(counts.items()), (float("inf"), beyond)]
    cumulative = list(itertools.accumulate(count for _, count in plain))
    rows = [
        ({"le": "+Inf" if bound == float("inf") else repr(bound)}, total)
        for (bound, _), total in zip(plain, cumulative, strict=True)
    ]
    chance.shuffle(rows)
    details = bucket_details({"h_bucket": [(at, labels) for at, (labels, _) in enumerate(rows)]}, "h_bucket", "h")
    reading = Plan("engine", "e", {}, [], details=details).read((*(float(total) for _, total in rows), 0.0, None))
    assert list(reading.details) == [count for _, count in plain]
    assert sum(reading.details) == cumulative[-1]
    assert reading.detail_names[-1] == "h_le_inf"


@pytest.mark.parametrize(
    ("bound", "name"),
    [
        ("1.0", "h_le_1"),
        ("+Inf", "h_le_inf"),
        ("0.3", "h_le_0.3"),
        ("1048576.0", "h_le_1048576"),
        ("2e+06", "h_le_2000000"),
    ],
)
def test_a_bucket_is_named_by_its_bound(bound: str, name: str) -> None:
    assert bucket_details({"h": [(0, {"le": bound})]}, "h", "h") == [Detail(name, 0)]


def test_bounds_that_differ_in_the_seventh_digit_have_names_of_their_own() -> None:
    samples = {"h": [(0, {"le": "1000001.0"}), (1, {"le": "1000002.0"})]}
    assert [detail.name for detail in bucket_details(samples, "h", "h")] == ["h_le_1000001", "h_le_1000002"]


@pytest.mark.parametrize(
    "labels", [{}, {"le": ""}, {"le": "ten"}, {"le": "NaN"}, {"le": "8"}], ids=["none", "empty", "word", "nan", "twice"]
)
def test_a_histogram_whose_bounds_cannot_be_told_apart_has_no_details(labels: dict[str, str]) -> None:
    assert bucket_details({"h": [(0, {"le": "8.0"}), (1, labels), (2, {"le": "+Inf"})]}, "h", "h") == []


def test_consecutive_recorded_pages_are_each_read_as_a_fresh_mapper_reads_them() -> None:
    mapper = PageMapper("host:8000", [VllmMapping(), LmcacheMapping()], "0.25.1")
    assert len(CONSECUTIVE) == 3
    for path in CONSECUTIVE:
        fresh = PageMapper("host:8000", [VllmMapping(), LmcacheMapping()], "0.25.1")
        assert mapper.read(path.read_bytes()) == fresh.read(path.read_bytes())


def test_the_series_of_a_page_are_a_set_that_knows_neither_order_nor_values() -> None:
    mapper = PageMapper("street", [Doors()])
    assert mapper.series(opened(a=1, b=2)) == mapper.series(b'opened{house="b"} 7\nopened{house="a"} NaN\n')
    assert mapper.series(opened(a=1)) == {("opened", (("house", "a"),))}
    assert mapper.series(opened(a=1)) != mapper.series(opened(b=1))
    assert mapper.series(b"") == frozenset()


def test_looking_at_the_series_of_a_page_leaves_the_readings_alone() -> None:
    doors = Doors()
    mapper = PageMapper("street", [doors])
    mapper.read(opened(a=1))
    mapper.series(opened(b=1, c=2))
    assert read(mapper, opened(a=2)) == [("street/a", 2)]
    assert len(doors.versions) == 1


def test_the_64_engines_of_a_page_are_told_apart_at_once_and_read_in_order() -> None:
    engine = (PAGES / "h100-v025-lmcache" / "1795409582483.prom").read_text()
    lines = [line for line in engine.splitlines() if line.startswith("vllm:")]
    page = "\n".join(line.replace('engine="0"', f'engine="{index}"') for index in range(64) for line in lines) + "\n"
    page = re.sub(r'(vllm:prompt_tokens_total\{engine="(\d+)".*\}) .*', r"\1 \2", page)
    readings = PageMapper("host:8000", [VllmMapping(), LmcacheMapping()]).read(page.encode())
    assert {reading.name: reading.values[0] for reading in readings} == {f"host:8000/{n}": n for n in range(64)}
