from __future__ import annotations

import gzip
import itertools
import os
import socket
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.daemon_process import DaemonProcess, config_of
from tests.loopback import LABELS, PAGE, PROMPT, FakeEngine, Server, Tokens, answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.loopback import Talk

MIB = 2**20
CHUNK = b"100000\r\n" + b"x" * MIB + b"\r\n"


def says(body: bytes, status: str = "200 OK", *headers: str) -> Talk:
    """Answer every request with the same."""
    whole = answer(body, status, *headers)

    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(whole)
        return True

    return talk


def sends_for_ever(head: bytes, pieces: Callable[[], Iterator[bytes]]) -> Talk:
    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(head)
        for piece in pieces():
            connection.sendall(piece)
        return False

    return talk


def endless_series() -> Iterator[bytes]:
    """Two million label sets, no two pages alike."""
    first = time.time_ns()
    for number in range(0, 2_000_000, 5000):
        lines = (f'vllm:prompt_tokens_total{{engine="0",model_name="tiny",who="{first + at}"}} 1\n' for at in range(number, number + 5000))
        yield "".join(lines).encode()


def slow() -> Iterator[bytes]:
    while True:
        time.sleep(1)
        yield b"v"


def is_silent(connection: socket.socket, _target: str) -> bool:
    connection.recv(1)  # until the client hangs up
    return False


def many_series() -> bytes:
    return "".join(f'vllm:prompt_tokens_total{{engine="{n}"}} 1\n' for n in range(150_000)).encode()


def fresh_series() -> Talk:
    """A page that is read in full each time, since all its label sets are new."""
    numbers = itertools.count()

    def talk(connection: socket.socket, _target: str) -> bool:
        n = next(numbers)
        body = "".join(
            f'vllm:prompt_tokens_total{{engine="0",model_name="m",who="{n}-{at}"}} 1\n' for at in range(19000)
        )
        connection.sendall(answer(body.encode()))
        return True

    return talk


TEXT = PAGE.read_bytes()
HOSTILE: dict[str, Talk] = {
    "html": says(b"<!DOCTYPE html><html><body>It works</body></html>"),
    "500": says(b"boom", "500 Internal Server Error"),
    "loop": says(b"", "302 Found", "Location: /metrics"),
    "elsewhere": says(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/metrics?token=geheim"),
    "truncated": sends_for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 50000\r\n\r\n", lambda: iter([TEXT[:20000]])),
    "not utf-8": says(TEXT + b'vllm:lora_requests_info{x="\xff"} 1\n'),
    "twice": says(TEXT + f"{PROMPT} 1\n".encode()),
    "announced": sends_for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 200000000\r\n\r\n", lambda: itertools.repeat(b"x" * MIB, 200)),
    "endless chunks": sends_for_ever(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", lambda: itertools.repeat(CHUNK)),
    "endless": sends_for_ever(b"HTTP/1.1 200 OK\r\n\r\n", lambda: itertools.repeat(b"#" * MIB)),
    "bomb": says(gzip.compress(bytes(200 * MIB), 9), "200 OK", "Content-Encoding: gzip"),
    "label sets": sends_for_ever(b"HTTP/1.1 200 OK\r\n\r\n", endless_series),
    "many series": says(many_series()),
    "fresh": fresh_series(),
    "slow": sends_for_ever(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", slow),
    "silent": is_silent,
    "closes": lambda _connection, _target: False,
    "empty": says(b""),
    "other": says(b"# TYPE node_load1 gauge\nnode_load1 0.5\n"),
}


def memory(pid):
    t = Path(f"/proc/{pid}/status").read_text()
    return [l for l in t.splitlines() if l.startswith(("VmHWM", "VmRSS"))]

def test_x(tmp_path: Path) -> None:
    with ExitStack() as stack:
        good = stack.enter_context(FakeEngine())
        only = os.environ.get("ONLY", "").split(",")
        hostile = {name: stack.enter_context(Server(talk)) for name, talk in HOSTILE.items() if only == [""] or name in only}
        t0 = time.monotonic()
        daemon = stack.enter_context(DaemonProcess(tmp_path, config_of([good.name, *(one.origin for one in hostile.values())])))
        daemon.wait_until("first", lambda: daemon.knows(good.name))
        print("first scrape after", time.monotonic() - t0)
        for n in range(80):
            good.serve(100, 50, 7)
            time.sleep(0.1)
        print(memory(daemon.pid))
        s = Path(f"/proc/{daemon.pid}/stat").read_text().split()
        print("cpu", int(s[13]) / 100, int(s[14]) / 100, "threads", s[19])
        t0 = time.monotonic()
        print("rc", daemon.stop(), time.monotonic() - t0)
        print(daemon.log())
        print(good.served, daemon.tokens(good.name))
        for r in daemon.rows(good.name):
            print((r.end_ns - r.start_ns) / 1e9, r.missed)
        for name, one in hostile.items():
            print(name, one.origin, one.requests)
