from __future__ import annotations

import os
import re
import socket
import stat
import sys
import textwrap
import time
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tests.daemon_process import DaemonProcess
from tests.loopback import FakeEngine
from tests.otlp_receiver import OtlpReceiver, free_port

from kvtally.agent import exporting
from kvtally.agent.child import Child
from kvtally.agent.config import Config
from kvtally.agent.config_tables import Export, Otlp, Prometheus
from kvtally.agent.exporting import CHILD_SECONDS_MAX, IDLE_SECONDS, Exporting
from kvtally.agent.health import Health
from kvtally.agent.log import Log
from kvtally.agent.metrics_server import Figures, packed

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PYTHON = sys.executable
ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
PAGES = Figures(0, b"kvtally_generated_tokens_total 7.0\n", b"kvtally_generated_tokens_total 7.0\n# EOF\n")
ANY_PORT = "127.0.0.1:0"


def config_with(listen: str = ANY_PORT, endpoint: str = "", refresh: float = 60.0) -> Config:
    return Config(export=Export(prometheus=Prometheus(listen=listen, refresh_seconds=refresh), otlp=Otlp(endpoint)))


class Bench:
    """An Exporting whose children run a program of the test's, by a clock of the test's."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder = folder
        self._monkeypatch = monkeypatch
        self.now = 1000.0
        self.lines: list[str] = []
        self._calls = folder / "calls"
        self._calls.touch()
        self.runs("")

    def runs(self, program: str) -> None:
        """What a child does from now on, after it has written down how it was called."""
        script = self._folder / "python"
        code = f"""\
            #!{PYTHON} -S
            import os, sys, time
            with open({str(self._calls)!r}, "a") as file:
                print(*sys.argv[1:], file=file)
            """
        script.write_text(textwrap.dedent(code) + textwrap.dedent(program))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        self._monkeypatch.setattr(sys, "executable", str(script))

    def prints(self, output: bytes) -> None:
        self.runs(f"sys.stdout.buffer.write({output!r})")

    def calls(self) -> list[str]:
        """How children were called so far."""
        return self._calls.read_text().splitlines()

    @contextmanager
    def started(self, config: Config, environ: Mapping[str, str] = {}) -> Iterator[Exporting]:
        log = Log(write=self.lines.append, clock=lambda: self.now)
        health = Health(str(self._folder / "ledger.db"), lambda: self.now)
        options = ("--ledger", "sqlite:///ledger.db")
        one = Exporting(config, options, health, log, environ=environ, monotonic=lambda: self.now)
        try:
            yield one
        finally:
            one.close()

    def passes(self, exporting: Exporting, seconds: float, *, step: float = 5.0) -> None:
        """Time passes, with ticks in it, at each of which the child that runs comes to its end."""
        until = self.now + seconds
        while self.now < until:
            self.now += step
            self.settle(exporting)

    def settle(self, exporting: Exporting, within_seconds: float = 20.0) -> None:
        """Tick until no child runs."""
        deadline = time.monotonic() + within_seconds
        exporting.look()
        while any(job._child is not None for job in (exporting._page, exporting._otlp)):
            assert time.monotonic() < deadline
            time.sleep(0.01)
            exporting.look()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def page(exporting: Exporting) -> str:
    assert exporting.port is not None
    connection = HTTPConnection("127.0.0.1", exporting.port, timeout=10)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def open_files() -> int:
    """How many this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def wait_for_end(job: exporting._Job) -> None:
    """Wait until the child of a job has ended, which the job has yet to see."""
    assert job._child is not None
    pid = job._child._pid
    assert pid is not None
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def asked(exporting: Exporting, at: float) -> None:
    """/metrics was asked for at this time of the test's clock."""
    assert exporting._server is not None
    exporting._server.asked_at = at


# /metrics


def test_figures_are_worked_out_while_somebody_asks_and_no_longer(bench: Bench) -> None:
    bench.prints(packed(PAGES._replace(at_ns=time.time_ns())))
    with bench.started(config_with()) as exporting:
        bench.passes(exporting, 600)
        assert bench.calls() == []
        assert "kvtally_generated_tokens_total" not in page(exporting)
        asked(exporting, bench.now)
        bench.settle(exporting)
        assert bench.calls() == ["-m kvtally export page --packed --ledger sqlite:///ledger.db"]
        assert "kvtally_generated_tokens_total 7.0\n" in page(exporting)
        asked(exporting, bench.now)
        bench.passes(exporting, 2 * IDLE_SECONDS)
        assert len(bench.calls()) == 1 + (IDLE_SECONDS - 5) // 60
    assert bench.lines == []


