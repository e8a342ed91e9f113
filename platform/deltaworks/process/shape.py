"""Shapes: what a declared Python type means to Arrow, to the app's state and to a document.

An app declares the columns it reads as a `TypedDict` or a dataclass, and the documents it makes
the same way. One table says what each declared type stands for:

| declared      | reads columns of           | is written as        | kept in the state as |
|---------------|----------------------------|----------------------|----------------------|
| `int`         | any integer                | int64                | integer              |
| `float`       | floats, numerics           | float64              | real                 |
| `str`         | text, enums                | string               | text                 |
| `bool`        | boolean                    | bool                 | integer              |
| `Decimal`     | numerics                   | decimal128(38, 9)    | text                 |
| `date`        | date                       | date32               | ISO text             |
| `datetime`    | timestamps                 | timestamp(us, UTC)   | ISO text             |
| `bytes`       | binary                     | binary               | hexadecimal text     |
| `list[T]`     | lists of what T reads      | list                 | JSON text            |
| `TypedDict`   | structs                    | struct               | JSON text            |

`T | None` stands for a column that may be null. A value that the column's Arrow type cannot hold, such as an
infinite date, comes as the declared type where that can say it (NaN as `float` or `Decimal`), else as the
source's text.
"""

import dataclasses
import json
import math
import types
import typing
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from functools import lru_cache
from itertools import repeat
from typing import Any, Literal, Union

import pyarrow as pa

from deltaworks.errors import TerminalError

Decode = Callable[[Any], Any]
"""From what the state keeps to the declared type; never called with None."""

_TO_ARROW: Mapping[Any, pa.DataType] = {
    int: pa.int64(),
    float: pa.float64(),
    str: pa.string(),
    bool: pa.bool_(),
    Decimal: pa.decimal128(38, 9),
    date: pa.date32(),
    datetime: pa.timestamp("us", "UTC"),
    bytes: pa.binary(),
}
_IS_READ_FROM: Mapping[Any, Callable[[pa.DataType], bool]] = {
    int: pa.types.is_integer,
    float: lambda type_: pa.types.is_floating(type_) or pa.types.is_decimal(type_),
    str: lambda type_: pa.types.is_string(type_) or pa.types.is_large_string(type_),
    bool: pa.types.is_boolean,
    Decimal: pa.types.is_decimal,
    date: pa.types.is_date,
    datetime: pa.types.is_timestamp,
    bytes: lambda type_: pa.types.is_binary(type_) or pa.types.is_large_binary(type_),
}


class ShapeError(TerminalError):
    """A declared type has no meaning here; the message lists those that do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One declared column: its name, its type without None, and whether None is allowed."""

    name: str
    type: Any  # Any: a declared type may be a class, a generic alias or a Literal
    nullable: bool

    def __str__(self) -> str:
        return show(self.type) + (" | None" if self.nullable else "")


def fields_of(declared: type) -> tuple[Field, ...]:
    """The fields of a `TypedDict` or dataclass, in their order.

    Raises:
        ShapeError: it is neither, or a field's type has no meaning here.
    """
    if not is_record(declared):
        raise ShapeError(f"cannot read columns from {declared!r}; declare a TypedDict or a dataclass")
    fields = tuple(field_of(name, hint) for name, hint in typing.get_type_hints(declared).items())
    for field in fields:
        arrow_type(field.type, where=f"{declared.__name__}.{field.name}")
    return fields


def is_record(declared: Any) -> bool:  # Any: any declared type may be asked
    """Whether this is a `TypedDict` or a dataclass."""
    return typing.is_typeddict(declared) or (isinstance(declared, type) and dataclasses.is_dataclass(declared))


def builder(declared: type) -> Callable[..., Any]:
    """What makes one record of the declared type from its values, in the order of its fields."""
    names = tuple(typing.get_type_hints(declared))
    if typing.is_typeddict(declared):
        return lambda *values: dict(zip(names, values, strict=True))
    if all(not item.kw_only for item in dataclasses.fields(declared)):
        return declared
    return lambda *values: declared(**dict(zip(names, values, strict=True)))


def records(declared: Any, columns: Sequence[Sequence[Any]]) -> Iterable[Any]:  # Any: a TypedDict is no type
    """Records of the declared type out of its columns, in the order of its fields."""
    if typing.is_typeddict(declared):
        return _dicts(tuple(typing.get_type_hints(declared)))(zip(*columns, strict=True))
    if (setters := _setters(declared)) is None:
        return map(builder(declared), *columns)
    # A frozen dataclass sets its fields by name, one by one; by its slots whole columns are set in half the time.
    made = list(map(object.__new__, repeat(declared, len(columns[0]))))
    for set_field, column in zip(setters, columns, strict=True):
        deque(map(set_field, made, column), maxlen=0)
    return made


