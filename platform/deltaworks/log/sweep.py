"""Deletes the rows that are gone from a table although no change said so.

After a gap, a detached partition or a table made anew a dump brings every row that is there, and cannot bring
the news of a row that is not. But the log knows all rows that were ever given out, and the position of the last
word on each:

    position    ──1──────2──────3───── P ──────────────────────────► end
    log         a,b,c    b      c      table is dumped again: a, c
    last word   b: 2                                    a, c: after P          so b is gone: delete it

`P` is a position at or after whatever made the rows go. The dump gives a row that is still there a newer word
than `P`: as a read, or because a change after `P` carries it. So a key whose last word is not after `P` and not
a delete has no row any more. The deletes are appended once the dump is done: a reader never sees an empty table,
and until then it sees rows that are gone, which is what it saw before.

The log is read once, a little at a time beside the stream, so nothing waits for it. Memory holds the keys of the
tables, not their rows.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import structlog

from deltaworks.change import DELETE, TRUNCATE, ChangeBatch, change_schema
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.position import Lsn
from deltaworks.schema import TableName, TableSchema

FIRST_ORDINAL = 1 << 31
"""Deletes share their position with the last change before them, so they count from where no change comes to."""

COMPACTED_ROWS = 200_000
"""Words held at least before those of one key are made one."""

CHANGES_PER_STEP = 16_384

logger = structlog.get_logger()

_WORD = _PLACE, _COMMIT, _ALIVE = "_place", "_commit", "_alive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """A table whose gone rows are to be deleted: those with no word after `since`.

    `is_another` says that the table was made anew, so rows of its older keys are gone too.
    """

    since: Lsn
    is_another: bool = False


@dataclass(slots=True, kw_only=True)
class Sweep:
    """The deletes that a source's log owes. Not thread-safe; what is owed is stored with every group."""

    reader: LogReader
    _owed: dict[TableName, Owed] = field(default_factory=dict)
    _read_up_to: int = -1
    _keys: dict[tuple[Any, ...], "_Keys"] = field(default_factory=dict)

    @property
    def is_owed(self) -> bool:
        """Whether anything is left to do."""
        return bool(self._owed)

    def is_due(self, position: Lsn, *, is_done: Callable[[TableName], bool]) -> bool:
        """Whether every such table is dumped, and the log is past what made its rows go."""
        return bool(self._owed) and all(is_done(table) and position >= owed.since for table, owed in self._owed.items())

    def to_json(self) -> dict[str, Any]:  # Any: JSON values
        """What is owed, as it is stored in a group's progress."""
        return {"sweeps": {str(name): [owed.since.value, owed.is_another] for name, owed in self._owed.items()}}

    def load(self, progress: Mapping[str, Any], *, tables: Collection[TableName]) -> None:  # Any: JSON values
        """Take up what is owed to tables that are still captured."""
        stored = {TableName.parse(name): owed for name, owed in progress.get("sweeps", {}).items()}
        self._owed = {
            name: Owed(since=Lsn(since), is_another=is_another)
            for name, (since, is_another) in stored.items()
            if name in tables
        }
        self._forget()

    def owe(self, table: TableName, *, since: Lsn, is_another: bool = False) -> None:
        """Ask for the deletes of a table that is dumped again from now on."""
        before = self._owed.get(table)
        was_another = before is not None and before.is_another
        self._owed[table] = Owed(since=since, is_another=is_another or was_another)
        self._forget()

    def step(self, *, up_to_sequence: int) -> bool:
        """Read a little of the log; `True` when everything up to that group was read."""
        if self._read_up_to < 0:
            self._begin_at_oldest()
        if self._read_up_to < up_to_sequence:
            for group in self.reader.read(after_sequence=self._read_up_to, max_changes=CHANGES_PER_STEP):
                self._take(group)
        return self._read_up_to >= up_to_sequence

    def deletes(
        self, current: Mapping[TableName, TableSchema], *, position: Lsn, committed_at: datetime
    ) -> tuple[ChangeBatch, ...]:
        """The deletes, at the log's end; nothing is owed afterwards.

        `current` are the tables as they are now; one that is not in there is left as it is.
        """
        batches: list[ChangeBatch] = []
        ordinal = FIRST_ORDINAL
        for keys in self._keys.values():
            table = keys.schema.name
            now = current.get(table)
            # Under keys of another kind a row may go on; only in a table made anew it cannot.
            if now is None or (keys.shape != _shape(now) and not self._owed[table].is_another):
                continue
            gone = keys.without_word_after(self._owed[table].since)
            if gone.num_rows:
                logger.warning("rows are gone without a change", table=str(table), rows=gone.num_rows)
                batches.append(
                    _deletes(keys.schema, gone, position=position, committed_at=committed_at, ordinal=ordinal)
                )
                ordinal += gone.num_rows
        self._owed.clear()
        self._forget()
        return tuple(batches)

    def _begin_at_oldest(self) -> None:
        oldest = self.reader.oldest()
        if oldest is not None and oldest.sequence > 0:
            logger.warning(
                "gone rows are looked for in what the log keeps; `deltaworks verify` finds older ones",
                oldest_group=oldest.sequence,
            )
            self._read_up_to = oldest.sequence - 1

    def _take(self, group: StoredGroup) -> None:
        for batch in group.batches:
            if batch.schema.name in self._owed and not batch.schema.key:
                # A dump of a table without a key begins with a truncate, so what is gone is gone with that.
                if pc.any(pc.equal(batch.rows.column("_op"), TRUNCATE)).as_py():
                    self._forget_rows(batch.schema.name)
            elif batch.schema.name in self._owed:
                keys = self._keys.setdefault((batch.schema.name, _shape(batch.schema)), _Keys(batch.schema))
                keys.add(batch)
                if keys.is_emptied:
                    self._empty_others(keys)
        self._read_up_to = group.header.sequence

    def _forget_rows(self, table: TableName) -> None:
        for keys in self._keys.values():
            if keys.schema.name == table:
                keys.clear()

    def _empty_others(self, emptied: "_Keys") -> None:
        emptied.is_emptied = False
        for keys in self._keys.values():
            if keys is not emptied and keys.schema.name == emptied.schema.name:
                keys.clear()

    def _forget(self) -> None:
        self._read_up_to = -1
        self._keys.clear()


