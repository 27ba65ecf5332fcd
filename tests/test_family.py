from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.collectors.base import CollectError
from kvtally.collectors.family import Family, TableMapping, release, sample_names, unit_told
from kvtally.collectors.page import NothingToRead, PageMapper
from kvtally.collectors.quantities import QUANTITIES, index

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.collectors.base import Reading

START = "process_start_time_seconds"


def table(*families: Family, **options: Any) -> TableMapping:
    return TableMapping("cache", families, **{"source": "a store", **options})


def read(mapping: TableMapping, page: str) -> tuple[Reading, ...]:
    return PageMapper("host:9", (mapping,)).read(page.encode())


def value(mapping: TableMapping, page: str, quantity: str = "loaded_tokens") -> float | None:
    (reading,) = read(mapping, page)
    return reading.values[index("cache", quantity)]


def named(readings: Sequence[Reading], quantity: str = "loaded_tokens") -> dict[str, float | None]:
    return {reading.name: reading.values[index("cache", quantity)] for reading in readings}


RENAMED = (
    Family("loaded_tokens", "loaded_tokens_total"),
    Family("loaded_tokens", "loaded_total"),
    Family("loads", "loads_total"),
)


@pytest.mark.parametrize(
    ("page", "loaded"),
    [
        ("loaded_tokens_total 5\n", 5),
        ("loaded_total 7\nloads_total 1\n", 7),
        # both names of one count: they are never added up, in whatever order the page has them
        ("loaded_total 7\nloaded_tokens_total 5\n", 5),
        ("loads_total 1\n", None),
    ],
)
def test_of_several_rows_the_first_that_the_page_shows_serves(page: str, loaded: float | None) -> None:
    assert value(table(*RENAMED), page) == loaded


def test_what_no_row_serves_is_unknown_and_never_zero() -> None:
    (reading,) = read(table(*RENAMED), "loaded_total 7\n")
    assert [count for count in reading.values if count is not None] == [7]
    assert len(reading.values) == len(QUANTITIES["cache"])


TIERS = (
    Family("dram_hit_tokens", "hits_total", {"tier": re.compile("l1|l1_.*")}),
    Family("disk_hit_tokens", "hits_total", {"tier": "l2", "kind": "disk"}),
    Family("lookup_hit_tokens", "hits_total"),
)


def test_labels_choose_the_series_by_their_whole_value() -> None:
    page = (
        'hits_total{tier="l1"} 1\n'
        'hits_total{tier="l1_pinned"} 2\n'
        'hits_total{tier="l10"} 4\n'
        'hits_total{tier="l2",kind="disk",node="a"} 8\n'
        'hits_total{tier="l2",kind="disk",node="b"} 16\n'
        'hits_total{tier="l2"} 32\n'
        'hits_total{tier="l2",kind="disks"} 64\n'
    )
    assert value(table(*TIERS), page, "dram_hit_tokens") == 3
    assert value(table(*TIERS), page, "disk_hit_tokens") == 24
    assert value(table(*TIERS), page, "lookup_hit_tokens") == 127


def test_a_row_none_of_whose_series_has_the_labels_gives_way_to_the_next() -> None:
    rows = (Family("loaded_tokens", "moved", {"way": "in"}), Family("loaded_tokens", "read_total"))
    assert value(table(*rows), 'moved{way="out"} 5\nread_total 6\n') == 6
    assert value(table(*rows), 'moved{way="in"} 5\nread_total 6\n') == 5


def test_the_scale_leads_from_the_unit_of_the_page_to_that_of_a_reading() -> None:
    rows = (
        Family("load_bytes", "loaded_kib", unit="KiB", scale=1024),
        Family("load_ns", "load_ms", unit="milliseconds", scale=1e-3),
        Family("waits_ms", "wait_seconds_sum", unit="seconds", scale=1e3),
    )
    (reading,) = read(table(*rows), "loaded_kib 3\nload_ms 2500\nwait_seconds_sum 0.25\n")
    assert reading.values[index("cache", "load_bytes")] == 3072
    assert reading.values[index("cache", "load_ns")] == 2.5
    assert (reading.detail_names, reading.details) == (("waits_ms",), (250,))


