"""Servers on loopback: one that talks as it is told, and an engine whose counters a test moves."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    # called with each request's target; False ends the connection
    Talk = Callable[[socket.socket, str], bool]

PAGE = Path(__file__).parent / "fixtures" / "pages" / "cpu-v032" / "1795408686554.prom"
LABELS = 'engine="0",model_name="tiny"'
START = "process_start_time_seconds"
BIRTH = f"vllm:prompt_tokens_created{{{LABELS}}}"
RUNNING = f"vllm:num_requests_running{{{LABELS}}}"
PROMPT = f"vllm:prompt_tokens_total{{{LABELS}}}"
COMPUTED = f'vllm:prompt_tokens_by_source_total{{{LABELS},source="local_compute"}}'
CACHED = f'vllm:prompt_tokens_by_source_total{{{LABELS},source="local_cache_hit"}}'
ALL_CACHED = f"vllm:prompt_tokens_cached_total{{{LABELS}}}"
GENERATED = f"vllm:generation_tokens_total{{{LABELS}}}"
STEPS = f"vllm:iteration_tokens_total_count{{{LABELS}}}"
COUNTERS = (PROMPT, COMPUTED, CACHED, ALL_CACHED, GENERATED, STEPS)


class Tokens(NamedTuple):
    """What requests took, as the ledger has it too."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0

    def plus(self, other: Tokens) -> Tokens:
        """The sum."""
        return Tokens(self.prompt + other.prompt, self.cached + other.cached, self.generated + other.generated)


class Server:
    """Holds any number of connections at once, each in a thread of its own."""

    def __init__(self, talk: Talk, port: int = 0) -> None:
        self.requests = 0
        self._talk = talk
        self._connections: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.port = self._listener.getsockname()[1]
        self.origin = f"127.0.0.1:{self.port}"
        self._threads.append(threading.Thread(target=self._accept))
        self._threads[0].start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._listener.accept()[0]
                self._connections.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):  # the client has hung up
            while request := _request(connection):
                self.requests += 1
                if not self._talk(connection, request.split(b" ", 2)[1].decode()):
                    return

    def close(self) -> None:
        for one in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in tuple(self._threads):
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _request(connection: socket.socket) -> bytes:
    text = b""
    while not text.endswith(b"\r\n\r\n"):
        piece = connection.recv(65536)
        if not piece:
            return b""
        text += piece
    return text


def answer(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = (f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", "")
    return "\r\n".join(lines).encode() + body


class FakeEngine:
    """Serves a real page of vLLM 0.32 whose token counters a test moves; answers /version and name[] as vLLM does."""

    def __init__(self, port: int = 0, started_at: float | None = None) -> None:
        lines = PAGE.read_text(encoding="utf-8").splitlines()
        pairs = (line.rpartition(" ")[::2] for line in lines if not line.startswith("#"))
        self._values = dict(pairs)
        self._lock = threading.Lock()
        self._scraped = threading.Condition(self._lock)
        self._asked_port = port
        self._server: Server | None = None
        self.scrapes = 0
        self.served = Tokens()
        self.set(RUNNING, 0)
        self.started(time.time() - 3600 if started_at is None else started_at)

    def set(self, key: str, value: float) -> None:
        """Show this value from now on."""
        text = repr(float(value))
        with self._lock:
            self._values[key] = {"nan": "NaN", "inf": "+Inf"}.get(text, text)

    def value(self, key: str) -> float:
        """What is shown now."""
        with self._lock:
            return float(self._values[key])

    def started(self, at: float) -> None:
        """Show this unix second as the start of the process, and the birth of its counters a moment later."""
        self.set(START, at)
        # pages of one birth are taken for the same engine: each fake has its own
        self.set(BIRTH, at + 0.001 + random.random() / 1000)

    def serve(self, prompt: int, cached: int, generated: int) -> None:
        """Serve one request: all counters move at once."""
        with self._lock:
            for key, more in zip(
                COUNTERS, (prompt, prompt - cached, cached, cached, generated, generated), strict=True
            ):
                self._values[key] = repr(float(self._values[key]) + more)
            self.served = self.served.plus(Tokens(prompt, cached, generated))

    def wait_for_scrapes(self, more: int = 1, within_seconds: float = 30.0) -> None:
        """Wait until so many more pages are served."""
        with self._scraped:
            until = self.scrapes + more
            assert self._scraped.wait_for(lambda: self.scrapes >= until, within_seconds), f"{self.name} is not scraped"

    @property
    def name(self) -> str:
        """Host and port, which the ledger calls it by."""
        return f"127.0.0.1:{self._asked_port}"

    def start(self) -> Self:
        """Listen; always on the same port."""
        self._server = Server(self._talk, self._asked_port)
        self._asked_port = self._server.port
        return self

    def stop(self) -> None:
        """Close every connection and the port."""
        if self._server is not None:
            self._server.close()
            self._server = None

    def begin_anew(self, started_at: float) -> None:
        """Another process: all that is counted is counted from 0."""
        with self._lock:
            for key in self._values:
                name = key.partition("{")[0]
                if name.endswith(("_total", "_sum", "_count", "_bucket")):
                    self._values[key] = "0.0"
        self.started(started_at)
        self.set(RUNNING, 0)

    def _talk(self, connection: socket.socket, target: str) -> bool:
        parts = urlsplit(target)
        if parts.path == "/version":
            connection.sendall(answer(b'{"version":"0.32.0"}'))
            return True
        names = parse_qs(parts.query).get("name[]")
        with self._scraped:
            page = self._page(names)
        connection.sendall(answer(page))
        with self._scraped:
            self.scrapes += 1
            self._scraped.notify_all()
        return True

    def _page(self, names: list[str] | None) -> bytes:
        wanted = None if names is None else set(names)
        return "".join(
            f"{key} {value}\n"
            for key, value in self._values.items()
            if wanted is None or key.partition("{")[0] in wanted
        ).encode()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()
