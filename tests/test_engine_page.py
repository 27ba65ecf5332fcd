from __future__ import annotations

import json
import subprocess
import sys
import threading
from typing import TYPE_CHECKING
from wsgiref.simple_server import WSGIRequestHandler, make_server

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from kvtally.collectors import engine_page
from kvtally.collectors.base import CollectError
from kvtally.collectors.engine_page import EnginePage
from kvtally.collectors.http import Endpoint
from kvtally.collectors.quantities import index
from kvtally.collectors.registry import SOURCES, sources_on

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from pathlib import Path
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

LABELS = ("model_name", "engine")
OF_ENGINE = {"model_name": "m", "engine": "0"}
STARTED = 1_795_400_000.0
PROMPT = index("engine", "prompt_tokens")
LOAD_BYTES = index("cache", "load_bytes")


def families(started: float = STARTED) -> CollectorRegistry:
    """A registry with families named as vLLM names them, and with some that nobody reads."""
    registry = CollectorRegistry(auto_describe=True)
    Gauge("process_start_time_seconds", "Start.", registry=registry).set(started)
    Gauge("vllm:num_requests_running", "Running.", LABELS, registry=registry).labels(**OF_ENGINE).set(2)
    Counter("vllm:prompt_tokens", "Prompt tokens.", LABELS, registry=registry).labels(**OF_ENGINE).inc(1000)
    by_source = Counter("vllm:prompt_tokens_by_source", "By source.", (*LABELS, "source"), registry=registry)
    for source, tokens in (("local_compute", 600), ("local_cache_hit", 400), ("external_kv_transfer", 0)):
        by_source.labels(**OF_ENGINE, source=source).inc(tokens)
    steps = Histogram("vllm:iteration_tokens_total", "Steps.", LABELS, registry=registry, buckets=(1, 8, 512))
    for tokens in (1, 1, 7, 600):
        steps.labels(**OF_ENGINE).observe(tokens)
    information = Gauge("vllm:cache_config_info", "Config.", ("block_size", "engine"), registry=registry)
    information.labels(block_size="16", engine="0").set(1)
    for number in range(10):
        Histogram(f"http_request_{number}_seconds", "Nobody reads this.", registry=registry).observe(number)
    return registry


