"""Compiles the loops over bytes before the first change needs them.

Numba compiles a function on its first call, which takes seconds on a new machine and some tenths of a second
where the result lies on disk. A short made-up stream with a column of every kind goes through all of them.
"""

import struct
from collections.abc import Sequence

import pyarrow as pa

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.source import Slice
from deltaworks.schema import Column, TableName, TableSchema

_RELATION = 1

_VALUES: Sequence[tuple[pa.DataType, bytes]] = (
    (pa.int64(), b"1"),
    (pa.int16(), b"1"),
    (pa.int32(), b"-1"),
    (pa.uint32(), b"1"),
    (pa.bool_(), b"t"),
    (pa.float64(), b"1.5"),
    (pa.decimal128(10, 2), b"1.50"),
    (pa.date32(), b"2001-02-03"),
    (pa.timestamp("us"), b"2001-02-03 04:05:06.7"),
    (pa.timestamp("us", "UTC"), b"2001-02-03 04:05:06.7+00"),
    (pa.binary(), b"\\x00ff"),
    (pa.string(), b"text"),
)
"""A kind of column each, and a text of it; the first is the key."""


def compile_loops() -> Slice:
    """Run a made-up transaction through the decoder; the slice that came out is of no table of anybody's."""
    columns = tuple(Column(name=f"c{at}", type=kind, source_type="") for at, (kind, _text) in enumerate(_VALUES))
    schema = TableSchema(name=TableName("deltaworks", "warm"), columns=columns, key=("c0",), has_before=True)
    builder = SliceBuilder(relations=Relations(describe=lambda _relation: schema))
    for message in _transaction():
        payload = b"w" + struct.pack(">QQq", 8, 8, 0) + message
        builder.buffer.append(memoryview(payload))
    builder.read(max_changes=1000)
    return builder.take()


def _transaction() -> Sequence[bytes]:
    new, old = [text for _kind, text in _VALUES], [b"2", *(text for _kind, text in _VALUES[1:])]
    number = struct.pack(">I", _RELATION)
    return (
        b"R"
        + number
        + b"deltaworks\0warm\0f"
        + struct.pack(">H", len(_VALUES))
        + b"".join(map(_column, range(len(_VALUES)))),
        b"B" + struct.pack(">QqI", 8, 0, 3),
        b"I" + number + b"N" + _row(new),
        b"U" + number + b"O" + _row(old) + b"N" + _row(new),
        b"U" + number + b"N" + _row([new[0], *[None] * (len(new) - 1)]),
        b"D" + number + b"O" + _row(old),
        b"C" + struct.pack(">BQQq", 0, 8, 16, 0),
    )


def _column(at: int) -> bytes:
    return bytes([at == 0]) + f"c{at}".encode() + b"\0" + struct.pack(">Ii", 25, -1)


def _row(values: Sequence[bytes | None]) -> bytes:
    cells = (b"n" if value is None else b"t" + struct.pack(">I", len(value)) + value for value in values)
    return struct.pack(">H", len(values)) + b"".join(cells)
