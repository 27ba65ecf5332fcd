from __future__ import annotations

import contextlib
import gzip
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
import trustme

from kvtally import __version__
from kvtally.collectors.access import Access
from kvtally.collectors.base import CollectError
from kvtally.collectors.exposition import PageReader
from kvtally.collectors.http import Endpoint, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import Self

    Talk = Callable[["Server", socket.socket], None]

PAGE = b"a 1\nb 2\n"


class Server:
    """A loopback server that holds one conversation per connection, in order, and keeps the requests."""

    def __init__(self, *talks: Talk, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self._talks = talks
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.origin = f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            for talk in self._talks:
                connection = self._listener.accept()[0]
                self.connections += 1
                connection.settimeout(5)
                with connection, contextlib.suppress(OSError):  # the client has hung up
                    if self._tls is None:
                        talk(self, connection)
                    else:
                        with self._tls.wrap_socket(connection, server_side=True) as secured:
                            talk(self, secured)

    def request(self, connection: socket.socket) -> bytes:
        """Read a request; nothing if the client has closed the connection."""
        text = b""
        while not text.endswith(b"\r\n\r\n"):
            piece = connection.recv(65536)
            if not piece:
                return b""
            text += piece
        self.requests.append(text)
        return text

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


def ok(body: bytes = PAGE, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n%sContent-Length: %d\r\n\r\n%s" % (headers, len(body), body)


def status(line: bytes, *headers: bytes) -> bytes:
    return b"\r\n".join([b"HTTP/1.1 " + line, b"Content-Length: 0", *headers, b"", b""])


def answers(*texts: bytes, then_closes: bool = False) -> Talk:
    """Answer one request after the other, then close the connection or wait until the client does."""

    def talk(server: Server, connection: socket.socket) -> None:
        for text in texts:
            if not server.request(connection):
                return
            connection.sendall(text)
        if not then_closes:
            connection.recv(1)

    return talk


def drips(head: bytes, piece: bytes, pause_seconds: float) -> Talk:
    """Send the head of an answer, and then a piece again and again."""

    def talk(server: Server, connection: socket.socket) -> None:
        server.request(connection)
        connection.sendall(head)
        waiting = threading.Event()
        for _ in range(100_000):
            waiting.wait(pause_seconds)
            connection.sendall(piece)

    return talk


@contextlib.contextmanager
def endpoint(server: Server, path: str = "/metrics", **options: object) -> Iterator[Endpoint]:
    client = Endpoint(f"http://{server.origin}{path}", **{"timeout_seconds": 5.0, **options})  # type: ignore[arg-type]  # options of one test
    try:
        yield client
    finally:
        client.close()


def failure(server: Server, path: str = "/metrics", **options: object) -> CollectError:
    with server, endpoint(server, path, **options) as client:
        with pytest.raises(CollectError) as caught:
            client.get()
        assert client._stream is None
    return caught.value


def bearer(folder: Path, token: str = "hunter2\n") -> Access:
    path = folder / "token"
    path.write_text(token)
    return Access(bearer_token_file=str(path))


def authorizations(server: Server) -> list[bytes]:
    lines = (line for request in server.requests for line in request.split(b"\r\n"))
    return [line for line in lines if line.lower().startswith(b"authorization")]


def test_a_page_is_fetched_with_the_headers_of_a_scraper() -> None:
    with Server(answers(ok())) as server, endpoint(server, "/metrics/?name[]=a#x") as client:
        assert client.get() == Response(200, PAGE, "text/plain")
        assert client.url == f"http://{server.origin}/metrics/?name[]=a#x"
    assert server.requests == [
        (
            f"GET /metrics/?name[]=a HTTP/1.1\r\nHost: {server.origin}\r\nUser-Agent: kvtally/{__version__}\r\n"
            "Accept: text/plain;version=0.0.4\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode()
    ]


@pytest.mark.parametrize("target", ["", "metrics", "/a b", "/a\r\nX: y", "/ö", "http://h/"])
def test_a_target_that_is_no_path_is_refused(target: str) -> None:
    with pytest.raises(ValueError, match=r"^a target is a path"):
        Endpoint("http://127.0.0.1:1/").get(target)


def test_credentials_in_the_url_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^credentials in a URL are refused"):
        Endpoint("http://user:password@127.0.0.1:8000/metrics")


def test_one_connection_serves_many_requests_of_several_targets() -> None:
    with Server(answers(ok(b"1"), ok(b"22"), ok(b"333"))) as server, endpoint(server) as client:
        assert [client.get().body, client.get("/version?x=1").body, client.get().body] == [b"1", b"22", b"333"]
    assert server.connections == 1
    assert [request.split(b" ")[1] for request in server.requests] == [b"/metrics", b"/version?x=1", b"/metrics"]


def test_chunks_with_extensions_and_trailers_keep_the_connection() -> None:
    chunked = (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; version=0.0.4\r\ntransfer-encoding: chunked\r\n\r\n"
        b"4;x=y\r\na 1\n\r\n4\r\nb 2\n\r\n0\r\nX-Sum: 1\r\n\r\n"
    )
    with Server(answers(chunked, chunked)) as server, endpoint(server) as client:
        assert client.get() == client.get() == Response(200, PAGE, "text/plain; version=0.0.4")
    assert server.connections == 1


def test_an_http_1_0_server_that_ends_its_page_by_closing_is_read() -> None:
    old = answers(b"HTTP/1.0 200 OK\r\n\r\n" + PAGE, then_closes=True)
    with Server(old, old) as server, endpoint(server) as client:
        assert client.get() == client.get() == Response(200, PAGE, "")
    assert server.connections == 2


def test_a_gzip_page_is_inflated_though_it_was_not_asked_for() -> None:
    with Server(answers(ok(gzip.compress(PAGE), b"Content-Encoding: gzip\r\n"))) as server, endpoint(server) as client:
        assert client.get().body == PAGE


def test_a_page_larger_than_the_buffer_is_read_whole() -> None:
    page = b"".join(b"series_%d 1\n" % number for number in range(60_000))
    with Server(answers(ok(page), ok(page))) as server, endpoint(server) as client:
        assert client.get().body == page
        assert client.get().body == page
    assert server.connections == 1


def test_a_connection_closed_between_two_scrapes_is_opened_again() -> None:
    with Server(answers(ok(b"1"), then_closes=True), answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        assert client.get().body == b"2"
    assert server.connections == 2


def test_a_connection_reset_between_two_scrapes_is_opened_again() -> None:
    def resets(server: Server, connection: socket.socket) -> None:
        server.request(connection)
        connection.sendall(ok(b"1"))
        connection.recv(10)  # part of the next request: what stays unread makes the close a reset

    with Server(resets, answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        assert client.get().body == b"2"
    assert server.connections == 2


def test_a_server_that_hangs_up_on_a_new_connection_is_not_asked_again() -> None:
    server = Server(answers(then_closes=True), answers(ok()))
    error = failure(server)
    assert str(error) == f"{server.origin} closed the connection without an answer"
    assert server.connections == 1


def test_an_answer_that_breaks_off_is_not_asked_for_again() -> None:
    broken = answers(ok(b"1"), b"HTTP/1.1 200 OK\r\nA: b\r\n", then_closes=True)
    with Server(broken, answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        with pytest.raises(CollectError, match=f"^the headers of {server.origin} end early$"):
            client.get()
        assert server.connections == 1
        assert client.get().body == b"2"


def test_a_connection_that_holds_more_than_the_answer_is_not_used_again() -> None:
    with Server(answers(ok(b"1") + ok(b"stale")), answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        assert client.get().body == b"2"
    assert server.connections == 2


def test_a_connection_that_the_server_will_close_is_not_used_again() -> None:
    closing = answers(ok(b"1", b"Connection: close\r\n"), ok(b"unwanted"))
    with Server(closing, answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        assert client.get().body == b"2"
    assert server.connections == 2


def test_the_connection_is_opened_again_after_an_error() -> None:
    with Server(answers(status(b"503 Starting")), answers(ok())) as server, endpoint(server) as client:
        with pytest.raises(CollectError, match=f"^HTTP 503 from {server.origin}/metrics$"):
            client.get()
        assert client.get().body == PAGE


@pytest.mark.parametrize(
    ("talk", "doing"),
    [
        (answers(b""), "waiting for the answer of"),
        (drips(b"HTTP/1.1 200 OK\r\nX: ", b"y", 0.02), "waiting for the answer of"),
        (drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"a", 0.02), "reading the answer of"),
        (drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n", 0.02), "reading the answer of"),
        (drips(b"HTTP/1.1 200 OK\r\n\r\n", b"a", 0.02), "reading the answer of"),
    ],
    ids=["silent", "slow header", "slow body", "slow chunks", "slow body without length"],
)
def test_a_server_that_sends_a_byte_at_a_time_is_cut_at_the_deadline(talk: Talk, doing: str) -> None:
    """Each byte comes long before the deadline: a time-out per read would never end this."""
    server = Server(talk)
    error = failure(server, timeout_seconds=0.2)
    assert str(error) == f"timed out after 0.2 s while {doing} {server.origin}"
    assert error.hint


def test_redirects_share_the_deadline() -> None:
    """Two redirects and a page, each 0.12 s late: any of them would be in time alone."""

    def slow(server: Server, connection: socket.socket) -> None:
        for text in (status(b"307 Moved", b"Location: /a"), status(b"307 Moved", b"Location: /b"), ok()):
            server.request(connection)
            threading.Event().wait(0.12)
            connection.sendall(text)

    assert str(failure(Server(slow), timeout_seconds=0.3)).startswith("timed out after 0.3 s while waiting")


@pytest.mark.parametrize(
    ("talk", "reason"),
    [
        (drips(b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 65536, 0), "the body has more than 1000000 bytes"),
        (
            drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b"x" * 4096 + b"\r\n", 0),
            "the body has more than 1000000 bytes",
        ),
        (answers(b"HTTP/1.1 200 OK\r\nContent-Length: 209715200\r\n\r\n"), "the body has more than 1000000 bytes"),
        (
            answers(ok(gzip.compress(bytes(50_000_000)), b"Content-Encoding: gzip\r\n")),
            "the body has more than 1000000 bytes",
        ),
        (drips(b"HTTP/1.1 200 OK\r\n", b"X-Flood: y\r\n" * 100, 0), "more than 65536 bytes of headers"),
        (
            drips(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000, 0),
            "a line of the headers or between chunks has more than 16384 bytes",
        ),
    ],
    ids=["endless body", "endless chunks", "200 MB announced", "gzip bomb", "header flood", "endless header"],
)
def test_an_answer_without_bounds_is_cut(talk: Talk, reason: str) -> None:
    assert str(failure(Server(talk), max_bytes=1_000_000)) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\na 1\n", "the body ends after 4 of 9 bytes"),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\na 1\n\r\n",
            "the body ends after 4 bytes, in the middle of its chunks",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\na 1\n\r\nzz\r\n",
            "malformed chunk after 4 bytes of the body",
        ),
        (b"220 smtp.example ready\r\n", "not an HTTP server: it answers '220 smtp.example ready'"),
    ],
)
def test_an_answer_that_is_broken_says_how(text: bytes, reason: str) -> None:
    assert str(failure(Server(answers(text, then_closes=True)))) == reason


@pytest.mark.parametrize(
    ("answer", "code", "hint"),
    [
        (status(b"500 Internal Server Error"), 500, "see the log of the server"),
        (status(b"404 Not Found"), 404, "check the path"),
        (status(b"400 Bad Request"), 400, "try https"),
        (status(b"400 Bad Request"), 400, "Storage Scale bridge serves /metrics_gpfs_filesystem"),
        (status(b"204 No Content"), 204, "see the log"),
        (status(b"304 Not Modified"), 304, "see the log"),
        (status(b"302 Found"), 302, "see the log"),
    ],
)
def test_another_status_than_200_is_an_error_with_a_hint(answer: bytes, code: int, hint: str, tmp_path: Path) -> None:
    server = Server(answers(answer))
    error = failure(server, "/metrics?token=hunter2", access=bearer(tmp_path))
    assert str(error) == f"HTTP {code} from {server.origin}/metrics"
    assert hint in error.hint
    assert "hunter2" not in error.hint


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("/metrics/", "/metrics/"),
        ("http://{origin}/metrics/?name[]=a", "/metrics/?name[]=a"),
        ("HTTP://{origin}/metrics/#part", "/metrics/"),
        ("//{origin}/other", "/other"),
        ("other", "/v1/other"),
        ("?x=1", "/v1/metrics?x=1"),
        ("http://{origin}", "/"),
    ],
)
def test_a_redirect_to_the_same_server_is_followed_on_the_same_connection(location: str, target: str) -> None:
    def moved(server: Server, connection: socket.socket) -> None:
        place = location.format(origin=server.origin).encode()
        answers(status(b"307 Temporary Redirect", b"Location: " + place), ok())(server, connection)

    with Server(moved) as server, endpoint(server, "/v1/metrics?y=2") as client:
        assert client.get().body == PAGE
    assert server.connections == 1
    assert [request.split(b" ")[1].decode() for request in server.requests] == ["/v1/metrics?y=2", target]


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("http://127.0.0.1:1/metrics?token=hunter2", "http://127.0.0.1:1/metrics"),
        ("https://{origin}/metrics", "https://{origin}/metrics"),
        ("//example.org/", "http://example.org:80/"),
    ],
)
def test_a_redirect_to_another_server_is_refused_and_named(location: str, shown: str, tmp_path: Path) -> None:
    def moved(server: Server, connection: socket.socket) -> None:
        place = location.format(origin=server.origin).encode()
        answers(status(b"301 Moved Permanently", b"Location: " + place))(server, connection)

    server = Server(moved)
    error = failure(server, access=bearer(tmp_path))
    place = shown.format(origin=server.origin)
    assert str(error) == f"{server.origin}/metrics redirects to {place}, which is not followed"
    assert "configure it as the URL" in error.hint