WORKERS = "".join(f'count{{worker="{worker}"}} {count}\n' for worker, count in enumerate((256, 768, 512)))


def test_several_series_add_up_unless_they_tell_the_same() -> None:
    assert value(table(Family("loaded_tokens", "count")), WORKERS) == 1536
    assert value(table(Family("loaded_tokens", "count", greatest=True)), WORKERS) == 768


def test_of_ranks_that_repeat_each_other_one_is_read_and_parts_beside_them_add_up() -> None:
    row = Family("loaded_tokens", "count", repeated=("rank",))
    page = (
        'count{rank="10",node="a"} 7\n'
        'count{rank="2",node="a"} 6\n'
        'count{rank="0",node="b"} 100\n'
        'count{rank="1",node="b"} 90\n'
    )
    # rank 2 of the one and rank 0 of the other
    assert value(table(row), page) == 106
    assert value(table(row), 'count{rank="3"} 9\n') == 9


LESS = (
    Family("loaded_tokens", "all_total", less=(("hbm_total", {}), ("failed_total", {"why": "lost"}))),
    Family("loaded_tokens", "fallback_total"),
)


@pytest.mark.parametrize(
    ("page", "loaded"),
    [
        ("all_total 100\nhbm_total 30\n", 70),
        ('all_total 100\nhbm_total 30\nfailed_total{why="lost"} 4\nfailed_total{why="late"} 9\n', 66),
        ('all_total{a="1"} 100\nall_total{a="2"} 5\nhbm_total{a="1"} 30\nhbm_total{a="2"} 3\n', 72),
        # nobody can say what has to be taken off
        ("all_total 100\n", None),
        ("all_total 100\nfallback_total 8\n", 8),
        ("hbm_total 30\nfallback_total 8\n", 8),
    ],
)
def test_a_row_with_something_to_take_off_serves_only_where_that_is_there(page: str, loaded: float | None) -> None:
    assert value(table(*LESS), f"{page}", "loaded_tokens") == loaded


def test_what_is_taken_off_is_scaled_too() -> None:
    row = Family("load_bytes", "blocks_total", less=(("lost_total", {}),), scale=4096)
    assert value(table(row), "blocks_total 10\nlost_total 4\n", "load_bytes") == 6 * 4096


def test_further_parts_are_added_where_they_are_there() -> None:
    row = Family("loaded_tokens", "one_total", plus=(("two_total", {"a": "1"}), ("three_total", {})))
    assert value(table(row), "one_total 1\n") == 1
    assert value(table(row), 'one_total 1\ntwo_total{a="1"} 2\ntwo_total{a="2"} 4\nthree_total 8\n') == 11


def test_a_series_that_comes_with_its_first_count_is_zero_before_it() -> None:
    born = Family("loaded_tokens", "one_total", plus=(("two_total", {}),), scale=10, zero_beside="looked_up_total")
    other = Family("loads", "loads_total")
    assert value(table(born, other), "looked_up_total 5\n") == 0
    assert value(table(born, other), "looked_up_total 5\none_total 3\n") == 30
    # a further part may be born before the first one: what it counted is not to come later, all at once
    assert value(table(born, other), "looked_up_total 5\ntwo_total 4\n") == 40
    assert value(table(born, other), "looked_up_total 5\ntwo_total 4\none_total 3\n") == 70
    assert value(table(born, other), "loads_total 1\n") is None


def test_nothing_is_taken_off_a_series_that_is_not_there() -> None:
    row = Family("loaded_tokens", "all_total", less=(("lost_total", {}),), zero_beside="looked_up_total")
    assert value(table(row), "looked_up_total 5\n") == 0
    assert value(table(row), "looked_up_total 5\nlost_total 2\n") is None
    assert value(table(row), "looked_up_total 5\nlost_total 2\nall_total 3\n") == 1


