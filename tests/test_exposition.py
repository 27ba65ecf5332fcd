from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from kvtally.collectors.base import CollectError
from kvtally.collectors.exposition import Layout, PageReader, Series

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from prometheus_client import Metric

PAGES = Path(__file__).parent / "fixtures" / "pages"
CONSECUTIVE = sorted(PAGES.glob("h100-lmcache-in-process/*.prom"))

# name, sorted labels, value: a value as text, so that NaN equals NaN
Samples = list[tuple[str, tuple[tuple[str, str], ...], str]]


def everything(_name: str) -> bool:
    return True


def engine_counters(name: str) -> bool:
    return name.startswith("vllm:") and not name.endswith(("_bucket", "_created"))


def samples(layout: Layout, values: tuple[float, ...]) -> Samples:
    return [
        (one.name, tuple(sorted(one.labels.items())), repr(value))
        for one, value in zip(layout.series, values, strict=True)
    ]


def official(families: Iterable[Metric], wanted: Callable[[str], bool] = everything) -> Samples:
    return [
        (sample.name, tuple(sorted(sample.labels.items())), repr(float(sample.value)))
        for family in families
        for sample in family.samples
        if wanted(sample.name)
    ]


def read(page: bytes, wanted: Callable[[str], bool] = everything) -> Samples:
    return samples(*PageReader(wanted).read(page))


def one_value(line: bytes) -> float:
    _, (value,) = PageReader(everything).read(line)
    return value


