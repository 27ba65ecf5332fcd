from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import HOUR, SECOND, START, Deployment, FakeEngine, new_ledger, reader_of

from kvtally.agent.accounts import Payment, Window
from kvtally.agent.rates import RateBook
from kvtally.agent.replica import About
from kvtally.agent.report import cost_report
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from kvtally.agent.finding import Finding

ENGINES = ("10.0.0.1:8000/0", "10.0.0.2:8000/0")
SERVER = "10.0.0.9:8180/lmcache_mp"


class Server(FakeEngine):
    """A cache of these engines; it counts loads, or does not tell."""

    def __init__(self, name: str, engines: str) -> None:
        super().__init__(name)
        self.attributes = {"engines": engines}
        self.loaded: float | None = 0.0

    def reading(self) -> Reading:
        told = {"loaded_tokens": self.loaded}
        return Reading(
            "cache", self.name, self.attributes, tuple(told.get(q.name) for q in QUANTITIES["cache"]), self.epoch
        )


def findings(
    folder: Path,
    external: Sequence[int],
    loaded: Sequence[int | None],
    *,
    seconds: int = 60,
    role: str = "",
    watched_from: int = 0,
) -> list[Finding]:
    """Three ticks in each of which the engines reuse so many tokens, and so many caches say that they loaded as many.

    The second cache is behind the first engine alone.
    """
    path = new_ledger(folder)
    engines = [FakeEngine(name) for name in ENGINES[: len(external)]]
    names = ",".join(name.partition("/")[0] for name in ENGINES)
    caches = [Server(SERVER, names), Server("10.0.0.8:8180/lmcache_mp", "10.0.0.1:8000")][: len(loaded)]
    for cache, tokens in zip(caches, loaded, strict=True):
        cache.loaded = None if tokens is None else 0.0
    abouts = {one.name.partition("/")[0]: About(gpus=(), facts={"role": role} if role else {}) for one in engines}
    deployment = Deployment(path, abouts, interval_seconds=seconds)
    for number in range(4):
        if number:
            for engine, tokens in zip(engines, external, strict=True):
                engine.serve(computed=1000, generated=10, steps=10)
                engine.counts["external_tokens"] += tokens
                engine.counts["prompt_tokens"] += tokens
            for cache, more in zip(caches, loaded, strict=True):
                cache.loaded = None if cache.loaded is None or more is None else cache.loaded + more
        deployment.scrape(START + number * seconds * SECOND, [*engines, *(caches if number >= watched_from else [])])
    deployment.close()
    with closing(reader_of(path)) as reader:
        report = cost_report(reader, Window(START, START + HOUR), (), RateBook(()), Payment())
    return [one for one in report.findings if one.kind == "cache_disagrees"]


def test_a_cache_that_loaded_more_than_its_engines_reused_is_told_with_both_figures(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, (3000, 1000), [5000])
    assert (found.severity, found.target) == ("info", f"engine/{ENGINES[0]}, {ENGINES[1]}")
    assert found.message.startswith(
        f"{SERVER} tells 15000 tokens loaded, its 2 engines 12000 from outer tiers. Usual reasons: requests that were "
    )
    assert (found.start_ns, found.end_ns) == (START, START + 180 * SECOND)


def test_one_that_loaded_less_is_told_too(tmp_path: Path) -> None:
    (found,) = findings(tmp_path, (4000,), [3000])
    assert f"{SERVER} tells 9000 tokens loaded, its engine 12000 from outer tiers" in found.message


@pytest.mark.parametrize(
    ("external", "loaded", "more"),
    [
        ((4000,), [3800], {}),  # 5 % of the larger
        ((4000,), [4200], {}),
        ((3000,), [1000], {}),  # 9,000 tokens
        ((8000,), [4000], {"seconds": 19}),  # 57 s
        ((8000,), [None], {}),
        ((8000,), [4000], {"role": "decode"}),  # what it has from outside was handed to it
        ((8000, 8000), [4000, 4000], {}),  # nothing tells which of the two its tokens came from
        ((8000,), [4000], {"seconds": 600, "watched_from": 2}),
        ((0,), [0], {}),
    ],
)
def test_where_they_agree_or_cannot_be_compared_nothing_is_said(
    tmp_path: Path, external: Sequence[int], loaded: Sequence[int | None], more: dict[str, int]
) -> None:
    assert findings(tmp_path, external, loaded, **more) == []  # type: ignore[arg-type]  # keywords of a table
