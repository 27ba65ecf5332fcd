from __future__ import annotations

import contextlib
import io
import json
from itertools import chain, repeat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtally.agent.request_log import (
    LINE_BYTES_MAX,
    REQUESTS_MAX,
    Parsed,
    Request,
    RequestLogError,
    bounded_lines,
    read_requests,
)

FIXTURES = Path(__file__).parent / "fixtures" / "requests"
AT = 1_795_409_206.5  # 2026-11-23T04:46:46.5Z
GOOD = '{"t": 1795409206.5, "n": 3000, "cached": 2048, "ttft": 0.5}'
USAGE = '{"prompt_tokens": 3000, "prompt_tokens_details": {"cached_tokens": 2048}}'
BAD = '{"t": 1795409206.5}'


def only(line: str) -> Request:
    (request,) = read_requests([line]).requests
    return request


def only_row(header: str, row: str) -> Request:
    (request,) = read_requests([header, row], "csv").requests
    return request


def rounded(request: Request) -> Request:
    """With its time to first token in whole microseconds: a difference of unix times is no exact number."""
    assert request.ttft_seconds is not None
    return request._replace(ttft_seconds=round(request.ttft_seconds, 6))


def fault(line: str | bytes) -> str:
    """Why a line is bad, among a good one."""
    parsed = read_requests([GOOD, line])
    assert parsed.bad == 1
    assert parsed.requests == (only(GOOD),)
    return parsed.first_bad


# recordings


def test_a_recording_s_requests_with_tag_and_usage_are_read() -> None:
    with (FIXTURES / "tag-t_start-usage.jsonl").open("rb") as file:
        parsed = read_requests(bounded_lines(file))
    assert (parsed.lines, parsed.skipped, parsed.bad) == (5, 0, 0)
    first, _, third, fourth, aborted = parsed.requests  # by time
    assert rounded(first) == Request(1795409206.9649026, 3000, 0, 0.115562, None, 8)
    assert third[:3] == (1795409210.3057787, 2048, 512)
    assert rounded(fourth) == Request(1795409236.3158855, 6682, 5936, 1.59749, None, 26)
    # aborted after its first token: the engine told nothing, the client knows what it sent
    assert rounded(aborted) == Request(1795409294.397103, 6000, None, 0.226736)


def test_a_recording_s_requests_with_phase_and_milliseconds_are_read() -> None:
    with (FIXTURES / "phase-t_send_ms.jsonl").open("rb") as file:
        parsed = read_requests(file)
    # not among them: aborted before the first token, refused with 404, and one that was not streamed
    assert (parsed.lines, parsed.skipped, parsed.bad) == (6, 3, 0)
    assert parsed.requests == (
        Request(1795408501.461, 416, 256, 0.05689, None, 16),
        Request(1795408522.715, 1024, 0, 0.33084, None, 64),
        Request(1795408523.555, 1024, None, 0.02823, None, None),
    )


# forms


@pytest.mark.parametrize(
    "line",
    [
        '{"t": 1795409206.5, "n": 3000, "cached": 2048, "ttft": 0.5}',
        '{"time": "2026-11-23T04:46:46.5Z", "prompt": 3000, "cached_tokens": 2048, "ttft_s": 0.5}',
        '{"timestamp": "2026-11-23 05:46:46.5+01:00", "prompt_tokens": 3000, "cached": 2048, "ttft_ms": 500}',
        '{"timestamp": "2026-11-23T04:46:46.500000000", "prompt_tokens": 3e3, "cached": 2048.0, "ttft_us": 500000}',
        '{"t_send_ms": 1795409206500, "input_tokens": 3000, "cached": 2048, "ttft_seconds": 0.5}',
        '{"t": 1795409206500, "prompt_tokens": "3000", "cached": " 2048 ", "time_to_first_token": "0.5"}',
        '{"ts": 1, "t_start": 1795409206.5, "t_first": 1795409207.0, "prompt_tokens": 3000, "cached": 2048}',
        '{"T": 1795409206500000, "Prompt_Tokens": 3000, "CACHED": 2048, "TTFT": 0.5, "status": 200, "error": null}',
        '{"t": 1795409206.5, "ttft": 0.5, "n": 1, "prompt": "a text", "usage": ' + USAGE + "}",
        '\ufeff  {"t": 1795409206.5, "n": 3000, "cached": 2048, "ttft": 0.5}\r\n',
    ],
)
def test_a_json_line_may_call_its_values_in_many_ways(line: str) -> None:
    assert only(line) == Request(AT, 3000, 2048, 0.5)
    assert read_requests([line.encode()], "jsonl").requests == (only(line),)


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("time,prompt,cached,ttft", "1795409206.5,3000,2048,0.5"),
        ("\ufefftimestamp;prompt_tokens;cached_tokens;ttft_ms", "2026-11-23T04:46:46.5Z;3000;2048;500"),
        ("ttft_s\tn\tt\tcached\tnote", "0.5\t3000\t1795409206500\t2048\t"),
        (
            '"Time", "usage.prompt_tokens", usage.prompt_tokens_details.cached_tokens,ttft_ms',
            '"1795409206.5",3000,2048,"500"',
        ),
        ("id,t_start,t_first,prompt_tokens,cached", '"a ""quoted"", id",1795409206.5,1795409207.0,3000,2048'),
    ],
)
def test_a_csv_file_may_have_its_columns_in_any_order(header: str, row: str) -> None:
    assert only_row(header, row) == Request(AT, 3000, 2048, 0.5)
    parsed = read_requests([f"{header}\r\n".encode(), b"\r\n", f"{row}\r\n".encode(), b"\n"])
    assert parsed == Parsed((Request(AT, 3000, 2048, 0.5),), 1, 0, 0, 0, "")


