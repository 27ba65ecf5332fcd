from __future__ import annotations

import ssl
import threading
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
import trustme
from tests.fake_vllm import DONE, TOKEN, FakeVllm, hang, refuse, say, stream, usage
from tests.loopback import answer

from kvtally.agent.config_file import ConfigError
from kvtally.agent.probe.api import Answer, Api, Served
from kvtally.agent.probe.engine import Engine
from kvtally.agent.probe.key import read_key
from kvtally.collectors.base import CollectError

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from tests.fake_vllm import Act, Sent

KEY = "sk-4711-secret"
PROMPT = [256, 257, 258]


def completed(vllm: FakeVllm, key: str = "", seconds: float = 20.0) -> Answer:
    return Api(vllm.url, key=key).complete("tiny", PROMPT, seconds)


def refusal(*acts: Act, key: str = "", seconds: float = 20.0) -> CollectError:
    with FakeVllm(*acts) as vllm, pytest.raises(CollectError) as refused:
        completed(vllm, key, seconds)
    return refused.value


def test_a_completion_tells_what_the_api_counted() -> None:
    with FakeVllm(stream(TOKEN, usage(3, 0), DONE)) as vllm:
        found = completed(vllm)
    assert found.prompt_tokens == 3
    assert found.cached_tokens == 0
    assert 0 < found.ttft_seconds < 20


def test_a_completion_needs_no_usage() -> None:
    with FakeVllm(stream(TOKEN, DONE)) as vllm:
        assert completed(vllm)[1:] == (None, None)


def test_the_first_token_is_timed_and_not_what_comes_before_or_after() -> None:
    waits = threading.Event()

    def late(_: FakeVllm, connection: socket.socket, __: Sent) -> bool:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n: keep-alive\n\n" + b'data: {"choices":[]}\n\n')
        waits.wait(0.1)
        connection.sendall(TOKEN.encode())
        waits.wait(1.0)
        connection.sendall((TOKEN + usage(3) + DONE).encode())
        return False

    with FakeVllm(late) as vllm:
        found = completed(vllm)
    assert found.prompt_tokens == 3
    assert 0.1 <= found.ttft_seconds < 1.0


@pytest.mark.parametrize(
    "raw",
    [
        answer((TOKEN + usage(3) + DONE).encode()),
        b"HTTP/1.0 200 OK\r\n\r\n" + (TOKEN + usage(3) + DONE).encode(),
        b"HTTP/1.1 200 OK\r\n\r\n" + (TOKEN + usage(3) + DONE).replace("\n", "\r\n").encode(),
    ],
    ids=["by length", "until the end", "with CRLF"],
)
def test_a_gateway_may_frame_the_stream_otherwise(raw: bytes) -> None:
    with FakeVllm(say(raw)) as vllm:
        assert completed(vllm).prompt_tokens == 3


@pytest.mark.parametrize(
    ("status", "body", "reason", "hint"),
    [
        ("401 Unauthorized", '{"error":"Unauthorized"}', "HTTP 401", "the API wants a key"),
        ("403 Forbidden", "<html>no</html>", "HTTP 403", "check the key and its rights"),
        (
            "404 Not Found",
            '{"error":{"message":"The model `tiny` does not exist."}}',
            "does not exist.",
            "model's name",
        ),
        ("400 Bad Request", '{"error":{"message":"too long\\u001b[31m","code":400}}', "HTTP 400: too long?[31m", "log"),
        ("500 Internal Server Error", "", "HTTP 500", "see the engine's log"),
        ("503 Service Unavailable", "x" * 100_000, "HTTP 503", "see the engine's log"),
        ("302 Found", "", "HTTP 302", "see the engine's log"),
    ],
)
def test_an_error_is_told_with_what_to_do(status: str, body: str, reason: str, hint: str) -> None:
    error = refusal(refuse(status, body))
    assert reason in str(error)
    assert hint in error.hint
    assert str(error).isprintable()


def test_an_error_within_the_stream_is_told_as_well() -> None:
    event = 'data: {"error": {"message": "Token id 5000 is out of vocabulary", "code": 400}}\n\n'
    assert str(refusal(stream(event, DONE))).endswith("HTTP 400: Token id 5000 is out of vocabulary")
    assert "refuses with an error: x" in str(refusal(stream('data: {"error":{"message":"x","code":"oops"}}\n\n')))


def test_a_long_error_is_cut() -> None:
    body = '{"error":{"message":"%s"}}' % ("x" * 1000)
    assert str(refusal(refuse("400 Bad Request", body))).endswith(": " + "x" * 200)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "closed the connection before its answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Type", "closed the connection before its answer was complete"),
        (answer(TOKEN.encode()), "closed the connection before its answer was complete"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + TOKEN.encode(), "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\ndata\r\n", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\ndata", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: soon\r\n\r\n", "malformed"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 20_000, "more than 16384 bytes"),
        (answer(b"data: no JSON\n\n"), "something else than a completion"),
        (answer(b'data: ["choices"]\n\n'), "something else than a completion"),
        (answer(b'data: {"choices": 7}\n\n'), "something else than a completion"),
        (answer(b"data: " + b"[" * 100_000 + b"\n\n"), "something else than a completion"),
        (answer(DONE.encode()), "something else than a completion"),
        (answer(b'{"choices": [{"text": "not streamed"}]}'), "closed the connection before its answer was complete"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an HTTP server"),
        (answer(b"x" * 300_000), "more than 262144 bytes"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"9\r\n: waiting\r\n" * 40_000, "more than 262144"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nfffffffffff\r\n" + b"x" * 300_000, "more than 262144"),
    ],
)
def test_an_answer_that_is_none_is_refused(raw: bytes, reason: str) -> None:
    assert reason in str(refusal(say(raw)))


