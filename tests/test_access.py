from __future__ import annotations

import os
import traceback
from base64 import b64encode
from typing import TYPE_CHECKING

import pytest

from kvtally.collectors.access import Access, Credentials
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2-and-more"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "secret"


def fault(access: Access) -> CollectError:
    with pytest.raises(CollectError) as caught:
        Credentials(access).line()
    return caught.value


def test_without_settings_nothing_is_sent_and_nothing_renewed() -> None:
    credentials = Credentials(Access(ca_file="/nowhere", server_name="a"))
    assert credentials.line() == b""
    assert not credentials.renew()


@pytest.mark.parametrize("text", [SECRET, f"{SECRET}\n", f"{SECRET}\r\n"])
def test_a_token_is_sent_without_the_end_of_its_line(file: Path, text: str) -> None:
    file.write_bytes(text.encode())
    assert Credentials(Access(bearer_token_file=str(file))).line() == f"Authorization: Bearer {SECRET}\r\n".encode()


@pytest.mark.parametrize(
    ("content", "sent"),
    [(b"open sesame", b"me:open sesame"), ("pässwörd\n".encode(), "me:pässwörd".encode()), (b" a:b \n", b"me: a:b ")],
)
def test_a_password_keeps_its_spaces_colons_and_bytes(file: Path, content: bytes, sent: bytes) -> None:
    file.write_bytes(content)
    line = Credentials(Access(username="me", password_file=str(file))).line()
    assert line == b"Authorization: Basic " + b64encode(sent) + b"\r\n"


def test_a_user_name_without_a_password_is_sent_with_none() -> None:
    assert Credentials(Access(username="me")).line() == b"Authorization: Basic " + b64encode(b"me:") + b"\r\n"


