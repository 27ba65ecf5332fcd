"""Whose a series on a page of vLLM is, and which family's, in whatever spelling it comes."""

from __future__ import annotations

import re
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

from kvtally.collectors.base import CollectError
from kvtally.collectors.family import sample_names
from kvtally.collectors.vllm_families import CONNECTORS, FAMILIES, HISTOGRAMS, INFORMATION, OFFLOAD

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from kvtally.collectors.exposition import Series

    Places = dict[str, list[tuple[int, Mapping[str, str]]]]

START = "process_start_time_seconds"
CREATED = "vllm:prompt_tokens_created"
_INFORMATION = (INFORMATION, *(name for connector in CONNECTORS for name in connector.information))
NAMES = frozenset((*sample_names((*FAMILIES, *HISTOGRAMS, *OFFLOAD)), *_INFORMATION, START, CREATED))
# every engine has one of these from its start on
_SURE = ("vllm:prompt_tokens_total", "vllm:num_requests_running", "vllm:generation_tokens_total")
_MAX_ENGINES = 512  # of one page: each becomes a target of the ledger
_NODE = "ray"  # the engines of a node that Ray counts together
# vllm:kv_offload_load_bytes_sharedstorage_total{engine="0",model_name="m"} 4096.0
# vllm:kv_offload_size_sharedstorage_count{engine="0",model_name="m",transfer_type="GPU_to_SHARED_STORAGE"} 3.0
_SPEC = re.compile(
    r"(vllm:kv_offload_(?:(?:total|load|store)_(?:bytes|time)|(?:load_|store_)?size))_(\w+)_(total|count)"
)


class Engine(NamedTuple):
    """What tells one engine of a page from another.

    rank     its label "engine"
    replica  "" on vLLM's own pages, never on Ray's
    """

    rank: str
    model: str
    replica: str

    @property
    def told_replica(self) -> str:
        """The id that Ray gives it; "" where there is none."""
        return "" if self.replica == _NODE else self.replica


class Owned(NamedTuple):
    """Places of one engine's series, by the samples of the table.

    samples  those of the engine and of its connectors
    specs    of the offloading connectors that have a name of their own beside the first: their samples
    """

    samples: Places
    specs: dict[str, Places]


def spelled(sample_name: str) -> str:
    """The sample's name as vLLM registers it.

    OpenMetrics without escaping=allow-utf-8 rewrites its colon, and so does Ray, which puts "ray_" before it and shows
    a counter without "_total" beside the counter, or instead of it.
    """
    is_ray = sample_name.startswith("ray_vllm")
    name = sample_name[4:] if is_ray else sample_name
    if name.startswith("vllm_"):
        name = "vllm:" + name[5:]
    return f"{name}_total" if is_ray and name not in NAMES and f"{name}_total" in NAMES else name


def is_read(sample_name: str) -> bool:
    """Whether a sample of this name is read, in any spelling."""
    name = spelled(sample_name)
    return name in NAMES or _SPEC.fullmatch(name) is not None


def by_engine(series: Sequence[Series]) -> dict[Engine, Owned]:
    """The series of each engine; one that lacks a label belongs to the only engine it can mean, else to none."""
    engines = _engines(series)
    homes: dict[tuple[str | None, ...], list[Engine]] = {}
    for engine in engines:
        for labels in product(*((label, None) for label in engine)):
            homes.setdefault(labels, []).append(engine)
    owned = {engine: Owned({}, {}) for engine in engines}
    repeats: list[tuple[Places, str, int, Mapping[str, str]]] = []
    for at, one in enumerate(series):
        name, spec = _taken_apart(spelled(one.name))
        index, model, replica = one.labels.get("engine"), one.labels.get("model_name"), _replica(one)
        # Ray may add up counters over a node and leave histograms to the workers, or the other way round
        beyond = None if replica == _NODE else _NODE
        candidates = homes.get((index, model, replica)) or homes.get((index, model, beyond), [])
        # the configuration names no model: it holds for all that this engine serves
        if len(candidates) != 1 and name != INFORMATION:
            continue
        for candidate in candidates:
            own = owned[candidate]
            if spec:
                own.specs.setdefault(spec, {}).setdefault(name, []).append((at, {**one.labels, "spec": spec}))
            elif name.endswith("_total") and not one.name.endswith("_total"):
                repeats.append((own.samples, name, at, one.labels))
            else:
                own.samples.setdefault(name, []).append((at, one.labels))
    _take_alone(repeats)
    return owned


def _engines(series: Sequence[Series]) -> set[Engine]:
    engines = {
        Engine(one.labels.get("engine", "0"), one.labels.get("model_name", ""), _replica(one))
        for one in series
        if spelled(one.name) in _SURE
    }
    if len(engines) > _MAX_ENGINES:
        raise CollectError(f"the page shows {len(engines)} engines, the limit is {_MAX_ENGINES}")
    return engines


def _take_alone(repeats: Sequence[tuple[Places, str, int, Mapping[str, str]]]) -> None:
    """Add Ray's gauges of counters where the counter itself is not there: either, never both."""
    alone = [name not in samples for samples, name, _, _ in repeats]
    for (samples, name, at, labels), is_alone in zip(repeats, alone, strict=True):
        if is_alone:
            samples.setdefault(name, []).append((at, labels))


# ray_vllm_prompt_tokens_total{ReplicaId="x2kq8",WorkerId="0a1b",engine="0",model_name="m"} 1000.0
def _replica(one: Series) -> str:
    if not one.name.startswith("ray_"):
        return ""
    return one.labels.get("ReplicaId") or one.labels.get("WorkerId") or _NODE


def _taken_apart(name: str) -> tuple[str, str]:
    """A sample's name in the table, and the connector's name that stands in it."""
    found = _SPEC.fullmatch(name)
    return (f"{found[1]}_{found[3]}", found[2]) if found else (name, "")