def test_what_a_log_does_not_tell_is_unknown() -> None:
    assert only('{"t": 1795409206.5, "n": 3000}') == Request(AT, 3000)
    assert only_row("t,n,cached,outer_tokens", "1795409206.5,3000,,none") == Request(AT, 3000)
    assert only('{"t": 1795409206.5, "n": 9, "usage": null, "cached": null}') == Request(AT, 9)


def test_outer_and_generated_tokens_are_read_where_they_are_told() -> None:
    line = '{"t": 1795409206.5, "prompt_tokens": 9, "cached_tokens": 8, "outer_tokens": 7, "completion_tokens": 6}'
    assert only(line) == Request(AT, 9, 8, None, 7, 6)


def test_requests_come_by_time_and_equal_times_are_no_trouble() -> None:
    lines = [f'{{"t": {at}, "n": {n}}}' for at, n in ((1795409209, 1), (1795409206, 2), (1795409206, 1))]
    lines.append('{"t": 1795409206, "n": 2, "cached": 1}')
    assert [request[1:3] for request in read_requests(lines).requests] == [(2, None), (1, None), (2, 1), (1, None)]


def test_requests_outside_the_span_are_counted_only() -> None:
    lines = [f'{{"t": {at}, "n": 10}}' for at in (1795409206, 1795409207, 1795409208)]
    parsed = read_requests(lines, since_seconds=1795409207, until_seconds=1795409208)
    assert [request.at_seconds for request in parsed.requests] == [1795409207]
    assert (parsed.lines, parsed.outside) == (3, 2)


def test_an_empty_log_holds_no_requests() -> None:
    assert read_requests([]) == read_requests(["", b"\n", "  \r\n"]) == Parsed((), 0, 0, 0, 0, "")


# requests that failed


@pytest.mark.parametrize(
    "line",
    [
        '{"t": 1795409206.5, "n": 3000, "ttft": null}',
        '{"t": 1795409206.5, "n": 3000, "ttft_ms": ""}',
        '{"t_start": 1795409206.5, "t_first": null, "n": 3000, "error": "aborted"}',
        '{"t": 1795409206.5, "n": 3000, "status": 500}',
        '{"t": 1795409206.5, "n": 3000, "status_code": "429", "ttft": 0.1}',
        '{"error": {"message": "nothing else is known"}}',
    ],
)
def test_a_request_without_a_first_token_is_skipped_and_counted(line: str) -> None:
    assert read_requests([line]) == Parsed((), 1, 0, 1, 0, "")


def test_a_request_that_was_aborted_after_its_first_token_counts() -> None:
    assert only('{"t": 1795409206.5, "n": 9, "ttft": 0.5, "error": "aborted", "status": 200}') == Request(
        AT, 9, None, 0.5
    )


