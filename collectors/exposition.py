"""Reads Prometheus text pages: a full, label-correct parse when the layout changes, verified places in between."""

from __future__ import annotations

import codecs
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# A page, as vLLM serves it (the timestamp and the exemplar that end the last two lines are allowed and unused):
#
#   # HELP vllm:prompt_tokens_total Number of prefill tokens processed.
#   # TYPE vllm:prompt_tokens_total counter
#   vllm:prompt_tokens_total{engine="0",model_name="llama-8b"} 2.666868e+06
#   gpfs_fs_bytes_read{gpfs_fs_name="fs1"} 17 1795409428000
#   foo_bucket{le="1.0"} 17 # {trace_id="a b"} 0.67

_MAX_LINES = 100_000  # 64 engines on one page have about 42,000
_MAX_WANTED_BYTES = 4 * 2**20  # of all wanted lines together: bounds what labels can cost
_MAX_LABELS = 250  # of one series; vLLM's longest have about 40
_MAX_NAMES = 10_000
_SAMPLE_CHARACTERS = 60
_PIECE_BYTES = 64 * 1024

# A line's beginning: "#", or a name with the separator that ends it. It alone decides whether a line is wanted.
_BEGINNING = re.compile(rb"[ \t]*(?:#|([a-zA-Z_:][a-zA-Z0-9_:]{0,255})(?:[ \t]*\{|[ \t]))")
_LABEL = re.compile(
    rb'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"([^"\\]*+(?:\\.[^"\\]*+)*+)"[ \t]*(?:,|(?=\}))',
)
_CLOSING_BRACE = re.compile(rb"[ \t]*\}")
_ESCAPE = re.compile(r'\\([\\n"])')


class Series(NamedTuple):
    """One series: its sample name ("vllm:prompt_tokens_total") and its labels, unescaped."""

    name: str
    labels: Mapping[str, str]


class Layout(NamedTuple):
    """The wanted series of a page, in page order."""

    series: tuple[Series, ...]


class _Places(NamedTuple):
    """Where the wanted series of the last full parse stood, and what every line of that page began with."""

    beginnings: list[bytes]
    blanks: tuple[int, ...]
    keys: tuple[tuple[int, int], ...]  # line index, length of the key