def test_they_are_renewed_as_often_as_config_says(bench: Bench) -> None:
    bench.prints(packed(PAGES))
    with bench.started(config_with(refresh=10)) as exporting:
        for _ in range(10):
            asked(exporting, bench.now)
            bench.passes(exporting, 30)
    assert len(bench.calls()) == 30


def test_a_child_that_takes_much_of_the_cpu_is_begun_more_rarely(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "LIGHT_SECONDS", 0.0)
    monkeypatch.setattr(exporting, "SHARE", 1e6)  # so that what the child takes here comes to hours
    bench.prints(packed(PAGES))
    with bench.started(config_with(refresh=10)) as one:
        for _ in range(15):
            asked(one, bench.now)
            bench.passes(one, 30)
        assert len(bench.calls()) == 1
        asked(one, bench.now)
        bench.passes(one, 30)
        assert len(bench.calls()) == 2


def test_nothing_is_served_and_no_child_runs_where_the_address_is_empty(bench: Bench) -> None:
    with bench.started(config_with("")) as exporting:
        bench.passes(exporting, 300)
        assert exporting.port is None
    assert bench.calls() == bench.lines == []


@pytest.mark.parametrize("at", ["in use", "127.0.0.1:99999"])
def test_an_address_that_cannot_be_had_is_a_warning_and_the_run_goes_on(bench: Bench, at: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}" if at == "in use" else at
        with bench.started(config_with(listen)) as exporting:
            bench.passes(exporting, 60)
            assert exporting.port is None
    (line,) = bench.lines
    assert f"/metrics is not served: {listen}" in line
    assert "[export.prometheus]" in line


def test_a_child_that_fails_keeps_the_last_figures_and_its_reason_is_told(bench: Bench) -> None:
    bench.prints(packed(PAGES._replace(at_ns=time.time_ns())))
    with bench.started(config_with()) as exporting:
        asked(exporting, bench.now)
        bench.settle(exporting)
        bench.runs("sys.stderr.write('first\\nkvtally: the ledger is locked\\n'); sys.exit(3)")
        bench.passes(exporting, 60)
        assert "kvtally_generated_tokens_total 7.0\n" in page(exporting)
        (line,) = bench.lines
        assert "its figures are not renewed" in line
        assert 'reason="kvtally: the ledger is locked"' in line
        bench.runs("sys.exit(9)")
        bench.passes(exporting, 60)
        assert "ended with 9" in bench.lines[1]


def test_a_child_that_floods_is_read_up_to_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "PAGE_BYTES_MAX", 1000)
    bench.runs("sys.stdout.write('1 2\\n' + 'x' * 5_000_000 + '# EOF\\n'); sys.stderr.write('e' * 5_000_000)")
    with bench.started(config_with()) as one:
        asked(one, bench.now)
        bench.settle(one)
        assert "kvtally_build_info" in page(one)
        bench.runs("sys.stderr.write('e' * 5_000_000); sys.exit(1)")
        bench.passes(one, 60)
    assert "could not be read" in bench.lines[0]
    assert "e" * 300 in bench.lines[1]
    assert "e" * 301 not in bench.lines[1]


def test_a_child_that_hangs_is_ended_and_told(bench: Bench) -> None:
    bench.runs("time.sleep(600)")
    with bench.started(config_with()) as exporting:
        asked(exporting, bench.now)
        exporting.look()
        asked(exporting, bench.now + CHILD_SECONDS_MAX)
        bench.now += CHILD_SECONDS_MAX
        exporting.look()
        assert bench.lines == []
        bench.now += 1
        exporting.look()
        (line,) = bench.lines
        assert "it took longer than 300 s" in line
        # the next one has been begun, and ends with the run
        assert exporting._page._child is not None
        pid = exporting._page._child._pid
        assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_where_no_process_is_to_be_had_it_is_told_and_tried_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable, before = sys.executable, open_files()
    with bench.started(config_with("", "http://127.0.0.1:4318")) as exporting:
        monkeypatch.setattr(sys, "executable", "/nowhere/python")
        bench.passes(exporting, 120)
        assert "could not be begun" in bench.lines[0]
        monkeypatch.setattr(sys, "executable", executable)
        bench.passes(exporting, 60)
        assert len(bench.calls()) == 1
        assert open_files() == before


