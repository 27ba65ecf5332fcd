from __future__ import annotations

from pathlib import Path

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
    complete,
    complete_page,
    ledger_url,
    load,
    masked,
)
from kvtally.agent.config_file import ConfigError
from kvtally.collectors.access import Access as Files

ENGINES = """
[labels]
cluster = "fra1"
tenant = "all"

[[engine]]
url = "http://127.0.0.1:8000/metrics"
gpus = ["GPU-a", "GPU-b"]
gpus_per_replica = 2

[[engine]]
url = "https://engine.example"
name = "chat"
term = "spot"
site = "fra"

[engine.labels]
namespace = "chat"
tenant = "search"

[rates]
term = "reserved"
site = "ams"
"""


def written(folder: Path, text: str, name: str = "kvtally.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def test_without_a_file_the_defaults_of_the_documentation_hold() -> None:
    config = load(None, {}, searched=())
    assert config == Config()
    assert (config.scrape.interval_seconds, config.scrape.timeout_seconds) == (5, 2)
    assert config.scrape.ports[:12] == (8000, 8001, 8002, 8003, 8004, 8005, 8006, 8007, 8008, 8009, 8010, 8200)
    assert {30000, 8081, 9400} < set(config.scrape.ports)
    assert config.ledger.retention_days == 90


def test_every_table_of_a_file_is_read(tmp_path: Path) -> None:
    text = """
    [scrape]
    interval_seconds = 1
    timeout_seconds = 0.25
    ports = [9000]
    discover = false
    discover_every_seconds = 30
    restrict = "never"
    file_sd = ["/etc/kvtally/engines.json"]
    [gpu]
    enabled = false
    energy_every_seconds = 20
    gpm_every_seconds = 30.5
    [host]
    processes = false
    disks = false
    cgroup = false
    [storage]
    enabled = false
    mmpmon = "/opt/mmpmon"
    [rates]
    default_card = false
    [ledger]
    retention_days = 7
    [log]
    format = "json"
    level = "debug"
    """
    config = load(written(tmp_path, text), {})
    assert config.scrape == Scrape(1.0, 0.25, False, 30.0, (9000,), "never", ("/etc/kvtally/engines.json",))
    assert (config.gpu.enabled, config.gpu.energy_every_seconds, config.gpu.gpm_every_seconds) == (False, 20, 30.5)
    assert (config.host.processes, config.host.disks, config.host.cgroup) == (False, False, False)
    assert (config.storage.enabled, config.storage.mmpmon) == (False, "/opt/mmpmon")
    assert (config.rates.default_card, config.ledger.retention_days) == (False, 7)
    assert (config.log.format, config.log.level) == ("json", "debug")


def test_a_listed_engine_is_completed_from_the_other_tables(tmp_path: Path) -> None:
    first, second = load(written(tmp_path, ENGINES), {}).engines
    assert (first.url, first.name) == ("http://127.0.0.1:8000/metrics", "127.0.0.1:8000")
    assert (first.gpus, first.gpus_per_replica) == (("GPU-a", "GPU-b"), 2)
    assert (first.term, first.site) == ("reserved", "ams")
    assert first.labels == Labels("fra1", "", "all")
    assert (second.url, second.name) == ("https://engine.example/metrics", "chat")
    assert (second.gpus, second.gpus_per_replica, second.pid, second.kv_dram_gib) == (None, None, None, None)
    assert (second.term, second.site) == ("spot", "fra")
    assert second.labels == Labels("fra1", "chat", "search")


@pytest.mark.parametrize(
    ("url", "page", "name"),
    [
        ("http://10.0.0.7:8000", "http://10.0.0.7:8000/metrics", "10.0.0.7:8000"),
        ("http://10.0.0.7:8000/", "http://10.0.0.7:8000/metrics", "10.0.0.7:8000"),
        ("http://a.example/v1/metrics?x=1", "http://a.example/v1/metrics?x=1", "a.example:80"),
        ("https://A.example", "https://A.example/metrics", "a.example:443"),
        ("http://[::1]:8001/metrics", "http://[::1]:8001/metrics", "[::1]:8001"),
    ],
)
def test_a_discovered_engine_is_completed_the_same_way(url: str, page: str, name: str) -> None:
    engine = complete(Engine(url), Config(labels=Labels(tenant="all"), rates=Rates(term="owned", site="fra")))
    assert (engine.url, engine.name, engine.term, engine.site) == (page, name, "owned", "fra")
    assert engine.labels == Labels("", "", "all")


@pytest.mark.parametrize(("interval", "timeout"), [(1.0, 0.5), (3.0, 1.5), (4.0, 2.0), (300.0, 2.0)])
def test_a_timeout_that_is_not_given_is_half_the_interval_and_at_most_two_seconds(
    interval: float, timeout: float
) -> None:
    assert Scrape(interval_seconds=interval).timeout_seconds == timeout


def test_the_file_that_the_option_names_comes_before_the_variable_and_the_searched_ones(tmp_path: Path) -> None:
    files = [written(tmp_path, f"[ledger]\nretention_days = {days}", f"{days}.toml") for days in (1, 2, 3, 4)]
    environ = {"KVTALLY_CONFIG": files[1]}
    assert load(files[0], environ, tuple(files[2:])).ledger.retention_days == 1
    assert load(None, environ, tuple(files[2:])).ledger.retention_days == 2
    assert load(None, {"KVTALLY_CONFIG": ""}, tuple(files[2:])).ledger.retention_days == 3
    assert load(None, {}, (str(tmp_path / "none.toml"), files[3])).ledger.retention_days == 4


def test_kvtally_toml_of_the_working_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path, "[ledger]\nretention_days = 5")
    monkeypatch.chdir(tmp_path)
    assert load(None, {}).ledger.retention_days == 5


