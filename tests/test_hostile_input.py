from __future__ import annotations

import gzip
import itertools
import math
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tests.daemon_process import DaemonProcess, config_of
from tests.loopback import CACHED, GENERATED, LABELS, PAGE, PROMPT, FakeEngine, Server, answer

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from tests.loopback import Talk

SECOND_NS = 10**9
HOUR_NS = 3600 * SECOND_NS
MIB = 2**20
TEXT = PAGE.read_bytes()
CHUNK = b"100000\r\n" + b"x" * MIB + b"\r\n"
STATUS = b"HTTP/1.1 200 OK\r\n"


def says(body: bytes, status: str = "200 OK", *headers: str) -> Talk:
    """Answer every request with the same."""
    whole = answer(body, status, *headers)

    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(whole)
        return True

    return talk


def pours(headers: bytes, pieces: Callable[[], Iterator[bytes]]) -> Talk:
    """Answer with pieces that may have no end, and close the connection."""

    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(STATUS + headers + b"\r\n")
        for piece in pieces():
            connection.sendall(piece)
        return False

    return talk


def greets(connection: socket.socket, _target: str) -> bool:
    connection.sendall(b"220 mail.example ESMTP\r\n")
    return False


def two_million_label_sets() -> Iterator[bytes]:
    for first in range(0, 2_000_000, 5000):
        yield b"".join(b'vllm:prompt_tokens_total{who="%d"} 1\n' % at for at in range(first, first + 5000))


def a_byte_a_second() -> Iterator[bytes]:
    while True:
        time.sleep(1)
        yield b"v"


def new_label_sets() -> Talk:
    """Pages within every limit, of which no two have a series in common."""
    numbers = itertools.count()

    def talk(connection: socket.socket, _target: str) -> bool:
        first = next(numbers) * 5000
        sample = f"vllm:prompt_tokens_total{{{LABELS},who="
        connection.sendall(answer("".join(f'{sample}"{at}"}} 1\n' for at in range(first, first + 5000)).encode()))
        return True

    return talk


class Hostile(NamedTuple):
    """An engine that is none, and what the log says of it."""

    talk: Talk
    reason: str


HOSTILE = {
    "HTML": Hostile(says(b"<!DOCTYPE html><html><body>It works</body></html>"), "not a metrics page"),
    "a 500": Hostile(says(b"boom", "500 Internal Server Error"), "HTTP 500"),
    "a redirect loop": Hostile(says(b"", "302 Found", "Location: /metrics"), "redirect loop"),
    "a redirect elsewhere": Hostile(
        says(b"", "307 Temporary Redirect", "Location: http://127.0.0.1:1/metrics?token=geheim"), "is not followed"
    ),
    "a truncated page": Hostile(
        pours(b"Content-Length: 50000\r\n", lambda: iter([TEXT[:20000]])), "the body ends after 20000 of 50000 bytes"
    ),
    "no UTF-8": Hostile(says(TEXT + b'vllm:lora_requests_info{x="\xff"} 1\n'), "invalid UTF-8"),
    "a series twice": Hostile(says(TEXT + f"{PROMPT} 1\n".encode()), "duplicate series"),
    "200 MB": Hostile(
        pours(b"Content-Length: 200000000\r\n", lambda: itertools.repeat(b"x" * MIB, 200)), "more than 8388608 bytes"
    ),
    "chunks without end": Hostile(
        pours(b"Transfer-Encoding: chunked\r\n", lambda: itertools.repeat(CHUNK)), "more than 8388608 bytes"
    ),
    "bytes without end": Hostile(pours(b"", lambda: itertools.repeat(b"#" * MIB)), "more than 8388608 bytes"),
    "a gzip bomb": Hostile(
        says(gzip.compress(bytes(200 * MIB)), "200 OK", "Content-Encoding: gzip"), "more than 8388608 bytes"
    ),
    "two million label sets": Hostile(pours(b"", two_million_label_sets), "more than 8388608 bytes"),
    "many lines": Hostile(says(b"a 1\n" * 200_000), "more than 100000 lines"),
    "a byte a second": Hostile(pours(b"Content-Length: 100\r\n", a_byte_a_second), "timed out after 0.5 s"),
    "no answer": Hostile(lambda connection, _: not connection.recv(1), "timed out after 0.5 s"),
    "a closed connection": Hostile(lambda _connection, _target: False, "closed the connection without an answer"),
    "an empty page": Hostile(says(b""), "holds no family that kvtally reads"),
    "another program": Hostile(says(b"# TYPE node_load1 gauge\nnode_load1 0.5\n"), "holds no family"),
    "no HTTP": Hostile(greets, "not an HTTP server"),
}


def flaps() -> Talk:
    """A true page, and then an error, and again."""
    turns = itertools.cycle((says(TEXT), says(b"", "503 Service Unavailable")))
    version = says(b'{"version":"0.32.0"}')

    def talk(connection: socket.socket, target: str) -> bool:
        turn = version if target == "/version" else next(turns)
        return turn(connection, target)

    return talk


