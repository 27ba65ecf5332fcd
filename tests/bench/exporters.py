"""What each exporter costs `kvtally run`: CPU and memory of the daemon, and of the children that it starts.

    python -m tests.bench.exporters [--seconds SECONDS]

Five daemons at once, each on an engine of its own under the same load, at the default interval of five seconds.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tests.bench import meter
from tests.daemon_process import DaemonProcess
from tests.loopback import FakeEngine
from tests.otlp_receiver import OtlpReceiver

if TYPE_CHECKING:
    from collections.abc import Sequence

WARM_UP_SECONDS = 90.0
ACCEPT = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"


class Case(NamedTuple):
    """One daemon: where it serves, and what is done with it."""

    name: str
    listen: str = ""
    scraped_every_seconds: float = 0.0
    is_pushing: bool = False


CASES = (
    Case("no exporter"),
    Case("/metrics, nobody asks", "127.0.0.1:0"),
    Case("/metrics every 15 s", "127.0.0.1:0", 15),
    Case("OTLP every 60 s", is_pushing=True),
    Case("both", "127.0.0.1:0", 15, is_pushing=True),
)


class Running:
    """A daemon that is watched."""

    def __init__(self, case: Case, folder: Path, receiver: OtlpReceiver, stack: ExitStack) -> None:
        folder.mkdir()
        self.case = case
        self._engine = stack.enter_context(FakeEngine())
        config = (
            "[scrape]\ndiscover = false\n[gpu]\nenabled = false\n"
            f'[export.prometheus]\nlisten = "{case.listen}"\n[[engine]]\nurl = "http://{self._engine.name}"\n'
        )
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint} if case.is_pushing else {}
        self._daemon = DaemonProcess(folder, config).start(**environment)
        stack.push(self._daemon)
        self._daemon.wait_until("it has started", lambda: self._daemon.lines("started"))
        self._next_scrape = time.monotonic()
        self.pages = 0
        self.page_bytes = 0
        self.child_mib = 0.0

    def step(self) -> None:
        """Serve a request, scrape where it is time, and look at the child that runs."""
        self._engine.serve(prompt=900, cached=300, generated=50)
        every = self.case.scraped_every_seconds
        if every and time.monotonic() >= self._next_scrape:
            self._next_scrape += every
            found = re.search(r"metrics=127\.0\.0\.1:(\d+)", self._daemon.log())
            connection = HTTPConnection("127.0.0.1", int(found[1]) if found else 0, timeout=10)
            connection.request("GET", "/metrics", headers={"Accept": ACCEPT})
            self.page_bytes = len(connection.getresponse().read())
            self.pages += 1
            connection.close()
        with suppress(OSError, KeyError):  # it has ended meanwhile
            pid = self._daemon.pid
            for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
                self.child_mib = max(self.child_mib, meter.memory(int(child)).resident_kib / 1024)

    def used(self) -> tuple[int, int]:
        """CPU of the daemon and of its children so far."""
        return meter.cpu_ns(self._daemon.pid), meter.children_cpu_ns(self._daemon.pid)

    def memory(self) -> meter.Memory:
        return meter.memory(self._daemon.pid)


def main() -> None:
    """Run them and print a table."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.exporters", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="how long is measured, after 90 s of warm-up")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvtally-exporters-") as folder, ExitStack() as stack:
        receiver = stack.enter_context(OtlpReceiver())
        running = [Running(case, Path(folder, str(at)), receiver, stack) for at, case in enumerate(CASES)]
        _step_until(running, time.monotonic() + WARM_UP_SECONDS)
        before, began = [one.used() for one in running], time.monotonic()
        _step_until(running, began + options.seconds)
        took = time.monotonic() - began
        after = [one.used() for one in running]
        sys.stdout.write(_table(running, before, after, took))
        sys.stdout.write(f"pushes taken: {len(receiver.pushes)}; threads here: {threading.active_count()}\n")


def _step_until(running: Sequence[Running], deadline: float) -> None:
    while time.monotonic() < deadline:
        for one in running:
            one.step()
        time.sleep(0.1)


def _table(
    running: Sequence[Running], before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]], took: float
) -> str:
    lines = [f"{'':24}{'RSS MiB (anon)':>16}{'CPU %':>8}{'children %':>12}{'child MiB':>11}{'pages':>7}{'kB':>6}"]
    for one, (own, children), (own_after, children_after) in zip(running, before, after, strict=True):
        memory = one.memory()
        shown = f"{memory.resident_kib / 1024:.1f} ({memory.anonymous_kib / 1024:.1f})"
        cpu, spent = ((late - early) / 1e7 / took for early, late in ((own, own_after), (children, children_after)))
        lines.append(
            f"{one.case.name:24}{shown:>16}{cpu:8.3f}{spent:12.2f}{one.child_mib:11.0f}"
            f"{one.pages:7}{one.page_bytes / 1000:6.1f}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
