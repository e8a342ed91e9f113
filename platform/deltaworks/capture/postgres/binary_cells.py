"""Cells in the server's binary form, of the types whose binary form is cheaper for both sides and says the same.

| Arrow type                    | on the wire                                                        |
|-------------------------------|--------------------------------------------------------------------|
| bool, int16, int32, int64     | big-endian                                                         |
| float32, float64              | big-endian IEEE 754                                                |
| date32                        | days since 2000-01-01                                              |
| timestamp                     | microseconds since 2000-01-01; in UTC where it has a zone          |
| decimal128 of up to 18 digits | numeric.c: count, weight, sign, scale, then digits to base 10,000  |

A value that its Arrow type does not hold (infinities, NaN in a decimal, years outside of 1 to 9999) gives the column
up: the rows are asked for once more as text, which `types` knows all of. So a dump's values are the log's.
"""

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa

from deltaworks.capture.postgres.cells import Cells
from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs, compiled, u16

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
def _decimals(data: Bytes, starts: Longs, sizes: Ints, scale: int, values: Longs) -> bool:
    """Read numerics as the pairs of halves that decimal128 is made of; `False` at the first that does not fit."""
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
            if exponent > 18 or exponent < -4:
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
    return _array(kind, cells, values) if _decimals(*cells, kind.scale, values) else None


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
