from __future__ import annotations

import json
import sys
from itertools import pairwise
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.yaml_text import DEPTH_MAX, decoded, is_installed

# what PyYAML writes of NEL and the like it does not read as it was
TEXTS = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Zs"), include_characters="\n"))
LEVELS = st.recursive(
    st.none() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


def deep(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def refusal(text: bytes) -> str:
    """Why it is not read; "" where it is."""
    try:
        decoded(text)
    except ValueError as error:
        return str(error)
    return ""


def test_lists_mappings_and_text_are_read_in_any_style() -> None:
    text = b"""\
# what Prometheus reads too
- targets: ['10.0.0.7:8000', engine-1:8000]
  labels:
    namespace: "chat"
    note: >-
      two
      lines
- targets:
  - h:1
"""
    assert decoded(text) == [
        {"targets": ["10.0.0.7:8000", "engine-1:8000"], "labels": {"namespace": "chat", "note": "two lines"}},
        {"targets": ["h:1"]},
    ]


def test_a_scalar_is_its_text_and_only_null_is_nothing() -> None:
    text = b"{a: 8000, b: yes, c: 1e3, d: 0x1F, e: 2026-11-23, f: null, g: ~, h: , i: 'null', j: ''}"
    assert decoded(text) == {
        "a": "8000",
        "b": "yes",
        "c": "1e3",
        "d": "0x1F",
        "e": "2026-11-23",
        "f": None,
        "g": None,
        "h": None,
        "i": "null",
        "j": "",
    }


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"---\n", b"--- null\n...\n"])
def test_a_text_may_hold_nothing(text: bytes) -> None:
    assert decoded(text) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"a: &x [1]\n", "anchors and aliases are not read (line 1)"),
        (b"a: 1\nb: *x\n", "anchors and aliases are not read (line 2)"),
        (b"- !!python/object/apply:os.system [id]\n", "tags are not read (line 1)"),
        (b"a: !!str 80\n", "tags are not read (line 1)"),
        (b"a: 1\na: 2\n", "'a' is there twice (line 2)"),
        (b"? [1]\n: 2\n", "a key that is no text (line 1)"),
        (b"~: 1\n", "a key that is no text (line 1)"),
        (b"a: 1\n---\nb: 2\n", "a second document (line 2)"),
        (b"a: [1\n", "did not find expected ',' or ']' (line 2)"),
        (b"a:\n\t- b\n", "found character that cannot start any token (line 2)"),
        (b'a: "\xc3"', "unacceptable character #x0022: invalid trailing UTF-8 octet"),
    ],
)
def test_what_is_not_plain_is_refused_with_its_line(text: bytes, reason: str) -> None:
    assert refusal(text) == reason


def test_a_text_that_would_grow_without_end_is_refused_before_it_does() -> None:
    """A billion laughs: each level names the one before nine times."""
    names = "abcdefghi"
    lines = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]" for before, name in pairwise(names)]
    with pytest.raises(ValueError, match="anchors and aliases are not read"):
        decoded("\n".join([f"a: &a [{'lol, ' * 9}]", *lines]).encode())


def test_a_text_is_as_deep_as_sixteen_levels() -> None:
    assert json.dumps(decoded(deep(DEPTH_MAX))) == deep(DEPTH_MAX).decode()
    with pytest.raises(ValueError, match="more than 16 levels"):
        decoded(deep(DEPTH_MAX + 1))
    with pytest.raises(ValueError, match="more than 16 levels"):
        decoded(b"[" * 100_000)


@given(LEVELS)
def test_what_pyyaml_writes_is_read_as_it_was(document: Any) -> None:
    assert decoded(yaml.safe_dump(document, allow_unicode=True).encode()) == document


@given(st.binary(max_size=200))
def test_whatever_stands_in_a_file_it_is_read_or_refused(text: bytes) -> None:
    assert refusal(text).isprintable()


def test_without_the_c_library_the_same_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader")
    assert decoded(b"- {a: [b, 'c']}\n") == [{"a": ["b", "c"]}]
    with pytest.raises(ValueError, match="anchors and aliases are not read"):
        decoded(b"[&x 1, *x]")


def test_where_pyyaml_is_not_there_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_installed()
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert not is_installed()
    with pytest.raises(ValueError, match=r"pip install 'kvtally\[yaml\]'"):
        decoded(b"[]")
