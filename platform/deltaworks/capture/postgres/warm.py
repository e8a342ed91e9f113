"""Compiles the loops over bytes before the first change needs them.

Numba compiles a function on its first call, which takes seconds on a new machine and some tenths of a second
where the result lies on disk. A short made-up stream with a column of every kind goes through all of them.
"""

import struct
from collections.abc import Sequence

import pyarrow as pa

from deltaworks.capture.memory import refused
from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.source import Slice
from deltaworks.schema import Column, TableName, TableSchema

_RELATION = 1

_VALUES: Sequence[tuple[pa.DataType, str, bytes, bytes]] = (
    (pa.int64(), "bigint", b"1", bytes(7) + b"\1"),
    (pa.int16(), "smallint", b"1", b"\0\1"),
    (pa.int32(), "integer", b"-1", b"\xff\xff\xff\xff"),
    (pa.uint32(), "oid", b"1", b"\0\0\0\1"),
    (pa.bool_(), "boolean", b"t", b"\1"),
    (pa.float64(), "double precision", b"1.5", b"\x3f\xf8" + bytes(6)),
    (pa.decimal128(10, 2), "numeric(10,2)", b"1.50", b"\0\2\0\0\0\0\0\2\0\1\x13\x88"),
    (pa.date32(), "date", b"2000-01-02", b"\0\0\0\1"),
    (pa.timestamp("us"), "timestamp without time zone", b"2000-01-01 00:00:00.000001", bytes(7) + b"\1"),
    (pa.timestamp("us", "UTC"), "timestamp with time zone", b"2000-01-01 00:00:00.000001+00", bytes(7) + b"\1"),
    (pa.binary(), "bytea", b"\\x00ff", b"\x00\xff"),
    (pa.string(), "text", b"text", b"text"),
)
"""A kind of column each, its name, a text of it, and the same in binary; the first is the key."""


def compile_loops(*, in_binary: bool = False) -> Slice:
    """Run a made-up transaction through the decoder; the slice that came out is of no table of anybody's."""
    columns = tuple(Column(name=f"c{at}", type=kind, source_type=name) for at, (kind, name, *_) in enumerate(_VALUES))
    schema = TableSchema(name=TableName("deltaworks", "warm"), columns=columns, key=("c0",), has_before=True)
    builder = SliceBuilder(relations=Relations(describe=lambda _relation: schema))
    for message in _transaction(in_binary=in_binary):
        payload = b"w" + struct.pack(">QQq", 8, 8, 0) + message
        builder.buffer.append(memoryview(payload))
    # The first loop makes numba look for scipy once more: see `compiled`.
    with refused("scipy"):
        builder.read(max_changes=1000)
    return builder.take()


def _transaction(*, in_binary: bool) -> Sequence[bytes]:
    new = [binary if in_binary else text for _kind, _name, text, binary in _VALUES]
    # In binary it is as long as the new key, in text it may be any number.
    old = [bytes(7) + b"\2" if in_binary else b"2", *new[1:]]
    form = b"b" if in_binary else b"t"

    def row(values: Sequence[bytes | None]) -> bytes:
        cells = (b"n" if value is None else form + struct.pack(">I", len(value)) + value for value in values)
        return struct.pack(">H", len(values)) + b"".join(cells)

    number = struct.pack(">I", _RELATION)
    return (
        b"R"
        + number
        + b"deltaworks\0warm\0f"
        + struct.pack(">H", len(_VALUES))
        + b"".join(map(_column, range(len(_VALUES)))),
        b"B" + struct.pack(">QqI", 8, 0, 3),
        b"I" + number + b"N" + row(new),
        b"U" + number + b"O" + row(old) + b"N" + row(new),
        b"U" + number + b"N" + row([new[0], *[None] * (len(new) - 1)]),
        b"D" + number + b"O" + row(old),
        b"C" + struct.pack(">BQQq", 0, 8, 16, 0),
    )


def _column(at: int) -> bytes:
    return bytes([at == 0]) + f"c{at}".encode() + b"\0" + struct.pack(">Ii", 25, -1)
