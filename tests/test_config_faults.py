from __future__ import annotations

import sys

import pytest

from kvtally.agent.config import (
    Access,
    Config,
    Engine,
    Labels,
    Ledger,
    Page,
    Rates,
    Scrape,
    Storage,
    complete,
    complete_page,
)
from kvtally.agent.config_faults import Fault, between, of_each, of_ledger


def faults(config: Config) -> list[tuple[str, str]]:
    return [(fault.key, fault.reason) for fault in of_each(config)]


def clashes(*engines: Engine, pages: tuple[Page, ...] = ()) -> list[Fault]:
    return list(between(tuple(complete(engine, Config()) for engine in engines), tuple(map(complete_page, pages))))


def test_the_defaults_and_a_whole_engine_have_no_fault() -> None:
    engine = Engine(
        "https://[::1]:8000/metrics",
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
            "decode",
            "chat",
        ),
        access=Access(username="me", password_file="word", cert_file="own.pem", key_file="own.key"),
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
    first, *_ = clashes(Engine("http://a:8000", "a"), Engine("http://a:8000/metrics", "b"))
    assert first == Fault("engine[1].url", "belongs to engine[0] too", "it would be counted twice")


def test_two_engines_must_not_share_a_name() -> None:
    clash = clashes(Engine("http://b", "a:80"), Engine("http://c"), Engine("http://a"))
    assert [(fault.key, fault.reason) for fault in clash] == [("engine[2].name", '"a:80" belongs to engine[0] too')]


def test_two_engines_may_share_a_gpu_and_one_names_it_once() -> None:
    sharing = (Engine("http://a", gpus=("GPU-a", "GPU-b")), Engine("http://b", gpus=("GPU-c", "GPU-b")))
    assert clashes(*sharing) == []
    assert faults(Config(engines=sharing)) == []
    twice = Engine("http://a", gpus=("GPU-a", "GPU-a"))
    assert faults(Config(engines=(twice, *sharing[1:]))) == [("engine[0].gpus", "names a GPU twice")]


@pytest.mark.parametrize("url", ["http://me:word@a/metrics", "https://word@a", "http://me:word@[::1]:x/"])
def test_credentials_in_the_url_of_a_page_are_refused_and_not_repeated(url: str) -> None:
    found = [*of_each(Config(engines=(Engine(url),))), *of_each(Config(pages=(Page(url),)))]
    assert [(fault.key, fault.hint) for fault in found] == [
        ("engine[0].url", "set engine[0].access.username and engine[0].access.password_file"),
        ("page[0].url", "set page[0].access.username and page[0].access.password_file"),
    ]
    assert not any("me:word" in part for fault in found for part in fault)


@pytest.mark.parametrize(
    ("access", "key", "reason"),
    [
        (Access(password_file="word"), "password_file", "a password without a user name"),
        (Access("token", "me"), "bearer_token_file", "a token beside a user name"),
        (Access(key_file="own.key"), "key_file", "a key without its certificate"),
        (
            Access(ca_file="ca.pem", insecure_skip_verify=True),
            "insecure_skip_verify",
            "nothing is checked against ca_file",
        ),
        (Access(ca_file="a\nb"), "ca_file", "holds a control character"),
    ],
)
def test_the_keys_of_an_access_must_make_sense_together(access: Access, key: str, reason: str) -> None:
    assert faults(Config(engines=(Engine("http://a", access=access),))) == [(f"engine[0].access.{key}", reason)]
    assert faults(Config(pages=(Page("http://a", access=access),))) == [(f"page[0].access.{key}", reason)]
    config = Config(scrape=Scrape(file_sd_access=access))
    assert faults(config) == [(f"scrape.file_sd_access.{key}", reason)]


def test_files_to_discover_from_are_json_or_yaml() -> None:
    scrape = Scrape(file_sd=("/etc/sd/*.json", "/etc/sd/engines.yml", "/etc/sd/*.yaml", "/etc/sd/*"))
    (found,) = of_each(Config(scrape=scrape))
    assert (found.key, found.reason) == ("scrape.file_sd", '"/etc/sd/*" does not end in .json, .yml or .yaml')


@pytest.mark.parametrize("pattern", ["/etc/sd/engines.yml", "/etc/sd/*.yaml"])
def test_yaml_without_pyyaml_is_refused_with_the_two_ways_out(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)  # as where it is not installed
    (found,) = of_each(Config(scrape=Scrape(file_sd=("/etc/sd/*.json", pattern))))
    assert found.reason == f'"{pattern}" is YAML, and PyYAML is not installed'
    assert "kvtally[yaml]" in found.hint
    assert "yq -o=json" in found.hint


def test_a_page_must_have_an_http_url_and_a_printable_name() -> None:
    config = Config(pages=(Page("ftp://a"), Page("http://a", "a\nb")))
    assert faults(config) == [("page[0].url", "no http or https URL"), ("page[1].name", "holds a control character")]


def test_mmpmon_is_given_from_the_root_or_not_at_all() -> None:
    assert faults(Config(storage=Storage(mmpmon=""))) == []
    assert faults(Config(storage=Storage(mmpmon="mmpmon"))) == [("storage.mmpmon", '"mmpmon" is relative')]


def test_a_page_must_not_share_address_or_name_with_another_or_with_an_engine() -> None:
    engine = Engine("http://a:8000", "chat")
    pages = (Page("http://a:8000/metrics", "x"), Page("http://b", "chat"), Page("http://b", "y"))
    assert [(fault.key, fault.reason) for fault in clashes(engine, pages=pages)] == [
        ("page[0].url", "belongs to engine[0] too"),
        ("page[1].name", '"chat" belongs to engine[0] too'),
        ("page[2].url", "belongs to page[1] too"),
    ]


@pytest.mark.parametrize("url", ["books.db", "/srv/books.db", "mysql://host/books", "sqlite:books.db", "://"])
def test_a_ledger_must_have_a_sqlite_or_postgresql_url(url: str) -> None:
    assert of_ledger(url) is not None
    assert faults(Config(ledger=Ledger(url))) == [("ledger.url", "no SQLite URL")]


@pytest.mark.parametrize("url", ["sqlite:///a.db", "sqlite+pysqlite:///a.db", "postgresql+psycopg://host/books"])
def test_a_ledger_may_name_its_driver(url: str) -> None:
    assert of_ledger(url) is None
