"""Exporters of a run: /metrics is served here, and what needs SQLAlchemy or OpenTelemetry runs in short-lived children.

A child works out the ledger's figures. For /metrics it does so only while somebody asks; an OTLP backend gets the
ledger's sums each time, so one that was down for an hour misses no token, and nothing is queued for it here.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from kvtally.agent.child import Child

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
OTLP_SECONDS = 60.0  # OpenTelemetry's own default
LIGHT_SECONDS = 2.0  # of CPU: a child that takes more, of a large ledger, is begun so rarely that
SHARE = 10  # it takes a tenth of one core,
REST_SECONDS_MAX = 450.0  # but not so rarely that its figures are too old to be shown
FIGURES_SECONDS_MAX = 900.0  # how old figures may be to be shown, but not less than three times as old as they get
ENDPOINTS = ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


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
        self._options = options
        self._log = log
        self._monotonic = monotonic
        self._server = self._served(health)
        self._page = _Job(monotonic)
        self._otlp = _Job(monotonic)
        self._otlp_seconds = otlp_interval(config, environ)
        for fault in otlp_faults(environ) if self._otlp_seconds is not None else ():
            log.line("warning", fault)

    def look(self) -> None:
        """Take what children have brought, and begin what is due."""
        self._look_page()
        if self._otlp_seconds is not None:
            self._end(self._otlp, "OTLP: not sent; the next push carries the same sums")
            if self._otlp.is_due(self._otlp_seconds):
                self._begin(self._otlp, "export", "otlp")

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
        self._begin(self._otlp, "export", "otlp")
        for _ in range(round(LAST_SECONDS / LAST_LOOK_SECONDS)):
            if not self._otlp.is_running:
                return
            time.sleep(LAST_LOOK_SECONDS)
            self._end(self._otlp, "OTLP: the last figures were not sent; the ledger has them")
        self._otlp.stop()

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

    def _look_page(self) -> None:
        server, job = self._server, self._page
        if server is None:
            return
        output = self._end(job, "/metrics: its figures are not renewed")
        if output is not None:
            from kvtally.agent.metrics_server import unpacked  # noqa: PLC0415  # as above

            try:
                server.figures = unpacked(output)
            except ValueError as error:
                self._log.complain("warning", "the figures of /metrics could not be read", reason=str(error))
        asked_at = server.asked_at
        is_read = asked_at is not None and self._monotonic() - asked_at < IDLE_SECONDS
        if is_read and job.is_due(self._config.export.prometheus.refresh_seconds):
            self._begin(job, "export", "page", "--packed")

    def _begin(self, job: _Job, *words: str) -> None:
        try:
            job.begin(*words, *self._options)
        except OSError as error:  # no memory or no process is left: the next one will do
            self._log.complain("warning", f"`kvtally {' '.join(words)}` could not be begun", reason=str(error))

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


def otlp_interval(config: Config, environ: Mapping[str, str]) -> float | None:
    """Seconds from one push to the next; None where no endpoint is named, or OpenTelemetry is switched off."""
    exporters = {one.strip() for one in environ.get("OTEL_METRICS_EXPORTER", "").split(",")} - {""}
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true" or (exporters and "otlp" not in exporters):
        return None
    if not (config.export.otlp.endpoint or any(environ.get(name) for name in ENDPOINTS)):
        return None
    try:
        given = float(environ.get("OTEL_METRIC_EXPORT_INTERVAL") or 0) / 1000
    except ValueError:
        given = 0.0
    return given if 1 <= given <= 86400 else OTLP_SECONDS  # noqa: PLR2004  # a second to a day


def otlp_faults(environ: Mapping[str, str]) -> list[str]:
    """What the environment says of OpenTelemetry that nobody understands, and what holds instead."""
    faults = []
    interval = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "").strip()
    if interval and not interval.isdecimal():
        faults.append(f"OTEL_METRIC_EXPORT_INTERVAL={interval} is no number of milliseconds: {OTLP_SECONDS:g} s hold")
    name = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    temporality = environ.get(name, "").strip().lower()
    if temporality not in {"", "cumulative", "delta", "lowmemory"}:
        faults.append(f"{name}={temporality} is none of cumulative, delta, lowmemory: cumulative holds")
    return faults


class _Job:
    """A child that is begun again and again; what it prints is kept in memory files of the kernel, not here."""

    def __init__(self, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._child: Child | None = None
        self._files: tuple[int, ...] = ()
        self._began: float | None = None
        self._rest_seconds = 0.0  # at least so long from one to the next
        self._is_late = False
        self.command = ""

    def is_due(self, every_seconds: float) -> bool:
        """Whether none runs and the last one began so long ago."""
        every_seconds = max(every_seconds, self._rest_seconds)
        return self._child is None and (self._began is None or self._monotonic() - self._began >= every_seconds)

    @property
    def is_running(self) -> bool:
        """Whether one runs."""
        return self._child is not None

    def begin(self, *words: str) -> None:
        """Begin one; OSError if there is no process to be had."""
        self._began = self._monotonic()
        self._is_late = False
        # no folder need be writable, and nothing is left behind by whatever end
        self._files = (os.memfd_create("kvtally-out"),)
        try:
            self._files += (os.memfd_create("kvtally-err"),)
            self._child = Child(*words, stdout=self._files[0], stderr=self._files[1])
        except OSError:
            self._close()
            raise
        self.command = self._child.command

    def poll(self) -> int | None:
        """The exit status of one that has ended just now; None otherwise. One that takes too long is killed."""
        if self._child is None:
            return None
        status = self._child.poll()
        if status is None and self._began is not None and self._monotonic() - self._began > CHILD_SECONDS_MAX:
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