@pytest.mark.parametrize("path", sorted(PAGES.glob("*/*.prom")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_sample_of_a_real_page_is_read_as_the_official_parser_reads_it(path: Path) -> None:
    expected = official(parse_text(path.read_text()))
    assert len(expected) == sum(not line.startswith("#") for line in path.read_text().splitlines())
    assert sorted(read(path.read_bytes())) == sorted(expected)


def test_an_openmetrics_page_with_exemplars_is_read_as_the_official_parser_reads_it() -> None:
    page = PAGES / "openmetrics" / "prometheus-client-0.26.om"
    families = parse_openmetrics(page.read_text())  # type: ignore[no-untyped-call]  # it has no types
    expected = official(families)
    assert len(expected) == 10
    reader = PageReader(everything)
    assert sorted(samples(*reader.read(page.read_bytes()))) == sorted(expected)
    places = reader._places
    assert sorted(samples(*reader.read(page.read_bytes()))) == sorted(expected)
    assert reader._places is places


def test_only_wanted_series_are_returned_in_page_order() -> None:
    page = b'b 2\na{x="2"} 22\nc 3\na{x="1"} 21\n'
    layout, values = PageReader({"a", "b"}.__contains__).read(page)
    assert layout.series == (Series("b", {}), Series("a", {"x": "2"}), Series("a", {"x": "1"}))
    assert values == (2.0, 22.0, 21.0)


def test_consecutive_real_pages_share_one_layout_and_are_not_parsed_again() -> None:
    reader = PageReader(engine_counters)
    layout, first = reader.read(CONSECUTIVE[0].read_bytes())
    places = reader._places
    for path in CONSECUTIVE[1:]:
        next_layout, values = reader.read(path.read_bytes())
        assert next_layout is layout
        assert reader._places is places
        assert values != first
        assert sorted(samples(layout, values)) == sorted(official(parse_text(path.read_text()), engine_counters))


def test_the_predicate_is_asked_once_for_a_name() -> None:
    asked: list[str] = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return name == "a"

    reader = PageReader(wanted)
    reader.read(b'a{x="1"} 1\na{x="2"} 1\nb 1\n')
    reader.read(b'b 1\na{x="3"} 1\nb{x="2"} 1\n')
    assert asked == ["a", "b"]


KNOWN = b'# HELP a of a\n# TYPE a gauge\na{x="1"} 1\nu{x="1"} 5\na{x="2"} 2\nab 3\n'


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        pytest.param(KNOWN + b'a{x="3"} 4\n', ["a1=1", "a2=2", "ab=3", "a3=4"], id="a wanted series came at the end"),
        pytest.param(KNOWN.replace(b"u{", b"a{").replace(b'"1"} 5', b'"9"} 5'), ["a1=1", "a9=5", "a2=2", "ab=3"],
                     id="a wanted series took the line of an unwanted one"),
        pytest.param(KNOWN.replace(b"# HELP a of a", b"ab{} 7"), None, id="a duplicate took the line of a comment"),
        pytest.param(KNOWN.replace(b"# HELP a of a", b'a{x="7"} 7'), ["a7=7", "a1=1", "a2=2", "ab=3"],
                     id="a wanted series took that of a comment"),
        pytest.param(KNOWN.replace(b'a{x="2"} 2\n', b""), ["a1=1", "ab=3"], id="a wanted series went"),
        pytest.param(KNOWN.replace(b'a{x="2"} 2', b'u{x="2"} 2'), ["a1=1", "ab=3"], id="one became unwanted"),
        pytest.param(KNOWN.replace(b'"1"} 1', b'"?"} 1').replace(b'"2"', b'"1"').replace(b"?", b"2"),
                     ["a2=1", "a1=2", "ab=3"], id="two swapped their places"),
        pytest.param(KNOWN.replace(b"ab 3", b"abc 3"), ["a1=1", "a2=2", "abc=3"], id="the old name begins the new one"),
        pytest.param(KNOWN.replace(b"ab 3", b"ab1 3"), ["a1=1", "a2=2", "ab1=3"], id="a digit came to a name"),
        pytest.param(KNOWN.replace(b"ab 3", b'ab {x="3"} 3'), ["a1=1", "a2=2", "ab3=3"], id="labels after a space"),
        pytest.param(KNOWN.replace(b"u{", b"uab{"), ["a1=1", "a2=2", "ab=3"], id="an unwanted name grew"),
        pytest.param(KNOWN.replace(b"u{", b"ua{").replace(b"ua", b"a"), None, id="duplicate in the line of another"),
        pytest.param(KNOWN.removesuffix(b"\n") + b"4", ["a1=1", "a2=2", "ab=34"], id="the last line has no end"),
        pytest.param(KNOWN + b"ab 3", None, id="a duplicate in the last line"),
        pytest.param(KNOWN.replace(b"\n", b"\r\n"), ["a1=1", "a2=2", "ab=3"], id="line ends changed"),
    ],
)  # fmt: skip
def test_a_page_that_differs_from_the_one_before_is_read_as_if_it_were_the_first(
    page: bytes, expected: list[str] | None
) -> None:
    """A series named u is unwanted; the notation a1=1 stands for a{x="1"} 1."""
    reader = PageReader(lambda name: name.startswith("a"))
    reader.read(KNOWN)
    if expected is None:
        with pytest.raises(CollectError, match="duplicate series"):
            reader.read(page)
    else:
        layout, values = reader.read(page)
        found = [
            f"{one.name}{''.join(one.labels.values())}={value:g}"
            for one, value in zip(layout.series, values, strict=True)
        ]
        assert found == expected
    layout, values = reader.read(KNOWN)
    assert values == (1.0, 2.0, 3.0)
    assert [one.labels.get("x") for one in layout.series] == ["1", "2", None]


def test_a_wanted_name_that_an_unwanted_one_begins_is_found_in_its_place() -> None:
    reader = PageReader({"ub", "c"}.__contains__)
    assert reader.read(b"u 1\nu{} 1\nc 2\n")[1] == (2.0,)
    assert reader.read(b"ub 1\nu{} 1\nc 2\n")[1] == (1.0, 2.0)
    assert reader.read(b"u 1\nub{} 1\nc 2\n")[1] == (1.0, 2.0)


def test_a_value_on_a_known_page_is_read_as_strictly_as_on_a_new_one() -> None:
    reader = PageReader(everything)
    reader.read(b"a 1\nb 2\n")
    for wrong in (b"1_0", b"one", b"", b"1 2 3", b"0x1"):
        with pytest.raises(CollectError, match="line 2 is not a sample"):
            reader.read(b"a 1\nb " + wrong + b"\n")


