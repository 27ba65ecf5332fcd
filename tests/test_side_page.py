from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tests.loopback import Server, answer

from kvtally.collectors import registry
from kvtally.collectors.base import CollectError, NoData, Reading
from kvtally.collectors.http import Endpoint
from kvtally.collectors.quantities import QUANTITIES, index
from kvtally.collectors.registry import SOURCES, Source
from kvtally.collectors.side_page import SidePage

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator, Sequence

    from kvtally.collectors.base import Kind

STORE = 'lmcache:num_hit_tokens_total{model_name="models/m",worker_id="0"} 5\n'
ROUTER = 'dynamo_frontend_input_sequence_tokens_sum{model="m"} 70\n'
ENGINE = 'vllm:prompt_tokens_total{engine="0",model_name="m"} 9\n'
LOADED = index("cache", "loaded_tokens")
INPUT = index("gateway", "input_tokens")


class Exporter:
    """A server whose only page a test writes."""

    def __init__(self) -> None:
        self.page = ""
        self._server = Server(self._talk)
        self.url = f"http://{self._server.origin}/metrics"

    def _talk(self, connection: socket.socket, _target: str) -> bool:
        connection.sendall(answer(self.page.encode()))
        return True

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    server = Exporter()
    yield server
    server.close()


@pytest.fixture
def visit(exporter: Exporter) -> Iterator[Callable[..., SidePage]]:
    pages: list[SidePage] = []

    def open_page(*serves: Callable[[Sequence[str]], Sequence[str]], **options: object) -> SidePage:
        endpoint = Endpoint(exporter.url, timeout_seconds=5)
        pages.append(SidePage("host:9", endpoint, *serves, **options))  # type: ignore[arg-type]  # options of the test
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


def kinds(readings: Sequence[Reading]) -> list[Kind]:
    return [reading.kind for reading in readings]


