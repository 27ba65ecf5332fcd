from __future__ import annotations

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.command_line import call, copied

from kvtally import __version__
from kvtally.agent.cli import COMMANDS, group
from kvtally.agent.cli.options import Seconds, dimensions_of, instant_ns, window_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.command_line import Call

SECOND = 10**9
FOUR = 1_795_406_400  # 2026-11-23T04:00:00Z
NEWEST = FOUR * SECOND


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by the words that call it, groups included."""

    def walk(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        yield words, command
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None
                yield from walk(f"{words} {name}".strip(), inner)

    context = click.Context(group)
    yield from walk("", group)


@pytest.mark.parametrize(
    ("text", "expected_ns"),
    [
        ("2026-11-23T04:00:00Z", NEWEST),
        ("2026-11-23T04:00", NEWEST),
        ("2026-11-23 04:00:00.25", NEWEST + SECOND // 4),
        ("2026-11-23T06:00:00+02:00", NEWEST),
        ("2026-11-23", (FOUR - 4 * 3600) * SECOND),
        ("1795406400", NEWEST),
        ("1795409235.9", 1_795_409_235_900_000_000),
        ("1795409235.123456789", 1_795_409_235_123_456_789),
        ("1970-01-01", 0),
        ("0", 0),
        ("90m", NEWEST - 5400 * SECOND),
        ("1.5h", NEWEST - 5400 * SECOND),
        ("24h", NEWEST - 86400 * SECOND),
        ("30d", NEWEST - 30 * 86400 * SECOND),
        ("2w", NEWEST - 14 * 86400 * SECOND),
        ("0.000000001s", NEWEST - 1),
        ("0s", NEWEST),
        ("99999999999d", 0),
    ],
)
def test_a_time_is_read_to_the_nanosecond(text: str, expected_ns: int) -> None:
    assert instant_ns("--since", text, NEWEST) == expected_ns


@pytest.mark.parametrize(
    "text", ["now", "", "-1", "-24h", "24hh", "1e400", "1e999999999", "nan", "inf", "2026-13-01", "9999-12-31"]
)
def test_what_is_no_time_is_refused_by_the_name_of_the_option(text: str) -> None:
    with pytest.raises(click.UsageError, match=f"--since {re.escape(repr(text))} "):
        instant_ns("--since", text, NEWEST)


@given(st.text(max_size=30))
def test_any_text_is_a_time_that_64_bits_hold_or_is_refused(text: str) -> None:
    try:
        at_ns = instant_ns("--until", text, NEWEST)
    except click.UsageError:
        return
    assert 0 <= at_ns < 2**63


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "-1", "86401", "x", "", "15 s", "-15s", "25h", "m", "10ms"])
def test_a_length_of_time_is_a_number_in_its_range(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Seconds(min=0, max=86400).convert(text, None, None)


def test_a_length_of_time_may_have_places() -> None:
    assert Seconds(min=0).convert("2.5", None, None) == 2.5


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("15s", 15), ("10m", 600), ("1h", 3600), ("1.5h", 5400), ("1d", 86400)]
)
def test_a_length_of_time_has_seconds_or_a_unit(text: str, seconds: float) -> None:
    assert Seconds(min=1).convert(text, None, None) == seconds


@pytest.mark.parametrize(
    ("since", "until", "expected"),
    [
        (None, None, None),
        ("1000", None, (1000 * SECOND, 5000 * SECOND)),
        (None, "4000", (2000 * SECOND, 4000 * SECOND)),
        ("3000", "4000", (3000 * SECOND, 4000 * SECOND)),
        ("1000s", "500s", (4000 * SECOND, 4500 * SECOND)),
        ("6000", None, (6000 * SECOND, 6000 * SECOND)),  # after everything: empty, no error
        (None, "1000", (1000 * SECOND, 1000 * SECOND)),  # before everything
    ],
)
def test_a_window_has_the_ledgers_own_ends_where_none_are_given(
    since: str | None, until: str | None, expected: tuple[int, int] | None
) -> None:
    assert window_of((2000 * SECOND, 5000 * SECOND), since, until) == expected


@pytest.mark.parametrize(("since", "until"), [("2000", "2000"), ("2001", "2000"), ("1h", "2h")])
def test_a_window_that_ends_before_it_starts_is_refused(since: str, until: str) -> None:
    with pytest.raises(click.UsageError, match="--until must be later than --since"):
        window_of((0, 9000 * SECOND), since, until)


def test_dimensions_are_parted_by_commas_and_named_once() -> None:
    assert dimensions_of("model, hour,model,") == ["model", "hour"]
    assert dimensions_of("") == []


def test_an_unknown_dimension_is_refused_with_those_that_are() -> None:
    with pytest.raises(click.UsageError, match="--by team: choose from model, replica, cluster, namespace, tenant, "):
        dimensions_of("model,team")


@pytest.mark.parametrize("words", [words for words, _ in commands()])
def test_every_command_has_a_page_with_one_example(words: str, kvtally: Call) -> None:
    ran = kvtally(*words.split(), "--help")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith(f"Usage: kvtally {words}".rstrip())
    if words:  # the first page names the command to begin with
        assert ran.out.count("Example:") == 1
        assert f"  kvtally {words}" in ran.out.partition("Example:")[2]
    else:
        assert "Begin with `kvtally demo`" in ran.out
    assert "\\b" not in ran.out


def test_every_option_says_what_it_does() -> None:
    silent = [
        f"{words} {parameter.opts[0]}"
        for words, command in commands()
        for parameter in command.params
        if isinstance(parameter, click.Option) and not (parameter.help or parameter.show_default)
    ]
    assert silent == []


@pytest.mark.parametrize("words", ["", "rates", "ledger"])
def test_a_group_called_alone_shows_its_page(words: str, kvtally: Call) -> None:
    assert kvtally(*words.split()) == kvtally(*words.split(), "-h")


def test_the_version_is_shown(kvtally: Call) -> None:
    assert kvtally("--version") == (0, f"kvtally, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("frobnicate", "kvtally: No such command 'frobnicate'. (see `kvtally --help`)"),
        ("rates frobnicate", "kvtally rates: No such command 'frobnicate'. (see `kvtally rates --help`)"),
        (
            "cost --by team",
            "kvtally cost: --by team: choose from model, replica, cluster, namespace, tenant, hour, day",
        ),
        (
            "cost --since yesterday",
            "kvtally cost: --since 'yesterday' is no time: give 2026-11-23T04:00Z, unix seconds",
        ),
        ("cost --since 9h --until 10h", "kvtally cost: --until must be later than --since (see `kvtally cost --help`)"),
        ("cost --frob", "kvtally cost: No such option"),
        ("cost --format xml", "kvtally cost: Invalid value for '--format': 'xml' is not one of"),
        ("record", "kvtally record: Missing argument 'DIR'. (see `kvtally record --help`)"),
        ("replay x --interval nan", "kvtally replay: Invalid value for '--interval': nan is no length of time"),
        ("record x --for inf", "kvtally record: Invalid value for '--for': inf is no length of time"),
        ("record x --for 0.5s", "kvtally record: Invalid value for '--for': 0.5 is not in the range x>=1."),
        (
            "record x --for long",
            "kvtally record: Invalid value for '--for': long is no length of time: give seconds, or 15s, 10m, 1h",
        ),
        ("rates add gpu 1", "kvtally rates add: Missing option '--from'. (see `kvtally rates add --help`)"),
        ("rates add gpu cheap --from 2026-01-01", "kvtally: price: 'cheap' is not a number: write it like 2.69"),
        ("rates add gpu 1 --from soon", 'kvtally: from: "soon" is no date: write 2026-01-01'),
        (
            "run --interval 0",
            "kvtally run: Invalid value for '--interval': 0.0 is not in the range 1<=x<=300.",
        ),
        ("run --interval nan", "kvtally run: Invalid value for '--interval': nan is no length of time"),
        ("record x --interval 301", "kvtally record: Invalid value for '--interval': 301.0 is not in the range"),
    ],
)
def test_a_wrong_call_is_one_line_and_status_2(line: str, told: str, kvtally: Call, demo_ledger: str) -> None:
    words = line.split()
    if words[0] == "cost":
        words += ["--ledger", demo_ledger]
    status, out, err = kvtally(*words)
    assert (status, out) == (2, "")
    assert err.startswith(told)
    assert err.count("\n") == 1


def test_a_wrong_config_is_one_line_that_names_the_key(kvtally: Call) -> None:
    Path("kvtally.toml").write_text("[scrape]\nintervall = 5\n", encoding="utf-8")
    status, out, err = kvtally("cost")
    assert (status, out) == (2, "")
    assert err.startswith("kvtally: kvtally.toml: scrape.intervall: unknown key")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("cost", "no ledger there (`kvtally run` or `kvtally replay` makes one)"),
        ("ledger info", "no ledger there (`kvtally run` or `kvtally replay` makes one)"),
        ("ledger settle", "no ledger there"),
        ("ledger prune", "no ledger there"),
        ("ledger audit", "no ledger there"),
        (
            "cost --ledger postgresql://db/x",
            "kvtally: postgresql: no ledger that this version can write (give a file as",
        ),
        ("rates list --ledger postgresql://db/x", "kvtally: postgresql: no ledger that this version can write"),
        ("rates add gpu 1 --from 2026-01-01 --ledger sqlite:////dev/null/x.db", "kvtally: /dev/null: "),
        ("replay nothing-there", "kvtally: nothing-there does not exist (a recording is a folder, or"),
        ("replay /dev/null", "kvtally: null is no recording"),
    ],
)
def test_what_cannot_be_reached_is_one_line_with_a_hint_and_status_3(line: str, told: str, kvtally: Call) -> None:
    status, out, err = kvtally(*line.split())
    assert (status, out) == (3, "")
    assert told in err
    assert re.fullmatch(r"kvtally: .+ \(.+\)\n", err)


WORDS = st.sampled_from(
    [
        *("--since", "--until", "--by", "--format", "--ledger", "--config", "--help", "--again", "--reason", "--prune"),
        *("--days", "--quiet", "--unit", "--sku", "--site", "--term", "--from", "--currency", "--committed", "--pue"),
        *("--source", "--note", "--interval", "model,hour", "day", "tenant", "json", "csv", "table", "gpu", "energy"),
        *("2.69", "0", "-1", "1e9", "1e-9", "24h", "2026-11-23", "2026-11-23T04:47:00Z", "1795409235.9", "nan", "EUR"),
        *("owned", "reserved", "kwh", "gpu-hour", "sqlite:///other.db", "sqlite:///", "", ".", "/dev/null", "--"),
    ]
)
PRINTED = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12)
CALLS = st.tuples(
    st.sampled_from(
        [
            *("cost", "cost --format table", "cost --by", "rates list", "rates add gpu", "rates add energy", "rates"),
            *(
                "rates import",
                "ledger info",
                "ledger settle",
                "ledger prune",
                "ledger audit",
                "ledger upgrade",
                "replay",
            ),
        ]
    ),
    st.lists(WORDS | PRINTED, max_size=5),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CALLS)
def test_any_call_ends_with_a_status_of_ours_and_at_most_one_line_of_complaint(
    kvtally: Call, demo_ledger: str, tmp_path: Path, asked: tuple[str, list[str]]
) -> None:
    words, more = asked
    if not (tmp_path / "copy.db").exists():
        os.environ["KVTALLY_LEDGER"] = copied(demo_ledger, tmp_path)
    status, out, err = kvtally(*words.split(), *more)
    assert status in {0, 1, 2, 3}
    assert "Traceback" not in out + err
    if status >= 2:
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("kvtally")


def test_a_name_that_the_terminal_cannot_show_is_escaped(demo_ledger: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    words = [sys.executable, "-m", "kvtally", "cost", "--by", "кириллица", "--ledger", demo_ledger]
    done = subprocess.run(words, capture_output=True, check=False, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith(rb"kvtally cost: --by \u043a\u0438")


@pytest.mark.parametrize("form", ["json", "csv", "table"])
def test_a_reader_that_has_gone_ends_a_command_quietly(form: str, demo_ledger: str) -> None:
    words = [sys.executable, "-m", "kvtally", "cost", "--format", form, "--ledger", demo_ledger]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def on_a_terminal(columns: int, *arguments: str) -> list[str]:
    """Lines of `kvtally ARGUMENTS` on a terminal of that width, without colours."""
    terminal, screen = pty.openpty()
    ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
    words = [sys.executable, "-m", "kvtally", *arguments]
    with subprocess.Popen(words, stdout=screen, stdin=screen, env=environment | {"TERM": "xterm"}) as process:
        os.close(screen)
        shown = b""
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            shown += part
    os.close(terminal)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).splitlines()


def test_a_terminal_gets_a_table_of_its_own_width(demo_ledger: str) -> None:
    lines = on_a_terminal(80, "cost", "--ledger", demo_ledger)
    assert any(line.startswith("all tokens  ") for line in lines)
    assert max(len(line) for line in lines) <= 80


def test_a_pipe_gets_json(kvtally: Call, demo_ledger: str) -> None:
    assert kvtally("cost", "--ledger", demo_ledger).out.startswith("{")
    assert kvtally("rates", "list").out.startswith("{")
    assert kvtally("ledger", "info", "--ledger", demo_ledger).out.startswith("{")


def test_the_first_page_names_every_command_without_loading_it(kvtally: Call) -> None:
    shown = re.findall(r"^  (\w+)  +\S", kvtally("--help").out.partition("Commands:")[2], re.MULTILINE)
    assert shown == list(COMMANDS)


def test_calling_in_this_process_is_what_a_shell_sees(demo_ledger: str) -> None:
    words = ["cost", "--ledger", demo_ledger]
    done = subprocess.run([sys.executable, "-m", "kvtally", *words], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr) == call(*words)
