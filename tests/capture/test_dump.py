"""The merge of dump and stream against a simulated database.

The simulation commits in two steps, as PostgreSQL does: first a transaction's changes enter the log,
later it becomes visible, in any order. Transactions that touch a common key keep a row lock until
they are visible, so they never overlap.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deltaworks.capture.dump import DumpState, Settled, TableDump, settle, strays
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.postgres.standby import StandbySnapshot
from deltaworks.capture.recent import Recent
from deltaworks.capture.source import Chunk
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.errors import InvariantError
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

MOVIE = TableName("public", "movie")
SCHEMA = TableSchema(
    name=MOVIE,
    columns=(
        Column(name="id", type=pa.int32(), source_type="integer", nullable=False),
        Column(name="title", type=pa.string(), source_type="text"),
        Column(name="plot", type=pa.string(), source_type="text"),
    ),
    key=("id",),
)
AT = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = range(1, 7)

Row = dict[str, Any]


def change(op: str, key: int | None, *, txid: int, commit: int, **more: Any) -> Row:
    """A change as a row of a batch; `more` overrides columns."""
    return {
        "_op": op,
        "_commit": commit,
        "_ordinal": 0,
        "_txid": txid,
        "_committed_at": AT,
        "_unchanged": None,
        "_old_key": None,
        "_as_text": None,
        "id": key,
        "title": None,
        "plot": None,
        **more,
    }


def batch_of(*rows: Row, schema: TableSchema = SCHEMA) -> ChangeBatch:
    return ChangeBatch(schema, pa.RecordBatch.from_pylist(list(rows), schema=change_schema(schema)))


def chunk_of(rows: Iterable[Row], snapshot: str, *, last_key: tuple[str, ...] | None = None) -> Chunk:
    return Chunk(
        schema=SCHEMA,
        rows=pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA.row_schema()),
        visible_in=Snapshot.parse(snapshot),
        last_key=last_key,
    )


def settled(chunk: Chunk, *changes: Row) -> list[Row]:
    recent = Recent()
    for each in changes:
        recent.remember(batch_of(each))
    out = settle(chunk, recent.unseen(MOVIE, chunk.visible_in), position=Lsn(1000), committed_at=AT)
    return out.reads.rows.select(["id", "title", "plot"]).to_pylist() if out.reads else []


OLD = {"id": 1, "title": "old", "plot": "long"}


def test_untouched_rows_are_reads_at_the_position_of_the_mark() -> None:
    chunk = chunk_of([OLD, {"id": 2, "title": "b", "plot": None}], "10:10:")
    out = settle(chunk, [], position=Lsn(1000), committed_at=AT)
    assert out.reads is not None
    assert out.reads.rows.to_pylist() == [
        change("r", 1, txid=0, commit=1000, _ordinal=0, title="old", plot="long"),
        change("r", 2, txid=0, commit=1000, _ordinal=1, title="b"),
    ]


def test_visible_change_is_in_the_row_already() -> None:
    assert settled(chunk_of([OLD], "10:10:"), change("u", 1, txid=9, commit=5, title="older")) == [OLD]


def test_complete_change_that_is_not_visible_replaces_the_read() -> None:
    assert settled(chunk_of([OLD], "9:10:9"), change("u", 1, txid=9, commit=5, title="new", plot="p")) == []


def test_change_without_a_large_column_is_merged_into_the_row() -> None:
    unsent = change("u", 1, txid=9, commit=5, title="new", _unchanged=["plot"])
    assert settled(chunk_of([OLD], "9:10:9"), unsent) == [{"id": 1, "title": "new", "plot": "long"}]


def test_large_column_that_the_stream_brought_before_needs_no_read() -> None:
    complete = change("u", 1, txid=9, commit=5, title="new", plot="p")
    unsent = change("u", 1, txid=10, commit=6, title="newer", _unchanged=["plot"])
    assert settled(chunk_of([OLD], "9:11:9,10"), complete, unsent) == []


@pytest.mark.parametrize("gone", [change("d", 1, txid=9, commit=5), change("t", None, txid=9, commit=5)])
def test_deleted_row_does_not_come_back(gone: Row) -> None:
    assert settled(chunk_of([OLD], "9:10:9"), gone) == []


def test_key_change_takes_the_row_along_with_its_large_column() -> None:
    moved = change("u", 5, txid=9, commit=5, title="new", _unchanged=["plot"], _old_key={"id": 1})
    chunk = chunk_of([OLD], "9:10:9")
    out = settle(chunk, [batch_of(moved)], position=Lsn(1000), committed_at=AT)
    assert out.reads is not None
    assert out.reads.rows.select(["id", "title", "plot"]).to_pylist() == [{"id": 5, "title": "new", "plot": "long"}]
    assert out.repaired == {("5",)}
    assert list(strays(batch_of(moved))) == [("5",)]


def test_chunk_of_another_shape_is_stale() -> None:
    wider = TableSchema(
        name=MOVIE,
        columns=(*SCHEMA.columns, Column(name="year", type=pa.int16(), source_type="smallint")),
        key=("id",),
    )
    late = batch_of({**change("u", 1, txid=9, commit=5), "year": 1999}, schema=wider)
    out = settle(chunk_of([OLD], "9:10:9"), [late], position=Lsn(1000), committed_at=AT)
    assert out == Settled(is_stale=True)


def test_two_rows_of_one_key_are_an_invariant_broken() -> None:
    with pytest.raises(InvariantError, match=r"two of its rows have one key"):
        settle(chunk_of([OLD, OLD], "9:9:"), [], position=Lsn(1), committed_at=AT)


def test_recent_forgets_what_a_snapshot_sees_and_nothing_else() -> None:
    recent = Recent()
    recent.remember(batch_of(change("u", 1, txid=9, commit=5), change("u", 2, txid=11, commit=6)))
    recent.forget_seen(Snapshot.parse("10:12:11"))
    assert len(recent) == 1
    recent.forget_seen(Snapshot.parse("12:12:"))
    assert len(recent) == 0


def standby_chunk(rows: Iterable[Row], *, absent: Iterable[int] = ()) -> Chunk:
    """A chunk of a standby that had replayed up to 100 and knows of 8 only that it began; 8 and 9 may be visible."""
    seen = StandbySnapshot(replayed=100, oldest_running=8, first_unknown=10)
    keys = [{"id": key} for key in absent]
    return Chunk(
        schema=SCHEMA,
        rows=pa.RecordBatch.from_pylist(list(rows), schema=SCHEMA.row_schema()),
        visible_in=seen,
        last_key=None,
        absent=pa.RecordBatch.from_pylist(keys, schema=SCHEMA.row_schema()) if keys else None,
    )


def settle_on_standby(chunk: Chunk, *changes: Row) -> Settled:
    recent = Recent()
    for each in changes:
        recent.remember(batch_of(each))
    return settle(chunk, recent.unseen(MOVIE, chunk.visible_in), position=Lsn(1000), committed_at=AT)


@pytest.mark.parametrize(
    ("doubtful", "again"),
    [
        (change("u", 1, txid=8, commit=101, title="new", plot="p"), set()),
        (change("u", 1, txid=8, commit=101, title="new", _unchanged=["plot"]), {("1",)}),
        (change("d", 1, txid=8, commit=101), {("1",)}),
        (change("u", 5, txid=8, commit=101, title="new", _unchanged=["plot"], _old_key={"id": 1}), {("1",), ("5",)}),
    ],
    ids=["whole", "without a large column", "delete", "move"],
)
def test_row_that_a_doubtful_change_touched_is_left_out_and_read_again(doubtful: Row, again: set[Any]) -> None:
    out = settle_on_standby(standby_chunk([OLD, {"id": 2, "title": "b", "plot": None}]), doubtful)
    assert out.reads is not None
    assert out.reads.rows.column("id").to_pylist() == [2]
    assert out.strays == again
    assert TableDump().advanced(out, last_key=("2",)).strays == again


def test_change_that_the_standby_had_replayed_is_in_the_row() -> None:
    out = settle_on_standby(standby_chunk([OLD]), change("u", 1, txid=9, commit=100, title="x", plot="y"))
    assert out.reads is not None
    assert out.strays == set()


def test_chunk_with_a_doubtful_truncate_is_read_again() -> None:
    assert settle_on_standby(standby_chunk([OLD]), change("t", None, txid=9, commit=101)).is_stale


def test_key_without_a_row_is_deleted_unless_the_stream_speaks_of_it() -> None:
    back = change("c", 7, txid=11, commit=102, title="back", plot="p")
    gone = [change("c", 8, txid=11, commit=102, title="n", plot="p"), change("d", 8, txid=12, commit=103)]
    doubted = change("d", 9, txid=9, commit=101)
    out = settle_on_standby(standby_chunk([OLD], absent=[6, 7, 8, 9]), back, *gone, doubted)
    assert out.deletes is not None
    assert [(row["_op"], row["id"], row["_ordinal"]) for row in out.deletes.rows.to_pylist()] == [("d", 6, 1)]
    assert out.missing == (("6",), ("8",))
    assert out.strays == {("9",)}


def test_row_that_moves_onto_a_key_while_it_is_read_again_stays_owed() -> None:
    """Its old key is not among those read, so what was not sent is in nobody's hands."""
    moved = change("u", 1, txid=10, commit=5, title="new", _unchanged=["plot"], _old_key={"id": 4})
    chunk = chunk_of([OLD], "9:10:9")
    out = settle(chunk, [batch_of(change("d", 1, txid=9, commit=4)), batch_of(moved)], position=Lsn(9), committed_at=AT)
    dump = TableDump(state=DumpState.REPAIRING, strays=frozenset({("1",)}))
    assert dump.repaired([("1",)], out) == replace(dump, strays=frozenset({("1",)}))


