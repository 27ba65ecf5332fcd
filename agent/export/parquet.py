"""Rows as Parquet (pyarrow, the extra `parquet`): exact decimals, instants in UTC, a row group at a time."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import IO, TYPE_CHECKING, Any

from kvtally.agent.export.rows import PLACES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtally.agent.export.rows import Column, Kind, Row, Value

_BATCH_ROWS = 2048  # as values of Python
_GROUP_ROWS = 32_768  # as columns of Arrow, which are some twenty times smaller
_DIGITS = 38  # of Arrow's 128-bit decimals
_MONEY_PLACES = 9


class ParquetMissing(Exception):  # noqa: N818  # it names the condition
    """Pyarrow is not installed; the message says what to type."""

    def __init__(self) -> None:
        super().__init__("Parquet needs pyarrow: pip install 'kvtally[parquet]'")


def check_installed() -> None:
    """ParquetMissing where pyarrow is not installed."""
    try:
        import pyarrow.parquet  # noqa: F401, PLC0415  # an extra, and 60 ms and 50 MB: only where it is asked for
    except ImportError:
        raise ParquetMissing from None


class ParquetWriter:
    """Writes rows of some columns into a file; `about` is kept as the file's own metadata. ParquetMissing."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column], about: dict[str, str] | None = None) -> None:
        check_installed()
        import pyarrow as pa  # noqa: PLC0415  # as above
        import pyarrow.parquet as pq  # noqa: PLC0415  # as above

        self._pa = pa
        self._kinds = [column.kind for column in columns]
        fields = [pa.field(column.name, _type(pa, column.kind)) for column in columns]
        self._schema = pa.schema(fields, metadata=about)
        self._file = pq.ParquetWriter(file, self._schema, compression="zstd")
        self._rows: list[Row] = []
        self._batches: list[Any] = []

    def write(self, row: Row) -> None:
        """Take one row; a row group is written when it is full."""
        self._rows.append(row)
        if len(self._rows) >= _BATCH_ROWS:
            self._pack()
            if len(self._batches) * _BATCH_ROWS >= _GROUP_ROWS:
                self._write_group()

    def finish(self) -> None:
        """Write what is held, and the end of the file."""
        if self._rows:
            self._pack()
        if self._batches:
            self._write_group()
        self._file.close()

    def _pack(self) -> None:
        columns = [
            self._pa.array([_plain(kind, value) for value in values], type=field.type)
            for kind, field, values in zip(self._kinds, self._schema, zip(*self._rows, strict=True), strict=True)
        ]
        self._batches.append(self._pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._rows.clear()

    def _write_group(self) -> None:
        self._file.write_table(self._pa.Table.from_batches(self._batches), row_group_size=_GROUP_ROWS)
        self._batches.clear()


def _type(pa: Any, kind: Kind) -> Any:
    types = {
        "text": pa.string(),
        "money": pa.decimal128(_DIGITS, _MONEY_PLACES),
        "number": pa.decimal128(_DIGITS, PLACES),
        "count": pa.int64(),
        "real": pa.float64(),
        "instant": pa.timestamp("us", tz="UTC"),
        "flag": pa.bool_(),
    }
    return types[kind]


def _plain(kind: Kind, value: Value) -> Any:
    """A value as Arrow takes it: money as its decimal, an instant in microseconds, text as UTF-8 can hold it."""
    if value is None:
        return None
    if kind == "money":
        with localcontext() as context:
            context.prec = _DIGITS
            return Decimal(int(value)).scaleb(-_MONEY_PLACES)
    if kind == "instant":
        return int(value) // 1000
    if kind == "text":
        return str(value).encode("utf-8", "backslashreplace").decode()
    return bool(value) if kind == "flag" else value
