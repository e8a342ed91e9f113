"""Values as the server's text, so that what capture holds can be compared with what the server shows."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa

from deltaworks.schema import Column, TableSchema

Text = str | None
Row = dict[str, Text]

SESSION = (
    "set timezone to 'UTC'",
    "set datestyle to 'ISO, YMD'",
    "set intervalstyle to postgres",
    "set bytea_output to hex",
    "set lc_monetary to 'C'",
    "set extra_float_digits to 3",
)
"""The settings under which the server's text is compared."""

_QUOTED_IN_ARRAY = set('{},"\\ \t\n\r\v\f')
_APPROXIMATE = ("real", "double precision")


def row_texts(schema: TableSchema, values: Mapping[str, Any], names: Iterable[str] | None = None) -> Row:
    """A row of a change batch, given as Python values, as texts by column."""
    as_text = dict(values.get("_as_text") or ())
    return {
        name: as_text[name] if name in as_text else text_of(values.get(name), schema.column(name))
        for name in (schema.names if names is None else names)
    }


def text_of(value: Any, column: Column) -> Text:
    """One value as the server prints it."""
    return None if value is None else _printer(column.type, column.source_type)(value)


def is_same(expected: Any, actual: Text, source_type: str = "") -> bool:
    """Whether a value of a case file is the one that the text says."""
    if expected is None or actual is None:
        return expected is None and actual is None
    if isinstance(expected, Mapping):
        encoded = actual.encode()
        return len(actual) == expected["$len"] and hashlib.md5(encoded).hexdigest() == expected["$md5"]
    if isinstance(expected, bool):
        return actual == ("t" if expected else "f")
    if isinstance(expected, float) or source_type in _APPROXIMATE:
        return _as_float(str(expected)) == _as_float(actual)
    return str(expected) == actual


def _as_float(text: str) -> float | str:
    number = float(text)
    return "NaN" if number != number else number


def _printer(kind: pa.DataType, source_type: str) -> Callable[[Any], str]:
    if pa.types.is_boolean(kind):
        return lambda value: "t" if value else "f"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return lambda value: "\\x" + value.hex()
    if pa.types.is_decimal(kind):
        return _decimal
    if pa.types.is_timestamp(kind):
        return lambda value: _timestamp(value, is_instant=kind.tz is not None)
    if pa.types.is_date(kind):
        return date.isoformat
    if pa.types.is_floating(kind):
        return _float
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        delimiter = ";" if source_type.startswith("box") else ","
        return lambda value: _array(value, _printer(kind.value_type, source_type.removesuffix("[]")), delimiter)
    return str


def _decimal(value: Decimal) -> str:
    return f"{value:f}"


def _float(value: float) -> str:
    return {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(str(value), repr(value))


def _timestamp(value: datetime, *, is_instant: bool) -> str:
    whole = value.replace(microsecond=0, tzinfo=None).isoformat(sep=" ")
    fraction = f".{value.microsecond:06d}".rstrip("0") if value.microsecond else ""
    return whole + fraction + ("+00" if is_instant else "")


def _array(values: Sequence[Any], printer: Callable[[Any], str], delimiter: str) -> str:
    return "{" + delimiter.join("NULL" if value is None else _element(printer(value)) for value in values) + "}"


def _element(text: str) -> str:
    if text and text.upper() != "NULL" and not _QUOTED_IN_ARRAY & set(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
