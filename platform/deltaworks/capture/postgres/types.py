"""PostgreSQL's text form of a value, as Arrow.

The dump and the log both arrive as the server's own text output under the same session settings,
and both go through `to_arrow`. So the value of a dump is the value of the log by construction.

| PostgreSQL                              | Arrow                                                   |
|-----------------------------------------|---------------------------------------------------------|
| boolean                                 | bool                                                    |
| smallint, integer, bigint, oid          | int16, int32, int64, uint32                             |
| real, double precision                  | float32, float64                                        |
| numeric(p, s) up to 38 digits           | decimal128(p, s), exact                                 |
| numeric without bounds, or wider        | utf8, exact                                             |
| date, timestamp, timestamptz            | date32, timestamp(us), timestamp(us, UTC)               |
| bytea                                   | binary                                                  |
| one-dimensional arrays of all of these  | list                                                    |
| everything else (uuid, json, enums, …)  | utf8, as the server prints it                           |

Column.source_type keeps the server's own name of the type. A value that its Arrow type cannot hold (NaN in
numeric(p, s), infinite dates, years outside of 1 to 9999, arrays of more dimensions or another lower bound)
is null there and stands as the server's text in the row's `_as_text`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

SESSION_OPTIONS = (
    "-c TimeZone=UTC -c DateStyle=ISO,YMD -c IntervalStyle=postgres -c bytea_output=hex "
    "-c extra_float_digits=3 -c lc_monetary=C -c xmlbinary=base64 -c client_encoding=UTF8"
)
"""Settings under which the server prints values; the same for the dump and for the log."""

_SIMPLE: dict[str, pa.DataType] = {
    "bool": pa.bool_(),
    "int2": pa.int16(),
    "int4": pa.int32(),
    "int8": pa.int64(),
    "oid": pa.uint32(),
    "float4": pa.float32(),
    "float8": pa.float64(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "timestamptz": pa.timestamp("us", "UTC"),
    "bytea": pa.binary(),
}

_MAX_DECIMAL_DIGITS = 38
_ARRAY_ELEMENT = re.compile(r'"((?:[^"\\]|\\.)*)"|([^,{}"\\]+)', re.DOTALL)
_PLAIN_ARRAY = r'^\{[^{}"\\]*\}$'
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)

Text = bytes | str
"""A value as the server prints it; elements of arrays come as `str`."""

Reader = Callable[[pa.Array, pa.DataType], pa.Array]
"""Reads texts as a type; raises `ValueError` or `ArrowInvalid` where one of them does not read so."""


class Held(NamedTuple):
    """A column as Arrow holds it, and the text of the values it cannot hold, by row; those are null in `array`."""

    array: pa.Array
    texts: Mapping[int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeFacts:
    """What the catalog says of a column's type, with domains already replaced by what they stand for.

    `base` is the name in pg_type in schema pg_catalog, or `None` for a type of any other schema.
    """

    source_type: str
    base: str | None
    modifier: int
    is_array: bool = False


def arrow_type(facts: TypeFacts) -> pa.DataType:
    """The Arrow type that holds every ordinary value of this type exactly.

    >>> arrow_type(TypeFacts(source_type="numeric(10,2)", base="numeric", modifier=655366))
    Decimal128Type(decimal128(10, 2))
    """
    element = _decimal(facts.modifier) if facts.base == "numeric" else _SIMPLE.get(facts.base or "", pa.string())
    return pa.list_(element) if facts.is_array else element


def to_arrow(values: Sequence[Text | None] | pa.Array, kind: pa.DataType) -> Held:
    """Read a column of texts as the server prints them: every value is held exactly, or its text is.

    `values` may be an Arrow array of utf8 or binary.
    """
    texts, not_utf8 = _strings(values)
    read = _READERS.get(kind.id, _cast)
    try:
        array = read(texts, kind)
    except (pa.ArrowInvalid, ValueError):
        unheld = _unheld(texts, kind, read)
        array = read(_without(texts, unheld), kind)
        not_utf8 |= {row: texts[row].as_py() for row in unheld}
    return Held(array, not_utf8)


def _decimal(modifier: int) -> pa.DataType:
    if modifier < 4:
        return pa.string()
    # numeric.c: precision in the upper half, scale as 11 bits with sign, both moved by VARHDRSZ.
    precision = (modifier - 4) >> 16 & 0xFFFF
    scale = ((modifier - 4 & 0x7FF) ^ 1024) - 1024
    # numeric(3,-2) has five digits before the point, numeric(3,5) five behind it.
    digits = max(precision, scale) if scale >= 0 else precision - scale
    return pa.decimal128(digits, max(scale, 0)) if digits <= _MAX_DECIMAL_DIGITS else pa.string()


def _strings(values: Sequence[Text | None] | pa.Array) -> tuple[pa.Array, dict[int, str]]:
    """The texts, and as the hexadecimal digits of its bytes each one that is not UTF-8."""
    if isinstance(values, pa.Array) and pa.types.is_string(values.type):
        return values, {}
    try:
        return pa.array(values, pa.binary()).cast(pa.string()), {}
    except pa.ArrowInvalid:
        # Only a server without an encoding (SQL_ASCII) sends what is not UTF-8.
        pass
    texts: list[str | None] = []
    not_utf8: dict[int, str] = {}
    for row, value in enumerate(pa.array(values, pa.binary()).to_pylist()):
        try:
            texts.append(None if value is None else value.decode())
        except UnicodeDecodeError:
            texts.append(None)
            not_utf8[row] = "\\x" + value.hex()
    return pa.array(texts, pa.string()), not_utf8


def _unheld(texts: pa.Array, kind: pa.DataType, read: Reader) -> list[int]:
    """The rows whose text does not read as this type."""
    ordinary = _ORDINARY.get(kind.id)
    if ordinary is not None:
        # Nearly always the others are special in their look, so that no row needs a try of its own.
        odd: list[int] = pc.indices_nonzero(pc.invert(pc.match_substring_regex(texts, ordinary))).to_pylist()
        if _reads(_without(texts, odd), kind, read):
            return odd
    return [row for row in range(len(texts)) if not _reads(texts.slice(row, 1), kind, read)]


def _reads(texts: pa.Array, kind: pa.DataType, read: Reader) -> bool:
    try:
        read(texts, kind)
    except (pa.ArrowInvalid, ValueError):
        return False
    return True


def _without(texts: pa.Array, rows: Sequence[int]) -> pa.Array:
    """The texts with null in these rows."""
    gone = np.zeros(len(texts), dtype=bool)
    gone[rows] = True
    return pc.if_else(pa.array(gone), pa.scalar(None, pa.string()), texts)


def _same(texts: pa.Array, _kind: pa.DataType) -> pa.Array:
    return texts


def _cast(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    return texts.cast(kind)


def _booleans(texts: pa.Array, _kind: pa.DataType) -> pa.Array:
    if not pc.all(pc.is_in(texts, pa.array(["t", "f", None])), min_count=0).as_py():
        raise ValueError("not a boolean")
    return pc.equal(texts, "t")


def _binaries(texts: pa.Array, _kind: pa.DataType) -> pa.Array:
    r"""Bytes out of their hexadecimal digits: bytea_output=hex prints `\x` and two digits for each."""
    # A null may have bytes behind it in Arrow; it must have none here.
    plain = pa.concat_arrays([texts.fill_null("")])
    _validity, offsets, data = plain.buffers()
    starts = np.frombuffer(offsets, np.int32, len(plain) + 1, 4 * plain.offset)
    digits = np.frombuffer(data, np.uint8)[starts[0] : starts[-1]] if data is not None else np.empty(0, np.uint8)
    starts = starts - starts[0]
    present = texts.is_valid().to_numpy(zero_copy_only=False)
    first = starts[:-1][present]
    if first.size and (np.diff(starts)[present].min() < 2 or not _begin_with(digits, first, rb"\x")):
        raise ValueError("not bytes in hexadecimal digits")
    keep = np.ones(len(digits), dtype=bool)
    keep[first] = keep[first + 1] = False
    bodies = np.zeros(len(starts), np.int32)
    np.cumsum(np.where(present, np.diff(starts) - 2, 0), out=bodies[1:])
    halves = _DIGIT[digits[keep]]
    if (bodies % 2).any() or (halves > 15).any():
        raise ValueError("not bytes in hexadecimal digits")
    values = halves[0::2] << 4 | halves[1::2]
    mask = pa.array(~present)
    validity = pc.invert(mask).buffers()[1]
    return pa.Array.from_buffers(
        pa.binary(), len(texts), [validity, pa.py_buffer(bodies // 2), pa.py_buffer(values.tobytes())]
    )


def _begin_with(data: np.ndarray, places: np.ndarray, prefix: bytes) -> bool:
    return all(bool((data[places + at] == byte).all()) for at, byte in enumerate(prefix))


def _lists(texts: pa.Array, kind: pa.DataType) -> pa.Array:
    split = _split(texts) or _parsed(texts)
    elements = to_arrow(split.values, kind.value_type)
    if elements.texts:
        raise ValueError("an element is not held")
    return pa.ListArray.from_arrays(split.offsets, elements.array, mask=texts.is_null())


def _split(texts: pa.Array) -> pa.Array | None:
    """The elements of arrays of which none is quoted, whole columns at once; `None` where that may not do."""
    if not pc.all(pc.match_substring_regex(texts, _PLAIN_ARRAY), min_count=0).as_py():
        return None
    inside = pc.if_else(pc.equal(texts, "{}"), None, pc.utf8_slice_codeunits(texts, 1, -1))
    split = pc.split_pattern(inside, ",")
    values = pc.if_else(pc.equal(split.values, "NULL"), None, split.values)
    return pa.ListArray.from_arrays(split.offsets, values)


def _parsed(texts: pa.Array) -> pa.Array:
    lists = [() if text is None else parse_array(text) for text in texts.to_pylist()]
    offsets = list(accumulate((len(items) for items in lists), initial=0))
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array([item for items in lists for item in items], pa.string())
    )


def parse_array(text: str) -> list[str | None]:
    r"""The elements of a one-dimensional array as PostgreSQL prints it.

    >>> parse_array('{a,"b \\"c\\"",NULL,"NULL",""}')
    ['a', 'b "c"', None, 'NULL', '']

    Raises:
        ValueError: it has more dimensions, or does not start at 1: a list cannot say so.
    """
    if text == "{}":
        return []
    if text[:1] != "{" or text[-1:] != "}":
        raise ValueError("not an array that starts at 1")
    inside = text[1:-1]
    if '"' not in inside and "{" not in inside and "\\" not in inside:
        return [None if item == "NULL" else item for item in inside.split(",")]
    items: list[str | None] = []
    at = 0
    while True:
        match = _ARRAY_ELEMENT.match(inside, at)
        if match is None:
            raise ValueError("more than one dimension")
        quoted, bare = match.groups()
        if quoted is not None:
            items.append(_ESCAPED.sub(r"\1", quoted))
        else:
            items.append(None if bare == "NULL" else bare)
        at = match.end()
        if at == len(inside):
            return items
        if inside[at] != ",":
            raise ValueError("no comma after an element")
        at += 1


_READERS: Mapping[int, Reader] = {
    pa.string().id: _same,
    pa.bool_().id: _booleans,
    pa.binary().id: _binaries,
    pa.list_(pa.null()).id: _lists,
}

_DATE = r"^\d{4}-\d\d-\d\d"
_DIGIT = np.full(256, 16, np.uint8)
"""The value of a hexadecimal digit by its byte, 16 for what is none."""
_DIGIT[list(b"0123456789abcdef")] = range(16)
_DIGIT[list(b"ABCDEF")] = range(10, 16)

_ORDINARY: Mapping[int, str] = {
    pa.date32().id: _DATE + "$",
    pa.timestamp("us").id: _DATE + r" [0-9:.]+(\+00)?$",
    pa.decimal128(1).id: r"^-?[0-9.]+$",
}
"""How texts look that Arrow holds, of types that have others too."""