def test_a_page_with_blank_lines_and_other_line_ends_is_not_parsed_again() -> None:
    reader = PageReader(everything)
    reader.read(b"a 1\r\n\r\n \r\nb 2\r\n")
    places = reader._places
    assert reader.read(b"a 3\r\n\r\n\r\nb 4\r\n")[1] == (3.0, 4.0)
    assert reader._places is places


def test_the_layout_stays_while_only_unwanted_series_come_and_go() -> None:
    reader = PageReader({"a"}.__contains__)
    layout, _ = reader.read(b"a 1\nu 1\n")
    again, values = reader.read(b"v 1\n# comment\na 2\nu 1\n")
    assert again is layout
    assert values == (2.0,)


def test_the_layout_stays_while_timestamps_come_and_go() -> None:
    reader = PageReader({"a"}.__contains__)
    layout, _ = reader.read(b"a 1\n")
    places = reader._places
    again, values = reader.read(b"a 2 1795409428000\n")
    assert again is layout
    assert reader._places is places
    assert values == (2.0,)


def test_a_bad_page_does_not_spoil_the_pages_after_it() -> None:
    reader = PageReader({"a"}.__contains__)
    layout, _ = reader.read(b"a 1\n")
    with pytest.raises(CollectError, match=r"^line 1 is not a sample: 'a x'$"):
        reader.read(b"a x\n")
    again, values = reader.read(b"a 3\n")
    assert again is layout
    assert values == (3.0,)


@pytest.mark.parametrize(
    ("line", "labels"),
    [
        (rb'a{x="back\\slash \"quote\" new\nline"} 1', {"x": 'back\\slash "quote" new\nline'}),
        (rb'a{x="\\n"} 1', {"x": "\\n"}),
        (rb'a{x="\t"} 1', {"x": "\\t"}),
        (b'a{x="1,2}3#4 5=6{7"} 1', {"x": "1,2}3#4 5=6{7"}),
        (b'a{x="} 9 # {"} 1', {"x": "} 9 # {"}),
        (b'a{x=""} 1', {"x": ""}),
        (b"a{} 1", {}),
        (b'a{x="1",} 1', {"x": "1"}),
        (b'a{ x = "1" , y="2" } 1', {"x": "1", "y": "2"}),
        (b'a {x="1"} 1', {"x": "1"}),
        (b' \ta{x="1"} 1', {"x": "1"}),
        (b'a{x="1"}1', {"x": "1"}),
        ('a{x="Größe 東京 🚀"} 1'.encode(), {"x": "Größe 東京 🚀"}),
    ],
)
def test_labels_are_unescaped_and_delimited_by_quotes_alone(line: bytes, labels: dict[str, str]) -> None:
    for page in (line, line + b"\n", line + b"\r\n"):
        layout, values = PageReader(everything).read(page)
        assert layout.series == (Series("a", labels),)
        assert values == (1.0,)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"a 1", 1.0),
        (b"a\t 1 ", 1.0),
        (b"a -0.5", -0.5),
        (b"a 2.666868e+06", 2666868.0),
        (b"a 1E-3", 0.001),
        (b"a +Inf", math.inf),
        (b"a -Inf", -math.inf),
        (b"a 9007199254740993", 9007199254740992.0),
        (b"a 17 1795409428000", 17.0),
        (b"a 17 -1", 17.0),
        (b'a 17 # {trace_id="a_b # 3"} 0.67 1600000000.5', 17.0),
        (b"a 17 1600000000.5 # {} 3", 17.0),
    ],
)
def test_a_value_is_what_follows_the_key_without_timestamp_and_exemplar(line: bytes, value: float) -> None:
    assert one_value(line) == value


def test_not_a_number_is_returned_as_it_is() -> None:
    assert math.isnan(one_value(b"a NaN"))