@lru_cache
def _setters(declared: Any) -> Sequence[Callable[[Any, Any], None]] | None:
    """What sets each field of a frozen dataclass with slots; `None` where making one does more than that."""
    params = declared.__dataclass_params__
    own = [declared.__dict__.get(item.name) for item in dataclasses.fields(declared)]
    is_plain = (
        params.frozen
        and params.init
        and own
        and all(isinstance(each, types.MemberDescriptorType) for each in own)
        and all(item.init for item in dataclasses.fields(declared))
        and not hasattr(declared, "__post_init__")
        and declared.__new__ is object.__new__
        # One that its author wrote is kept by `dataclass`, and comes from a file.
        and declared.__init__.__code__.co_filename == "<string>"
        and len(own) == len(typing.get_type_hints(declared))
    )
    return [each.__set__ for each in own if each is not None] if is_plain else None


@lru_cache
def _dicts(names: tuple[str, ...]) -> Callable[[Iterable[tuple[Any, ...]]], list[dict[str, Any]]]:
    """What makes dicts with these keys of rows of values: compiled, as that takes half the time of `dict(zip(…))`."""
    places = [f"_{place}" for place in range(len(names))]
    items = ", ".join(f"{name!r}: {place}" for name, place in zip(names, places, strict=True))
    build: Callable[[Iterable[tuple[Any, ...]]], list[dict[str, Any]]]
    build = eval(f"lambda rows: [{{{items}}} for {', '.join(places)}, in rows]", {})  # noqa: S307 - names are quoted
    return build


def show(declared: Any) -> str:  # Any: any declared type may be shown
    """The type as its author wrote it, near enough for an error message."""
    return declared.__name__ if isinstance(declared, type) and not is_list(declared) else str(declared)


def arrow_type(declared: Any, *, where: str) -> pa.DataType:  # Any: any declared type may be asked
    """The Arrow type that values of the declared type are written as; `where` names it in errors.

    Raises:
        ShapeError: the type has no meaning here.
    """
    if isinstance(declared, pa.DataType):
        return declared
    inner = field_of("", declared).type
    if inner in _TO_ARROW:
        return _TO_ARROW[inner]
    if is_literal(inner):
        return arrow_type(type(typing.get_args(inner)[0]), where=where)
    if is_list(inner):
        return pa.list_(arrow_type(typing.get_args(inner)[0], where=where))
    if is_record(inner):
        return pa.struct([pa.field(field.name, arrow_type(field.type, where=where)) for field in fields_of(inner)])
    known = ", ".join(type_.__name__ for type_ in _TO_ARROW)
    raise ShapeError(f"{where}: no column is read or written as {show(declared)}; use {known}, a list or a TypedDict")


def reads(declared: Any, column: pa.DataType) -> bool:  # Any: any declared type may be asked
    """Whether a column of that Arrow type can be read as the declared type."""
    inner = field_of("", declared).type
    if is_literal(inner):
        inner = type(typing.get_args(inner)[0])
    if inner in _IS_READ_FROM:
        return bool(_IS_READ_FROM[inner](column))
    if is_list(inner):
        return (pa.types.is_list(column) or pa.types.is_large_list(column)) and reads(
            typing.get_args(inner)[0], column.value_type
        )
    return (
        is_record(inner)
        and pa.types.is_struct(column)
        and all(
            column.get_field_index(field.name) >= 0 and reads(field.type, column.field(field.name).type)
            for field in fields_of(inner)
        )
    )


def plain_values(column: pa.Array, declared: Any) -> list[Any]:  # Any: the state's values are int, float, str, bytes
    """A column as the state keeps it: values that SQLite holds as they are, so that equal means unchanged."""
    inner = field_of("", declared).type
    if inner is float and pa.types.is_decimal(column.type):
        # Arrow's own cast makes 6.800000000000001 of 6.8; Python reads the nearest float.
        return [None if text is None else float(text) for text in column.cast(pa.string()).to_pylist()]
    if inner is float:
        return [_plain_float(value) for value in column.cast(pa.float64()).to_pylist()]
    if inner in (Decimal, date, datetime):
        # Arrow writes ISO texts for whole columns at once, which is ten times as fast as Python's own.
        return list(column.cast(pa.string()).to_pylist())
    if inner is bytes:
        return [None if value is None else value.hex() for value in column.to_pylist()]
    if is_list(inner) or is_record(inner):
        return [None if value is None else json.dumps(value, default=_plain) for value in column.to_pylist()]
    return list(column.to_pylist())