def test_recent_lets_go_and_is_clear_again_once_all_of_it_is_seen() -> None:
    recent = Recent()
    recent.remember(batch_of(change("u", 1, txid=9, commit=5), change("u", 2, txid=11, commit=6)))
    assert recent.byte_count > 0
    assert recent.let_go() == [MOVIE]
    assert (recent.byte_count, len(recent), recent.is_clear(MOVIE)) == (0, 0, False)
    recent.forget_seen(Snapshot.parse("10:12:11"))
    assert not recent.is_clear(MOVIE)
    recent.forget_seen(Snapshot.parse("12:12:"))
    assert recent.is_clear(MOVIE)


def test_dump_is_stored_and_read_back_as_it_was() -> None:
    dump = TableDump(
        state=DumpState.READING, after_key=("a", "1"), up_to_key=("z", "9"), rows=7, strays=frozenset({("b", "2")})
    )
    assert TableDump.from_json(dump.to_json()) == dump
    assert TableDump.from_json(TableDump().to_json()) == TableDump()


# The simulated database.


@dataclass
class Transaction:
    txid: int
    effects: list[Row]
    touched: set[int]


@dataclass
class Database:
    """Rows as the newest transaction sees them, and as everybody else does."""

    visible: dict[int, Row]
    newest: dict[int, Row]
    log: list[ChangeBatch | str] = field(default_factory=list)
    running: list[Transaction] = field(default_factory=list)
    next_txid: int = 100
    commit: int = 0

    def locked(self) -> set[int]:
        return {key for transaction in self.running for key in transaction.touched}

    def snapshot(self) -> Snapshot:
        ids = frozenset(transaction.txid for transaction in self.running)
        return Snapshot(oldest_running=min(ids, default=self.next_txid), first_unknown=self.next_txid, running=ids)

    def write(self, action: str, key: int, other: int, value: str) -> None:
        """One statement in a transaction of its own; its commit record enters the log, visibility follows later."""
        if key in self.locked() or other in self.locked():
            return
        row = self.newest.get(key)
        self.commit += 10
        made: Row = {"id": key, "title": value, "plot": f"plot {value}"}
        base = {"txid": self.next_txid, "commit": self.commit}
        touched = {key}
        if action == "insert" and row is None:
            entry = change("c", **base, key=key, title=value, plot=made["plot"])
        elif action == "update" and row is not None:
            entry = change("u", **base, key=key, title=value, plot=made["plot"])
        elif action == "toast" and row is not None:
            made["plot"] = row["plot"]
            entry = change("u", **base, key=key, title=value, _unchanged=["plot"])
        elif action == "delete" and row is not None:
            entry = change("d", **base, key=key)
        elif action == "move" and row is not None and other not in self.newest:
            made |= {"id": other, "plot": row["plot"]}
            entry = change("u", **base, key=other, title=value, _unchanged=["plot"], _old_key={"id": key})
            touched.add(other)
        else:
            return
        self.newest.pop(key, None)
        if action != "delete":
            self.newest[made["id"]] = made
        self.running.append(Transaction(self.next_txid, [made] if action != "delete" else [], touched))
        self.next_txid += 1
        self.log.append(batch_of(entry))

    def finish(self, which: int) -> None:
        """A transaction becomes visible and lets its locks go."""
        if self.running:
            done = self.running.pop(which % len(self.running))
            for key in done.touched:
                self.visible.pop(key, None)
            self.visible |= {row["id"]: row for row in done.effects}