def test_an_answer_that_does_not_come_ends_with_its_time() -> None:
    assert str(refusal(hang, seconds=0.2)).endswith("/v1/completions took longer than 0.2 s")


def test_an_answer_that_drips_ends_with_its_time_too() -> None:
    def drip(vllm: FakeVllm, connection: object, _: object) -> bool:
        send = connection.sendall  # type: ignore[attr-defined]  # a socket
        send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        while not vllm.hung_up.wait(0.02):
            send(b"2\r\n:\n\r\n")  # OSError once the client has gone
        return False

    assert "took longer than 0.3 s" in str(refusal(drip, seconds=0.3))


def test_a_port_where_nobody_listens_is_named() -> None:
    with FakeVllm() as vllm:
        origin, url = vllm.origin, vllm.url
    with pytest.raises(CollectError, match=f"connection refused: nothing listens on {origin}"):
        Api(url).complete("tiny", PROMPT)


# which model


def test_the_served_model_is_the_first_that_is_no_adapter() -> None:
    with FakeVllm() as vllm:
        assert Api(vllm.url).served() == Served("tiny", 4096)
        assert Api(vllm.url).served("adapter") == Served("adapter", 4096)


def test_a_model_that_is_not_served_is_told_with_those_that_are() -> None:
    with FakeVllm() as vllm, pytest.raises(CollectError, match="/v1/models does not list llama") as refused:
        Api(vllm.url).served("llama")
    assert refused.value.hint == "it lists adapter, tiny"


@pytest.mark.parametrize("length", [None, 0, -4])
def test_a_model_without_a_longest_prompt_is_refused(length: int | None) -> None:
    with (
        FakeVllm(models=[{"id": "tiny", "max_model_len": length}]) as vllm,
        pytest.raises(CollectError, match="does not tell how long a prompt may be"),
    ):
        Api(vllm.url).served()


@pytest.mark.parametrize("models", [7, [{"name": "tiny"}], [7], {"tiny": {}}])
def test_a_list_of_models_that_is_none_is_refused(models: object) -> None:
    with FakeVllm(models=models) as vllm, pytest.raises(CollectError, match="/v1/models is no list of models"):
        Api(vllm.url).served()


def test_a_list_of_models_without_end_is_refused() -> None:
    with (
        FakeVllm(models=[{"id": "x" * 100_000}] * 50) as vllm,
        pytest.raises(CollectError, match="more than 4194304 bytes"),
    ):
        Api(vllm.url).served()


# where it is, and with which key


def test_the_api_is_where_the_page_is() -> None:
    with closing(Engine("http://gpu-7:8000/metrics")) as engine:
        assert engine.api_url == "http://gpu-7:8000"
    with closing(Engine("http://gateway/llama/metrics?name[]=x")) as engine:
        assert engine.api_url == "http://gateway/llama"


@pytest.mark.parametrize("api_url", ["http://gateway:80/llama", "http://gateway:80/llama/v1/"])
def test_the_api_may_be_elsewhere(api_url: str) -> None:
    with closing(Engine("http://gpu-7:8000/metrics", api_url=api_url)) as engine:
        assert engine.api_url == "http://gateway:80/llama"


def test_a_url_with_credentials_is_refused() -> None:
    with pytest.raises(ValueError, match="credentials in a URL are refused"):
        Engine("http://gpu-7:8000/metrics", api_url="http://me:secret@gateway")


def test_the_key_goes_to_the_api_and_to_nobody_else() -> None:
    with FakeVllm() as vllm, closing(Engine(f"{vllm.url}/metrics", key=KEY)) as engine:
        engine.look()
        engine.served()
        engine.complete("tiny", PROMPT)
        sent = [(one.line.split()[1], one.headers.get("authorization")) for one in vllm.requests]
    assert sent == [("/metrics", None), ("/v1/models", f"Bearer {KEY}"), ("/v1/completions", f"Bearer {KEY}")]


def test_without_a_key_none_is_sent() -> None:
    with FakeVllm() as vllm:
        completed(vllm)
        assert "authorization" not in vllm.requests[0].headers


def test_the_key_stands_in_no_message_even_if_the_server_repeats_it() -> None:
    error = refusal(refuse("401 Unauthorized", f'{{"error":{{"message":"{KEY} is wrong"}}}}'), key=KEY)
    assert str(error).endswith("refuses with HTTP 401")
    assert KEY not in str(error) + error.hint


def test_a_completion_is_asked_for_over_tls_only_of_a_server_that_is_trusted(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    with FakeVllm(tls=context) as vllm:
        found = Api(vllm.url, key=KEY, ca_file=str(trusted)).complete("tiny", PROMPT, 20)
        assert found.prompt_tokens == 3
        with pytest.raises(CollectError, match="is not trusted"):
            Api(vllm.url, key=KEY).complete("tiny", PROMPT, 20)
        assert len(vllm.completions) == 1


def test_a_key_is_read_from_a_file_first_and_else_from_a_variable(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY}\n")
    environ = {"OPENAI_API_KEY": "sk-other"}
    assert read_key(str(file), "OPENAI_API_KEY", environ) == KEY
    assert read_key(None, "OPENAI_API_KEY", environ) == "sk-other"
    assert not read_key(None, None, environ)


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"sk-\x00", b"sk-\xff", b"a\nb", b"x" * 4097])
def test_a_file_that_holds_no_key_is_refused_without_quoting_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "key"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match="holds no API key") as refused:
        read_key(str(file), None, {})
    assert str(refused.value) == f"{file}: holds no API key"


def test_a_key_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_key(str(tmp_path / "none"), None, {})
    with pytest.raises(ConfigError, match=r"\$VLLM_API_KEY: holds no API key"):
        read_key(None, "VLLM_API_KEY", {})
