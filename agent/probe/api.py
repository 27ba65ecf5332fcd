"""An OpenAI-compatible API: which models it serves, and completions of one token whose arrival is timed."""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from kvtally import __version__
from kvtally.collectors.access import Access
from kvtally.collectors.base import CollectError
from kvtally.collectors.http_answer import Stream, read_head
from kvtally.collectors.http_connection import Connector, take_apart

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

ANSWER_SECONDS = 120.0
_MODELS_SECONDS = 5.0
_MODELS_BYTES_MAX = 4 * 2**20
_ANSWER_BYTES_MAX = 256 * 1024
_ERROR_BYTES_MAX = 4096
_SHOWN_CHARACTERS = 200
_OK = 200
_HINTS = {
    401: "the API wants a key: name the file or the environment variable that holds it",
    403: "the API refuses this client: check the key and its rights",
    404: "check the API's address and the model's name",
    429: "the API limits how much it is asked",
}


class Served(NamedTuple):
    """The name of a served model, and how many tokens a prompt and its answer may have together."""

    model: str
    max_model_len: int


class Answer(NamedTuple):
    """One completion: seconds from sending it to its first token; the API's counts of its prompt, None untold."""

    ttft_seconds: float
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Fault(msgspec.Struct):
    message: str = ""
    code: int | str | None = None


# A stream of vLLM, an event a line with an empty line behind it:
#   first data: {"choices":[{"index":0,"text":" w3678","finish_reason":"length"}]}
#   then  data: {"choices":[],"usage":{"prompt_tokens":1000,"prompt_tokens_details":{"cached_tokens":0}}}
#   last  data: [DONE]
#   or    data: {"error":{"message":"Token id 5000 is out of vocabulary","code":400}}
class _Event(msgspec.Struct):
    choices: list[msgspec.Raw] = []
    usage: _Usage | None = None
    error: _Fault | None = None


class Api:
    """One API; a connection for each request. Methods raise CollectError where it does not answer as it should.

    url             what /v1 lies below; ValueError if it is none
    key             is sent as a bearer token, and stands in no message
    answer_seconds  bounds one completion
    ca_file         certificate authorities to trust for https, instead of the system's
    resolve         is called as socket.getaddrinfo is
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "",
        answer_seconds: float = ANSWER_SECONDS,
        ca_file: str | None = None,
        resolve: Callable[..., list[Any]] = socket.getaddrinfo,
    ) -> None:
        self.url = url
        self._place = take_apart(f"{url}/v1")
        self._key = key
        self._answer_seconds = answer_seconds
        self._connector = Connector(self._place, Access(ca_file=ca_file or ""), resolve)

    def served(self, model: str | None = None) -> Served:
        """The model of this name; by default the first that is no adapter of another."""
        where = f"{self._place.origin}{self._place.target}/models"
        with self._exchange("GET", "/models", b"", _MODELS_SECONDS) as (_, pieces):
            body = b"".join(_bounded(pieces, _MODELS_BYTES_MAX))
        try:
            listed = msgspec.json.decode(body, type=_Models).data
        except (msgspec.MsgspecError, RecursionError):
            raise CollectError(f"{where} is no list of models", "the API of vLLM has one") from None
        for one in listed:
            if one.id == model or (model is None and one.parent is None):
                if one.max_model_len is None or one.max_model_len < 1:
                    raise CollectError(f"{where} does not tell how long a prompt may be", "that of vLLM does")
                return Served(one.id, one.max_model_len)
        names = ", ".join(_printable(one.id) for one in listed[:10]) or "nothing"
        raise CollectError(f"{where} does not list {model or 'a model'}", f"it lists {names}")

    def complete(self, model: str, token_ids: Sequence[int], seconds_max: float = math.inf) -> Answer:
        """Send a prompt under a salt of its own, which no cache can know, and wait for its one token.

        Whatever ends the wait (an error, a deadline, Ctrl-C) closes the connection, and vLLM drops the request.
        """
        body = msgspec.json.encode(
            {
                "model": model,
                "prompt": list(token_ids),
                "max_tokens": 1,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                "cache_salt": os.urandom(16).hex(),
            }
        )
        seconds = min(self._answer_seconds, seconds_max)
        with self._exchange("POST", "/completions", body, seconds) as (sent, pieces):
            return self._answer(sent, _events(_bounded(pieces, _ANSWER_BYTES_MAX)))

    @contextmanager
    def _exchange(self, method: str, path: str, body: bytes, seconds: float) -> Iterator[tuple[float, Iterator[bytes]]]:
        """Send a request; gives when it was sent, and the body of an answer 200. Closes the connection in any case."""
        origin = self._place.origin
        stream: Stream | None = None
        try:
            deadline = time.monotonic() + seconds
            stream = Stream(self._connector.connect(deadline))
            sent = time.perf_counter()
            stream.send(self._head(method, path, len(body)) + body, deadline)
            head = read_head(stream)
            pieces = _pieces(stream, head.headers)
            if head.status != _OK:
                raise self._refused(head.status, _error_text(pieces))
            yield sent, pieces
        except TimeoutError:
            hint = "a long prompt on a slow engine needs more time than it was given"
            raise CollectError(f"{origin}{self._place.target}{path} took longer than {seconds:.3g} s", hint) from None
        except ConnectionRefusedError:
            raise CollectError(f"connection refused: nothing listens on {origin}", "check the API's address") from None
        except EOFError:
            raise CollectError(f"{origin} closed the connection before its answer was complete") from None
        except OSError as error:
            raise CollectError(f"{error.strerror or error} while talking to {origin}") from None
        finally:
            if stream is not None:
                stream.close()

    def _head(self, method: str, path: str, body_bytes: int) -> bytes:
        lines = [
            f"{method} {self._place.target}{path} HTTP/1.1",
            f"Host: {self._place.authority}",
            f"User-Agent: kvtally/{__version__}",
            "Accept-Encoding: identity",
            "Connection: close",
            *([f"Authorization: Bearer {self._key}"] if self._key else []),
            *(["Content-Type: application/json", f"Content-Length: {body_bytes}"] if body_bytes else []),
        ]
        return "\r\n".join((*lines, "", "")).encode("ascii")

    def _answer(self, sent: float, events: Iterator[bytes]) -> Answer:
        ttft_seconds: float | None = None
        usage = _Usage()
        for data in events:
            arrived = time.perf_counter()
            if data == b"[DONE]" and ttft_seconds is not None:
                details = usage.prompt_tokens_details or _Cached()
                return Answer(ttft_seconds, usage.prompt_tokens, details.cached_tokens)
            event = _decoded(data)
            if event is None:
                raise CollectError(f"{self._place.origin} answers with something else than a completion")
            if event.error is not None:  # vLLM has sent its 200 by then
                raise self._refused(event.error.code, event.error.message)
            if event.choices and ttft_seconds is None:
                ttft_seconds = arrived - sent
            usage = event.usage or usage
        raise EOFError

    def _refused(self, code: int | str | None, message: str) -> CollectError:
        """What to say of an error, in the server's own words unless they hold the key."""
        reason = f"{self._place.origin} refuses with {f'HTTP {code}' if isinstance(code, int) else 'an error'}"
        if message and not (self._key and self._key in message):
            reason += f": {_printable(message)}"
        hint = _HINTS.get(code) if isinstance(code, int) else None
        return CollectError(reason, hint or "see the engine's log")


