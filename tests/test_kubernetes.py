from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.config import Config, Engine, Labels, complete
from kvtally.agent.kubernetes import LABELS_FILE, NAMESPACE_FILE, Pod, in_pod, labels_in, pod_of, read_small, role_of

if TYPE_CHECKING:
    from pathlib import Path

# as the kubelet writes it for a decode pod of llm-d
LABELS = """\
app.kubernetes.io/instance="ms-chat"
llm-d.ai/engine-type="vllm"
llm-d.ai/inference-serving="true"
llm-d.ai/model="qwen3-32b"
llm-d.ai/role="decode"
pod-template-hash="5d7c9b6f4"
"""
ENVIRON = {
    "POD_NAME": "ms-chat-decode-0",
    "POD_NAMESPACE": "chat",
    "NODE_NAME": "gpu-7",
    "POD_IP": "10.0.0.7",
    "HOST_IP": "192.168.0.7",
}


def pod(environ: dict[str, str], files: dict[str, str]) -> Pod | None:
    return pod_of(environ, files.get)


def test_outside_of_a_pod_there_is_none() -> None:
    assert pod({"HOME": "/root", "HOSTNAME": "gpu-7"}, {}) is None


def test_the_downward_api_tells_pod_and_engine() -> None:
    found = pod(ENVIRON, {LABELS_FILE: LABELS})
    assert found == Pod("chat", "ms-chat-decode-0", "gpu-7", "10.0.0.7", "decode", "qwen3-32b", "vllm")
    assert found.labels == {"namespace": "chat", "pod": "ms-chat-decode-0", "node": "gpu-7"}


def test_the_file_of_labels_may_lie_elsewhere() -> None:
    found = pod({"KVTALLY_POD_LABELS": "/pod/labels"}, {"/pod/labels": LABELS, LABELS_FILE: 'llm-d.ai/role="prefill"'})
    assert found == Pod(role="decode", model="qwen3-32b", engine_type="vllm")
    assert found.labels == {}


def test_the_namespace_is_that_of_the_service_account_where_no_variable_tells_it() -> None:
    assert pod({}, {NAMESPACE_FILE: "chat\n"}) == Pod(namespace="chat")
    assert pod({"POD_NAMESPACE": "search"}, {NAMESPACE_FILE: "chat"}) == Pod(namespace="search")


def test_the_older_label_of_the_engine_type_is_read_where_the_newer_is_missing() -> None:
    old = 'inference.networking.k8s.io/engine-type="sglang"\n'
    assert pod({}, {LABELS_FILE: old}) == Pod(engine_type="sglang")
    assert pod({}, {LABELS_FILE: old + LABELS}) == Pod(role="decode", model="qwen3-32b", engine_type="vllm")


def test_on_the_network_of_the_host_the_engines_are_other_pods() -> None:
    environ = ENVIRON | {"HOST_IP": "10.0.0.7"}
    assert pod(environ, {LABELS_FILE: LABELS}) == Pod(node="gpu-7", address="10.0.0.7")


def test_a_name_that_is_none_is_not_taken() -> None:
    assert (
        pod({"POD_NAME": "a\x1b[2J", "POD_NAMESPACE": "x" * 254, "NODE_NAME": " "}, {NAMESPACE_FILE: "<html>"}) is None
    )


def test_a_line_that_is_no_label_is_passed_over() -> None:
    text = 'a="1"\r\n\nb=2\nkubernetes.io/config.seen="2015-08-24T13:47:23Z"\nc="a\\"b"\nd="x y"\n=""\ne=""\na="3"\n'
    assert labels_in(text) == {"a": "3", "e": ""}


@pytest.mark.parametrize(
    ("text", "role"),
    [
        ("prefill", "prefill"),
        ("encode-prefill", "prefill"),
        ("decode", "decode"),
        ("both", "both"),
        ("prefill-decode", "both"),
        ("encode-prefill-decode", "both"),
        ("encode", ""),
        ("Prefill", ""),
        ("", ""),
    ],
)
def test_a_role_is_one_of_those_of_llm_d(text: str, role: str) -> None:
    assert role_of(text) == role


def test_what_config_says_of_an_engine_goes_before_its_pod() -> None:
    told = pod(ENVIRON, {LABELS_FILE: LABELS})
    silent = in_pod(complete(Engine("http://127.0.0.1:8000"), Config(labels=Labels(tenant="all"))), told)
    assert (silent.labels, silent.role, silent.name) == (Labels("", "chat", "all"), "decode", "127.0.0.1:8000")
    engine = Engine("http://127.0.0.1:8000", role="both")
    said = in_pod(complete(engine, Config(labels=Labels(namespace="search"))), told)
    assert (said.labels, said.role) == (Labels("", "search"), "both")


def test_an_engine_outside_of_a_pod_stays_as_it_is() -> None:
    engine = Engine("http://127.0.0.1:8000")
    assert in_pod(engine, None) == in_pod(engine, Pod(node="gpu-7")) == engine


def test_a_small_file_is_read_whole_and_nothing_else(tmp_path: Path) -> None:
    small, large, binary, pipe = (tmp_path / name for name in ("small", "large", "binary", "pipe"))
    small.write_text(LABELS)
    large.write_bytes(b"x" * (64 * 1024 + 1))
    binary.write_bytes(b"\xff\xfe")
    os.mkfifo(pipe)
    assert read_small(str(small)) == LABELS
    assert [read_small(str(path)) for path in (large, binary, pipe, tmp_path, tmp_path / "missing")] == [None] * 5
    assert read_small("a\x00b") is None