BY_MODEL = (Family("loaded_tokens", "loaded_total"), Family("used_bytes", "used", unit="bytes"))
TWO_MODELS = (
    'loaded_total{model="b",host="x"} 2\nloaded_total{model="a",host="x"} 1\nloaded_total{model="a",host="y"} 4\n'
)


def test_targets_are_told_apart_by_labels_and_one_alone_bears_the_name_of_the_page() -> None:
    mapping = table(*BY_MODEL, by=("model",), suffix="/store")
    assert named(read(mapping, TWO_MODELS)) == {"host:9/store/a": 5, "host:9/store/b": 2}
    assert named(read(mapping, 'loaded_total{model="b"} 2\n')) == {"host:9/store": 2}
    assert named(read(table(*BY_MODEL, suffix="/store"), TWO_MODELS)) == {"host:9/store": 7}


def test_a_keyed_target_keeps_its_name_whatever_others_come() -> None:
    mapping = table(*BY_MODEL, by=("model",), suffix="/store", keyed=True)
    assert named(read(mapping, TWO_MODELS)) == {"host:9/store/a": 5, "host:9/store/b": 2}
    assert named(read(mapping, 'loaded_total{model="b"} 2\n')) == {"host:9/store/b": 2}
    assert named(read(mapping, "loaded_total 2\n")) == {"host:9/store": 2}


def test_a_series_without_the_labels_belongs_to_the_only_target_that_it_can_mean() -> None:
    mapping = table(*BY_MODEL, by=("model",))
    shared = "used 4096\nloaded_total 8\n"
    (only,) = read(mapping, f'{shared}loaded_total{{model="b"}} 2\n')
    assert (only.name, only.values[index("cache", "used_bytes")]) == ("host:9", 4096)
    assert only.values[index("cache", "loaded_tokens")] == 10
    both = read(mapping, TWO_MODELS + shared)
    assert named(both, "used_bytes") == {"host:9/a": None, "host:9/b": None}
    assert named(both) == {"host:9/a": 5, "host:9/b": 2}
    assert named(read(mapping, shared)) == {"host:9": 8}


def test_targets_of_several_labels_have_all_of_them_in_their_names() -> None:
    mapping = table(*BY_MODEL, by=("model", "pool"))
    page = 'loaded_total{model="a",pool="x"} 1\nloaded_total{model="a",pool="y"} 2\n'
    assert named(read(mapping, page)) == {"host:9/a/x": 1, "host:9/a/y": 2}


@pytest.mark.parametrize(("first", "second"), [(("a/b", "c"), ("a", "b/c")), (("a", ""), ("", "a"))])
def test_targets_whose_names_fall_together_are_an_error_and_never_mixed(
    first: tuple[str, str], second: tuple[str, str]
) -> None:
    page = "".join(f'loaded_total{{model="{model}",pool="{pool}"}} 1\n' for model, pool in (first, second))
    with pytest.raises(CollectError, match="two targets of the name host:9/"):
        read(table(*BY_MODEL, by=("model", "pool")), page)


def test_more_targets_than_a_ledger_should_take_are_an_error_and_none_is_left_out() -> None:
    mapping = table(*BY_MODEL, by=("model",))
    lines = [f'loaded_total{{model="{number}"}} {number}\n' for number in range(513)]
    assert len(read(mapping, "".join(lines[:512]))) == 512
    with pytest.raises(CollectError, match="the page shows 513 targets of one source, the limit is 512"):
        read(mapping, "".join(lines))


def test_attributes_are_those_of_the_source_and_what_the_labels_tell() -> None:
    mapping = table(
        *BY_MODEL,
        by=("model",),
        tells={"model": ("served", "model"), "host": ("node", "host"), "zone": ("zone",)},
        attributes={"cache": "a store's"},
    )
    page = (
        'loaded_total{model="models/a",served="a",host="x"} 1\n'
        'loaded_total{model="b",zone=""} 2\n'
        'used{model="b",served="",node="n7"} 3\n'
    )
    assert {reading.name: reading.attributes for reading in read(mapping, page)} == {
        "host:9/models/a": {"source": "a store", "cache": "a store's", "model": "a", "host": "x"},
        "host:9/b": {"source": "a store", "cache": "a store's", "model": "b", "host": "n7"},
    }


