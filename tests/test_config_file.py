from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent import config_file
from kvtally.agent.config import Config, load
from kvtally.agent.config_file import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

ENGINE = '[[engine]]\nurl = "http://a"\n'


def refused(tmp_path: Path, content: str | bytes, environ: dict[str, str] | None = None) -> ConfigError:
    file = tmp_path / "c.toml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load(str(file), environ or {})
    assert len(str(caught.value).splitlines()) == 1
    return caught.value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[scrape]\ninterval_seconds = 0.5", "scrape.interval_seconds: expected number from 1 to 300, got 0.5"),
        ("[scrape]\ninterval_seconds = 300.5", "scrape.interval_seconds: expected number from 1 to 300, got 300.5"),
        ("[scrape]\ninterval_seconds = nan", "scrape.interval_seconds: expected number from 1 to 300, got nan"),
        ("[scrape]\ninterval_seconds = true", "scrape.interval_seconds: expected number from 1 to 300, got true"),
        ('[scrape]\ninterval_seconds = "5"', 'scrape.interval_seconds: expected number from 1 to 300, got "5"'),
        ("[scrape]\nports = [80, 0]", "scrape.ports[1]: expected integer from 1 to 65,535, got 0"),
        ("scrape = 3", "scrape: expected table, got 3"),
        ('[log]\nlevel = "trace"', 'log.level: expected one of "debug", "info", "warning", "error", got "trace"'),
        (ENGINE + "[[engine]]\nname = 'b'", 'engine[1]: "url" is missing'),
        (ENGINE + "gpus = 'GPU-1'", 'engine[0].gpus: expected list of strings, at most 1,024 long, got "GPU-1"'),
        (ENGINE + "gpus = [1]", "engine[0].gpus[0]: expected string, got 1"),
        (ENGINE + "pid = 0", "engine[0].pid: expected integer from 1 to 4,194,304, got 0"),
        (ENGINE + "kv_dram_gib = inf", "engine[0].kv_dram_gib: expected number from 0 to 1,048,576, got inf"),
        (ENGINE + "kv_dram_gib = [1]", "engine[0].kv_dram_gib: expected number from 0 to 1,048,576, got a list of 1"),
        (
            f'[scrape]\ndiscover = "{"x" * 61}"',
            "scrape.discover: expected true or false, got another string",
        ),
        (
            '[ledger]\nretention_days = "postgresql://me:secret@host"',
            "ledger.retention_days: expected integer from 1 to 36,500, got another string",
        ),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key_with_what_was_expected(tmp_path: Path, text: str, reason: str) -> None:
    assert str(refused(tmp_path, text)) == f"{tmp_path}/c.toml: {reason}"


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[scrape]\ninterval_second = 1", "scrape.interval_second", "did you mean scrape.interval_seconds?"),
        ("interval_seconds = 1", "interval_seconds", "did you mean scrape.interval_seconds?"),
        ("[gpus]\nenabled = true", "gpus", "did you mean gpu?"),
        (ENGINE * 2 + "gpu = []", "engine[1].gpu", "did you mean engine[1].gpus?"),
        (ENGINE + "[engine.labels]\nowner = 'a'", "engine[0].labels.owner", "known here: cluster, namespace, tenant"),
        (
            "[prometheus]",
            "prometheus",
            "known here: scrape, labels, engine, page, gpu, host, storage, export, rates, ledger, log",
        ),
        ('["0"]\na = 1', "0", "known here: scrape, "),
        ('"a.b\\n" = 1', "a.b?", "known here: scrape, "),
    ],
)
def test_an_unknown_key_is_named_with_the_key_that_was_meant(tmp_path: Path, text: str, key: str, hint: str) -> None:
    error = refused(tmp_path, text)
    assert str(error) == f"{tmp_path}/c.toml: {key}: unknown key"
    assert error.hint.startswith(hint)


