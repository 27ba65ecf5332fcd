from __future__ import annotations

import json
from contextlib import closing
from typing import TYPE_CHECKING

import pytest
from tests.ledgers import HOUR, SECOND, SKU, START, Deployment, FakeEngine, new_ledger, reader_of
from tests.serving import FACTS, SHAPE, ServingEngine, Site

from kvtally.agent.calibrating import learn
from kvtally.agent.finding import utc_text
from kvtally.agent.kin import _missing, kin_of, known_laws
from kvtally.agent.ledger.read import Target, replica_of
from kvtally.agent.replica import About
from kvtally.collectors.base import Reading
from kvtally.collectors.quantities import QUANTITIES

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from kvtally.agent.calibrating import Learned
    from kvtally.agent.observed import CacheSpan

FIRST, SECOND_ENGINE = "10.0.0.1:8000/0", "10.0.0.2:8000/0"
SERVER = "10.0.0.9:8180/lmcache_mp"


class Server(FakeEngine):
    """An LMCache server that both engines load from."""

    def __init__(self, engines: str = "10.0.0.1:8000,10.0.0.2:8000") -> None:
        super().__init__(SERVER)
        self.attributes = {"engines": engines}
        self.counts = dict.fromkeys((quantity.name for quantity in QUANTITIES["cache"]), 0.0)

    def reading(self) -> Reading:
        return Reading("cache", self.name, self.attributes, tuple(self.counts.values()), self.epoch)


def caches_of(path: str) -> Mapping[str, tuple[CacheSpan, ...]]:
    """What each engine is charged of the server, by the engine's name."""
    with closing(reader_of(path)) as reader:
        found = kin_of(reader, (START, START + 3 * HOUR), reader.targets())
    return {one.name: one.observed.caches.get(SERVER, ()) for kin in found for one in kin.subjects}


def serve(
    path: str, loads: Mapping[int, tuple[int, int]], server: Server, *, roles: tuple[str, str] = ("", "")
) -> None:
    """Each hour the engines load that many tokens and compute 1,000 and 3,000, and the server tells what it did."""
    engines = FakeEngine(FIRST), FakeEngine(SECOND_ENGINE)
    abouts = {
        one.name.partition("/")[0]: About(gpus=(), facts={"role": role} if role else {})
        for one, role in zip(engines, roles, strict=True)
    }
    deployment = Deployment(path, abouts)
    deployment.scrape(START, [*engines, server])
    for hour, loaded in sorted(loads.items()):
        for engine, tokens, computed in zip(engines, loaded, (1000, 3000), strict=True):
            engine.serve(computed=computed)
            engine.counts["external_tokens"] += tokens
            engine.counts["prompt_tokens"] += tokens
        server.counts["load_ns"] += 4.0
        server.counts["store_ns"] += 2.0
        server.counts["dram_hit_tokens"] += 600
        server.counts["disk_hit_tokens"] += 400
        deployment.scrape(START + hour * HOUR + 20 * SECOND, [*engines, server])
        deployment.scrape(START + hour * HOUR + HOUR, [*engines, server])
    deployment.close()


def sums(spans: tuple[CacheSpan, ...], name: str) -> int:
    return sum(getattr(one, name) or 0 for one in spans)


@pytest.mark.parametrize(
    ("replica", "text", "hint"),
    [
        (
            {},
            "vLLM ? does not tell vllm:iteration_tokens_total_count",
            "vLLM 0.16 and later count what the savings need",
        ),
        (
            {"version": "0.12.0"},
            "vLLM 0.12.0 does not tell vllm:iteration_tokens_total_count",
            "vLLM 0.16 and later count what the savings need",
        ),
        (
            {"version": "0.25.1"},
            "the page of vLLM 0.25.1 lacks vllm:iteration_tokens_total_count",
            "this version shows it: look for what filters the page on its way here, or for values that are no numbers",
        ),
        (
            {"engine": "sglang", "version": "0.5.23"},
            "SGLang 0.5.23 does not tell steps: this engine does not count what the savings need",
            "",
        ),
        (
            {"engine": "tensorrt-llm"},
            "TensorRT-LLM does not tell steps: this engine does not count what the savings need",
            "",
        ),
        ({"engine": "else"}, "else does not tell steps: this engine does not count what the savings need", ""),
    ],
)
def test_what_is_missing_is_said_of_the_engine_that_it_is(replica: dict[str, str], text: str, hint: str) -> None:
    attributes = {"model": "m", **replica}
    found = _missing(["steps"], replica_of(Target(1, "engine", FIRST, attributes, ())))
    assert (found.text, found.hint, found.refuses) == (text, hint, True)