# bad lines


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"t": 1795409206.5, "n": 30', "is not JSON"),
        ('{"t": 1795409206.5, "n": NaN}', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1795409206.5, 3000]", "is no JSON object"),
        (b'{"t": "\xff"}', "is not UTF-8"),
        ('{"n": 3000}', "has no time"),
        ('{"t": "yesterday", "n": 3000}', "has a t that is no time"),
        ('{"t": 12.5, "n": 3000}', "has a t that is no unix time of the years 2001 to 2286"),
        ('{"t_send_ms": 1795409206.5, "n": 3000}', "has a t_send_ms that is no unix time of the years 2001 to 2286"),
        ('{"t": 1e300, "n": 3000}', "has a t that is no unix time of the years 2001 to 2286"),
        ('{"t": true, "n": 3000}', "has a t that is no number"),
        ('{"t": "0001-01-01", "n": 3000}', "has a t that is no unix time of the years 2001 to 2286"),
        ('{"t": 1795409206.5}', "has no prompt"),
        ('{"t": 1795409206.5, "prompt": "my secret"}', "has a prompt that is no number"),
        ('{"t": 1795409206.5, "n": [3000]}', "has a n that is no number"),
        ('{"t": 1795409206.5, "n": "3_000"}', "has a n that is no number"),
        ('{"t": 1795409206.5, "n": 0}', "has a prompt of 0 tokens"),
        ('{"t": 1795409206.5, "n": -3}', "has a n that is no count of tokens"),
        ('{"t": 1795409206.5, "n": 1.5}', "has a n that is no count of tokens"),
        ('{"t": 1795409206.5, "n": 100000001}', "has a n that is no count of tokens"),
        ('{"t": 1795409206.5, "n": "nan"}', "has a n that is not finite"),
        ('{"t": 1795409206.5, "n": "1%s"}' % ("0" * 5000), "has a n that is not finite"),
        ('{"t": 1795409206.5, "n": 9, "cached": 10}', "has more cached tokens than its prompt has"),
        ('{"t": 1795409206.5, "n": 9, "cached": -1}', "has a cached that is no count of tokens"),
        ('{"t": 1795409206.5, "n": 9, "usage": {"prompt_tokens_details": {"cached_tokens": "x"}}}',
         "has a usage.prompt_tokens_details.cached_tokens that is no number"),
        ('{"t": 1795409206.5, "n": 9, "cached": 5, "outer_tokens": 6}',
         "has more tokens from outside HBM than cached ones"),
        ('{"t": 1795409206.5, "n": 9, "outer_tokens": 10}', "has more tokens from outside HBM than cached ones"),
        ('{"t": 1795409206.5, "n": 9, "ttft": -1}',
         "has a time to first token that is not above 0 and within a day"),
        ('{"t": 1795409206.5, "n": 9, "ttft_s": 86401}',
         "has a time to first token that is not above 0 and within a day"),
        ('{"t_start": 1795409206.5, "n": 9, "t_first": 1795409206.5}',
         "has a time to first token that is not above 0 and within a day"),
        ('{"t": 1795409206.5, "n": 9, "generated": -1}', "has a generated that is no count of tokens"),
        ('{"t": 1795409206.5, "n": 9, "x": "%s"}' % ("x" * LINE_BYTES_MAX), "is longer than 1 MiB"),
    ],
)  # fmt: skip
def test_a_bad_line_is_counted_with_its_number_and_reason(line: str | bytes, reason: str) -> None:
    assert fault(line) == f"line 2 {reason}"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1795409206.5,3000", "has 2 cells, the header has 3"),
        ('1795409206.5,"3000,0.5', "is not CSV"),
        ("1795409206.5,NaN,0.5", "has a prompt that is not finite"),
        ("1795409206.5,,0.5", "has no prompt"),
    ],
)
def test_a_bad_row_is_counted_with_its_number_and_reason(row: str, reason: str) -> None:
    parsed = read_requests(["time,prompt,ttft", "1795409206.5,3000,0.5", "", row, "1795409206.5,0,0.5"] + [
        "1795409206.5,3000,0.5"
    ] * 200)  # fmt: skip
    assert parsed.bad == 2
    assert parsed.first_bad == f"line 4 {reason}"
    assert len(parsed.requests) == 201


def test_one_line_in_a_hundred_may_be_bad_and_no_more() -> None:
    assert read_requests([*[GOOD] * 198, BAD, BAD]).bad == 2
    with pytest.raises(RequestLogError, match="2 of 199 lines of the log cannot be read, first line 198 has no prompt"):
        read_requests([*[GOOD] * 197, BAD, BAD])


