"""A ledger that grows as if a recorded deployment ran now, and the /metrics that `kvtally run` would serve of it."""

from __future__ import annotations

import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from kvtally.agent.accounts import Payment
from kvtally.agent.book import book_of
from kvtally.agent.config import Config
from kvtally.agent.export.figures import snapshot
from kvtally.agent.export.prometheus import openmetrics_page, text_page
from kvtally.agent.health import Health
from kvtally.agent.ledger.append import Closed, LedgerWriter
from kvtally.agent.ledger.place import connect
from kvtally.agent.ledger.read import LedgerReader
from kvtally.agent.ledger.upgrade import upgrade
from kvtally.agent.metrics_server import Figures, MetricsServer
from kvtally.agent.pipeline import Pipeline, Tick
from kvtally.agent.recording import GpuLine, HostLine
from kvtally.agent.replay import Replay
from kvtally.collectors.base import Scrape
from kvtally.collectors.http import Response
from kvtally.collectors.nfs import NfsMount
from kvtally.collectors.side_page import SidePage

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from kvtally.agent.finding import Finding
    from kvtally.agent.recording import Event, Recording

NANO = 10**9
WINDOWS = {"1h": 3600 * NANO, "24h": 86400 * NANO}
MOUNT = "/mnt/kv"
# What no recording of ours has, one page and one file a second: an NFS mount of which a page cache serves two thirds,
# and a cache that counts the bytes it brings to the engine.
MOUNTSTATS = """\
device server:/kv mounted on {mount} with fstype nfs4 statvers=1.1
\tbytes:\t{app} 0 0 0 {server} 0 0 0
\tper-op statistics
\t        READ: {reads} {reads} 0 0 {server} 0 {milliseconds} {milliseconds} 0
\t       WRITE: 0 0 0 0 0 0 0 0 0
"""
MOONCAKE = """\
# TYPE mooncake_transfer_read_bytes counter
mooncake_transfer_read_bytes {loaded}
# TYPE mooncake_transfer_get_latency histogram
mooncake_transfer_get_latency_sum 0
mooncake_transfer_get_latency_count 0
# TYPE mooncake_transfer_batch_get_latency histogram
mooncake_transfer_batch_get_latency_sum {microseconds}
mooncake_transfer_batch_get_latency_count {loads}
"""


class Shifted:
    """A recording moved to now, each event given when its time has come."""

    def __init__(self, recording: Recording, seconds: float) -> None:
        """`seconds` of it, from the first page on."""
        self.name, self.meta = recording.name, recording.meta
        self._recording = recording
        # whole milliseconds, as pages are named
        self._shift_ns = (time.time_ns() - recording.first_ns) // 10**6 * 10**6 + NANO
        self.first_ns = recording.first_ns + self._shift_ns
        self._last_ns = recording.first_ns + round(seconds * NANO)

    def events(self) -> Iterator[Event]:
        """As a recording's."""
        for event in self._recording.events():
            if event.t_ns > self._last_ns:
                return
            moved = event._replace(t_ns=event.t_ns + self._shift_ns)
            if isinstance(moved, (GpuLine, HostLine)):
                moved = moved._replace(line={**moved.line, "t": moved.line["t"] + self._shift_ns / NANO})
            time.sleep(max(0.0, (moved.t_ns - time.time_ns()) / NANO))
            yield moved


class _Counting(LedgerWriter):
    """Remembers what it wrote, for kvtally's own health."""

    closed: tuple[Closed, ...] = ()

    def append(self, batch: Iterable[Closed], findings: Iterable[Finding] = ()) -> None:
        self.closed = tuple(batch)
        super().append(self.closed, findings)


class _Replay(Replay):
    """A replay that tells its health what it scraped."""

    def __init__(self, shifted: Shifted, writer: _Counting, health: Health) -> None:
        super().__init__(shifted, writer)  # type: ignore[arg-type]  # it has what a replay reads
        self._counting, self._health = writer, health

    def _tick(self, scrapes: list[Scrape]) -> None:
        self._counting.closed = ()
        super()._tick(scrapes)
        self._health.add(scrapes, Tick(self._counting.closed, ()))