class _Keys:
    """The last word on every key of one kind of a table."""

    def __init__(self, schema: TableSchema) -> None:
        self.schema = schema
        self.shape = _shape(schema)
        self.is_emptied = False
        self._words: list[pa.Table] = []
        self._rows = 0
        self._compacted = 0
        self._place = 0

    def add(self, batch: ChangeBatch) -> None:
        self.schema = batch.schema
        rows = batch.rows
        truncates = pc.indices_nonzero(pc.equal(rows.column("_op"), TRUNCATE))
        if len(truncates):
            self.clear()
            self.is_emptied = True
            rows = rows.slice(truncates[-1].as_py() + 1)
        if not rows.num_rows:
            return
        first = self._place
        self._place += 2 * rows.num_rows
        self._keep(self._moved_from(rows, first))
        alive = pc.not_equal(rows.column("_op"), DELETE)
        places = pa.array(range(first + 1, self._place, 2), pa.int64())
        keys = [rows.column(name) for name in self.schema.key]
        self._keep(self._table([*keys, places, rows.column("_commit"), alive]))
        if self._rows > 2 * self._compacted + COMPACTED_ROWS:
            self._compact()

    def clear(self) -> None:
        self._words.clear()
        self._rows = self._compacted = 0

    def without_word_after(self, since: Lsn) -> pa.Table:
        """The keys that have a row as far as the log knows, and no word after a position."""
        self._compact()
        if not self._words:
            return pa.table({})
        words = self._words[0]
        chosen = pc.and_(words[_ALIVE], pc.less_equal(words[_COMMIT], pa.scalar(since.value, pa.uint64())))
        for name in self.schema.key:
            # A key part that Arrow cannot hold has no delete that names it; such a row stays.
            chosen = pc.and_(chosen, pc.is_valid(words[_column(self.schema, name)]))
        return words.filter(chosen)

    def _moved_from(self, rows: pa.RecordBatch, first: int) -> pa.Table:
        moved = rows.column("_old_key")
        at = pc.indices_nonzero(pc.is_valid(moved))
        old = moved.take(at)
        places = pc.add(pc.multiply(at.cast(pa.int64()), 2), first)
        commits = rows.column("_commit").take(at)
        keys = [pc.struct_field(old, [name]) for name in self.schema.key]
        return self._table([*keys, places, commits, pa.repeat(pa.scalar(False), len(at))])

    def _keep(self, words: pa.Table) -> None:
        if words.num_rows:
            self._words.append(words)
            self._rows += words.num_rows

    def _table(self, columns: list[pa.Array]) -> pa.Table:
        return pa.table(columns, names=[*(_column(self.schema, name) for name in self.schema.key), *_WORD])

    def _compact(self) -> None:
        if not self._words:
            return
        words = pa.concat_tables(self._words).combine_chunks().sort_by(_PLACE)
        names = [_column(self.schema, name) for name in self.schema.key]
        # The order of rows is kept only without threads.
        last = words.group_by(names, use_threads=False).aggregate([(name, "last") for name in _WORD])
        self._words = [last.select([*names, *(f"{name}_last" for name in _WORD)]).rename_columns([*names, *_WORD])]
        self._rows = self._compacted = last.num_rows


def _deletes(
    schema: TableSchema, gone: pa.Table, *, position: Lsn, committed_at: datetime, ordinal: int
) -> ChangeBatch:
    count = gone.num_rows
    values: dict[str, pa.Array] = {
        "_op": pa.repeat(pa.scalar(DELETE, pa.string()), count),
        "_commit": pa.repeat(pa.scalar(position.value, pa.uint64()), count),
        "_ordinal": pa.array(range(ordinal, ordinal + count), pa.uint32()),
        "_txid": pa.repeat(pa.scalar(0, pa.uint64()), count),
        "_committed_at": pa.repeat(pa.scalar(committed_at, pa.timestamp("us", "UTC")), count),
    }
    for name in schema.key:
        values[name] = gone[_column(schema, name)].combine_chunks()
    arrow = change_schema(schema)
    arrays = [values[field.name] if field.name in values else pa.nulls(count, field.type) for field in arrow]
    return ChangeBatch(schema, pa.RecordBatch.from_arrays(arrays, schema=arrow))


def _shape(schema: TableSchema) -> tuple[Any, ...]:  # Any: names and types
    return tuple((name, str(schema.column(name).type)) for name in schema.key)


def _column(schema: TableSchema, name: str) -> str:
    """The key's column among ours, whatever the source calls it."""
    return f"key_{schema.key.index(name)}"
