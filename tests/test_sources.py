from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from msgspec.structs import replace
from tests.loopback import FakeEngine, Server, answer

from kvtally.agent.config import Config, Engine, Gpu, Host, Labels, Page, Rates, Scrape, complete, complete_page
from kvtally.agent.config_file import ConfigError
from kvtally.agent.discovery import FoundEngine, FoundPage
from kvtally.agent.look import Found, look_around
from kvtally.agent.sources import GONE_LOOKS, Sources, about_of
from kvtally.collectors.base import NoData, Reading

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator, Mapping, Sequence

    from kvtally.collectors.nvml import NvmlCollector

FIXTURES = Path(__file__).parent / "fixtures"
LMCACHE_MP = next((FIXTURES / "pages" / "lmcache-mp-056").glob("*.prom")).read_bytes()
DCGM = (FIXTURES / "dcgm" / "two-gpus.prom").read_bytes()
FOUR = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")
MODEL = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 32, "torch_dtype": "bfloat16", "rope_theta": 5e5}
SHAPE = '{"architecture":"LlamaForCausalLM","kv_dtype":"bfloat16","num_hidden_layers":32,"weight_dtype":"bfloat16"}'
NO_HOST = Host(processes=False, disks=False, cgroup=False)


def found(  # what discovery tells of one engine
    url: str = "http://127.0.0.1:8000",
    *,
    pid: int | None = None,
    gpus: tuple[str, ...] | None = None,
    ranks: int | None = None,
    logs_scrapes: bool | None = None,
) -> FoundEngine:
    name = url.partition("//")[2]
    return FoundEngine(url, name, pid, "0.25.1", "vllm", gpus, "by its environment", 1, 1, (), ranks, logs_scrapes)


def config_of(*engines: Engine, **tables: object) -> Config:
    config = replace(Config(gpu=Gpu(enabled=False), host=NO_HOST), **tables)
    return replace(config, engines=tuple(complete(engine, config) for engine in engines))


def names(sources: Sources) -> list[str]:
    return [page.name for page in sources.engines]