class _Beside:
    """An NFS mount and a Mooncake client that grow by the second."""

    url = ""

    def __init__(self, folder: Path, writer: _Counting, health: Health) -> None:
        self._file = folder / "self" / "mountstats"
        self._file.parent.mkdir(parents=True)
        self._nfs = NfsMount(MOUNT, str(folder))
        self._page = SidePage("mooncake", self)
        self._writer, self._health = writer, health
        self._pipeline: Pipeline | None = None
        self._number = 0

    def get(self, target: str | None = None) -> Response:  # noqa: ARG002  # there is this page alone
        body = MOONCAKE.format(
            loaded=self._number * 2 * 10**9, microseconds=self._number * 10**5, loads=self._number * 4
        )
        return Response(200, body.encode(), "text/plain")

    def close(self) -> None:
        """Nothing is open."""

    def tick(self, t_ns: int) -> None:
        if self._pipeline is None:
            self._pipeline = Pipeline(self._writer, {}, list, interval_ns=None, started_ns=t_ns)
        self._number += 1
        moved = {"app": 3 * 10**8, "server": 10**8, "reads": 100, "milliseconds": 300}
        counts = {name: self._number * step for name, step in moved.items()}
        self._file.write_text(MOUNTSTATS.format(mount=MOUNT, **counts))
        scrapes = [Scrape(one.source, t_ns, 0.0, one.collect()) for one in (self._nfs, self._page)]
        self._health.add(scrapes, self._pipeline.tick(scrapes))


class GrowingLedger:
    """The ledger, its /metrics on loopback, and the threads that fill the one and renew the other.

    first_ns   unix nanoseconds at which its first engine interval starts
    """

    def __init__(self, folder: Path, recording: Recording, seconds: float, refresh_seconds: float) -> None:
        self.url = f"sqlite:///{folder / 'ledger.db'}"
        upgrade(self.url)
        self._folder, self._refresh_seconds = folder, refresh_seconds
        self._health = Health(str(folder / "ledger.db"))
        self._server = MetricsServer("127.0.0.1", 0, self._health)
        self._shifted = Shifted(recording, seconds)
        self.first_ns = self._shifted.first_ns
        self.failure: Exception | None = None
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._guarded, args=(work,)) for work in (self._fill, self._renew)]
        for thread in self._threads:
            thread.start()

    @property
    def port(self) -> int:
        """Of /metrics."""
        return self._server.port

    @property
    def is_over(self) -> bool:
        """Whether the recording is in the ledger whole, or a thread failed."""
        return self._is_over.is_set()

    def close(self) -> None:
        """Wait for the end of the recording, and stop serving."""
        for thread in self._threads:
            thread.join()
        self._server.close()

    def renew(self) -> None:
        """Work out the figures as the child of `kvtally run` does."""
        config = Config()
        with LedgerReader(self.url) as reader, reader.snapshot():
            payment = Payment(config.rates.term, config.rates.site)
            taken = snapshot(reader, book_of(reader, config), payment, WINDOWS, opencost=True)
        self._server.figures = Figures(time.time_ns(), text_page(taken), openmetrics_page(taken))

    def _guarded(self, work: Any) -> None:
        try:
            work()
        except Exception as error:
            self.failure = error
            self._is_over.set()
            raise

    def _fill(self) -> None:
        path = str(self._folder / "ledger.db")
        with closing(_Counting(connect(path), path)) as writer:
            beside = _Beside(self._folder / "proc", writer, self._health)
            _Replay(self._shifted, writer, self._health).run(beside.tick)
        self._is_over.set()

    def _renew(self) -> None:
        while not self.is_over:
            self.renew()
            time.sleep(self._refresh_seconds)