@pytest.mark.parametrize("location", ["http://user:hunter2@h/", "mailto:hunter2", "/a b", "http://h:99999/"])
def test_a_redirect_to_what_is_no_url_is_refused(location: str) -> None:
    server = Server(answers(status(b"302 Found", b"Location: " + location.encode())))
    assert str(failure(server)) == f"{server.origin}/metrics redirects to a place that is no URL"


def test_a_redirect_loop_is_an_error() -> None:
    loop = [status(b"307 Moved", b"Location: " + place) for place in (b"/b", b"/a?x=1", b"/b")]
    server = Server(answers(*loop))
    assert str(failure(server, "/a?x=1")) == f"redirect loop at {server.origin}/a"
    assert len(server.requests) == 2


def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    moves = [status(b"307 Moved", b"Location: /%d" % number) for number in range(4)]
    with Server(answers(*moves[:3], ok())) as server, endpoint(server) as client:
        assert client.get().body == PAGE
    server = Server(answers(*moves))
    assert str(failure(server)) == f"more than 3 redirects from {server.origin}/metrics"
    assert len(server.requests) == 4


def test_a_refused_connection_says_that_nothing_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(CollectError, match=f"^connection refused: nothing listens on 127.0.0.1:{port}$") as caught:
        Endpoint(f"http://127.0.0.1:{port}/metrics").get()
    assert caught.value.hint == "start the server, or correct the host and port of the URL"


