"""Which caches stand behind which engine: by the part of their names that both share, or by what the config says."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence


class CacheTarget(NamedTuple):
    """A cache target of the ledger by what it is joined by; one name may have several, where its attributes changed."""

    id: int
    name: str
    attributes: Mapping[str, str]


def caches_behind(
    engine: str, caches: Iterable[CacheTarget], engines: Collection[str] = frozenset()
) -> list[CacheTarget]:
    """The caches whose loads are reuse of this engine's; `engines` are the names of all engine targets.

    A transfer from a prefill to a decode engine is none: nobody was spared the prefill.
    """
    return [one for one in _joined(engine, caches, engines) if not is_transfer(one.attributes)]


def transfers_of(
    engine: str, caches: Iterable[CacheTarget], engines: Collection[str] = frozenset()
) -> list[CacheTarget]:
    """The caches by which KV is handed to this engine or from it; `engines` as above."""
    return [one for one in _joined(engine, caches, engines) if is_transfer(one.attributes)]


def _joined(engine: str, caches: Iterable[CacheTarget], engines: Collection[str]) -> list[CacheTarget]:
    return [one for one in caches if _is_named(one.attributes, engine) or _is_near(one.name, engine, engines)]


def is_transfer(attributes: Mapping[str, str]) -> bool:
    """Whether a cache moves KV between engines that share a request, and keeps none."""
    return attributes.get("transfer") == "1"


def named_engines(attributes: Mapping[str, str]) -> Sequence[str]:
    """The engines that a cache's page is said to serve: their targets' names up to the first slash."""
    return [name for part in attributes.get("engines", "").split(",") if (name := part.strip())]


def _is_named(attributes: Mapping[str, str], engine: str) -> bool:
    return bool({engine, engine.partition("/")[0]} & set(named_engines(attributes)))


def _is_near(cache: str, engine: str, engines: Collection[str]) -> bool:
    """Whether both are of one page, and the cache is not another rank's own: "host:8000/1/kv_offload" is rank 1's."""
    if cache.partition("/")[0] != engine.partition("/")[0]:
        return False
    return _owner(cache, engines) in {None, engine}


def _owner(cache: str, engines: Collection[str]) -> str | None:
    """The engine that a cache is named for, as a rank's own offloading is; None where it is the whole host's."""
    while "/" in cache:
        cache = cache.rpartition("/")[0]
        if cache in engines:
            return cache
    return None
