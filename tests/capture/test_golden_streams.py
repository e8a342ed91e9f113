"""Streams of real servers, captured once: both decoders read them alike, and as the rows beside them say.

    tests/golden/pgoutput/statements.sql ──server──► 18-protocol-1.bin, 18-protocol-2.bin ──decoders──► 18.json

Protocol 2 streams the large transaction before its end, and what it says in the end is the same. To rewrite the
files: `DELTAWORKS_REWRITE=1 pytest tests/capture/test_golden_streams.py`, and again with `--postgres-binaries`.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from capture import messages
from capture import row_decoder as rows
from capture.row_messages import decode
from pydantic import SecretStr
from servers.postgres import Database

from deltaworks.capture.postgres.buffer import ReceiveBuffer
from deltaworks.capture.postgres.catalog import describe_relation
from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.connect import connect
from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.relations import Describe, Relations
from deltaworks.capture.postgres.wire import SocketWire
from deltaworks.capture.source import Slice
from deltaworks.schema import Column, TableName, TableSchema

GOLDEN = Path(__file__).parent.parent / "golden" / "pgoutput"
VERSIONS = ("15", "18")
TABLES = (
    """create table item (id int primary key, name text, price numeric(10,2), born date, at timestamptz, tags int[],
       raw bytea, ok bool, score double precision, big text)""",
    "alter table item alter column big set storage external",
    "create table whole (id text primary key, amount numeric(10,2), day date)",
    "alter table whole replica identity full",
    "create table other (id int primary key)",
    "create table passed_over (id int primary key)",
)
DEADLINE_S = 20.0


def table(name: str, *columns: tuple[str, str, pa.DataType], has_before: bool = False) -> TableSchema:
    return TableSchema(
        name=TableName("public", name),
        columns=tuple(
            Column(name=column, type=kind, source_type=source_type, nullable=column != "id")
            for column, source_type, kind in columns
        ),
        key=("id",),
        has_before=has_before,
    )


ITEM = (
    ("id", "integer", pa.int32()),
    ("name", "text", pa.string()),
    ("price", "numeric(10,2)", pa.decimal128(10, 2)),
    ("born", "date", pa.date32()),
    ("at", "timestamp with time zone", pa.timestamp("us", "UTC")),
    ("tags", "integer[]", pa.list_(pa.int32())),
    ("raw", "bytea", pa.binary()),
    ("ok", "boolean", pa.bool_()),
    ("score", "double precision", pa.float64()),
    ("big", "text", pa.string()),
)
WHOLE = (("id", "text", pa.string()), ("amount", "numeric(10,2)", pa.decimal128(10, 2)), ("day", "date", pa.date32()))
SCHEMAS = {
    ("item", 10): table("item", *ITEM),
    ("item", 11): table("item", *ITEM, ("added", "integer", pa.int32())),
    ("whole", 3): table("whole", *WHOLE, has_before=True),
    ("other", 1): table("other", ("id", "integer", pa.int32())),
}
# Anything near: the ids of a new server are small.
NEARBY_XID = 1_000


def describe(relation: Relation) -> TableSchema | None:
    return SCHEMAS.get((relation.name, len(relation.columns)))


def frames(data: bytes) -> Iterator[bytes]:
    """The whole frames of a stream."""
    at = 0
    while at + 5 <= len(data) and (end := at + 1 + int.from_bytes(data[at + 1 : at + 5], "big")) <= len(data):
        yield data[at:end]
        at = end


def by_columns(data: bytes, *, describe: Describe = describe) -> list[Slice]:
    builder = SliceBuilder(relations=Relations(describe), nearby_xid=NEARBY_XID)
    slices = list(messages.slices_of(builder, data, max_changes=50))
    builder.close()
    return slices


def by_rows(data: bytes) -> list[Slice]:
    """Slices of the plain decoder, cut as the columnar one cuts them."""
    builder = rows.SliceBuilder(describe=describe, clock=rows.XidClock(NEARBY_XID))
    slices: list[Slice] = []
    for frame in frames(data):
        if frame[5:6] == b"w":
            builder.feed(decode(frame[30:]))
            if not builder.in_transaction and (builder.mark is not None or builder.change_count >= 50):
                slices.append(builder.take())
    return [*slices, builder.take()]


def as_json(slices: Sequence[Slice]) -> list[dict[str, Any]]:
    """The rows in the order of their commits, as they stand in the file."""
    found = [
        {"table": batch.schema.name.name} | {name: value for name, value in row.items() if not _is_bare(name, value)}
        for taken in slices
        for batch in taken.batches
        for row in batch.rows.to_pylist()
    ]
    found.sort(key=lambda row: (row["_commit"], row["_ordinal"]))
    listed: list[dict[str, Any]] = json.loads(json.dumps(found, default=_text))
    return listed


def _is_bare(name: str, value: object) -> bool:
    """Whether it is a column about the change with nothing to say; those of the table stay."""
    return name.startswith("_") and value is None


def _text(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def summary(slices: Sequence[Slice]) -> list[tuple[Any, ...]]:
    """What of slices is the same for both decoders; NaN as a text, which equals itself."""
    return [
        (
            [(batch.schema, str(batch.rows.to_pylist())) for batch in taken.batches],
            taken.transaction_count,
            taken.mark,
            taken.mark_position,
        )
        for taken in slices
    ]


def golden(version: str, protocol: int) -> bytes:
    return (GOLDEN / f"{version}-protocol-{protocol}.bin").read_bytes()


def golden_rows(version: str) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = json.loads((GOLDEN / f"{version}.json").read_text(encoding="utf-8"))
    return listed


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_stream_is_read_alike_by_both_decoders(version: str) -> None:
    data = golden(version, 1)
    slices = by_columns(data)
    assert summary(slices) == summary(by_rows(data))
    assert str(as_json(slices)) == str(golden_rows(version))


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_stream_of_pieces_of_transactions_has_the_same_rows(version: str) -> None:
    data = golden(version, 2)
    kinds = {frame[30:31] for frame in frames(data)}
    assert {b"S", b"E", b"c", b"A"} <= kinds
    assert str(as_json(by_columns(data))) == str(golden_rows(version))


def test_server_sends_today_what_the_golden_stream_has(database: Database) -> None:
    streams = captured(database)
    with connect(SecretStr(database.dsn), name="t", application="t") as catalog:

        def described(relation: Relation) -> TableSchema | None:
            schema = describe(relation)
            assert schema in {None, describe_relation(catalog, relation)}
            return schema

        found = as_json(by_columns(streams[1], describe=described))
    assert str(found) == str(as_json(by_columns(streams[2])))
    last = {row["id"]: row["name"] for row in found if row["table"] == "item" and row["_op"] != "d"}
    in_table = dict(database.rows("select id, name from item"))
    assert {number: last[number] for number in in_table} == in_table
    if "DELTAWORKS_REWRITE" in os.environ:
        rewrite(database, streams, found)
    assert str(timeless(found)) == str(timeless(golden_rows(VERSIONS[-1])))


def timeless(listed: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what another run changes."""
    return [
        {name: value for name, value in row.items() if name not in {"_commit", "_txid", "_committed_at"}}
        for row in listed
    ]


