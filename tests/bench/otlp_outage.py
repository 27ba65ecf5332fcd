"""An OTLP backend that is stopped under load and started again: what that costs `kvtally run`, and what is lost.

    python -m tests.bench.otlp_outage [--outage SECONDS] [--receiver PYTHON]

The receiver is `oteltap` of PyPI (PYTHON -m oteltap; pip install oteltap), none of whose code is ours. Pushes come
every two seconds. Exit status 1 if the sums that it holds at the end are not those of the ledger and of the engine.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench import meter
from tests.daemon_process import DaemonProcess
from tests.loopback import FakeEngine
from tests.otlp_receiver import free_port

if TYPE_CHECKING:
    from typing import TextIO

AROUND_SECONDS = 60.0  # before the outage and after it
REQUESTS_EVERY_SECONDS = 0.05
LATE_SECONDS = 60.0  # that the last sums may take


class Sums(NamedTuple):
    """Tokens of the newest push."""

    prompt: float
    generated: float


class Edge(NamedTuple):
    """What the daemon holds and has used up."""

    resident_mib: float
    anonymous_mib: float
    cpu_seconds: float
    children_seconds: float


class Receiver:
    """oteltap, whose output is kept over its own restarts."""

    def __init__(self, python: str, port: int, folder: Path) -> None:
        self._command = [python, "-u", "-m", "oteltap", "--port", str(port)]
        self._path = folder / "received.ndjson"
        self._output: TextIO | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._output = self._path.open("a", encoding="utf-8")
        self._process = subprocess.Popen(self._command, stdout=self._output)

    def stop(self) -> None:
        if self._process is not None and self._output is not None:
            self._process.terminate()
            self._process.wait()
            self._output.close()

    def pushes(self) -> list[Sums]:
        """The sums of every push, in order."""
        found: list[Sums] = []
        told: dict[str, float] = {}
        for line in self._path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the line that says that it listens, or one that is being written
                metric = json.loads(line)
                points = [float(_value(point)) for point in metric.get("sum", {}).get("dataPoints", ())]
                told[metric["name"]] = sum(points)
                if metric["name"] == "kvtally.generated.tokens":
                    found.append(Sums(told.get("kvtally.prompt.tokens", 0), told[metric["name"]]))
        return found


def _value(point: dict[str, Any]) -> Any:
    return point.get("asInt", point.get("asDouble"))


def main() -> None:
    """Run it, print what was seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.otlp_outage", description=__doc__.splitlines()[0])
    parser.add_argument("--outage", type=float, default=600, metavar="SECONDS", help="how long the receiver is away")
    parser.add_argument("--receiver", default=sys.executable, metavar="PYTHON", help="a Python that has oteltap")
    options = parser.parse_args()
    if subprocess.run([options.receiver, "-c", "import oteltap"], check=False, capture_output=True).returncode:
        sys.exit("otlp_outage: oteltap is not there: pip install oteltap, in any environment (--receiver PYTHON)")
    with tempfile.TemporaryDirectory(prefix="kvtally-outage-") as folder, free_port() as port:
        receiver = Receiver(options.receiver, port, Path(folder))
        try:
            is_whole = _run(Path(folder), receiver, port, options.outage)
        finally:
            receiver.stop()
    sys.exit(0 if is_whole else 1)


def _run(folder: Path, receiver: Receiver, port: int, outage_seconds: float) -> bool:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "OTEL_METRIC_EXPORT_INTERVAL": "2000",
    }
    receiver.start()
    with FakeEngine() as engine:
        daemon = DaemonProcess(folder, _config(engine)).start(**environment)
        try:
            daemon.wait_until("it reads the engine", lambda: daemon.knows(engine.name))
            edges = _under_load(daemon, engine, receiver, outage_seconds)
            served, ledger = engine.served, None
            deadline = time.monotonic() + LATE_SECONDS
            while time.monotonic() < deadline:
                ledger = daemon.tokens(engine.name)
                last = receiver.pushes()[-1]
                if ledger == served and last == (served.prompt, served.generated):
                    break
                time.sleep(1)
            (group,) = daemon.cost()["groups"]
            tokens = group["tokens"]
            status = daemon.stop()
            told = len(daemon.lines("OTLP: not sent"))
        finally:
            if daemon.process.poll() is None:
                daemon.kill()
    _show(edges)
    _say(f"served {served.prompt} + {served.generated} tokens; ledger {ledger}; last push {last}")
    _say(f"kvtally cost: prompt {tokens['prompt']}, generated {tokens['generated']}; exit {status}; complaints {told}")
    _say(f"gaps between intervals: {[gap for gap in daemon.gaps() if gap[1]]}")
    sums = receiver.pushes()
    _say(f"pushes taken: {len(sums)}, each sum at least the one before: {sums == sorted(sums)}")
    same = {(served.prompt, served.generated), tuple(map(int, last)), (tokens["prompt"], tokens["generated"])}
    return len(same) == 1 and sums == sorted(sums) and status == 0


def _under_load(
    daemon: DaemonProcess, engine: FakeEngine, receiver: Receiver, outage_seconds: float
) -> list[tuple[str, Edge]]:
    """What the daemon held at the edges of the three phases, and every minute of the outage."""
    is_over = threading.Event()
    load = threading.Thread(target=_serve, args=(engine, is_over))
    load.start()
    try:
        time.sleep(AROUND_SECONDS)
        edges = [("before", _edge(daemon.pid))]
        receiver.stop()
        began = time.monotonic()
        while (left := outage_seconds - (time.monotonic() - began)) > 0:
            time.sleep(min(60, left))
            edges.append((f"away for {time.monotonic() - began:.0f} s", _edge(daemon.pid)))
        receiver.start()
        time.sleep(AROUND_SECONDS)
        edges.append(("after", _edge(daemon.pid)))
    finally:
        is_over.set()
        load.join()
    return edges


def _serve(engine: FakeEngine, is_over: threading.Event) -> None:
    while not is_over.wait(REQUESTS_EVERY_SECONDS):
        engine.serve(prompt=900, cached=300, generated=50)


def _edge(pid: int) -> Edge:
    memory = meter.memory(pid)
    return Edge(
        memory.resident_kib / 1024,
        memory.anonymous_kib / 1024,
        meter.cpu_ns(pid) / 1e9,
        meter.children_cpu_ns(pid) / 1e9,
    )


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _show(edges: list[tuple[str, Edge]]) -> None:
    _say(f"{'':18}{'RSS MiB':>9}{'anon':>7}{'CPU s':>8}{'children s':>12}")
    for name, edge in edges:
        _say(
            f"{name:18}{edge.resident_mib:9.2f}{edge.anonymous_mib:7.2f}"
            f"{edge.cpu_seconds:8.2f}{edge.children_seconds:12.2f}"
        )


def _config(engine: FakeEngine) -> str:
    return (
        "[scrape]\ninterval_seconds = 1\ndiscover = false\n[gpu]\nenabled = false\n"
        f'[export.prometheus]\nlisten = ""\n[[engine]]\nurl = "http://{engine.name}"\n'
    )


if __name__ == "__main__":
    main()
