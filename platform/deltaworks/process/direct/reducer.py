"""Ranges of changes as the newest state of each key in them, in columns; see `direct`."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, compress, repeat
from operator import not_
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.change import DELETE, READ, TRUNCATE, ChangeBatch, op_letters
from deltaworks.log.change_log import StoredGroup
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App
from deltaworks.process.arrow import table_schema
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY, TableStep
from deltaworks.process.direct.flags import Flags, flag_array
from deltaworks.process.direct.places import Integers, ascending, last_of_each, places_of
from deltaworks.process.entity import Entity
from deltaworks.process.fold import At, Fold, Key, Row, fold_rows, moment, old_row_keys, row_keys
from deltaworks.process.shape import cast, given_values, records
from deltaworks.process.sink import Document
from deltaworks.schema import AS_TEXT, texts_by_column

WIDE_BYTES = 500
"""PostgreSQL stores values out of line from 2,000 bytes a row on; Arrow's and its sizes differ by less than this."""

StoredRows = Callable[[Sequence[Key]], Mapping[Key, Row]]
"""The rows of these keys that the state has."""

_T = TypeVar("_T")

_META = ("_op", "_commit", "_ordinal", "_committed_at", AS_TEXT.name)


class RowsNeededError(Exception):
    """The changes cannot be understood without the rows before them; the message says why."""


@dataclass(slots=True, kw_only=True)
class Reduced:
    """A range of the log as the newest state of each key in it; `rows` has no key of `folded`.

    `rows`: `_key`, the meta columns, then the declared columns as the source has them. `folded` are keys whose rows
    had to be put together one by one. `wide` are keys of rows that the state has to keep.
    """

    rows: pa.Table
    folded: Fold
    wide: frozenset[Key]
    batches: Sequence[ChangeBatch]
    appended_at: "np.ndarray[Any, Any]"
    """When each of `rows` was appended to the log, in seconds since 1970."""

    def all_keys(self) -> list[Key]:
        """Every key in the range."""
        return [*self.rows.column(KEY).to_pylist(), *self.folded.puts]


def is_direct(app: App) -> bool:
    """Whether the app's documents are made of one row each, with nothing to remember between them."""
    remembers = app.related or app.lookups or app.reactions or app.windowing or app.deduplication
    return not remembers and all(step.when is None for step in app.enrichments)


def is_vectorised(app: App) -> bool:
    """Whether every step takes tables, so that no row becomes a Python object."""
    return all(isinstance(step, TableStep) or step.kind == "project" for step in app.steps)


