"""The messages of pgoutput (protocol 1 and 2) that carry no row: bytes in, values out, no input or output.

Rows, and where transactions begin and end, are read by `scan`. See "Logical Replication Message
Formats" in PostgreSQL's documentation.
"""

import struct
from collections.abc import Callable
from typing import NamedTuple

from deltaworks.errors import InvariantError
from deltaworks.position import Lsn


class MalformedMessageError(InvariantError):
    """A replication message does not follow the protocol; nothing behind it may be trusted."""


class RelationColumn(NamedTuple):
    """A column of a `Relation`."""

    in_identity: bool
    name: str
    type_oid: int
    modifier: int


class Relation(NamedTuple):
    """What a table looks like from here on."""

    id: int
    namespace: str
    name: str
    identity: str
    """The replica identity: `d` default, `n` nothing, `f` full, `i` an index."""
    columns: tuple[RelationColumn, ...]


class TypeName(NamedTuple):
    """The name of a type that is not built in."""

    oid: int
    namespace: str
    name: str


class Origin(NamedTuple):
    """The transaction was replicated to this server from that place."""

    lsn: int
    name: str


class Truncate(NamedTuple):
    """Tables were emptied, together."""

    relation_ids: tuple[int, ...]


class LogicalMessage(NamedTuple):
    """What somebody wrote with `pg_logical_emit_message`."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


class StreamStart(NamedTuple):
    """Changes of a transaction follow that has not ended yet, up to the next `StreamStop`."""

    xid: int


class StreamStop(NamedTuple):
    """What follows is of no streamed transaction, or of another one."""


class StreamCommit(NamedTuple):
    """A streamed transaction is committed; see the message of an ordinary commit."""

    xid: int
    commit_lsn: int
    end_lsn: int
    committed_at_us: int
    """As the server counts: since 2000."""


class StreamAbort(NamedTuple):
    """A streamed transaction, or with another `subxid` a part of it, was rolled back."""

    xid: int
    subxid: int


Message = Relation | TypeName | Origin | Truncate | LogicalMessage
StreamMessage = StreamStart | StreamStop | StreamCommit | StreamAbort

_MESSAGE = struct.Struct(">xBQ")
_COLUMN_TAIL = struct.Struct(">Ii")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_STREAM_START = struct.Struct(">xIB")
_STREAM_COMMIT = struct.Struct(">xIBQQq")
_STREAM_ABORT = struct.Struct(">xII")


def decode(data: bytes, *, lsn: int = 0) -> Message | StreamMessage:
    """Decode one message. `lsn` is where it was in the WAL, for the error.

    Raises:
        MalformedMessageError: unknown kind, cut short, or longer than it says.
    """
    read = _READERS.get(data[0]) if data else None
    if read is None:
        raise MalformedMessageError(f"cannot decode a message of kind {data[:1]!r} at {Lsn(lsn)}")
    try:
        return read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedMessageError(
            f"cannot decode the {chr(data[0])!r} message of {len(data)} bytes at {Lsn(lsn)}: {error}"
        ) from error


def _relation(data: bytes) -> Relation:
    (relation_id,) = _U32.unpack_from(data, 1)
    namespace, at = _text(data, 5)
    name, at = _text(data, at)
    identity = chr(data[at])
    (count,) = _U16.unpack_from(data, at + 1)
    at += 3
    columns: list[RelationColumn] = []
    for _ in range(count):
        in_identity = bool(data[at] & 1)
        column, at = _text(data, at + 1)
        columns.append(RelationColumn(in_identity, column, *_COLUMN_TAIL.unpack_from(data, at)))
        at += 8
    _expect_end(data, at)
    # The server leaves the namespace empty for pg_catalog.
    return Relation(relation_id, namespace or "pg_catalog", name, identity, tuple(columns))


def _type_name(data: bytes) -> TypeName:
    (oid,) = _U32.unpack_from(data, 1)
    namespace, at = _text(data, 5)
    name, at = _text(data, at)
    _expect_end(data, at)
    return TypeName(oid, namespace or "pg_catalog", name)


def _origin(data: bytes) -> Origin:
    name, at = _text(data, 9)
    _expect_end(data, at)
    return Origin(int.from_bytes(data[1:9], "big"), name)


def _truncate(data: bytes) -> Truncate:
    (count,) = _U32.unpack_from(data, 1)
    _expect_end(data, 6 + 4 * count)
    return Truncate(struct.unpack_from(f">{count}I", data, 6))


def _message(data: bytes) -> LogicalMessage:
    flags, lsn = _MESSAGE.unpack_from(data)
    prefix, at = _text(data, 10)
    (size,) = _U32.unpack_from(data, at)
    _expect_end(data, at + 4 + size)
    return LogicalMessage(bool(flags & 1), lsn, prefix, data[at + 4 :])


def _stream_start(data: bytes) -> StreamStart:
    return StreamStart(_STREAM_START.unpack(data)[0])


def _stream_stop(data: bytes) -> StreamStop:
    _expect_end(data, 1)
    return StreamStop()


def _stream_commit(data: bytes) -> StreamCommit:
    xid, _flags, commit_lsn, end_lsn, committed_at = _STREAM_COMMIT.unpack(data)
    return StreamCommit(xid, commit_lsn, end_lsn, committed_at)


def _stream_abort(data: bytes) -> StreamAbort:
    return StreamAbort(*_STREAM_ABORT.unpack(data))


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(0, at)
    return data[at:end].decode(), end + 1


def _expect_end(data: bytes, at: int) -> None:
    # Slices never complain, so a message that was cut short shows only here.
    if at != len(data):
        raise ValueError(f"it should have {at} bytes")


_READERS: dict[int, Callable[[bytes], Message | StreamMessage]] = {
    ord("R"): _relation,
    ord("Y"): _type_name,
    ord("O"): _origin,
    ord("T"): _truncate,
    ord("M"): _message,
    ord("S"): _stream_start,
    ord("E"): _stream_stop,
    ord("c"): _stream_commit,
    ord("A"): _stream_abort,
}
