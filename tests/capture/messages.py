"""Replication messages as the server writes them, for tests of what reads them."""

import struct
from collections.abc import Iterator, Sequence

from capture.row_messages import UNCHANGED, Value

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.source import Slice


def row(values: Sequence[Value]) -> bytes:
    """A row of texts, nulls and markers for values that were not sent."""
    return struct.pack(">H", len(values)) + b"".join(cell(value) for value in values)


def cell(value: Value) -> bytes:
    if value is None:
        return b"n"
    if value is UNCHANGED:
        return b"u"
    return b"t" + struct.pack(">I", len(value)) + value


def relation(number: int, name: str, columns: Sequence[tuple[bool, str]], *, identity: str = "d") -> bytes:
    head = b"R" + struct.pack(">I", number) + b"public\0" + name.encode() + b"\0" + identity.encode()
    parts = [bytes([is_key]) + column.encode() + b"\0" + struct.pack(">Ii", 25, -1) for is_key, column in columns]
    return head + struct.pack(">H", len(columns)) + b"".join(parts)


def begin(commit_lsn: int, *, at_us: int = 0, xid: int = 700) -> bytes:
    return b"B" + struct.pack(">QqI", commit_lsn, at_us, xid)


def commit(commit_lsn: int, *, at_us: int = 0) -> bytes:
    return b"C" + struct.pack(">BQQq", 0, commit_lsn, commit_lsn + 8, at_us)


def insert(number: int, new: Sequence[Value]) -> bytes:
    return b"I" + struct.pack(">I", number) + b"N" + row(new)


def update(number: int, new: Sequence[Value], *, key: Sequence[Value] = (), old: Sequence[Value] = ()) -> bytes:
    before = b"K" + row(key) if key else b"O" + row(old) if old else b""
    return b"U" + struct.pack(">I", number) + before + b"N" + row(new)


def delete(number: int, *, key: Sequence[Value] = (), old: Sequence[Value] = ()) -> bytes:
    return b"D" + struct.pack(">I", number) + (b"K" + row(key) if key else b"O" + row(old))


def truncate(*numbers: int) -> bytes:
    return b"T" + struct.pack(f">IB{len(numbers)}I", len(numbers), 0, *numbers)


def logical_message(prefix: str, content: bytes, *, transactional: bool = True, lsn: int = 0) -> bytes:
    head = b"M" + struct.pack(">BQ", transactional, lsn) + prefix.encode() + b"\0"
    return head + struct.pack(">I", len(content)) + content


def in_stream(message: bytes, *, xid: int) -> bytes:
    """The message as it stands inside of a streamed transaction."""
    return message[:1] + struct.pack(">I", xid) + message[1:]


def framed(message: bytes, *, lsn: int = 42) -> bytes:
    """The message as WAL data in a CopyData frame."""
    payload = b"w" + struct.pack(">QQq", lsn, lsn, 0) + message
    return b"d" + struct.pack(">I", 4 + len(payload)) + payload


def keep_alive(end_of_wal: int, *, reply: bool = False) -> bytes:
    return b"d" + struct.pack(">IcQqB", 22, b"k", end_of_wal, 0, reply)


def slices_of(builder: SliceBuilder, data: bytes, *, pieces: Sequence[int] = (), max_changes: int) -> Iterator[Slice]:
    """Feed bytes in pieces of these sizes, then the rest; every slice that must be taken, and what is left."""
    cuts = iter(pieces)
    while True:
        builder.read(max_changes)
        builder.make_room()
        if builder.is_complete:
            yield builder.take()
            continue
        if not data:
            break
        room = builder.buffer.free()
        piece, data = data[: (size := min(next(cuts, len(data)), len(room)))], data[size:]
        room[: len(piece)] = piece
        builder.buffer.received(len(piece))
    yield builder.take()


def stream_start(xid: int) -> bytes:
    return b"S" + struct.pack(">IB", xid, 1)


def stream_stop() -> bytes:
    return b"E"


def stream_commit(xid: int, commit_lsn: int, *, at_us: int = 0) -> bytes:
    return b"c" + struct.pack(">IBQQq", xid, 0, commit_lsn, commit_lsn + 8, at_us)


def stream_abort(xid: int, part: int) -> bytes:
    return b"A" + struct.pack(">II", xid, part)
