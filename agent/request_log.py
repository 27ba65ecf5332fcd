"""Reads a per-request log, JSON lines or CSV: what each prompt took, what of it was cached, time to first token."""

from __future__ import annotations

import csv
import math
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, NamedTuple

import msgspec

from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

# One line a request, as clients and gateways write it (the second and the third are those of recordings):
#
#   time,prompt_tokens,cached_tokens,ttft_ms
#   2026-11-23T04:46:46Z,3000,2048,88.1
#   {"t_start": 1795409206.96, "t_first": 1795409207.08, "usage": {"prompt_tokens": 3000,
#       "prompt_tokens_details": {"cached_tokens": 0}}, "error": null}
#   {"t_send_ms": 1795411552675, "ttft_s": 0.385, "prompt_tokens": 1024,
#       "cached_tokens": 0, "status": 200}

REQUESTS_MAX = 1_000_000
LINE_BYTES_MAX = 1 << 20  # a line may hold the prompt's text, too
_BAD_SHARE_MAX = 0.01
_BAD_MAX = int(REQUESTS_MAX * _BAD_SHARE_MAX)
_TOKENS_MAX = 100_000_000
_TTFT_SECONDS_MAX = 86_400
_EARLIEST, _LATEST = 1e9, 1e10  # 2001 to 2286: an instant lies there in one unit only, a relative time in none
_UNIX_UNITS = (1.0, 1e3, 1e6, 1e9)
_UNITS = {"": None, "_s": 1.0, "_seconds": 1.0, "_ms": 1e3, "_us": 1e6, "_ns": 1e9}
_UNKNOWN = frozenset({"", "null", "none"})  # as a cell of a CSV file
_FAILED = frozenset((*range(400, 600), *map(str, range(400, 600))))

Form = Literal["auto", "jsonl", "csv"]


class RequestLogError(CollectError):
    """The log cannot be used; `hint` says what to do about it."""


class Request(NamedTuple):
    """One request that gave its first token.

    at_seconds        unix time at which it was sent
    prompt_tokens     length of the prompt, cached part included
    cached_tokens     what of it was reused from any tier; None unknown, as all below
    ttft_seconds      time to first token as its client saw it, queueing included
    outer_tokens      what of the cached tokens came from outside HBM
    generated_tokens  output tokens
    """

    at_seconds: float
    prompt_tokens: int
    cached_tokens: int | None = None
    ttft_seconds: float | None = None
    outer_tokens: int | None = None
    generated_tokens: int | None = None


class Parsed(NamedTuple):
    """A log's requests by time, and what of its lines is not among them.

    lines      lines that hold something, a CSV file's header not counted
    outside    requests sent before `since_seconds`, or at `until_seconds` or later
    skipped    requests that failed or were aborted before their first token
    bad        lines that cannot be read, and
    first_bad  the number of the first of them with the reason, "" without one
    """

    requests: tuple[Request, ...]
    lines: int
    outside: int
    skipped: int
    bad: int
    first_bad: str


class _Bad(ValueError):  # noqa: N818  # it ends a line, not the reading
    """What is wrong with one line; never quotes a value, which may be a prompt."""


class _Column(NamedTuple):
    """A quantity as a log calls it; `per_second` is the unit of a time, None where the name does not tell."""

    path: tuple[str, ...]
    per_second: float | None = None


_NOWHERE = _Column(())


def _times(*names: str) -> tuple[_Column, ...]:
    return tuple(_Column((name + suffix,), unit) for name in names for suffix, unit in _UNITS.items())


def _values(*names: str) -> tuple[_Column, ...]:
    return tuple(_Column(tuple(name.split("."))) for name in names)


# what each quantity may be called, best first
_KNOWN: Mapping[str, tuple[_Column, ...]] = {
    "sent": _times("t_send", "t_start", "at", "sent_at", "start_time", "timestamp", "time", "t"),
    "first": _times("t_first", "first_token_at", "first_token_time"),
    "ttft": _times("ttft", "time_to_first_token"),
    "prompt": _values(
        *("usage.prompt_tokens", "prompt_tokens", "input_tokens", "sent_prompt_tokens", "prompt_tokens_sent"),
        *("prompt", "n"),  # last: they may as well be the prompt's text, and how many answers were asked for
    ),
    "cached": _values(
        *("usage.prompt_tokens_details.cached_tokens", "prompt_tokens_details.cached_tokens"),
        *("cached_tokens", "cached_prompt_tokens", "cached"),
    ),
    "outer": _values("outer_tokens", "external_tokens"),
    "generated": _values(
        *("usage.completion_tokens", "completion_tokens", "generated_tokens", "output_tokens", "generated"),
    ),
    "status": _values("status", "status_code", "http_status"),
    "error": _values("error"),
}