def test_a_named_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.toml")
    for option, environ in ((missing, {}), (None, {"KVTALLY_CONFIG": missing})):
        with pytest.raises(ConfigError, match="No such file") as caught:
            load(option, environ, searched=())
        assert str(caught.value).startswith(missing)


def test_a_searched_file_that_leads_nowhere_is_an_error_and_not_skipped(tmp_path: Path) -> None:
    link = tmp_path / "kvtally.toml"
    link.symlink_to(tmp_path / "gone.toml")
    with pytest.raises(ConfigError, match="No such file"):
        load(None, {}, searched=(str(link),))


def test_the_environment_comes_before_the_file(tmp_path: Path) -> None:
    environ = {
        "KVTALLY_SCRAPE__INTERVAL_SECONDS": "2",
        "KVTALLY_ENGINE__1__NAME": "renamed",
        "KVTALLY_ENGINE__1__LABELS__TENANT": "other",
        "KVTALLY_ENGINE__2__URL": "http://127.0.0.1:8002",
        "KVTALLY_RATES__TERM": "owned",
    }
    config = load(written(tmp_path, ENGINES), environ)
    assert config.scrape == Scrape(interval_seconds=2.0, timeout_seconds=1.0)
    assert [engine.name for engine in config.engines] == ["127.0.0.1:8000", "renamed", "127.0.0.1:8002"]
    assert [engine.term for engine in config.engines] == ["owned", "spot", "owned"]
    assert config.engines[1].labels == Labels("fra1", "chat", "other")


def test_relative_paths_count_from_the_file_or_for_the_environment_from_the_working_folder(tmp_path: Path) -> None:
    text = '[rates]\ncard = "prices/card.toml"\n[ledger]\nurl = "sqlite:///books.db?timeout=9"'
    file = written(tmp_path, text)
    config = load(file, {})
    assert config.rates.card == f"{tmp_path}/prices/card.toml"
    assert config.ledger.url == f"sqlite:///{tmp_path}/books.db?timeout=9"
    environ = {"KVTALLY_RATES__CARD": "card.toml", "KVTALLY_LEDGER__URL": "sqlite:///books.db"}
    config = load(file, environ)
    assert config.rates.card == "card.toml"
    assert ledger_url(None, config, {}) == f"sqlite:///{Path.cwd()}/books.db"