@pytest.mark.parametrize(
    "line",
    [
        b"a",
        b"a ",
        b"a{",
        b"a{}",
        b'a{x="1"',
        b'a{x="1} 1',
        b'a{x="1\\"} 1',
        b"a{x=1} 1",
        b'a{="1"} 1',
        b'a{1x="1"} 1',
        b'a{x="1" y="2"} 1',
        b'a{,x="1"} 1',
        b'a{x="1",,y="2"} 1',
        b'a{x="1",x="2"} 1',
        b'a{x="1"} ',
        b"a 1_000",
        b"a one",
        b"a 1 now",
        b"a 1 1_000",
        b"a 1 2 3",
        b"a 1# {} 1",
        b"1a 1",
        b"a-b 1",
        b"<p>",
        b"\x00",
        b"a" * 257 + b" 1",
    ],
)
def test_a_line_that_is_no_sample_is_named_with_its_number(line: bytes) -> None:
    with pytest.raises(CollectError, match=r"^line 3 is not a sample: "):
        PageReader(everything).read(b"# a comment\nok 1\n" + line + b"\nok2 1\n")


def test_a_bad_line_is_shown_short_and_harmless() -> None:
    with pytest.raises(CollectError) as caught:
        PageReader(everything).read(b"ok 1\n\x1b[31m" + b"\xc3\xa9" * 5000)
    assert str(caught.value) == "line 2 is not a sample: '\\x1b[31m" + "\\xe9" * 55 + "'"


def test_of_an_unwanted_line_only_the_name_is_read() -> None:
    _, values = PageReader({"a"}.__contains__).read(b'u{x="1 oops\na 1\n')
    assert values == (1.0,)
    with pytest.raises(CollectError, match="not a metrics page: it begins with 'u-v 1'"):
        PageReader({"a"}.__contains__).read(b"u-v 1\na 1\n")


@pytest.mark.parametrize(
    ("page", "beginning"),
    [
        (b"<!DOCTYPE html>\n<html><body>metrics</body></html>", "'<!DOCTYPE html>'"),
        (b'\n\n{"status": "ok"}', '\'{"status": "ok"}\''),
        (b"Not Found", "'Not Found'"),
        (b"Service is starting, please wait", "'Service is starting, please wait'"),
        (b"404", "'404'"),
    ],
)
def test_what_is_no_metrics_page_is_called_so_with_a_hint(page: bytes, beginning: str) -> None:
    with pytest.raises(CollectError) as caught:
        PageReader({"a"}.__contains__).read(page)
    assert str(caught.value) == f"not a metrics page: it begins with {beginning}"
    assert "/metrics" in caught.value.hint


@pytest.mark.parametrize("page", [b"", b"\n", b"# EOF\n", b"# HELP u text\nu 1\n", b'u{x="a"} 1 # {} 1\n'])
def test_a_page_without_wanted_series_gives_an_empty_layout(page: bytes) -> None:
    reader = PageReader({"a"}.__contains__)
    layout, values = reader.read(page)
    assert layout.series == ()
    assert values == ()
    assert reader.read(page)[0] is layout
    assert reader.read(page + b"\na 1\n")[1] == (1.0,)


@pytest.mark.parametrize("page", [b'a{x="1",y="2"} 1\na{y="2",x="1"} 1\n', b"a 1\na 2\n", b"a 1\na{} 2\n"])
def test_a_duplicate_series_is_named(page: bytes) -> None:
    with pytest.raises(CollectError, match=r"^duplicate series 'a.*' in line 2: the page cannot be trusted$"):
        PageReader(everything).read(page)
    assert PageReader({"b"}.__contains__).read(page)[1] == ()


@pytest.mark.parametrize("place", ["comment", "label", "unwanted"])
def test_bytes_that_are_not_utf_8_are_refused_on_a_new_and_on_a_known_page(place: str) -> None:
    def page(text: bytes) -> bytes:
        texts = {"comment": b"", "label": b"", "unwanted": b""} | {place: text}
        return b'# %(comment)s\na{x="%(label)s"} 1\nu{x="%(unwanted)s"} 1\n' % {
            key.encode(): value for key, value in texts.items()
        }

    fresh, reader = PageReader({"a"}.__contains__), PageReader({"a"}.__contains__)
    reader.read(page("é".encode()))
    for one in (fresh, reader):
        for wrong in (b"\xff", b"\xc3", b"\xed\xa0\x80"):
            with pytest.raises(CollectError, match="invalid UTF-8 in the page: byte 0x"):
                one.read(page(wrong))


