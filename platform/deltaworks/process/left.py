"""What left an app that keeps no rows, in its state: columns, because a row of a table for each is too slow.

    range ──► run ──► run ──► … ──► the newest of each key, as soon as runs hold four times as many

A run is one range's keys and versions: `_key`, `position`, `ordinal`, `minute` of the commit, `sinks` as
`sinks_text` gives them, and `is_gone` where the row itself is not there any more. Runs are in the order in which they
left, so of a key the last one counts. They take 4 to 25 bytes for each document, and hold at most five times the keys
that ever left and `RUNS_AT_LEAST` more.
"""

import sqlite3
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.process.ascending import Integers, last_of_each
from deltaworks.process.columns import DocumentBatch
from deltaworks.process.declared import KEY
from deltaworks.process.fold import Key
from deltaworks.process.sink import Document, key_text

RUNS_AT_LEAST = 1 << 22
"""Documents that may be in runs before they are merged, however few keys there are."""

_MINUTE_US = 60_000_000
_PART = 1 << 20
"""Documents of one blob; SQLite takes a billion bytes at most."""

STATEMENT = """
    create table if not exists left_run (
      id int not null, part int not null, documents int not null, is_merged int not null, body blob not null,
      primary key (id, part))
    """
"""What creates the table."""


def runs_of_batch(batch: DocumentBatch, *, gone: pa.Array, refused: Collection[Key]) -> list[pa.Table]:
    """The documents of a range but for those of `refused` keys; `gone` are keys whose rows are not there any more."""
    return _runs(batch.meta, batch.gone, gone=gone, refused=refused)


def runs_of_rows(
    rows: pa.Table, documents: Sequence[Document], *, gone: Collection[Key], set_back: Collection[Key]
) -> list[pa.Table]:
    """The same of rows that became documents one by one, for all sinks; `set_back` are those that became none."""
    meta = rows.select([KEY, "_commit", "_ordinal", "_committed_at"])
    kind = meta.schema.field(KEY).type
    if set_back:
        meta = meta.filter(pc.invert(pc.is_in(meta.column(KEY), pa.array(list(set_back), kind))))
    if not meta.num_rows:
        return []
    is_made = pc.invert(_is_among(meta.column(KEY), [each.key for each in documents if each.body is None]))
    nowhere = pa.array(np.zeros(meta.num_rows, np.int32), mask=is_made.to_numpy(zero_copy_only=False))
    sinks = pa.DictionaryArray.from_arrays(nowhere, pa.array([""]))
    return [_run(meta, sinks, is_gone=_is_among(meta.column(KEY), gone))]


def _is_among(keys: pa.ChunkedArray, some: Collection[Key]) -> pa.Array:
    if not some:
        return pa.array(np.zeros(len(keys), bool))
    return pc.is_in(keys.combine_chunks(), pa.array(list(some), keys.type))


def _runs(made: pa.Table, removed: pa.Table, *, gone: pa.Array, refused: Collection[Key]) -> list[pa.Table]:
    if refused:
        made = made.filter(pc.invert(pc.is_in(made.column(KEY), pa.array(list(refused), made.schema.field(KEY).type))))
    if not removed.num_rows or not len(gone):
        pieces = [(made, None, False), (removed, "", False)]
    elif removed.num_rows == len(gone):
        pieces = [(made, None, False), (removed, "", True)]
    else:
        is_gone = pc.is_in(removed.column(KEY), gone)
        pieces = [
            (made, None, False),
            (removed.filter(is_gone), "", True),
            (removed.filter(pc.invert(is_gone)), "", False),
        ]
    return [
        _run(meta, _alike(meta.num_rows, sinks), is_gone=pa.array(np.full(meta.num_rows, is_gone)))
        for meta, sinks, is_gone in pieces
        if meta.num_rows
    ]


def _alike(count: int, sinks: str | None) -> pa.DictionaryArray:
    if sinks is None:
        return pa.DictionaryArray.from_arrays(pa.nulls(count, pa.int32()), pa.array([], pa.string()))
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int32)), pa.array([sinks]))


