"""Merging a dump with the stream, exactly: compare what a snapshot sees, never positions.

Log order and visibility differ. A commit that waits for a synchronous standby is in the stream while
a SELECT still shows the row before it, so a chunk cannot be placed between two log positions.

    stream   … ──x1──x2──────────x3──HIGH──►       x1 is visible in the chunk's snapshot S: ignored
                          ▲ chunk read at S         x2, x3 are not: they win over the chunk's row

For each row of the chunk, in commit order over the changes that S does not see:

| change                                  | the row                                              |
|-----------------------------------------|------------------------------------------------------|
| none                                    | is given out as a read, at the position of HIGH      |
| complete (every column was sent)        | is left out: the change itself carries it            |
| with columns that were not sent         | is given out with the change merged into it          |
| delete, truncate                        | is left out                                          |
| key change                              | leaves its old key; at the new key as above          |

What S sees has its commit record before HIGH, so nothing visible comes after HIGH; what S does not
see is newer and wins. No low mark, no lock, no pause. After DBLog (arXiv 2010.12597), with
snapshots in the place of watermark positions.

Chosen keys are read the same way. A key without a row in S is gone unless a change that S does not see
brought it back: it is given out as a delete at HIGH, because a store may still have its row.

A standby says of some transactions only that they may be visible. A complete change settles its row
either way; rows that any other such change touched are left out and read again.

The rows that no change touched, nearly all, stay columns of Arrow from the first step to the last.
This module decides and does nothing: the driver is `log.dumping`; what was streamed is in `capture.recent`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.capture.recent import transactions
from deltaworks.capture.source import Chunk, StreamedChange
from deltaworks.change import BEFORE, DELETE, OLD_KEY, READ, TRUNCATE, ChangeBatch, change_schema
from deltaworks.errors import InvariantError
from deltaworks.position import Lsn
from deltaworks.schema import AS_TEXT, TableSchema

Key = tuple[Any, ...]  # Any: a key column may have any type
TextKey = tuple[str, ...]


class DumpState(Enum):
    """Where the dump of a table stands. The recorder sets it; it is stored with the group that reached it."""

    WAITING = "waiting"
    """Not begun: transactions may run that wrote to the table before its changes were captured."""
    READING = "reading"
    """Rows up to `after_key` are in the log or covered by changes there; of a dump by key, `next_key` keys."""
    REPAIRING = "repairing"
    """The range is read; rows that moved with columns not sent are read again by key."""
    DONE = "done"
    """Every row is in the log or covered by changes there. Nothing leads out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDump:
    """The dump of one table, as it is stored with every group.

    `strays` are the new keys of rows that changed their key while columns were not sent. Such a
    row may have moved from what is still to be read to what was read already, and would be missed.
    `rows` were given out, `scanned` looked at out of about `estimated_rows`, since `began_at`.
    """

    state: DumpState = DumpState.WAITING
    after_key: TextKey | None = None
    up_to_key: TextKey | None = None
    next_key: int = 0
    rows: int = 0
    scanned: int = 0
    missing: int = 0
    estimated_rows: int | None = None
    began_at: datetime | None = None
    strays: frozenset[TextKey] = frozenset()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:  # Any: JSON values
        """Read what `to_json` gave; an older version gave less."""
        began_at = stored.get("began_at")
        return cls(
            state=DumpState(stored["state"]),
            after_key=_text_key(stored["after_key"]),
            up_to_key=_text_key(stored["up_to_key"]),
            next_key=stored.get("next_key", 0),
            rows=stored["rows"],
            scanned=stored.get("scanned", stored["rows"]),
            missing=stored.get("missing", 0),
            estimated_rows=stored.get("estimated_rows"),
            began_at=began_at and datetime.fromisoformat(began_at),
            strays=frozenset(tuple(key) for key in stored["strays"]),
        )

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """The dump as JSON values."""
        return {
            "state": self.state.value,
            "after_key": self.after_key,
            "up_to_key": self.up_to_key,
            "next_key": self.next_key,
            "rows": self.rows,
            "scanned": self.scanned,
            "missing": self.missing,
            "estimated_rows": self.estimated_rows,
            "began_at": self.began_at and self.began_at.isoformat(),
            "strays": sorted(self.strays),
        }

    def begun(self, last_key: TextKey | None, *, estimated_rows: int | None = None) -> Self:
        """The dump at its start; done at once on an empty table."""
        begun = replace(self, estimated_rows=estimated_rows, began_at=datetime.now(UTC))
        if last_key is None:
            return replace(begun, state=DumpState.REPAIRING if self.strays else DumpState.DONE)
        return replace(begun, state=DumpState.READING, up_to_key=last_key)

    def advanced(self, settled: "Settled", *, last_key: TextKey | None, scanned: int = 0) -> Self:
        """The dump after a chunk of its range was settled; `last_key` is the chunk's."""
        after = self._after(settled, scanned=scanned, without=frozenset())
        return replace(after, after_key=last_key) if last_key is not None else after._read_through()

    def read_keys(self, count: int, settled: "Settled", *, asked: int) -> Self:
        """The dump after the next `count` of its `asked` keys were settled."""
        after = self._after(settled, scanned=count, without=frozenset())
        after = replace(after, next_key=self.next_key + count)
        return after if after.next_key < asked else after._read_through()

    def repaired(self, keys: Iterable[TextKey], settled: "Settled") -> Self:
        """The dump after the rows of these keys were read again and settled."""
        after = self._after(settled, scanned=0, without=frozenset(keys))
        return after if after.state is not DumpState.REPAIRING else after._read_through()

    def _after(self, settled: "Settled", *, scanned: int, without: frozenset[TextKey]) -> Self:
        return replace(
            self,
            rows=self.rows + settled.row_count,
            scanned=self.scanned + scanned,
            missing=self.missing + len(settled.missing),
            # A row that moved while its key was read again is a stray once more.
            strays=(self.strays - without - settled.repaired) | settled.strays,
        )

    def _read_through(self) -> Self:
        return replace(self, state=DumpState.REPAIRING if self.strays else DumpState.DONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What comes out of a chunk at its mark.

    `reads` and `deletes` are `None` when there is nothing to give out. `repaired` has the keys of rows
    that moved and are known to be complete now; `strays` of those that are not and must be read again.
    `missing` are the asked keys that have no row. `is_stale` means that the table changed its shape
    after the chunk was read: nothing may be used, the chunk must be read again. `reset` is the truncate
    that comes before the reads of a table without a key, see `capture.bag`.
    """

    reset: ChangeBatch | None = None
    reads: ChangeBatch | None = None
    deletes: ChangeBatch | None = None
    repaired: frozenset[TextKey] = frozenset()
    strays: frozenset[TextKey] = frozenset()
    missing: tuple[TextKey, ...] = ()
    is_stale: bool = False

    @property
    def row_count(self) -> int:
        """Rows given out."""
        return 0 if self.reads is None else len(self.reads)


def settle(chunk: Chunk, unseen: Iterable[ChangeBatch], *, position: Lsn, committed_at: datetime) -> Settled:
    """Merge a chunk with the changes up to its mark that its snapshot does not see, or may not.

    `position` and `committed_at` are those of the mark; every read carries them.
    """
    unseen = list(unseen)
    hidden = doubtful(unseen, chunk)
    if any(not same_shape(batch.schema, chunk.schema) for batch in unseen) or _has_doubtful_truncate(unseen, hidden):
        return Settled(is_stale=True)
    _check_keys_differ(chunk)
    merge = _Merge.of(chunk, unseen)
    for batch in unseen:
        for change in streamed_changes(merge.concerned(batch)):
            if change.txid in hidden:
                merge.doubt(change)
            else:
                merge.apply(change)
    return merge.settled(position=position, committed_at=committed_at)


def strays(batch: ChangeBatch) -> Iterator[TextKey]:
    """The new keys of rows that changed their key while columns were not sent."""
    moved, unsent = batch.rows.column("_old_key"), batch.rows.column("_unchanged")
    if moved.null_count == len(batch) or unsent.null_count == len(batch):
        return
    both = pc.and_(moved.is_valid(), unsent.is_valid())
    for change in streamed_changes(ChangeBatch(batch.schema, batch.rows.filter(both))):
        yield text_key(change.key)


def streamed_changes(batch: ChangeBatch) -> Iterator[StreamedChange]:
    """The changes of a batch one by one."""
    schema = batch.schema
    for row in batch.rows.to_pylist():
        unchanged = frozenset(row["_unchanged"] or ())
        old_key, texts = row["_old_key"], dict(row["_as_text"] or ())
        yield StreamedChange(
            txid=row["_txid"],
            op=row["_op"],
            key=_key(row, texts, schema),
            old_key=None if old_key is None else _key(old_key, texts, schema, text_of=OLD_KEY),
            values={name: row[name] for name in schema.names if name not in unchanged},
            texts={name: text for name, text in texts.items() if name in schema.names},
            unchanged=unchanged,
        )


def text_key(key: Key) -> TextKey:
    """A key as text that the source reads back as the same key."""
    return tuple(_text(part) for part in key)


@dataclass(slots=True)
class _Row:
    """A row of the chunk, at `index` there, or one that such a row became.

    `is_owed`: what left so far does not hold the whole row, so a read must.
    """

    index: int
    changed: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    is_owed: bool = True

    def merged(self, change: StreamedChange) -> "_Row":
        """The row with what a change sent of it; `texts` are those of changed columns."""
        kept = {name: text for name, text in self.texts.items() if name not in change.values}
        return replace(self, changed=self.changed | change.values, texts=kept | change.texts)

    def over(self, values: dict[str, Any]) -> dict[str, Any]:
        """The row as it was read with the changed columns in it."""
        texts = {name: text for name, text in values[AS_TEXT.name] or () if name not in self.changed} | self.texts
        return values | self.changed | {AS_TEXT.name: texts or None}


@dataclass(slots=True)
class _Merge:
    """A chunk on its way through the changes that it does not see.

    `rows` holds those rows that a change may touch; of all others `untouched` is true.
    `absent` holds asked keys: `True` while nothing brought a row or told that it is gone.
    """

    chunk: Chunk
    untouched: np.ndarray
    rows: dict[Key, "_Row"]
    absent: dict[Key, bool]
    known: "_KeyValues"
    returned: set[Key] = field(default_factory=set)
    repaired: set[TextKey] = field(default_factory=set)
    again: set[TextKey] = field(default_factory=set)

    @classmethod
    def of(cls, chunk: Chunk, unseen: list[ChangeBatch]) -> Self:
        """The start: which rows the changes can touch, and which changes can touch a row."""
        schema = chunk.schema
        touched = (
            _KeyValues.of_changes(unseen, schema).may_hold(chunk.rows) if unseen else np.zeros(len(chunk.rows), bool)
        )
        places = np.flatnonzero(touched)
        keys = _keys(chunk.rows.take(pa.array(places)), schema)
        absent = () if chunk.absent is None else _keys(chunk.absent, schema)
        return cls(
            chunk=chunk,
            untouched=~touched,
            rows={key: _Row(int(place)) for place, key in zip(places, keys, strict=True)},
            absent=dict.fromkeys(absent, True),
            known=_KeyValues.of_rows(chunk, unseen),
        )

    def concerned(self, batch: ChangeBatch) -> ChangeBatch:
        """The changes of a batch that may touch the chunk: on its keys, or on one that a row moved to."""
        rows = batch.rows
        chosen = self.known.may_hold(rows) | pc.equal(rows.column("_op"), TRUNCATE).to_numpy(zero_copy_only=False)
        old = rows.column("_old_key")
        if old.null_count < len(rows):
            was = pa.RecordBatch.from_arrays(old.flatten(), names=list(batch.schema.key))
            chosen |= self.known.may_hold(was) & old.is_valid().to_numpy(zero_copy_only=False)
        return batch if chosen.all() else ChangeBatch(batch.schema, rows.filter(pa.array(chosen)))

    def apply(self, change: StreamedChange) -> None:
        """Take a change that the snapshot does not see."""
        if change.op == TRUNCATE:
            self.rows.clear()
            self.untouched[:] = False
            self.absent = dict.fromkeys(self.absent, False)
            self.returned.clear()
            return
        was_at = change.old_key if change.old_key is not None else change.key
        row = self.rows.pop(was_at, None)
        self._note(was_at, is_there=False)
        if change.op == DELETE:
            return
        self._note(change.key, is_there=True)
        if not change.unchanged:
            # The change itself holds the whole row.
            self.rows[change.key] = _Row(-1, change.values, change.texts, is_owed=False)
        elif row is not None:
            self.rows[change.key] = row.merged(change)
            if change.old_key is not None:
                self.repaired.add(text_key(change.key))
        elif change.old_key is not None or change.key in self.absent:
            # Its row is not in this chunk: what was not sent is in none of our hands.
            self.again.add(text_key(change.key))

    def doubt(self, change: StreamedChange) -> None:
        """Take a change that the snapshot may see or not."""
        if change.old_key is None and change.op != DELETE and not change.unchanged:
            self.apply(change)
            return
        for key in {change.key} if change.old_key is None else {change.key, change.old_key}:
            self.rows.pop(key, None)
            self._note(key, is_there=True)
            self.again.add(text_key(key))

    def settled(self, *, position: Lsn, committed_at: datetime) -> Settled:
        """What the chunk gives out at its mark."""
        chunk = self.chunk
        reads = self._reads([row for row in self.rows.values() if row.is_owed])
        gone = [place for place, is_silent in enumerate(self.absent.values()) if is_silent]
        deleted = chunk.rows.slice(0, 0) if chunk.absent is None else chunk.absent.take(pa.array(gone, pa.int64()))
        return Settled(
            reads=as_changes(READ, chunk, reads, first=0, position=position, committed_at=committed_at),
            deletes=as_changes(DELETE, chunk, deleted, first=len(reads), position=position, committed_at=committed_at),
            repaired=frozenset(self.repaired - self.again),
            strays=frozenset(self.again),
            missing=tuple(text_key(key) for key in self.absent if key not in self.returned),
        )

    def _note(self, key: Key, *, is_there: bool) -> None:
        if key in self.absent:
            # The stream speaks of it, so no delete of ours is needed.
            self.absent[key] = False
            (self.returned.add if is_there else self.returned.discard)(key)

    def _reads(self, owed: list["_Row"]) -> pa.RecordBatch:
        """The rows to give out; only those that were merged leave Arrow on the way."""
        untouched = self.untouched.copy()
        untouched[[row.index for row in owed if not row.changed]] = True
        merged = [row for row in owed if row.changed]
        rows = self.chunk.rows if untouched.all() else self.chunk.rows.filter(pa.array(untouched))
        if not merged:
            return rows
        read = self.chunk.rows.take(pa.array([row.index for row in merged], pa.int64())).to_pylist()
        filled = [row.over(values) for values, row in zip(read, merged, strict=True)]
        return pa.concat_batches([rows, pa.RecordBatch.from_pylist(filled, schema=rows.schema)])


@dataclass(frozen=True, slots=True)
class _KeyValues:
    """The values of each key column, to tell rows that cannot have one of some keys. `None`: any value may match."""

    columns: dict[str, pa.Array | None]

    @classmethod
    def of_changes(cls, batches: Iterable[ChangeBatch], schema: TableSchema) -> Self:
        """The keys that changes speak of, old and new."""
        parts: dict[str, list[pa.Array]] = {name: [] for name in schema.key}
        for batch in batches:
            for name in schema.key:
                parts[name].append(batch.rows.column(name))
                parts[name].append(pc.struct_field(batch.rows.column("_old_key"), name))
        return cls({name: _distinct(arrays, schema.column(name).type) for name, arrays in parts.items()})

    @classmethod
    def of_rows(cls, chunk: Chunk, batches: Iterable[ChangeBatch]) -> Self:
        """The keys of a chunk, those that were asked for, and those that rows moved to."""
        schema = chunk.schema
        moved = [batch.rows.filter(batch.rows.column("_old_key").is_valid()) for batch in batches]
        rows = [chunk.rows, *moved, *(() if chunk.absent is None else (chunk.absent,))]
        return cls(
            {name: _distinct([each.column(name) for each in rows], schema.column(name).type) for name in schema.key}
        )

    def may_hold(self, rows: pa.RecordBatch) -> np.ndarray:
        """For each row whether its key may be one of these; a part that is null, so not held, may be any."""
        chosen = np.ones(len(rows), bool)
        for name, values in self.columns.items():
            column = rows.column(name)
            if values is not None:
                here = pc.or_(pc.is_in(column, values), column.is_null())
                chosen &= here.to_numpy(zero_copy_only=False)
        return chosen


def _distinct(arrays: list[pa.Array], kind: pa.DataType) -> pa.Array | None:
    # Arrow tells 0 from -0, which are one key; of lists it makes no sets.
    if pa.types.is_floating(kind) or pa.types.is_nested(kind):
        return None
    return pc.unique(pa.chunked_array(arrays, kind))


def as_changes(
    op: str, chunk: Chunk, rows: pa.RecordBatch, *, first: int, position: Lsn, committed_at: datetime
) -> ChangeBatch | None:
    """Rows as changes at a mark, with ordinals from `first`; `None` without any."""
    count = len(rows)
    if count == 0:
        return None
    schema = change_schema(chunk.schema)
    meta = [
        pa.repeat(pa.scalar(op, pa.string()), count),
        pa.repeat(pa.scalar(position.value, pa.uint64()), count),
        pa.array(np.arange(first, first + count, dtype=np.uint32)),
        pa.repeat(pa.scalar(0, pa.uint64()), count),
        pa.repeat(pa.scalar(committed_at, pa.timestamp("us", "UTC")), count),
        pa.nulls(count, pa.list_(pa.string())),
        pa.nulls(count, schema.field("_old_key").type),
    ]
    before = [pa.nulls(count, schema.field(BEFORE).type)] if chunk.schema.has_before else []
    # The rows begin with the last of the meta columns, `_as_text`.
    return ChangeBatch(chunk.schema, pa.RecordBatch.from_arrays([*meta, *rows.columns, *before], schema=schema))


def doubtful(unseen: list[ChangeBatch], chunk: Chunk) -> set[int]:
    """The transactions that the chunk's snapshot may see or not."""
    found = {pair for batch in unseen for pair in transactions(batch)}
    return {txid for txid, commit in found if chunk.visible_in.sees(txid, commit=commit) is None}


def _has_doubtful_truncate(unseen: list[ChangeBatch], hidden: set[int]) -> bool:
    if not hidden:
        return False
    truncates = (batch.rows.filter(pc.equal(batch.rows.column("_op"), TRUNCATE)) for batch in unseen)
    return any(txid in hidden for rows in truncates for txid in rows.column("_txid").to_pylist())


def _check_keys_differ(chunk: Chunk) -> None:
    names = list(chunk.schema.key)
    keys = pa.Table.from_batches([chunk.rows]).select(names).drop_null()
    try:
        distinct = len(pc.unique(keys[0])) if len(names) == 1 else keys.group_by(names).aggregate([]).num_rows
    except pa.ArrowNotImplementedError:
        # Keys that Arrow makes no sets of, such as arrays.
        distinct = len(set(_keys(chunk.rows.filter(pc.is_valid(chunk.rows.column(names[0]))), chunk.schema)))
    if distinct != len(keys):
        raise InvariantError(f"cannot settle a chunk of {chunk.schema.name}: two of its rows have one key")


def same_shape(one: TableSchema, other: TableSchema) -> bool:
    """Whether rows of both have the same columns and keys."""
    if one.key != other.key or one.names != other.names:
        return False
    return all(ours.type.equals(theirs.type) for ours, theirs in zip(one.columns, other.columns, strict=True))


def _keys(rows: pa.RecordBatch, schema: TableSchema) -> Iterator[Key]:
    parts = rows.select([AS_TEXT.name, *schema.key]).to_pylist()
    for row in parts:
        yield _key(row, dict(row[AS_TEXT.name] or ()), schema)


def _key(values: Mapping[str, Any], texts: Mapping[str, str], schema: TableSchema, text_of: str = "") -> Key:
    """A key that compares as the source's: a part that its column cannot hold is its text."""
    return tuple(texts.get(text_of + name) if values[name] is None else comparable(values[name]) for name in schema.key)


def comparable(part: Any) -> Any:  # Any: a column may have any type
    """A value in a form that may stand in a set and equals itself."""
    if isinstance(part, list):
        return tuple(comparable(item) for item in part)
    # Python's NaN differs from itself; PostgreSQL's is one key.
    return "NaN" if isinstance(part, float) and part != part else part  # noqa: PLR0124


def _text(part: Any) -> str:  # Any: a key column may have any type
    if isinstance(part, bytes):
        return "\\x" + part.hex()
    if isinstance(part, tuple):
        items = ("NULL" if item is None else _quoted(_text(item)) for item in part)
        return "{" + ",".join(items) + "}"
    return str(part)


def _quoted(element: str) -> str:
    return '"' + element.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _text_key(stored: list[str] | None) -> TextKey | None:
    return None if stored is None else tuple(stored)
