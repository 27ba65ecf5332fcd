"""A loopback server that talks and counts as vLLM's API server does, until a test tells it otherwise."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.loopback import LABELS, FakeEngine, answer

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Self

    # what is done for one completion in the place of serving it; False hangs up
    Act = Callable[["FakeVllm", socket.socket, "Sent"], bool]

WAITING = f"vllm:num_requests_waiting{{{LABELS}}}"
FIRST_TOKENS = f"vllm:time_to_first_token_seconds_count{{{LABELS}}}"
FINISHED = 'vllm:request_success_total{engine="0",finished_reason="length",model_name="tiny"}'
PREFILL = f"vllm:request_prefill_time_seconds_sum{{{LABELS}}}"
AWAKE = 'vllm:engine_sleep_state{engine="0",model_name="tiny",sleep_state="awake"}'
MODELS = [
    {"id": "adapter", "object": "model", "parent": "tiny", "max_model_len": 4096},
    {"id": "tiny", "object": "model", "parent": None, "max_model_len": 4096},
]
SECONDS_PER_TOKEN = 1e-6  # of prefill: so little that an answer by loopback takes longer
TOKEN = 'data: {"choices":[{"index":0,"text":" w3678","finish_reason":"length"}]}\n\n'
DONE = "data: [DONE]\n\n"


class Sent(NamedTuple):
    """One request as it arrived."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        """Its body."""
        decoded: dict[str, Any] = json.loads(self.body)
        return decoded


class FakeVllm:
    """Counts on a real page of vLLM 0.32. `acts` are done for the completions to come, one each."""

    def __init__(self, *acts: Act, models: object = MODELS, tls: ssl.SSLContext | None = None) -> None:
        self.counters = FakeEngine()
        self.acts = deque(acts)
        self.requests: list[Sent] = []
        self.before_page: Callable[[FakeVllm], None] = lambda _: None
        self.hidden: set[str] = set()
        self.hung_up = threading.Event()
        self._models = models
        self._tls = tls
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.origin = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"{'http' if tls is None else 'https'}://{self.origin}"
        for key in (WAITING, FIRST_TOKENS, FINISHED, PREFILL):
            assert key in self.counters._values
            self.counters.set(key, 0)
        self._threads[0].start()

    @property
    def completions(self) -> list[Sent]:
        """The prompts that arrived."""
        return [one for one in self.requests if one.line.startswith("POST")]

    def add(self, key: str, more: float) -> None:
        """Move a counter."""
        self.counters.set(key, self.counters.value(key) + more)

    def count(self, prompt: int, cached: int = 0, seconds: float | None = None) -> None:
        """Count a request with one output token."""
        self.add(PREFILL, prompt * SECONDS_PER_TOKEN if seconds is None else seconds)
        self.add(FIRST_TOKENS, 1)
        self.add(FINISHED, 1)
        self.counters.serve(prompt, cached, 1)

    def serve(self, connection: socket.socket, sent: Sent) -> bool:
        """What vLLM does with a prompt."""
        prompt = len(sent.json["prompt"])
        self.count(prompt)
        reply(connection, TOKEN, usage(prompt), DONE)
        return True

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._listener.accept()[0]
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._talk, args=(connection,)))
                self._threads[-1].start()

    def _talk(self, plain: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client has hung up
            connection = plain if self._tls is None else self._tls.wrap_socket(plain, server_side=True)
            with connection:
                while (sent := _received(connection)) is not None:
                    self.requests.append(sent)
                    if not self._answer(connection, sent):
                        break

    def _answer(self, connection: socket.socket, sent: Sent) -> bool:
        path = sent.line.split()[1]
        if path == "/metrics":
            self.before_page(self)
            lines = self.counters._page(None).decode().splitlines(keepends=True)
            page = "".join(line for line in lines if line.partition(" ")[0] not in self.hidden)
            connection.sendall(answer(page.encode()))
        elif path == "/v1/models":
            connection.sendall(answer(json.dumps({"object": "list", "data": self._models}).encode()))
        elif path == "/v1/completions":
            return self.acts.popleft()(self, connection, sent) if self.acts else self.serve(connection, sent)
        else:
            connection.sendall(answer(b'{"detail":"Not Found"}', "404 Not Found"))
        return True

    def close(self) -> None:
        """Hang up on everybody."""
        for one in (self._listener, *self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def usage(prompt: int, cached: int | None = None) -> str:
    """The event that tells what a prompt took."""
    details = None if cached is None else {"cached_tokens": cached}
    return (
        f"data: {json.dumps({'choices': [], 'usage': {'prompt_tokens': prompt, 'prompt_tokens_details': details}})}\n\n"
    )


def reply(connection: socket.socket, *events: str) -> None:
    """Stream events in chunks, one each."""
    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
    for event in events:
        connection.sendall(f"{len(event.encode()):x}\r\n{event}\r\n".encode())
    connection.sendall(b"0\r\n\r\n")


def refuse(status: str, body: str) -> Act:
    """Answer with an error."""

    def act(_: FakeVllm, connection: socket.socket, __: Sent) -> bool:
        connection.sendall(answer(body.encode(), status))
        return True

    return act


def say(raw: bytes) -> Act:
    """Send these bytes, and hang up."""

    def act(_: FakeVllm, connection: socket.socket, __: Sent) -> bool:
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_RDWR)
        return False

    return act


def stream(*events: str) -> Act:
    """Stream these events, and count nothing."""

    def act(_: FakeVllm, connection: socket.socket, __: Sent) -> bool:
        reply(connection, *events)
        return True

    return act


def hang(vllm: FakeVllm, connection: socket.socket, _: Sent) -> bool:
    """Never answer; `hung_up` is set when the client gives up."""
    connection.recv(1)
    vllm.hung_up.set()
    return False


def beside(prompt: int) -> Act:
    """Serve the prompt, and another request of so many tokens beside it."""

    def act(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        vllm.count(prompt)
        return vllm.serve(connection, sent)

    return act


def counted(cached: int = 0, seconds: float | None = None, more: int = 0, told: int | None = None) -> Act:
    """Serve the prompt, and count it as told: a part cached, another prefill time, more tokens."""

    def act(vllm: FakeVllm, connection: socket.socket, sent: Sent) -> bool:
        prompt = len(sent.json["prompt"])
        vllm.count(prompt + more, cached, seconds)
        reply(connection, TOKEN, usage(prompt, told), DONE)
        return True

    return act


def _received(connection: socket.socket) -> Sent | None:
    raw = b""
    while b"\r\n\r\n" not in raw:
        piece = connection.recv(65536)
        if not piece:
            return None
        raw += piece
    head, _, body = raw.partition(b"\r\n\r\n")
    line, *rest = head.decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (one.partition(":") for one in rest)}
    while len(body) < int(headers.get("content-length", 0)):
        body += connection.recv(65536)
    return Sent(line, headers, body)