def test_a_single_table_in_the_place_of_a_list_is_told_how_to_write_it(tmp_path: Path) -> None:
    error = refused(tmp_path, '[engine]\nurl = "http://a"')
    assert str(error).endswith("engine: expected list of tables, at most 4,096 long, got a table")
    assert error.hint == "write [[engine]]"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("a = [", "Invalid value (at end of document)"),
        ("[a]\n[a]", "Cannot declare ('a',) twice (at line 2, column 3)"),
        (b"a = '\xff'", "no UTF-8 at byte 5"),
        (b"#" * (1 << 20) + b"#", "more than 1 MiB: this is no config file"),
        ("a = " + "[" * 50_000, "nested too deeply"),
    ],
)
def test_what_is_no_toml_is_named_by_its_place(tmp_path: Path, content: str | bytes, reason: str) -> None:
    assert str(refused(tmp_path, content)) == f"{tmp_path}/c.toml: {reason}"


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        config_file.read(str(tmp_path))


def test_a_byte_order_mark_is_no_error(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_bytes(b"\xef\xbb\xbf[ledger]\nretention_days = 3")
    assert load(str(file), {}).ledger.retention_days == 3


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("SCRAPE__INTERVAL_SECONDS", "x", 'scrape.interval_seconds: expected number from 1 to 300, got "x"'),
        ("SCRAPE__INTERVAL_SECONDS", "", 'scrape.interval_seconds: expected number from 1 to 300, got ""'),
        ("SCRAPE__INTERVAL_SECONDS", "nan", 'scrape.interval_seconds: expected number from 1 to 300, got "nan"'),
        ("SCRAPE__TIMEOUT_SECONDS", "9", "scrape.timeout_seconds: 9 is not below interval_seconds, 5"),
        ("SCRAPE__DISCOVER", "yes", 'scrape.discover: expected true or false, got "yes"'),
        (
            "SCRAPE__PORTS",
            "80,",
            'scrape.ports: expected list of integers from 1 to 65,535, at most 256 long, got "80,"',
        ),
        (
            "SCRAPE__PORTS",
            "[80",
            'scrape.ports: expected list of integers from 1 to 65,535, at most 256 long, got "[80"',
        ),
        ("SCRAPE__INTERVAL", "1", "scrape.interval: unknown key"),
        ("ENGINE__URL", "http://a", "engine.url: unknown key"),
        ("ENGINE__0__LABELS", "x", "engine[0].labels is a table"),
        ("ENGINE__0", "x", "engine[0] is a table"),
        ("ENGINE__1__URL", "http://a", "engine[1].url: 0 must come before it, and the first is 0"),
        ("ENGINE__99999999999__URL", "http://a", "engine.99999999999.url: unknown key"),
        ("ENGINE__00__URL", "http://a", "engine[0].url: unknown key"),
        ("scrape__ports", "80", "scrape.ports: unknown key"),
        ("ENGINE__²__URL", "http://a", "engine.².url: unknown key"),
        ("__", "x", ".: unknown key"),
    ],
)
def test_a_wrong_variable_is_named_with_its_key(tmp_path: Path, name: str, text: str, reason: str) -> None:
    assert str(refused(tmp_path, "", {f"KVTALLY_{name}": text})) == f"$KVTALLY_{name}: {reason}"


def test_an_unknown_variable_is_told_the_variable_that_was_meant(tmp_path: Path) -> None:
    assert refused(tmp_path, "", {"KVTALLY_SCRAPE__INTERVAL": "1"}).hint == (
        "did you mean KVTALLY_SCRAPE__INTERVAL_SECONDS?"
    )
    assert refused(tmp_path, "", {"KVTALLY_ENGINE__URL": "1"}).hint == "did you mean KVTALLY_ENGINE__0__URL?"
    assert refused(tmp_path, "", {"KVTALLY_X__Y": "1"}).hint.startswith("known tables: scrape, labels, engine, ")
    assert refused(tmp_path, ENGINE, {"KVTALLY_ENGINE__0__GPU": "1"}).hint == "did you mean KVTALLY_ENGINE__0__GPUS?"


