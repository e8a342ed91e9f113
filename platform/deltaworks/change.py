"""Changes: what one table went through, as an Arrow record batch.

A change is one row-level create, update, delete, read or truncate. A `ChangeBatch` holds the
changes of one table in commit order; its columns are the meta columns below, then the table's own
columns *after* the change.

| meta column     | type                | holds                                                         |
|-----------------|---------------------|---------------------------------------------------------------|
| `_op`           | utf8                | `c` create, `u` update, `d` delete, `r` read, `t` truncate, `m` message |
| `_commit`       | uint64              | the commit position (`Lsn.value`) of the transaction          |
| `_ordinal`      | uint32              | place in the transaction, over all tables, from 0             |
| `_txid`         | uint64              | the source's transaction id, widened; 0 for reads             |
| `_committed_at` | timestamp(us, UTC)  | commit time by the source's clock                             |
| `_unchanged`    | list<utf8>, or null | columns the source did not send; their value here is null and means nothing |
| `_old_key`      | struct of the key columns, or null | the key before the change, only where it changed |
| `_as_text`      | map<utf8, utf8>, or null | column to the source's text of a value that its Arrow type cannot hold |
| `_before`       | struct of the columns, or null | the row before the change; last, only where `schema.has_before` |

A column that `_as_text` names is null in that row; see `schema.AS_TEXT`. A part of the old key that its type
cannot hold is null in `_old_key` and stands there as `_old_key.<column>`; so does one of `_before`.

A delete has its key columns filled and all others null. A truncate has all of them null.

A table without a key is a bag of rows: `_before` says which of them a change takes away, and stores take away one
that is equal. A dump of it is a truncate at the mark and all rows behind it, because no read can replace a row.

Messages that applications write into the source's log are under the name `MESSAGES`, which is no table: they are
for readers of the log, and stores, apps and proofs pass them over. One outside of any transaction has `_txid` 0.

(`_commit`, `_ordinal`) is the identity of a change. A read has the position of the mark that
settled its chunk, so "the largest identity wins" is true of reads and changes alike.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pyarrow as pa

from deltaworks.errors import InvariantError
from deltaworks.schema import AS_TEXT, TableName, TableSchema

CREATE, UPDATE, DELETE, READ, TRUNCATE, MESSAGE = "c", "u", "d", "r", "t", "m"

MESSAGES = TableName("pg_catalog", "logical_message")
"""What a batch of messages has as its name; no captured table can have it."""


class MalformedBatchError(InvariantError):
    """A record batch that claims to hold changes lacks their columns."""


def meta_fields(schema: TableSchema) -> tuple[pa.Field, ...]:
    """The meta columns of a change of this table, in order."""
    old_key = pa.struct([pa.field(name, schema.column(name).type) for name in schema.key])
    return (
        pa.field("_op", pa.string(), nullable=False),
        pa.field("_commit", pa.uint64(), nullable=False),
        pa.field("_ordinal", pa.uint32(), nullable=False),
        pa.field("_txid", pa.uint64(), nullable=False),
        pa.field("_committed_at", pa.timestamp("us", "UTC"), nullable=False),
        pa.field("_unchanged", pa.list_(pa.string())),
        pa.field("_old_key", old_key),
        AS_TEXT,
    )


META_COLUMNS = ("_op", "_commit", "_ordinal", "_txid", "_committed_at", "_unchanged", "_old_key", AS_TEXT.name)

OLD_KEY = "_old_key."
"""What stands before a column's name in `_as_text` where the text is of the old key."""


BEFORE = "_before"
"""The column with the whole row before a change; `_before.` stands before a column's name in `_as_text`."""


def change_schema(schema: TableSchema) -> pa.Schema:
    """The Arrow schema of a batch of changes of this table."""
    fields = schema.to_arrow(before=meta_fields(schema))
    if not schema.has_before:
        return fields
    return fields.append(pa.field(BEFORE, pa.struct([pa.field(column.name, column.type) for column in schema.columns])))


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Changes of one table in commit order; never empty; shares no memory with another batch."""

    schema: TableSchema
    rows: pa.RecordBatch

    @classmethod
    def from_arrow(cls, rows: pa.RecordBatch) -> Self:
        """Take a record batch that `change_schema` describes, for example out of the log.

        Batches from before `_as_text` get it: no value of theirs needed one.

        Raises:
            MalformedBatchError: the meta columns are not there.
        """
        names = tuple(rows.schema.names[: len(META_COLUMNS)])
        if names != META_COLUMNS:
            if names[: len(META_COLUMNS) - 1] != META_COLUMNS[:-1]:
                raise MalformedBatchError(f"cannot read changes: first columns are {names}")
            rows = rows.add_column(len(META_COLUMNS) - 1, AS_TEXT, pa.nulls(rows.num_rows, AS_TEXT.type))
        return cls(TableSchema.from_arrow(rows.schema), rows)

    def __len__(self) -> int:
        return int(self.rows.num_rows)

    def slice_by_commit(self, *, after: int, up_to: int) -> Iterator["ChangeBatch"]:
        """The changes with `after < _commit <= up_to` (both `Lsn.value`), as zero or one batch."""
        commits = self.rows.column("_commit").to_numpy()
        first, end = commits.searchsorted([after, up_to], side="right")
        if end > first:
            yield ChangeBatch(self.schema, self.rows.slice(first, end - first))


def op_letters(ops: pa.Array | pa.ChunkedArray) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """The letter of each change as its byte, `ord(DELETE)` and so on; no copy of what is one piece.

    Comparing bytes takes a tenth of what comparing texts does.

    >>> op_letters(pa.array([CREATE, DELETE])).tolist() == [ord(CREATE), ord(DELETE)]
    True
    """
    pieces = ops.chunks if isinstance(ops, pa.ChunkedArray) else [ops]
    letters = [np.frombuffer(_letters(piece), np.uint8) for piece in pieces if len(piece)]
    if len(letters) == 1:
        return letters[0]
    return np.concatenate(letters) if letters else np.empty(0, np.uint8)


def _letters(ops: pa.Array) -> memoryview:
    _, bounds, data = ops.buffers()
    start, end = memoryview(bounds).cast("i")[ops.offset :: len(ops)][:2]
    if end - start != len(ops):
        raise MalformedBatchError(f"cannot read changes: {len(ops)} of them have ops of {end - start} letters")
    return memoryview(data)[start:end]


def together(batches: Iterable[ChangeBatch]) -> list[ChangeBatch]:
    """The same changes in fewer batches: one for each run of a table's batches of one schema.

    The changes of a table stay in their order; those of different tables do not keep theirs between them.
    """
    runs: dict[TableName, list[list[ChangeBatch]]] = {}
    for batch in batches:
        of_table = runs.setdefault(batch.schema.name, [])
        # The Arrow schema has the metadata too, so what is of one schema here is so in every respect.
        if of_table and of_table[-1][0].rows.schema.equals(batch.rows.schema, check_metadata=True):
            of_table[-1].append(batch)
        else:
            of_table.append([batch])
    return [_joined(run) for of_table in runs.values() for run in of_table]


def _joined(run: Sequence[ChangeBatch]) -> ChangeBatch:
    if len(run) == 1:
        return run[0]
    return ChangeBatch(run[0].schema, pa.concat_batches([batch.rows for batch in run]))
