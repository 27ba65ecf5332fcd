"""Where a URL points to, and a TCP or TLS connection to it that stands before a deadline."""

from __future__ import annotations

import re
import socket
import time
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from collections.abc import Callable
    from threading import Thread
    from typing import Any

    from kvtally.collectors.access import Access
    from kvtally.collectors.tls import Tls

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?"
    r"(?P<target>(?:/[!-\"$->@-~]*)?(?:\?[!-\"$-~]*)?)(?:#[!-~]*)?",
    re.IGNORECASE,
)
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Place(NamedTuple):
    """A URL taken apart; `target` is the path with its query."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def origin(self) -> str:
        """Host and port, as messages show them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def authority(self) -> str:
        """The value of the Host header."""
        return self.origin.rpartition(":")[0] if self.port == _DEFAULT_PORTS[self.scheme] else self.origin


def take_apart(url: str) -> Place:
    """Read a URL; ValueError if it is none, or if it holds credentials."""
    if "@" in re.split(r"[/?#]", url.partition("://")[2] or url)[0]:
        raise ValueError(
            "credentials in a URL are refused, since they end up in logs: "
            "give them as access.username and access.password_file"
        )
    match = _URL.fullmatch(url)
    if match is None:
        raise ValueError(f"not a URL of the form http://host:port/path: {without_query(url)[:100]!a}")
    scheme = match["scheme"].lower()
    port = int(match["port"] or _DEFAULT_PORTS[scheme])
    if not 0 < port < 2**16:
        raise ValueError(f"no such port: {port}")
    target = match["target"]
    return Place(scheme, match["host"].strip("[]").lower(), port, target if target.startswith("/") else f"/{target}")


def without_query(target: str) -> str:
    """Return what of a target or URL may stand in a message: a query can hold a token."""
    return re.split(r"[?#]", target)[0]


def seconds_left(deadline: float) -> float:
    """Return the time until the deadline (monotonic seconds); TimeoutError if it has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class Connector:
    """Opens connections to one place; `resolve` is called as socket.getaddrinfo is."""

    def __init__(self, place: Place, access: Access, resolve: Callable[..., list[Any]]) -> None:
        self._place = place
        self._access = access
        self._resolve = resolve
        self._look_up: tuple[Thread, list[Any]] | None = None
        self._tls: Tls | None = None

    def connect(self, deadline: float) -> socket.socket:
        """Connect before the deadline, or raise TimeoutError, another OSError, or CollectError with a hint."""
        addresses = self._addresses(deadline)
        failure = OSError("the host has no address")
        for index, (family, kind, protocol, _, address) in enumerate(addresses):
            connection = socket.socket(family, kind, protocol)
            try:
                # An address that swallows packets must not use up the time of those behind it.
                connection.settimeout(seconds_left(deadline) / (len(addresses) - index))
                connection.connect(address)
                if self._place.scheme == "http":
                    return connection
                connection.settimeout(seconds_left(deadline))
                return self._secure().secured(connection)
            except OSError as error:
                connection.close()
                failure = error
            except BaseException:
                connection.close()
                raise
        raise failure

    def fault(self, error: OSError) -> CollectError | None:
        """What a failure of an open connection means, where it is a matter of TLS."""
        return self._secure().fault(error) if self._place.scheme == "https" else None

    def _secure(self) -> Tls:
        if self._tls is None:
            from kvtally.collectors.tls import Tls  # noqa: PLC0415  # only https needs it

            self._tls = Tls(self._access, self._place.host, self._place.origin)
        return self._tls

    def _addresses(self, deadline: float) -> list[Any]:
        """Resolve the host; in a thread if it is a name, since no look-up can be given a time-out."""
        host = self._place.host
        if ":" in host or re.fullmatch(r"[0-9.]+", host):
            found = [self._resolved()]
        else:
            if self._look_up is None:  # else one from an earlier call still runs: threads must not pile up
                import threading  # noqa: PLC0415  # only names need it

                found = []
                thread = threading.Thread(target=lambda: found.append(self._resolved()), daemon=True)
                self._look_up = (thread, found)
                thread.start()
            thread, found = self._look_up
            thread.join(seconds_left(deadline))
            if thread.is_alive():
                raise CollectError(f"timed out while looking up the host {host}", "check the DNS")
            self._look_up = None
        if isinstance(found[0], str):
            raise CollectError(
                f"no address for the host {host}: {found[0]}", "check the spelling of the URL and the DNS"
            )
        return list(found[0])

    def _resolved(self) -> list[Any] | str:
        """Return the addresses, or the reason why there are none."""
        try:
            return self._resolve(self._place.host, self._place.port, 0, socket.SOCK_STREAM)
        except OSError as error:
            return error.strerror or str(error)
        except UnicodeError as error:
            return str(error)