def test_a_page_is_read_by_the_source_that_it_shows(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit()
    exporter.page = STORE
    (reading,) = page.collect()
    assert (page.source, page.sources) == ("page:host:9", ("lmcache",))
    assert (reading.kind, reading.name, reading.values[LOADED]) == ("cache", "host:9/lmcache", 5)
    assert "engines" not in reading.attributes
    exporter.page = STORE.replace(" 5\n", " 8\n")
    assert page.collect()[0].values[LOADED] == 8
    assert page.page().decode() == exporter.page


def test_two_sources_on_one_page_are_both_read(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit()
    exporter.page = ROUTER + STORE
    cache, gateway = page.collect()
    assert (kinds([cache, gateway]), page.sources) == (["cache", "gateway"], ("lmcache", "dynamo"))
    assert (cache.values[LOADED], gateway.values[INPUT]) == (5, 70)


def test_a_source_that_comes_later_is_read_and_one_that_goes_fails_no_other(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    page = visit()
    exporter.page = STORE
    assert kinds(page.collect()) == ["cache"]
    exporter.page = STORE + ROUTER
    assert kinds(page.collect()) == ["cache", "gateway"]
    exporter.page = ROUTER
    assert kinds(page.collect()) == ["gateway"]


def test_a_source_whose_page_shows_nothing_of_it_that_is_read_fails_no_other(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    page = visit()
    exporter.page = "lmcache:remote_ping_latency 1\n" + ROUTER
    assert kinds(page.collect()) == ["gateway"]
    exporter.page = "lmcache:remote_ping_latency 1\n"
    with pytest.raises(NoData, match="host:9: LMCache in-process has counted nothing yet"):
        page.collect()


def test_a_source_that_cannot_be_trusted_fails_the_page(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    exporter.page = STORE + STORE + ROUTER
    with pytest.raises(CollectError, match="duplicate series"):
        visit().collect()


# a fresh LMCache server
FRESH = """# HELP python_info Python platform information
# TYPE python_info gauge
python_info{implementation="CPython",version="3.11.7"} 1.0
process_start_time_seconds 1.795411e+09
target_info{service_name="lmcache"} 1.0
"""


@pytest.mark.parametrize("body", ["", FRESH])
def test_a_page_of_a_server_that_has_counted_nothing_yet_is_no_data(
    exporter: Exporter, visit: Callable[..., SidePage], body: str
) -> None:
    exporter.page = body
    page = visit()
    with pytest.raises(NoData, match="host:9: the page holds no family that kvtally reads yet") as nothing:
        page.collect()
    assert nothing.value.hint.startswith("some families are not there before they have counted something; it reads ")
    exporter.page = body + STORE
    assert kinds(page.collect()) == ["cache"]


def test_a_server_that_began_anew_and_has_counted_nothing_since_is_no_data(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    page = visit()
    exporter.page = STORE
    page.collect()
    exporter.page = FRESH
    with pytest.raises(NoData, match="host:9: LMCache in-process has counted nothing since it began anew"):
        page.collect()


@pytest.mark.parametrize("body", ["node_load1 0.5\n", FRESH + "node_load1 0.5\n", "<html>", "{}"])
def test_a_page_that_holds_nothing_is_an_error_that_tells_what_is_read(
    exporter: Exporter, visit: Callable[..., SidePage], body: str
) -> None:
    exporter.page = body
    with pytest.raises(CollectError, match="host:9: the page holds no family that kvtally reads") as error:
        visit().collect()
    known = [source.title for source in SOURCES.values() if not source.is_engine]
    assert "LMCache in-process" in known
    assert error.value.hint == f"it reads those of {', '.join(known)}"


def test_the_page_of_an_engine_is_told_to_be_listed_as_one(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    exporter.page = ENGINE
    with pytest.raises(CollectError, match=re.escape("this is an engine's page (vLLM)")) as error:
        visit().collect()
    assert error.value.hint == "list it under [[engine]], not under [[page]]"


def test_what_an_engine_shows_on_the_page_of_another_is_left_to_the_engine(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    exporter.page = ENGINE + STORE
    page = visit()
    assert kinds(page.collect()) == ["cache"]
    assert page.sources == ("lmcache",)


def test_caches_and_nothing_else_carry_the_engines_that_they_serve(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    asked: list[tuple[str, ...]] = []

    def serves(sources: Sequence[str]) -> Sequence[str]:
        asked.append(tuple(sources))
        return ["10.0.0.1:8000", "b"]

    exporter.page = STORE + ROUTER
    page = visit(serves)
    cache, gateway = page.collect()
    assert asked == [("lmcache", "dynamo")]
    assert (cache.attributes["engines"], page.engines) == ("10.0.0.1:8000,b", ("10.0.0.1:8000", "b"))
    assert cache.attributes["cache"] == "lmcache in-process"
    assert "engines" not in gateway.attributes


def test_attributes_are_the_same_object_until_something_changes(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    engines = ["a"]
    page = visit(lambda _: engines)
    other = STORE.replace("models/m", "models/n")
    exporter.page = STORE
    (first,) = page.collect()
    exporter.page = STORE.replace(" 5\n", " 6\n")
    (second,) = page.collect()
    assert second.attributes is first.attributes
    # a second target makes the page be compiled anew; the first has another name then
    exporter.page = STORE + other
    assert {reading.attributes["engines"] for reading in page.collect()} == {"a"}
    engines.append("b")
    third, fourth = page.collect()
    assert third.attributes["engines"] == fourth.attributes["engines"] == "a,b"
    assert page.collect()[0].attributes is third.attributes
    engines.clear()
    assert "engines" not in page.collect()[0].attributes


def test_a_compilation_that_changes_nothing_told_leaves_the_attributes_as_they_are(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    page = visit(lambda _: ["a"])
    exporter.page = STORE
    (first,) = page.collect()
    exporter.page = STORE + STORE.replace("num_hit_tokens", "num_stored_tokens")
    (second,) = page.collect()
    assert second.attributes is first.attributes


def test_what_a_target_tells_anew_is_told_with_its_engines(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit(lambda _: ["a"])
    looked_up = 'lmcache_mp_lookup_requested_tokens_total{model_name="models/m"} 5\n'
    exporter.page = looked_up
    (first,) = page.collect()
    exporter.page = looked_up + looked_up.replace("models/m", "models/n")
    (second,) = page.collect()
    assert second.name == first.name
    assert second.attributes == {**first.attributes, "models": "models/m,models/n"}


def test_nothing_is_kept_of_targets_that_are_gone(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit(lambda _: ["a"])
    for number in range(5):
        models = (f"{number}-{place}" for place in range(3))
        exporter.page = "".join(STORE.replace("models/m", model) for model in models)
        assert len(page.collect()) == 3
    assert len(page._told) == 3


def test_kinds_that_another_source_gives_are_left_out(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit(leave_out=("gateway",))
    exporter.page = STORE + ROUTER
    assert kinds(page.collect()) == ["cache"]
    exporter.page = ROUTER
    assert page.collect() == ()


# DCGM names an instance by its GPU's UUID: NVML's own name of it is another
INSTANCE = (
    'DCGM_FI_PROF_GR_ENGINE_ACTIVE{gpu="0",UUID="GPU-a",device="nvidia0",modelName="NVIDIA A100-SXM4-40GB",'
    'GPU_I_PROFILE="1g.5gb",GPU_I_ID="13",Hostname="n1"} 1\n'
)


def test_instances_of_a_gpu_are_left_out_with_the_gpus(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    exporter.page = INSTANCE + STORE
    assert {one.name for one in visit().collect()} == {"host:9/lmcache", "GPU-a", "MIG-GPU-a/13/0"}
    # where NVML counts them
    assert kinds(visit(leave_out=("gpu",)).collect()) == ["cache"]


class Meter:
    """Holds a gauge over the time since the page before, as readers of rates do."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._before = clock()
        self._total = 0.0

    def read(self, body: bytes) -> tuple[Reading, ...]:
        rate = float(body.split()[-1])
        now = self._clock()
        self._total += rate * (now - self._before)
        self._before = now
        values = (self._total, *(None for _ in QUANTITIES["filesystem"][1:]))
        return (Reading("filesystem", "fs", {}, values, session=1.0),)


@pytest.fixture
def metered(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(("meter_",), f"{__name__}:Meter", "a meter", integrates=True)
    monkeypatch.setitem(SOURCES, "meter", source)
    monkeypatch.setitem(registry._BY_NAME, "meter", re.compile(rb"\nmeter_"))


@pytest.mark.usefixtures("metered")
def test_a_source_of_rates_is_read_by_one_reader_over_the_clock_of_the_page(
    exporter: Exporter, visit: Callable[..., SidePage]
) -> None:
    seconds = iter((100.0, 105.0, 115.0))
    page = visit(clock=lambda: next(seconds))
    exporter.page = "meter_bytes_per_second 1000\n"
    totals = [reading.values[0] for _ in range(2) for reading in page.collect()]
    assert totals == [5000, 15_000]


@pytest.mark.usefixtures("metered")
def test_two_sources_that_give_one_target_are_an_error_and_never_mixed(
    exporter: Exporter, visit: Callable[..., SidePage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SOURCES, "other", SOURCES["meter"])
    monkeypatch.setitem(registry._BY_NAME, "other", re.compile(rb"\nmeter_"))
    exporter.page = "meter_bytes_per_second 1000\n"
    with pytest.raises(CollectError, match="two targets of the name fs"):
        visit().collect()


def test_a_page_that_cannot_be_had_is_an_error(exporter: Exporter, visit: Callable[..., SidePage]) -> None:
    page = visit()
    exporter.page = STORE
    page.collect()
    exporter.close()
    with pytest.raises(CollectError):
        page.collect()
