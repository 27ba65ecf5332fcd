from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from tests.bench import meter
from tests.daemon_process import DaemonProcess

if TYPE_CHECKING:
    from collections.abc import Iterator

MINUTES = float(os.environ.get("KVTALLY_SOAK_MINUTES", "15"))
SETTLED_SECONDS = 120.0  # by then every cache has its size
SAMPLE_SECONDS = 5.0
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


class Sample(NamedTuple):
    """What the daemon held at a moment since its start."""

    at_seconds: float
    resident_kib: int
    anonymous_kib: int
    descriptors: int
    threads: int


@pytest.fixture
def replayed_page() -> Iterator[int]:
    """The port of a page of 86 kB whose counters grow each second."""
    command = [sys.executable, "-m", "tests.bench.page_server", "1", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        yield int(json.loads(server.stdout.readline())["ports"][0])
        server.stdin.close()


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that refuses: each scrape of it fails, which must leave nothing behind."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield int(bound.getsockname()[1])


def taken(pid: int, began: float) -> Sample:
    process = Path("/proc", str(pid))
    descriptors, threads = (len(list((process / folder).iterdir())) for folder in ("fd", "task"))
    return Sample(time.monotonic() - began, *meter.memory(pid), descriptors, threads)


def watched(daemon: DaemonProcess, seconds: float) -> list[Sample]:
    began = time.monotonic()
    samples: list[Sample] = []
    while time.monotonic() - began < seconds:
        time.sleep(SAMPLE_SECONDS)
        assert daemon.process.poll() is None, daemon.log()
        samples.append(taken(daemon.pid, began))
    return samples


@pytest.mark.timeout(0)
def test_a_soak_leaves_memory_and_descriptors_flat(tmp_path: Path, replayed_page: int, closed_port: int) -> None:
    """KVTALLY_SOAK_MINUTES says for how long; what is compared begins after two minutes."""
    engines = "".join(f'[[engine]]\nurl = "http://127.0.0.1:{port}"\n' for port in (replayed_page, closed_port))
    config = f"[scrape]\ninterval_seconds = 1\ndiscover_every_seconds = 5\nports = []\n{engines}"
    name = f"127.0.0.1:{replayed_page}"
    with DaemonProcess(tmp_path, config) as daemon:
        daemon.wait_until("the first scrape", lambda: daemon.knows(name))
        cpu_ns = meter.cpu_ns(daemon.pid)
        samples = watched(daemon, MINUTES * 60)
        cpu_ns = meter.cpu_ns(daemon.pid) - cpu_ns
        assert daemon.stop() == 0
    settled = [one for one in samples if one.at_seconds >= SETTLED_SECONDS]
    assert len(settled) > 1, "KVTALLY_SOAK_MINUTES must be more than 2"
    first, last = settled[0], settled[-1]
    grown_kib = max(one.resident_kib for one in settled) - first.resident_kib
    print(  # noqa: T201  # what a soak is run for
        f"\n{last.at_seconds:.0f} s: RSS {first.resident_kib} -> {last.resident_kib} KiB (most grown by {grown_kib}), "
        f"anonymous {first.anonymous_kib} -> {last.anonymous_kib} KiB, descriptors {first.descriptors} -> "
        f"{last.descriptors}, threads {first.threads} -> {last.threads}, "
        f"CPU {cpu_ns / 1e9 / last.at_seconds:.3%} of a core"
    )
    assert grown_kib < 1024
    # a look around this host holds a few for a moment
    assert min(one.descriptors for one in settled[len(settled) // 2 :]) <= min(one.descriptors for one in settled)
    assert last.threads <= first.threads + 1
    rows = daemon.rows(name)
    assert len(rows) > MINUTES * 60 * 0.98