def rewrite(database: Database, streams: dict[int, bytes], found: Sequence[dict[str, Any]]) -> None:
    ((version,),) = database.rows("select current_setting('server_version_num')::int / 10000")
    for protocol, data in streams.items():
        (GOLDEN / f"{version}-protocol-{protocol}.bin").write_bytes(data)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in found)
    (GOLDEN / f"{version}.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def captured(database: Database) -> dict[int, bytes]:
    """The server's stream of the statements by protocol, as it came from the socket."""
    name = database.name
    database.execute(
        f"alter database {name} set logical_decoding_work_mem = '64kB'",
        *TABLES,
        f"create publication {name} for table item, whole, other, passed_over",
        *(f"select pg_create_logical_replication_slot('{name}_{protocol}', 'pgoutput')" for protocol in (1, 2)),
    )
    statements = (GOLDEN / "statements.sql").read_text(encoding="utf-8").split(";\n")
    database.execute("insert into other values (-1)")
    with database.connect() as connection:
        for statement in statements:
            if statement.strip():
                connection.execute(statement)  # type: ignore[arg-type]  # the file is ours
    database.execute("select pg_logical_emit_message(true, 'deltaworks.mark', 'the end')")
    return {
        1: stream_of(database, f"{name}_1", "proto_version '1'"),
        2: stream_of(database, f"{name}_2", "proto_version '2', streaming 'on'"),
    }


def stream_of(database: Database, slot: str, options: str) -> bytes:
    """All bytes up to the commit of the mark."""
    dsn = SecretStr(database.dsn)
    command = (
        f"START_REPLICATION SLOT {slot} LOGICAL 0/0 ({options}, publication_names '{database.name}', messages 'true')"
    )
    received, deadline = b"", time.monotonic() + DEADLINE_S
    with connect(dsn, name="t", application="t", replication=True) as replication:
        wire = SocketWire.start(replication, command.encode())
        while (end := end_of_mark(received)) is None:
            assert time.monotonic() < deadline, "the mark never came"
            buffer = ReceiveBuffer()
            if not wire.receive(buffer):
                wire.wait(0.1)
            received += bytes(buffer.data[: buffer.end])
        wire.close()
    return received[:end]


def end_of_mark(data: bytes) -> int | None:
    """Where the transaction of the mark ends."""
    at, is_marked = 0, False
    for frame in frames(data):
        at += len(frame)
        is_marked |= b"deltaworks.mark" in frame
        if is_marked and frame[30:31] == b"C":
            return at
    return None
