"""Replays recorded metrics pages on loopback for ever: one page a second, counters that never go back.

    python -m tests.bench.page_server 2 1

prints {"ports": [...]} for two ports that ignore name[] and one that understands it, and serves until stdin ends.
"""

from __future__ import annotations

import json
import socketserver
import sys
import tarfile
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, urlsplit

from prometheus_client.utils import floatToGoString

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

PAGES = Path(__file__).parent / "pages" / "h100-llama8b-lmc-cpu.tar.xz"
PAGE_SECONDS = 1.0
_CUMULATIVE = {"counter", "histogram", "summary"}
_SCALE = 10**20  # finer than any value of the recording
_LINE_BYTES = 65536
_TEXT: Callable[[float], str] = floatToGoString  # it has no types of its own


def recorded_pages(path: Path = PAGES) -> list[bytes]:
    """The pages of a packed recording, in time order."""
    with tarfile.open(path) as archive:
        members = sorted((member for member in archive if member.isfile()), key=lambda member: member.name)
        return [archive.extractfile(member).read() for member in members]  # type: ignore[union-attr]  # files only


class _Line(NamedTuple):
    """One line of every page: its text up to the value, which a comment lacks."""

    text: bytes
    family: str
    name: str = ""  # of the sample; "" for a comment


class EndlessReplay:
    """An endless sequence of pages: the recording's own increments again and again, on top of what was counted.

    Counters are added up as scaled integers, so that no rounding takes one back. ValueError if the series change
    within the recording.
    """

    def __init__(self, pages: Sequence[bytes]) -> None:
        self._lines, cumulative, texts = _taken_apart(pages[0])
        self._gauges = [at for at, counts in enumerate(cumulative) if not counts]
        self._counters = [at for at, counts in enumerate(cumulative) if counts]
        self._texts = []
        self._values = []
        for number, page in enumerate(pages):
            lines, _, texts = _taken_apart(page)
            if lines != self._lines:
                raise ValueError(f"the series of page {number} are not those of the first")
            self._texts.append(texts)
            self._values.append([int(Decimal(texts[at].decode()) * _SCALE) for at in self._counters])
        first, last = self._values[0], self._values[-1]
        self._growth = [end - begin for begin, end in zip(first, last, strict=True)]

    @property
    def series(self) -> int:
        """Number of series on a page."""
        return len(self._gauges) + len(self._counters)

    def page(self, number: int, names: frozenset[str] | None = None) -> bytes:
        """The page of second `number`; with `names` only the samples of those names and their families' comments."""
        # the first page plus a whole round's growth is the last page: that one is left out of each round
        rounds, step = divmod(number, len(self._texts) - 1)
        values = list(self._texts[step])
        for at, count, growth in zip(self._counters, self._values[step], self._growth, strict=True):
            values[at] = _TEXT((count + rounds * growth) / _SCALE).encode()
        rest = iter(values)
        whole = [(line, line.text + next(rest) if line.name else line.text) for line in self._lines]
        if names is None:
            return b"".join(text + b"\n" for _, text in whole)
        shown = {line.family for line in self._lines if line.name in names}
        return b"".join(
            text + b"\n" for line, text in whole if (line.name in names if line.name else line.family in shown)
        )


# # HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# # TYPE vllm:prompt_tokens_total counter
# vllm:prompt_tokens_total{engine="0",model_name="llama-8b"} 2.666868e+06
def _taken_apart(page: bytes) -> tuple[list[_Line], list[bool], list[bytes]]:
    """The lines of a page, and of each sample whether it adds up over time and the text of its value."""
    lines: list[_Line] = []
    cumulative: list[bool] = []
    values: list[bytes] = []
    family, kind = "", ""
    for raw in page.splitlines():
        if raw.startswith(b"#"):
            words = raw.decode().split(" ", 3)
            family = words[2]
            kind = words[3] if words[1] == "TYPE" else ""
            lines.append(_Line(raw, family))
        else:
            key, _, value = raw.rpartition(b" ")
            lines.append(_Line(key + b" ", family, key.partition(b"{")[0].decode()))
            cumulative.append(kind in _CUMULATIVE)
            values.append(value)
    return lines, cumulative, values


