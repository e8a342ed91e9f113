"""Cells in the server's binary form: of dumps, column by column, and of streams that were asked for in it.

| Arrow type                    | on the wire                                                        |
|-------------------------------|--------------------------------------------------------------------|
| bool, int16, int32, int64     | big-endian                                                         |
| float32, float64              | big-endian IEEE 754                                                |
| date32                        | days since 2000-01-01                                              |
| timestamp                     | microseconds since 2000-01-01; in UTC where it has a zone          |
| decimal128 of up to 18 digits | numeric.c: count, weight, sign, scale, then digits to base 10,000  |

| text, varchar, char, json     | the text                                                           |
| bytea, uuid                   | the bytes                                                          |

A value that its Arrow type does not hold (infinities, NaN in a decimal, years outside of 1 to 9999) gives the column of
a dump up: the rows are asked for once more as text. A stream cannot be asked again, so there it is printed as the
server would. Either way a value has one form, however it was read.
"""

import struct
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal

import numpy as np
import pyarrow as pa

from deltaworks.capture.postgres.cells import NULL_SIZE, Cells, read_texts
from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs, compiled, u16
from deltaworks.capture.postgres.types import Held
from deltaworks.schema import Column

_MOST_DIGITS = 18
_EPOCH_DAYS = 10_957
_DAY_US = 86_400_000_000
_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896
"""0001-01-01 and 9999-12-31, in days since 1970."""

_POSITIVE, _NEGATIVE = 0x0000, 0x4000


def is_read_from_binary(kind: pa.DataType) -> bool:
    """Whether a column of this type is best asked for in binary."""
    return kind.id in _READERS and (not pa.types.is_decimal(kind) or kind.precision <= _MOST_DIGITS)