def apply(rows: dict[int, Row], newest: dict[int, int], batch: ChangeBatch) -> None:
    """A reader of the log: keeps the latest row per key, fills what was not sent from what it has."""
    for row in batch.rows.to_pylist():
        # I1: per key the output never goes back.
        for key in {row["id"], (row["_old_key"] or row)["id"]}:
            assert row["_commit"] >= newest.get(key, 0)
            newest[key] = row["_commit"]
        had = rows.pop((row["_old_key"] or row)["id"], {})
        if row["_op"] != "d":
            unsent = {name: had.get(name, "LOST") for name in row["_unchanged"] or ()}
            rows[row["id"]] = {name: row[name] for name in SCHEMA.names} | unsent


WRITES = ["insert", "update", "toast", "toast", "delete", "move", "move", "move"]
ACTIONS = st.tuples(
    st.sampled_from([*WRITES, *["step"] * 4, *["stream"] * 6, *["finish"] * 4]),
    st.sampled_from(KEYS),
    st.sampled_from(KEYS),
)


class Reader:
    """The recorder in small: streams, dumps two keys at a time, settles at marks."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.read = 0
        self.recent = Recent()
        self.rows: dict[int, Row] = {}
        self.newest: dict[int, int] = {}
        self.dump = TableDump()
        self.flight: tuple[Chunk, list[tuple[str, ...]] | None] | None = None
        self.is_marked = False

    def stream(self) -> None:
        """Take the next entry of the log."""
        if self.read == len(self.database.log):
            return
        entry = self.database.log[self.read]
        self.read += 1
        if isinstance(entry, ChangeBatch):
            apply(self.rows, self.newest, entry)
            if self.dump.state is not DumpState.DONE:
                self.recent.remember(entry)
                moved = frozenset(strays(entry))
                self.dump = TableDump.from_json({**self.dump.to_json(), "strays": [*self.dump.strays, *moved]})
            return
        assert self.flight is not None
        (chunk, keys), self.flight, self.is_marked = self.flight, None, False
        out = settle(chunk, self.recent.unseen(MOVIE, chunk.visible_in), position=Lsn(int(entry)), committed_at=AT)
        if out.reads is not None:
            apply(self.rows, self.newest, out.reads)
        if keys is None:
            self.dump = self.dump.advanced(out, last_key=chunk.last_key)
        else:
            self.dump = self.dump.repaired(keys, out)

    def step(self) -> None:
        """Read the next chunk, or write the mark of the one that was read."""
        visible = self.database.visible
        if self.flight is not None:
            if not self.is_marked:
                self.is_marked = True
                self.database.commit += 10
                self.database.log.append(str(self.database.commit))
            return
        if self.dump.state is DumpState.DONE:
            return
        if self.dump.state is DumpState.WAITING:
            self.dump = self.dump.begun((str(max(visible)),) if visible else None)
            return
        keys = sorted(self.dump.strays) if self.dump.state is DumpState.REPAIRING else None
        if keys is not None:
            found, last = [int(key) for (key,) in keys if int(key) in visible], None
        else:
            assert self.dump.up_to_key is not None
            after = int(self.dump.after_key[0]) if self.dump.after_key else 0
            within = [key for key in sorted(visible) if after < key <= int(self.dump.up_to_key[0])]
            found = within[:2]
            last = (str(found[-1]),) if len(found) == 2 else None
        snapshot = self.database.snapshot()
        chunk = Chunk(
            schema=SCHEMA,
            rows=pa.RecordBatch.from_pylist([visible[key] for key in found], schema=SCHEMA.row_schema()),
            visible_in=snapshot,
            last_key=last,
        )
        self.recent.forget_seen(snapshot)
        self.flight = (chunk, keys)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(present=st.sets(st.sampled_from(KEYS)), actions=st.lists(ACTIONS, min_size=10, max_size=80))
def test_dump_merged_with_the_stream_equals_the_table(present: set[int], actions: list[tuple[str, int, int]]) -> None:
    rows = {key: {"id": key, "title": "first", "plot": f"plot {key}"} for key in present}
    database = Database(visible=dict(rows), newest=dict(rows))
    reader = Reader(database)
    for place, (action, key, other) in enumerate(actions):
        if action == "finish":
            database.finish(key)
        elif action == "step":
            reader.step()
        elif action == "stream":
            reader.stream()
        else:
            database.write(action, key, other, str(place))
    # The database falls silent; the dump must end.
    while database.running:
        database.finish(0)
    for _ in range(200):
        reader.step()
        reader.stream()
    assert reader.dump.state is DumpState.DONE
    assert reader.read == len(database.log)
    assert reader.rows == database.visible == database.newest