def test_a_setting_of_an_engine_is_words_that_hold_whatever_the_file_has_already() -> None:
    def told(kind: str) -> str:
        return replica_of(Target(1, "engine", FIRST, {"engine": kind}, ())).in_config("x = 1")

    assert told("vllm") == 'in kvtally.toml, in the [[engine]] with url = "http://10.0.0.1:8000/metrics": x = 1'
    assert '"http://10.0.0.1:8000/prometheus/metrics": x = 1' in told("tensorrt-llm")


def test_an_engine_that_config_names_is_found_there_by_its_name() -> None:
    def told(name: str, mapping: str = "config") -> str:
        return replica_of(Target(1, "engine", name, {"mapping": mapping}, ())).in_config("x = 1")

    assert told("sgl-new/0") == 'in kvtally.toml, in the [[engine]] with name = "sgl-new": x = 1'
    assert told("sgl-new:eu/0") == 'in kvtally.toml, in the [[engine]] with name = "sgl-new:eu": x = 1'
    assert told("[::1]:8000/0") == 'in kvtally.toml, in the [[engine]] with url = "http://[::1]:8000/metrics": x = 1'
    for mapping in ("recorded", "the recording does not say which GPUs it had"):
        assert told("on/0", mapping) == (
            'in kvtally.toml, in the [[engine]] with name = "on": x = 1, and replay it into a new ledger'
        )


