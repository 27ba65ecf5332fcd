"""Exporters of a run: /metrics is served here, and what needs SQLAlchemy or OpenTelemetry runs in short-lived children.

A child works out the ledger's figures. For /metrics it does so only while somebody asks; an OTLP backend gets the
ledger's sums each time, so one that was down for an hour misses no token, and nothing is queued for it here. The two
take 66 to 91 MiB each, and never run side by side.
"""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

from kvtally.agent.child import Child
from kvtally.agent.export.otlp_environment import otlp_faults, otlp_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from kvtally.agent.config import Config
    from kvtally.agent.health import Health
    from kvtally.agent.log import Log
    from kvtally.agent.metrics_server import MetricsServer

PAGE_BYTES_MAX = 32 * 2**20
REASON_BYTES_MAX = 4096
REASON_LENGTH_MAX = 300
LAST_SECONDS = 8.0  # for the push at the end: Kubernetes gives 30 from the word to stop to the end
LAST_LOOK_SECONDS = 0.05
CHILD_SECONDS_MAX = 300.0  # one that takes longer is ended: the next may do better
IDLE_SECONDS = 300.0  # figures are worked out on only while /metrics was asked for this recently
LIGHT_SECONDS = 2.0  # of CPU: a child that takes more, of a large ledger, is begun so rarely that
SHARE = 10  # it takes a tenth of one core,
REST_SECONDS_MAX = 450.0  # but not so rarely that its figures are too old to be shown
FIGURES_SECONDS_MAX = 900.0  # how old figures may be to be shown, but not less than three times as old as they get
NOT_SENT = "OTLP: not sent, or not whole; what was not sent is in the next push"
LAST_NOT_SENT = "OTLP: the last figures were not sent, or not whole; the ledger has them"


