from __future__ import annotations

import io
import sys
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest

from kvtally.agent.export.parquet import ParquetMissing, ParquetWriter, check_installed
from kvtally.agent.export.rows import Column

if TYPE_CHECKING:
    from collections.abc import Iterable

    from kvtally.agent.export.rows import Row

COLUMNS = (
    Column("name", "text"),
    Column("amount", "money"),
    Column("quantity", "number"),
    Column("tokens", "count"),
    Column("seconds", "real"),
    Column("at", "instant"),
    Column("is_settled", "flag"),
)
ROW: Row = ("a", 70_200_001, Decimal("0.333333333333333333"), 2**63 - 1, 0.1, 1_795_406_400_123_456_789, False)


def written(rows: Iterable[Row]) -> Any:
    parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `parquet`")
    out = io.BytesIO()
    writer = ParquetWriter(out, COLUMNS, {"focus_version": "1.2"})
    for row in rows:
        writer.write(row)
    writer.finish()
    return parquet.ParquetFile(io.BytesIO(out.getvalue()))


def test_columns_have_types_that_lose_nothing() -> None:
    file = written([ROW])
    assert {field.name: str(field.type) for field in file.schema_arrow} == {
        "name": "string",
        "amount": "decimal128(38, 9)",
        "quantity": "decimal128(38, 18)",
        "tokens": "int64",
        "seconds": "double",
        "at": "timestamp[us, tz=UTC]",
        "is_settled": "bool",
    }
    assert file.read().to_pylist() == [
        {
            "name": "a",
            "amount": Decimal("0.070200001"),
            "quantity": Decimal("0.333333333333333333"),
            "tokens": 2**63 - 1,
            "seconds": 0.1,
            "at": datetime(2026, 11, 23, 4, 0, 0, 123456, UTC),
            "is_settled": False,
        }
    ]


def test_what_is_unknown_is_null() -> None:
    (row,) = written([(None,) * len(COLUMNS)]).read().to_pylist()
    assert set(row.values()) == {None}


def test_the_file_says_what_it_is() -> None:
    assert written([]).schema_arrow.metadata[b"focus_version"] == b"1.2"


def test_a_file_without_rows_still_has_its_columns() -> None:
    file = written([])
    assert (file.metadata.num_rows, file.metadata.num_columns) == (0, 7)


def test_many_rows_come_in_groups_and_in_their_order() -> None:
    file = written((f"row {number}", number, None, number, None, None, None) for number in range(70_000))
    assert [file.metadata.row_group(at).num_rows for at in range(file.num_row_groups)] == [32_768, 32_768, 4_464]
    assert file.read(columns=["tokens"]).column("tokens").to_pylist() == list(range(70_000))


def test_an_amount_of_a_century_is_exact() -> None:
    nano = 123_456_789_012_345_678
    assert written([(None, nano, *[None] * 5)]).read().to_pylist()[0]["amount"] == Decimal("123456789.012345678")


def test_text_that_is_no_unicode_is_escaped() -> None:
    assert written([("\ud800", *[None] * 6)]).read().to_pylist()[0]["name"] == "\\ud800"


def test_without_pyarrow_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ParquetMissing, match=r"pip install 'kvtally\[parquet\]'"):
        check_installed()
    with pytest.raises(ParquetMissing):
        ParquetWriter(io.BytesIO(), COLUMNS)
