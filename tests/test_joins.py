from __future__ import annotations

import pytest

from kvtally.agent.joins import CacheTarget, caches_behind, is_transfer, named_engines, transfers_of

ENGINES = {"10.0.0.1:8000/0", "10.0.0.1:8000/1", "10.0.0.2:8000/0"}


def behind(engine: str, name: str, **attributes: str) -> bool:
    cache = CacheTarget(7, name, attributes)
    return caches_behind(engine, [cache], ENGINES) == [cache]


@pytest.mark.parametrize("name", ["10.0.0.1:8000/lmcache", "10.0.0.1:8000/lmcache/model", "10.0.0.1:8000/1/kv_offload"])
def test_a_cache_on_an_engines_page_is_behind_it(name: str) -> None:
    assert behind("10.0.0.1:8000/1", name)
    assert not behind("10.0.0.2:8000/0", name)


def test_what_one_rank_offloads_is_behind_that_rank_alone() -> None:
    assert not behind("10.0.0.1:8000/0", "10.0.0.1:8000/1/kv_offload")


@pytest.mark.parametrize("engines", ["10.0.0.1:8000", "10.0.0.2:8000, 10.0.0.1:8000", "10.0.0.1:8000/0"])
def test_a_page_of_its_own_is_behind_the_engines_that_it_is_said_to_serve(engines: str) -> None:
    assert behind("10.0.0.1:8000/0", "10.0.0.9:8180/lmcache_mp", engines=engines)


def test_one_rank_of_two_may_be_named() -> None:
    assert not behind("10.0.0.1:8000/1", "10.0.0.9:8180/lmcache_mp", engines="10.0.0.1:8000/0")


@pytest.mark.parametrize("engines", ["", "10.0.0.1", ",", "10.0.0.1:80000"])
def test_a_page_that_names_nobody_is_behind_nobody(engines: str) -> None:
    assert not behind("10.0.0.1:8000/0", "10.0.0.9:8180/lmcache_mp", engines=engines)


def test_a_transfer_between_two_engines_is_no_cache_behind_either() -> None:
    assert is_transfer({"transfer": "1"})
    assert not behind("10.0.0.1:8000/0", "10.0.0.1:8000/0/nixl", transfer="1")
    assert not behind("10.0.0.1:8000/0", "10.0.0.9:1/nixl", transfer="1", engines="10.0.0.1:8000")


def test_transfers_are_joined_as_caches_are() -> None:
    first = CacheTarget(1, "10.0.0.1:8000/0/nixl", {"transfer": "1"})
    other = CacheTarget(2, "10.0.0.1:8000/1/nixl", {"transfer": "1"})
    cache = CacheTarget(3, "10.0.0.1:8000/lmcache", {})
    assert transfers_of("10.0.0.1:8000/0", [first, other, cache], ENGINES) == [first]


def test_names_are_told_one_by_one() -> None:
    assert named_engines({"engines": " a:1 ,, b:2"}) == ["a:1", "b:2"]
    assert named_engines({}) == []