def test_no_file_is_left_open_however_a_child_ends(bench: Bench) -> None:
    with bench.started(config_with()) as exporting:
        before = open_files()
        for program in ("", "sys.exit(3)", f"sys.stdout.buffer.write({packed(PAGES)!r})"):
            bench.runs(program)
            asked(exporting, bench.now)
            bench.passes(exporting, 60)
        assert len(bench.calls()) == 3
        assert open_files() == before


# when is pushed


def test_pushes_come_at_their_interval_whether_or_not_they_are_taken(bench: Bench) -> None:
    with bench.started(config_with(""), ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "20000"}) as exporting:
        bench.passes(exporting, 60)
        assert bench.calls() == ["-m kvtally export otlp --ledger sqlite:///ledger.db"] * 3
        bench.runs("sys.stderr.write('the backend did not take them: refused\\n'); sys.exit(3)")
        bench.passes(exporting, 60)
        assert len(bench.calls()) == 6
    assert len(bench.lines) == 1  # the same complaint once a minute
    assert "OTLP: not sent, or not whole; what was not sent is in the next push" in bench.lines[0]
    assert "the backend did not take them: refused" in bench.lines[0]


def test_what_the_ledger_holds_in_the_end_is_pushed_once_more(bench: Bench) -> None:
    with bench.started(config_with(""), ENDPOINT) as exporting:
        bench.passes(exporting, 5)
        exporting.close()
        exporting.push_last()
        assert bench.calls() == ["-m kvtally export otlp --ledger sqlite:///ledger.db"] * 2
    assert bench.lines == []


def test_a_last_push_that_hangs_holds_up_the_end_for_a_bounded_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtally.agent.exporting.LAST_SECONDS", 0.2)
    bench.runs("time.sleep(60)")
    with bench.started(config_with(""), ENDPOINT) as exporting:
        exporting.push_last()
        assert not exporting._otlp.is_running
    (line,) = bench.lines
    assert "OTLP: the last figures were not sent" in line
    assert "the push took longer than 0.2 s" in line


def test_a_page_and_a_push_never_run_side_by_side_and_neither_waits_for_ever(bench: Bench) -> None:
    """Both are due at every look: each takes longer than the other rests."""
    bench.prints(packed(PAGES))
    with bench.started(config_with(refresh=5), ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "1000"}) as exporting:
        for _ in range(6):
            asked(exporting, bench.now)
            exporting.look()
            (running,) = [job for job in (exporting._page, exporting._otlp) if job.is_running]
            wait_for_end(running)
            bench.now += 20
    assert [call.split()[3] for call in bench.calls()] == ["page", "otlp"] * 3


def test_what_nobody_understands_of_the_environment_is_told_at_the_start(bench: Bench) -> None:
    temporality = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    with bench.started(config_with(""), ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "abc", temporality: "Deltas"}):
        pass
    assert ["no whole number of milliseconds" in bench.lines[0], "cumulative holds" in bench.lines[1]] == [True, True]
    with bench.started(config_with(""), ENDPOINT | {"OTEL_METRIC_EXPORT_INTERVAL": "2000", temporality: "DELTA"}):
        pass
    assert len(bench.lines) == 2
    with bench.started(config_with(""), {"OTEL_EXPORTER_OTLP_ENDPOINT": "127.0.0.1:4318"}):
        pass
    assert "write http://127.0.0.1:4318" in bench.lines[2]


def test_nothing_is_pushed_where_no_endpoint_is_named(bench: Bench) -> None:
    with bench.started(config_with("")) as exporting:
        bench.passes(exporting, 600)
    assert bench.calls() == []


# the child


