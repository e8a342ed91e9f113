"""Settling the dump of a table without a key: a bag of rows, where equal ones differ in nothing.

The stream says which row went by its values and not by its place, so no range of the table can be settled
apart. It is read whole in one snapshot, block by block, and at its mark it becomes what the table was there:

    stream   … ──x1──x2──────x3──HIGH──►        x1 is visible in the snapshot S: it is in the rows
                          ▲ rows read at S       x2, x3 are not: what they took is taken out, what they brought put in
    log      … x1  x2      x3  [truncate, all rows]

The truncate ends what readers had before, so a repeated dump never doubles a row. Pure, as `capture.dump`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.capture.dump import Settled, as_changes, comparable, doubtful, same_shape
from deltaworks.capture.source import Chunk
from deltaworks.change import BEFORE, DELETE, READ, TRUNCATE, ChangeBatch
from deltaworks.errors import InvariantError
from deltaworks.position import Lsn
from deltaworks.schema import AS_TEXT, TableSchema

Row = tuple[Any, ...]
"""A row in a form in which equal rows are equal: a value, or its text, for each column."""


def settle_bag(chunk: Chunk, unseen: Iterable[ChangeBatch], *, position: Lsn, committed_at: datetime) -> Settled:
    """All rows of a table as of the mark: those of the chunk, with the changes that its snapshot does not see.

    Raises:
        InvariantError: a change took away a row that was not there.
    """
    unseen = list(unseen)
    if doubtful(unseen, chunk) or any(not same_shape(batch.schema, chunk.schema) for batch in unseen):
        return Settled(is_stale=True)
    bag = _Bag()
    for batch in unseen:
        bag.take(batch)
    rows = chunk.rows.slice(0, 0) if bag.is_emptied else _without(chunk, bag.gone)
    if bag.came:
        added = pa.RecordBatch.from_pylist([row for rows in bag.came.values() for row in rows], schema=rows.schema)
        rows = pa.concat_batches([rows, added])
    nothing = pa.RecordBatch.from_pylist([{}], schema=rows.schema)
    return Settled(
        reset=as_changes(TRUNCATE, chunk, nothing, first=0, position=position, committed_at=committed_at),
        reads=as_changes(READ, chunk, rows, first=1, position=position, committed_at=committed_at),
    )


@dataclass(slots=True)
class _Bag:
    """What changes did to a bag: rows to take out of it, rows to put into it."""

    came: dict[Row, list[dict[str, Any]]] = field(default_factory=dict)
    gone: defaultdict[Row, int] = field(default_factory=lambda: defaultdict(int))
    is_emptied: bool = False

    def take(self, batch: ChangeBatch) -> None:
        schema = batch.schema
        for values in batch.rows.to_pylist():
            if values["_op"] == TRUNCATE:
                self.came.clear()
                self.gone.clear()
                self.is_emptied = True
                continue
            texts = dict(values[AS_TEXT.name] or ())
            before = values.get(BEFORE)
            if before is not None:
                self._went(_row(before, texts, schema, text_of=f"{BEFORE}."))
            if values["_op"] != DELETE:
                ours = {name: text for name, text in texts.items() if name in schema.names}
                row = {name: values[name] for name in schema.names} | {AS_TEXT.name: ours or None}
                self.came.setdefault(_row(values, texts, schema), []).append(row)

    def _went(self, row: Row) -> None:
        here = self.came.get(row)
        if here is None:
            self.gone[row] += 1
            return
        here.pop()
        if not here:
            del self.came[row]


def _without(chunk: Chunk, gone: Mapping[Row, int]) -> pa.RecordBatch:
    """The rows without as many of each as went."""
    if not gone:
        return chunk.rows
    left, kept = dict(gone), np.ones(len(chunk.rows), bool)
    places = np.flatnonzero(_may_be(chunk, gone))
    for place, row in zip(places, _rows(chunk.rows.take(pa.array(places)), chunk.schema), strict=True):
        if left.get(row):
            left[row] -= 1
            kept[place] = False
    if any(left.values()):
        raise InvariantError(
            f"cannot settle a dump of {chunk.schema.name}: {sum(left.values())} rows went that were not there; "
            "report this"
        )
    return chunk.rows.filter(pa.array(kept))


def _may_be(chunk: Chunk, rows: Iterable[Row]) -> np.ndarray:
    """Which rows of the chunk may be one of these, by the columns that Arrow makes sets of."""
    chosen = np.ones(len(chunk.rows), bool)
    for place, column in enumerate(chunk.schema.columns):
        if pa.types.is_floating(column.type) or pa.types.is_nested(column.type):
            continue
        # A text stands for a null.
        values = [None if isinstance(row[place], _Text) else row[place] for row in rows]
        wanted = pa.array(values, column.type)
        chosen &= pc.is_in(chunk.rows.column(column.name), wanted).to_numpy(zero_copy_only=False)
    return chosen


class _Text(str):
    """The source's text of a value that its column cannot hold."""

    __slots__ = ()


def _rows(rows: pa.RecordBatch, schema: TableSchema) -> Iterator[Row]:
    for values in rows.to_pylist():
        yield _row(values, dict(values[AS_TEXT.name] or ()), schema)


def _row(values: Mapping[str, Any], texts: Mapping[str, str], schema: TableSchema, text_of: str = "") -> Row:
    return tuple(
        _Text(texts[text_of + name]) if values[name] is None and text_of + name in texts else _exact(values[name])
        for name in schema.names
    )


def _exact(value: Any) -> Any:  # Any: a column may have any type
    # 0 and -0 are equal numbers and two values.
    return value.hex() if isinstance(value, float) else comparable(value)
