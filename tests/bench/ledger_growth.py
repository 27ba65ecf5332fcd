"""How much the ledger's file grows for each interval of an engine."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.bench.page_server import EndlessReplay, recorded_pages

from kvtally.agent.ledger.append import LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.pipeline import Pipeline
from kvtally.collectors.base import Scrape
from kvtally.collectors.lmcache import LmcacheMapping
from kvtally.collectors.page import PageMapper
from kvtally.collectors.vllm import VllmMapping

if TYPE_CHECKING:
    from pathlib import Path

HOUR_SCRAPES = 3600
_BEGAN_NS = 1_795_410_000_000_000_000  # a whole hour, so that the replay crosses the next one's edge
_STEP_NS = 1_000_000_000


class Size(NamedTuple):
    """A ledger at one moment: bytes of the database with its write-ahead log folded in, and engine intervals."""

    file_bytes: int
    intervals: int

    def since(self, before: Size) -> float:
        """Bytes for each interval that came after `before`."""
        return (self.file_bytes - before.file_bytes) / (self.intervals - before.intervals)


def size(path: Path) -> Size:
    """The size of a ledger, which may be in use."""
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        connection.execute("BEGIN")
        (intervals,) = connection.execute("SELECT count(*) FROM engine_interval").fetchone()
        # in a transaction these are the pages of what it sees, wherever they lie
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        (page_bytes,) = connection.execute("PRAGMA page_size").fetchone()
    return Size(pages * page_bytes, intervals)


def measure(folder: Path) -> dict[str, Any]:
    """Send an hour of the replayed pages through the pipeline; growth is counted from its first tenth on."""
    path = folder / "hour.db"
    upgrade(f"sqlite:///{path}")
    replay = EndlessReplay(recorded_pages())
    mapper = PageMapper("127.0.0.1:8000", (VllmMapping(), LmcacheMapping()), "0.25.1")
    before = None
    with closing(LedgerWriter(connect(str(path)), str(path))) as writer:
        pipeline = Pipeline(writer, {}, lambda readings: readings, interval_ns=_STEP_NS, started_ns=_BEGAN_NS)
        for number in range(HOUR_SCRAPES + 1):
            at_ns = _BEGAN_NS + number * _STEP_NS
            tick = pipeline.tick([Scrape("vllm:bench", at_ns, 0.0, mapper.read(replay.page(number)))])
            if tick.error:
                raise tick.error
            if number == HOUR_SCRAPES // 10:
                before = size(path)
    assert before is not None
    return {"bytes_per_engine_interval": size(path).since(before), "bytes_by_table": _by_table(path)}


def _by_table(path: Path) -> dict[str, float]:
    """Bytes per interval of the tables that grow; empty where SQLite was built without dbstat."""
    query = "SELECT name, sum(pgsize) FROM dbstat WHERE name LIKE '%_interval' GROUP BY name HAVING sum(pgsize) > 4096"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        try:
            return {name: taken / HOUR_SCRAPES for name, taken in connection.execute(query)}
        except sqlite3.OperationalError:
            return {}


def lines(result: dict[str, Any]) -> list[str]:
    """The figures for people."""
    live = ", ".join(f"{name} {taken:.0f}" for name, taken in result["ledger_bytes_per_engine_interval"].items())
    hour = result["replayed_hour"]
    parts = ", ".join(f"{name} {taken:.0f}" for name, taken in hour["bytes_by_table"].items())
    return [
        f"ledger growth in this run, bytes per engine interval (a file grows by 4096 bytes): {live}",
        f"the same over a replayed hour: {hour['bytes_per_engine_interval']:.1f} ({parts or 'no dbstat here'})",
    ]