def test_a_child_writes_where_it_is_told_and_says_what_it_took(bench: Bench, tmp_path: Path) -> None:
    bench.runs("print('out'); print('err', file=sys.stderr); sum(range(3_000_000)); sys.exit(4)")
    with (tmp_path / "out").open("wb") as out, (tmp_path / "err").open("wb") as err:
        child = Child("any", "words", stdout=out.fileno(), stderr=err.fileno())
        assert child.wait() == 4
    assert (tmp_path / "out").read_text() == "out\n"
    assert (tmp_path / "err").read_text() == "err\n"
    assert 0.01 < child.cpu_seconds < 20
    child.kill()  # one that has ended is let be
    assert (child.poll(), child.command) == (4, "any words")


def test_a_child_that_is_killed_says_so(bench: Bench) -> None:
    bench.runs("time.sleep(600)")
    child = Child("any")
    assert child.poll() is None
    child.kill()
    assert child.wait() == -9


# the whole


def configured(engine: FakeEngine, listen: str = ANY_PORT, more: str = "") -> str:
    return (
        "[scrape]\ninterval_seconds = 1\ndiscover = false\n[gpu]\nenabled = false\n"
        f'[export.prometheus]\nlisten = "{listen}"\nrefresh_seconds = 5\n{more}'
        f'[[engine]]\nurl = "http://{engine.name}"\n'
    )


def test_a_run_serves_what_its_ledger_holds_and_closes_in_order(tmp_path: Path) -> None:
    with FakeEngine() as engine, DaemonProcess(tmp_path, configured(engine)) as daemon:
        daemon.wait_until("it serves", lambda: daemon.lines("started"))
        found = re.search(r"metrics=127\.0\.0\.1:(\d+)", daemon.log())
        assert found, daemon.log()
        engine.wait_for_scrapes(2)
        engine.serve(prompt=900, cached=300, generated=50)
        daemon.wait_until("the tokens are in the ledger", lambda: daemon.tokens(engine.name).generated == 50, 60)

        def shown() -> str:
            connection = HTTPConnection("127.0.0.1", int(found[1]), timeout=10)
            try:
                connection.request("GET", "/metrics")
                return connection.getresponse().read().decode()
            finally:
                connection.close()

        wanted = re.compile(r"^kvtally_generated_tokens_total\{.*\} 50\.0$", re.MULTILINE)
        daemon.wait_until("the tokens are on its page", lambda: wanted.search(shown()), 60)
        assert 'outcome="ok"' in shown()
        assert daemon.stop() == 0
        assert not daemon.lines("Z warning"), daemon.log()


def test_a_run_whose_port_is_taken_goes_on_without_it(tmp_path: Path) -> None:
    with FakeEngine() as engine, socket.create_server(("127.0.0.1", 0)) as other:
        listen = f"127.0.0.1:{other.getsockname()[1]}"
        with DaemonProcess(tmp_path, configured(engine, listen)) as daemon:
            daemon.wait_until("it says so", lambda: daemon.lines("warning", "/metrics is not served"))
            daemon.wait_until("it reads", lambda: daemon.knows(engine.name))
            assert daemon.stop() == 0


def test_a_run_whose_backend_is_down_tells_it_keeps_its_ledger_and_sends_the_sums_after(tmp_path: Path) -> None:
    with free_port() as port, FakeEngine() as engine, ExitStack() as stack:
        environment = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
            "OTEL_METRIC_EXPORT_INTERVAL": "1000",
            "OTEL_EXPORTER_OTLP_TIMEOUT": "2000",
        }
        daemon = DaemonProcess(tmp_path, configured(engine, "")).start(**environment)
        stack.push(daemon)
        daemon.wait_until("it tells of the backend", lambda: daemon.lines("OTLP: not sent"), 60)
        assert "refused" in daemon.log()
        engine.serve(prompt=900, cached=300, generated=50)
        daemon.wait_until("the tokens are in the ledger", lambda: daemon.tokens(engine.name).generated == 50, 60)
        with OtlpReceiver(port) as receiver:
            # one that was begun before may come first
            daemon.wait_until(
                "the sums are taken",
                lambda: receiver.pushes and receiver.values("kvtally.generated.tokens") == [50],
                60,
            )
            assert sum(receiver.values("kvtally.prompt.tokens")) == 900
        assert daemon.stop() == 0
        assert not daemon.lines("Z error"), daemon.log()