class Stage:
    """What is served at this moment; the next answer is made ready ahead of its time."""

    def __init__(self, replay: EndlessReplay) -> None:
        self._replay = replay
        self._asked: set[frozenset[str] | None] = {None}
        self._began = time.monotonic()
        self._answers: dict[tuple[int, frozenset[str] | None], bytes] = {}

    def answer(self, names: frozenset[str] | None) -> bytes:
        """The whole HTTP answer of this second."""
        number = int((time.monotonic() - self._began) / PAGE_SECONDS)
        self._asked.add(names)
        return self._answers.get((number, names)) or self._made(number, names)

    def _made(self, number: int, names: frozenset[str] | None) -> bytes:
        body = self._replay.page(number, names)
        return _whole_answer(b"text/plain; version=0.0.4; charset=utf-8", body)

    def run(self) -> None:
        """Make the answers of each second half a second before it begins, for ever."""
        number = 1
        while True:
            time.sleep(max(0.0, self._began + (number - 0.5) * PAGE_SECONDS - time.monotonic()))
            made = {(number, names): self._made(number, names) for names in tuple(self._asked)}
            kept = {key: answer for key, answer in self._answers.items() if key[0] == number - 1}
            self._answers = kept | made
            number += 1


class PageServer(socketserver.ThreadingTCPServer):
    """One port; counts the pages that it serves."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, stage: Stage, *, understands_names: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.stage = stage
        self.understands_names = understands_names
        self.served = 0
        self.page_bytes = 0

    @property
    def port(self) -> int:
        """The port that it listens on."""
        return int(self.server_address[1])


class _Connection(socketserver.StreamRequestHandler):
    """Answers GET /metrics, /version as vLLM does, /served with what was served here; takes any POST."""

    disable_nagle_algorithm = True
    server: PageServer

    def handle(self) -> None:
        while line := self.rfile.readline(_LINE_BYTES):
            method, target, _ = line.decode("latin-1").split(" ", 2)
            length = 0
            while (header := self.rfile.readline(_LINE_BYTES)) not in {b"\r\n", b""}:
                if header.lower().startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            self.rfile.read(length)
            self.wfile.write(b"HTTP/1.1 204 No Content\r\n\r\n" if method == "POST" else self._answer(target))

    def _answer(self, target: str) -> bytes:
        path = urlsplit(target).path
        if path == "/version":
            return _small({"version": "0.25.1"})
        if path == "/served":
            return _small({"pages": self.server.served, "page_bytes": self.server.page_bytes})
        names = parse_qs(urlsplit(target).query).get("name[]", [])
        # without the slash, vLLM's /metrics ignores the parameter
        restricted = self.server.understands_names and path == "/metrics/" and names
        answer = self.server.stage.answer(frozenset(names) if restricted else None)
        self.server.served += 1
        self.server.page_bytes = len(answer) - answer.index(b"\r\n\r\n") - 4
        return answer


def _small(body: object) -> bytes:
    return _whole_answer(b"application/json", json.dumps(body).encode())


def _whole_answer(content_type: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n" % (content_type, len(body))
    return head + body


def servers(plain: int, understanding: int, pages: Iterable[bytes]) -> list[PageServer]:
    """Start to replay on so many ports, in threads of this process; the plain ones come first."""
    stage = Stage(EndlessReplay(list(pages)))
    made = [PageServer(stage, understands_names=number >= plain) for number in range(plain + understanding)]
    for run in (stage.run, *(server.serve_forever for server in made)):
        threading.Thread(target=run, daemon=True).start()
    return made


def main() -> None:
    """Serve until stdin ends, that is until the process that started this one has gone."""
    made = servers(int(sys.argv[1]), int(sys.argv[2]), recorded_pages())
    sys.stdout.write(json.dumps({"ports": [server.port for server in made]}) + "\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
