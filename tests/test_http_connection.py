from __future__ import annotations

import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from kvtally.collectors.access import Access
from kvtally.collectors.base import CollectError
from kvtally.collectors.http_connection import Connector, Place, seconds_left, take_apart, without_query

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.mark.parametrize(
    ("url", "place", "authority"),
    [
        ("http://127.0.0.1:8000/metrics", Place("http", "127.0.0.1", 8000, "/metrics"), "127.0.0.1:8000"),
        ("HTTP://Engine-0.Pods_x.svc", Place("http", "engine-0.pods_x.svc", 80, "/"), "engine-0.pods_x.svc"),
        ("https://h/m", Place("https", "h", 443, "/m"), "h"),
        ("https://h:80/m", Place("https", "h", 80, "/m"), "h:80"),
        ("http://[::1]:8000/m", Place("http", "::1", 8000, "/m"), "[::1]:8000"),
        ("http://[FE80::1]", Place("http", "fe80::1", 80, "/"), "[fe80::1]"),
        ("http://h/m/?name[]=a:b&x=@#part", Place("http", "h", 80, "/m/?name[]=a:b&x=@"), "h"),
        ("http://h?x=/", Place("http", "h", 80, "/?x=/"), "h"),
    ],
)
def test_a_url_is_taken_apart(url: str, place: Place, authority: str) -> None:
    assert take_apart(url) == place
    assert take_apart(url).authority == authority


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h:8000",
        "ftp://h/",
        "http://",
        "http:///metrics",
        "http://h:0/",
        "http://h:65536/",
        "http://h:x/",
        "http://h /",
        "http://h/a b",
        "http://h/\r\nX: y",
        "http://h/metrics\n",
        "http://hö/",
        "http://h/ö",
        "http://[::1",
        "http://::1/",
    ],
)
def test_what_is_no_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(not a URL|no such port)"):
        take_apart(url)


@pytest.mark.parametrize(
    "url", ["http://user:hunter2@h/", "http://hunter2@h", "user:hunter2@h:80/x", "http://user:hunter2@[::1]:x/"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^credentials in a URL are refused") as caught:
        take_apart(url)
    assert "hunter2" not in str(caught.value)
    assert "access.password_file" in str(caught.value)


def test_neither_query_nor_fragment_stands_in_a_message() -> None:
    assert without_query("/metrics?token=hunter2") == "/metrics"
    with pytest.raises(ValueError, match=r"http://h:port/x'$") as caught:
        take_apart("http://h:port/x?token=hunter2#hunter2")
    assert "hunter2" not in str(caught.value)


def test_a_deadline_that_has_passed_is_a_time_out() -> None:
    assert 4 < seconds_left(time.monotonic() + 5) <= 5
    with pytest.raises(TimeoutError):
        seconds_left(time.monotonic())


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def address_of(server: socket.socket) -> tuple[Any, ...]:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", server.getsockname())


def free_address() -> tuple[Any, ...]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return address_of(server)


def connector(host: str, resolve: Any) -> Connector:
    return Connector(Place("http", host, 8000, "/"), Access(), resolve)


def test_the_resolver_is_asked_for_host_and_port(listener: socket.socket) -> None:
    asked: list[tuple[Any, ...]] = []

    def resolve(*arguments: Any) -> list[Any]:
        asked.append(arguments)
        return [address_of(listener)]

    for host in ("::1", "127.0.0.1", "engine"):
        connector(host, resolve).connect(time.monotonic() + 5).close()
    assert asked == [(host, 8000, 0, socket.SOCK_STREAM) for host in ("::1", "127.0.0.1", "engine")]


def test_the_next_address_is_tried_when_one_refuses(listener: socket.socket) -> None:
    connection = connector("h", lambda *_: [free_address(), address_of(listener)]).connect(time.monotonic() + 5)
    with connection:
        assert connection.getpeername() == listener.getsockname()


def test_an_address_that_swallows_packets_leaves_time_for_the_next(listener: socket.socket) -> None:
    """A full backlog of a socket that nobody accepts from drops what comes: no answer, no refusal."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, socket.create_connection(deaf.getsockname()):
        both = [address_of(deaf), address_of(listener)]
        with connector("h", lambda *_: both).connect(time.monotonic() + 0.4) as connection:
            assert connection.getpeername() == listener.getsockname()
        with pytest.raises(TimeoutError):
            connector("h", lambda *_: both[:1]).connect(time.monotonic() + 0.2)


def test_the_last_refusal_is_raised() -> None:
    with pytest.raises(ConnectionRefusedError):
        connector("h", lambda *_: [free_address()]).connect(time.monotonic() + 5)
    with pytest.raises(OSError, match="the host has no address"):
        connector("h", lambda *_: []).connect(time.monotonic() + 5)


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "h: Name or service not known"),
        (UnicodeError("label too long"), "h: label too long"),
    ],
)
def test_a_host_without_address_is_named(failure: Exception, reason: str) -> None:
    def resolve(*_: Any) -> list[Any]:
        raise failure

    with pytest.raises(CollectError, match=f"^no address for the host {reason}$") as caught:
        connector("h", resolve).connect(time.monotonic() + 5)
    assert "DNS" in caught.value.hint


def test_a_look_up_that_hangs_is_left_at_the_deadline_and_not_started_twice(listener: socket.socket) -> None:
    released = threading.Event()
    asked: list[str] = []

    def resolve(host: str, *_: Any) -> list[Any]:
        asked.append(host)
        released.wait(10)
        return [address_of(listener)]

    hanging = connector("engine", resolve)
    for _ in range(3):
        with pytest.raises(CollectError, match=r"^timed out while looking up the host engine$"):
            hanging.connect(time.monotonic() + 0.05)
    assert asked == ["engine"]
    released.set()
    hanging.connect(time.monotonic() + 5).close()
    assert asked == ["engine"]
    hanging.connect(time.monotonic() + 5).close()
    assert asked == ["engine", "engine"]


def test_a_certificate_file_that_is_missing_is_named(listener: socket.socket) -> None:
    access = Access(ca_file="/nowhere/ca.pem")
    missing = Connector(Place("https", "h", 443, "/"), access, lambda *_: [address_of(listener)])
    with pytest.raises(CollectError, match=r"^the certificate file /nowhere/ca\.pem cannot be read: No such file"):
        missing.connect(time.monotonic() + 5)