def read_binary_cells(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    """The column as Arrow holds it; `None` when it does not hold a value of it."""
    return _READERS[kind.id](cells, kind)


def is_streamed_in_binary(columns: Iterable[Column]) -> bool:
    """Whether all of these columns are read here in the binary form in which a stream has them."""
    return all(_stream_reader(column) is not None for column in columns)


def read_streamed_cells(cells: Cells, column: Column) -> Held:
    """The column as Arrow holds it, and the text of each value that it cannot hold.

    Raises:
        ValueError: a cell is not of the column's type.
    """
    read = _stream_reader(column)
    if read is None:
        raise ValueError(f"no binary form of {column.source_type} is known here")
    array = read(cells, column.type)
    if array is not None:
        return Held(array, {})
    texts = _odd_texts(cells, column.type)
    sizes = cells.sizes.copy()
    sizes[list(texts)] = NULL_SIZE
    array = read(Cells(cells.data, cells.starts, sizes), column.type)
    if array is None:
        raise ValueError(f"a value of column {column.name} is malformed")
    return Held(array, texts)


def _stream_reader(column: Column) -> Callable[[Cells, pa.DataType], pa.Array | None] | None:
    name = column.source_type.partition("(")[0]
    if name in _OF_STREAMS:
        return _OF_STREAMS[name]
    if name == "numeric" and pa.types.is_decimal(column.type):
        return _exact_of_any_size if column.type.precision > _MOST_DIGITS else _exact
    # Domains and enums have names of their own, and come under those.
    return _READERS[column.type.id] if name in _PLAIN and is_read_from_binary(column.type) else None


def _odd_texts(cells: Cells, kind: pa.DataType) -> dict[int, str]:
    """The texts of values that the type does not hold, by row."""
    found: dict[int, str] = {}
    for row in np.flatnonzero(cells.sizes >= 0).tolist():
        value = bytes(cells.data[cells.starts[row] : cells.starts[row] + cells.sizes[row]])
        text = _odd_number(value) if pa.types.is_decimal(kind) else _odd_moment(value, kind)
        if text is not None:
            found[row] = text
    return found


def _odd_number(value: bytes) -> str | None:
    return _ODD_SIGNS.get(value[4:6])


def _odd_moment(value: bytes, kind: pa.DataType) -> str | None:
    """A date or time that Arrow does not hold, as the server prints it."""
    number, largest = int.from_bytes(value, "big", signed=True), (1 << 8 * len(value) - 1) - 1
    if number in {largest, -largest - 1}:
        return "infinity" if number > 0 else "-infinity"
    days, time_us = (number, 0) if pa.types.is_date(kind) else divmod(number, _DAY_US)
    days += _EPOCH_DAYS
    if _FIRST_DAY <= days <= _LAST_DAY:
        return None
    # A date 400 years of 146,097 days away has the same month and day.
    cycles = (days - _FIRST_DAY) // 146_097
    year, rest = str(np.datetime64(days - 146_097 * cycles, "D")).split("-", 1)
    number_of_year = int(year) + 400 * cycles
    text = f"{number_of_year if number_of_year > 0 else 1 - number_of_year:04d}-{rest}"
    if not pa.types.is_date(kind):
        seconds, micros = divmod(time_us, 1_000_000)
        fraction = f".{micros:06d}".rstrip("0") if micros else ""
        text += (
            f" {seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}{fraction}{'+00' if kind.tz else ''}"
        )
    return text if number_of_year > 0 else text + " BC"


@compiled
def _numbers(data: Bytes, starts: Longs, sizes: Ints, width: int, values: Longs) -> bool:
    """Read signed big-endian numbers; `False` at the first cell of another width."""
    for row in range(len(sizes)):
        values[row] = 0
        if sizes[row] < 0:
            continue
        if sizes[row] != width:
            return False
        start = starts[row]
        value = np.int64(data[start])
        if value > 127:
            value -= 256
        for place in range(start + 1, start + width):
            value = value << 8 | np.int64(data[place])
        values[row] = value
    return True


@compiled
def _decimals(data: Bytes, starts: Longs, sizes: Ints, scale: int, most_exponent: int, values: Longs) -> bool:
    """Read numerics as the pairs of halves that decimal128 is made of; `False` at the first that does not fit.

    A group of four digits before more than `most_exponent` others is one that does not fit.
    """
    for row in range(len(sizes)):
        values[row, 0] = values[row, 1] = 0
        size, at = sizes[row], starts[row]
        if size < 0:
            continue
        if size < 8 or size != 8 + 2 * u16(data, at):
            return False
        weight, sign = u16(data, at + 2), u16(data, at + 4)
        if weight > 0x7FFF:
            weight -= 0x10000
        if (sign != _POSITIVE and sign != _NEGATIVE) or u16(data, at + 6) != scale:  # noqa: PLR1714  compiled
            return False
        value = np.int64(0)
        for place in range(u16(data, at)):
            digit = np.int64(u16(data, at + 8 + 2 * place))
            exponent = 4 * (weight - place) + scale
            if exponent > most_exponent or exponent < -4:
                return False
            # The digits of the last group behind the scale are zeros.
            for _ in range(exponent):
                digit *= 10
            for _ in range(-exponent):
                digit //= 10
            value += digit
        if sign == _NEGATIVE:
            value = -value
        values[row, 0] = value
        values[row, 1] = value >> 63
    return True


def _read_numbers(cells: Cells, width: int) -> np.ndarray | None:
    values = np.empty(len(cells.sizes), np.int64)
    return values if _numbers(*cells, width, values) else None


def _integers(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    dtype = np.dtype(kind.to_pandas_dtype())
    values = _read_numbers(cells, dtype.itemsize)
    return None if values is None else _array(kind, cells, values.astype(dtype, copy=False))


def _booleans(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = _read_numbers(cells, 1)
    return None if values is None else _array(kind, cells, np.packbits(values != 0, bitorder="little"))


def _floats(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    dtype = np.dtype(kind.to_pandas_dtype())
    bits = _read_numbers(cells, dtype.itemsize)
    if bits is None:
        return None
    values = bits.astype(f"i{dtype.itemsize}").view(dtype)
    # One NaN, as its text says.
    values[np.isnan(values)] = np.nan
    return _array(kind, cells, values)


def _dates(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    days = _read_numbers(cells, 4)
    if days is None:
        return None
    days += _EPOCH_DAYS
    if ((days < _FIRST_DAY) | (days > _LAST_DAY)).any():
        return None
    return _array(kind, cells, days.astype(np.int32))


def _timestamps(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = _read_numbers(cells, 8)
    # Compared before the epochs are made equal, because an infinity is the end of the numbers.
    first, after = (_FIRST_DAY - _EPOCH_DAYS) * _DAY_US, (_LAST_DAY + 1 - _EPOCH_DAYS) * _DAY_US
    if values is None or ((values < first) | (values >= after)).any():
        return None
    return _array(kind, cells, values + _EPOCH_DAYS * _DAY_US)


def _exact(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = np.empty((len(cells.sizes), 2), np.int64)
    return _array(kind, cells, values) if _decimals(*cells, kind.scale, _MOST_DIGITS, values) else None


def _exact_of_any_size(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    """Decimals of up to 38 digits: at once where all of them have 18 at most, else one by one."""
    values = np.empty((len(cells.sizes), 2), np.int64)
    if _decimals(*cells, kind.scale, _MOST_DIGITS - 4, values):
        return _array(kind, cells, values)
    found: list[Decimal | None] = [None] * len(cells.sizes)
    for row in np.flatnonzero(cells.sizes >= 0).tolist():
        found[row] = _decimal(bytes(cells.data[cells.starts[row] : cells.starts[row] + cells.sizes[row]]), kind.scale)
        if found[row] is None:
            return None
    return pa.array(found, kind)


def _decimal(value: bytes, scale: int) -> Decimal | None:
    if len(value) < 8 or len(value) % 2:
        return None
    count, weight, sign, behind = struct.unpack_from(">HhHH", value)
    if sign not in {_POSITIVE, _NEGATIVE} or behind != scale or len(value) != 8 + 2 * count:
        return None
    groups = struct.unpack_from(f">{count}H", value, 8)
    whole = sum(group * 10 ** (4 * (count - 1 - place)) for place, group in enumerate(groups))
    # The digits of the last group behind the scale are zeros.
    shift = 4 * (weight - count + 1) + scale
    unscaled = whole * 10**shift if shift >= 0 else whole // 10**-shift
    return Decimal((int(sign == _NEGATIVE), tuple(map(int, str(unscaled))), -scale))


def _oids(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = _read_numbers(cells, 4)
    return None if values is None else _array(kind, cells, values.astype(np.uint32))


def _raw(cells: Cells, _kind: pa.DataType) -> pa.Array:
    return cells.texts()


def _uuids(cells: Cells, _kind: pa.DataType) -> pa.Array | None:
    present = cells.sizes >= 0
    if (cells.sizes[present] != 16).any():
        return None
    data = cells.texts().buffers()[2]
    raw = np.frombuffer(data, np.uint8).reshape(-1, 16) if data is not None else np.empty((0, 16), np.uint8)
    texts = np.full((len(raw), 36), ord("-"), np.uint8)
    texts[:, _UUID_DIGITS] = _HEX[raw].reshape(len(raw), 32)
    offsets = np.zeros(len(present) + 1, np.int32)
    np.cumsum(36 * present, out=offsets[1:])
    bitmap = None if present.all() else pa.py_buffer(np.packbits(present, bitorder="little"))
    return pa.Array.from_buffers(pa.string(), len(present), [bitmap, pa.py_buffer(offsets), pa.py_buffer(texts)])


def _array(kind: pa.DataType, cells: Cells, values: np.ndarray) -> pa.Array:
    valid = cells.sizes >= 0
    bitmap = None if valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(kind, len(valid), [bitmap, pa.py_buffer(np.ascontiguousarray(values))])


_READERS: Mapping[int, Callable[[Cells, pa.DataType], pa.Array | None]] = {
    pa.bool_().id: _booleans,
    pa.int16().id: _integers,
    pa.int32().id: _integers,
    pa.int64().id: _integers,
    pa.float32().id: _floats,
    pa.float64().id: _floats,
    pa.date32().id: _dates,
    pa.timestamp("us").id: _timestamps,
    pa.decimal128(1).id: _exact,
}

_HEX = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), np.uint8).reshape(256, 2)
_UUID_DIGITS = [place for place in range(36) if place not in {8, 13, 18, 23}]

_PLAIN = frozenset(
    (
        *("boolean", "smallint", "integer", "bigint", "real", "double precision", "date", "timestamp"),
        *("timestamp without time zone", "timestamp with time zone"),
    )
)
"""The server's names, without what stands in brackets, of types that are read by their Arrow type."""

_OF_STREAMS: Mapping[str, Callable[[Cells, pa.DataType], pa.Array | None]] = {
    "oid": _oids,
    "bytea": _raw,
    "uuid": _uuids,
    "text": read_texts,
    "character varying": read_texts,
    "character": read_texts,
    "json": read_texts,
}

_ODD_SIGNS: Mapping[bytes, str] = {b"\xc0\x00": "NaN", b"\xd0\x00": "Infinity", b"\xf0\x00": "-Infinity"}
