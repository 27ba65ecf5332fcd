"""TLS with one server: whom we trust, how we show ourselves, and which setting would help where that fails."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtally.collectors.access import marks_of
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    import socket
    import ssl

    from kvtally.collectors.access import Access
    from kvtally.collectors.bounded_file import Mark

# numbers of OpenSSL's x509_vfy.h, X509_V_ERR_…
_HINTS = {
    9: "the certificate is not valid yet: check the clocks of both hosts",
    10: "renew the certificate of the server, or check the clock of this host",
    62: "set access.server_name to a name that the certificate bears",
    64: "set access.server_name to a name that the certificate bears",
}
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "UNKNOWN_PROTOCOL", "HTTP_REQUEST")
_WANTS_CERTIFICATE = ("CERTIFICATE", "UNKNOWN_CA", "HANDSHAKE_FAILURE", "ACCESS_DENIED", "DECRYPT_ERROR")


class Tls:
    """Secures connections to one server; `origin` is its host and port as messages show them.

    Its files are looked at before every handshake, so that renewed certificates count without a restart.
    """

    def __init__(self, access: Access, host: str, origin: str) -> None:
        self._access = access
        self._name = access.server_name or host
        self._origin = origin
        self._context: ssl.SSLContext | None = None
        self._marks: tuple[Mark | None, ...] = ()

    def secured(self, connection: socket.socket) -> socket.socket:
        """Shake hands within the connection's time-out; TimeoutError, another OSError, or CollectError with a hint."""
        import ssl  # noqa: PLC0415  # 3 MB that only https needs

        marks = marks_of(self._access, "ca_file", "cert_file", "key_file")
        if self._context is None or marks != self._marks:
            self._context, self._marks = _context(self._access), marks
        try:
            return self._context.wrap_socket(connection, server_hostname=self._name)
        except ssl.SSLCertVerificationError as error:
            reason = f"the certificate of {self._origin} is not trusted: {error.verify_message}"
            hint = "set access.ca_file to the file of its certificate authority"
            raise CollectError(reason, _HINTS.get(error.verify_code, hint)) from None
        except ssl.SSLError as error:
            if fault := self.fault(error):
                raise fault from None
            raise

    def fault(self, error: OSError) -> CollectError | None:
        """What a failure of TLS means, also one after the handshake; None for what is no matter of TLS."""
        import ssl  # noqa: PLC0415  # as above

        # with TLS 1.3, a server's refusal of our certificate comes only after the handshake, where its answer should be
        is_end = isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError | ssl.SSLSyscallError)
        reason = error.reason if isinstance(error, ssl.SSLError) and not is_end else None
        if not reason:
            return None
        if reason in _NO_TLS:
            return CollectError(f"{self._origin} does not speak TLS", "if it is a plain server, write http in the URL")
        if any(each in reason for each in _WANTS_CERTIFICATE):
            hint = "it wants a client certificate: set access.cert_file and access.key_file"
            if self._access.cert_file:
                hint = "it does not take the certificate in access.cert_file"
            return CollectError(f"{self._origin} refuses this client: {_words(reason)}", hint)
        return CollectError(f"TLS with {self._origin} fails: {_words(reason)}", "see the log of the server")


def _context(access: Access) -> ssl.SSLContext:
    """All that a handshake needs; CollectError that names the file which cannot serve."""
    import ssl  # noqa: PLC0415  # as above

    # Not ssl.create_default_context: it writes keys to $SSLKEYLOGFILE, and from Python 3.13 on refuses the authorities
    # of many clusters, whose certificates bear no key identifier, though neither Go nor curl asks for one.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if access.insecure_skip_verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif access.ca_file:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # what the file holds is trusted, root or not
        try:
            context.load_verify_locations(access.ca_file)
        except OSError as error:
            raise _unusable("ca_file", access.ca_file, error) from None
    else:
        context.load_default_certs()
    if access.cert_file:
        try:
            context.load_cert_chain(access.cert_file, access.key_file or None, _no_password)
        except OSError as error:
            raise _unusable("cert_file", access.cert_file, error) from None
    return context


def _no_password() -> str:
    """Stand in for OpenSSL's question at the terminal, for which a daemon would wait for ever."""
    raise CollectError("the key of the client certificate is encrypted", "give access.key_file without a pass phrase")


def _unusable(key: str, path: str, error: OSError) -> CollectError:
    reason = getattr(error, "reason", "")  # None where OpenSSL finds no PEM at all
    text = error.strerror if reason == "" else _words(reason or "it or its key is not PEM")
    hint = f"access.{key} names it" + (", and access.key_file its key" if key == "cert_file" else "")
    return CollectError(f"the certificate file {path} cannot be used: {text}", hint)


def _words(reason: str) -> str:
    """A reason of OpenSSL ("TLSV13_ALERT_CERTIFICATE_REQUIRED") in lower case."""
    return reason.replace("_", " ") if " " in reason else reason.lower().replace("_", " ")