def test_the_place_of_a_models_config_counts_from_the_file_that_names_it(tmp_path: Path) -> None:
    text = """
    engine = [
        { url = "http://a", model_config = "models/a" },
        { url = "http://b", model_config = "/models/b/config.json", token_budget = 2048 },
        { url = "http://c", model_config = "models/c" },
        { url = "http://d" },
    ]
    """
    config = load(written(tmp_path, text), {"KVTALLY_ENGINE__2__MODEL_CONFIG": "models/other"})
    places = [engine.model_config for engine in config.engines]
    assert places == [f"{tmp_path}/models/a", "/models/b/config.json", "models/other", ""]
    assert [engine.token_budget for engine in config.engines] == [None, 2048, None, None]


def test_the_files_of_an_access_count_from_the_file_that_names_them(tmp_path: Path) -> None:
    text = """
    [scrape]
    file_sd = ["sd/*.json", "/etc/sd.json"]
    [scrape.file_sd_access]
    ca_file = "ca.pem"
    [[engine]]
    url = "https://a"
    role = "prefill"
    group = "chat"
    [engine.access]
    bearer_token_file = "token"
    ca_file = "/etc/ca.pem"
    cert_file = "own.pem"
    key_file = "own.key"
    server_name = "engine.example"
    [[engine]]
    url = "https://b"
    [engine.access]
    username = "me"
    password_file = "word"
    insecure_skip_verify = true
    [[page]]
    url = "https://c"
    access = { bearer_token_file = "token" }
    """
    environ = {"KVTALLY_ENGINE__1__ACCESS__PASSWORD_FILE": "other", "KVTALLY_PAGE__0__ACCESS__CA_FILE": "ca"}
    config = load(written(tmp_path, text), environ)
    assert config.scrape.file_sd == (f"{tmp_path}/sd/*.json", "/etc/sd.json")
    assert config.scrape.file_sd_access == Access(ca_file=f"{tmp_path}/ca.pem")
    first, second = config.engines
    assert (first.role, first.group, second.role, second.group) == ("prefill", "chat", "", "")
    own = (f"{tmp_path}/own.pem", f"{tmp_path}/own.key")
    assert first.access.for_endpoint() == Files(
        f"{tmp_path}/token", "", "", "/etc/ca.pem", *own, "engine.example", insecure_skip_verify=False
    )
    assert second.access == Access(username="me", password_file="other", insecure_skip_verify=True)
    assert config.pages[0].access == Access(bearer_token_file=f"{tmp_path}/token", ca_file="ca")


def test_files_to_discover_from_that_the_environment_names_count_from_the_working_folder(tmp_path: Path) -> None:
    file = written(tmp_path, '[scrape]\nfile_sd = ["a.json"]')
    assert load(file, {"KVTALLY_SCRAPE__FILE_SD": "b.json,/c.json"}).scrape.file_sd == ("b.json", "/c.json")


def test_a_listed_page_is_completed_as_an_engine_is(tmp_path: Path) -> None:
    text = """
    [[page]]
    url = "http://127.0.0.1:7000"
    [[page]]
    url = "http://127.0.0.1:9400/gpu/metrics"
    name = "dcgm"
    engines = ["a", "b"]
    """
    assert load(written(tmp_path, text), {}).pages == (
        Page("http://127.0.0.1:7000/metrics", "127.0.0.1:7000"),
        Page("http://127.0.0.1:9400/gpu/metrics", "dcgm", ("a", "b")),
    )
    assert complete_page(Page("https://[::1]/")) == Page("https://[::1]/metrics", "[::1]:443")


def test_a_page_and_an_engine_of_one_name_are_an_error(tmp_path: Path) -> None:
    text = 'engine = [{ url = "http://a" }]\npage = [{ url = "http://a/other" }]'
    with pytest.raises(ConfigError, match=r'page\[0\]\.name: "a:80" belongs to engine\[0\] too$') as caught:
        load(written(tmp_path, text), {})
    assert caught.value.hint == "give one of them another name"


