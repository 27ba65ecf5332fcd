from __future__ import annotations

import re
import runpy
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from kvtally.agent import config_file, config_keys
from kvtally.agent.config import Config, load
from kvtally.agent.file_sd import parse

ROOT = Path(__file__).parents[1]
KEYS = list(config_keys.keys(Config))
SAMPLES = {"true": "true", "integer": "3", "number": "30", "string": "text", "list": "3", "one": "spot"}


def sample(key: config_keys.Key) -> str:
    """A text that the key's type takes."""
    named = {
        "scrape.restrict": "never",
        "gpu.unheld": "others",
        "export.windows": "30d",
        "export.prometheus.listen": "[::1]:9478",
        "engine[].role": "prefill",
        "engine[].access.server_name": "a.example",
        "log.format": "json",
        "log.level": "error",
    }
    return named.get(key.path) or SAMPLES[config_keys.words(key.type).split()[0].strip(",")]


def test_keys_are_found_in_tables_and_lists_of_tables() -> None:
    paths = [key.path for key in KEYS]
    assert len(paths) == len(set(paths))
    assert {"scrape.interval_seconds", "engine[].url", "engine[].labels.tenant", "log.level"} <= set(paths)


def test_only_what_cannot_be_left_out_is_required() -> None:
    assert [key.path for key in KEYS if key.required] == ["engine[].url", "page[].url"]


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_key_says_what_it_means_and_every_number_has_a_range(key: config_keys.Key) -> None:
    assert key.meaning.endswith(".")
    words = config_keys.words(key.type)
    if words.startswith(("number", "integer")):
        assert re.search(r"from [\d,]+ to [\d,]+", words)
    if words.startswith(("string", "list")):
        assert "at most" in words


@pytest.mark.parametrize("key", KEYS, ids=lambda key: key.path)
def test_every_key_can_be_set_by_its_variable(key: config_keys.Key) -> None:
    variable, text = key.variable.replace("__N__", "__0__"), sample(key)
    environ = {"KVTALLY_ENGINE__0__URL": "http://a", "KVTALLY_PAGE__0__URL": "http://b"} | {variable: text}
    tables = config_file.overlay("", {}, environ, Config)
    config = config_file.decode(tables, Config)
    found: Any = msgspec.to_builtins(config)
    for part in key.path.replace("[]", ".0").split("."):
        found = found[int(part)] if part.isdecimal() else found[part]
    assert str(found).strip("(',)").lower().removesuffix(".0") == text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("scrape",), "table"),
        (("engine",), "list of tables, at most 4,096 long"),
        (("engine", 0), "table"),
        (("engine", 3, "gpus", 1), "string"),
        (("host", "disks"), "true or false"),
        (("rates", "term"), 'one of "on-demand", "spot", "reserved", "owned"'),
    ],
)
def test_types_are_told_in_words(path: tuple[str | int, ...], words: str) -> None:
    assert config_keys.words(config_keys.type_at(Config, path)) == words


@pytest.mark.parametrize("path", [("scrap",), ("scrape", 0), ("engine", "url"), ("log", "level", "x"), (0,)])
def test_a_path_that_is_no_key_has_no_type(path: tuple[str | int, ...]) -> None:
    assert config_keys.type_at(Config, path) is None


def test_the_committed_page_is_what_the_structs_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/configuration.py"))["page"]
    assert (ROOT / "docs/configuration.md").read_text() == page(), "run `just docs`"


def test_the_page_names_every_key_with_its_variable_range_and_meaning() -> None:
    rows = [line for line in (ROOT / "docs/configuration.md").read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS)
    for key, row in zip(KEYS, rows, strict=True):
        name = key.path.rpartition(".")[2]
        assert all(part in row for part in (f"`{name}`", f"`{key.variable}`", config_keys.words(key.type), key.meaning))


def test_the_example_of_the_page_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
    (tmp_path / "kvtally.toml").write_text(example)
    config = load(str(tmp_path / "kvtally.toml"), {})
    assert config.engines[0].labels.tenant == tomllib.loads(example)["engine"][0]["labels"]["tenant"]
    assert config.engines[0].term == "reserved"
    assert config.engines[0].access.bearer_token_file == "/run/secrets/token"
    assert config.pages[0].engines == (config.engines[0].name,)


def test_the_file_of_targets_on_the_page_can_be_read() -> None:
    (example,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.DOTALL)
    targets = parse(example.encode())
    assert [engine.role for engine in targets.engines] == ["decode", "decode"]
    assert targets.pages[0].engines == ("10.0.0.7:8000",)
