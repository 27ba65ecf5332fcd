from __future__ import annotations

import gzip
import socket
import time
import tracemalloc
import zlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtally.collectors.base import CollectError
from kvtally.collectors.http_answer import Head, Stream, read_body, read_head

if TYPE_CHECKING:
    from collections.abc import Sequence


def answered(pieces: Sequence[bytes], max_bytes: int = 1000) -> tuple[Head, bytes, bool, bytes]:
    """Head, body, whether its end was marked, and what is left, of an answer that comes in these pieces."""
    here, there = socket.socketpair()
    with here, there:
        stream = Stream(here)
        stream.send(b"", time.monotonic() + 5)
        for piece in pieces:
            there.sendall(piece)
        there.shutdown(socket.SHUT_WR)
        head = read_head(stream)
        body, is_marked = read_body(stream, head.headers, max_bytes)
        rest = b""
        while more := bytes(stream.take(1000)):
            rest += more
        return head, body, is_marked, rest


def body_of(answer: bytes, max_bytes: int = 1000) -> bytes:
    return answered([answer], max_bytes)[1]


def ok(headers: bytes, body: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body


def test_an_answer_with_a_length_leaves_what_follows_it() -> None:
    head, body, is_marked, rest = answered([ok(b"Content-Length: 4\r\nX-A:  1 ", b"a 1\nnext")])
    assert head == Head(200, True, {"content-length": "4", "x-a": "1"})
    assert (body, is_marked, rest) == (b"a 1\n", True, b"next")


def test_an_answer_without_a_length_ends_with_the_connection() -> None:
    _, body, is_marked, rest = answered([ok(b"A: b", b"a 1\nb 2\n")])
    assert (body, is_marked, rest) == (b"a 1\nb 2\n", False, b"")


def test_chunks_may_have_extensions_and_trailers() -> None:
    chunks = b'3;name="x;y"\r\na 1\r\n00A \r\n\nb 2\nc 3\nd\r\n0;last\r\nX-Sum: 1\r\nX-More: 2\r\n\r\nnext'
    _, body, is_marked, rest = answered([ok(b"Transfer-Encoding: Chunked\r\nContent-Length: 7", chunks)])
    assert (body, is_marked, rest) == (b"a 1\nb 2\nc 3\nd", True, b"next")


def test_lines_may_end_without_a_carriage_return() -> None:
    assert body_of(b"HTTP/1.0 200\nContent-Length: 3\n\na 1") == b"a 1"


def test_interim_answers_are_passed_over() -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    head, body, _, _ = answered([interim + ok(b"Content-Length: 1", b"x")])
    assert head == Head(200, True, {"content-length": "1"})
    assert body == b"x"


@pytest.mark.parametrize(
    ("answer", "keeps_alive"),
    [
        (b"HTTP/1.1 200 OK\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nConnection: Close\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\n\r\n", False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n\r\n", True),
    ],
)
def test_the_head_tells_whether_the_connection_is_kept(answer: bytes, keeps_alive: bool) -> None:
    assert answered([answer])[0].keeps_alive is keeps_alive


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", r"^not an HTTP server: it answers 'SSH-2.0-OpenSSH_9.2'$"),
        (b"\x15\x03\x01\x00\x02\n", r"^not an HTTP server: it answers '\\x15\\x03\\x01\\x00\\x02'$"),
        (b"HTTP/2 200 OK\r\n\r\n", "not an HTTP server"),
        (b"HTTP/1.1 20 OK\r\n\r\n", "not an HTTP server"),
        (ok(b"no colon"), "malformed header in an answer with status 200"),
        (ok(b"A: " + b"b" * 17_000), "has more than 16384 bytes"),
        (ok(b"A: b\r\n" * 20_000), "more than 65536 bytes of headers"),
        (ok(b"Content-Length: 5", b"abc"), "^the body ends after 3 of 5 bytes$"),
        (ok(b"Content-Length: 1001"), "^the body has more than 1000 bytes$"),
        (ok(b"Content-Length: 209715200"), "^the body has more than 1000 bytes$"),
        (ok(b"Content-Length: -1"), "malformed Content-Length"),
        (ok(b"Content-Length: 1_0"), "malformed Content-Length"),
        (ok(b"Content-Length: " + b"9" * 5000), "malformed Content-Length"),
        (ok(b"Content-Length: 3\r\nContent-Length: 4", b"abcd"), "malformed Content-Length"),
        (ok(b"A: b", b"x" * 1001), "^the body has more than 1000 bytes$"),
        (ok(b"Transfer-Encoding: gzip, chunked", b"0\r\n\r\n"), "unknown transfer encoding 'gzip, chunked'"),
        (ok(b"Transfer-Encoding: chunked", b"x\r\n"), "malformed chunk after 0 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"\r\n"), "malformed chunk after 0 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"-3\r\nabc\r\n"), "malformed chunk after 0 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"0x3\r\nabc\r\n"), "malformed chunk after 0 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"3\r\nabcd\r\n0\r\n\r\n"), "malformed chunk after 3 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"3\r\nabc\r\n3e9\r\n"), "^the body has more than 1000 bytes$"),
        (ok(b"Transfer-Encoding: chunked", b"fffffffffffffff\r\n"), "^the body has more than 1000 bytes$"),
        (ok(b"Transfer-Encoding: chunked", b"3\r\nab"), "the body ends after 2 of 3 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"3\r\nabc\r\n"), "ends after 3 bytes, in the middle of its chunks"),
        (ok(b"Transfer-Encoding: chunked", b"3\r\nabc\r\n0\r\n"), "ends after 3 bytes, in the middle of its chunks"),
        (ok(b"Transfer-Encoding: chunked", b"3;" + b"x" * 17_000), "has more than 16384 bytes"),
        (ok(b"Transfer-Encoding: chunked", b"0\r\n" + b"a: b\r\n" * 20_000), "more than 65536 bytes of headers"),
        (ok(b"Content-Encoding: br", b"x"), "unknown content encoding 'br'"),
        (ok(b"Content-Encoding: gzip", b"a 1\n"), "the gzip body is corrupt"),
        (ok(b"Content-Encoding: gzip", gzip.compress(b"a 1\n")[:-9]), "the gzip body ends early"),
        (ok(b"Content-Encoding: gzip", gzip.compress(b"a 1\n") * 2), "or another follows it"),
        (ok(b"Content-Encoding: gzip", gzip.compress(b"a" * 1001)), "^the body has more than 1000 bytes$"),
        (ok(b"Content-Encoding: gzip", gzip.compress(b"a" * 900_000)), "^the body has more than 1000 bytes$"),
    ],
)
def test_an_answer_that_is_broken_or_too_large_says_how(answer: bytes, reason: str) -> None:
    with pytest.raises(CollectError, match=reason):
        body_of(answer)


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK", b"HTTP/1.1 200 OK\r\nA: b\r\n", b"HTTP/1.1 100 Go\r\n\r\n"]
)
def test_a_stream_that_ends_inside_the_head_is_an_end_of_file(answer: bytes) -> None:
    with pytest.raises(EOFError):
        body_of(answer)


