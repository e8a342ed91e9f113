"""Compares a source with the lake, row by row, at one position, while everything goes on.

    source   ───────────── snapshot at L ─────────────►   rows as the source has them at L
    log      ──────────────────┬─────── changes ─┬───►    is waited for until it has reached L
    lake     version 41 ───────┘ position ≤ L    └─ folded in memory: rows as the lake has them at L

Both sides are states at the very same position, so any difference is a fault: of capture, log or
load, or of somebody who wrote into the lake. Nothing is written to the lake.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from deltaworks.capture.snapshot import SnapshotSource, SourceSnapshot
from deltaworks.errors import RetryableError
from deltaworks.log.change_log import LogReader, StoredGroup
from deltaworks.position import Lsn
from deltaworks.schema import TableSchema
from deltaworks.store.evolve import evolve
from deltaworks.store.lake import Lake, quoted
from deltaworks.store.load import LastLoad, groups_between, load_at
from deltaworks.store.statements import Statements
from deltaworks.store.tables import Tables, slices
from deltaworks.store.texts import has_texts, spread, text_columns, widened

SAMPLE_KEYS = 10
"""Keys of differing rows that a verdict names; the rows themselves stay where they are."""

_SQL = Statements("verify.sql")
_SCRATCH = "deltaworks_verify"
_SOURCE_ROWS = "source rows"


class LogBehindError(RetryableError):
    """The log did not reach the position of the comparison in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TableVerdict:
    """One table's comparison. `differing` counts keys; `sample` has the first of them, keys only."""

    table: str
    source_rows: int
    lake_rows: int
    differing: int
    sample: tuple[tuple[Any, ...], ...]  # Any: a key column has any type

    @property
    def is_equal(self) -> bool:
        """Whether both sides have the same rows. A key that the lake has twice shows in the counts."""
        return self.differing == 0 and self.source_rows == self.lake_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The comparison at `position`: the lake's `version` and `folded_changes` of the log after it."""

    position: Lsn
    version: int | None
    folded_changes: int
    tables: tuple[TableVerdict, ...]
    took_s: float

    @property
    def is_equal(self) -> bool:
        """Whether every table is equal."""
        return all(table.is_equal for table in self.tables)


def verify(
    source: SnapshotSource,
    lake: Lake,
    reader: LogReader,
    *,
    log: str,
    catch_up: Callable[[], object] = lambda: None,
    timeout_s: float = 60.0,
    sample_keys: int = SAMPLE_KEYS,
) -> Verification:
    """Compare every captured table with its table in `lake.<log>`; `lake` may be open for reading only.

    Capture must be running, or `catch_up` must bring the log to the source's present (as
    `recorder.drain` does; it is called twice). The lake may lag behind: the rest is folded from the
    log, in memory that spills to disk.

    Raises:
        LogBehindError: the log did not reach the snapshot's position in `timeout_s`.
        SourceUnreachableError: the source does not answer.
    """
    started_s = time.monotonic()
    # Once before, so that dumps are complete: a row that is dumped after the position is not in the lake at it.
    catch_up()
    with source.snapshot() as snapshot, _scratch(lake.connection) as connection:
        position = snapshot.position
        catch_up()
        _wait_for(reader, position, log=log, timeout_s=timeout_s)
        base = load_at(lake, log, up_to=position)
        folded = _fold(lake, reader, snapshot.tables(), log=log, base=base, up_to=position)
        verdicts = tuple(
            _compare(connection, snapshot, table, log=log, sample_keys=sample_keys) for table in snapshot.tables()
        )
    return Verification(
        position=position,
        version=base.version,
        folded_changes=folded,
        tables=verdicts,
        took_s=time.monotonic() - started_s,
    )


@contextmanager
def _scratch(connection: duckdb.DuckDBPyConnection) -> Iterator[duckdb.DuckDBPyConnection]:
    """A database in memory beside the lake, gone afterwards."""
    connection.execute(f"attach ':memory:' as {_SCRATCH}")
    try:
        yield connection
    finally:
        connection.execute("drop table if exists temp.differing")
        connection.execute(f"detach {_SCRATCH}")


def _wait_for(reader: LogReader, position: Lsn, *, log: str, timeout_s: float) -> None:
    deadline_s = time.monotonic() + timeout_s
    while (end := reader.end()).position < position:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise LogBehindError(
                f"cannot compare at {str(position)!r}: log {log!r} stands at {str(end.position)!r} after"
                f" {timeout_s:.0f} s; is `deltaworks capture {log}` running?"
            )
        reader.wait(after_sequence=end.sequence, timeout_s=left_s)


