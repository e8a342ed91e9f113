"""Values that their Arrow column cannot hold, on their way into the lake: `_as_text` becomes columns.

| value                                             | in the lake                                         |
|---------------------------------------------------|-----------------------------------------------------|
| infinite date or time, a year outside of 1 to 9999 | the column itself: DuckDB's range is wider          |
| any other (NaN in a decimal, an array of two dimensions) | null, and its text in the column `_as_text_<column>` |

A text column is there once a value needed it. It is a column like any other after that: sent or not sent
together with the one it stands for, compared, and part of the key where that one is.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from deltaworks.change import OLD_KEY
from deltaworks.schema import AS_TEXT, Column, TableSchema, texts_by_column

PREFIX = AS_TEXT.name + "_"
"""What stands before a column's name in the name of its text column."""

TEXT_TYPE = "_as_text"
"""The source type of a text column: no source has it."""

Texts = Mapping[str, Mapping[int, str]]
"""The texts by column and row."""

_MOMENT = re.compile(r"(\d{4,})-(\d\d)-(\d\d)(?: (\d\d):(\d\d):(\d\d)(?:\.(\d{1,6}))?(?:\+00)?)?( BC)?")
_DAY_US = 86_400_000_000


def text_columns(connection: duckdb.DuckDBPyConnection, target: str, schema: TableSchema) -> frozenset[str]:
    """The columns of `schema` that have a text column in the table `target` (quoted)."""
    present = {str(row[0]) for row in connection.execute(f"describe {target}").fetchall()}
    return frozenset(name for name in schema.names if PREFIX + name in present - set(schema.names))


def widened(schema: TableSchema, names: Collection[str]) -> TableSchema:
    """The schema with the text columns of these columns behind its own, in its key too."""
    texts = tuple(
        Column(name=PREFIX + name, type=pa.string(), source_type=TEXT_TYPE) for name in schema.names if name in names
    )
    key = (*schema.key, *(PREFIX + name for name in schema.key if name in names))
    return replace(schema, columns=(*schema.columns, *texts), key=key) if texts else schema


def has_texts(schema: TableSchema) -> bool:
    """Whether the key of a widened schema has text columns, so that its parts may be null."""
    return any(PREFIX + name in schema.key for name in schema.key)


def spread(schema: TableSchema, rows: pa.Table, *, present: Collection[str] = ()) -> tuple[TableSchema, pa.Table]:
    """Rows or changes with their `_as_text` spread over columns, and the schema that has those.

    `present` are the columns that have a text column anyway.
    """
    texts: dict[str, Mapping[int, str]] = dict(texts_by_column(rows))
    for column in schema.columns:
        for name in (column.name, OLD_KEY + column.name):
            if name in texts and _is_moment(column.type):
                rows, texts[name] = _with_moments(rows, name, column, texts[name])
    named = {*present, *(name.removeprefix(OLD_KEY) for name, of_rows in texts.items() if of_rows)}
    wide = widened(schema, named)
    for name in wide.names[len(schema.names) :]:
        rows = rows.append_column(name, _text_array(texts.get(name.removeprefix(PREFIX), {}), rows.num_rows))
    if len(wide.key) > len(schema.key) and "_old_key" in rows.column_names:
        rows = _with_old_key(rows, {name: texts.get(OLD_KEY + name, {}) for name in schema.key if name in named})
    return wide, rows


def texts_needed(schema: TableSchema, rows: pa.Table) -> frozenset[str]:
    """The columns that `spread` gives these rows a text column for."""
    wide, _ = spread(schema, rows)
    return frozenset(name.removeprefix(PREFIX) for name in wide.names[len(schema.names) :])


def moment_value(text: str, kind: pa.DataType) -> int | None:
    """A date or time as DuckDB stores it, from PostgreSQL's text; `None` where DuckDB has no such value.

    >>> moment_value("infinity", pa.date32()), moment_value("0001-12-31 BC", pa.date32())
    (2147483647, -719163)
    >>> moment_value("294276-12-31 23:59:59.999999", pa.timestamp("us")) is None
    True
    """
    largest = 2**31 - 1 if pa.types.is_date(kind) else 2**63 - 1
    if text in {"infinity", "-infinity"}:
        return largest if text == "infinity" else -largest
    match = _MOMENT.fullmatch(text)
    if match is None:
        return None
    year, month, day, hour, minute, second = (int(part or 0) for part in match.groups()[:6])
    # There is no year 0: the year before 1 is 1 BC.
    days = _days_since_1970(1 - year if match[8] else year, month, day)
    if pa.types.is_date(kind):
        return days
    within = ((hour * 60 + minute) * 60 + second) * 1_000_000 + int((match[7] or "").ljust(6, "0"))
    value = days * _DAY_US + within
    return value if abs(value) < largest else None


def _days_since_1970(year: int, month: int, day: int) -> int:
    """Days in the Gregorian calendar, drawn out over all years: 400 of them have 146,097 days."""
    cycles = (year - 2000) // 400
    first = np.datetime64(f"{year - 400 * cycles:04d}-{month:02d}-{day:02d}", "D")
    return int(first.astype(np.int64)) + cycles * 146_097


def _is_moment(kind: pa.DataType) -> bool:
    return bool(pa.types.is_date32(kind) or pa.types.is_timestamp(kind))


def _with_moments(
    rows: pa.Table, name: str, column: Column, texts: Mapping[int, str]
) -> tuple[pa.Table, Mapping[int, str]]:
    """The rows with those moments in their column that DuckDB can hold, and the other texts."""
    values = {row: value for row, text in texts.items() if (value := moment_value(text, column.type)) is not None}
    rest = {row: text for row, text in texts.items() if row not in values}
    if name == column.name:
        place = rows.column_names.index(name)
        return rows.set_column(place, name, _filled(rows[name].combine_chunks(), values)), rest
    old_key = rows["_old_key"].combine_chunks()
    parts = dict(zip((field.name for field in old_key.type), old_key.flatten(), strict=True))
    parts[column.name] = _filled(parts[column.name], values)
    return _replace_old_key(rows, old_key, parts), rest


def _filled(array: pa.Array, values: Mapping[int, int]) -> pa.Array:
    """The array with these raw values in their places."""
    width = pa.int32() if pa.types.is_date32(array.type) else pa.int64()
    gone = array.is_null().to_numpy(zero_copy_only=False).copy()
    raw = array.view(width).fill_null(0).to_numpy(zero_copy_only=False).copy()
    for row, value in values.items():
        raw[row], gone[row] = value, False
    return pa.array(raw, width, mask=gone).view(array.type)


def _with_old_key(rows: pa.Table, texts: Texts) -> pa.Table:
    """The changes with the text columns of the key in `_old_key` too."""
    old_key = rows["_old_key"].combine_chunks()
    parts = dict(zip((field.name for field in old_key.type), old_key.flatten(), strict=True))
    for name, of_rows in texts.items():
        parts[PREFIX + name] = _text_array(of_rows, rows.num_rows)
    return _replace_old_key(rows, old_key, parts)


def _replace_old_key(rows: pa.Table, old_key: pa.StructArray, parts: Mapping[str, pa.Array]) -> pa.Table:
    place = rows.column_names.index("_old_key")
    array = pa.StructArray.from_arrays(list(parts.values()), names=list(parts), mask=old_key.is_null())
    return rows.set_column(place, "_old_key", array)


def _text_array(texts: Mapping[int, str], count: int) -> pa.Array:
    values: Iterable[Any] = (texts.get(row) for row in range(count)) if texts else ()
    return pa.array(list(values), pa.string()) if texts else pa.nulls(count, pa.string())
