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

This module decides and does nothing: the driver is `log.recorder`.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import Enum
from typing import Any, Self

import numpy as np
import pyarrow as pa

from deltaworks.capture.source import Chunk, StreamedChange, Visibility
from deltaworks.change import DELETE, OLD_KEY, READ, TRUNCATE, ChangeBatch, change_schema
from deltaworks.errors import InvariantError
from deltaworks.position import Lsn
from deltaworks.schema import AS_TEXT, TableName, TableSchema

Key = tuple[Any, ...]  # Any: a key column may have any type
TextKey = tuple[str, ...]


class DumpState(Enum):
    """Where the dump of a table stands. The recorder sets it; it is stored with the group that reached it."""

    WAITING = "waiting"
    """Not begun: transactions may run that wrote to the table before its changes were captured."""
    READING = "reading"
    """Rows up to `after_key` are in the log or covered by changes there."""
    REPAIRING = "repairing"
    """The range is read; rows that moved with columns not sent are read again by key."""
    DONE = "done"
    """Every row is in the log or covered by changes there. Nothing leads out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableDump:
    """The dump of one table, as it is stored with every group.

    `strays` are the new keys of rows that changed their key while columns were not sent. Such a
    row may have moved from what is still to be read to what was read already, and would be missed.
    """

    state: DumpState = DumpState.WAITING
    after_key: TextKey | None = None
    up_to_key: TextKey | None = None
    rows: int = 0
    strays: frozenset[TextKey] = frozenset()

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Self:
        """Read what `to_json` gave."""
        return cls(
            state=DumpState(stored["state"]),
            after_key=_text_key(stored["after_key"]),
            up_to_key=_text_key(stored["up_to_key"]),
            rows=stored["rows"],
            strays=frozenset(tuple(key) for key in stored["strays"]),
        )

    def to_json(self) -> dict[str, Any]:
        """The dump as JSON values."""
        return {
            "state": self.state.value,
            "after_key": self.after_key,
            "up_to_key": self.up_to_key,
            "rows": self.rows,
            "strays": sorted(self.strays),
        }

    def begun(self, last_key: TextKey | None) -> Self:
        """The dump at its start; done at once on an empty table."""
        if last_key is None:
            return replace(self, state=DumpState.REPAIRING if self.strays else DumpState.DONE)
        return replace(self, state=DumpState.READING, up_to_key=last_key)

    def advanced(self, settled: "Settled", *, last_key: TextKey | None) -> Self:
        """The dump after a chunk of its range was settled; `last_key` is the chunk's."""
        strays = self.strays - settled.repaired
        after = replace(self, rows=self.rows + settled.row_count, strays=strays)
        if last_key is not None:
            return replace(after, after_key=last_key)
        return replace(after, state=DumpState.REPAIRING if strays else DumpState.DONE)

    def repaired(self, keys: Iterable[TextKey], settled: "Settled") -> Self:
        """The dump after the rows of these keys were read again and settled."""
        strays = self.strays - frozenset(keys) - settled.repaired
        after = replace(self, rows=self.rows + settled.row_count, strays=strays)
        return after if strays else replace(after, state=DumpState.DONE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What comes out of a chunk at its mark.

    `reads` is `None` when no row is left. `repaired` has the keys of rows that moved and are
    known to be complete now. `is_stale` means that the table changed its shape after the chunk was
    read: nothing may be used, the chunk must be read again.
    """

    reads: ChangeBatch | None = None
    repaired: frozenset[TextKey] = frozenset()
    is_stale: bool = False

    @property
    def row_count(self) -> int:
        """Rows given out."""
        return 0 if self.reads is None else len(self.reads)


@dataclass(slots=True)
class Recent:
    """Streamed changes that a snapshot taken from now on may not see, per table, in commit order."""

    _batches: dict[TableName, list[ChangeBatch]] = field(default_factory=dict)

    def remember(self, batch: ChangeBatch) -> None:
        """Keep a batch that was streamed."""
        self._batches.setdefault(batch.schema.name, []).append(batch)

    def forget_seen(self, visible_in: Visibility) -> None:
        """Drop what this snapshot sees: every later one sees it too."""
        for table, batches in list(self._batches.items()):
            left = [unseen for batch in batches if (unseen := _unseen(batch, visible_in)) is not None]
            if left:
                self._batches[table] = left
            else:
                del self._batches[table]

    def forget_table(self, table: TableName) -> None:
        """Drop a table whose dump is done."""
        self._batches.pop(table, None)

    def unseen(self, table: TableName, visible_in: Visibility) -> list[ChangeBatch]:
        """The changes of a table that the snapshot does not see, in commit order."""
        batches = self._batches.get(table, [])
        return [unseen for batch in batches if (unseen := _unseen(batch, visible_in)) is not None]

    def __len__(self) -> int:
        return sum(len(batch) for batches in self._batches.values() for batch in batches)


def settle(chunk: Chunk, unseen: Iterable[ChangeBatch], *, position: Lsn, committed_at: datetime) -> Settled:
    """Merge a chunk with the changes up to its mark that its snapshot does not see.

    `position` and `committed_at` are those of the mark; every read carries them.
    """
    unseen = list(unseen)
    if any(not _same_shape(batch.schema, chunk.schema) for batch in unseen):
        return Settled(is_stale=True)
    rows = {key: _Row(index) for index, key in enumerate(_keys(chunk.rows, chunk.schema))}
    repaired: set[TextKey] = set()
    for batch in unseen:
        for change in streamed_changes(batch):
            _apply(change, rows, repaired)
    owed = [row for row in rows.values() if row.is_owed]
    return Settled(
        reads=_reads(chunk, owed, position=position, committed_at=committed_at) if owed else None,
        repaired=frozenset(repaired),
    )


def strays(batch: ChangeBatch) -> Iterator[TextKey]:
    """The new keys of rows that changed their key while columns were not sent."""
    moved, unsent = batch.rows.column("_old_key"), batch.rows.column("_unchanged")
    if moved.null_count == len(batch) or unsent.null_count == len(batch):
        return
    for change in streamed_changes(batch):
        if change.old_key is not None and change.unchanged:
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
            texts={name: text for name, text in texts.items() if not name.startswith(OLD_KEY)},
            unchanged=unchanged,
        )


def text_key(key: Key) -> TextKey:
    """A key as text that the source reads back as the same key."""
    return tuple(_text(part) for part in key)


@dataclass(slots=True)
class _Row:
    """A row of the chunk, or one that such a row became.

    `is_owed`: what left so far does not hold the whole row, so a read must.
    """

    index: int | None
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


def _apply(change: StreamedChange, rows: dict[Key, _Row], repaired: set[TextKey]) -> None:
    if change.op == TRUNCATE:
        rows.clear()
        return
    was_at = change.old_key if change.old_key is not None else change.key
    row = rows.pop(was_at, None)
    if change.op == DELETE:
        return
    if not change.unchanged:
        rows[change.key] = _Row(None, change.values, change.texts, is_owed=False)
    elif row is not None:
        rows[change.key] = row.merged(change)
        if change.old_key is not None:
            repaired.add(text_key(change.key))


def _reads(chunk: Chunk, owed: list[_Row], *, position: Lsn, committed_at: datetime) -> ChangeBatch:
    """The owed rows as reads; those that nothing touched stay in Arrow."""
    indices = pa.array([row.index for row in owed], pa.int64())
    rows = chunk.rows.take(indices)
    if any(row.changed for row in owed):
        merged = [row.over(values) for values, row in zip(rows.to_pylist(), owed, strict=True)]
        rows = pa.RecordBatch.from_pylist(merged, schema=rows.schema)
    count = len(owed)
    schema = change_schema(chunk.schema)
    meta = [
        pa.repeat(pa.scalar(READ, pa.string()), count),
        pa.repeat(pa.scalar(position.value, pa.uint64()), count),
        pa.array(range(count), pa.uint32()),
        pa.repeat(pa.scalar(0, pa.uint64()), count),
        pa.repeat(pa.scalar(committed_at, pa.timestamp("us", "UTC")), count),
        pa.nulls(count, pa.list_(pa.string())),
        pa.nulls(count, schema.field("_old_key").type),
    ]
    # The rows begin with the last of the meta columns, `_as_text`.
    return ChangeBatch(chunk.schema, pa.RecordBatch.from_arrays([*meta, *rows.columns], schema=schema))


def _unseen(batch: ChangeBatch, visible_in: Visibility) -> ChangeBatch | None:
    txids = batch.rows.column("_txid").to_numpy()
    candidates = np.unique(txids[txids >= visible_in.oldest_running])
    missed = [txid for txid in candidates.tolist() if not visible_in.sees(txid)]
    if not missed:
        return None
    chosen = np.isin(txids, np.array(missed, dtype=np.uint64))
    return batch if chosen.all() else ChangeBatch(batch.schema, batch.rows.filter(pa.array(chosen)))


def _same_shape(one: TableSchema, other: TableSchema) -> bool:
    if one.key != other.key or one.names != other.names:
        return False
    return all(ours.type.equals(theirs.type) for ours, theirs in zip(one.columns, other.columns, strict=True))


def _keys(rows: pa.RecordBatch, schema: TableSchema) -> Iterator[Key]:
    parts = rows.select([AS_TEXT.name, *schema.key]).to_pylist()
    keys = [_key(row, dict(row[AS_TEXT.name] or ()), schema) for row in parts]
    if len(set(keys)) != len(keys):
        raise InvariantError(f"cannot settle a chunk of {schema.name}: two of its rows have one key")
    yield from keys


def _key(values: Mapping[str, Any], texts: Mapping[str, str], schema: TableSchema, text_of: str = "") -> Key:
    """A key that compares as the source's: a part that its column cannot hold is its text."""
    return tuple(
        texts.get(text_of + name) if values[name] is None else _comparable(values[name]) for name in schema.key
    )


def _comparable(part: Any) -> Any:  # Any: a key column may have any type
    if isinstance(part, list):
        return tuple(_comparable(item) for item in part)
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