def read_requests(
    lines: Iterable[str | bytes],
    form: Form = "auto",
    *,
    since_seconds: float = -math.inf,
    until_seconds: float = math.inf,
) -> Parsed:
    """Read the requests of [since_seconds, until_seconds), unix time; times without a zone are UTC.

    RequestLogError if more than 1 % of the lines are bad (one is always forgiven, since a live log's last line may
    be torn), if a CSV file's header lacks the time or the prompt, and for more than REQUESTS_MAX requests.
    """
    requests: list[Request] = []
    count = outside = skipped = bad = 0
    first_bad = ""
    for number, request in _read(lines, form):
        count += 1
        if isinstance(request, _Bad):
            bad += 1
            first_bad = first_bad or f"line {number} {request}"
            if bad > _BAD_MAX and bad > _BAD_SHARE_MAX * count:
                break
        elif request is None:
            skipped += 1
        elif not since_seconds <= request.at_seconds < until_seconds:
            outside += 1
        elif len(requests) == REQUESTS_MAX:
            reason = f"the log holds more than {REQUESTS_MAX:,} requests"
            raise RequestLogError(reason, "choose a span of time with --since and --until")
        else:
            requests.append(request)
    forgiven = 1 if count > bad else 0
    if bad > forgiven and bad > _BAD_SHARE_MAX * count:
        reason = f"{bad} of {count} lines of the log cannot be read, first {first_bad}"
        raise RequestLogError(reason, "JSON lines or CSV, a request a line: time, prompt_tokens, cached_tokens, ttft")
    requests.sort(key=lambda request: request.at_seconds)
    return Parsed(tuple(requests), count, outside, skipped, bad, first_bad)


def bounded_lines(file: BinaryIO) -> Iterator[bytes]:
    """The lines of an open file; one longer than LINE_BYTES_MAX comes cut, so that it counts as one bad line."""
    while line := file.readline(LINE_BYTES_MAX + 1):
        yield line
        while len(line) > LINE_BYTES_MAX and not line.endswith(b"\n"):
            line = file.readline(LINE_BYTES_MAX + 1)


def _read(lines: Iterable[str | bytes], form: Form) -> Iterator[tuple[int, Request | _Bad | None]]:
    """Every line that holds something by its number: its request, None if that failed, or what is wrong with it."""
    record_of: Callable[[str], Mapping[str, Any]] | None = None
    for number, raw in enumerate(lines, 1):
        request: Request | _Bad | None
        try:
            line = _text(raw, number)
            if not line:
                continue
            if record_of is None and form != "jsonl" and (form == "csv" or line.lstrip()[0] != "{"):
                record_of = _csv_rows(line)
                continue
            record_of = record_of or _json_record
            request = _request(record_of(line))
        except _Bad as error:
            request = error
        yield number, request


def _text(raw: str | bytes, number: int) -> str:
    """A line without its end, and without a byte order mark if it is the first; _Bad if it is no text."""
    if len(raw) > LINE_BYTES_MAX:
        raise _Bad("is longer than 1 MiB")
    if isinstance(raw, bytes):
        try:
            raw = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise _Bad("is not UTF-8") from None
    line = (raw.removeprefix("\ufeff") if number == 1 else raw).rstrip("\r\n")
    return line if line.strip() else ""


def _json_record(line: str) -> Mapping[str, Any]:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError):
        raise _Bad("is not JSON") from None
    if not isinstance(record, dict):
        raise _Bad("is no JSON object")
    return record


def _csv_rows(header: str) -> Callable[[str], Mapping[str, Any]]:
    """What reads the lines below this header; RequestLogError if it lacks what a log must tell."""
    delimiter = max(",;\t", key=header.count)
    try:
        names = tuple(name.strip() for name in _cells(header, delimiter))
    except _Bad as error:
        raise RequestLogError(f"the header of the log {error}") from None
    columns = _columns(names)
    lacking = [what for what, found in (("time", "sent"), ("prompt_tokens", "prompt")) if not columns[found]]
    if lacking:
        reason = f"the first line of the log is no JSON object and names no {' and no '.join(lacking)}"
        raise RequestLogError(reason, "a CSV file begins with a line such as time,prompt_tokens,cached_tokens,ttft_ms")

    def record_of(line: str) -> Mapping[str, Any]:
        cells = _cells(line, delimiter)
        if len(cells) != len(names):
            raise _Bad(f"has {len(cells)} cells, the header has {len(names)}")
        return dict(zip(names, cells, strict=True))

    return record_of


