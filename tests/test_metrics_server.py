from __future__ import annotations

import socket
import threading
import time
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING, NamedTuple

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families as text_families

from kvtally.agent import metrics_server
from kvtally.agent.health import Health
from kvtally.agent.metrics_server import (
    OPENMETRICS,
    TEXT,
    Figures,
    MetricsServer,
    packed,
    prefers_openmetrics,
    unpacked,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# what they send: Prometheus 2.42 and 3.4, VictoriaMetrics' vmagent, curl
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
VMAGENT = "text/plain;version=0.0.4;q=1,*/*;q=0.1"
AT_NS = 1_795_406_400_000_000_000
FIGURES = Figures(
    AT_NS,
    b"# HELP kvtally_generated_tokens_total x\n# TYPE kvtally_generated_tokens_total counter\n"
    b"kvtally_generated_tokens_total 7.0\n",
    b"# HELP kvtally_generated_tokens x\n# TYPE kvtally_generated_tokens counter\n"
    b"kvtally_generated_tokens_total 7.0\n# EOF\n",
)


class Got(NamedTuple):
    """An answer."""

    status: int
    kind: str | None
    body: str


@pytest.fixture
def server() -> Iterator[MetricsServer]:
    one = MetricsServer("127.0.0.1", 0, Health("ledger.db"), lambda: AT_NS + 30_000_000_000)
    try:
        yield one
    finally:
        one.close()


def got(port: int, path: str = "/metrics", method: str = "GET", host: str = "127.0.0.1", **headers: str) -> Got:
    with closing(HTTPConnection(host, port, timeout=10)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return Got(answer.status, answer.getheader("Content-Type"), answer.read().decode())


def raw(port: int, *pieces: bytes) -> socket.socket:
    """A client that has sent these pieces and no more."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    for piece in pieces:
        client.sendall(piece)
    return client


def everything(client: socket.socket) -> bytes:
    """What comes until the server closes."""
    received = b""
    try:
        while piece := client.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


def test_metrics_are_the_figures_and_then_its_own_health(server: MetricsServer) -> None:
    before = got(server.port)
    assert (before.status, before.kind) == (200, TEXT)
    assert "kvtally_build_info" in before.body
    assert "kvtally_generated_tokens_total" not in before.body
    server.figures = FIGURES
    after = got(server.port)
    names = [family.name for family in text_families(after.body)]
    assert names[0] == "kvtally_generated_tokens"
    assert "kvtally_build_info" in names
    assert "kvtally_snapshot_age_seconds 30.0\n" in after.body


def test_openmetrics_is_served_whole_with_one_end(server: MetricsServer) -> None:
    for figures in (None, FIGURES):
        server.figures = figures
        answer = got(server.port, Accept=PROMETHEUS_2)
        assert (answer.status, answer.kind) == (200, OPENMETRICS)
        families = {one.name: one for one in openmetrics_families(answer.body)}  # type: ignore[no-untyped-call]  # as above
        assert families["kvtally_failed_writes"].type == "counter"
        assert ("kvtally_generated_tokens" in families) == (figures is not None)
        assert answer.body.count("# EOF") == 1


def test_figures_that_are_too_old_are_left_out_and_their_age_is_told(server: MetricsServer) -> None:
    server.figures = FIGURES._replace(at_ns=AT_NS - 871_000_000_000)
    answer = got(server.port)
    assert "kvtally_generated_tokens_total" not in answer.body
    assert "kvtally_snapshot_age_seconds 901.0\n" in answer.body
    server.figures = FIGURES._replace(at_ns=AT_NS - 869_000_000_000)
    assert "kvtally_generated_tokens_total" in got(server.port).body


@pytest.mark.parametrize(
    ("accept", "openmetrics"),
    [
        (PROMETHEUS_2, True),
        (PROMETHEUS_3, True),
        (VMAGENT, False),
        ("*/*", False),
        ("", False),
        ("application/openmetrics-text", True),
        ("Application/OpenMetrics-Text; version=1.0.0", True),
        ("application/openmetrics-text;q=0", False),
        ("application/openmetrics-text;q=0.3, text/plain;q=0.4", False),
        ("application/openmetrics-text;q=x,text/plain", False),
        ("text/plain,application/openmetrics-text", False),
        ("application/openmetrics-text,text/plain", True),
        ("text/plain;q=0.5,application/openmetrics-text;q=0.5", False),
        ("text/plain;q=0,application/openmetrics-text;q=0", False),
        ("text/plain;q=0.2,application/openmetrics-text;q=0.3,text/plain;q=0.3", False),
        (",;,;q=;=", False),
    ],
)
def test_openmetrics_is_for_those_who_ask_for_it_first(accept: str, *, openmetrics: bool) -> None:
    assert prefers_openmetrics(accept) is openmetrics


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text"),
        ("application/openmetrics-text;version=1.0.0,text/plain;q=0.5", "application/openmetrics-text"),
        ("text/plain;version=0.0.4;q=0.6,application/openmetrics-text;version=1.0.0;q=0.5", "text/plain"),
    ],
)
def test_the_first_type_that_a_scraper_names_counts_on_the_wire_too(
    server: MetricsServer, accept: str, kind: str
) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(f"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
        answer = b"".join(iter(lambda: client.recv(65536), b"")).decode()
    assert f"\r\nContent-Type: {kind};" in answer
    assert answer.endswith("# EOF\n") is (kind != "text/plain")


def test_health_and_readiness_are_told(server: MetricsServer) -> None:
    assert got(server.port, "/-/healthy").status == 200
    assert got(server.port, "/-/ready").status == 503
    server._health.is_ready = True
    assert got(server.port, "/-/ready").status == 200
    assert got(server.port, "/").status == 200


def test_a_run_that_reads_nothing_any_more_is_not_healthy() -> None:
    now = [0.0]
    server = MetricsServer("127.0.0.1", 0, Health("ledger.db", lambda: now[0]))
    try:
        assert got(server.port, "/-/healthy").status == 200
        now[0] = 901.0
        assert got(server.port, "/-/healthy").status == 503
    finally:
        server.close()


def test_a_query_is_ignored_and_another_address_is_not_found(server: MetricsServer) -> None:
    assert got(server.port, "/metrics?name[]=x").status == 200
    for path in ("/metric", "/metrics/", "/..", "//"):
        assert got(server.port, path).status == 404
    assert server.asked_at is not None


def test_only_metrics_count_as_asked_for(server: MetricsServer) -> None:
    got(server.port, "/-/healthy")
    got(server.port, "/nothing")
    assert server.asked_at is None
    before = time.monotonic()
    got(server.port)
    assert before <= (server.asked_at or 0) <= time.monotonic()


def test_head_has_the_length_and_no_body(server: MetricsServer) -> None:
    with closing(raw(server.port, b"HEAD /-/healthy HTTP/1.1\r\nHost: x\r\n\r\n")) as client:
        head, _, body = everything(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200 OK\r\n")
    assert b"Content-Length: 20" in head
    assert body == b""


def test_another_method_is_refused_and_told_which_are_not(server: MetricsServer) -> None:
    for method in (b"POST", b"DELETE", b"OPTIONS"):
        with closing(raw(server.port, method + b" /metrics HTTP/1.1\r\nHost: x\r\n\r\n")) as client:
            head = everything(client).partition(b"\r\n\r\n")[0].split(b"\r\n")
        assert head[0] == b"HTTP/1.0 405 Method Not Allowed"
        assert b"Allow: GET, HEAD" in head


@pytest.mark.parametrize(
    ("target", "status"),
    [
        (b"http://127.0.0.1:9478/-/healthy", b"200"),
        (b"HTTP://kvtally.example/-/healthy?x=://", b"200"),
        (b"https://kvtally.example/metrics?name[]=x", b"200"),
        (b"http://kvtally.example", b"200"),
        (b"http://kvtally.example/nothing", b"404"),
        (b"ftp://kvtally.example/metrics", b"404"),
        (b"/x?http://kvtally.example/metrics", b"404"),
        (b"*", b"404"),
    ],
)
def test_a_target_may_name_the_server_as_for_a_proxy(server: MetricsServer, target: bytes, status: bytes) -> None:
    with closing(raw(server.port, b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n\r\n")) as client:
        assert everything(client).split()[1] == status


@pytest.mark.parametrize(
    "request_text",
    [b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET /" + b"x" * 9000 + b" HTTP/1.1\r\n\r\n"],
)
def test_what_is_no_request_gets_no_figures_and_harms_nobody(server: MetricsServer, request_text: bytes) -> None:
    with closing(raw(server.port, request_text)) as client:
        assert b"kvtally_" not in everything(client)
    assert got(server.port).status == 200


def test_a_request_that_comes_byte_by_byte_is_answered(server: MetricsServer) -> None:
    with closing(raw(server.port, *(bytes([one]) for one in b"GET /-/healthy HTTP/1.0\n\n"))) as client:
        assert everything(client).startswith(b"HTTP/1.0 200 OK\r\n")


def test_a_client_that_sends_nothing_is_let_go(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_CLIENT_SECONDS", 0.2)
    with closing(raw(server.port, b"GET /metrics HTTP/1.1\r\nHost:")) as client:
        assert everything(client) == b""


def test_a_client_that_reads_nothing_holds_no_thread_for_long(
    server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_server, "_CLIENT_SECONDS", 0.2)
    monkeypatch.setattr(metrics_server._Handler, "timeout", 0.2)
    server.figures = FIGURES._replace(text=b"# " + b"x" * 32_000_000 + b"\n")
    with closing(raw(server.port, b"GET /metrics HTTP/1.0\r\n\r\n")) as client:
        assert client.recv(5) == b"HTTP/"
        wait_until_alone()
        assert len(everything(client)) < 32_000_000
    server.figures = None
    assert got(server.port).status == 200


def wait_until_alone(within_seconds: float = 20.0) -> None:
    """Wait until no client is being served."""
    deadline = time.monotonic() + within_seconds
    while any("process_request_thread" in thread.name for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_client_that_goes_away_harms_nobody(server: MetricsServer, capfd: pytest.CaptureFixture[str]) -> None:
    server.figures = FIGURES._replace(text=b"# " + b"x" * 8_000_000 + b"\n")
    for _ in range(20):
        raw(server.port, b"GET /metrics HTTP/1.0\r\n\r\n").close()
    wait_until_alone()
    server.figures = None
    assert got(server.port).status == 200
    assert capfd.readouterr() == ("", "")


def test_a_ninth_client_is_turned_away_and_room_comes_back(server: MetricsServer) -> None:
    clients = [raw(server.port, b"GET /metrics HTTP/1.0\r\n") for _ in range(8)]
    deadline = time.monotonic() + 20
    while threading.active_count() < 8 + 2:  # its own and this one
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with closing(raw(server.port)) as ninth:
        assert everything(ninth) == b""
    for client in clients:
        client.sendall(b"\r\n")
        assert everything(client).startswith(b"HTTP/1.0 200 OK")
        client.close()
    wait_until_alone()
    assert got(server.port).status == 200


def test_where_no_thread_is_to_be_had_room_comes_back(server: MetricsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_server, "_BREATH_SECONDS", 0)
    start = threading.Thread.start

    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    for _ in range(10):
        with closing(raw(server.port, b"GET /metrics HTTP/1.0\r\n\r\n")) as client:
            assert everything(client) == b""
    monkeypatch.setattr(threading.Thread, "start", start)
    assert got(server.port).status == 200


def can_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.skipif(not can_ipv6(), reason="this machine has no IPv6")
def test_ipv6_is_served_and_all_addresses_are_those_of_both() -> None:
    for host, asked in (("::1", ("::1",)), ("::", ("::1", "127.0.0.1"))):
        server = MetricsServer(host, 0, Health("ledger.db"))
        try:
            assert [got(server.port, host=one).status for one in asked] == [200] * len(asked)
        finally:
            server.close()


def test_a_port_in_use_and_an_address_of_another_host_are_refused(server: MetricsServer) -> None:
    for host, port in (("127.0.0.1", server.port), ("192.0.2.1", 0)):
        with pytest.raises(OSError, match=r"(?i)address"):
            MetricsServer(host, port, Health("ledger.db"))


def test_its_port_is_free_again_and_no_thread_is_left_when_it_is_closed() -> None:
    before = set(threading.enumerate())
    for _ in range(3):
        server = MetricsServer("127.0.0.1", 0, Health("ledger.db"))
        port = server.port
        assert got(port, "/-/healthy").status == 200
        server.close()
        with pytest.raises(ConnectionRefusedError):
            got(port)
        again = MetricsServer("127.0.0.1", port, Health("ledger.db"))
        again.close()
    wait_until_alone()
    assert set(threading.enumerate()) == before


def test_what_is_packed_is_unpacked_and_nothing_else() -> None:
    assert unpacked(packed(FIGURES)) == FIGURES
    assert unpacked(packed(Figures(1, b"", b"# EOF\n"))) == Figures(1, b"", b"# EOF\n")
    for content in (b"", b"\n", packed(FIGURES)[:-3], b"1\n# EOF\n", b"a b\n# EOF\n", b"1 2 3\n# EOF\n"):
        with pytest.raises(ValueError, match=r"no figures|invalid literal"):
            unpacked(content)
