"""Reads the format of Prometheus' file_sd_configs, JSON or YAML, as engines and pages."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlencode

import msgspec
from msgspec import Struct

from kvtally.agent.config_tables import Access, Engine, Labels, Page
from kvtally.agent.kubernetes import role_of
from kvtally.agent.yaml_text import decoded
from kvtally.collectors.http_connection import take_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TARGETS_MAX = 4096

_URL_CHARACTERS_MAX = 2000
_LABEL_CHARACTERS_MAX = 200
_ADDRESS = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_PARAMETER = "__param_"
_OPEN = Access()
_OWN = ("kvtally_kind", "kvtally_group", "kvtally_engines")
_READ = frozenset({*Labels.__struct_fields__, *_OWN, "instance", "role", "llm-d.ai/role", "llm_d_ai_role"})


# One group, as Prometheus' documentation has it:
#   - targets: ["10.0.0.7:8000"]  labels: {"__metrics_path__": "/metrics", "namespace": "chat", "role": "prefill"}
class _Group(Struct, forbid_unknown_fields=True):
    targets: list[str]
    labels: dict[str, str] | None = None


class Targets(NamedTuple):
    """What a file names: engines and pages, with what its labels tell of them."""

    engines: tuple[Engine, ...] = ()
    pages: tuple[Page, ...] = ()


def parse(content: bytes, access: Access = _OPEN, *, is_yaml: bool = False) -> Targets:
    """The targets of one file; ValueError, which says where, for a file that is not wholly understood.

    Read are the labels __scheme__, __metrics_path__ and __param_*; cluster, namespace and tenant; instance (the name,
    where the group has one target); role, llm-d.ai/role or llm_d_ai_role; kvtally_kind ("engine" or "page"),
    kvtally_group, and kvtally_engines (names with commas) of a page. Others are Prometheus' affair.
    """
    try:
        if is_yaml:
            document = decoded(content)
            groups = [] if document is None else msgspec.convert(document, type=list[_Group])
        else:
            groups = msgspec.json.decode(content, type=list[_Group])
    except (msgspec.MsgspecError, ValueError) as error:
        raise ValueError(f"not in the format of file_sd: {error}") from None
    if sum(len(group.targets) for group in groups) > TARGETS_MAX:
        raise ValueError(f"more than {TARGETS_MAX} targets")
    entries = [entry for place, group in enumerate(groups) for entry in _entries(f"[{place}]", group, access)]
    return Targets(
        tuple(entry for entry in entries if isinstance(entry, Engine)),
        tuple(entry for entry in entries if isinstance(entry, Page)),
    )


def _entries(place: str, group: _Group, access: Access) -> Iterator[Engine | Page]:
    labels = group.labels or {}
    for name, value in labels.items():
        if name.startswith("kvtally") and name not in _OWN:
            raise ValueError(f"{place}.labels: unknown is {name[:60]!a}; kvtally's own are {', '.join(_OWN)}")
        if name in _READ and (len(value) > _LABEL_CHARACTERS_MAX or not value.isprintable()):
            reason = f"longer than {_LABEL_CHARACTERS_MAX} characters, or holds a control character"
            raise ValueError(f"{place}.labels.{name}: {reason}")
    kind = labels.get("kvtally_kind", "engine")
    if kind not in {"engine", "page"}:
        raise ValueError(f"{place}.labels.kvtally_kind: neither engine nor page")
    name = labels.get("instance", "") if len(group.targets) == 1 else ""  # a name belongs to one target
    for index, target in enumerate(group.targets):
        try:
            url = _url(target, labels)
        except ValueError as error:
            raise ValueError(f"{place}.targets[{index}]: {error}") from None
        if kind == "page":
            engines = tuple(each for part in labels.get("kvtally_engines", "").split(",") if (each := part.strip()))
            yield Page(url, name, engines, access)
        else:
            yield _engine(url, name, labels, access)


def _engine(url: str, name: str, labels: Mapping[str, str], access: Access) -> Engine:
    role = next((labels[key] for key in ("llm-d.ai/role", "llm_d_ai_role", "role") if key in labels), "")
    return Engine(
        url,
        name,
        role=role_of(role),
        group=labels.get("kvtally_group", ""),
        labels=Labels(**{key: labels.get(key, "") for key in Labels.__struct_fields__}),
        access=access,
    )


def _url(target: str, labels: Mapping[str, str]) -> str:
    """The page of a target ("host:port"); ValueError, which never holds credentials, where it cannot be asked."""
    if "@" in target:
        raise ValueError("credentials are refused: set scrape.file_sd_access")
    if not _ADDRESS.fullmatch(target):
        raise ValueError(
            f"{target[:60]!a} is no host:port; scheme and path are the labels __scheme__, __metrics_path__"
        )
    scheme = labels.get("__scheme__", "http")
    if scheme not in {"http", "https"}:
        raise ValueError("__scheme__ is neither http nor https")
    path = "/" + labels.get("__metrics_path__", "/metrics").removeprefix("/")
    query = urlencode([(key.removeprefix(_PARAMETER), labels[key]) for key in labels if key.startswith(_PARAMETER)])
    url = f"{scheme}://{target}{path}" + (f"?{query}" if query else "")
    if len(url) > _URL_CHARACTERS_MAX:
        raise ValueError(f"its address has more than {_URL_CHARACTERS_MAX} characters")
    take_apart(url)
    return url