def test_a_connection_that_is_never_accepted_times_out() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_connection(deaf.getsockname()):
        origin = f"127.0.0.1:{deaf.getsockname()[1]}"
        with pytest.raises(CollectError, match=f"^timed out after 0.2 s while connecting to {origin}$"):
            Endpoint(f"http://{origin}/metrics", timeout_seconds=0.2).get()


def test_another_fault_of_the_network_is_told_in_its_own_words() -> None:
    def unreachable(*_: object) -> list[object]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("255.255.255.255", 80))]

    with pytest.raises(CollectError, match=r"while connecting to \[2001:db8::1\]:80$"):
        Endpoint("http://[2001:db8::1]/metrics", resolve=unreachable).get()


def test_an_ipv6_host_stands_in_brackets_in_the_request() -> None:
    with Server(answers(ok())) as server:
        host, port = server.origin.split(":")
        client = Endpoint(
            f"http://[::1]:{port}/metrics",
            resolve=lambda *_: [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, int(port)))],
        )
        assert client.get().body == PAGE
        client.close()
    assert f"Host: [::1]:{port}".encode() in server.requests[0].split(b"\r\n")


def test_a_page_that_is_no_metrics_page_is_left_to_the_reader() -> None:
    with Server(answers(ok(b"<!DOCTYPE html><title>Grafana</title>"))) as server, endpoint(server) as client:
        body = client.get().body
    with pytest.raises(CollectError, match=r"^not a metrics page: it begins with '<!DOCTYPE html>"):
        PageReader({"a"}.__contains__).read(body)


