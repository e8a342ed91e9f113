"""Decoder of pgoutput, protocol version 1, text format: bytes in, values out, no input or output.

See "Logical Replication Message Formats" in PostgreSQL's documentation. Values stay the bytes the
server sent; `types.to_arrow` reads whole columns of them at once.
"""

import struct
from collections.abc import Callable
from enum import Enum
from typing import Literal, NamedTuple

from deltaworks.errors import InvariantError
from deltaworks.position import Lsn

POSTGRES_EPOCH_US = 946_684_800_000_000
"""2000-01-01 UTC, PostgreSQL's zero of time, in microseconds since 1970."""


class MalformedMessageError(InvariantError):
    """A replication message does not follow the protocol; nothing behind it may be trusted."""


class Unchanged(Enum):
    """The marker for a large value that an update did not touch and the server did not send."""

    UNCHANGED = "unchanged"


UNCHANGED = Unchanged.UNCHANGED

Value = bytes | None | Literal[Unchanged.UNCHANGED]
Row = list[Value]


class Begin(NamedTuple):
    """A transaction starts; its changes follow, whole and in one piece."""

    commit_lsn: int
    committed_at_us: int
    xid: int
    """The transaction's id, 32 bits."""


class Commit(NamedTuple):
    """The transaction ends. `end_lsn` is just behind its commit record, where reading may resume."""

    commit_lsn: int
    end_lsn: int
    committed_at_us: int


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


class Insert(NamedTuple):
    """A row was created."""

    relation_id: int
    new: Row


class Update(NamedTuple):
    """A row was changed. `old` is sent where the key changed, or always under identity full.

    With `old_is_key` only the key columns of `old` hold values, the others are null and mean nothing.
    """

    relation_id: int
    old: Row | None
    old_is_key: bool
    new: Row


class Delete(NamedTuple):
    """A row was deleted. With `old_is_key` only its key columns are there."""

    relation_id: int
    old: Row
    old_is_key: bool


class Truncate(NamedTuple):
    """Tables were emptied, together."""

    relation_ids: tuple[int, ...]


class LogicalMessage(NamedTuple):
    """What somebody wrote with `pg_logical_emit_message`."""

    transactional: bool
    lsn: int
    prefix: str
    content: bytes


Message = Begin | Commit | Relation | TypeName | Origin | Insert | Update | Delete | Truncate | LogicalMessage

_BEGIN = struct.Struct(">xQqI")
_COMMIT = struct.Struct(">xBQQq")
_COLUMN_TAIL = struct.Struct(">Ii")
_MESSAGE = struct.Struct(">xBQ")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_SIZE = struct.Struct(">i")

_NEW, _KEY, _OLD = ord("N"), ord("K"), ord("O")
_TEXT, _NULL, _SKIPPED = ord("t"), ord("n"), ord("u")


def decode(data: bytes, *, lsn: int = 0) -> Message:
    """Decode one message. `lsn` is where it was in the WAL, for the error.

    Raises:
        MalformedMessageError: unknown kind, cut short, or longer than it says.
    """
    read = _READERS.get(data[0]) if data else None
    if read is None:
        raise MalformedMessageError(f"cannot decode a message of kind {data[:1]!r} at {Lsn(lsn)}; is it protocol 1?")
    try:
        return read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedMessageError(
            f"cannot decode the {chr(data[0])!r} message of {len(data)} bytes at {Lsn(lsn)}: {error}"
        ) from error


def _begin(data: bytes) -> Begin:
    commit_lsn, committed_at, xid = _BEGIN.unpack(data)
    return Begin(commit_lsn, committed_at + POSTGRES_EPOCH_US, xid)


def _commit(data: bytes) -> Commit:
    _flags, commit_lsn, end_lsn, committed_at = _COMMIT.unpack(data)
    return Commit(commit_lsn, end_lsn, committed_at + POSTGRES_EPOCH_US)


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


def _insert(data: bytes) -> Insert:
    _expect(data[5] == _NEW)
    new, at = _row(data, 6)
    _expect_end(data, at)
    return Insert(_U32.unpack_from(data, 1)[0], new)


def _update(data: bytes) -> Update:
    old: Row | None = None
    kind, at = data[5], 5
    if kind != _NEW:
        _expect(kind in (_KEY, _OLD))
        old, at = _row(data, 6)
        _expect(data[at] == _NEW)
    new, at = _row(data, at + 1)
    _expect_end(data, at)
    return Update(_U32.unpack_from(data, 1)[0], old, kind == _KEY, new)


def _delete(data: bytes) -> Delete:
    _expect(data[5] in (_KEY, _OLD))
    old, at = _row(data, 6)
    _expect_end(data, at)
    return Delete(_U32.unpack_from(data, 1)[0], old, data[5] == _KEY)


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


def _row(data: bytes, at: int) -> tuple[Row, int]:
    (count,) = _U16.unpack_from(data, at)
    at += 2
    row: Row = []
    size_at = _SIZE.unpack_from
    for _ in range(count):
        kind = data[at]
        if kind == _TEXT:
            start = at + 5
            at = start + size_at(data, at + 1)[0]
            _expect(at >= start)
            row.append(data[start:at])
        elif kind == _NULL:
            row.append(None)
            at += 1
        else:
            _expect(kind == _SKIPPED)
            row.append(UNCHANGED)
            at += 1
    return row, at


def _text(data: bytes, at: int) -> tuple[str, int]:
    end = data.index(0, at)
    return data[at:end].decode(), end + 1


def _expect(holds: bool) -> None:
    if not holds:
        raise ValueError("a marker byte or a size is wrong")


def _expect_end(data: bytes, at: int) -> None:
    # Slices never complain, so a message that was cut short shows only here.
    if at != len(data):
        raise ValueError(f"it should have {at} bytes")


_READERS: dict[int, Callable[[bytes], Message]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("R"): _relation,
    ord("Y"): _type_name,
    ord("O"): _origin,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
    ord("T"): _truncate,
    ord("M"): _message,
}