class Reducer:
    """Makes ranges of changes into newest states; pure, but for what the app declares."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._table = app.entity
        self._names = [item.name for item in app.entity.fields]
        declared = {app.key, *self._names}
        self._declared = pa.array(sorted(declared), pa.string())

    def batches(self, groups: Iterable[StoredGroup]) -> list[ChangeBatch]:
        """The changes of the app's table."""
        return [batch for group in groups for batch in group.batches if batch.schema.name == self._table.name]

    def reduce(
        self, groups: Sequence[StoredGroup], batches: Sequence[ChangeBatch], *, stored: StoredRows, apart: set[Key]
    ) -> Reduced:
        """The newest state of each key; the keys `apart` are folded one by one, with those that need it.

        Raises:
            RowsNeededError: only the rows before can tell what the changes mean.
        """
        tricky = apart | self._tricky_keys(batches)
        table, wide_at = self._tables(batches)
        keys = table.column(KEY).combine_chunks()
        last = last_of_each(keys)
        if tricky:
            chosen = pa.array(list(tricky), keys.type)
            is_plain = pc.invert(pc.is_in(keys, chosen)).to_numpy(zero_copy_only=False)
            last = last[is_plain[last]]
        rows = table if len(last) == table.num_rows else table.take(pa.array(last))
        wide = frozenset(keys.take(pa.array(last[wide_at[last]])).to_pylist()) if wide_at.any() else frozenset()
        folded = self.fold(batches, tricky, stored=stored)
        is_wide_folded = bool(tricky) and bool(wide_at.any())
        return Reduced(
            rows=rows,
            folded=folded,
            wide=wide | (frozenset(folded.puts) if is_wide_folded else frozenset()),
            batches=batches,
            appended_at=self._appended_at(groups)[last],
        )

    def _appended_at(self, groups: Sequence[StoredGroup]) -> "np.ndarray[Any, Any]":
        counts = [sum(len(batch) for batch in self.batches([group])) for group in groups]
        return np.repeat([group.header.appended_at.timestamp() for group in groups], counts)

    def fold(self, batches: Sequence[ChangeBatch], keys: Iterable[Key], *, stored: StoredRows) -> Fold:
        """The changes of these keys folded row by row, as the plan that keeps rows does it.

        Raises:
            RowsNeededError: a column was not sent, and the row before is not there.
        """
        fold = Fold()
        wanted = list(keys)
        if not wanted:
            return fold
        before = stored(wanted)
        moved: dict[Key, At] = {}
        for batch in batches:
            chosen = _chosen(batch, wanted)
            if len(chosen):
                moved |= _moves(chosen)
                fold_rows(
                    fold,
                    chosen,
                    self._table,
                    key=self._app.key,
                    stored=before,
                    watched=(),
                )
        if fold.incomplete:
            raise RowsNeededError("a change came without a column, and the row before it is not known")
        for key, at in moved.items():
            if fold.puts.get(key, ()) is None:
                fold.touch(key, at)
        return fold

    def ats(self, rows: pa.Table) -> dict[Key, At]:
        """When the newest change of each row was."""
        return dict(zip(rows.column(KEY).to_pylist(), _ats(rows), strict=True))

    def entities(self, rows: pa.Table) -> tuple[list[Entity[Any]], list[Document]]:
        """The entities that are there, and tombstones of those that are gone."""
        keys = rows.column(KEY).to_pylist()
        versions = list(map(Version, _once_each(rows.column("_commit"), Lsn), rows.column("_ordinal").to_pylist()))
        committed_at = _once_each(rows.column("_committed_at").cast(pa.int64()), moment)
        texts = texts_by_column(rows.select([AS_TEXT.name]).combine_chunks())
        columns = [given_values(rows.column(item.name), item.type, texts.get(item.name)) for item in self._table.fields]
        # By place: a call by name takes half as long again.
        entities = list(
            map(
                Entity,
                keys,
                records(self._app.entity.schema, columns),
                versions,
                committed_at,
                repeat(_NO_ROWS),
                repeat(_NOTHING),
            )
        )
        is_gone = op_letters(rows.column("_op")) == ord(DELETE)
        if not is_gone.any():
            return entities, []
        gone = is_gone.tolist()
        tombstones = [Document(each.key, each.version, each.committed_at, None) for each in compress(entities, gone)]
        return list(compress(entities, map(not_, gone))), tombstones

    def table(self, rows: pa.Table) -> pa.Table:
        """The table that an `arrow` step is given: `_key` and the declared columns in their declared types."""
        schema = table_schema(self._table.fields, key=rows.column(KEY).type)
        columns = [rows.column(KEY), *(cast(rows.column(item.name), item.type) for item in self._table.fields)]
        return pa.Table.from_arrays(columns, schema=schema)

    def _tables(self, batches: Sequence[ChangeBatch]) -> tuple[pa.Table, Flags]:
        runs: list[list[ChangeBatch]] = []
        for batch in batches:
            if runs and runs[-1][0].rows.schema.equals(batch.rows.schema):
                runs[-1].append(batch)
            else:
                runs.append([batch])
        tables = [self._table_of(run) for run in runs]
        try:
            table = tables[0] if len(tables) == 1 else pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowInvalid as error:
            raise RowsNeededError("a column changed its type") from error
        return table, np.concatenate([_is_wide(batch) for batch in batches])

    def _table_of(self, alike: Sequence[ChangeBatch]) -> pa.Table:
        """The columns of batches that have one schema."""
        rows = pa.Table.from_batches([batch.rows for batch in alike])
        key = rows.column(self._app.key)
        key = key.cast(pa.int64()) if pa.types.is_integer(key.type) else key.cast(pa.string())
        sent = alike[0].schema.names
        columns = [rows.column(name) if name in sent else pa.nulls(len(rows)) for name in self._names]
        return pa.table([key, *(rows.column(name) for name in _META), *columns], [KEY, *_META, *self._names])

    def _tricky_keys(self, batches: Sequence[ChangeBatch]) -> set[Key]:
        tricky: set[Key] = set()
        for batch in batches:
            rows = batch.rows
            if (op_letters(rows.column("_op")) == ord(TRUNCATE)).any():
                raise RowsNeededError("the table was truncated")
            unchanged = rows.column("_unchanged")
            if unchanged.null_count < len(unchanged):
                is_declared = pc.is_in(unchanged.flatten(), self._declared)
                places = pc.list_parent_indices(unchanged).filter(is_declared)
                tricky |= {key for key in row_keys(_taken(batch, pc.unique(places))) if key is not None}
            if rows.column("_old_key").null_count < len(rows):
                tricky |= _keys_that_move(batch)
        return tricky