@contextmanager
def sleeping(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process with these words behind its program."""
    program = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen([*program, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it runs, so its command line is there
        yield process
        process.communicate(b"\n")


class FakeNvml:
    """Two GPUs, listed against their order; or a driver that does not answer."""

    def __init__(self, fault: Exception | None = None) -> None:
        self._fault = fault
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def collect(self) -> tuple[Reading, ...]:
        if self._fault is not None:
            raise self._fault
        return tuple(Reading("gpu", f"GPU-{index}", {"index": str(index)}, ()) for index in (10, 2))

    def compute_pids(self) -> Mapping[str, Sequence[int]]:
        return {"GPU-2": [os.getpid()]}


def nvml(fault: Exception | None = None) -> NvmlCollector:
    return FakeNvml(fault)  # type: ignore[return-value]  # the part of it that is asked


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with FakeEngine() as one:
        yield one


def port_of(engine: FakeEngine) -> int:
    return int(engine.name.rpartition(":")[2])


def test_gpus_that_config_names_come_before_those_that_are_found() -> None:
    about = about_of(Engine(url="", gpus=("GPU-9",)), found(gpus=FOUR))
    assert (about.gpus, about.mapping, about.per_replica) == (("GPU-9",), "config", None)


def test_where_config_is_silent_discovery_says_which_gpus_and_why() -> None:
    about = about_of(Engine(url=""), found(gpus=("GPU-1",)))
    assert (about.gpus, about.mapping) == (("GPU-1",), "by its environment")


@pytest.mark.parametrize(
    ("gpus", "ranks", "configured", "per_replica"),
    [
        (FOUR, 2, None, 2),
        (FOUR, 1, None, None),
        (FOUR, None, None, None),
        (FOUR, 2, 4, 4),
        ((), 2, None, None),
        (None, 2, None, None),
    ],
)
def test_data_parallel_ranks_share_what_is_found_evenly(
    gpus: tuple[str, ...] | None, ranks: int | None, configured: int | None, per_replica: int | None
) -> None:
    about = about_of(Engine(url="", gpus_per_replica=configured), found(gpus=gpus, ranks=ranks))
    assert about.per_replica == per_replica


def test_an_engine_that_is_not_on_this_host_has_no_known_gpus_and_the_mapping_says_why() -> None:
    about = about_of(Engine(url=""), None)
    assert about.gpus is None
    assert "not found on this host" in about.mapping


def test_an_empty_list_in_config_is_an_engine_without_a_gpu() -> None:
    assert about_of(Engine(url="", gpus=()), found(gpus=FOUR)).gpus == ()


def test_labels_that_are_empty_are_no_labels() -> None:
    assert about_of(Engine(url="", labels=Labels(tenant="search")), None).labels == {"tenant": "search"}


def test_capacities_are_decimal_texts_or_empty() -> None:
    about = about_of(Engine(url="", kv_dram_gib=64, kv_storage_tib=0.5), None)
    assert (about.dram_gib, about.storage_tib) == ("64.000000000", "0.500000000")
    about = about_of(Engine(url=""), None)
    assert (about.dram_gib, about.storage_tib) == ("", "")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a model's config.json."""
    (tmp_path / "config.json").write_text(json.dumps(MODEL))
    return str(tmp_path)


@pytest.mark.parametrize("name", ["", "/config.json"])
def test_a_model_that_config_names_is_known_of_an_engine_on_another_host(model: str, name: str) -> None:
    listed = Engine("http://192.0.2.1:8000", model_config=model + name, token_budget=2048)
    config = config_of(listed, scrape=Scrape(discover=False))
    sources = Sources(config, None)
    told = {"shape": SHAPE, "token_budget": "2048"}
    assert sources.abouts["192.0.2.1:8000"].facts == told
    sources.take(look_around(config, None))
    assert sources.abouts["192.0.2.1:8000"].facts == told


def test_a_model_that_config_names_and_that_is_not_there_is_a_mistake_of_the_config(tmp_path: Path) -> None:
    for place in ("nowhere", "", "own.json"):
        (tmp_path / "own.json").write_text("[]")
        config = config_of(Engine("http://a", name="a", model_config=f"{tmp_path}/{place}"))
        with pytest.raises(ConfigError, match=r"engine a: model_config: .* is no config\.json of a model"):
            Sources(config, None)


# what an engine's process tells is read in a look around, options and all; what config says goes before it
def test_a_look_tells_how_engines_are_run_and_config_goes_before_it(engine: FakeEngine, model: str) -> None:
    words = ["--enforce-eager", "--max-num-batched-tokens", "4096", "--kv-cache-dtype", "fp8"]
    with sleeping(*words) as process:
        listed = Engine(f"http://{engine.name}", "mine", pid=process.pid, model_config=model)
        config = config_of(listed, scrape=Scrape(discover=False))
        look = look_around(config, None)
        sources, other = Sources(config, None), Sources(config_of(replace(listed, token_budget=2048)), None)
        assert sources.abouts["mine"].facts == {"shape": SHAPE}
        for one in (sources, other):
            one.take(look)
    facts = {"shape": SHAPE.replace('"kv_dtype":"bfloat16"', '"kv_dtype":"fp8"'), "eager": "1"}
    assert sources.abouts["mine"].facts == {**facts, "token_budget": "4096"}
    assert other.abouts["mine"].facts == {**facts, "token_budget": "2048"}


def test_a_connector_that_config_names_goes_before_the_one_of_the_command_line() -> None:
    told = '{"kv_connector": "MultiConnector", "kv_role": "kv_both"}'
    with sleeping("--kv-transfer-config", told, "-tp", "2") as process:
        listed = Engine("http://192.0.2.1:8000", "a", pid=process.pid)
        config = config_of(listed, scrape=Scrape(discover=False))
        look = look_around(config, None)
        silent, named = Sources(config, None), Sources(config_of(replace(listed, connector="LMCacheConnectorV1")), None)
        assert named.abouts["a"].facts == {"connector": "LMCacheConnectorV1"}  # before anybody looked
        for one in (silent, named):
            one.take(look)
    assert silent.abouts["a"].facts == {"tensor_parallel": "2", "connector": "MultiConnector"}
    assert named.abouts["a"].facts == {"tensor_parallel": "2", "connector": "LMCacheConnectorV1"}


def test_a_process_that_config_names_is_asked_although_its_engine_does_not_answer() -> None:
    with sleeping("-tp", "4") as process:
        config = config_of(Engine("http://192.0.2.1:8000", "a", pid=process.pid), scrape=Scrape(discover=False))
        sources = Sources(config, None)
        sources.take(look_around(config, None))
    about = sources.abouts["a"]
    assert (about.facts, about.gpus) == ({"tensor_parallel": "4"}, None)


def test_what_a_later_look_does_not_tell_is_not_kept_but_an_engine_that_is_not_found_stays_as_it_was() -> None:
    sources = Sources(config_of(), None)
    name = "127.0.0.1:8000"
    sources.take(Found((found(),), None, {}, {name: {"eager": "1", "connector": "X"}}))
    assert sources.abouts[name].facts == {"eager": "1", "connector": "X"}
    sources.take(Found((), None))
    assert sources.abouts[name].facts == {"eager": "1", "connector": "X"}
    sources.take(Found((found(),), None, {}, {name: {"connector": "X"}}))
    assert sources.abouts[name].facts == {"connector": "X"}


def test_engines_that_config_lists_are_read_from_the_start() -> None:
    sources = Sources(config_of(Engine(url="http://127.0.0.1:8000"), Engine(url="http://gpu7:9000", name="b")), None)
    assert names(sources) == ["127.0.0.1:8000", "b"]
    assert [one.source for one in sources.may_hang] == ["engine:127.0.0.1:8000", "engine:b"]
    assert sources.prompt == []


def test_an_engine_that_is_found_is_read_from_then_on_and_takes_what_holds_for_all() -> None:
    config = config_of(labels=Labels(cluster="fra1"), rates=Rates(term="reserved", site="fra"))
    sources = Sources(config, None)
    assert sources.take(Found((found(gpus=("GPU-1",)),), None))
    assert names(sources) == ["127.0.0.1:8000"]
    about = sources.abouts["127.0.0.1:8000"]
    assert (about.labels, about.term, about.site, about.gpus) == ({"cluster": "fra1"}, "reserved", "fra", ("GPU-1",))
    assert not sources.take(Found((found(gpus=("GPU-1",)),), None))


def test_an_engine_that_is_not_found_any_more_is_still_read() -> None:
    sources = Sources(config_of(), None)
    sources.take(Found((found(),), None))
    assert not sources.take(Found((), None))
    assert names(sources) == ["127.0.0.1:8000"]


def test_an_engine_whose_process_is_gone_is_forgotten_after_a_while_and_taken_again_when_it_returns() -> None:
    with subprocess.Popen(["true"]) as ended:
        pass
    sources = Sources(config_of(Engine("http://127.0.0.1:9000")), None)
    here, gone = found("http://127.0.0.1:8001", pid=os.getpid()), found(pid=ended.pid)
    sources.take(Found((here, gone), None, {}))
    for _ in range(GONE_LOOKS - 1):
        assert not sources.take(Found((), None, {}))
    assert sources.take(Found((), None, {}))
    # one that lives is too busy to answer, and one that config lists may come back at any time
    assert names(sources) == ["127.0.0.1:9000", "127.0.0.1:8001"]
    assert sources.take(Found((gone,), None, {}))
    assert "127.0.0.1:8000" in names(sources)


def test_the_gpus_are_a_source_that_may_hang() -> None:
    gpus = nvml()
    assert Sources(config_of(), gpus).may_hang == [gpus]


@pytest.mark.parametrize("address", ["127.0.0.1", "localhost", "127.0.0.7"])
def test_an_engine_that_config_lists_under_another_address_of_this_host_is_no_second_one(
    engine: FakeEngine, address: str
) -> None:
    listed = Engine(url=f"http://{address}:{port_of(engine)}/metrics", name="mine", labels=Labels(tenant="search"))
    config = config_of(listed, scrape=Scrape(discover=True, ports=(port_of(engine),)))
    sources = Sources(config, None)
    sources.take(look_around(config, None))
    assert names(sources) == ["mine"]
    assert sources.abouts["mine"].labels == {"tenant": "search"}
    assert sources.abouts["mine"].mapping != about_of(listed, None).mapping  # it was recognised


def test_processes_and_cgroup_of_an_engine_are_sources_once_its_process_is_known() -> None:
    sources = Sources(config_of(host=Host(processes=True, disks=True, cgroup=True)), None)
    assert [one.source for one in sources.prompt] == ["diskstats"]
    sources.take(Found((found(),), None))
    assert [one.source for one in sources.prompt] == ["diskstats"]
    assert sources.take(Found((found(pid=os.getpid()),), None))
    name = "127.0.0.1:8000"
    assert [one.source for one in sources.prompt] == ["diskstats", f"process:{name}", f"cgroup:{name}"]


def test_the_processes_of_an_engine_are_those_of_its_newest_process() -> None:
    config = config_of(Engine(url="http://127.0.0.1:8000", pid=2**22), host=Host(disks=False, cgroup=False))
    sources = Sources(config, None)
    (tree,) = sources.prompt
    with pytest.raises(NoData):
        tree.collect()  # there is no such process
    sources = Sources(config_of(host=Host(disks=False, cgroup=False)), None)
    sources.take(Found((found(pid=2**22),), None))
    (tree,) = sources.prompt
    with pytest.raises(NoData):
        tree.collect()
    assert sources.take(Found((found(pid=os.getpid()),), None))
    assert sources.prompt == [tree]
    (reading,) = tree.collect()
    assert (reading.kind, reading.name) == ("process", "127.0.0.1:8000")


@pytest.mark.parametrize(
    ("mode", "logs_scrapes", "restricted"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("auto", None, False),
        ("always", True, True),
        ("never", False, False),
    ],
)
def test_an_engine_is_asked_for_less_where_that_is_allowed(
    engine: FakeEngine, mode: str, logs_scrapes: bool | None, restricted: bool
) -> None:
    config = config_of(scrape=Scrape(restrict=mode))  # type: ignore[arg-type]  # one of its words
    sources = Sources(config, None)
    sources.take(Found((found(f"http://{engine.name}", logs_scrapes=logs_scrapes),), None))
    (page,) = sources.engines
    page.collect()
    assert page.restricted == restricted
    sources.close()


def test_a_url_that_cannot_be_asked_is_a_mistake_of_the_config() -> None:
    with pytest.raises(ConfigError, match="engine a"):
        Sources(config_of(Engine(url="http://user:word@gpu7:8000/metrics", name="a")), None)


def serve(page: bytes) -> Server:
    def talk(connection: socket.socket, _target: str) -> bool:
        connection.sendall(answer(page))
        return True

    return Server(talk)


def beside(server: Server, *sources: str) -> FoundPage:
    return FoundPage(f"http://{server.origin}/metrics", server.origin, sources)


def look_of(*engines: FoundEngine, **more: Any) -> Found:
    return Found(engines, None)._replace(**more)


def connected(**connectors: str) -> tuple[Engine, ...]:
    """Engines with these connectors, by name."""
    return tuple(
        Engine(f"http://192.0.2.{at}:8000", name, connector=connector)
        for at, (name, connector) in enumerate(connectors.items(), 1)
    )


def test_only_an_engine_whose_connector_nobody_knows_is_guessed_at() -> None:
    with serve(LMCACHE_MP) as server:
        sources = Sources(config_of(), None)
        seen = found(pid=1)  # its whole command line is to be seen, and names no connector
        assert sources.take(look_of(seen, pages=(beside(server, "lmcache_mp"),)))
        assert sources.pages[0].collect()[0].attributes.get("engines") is None
        hidden = seen._replace(url="http://127.0.0.1:8001/metrics", name="127.0.0.1:8001", tensor_parallel=None)
        assert sources.take(look_of(seen, hidden, pages=(beside(server, "lmcache_mp"),)))
        assert sources.pages[0].collect()[0].attributes["engines"] == "127.0.0.1:8001"
        sources.close()


@pytest.mark.parametrize(
    ("connectors", "served"),
    [
        ({"a": "LMCacheMPConnector", "b": "NixlConnector", "c": ""}, "a"),
        ({"b": "LMCacheMPConnector", "a": "LMCacheMPConnector"}, "a,b"),
        ({"a": "LMCacheConnectorV1", "b": "", "c": "NixlConnector"}, "b"),
        ({"a": "LMCacheConnectorV1", "b": "MultiConnector"}, "b"),
        # of two that may be meant, a guess would split the tokens of one by the lookups of the other
        ({"a": "LMCacheConnectorV1", "b": "", "c": "MultiConnector"}, None),
        ({"a": "LMCacheMPConnector", "b": "LMCacheMPConnector"}, "a,b"),
        ({"a": "NixlConnector"}, None),
    ],
)
def test_a_cache_that_is_found_serves_the_engines_whose_connector_is_its_own_or_else_the_only_one_not_known(
    connectors: dict[str, str], served: str | None
) -> None:
    with serve(LMCACHE_MP) as server:
        sources = Sources(config_of(*connected(**connectors)), None)
        assert sources.take(look_of(pages=(beside(server, "lmcache_mp"),)))
        (page,) = sources.pages
        (reading,) = page.collect()
        sources.close()
    assert (reading.kind, reading.attributes.get("engines")) == ("cache", served)
    assert page in sources.may_hang


def test_the_engines_that_config_names_go_before_what_connectors_tell() -> None:
    with serve(LMCACHE_MP) as server:
        config = config_of(*connected(a="LMCacheMPConnector", b="NixlConnector"))
        config = replace(config, pages=(Page(f"http://{server.origin}", "cache", ("b",)),))
        sources = Sources(config, None)
        (page,) = sources.pages
        (reading,) = page.collect()
        sources.close()
    assert (page.source, reading.attributes["engines"]) == ("page:cache", "b")


def test_an_engine_that_is_gone_is_served_no_more() -> None:
    with serve(LMCACHE_MP) as server:
        both = config_of(*connected(a="LMCacheMPConnector", b="LMCacheMPConnector"))
        sources = Sources(config_of(), None)
        sources.take(look_of(config=both, pages=(beside(server, "lmcache_mp"),)))
        (page,) = sources.pages
        sources.take(look_of(config=replace(both, engines=both.engines[:1]), pages=(beside(server, "lmcache_mp"),)))
        (reading,) = page.collect()
        sources.close()
    assert (reading.attributes["engines"], set(sources.abouts)) == ("a", {"a"})


def test_a_page_that_is_not_found_any_more_is_forgotten_after_a_while_and_one_of_the_config_never() -> None:
    with serve(LMCACHE_MP) as server:
        config = replace(config_of(), pages=(complete_page(Page("http://192.0.2.1:8080")),))
        sources = Sources(config, None)
        sources.take(look_of(pages=(beside(server, "lmcache_mp"),)))
        assert [page.name for page in sources.pages] == ["192.0.2.1:8080", server.origin]
        for _ in range(GONE_LOOKS - 1):
            assert not sources.take(look_of())
        assert sources.take(look_of())
        assert [page.name for page in sources.pages] == ["192.0.2.1:8080"]
        sources.close()


def test_gpus_of_a_page_are_left_out_where_nvml_counts_them() -> None:
    with serve(DCGM) as server:
        config = replace(config_of(), pages=(Page(f"http://{server.origin}"),))
        driver = FakeNvml()
        with_driver, without = Sources(config, driver), Sources(config, None)  # type: ignore[arg-type]  # as in nvml()
        assert with_driver.pages[0].collect() == ()
        assert {reading.kind for reading in without.pages[0].collect()} == {"gpu"}
        for one in (with_driver, without):
            one.close()
    assert driver.is_closed


class Mount:
    """A mount that counts nothing."""

    source = "mount:/kv"

    def collect(self) -> tuple[Reading, ...]:
        return ()


def test_a_mount_goes_on_with_its_collector_as_long_as_it_is_seen_by_the_same_process_with_the_same_folders() -> None:
    sources, one, two, three = Sources(config_of(), None), Mount(), Mount(), Mount()
    assert sources.take(look_of(mounts={(7, ("/kv",)): one}))
    assert not sources.take(look_of(mounts={(7, ("/kv",)): two}))
    assert sources.may_hang == [one]
    assert sources.take(look_of(mounts={(8, ("/kv",)): three}))  # the engine was started anew
    assert sources.may_hang == [three]
    assert sources.take(look_of())
    assert sources.may_hang == []


def test_what_files_name_no_more_is_read_no_more_and_what_they_tell_otherwise_is_read_anew() -> None:
    a, b = connected(a="", b="")
    page = Page("http://192.0.2.9:8080", "cache")
    sources = Sources(config_of(a), None)
    first = replace(config_of(a, b), pages=(complete_page(page),))
    assert sources.take(look_of(config=first))
    assert (names(sources), [one.name for one in sources.pages]) == (["a", "b"], ["cache"])
    kept, before = sources.engines
    assert not sources.take(look_of(config=first))
    moved = replace(config_of(a, replace(b, url="http://192.0.2.7:8000")), pages=(complete_page(page),))
    assert sources.take(look_of(config=moved))  # by its name it is the same
    assert sources.engines[0] is kept
    assert sources.engines[1] is not before
    assert sources.engines[1].url == "http://192.0.2.7:8000/metrics"
    assert sources.take(look_of(config=config_of(a)))
    assert (names(sources), sources.pages) == (["a"], ())


def test_an_engine_and_a_page_that_were_found_are_dropped_once_config_lists_them_under_other_names() -> None:
    with serve(LMCACHE_MP) as server:
        here = found("http://127.0.0.1:8000", pid=os.getpid())
        sources = Sources(config_of(), None)
        sources.take(look_of(here, pages=(beside(server, "lmcache_mp"),)))
        assert (names(sources), len(sources.pages)) == (["127.0.0.1:8000"], 1)
        listed = config_of(Engine("http://localhost:8000", "mine"))
        listed = replace(listed, pages=(complete_page(Page(f"http://localhost:{server.port}", "cache")),))
        listing = look_of(here, config=listed, listed={8000: "mine"}, listed_pages=frozenset({server.origin}))
        assert sources.take(listing)
        assert (names(sources), [page.name for page in sources.pages]) == (["mine"], ["cache"])
        sources.close()


def test_engines_that_are_found_beside_kvtally_in_its_pod_take_what_the_pod_tells(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    labels = tmp_path / "labels"
    labels.write_text('llm-d.ai/role="prefill"\n')
    monkeypatch.setenv("KVTALLY_POD_LABELS", str(labels))
    monkeypatch.setenv("POD_NAMESPACE", "chat")
    monkeypatch.setenv("POD_NAME", "llama-0")
    config = config_of(Engine("http://192.0.2.1:8000", "far"), labels=Labels(cluster="fra1"))
    sources = Sources(config, None)
    sources.take(Found((found(),), None))
    about = sources.abouts["127.0.0.1:8000"]
    assert (about.labels, about.role) == ({"cluster": "fra1", "namespace": "chat"}, "prefill")
    # what config lists may be another pod's
    assert (sources.abouts["far"].labels, sources.abouts["far"].role) == ({"cluster": "fra1"}, "")
    named = Sources(config_of(labels=Labels(namespace="search")), None)
    named.take(Found((found(),), None))
    assert named.abouts["127.0.0.1:8000"].labels == {"namespace": "search"}