def test_utf_8_is_checked_across_the_pieces_of_a_long_page() -> None:
    page = b"# " + "é".encode() * 200_000 + b"\na 1\n"
    assert one_value(page) == 1.0
    assert one_value(b"#" + page[1:]) == 1.0
    assert one_value(b"##" + page[1:]) == 1.0
    with pytest.raises(CollectError, match="invalid UTF-8"):
        one_value(page + b"# \xc3")


def test_a_page_beyond_the_limits_is_refused() -> None:
    reader = PageReader(everything, max_bytes=40, max_series=3)
    assert reader.read(b"a 1\nb 1\nc 1\n")[1] == (1.0, 1.0, 1.0)
    with pytest.raises(CollectError, match="more than 3 wanted series"):
        reader.read(b"a 1\nb 1\nc 1\nd 1\n")
    with pytest.raises(CollectError, match="the page has 41 bytes, the limit is 40"):
        reader.read(b"#" * 41)


def endless_labels() -> bytes:
    return b"a{" + b"".join(b'l%d="",' % number for number in range(300_000)) + b"} 1\n"


def many_long_series() -> bytes:
    labels = b"".join(b'l%d="%d",' % (number, number) for number in range(249))
    return b"".join(b'a{x="%d",%s} 1\n' % (number, labels) for number in range(2_000))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: b"".join(b'a{x="%d"} 1\n' % number for number in range(2_000_000)), "more than 100000 lines"),
        (lambda: b"u 1\n" * 4_000_000, "more than 100000 lines"),
        (lambda: b"\n" * 16_000_000, "more than 100000 lines"),
        (lambda: b'a{x="' + b"y" * 5 * 2**20 + b'"} 1\n', "more than 4194304 bytes"),
        (lambda: b'a{x="' + b"\\n" * 3 * 2**20 + b'"} 1\n', "more than 4194304 bytes"),
        (lambda: b'a{x="' + b"\\n" * 1024 * 1024 + b'" 1\n', "line 1 is not a sample"),
        (endless_labels, "line 1 is not a sample"),
        (many_long_series, "more than 4194304 bytes"),
    ],
)
def test_a_page_made_to_exhaust_memory_is_refused_in_little_memory(make: Callable[[], bytes], reason: str) -> None:
    page = make()
    tracemalloc.start()
    try:
        with pytest.raises(CollectError, match=reason):
            PageReader(lambda name: name == "a", max_bytes=64 * 2**20).read(page)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(page) + 16 * 2**20


NAMES = ("a", "a1", "ab", "b:c", "u", "u1", "ua")  # of two where one begins the other, either may be the wanted one
WANTED = frozenset({"a", "a1", "ua", "b:c"})


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


blank = st.sampled_from(["", " ", "  ", "\t"])
space = st.sampled_from([" ", "  ", "\t"])
label_value = st.text(alphabet='1a,}{#\\"\n =é', max_size=3).map(escaped)
value = st.sampled_from(["0", "1", "2.5", "1e+06", "-3.5e-3", "+Inf", "-Inf", "NaN", "12345678901234567890"])


@st.composite
def label_sets(draw: st.DrawFn) -> str:
    names = draw(st.lists(st.sampled_from(["x", "y", "le"]), max_size=2, unique=True))
    labels = ",".join(f'{draw(blank)}{name}="{draw(label_value)}"{draw(blank)}' for name in names)
    return "{" + labels + (draw(st.sampled_from(["", ","])) if names else "") + "}"


@st.composite
def sample_lines(draw: st.DrawFn) -> str:
    name, number = draw(st.sampled_from(NAMES)), draw(value)
    key = draw(st.one_of(st.just(name + draw(space)), label_sets().map(name.__add__)))
    timestamp = draw(st.sampled_from(["", "", "", " 1795409428000"]))
    return f"{draw(blank)}{key}{draw(st.sampled_from([' ', '  ']))}{number}{timestamp}"