def document_batch(rows: pa.Table, made: pa.Table, places: Integers | None = None) -> tuple[DocumentBatch, Flags]:
    """What a vectorised app made of rows: those that are in `made`, which are flagged, and tombstones of all others.

    `places` has the row of which each was made, where that is known already.
    """
    meta = rows.select([KEY, "_commit", "_ordinal", "_committed_at"])
    bodies = made.drop_columns([KEY])
    if places is None:
        places = places_of(made.column(KEY), rows.column(KEY))
    if places is None:
        places = pc.index_in(made.column(KEY), rows.column(KEY).combine_chunks()).to_numpy()
    is_made = np.zeros(rows.num_rows, dtype=bool)
    is_made[places] = True
    if len(places) == rows.num_rows and ascending(pa.array(places)) is not None:
        return DocumentBatch(meta=meta, bodies=bodies, gone=meta.slice(0, 0)), is_made
    gone = meta.filter(flag_array(~is_made))
    return DocumentBatch(meta=meta.take(pa.array(places)), bodies=bodies, gone=gone), is_made


_NO_ROWS: Mapping[str, Sequence[Any]] = {}
_NOTHING: Mapping[str, Any] = {}


def _once_each(column: pa.ChunkedArray, make: Callable[[int], _T]) -> list[_T]:
    """What is made of each value of a column; neighbours that are equal share it, as the changes of a commit do."""
    values = column.to_numpy()
    begins = np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])[: len(values)])
    made = map(make, values[begins].tolist())
    if len(begins) == len(values):
        return list(made)
    counts = np.diff(np.append(begins, len(values))).tolist()
    return list(chain.from_iterable(map(repeat, made, counts)))


def _is_wide(batch: ChangeBatch) -> "np.ndarray[Any, Any]":
    """Which rows may be stored out of line, by the size of all their columns."""
    if not len(batch):
        # Then a column of texts need not even have bounds.
        return np.zeros(0, bool)
    sizes = [_sizes(batch.rows.column(name), len(batch)) for name in batch.schema.names]
    # In most batches not even the longest values together make a wide row.
    if sum(each if isinstance(each, int) else int(each.max()) for each in sizes) < WIDE_BYTES:
        return np.zeros(len(batch), bool)
    size = np.zeros(len(batch), np.int64)
    for each in sizes:
        size += each
    return np.asarray(size >= WIDE_BYTES)


def _sizes(column: pa.Array, count: int) -> "int | np.ndarray[Any, Any]":
    """The bytes of each value, or of any where they are alike."""
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        width = np.int64 if pa.types.is_large_string(kind) else np.int32
        bounds = np.frombuffer(column.buffers()[1], width)[column.offset : column.offset + count + 1]
        return np.diff(bounds)
    # Nested ones are seldom, and seldom small: counted evenly over the rows, and generously.
    return 4 * column.nbytes // count if pa.types.is_nested(kind) else 8


def _chosen(batch: ChangeBatch, keys: Sequence[Key]) -> ChangeBatch:
    """The changes of these keys, or that moved a row away from one of them."""
    [name] = batch.schema.key
    column, old_key = batch.rows.column(name), batch.rows.column("_old_key")
    wanted = pa.array(keys, column.type)
    is_chosen = pc.is_in(column, wanted)
    if old_key.null_count < len(old_key):
        is_old = pc.and_(old_key.is_valid(), pc.is_in(pc.struct_field(old_key, name), wanted))
        is_chosen = pc.or_(is_chosen, is_old)
    return ChangeBatch(batch.schema, batch.rows.filter(is_chosen))


def _taken(batch: ChangeBatch, places: pa.Array) -> ChangeBatch:
    return ChangeBatch(batch.schema, batch.rows.take(places))


def _keys_that_move(batch: ChangeBatch) -> set[Key]:
    moved = _taken(batch, pc.indices_nonzero(batch.rows.column("_old_key").is_valid()))
    arrived: set[tuple[int, Key]] = set()
    tricky: set[Key] = set()
    commits = moved.rows.column("_commit").to_pylist()
    for commit, key, old_key in zip(commits, row_keys(moved), old_row_keys(moved), strict=True):
        if key is None or old_key is None:
            continue
        if (commit, old_key) in arrived:
            raise RowsNeededError("keys changed places inside a transaction")
        arrived.add((commit, key))
        tricky |= {key, old_key}
    return tricky


def _moves(batch: ChangeBatch) -> dict[Key, At]:
    """The keys that rows moved away from, and when."""
    return {key: at for key, at in zip(old_row_keys(batch), _ats(batch.rows), strict=True) if key is not None}


def _ats(rows: pa.RecordBatch | pa.Table) -> Iterator[At]:
    return map(
        At,
        rows.column("_commit").to_pylist(),
        rows.column("_ordinal").to_pylist(),
        rows.column("_committed_at").cast(pa.int64()).to_pylist(),
        [op == READ for op in rows.column("_op").to_pylist()],
    )
