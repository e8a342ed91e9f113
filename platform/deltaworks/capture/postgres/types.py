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

Column.source_type keeps the server's own name of the type.
"""

import re
from binascii import unhexlify
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.errors import InvariantError

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
_ESCAPED = re.compile(r"\\(.)", re.DOTALL)

Text = bytes | str
"""A value as the server prints it; elements of arrays come as `str`."""


class UnheldValueError(Exception):
    """Arrow cannot hold the value at `index`; the caller adds table, column and position.

    It never leaves this package, and never carries the value: messages hold no row data.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index
        self.reason = reason


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


def to_arrow(values: Sequence[Text | None], kind: pa.DataType) -> pa.Array:
    """Read a column of texts as the server prints them.

    Raises:
        UnheldValueError: Arrow cannot hold one of them, e.g. an infinite date; never a wrong value.
    """
    read = _reader(kind)
    try:
        return read(values, kind)
    except (pa.ArrowInvalid, ValueError, UnheldValueError):
        # An element of an array knows its place in the array only, so the row is looked for here too.
        raise _first_unheld(values, kind, read) from None


def _decimal(modifier: int) -> pa.DataType:
    if modifier < 4:
        return pa.string()
    # numeric.c: precision in the upper half, scale as 11 bits with sign, both moved by VARHDRSZ.
    precision = (modifier - 4) >> 16 & 0xFFFF
    scale = ((modifier - 4 & 0x7FF) ^ 1024) - 1024
    # numeric(3,-2) has five digits before the point, numeric(3,5) five behind it.
    digits = max(precision, scale) if scale >= 0 else precision - scale
    return pa.decimal128(digits, max(scale, 0)) if digits <= _MAX_DECIMAL_DIGITS else pa.string()


def _reader(kind: pa.DataType) -> Callable[[Sequence[Text | None], pa.DataType], pa.Array]:
    if pa.types.is_string(kind):
        return pa.array  # type: ignore[no-any-return]  # pyarrow has no types
    if pa.types.is_boolean(kind):
        return _booleans
    if pa.types.is_binary(kind):
        return _binaries
    if pa.types.is_list(kind):
        return _lists
    return _cast


def _cast(values: Sequence[Text | None], kind: pa.DataType) -> pa.Array:
    return pa.array(values, pa.string()).cast(kind)


def _booleans(values: Sequence[Text | None], _kind: pa.DataType) -> pa.Array:
    texts = pa.array(values, pa.string())
    if not pc.all(pc.is_in(texts, pa.array(["t", "f", None])), min_count=0).as_py():
        raise ValueError
    return pc.equal(texts, "t")


def _binaries(values: Sequence[Text | None], _kind: pa.DataType) -> pa.Array:
    # bytea_output=hex prints \x and two digits for every byte.
    return pa.array([None if value is None else unhexlify(value[2:]) for value in values], pa.binary())


def _lists(values: Sequence[Text | None], kind: pa.DataType) -> pa.Array:
    texts = pa.array(values, pa.string()).to_pylist()
    lists = [None if text is None else parse_array(text) for text in texts]
    ends = accumulate((len(items or ()) for items in lists), initial=0)
    offsets = [None if items is None else start for items, start in zip([*lists, ()], ends, strict=True)]
    flat = [item for items in lists if items for item in items]
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), to_arrow(flat, kind.value_type))


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


def _first_unheld(
    values: Sequence[Text | None],
    kind: pa.DataType,
    read: Callable[[Sequence[Text | None], pa.DataType], pa.Array],
) -> Exception:
    for index, value in enumerate(values):
        try:
            read([value], kind)
        except UnheldValueError as error:
            return UnheldValueError(index, error.reason)
        except (pa.ArrowInvalid, ValueError):
            return UnheldValueError(index, _reason(value, kind))
    # Each value alone can be read, so the column must be: the fault is ours.
    return InvariantError(f"cannot read a column of {kind} whose values can all be read; report this")


def _reason(value: Text | None, kind: pa.DataType) -> str:
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else value or ""
    if "\ufffd" in text:
        return "its text is not UTF-8"
    if pa.types.is_list(kind):
        return "an array of more than one dimension, or one that does not start at 1"
    if text in {"infinity", "-infinity"}:
        return f"infinity is not in the range of {kind}"
    if text.endswith(" BC") or re.match(r"\d{5,}-", text):
        return f"its year is not in the range 1 to 9999 of {kind}"
    if text == "NaN":
        return f"NaN is not in the range of {kind}"
    return f"its text does not read as {kind}"