class PageReader:
    """Reads the samples whose name is wanted from the pages of one endpoint; raises CollectError for a bad page.

    Lines of unwanted series are read as far as their name, which must be there. NaN and infinities are returned
    as they are. A page without wanted series gives an empty layout.

    As long as the wanted series are the same in the same order, `read` returns the very same Layout object.

    The short way is exact. It is taken only if the page has as many lines as the page parsed last, each line begins
    with the same bytes (a wanted one with its whole key, an unwanted one with its name and separator, a comment with
    "#", a blank one is blank), all of it is UTF-8, and each value is read by the rule of the full parse. The full
    parse decides from these very bytes which lines are wanted and what their keys are, so it would find the same.
    """

    def __init__(
        self,
        wanted: Callable[[str], bool],
        *,
        max_bytes: int = 16 * 2**20,
        max_series: int = 20_000,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_series = max_series
        self._is_wanted = lru_cache(maxsize=_MAX_NAMES)(lambda name: wanted(name.decode("ascii")))
        self._layout = Layout(())
        self._places: _Places | None = None

    def read(self, body: bytes) -> tuple[Layout, tuple[float, ...]]:
        """Return the layout and one value per series of it; CollectError says what is wrong with the page."""
        if len(body) > self._max_bytes:
            raise CollectError(f"the page has {len(body)} bytes, the limit is {self._max_bytes}")
        if not body.isascii():
            _check_utf8(body)
        values = None if self._places is None else _values_at(self._places, body)
        if values is None:
            values = self._parse(body)
        return self._layout, values

    def _parse(self, body: bytes) -> tuple[float, ...]:
        """Read every line, and remember the layout and the places for the pages to come."""
        lines = body.split(b"\n", _MAX_LINES)
        if len(lines) > _MAX_LINES:
            raise CollectError(f"the page has more than {_MAX_LINES} lines")
        beginnings: list[bytes] = []
        blanks: list[int] = []
        wanted_lines: list[tuple[int, re.Match[bytes]]] = []
        shared: dict[bytes, bytes] = {}
        first_sample: tuple[int, re.Match[bytes]] | None = None
        for index, line in enumerate(lines):
            beginning = _BEGINNING.match(line)
            if beginning is None:
                if line.strip():
                    raise _unreadable(index, line, first=len(blanks) == index)
                blanks.append(index)
                beginnings.append(b"")
                continue
            beginnings.append(shared.setdefault(beginning[0], beginning[0]))
            if beginning[1] is None:
                continue
            first_sample = first_sample or (index, beginning)
            if self._is_wanted(beginning[1]):
                wanted_lines.append((index, beginning))
                if len(wanted_lines) > self._max_series:
                    raise CollectError(f"the page has more than {self._max_series} wanted series")
        if first_sample and not wanted_lines:
            # "Not Found" looks like a series named Not: one whole sample tells a metrics page from prose.
            _read_samples([first_sample], first=True)
            return self._remember((), None, ())
        series, keys, values = _read_samples(wanted_lines)
        for (index, _), key in zip(wanted_lines, keys, strict=True):
            beginnings[index] = key
        places = tuple((index, len(beginnings[index])) for index, _ in wanted_lines)
        return self._remember(series, _Places(beginnings, tuple(blanks), places), values)

    def _remember(
        self,
        series: tuple[Series, ...],
        places: _Places | None,
        values: tuple[float, ...],
    ) -> tuple[float, ...]:
        if series != self._layout.series:
            self._layout = Layout(series)
        self._places = places
        return values


def _values_at(places: _Places, body: bytes) -> tuple[float, ...] | None:
    """Read the values at the known places, or None where anything is not exactly as it was."""
    beginnings = places.beginnings
    lines = body.split(b"\n", len(beginnings))
    if len(lines) != len(beginnings) or not all(map(bytes.startswith, lines, beginnings)):
        return None
    for index in places.blanks:
        if lines[index].strip():
            return None
    rests = [lines[index][length:] for index, length in places.keys]
    try:
        if b"_" not in b"".join(rests):  # float() reads 1_0 as 10, an exposition page does not
            return tuple(map(float, rests))
    except ValueError:
        pass
    try:
        return tuple(map(_value, rests))  # timestamps and exemplars
    except ValueError:
        return None


def _read_samples(
    wanted_lines: list[tuple[int, re.Match[bytes]]],
    *,
    first: bool = False,
) -> tuple[tuple[Series, ...], list[bytes], tuple[float, ...]]:
    """Series, raw keys and values of the wanted lines; CollectError for a duplicate or an unreadable one."""
    if sum(len(beginning.string) for _, beginning in wanted_lines) > _MAX_WANTED_BYTES:
        raise CollectError(f"the wanted series take more than {_MAX_WANTED_BYTES} bytes of the page")
    series: list[Series] = []
    keys: list[bytes] = []
    values: list[float] = []
    seen: set[tuple[str, tuple[tuple[str, str], ...]]] = set()
    for index, beginning in wanted_lines:
        one, key, value = _read_sample(index, beginning, first=first)
        identity = (one.name, tuple(sorted(one.labels.items())))
        if identity in seen:
            raise CollectError(f"duplicate series {_shown(key)} in line {index + 1}: the page cannot be trusted")
        seen.add(identity)
        series.append(one)
        keys.append(key)
        values.append(value)
    return tuple(series), keys, tuple(values)


def _read_sample(index: int, beginning: re.Match[bytes], *, first: bool) -> tuple[Series, bytes, float]:
    """Series, raw key and value of one line; CollectError names the line."""
    line = beginning.string
    labels: dict[str, str] = {}
    try:
        position = beginning.end()
        if beginning[0].endswith(b"{"):
            position = _read_labels(line, position, labels)
        return Series(beginning[1].decode("ascii"), labels), line[:position], _value(line[position:])
    except ValueError:
        raise _unreadable(index, line, first=first) from None


def _read_labels(line: bytes, position: int, labels: dict[str, str]) -> int:
    """Fill `labels` from the text behind the brace and return where it closes; ValueError if it is malformed."""
    while (closing := _CLOSING_BRACE.match(line, position)) is None:
        label = _LABEL.match(line, position)
        if label is None or len(labels) == _MAX_LABELS:
            raise ValueError
        name, value = label[1].decode("ascii"), label[2].decode("utf-8")
        if name in labels:
            raise ValueError
        labels[name] = _ESCAPE.sub(_unescape, value) if "\\" in value else value
        position = label.end()
    return closing.end()


def _unescape(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else escape[1]


def _value(rest: bytes) -> float:
    """Read what follows a key: a value, then perhaps a timestamp, then perhaps an exemplar; else ValueError."""
    value, *others = rest.split(None, 2) or (b"",)
    if others and not others[0].startswith(b"#"):
        _number(others.pop(0))
    if others and not others[0].startswith(b"#"):
        raise ValueError
    return _number(value)


def _number(token: bytes) -> float:
    if b"_" in token:
        raise ValueError
    return float(token)


def _check_utf8(body: bytes) -> None:
    """Raise CollectError unless the page is UTF-8; in pieces, since a text takes up to four bytes a character."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), _PIECE_BYTES):
            decoder.decode(body[start : start + _PIECE_BYTES])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise CollectError(f"invalid UTF-8 in the page: byte 0x{wrong:02x}") from None


def _unreadable(index: int, line: bytes, *, first: bool) -> CollectError:
    if first:
        return CollectError(
            f"not a metrics page: it begins with {_shown(line)}",
            "check the path of the URL: vLLM and LMCache serve their metrics at /metrics",
        )
    return CollectError(f"line {index + 1} is not a sample: {_shown(line)}")


def _shown(raw: bytes) -> str:
    """Quote the beginning of a foreign text, safe for terminals and logs."""
    return ascii(raw[: 4 * _SAMPLE_CHARACTERS].decode("utf-8", "replace")[:_SAMPLE_CHARACTERS])