class Siege:
    """One daemon among all of them, and what it had used when it was told to stop."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.good, self.odd, self.huge = (stack.enter_context(FakeEngine()) for _ in range(3))
        self.hostile = {name: stack.enter_context(Server(one.talk)) for name, one in HOSTILE.items()}
        self.flapping = stack.enter_context(Server(flaps()))
        self.fresh = stack.enter_context(Server(new_label_sets()))
        names = [self.good.name, self.odd.name, self.huge.name, self.flapping.origin, self.fresh.origin]
        self.daemon = DaemonProcess(folder, config_of([*names, *(one.origin for one in self.hostile.values())]))
        stack.enter_context(self.daemon)
        engines = (self.good, self.odd, self.huge)
        self.daemon.wait_until("the first scrapes", lambda: all(self.daemon.knows(one.name) for one in engines))
        began = time.monotonic()
        self._serve(2)
        true = {key: self.odd.value(key) for key in (PROMPT, CACHED, GENERATED)}
        self.odd.set(PROMPT, math.nan)
        self.odd.set(GENERATED, math.inf)
        self.huge.set(PROMPT, 1e300)
        self.huge.set(CACHED, -1e300)
        self._wait(2)
        for engine in (self.odd, self.huge):
            for key, value in true.items():
                engine.set(key, value)
        self._serve(3)
        self.high_water_mib = self._status("VmHWM") / 1024
        self.threads = self._status("Threads")
        fields = Path(f"/proc/{self.daemon.pid}/stat").read_text(encoding="ascii").split()
        self.cpu_seconds = (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")
        self.seconds = time.monotonic() - began
        self.status = self.daemon.stop()

    def _serve(self, scrapes: int) -> None:
        """Serve all the while."""
        until = self.good.scrapes + scrapes
        while self.good.scrapes < until:
            for engine in (self.good, self.odd, self.huge):
                engine.serve(100, 40, 7)
            time.sleep(0.1)

    def _wait(self, scrapes: int) -> None:
        for engine in (self.good, self.odd, self.huge):
            engine.wait_for_scrapes(scrapes)

    def _status(self, name: str) -> int:
        lines = Path(f"/proc/{self.daemon.pid}/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


@pytest.fixture(scope="module")
def siege(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Siege]:
    with ExitStack() as stack:
        yield Siege(tmp_path_factory.mktemp("siege"), stack)


def test_tokens_of_a_good_engine_are_exact_whatever_its_neighbours_do(siege: Siege) -> None:
    assert siege.good.served.prompt > 1000
    assert siege.daemon.tokens(siege.good.name) == siege.good.served


def test_ticks_of_a_good_engine_keep_their_cadence(siege: Siege) -> None:
    rows = siege.daemon.rows(siege.good.name)
    assert [row.missed for row in rows] == [0] * len(rows)
    assert len(rows) == pytest.approx((rows[-1].end_ns - rows[0].start_ns) / SECOND_NS, abs=1)


@pytest.mark.parametrize("name", HOSTILE)
def test_one_line_says_what_is_wrong_where_and_what_to_do_about(siege: Siege, name: str) -> None:
    source = f"engine:{siege.hostile[name].origin}"
    (line,) = siege.daemon.lines(" warning ", source)
    assert f"{source} could not be read reason=" in line
    assert HOSTILE[name].reason in line
    assert " hint=" in line


def test_an_engine_that_fails_every_other_time_is_told_of_once_a_minute(siege: Siege) -> None:
    source = f"engine:{siege.flapping.origin}"
    assert siege.flapping.requests > 4
    assert len(siege.daemon.lines(" warning ", source, "HTTP 503")) == 1
    assert len(siege.daemon.lines("scrapes_failed", source)) == 1


def test_the_token_of_a_redirect_stands_in_no_log(siege: Siege) -> None:
    assert siege.daemon.lines("is not followed")
    assert "geheim" not in siege.daemon.log()


def test_nan_and_infinity_are_unknown_for_their_time_and_nothing_is_lost(siege: Siege) -> None:
    query = (
        "SELECT prompt_tokens IS NULL, generated_tokens IS NULL, hbm_tokens IS NULL "
        "FROM engine_interval JOIN target ON target.id = target_id WHERE name = ? ORDER BY start_ns"
    )
    unknown = siege.daemon.query(query, f"{siege.odd.name}/0")
    assert (1, 1, 0) in unknown
    assert set(unknown) == {(1, 1, 0), (0, 0, 0)}
    assert siege.daemon.tokens(siege.odd.name) == siege.odd.served


def test_numbers_that_nothing_can_have_counted_are_findings_and_nothing_is_lost(siege: Siege) -> None:
    target = f"engine/{siege.huge.name}/0"
    found = siege.daemon.findings("counter_impossible", "counter_backwards")
    assert {kind for kind, where, _, _ in found if where == target} == {"counter_impossible", "counter_backwards"}
    assert siege.daemon.tokens(siege.huge.name) == siege.huge.served


def test_a_page_with_none_but_new_series_is_read_within_its_limits(siege: Siege) -> None:
    # 5000 counters of 1 on each page add up to the same each time
    rows = siege.daemon.query(
        "SELECT DISTINCT prompt_tokens FROM engine_interval JOIN target ON target.id = target_id WHERE name = ?",
        f"{siege.fresh.origin}/0",
    )
    assert rows == [(0,)]


def test_memory_threads_and_cpu_are_bounded(siege: Siege) -> None:
    assert siege.high_water_mib < 80  # 22 by itself, and five pages of 8 MiB at once
    assert siege.threads <= len(HOSTILE) + 8
    assert siege.cpu_seconds < siege.seconds


def test_it_stops_as_asked_and_no_line_is_a_traceback(siege: Siege) -> None:
    assert siege.status == 0
    assert "Traceback" not in siege.daemon.log()
