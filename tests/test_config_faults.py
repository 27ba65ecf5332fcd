from __future__ import annotations

import pytest

from kvtally.agent.config import Config, Engine, Labels, Ledger, Rates, Scrape, complete
from kvtally.agent.config_faults import Fault, between, of_each, of_ledger


def faults(config: Config) -> list[tuple[str, str]]:
    return [(fault.key, fault.reason) for fault in of_each(config)]


def clashes(*engines: Engine) -> list[Fault]:
    return list(between(tuple(complete(engine, Config()) for engine in engines)))


def test_the_defaults_and_a_whole_engine_have_no_fault() -> None:
    engine = Engine(
        "https://me:word@[::1]:8000/metrics",
        *(
            "a",
            ("GPU-a", "MIG-b"),
            2,
            7,
            ("/mnt/kv",),
            64.0,
            1.0,
            "/models/a",
            8192,
            "LMCacheConnectorV1",
            "owned",
            "fra",
        ),
    )
    assert faults(Config(engines=(engine,))) == []
    assert clashes(engine, Engine("http://127.0.0.1:8001", gpus=("GPU-c",)), Engine("http://127.0.0.1:8002")) == []


@pytest.mark.parametrize("timeout", [5.0, 5.5])
def test_a_timeout_must_be_below_the_interval(timeout: float) -> None:
    config = Config(scrape=Scrape(timeout_seconds=timeout))
    assert faults(config) == [("scrape.timeout_seconds", f"{timeout:g} is not below interval_seconds, 5")]


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "file:///etc/passwd", "unix:///run/engine", "http://", "http:///metrics"),
        *("http://a:0/", "http://a:99999/", "http://a:b/", "http://[::1/", "http://a b/"),
    ],
)
def test_a_page_must_have_an_http_url(url: str) -> None:
    assert faults(Config(engines=(Engine("http://a"), Engine(url)))) == [("engine[1].url", "no http or https URL")]


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Config(labels=Labels(tenant="a\nb")), "labels.tenant"),
        (Config(rates=Rates(site="\x1b[2J")), "rates.site"),
        (Config(engines=(Engine("http://a", name="a\x00"),)), "engine[0].name"),
        (Config(engines=(Engine("http://a", labels=Labels(cluster="a\tb")),)), "engine[0].labels.cluster"),
    ],
)
def test_names_that_reports_print_hold_no_control_characters(config: Config, key: str) -> None:
    assert faults(config) == [(key, "holds a control character")]


@pytest.mark.parametrize(
    ("engine", "key", "reason"),
    [
        (Engine("http://a", gpus=("0",)), "gpus", '"0" is no UUID'),
        (Engine("http://a", gpus=("GPU-a", "GPU-a")), "gpus", "names a GPU twice"),
        (
            Engine("http://a", gpus=("GPU-a", "GPU-b", "GPU-c"), gpus_per_replica=2),
            "gpus_per_replica",
            "3 GPUs do not divide into replicas of 2",
        ),
        (Engine("http://a", kv_paths=("kv",)), "kv_paths", '"kv" is relative'),
    ],
)
def test_what_an_engine_holds_must_make_sense(engine: Engine, key: str, reason: str) -> None:
    assert faults(Config(engines=(engine,))) == [(f"engine[0].{key}", reason)]


def test_replicas_without_listed_gpus_are_no_fault() -> None:
    assert faults(Config(engines=(Engine("http://a", gpus_per_replica=2),))) == []


def test_two_engines_must_not_share_a_page() -> None:
    first, *_ = clashes(Engine("http://me:word@a:8000", "a"), Engine("http://me:word@a:8000/metrics", "b"))
    assert first == Fault("engine[1].url", "belongs to engine[0] too", "it would be counted twice")


def test_two_engines_must_not_share_a_name() -> None:
    clash = clashes(Engine("http://b", "a:80"), Engine("http://c"), Engine("http://a"))
    assert [(fault.key, fault.reason) for fault in clash] == [("engine[2].name", '"a:80" belongs to engine[0] too')]


def test_two_engines_must_not_share_a_gpu() -> None:
    clash = clashes(Engine("http://a", gpus=("GPU-a", "GPU-b")), Engine("http://b", gpus=("GPU-c", "GPU-b")))
    assert [(fault.key, fault.reason) for fault in clash] == [("engine[1].gpus", '"GPU-b" belongs to engine[0] too')]


@pytest.mark.parametrize("url", ["books.db", "/srv/books.db", "mysql://host/books", "sqlite:books.db", "://"])
def test_a_ledger_must_have_a_sqlite_or_postgresql_url(url: str) -> None:
    assert of_ledger(url) is not None
    assert faults(Config(ledger=Ledger(url))) == [("ledger.url", "no SQLite URL")]


@pytest.mark.parametrize("url", ["sqlite:///a.db", "sqlite+pysqlite:///a.db", "postgresql+psycopg://host/books"])
def test_a_ledger_may_name_its_driver(url: str) -> None:
    assert of_ledger(url) is None