@pytest.mark.parametrize("bad", ["NaN", "+Inf"])
@pytest.mark.parametrize(
    "row",
    [
        Family("loaded_tokens", "count"),
        Family("loaded_tokens", "count", greatest=True),
        Family("loaded_tokens", "count", scale=16),
        Family("loaded_tokens", "count", {"worker": "0"}, plus=(("count", {"worker": "1"}),)),
        Family("loaded_tokens", "count", {"worker": "0"}, less=(("count", {"worker": "1"}),)),
        Family("loaded_tokens", "count", {"worker": "1"}, less=(("count", {"worker": "0"}),)),
    ],
)
def test_one_part_that_is_no_number_makes_its_quantity_unknown_and_no_other(row: Family, bad: str) -> None:
    page = f'count{{worker="0"}} 3\ncount{{worker="1"}} {bad}\nloads_total 4\n'
    mapping = table(row, Family("loads", "loads_total"))
    found = value(mapping, page)
    assert found is not None
    assert math.isnan(found)
    assert value(mapping, page, "loads") == 4


def test_a_gauge_that_is_no_number_is_as_one_that_is_not_there() -> None:
    assert value(table(*BY_MODEL), "loaded_total 1\nused NaN\n", "used_bytes") is None


DETAILS = (
    Family("loaded_tokens", "loaded_total"),
    Family("rare", "rare_new_total"),
    Family("rare", "rare_total", scale=2),
    Family("parts", "parts_total"),
    Family("rest", "all_total", less=(("some_total", {}),)),
    Family("rests", "all_total", less=(("some_total", {}), ("more_total", {}))),
)


def test_what_is_no_quantity_of_the_kind_is_a_detail() -> None:
    (reading,) = read(table(*DETAILS), "loaded_total 1\nrare_total 4\nall_total 10\nsome_total 3\n")
    told = dict(zip(reading.detail_names, reading.details, strict=True))
    assert told == {"rare": 8, "rest": 7, "rests": 7}


def test_a_detail_that_would_have_to_be_added_up_is_left_out() -> None:
    page = 'loaded_total 1\nparts_total{a="1"} 1\nparts_total{a="2"} 1\nall_total 10\nsome_total 3\nmore_total 1\n'
    (reading,) = read(table(*DETAILS), page)
    # "rest" takes one series off another; "rests" would take off two
    assert dict(zip(reading.detail_names, reading.details, strict=True)) == {"rest": 7}


def test_what_is_asked_for_is_every_sample_of_the_table_once_and_the_start_of_the_process() -> None:
    families = (*LESS, *RENAMED, Family("loads", "one", plus=(("two", {}),), zero_beside="three"))
    expected = {"all_total", "hbm_total", "failed_total", "fallback_total", "loaded_tokens_total", "loaded_total"}
    expected |= {"loads_total", "one", "two", "three"}
    assert sorted(sample_names(families)) == sorted(expected)
    mapping = table(*families)
    assert sorted(mapping.names()) == sorted({*expected, START})
    assert all(mapping.wants(name) for name in mapping.names())
    assert not mapping.wants("")
    assert not mapping.wants("loaded")


def test_the_start_of_the_process_is_the_epoch_of_every_target() -> None:
    readings = read(table(*BY_MODEL, by=("model",)), f"{TWO_MODELS}{START} 1.7954e9\n")
    assert [reading.epoch for reading in readings] == [1_795_400_000] * 2
    assert [reading.epoch for reading in read(table(*BY_MODEL), TWO_MODELS)] == [None]


def test_a_page_with_a_start_of_the_process_alone_shows_no_target() -> None:
    with pytest.raises(NothingToRead):
        read(table(*BY_MODEL), f"{START} 1.7954e9\n")