def test_a_closed_endpoint_opens_a_new_connection() -> None:
    with Server(answers(ok(b"1")), answers(ok(b"2"))) as server, endpoint(server) as client:
        assert client.get().body == b"1"
        client.close()
        client.close()
        assert client.get().body == b"2"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def tls(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    return context


def trusting(authority: trustme.CA, folder: Path) -> Access:
    path = folder / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return Access(ca_file=str(path))


def test_https_is_spoken_with_a_server_whose_certificate_is_trusted(
    authority: trustme.CA, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    page = PAGE * 50_000
    access = trusting(authority, tmp_path)
    with Server(answers(ok(page), ok(page), then_closes=True), answers(ok(b"2")), tls=tls) as server:
        client = Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5, access=access)
        assert [client.get().body, client.get().body, client.get().body] == [page, page, b"2"]
        client.close()
    assert server.connections == 2


def test_a_certificate_that_is_not_trusted_is_refused_with_a_hint(tls: ssl.SSLContext) -> None:
    with Server(answers(ok()), tls=tls) as server:
        with pytest.raises(CollectError, match=f"^the certificate of {server.origin} is not trusted: ") as caught:
            Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5).get()
        assert caught.value.hint == "set access.ca_file to the file of its certificate authority"
    assert server.requests == []


def test_credentials_are_not_sent_before_the_certificate_is_trusted(tls: ssl.SSLContext, tmp_path: Path) -> None:
    with Server(answers(ok()), tls=tls) as server, pytest.raises(CollectError, match="is not trusted"):
        Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5, access=bearer(tmp_path)).get()
    assert server.requests == []


