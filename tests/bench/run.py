"""Measures kvtally's daemon and its peers side by side in one run, and prints what it costs against them.

    python -m tests.bench.run [--quick] [--json FILE]

README.md says what is measured and how. Ratios are between processes that ran at the same time on the same page.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.request import ProxyHandler, build_opener

from tests.bench import ledger_growth, meter
from tests.bench.scrapers import KVTALLY, WANTED, Kitchen, Scraper, missing

if TYPE_CHECKING:
    from collections.abc import Sequence

BASE = "Prometheus, keep list"  # every ratio is against this one
ROOT = Path(__file__).parents[2]
GATES = {"cpu_ratio": (0.67, 0.42), "resident_mib": (45.0, 22.0), "bytes_per_interval": (150.0, 100.0)}
_OPENER = build_opener(ProxyHandler({}))


class Plan(NamedTuple):
    """How long is measured."""

    warm_up_seconds: float
    window_seconds: float
    windows: int


class Edge(NamedTuple):
    """What a process had used up, and how many pages it had read, at the edge of a window."""

    cpu_ns: int
    children_cpu_ns: int
    pages: int


class Row(NamedTuple):
    """One program's figures."""

    name: str
    version: str
    page_bytes: int
    scrapes: int
    milliseconds: list[float]  # CPU per scrape, one a window
    ratios: list[float]  # the same over the base's in the same window
    resident_mib: float
    anonymous_mib: float
    children_milliseconds: float  # CPU of child processes, per scrape


