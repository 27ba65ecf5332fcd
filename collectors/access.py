"""How a page that is not open to all is reached: token, password and certificates, each of them in a file."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError
from kvtally.collectors.bounded_file import Mark, mark_of, read_bounded

if TYPE_CHECKING:
    from typing import Final

_SECRET_BYTES_MAX: Final = 64 * 1024
_UNAUTHORIZED: Final = 401
_PLAIN_HOST = re.compile(r"http://(\[[^\]]*\]|[^/:?#]*)", re.IGNORECASE)
_LOOPBACK = re.compile(r"(?:.+\.)?localhost\.?|127(?:\.[0-9]+){3}|\[::1\]", re.IGNORECASE)
_TOKEN = re.compile(rb"[!-~]+")
_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


class Access(NamedTuple):
    """What a server asks of its clients, and what a client asks of the server; secrets stand in the named files.

    bearer_token_file     its token is sent with every request, and to this server only
    username              of basic auth, with the password in password_file
    ca_file               certificate authorities to trust instead of the system's (PEM)
    cert_file, key_file   the client's own certificate and its key (PEM); key_file "" where cert_file holds both
    server_name           the name that the server's certificate must bear; "" for the host of the URL
    insecure_skip_verify  take any certificate of the server
    """

    bearer_token_file: str = ""
    username: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""
    insecure_skip_verify: bool = False

    def warning(self, url: str) -> str:
        """What is unsafe with this URL, or has no effect; "" where nothing is."""
        plain = _PLAIN_HOST.match(url)
        found = []
        if plain and not _LOOPBACK.fullmatch(plain[1]) and (self.bearer_token_file or self.username):
            found.append(f"the secret goes to {plain[1]} in clear text: use https")
        if plain and (self.ca_file or self.cert_file or self.server_name or self.insecure_skip_verify):
            found.append("its TLS settings have no effect: the URL is http")
        if not plain and self.insecure_skip_verify:
            found.append("the server's certificate is not checked: set ca_file instead of insecure_skip_verify")
        return "; ".join(found)

    def refusal_hint(self, status: int) -> str:
        """What to do where a server answers 401 or 403."""
        if self.bearer_token_file and status == _UNAUTHORIZED:
            return "the server does not take the token in access.bearer_token_file: it may have expired"
        if self.bearer_token_file:
            return (
                "the token in access.bearer_token_file may not read this page: "
                "in Kubernetes its role needs get on the nonResourceURLs /metrics"
            )
        if self.username:
            return "the server does not take access.username with the password in access.password_file"
        return (
            "the endpoint wants credentials: "
            "set access.bearer_token_file, or access.username and access.password_file, or access.cert_file"
        )


def marks_of(access: Access, *keys: str) -> tuple[Mark | None, ...]:
    """Look at the files that some keys name, None for a key without one; CollectError that names the missing one."""
    return tuple(_looked(key, path) if (path := getattr(access, key)) else None for key in keys)


class Credentials:
    """The Authorization header of one server; CollectError, which never holds a secret, where a file cannot serve.

    Kubernetes puts a new token into the file while the old one still holds, so the file is looked at before every
    request (a stat, 3 us) and read when it has changed. A server may refuse the old one earlier: then `renew`.
    """

    def __init__(self, access: Access) -> None:
        self._access = access
        self._is_bearer = bool(access.bearer_token_file)
        self._key = "bearer_token_file" if self._is_bearer else "password_file"
        self._path = access.bearer_token_file or access.password_file
        self._mark: Mark | None = None
        self._line: bytes | None = None

    def line(self) -> bytes:
        """The header's line with its end; b"" where nothing is configured."""
        if not self._path and not self._access.username:
            return b""
        (mark,) = marks_of(self._access, self._key)
        if self._line is None or mark != self._mark:
            self._read()
        return self._line or b""

    def renew(self) -> bool:
        """Read the file whatever its mark; True if it holds another secret than was sent last."""
        before = self._line
        if self._path:
            self._read()
        return self._line != before

    def _read(self) -> None:
        self._line = None  # a secret whose file is gone or broken is not sent again
        secret = b""
        if self._path:
            try:
                self._mark, content = read_bounded(self._path, _SECRET_BYTES_MAX)
            except OSError as error:
                raise _unreadable(self._key, self._path, error) from None
            secret = content.removesuffix(b"\n").removesuffix(b"\r")
        if self._is_bearer:
            if not _TOKEN.fullmatch(secret):
                reason = f"{self._path} holds no token: one line without spaces, in ASCII"
                raise CollectError(reason, f"see access.{self._key}")
            self._line = b"Authorization: Bearer %s\r\n" % secret
        else:
            if _CONTROL.search(secret):
                raise CollectError(f"{self._path} holds more than one line of text", f"see access.{self._key}")
            from binascii import b2a_base64  # noqa: PLC0415  # only basic auth needs it

            pair = b"%s:%s" % (self._access.username.encode(), secret)
            self._line = b"Authorization: Basic %s\r\n" % b2a_base64(pair, newline=False)


def _looked(key: str, path: str) -> Mark:
    try:
        return mark_of(path)
    except OSError as error:
        raise _unreadable(key, path, error) from None


def _unreadable(key: str, path: str, error: OSError) -> CollectError:
    what = {"bearer_token_file": "token", "password_file": "password", "key_file": "key"}.get(key, "certificate")
    return CollectError(f"the {what} file {path} cannot be read: {error.strerror or error}", f"access.{key} names it")
