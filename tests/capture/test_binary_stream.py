"""A stream in the server's binary form has the values of one in text, odd ones too."""

import struct
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from capture import messages
from capture import row_decoder as rows
from capture.row_messages import Value, decode
from capture.test_columnar import NEARBY, VALUES, patient
from hypothesis import given
from hypothesis import strategies as st
from servers.postgres import Database

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.source import SourceUnreachableError
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain
from deltaworks.schema import Column, TableName, TableSchema

SERVERS_NAMES = {
    "bool": "boolean",
    "int2": "smallint",
    "int4": "integer",
    "int8": "bigint",
    "oid": "oid",
    "double": "double precision",
    "cents": "numeric(10,2)",
    "day": "date",
    "time": "timestamp without time zone",
    "instant": "timestamp with time zone",
    "bytes": "bytea",
    "text": "text",
}
ALL = TableSchema(
    name=TableName("public", "every"),
    columns=tuple(Column(name=name, type=VALUES[name][0], source_type=kind) for name, kind in SERVERS_NAMES.items()),
    key=("int8",),
    has_before=True,
)
EPOCH = datetime(2000, 1, 1)  # noqa: DTZ001  the server's zero has no zone


def numeric(text: str) -> bytes:
    """numeric.c: groups of four digits, their weight, a sign, and how many digits stand behind the point."""
    if text == "NaN":
        return struct.pack(">HhHH", 0, 0, 0xC000, 0)
    value = Decimal(text)
    whole, _, fraction = f"{abs(value):f}".partition(".")
    digits = whole.zfill(-(-len(whole) // 4) * 4) + fraction.ljust(-(-len(fraction) // 4) * 4, "0")
    groups = [int(digits[at : at + 4]) for at in range(0, len(digits), 4)]
    weight = -(-len(whole) // 4) - 1
    while groups and groups[0] == 0:
        del groups[0]
        weight -= 1
    while groups and groups[-1] == 0:
        groups.pop()
    sign = 0x4000 if value < 0 else 0
    return struct.pack(f">HhHH{len(groups)}H", len(groups), weight if groups else 0, sign, 2, *groups)


def moment(text: str) -> bytes:
    number = {"infinity": (1 << 63) - 1}.get(text)
    if number is None:
        since = datetime.fromisoformat(text.removesuffix("+00")) - EPOCH
        number = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    return struct.pack(">q", number)


def day(text: str) -> bytes:
    edges = {"infinity": (1 << 31) - 1, "-infinity": -(1 << 31), "0044-03-15 BC": -746_117, "12000-01-01": 3_652_425}
    number = edges[text] if text in edges else (date.fromisoformat(text) - EPOCH.date()).days
    return struct.pack(">i", number)


def in_binary(name: str, text: str) -> bytes:
    numbers = {"int2": ">h", "int4": ">i", "int8": ">q", "oid": ">I"}
    if name in numbers:
        return struct.pack(numbers[name], int(text))
    makers: dict[str, Any] = {
        "bool": lambda: bytes([text == "t"]),
        "double": lambda: struct.pack(">d", float(text)),
        "cents": lambda: numeric(text),
        "day": lambda: day(text),
        "time": lambda: moment(text),
        "instant": lambda: moment(text),
        "bytes": lambda: bytes.fromhex(text[2:]),
        "text": text.encode,
    }
    return makers[name]()  # type: ignore[no-any-return]  # as above


def value_of(name: str) -> st.SearchStrategy[str | None]:
    texts = VALUES[name][1]
    if name == "day":
        # No server sends a day that its calendar does not have.
        texts = texts.filter(lambda text: text != "2021-02-29")
    if name in {"time", "instant"}:
        texts = texts.filter(lambda text: "BC" not in text)
    if name == "cents":
        texts = texts.map(lambda text: text if text == "NaN" else f"{Decimal(text):.2f}")
    if name == "double":
        texts = texts.filter(lambda text: text != "-0.0")
    return texts if name == "int8" else texts | st.none()


ROWS = st.tuples(*(value_of(name) for name in SERVERS_NAMES)).map(list)


@patient
@given(st.lists(st.tuples(ROWS, ROWS), min_size=1, max_size=4))
def test_binary_values_are_read_as_their_texts_are(pairs: list[tuple[list[str | None], list[str | None]]]) -> None:
    columns = [(True, name) for name in SERVERS_NAMES]
    frame = [messages.begin(100), messages.relation(7, "every", columns, identity="f")]

    def stream(*, binary: bool) -> list[bytes]:
        def cells(row: list[str | None]) -> list[Value]:
            return [
                None if text is None else in_binary(name, text) if binary else text.encode()
                for name, text in zip(SERVERS_NAMES, row, strict=True)
            ]

        updates = [messages.update(7, cells(new), old=cells(old)) for old, new in pairs]
        deletes = [messages.delete(7, old=cells(old)) for old, _ in pairs]
        return [*frame, *updates, *deletes, messages.commit(100)]

    builder = SliceBuilder(relations=Relations(lambda _relation: ALL), nearby_xid=NEARBY)
    data = b"".join(messages.framed(as_binary(message)) for message in stream(binary=True))
    (found,) = messages.slices_of(builder, data, max_changes=100)
    oracle = rows.SliceBuilder(describe=lambda _relation: ALL, clock=rows.XidClock(NEARBY))
    for message in stream(binary=False):
        oracle.feed(decode(message))
    (batch,), (wanted,) = found.batches, oracle.take().batches
    batch.rows.validate(full=True)
    assert str(batch.rows.to_pylist()) == str(wanted.rows.to_pylist())


def as_binary(message: bytes) -> bytes:
    """The message with its values marked as binary ones."""
    if message[:1] not in {b"U", b"D"}:
        return message
    head, at, out = message[:5], 5, b""
    while at < len(message):
        out += message[at : at + 3]
        count, at = int.from_bytes(message[at + 1 : at + 3], "big"), at + 3
        for _ in range(count):
            size = 0 if message[at : at + 1] == b"n" else 4 + int.from_bytes(message[at + 1 : at + 5], "big")
            out += (b"n" if size == 0 else b"b") + message[at + 1 : at + 1 + size]
            at += 1 + size
    return head + out


MADE = (
    """create table every (id int primary key, a boolean, b smallint, c bigint, d oid, e real, f double precision,
       g numeric(10,2), h numeric(18,5), i date, j timestamp, k timestamptz(3), l text, m varchar(20), n character(4),
       o bytea, p uuid, q json, r numeric(38,18), big text)""",
    "alter table every alter big set storage external",
)
ODD = (
    """insert into every values (1, true, -32768, 9223372036854775807, 4000000000, 'NaN', '-Infinity', 'NaN', -0.00001,
       'infinity', '-infinity', 'infinity', 'é', '', 'x', '\\x00ff', '00000000-0000-0000-0000-0000000000ff',
       '{"b": 1,  "a": 2}', 'NaN', repeat('z', 5000))""",
    """insert into every (id, g, h, i, j, k) values (2, -12345678.90, 9999999999999.99999, '0044-03-15 BC',
       '4713-01-01 00:00:00 BC', '294276-12-31 23:59:59.999+00'), (3, 0, 0, '5874897-12-31', '0001-01-01 00:00:00',
       '10000-01-01 00:00:00.5+00'), (4, 0.01, 10000, '0001-01-01', '9999-12-31 23:59:59.999999',
       '0001-12-31 23:59:59.999+00 BC'), (5, null, null, '-infinity', '0045-02-29 12:30:00.25 BC', null)""",
    "insert into every (id, e, f) select g, g / 7.0, g / 7.0 from generate_series(10, 30) g",
    "insert into every (id, r) values (40, 12345678901234567890.123456789012345678), (41, -1), (42, 0)",
    "insert into every (id, r) values (43, 0.000000000000000001), (44, -99999999999999999999.5), (45, 10000)",
    "insert into every (id, r) values (46, 12.5), (47, -0.25)",
    "update every set b = 5 where id = 1",
    "update every set id = 99 where id = 1",
    "alter table every replica identity full",
    "update every set c = 1 where id in (2, 99)",
    "delete from every where id = 3",
    "truncate every",
)


def changes_of(log: MemoryLog) -> list[str]:
    return [str(batch.rows.to_pylist()) for group in log.reader().read(after_sequence=-1) for batch in group.batches]


def test_server_sends_the_same_values_in_both_forms(database: Database) -> None:
    database.execute(*MADE)
    logs = {"text": MemoryLog(), "binary": MemoryLog()}

    def record() -> None:
        for form, log in logs.items():
            with database.source("every", name=f"s_{form}", stream_format=form) as source, log.writer() as writer:
                drain(source, writer, log.reader())

    record()
    for statement in ODD:
        database.execute(statement)
    record()
    text, binary = (
        [change for batch in changes_of(log) for change in batch.split("}, {'_op'")] for log in logs.values()
    )
    assert len(text) > 30
    assert text == binary


def test_table_with_a_type_that_has_no_binary_form_here_makes_the_stream_text(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    log = MemoryLog()

    def record() -> None:
        with database.source("t", stream_format="binary") as source, log.writer() as writer:
            drain(source, writer, log.reader())

    record()
    # The column is gone when the stream is opened, and there in the part of the log that is read.
    database.execute(
        "alter table t add column v interval",
        "insert into t values (1, '1 day')",
        "alter table t drop column v",
        "insert into t values (2)",
    )
    record()
    found = [row for group in log.reader().read(after_sequence=-1) for b in group.batches for row in b.rows.to_pylist()]
    assert [(row["id"], row.get("v")) for row in found] == [(1, "1 day"), (2, None)]


def test_form_that_differs_within_a_column_is_damage() -> None:
    pair = TableSchema(
        name=TableName("public", "t"), columns=(Column(name="a", type=pa.int32(), source_type="integer"),), key=("a",)
    )
    builder = SliceBuilder(relations=Relations(lambda _relation: pair))
    binary = as_binary(messages.update(7, [struct.pack(">i", 5)]))
    stream = [messages.begin(100), messages.relation(7, "t", [(True, "a")]), messages.insert(7, [b"5"]), binary]
    with pytest.raises(Exception, match="cannot decode") as damaged:
        list(
            messages.slices_of(builder, b"".join(map(messages.framed, [*stream, messages.commit(100)])), max_changes=5)
        )
    assert not isinstance(damaged.value, SourceUnreachableError)