def main() -> None:
    """Run all, print a table, write JSON where asked; exit 1 if something could not be measured."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.run", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="half a minute instead of a quarter of an hour")
    parser.add_argument("--windows", type=int, help="windows of 60 s (quick: 10 s) to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--kvtally", default=shlex.join(KVTALLY), metavar="COMMAND", help="the kvtally to measure")
    options = parser.parse_args()
    if fault := missing():
        sys.exit(f"bench: {fault}")
    plan = Plan(5, 10, options.windows or 2) if options.quick else Plan(60, 60, options.windows or 15)
    with tempfile.TemporaryDirectory(prefix="kvtally-bench-") as folder:
        result = measure(Path(folder), plan, shlex.split(options.kvtally))
        result["replayed_hour"] = ledger_growth.measure(Path(folder))
    sys.stdout.write(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


def measure(folder: Path, plan: Plan, kvtally: Sequence[str]) -> dict[str, Any]:
    """Start everything, read the clocks at the edges of the windows, and stop everything."""
    with ExitStack() as stack:
        with_agent = shutil.which("vmagent") is not None
        server = stack.enter_context(_page_server(plain=4 + with_agent, understanding=2))
        assert server.stdout is not None
        ports = json.loads(server.stdout.readline())["ports"]
        scrapers = _scrapers(Kitchen(folder, server.pid, kvtally), ports, with_agent=with_agent)
        running = []
        for number, scraper in enumerate(scrapers):
            running.append(scraper.start())
            stack.callback(_end, running[-1])
            if number + 1 < len(scrapers):
                time.sleep(0.37)  # so that they do not all read at one moment
        time.sleep(plan.warm_up_seconds)
        say(f"{len(scrapers)} programs run; measuring {plan.windows} windows of {plan.window_seconds:g} s")
        ledgers = [ledger_growth.size(scraper.ledger) if scraper.ledger else None for scraper in scrapers]
        edges = [_edges(scrapers, running)]
        began = time.monotonic()
        for window in range(1, plan.windows + 1):
            time.sleep(max(0.0, began + window * plan.window_seconds - time.monotonic()))
            edges.append(_edges(scrapers, running))
        rows = _rows(scrapers, running, edges)
        growth = {
            scraper.name: ledger_growth.size(scraper.ledger).since(before)
            for scraper, before in zip(scrapers, ledgers, strict=True)
            if scraper.ledger and before
        }
        served = _served(ports[-1])
    return {
        "taken_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "plan": plan._asdict(),
        "page": {"wanted_names": len(WANTED), "restricted_bytes": served["page_bytes"]},
        "rows": [row._asdict() for row in rows],
        "ledger_bytes_per_engine_interval": growth,
    }


def _scrapers(kitchen: Kitchen, ports: Sequence[int], *, with_agent: bool) -> list[Scraper]:
    """All programs; those on the last two ports ask a server that understands name[]."""
    scrapers = [
        kitchen.kvtally("kvtally", ports[0]),
        kitchen.prometheus(BASE, ports[1]),
        kitchen.kvtally("kvtally, host and GPU too", ports[2], host=True),
        kitchen.prometheus("Prometheus, whole page", ports[3], keep=False),
    ]
    if with_agent:
        scrapers.append(kitchen.vmagent("vmagent, keep list", ports[4]))
    scrapers.append(kitchen.kvtally("kvtally, restricted page", ports[-2], restrict=True))
    scrapers.append(kitchen.prometheus("Prometheus, restricted page", ports[-1], restrict=True))
    return scrapers


def _page_server(*, plain: int, understanding: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.bench.page_server", str(plain), str(understanding)]
    # it ends when its stdin does, which leaving the context brings about
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _edges(scrapers: Sequence[Scraper], running: Sequence[subprocess.Popen[bytes]]) -> list[Edge]:
    edges = []
    for scraper, process in zip(scrapers, running, strict=True):
        if process.poll() is not None:
            tail = Path(scraper.folder, "log").read_text(errors="replace")[-2000:]
            sys.exit(f"bench: {scraper.name} ended with {process.returncode}:\n{tail}")
        own, children = meter.cpu_ns(process.pid), meter.children_cpu_ns(process.pid)
        edges.append(Edge(own, children, _served(scraper.page_port)["pages"]))
    return edges


def _rows(
    scrapers: Sequence[Scraper], running: Sequence[subprocess.Popen[bytes]], edges: Sequence[Sequence[Edge]]
) -> list[Row]:
    costs = {}
    for scraper, own in zip(scrapers, zip(*edges, strict=True), strict=True):
        if any(after.pages == before.pages for before, after in pairwise(own)):
            sys.exit(f"bench: {scraper.name} reads no pages; is its configuration refused?")
        costs[scraper.name] = [
            (after.cpu_ns - before.cpu_ns) / 1e6 / (after.pages - before.pages) for before, after in pairwise(own)
        ]
    rows = []
    for position, (scraper, process) in enumerate(zip(scrapers, running, strict=True)):
        memory = meter.memory(process.pid)
        first, last = edges[0][position], edges[-1][position]
        own_costs = costs[scraper.name]
        rows.append(
            Row(
                scraper.name,
                scraper.version(),
                int(_served(scraper.page_port)["page_bytes"]),
                last.pages - first.pages,
                own_costs,
                [cost / base for cost, base in zip(own_costs, costs[BASE], strict=True)],
                memory.resident_kib / 1024,
                memory.anonymous_kib / 1024,
                (last.children_cpu_ns - first.children_cpu_ns) / 1e6 / (last.pages - first.pages),
            )
        )
    return rows


def _served(port: int) -> dict[str, int]:
    with _OPENER.open(f"http://127.0.0.1:{port}/served", timeout=5) as answer:
        served: dict[str, int] = json.load(answer)
        return served


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    machine, plan = result["machine"], result["plan"]
    cells = [("", "page kB", "CPU ms per scrape", f"x {BASE}", "RSS MiB (anon)", "children ms")]
    cells += [
        (
            row["name"],
            f"{row['page_bytes'] / 1000:.1f}",
            _spread(row["milliseconds"]),
            _spread(row["ratios"]),
            f"{row['resident_mib']:.1f} ({row['anonymous_mib']:.0f})",
            f"{row['children_milliseconds']:.2f}",
        )
        for row in result["rows"]
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        f"{result['taken_at']}, {machine['processor']}, {machine['cores']} cores, Python {result['python']}",
        f"median [least-most] of {plan['windows']} windows of {plan['window_seconds']:g} s",
        "",
        *("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells),
    ]
    return "\n".join([*lines, "", *ledger_growth.lines(result), "", *_verdicts(result)]) + "\n"


def _verdicts(result: dict[str, Any]) -> list[str]:
    bare = result["rows"][0]
    figures = {
        "cpu_ratio": statistics.median(bare["ratios"]),
        "resident_mib": bare["resident_mib"],
        "bytes_per_interval": result["replayed_hour"]["bytes_per_engine_interval"],
    }
    said = []
    for key, (gate, aim) in GATES.items():
        verdict = "aim met" if figures[key] <= aim else "gate met" if figures[key] <= gate else "GATE MISSED"
        said.append(f"{key.replace('_', ' ')}: {figures[key]:.4g} (gate {gate:g}, aim {aim:g}): {verdict}")
    return said


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}-{max(values):.2f}]"


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def say(text: str) -> None:
    """Tell how far it is."""
    sys.stderr.write(f"bench: {text}\n")


if __name__ == "__main__":
    main()
