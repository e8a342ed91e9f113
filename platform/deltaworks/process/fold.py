"""Changes folded into rows: which rows there are now, and which entities were touched.

    changes of a table + rows as stored ──► rows to put and to drop, keys touched, columns that turned

Deciding only: what is stored is handed in, what to store is handed back. Key moves, truncates, values that the
source did not send, and a row that moves from one entity to another all end here.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import pyarrow as pa

from deltaworks.change import CREATE, DELETE, OLD_KEY, READ, TRUNCATE, UPDATE, ChangeBatch
from deltaworks.process.shape import Field, plain_values
from deltaworks.process.source import Table
from deltaworks.schema import TableSchema, texts_by_column

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

Key = int | str
"""A row's or entity's key as the state holds it; a key of several columns is a JSON text."""

Row = tuple[Any, ...]
"""The entity's key, then the declared columns, as `shape.plain_values` gives them."""


class At(NamedTuple):
    """When a change happened; ordered as its version is. `committed_at` is in microseconds since 1970."""

    position: int
    ordinal: int
    committed_at: int
    is_read: bool


def moment(committed_at: int) -> datetime:
    """The time of an `At`, in UTC."""
    return _EPOCH + timedelta(microseconds=committed_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A watched column of an entity that changed."""

    entity: Key
    column: str
    before: Any
    row: Row
    at: At


@dataclass(slots=True, kw_only=True)
class Fold:
    """What one table's changes come to; filled in by `fold_rows` or `fold_keys`.

    `puts` maps a row's key to the row, or to `None` where it is dropped. `emptied_at` says that a truncate
    came first: everything stored before is gone.
    """

    puts: dict[Key, Row | None] = field(default_factory=dict)
    touched: dict[Key, At] = field(default_factory=dict)
    emptied_at: At | None = None
    turns: list[Turn] = field(default_factory=list)
    incomplete: int = 0
    _position: int = -1
    _aside: dict[Key, list[Row]] = field(default_factory=dict)

    def touch(self, entity: Key | None, at: At) -> None:
        """Mark an entity as touched, at the newest of its changes."""
        if entity is not None and ((known := self.touched.get(entity)) is None or known < at):
            self.touched[entity] = at

    def begin(self, position: int) -> None:
        """Go on to the transaction at this position; what it left aside is gone."""
        if position != self._position:
            self._position = position
            self._aside.clear()

    def put_aside(self, key: Key, row: Row) -> None:
        """Keep a row whose key another row moved to: inside one transaction a key may have two rows."""
        self._aside.setdefault(key, []).append(row)

    def first_aside(self, key: Key) -> Row | None:
        """The row aside that would leave first."""
        rows = self._aside.get(key)
        return rows[0] if rows else None

    def leave(self, key: Key) -> Row | None:
        """Take the row that leaves a key, if there is one aside: the one that was there first."""
        rows = self._aside.get(key)
        return rows.pop(0) if rows else None


def row_keys(batch: ChangeBatch) -> list[Key | None]:
    """The keys of the changed rows, after the change; `None` for a truncate."""
    texts = texts_by_column(batch.rows)
    return _keys([(batch.rows.column(name), texts.get(name, {})) for name in batch.schema.key])


def old_row_keys(batch: ChangeBatch) -> list[Key | None]:
    """The keys before the change where it moved them, else `None`."""
    column = batch.rows.column("_old_key")
    if column.null_count == len(column):
        return [None] * len(column)
    moved = [value is not None for value in column.to_pylist()]
    texts = texts_by_column(batch.rows)
    keys = _keys([(column.field(name), texts.get(OLD_KEY + name, {})) for name in batch.schema.key])
    return [key if is_moved else None for key, is_moved in zip(keys, moved, strict=True)]


def fold_rows(
    fold: Fold,
    batch: ChangeBatch,
    table: Table[Any],
    *,
    key: str,
    stored: Mapping[Key, Row],
    watched: Sequence[str],
    have_left: bool = False,
) -> None:
    """Fold changes of the entity's table or of a related one.

    `stored` has the rows, as stored before this fold, of every key and old key in the batch. `watched` are
    columns whose turns are wanted. `have_left` says that documents of these changes may be in the sinks.
    """
    places = {item.name: index for index, item in enumerate(table.fields, start=1)}
    turning = [(name, places[name]) for name in watched]
    for op, at, row_key, old_key, unchanged, row in zip(
        batch.rows.column("_op").to_pylist(),
        _ats(batch),
        row_keys(batch),
        old_row_keys(batch),
        batch.rows.column("_unchanged").to_pylist(),
        _rows(batch, table.fields, key),
        strict=True,
    ):
        fold.begin(at.position)
        if op == TRUNCATE:
            _empty(fold, at)
        elif op == DELETE:
            _delete(fold, stored, row_key, row, at)
        else:
            before_key = row_key if old_key is None else old_key
            before = fold.first_aside(before_key) if before_key != row_key else None
            before = before or _current(fold, stored, before_key)
            if unchanged and before is None:
                # The dump has not come to this row yet; it re-reads every row that left incomplete.
                fold.incomplete += 1
                continue
            after = _filled(row, before, unchanged, places, key) if unchanged and before is not None else row
            if op == UPDATE and after == before and before_key == row_key and not have_left:
                # Nothing that the app reads has changed. A dump's read is let through: it is how a repair is asked for.
                # Where no row was kept nobody knew that, so the document has left with the version of this change.
                continue
            if before_key != row_key:
                _move(fold, stored, before_key, row_key, at)
            fold.puts[row_key] = after
            fold.touch(after[0], at)
            if before is not None:
                fold.touch(before[0], at)
            if before is not None or op == CREATE:
                fold.turns += _turns(turning, before, after, at)


def fold_keys(fold: Fold, batch: ChangeBatch) -> None:
    """Fold changes of a looked-up table: only which ids were touched."""
    for op, at, row_key, old_key in zip(
        batch.rows.column("_op").to_pylist(), _ats(batch), row_keys(batch), old_row_keys(batch), strict=True
    ):
        if op == TRUNCATE:
            _empty(fold, at)
        fold.touch(row_key, at)
        fold.touch(old_key, at)


def _delete(fold: Fold, stored: Mapping[Key, Row], row_key: Key, row: Row, at: At) -> None:
    before = fold.leave(row_key)
    if before is None:
        before = _current(fold, stored, row_key)
        fold.puts[row_key] = None
    # A delete carries the key alone, so the entity it belonged to is known from the row before.
    fold.touch(before[0] if before is not None else row[0], at)


def _move(fold: Fold, stored: Mapping[Key, Row], old_key: Key, new_key: Key, at: At) -> None:
    if fold.leave(old_key) is None:
        fold.puts[old_key] = None
    displaced = _current(fold, stored, new_key)
    if displaced is not None:
        fold.put_aside(new_key, displaced)
        fold.touch(displaced[0], at)


def _turns(turning: Iterable[tuple[str, int]], before: Row | None, after: Row, at: At) -> Iterator[Turn]:
    for column, place in turning:
        old_value = before[place] if before is not None else None
        if before is None or old_value != after[place]:
            yield Turn(entity=after[0], column=column, before=old_value, row=after, at=at)


def _empty(fold: Fold, at: At) -> None:
    # Entities of rows put earlier in this fold are touched already; those of stored rows are found by the state.
    for entity in fold.touched:
        fold.touch(entity, at)
    fold.puts.clear()
    fold.emptied_at = at


def _current(fold: Fold, stored: Mapping[Key, Row], key: Key) -> Row | None:
    if key in fold.puts:
        return fold.puts[key]
    return None if fold.emptied_at is not None else stored.get(key)


def _filled(row: Row, before: Row, unchanged: Iterable[str], columns: Mapping[str, int], key: str) -> Row:
    values = list(row)
    for name in unchanged:
        if name == key:
            values[0] = before[0]
        if (index := columns.get(name)) is not None:
            values[index] = before[index]
    return tuple(values)


def _rows(batch: ChangeBatch, fields: Sequence[Field], key: str) -> Iterator[Row]:
    texts = texts_by_column(batch.rows)
    return zip(
        _with_texts(batch.rows.column(key).to_pylist(), texts.get(key, {})),
        *(_with_texts(_column(batch.rows, batch.schema, item), texts.get(item.name, {})) for item in fields),
        strict=True,
    )


def _column(rows: pa.RecordBatch, schema: TableSchema, item: Field) -> list[Any]:
    if item.name not in schema.names:
        # Only a batch from before the column was added; the schema check lets no other through.
        return [None] * rows.num_rows
    return plain_values(rows.column(item.name), item.type)


def _with_texts(values: list[Any], texts: Mapping[int, str]) -> list[Any]:
    """The values with the source's text in place of those that the column could not hold."""
    for row, text in texts.items():
        values[row] = text
    return values


def _ats(batch: ChangeBatch) -> Iterator[At]:
    make: Callable[..., At] = At
    return map(
        make,
        batch.rows.column("_commit").to_pylist(),
        batch.rows.column("_ordinal").to_pylist(),
        batch.rows.column("_committed_at").cast(pa.int64()).to_pylist(),
        [op == READ for op in batch.rows.column("_op").to_pylist()],
    )


def _keys(columns: Sequence[tuple[pa.Array, Mapping[int, str]]]) -> list[Key | None]:
    """The keys out of their columns, each with the texts of what it could not hold."""
    kinds = [column.type for column, _ in columns]
    values = [_with_texts(column.to_pylist(), texts) for column, texts in columns]
    if len(values) == 1 and (pa.types.is_integer(kinds[0]) or pa.types.is_string(kinds[0])):
        return list(values[0])
    return [json.dumps(key, default=str) for key in zip(*values, strict=True)]
