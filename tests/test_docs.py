from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from kvtally.agent import config_keys
from kvtally.agent.cli import group
from kvtally.agent.config import Config
from kvtally.collectors.host_fields import HOST_FIELDS
from kvtally.collectors.quantities import QUANTITIES
from kvtally.collectors.registry import SOURCES

if TYPE_CHECKING:
    from kvtally.collectors.base import Kind

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("agent/**/*.md")])
CLI = (ROOT / "docs/cli.md").read_text(encoding="utf-8")
README = ROOT / "README.md"
BLOCK = "<!-- demo -->\n```\n```\n<!-- /demo -->"


def commands(command: click.Command, words: str = "") -> dict[str, click.Command]:
    """Every command below one, by the words that call it."""
    found = {words: command} if words else {}
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found |= commands(inner, f"{words} {name}".strip())
    return found


COMMANDS = commands(group)


def test_the_page_of_the_command_line_is_what_help_says() -> None:
    page = runpy.run_path(str(ROOT / "docs/cli.py"))["page"]
    assert page() == CLI, "run `just docs`"


def test_the_page_of_what_is_read_is_what_the_tables_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/metrics.py"))["page"]
    assert page() == (ROOT / "docs/metrics.md").read_text(encoding="utf-8"), "run `just docs`"


def test_the_page_of_prometheus_and_opentelemetry_is_what_their_tables_say() -> None:
    page = runpy.run_path(str(ROOT / "docs/observability.py"))["page"]
    assert page() == (ROOT / "docs/observability.md").read_text(encoding="utf-8"), "run `just docs`"


def test_no_table_of_what_is_read_is_empty_and_none_breaks() -> None:
    """A pipe inside a cell is escaped: every line of a table has as many cells as its head."""
    text = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    sections = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    for section in sections:
        title = section.partition("\n")[0]
        tables = [block.splitlines() for block in section.split("\n\n") if block.startswith("|")]
        assert tables, title
        for head, rule, *rows in tables:
            cells = {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)}
            assert (len(cells), bool(rows)) == (1, True), title
    titles = {section.partition("\n")[0] for section in sections}
    assert {source.title for source in SOURCES.values()} | set(HOST_FIELDS) <= titles


@pytest.mark.parametrize("kind", ["gpu", "filesystem", "process"])
def test_every_quantity_of_this_host_has_a_source(kind: Kind) -> None:
    of_kind = {"gpu": ("NVIDIA",), "process": ("An engine's processes",)}
    others = tuple(each for names in of_kind.values() for each in names)
    tables = [
        table
        for title, table in HOST_FIELDS.items()
        if (title.startswith(of_kind[kind]) if kind in of_kind else not title.startswith(others))
    ]
    served = {row.quantity for table in tables for row in table}
    assert served == {quantity.name for quantity in QUANTITIES[kind]}


@pytest.mark.parametrize("words", COMMANDS)
def test_every_command_and_option_is_on_its_page(words: str) -> None:
    head = f" `kvtally {words}`\n"
    assert CLI.count(head) == 1
    section = CLI.partition(head)[2].partition("\n#")[0]
    params = COMMANDS[words].params
    options = [each for each in params if isinstance(each, click.Option) and not each.hidden]
    assert [name for option in options for name in option.opts if f"  {name}" not in section] == []


def test_the_page_says_which_forms_each_command_takes() -> None:
    told = {
        words: forms
        for forms, names in re.findall(r"^- .*, `([a-z|]+)`: (.*)$", CLI, re.MULTILINE)
        for words in re.findall(r"`([a-z ]+)`", names)
    }
    forms = {
        words: "|".join(option.type.choices)
        for words, command in COMMANDS.items()
        for option in command.params
        if option.name == "form" and isinstance(option.type, click.Choice)
    }
    assert told == forms


def test_every_page_that_is_generated_stands_in_the_recipe() -> None:
    recipe = re.search(r"^docs:\n((?:    .*\n)+)", (ROOT / "justfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert recipe is not None
    written = set(re.findall(r"/python docs/(\w+)\.py > \S+\.new\n    mv \S+\.new \S+\.\w+\n", recipe[1]))
    assert written == {path.stem for path in ROOT.glob("docs/*.py")}


def test_the_readme_shows_what_the_demo_prints_now() -> None:
    module = runpy.run_path(str(ROOT / "docs/readme.py"))
    readme = README.read_text(encoding="utf-8")
    assert module["page"](readme, module["demo"]()) == readme, "run `just docs`"


@pytest.mark.parametrize("readme", ["no block", BLOCK[:20], BLOCK * 2])
def test_a_readme_without_its_block_is_not_written(readme: str) -> None:
    page = runpy.run_path(str(ROOT / "docs/readme.py"))["page"]
    with pytest.raises(ValueError, match="no block of the demo, or two"):
        page(readme, "shown")


def test_every_key_of_the_config_is_on_its_page() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    keys = config_keys.keys(Config)
    missing = [key.path for key in keys if key.variable not in page or f"`{key.path.rpartition('.')[2]}`" not in page]
    assert missing == []


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_inside_leads_somewhere(page: Path) -> None:
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            dead.append(link)
    assert dead == []


def lines_to_type() -> list[tuple[str, str]]:
    """Every `kvtally …` line of a code block or a span of code, with its page."""
    found: list[tuple[str, str]] = []
    for page in PAGES:
        text = re.sub(r"<!-- demo -->.*?<!-- /demo -->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
        fenced = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks = [block for language, block in fenced if language in {"", "sh", "console", "bash"}]
        spans = re.findall(r"(?<!`)`(kvtally [^`\n]+)`(?!`)", text)
        lines = [line for block in blocks if not block.startswith("Usage:") for line in block.splitlines()]
        parts = [part.strip() for line in (*lines, *spans) for part in line.split("&&")]
        asked = [line for line in parts if re.match(r"kvtally [a-z]", line) and "…" not in line]
        found += [(str(page.relative_to(ROOT)), line) for line in asked]
    return found


@pytest.mark.parametrize(("page", "line"), lines_to_type())
def test_every_line_to_type_is_a_call_that_is_understood(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    for end in ("|", "&", ">", ";"):
        words = words[: words.index(end)] if end in words else words
    command: click.Command = group
    context = click.Context(group, info_name="kvtally")
    while isinstance(command, click.Group) and words:
        name, *words = words
        inner = command.get_command(context, name)
        assert inner is not None, f"{page}: {line}"
        command = inner
    try:
        command.make_context(command.name, words, parent=context)
    except click.exceptions.Exit:  # --help
        return
    except click.MissingParameter:
        if words and not words[-1].isupper():  # `kvtally replay` names the command alone, `… rates add` may say PRICE
            raise
    except click.BadParameter as error:
        if "does not exist" not in str(error):  # a file of the reader's own
            raise


def test_lines_to_type_are_found() -> None:
    assert ("README.md", "kvtally cost --since 24h --by model,hour") in lines_to_type()