def _cells(line: str, delimiter: str) -> list[str]:
    if '"' not in line:
        return line.split(delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True, strict=True))
    except csv.Error:
        raise _Bad("is not CSV") from None


@lru_cache(maxsize=64)
def _columns(keys: tuple[str, ...]) -> Mapping[str, tuple[_Column, ...]]:
    """What is known of a record's keys, spelled as there; a CSV file's header may spell a whole path."""
    spelled = {key.lower(): key for key in keys}
    found: dict[str, tuple[_Column, ...]] = {}
    for quantity, columns in _KNOWN.items():
        paths = [
            ((spelled[whole],) if whole in spelled else (spelled.get(column.path[0], ""), *column.path[1:]), column)
            for column in columns
            if (whole := ".".join(column.path))
        ]
        found[quantity] = tuple(column._replace(path=path) for path, column in paths if path[0])
    return found


def _request(record: Mapping[str, Any]) -> Request | None:
    """The request of one record; None if it gave no first token, _Bad if the record cannot be one."""
    columns = _columns(tuple(record))
    status, _ = _found(record, columns["status"])
    if isinstance(status, int | str) and status in _FAILED:
        return None
    ttft, ttft_column = _found(record, columns["ttft"])
    first, first_column = _found(record, columns["first"])
    is_told = bool(columns["ttft"] or columns["first"])
    if ttft is None and first is None and (is_told or _found(record, columns["error"])[0]):
        return None
    sent, sent_column = _found(record, columns["sent"])
    if sent is None:
        raise _Bad("has no time")
    at_seconds = _instant(sent, sent_column)
    prompt = _count(record, columns["prompt"])
    if not prompt:
        raise _Bad("has no prompt" if prompt is None else "has a prompt of 0 tokens")
    cached, outer = _count(record, columns["cached"]), _count(record, columns["outer"])
    if cached is not None and cached > prompt:
        raise _Bad("has more cached tokens than its prompt has")
    if outer is not None and outer > (prompt if cached is None else cached):
        raise _Bad("has more tokens from outside HBM than cached ones")
    seconds = None
    if ttft is not None:
        seconds = _number(ttft, ttft_column) / (ttft_column.per_second or 1)
    elif first is not None:
        seconds = _instant(first, first_column) - at_seconds
    if seconds is not None and not 0 < seconds <= _TTFT_SECONDS_MAX:
        raise _Bad("has a time to first token that is not above 0 and within a day")
    return Request(at_seconds, prompt, cached, seconds, outer, _count(record, columns["generated"]))


def _found(record: Mapping[str, Any], columns: tuple[_Column, ...]) -> tuple[Any, _Column]:
    """The first of these columns' values that is told, with its column; None if none is."""
    for column in columns:
        value: Any = record
        for name in column.path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None and not (isinstance(value, str) and value.strip().lower() in _UNKNOWN):
            return value, column
    return None, _NOWHERE


def _number(value: Any, column: _Column) -> float:
    """A finite number, or one written as text; else _Bad."""
    name = ".".join(column.path)
    if isinstance(value, bool) or not isinstance(value, int | float | str) or (isinstance(value, str) and "_" in value):
        raise _Bad(f"has a {name} that is no number")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise _Bad(f"has a {name} that is no number") from None
    if not math.isfinite(number):
        raise _Bad(f"has a {name} that is not finite")
    return number


def _count(record: Mapping[str, Any], columns: tuple[_Column, ...]) -> int | None:
    value, column = _found(record, columns)
    if value is None:
        return None
    number = _number(value, column)
    if not (0 <= number <= _TOKENS_MAX and number.is_integer()):
        raise _Bad(f"has a {'.'.join(column.path)} that is no count of tokens")
    return int(number)


def _instant(value: Any, column: _Column) -> float:
    """Unix seconds of ISO 8601 or of a unix time, whose unit its name tells, else its size; else _Bad."""
    if isinstance(value, str) and not value.strip().replace(".", "", 1).isdecimal():
        try:
            moment = datetime.fromisoformat(value.strip())
            seconds = (moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment).timestamp()
        except (ValueError, OverflowError):
            raise _Bad(f"has a {column.path[0]} that is no time") from None
    else:
        number = _number(value, column)
        units = _UNIX_UNITS if column.per_second is None else (column.per_second,)
        seconds = next((number / unit for unit in units if _EARLIEST <= number / unit < _LATEST), 0.0)
    if not _EARLIEST <= seconds < _LATEST:
        raise _Bad(f"has a {column.path[0]} that is no unix time of the years 2001 to 2286")
    return seconds
