from __future__ import annotations

import csv
import io
import os
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest

from kvtally.agent.export.rows import Column, CsvWriter, Kind, Value, csv_text, number, opened, second_text

if TYPE_CHECKING:
    from pathlib import Path

TWO = (Column("name", "text"), Column("amount", "money"))


def test_lines_end_and_fields_are_quoted_as_rfc_4180_says() -> None:
    out = io.BytesIO()
    writer = CsvWriter(out, TWO)
    for row in (('a "big", one', 1), ("two\nlines", None), (None, -70_200_000), ("Größe 模型", 0)):
        writer.write(row)
    writer.finish()
    assert out.getvalue().decode() == (
        'name,amount\r\n"a ""big"", one",0.000000001\r\n"two\nlines",\r\n,-0.070200000\r\nGröße 模型,0.000000000\r\n'
    )
    told = list(csv.reader(io.StringIO(out.getvalue().decode(), newline="")))
    assert told[1] == ['a "big", one', "0.000000001"]


def test_text_that_is_no_unicode_is_escaped_and_not_lost() -> None:
    out = io.BytesIO()
    CsvWriter(out, TWO).write(("\ud800", 0))
    assert out.getvalue().endswith(b"\\ud800,0.000000000\r\n")


def test_a_row_with_a_field_too_few_is_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        CsvWriter(io.BytesIO(), TWO).write(("a",))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        ("text", None, ""),
        ("money", None, ""),
        ("money", 10**18 + 1, "1000000000.000000001"),
        ("number", Decimal("0.500000000000000000"), "0.5"),
        ("number", Decimal("100.000"), "100"),
        ("number", Decimal(100), "100"),
        ("number", Decimal("1E-18"), "0.000000000000000001"),
        ("number", Decimal(0), "0"),
        ("count", 2**63 - 1, "9223372036854775807"),
        ("count", 0, "0"),
        ("real", 0.5, "0.5"),
        ("flag", True, "true"),
        ("flag", False, "false"),
        ("flag", None, ""),
        ("instant", 1_795_406_400_000_000_000, "2026-11-23T04:00:00Z"),
    ],
)
def test_a_field_is_exact_and_what_is_unknown_is_empty(kind: Kind, value: Value, text: str) -> None:
    assert csv_text(kind, value) == text


def test_a_part_of_a_second_is_cut_off() -> None:
    assert second_text(1_795_406_400_999_999_999) == "2026-11-23T04:00:00Z"


@pytest.mark.parametrize(
    ("exact", "text"),
    [
        (Fraction(1, 3), "0.333333333333333333"),
        (Fraction(2, 3), "0.666666666666666667"),
        (Fraction(-2, 3), "-0.666666666666666667"),
        (Fraction(2**62, 3), "1537228672809129301.333333333333333333"),
        (Fraction(5), "5.000000000000000000"),
        (Fraction(1, 2 * 10**18), "0.000000000000000000"),  # half to even
        (Fraction(3, 2 * 10**18), "0.000000000000000002"),
    ],
)
def test_a_quantity_has_eighteen_places_however_large_it_is(exact: Fraction, text: str) -> None:
    assert f"{number(exact):f}" == text


def test_a_file_is_there_when_all_of_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    with opened(str(path)) as file:
        file.write(b"half")
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert [one.name for one in tmp_path.iterdir()] == ["out.csv"]


def test_what_fails_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    path.write_bytes(b"yesterday")
    with pytest.raises(ValueError, match="longer"), opened(str(path)) as file:
        CsvWriter(file, TWO).write(("a", 1, "unexpected"))
    assert path.read_bytes() == b"yesterday"
    assert [one.name for one in tmp_path.iterdir()] == ["out.csv"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), opened(str(tmp_path / "nowhere" / "out.csv")):
        pass


def test_without_a_path_it_is_standard_output(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    with opened(None) as file:
        file.write(b"a\r\n")
    assert capfdbinary.readouterr().out == b"a\r\n"


def test_a_pipe_is_written_to_and_a_link_leads_to_its_file(tmp_path: Path) -> None:
    pipe, target, link = tmp_path / "pipe", tmp_path / "target.csv", tmp_path / "link.csv"
    os.mkfifo(pipe)
    link.symlink_to(target)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with opened(str(pipe)) as file:
            file.write(b"rows")
        assert os.read(reader, 10) == b"rows"
    finally:
        os.close(reader)
    with opened(str(link)) as file:
        file.write(b"rows")
    assert (target.read_bytes(), link.is_symlink(), pipe.is_fifo()) == (b"rows", True, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link.csv", "pipe", "target.csv"]