def test_the_torn_last_line_of_a_short_log_is_forgiven() -> None:
    assert read_requests([GOOD, GOOD[:20]]).bad == 1


def test_a_log_of_nothing_but_a_bad_line_is_refused() -> None:
    with pytest.raises(RequestLogError, match="1 of 1 lines") as refused:
        read_requests([BAD])
    assert refused.value.hint.startswith("JSON lines or CSV")


def test_what_is_no_log_is_given_up_before_its_end() -> None:
    with pytest.raises(RequestLogError, match="10001 of 10001 lines of the log cannot be read"):
        read_requests(repeat(BAD), "jsonl")  # without end


def test_bad_lines_of_a_log_whose_lines_are_mostly_outside_do_not_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtally.agent.request_log._BAD_MAX", 10)
    outside = repeat('{"t": 1600000000, "n": 1}', 1100)
    parsed = read_requests(chain(outside, repeat(BAD, 11), [GOOD]), since_seconds=1.7e9)
    assert parsed.bad == 11
    assert len(parsed.requests) == 1


@pytest.mark.parametrize(
    ("header", "lacking"),
    [
        ("when,prompt,ttft", "no time"),
        ("time,cached", "no prompt_tokens"),
        ("GET /v1/completions HTTP/1.1", "no time and no prompt_tokens"),
        ("[", "no time and no prompt_tokens"),
    ],
)
def test_a_header_that_lacks_what_is_needed_is_refused(header: str, lacking: str) -> None:
    with pytest.raises(RequestLogError) as refused:
        read_requests([header, "1,2,3"])
    assert str(refused.value) == f"the first line of the log is no JSON object and names {lacking}"
    assert "time,prompt_tokens,cached_tokens,ttft_ms" in refused.value.hint


def test_a_header_that_is_no_csv_is_refused() -> None:
    with pytest.raises(RequestLogError, match="the header of the log is not CSV"):
        read_requests(['time,"prompt', "1,2"])


def test_no_message_quotes_a_value() -> None:
    secret = '{"t": 1795409206.5, "prompt": "my secret"}'
    assert "secret" not in fault(secret)
    with pytest.raises(RequestLogError) as refused:
        read_requests(["my secret"])
    assert "secret" not in str(refused.value) + refused.value.hint


# bounds


def test_a_line_without_end_is_cut_and_counts_once() -> None:
    file = io.BytesIO(GOOD.encode() + b"\n" + b"x" * (3 * LINE_BYTES_MAX) + b"\n" + GOOD.encode())
    assert [len(line) for line in bounded_lines(file)] == [len(GOOD) + 1, LINE_BYTES_MAX + 1, len(GOOD)]
    file.seek(0)
    parsed = read_requests(bounded_lines(file))
    assert (parsed.lines, parsed.bad, parsed.first_bad) == (3, 1, "line 2 is longer than 1 MiB")


def test_a_log_of_more_requests_than_are_held_is_refused_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    assert REQUESTS_MAX == 1_000_000
    monkeypatch.setattr("kvtally.agent.request_log.REQUESTS_MAX", 3)
    assert len(read_requests([GOOD] * 3).requests) == 3
    with pytest.raises(RequestLogError, match="the log holds more than 3 requests") as refused:
        read_requests([GOOD] * 4)
    assert refused.value.hint == "choose a span of time with --since and --until"


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(("t", "time", "prompt", "n", "cached", "ttft", "t_first", "usage", "status", "error", "x")),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(AT),
            lambda inner: st.dictionaries(st.sampled_from(("prompt_tokens", "prompt_tokens_details")), inner),
            max_leaves=3,
        ),
    )
)
def test_whatever_a_line_holds_it_is_a_request_or_skipped_or_bad(record: dict[str, object]) -> None:
    parsed = read_requests([GOOD, json.dumps(record)])
    assert len(parsed.requests) + parsed.skipped + parsed.bad == parsed.lines == 2
    for request in parsed.requests:
        assert request.prompt_tokens >= (request.cached_tokens or 0) >= 0
        assert request.ttft_seconds is None or request.ttft_seconds > 0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_whatever_a_file_holds_it_is_read_or_refused(lines: list[bytes]) -> None:
    with contextlib.suppress(RequestLogError):
        assert read_requests(lines).lines <= len(lines)
