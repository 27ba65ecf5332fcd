"""The programs that are measured side by side: how each is told to read one page every second and keep the same."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from collections.abc import Sequence

KVTALLY = (sys.executable, "-m", "kvtally")
# every sample that kvtally reads; the peers keep the same and drop the rest
WANTED = (*VllmMapping().names(), *LmcacheMapping().names())


class Scraper(NamedTuple):
    """One program and the page that it reads."""

    name: str
    command: tuple[str, ...]
    page_port: int
    folder: Path
    version_command: tuple[str, ...]
    ledger: Path | None = None

    def start(self) -> subprocess.Popen[bytes]:
        """Start it; what it says goes into its folder."""
        # the configuration of whoever runs the bench must not leak in
        environment = {key: value for key, value in os.environ.items() if not key.startswith("KVTALLY")}
        with Path(self.folder, "log").open("wb") as log:
            return subprocess.Popen(self.command, cwd=self.folder, env=environment, stdout=log, stderr=log)

    def version(self) -> str:
        """What it calls itself."""
        done = subprocess.run(self.version_command, capture_output=True, text=True, check=False)
        found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout + done.stderr)
        return found[0] if found else "unknown"


class Kitchen:
    """Writes each program's configuration into a folder of its own."""

    def __init__(self, folder: Path, engine_pid: int, kvtally: Sequence[str] = KVTALLY) -> None:
        """`engine_pid` is the process whose CPU and input/output kvtally reads where it reads a host at all."""
        self._folder = folder
        self._engine_pid = engine_pid
        self._kvtally = tuple(kvtally)

    def kvtally(self, name: str, port: int, *, host: bool = False, restrict: bool = False) -> Scraper:
        """`kvtally run` every second on one page; with `host` also GPUs, disks, processes and cgroup."""
        folder = self._own(name)
        flag = str(host).lower()
        ledger = folder / "ledger.db"
        lines = [
            "[scrape]",
            "interval_seconds = 1",
            "discover = false",
            f'restrict = "{"always" if restrict else "never"}"',
            "[[engine]]",
            f'url = "http://127.0.0.1:{port}/metrics"',
            *([f"pid = {self._engine_pid}"] if host else ["gpus = []"]),
            "[gpu]",
            f"enabled = {flag}",
            "[host]",
            f"processes = {flag}",
            f"disks = {flag}",
            f"cgroup = {flag}",
            "[ledger]",
            f'url = "sqlite:///{ledger}"',
        ]
        config = folder / "bench.toml"
        config.write_text("\n".join(lines) + "\n")
        command = (*self._kvtally, "run", "--config", str(config))
        return Scraper(name, command, port, folder, (*self._kvtally, "--version"), ledger)

    def prometheus(self, name: str, port: int, *, keep: bool = True, restrict: bool = False) -> Scraper:
        """Debian's Prometheus every second on one page; with `keep` it stores only what kvtally reads."""
        folder = self._own(name)
        config = folder / "prometheus.yml"
        config.write_text(_scrape_config(port, keep=keep, restrict=restrict))
        options = {
            "config.file": str(config),
            "storage.tsdb.path": str(folder / "data"),
            "web.listen-address": f"127.0.0.1:{_free_port()}",
            "log.level": "warn",
        }
        command = ("prometheus", *(f"--{key}={value}" for key, value in options.items()))
        return Scraper(name, command, port, folder, ("prometheus", "--version"))

    def vmagent(self, name: str, port: int) -> Scraper:
        """VictoriaMetrics' agent with the same keep list; what it forwards is thrown away."""
        folder = self._own(name)
        config = folder / "vmagent.yml"
        config.write_text(_scrape_config(port, keep=True, restrict=False))
        options = {
            "promscrape.config": str(config),
            "remoteWrite.url": f"http://127.0.0.1:{port}/write",
            "remoteWrite.tmpDataPath": str(folder / "data"),
            "httpListenAddr": f"127.0.0.1:{_free_port()}",
            "loggerLevel": "WARN",
        }
        command = ("vmagent", *(f"-{key}={value}" for key, value in options.items()))
        return Scraper(name, command, port, folder, ("vmagent", "-version"))

    def _own(self, name: str) -> Path:
        folder = self._folder / re.sub(r"[^a-z]+", "-", name.lower()).strip("-")
        folder.mkdir()
        return folder


def missing() -> str | None:
    """What must be installed before anything can be measured; None if all is there."""
    if shutil.which("prometheus") is None:
        return "prometheus is not on PATH: apt install prometheus (its service need not run), or unpack a release"
    return None


def _scrape_config(port: int, *, keep: bool, restrict: bool) -> str:
    """A scrape every second; `restrict` asks the engine for the wanted names alone, as kvtally does."""
    lines = [
        "global: {scrape_interval: 1s, scrape_timeout: 1s}",
        "scrape_configs:",
        "- job_name: engine",
        f"  static_configs: [{{targets: ['127.0.0.1:{port}']}}]",
    ]
    if restrict:
        lines += ["  metrics_path: /metrics/", f"  params: {{'name[]': [{', '.join(map(_quoted, WANTED))}]}}"]
    if keep:
        pattern = _quoted("|".join(WANTED))
        lines += ["  metric_relabel_configs:", f"  - {{source_labels: [__name__], action: keep, regex: {pattern}}}"]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return f"'{text}'"


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
