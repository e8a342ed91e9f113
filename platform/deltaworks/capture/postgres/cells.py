"""From cells, offsets into the bytes that the server sent, to Arrow columns: a whole column at a time.

    changes ──locate──► Cells: start and size of every value ──read_cells──► Held: Arrow, and odd texts

The common types are read here, from the server's text; a column with a value that does not read as
plainly as that goes through `types.to_arrow`, which knows every text. So both give the same values.
Every buffer is made for the one array that keeps it: nothing here outlives or shares scratch memory.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from deltaworks.capture.postgres.compiled import Bytes, Ints, Longs, compiled, u16, u32
from deltaworks.capture.postgres.scan import END, NEW, OLD, OP
from deltaworks.capture.postgres.types import Held, to_arrow

NULL_SIZE, UNCHANGED_SIZE = -1, -2
"""Sizes of cells that hold nothing: a null, and a large value that the server did not send."""

AS_TEXT_FORMAT, AS_BINARY_FORMAT = 1, 2
"""Bits that `locate` sets for a column: it met values in that format."""

_TEXT, _BINARY, _NULL = ord("t"), ord("b"), ord("n")
_TRUNCATED, _DELETED = ord("t"), ord("d")
_MINUS, _ZERO, _NINE, _DASH, _COLON, _POINT, _SPACE, _PLUS = (ord(letter) for letter in "-09-:. +")
_SMALLEST = -(1 << 63)
_LAST_TENTH, _LAST_DIGIT = (1 << 63) // 10, (1 << 63) % 10


class Cells(NamedTuple):
    """The values of one column: cell i is `data[starts[i]:starts[i] + sizes[i]]`, or nothing for a negative size."""

    data: Bytes
    starts: Longs
    sizes: Ints

    def texts(self) -> pa.Array:
        """A copy of the cells as an Arrow array of binary."""
        offsets, validity = self._offsets(), self._validity()
        copied = np.empty(offsets[-1], np.uint8)
        _copy(self.data, self.starts, self.sizes, copied)
        return _array(pa.binary(), len(self.sizes), validity, offsets, copied)

    def _offsets(self, *, skip: int = 0, width: int = 1) -> Ints:
        """Arrow's offsets of values that take `size - skip` bytes, divided by `width`."""
        offsets = np.zeros(len(self.sizes) + 1, np.int64)
        np.cumsum(np.maximum(self.sizes - skip, 0) // width, out=offsets[1:])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise OverflowError("the texts of one column in one slice exceed two gigabytes")
        return offsets.astype(np.int32)

    def _validity(self) -> Bytes | None:
        """Arrow's bitmap, or `None` when every cell holds a value."""
        valid = self.sizes >= 0
        return None if valid.all() else np.packbits(valid, bitorder="little")


def read_cells(cells: Cells, kind: pa.DataType) -> Held:
    """The column as Arrow holds it, and the text of each value that it cannot hold."""
    read = _READERS.get(kind.id)
    if read is not None:
        array = read(cells, kind)
        if array is not None:
            return Held(array, {})
    texts = cells.texts()
    try:
        return to_arrow(texts.cast(pa.string()), kind)
    except pa.ArrowInvalid:
        # Not UTF-8: `to_arrow` finds the rows.
        return to_arrow(texts.to_pylist(), kind)


@compiled
def locate(
    data: Bytes,
    changes: Longs,
    rows: Longs,
    is_key: Bytes,
    starts: Longs,
    sizes: Ints,
    old_starts: Longs,
    old_sizes: Ints,
    moved: Bytes,
    formats: Bytes,
) -> int:
    """Find the cells of these changes of one table; the first row that is malformed, or -1.

    `starts` and `sizes` have a line per column. A value that an update did not touch is taken from
    the old row where that has it. `moved` is set where the key changed; the old row's cells are in
    `old_starts` and `old_sizes` then.
    """
    columns = len(is_key)
    for place in range(len(rows)):
        change = changes[rows[place]]
        op, end = change[OP], change[END]
        if op == _TRUNCATED:
            for column in range(columns):
                sizes[column, place] = NULL_SIZE
            continue
        if change[OLD]:
            at = _row(data, change[OLD], end, place, old_starts, old_sizes, formats)
            if at < 0 or (op == _DELETED and at != end):
                return place
        if op == _DELETED:
            for column in range(columns):
                starts[column, place] = old_starts[column, place]
                sizes[column, place] = old_sizes[column, place] if is_key[column] else NULL_SIZE
            continue
        if _row(data, change[NEW], end, place, starts, sizes, formats) != end:
            return place
        if not change[OLD]:
            continue
        for column in range(columns):
            # A value kept out of line is never null, so a null in the old row only says that it was not sent.
            if sizes[column, place] == UNCHANGED_SIZE and old_sizes[column, place] >= 0:
                starts[column, place] = old_starts[column, place]
                sizes[column, place] = old_sizes[column, place]
            if is_key[column] and not _same(
                data,
                starts[column, place],
                sizes[column, place],
                old_starts[column, place],
                old_sizes[column, place],
            ):
                moved[place] = 1
    return -1


@compiled
def _row(data: Bytes, at: int, end: int, place: int, starts: Longs, sizes: Ints, formats: Bytes) -> int:
    """Note the cells of the row at `at`; where it ends, or -1."""
    columns = len(formats)
    if at + 2 > end or u16(data, at) != columns:
        return -1
    at += 2
    for column in range(columns):
        if at >= end:
            return -1
        kind = data[at]
        if kind in (_TEXT, _BINARY):
            if at + 5 > end:
                return -1
            size = u32(data, at + 1)
            at += 5
            if size > end - at:
                return -1
            starts[column, place] = at
            sizes[column, place] = size
            formats[column] |= AS_TEXT_FORMAT if kind == _TEXT else AS_BINARY_FORMAT
            at += size
        else:
            sizes[column, place] = NULL_SIZE if kind == _NULL else UNCHANGED_SIZE
            if kind != _NULL and kind != ord("u"):
                return -1
            at += 1
    return at


@compiled
def _same(data: Bytes, start: int, size: int, other_start: int, other_size: int) -> bool:
    if size != other_size:
        return False
    for place in range(size):  # noqa: SIM110  compiled
        if data[start + place] != data[other_start + place]:
            return False
    return True


@compiled
def _copy(data: Bytes, starts: Longs, sizes: Ints, copied: Bytes) -> None:
    at = 0
    for row in range(len(sizes)):
        start = starts[row]
        for place in range(sizes[row]):
            copied[at + place] = data[start + place]
        at += max(sizes[row], 0)


@compiled
def _unhex(data: Bytes, starts: Longs, sizes: Ints, copied: Bytes) -> bool:
    r"""Read `\x00ff`; `False` at the first cell that is not so."""
    at = 0
    for row in range(len(sizes)):
        size = sizes[row]
        if size < 0:
            continue
        start = starts[row]
        if size < 2 or size & 1 or data[start] != ord("\\") or data[start + 1] != ord("x"):
            return False
        for place in range(start + 2, start + size, 2):
            high, low = _hex_digit(data[place]), _hex_digit(data[place + 1])
            if high < 0 or low < 0:
                return False
            copied[at] = high << 4 | low
            at += 1
    return True


@compiled
def _hex_digit(letter: int) -> int:
    if ord("0") <= letter <= ord("9"):
        return letter - ord("0")
    if ord("a") <= letter <= ord("f"):
        return letter - ord("a") + 10
    return -1


@compiled
def _integers(data: Bytes, starts: Longs, sizes: Ints, low: int, high: int, values: Longs) -> bool:
    """Read whole numbers; `False` at the first cell that is none in these bounds."""
    for row in range(len(sizes)):
        size = sizes[row]
        if size < 0:
            values[row] = 0
            continue
        start = starts[row]
        end = start + size
        negative = size > 0 and data[start] == _MINUS
        if negative:
            start += 1
        if start == end or end - start > 19:
            return False
        # Downwards, because there is one negative number more than positive ones.
        value = np.int64(0)
        for place in range(start, end):
            digit = np.int64(data[place]) - _ZERO
            if digit < 0 or digit > 9:
                return False
            if value < -_LAST_TENTH or (value == -_LAST_TENTH and digit > _LAST_DIGIT):
                return False
            value = value * 10 - digit
        if not negative:
            if value == _SMALLEST:
                return False
            value = -value
        if value < low or value > high:
            return False
        values[row] = value
    return True


@compiled
def _booleans(data: Bytes, starts: Longs, sizes: Ints, values: Bytes) -> bool:
    for row in range(len(sizes)):
        values[row] = 0
        if sizes[row] < 0:
            continue
        letter = data[starts[row]] if sizes[row] == 1 else 0
        if letter != ord("t") and letter != ord("f"):
            return False
        values[row] = letter == ord("t")
    return True


@compiled
def _decimals(data: Bytes, starts: Longs, sizes: Ints, scale: int, values: Longs) -> bool:
    """Read numbers of up to 18 digits as the pairs of halves that decimal128 is made of."""
    for row in range(len(sizes)):
        size = sizes[row]
        values[row, 0] = values[row, 1] = 0
        if size < 0:
            continue
        start = starts[row]
        end = start + size
        negative = size > 0 and data[start] == _MINUS
        if negative:
            start += 1
        value, digits, behind = np.int64(0), 0, -1
        for place in range(start, end):
            letter = data[place]
            if letter == _POINT and behind < 0:
                behind = 0
                continue
            if letter < _ZERO or letter > _NINE:
                return False
            value = value * 10 + (np.int64(letter) - _ZERO)
            digits += 1
            behind += behind >= 0
            if digits > 18:
                return False
        # numeric(p, s) prints exactly s digits behind the point.
        if digits == 0 or max(behind, 0) != scale:
            return False
        if negative:
            value = -value
        values[row, 0] = value
        values[row, 1] = value >> 63
    return True


@compiled
def _number(data: Bytes, at: int, digits: int) -> int:
    """The number in that many digits, or a negative one."""
    value = np.int64(0)
    for place in range(at, at + digits):
        digit = np.int64(data[place]) - _ZERO
        if digit < 0 or digit > 9:
            return -1
        value = value * 10 + digit
    return value  # type: ignore[return-value]  # numpy's int64 is an int here


@compiled
def _days(data: Bytes, at: int) -> int:
    """The days from 1970-01-01 to the date in the ten bytes from `at`, or the smallest number there is."""
    year, month, day = _number(data, at, 4), _number(data, at + 5, 2), _number(data, at + 8, 2)
    is_leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    length = 31 - (month in (4, 6, 9, 11)) if month != 2 else 28 + is_leap
    if data[at + 4] != _DASH or data[at + 7] != _DASH or year < 1 or not 1 <= month <= 12 or not 1 <= day <= length:
        return _SMALLEST
    # Days in the years and months before, in a year that begins in March, so that the leap day is its last.
    before = year - (month <= 2)
    days_of_year = (153 * (month + (-3 if month > 2 else 9)) + 2) // 5 + day - 1
    return before * 365 + before // 4 - before // 100 + before // 400 + days_of_year - 719_468


@compiled
def _dates(data: Bytes, starts: Longs, sizes: Ints, values: Longs) -> bool:
    for row in range(len(sizes)):
        values[row] = 0
        if sizes[row] < 0:
            continue
        if sizes[row] != 10:
            return False
        values[row] = _days(data, starts[row])
        if values[row] == _SMALLEST:
            return False
    return True


@compiled
def _timestamps(data: Bytes, starts: Longs, sizes: Ints, zone_size: int, values: Longs) -> bool:
    """Read `2020-02-29 23:59:59.999999`, followed by `+00` where `zone_size` is 3."""
    for row in range(len(sizes)):
        values[row] = 0
        if sizes[row] < 0:
            continue
        at = starts[row]
        size = sizes[row] - zone_size
        if size != 19 and not 20 < size <= 26:
            return False
        if zone_size and not (
            data[at + size] == _PLUS and data[at + size + 1] == _ZERO and data[at + size + 2] == _ZERO
        ):
            return False
        days = _days(data, at)
        hour, minute, second = _number(data, at + 11, 2), _number(data, at + 14, 2), _number(data, at + 17, 2)
        if days == _SMALLEST or not (0 <= hour < 24 and 0 <= minute < 60 and 0 <= second < 60):
            return False
        if data[at + 10] != _SPACE or data[at + 13] != _COLON or data[at + 16] != _COLON:
            return False
        fraction = np.int64(0)
        if size > 19:
            fraction = np.int64(_number(data, at + 20, size - 20))
            if data[at + 19] != _POINT or fraction < 0:
                return False
            for _ in range(size - 20, 6):
                fraction *= 10
        values[row] = (((days * 24 + hour) * 60 + minute) * 60 + second) * 1_000_000 + fraction
    return True


Reader = Callable[[Cells, pa.DataType], pa.Array | None]
"""Reads a column; `None` when a value of it is out of the ordinary."""


def read_texts(cells: Cells, _kind: pa.DataType) -> pa.Array | None:
    """Texts, which are the same in both forms; `None` when one is not UTF-8."""
    try:
        return cells.texts().cast(pa.string())
    except pa.ArrowInvalid:
        return None


_INTEGERS: Mapping[int, type[np.integer[Any]]] = {  # Any: of any width
    pa.int16().id: np.int16,
    pa.int32().id: np.int32,
    pa.int64().id: np.int64,
    pa.uint32().id: np.uint32,
}


def _read_integers(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    bounds = np.iinfo(_INTEGERS[kind.id])
    values = np.empty(len(cells.sizes), np.int64)
    if not _integers(*cells, bounds.min, bounds.max, values):
        return None
    return _array(kind, len(values), cells._validity(), values.astype(bounds.dtype, copy=False))


def _read_booleans(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = np.empty(len(cells.sizes), np.uint8)
    if not _booleans(*cells, values):
        return None
    return _array(kind, len(values), cells._validity(), np.packbits(values, bitorder="little"))


def _read_binaries(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    offsets = cells._offsets(skip=2, width=2)
    values = np.empty(offsets[-1], np.uint8)
    if not _unhex(*cells, values):
        return None
    return _array(kind, len(cells.sizes), cells._validity(), offsets, values)


def _read_decimals(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = np.empty((len(cells.sizes), 2), np.int64)
    if kind.precision > 18 or not _decimals(*cells, kind.scale, values):
        return None
    return _array(kind, len(values), cells._validity(), values)


def _read_dates(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = np.empty(len(cells.sizes), np.int64)
    if not _dates(*cells, values):
        return None
    return _array(kind, len(values), cells._validity(), values.astype(np.int32))


def _read_timestamps(cells: Cells, kind: pa.DataType) -> pa.Array | None:
    values = np.empty(len(cells.sizes), np.int64)
    if not _timestamps(*cells, 3 if kind.tz else 0, values):
        return None
    return _array(kind, len(values), cells._validity(), values)


def _array(kind: pa.DataType, count: int, *buffers: np.ndarray | None) -> pa.Array:
    """An array over buffers that nobody else writes to."""
    made = [None if buffer is None else pa.py_buffer(buffer) for buffer in buffers]
    return pa.Array.from_buffers(kind, count, made)


_READERS: Mapping[int, Reader] = {
    pa.string().id: read_texts,
    pa.bool_().id: _read_booleans,
    pa.int16().id: _read_integers,
    pa.int32().id: _read_integers,
    pa.int64().id: _read_integers,
    pa.uint32().id: _read_integers,
    pa.date32().id: _read_dates,
    pa.timestamp("us").id: _read_timestamps,
    pa.binary().id: _read_binaries,
    pa.decimal128(1).id: _read_decimals,
}