def text(body: str, status: str = "200 OK", **headers: str) -> WSGIApplication:
    def answer(_environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        start(status, [("Content-Type", "text/plain"), *headers.items()])
        return [body.encode("utf-8", "surrogateescape")]

    return answer


def whole(registry: CollectorRegistry) -> WSGIApplication:
    """The whole page whatever is asked for."""
    restricting: WSGIApplication = make_wsgi_app(registry)
    return lambda environ, start: restricting({**environ, "QUERY_STRING": ""}, start)


class QuietHandler(WSGIRequestHandler):
    def log_message(self, *_arguments: object) -> None:
        pass


class Engine:
    """A server like vLLM's: all of /metrics whatever is asked, what is asked for at /metrics/, and a version."""

    def __init__(self) -> None:
        self.registry = families()
        self.asked: list[tuple[str, int]] = []  # path without its query, bytes of the answer
        self.routes: dict[str, WSGIApplication] = {}
        self.become(self.registry, "0.32.0")
        self._server = make_server("127.0.0.1", 0, self._answer, handler_class=QuietHandler)
        self.port = self._server.server_port
        self._thread = threading.Thread()
        self._run()

    def become(self, registry: CollectorRegistry, version: str) -> None:
        """Be another process from now on."""
        self.registry = registry
        self.routes = {
            "/metrics": whole(registry),
            "/metrics/": make_wsgi_app(registry),
            "/version": text(json.dumps({"version": version})),
        }

    def _answer(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        body = b"".join(self.routes.get(path, text("Not Found", "404 Not Found"))(environ, start))
        self.asked.append((path, len(body)))
        return [body]

    def _run(self) -> None:
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def start_again(self) -> None:
        self._server = make_server("127.0.0.1", self.port, self._answer, handler_class=QuietHandler)
        self._run()

    def paths(self) -> list[str]:
        """What was asked since the last time."""
        paths = [path for path, _ in self.asked]
        self.asked.clear()
        return paths


@pytest.fixture
def engine() -> Iterator[Engine]:
    server = Engine()
    yield server
    server.stop()


@pytest.fixture
def visit(engine: Engine) -> Iterator[Callable[..., EnginePage]]:
    pages: list[EnginePage] = []

    def open_page(path: str = "/metrics", **options: object) -> EnginePage:
        endpoint = Endpoint(f"http://127.0.0.1:{engine.port}{path}", timeout_seconds=5)
        pages.append(EnginePage("e", endpoint, **options))  # type: ignore[arg-type]  # options of the test
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


FIRST = ["/metrics", "/metrics/", "/version"]


def version_of(page: EnginePage) -> str | None:
    return page.collect()[0].attributes.get("version")


def test_an_engine_that_can_is_asked_for_what_is_read_and_no_more(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page, everything = visit(), visit(restrict=False)
    first = page.collect()
    assert engine.paths() == FIRST
    assert page.restricted
    assert [page.collect() for _ in range(3)] == [first] * 3
    assert {path for path, _ in engine.asked} == {"/metrics/"}
    restricted_bytes = engine.asked[0][1]
    assert restricted_bytes < len(page.page()) / 3
    assert everything.collect() == first
    assert not everything.restricted
    assert page.source == "engine:e"


def test_what_is_read_of_a_restricted_page_is_what_the_registry_holds(visit: Callable[..., EnginePage]) -> None:
    page = visit()
    page.collect()
    (reading,) = page.collect()
    assert page.restricted
    assert reading.values[:4] == (1000, 600, 400, 0)
    assert (reading.epoch, reading.attributes["block_size"]) == (STARTED, "16")
    buckets = {name: value for name, value in zip(reading.detail_names, reading.details, strict=True) if "_le_" in name}
    assert buckets == {"step_tokens_le_1": 2, "step_tokens_le_8": 1, "step_tokens_le_512": 0, "step_tokens_le_inf": 1}


@pytest.mark.parametrize(
    "name",
    [
        "vllm:prompt_tokens_total",
        "vllm:prompt_tokens_created",
        "vllm:iteration_tokens_total_bucket",
        "vllm:iteration_tokens_total_sum",
        "vllm:iteration_tokens_total_count",
        "vllm:num_requests_running",
        "process_start_time_seconds",
    ],
)
def test_a_sample_name_selects_its_samples_whatever_its_suffix(engine: Engine, name: str) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{engine.port}/metrics", timeout_seconds=5)
    body = endpoint.get(f"/metrics/?name[]={name}").body.decode()
    assert {sample.name for family in text_string_to_metric_families(body) for sample in family.samples} == {name}
    endpoint.close()


@pytest.mark.parametrize("name", ["vllm:prompt_tokens", "vllm:iteration_tokens_total"])
def test_a_family_name_selects_nothing_so_sample_names_are_asked_for(engine: Engine, name: str) -> None:
    endpoint = Endpoint(f"http://127.0.0.1:{engine.port}/metrics", timeout_seconds=5)
    assert endpoint.get(f"/metrics/?name[]={name}").body == b""
    endpoint.close()


def restricts_differently(registry: CollectorRegistry) -> Mapping[str, WSGIApplication]:
    """What other servers may say to /metrics/?name[]=…"""
    return {
        "the whole page": whole(registry),
        "nothing": text(""),
        "not found": text("Not Found", "404 Not Found"),
        "failure": text("Internal Server Error", "500 Internal Server Error"),
        "redirect to the whole page": text("", "307 Temporary Redirect", Location="/metrics"),
        "redirect to nowhere": text("", "307 Temporary Redirect", Location="/nowhere"),
        "a page of HTML": text("<html><body>sign in</body></html>"),
        "fewer series": text('vllm:prompt_tokens_total{engine="0",model_name="m"} 1000\n'),
    }


@pytest.mark.parametrize("other", restricts_differently(CollectorRegistry()))
def test_an_engine_that_cannot_restrict_is_read_whole(
    engine: Engine, visit: Callable[..., EnginePage], other: str
) -> None:
    engine.routes["/metrics/"] = restricts_differently(engine.registry)[other]
    page = visit()
    first = page.collect()
    assert first[0].values[PROMPT] == 1000
    assert not page.restricted
    engine.paths()
    assert page.collect() == first
    assert engine.paths() == ["/metrics"]


def test_multiprocess_mode_cannot_restrict_and_is_read_whole(
    engine: Engine, visit: Callable[..., EnginePage], tmp_path: Path
) -> None:
    script = (
        "from prometheus_client import Counter\n"
        "Counter('vllm:prompt_tokens', 'x', ['engine', 'model_name']).labels('0', 'm').inc(7)\n"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):  # two front-ends
        subprocess.run([sys.executable, "-c", script], env=environment, check=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))  # type: ignore[no-untyped-call]  # as the library has it
    engine.become(registry, "0.25.1")
    page = visit()
    for _ in range(2):
        (reading,) = page.collect()
        assert (reading.values[PROMPT], reading.epoch, page.restricted) == (14, None, False)


def test_with_restriction_off_only_the_page_and_the_version_are_asked_for(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(restrict=False)
    page.collect()
    page.collect()
    assert engine.paths() == ["/metrics", "/version", "/metrics"]


def test_restriction_is_switched_while_it_runs(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    page = visit(restrict=False)
    page.collect()
    page.allow_restricting(allowed=False)
    page.collect()
    assert not page.restricted
    page.allow_restricting(allowed=True)
    page.collect()
    assert page.restricted
    engine.paths()
    page.collect()
    page.allow_restricting(allowed=False)
    page.collect()
    assert engine.paths() == ["/metrics/", "/metrics", "/version"]


def offload(registry: CollectorRegistry) -> None:
    Counter("vllm:kv_offload_load_bytes", "Loaded.", LABELS, registry=registry).labels(**OF_ENGINE).inc(4096)


def lmcache(registry: CollectorRegistry) -> None:
    names = ("model_name", "role", "served_model_name", "worker_id")
    usage = Gauge("lmcache:local_cache_usage", "Used.", names, registry=registry)
    usage.labels("models/m", "worker", "m", "0").set(4096)


@pytest.mark.parametrize(("birth", "name"), [(offload, "e/0/kv_offload"), (lmcache, "e/lmcache")])
def test_a_family_that_is_born_later_is_on_the_next_restricted_page(
    engine: Engine, visit: Callable[..., EnginePage], birth: Callable[[CollectorRegistry], None], name: str
) -> None:
    page = visit()
    for _ in range(2):
        assert len(page.collect()) == 1
    birth(engine.registry)
    _, cache = page.collect()
    assert (cache.kind, cache.name) == ("cache", name)
    assert 4096 in cache.values
    assert page.restricted


def test_a_family_that_a_restricted_page_cannot_show_is_found_at_the_next_check(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(recheck_scrapes=3)
    assert len(page.collect()) == 1
    offload(engine.registry)
    engine.routes["/metrics/"] = make_wsgi_app(families())  # knows nothing of the new family
    assert [len(page.collect()) for _ in range(3)] == [1, 1, 1]
    assert page.restricted
    assert [len(page.collect()) for _ in range(5)] == [2] * 5
    assert not page.restricted


def test_every_so_many_scrapes_the_whole_page_and_the_version_are_asked_for_again(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(recheck_scrapes=2)
    for _ in range(7):
        page.collect()
    assert engine.paths() == [*FIRST, "/metrics/", "/metrics/", *FIRST, "/metrics/", "/metrics/", *FIRST]


def test_the_first_page_of_another_process_is_read_under_its_own_version(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit()
    assert [version_of(page), version_of(page)] == ["0.32.0", "0.32.0"]
    engine.become(families(STARTED + 60), "0.33.0")
    engine.paths()
    (reading,) = page.collect()
    assert (reading.epoch, reading.attributes["version"]) == (STARTED + 60, "0.33.0")
    assert engine.paths() == ["/metrics/", "/version"]
    assert not page.restricted  # the new process has to show that it can
    page.collect()
    assert engine.paths() == FIRST
    assert page.restricted


def test_another_process_that_tells_no_version_does_not_inherit_one(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit()
    assert version_of(page) == "0.32.0"
    engine.become(families(STARTED + 60), "0.33.0")
    del engine.routes["/version"]
    assert version_of(page) is None


def test_a_server_that_goes_and_comes_back_is_read_again(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    page = visit()
    before = page.collect()
    engine.stop()
    for _ in range(3):
        with pytest.raises(CollectError, match=str(engine.port)):
            page.collect()
    engine.start_again()
    engine.paths()
    assert page.collect() == before
    assert engine.paths() == FIRST
    assert page.restricted


def test_an_engine_that_comes_up_after_its_first_scrapes_is_asked_for_its_version(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    engine.stop()
    page = visit()
    for _ in range(5):
        with pytest.raises(CollectError):
            page.collect()
    engine.start_again()
    assert version_of(page) == "0.32.0"
    assert page.restricted


def test_a_process_without_a_start_time_is_asked_for_its_version_after_every_gap(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    engine.routes["/metrics"] = text('vllm:prompt_tokens_total{engine="0",model_name="m"} 7\n')  # multiprocess mode
    page = visit()
    assert page.collect()[0].epoch is None
    assert version_of(page) == "0.32.0"
    engine.stop()
    with pytest.raises(CollectError):
        page.collect()
    engine.routes["/version"] = text('{"version": "0.33.0"}')
    engine.start_again()
    assert version_of(page) == "0.33.0"


def test_a_version_is_kept_while_its_own_process_is_too_busy_to_tell_it(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(recheck_scrapes=1)
    assert version_of(page) == "0.32.0"
    engine.routes["/version"] = text("busy", "503 Service Unavailable")
    assert [version_of(page) for _ in range(9)] == ["0.32.0"] * 9


def test_a_version_that_could_not_be_had_is_asked_for_again(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    told = engine.routes.pop("/version")
    page = visit()
    assert version_of(page) is None
    engine.routes["/version"] = told
    assert version_of(page) == "0.32.0"


def test_a_server_without_a_version_is_asked_three_times_and_no_more(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    del engine.routes["/version"]
    page = visit()
    assert [version_of(page) for _ in range(6)] == [None] * 6
    assert engine.paths().count("/version") == 3


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "0.32.0",
        "{}",
        '["version"]',
        '{"version": null}',
        '{"version": 0.32}',
        '{"version": ""}',
        '{"version": "0.32\\n0"}',
        '{"version": "' + "0" * 65 + '"}',
        '{"version": "0.32.0"' + " " * 5000 + "}",
        "[" * 4000,
        "\udcff",
    ],
)
def test_an_answer_that_is_no_version_is_none(engine: Engine, visit: Callable[..., EnginePage], answer: str) -> None:
    engine.routes["/version"] = text(answer)
    assert version_of(visit()) is None


def test_a_version_that_is_given_is_believed(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    page = visit(version="0.17.1")
    assert version_of(page) == "0.17.1"
    engine.become(families(STARTED + 60), "0.33.0")
    assert [version_of(page), version_of(page)] == ["0.17.1", "0.17.1"]
    assert "/version" not in engine.paths()


@pytest.mark.parametrize("path", ["/engine7/metrics", "/engine7/metrics/", "/engine7/metrics?token=1"])
def test_an_engine_behind_a_path_is_asked_below_that_path(
    engine: Engine, visit: Callable[..., EnginePage], path: str
) -> None:
    engine.routes = {f"/engine7{route}": answer for route, answer in engine.routes.items()}
    engine.routes |= {"/version": text('{"version": "of the gateway"}')}
    page = visit(path)
    assert version_of(page) == "0.32.0"
    assert version_of(page) == "0.32.0"
    assert {asked.split("?")[0] for asked in engine.paths()} <= {f"/engine7{path}" for path in FIRST}


def test_a_page_of_another_program_is_an_error_with_a_hint(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    engine.routes["/metrics"] = text("node_load1 0.5\n")
    with pytest.raises(CollectError, match="e: the page holds no family") as error:
        visit().collect()
    assert "--disable-log-stats" in error.value.hint


def test_another_program_at_the_address_of_a_restricted_engine_is_an_error_until_it_goes(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit()
    before = page.collect()
    vllm = dict(engine.routes)
    engine.routes = {"/metrics": text("node_load1 0.5\n")}
    for _ in range(2):
        with pytest.raises(CollectError):
            page.collect()
    assert page.sources == ("vllm", "lmcache")
    engine.routes = vllm
    assert page.collect() == before
    assert page.restricted


def sglang(started: float = STARTED + 60) -> CollectorRegistry:
    """A registry as SGLang has it."""
    registry = CollectorRegistry(auto_describe=True)
    Gauge("process_start_time_seconds", "Start.", registry=registry).set(started)
    Gauge("sglang:num_running_reqs", "Running.", ("model_name",), registry=registry).labels("m").set(1)
    Counter("sglang:prompt_tokens", "Prompt tokens.", ("model_name",), registry=registry).labels("m").inc(77)
    for number in range(10):
        Histogram(f"http_request_{number}_seconds", "Nobody reads this.", registry=registry).observe(number)
    return registry


def test_another_engine_behind_the_same_address_is_read_as_what_it_is(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit()
    assert (version_of(page), page.sources) == ("0.32.0", ("vllm", "lmcache"))
    assert page.restricted
    engine.become(sglang(), "")
    del engine.routes["/version"]
    # it is asked for families of vLLM once more
    with pytest.raises(CollectError, match="the page holds no family"):
        page.collect()
    (reading,) = page.collect()
    assert (page.sources, reading.attributes["engine"], reading.values[PROMPT]) == (("sglang",), "sglang", 77)
    assert page.mapper.version is None
    page.collect()  # another process has to show once more that it can restrict
    assert page.restricted
    engine.asked.clear()
    assert page.collect() == (reading,)
    assert [path for path in engine.paths() if path != "/version"] == ["/metrics/"]
    engine.become(families(STARTED + 120), "0.33.0")
    with pytest.raises(CollectError):
        page.collect()
    (reading,) = page.collect()
    assert (reading.attributes["engine"], reading.values[PROMPT], version_of(page)) == ("vllm", 1000, "0.33.0")


def test_another_engine_without_a_start_time_does_not_inherit_a_version(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(restrict=False)
    assert version_of(page) == "0.32.0"
    engine.routes = {"/metrics": text('sglang:prompt_tokens_total{model_name="m"} 7\n')}
    (reading,) = page.collect()
    assert (reading.attributes["engine"], reading.epoch, page.mapper.version) == ("sglang", None, None)


def test_a_version_that_is_given_is_believed_of_whatever_engine_answers(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    page = visit(version="0.17.1")
    page.collect()
    engine.become(sglang(), "0.5.10")
    with pytest.raises(CollectError):
        page.collect()
    page.collect()
    assert page.mapper.version == "0.17.1"


def kvbm(registry: CollectorRegistry) -> None:
    Gauge("kvbm_matched_tokens", "Matched; a counter all the same.", registry=registry).set(4096)


def test_another_source_that_is_born_later_is_read_from_the_next_whole_page(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    restricted, free = visit(recheck_scrapes=2), visit(restrict=False)
    for page in (restricted, free):
        assert len(page.collect()) == 1
    kvbm(engine.registry)
    assert [reading.kind for reading in free.collect()] == ["engine", "cache"]
    assert free.sources == ("vllm", "lmcache", "kvbm")
    # what is asked for is of vLLM alone, until the whole page is looked at again
    assert [len(restricted.collect()) for _ in range(4)] == [1, 1, 2, 2]
    assert restricted.restricted
    engine.asked.clear()
    assert 4096 in restricted.collect()[1].values
    assert engine.paths() == ["/metrics/"]


def test_a_whole_page_is_searched_for_sources_where_it_has_other_lines_and_nothing_else_changes(
    engine: Engine, visit: Callable[..., EnginePage], monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[bytes] = []

    def search(body: bytes) -> tuple[str, ...]:
        searched.append(body)
        return sources_on(body)

    monkeypatch.setattr(engine_page, "sources_on", search)
    page = visit(restrict=False)
    before = page.collect()
    mapper = page.mapper
    assert [page.collect() for _ in range(3)] == [before] * 3
    assert len(searched) == 1
    engine.paths()
    Gauge("anything", "Nobody reads this.", registry=engine.registry)
    assert [page.collect() for _ in range(3)] == [before] * 3
    assert len(searched) == 2
    assert page.mapper is mapper
    assert engine.paths() == ["/metrics"] * 3


def test_a_source_that_goes_is_not_asked_for_after_the_next_whole_page(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    kvbm(engine.registry)
    page = visit(restrict=False)
    assert len(page.collect()) == 2
    engine.become(families(), "0.32.0")
    assert [reading.kind for reading in page.collect()] == ["engine"]
    assert page.sources == ("vllm", "lmcache")


def test_the_restricted_page_of_an_engine_is_asked_for_each_name_once(visit: Callable[..., EnginePage]) -> None:
    page = visit()
    names = page._restricted_target.partition("?")[2].split("&")
    assert len(names) == len(set(names))
    assert "name[]=process_start_time_seconds" in names
    assert any("name[]=lmcache:" in name for name in names)


def test_the_start_of_an_engine_is_told_by_whichever_target_has_it(
    engine: Engine, visit: Callable[..., EnginePage]
) -> None:
    def two(created: float) -> str:
        ranks = "".join(f'vllm:prompt_tokens_total{{engine="{rank}",model_name="m"}} 7\n' for rank in "01")
        return f'{ranks}vllm:prompt_tokens_created{{engine="1",model_name="m"}} {created}\n'

    engine.routes["/metrics"] = text(two(STARTED))
    page = visit(restrict=False)
    assert [reading.epoch for reading in page.collect()] == [None, STARTED]
    engine.routes["/metrics"] = text(two(STARTED + 60))
    engine.routes["/version"] = text('{"version": "0.33.0"}')
    assert {reading.attributes["version"] for reading in page.collect()} == {"0.33.0"}


def test_a_source_of_rates_on_an_engine_s_page_is_left_alone(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    sample = "gpfs_fs_bytes_read"
    assert [SOURCES[name].integrates for name in sources_on(f"{sample} 1\n".encode())] == [True]
    engine.routes["/metrics"] = text(f'vllm:prompt_tokens_total{{engine="0",model_name="m"}} 7\n{sample} 1\n')
    page = visit(restrict=False)
    assert [reading.kind for reading in page.collect()] == ["engine"]
    engine.routes["/metrics"] = text(f"{sample} 1\n")
    with pytest.raises(CollectError, match="the page holds no family"):
        page.collect()


def test_a_recording_takes_the_whole_page(engine: Engine, visit: Callable[..., EnginePage]) -> None:
    page = visit()
    page.collect()
    page.collect()
    assert page.restricted
    assert b"http_request_9_seconds" in page.page()
    assert engine.paths()[-1] == "/metrics"
