"""Reads the plain part of YAML: lists, mappings and text, as an operator writes them, with PyYAML where it is there."""

from __future__ import annotations

from typing import Any

SUFFIXES = (".yml", ".yaml")
DEPTH_MAX = 16
REMEDY = "pip install 'kvtally[yaml]', or convert it to JSON: yq -o=json targets.yml > targets.json"
_NOTHING = ("", "~", "null", "Null", "NULL")


def is_installed() -> bool:
    """Whether PyYAML is there; it is not loaded."""
    from importlib.util import find_spec  # noqa: PLC0415  # of use to those alone who write YAML

    return find_spec("yaml") is not None


def decoded(content: bytes) -> Any:
    """The one document of a text; ValueError, which says where, for what is not plain, and where PyYAML is not there.

    Every scalar is its text, as Prometheus takes what it reads into strings: 8000 is "8000", and only an empty one or
    null is None. Aliases are refused, so that a text is never larger than it looks; so are tags and repeated keys.
    """
    try:
        import yaml  # noqa: PLC0415  # 1 MiB, for those alone who write YAML
    except ImportError:
        raise ValueError(f"YAML takes PyYAML: {REMEDY}") from None
    builder = _Builder()
    try:
        # events, and not a tree: PyYAML's takes 50 times the memory of the text
        for event in yaml.parse(content, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            builder.take(type(event).__name__, event)
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"{error.problem or error.context}{_at(error.problem_mark)}") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).partition("\n")[0]) from None
    return builder.document


class _Builder:
    """Puts a document together from PyYAML's events."""

    def __init__(self) -> None:
        self.document: Any = None
        self._documents = 0
        self._open: list[list[Any] | dict[str, Any]] = []
        self._keys: list[str | None] = []  # of the open collections, the key that waits for its value

    def take(self, kind: str, event: Any) -> None:
        """Take the next event."""
        if kind == "DocumentStartEvent":
            self._documents += 1
            if self._documents > 1:
                raise ValueError(f"a second document{_at(event.start_mark)}")
        elif kind == "AliasEvent" or getattr(event, "anchor", None):
            raise ValueError(f"anchors and aliases are not read{_at(event.start_mark)}")
        elif getattr(event, "tag", None):
            raise ValueError(f"tags are not read{_at(event.start_mark)}")
        elif kind == "ScalarEvent":
            is_nothing = event.implicit[0] and event.value in _NOTHING
            self._put(None if is_nothing else event.value, event)
        elif kind in {"SequenceStartEvent", "MappingStartEvent"}:
            if len(self._open) == DEPTH_MAX:
                raise ValueError(f"more than {DEPTH_MAX} levels{_at(event.start_mark)}")
            made: list[Any] | dict[str, Any] = [] if kind == "SequenceStartEvent" else {}
            self._put(made, event)
            self._open.append(made)
            self._keys.append(None)
        elif kind in {"SequenceEndEvent", "MappingEndEvent"}:
            self._open.pop()
            self._keys.pop()

    def _put(self, value: Any, event: Any) -> None:
        if not self._open:
            self.document = value
            return
        within, key = self._open[-1], self._keys[-1]
        if isinstance(within, list):
            within.append(value)
        elif key is None:
            if not isinstance(value, str):
                raise ValueError(f"a key that is no text{_at(event.start_mark)}")  # noqa: TRY004  # a fault of the text
            if value in within:
                raise ValueError(f"{value[:60]!a} is there twice{_at(event.start_mark)}")
            self._keys[-1] = value
        else:
            within[key] = value
            self._keys[-1] = None


def _at(mark: Any) -> str:
    return "" if mark is None else f" (line {mark.line + 1})"