def test_a_server_of_two_engines_is_shared_by_what_each_loaded_and_stored(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    serve(path, {0: (300, 100)}, Server())
    found = caches_of(path)
    # loads 3 : 1, and stores as what had to be computed, 1 : 3
    for name, load_ns, store_ns, dram, disk in (
        (FIRST, 3 * SECOND, SECOND // 2, 450, 300),
        (SECOND_ENGINE, SECOND, 3 * SECOND // 2, 150, 100),
    ):
        assert [sums(found[name], one) for one in ("load_ns", "store_ns", "dram_hit_tokens", "disk_hit_tokens")] == [
            load_ns,
            store_ns,
            dram,
            disk,
        ]


def test_hour_by_hour_the_engine_that_worked_is_charged(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    serve(path, {0: (300, 0), 1: (0, 900)}, Server())
    found = caches_of(path)
    by_hour = {
        name: [sums(tuple(one for one in spans if one.start_ns // HOUR == hour), "load_ns") for hour in hours()]
        for name, spans in found.items()
    }
    assert by_hour == {FIRST: [4 * SECOND, 0], SECOND_ENGINE: [0, 4 * SECOND]}


def hours() -> tuple[int, int]:
    return START // HOUR, START // HOUR + 1


def test_what_nobody_loaded_is_shared_alike(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    serve(path, {0: (0, 0)}, Server())
    assert [sums(spans, "load_ns") for spans in caches_of(path).values()] == [2 * SECOND, 2 * SECOND]


def test_an_engine_that_the_server_does_not_serve_is_charged_nothing(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    serve(path, {0: (300, 100)}, Server("10.0.0.1:8000"))
    found = caches_of(path)
    assert sums(found[FIRST], "load_ns") == 4 * SECOND
    assert found[SECOND_ENGINE] == ()


@pytest.mark.parametrize("decodes", [False, True])
def test_a_decode_engine_is_handed_its_tokens_and_loads_none(tmp_path: Path, decodes: bool) -> None:
    path = new_ledger(tmp_path)
    serve(path, {0: (300, 100)}, Server(), roles=("", "decode" if decodes else ""))
    assert sums(caches_of(path)[FIRST], "load_ns") == (4 if decodes else 3) * SECOND


# -- what shares a law

DEEP = {**FACTS, "shape": json.dumps({**SHAPE, "num_hidden_layers": 64}, sort_keys=True)}


def served(path: str, second: Mapping[str, str] | None = None) -> None:
    """Half an hour of an engine, and of a second one behind the same name that is said to be run as these facts say."""
    names, about = [FIRST], {}
    if second is not None:
        names.append(SECOND_ENGINE)
        about["10.0.0.2:8000"] = About(gpus=("GPU-1",), sku=SKU, mapping="a test", facts=second)
    made = Site(path, [ServingEngine(name) for name in names], about=about)
    made.scrape(made.engines)
    made.serve(1800).close()


def laws_of(path: str) -> dict[tuple[str, ...], Learned]:
    with closing(reader_of(path)) as reader:
        return {one.replicas: one for one in learn(reader, (0, 2**62), reader.targets())}


@pytest.mark.parametrize("second", [DEEP, {**FACTS, "eager": "1"}], ids=["other weights", "eager"])
def test_engines_that_are_not_alike_behind_one_served_name_share_no_law(tmp_path: Path, second: dict[str, str]) -> None:
    path = new_ledger(tmp_path)
    served(path, second=second)
    with closing(reader_of(path)) as reader:
        found = {kin.subjects[0].name: kin for kin in kin_of(reader, (START, START + HOUR), reader.targets())}
    assert {name: len(kin.subjects) for name, kin in found.items()} == {FIRST: 1, SECOND_ENGINE: 1}
    honest, other = found[FIRST].machine, found[SECOND_ENGINE].machine
    assert honest is not None
    assert other is not None
    assert (honest.shape.layers, honest.is_eager) == (32, False)
    assert (other.shape.layers, other.is_eager) == (json.loads(second["shape"])["num_hidden_layers"], "eager" in second)
    law = laws_of(path)[FIRST,].calibration
    assert law is not None
    assert law.evidence.requests == 240  # its own alone
    assert law.evidence.worked_ratio == pytest.approx(1.0, abs=0.02)


def test_a_stored_law_of_before_sizes_were_told_is_neither_lost_nor_given_to_another(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone, both = new_ledger(tmp_path / "alone"), new_ledger(tmp_path)
    served(alone)
    served(both, second=DEEP)
    law = laws_of(alone)[FIRST,].calibration
    assert law is not None
    assert law.fingerprint.sizes
    old = law._replace(fingerprint=law.fingerprint._replace(sizes=""))
    found = {}
    for path in (alone, both):
        with closing(reader_of(path)) as reader:
            reader.add_calibration(old, START, "a test")
            (one,) = known_laws(reader.calibrations(), reader.targets())
            found[path] = one.calibration.fingerprint
    assert found == {alone: law.fingerprint, both: old.fingerprint}


def test_an_engine_whose_shape_nobody_knows_takes_no_law_from_its_kind(tmp_path: Path) -> None:
    path = new_ledger(tmp_path)
    served(path, second={"token_budget": "8192"})
    found = laws_of(path)
    law = found[FIRST,].calibration
    assert law is not None
    assert law.evidence.requests == 240
    (reason,) = found[SECOND_ENGINE,].reasons
    assert reason.text == "the shape of model llama-8b is not known"


def test_an_engine_whose_cache_was_switched_off_is_not_asked_for_its_timers(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), FakeEngine(FIRST)
    for half, facts in enumerate(({**FACTS, "connector": "LMCacheConnectorV1"}, FACTS)):
        about = About(gpus=("GPU-0",), sku=SKU, mapping="a test", facts=facts)
        deployment = Deployment(path, {"10.0.0.1:8000": about}, interval_seconds=10)
        for at in range(60):
            engine.serve(computed=60)
            deployment.scrape(START + (half * 600 + at * 10) * SECOND, [engine])
        deployment.close()
    with closing(reader_of(path)) as reader:
        subjects = [one for kin in kin_of(reader, (START, START + HOUR), reader.targets()) for one in kin.subjects]
    told = {one.replica.connector: [each.connector for each in one.observed.replicas.values()] for one in subjects}
    assert told == {"LMCacheConnectorV1": ["LMCacheConnectorV1"], "": [""]}


def test_what_was_not_known_before_is_told_with_the_time_from_which_it_is(tmp_path: Path) -> None:
    path, engine = new_ledger(tmp_path), ServingEngine(FIRST)
    blind = About(gpus=("GPU-0",), mapping="a test")  # its process is not seen yet
    before = Site(path, [engine], about={"10.0.0.1:8000": blind})
    before.scrape(before.engines)
    before.serve(600).close()
    after = Site(path, [engine])
    after.at_ns, after.gpus = before.at_ns, before.gpus
    after.serve(600).close()
    with closing(reader_of(path)) as reader:
        reasons = [one for kin in kin_of(reader, (START, START + HOUR), reader.targets()) for one in kin.reasons]
    (shape,) = (one for one in reasons if "the shape of model" in one.text)
    since = utc_text(START + 600 * SECOND)
    assert shape.text == f"before {since}, the shape of model llama-8b is not known"
    assert (shape.hint, shape.refuses) == (f"ask from then on: --since {since}", True)
