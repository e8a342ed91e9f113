"""The decoder on captured messages. The bytes are what PostgreSQL 18 sent for the statements beside them."""

import contextlib
import struct

import pytest
from capture.row_messages import UNCHANGED, Begin, Commit, Delete, Insert, Update, decode
from hypothesis import given
from hypothesis import strategies as st

from deltaworks.capture.postgres.pgoutput import (
    LogicalMessage,
    MalformedMessageError,
    Origin,
    Relation,
    RelationColumn,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
    Truncate,
    TypeName,
)

COLUMNS = (
    RelationColumn(True, "id", 23, -1),
    RelationColumn(False, "name", 25, -1),
    RelationColumn(False, "feels", 16385, -1),
    RelationColumn(False, "body", 25, -1),
)

# create table t (id int primary key, name text, feels mood, body text)
GOLDEN = {
    "begin": (
        "42000000000172bb30000303e3ff964ddc000002f1",
        Begin(commit_lsn=0x172BB30, committed_at_us=1795387510631900, xid=753),
    ),
    "commit": (
        "4300000000000172bb30000000000172bb98000303e3ff964ddc",
        Commit(commit_lsn=0x172BB30, end_lsn=0x172BB98, committed_at_us=1795387510631900),
    ),
    "type": ("59000040017075626c6963006d6f6f6400", TypeName(16385, "public", "mood")),
    "relation": (
        "52000040037075626c69630074006400040169640000000017ffffffff006e616d650000000019ffffffff"
        "006665656c730000004001ffffffff00626f64790000000019ffffffff",
        Relation(16387, "public", "t", "d", COLUMNS),
    ),
    # insert into t values (1, 'é')
    "insert": ("49000040034e00047400000001317400000002c3a96e6e", Insert(16387, [b"1", "é".encode(), None, None])),
    # update t set name = 'b' where id = 2, with a body of 4,000 bytes kept out of line
    "update": (
        "55000040034e00047400000001327400000001627400000005686170707975",
        Update(16387, None, False, [b"2", b"b", b"happy", UNCHANGED]),
    ),
    # delete from t where id = 3
    "delete": ("44000040034b00047400000001336e6e6e", Delete(16387, [b"3", None, None, None], True)),
    "truncate": ("54000000010000004003", Truncate((16387,))),
    # select pg_logical_emit_message(true, 'deltaworks.mark', 'm')
    "message": (
        "4d01000000000172bb3064656c7461776f726b732e6d61726b00000000016d",
        LogicalMessage(True, 0x172BB30, "deltaworks.mark", b"m"),
    ),
    # A transaction larger than logical_decoding_work_mem, part of it rolled back.
    "stream start": ("53000002f101", StreamStart(753)),
    "stream stop": ("45", StreamStop()),
    "stream commit": (
        "63000002f1000000000002d0ab580000000002d0abf800030500a1b2c3d4",
        StreamCommit(753, 0x2D0AB58, 0x2D0ABF8, 0x00030500A1B2C3D4),
    ),
    "stream abort": ("41000002f1000002f2", StreamAbort(753, 754)),
    "origin": ("4f000000000000002a656c7365776865726500", Origin(42, "elsewhere")),
}


def bytes_of(name: str) -> bytes:
    return bytes.fromhex(GOLDEN[name][0])


def row(*values: bytes) -> bytes:
    """A row of texts as the protocol has it."""
    return struct.pack(">H", len(values)) + b"".join(b"t" + struct.pack(">I", len(each)) + each for each in values)


def test_update_with_old_key_has_both_rows() -> None:
    data = b"U" + struct.pack(">I", 7) + b"K" + row(b"1") + b"N" + row(b"2")
    assert decode(data) == Update(7, [b"1"], True, [b"2"])


def test_update_under_identity_full_has_both_rows() -> None:
    data = b"U" + struct.pack(">I", 7) + b"O" + row(b"1", b"a") + b"N" + row(b"1", b"b")
    assert decode(data) == Update(7, [b"1", b"a"], False, [b"1", b"b"])


@pytest.mark.parametrize("name", GOLDEN)
def test_captured_message_is_decoded(name: str) -> None:
    assert decode(bytes_of(name)) == GOLDEN[name][1]


@pytest.mark.parametrize("name", GOLDEN)
def test_message_cut_short_or_too_long_is_refused_with_its_position(name: str) -> None:
    for broken in (bytes_of(name)[:-1], bytes_of(name) + b"\0"):
        with pytest.raises(MalformedMessageError, match="at 0/2A"):
            decode(broken, lsn=42)


@given(st.sampled_from(sorted(GOLDEN)), st.integers(0, 200), st.integers(0, 255))
def test_damaged_message_is_decoded_or_refused_and_nothing_else(name: str, at: int, byte: int) -> None:
    data = bytearray(bytes_of(name))
    data[at % len(data)] = byte
    with contextlib.suppress(MalformedMessageError):
        decode(bytes(data))


@pytest.mark.parametrize("data", [b"", b"?", b"P\0"])
def test_unknown_message_is_refused(data: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="kind"):
        decode(data)
