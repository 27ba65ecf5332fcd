from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Each costs tens of milliseconds or megabytes: it belongs inside the function that needs it
HEAVY = {
    *("alembic", "asyncio", "click", "google", "hashlib", "http", "numpy", "opentelemetry", "prometheus_client"),
    *("psutil", "psycopg", "pynvml", "requests", "rich", "sqlalchemy", "sqlite3", "ssl", "tempfile", "tomllib"),
    "urllib3",
}
NO_WORK = HEAVY - {"click"} | {"msgspec"}  # a page of help reads no config and no ledger
COLLECTORS = sorted(path.stem for path in (Path(__file__).parents[1] / "collectors").glob("[a-z]*.py"))

# What is run in a fresh interpreter, and which modules it must not have loaded at its end: one line a case
CASES = {
    "the config without a file": ("from kvtally.agent.config import load; load(None, {}, ())", HEAVY),
    "the collectors": ("; ".join(f"import kvtally.collectors.{name}" for name in COLLECTORS), HEAVY),
    "the daemon": ("import kvtally.agent.daemon, kvtally.agent.discovery", HEAVY - {"sqlite3"}),
    "what serves /metrics": ("import kvtally.agent.metrics_server, kvtally.agent.exporting", HEAVY | {"sqlite3"}),
    "a daemon that serves nothing": ("import kvtally.agent.daemon", {"kvtally.agent.metrics_server", "socketserver"}),
    "the figures of /metrics": ("import kvtally.agent.cli.export_live, kvtally.agent.export.prometheus", {"requests"}),
    "what settles hours": ("import kvtally.agent.settlement, kvtally.agent.child", {"numpy", "rich"}),
    **{
        f"kvtally {line}": (f"from kvtally.agent.cli import main; main({line.split()})", NO_WORK)
        for line in (
            *("--help", "run --help", "cost --help", "savings --help", "calibrate --help", "doctor --help"),
            *("rates add --help", "ledger settle --help", "export otlp --help"),
        )
    },
    "what prints no table": ("from kvtally.agent.cli import main; main(['demo', '--format', 'csv'])", {"rich"}),
}

PROGRAM = """
import sys
try:
    exec(sys.argv[1], {"__name__": "case"})
except SystemExit:
    pass
print("\\nLOADED", *sys.modules)
"""


def loaded(code: str) -> set[str]:
    """The names of the modules and packages that a fresh interpreter has loaded after the code."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, code], capture_output=True, text=True, check=True)
    return set(done.stdout.rpartition("\nLOADED ")[2].split())


@pytest.mark.parametrize("case", CASES)
def test_heavy_modules_are_not_loaded_by(case: str) -> None:
    code, forbidden = CASES[case]
    found = loaded(code)
    assert any(name.startswith("kvtally.") for name in found)
    assert found & forbidden == set()


def test_a_module_that_is_loaded_would_be_seen() -> None:
    assert loaded("import sqlite3; raise SystemExit") & HEAVY == {"sqlite3"}