def test_https_to_a_plain_server_is_an_error() -> None:
    def plain(_: Server, connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with Server(plain) as server, pytest.raises(CollectError, match=f"^{server.origin} does not speak TLS$") as caught:
        Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5).get()
    assert caught.value.hint == "if it is a plain server, write http in the URL"


def test_a_server_that_wants_a_client_certificate_gets_it(
    authority: trustme.CA, tls: ssl.SSLContext, tmp_path: Path
) -> None:
    tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(tls)
    own = authority.issue_cert("kvtally.example")
    own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own.pem"))
    access = trusting(authority, tmp_path)._replace(cert_file=str(tmp_path / "own.pem"))
    with Server(answers(ok()), tls=tls) as server:
        client = Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5, access=access)
        assert client.get().body == PAGE
        client.close()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_server_that_misses_a_client_certificate_leads_to_the_setting(
    authority: trustme.CA, tls: ssl.SSLContext, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.maximum_version = version
    access = trusting(authority, tmp_path)
    with Server(answers(ok()), tls=tls) as server, pytest.raises(CollectError) as caught:
        Endpoint(f"https://{server.origin}/metrics", timeout_seconds=5, access=access).get()
    assert "access.cert_file" in caught.value.hint
    assert server.requests == []


def test_a_bearer_token_is_sent_from_its_file(tmp_path: Path) -> None:
    with Server(answers(ok(), ok())) as server, endpoint(server, access=bearer(tmp_path)) as client:
        client.get()
        client.get("/version")
    assert authorizations(server) == [b"Authorization: Bearer hunter2"] * 2
    assert server.connections == 1


def test_a_user_name_and_a_password_are_sent_as_basic_auth(tmp_path: Path) -> None:
    (tmp_path / "word").write_text("open sesame\n")
    access = Access(username="Aladdin", password_file=str(tmp_path / "word"))
    with Server(answers(ok())) as server, endpoint(server, access=access) as client:
        client.get()
    assert authorizations(server) == [b"Authorization: Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="]  # the example of RFC 7617


def test_a_token_that_was_replaced_between_two_requests_is_read_anew(tmp_path: Path) -> None:
    access = bearer(tmp_path, "first")
    with Server(answers(ok(), ok(), ok())) as server, endpoint(server, access=access) as client:
        client.get()
        client.get()
        (tmp_path / "next").write_text("other")
        (tmp_path / "next").replace(tmp_path / "token")
        client.get()
    assert [line.split()[-1] for line in authorizations(server)] == [b"first", b"first", b"other"]


def test_a_token_that_expires_is_replaced_by_the_one_that_has_come_to_lie_on_disk(tmp_path: Path) -> None:
    """The file is replaced while the request is under way: the server refuses the old token, and takes the new one."""
    access = bearer(tmp_path, "old")

    def expires(server: Server, connection: socket.socket) -> None:
        server.request(connection)
        (tmp_path / "token").write_text("new")
        connection.sendall(status(b"401 Unauthorized"))

    with Server(expires, answers(ok())) as server, endpoint(server, access=access) as client:
        assert client.get().body == PAGE
    assert [line.split()[-1] for line in authorizations(server)] == [b"old", b"new"]


@pytest.mark.parametrize(("line", "hint"), [(b"401 Unauthorized", "may have expired"), (b"403 Forbidden", "role")])
def test_a_token_that_is_refused_is_sent_once_and_stands_nowhere(tmp_path: Path, line: bytes, hint: str) -> None:
    server = Server(answers(status(line)))
    error = failure(server, access=bearer(tmp_path))
    assert str(error) == f"HTTP {line[:3].decode()} from {server.origin}/metrics"
    assert "access.bearer_token_file" in error.hint
    assert hint in error.hint
    assert len(server.requests) == 1
    assert "hunter2" not in f"{error!r} {error.hint} {error.__cause__} {error.__context__!r}"


def test_a_token_that_is_refused_is_replaced_only_once(tmp_path: Path) -> None:
    access = bearer(tmp_path, "0")

    def refuses(server: Server, connection: socket.socket) -> None:
        server.request(connection)
        (tmp_path / "token").write_text(str(len(server.requests)))
        connection.sendall(status(b"403 Forbidden"))

    server = Server(refuses, refuses)
    assert str(failure(server, access=access)) == f"HTTP 403 from {server.origin}/metrics"
    assert [line.split()[-1] for line in authorizations(server)] == [b"0", b"1"]


def test_where_nothing_is_configured_a_refusal_names_what_could_be() -> None:
    error = failure(Server(answers(status(b"401 Unauthorized"))))
    assert "set access.bearer_token_file, or access.username and access.password_file" in error.hint


def test_a_token_file_that_is_missing_is_an_error_of_this_scrape_and_not_of_the_next(tmp_path: Path) -> None:
    access = Access(bearer_token_file=str(tmp_path / "token"))
    with Server(answers(), answers(ok())) as server, endpoint(server, access=access) as client:
        with pytest.raises(CollectError, match=r"/token cannot be read: No such file or directory$"):
            client.get()
        bearer(tmp_path)
        assert client.get().body == PAGE
    assert authorizations(server) == [b"Authorization: Bearer hunter2"]


def test_a_token_of_two_lines_smuggles_no_header(tmp_path: Path) -> None:
    error = failure(Server(answers(ok())), access=bearer(tmp_path, "a\r\nX-Admin: hunter2"))
    assert str(error) == f"{tmp_path}/token holds no token: one line without spaces, in ASCII"