def run_of_documents(
    documents: Sequence[Document], routes: Mapping[Key, Collection[str]], *, gone: Collection[Key]
) -> pa.Table:
    """The same of documents that are objects; `routes` has the sinks of those that are not for all."""
    return pa.table(
        {
            KEY: [each.key for each in documents],
            "position": pa.array([each.version.position.value for each in documents], pa.uint64()),
            "ordinal": pa.array([each.version.ordinal for each in documents], pa.uint32()),
            "minute": pa.array([int(each.committed_at.timestamp()) // 60 for each in documents], pa.int32()),
            "sinks": pa.array([sinks_text(each, routes) for each in documents], pa.string()).dictionary_encode(),
            "is_gone": pa.array([each.key in gone for each in documents], pa.bool_()),
        }
    )


def sinks_text(document: Document, routes: Mapping[Key, Collection[str]]) -> str | None:
    """The names of the sinks that it is in: `None` for all of them, empty where it is in none."""
    if document.body is None:
        return ""
    return ",".join(routes[document.key]) if document.key in routes else None


def stored_run(rows: Sequence[Sequence[Any]]) -> pa.Table:
    """Rows of `left_document`, their keys as text where they are of no one type that Arrow has."""
    keys, positions, ordinals, minutes, sinks, is_gone = zip(*rows, strict=True)
    is_alike = all(type(key) is int for key in keys) or all(type(key) is str for key in keys)
    return pa.table(
        {
            KEY: pa.array(keys if is_alike else [key_text(key) for key in keys]),
            "position": pa.array(positions, pa.uint64()),
            "ordinal": pa.array(ordinals, pa.uint32()),
            "minute": pa.array(minutes, pa.int32()),
            "sinks": pa.array(sinks, pa.string()).dictionary_encode(),
            "is_gone": pa.array(map(bool, is_gone), pa.bool_()),
        }
    )


def _run(meta: pa.Table, sinks: pa.DictionaryArray, *, is_gone: pa.Array) -> pa.Table:
    committed_at = meta.column("_committed_at").cast(pa.int64()).to_numpy()
    minute = committed_at.min() // _MINUTE_US
    # Most ranges are of one minute, and a division takes longer than all the rest.
    is_one = committed_at.max() // _MINUTE_US == minute
    minutes = np.full(len(sinks), minute, np.int32) if is_one else (committed_at // _MINUTE_US).astype(np.int32)
    return pa.table(
        {
            KEY: meta.column(KEY),
            "position": meta.column("_commit"),
            "ordinal": meta.column("_ordinal"),
            "minute": pa.array(minutes),
            "sinks": sinks,
            "is_gone": is_gone,
        }
    )


class LeftRuns:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, run: pa.Table) -> None:
        """Note what every sink has made durable; inside the transaction that settles it."""
        if not run.num_rows:
            return
        newest, loose, merged = self._connection.execute(
            """
            select ifnull(max(id), 0), total(iif(is_merged, 0, documents)), total(iif(is_merged, documents, 0))
            from left_run
            """
        ).fetchone()
        self._write(newest + 1, run, is_merged=False)
        if loose + run.num_rows > max(RUNS_AT_LEAST, 4 * merged):
            self._merge()

    def _merge(self) -> None:
        (newest,) = self._connection.execute("select max(id) from left_run").fetchone()
        runs = list(read_runs(self._connection))
        # A run whose keys are of another type cannot have a key of these.
        by_type: dict[pa.DataType, list[pa.Table]] = {}
        for run in runs:
            by_type.setdefault(run.schema.field(KEY).type, []).append(run)
        self._connection.execute("delete from left_run")
        part = 0
        for alike in by_type.values():
            rows = pa.concat_tables(alike).unify_dictionaries()
            rows = rows.take(pa.array(_newest(rows.column(KEY).combine_chunks())))
            # The same id as the newest had: nothing left since.
            part = self._write(newest, rows, is_merged=True, part=part)

    def _write(self, run_id: int, run: pa.Table, *, is_merged: bool, part: int = 0) -> int:
        for start in range(0, run.num_rows, _PART):
            rows = _as_differences(run.slice(start, _PART)).combine_chunks()
            body = pa.BufferOutputStream()
            with pa.ipc.new_stream(body, rows.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
                writer.write_table(rows)
            self._connection.execute(
                "insert into left_run values (?, ?, ?, ?, ?)",
                (run_id, part, rows.num_rows, is_merged, memoryview(body.getvalue())),
            )
            part += 1
        return part


def _newest(keys: pa.Array) -> "np.ndarray[Any, Any]":
    """The place of the last of each key; integers come out sorted, which the next merge takes in one pass."""
    if not pa.types.is_integer(keys.type):
        return last_of_each(keys)
    values = keys.to_numpy()
    order = np.argsort(values, kind="stable")
    is_last = np.ones(len(order), bool)
    is_last[:-1] = values[order[1:]] != values[order[:-1]]
    return order[is_last]


def read_runs(connection: sqlite3.Connection) -> Iterator[pa.Table]:
    """The runs in the order in which they left."""
    for (body,) in connection.execute("select body from left_run order by id, part"):
        yield _from_differences(pa.ipc.open_stream(body).read_all())


def _as_differences(run: pa.Table) -> pa.Table:
    """The run with its large numbers as steps from row to row, which are small and compress well."""
    return _changed(run, lambda values: np.diff(values, prepend=values.dtype.type(0)))


def _from_differences(run: pa.Table) -> pa.Table:
    return _changed(run, lambda values: np.cumsum(values, dtype=values.dtype))


def _changed(run: pa.Table, change: Callable[[Integers], Integers]) -> pa.Table:
    for place, name in enumerate(run.column_names[:2]):
        if pa.types.is_integer(run.column(place).type):
            run = run.set_column(place, name, pa.array(change(run.column(place).to_numpy())))
    return run