def given_values(column: pa.ChunkedArray, declared: Any, texts: Mapping[int, str] | None) -> list[Any]:
    """A column as steps see it, exactly as if it had been kept in the state; `texts` are what it could not hold."""
    array = column.combine_chunks()
    inner = field_of("", declared).type
    decode = _decoder(declared)
    if decode is None or inner is bool or (inner is float and not pa.types.is_decimal(array.type)):
        values = list((array.cast(pa.float64()) if inner is float else array).to_pylist())
        decode = None
    else:
        values = plain_values(array, declared)
    for row, text in (texts or {}).items():
        values[row] = text
    decode = decoder(declared) if decode is not None or texts else None
    return values if decode is None else [None if value is None else decode(value) for value in values]


def cast(column: pa.ChunkedArray, declared: Any) -> pa.ChunkedArray:  # Any: any declared type may be asked
    """A column in the type that values of the declared type are written as; see `arrow_type`."""
    wanted = arrow_type(declared, where="")
    if column.type == wanted:
        return column
    if pa.types.is_decimal(column.type) and pa.types.is_floating(wanted):
        # Arrow's own cast makes 6.800000000000001 of 6.8; from a text it reads the nearest float.
        return column.cast(pa.string()).cast(wanted)
    try:
        return column.cast(wanted, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.chunked_array([pa.array(column.to_pylist(), wanted)])


def decoder(declared: Any) -> Decode | None:  # Any: any declared type may be asked
    """What turns the state's value into the declared type; `None` where they are the same."""
    decode = _decoder(declared)
    return None if decode is None else _or_text(decode)


def _or_text(decode: Decode) -> Decode:
    def decode_or_keep(value: Any) -> Any:
        try:
            return decode(value)
        except (ValueError, ArithmeticError):
            # The column could not hold it, so the state has the source's text. No such text reads as a value of
            # another meaning: dates have no fifth digit of a year, JSON no braces around a bare number.
            return value

    return decode_or_keep


def _decoder(declared: Any) -> Decode | None:
    inner = field_of("", declared).type
    if is_list(inner) or is_record(inner):
        item = _json_decoder(inner)
        return lambda text: item(json.loads(text))
    # A NaN is kept as text, because SQLite stores it as NULL.
    simple: Mapping[Any, Decode] = {
        float: float,
        bool: bool,
        Decimal: Decimal,
        date: date.fromisoformat,
        datetime: datetime.fromisoformat,
        bytes: bytes.fromhex,
    }
    return simple.get(inner)


def to_mapping(value: Any) -> Mapping[str, Any]:  # Any: a document may be a dict or a dataclass
    """A document as a mapping: a dataclass becomes a dict, with those inside it."""
    # A dict is told apart ten times as fast as a Mapping.
    return value if type(value) is dict or isinstance(value, Mapping) else dataclasses.asdict(value)


def field_of(name: str, hint: Any) -> Field:  # Any: any declared type may be asked
    """The field of this name and declared type."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        arms = [arm for arm in typing.get_args(hint) if arm is not type(None)]
        nullable = len(arms) < len(typing.get_args(hint))
        return Field(name=name, type=arms[0] if len(arms) == 1 else hint, nullable=nullable)
    return Field(name=name, type=hint, nullable=False)


def is_list(declared: Any) -> bool:  # Any: any declared type may be asked
    """Whether this is `list[T]`."""
    return typing.get_origin(declared) is list


def is_literal(declared: Any) -> bool:  # Any: any declared type may be asked
    """Whether this is a `Literal`."""
    return typing.get_origin(declared) is Literal


def _plain_float(value: float | None) -> float | str | None:
    return "nan" if value is not None and math.isnan(value) else value


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _json_decoder(declared: Any) -> Decode:
    field = field_of("", declared)
    if is_list(field.type):
        item = _json_decoder(typing.get_args(field.type)[0])
        return lambda values: None if values is None else [item(value) for value in values]
    if is_record(field.type):
        build = builder(field.type)
        parts = [(part.name, _json_decoder(part.type)) for part in fields_of(field.type)]
        return lambda given: None if given is None else build(*(part(given[name]) for name, part in parts))
    decode = _decoder(field.type) or (lambda value: value)
    return lambda value: None if value is None else decode(value)