class Exporting:
    """What runs beside the ticks for those who read kvtally; call `look` between two ticks."""

    def __init__(
        self,
        config: Config,
        options: tuple[str, ...],
        health: Health,
        log: Log,
        *,
        environ: Mapping[str, str] = os.environ,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`options` name the ledger and the config to the children."""
        self._config = config
        self._log = log
        self._monotonic = monotonic
        self._server = self._served(health)
        self._page = _Job(monotonic, "export", "page", "--packed", *options)
        self._otlp = _Job(monotonic, "export", "otlp", *options)
        self._otlp_seconds = otlp_interval(config, environ)
        for fault in otlp_faults(config, environ) if self._otlp_seconds is not None else ():
            log.line("warning", fault)

    def look(self) -> None:
        """Take what children have brought, and begin what is due: the one that began longer ago, if both are."""
        self._take_page()
        self._end(self._otlp, NOT_SENT)
        if self._page.is_running or self._otlp.is_running:
            return
        due = [
            job
            for job, every in ((self._page, self._page_seconds), (self._otlp, self._otlp_seconds))
            if job.is_due(every)
        ]
        if due:
            self._begin(min(due, key=lambda job: job.began))

    def close(self) -> None:
        """End the server and whatever child still runs."""
        if self._server is not None:
            self._server.close()
        for job in (self._page, self._otlp):
            job.stop()

    def push_last(self) -> None:
        """Send what the ledger holds in the end, once nothing more is written to it; waits a few seconds at most."""
        if self._otlp_seconds is None:
            return
        self._begin(self._otlp)
        for _ in range(round(LAST_SECONDS / LAST_LOOK_SECONDS)):
            if not self._otlp.is_running:
                return
            time.sleep(LAST_LOOK_SECONDS)
            self._end(self._otlp, LAST_NOT_SENT)
        if self._otlp.is_running:
            self._otlp.stop()
            self._log.complain("warning", LAST_NOT_SENT, reason=f"the push took longer than {LAST_SECONDS:g} s")

    @property
    def port(self) -> int | None:
        """Where /metrics is served; None where it is not."""
        return None if self._server is None else self._server.port

    def _served(self, health: Health) -> MetricsServer | None:
        listen, every = self._config.export.prometheus.listen, self._config.export.prometheus.refresh_seconds
        if not listen:
            return None
        from kvtally.agent.metrics_server import MetricsServer  # noqa: PLC0415  # what is not served takes no memory

        host, _, port = listen.rpartition(":")
        try:
            figures_seconds = max(FIGURES_SECONDS_MAX, 3 * every)
            return MetricsServer(host.strip("[]"), int(port), health, figures_seconds=figures_seconds)
        except (OSError, OverflowError) as error:
            self._log.line(
                "warning",
                f"/metrics is not served: {listen}: {getattr(error, 'strerror', None) or error}",
                hint='another address: [export.prometheus] listen = "127.0.0.1:9479"; "" for none',
            )
            return None

    def _take_page(self) -> None:
        server = self._server
        output = self._end(self._page, "/metrics: its figures are not renewed")
        if server is None or output is None:
            return
        from kvtally.agent.metrics_server import unpacked  # noqa: PLC0415  # as above

        try:
            server.figures = unpacked(output)
        except ValueError as error:
            self._log.complain("warning", "the figures of /metrics could not be read", reason=str(error))

    @property
    def _page_seconds(self) -> float | None:
        """How often figures are worked out for /metrics; None while nobody asks."""
        asked_at = None if self._server is None else self._server.asked_at
        if asked_at is None or self._monotonic() - asked_at >= IDLE_SECONDS:
            return None
        return self._config.export.prometheus.refresh_seconds

    def _begin(self, job: _Job) -> None:
        try:
            job.begin()
        except OSError as error:  # no memory or no process is left: the next one will do
            self._log.complain("warning", f"`{job.command}` could not be begun", reason=str(error))

    def _end(self, job: _Job, fault: str) -> bytes | None:
        """What a child has printed, once it has ended well; else `fault` is told with its reason."""
        status = job.poll()
        if status is None:
            return None
        output, reason = job.take()
        if status == 0:
            return output
        self._log.complain("warning", fault, reason=reason or f"`{job.command}` ended with {status}")
        return None


class _Job:
    """A child that is begun again and again; what it prints is kept in memory files of the kernel, not here."""

    def __init__(self, monotonic: Callable[[], float], *words: str) -> None:
        self._monotonic = monotonic
        self._words = words
        self._child: Child | None = None
        self._files: tuple[int, ...] = ()
        self._rest_seconds = 0.0  # at least so long from one to the next
        self._is_late = False
        self.began = -math.inf  # when the last one did
        self.command = f"kvtally {' '.join(words)}"

    def is_due(self, every_seconds: float | None) -> bool:
        """Whether none runs and the last one began so long ago; never with None."""
        if every_seconds is None or self._child is not None:
            return False
        return self._monotonic() - self.began >= max(every_seconds, self._rest_seconds)

    @property
    def is_running(self) -> bool:
        """Whether one runs."""
        return self._child is not None

    def begin(self) -> None:
        """Begin one; OSError if there is no process to be had."""
        self.began = self._monotonic()
        self._is_late = False
        # no folder need be writable, and nothing is left behind by whatever end
        self._files = (os.memfd_create("kvtally-out"),)
        try:
            self._files += (os.memfd_create("kvtally-err"),)
            self._child = Child(*self._words, stdout=self._files[0], stderr=self._files[1])
        except OSError:
            self._close()
            raise

    def poll(self) -> int | None:
        """The exit status of one that has ended just now; None otherwise. One that takes too long is killed."""
        if self._child is None:
            return None
        status = self._child.poll()
        if status is None and self._monotonic() - self.began > CHILD_SECONDS_MAX:
            self._is_late = True
            self._child.kill()
            status = self._child.wait()
        if status is not None:
            used = self._child.cpu_seconds
            self._rest_seconds = min(SHARE * used, REST_SECONDS_MAX) if used > LIGHT_SECONDS else 0.0
            self._child = None
        return status

    def take(self) -> tuple[bytes, str]:
        """What one that has ended printed, and the last line of its complaints; both up to a bound."""
        out, err = self._files
        output = os.pread(out, PAGE_BYTES_MAX, 0)
        start = max(0, os.fstat(err).st_size - REASON_BYTES_MAX)
        complaints = os.pread(err, REASON_BYTES_MAX, start).decode(errors="replace").strip().splitlines()
        self._close()
        if self._is_late:
            return output, f"it took longer than {CHILD_SECONDS_MAX:g} s and was ended"
        return output, complaints[-1][:REASON_LENGTH_MAX] if complaints else ""

    def stop(self) -> None:
        """End it now."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            self._child = None
        self._close()

    def _close(self) -> None:
        for file in self._files:
            os.close(file)
        self._files = ()
