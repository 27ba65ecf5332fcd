from __future__ import annotations

import json
import re
from typing import Any

import pytest

from kvtally.agent.config import Access, Engine, Labels, Page
from kvtally.agent.file_sd import Targets, parse

OPEN = Access()


def targets(*groups: Any, access: Access = OPEN) -> Targets:
    return parse(json.dumps(groups).encode(), access)


def fault(*groups: Any) -> str:
    with pytest.raises(ValueError, match=r"^(\[|more)") as caught:
        targets(*groups)
    return str(caught.value)


def group(*addresses: str, **labels: str) -> dict[str, Any]:
    return {"targets": list(addresses), "labels": labels}


def test_an_example_of_prometheus_is_read() -> None:
    """The form of its documentation, with a label that says nothing here."""
    found = targets({"targets": ["10.0.0.7:8000", "engine-1.svc:8000"], "labels": {"env": "prod", "job": "vllm"}})
    assert found == Targets((Engine("http://10.0.0.7:8000/metrics"), Engine("http://engine-1.svc:8000/metrics")))


@pytest.mark.parametrize("content", [b"[]", b" [ ] \n", b'[{"targets": []}]', b'[{"targets": [], "labels": null}]'])
def test_a_file_may_name_nothing(content: bytes) -> None:
    assert parse(content) == Targets()


def test_scheme_path_and_parameters_make_the_address() -> None:
    labels = {"__scheme__": "https", "__metrics_path__": "/v1/metrics", "__param_x": "a b&c", "__param_name[]": "d"}
    assert targets(group("[fd00::7]:8443", **labels)) == Targets(
        (Engine("https://[fd00::7]:8443/v1/metrics?x=a+b%26c&name%5B%5D=d"),)
    )
    assert targets(group("h", __metrics_path__="prom")).engines[0].url == "http://h/prom"


def test_labels_tell_whose_tokens_they_are_and_what_the_engine_does() -> None:
    told = {
        "cluster": "fra1",
        "namespace": "chat",
        "tenant": "search",
        "role": "prefill",
        "kvtally_group": "chat-0",
        "instance": "prefill-0",
        "__meta_kubernetes_pod_name": "x",
    }
    assert targets(group("h:1", **told)).engines == (
        Engine(
            "http://h:1/metrics",
            "prefill-0",
            role="prefill",
            group="chat-0",
            labels=Labels("fra1", "chat", "search"),
        ),
    )


@pytest.mark.parametrize(
    ("labels", "role"),
    [
        ({"llm-d.ai/role": "decode", "role": "prefill"}, "decode"),
        ({"llm_d_ai_role": "both"}, "both"),
        ({"role": "gpu-node"}, ""),
        ({}, ""),
    ],
)
def test_the_role_is_that_of_llm_d_where_there_is_one(labels: dict[str, str], role: str) -> None:
    assert targets(group("h:1", **labels)).engines[0].role == role


def test_a_name_is_given_to_one_target_and_not_to_several() -> None:
    assert [one.name for one in targets(group("a:1", "b:1", instance="x")).engines] == ["", ""]


def test_a_page_is_named_as_such_with_the_engines_that_it_serves() -> None:
    labels = {"kvtally_kind": "page", "kvtally_engines": "a:8000, b:8000,", "instance": "lmcache"}
    found = targets(group("h:7000", **labels), group("h:8000", kvtally_kind="engine"))
    assert found == Targets(
        (Engine("http://h:8000/metrics"),), (Page("http://h:7000/metrics", "lmcache", ("a:8000", "b:8000")),)
    )


