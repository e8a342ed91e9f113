"""Messages of pgoutput, each as a value with its rows; for the oracle of the columnar decoder."""

import struct
from collections.abc import Callable
from enum import Enum
from typing import Literal, NamedTuple

from deltaworks.capture.postgres import pgoutput
from deltaworks.capture.postgres.pgoutput import MalformedMessageError
from deltaworks.capture.postgres.scan import POSTGRES_EPOCH_US
from deltaworks.position import Lsn

_BEGIN = struct.Struct(">xQqI")
_COMMIT = struct.Struct(">xBQQq")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")
_SIZE = struct.Struct(">i")
_NEW, _KEY, _OLD = ord("N"), ord("K"), ord("O")
_TEXT, _NULL, _SKIPPED = ord("t"), ord("n"), ord("u")


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


Message = Begin | Commit | Insert | Update | Delete | pgoutput.Message
NO_TRANSACTION = Begin(0, 0, 0)


def decode(data: bytes, *, lsn: int = 0) -> Message:
    """Decode any message of protocol 1."""
    read = _READERS.get(data[0]) if data else None
    if read is None:
        return pgoutput.decode(data, lsn=lsn)
    try:
        return read(data)
    except (struct.error, IndexError, ValueError) as error:
        raise MalformedMessageError(f"cannot decode {data[:1]!r} at {Lsn(lsn)}: {error}") from error


def _begin(data: bytes) -> Begin:
    commit_lsn, committed_at, xid = _BEGIN.unpack(data)
    return Begin(commit_lsn, committed_at + POSTGRES_EPOCH_US, xid)


def _commit(data: bytes) -> Commit:
    _flags, commit_lsn, end_lsn, committed_at = _COMMIT.unpack(data)
    return Commit(commit_lsn, end_lsn, committed_at + POSTGRES_EPOCH_US)


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


def _expect(holds: bool) -> None:
    if not holds:
        raise ValueError("a marker byte or a size is wrong")


def _expect_end(data: bytes, at: int) -> None:
    if at != len(data):
        raise ValueError(f"it should have {at} bytes")


_READERS: dict[int, Callable[[bytes], Message]] = {
    ord("B"): _begin,
    ord("C"): _commit,
    ord("I"): _insert,
    ord("U"): _update,
    ord("D"): _delete,
}
