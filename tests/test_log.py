from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtally.agent.log import Log

if TYPE_CHECKING:
    from kvtally.agent.log import Level

AT = 1_795_406_400.9  # 2026-11-23T04:00:00.9Z


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = AT

    def __call__(self) -> float:
        return self.now


def test_a_line_of_text_has_its_time_level_message_and_fields() -> None:
    lines: list[str] = []
    Log(write=lines.append, clock=Clock()).line("info", "scraped", engines=2, took_seconds=0.012345, note="a b")
    assert lines == ['2026-11-23T04:00:00Z info    scraped engines=2 took_seconds=0.01235 note="a b"\n']


def test_a_line_of_json_is_an_object_of_the_same() -> None:
    lines: list[str] = []
    Log("json", write=lines.append, clock=Clock()).line("warning", "slow\nline", engines=2, took_seconds=0.5)
    assert [json.loads(line) for line in lines] == [
        {"time": "2026-11-23T04:00:00Z", "level": "warning", "message": "slow\nline", "engines": 2, "took_seconds": 0.5}
    ]
    assert lines[0].count("\n") == 1


def test_fields_that_nobody_knows_are_left_out() -> None:
    lines: list[str] = []
    for form in ("text", "json"):
        Log(form, write=lines.append, clock=Clock()).line("info", "x", known=0, unknown=None)
    assert lines[0].endswith(" x known=0\n")
    assert "unknown" not in lines[1]


def test_a_value_that_json_does_not_know_is_text() -> None:
    lines: list[str] = []
    Log("json", write=lines.append, clock=Clock()).line("info", "x", error=ValueError("no"))
    assert json.loads(lines[0])["error"] == "no"


@pytest.mark.parametrize(
    ("least", "written"),
    [
        ("debug", ["debug", "info", "warning", "error"]),
        ("info", ["info", "warning", "error"]),
        ("warning", ["warning", "error"]),
        ("error", ["error"]),
    ],
)
def test_what_is_less_than_asked_for_is_not_written(least: Level, written: list[str]) -> None:
    lines: list[str] = []
    log = Log(least=least, write=lines.append, clock=Clock())
    levels: tuple[Level, ...] = ("debug", "info", "warning", "error")
    for level in levels:
        log.line(level, "x")
        log.complain(level, f"complaint of {level}")
    assert [line.split()[1] for line in lines] == [level for level in written for _ in range(2)]


@given(st.text(), st.text())
def test_whatever_is_said_stays_on_one_line_and_a_value_can_be_told_from_the_next(message: str, value: str) -> None:
    lines: list[str] = []
    Log(write=lines.append, clock=Clock()).line("info", message, field=value, last=1)
    (line,) = lines
    assert "\n" not in line[:-1]
    assert "\r" not in line
    found = re.search(r' field=("(?:[^"\\]|\\.)*"|[^ "=]+) last=1\n\Z', line, re.DOTALL)
    assert found is not None
    assert (json.loads(found[1]) if found[1].startswith('"') else found[1]) == value


def test_the_same_complaint_is_made_once_a_minute() -> None:
    lines: list[str] = []
    clock = Clock()
    log = Log(write=lines.append, clock=clock)
    for second in range(125):
        clock.now = AT + second
        log.complain("warning", "the page is gone", target="a")
    assert [line[17:19] for line in lines] == ["00", "00", "00"]  # at 0, 60 and 120 s
    log.complain("warning", "another page is gone")
    assert len(lines) == 4


def test_a_clock_that_goes_back_does_not_silence_a_complaint_for_long() -> None:
    lines: list[str] = []
    clock = Clock()
    log = Log(write=lines.append, clock=clock)
    log.complain("warning", "gone")
    clock.now -= 86_400
    log.complain("warning", "gone")
    assert len(lines) == 2


def test_what_was_complained_of_is_not_remembered_without_bound() -> None:
    lines: list[str] = []
    log = Log(write=lines.append, clock=Clock())
    for number in range(3000):
        log.complain("warning", f"complaint {number}")
    assert len(lines) == 3000
    assert len(log._said) == 1000
    log.complain("warning", "complaint 2999")
    assert len(lines) == 3000
    log.complain("warning", "complaint 0")
    assert len(lines) == 3001


def test_lines_go_to_standard_error_by_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    Log().line("error", "x")
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ error   x\n", shown.err)