def test_all_targets_are_reached_as_config_says_for_files() -> None:
    access = Access(bearer_token_file="/run/token")
    found = targets(group("h:1"), group("h:2", kvtally_kind="page"), access=access)
    assert (found.engines[0].access, found.pages[0].access) == (access, access)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not in the format of file_sd: Input data was truncated"),
        (b'[{"targets": ["h:1"]', "not in the format of file_sd: Input data was truncated"),
        (b"- targets: ['h:1']", "not in the format of file_sd: JSON is malformed"),
        (b"{}", "not in the format of file_sd: Expected `array`, got `object`"),
        (b"[null]", "not in the format of file_sd: Expected `object`, got `null`"),
        (b"[{}]", "not in the format of file_sd: Object missing required field `targets`"),
        (b'[{"targets": ["a"], "lables": {}}]', "not in the format of file_sd: Object contains unknown field `lables`"),
        (b'[{"targets": [1]}]', "not in the format of file_sd: Expected `str`, got `int`"),
        (b'[{"targets": [], "labels": {"a": 1}}]', "not in the format of file_sd: Expected `str`, got `int`"),
        (b'["\xff"]', "not in the format of file_sd: "),
        (b"[" * 100_000, "not in the format of file_sd: Expected `object`, got `array`"),
    ],
)
def test_what_is_not_in_the_format_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        parse(content)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("", "'' is no host:port"),
        ("http://h:1/metrics", "'http://h:1/metrics' is no host:port"),
        ("h:1/metrics", "'h:1/metrics' is no host:port"),
        ("h:port", "'h:port' is no host:port"),
        ("h 1", "'h 1' is no host:port"),
        ("h\n", "'h\\n' is no host:port"),
        ("h:0", "no such port: 0"),
        ("h:65536", "no such port: 65536"),
        ("::1", "'::1' is no host:port"),
    ],
)
def test_a_target_is_a_host_with_a_port(address: str, reason: str) -> None:
    assert fault(group("a:1"), group("b:1", address)).startswith(f"[1].targets[1]: {reason}")


def test_credentials_in_a_target_are_refused_and_not_repeated() -> None:
    found = fault(group("me:hunter2@h:1"))
    assert found == "[0].targets[0]: credentials are refused: set scrape.file_sd_access"


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        ({"__scheme__": "ftp"}, "[0].targets[0]: __scheme__ is neither http nor https"),
        ({"__metrics_path__": "/a b"}, "[0].targets[0]: not a URL of the form"),
        ({"__metrics_path__": "/" + "x" * 2000}, "[0].targets[0]: its address has more than 2000 characters"),
        ({"kvtally_kind": "gpu"}, "[0].labels.kvtally_kind: neither engine nor page"),
        ({"kvtally_knd": "page"}, "[0].labels: unknown is 'kvtally_knd'; kvtally's own are kvtally_kind, "),
        ({"tenant": "a\nb"}, "[0].labels.tenant: longer than 200 characters, or holds a control character"),
        ({"instance": "x" * 201}, "[0].labels.instance: longer than 200 characters"),
    ],
)
def test_a_label_that_cannot_be_meant_is_refused(labels: dict[str, str], reason: str) -> None:
    assert fault(group("h:1", **labels)).startswith(reason)


def test_a_label_that_is_not_read_may_hold_anything() -> None:
    assert targets(group("h:1", note="x" * 5000 + "\n")).engines[0].labels == Labels()


def test_a_file_names_at_most_4096_targets() -> None:
    assert len(targets(group(*["h:1"] * 4096)).engines) == 4096
    assert fault(group(*["h:1"] * 4000), group(*["h:1"] * 97)) == "more than 4096 targets"


# -- the same in YAML


def test_yaml_names_what_the_same_json_names() -> None:
    text = b"""\
- targets: ["10.0.0.7:8000"]
  labels: {namespace: chat, role: prefill, tenant: 7, env: ~x}
- targets:
    - 10.0.0.9:7000
  labels:
    kvtally_kind: page
    kvtally_engines: 10.0.0.7:8000
- targets: [h:1]
  labels:
"""
    labels = {"namespace": "chat", "role": "prefill", "tenant": "7", "env": "~x"}
    same = targets(
        group("10.0.0.7:8000", **labels),
        group("10.0.0.9:7000", kvtally_kind="page", kvtally_engines="10.0.0.7:8000"),
        group("h:1"),
    )
    assert parse(text, is_yaml=True) == same
    assert same.engines[0].labels.tenant == "7"


@pytest.mark.parametrize("content", [b"", b"# nothing yet\n", b"[]", b"- targets: []\n"])
def test_a_yaml_file_may_name_nothing(content: bytes) -> None:
    assert parse(content, is_yaml=True) == Targets()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"targets: [h:1]\n", "not in the format of file_sd: Expected `array`, got `object`"),
        (b"- targets: h:1\n", "not in the format of file_sd: Expected `array`, got `str` - at `$[0].targets`"),
        (b"- targets: [h:1]\n  label: {}\n", "not in the format of file_sd: Object contains unknown field `label`"),
        (b"- targets: [h:1]\n  labels: &x {}\n", "not in the format of file_sd: anchors and aliases are not read"),
        (b"- targets: [h:1\n", "not in the format of file_sd: did not find expected"),
        (b"{}", "not in the format of file_sd: Expected `array`, got `object`"),
    ],
)
def test_yaml_that_is_not_wholly_understood_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        parse(content, is_yaml=True)