def test_the_connector_of_an_engine_is_the_name_of_a_class(tmp_path: Path) -> None:
    text = 'engine = [{ url = "http://a", connector = "LMCacheConnectorV1" }, { url = "http://b" }]'
    assert [one.connector for one in load(written(tmp_path, text), {}).engines] == ["LMCacheConnectorV1", ""]
    for wrong in ('"LMCache Connector"', '"{}"', "7", f'"{"A" * 201}"'):
        file = written(tmp_path, f'engine = [{{ url = "http://a", connector = {wrong} }}]')
        with pytest.raises(ConfigError, match=r"engine\[0\]\.connector: "):
            load(file, {})


def test_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path, '[rates]\ncard = "/etc/card.toml"\n[ledger]\nurl = "sqlite:////srv/books.db"')
    config = load(file, {})
    assert (config.rates.card, config.ledger.url) == ("/etc/card.toml", "sqlite:////srv/books.db")


def test_the_ledger_is_the_option_then_the_variable_then_the_config_then_the_state_folder() -> None:
    config = Config(ledger=Ledger(url="sqlite:////srv/config.db"))
    environ = {"KVTALLY_LEDGER": "postgresql+psycopg://host/kvtally", "HOME": "/home/me"}
    assert ledger_url("sqlite:////srv/option.db", config, environ) == "sqlite:////srv/option.db"
    assert ledger_url(None, config, environ) == "postgresql+psycopg://host/kvtally"
    assert ledger_url(None, config, {"HOME": "/home/me"}) == "sqlite:////srv/config.db"
    assert ledger_url(None, Config(), {"HOME": "/home/me"}) == "sqlite:////home/me/.local/state/kvtally/ledger.db"


@pytest.mark.parametrize(
    ("environ", "path"),
    [
        ({"XDG_STATE_HOME": "/state", "HOME": "/root"}, "/state/kvtally/ledger.db"),
        ({"XDG_STATE_HOME": "relative", "HOME": "/root"}, "/root/.local/state/kvtally/ledger.db"),
        ({"STATE_DIRECTORY": "/var/lib/kvtally", "XDG_STATE_HOME": "/state"}, "/var/lib/kvtally/ledger.db"),
        ({"STATE_DIRECTORY": "/var/lib/kvtally:/var/lib/other"}, "/var/lib/kvtally/ledger.db"),
    ],
)
def test_the_state_folder_is_that_of_systemd_or_of_the_user(environ: dict[str, str], path: str) -> None:
    assert ledger_url(None, Config(), environ) == f"sqlite:///{path}"


def test_without_any_home_the_error_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match="no home directory") as caught:
        ledger_url(None, Config(), {"HOME": "nowhere"})
    assert caught.value.hint == "set KVTALLY_LEDGER"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=true", "postgresql://a/b"])
def test_a_url_without_a_relative_path_is_left_alone(url: str) -> None:
    assert ledger_url(url, Config(), {}) == url


def test_a_path_in_the_place_of_a_url_is_refused_and_a_password_not_repeated() -> None:
    with pytest.raises(ConfigError) as caught:
        ledger_url("books.db", Config(), {})
    assert str(caught.value) == "--ledger: no SQLite URL"
    with pytest.raises(ConfigError) as caught:
        ledger_url(None, Config(), {"KVTALLY_LEDGER": "mysql://me:secret@host/books"})
    assert str(caught.value) == "$KVTALLY_LEDGER: no SQLite URL"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:secret@host/books", "postgresql://me:***@host/books"),
        ("postgresql+psycopg://me:se:c/r@et@host:5432/books", "postgresql+psycopg://me:***@host:5432/books"),
        ("postgresql://:secret@host/books", "postgresql://:***@host/books"),
        ("postgresql://host/books?user=me&password=secret&x=1", "postgresql://host/books?user=me&password=***&x=1"),
        ("postgresql://host/books?sslPassword=secret", "postgresql://host/books?sslPassword=***"),
        ("postgresql://me@host:5432/books", "postgresql://me@host:5432/books"),
        ("http://user:secret@host:8000/metrics", "http://user:***@host:8000/metrics"),
        ("sqlite:////srv/a@b:c/ledger.db", "sqlite:////srv/a@b:c/ledger.db"),
    ],
)
def test_passwords_are_masked(url: str, shown: str) -> None:
    assert masked(url) == shown
