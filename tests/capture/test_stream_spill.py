"""Transactions that come before their end, or do not fit into memory: whole at their commit, or never."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pytest
from capture import messages
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaworks.capture.postgres import buffer
from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.source import Slice
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

TABLE_ID = 7
ONE = TableSchema(
    name=TableName("public", "t"), columns=(Column(name="id", type=pa.int64(), source_type="bigint"),), key=("id",)
)
TWO = TableSchema(
    name=ONE.name, columns=(*ONE.columns, Column(name="v", type=pa.string(), source_type="text")), key=("id",)
)


def describe(relation: Relation) -> TableSchema:
    return ONE if len(relation.columns) == 1 else TWO


def relation(schema: TableSchema = ONE) -> bytes:
    return messages.relation(TABLE_ID, "t", [(name == "id", name) for name in schema.names])


def insert(number: int) -> bytes:
    return messages.insert(TABLE_ID, [str(number).encode()])


@pytest.fixture
def builder() -> SliceBuilder:
    return SliceBuilder(relations=Relations(describe), nearby_xid=1000)


def read(builder: SliceBuilder, stream: Sequence[bytes], *, max_changes: int = 100) -> list[Slice]:
    data = b"".join(each if each[:1] == b"d" else messages.framed(each) for each in stream)
    slices = list(messages.slices_of(builder, data, max_changes=max_changes))
    builder.close()
    return slices


def ids(slices: Sequence[Slice]) -> list[int]:
    return [row["id"] for taken in slices for batch in taken.batches for row in batch.rows.to_pylist()]


def streamed(xid: int, *parts: tuple[int, bytes]) -> list[bytes]:
    """One piece of a streamed transaction: (id of the part, message) each."""
    return [
        messages.stream_start(xid),
        *(messages.in_stream(message, xid=part) for part, message in parts),
        messages.stream_stop(),
    ]


@dataclass
class Writer:
    """A transaction as the server sees it: what survives of it, and what it streams."""

    xid: int
    open_parts: list[tuple[int, int]] = field(default_factory=list)
    """(id, count of changes before it) of the parts that are open."""
    kept: list[int] = field(default_factory=list)
    pieces: list[list[bytes]] = field(default_factory=list)

    def run(self, actions: Sequence[str], numbers: Any) -> None:
        piece = [messages.stream_start(self.xid)]
        next_part = self.xid + 1
        for action in actions:
            if action == "enter":
                self.open_parts.append((next_part, len(self.kept)))
                next_part += 1
            elif action == "leave" and self.open_parts:
                self.open_parts.pop()
            elif action == "abort" and self.open_parts:
                part, before = self.open_parts.pop()
                self.kept = self.kept[:before]
                self.pieces.append([*piece, messages.stream_stop(), messages.stream_abort(self.xid, part)])
                piece = [messages.stream_start(self.xid)]
            elif action == "cut":
                self.pieces.append([*piece, messages.stream_stop()])
                piece = [messages.stream_start(self.xid)]
            elif action == "describe":
                part = self.open_parts[-1][0] if self.open_parts else self.xid
                piece.append(messages.in_stream(relation(), xid=part))
            elif action == "insert":
                number = next(numbers)
                part = self.open_parts[-1][0] if self.open_parts else self.xid
                self.kept.append(number)
                piece.append(messages.in_stream(insert(number), xid=part))
        self.pieces.append([*piece, messages.stream_stop()])


ACTIONS = st.lists(
    st.sampled_from(["insert", "insert", "insert", "enter", "leave", "abort", "cut", "describe"]), max_size=25
)


@settings(deadline=None)
@given(st.lists(st.tuples(ACTIONS, st.booleans()), min_size=1, max_size=3), st.randoms(), st.integers(1, 9))
def test_streamed_transactions_come_out_at_their_commit_without_what_was_rolled_back(
    plans: list[tuple[list[str], bool]], random: Any, max_changes: int
) -> None:
    numbers = iter(range(10**6))
    writers = [Writer(xid=1000 * (place + 1)) for place in range(len(plans))]
    for writer, (actions, _) in zip(writers, plans, strict=True):
        writer.run(actions, numbers)
    stream = [messages.begin(100), relation(), insert(next(numbers)), messages.commit(100)]
    expected: list[tuple[int, list[int]]] = []
    lsn = 200
    waiting = [list(writer.pieces) for writer in writers]
    left = [place for place, pieces in enumerate(waiting) for _ in range(len(pieces) + 1)]
    random.shuffle(left)
    for place in left:
        writer, is_committed = writers[place], plans[place][1]
        if waiting[place]:
            stream += waiting[place].pop(0)
        elif is_committed:
            lsn += 100
            stream.append(messages.stream_commit(writer.xid, lsn))
            expected.append((lsn + 8, writer.kept))
        else:
            stream.append(messages.stream_abort(writer.xid, writer.xid))
        if random.random() < 0.5:
            lsn += 100
            number = next(numbers)
            stream += [messages.begin(lsn, xid=77), insert(number), messages.commit(lsn)]
            expected.append((lsn + 8, [number]))
    slices = read(SliceBuilder(relations=Relations(describe), nearby_xid=1000), stream, max_changes=max_changes)
    found = [
        (row["_commit"], row["_ordinal"], row["id"])
        for taken in slices
        for batch in taken.batches
        for row in batch.rows.to_pylist()
    ]
    assert [each for each in found if each[0] != 108] == [
        (commit, ordinal, number) for commit, kept in expected for ordinal, number in enumerate(kept)
    ]
    assert_is_whole(slices)


def assert_is_whole(slices: Sequence[Slice]) -> None:
    """A run ends with the slice that moves the position past its transaction."""
    position = Lsn(0)
    for taken in slices:
        commits = {row["_commit"] for batch in taken.batches for row in batch.rows.to_pylist()}
        if taken.is_partial:
            assert taken.position == position
            assert len(commits) <= 1
            assert taken.transaction_count == 0
        else:
            assert all(Lsn(commit) <= taken.position for commit in commits)
        assert all(Lsn(commit) > position for commit in commits)
        position = taken.position


def test_run_of_slices_moves_the_position_with_the_last_one_only(builder: SliceBuilder, monkeypatch: Any) -> None:
    monkeypatch.setattr(buffer, "RECEIVE_BYTES", 4096)
    parts = [(900, relation()), *((900, insert(number)) for number in range(1000))]
    slices = read(builder, [*streamed(900, *parts), messages.stream_commit(900, 5000)], max_changes=100)
    run = [taken for taken in slices if taken.batches]
    assert len(run) > 5
    assert [taken.is_partial for taken in run] == [True] * (len(run) - 1) + [False]
    assert {taken.position for taken in run[:-1]} == {Lsn(0)}
    assert run[-1].position == Lsn(5008)
    assert sum(taken.transaction_count for taken in slices) == 1
    assert ids(slices) == list(range(1000))
    ordinals = [row["_ordinal"] for taken in run for batch in taken.batches for row in batch.rows.to_pylist()]
    assert ordinals == list(range(1000))


def test_what_was_committed_before_leaves_before_the_run(builder: SliceBuilder) -> None:
    early = [messages.begin(100), relation(), insert(1), messages.commit(100)]
    slices = read(builder, [*streamed(900, (900, insert(2))), *early, messages.stream_commit(900, 200)])
    with_rows = [taken for taken in slices if taken.batches]
    assert [(taken.position, ids([taken])) for taken in with_rows] == [(Lsn(108), [1]), (Lsn(208), [2])]


def test_description_in_a_part_that_was_rolled_back_still_holds(builder: SliceBuilder) -> None:
    pieces = streamed(900, (901, relation()), (901, insert(1)))
    more = streamed(900, (900, insert(2)))
    stream = [*pieces, messages.stream_abort(900, 901), *more, messages.stream_commit(900, 100)]
    assert ids(read(builder, stream)) == [2]


def test_mark_in_a_streamed_transaction_ends_the_last_slice_of_its_run(builder: SliceBuilder) -> None:
    mark = messages.logical_message("deltaworks.mark", b"here")
    stream = [*streamed(900, (900, relation()), (900, mark), (900, insert(1))), messages.stream_commit(900, 100)]
    *_, taken = [taken for taken in read(builder, stream) if taken.batches]
    assert (taken.mark, taken.mark_position) == ("here", Lsn(108))


def test_transaction_that_outgrows_the_buffer_is_spilled_and_comes_out_whole(
    builder: SliceBuilder, monkeypatch: Any
) -> None:
    monkeypatch.setattr(buffer, "MOST_BYTES", len(builder.buffer.data))
    count = 200_000
    stream = [messages.begin(100, xid=900), relation(), *(insert(number) for number in range(count))]
    stream += [messages.keep_alive(50), messages.commit(100)]
    slices = read(builder, stream, max_changes=16_384)
    assert sum(taken.is_partial for taken in slices) > 2
    assert ids(slices) == list(range(count))
    assert_is_whole(slices)
    assert len(builder.buffer.data) == buffer.FIRST_BYTES


def test_table_that_changed_in_a_spilled_transaction_is_read_in_both_shapes(
    builder: SliceBuilder, monkeypatch: Any
) -> None:
    monkeypatch.setattr(buffer, "MOST_BYTES", len(builder.buffer.data))
    rest = [messages.insert(TABLE_ID, [str(number).encode(), b"x" * 100]) for number in range(1, 50_000)]
    stream = [messages.begin(100, xid=900), relation(), insert(0), relation(TWO), *rest, messages.commit(100)]
    slices = read(builder, stream, max_changes=16_384)
    assert ids(slices) == list(range(50_000))
    assert slices[0].batches[0].schema == ONE
    assert {batch.schema.names for taken in slices for batch in taken.batches} == {ONE.names, TWO.names}


def test_stream_that_ends_early_gives_its_disk_space_back(builder: SliceBuilder) -> None:
    read(builder, streamed(900, (900, relation()), (900, insert(1))))
    assert all(spill._file.closed for spill in builder._spills.values())