def test_a_fault_of_an_engine_that_variables_made_names_file_and_variable(tmp_path: Path) -> None:
    error = refused(tmp_path, ENGINE, {"KVTALLY_ENGINE__1__NAME": "b"})
    assert str(error) == f'{tmp_path}/c.toml with $KVTALLY_ENGINE__1__NAME: engine[1]: "url" is missing'
    with pytest.raises(ConfigError) as caught:
        load(None, {"KVTALLY_ENGINE__0__NAME": "b"}, searched=())
    assert str(caught.value) == '$KVTALLY_ENGINE__0__NAME: engine[0]: "url" is missing'


@pytest.mark.parametrize(("text", "name"), [("scrape = 3", "SCRAPE__DISCOVER"), ("engine = 3", "ENGINE__0__URL")])
def test_a_variable_does_not_hide_a_file_that_is_wrong_above_it(tmp_path: Path, text: str, name: str) -> None:
    assert "the file has no " in str(refused(tmp_path, text, {f"KVTALLY_{name}": "true"}))


def test_variables_that_are_no_keys_are_left_alone() -> None:
    environ = {
        "KVTALLY_PORT": "tcp://10.0.0.1:9100",  # what Kubernetes sets beside a service called kvtally
        "KVTALLY_SERVICE_HOST": "10.0.0.1",
        "KVTALLY_LEDGER": "sqlite:///x.db",
        "HOME": "/root",
        "OTHER__KEY": "1",
    }
    assert load(None, environ, searched=()) == Config()


def test_lists_are_written_with_commas_or_as_json_and_engines_in_any_order() -> None:
    environ = {
        "KVTALLY_SCRAPE__PORTS": "[8000, 8200]",
        "KVTALLY_SCRAPE__DISCOVER": "0",
        **{f"KVTALLY_ENGINE__{place}__URL": f"http://127.0.0.1:{9000 + place}" for place in range(11)},
        "KVTALLY_ENGINE__10__GPUS": "GPU-a, GPU-b",
        "KVTALLY_ENGINE__9__GPUS": "",
        "KVTALLY_ENGINE__8__KV_PATHS": '["/mnt/a,b"]',
        "KVTALLY_ENGINE__7__KV_DRAM_GIB": "1.5",
        "KVTALLY_ENGINE__7__PID": "77",
    }
    config = load(None, environ, searched=())
    assert (config.scrape.ports, config.scrape.discover) == ((8000, 8200), False)
    assert [engine.name for engine in config.engines] == [f"127.0.0.1:{9000 + place}" for place in range(11)]
    assert (config.engines[10].gpus, config.engines[9].gpus) == (("GPU-a", "GPU-b"), ())
    assert config.engines[8].kv_paths == ("/mnt/a,b",)
    assert (config.engines[7].kv_dram_gib, config.engines[7].pid) == (1.5, 77)


TOML_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
TABLES = st.dictionaries(
    st.sampled_from(["scrape", "labels", "engine", "gpu", "host", "rates", "ledger", "log", "other"]),
    st.one_of(
        TOML_VALUES,
        st.lists(st.dictionaries(st.sampled_from(["url", "gpus", "labels", "pid", "0"]), TOML_VALUES), max_size=3),
        st.dictionaries(st.sampled_from(["interval_seconds", "ports", "card", "url", "level", "tenant"]), TOML_VALUES),
    ),
)
VARIABLES = st.dictionaries(
    st.lists(
        st.sampled_from(["ENGINE", "0", "1", "URL", "SCRAPE", "PORTS", "LABELS", "TENANT", "²", ""]), min_size=2
    ).map(lambda parts: "KVTALLY_" + "__".join(parts)),
    st.text(max_size=8),
    max_size=3,
)


@given(tables=TABLES, variables=VARIABLES)
def test_whatever_is_written_the_answer_is_a_config_or_one_line(
    tables: dict[str, object], variables: dict[str, str]
) -> None:
    try:
        config = config_file.decode(config_file.overlay("c.toml", tables, variables, Config), Config)
    except ConfigError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017  # either end is right
    else:
        assert isinstance(config, Config)