def _printable(text: str) -> str:
    return "".join(each if " " <= each <= "~" else "?" for each in text[:_SHOWN_CHARACTERS])


def _decoded(data: bytes) -> _Event | None:
    try:
        return msgspec.json.decode(data, type=_Event)
    except (msgspec.MsgspecError, RecursionError):
        return None


def _error_text(pieces: Iterator[bytes]) -> str:
    """What the body of an error says; "" if that is in no known form."""
    try:
        event = _decoded(b"".join(_bounded(pieces, _ERROR_BYTES_MAX)))
    except (EOFError, CollectError):
        return ""
    return event.error.message if event is not None and event.error is not None else ""


def _events(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """What follows "data:" in each line of a stream of events."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _bounded(pieces: Iterator[bytes], max_bytes: int) -> Iterator[bytes]:
    received = 0
    for piece in pieces:
        received += len(piece)
        if received > max_bytes:
            raise CollectError(f"the API's answer has more than {max_bytes} bytes")
        yield piece


def _pieces(stream: Stream, headers: Mapping[str, str]) -> Iterator[bytes]:
    """The body, each piece as soon as it is there; EOFError if the connection ends before the body does."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := _size(stream.line().partition(b";")[0], 16):
            yield from _exactly(stream, size)
            stream.line()
    elif "content-length" in headers:
        yield from _exactly(stream, _size(headers["content-length"].encode("latin-1"), 10))
    else:
        while piece := bytes(stream.take(sys.maxsize)):
            yield piece


def _exactly(stream: Stream, count: int) -> Iterator[bytes]:
    while count:
        piece = bytes(stream.take(count))
        if not piece:
            raise EOFError
        count -= len(piece)
        yield piece


def _size(text: bytes, base: int) -> int:
    try:
        size = int(text, base)
    except ValueError:
        size = -1
    if size < 0:
        raise CollectError("the API's answer is malformed: it holds a size that is none")
    return size
