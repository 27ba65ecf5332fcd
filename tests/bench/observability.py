"""The dashboard and the alerts against a real Prometheus and a real VictoriaMetrics that scrape a kvtally.

    python -m tests.bench.observability [--recording DIR] [--seconds N] [--data FILE]

A recording (the demo's, unless another is named) runs into a ledger in real time, with its times moved to now; beside
it an NFS mount and a cache that counts its bytes, made up, since no recording has them. Then every query of the
dashboard is run against both servers, and what they say of one window is laid beside `kvtally cost` and `kvtally
savings`. Exit status 1 where a panel has no data, a figure differs, or promtool complains.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from tests.bench.observability_figures import Run, fleet_faults, part_faults, say, window_faults
from tests.bench.observability_ledger import NANO, GrowingLedger
from tests.bench.observability_servers import missing, prometheus, victoria_metrics

from kvtally.agent.cli.demo import RECORDING
from kvtally.agent.recording import open_recording

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from tests.bench.observability_servers import Series, Server

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
SCRAPE_SECONDS = 2
RATE_SECONDS = 20
UNSET = {"cluster", "namespace", "tenant"}


def main() -> int:
    """Run it all and print what came of it."""
    options = _options()
    if lacking := missing():
        say(f"not here: {', '.join(lacking)} (apt install prometheus victoria-metrics)")
        return 2
    recording = open_recording(options.recording)
    seconds = min(options.seconds, (recording.last_ns - recording.first_ns) / NANO)
    with tempfile.TemporaryDirectory() as place:
        ledger = GrowingLedger(Path(place), recording, seconds, SCRAPE_SECONDS)
        servers: list[Server] = []
        try:
            servers.append(prometheus(Path(place), ledger.port, RULES, SCRAPE_SECONDS))
            servers.append(victoria_metrics(Path(place), ledger.port, SCRAPE_SECONDS))
            run = _scraped(ledger, servers, seconds)
            told = " and ".join(f"{server.name} {server.version()}" for server in servers)
            say(
                f"{told} scraped {recording.name} (RECORDED) every {SCRAPE_SECONDS} s for {run.end - run.start:.0f} s\n"
            )
            board = json.loads((DEPLOY / "grafana" / "kvtally.json").read_text())
            faults = [
                *_variables(board, run),
                *_panels(board, run, options.data),
                *window_faults(run),
                *part_faults(run),
                *fleet_faults(_targets(board, run), run),
            ]
            faults += _promtool(ledger.port) + _alerts(servers[0])
        finally:
            for server in servers:
                server.close()
            ledger.close()
    say("\n" + ("\n".join(f"FAULT: {fault}" for fault in faults) or "no fault"))
    return 1 if faults else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recording", default=str(files("kvtally.agent") / "demo" / RECORDING))
    parser.add_argument("--seconds", type=float, default=600.0, help="of the recording, from its start")
    parser.add_argument("--data", type=Path, help="write what the panels' queries gave, as JSON")
    return parser.parse_args()


def _scraped(ledger: GrowingLedger, servers: Sequence[Server], seconds: float) -> Run:
    """Wait until the recording is in the ledger whole, and its last figures are scraped."""
    start = time.time()
    while not ledger.is_over:
        time.sleep(0.2)
    if ledger.failure is not None:
        raise ledger.failure
    ledger.renew()
    time.sleep(4 * SCRAPE_SECONDS)
    return Run(ledger, servers, start, start + seconds * 0.4, time.time())


def _filled(expr: str, run: Run) -> str:
    """A query of the dashboard as Grafana sends it, with every model, cluster, namespace and tenant chosen."""
    words = {
        "__rate_interval": f"{RATE_SECONDS}s",
        "__range": f"{run.end - run.start:.0f}s",
        "window": "1h",
        "currency": "USD",
    }
    words |= dict.fromkeys(("model", "cluster", "namespace", "tenant", "instance"), ".*")
    for name, value in words.items():
        expr = expr.replace(f"${name}", value)
    return expr


def _variables(board: Mapping[str, Any], run: Run) -> Iterator[str]:
    """What the variables of the dashboard can be chosen from; a label that nobody sets has no value."""
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric, label = variable["definition"].removeprefix("label_values(").removesuffix(")").split(", ")
            values = [server.label_values(metric, label) for server in run.servers]
            say(f"variable {variable['name']:<10} {' '.join(values[0]) or '(none)'}")
            if sorted(values[0]) != sorted(values[1]) or (label not in UNSET and not values[0]):
                yield f"variable {variable['name']}: {values}"


def _panels(board: Mapping[str, Any], run: Run, data: Path | None) -> list[str]:
    faults, kept = [], []
    say(f"\n{'series that each query returns':<62}{'  '.join(server.name for server in run.servers)}")
    for panel in board["panels"]:
        if panel["type"] == "row":
            kept.append({"row": panel["title"]})
            continue
        drawn: list[dict[str, Any]] = []
        for target in panel["targets"]:
            answers = [_asked(target, server, run) for server in run.servers]
            counts = [len(answer) for answer in answers]
            say(f"  {panel['title'][:54]:<56}{target['refId']}  {counts[0]:>8}  {counts[1]:>15}")
            if counts[0] != counts[1]:
                faults.append(f"{panel['title']} {target['refId']}: {counts} series")
            drawn += [{"legend": target["legendFormat"], **series._asdict()} for series in answers[0]]
        if not drawn:
            faults.append(f"{panel['title']} has no data")
        kept.append({"panel": panel, "series": drawn})
    if data is not None:
        data.write_text(json.dumps(kept))
    return faults


def _targets(board: Mapping[str, Any], run: Run) -> list[tuple[str, str]]:
    """Every query with its panel's title."""
    panels = (panel for panel in board["panels"] if panel["type"] != "row")
    return [(panel["title"], _filled(target["expr"], run)) for panel in panels for target in panel["targets"]]


def _asked(target: Mapping[str, Any], server: Server, run: Run) -> list[Series]:
    expr = _filled(target["expr"], run)
    return server.instant(expr, run.end) if target["instant"] else server.over_time(expr, run.start, run.end)


def _promtool(port: int) -> list[str]:
    faults = []
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        page = answer.read()
    checks = (
        ("check", "metrics"),
        ("check", "rules", str(RULES)),
        ("test", "rules", str(RULES.with_name("rules_test.yml"))),
    )
    say("")
    for words in checks:
        given = page if "metrics" in words else b""
        done = subprocess.run(["promtool", *words], input=given, capture_output=True, check=False)
        said = (done.stdout + done.stderr).decode().strip()
        say(f"promtool {words[0]} {words[1]}: {said or 'clean'}")
        if done.returncode or ("metrics" in words and said):
            faults.append(f"promtool {' '.join(words)}: {said}")
    return faults


def _alerts(server: Server) -> list[str]:
    rules = server.rules()
    firing = [rule["name"] for rule in rules if rule["state"] != "inactive"]
    say(f"alerts in Prometheus: {len(rules)}, firing or pending: {' '.join(firing) or 'none'}")
    return [f"{rule['name']}: {rule['health']} {rule.get('lastError', '')}" for rule in rules if rule["health"] != "ok"]


if __name__ == "__main__":
    sys.exit(main())
