"""Rows from the server's texts, column by column, with what a column cannot hold beside them."""

from collections.abc import Iterable, Mapping, Sequence

import pyarrow as pa

from deltaworks.capture.postgres.types import Held, to_arrow
from deltaworks.schema import AS_TEXT, TableSchema


def read_rows(schema: TableSchema, columns: Sequence[Sequence[bytes | None]]) -> pa.RecordBatch:
    """Rows as `schema.row_schema()` has them, from the server's texts column by column."""
    held = [to_arrow(texts, column.type) for column, texts in zip(schema.columns, columns, strict=True)]
    as_text = gather_texts(zip(schema.names, held, strict=True), row_count=len(held[0].array))
    return pa.RecordBatch.from_arrays([as_text, *(column.array for column in held)], schema=schema.row_schema())


def gather_texts(columns: Iterable[tuple[str, Held]], *, row_count: int) -> pa.Array:
    """The `_as_text` of rows whose columns were read."""
    rows: dict[int, dict[str, str]] = {}
    for name, held in columns:
        for row, text in held.texts.items():
            rows.setdefault(row, {})[name] = text
    return _sparse(rows, row_count, AS_TEXT.type)


def _sparse(values: Mapping[int, object], count: int, kind: pa.DataType) -> pa.Array:
    return pa.array([values.get(row) for row in range(count)], kind) if values else pa.nulls(count, kind)