comments = st.sampled_from(["# HELP a text", "# TYPE a gauge", "# TYPE u histogram", "#", "# é", "", " "])
page_lines = st.lists(st.one_of(sample_lines(), sample_lines(), comments), max_size=8)


@st.composite
def mutated(draw: st.DrawFn, lines: list[str]) -> list[str]:
    """The same page a second later, or one that differs in whichever way a page can."""
    result = list(lines)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        what = draw(st.sampled_from(["value", "replace", "insert", "delete", "swap", "rename", "grow", "copy", "edit"]))
        if what == "insert" or not result:
            result.insert(at, draw(st.one_of(sample_lines(), comments)))
        elif what == "value":
            result[at] = " ".join([*result[at].split(" ")[:-1], draw(st.one_of(value, st.just("1_0")))])
        elif what == "replace":
            result[at] = draw(st.one_of(sample_lines(), comments))
        elif what == "delete":
            del result[at]
        elif what == "swap":
            other = draw(st.integers(0, len(result) - 1))
            result[at], result[other] = result[other], result[at]
        elif what == "rename":
            result[at] = draw(st.sampled_from(NAMES)) + result[at].lstrip("".join(NAMES))
        elif what == "grow":
            cut = draw(st.integers(0, len(result[at])))
            result[at] = (
                result[at][:cut] + draw(st.sampled_from(["b", "1", " ", "_", '"', "}", "\\"])) + result[at][cut:]
            )
        elif what == "copy":
            result[at] = draw(st.sampled_from(result))
        else:
            cut = draw(st.integers(0, len(result[at])))
            result[at] = result[at][:cut] + result[at][cut + 1 :]
    return result


def outcome(reader: PageReader, page: bytes) -> Samples | str:
    try:
        return samples(*reader.read(page))
    except CollectError as error:
        return str(error)


def as_page(lines: list[str], line_end: str, last_end: str) -> bytes:
    return (line_end.join(lines) + last_end).encode()


@settings(max_examples=300, deadline=None)
@given(lines=page_lines, line_end=st.sampled_from(["\n", "\r\n"]), last_end=st.sampled_from(["", "\n"]))
def test_any_well_formed_page_is_read_as_the_official_parser_reads_it(
    lines: list[str], line_end: str, last_end: str
) -> None:
    page = as_page(lines, line_end, last_end)
    expected = official(parse_text(page.decode()), WANTED.__contains__)
    if len({one[:2] for one in expected}) < len(expected):
        with pytest.raises(CollectError, match="duplicate series"):
            read(page, WANTED.__contains__)
    else:
        assert sorted(read(page, WANTED.__contains__)) == sorted(expected)


@settings(max_examples=600, deadline=None)
@given(data=st.data(), lines=page_lines)
def test_a_reader_with_a_memory_reads_any_sequence_of_pages_as_a_new_reader_does(
    data: st.DataObject, lines: list[str]
) -> None:
    """Good pages, bad pages, near misses: values, series and errors are the same; equal series are one layout."""
    reader = PageReader(WANTED.__contains__)
    before: Layout | None = None
    for _ in range(3):
        page = as_page(lines, "\n", "\n")
        expected = outcome(PageReader(WANTED.__contains__), page)
        assert outcome(reader, page) == expected
        if not isinstance(expected, str):
            layout, _ = reader.read(page)
            assert before is None or (layout is before) == (layout.series == before.series)
            before = layout
        lines = data.draw(mutated(lines))


@settings(max_examples=300, deadline=None)
@given(
    page=st.one_of(
        st.binary(max_size=60),
        st.text(alphabet='au{}x="\\ ,#1_\n\r\té', max_size=40).map(str.encode),
    )
)
def test_no_bytes_make_the_reader_raise_anything_but_a_collect_error(page: bytes) -> None:
    reader = PageReader(WANTED.__contains__)
    assert outcome(reader, page) == outcome(reader, page)