def test_a_gzip_body_is_inflated_up_to_the_limit() -> None:
    assert body_of(ok(b"Content-Encoding: gzip", gzip.compress(b"a" * 1000))) == b"a" * 1000
    assert body_of(ok(b"Content-Encoding: X-GZIP\r\nContent-Length: 20", gzip.compress(b""))) == b""


def test_a_gzip_bomb_is_refused_before_it_takes_memory() -> None:
    bomb = ok(b"Content-Encoding: gzip", gzip.compress(bytes(50_000_000)))
    tracemalloc.start()
    try:
        with pytest.raises(CollectError, match=r"^the body has more than 100000 bytes$"):
            body_of(bomb, 100_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_body_of_exactly_the_limit_is_read_in_each_framing() -> None:
    text = b"x" * 1000
    assert body_of(ok(b"Content-Length: 1000, 1000", text)) == text
    assert body_of(ok(b"A: b", text)) == text
    assert body_of(ok(b"Transfer-Encoding: chunked", b"3e8\r\n" + text + b"\r\n0\r\n\r\n")) == text


def test_a_stream_past_its_deadline_times_out() -> None:
    here, there = socket.socketpair()
    with here, there:
        stream = Stream(here)
        with pytest.raises(TimeoutError):
            stream.send(b"", time.monotonic() - 1)
        stream.send(b"", time.monotonic() + 0.05)
        there.sendall(b"HTTP/1.1 200 OK\r\n")
        with pytest.raises(TimeoutError):
            read_head(stream)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), chunks=st.lists(st.binary(min_size=1, max_size=300), max_size=5), framing=st.integers(0, 3))
def test_the_body_does_not_depend_on_how_the_answer_is_cut_into_pieces(
    data: st.DataObject, chunks: list[bytes], framing: int
) -> None:
    text = b"".join(chunks)
    if framing == 0:
        answer = ok(b"Content-Length: %d" % len(text), text)
    elif framing == 1:
        body = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
        answer = ok(b"Transfer-Encoding: chunked", body + b"0\r\n\r\n")
    elif framing == 2:
        packed = zlib.compress(text, wbits=31)
        answer = ok(b"Content-Encoding: gzip\r\nContent-Length: %d" % len(packed), packed)
    else:
        answer = ok(b"A: b", text)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(answer)), max_size=6)))
    pieces = [answer[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(answer)], strict=True)]
    _, found, is_marked, rest = answered(pieces, 2000)
    assert (found, is_marked, rest) == (text, framing != 3, b"")