def test_names_may_be_spelled_in_another_way_on_the_page() -> None:
    rows = (Family("loaded_tokens", "store:loaded_total"), Family("loads", "store:loads_total"))
    mapping = table(*rows, spelled=lambda name: name.replace("store_", "store:", 1))
    for page in ("store_loaded_total 5\nstore_loads_total 2\n", "store:loaded_total 5\nstore:loads_total 2\n"):
        assert (value(mapping, page), value(mapping, page, "loads")) == (5, 2)
    assert mapping.wants("store_loads_total")
    assert not mapping.wants("shop_loads_total")


@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("0.25.1", (0, 25)),
        ("v0.17.0+cpu", (0, 17)),
        ("1.2rc1", (1, 2)),
        ("0.9", (0, 9)),
        ("0.10", (0, 10)),
        ("", None),
        (None, None),
        ("main", None),
        ("7", None),
    ],
)
def test_a_release_is_the_first_two_numbers_of_a_version(version: str | None, told: tuple[int, int] | None) -> None:
    assert release(version) == told


SAME_NAME = (
    Family("prefix_hit_tokens", "hits_total", since="0.9", until="0.11"),
    Family("prefix_hit_tokens", "hits_total", since="0.7", until="0.8", unit="blocks"),
)


@pytest.mark.parametrize(
    ("version", "text", "unit"),
    [
        ("0.8.5", "Hits, in tokens.", "blocks"),  # the version goes before the text
        ("0.9.0", "", "tokens"),
        ("0.11.2", "", "tokens"),
        ("0.10.0", "", "tokens"),
        (None, "Hits, in terms of number of cached blocks.", "blocks"),
        (None, "Number of tokens.", "tokens"),
        ("0.12.0", "Number of tokens.", "tokens"),
        ("0.6.0", "Whatever.", None),
        (None, "Tokens in blocks, of so many tokens each.", None),
        (None, "", None),
    ],
)
def test_the_unit_of_a_name_that_has_had_two_is_known_by_the_version_or_the_help_text_or_not_at_all(
    version: str | None, text: str, unit: str | None
) -> None:
    assert unit_told(SAME_NAME, release(version), text) == unit


SAMPLES = ("one", "two", "three")
PAIRS = st.tuples(st.sampled_from(SAMPLES), st.dictionaries(st.just("a"), st.sampled_from(["x", "y"]), max_size=1))
ROWS = st.builds(
    lambda own, greatest, scale, plus, less: Family(
        "loaded_tokens", own[0], own[1], greatest=greatest, scale=scale, plus=tuple(plus), less=tuple(less)
    ),
    PAIRS,
    st.booleans(),
    st.sampled_from([1.0, 0.5, 4096.0]),
    st.lists(PAIRS, max_size=1),
    st.lists(PAIRS, max_size=2),
)
PAGES = st.dictionaries(
    st.tuples(st.sampled_from(SAMPLES), st.sampled_from(["", "x", "y"]), st.sampled_from(["0", "1"])),
    st.one_of(st.integers(0, 2**40), st.none()),
    min_size=1,
    max_size=12,
)


@given(st.lists(ROWS, min_size=1, max_size=3), PAGES)
def test_any_table_reads_of_any_page_what_the_rows_say(
    rows: list[Family], page: dict[tuple[str, str, str], int | None]
) -> None:
    def of(sample: str, labels: Any) -> list[int | None]:
        return [count for (name, a, _), count in page.items() if name == sample and labels.get("a", a) == a]

    expected: float | None = None
    for row in rows:
        own, off = of(row.sample, row.labels), [count for one in row.less for count in of(*one)]
        if own and (off or not row.less):
            own += [count for one in row.plus for count in of(*one)]
            known = [count for count in own if count is not None]
            less = [count for count in off if count is not None]
            expected = math.nan
            if len(known) + len(less) == len(own) + len(off):
                expected = ((max(known) if row.greatest else sum(known)) - sum(less)) * row.scale
            break
    text = "".join(
        f'{name}{{a="{a}",worker="{worker}"}} {"NaN" if count is None else count}\n'
        for (name, a, worker), count in page.items()
    )
    found = value(table(*rows, Family("loads", "always")), f"always 1\n{text}")
    assert found == expected or (found is not None and expected is not None and math.isnan(found + expected))
