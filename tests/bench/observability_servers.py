"""Prometheus and VictoriaMetrics on loopback, scraping one address, and what they answer."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

if TYPE_CHECKING:
    from pathlib import Path

PROGRAMS = {"Prometheus": "prometheus", "VictoriaMetrics": "victoria-metrics"}
STEP_SECONDS = 5


class Series(NamedTuple):
    """One series: its labels, its values by unix seconds as the server prints them, without those that are NaN."""

    labels: dict[str, str]
    values: tuple[tuple[float, str], ...]


class Server:
    """One server, running until it is closed."""

    def __init__(self, name: str, command: list[str], port: int, folder: Path) -> None:
        self.name = name
        self._origin = f"http://127.0.0.1:{port}"
        with (folder / f"{name}.log").open("wb") as log:
            self._process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        self._wait()

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(timeout=30)

    def instant(self, expr: str, at: float) -> list[Series]:
        """What an instant query gives."""
        found = self._get("query", query=expr, time=f"{at:.3f}")["result"]
        return [one for one in (_series(each["metric"], [each["value"]]) for each in found) if one.values]

    def over_time(self, expr: str, start: float, end: float, step: float = STEP_SECONDS) -> list[Series]:
        """What a range query gives; a series of NaN alone is none."""
        found = self._get("query_range", query=expr, start=f"{start:.3f}", end=f"{end:.3f}", step=f"{step}s")["result"]
        return [one for one in (_series(each["metric"], each["values"]) for each in found) if one.values]

    def value(self, expr: str, at: float) -> Decimal | None:
        """The value of an expression of one series; None if it gives none."""
        found = self.instant(expr, at)
        if len(found) > 1:
            raise ValueError(f"{expr} gives {len(found)} series")
        return Decimal(found[0].values[0][1]) if found else None

    def label_values(self, metric: str, label: str) -> list[str]:
        """Values of a label, as a dashboard's variable asks for them."""
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": metric})
        return values

    def rules(self) -> list[dict[str, Any]]:
        """Alerting rules with their health and what fires."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def version(self) -> str:
        """The version of its Debian package: VictoriaMetrics' program does not know its own."""
        words = ["dpkg-query", "--show", "--showformat=${Version}", PROGRAMS[self.name]]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout or "unpacked by hand"

    def _get(self, path: str, **words: str) -> Any:
        with urlopen(f"{self._origin}/api/v1/{path}?{urlencode(words)}", timeout=30) as answer:
            return json.load(answer)["data"]

    def _wait(self) -> None:
        for _ in range(100):
            try:
                self._get("query", query="1")
            except OSError:
                if self._process.poll() is not None:
                    raise
                time.sleep(0.1)
            else:
                return
        self.close()
        raise TimeoutError(f"{self.name} does not answer")


def missing() -> list[str]:
    """Debian packages that are not there."""
    return [program for program in (*PROGRAMS.values(), "promtool") if shutil.which(program) is None]


def prometheus(folder: Path, target_port: int, rules: Path, scrape_seconds: int) -> Server:
    """Debian's Prometheus with the alerts that we ship."""
    config = folder / "prometheus.yml"
    config.write_text(f"rule_files: [{json.dumps(str(rules))}]\n{_scrapes(target_port, scrape_seconds)}")
    port = _free_port()
    options = {
        "config.file": config,
        "storage.tsdb.path": folder / "prometheus",
        "web.listen-address": f"127.0.0.1:{port}",
        "log.level": "warn",
    }
    return Server("Prometheus", ["prometheus", *(f"--{key}={value}" for key, value in options.items())], port, folder)


def victoria_metrics(folder: Path, target_port: int, scrape_seconds: int) -> Server:
    """Debian's VictoriaMetrics, which shows samples as soon as it has them."""
    config = folder / "victoria.yml"
    config.write_text(_scrapes(target_port, scrape_seconds).replace("evaluation_interval", "scrape_timeout"))
    port = _free_port()
    options = {
        "promscrape.config": config,
        "storageDataPath": folder / "victoria",
        "httpListenAddr": f"127.0.0.1:{port}",
        "search.latencyOffset": "0s",
        "loggerLevel": "WARN",
    }
    command = ["victoria-metrics", *(f"-{key}={value}" for key, value in options.items())]
    return Server("VictoriaMetrics", command, port, folder)


def _scrapes(port: int, seconds: int) -> str:
    return (
        f"global: {{scrape_interval: {seconds}s, evaluation_interval: {seconds}s}}\n"
        "scrape_configs:\n"
        "- job_name: kvtally\n"
        "  honor_labels: true\n"
        f"  static_configs: [{{targets: ['127.0.0.1:{port}']}}]\n"
    )


def _series(labels: dict[str, str], values: list[tuple[float, str]]) -> Series:
    return Series(labels, tuple((at, value) for at, value in values if math.isfinite(float(value))))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
