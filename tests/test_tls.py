from __future__ import annotations

import contextlib
import datetime as dt
import os
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import pytest
import trustme

from kvtally.collectors.access import Access
from kvtally.collectors.base import CollectError
from kvtally.collectors.tls import Tls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ORIGIN = "engine.example:8443"


class Server:
    """Shakes hands with every client as its context says, sends it b"ok" and hangs up."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context
        self.names: list[str | None] = []
        self.context.sni_callback = lambda _, name, __: self.names.append(name)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # the test is over
            while True:
                connection = self._listener.accept()[0]
                connection.settimeout(5)
                with (
                    connection,
                    contextlib.suppress(OSError),  # the handshake fails, as some tests want
                    self.context.wrap_socket(connection, server_side=True) as secured,
                ):
                    secured.sendall(b"ok")

    def connect(self) -> socket.socket:
        return socket.create_connection(self._listener.getsockname(), timeout=5)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def server(authority: trustme.CA) -> Iterator[Server]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("engine.example").configure_cert(context)
    running = Server(context)
    yield running
    running.close()


@pytest.fixture
def trusted(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def greeting(server: Server, tls: Tls) -> bytes:
    with server.connect() as connection, tls.secured(connection) as secured:
        return secured.recv(2)


def fault(server: Server, access: Access, host: str = "engine.example") -> CollectError:
    with server.connect() as connection, pytest.raises(CollectError) as caught:
        Tls(access, host, ORIGIN).secured(connection)
    return caught.value


def test_the_host_of_the_url_must_be_on_the_certificate(server: Server, trusted: str) -> None:
    assert greeting(server, Tls(Access(ca_file=trusted), "engine.example", ORIGIN)) == b"ok"
    error = fault(server, Access(ca_file=trusted), "other.example")
    assert str(error).startswith(f"the certificate of {ORIGIN} is not trusted: Hostname mismatch")
    assert error.hint == "set access.server_name to a name that the certificate bears"
    assert fault(server, Access(ca_file=trusted), "127.0.0.1").hint == error.hint


def test_another_name_is_asked_for_where_it_is_set(server: Server, trusted: str) -> None:
    access = Access(ca_file=trusted, server_name="engine.example")
    assert greeting(server, Tls(access, "10.0.0.7", ORIGIN)) == b"ok"
    assert server.names == ["engine.example"]


def test_a_certificate_of_an_authority_that_is_not_ours_is_refused(server: Server, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    for access in (Access(), Access(ca_file=str(other))):
        error = fault(server, access)
        assert str(error).startswith(f"the certificate of {ORIGIN} is not trusted: ")
        assert error.hint == "set access.ca_file to the file of its certificate authority"


def test_the_certificate_itself_can_be_what_is_trusted(server: Server, authority: trustme.CA, tmp_path: Path) -> None:
    leaf = authority.issue_cert("engine.example")
    leaf.configure_cert(server.context)
    leaf.cert_chain_pems[0].write_to_path(str(tmp_path / "leaf.pem"))
    assert greeting(server, Tls(Access(ca_file=str(tmp_path / "leaf.pem")), "engine.example", ORIGIN)) == b"ok"


@pytest.mark.parametrize(("begins", "hint"), [(-9, "renew the certificate"), (2, "not valid yet")])
def test_a_certificate_out_of_its_time_leads_to_the_clocks(
    server: Server, authority: trustme.CA, trusted: str, begins: int, hint: str
) -> None:
    now = dt.datetime.now(dt.UTC)
    certificate = authority.issue_cert(
        "engine.example",
        not_before=now + dt.timedelta(days=begins),
        not_after=now + dt.timedelta(days=begins + 7),
    )
    certificate.configure_cert(server.context)
    error = fault(server, Access(ca_file=trusted))
    assert hint in error.hint
    assert "clock" in error.hint


def test_nothing_is_checked_where_the_operator_says_so(server: Server) -> None:
    assert greeting(server, Tls(Access(insecure_skip_verify=True), "other.example", ORIGIN)) == b"ok"


def test_an_authority_that_was_replaced_counts_without_a_restart(
    server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    path = tmp_path / "authority.pem"
    trustme.CA().cert_pem.write_to_path(str(path))
    tls = Tls(Access(ca_file=str(path)), "engine.example", ORIGIN)
    with server.connect() as connection, pytest.raises(CollectError, match="is not trusted"):
        tls.secured(connection)
    authority.cert_pem.write_to_path(str(path))
    os.utime(path, ns=(0, 0))
    assert greeting(server, tls) == b"ok"
    os.utime(path, ns=(0, 1))
    assert greeting(server, tls) == b"ok"
    path.unlink()
    with server.connect() as connection, pytest.raises(CollectError, match=r"authority\.pem cannot be read: No such"):
        tls.secured(connection)


def test_a_client_shows_its_certificate_with_a_key_beside_it(
    server: Server, authority: trustme.CA, trusted: str, tmp_path: Path
) -> None:
    server.context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(server.context)
    own = authority.issue_cert("kvtally.example")
    own.private_key_pem.write_to_path(str(tmp_path / "key"))
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "own"))
    access = Access(ca_file=trusted, cert_file=str(tmp_path / "own"), key_file=str(tmp_path / "key"))
    assert greeting(server, Tls(access, "engine.example", ORIGIN)) == b"ok"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_certificate_that_is_missing_or_not_accepted_is_told(
    server: Server, trusted: str, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    server.context.verify_mode = ssl.CERT_REQUIRED
    server.context.maximum_version = version
    server.context.load_verify_locations(trusted)
    missing = refused(server, Access(ca_file=trusted))
    assert missing.hint == "it wants a client certificate: set access.cert_file and access.key_file"
    own = trustme.CA().issue_cert("kvtally.example")
    own.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "own"))
    not_accepted = refused(server, Access(ca_file=trusted, cert_file=str(tmp_path / "own")))
    assert not_accepted.hint == "it does not take the certificate in access.cert_file"


def refused(server: Server, access: Access) -> CollectError:
    tls = Tls(access, "engine.example", ORIGIN)
    found: CollectError | None = None
    with server.connect() as connection:
        try:
            with tls.secured(connection) as secured:
                secured.recv(2)
        except CollectError as error:  # TLS 1.2 says it in the handshake
            found = error
        except OSError as error:  # TLS 1.3 after it
            found = tls.fault(error)
    assert found is not None
    assert str(found).startswith(f"{ORIGIN} refuses this client: ")
    return found


def test_a_file_that_cannot_serve_is_named(server: Server, authority: trustme.CA, trusted: str, tmp_path: Path) -> None:
    junk, own, key = tmp_path / "junk", tmp_path / "own", tmp_path / "key"
    junk.write_text("no certificate")
    authority.issue_cert("a.example").cert_chain_pems[0].write_to_path(str(own))
    authority.issue_cert("b.example").private_key_pem.write_to_path(str(key))
    missing = str(tmp_path / "missing")
    cases = {
        Access(ca_file=str(junk)): (f"the certificate file {junk} cannot be used: ", "access.ca_file"),
        Access(ca_file=missing): (f"the certificate file {missing} cannot be read: No such file", "access.ca_file"),
        Access(trusted, ca_file=str(tmp_path)): (f"the certificate file {tmp_path} cannot be read", "access.ca_file"),
        Access(cert_file=str(junk)): (f"the certificate file {junk} cannot be used: ", "access.key_file"),
        Access(cert_file=str(own), key_file=str(key)): (f"the certificate file {own} cannot be used: key values", ""),
        Access(cert_file=str(own), key_file=missing): (f"the key file {missing} cannot be read: ", "access.key_file"),
    }
    for access, (reason, hint) in cases.items():
        error = fault(server, access)
        assert str(error).startswith(reason)
        assert hint in error.hint


def test_an_encrypted_key_is_refused_without_a_question_at_the_terminal(
    server: Server, authority: trustme.CA, tmp_path: Path
) -> None:
    from cryptography.hazmat.primitives import serialization  # noqa: PLC0415  # trustme brings it

    own = authority.issue_cert("kvtally.example")
    plain = serialization.load_pem_private_key(own.private_key_pem.bytes(), None)
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "own"))
    (tmp_path / "key").write_bytes(
        plain.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"pass phrase"),
        )
    )
    error = fault(server, Access(cert_file=str(tmp_path / "own"), key_file=str(tmp_path / "key")))
    assert str(error) == "the key of the client certificate is encrypted"


def test_the_end_of_a_connection_is_no_fault_of_tls() -> None:
    tls = Tls(Access(), "engine.example", ORIGIN)
    for error in (ConnectionResetError(), BrokenPipeError(), ssl.SSLEOFError(8, "x"), ssl.SSLZeroReturnError(6, "x")):
        assert tls.fault(error) is None


def test_keys_are_not_written_to_the_log_that_the_environment_names(
    server: Server, trusted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSLKEYLOGFILE", str(tmp_path / "keys"))
    assert greeting(server, Tls(Access(ca_file=trusted), "engine.example", ORIGIN)) == b"ok"
    assert not (tmp_path / "keys").exists()
