"""The columnar decoder: held equal to the row decoder over streams of every message, cut anywhere."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from capture import messages
from capture import row_decoder as rows
from capture.row_messages import UNCHANGED, Value, decode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.pgoutput import MalformedMessageError, Relation
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.source import Slice
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

DIGITS = st.integers(-(10**20), 10**20).map(str)
DATES = st.dates().map(str) | st.sampled_from(["infinity", "-infinity", "0044-03-15 BC", "12000-01-01", "2021-02-29"])
TIMES = st.datetimes().map(str) | st.sampled_from(
    ["infinity", "2020-01-01 00:00:00.5", "1969-12-31 23:59:59.000001", "0001-01-01 00:00:00", "0044-03-15 00:00:00 BC"]
)
VALUES: dict[str, tuple[pa.DataType, st.SearchStrategy[str]]] = {
    "bool": (pa.bool_(), st.sampled_from(["t", "f"])),
    "int2": (pa.int16(), st.integers(-(2**15), 2**15 - 1).map(str)),
    "int4": (pa.int32(), st.integers(-(2**31), 2**31 - 1).map(str)),
    "int8": (pa.int64(), st.integers(-(2**63), 2**63 - 1).map(str)),
    "oid": (pa.uint32(), st.integers(0, 2**32 - 1).map(str)),
    "real": (pa.float32(), st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr)),
    "double": (pa.float64(), st.floats(allow_nan=False, allow_infinity=False).map(repr) | st.just("NaN")),
    "cents": (pa.decimal128(10, 2), st.decimals(-(10**7), 10**7, places=2).map(str) | st.just("NaN")),
    "huge": (pa.decimal128(38, 5), st.decimals(-(10**20), 10**20, places=5).map(str)),
    "number": (pa.string(), DIGITS),
    "day": (pa.date32(), DATES),
    "time": (pa.timestamp("us"), TIMES),
    "instant": (pa.timestamp("us", "UTC"), TIMES.map(lambda text: text + "+00" if text[:1].isdigit() else text)),
    "bytes": (pa.binary(), st.binary(max_size=9).map(lambda value: "\\x" + value.hex())),
    "text": (pa.string(), st.text(max_size=12)),
    "ints": (
        pa.list_(pa.int32()),
        st.lists(st.integers(0, 99), max_size=3)
        .map(lambda each: str(each).replace(" ", ""))
        .map(lambda text: "{" + text[1:-1] + "}")
        | st.just("[0:1]={1,2}"),
    ),
}
WIDE = TableSchema(
    name=TableName("public", "wide"),
    columns=tuple(Column(name=name, type=kind, source_type=name) for name, (kind, _) in VALUES.items()),
    key=("int8",),
)
PAIR = TableSchema(
    name=TableName("public", "pair"),
    columns=tuple(Column(name=name, type=pa.string(), source_type="text") for name in ("a", "b", "v")),
    key=("b", "a"),
)
GROWN = TableSchema(
    name=PAIR.name, columns=(*PAIR.columns, Column(name="w", type=pa.int32(), source_type="integer")), key=PAIR.key
)
FULL = TableSchema(
    name=TableName("public", "full"),
    columns=tuple(column for column in WIDE.columns if column.name in {"int8", "cents", "day", "text"}),
    key=("int8",),
    has_before=True,
)
WIDE_ID, PAIR_ID, FOREIGN_ID, FULL_ID = 7, 8, 9, 10
NEARBY = 3 << 32
MESSAGE_CONTENTS = st.sampled_from([b"", b"text", b"\xff\x00"])
# The first example compiles the decoder, and a row of every type is much to draw.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def describe(relation: Relation) -> TableSchema | None:
    schemas = {("wide", 16): WIDE, ("pair", 3): PAIR, ("pair", 4): GROWN, ("full", 4): FULL}
    return schemas.get((relation.name, len(relation.columns)))


def relation_of(number: int, schema: TableSchema) -> bytes:
    # Under identity full every column is part of the identity.
    columns = [(schema.has_before or name in schema.key, name) for name in schema.names]
    return messages.relation(number, schema.name.name, columns, identity="f" if schema.has_before else "d")


def row_of(schema: TableSchema) -> st.SearchStrategy[list[Value]]:
    def value_of(column: Column) -> st.SearchStrategy[Value]:
        values = (
            VALUES[column.name][1] if column.name in VALUES else DIGITS if column.name == "w" else st.text(max_size=3)
        )
        texts = values.map(str.encode)
        if column.name in schema.key:
            return texts
        return texts | st.none() | st.just(UNCHANGED) if pa.types.is_string(column.type) else texts | st.none()

    return st.tuples(*(value_of(column) for column in schema.columns)).map(list)


def changes_of(number: int, schema: TableSchema) -> st.SearchStrategy[bytes]:
    def key_of(values: Sequence[Value]) -> list[Value]:
        return [value if name in schema.key else None for name, value in zip(schema.names, values, strict=True)]

    def whole(values: Sequence[Value]) -> list[Value]:
        return [None if value is UNCHANGED else value for value in values]

    one = row_of(schema)
    # Under identity full the server sends the whole row before, never its key alone.
    key_only = [
        st.tuples(one, one).map(lambda pair: messages.update(number, pair[0], key=key_of(pair[1]))),
        one.map(lambda old: messages.delete(number, key=key_of(old))),
    ]
    return st.one_of(
        one.map(lambda new: messages.insert(number, whole(new))),
        one.map(lambda new: messages.update(number, new)),
        *([] if schema.has_before else key_only),
        st.tuples(one, one).map(lambda pair: messages.update(number, pair[0], old=whole(pair[1]))),
        one.map(lambda old: messages.delete(number, old=whole(old))),
        st.just(messages.truncate(number)),
    )


@st.composite
def transactions(draw: st.DrawFn) -> list[bytes]:
    """Messages of some transactions, in order; `pair` may get a column on the way."""
    stream: list[bytes] = []
    lsn, pair = 100, PAIR
    described = [
        relation_of(WIDE_ID, WIDE),
        relation_of(PAIR_ID, PAIR),
        relation_of(FULL_ID, FULL),
        messages.relation(FOREIGN_ID, "other", [(True, "id")]),
    ]
    for _ in range(draw(st.integers(1, 4))):
        lsn += draw(st.integers(16, 50))
        stream.append(messages.begin(lsn, at_us=draw(st.integers(0, 10**15)), xid=draw(st.integers(1, 2**32 - 1))))
        stream += described
        described = []
        if pair is PAIR and draw(st.booleans()):
            pair = GROWN
            stream.append(relation_of(PAIR_ID, pair))
        stream += draw(
            st.lists(
                changes_of(WIDE_ID, WIDE)
                | changes_of(PAIR_ID, pair)
                | changes_of(FULL_ID, FULL)
                | st.sampled_from([messages.insert(FOREIGN_ID, [b"1"]), messages.truncate(FOREIGN_ID, PAIR_ID)])
                | st.sampled_from([b"O" + bytes(8) + b"elsewhere\0", b"Y" + bytes(4) + b"public\0mood\0"])
                | st.booleans().map(
                    lambda is_in: messages.logical_message("deltaworks.mark", b"m", transactional=is_in)
                )
                | MESSAGE_CONTENTS.map(lambda content: messages.logical_message("app", content)),
                max_size=6,
            )
        )
        stream.append(messages.commit(lsn, at_us=draw(st.integers(0, 10**15))))
        stream += [
            messages.logical_message("alone", content, transactional=False, lsn=lsn + 8)
            for content in draw(st.lists(MESSAGE_CONTENTS, max_size=1))
        ]
    return stream


def expected(stream: Sequence[bytes], *, max_changes: int) -> list[Slice]:
    builder = rows.SliceBuilder(describe=describe, clock=rows.XidClock(NEARBY))
    slices: list[Slice] = []
    for message in stream:
        builder.feed(decode(message))
        if not builder.in_transaction and (builder.mark is not None or builder.change_count >= max_changes):
            slices.append(builder.take())
    return [*slices, builder.take()]


def as_text(taken: Slice) -> tuple[object, ...]:
    """A slice in a form in which NaN equals itself."""
    batches = [(batch.schema, batch.rows.schema.metadata, str(batch.rows.to_pylist())) for batch in taken.batches]
    return (batches, taken.position, taken.transaction_count, taken.mark, taken.mark_position, taken.mark_committed_at)


@patient
@given(transactions(), st.lists(st.integers(1, 300)), st.integers(1, 20))
def test_stream_cut_anywhere_is_read_as_the_row_decoder_reads_it(
    stream: list[bytes], pieces: list[int], max_changes: int
) -> None:
    builder = SliceBuilder(relations=Relations(describe), nearby_xid=NEARBY)
    data = b"".join(messages.framed(message) for message in stream)
    found = list(messages.slices_of(builder, data, pieces=pieces, max_changes=max_changes))
    for taken in found:
        for batch in taken.batches:
            batch.rows.validate(full=True)
    assert [as_text(taken) for taken in found] == [
        as_text(taken) for taken in expected(stream, max_changes=max_changes)
    ]


@settings(patient, max_examples=25)
@given(transactions(), transactions())
def test_batches_keep_their_values_while_more_is_read(first: list[bytes], second: list[bytes]) -> None:
    builder = SliceBuilder(relations=Relations(describe), nearby_xid=NEARBY)
    taken = list(messages.slices_of(builder, b"".join(map(messages.framed, first)), max_changes=5))
    before = [as_text(each) for each in taken]
    list(messages.slices_of(builder, b"".join(map(messages.framed, second)), max_changes=5))
    builder.buffer.data[:] = 0
    assert [as_text(each) for each in taken] == before


@settings(patient, max_examples=40)
@given(transactions(), st.integers(0, 10**6), st.integers(0, 255))
def test_damaged_stream_is_refused_or_read_and_nothing_else(stream: list[bytes], at: int, byte: int) -> None:
    # The frame's own size stays whole: without it nothing says where the next one starts.
    framed = [bytearray(messages.framed(message)) for message in stream]
    victim = framed[at % len(framed)]
    victim[5 + at % (len(victim) - 5)] = byte
    builder = SliceBuilder(relations=Relations(describe), nearby_xid=NEARBY)
    try:
        for taken in messages.slices_of(builder, b"".join(framed), max_changes=5):
            for batch in taken.batches:
                batch.rows.validate(full=True)
    except (MalformedMessageError, UnicodeDecodeError):
        pass


def test_malformed_message_is_refused_and_kept_for_a_report(tmp_path: Path) -> None:
    builder = SliceBuilder(relations=Relations(describe), position=Lsn(7), reports=tmp_path)
    broken = messages.framed(messages.insert(PAIR_ID, [b"secret", b"b", None])[:-1], lsn=42)
    stream = [messages.framed(each) for each in (messages.begin(100), relation_of(PAIR_ID, PAIR))]
    with pytest.raises(MalformedMessageError, match=r"'I' message of \d+ bytes at 0/2A") as caught:
        list(
            messages.slices_of(
                builder, b"".join([*stream, broken, messages.framed(messages.commit(100))]), max_changes=5
            )
        )
    (path,) = tmp_path.iterdir()
    assert path.read_bytes() == broken
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (messages.insert(PAIR_ID, [b"a", b"b", None]), "relation 8 after 0/7: no description"),
        (messages.commit(100), "place in the stream"),
        (b"?", "kind"),
    ],
)
def test_message_out_of_place_is_refused(message: bytes, said: str) -> None:
    builder = SliceBuilder(relations=Relations(describe), position=Lsn(7))
    with pytest.raises(MalformedMessageError, match=said):
        list(messages.slices_of(builder, messages.framed(message), max_changes=5))


def test_row_of_another_width_than_its_table_is_refused() -> None:
    builder = SliceBuilder(relations=Relations(describe))
    stream = [messages.begin(100), relation_of(PAIR_ID, PAIR), messages.insert(PAIR_ID, [b"a", b"b"])]
    with pytest.raises(MalformedMessageError, match="'I' message"):
        list(
            messages.slices_of(builder, b"".join(map(messages.framed, [*stream, messages.commit(100)])), max_changes=5)
        )


def test_keep_alive_moves_the_position_between_transactions_only() -> None:
    builder = SliceBuilder(relations=Relations(describe))
    before = messages.keep_alive(50) + messages.framed(messages.begin(100)) + messages.keep_alive(99)
    list(messages.slices_of(builder, before, max_changes=5))
    assert builder.position == Lsn(50)
    assert not builder.is_status_wanted
    after = messages.framed(messages.commit(100)) + messages.keep_alive(200, reply=True)
    list(messages.slices_of(builder, after, max_changes=5))
    assert builder.position == Lsn(200)
    assert builder.is_status_wanted


def test_large_message_grows_the_buffer_and_the_buffer_shrinks_again() -> None:
    builder = SliceBuilder(relations=Relations(describe))
    large = b"x" * (40 << 20)
    stream = [messages.begin(100), relation_of(PAIR_ID, PAIR), messages.insert(PAIR_ID, [large, b"b", None])]
    (taken,) = messages.slices_of(
        builder, b"".join(map(messages.framed, [*stream, messages.commit(100)])), max_changes=5
    )
    assert taken.batches[0].rows.column("a").to_pylist() == [large.decode()]
    assert len(builder.buffer.data) < len(large)