def _fold(lake: Lake, reader: LogReader, tables: Sequence[TableSchema], *, log: str, base: LastLoad, up_to: Lsn) -> int:
    """Build every table as the lake would have it at `up_to`; returns the changes applied on top."""
    connection = lake.connection
    for table in tables:
        _copy(connection, table, log=log, version=base.version)
    wanted = {table.name for table in tables}
    brought = Tables(connection, database=_SCRATCH, schema=log, applied_up_to=base.position)
    folded = 0
    for groups in slices(_groups_up_to(reader, log=log, after=base, up_to=up_to)):
        batches = (
            changes
            for group in groups
            for batch in group.batches
            if batch.schema.name in wanted
            for changes in batch.slice_by_commit(after=0, up_to=up_to.value)
        )
        folded += sum(applied.changes for applied in brought.apply(batches).values())
    return folded


def _groups_up_to(reader: LogReader, *, log: str, after: LastLoad, up_to: Lsn) -> Iterator[StoredGroup]:
    """The groups after a load that can hold changes at or before a position."""
    for group in groups_between(reader, log=log, after=after):
        if group.header.previous_position >= up_to:
            return
        yield group


def _copy(connection: duckdb.DuckDBPyConnection, table: TableSchema, *, log: str, version: int | None) -> None:
    connection.execute(f"create schema if not exists {quoted(_SCRATCH, log)}")
    if version is not None:
        names = {
            "copy": quoted(_SCRATCH, log, table.name.short),
            "original": quoted("lake", log, table.name.short),
            "version": str(version),
        }
        # A table without a change in that version is not there yet; it starts empty.
        with suppress(duckdb.CatalogException, duckdb.BinderException):
            connection.execute(_SQL["copy"].format_map(names))
    evolve(connection, database=_SCRATCH, schema=log, table=table)


def _compare(
    connection: duckdb.DuckDBPyConnection,
    snapshot: SourceSnapshot,
    table: TableSchema,
    *,
    log: str,
    sample_keys: int,
) -> TableVerdict:
    source = _read_source(connection, snapshot, table)
    stored = quoted(_SCRATCH, log, table.name.short)
    table = widened(table, text_columns(connection, source, table) | text_columns(connection, stored, table))
    for schema in (_SOURCE_ROWS, log):
        evolve(connection, database=_SCRATCH, schema=schema, table=table)
    if not table.key:
        return _compare_bags(connection, source, stored, table)
    same = "is not distinct from" if has_texts(table) else "="
    others = [name for name in table.names if name not in table.key]
    differs = " or ".join(f"{quoted('s', name)} is distinct from {quoted('l', name)}" for name in others)
    names = {
        "source": f"(select *, true as _is_here from {source})",
        "stored": f"(select *, true as _is_here from {stored})",
        "keys": ", ".join(f"coalesce({quoted('s', key)}, {quoted('l', key)}) as {quoted(key)}" for key in table.key),
        "key": ", ".join(quoted(key) for key in table.key),
        "same_key": " and ".join(f"{quoted('s', key)} {same} {quoted('l', key)}" for key in table.key),
        "differs": differs or "false",
        "limit": str(sample_keys),
    }
    connection.execute(_SQL["differing"].format_map(names))
    return TableVerdict(
        table=table.name.short,
        source_rows=_count(connection, source),
        lake_rows=_count(connection, stored),
        differing=_count(connection, "temp.differing"),
        sample=tuple(connection.execute(_SQL["sample"].format_map(names)).fetchall()),
    )


def _compare_bags(connection: duckdb.DuckDBPyConnection, source: str, stored: str, table: TableSchema) -> TableVerdict:
    """Compare a table without a key: `differing` counts rows that one side has more often, none of them is shown."""
    values = ", ".join(quoted(name) for name in table.names)
    connection.execute(_SQL["differing_bags"].format(source=source, stored=stored, values=values))
    return TableVerdict(
        table=table.name.short,
        source_rows=_count(connection, source),
        lake_rows=_count(connection, stored),
        differing=_count(connection, "temp.differing"),
        sample=(),
    )


def _read_source(connection: duckdb.DuckDBPyConnection, snapshot: SourceSnapshot, table: TableSchema) -> str:
    target = evolve(connection, database=_SCRATCH, schema=_SOURCE_ROWS, table=table)
    for batch in snapshot.read(table.name):
        wide, rows = spread(table, pa.Table.from_batches([batch]))
        if wide != table:
            evolve(connection, database=_SCRATCH, schema=_SOURCE_ROWS, table=wide)
        columns = ", ".join(quoted(name) for name in wide.names)
        connection.register("rows_read", rows)
        connection.execute(f"insert into {target} ({columns}) select {columns} from rows_read")
        connection.unregister("rows_read")
    return target


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    row = connection.execute(f"select count(*) from {table}").fetchone()
    return int(row[0]) if row is not None else 0