def test_a_long_password_stays_on_one_line(file: Path) -> None:
    file.write_text("x" * 300)
    assert Credentials(Access(username="me", password_file=str(file))).line().count(b"\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        f"{SECRET}\n\n".encode(),
        f"{SECRET}\r\nX-Admin: 1".encode(),
        f"{SECRET} b".encode(),
        f"{SECRET}\x00".encode(),
        f"{SECRET}\xff".encode("latin-1"),
        f"\ufeff{SECRET}".encode(),
    ],
)
def test_what_is_no_token_is_refused_and_never_shown(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    error = fault(Access(bearer_token_file=str(file)))
    assert str(error) == f"{file} holds no token: one line without spaces, in ASCII"
    assert error.hint == "see access.bearer_token_file"
    assert SECRET not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize("content", [f"{SECRET}\nb".encode(), f"{SECRET}\n\n".encode(), f"a\x00{SECRET}".encode()])
def test_a_password_of_two_lines_is_refused_and_never_shown(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    error = fault(Access(username="me", password_file=str(file)))
    assert str(error) == f"{file} holds more than one line of text"
    assert SECRET not in "".join(traceback.format_exception(error))


def test_a_file_that_cannot_be_read_is_named_with_its_key(tmp_path: Path) -> None:
    missing, pipe, large = tmp_path / "missing", tmp_path / "pipe", tmp_path / "large"
    os.mkfifo(pipe)
    large.write_bytes(b"x" * (64 * 1024 + 1))
    reasons = {
        missing: "No such file or directory",
        tmp_path: "it is no file",
        pipe: "it is no file",
        large: "it has more than 65536 bytes",
    }
    for path, reason in reasons.items():
        error = fault(Access(bearer_token_file=str(path)))
        assert (str(error), error.hint) == (
            f"the token file {path} cannot be read: {reason}",
            "access.bearer_token_file names it",
        )
    error = fault(Access(username="me", password_file=str(missing)))
    assert str(error) == f"the password file {missing} cannot be read: No such file or directory"
    assert error.hint == "access.password_file names it"


def test_a_token_of_64_kib_is_the_longest(file: Path) -> None:
    file.write_bytes(b"x" * 64 * 1024)
    assert len(Credentials(Access(bearer_token_file=str(file))).line()) == len(b"Authorization: Bearer \r\n") + 65536


def test_a_file_is_read_again_only_when_it_has_changed(file: Path) -> None:
    """An unchanged mark hides a changed content: that it is not seen shows that the file was not read."""
    file.write_text("first")
    before = file.stat()
    credentials = Credentials(Access(bearer_token_file=str(file)))
    assert credentials.line().split()[-1] == b"first"
    file.write_text("other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert credentials.line().split()[-1] == b"first"
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert credentials.line().split()[-1] == b"other"


def test_renewal_reads_whatever_the_mark_says_and_tells_whether_it_helps(file: Path) -> None:
    file.write_text("first")
    before = file.stat()
    credentials = Credentials(Access(bearer_token_file=str(file)))
    credentials.line()
    assert not credentials.renew()
    file.write_text("other")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert credentials.renew()
    assert credentials.line().split()[-1] == b"other"


def test_a_token_that_kubernetes_rotates_is_seen_through_its_links(tmp_path: Path) -> None:
    """A projected volume: token -> ..data/token, ..data -> a folder of its own for every version."""
    for name in ("..1", "..2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "token").write_text(f"token{name}")
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "token").symlink_to("..data/token")
    credentials = Credentials(Access(bearer_token_file=str(tmp_path / "token")))
    assert credentials.line().split()[-1] == b"token..1"
    (tmp_path / "..tmp").symlink_to("..2")
    (tmp_path / "..tmp").replace(tmp_path / "..data")
    assert credentials.line().split()[-1] == b"token..2"


def test_a_secret_whose_file_is_gone_or_broken_is_not_sent_again(file: Path) -> None:
    file.write_text("first")
    credentials = Credentials(Access(bearer_token_file=str(file)))
    credentials.line()
    file.write_text("broken by hand")
    for _ in range(2):
        with pytest.raises(CollectError, match="holds no token"):
            credentials.line()
    file.unlink()
    with pytest.raises(CollectError, match="No such file"):
        credentials.line()
    file.write_text("again")
    assert credentials.line().split()[-1] == b"again"


def test_neither_settings_nor_credentials_show_a_secret(file: Path) -> None:
    file.write_text(SECRET)
    access = Access(username="me", password_file=str(file))
    credentials = Credentials(access)
    credentials.line()
    assert SECRET not in f"{access!r} {credentials!r} {credentials!s}"


@pytest.mark.parametrize(
    ("access", "url", "warning"),
    [
        (Access(), "http://gpu7:8000/metrics", ""),
        (Access("token"), "https://gpu7/metrics", ""),
        (Access("token"), "http://127.0.0.1:8000/metrics", ""),
        (Access("token"), "http://127.8.0.1/metrics", ""),
        (Access("token"), "http://LocalHost:8000/metrics", ""),
        (Access("token"), "http://[::1]:8000/metrics", ""),
        (Access("token"), "HTTP://gpu7:8000/metrics", "the secret goes to gpu7 in clear text: use https"),
        (Access(username="me"), "http://10.0.0.7", "the secret goes to 10.0.0.7 in clear text: use https"),
        (Access("token"), "http://127.0.0.1.example/", "the secret goes to 127.0.0.1.example in clear text: use https"),
        (Access("token"), "http://localhost.example/", "the secret goes to localhost.example in clear text: use https"),
        (Access("token"), "http://[fe80::1]:1/", "the secret goes to [fe80::1] in clear text: use https"),
        (Access(ca_file="ca"), "http://gpu7/", "its TLS settings have no effect: the URL is http"),
        (
            Access("token", insecure_skip_verify=True),
            "https://gpu7/",
            "the server's certificate is not checked: set ca_file instead of insecure_skip_verify",
        ),
        (
            Access("token", server_name="a"),
            "http://gpu7/",
            "the secret goes to gpu7 in clear text: use https; its TLS settings have no effect: the URL is http",
        ),
    ],
)
def test_what_is_unsafe_or_without_effect_is_told(access: Access, url: str, warning: str) -> None:
    assert access.warning(url) == warning


@pytest.mark.parametrize(
    ("access", "status", "part"),
    [
        (Access(), 401, "set access.bearer_token_file, or access.username and access.password_file"),
        (Access(), 403, "or access.cert_file"),
        (Access("token"), 401, "access.bearer_token_file: it may have expired"),
        (Access("token"), 403, "nonResourceURLs"),
        (Access(username="me"), 403, "access.username with the password in access.password_file"),
    ],
)
def test_a_refusal_leads_to_the_setting(access: Access, status: int, part: str) -> None:
    assert part in access.refusal_hint(status)
