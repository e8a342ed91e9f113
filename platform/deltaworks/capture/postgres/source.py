"""PostgreSQL 14 and newer as a source: publication, slot and pgoutput; dumps by key range."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from types import TracebackType
from typing import Self

import psycopg
import pyarrow as pa
import structlog
from psycopg import errors, pq, sql

from deltaworks.capture.postgres import preflight
from deltaworks.capture.postgres.batches import MARK_PREFIX, SliceBuilder, XidClock, read_columns
from deltaworks.capture.postgres.catalog import (
    AnyConnection,
    CatalogRow,
    describe_relation,
    describe_tables,
    find_published,
    find_tables,
    query,
    quoted,
    texts,
)
from deltaworks.capture.postgres.connect import connect, translated
from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.replication import PostgresStream
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.postgres.still import PostgresSnapshot, take_snapshot
from deltaworks.capture.source import (
    Chunk,
    Finding,
    Running,
    SlotInvalidatedError,
    SourceNotReadyError,
)
from deltaworks.config import PostgresConfig
from deltaworks.errors import InvariantError, RetryableError
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName, TableSchema

COUNTED_BYTES = 64 << 20
"""Below this size a table without statistics is counted for the progress display; it takes milliseconds."""

HELD_PATIENCE_S = 2.0
"""The server notices only after a moment that the last reader of a slot has left."""

logger = structlog.get_logger()


class SlotHeldError(RetryableError):
    """Another reader is on the slot; there can be one."""


class PostgresSource:
    """A `Source` over one PostgreSQL database. Not thread-safe.

    It holds one ordinary connection for reads and marks, opened when first needed and again after
    it broke, and one replication connection for each open stream.
    """

    def __init__(self, name: str, config: PostgresConfig) -> None:
        self.name = name
        self.chunk_rows = config.chunk_rows
        self._dsn = config.dsn
        self._wanted = preflight.Wanted(
            source=name,
            tables=config.table_names,
            publication=config.publication or f"deltaworks_{name}",
            slot=config.slot or f"deltaworks_{name}",
        )
        self._connection: AnyConnection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> Sequence[Finding]:
        """Everything missing on the server, all at once; empty when it is ready."""
        with self._asking("look at the server") as connection:
            return preflight.findings(preflight.inspect(connection, self._wanted), self._wanted, connection)

    def prepare(self) -> None:
        """Create the publication and the slot where they are missing; see `Source`.

        Creating a slot waits for the transactions that write at that moment.
        """
        with self._asking("prepare the server") as connection:
            state = preflight.inspect(connection, self._wanted)
            found = preflight.findings(state, self._wanted, connection)
            if found:
                raise SourceNotReadyError(_listing(self.name, found))
            # The publication comes first: the log before it cannot be read with it.
            if state.publication is None:
                connection.execute(preflight.create_publication(self._wanted, version=connection.info.server_version))
            elif missing := preflight.unpublished(state, self._wanted):
                connection.execute(preflight.extend_publication(self._wanted, missing))
            if state.slot is None:
                self._create_slot(connection)

    def tables(self) -> Sequence[TableSchema]:
        """The captured tables as they are now, in configured order."""
        with self._asking("describe the tables") as connection:
            facts = find_tables(connection, self._wanted.tables)
            missing = [str(name) for name in self._wanted.tables if name not in facts]
            if missing:
                raise SourceNotReadyError(f"cannot describe tables of source {self.name!r}: no {', '.join(missing)}")
            schemas = describe_tables(connection, facts.values(), find_published(connection, self._wanted.publication))
        return [schemas[name] for name in self._wanted.tables]

    def open(self, *, resume_after: Lsn) -> AbstractContextManager[PostgresStream]:
        """Start streaming what was committed after `resume_after`; from the slot's own position for `START`.

        Raises:
            SlotInvalidatedError: the slot is gone, lost, or ahead of `resume_after`.
            SlotHeldError: another reader is on the slot.
        """
        with self._asking("read the slot") as connection:
            start = self._start_position(connection, resume_after)
            following = Snapshot.parse(query(connection, "running")[0]["snapshot"]).first_unknown
        replication = connect(self._dsn, name=self.name, application=f"deltaworks {self.name} stream", replication=True)
        try:
            self._start_replication(replication, start)
        except BaseException:
            replication.close()
            raise
        builder = SliceBuilder(describe=self._describe, clock=XidClock(following), position=start)
        return PostgresStream(connection=replication, builder=builder, durable=start)

    def current_position(self) -> Lsn:
        """A position at or after every change visible now."""
        with self._asking("ask for the position") as connection:
            # The insert position: with synchronous_commit off a change is visible before it is flushed.
            row = connection.execute("select pg_catalog.pg_current_wal_insert_lsn()::text").fetchone()
        return Lsn.parse(row[0]) if row else START

    def last_key(self, table: TableName) -> tuple[str, ...] | None:
        """The largest key now, as text in key order; `None` for an empty table."""
        with self._asking(f"find the last key of {table}") as connection:
            schema = self._describe_now(table, connection)
            statement = sql.SQL("select {} from {} order by {} limit 1").format(
                _names(schema.key), quoted(table), sql.SQL(", ").join(_descending(name) for name in schema.key)
            )
            columns = texts(connection, statement, [])
        return _key_at(columns, 0) if columns and columns[0] else None

    def chunk(
        self,
        table: TableName,
        *,
        after_key: tuple[str, ...] | None,
        up_to_key: tuple[str, ...],
        limit: int,
    ) -> Chunk:
        """Up to `limit` rows with `after_key < key <= up_to_key`; the database compares the keys."""

        def statement(schema: TableSchema) -> tuple[sql.Composable, list[object]]:
            key, typed = _names(schema.key), _typed_key(schema)
            after = sql.SQL("({}) > ({}) and ").format(key, typed) if after_key is not None else sql.SQL("")
            text = sql.SQL("select {} from {} where {}({}) <= ({}) order by {} limit %s").format(
                _names(schema.names), quoted(table), after, key, typed, key
            )
            return text, [*(after_key or ()), *up_to_key, limit]

        return self._read(table, statement, limit=limit)

    def rows(self, table: TableName, *, keys: Sequence[tuple[str, ...]]) -> Chunk:
        """The rows that have one of these keys now."""

        def statement(schema: TableSchema) -> tuple[sql.Composable, list[object]]:
            key = _names(schema.key)
            wanted = sql.SQL(", ").join([sql.SQL("({})").format(_typed_key(schema))] * len(keys))
            text = sql.SQL("select {} from {} where ({}) in ({}) order by {}").format(
                _names(schema.names), quoted(table), key, wanted, key
            )
            return text, [part for each in keys for part in each]

        return self._read(table, statement, limit=None)

    def running(self) -> Running:
        """The transactions that run now, and since when."""
        with self._asking("ask for running transactions") as connection:
            row = query(connection, "running")[0]
        # Another role's start times are hidden without pg_monitor; then any time is possible.
        began_at = datetime.min.replace(tzinfo=UTC) if row["hidden"] else row["oldest_began_at"]
        return Running(visible_in=Snapshot.parse(row["snapshot"]), next_txid=row["next_txid"], oldest_began_at=began_at)

    def estimated_rows(self, table: TableName) -> int | None:
        """The statistics' row count; counted where there are none and the table is small."""
        with self._asking(f"estimate the rows of {table}") as connection:
            name = quoted(table).as_string(connection)
            row = next(iter(query(connection, "estimated_rows", table=name)), None)
            if row is None:
                return None
            if row["estimated"] >= 0:
                return int(row["estimated"])
            if row["bytes"] > COUNTED_BYTES:
                return None
            counted = connection.execute(sql.SQL("select count(*) from {}").format(quoted(table))).fetchone()
        return int(counted[0]) if counted else None

    def mark(self, mark_id: str) -> None:
        """Commit a marker into the WAL; it comes back as `Slice.mark`."""
        with self._asking("write a mark") as connection:
            connection.execute("select pg_catalog.pg_logical_emit_message(true, %s, %s)", [MARK_PREFIX, mark_id])

    def snapshot(self) -> AbstractContextManager[PostgresSnapshot]:
        """All captured tables as of one exact position of the WAL, over connections of its own."""
        return take_snapshot(
            self._dsn, name=self.name, tables=self._wanted.tables, publication=self._wanted.publication
        )

    def has_uncaptured(self) -> bool:
        """Whether the slot has changes of our tables to give; asking takes none of them."""
        with self._asking("look into the slot") as connection:
            slot = next(iter(query(connection, "slot", slot=self._wanted.slot)), None)
            if slot is None:
                return True
            try:
                found = query(connection, "uncaptured", slot=self._wanted.slot, publication=self._wanted.publication)
            except errors.ObjectInUse:
                return False
        return bool(found)

    def close(self) -> None:
        """Let go of the connection; the next call opens a new one."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def _asking(self, what: str) -> Iterator[AnyConnection]:
        """The ordinary connection, opened when there is none; errors in the contract's words."""
        if self._connection is None or self._connection.closed or self._connection.broken:
            self._connection = connect(self._dsn, name=self.name, application=f"deltaworks {self.name}")
        with translated(f"{what} of source {self.name!r}"):
            yield self._connection

    def _create_slot(self, connection: AnyConnection) -> None:
        logger.info("creating the replication slot", source=self.name, slot=self._wanted.slot)
        connection.execute("select pg_catalog.pg_create_logical_replication_slot(%s, 'pgoutput')", [self._wanted.slot])

    def _free_slot(self, connection: AnyConnection) -> CatalogRow | None:
        """The slot, once nobody reads it."""
        deadline = time.monotonic() + HELD_PATIENCE_S
        while True:
            slot = next(iter(query(connection, "slot", slot=self._wanted.slot)), None)
            if slot is None or slot["active_pid"] is None:
                return slot
            if time.monotonic() > deadline:
                raise SlotHeldError(
                    f"cannot read slot {self._wanted.slot!r}: process {slot['active_pid']} of the server is on it; "
                    "stop the other reader of this source"
                )
            time.sleep(0.05)

    def _start_position(self, connection: AnyConnection, resume_after: Lsn) -> Lsn:
        slot, name = self._free_slot(connection), self._wanted.slot
        mend = "the changes in between are lost to this log: capture the source into a new log, which dumps its tables"
        if slot is None or slot["confirmed"] is None:
            raise SlotInvalidatedError(f"cannot resume after {resume_after}: slot {name!r} is gone; {mend}")
        if slot["wal_status"] == "lost":
            raise SlotInvalidatedError(
                f"cannot resume after {resume_after}: the server recycled log that slot {name!r} had not read; "
                f"drop the slot; {mend}"
            )
        confirmed = Lsn.parse(slot["confirmed"])
        if resume_after == START:
            return confirmed
        # The server would start at its own position without a word.
        if confirmed > resume_after:
            raise SlotInvalidatedError(
                f"cannot resume after {resume_after}: slot {name!r} is ahead at {confirmed}; {mend}"
            )
        if resume_after > Lsn.parse(slot["flushed"]):
            raise SlotInvalidatedError(
                f"cannot resume after {resume_after}: the server's own log ends before, at {slot['flushed']}, "
                f"so it was restored or replaced; {mend}"
            )
        return resume_after

    def _start_replication(self, connection: psycopg.Connection[tuple[object, ...]], start: Lsn) -> None:
        publication = sql.Identifier(self._wanted.publication).as_string(connection)
        command = sql.SQL(
            "START_REPLICATION SLOT {} LOGICAL {} (proto_version '1', publication_names {}, messages 'true')"
        ).format(sql.Identifier(self._wanted.slot), sql.SQL(str(start)), sql.Literal(publication))
        result = connection.pgconn.exec_(command.as_bytes(connection))
        if result.status == pq.ExecStatus.COPY_BOTH:
            connection.pgconn.nonblocking = 1
            return
        error = errors.error_from_result(result)
        if isinstance(error, errors.ObjectInUse):
            # The server names the process that is on it.
            raise SlotHeldError(f"cannot read slot {self._wanted.slot!r}: {error.diag.message_primary}") from error
        if isinstance(error, errors.ObjectNotInPrerequisiteState):
            raise SlotInvalidatedError(
                f"cannot read slot {self._wanted.slot!r}: {error.diag.message_primary}; drop it and capture the "
                "source into a new log, which dumps its tables"
            ) from error
        with translated(f"start replication of source {self.name!r}"):
            raise error

    def _describe(self, relation: Relation) -> TableSchema | None:
        if TableName(relation.namespace, relation.name) not in self._wanted.tables:
            return None
        with self._asking(f"describe {relation.namespace}.{relation.name}") as connection:
            schema = describe_relation(connection, relation)
        if not schema.key:
            raise SourceNotReadyError(f"cannot capture {schema.name} any further: it has lost its key; give it one")
        return schema

    def _describe_now(self, table: TableName, connection: AnyConnection) -> TableSchema:
        facts = find_tables(connection, [table])
        if table not in facts:
            raise SourceNotReadyError(f"cannot find table {table} of source {self.name!r}; was it dropped or renamed?")
        schema = describe_tables(connection, facts.values(), find_published(connection, self._wanted.publication))[
            table
        ]
        if not schema.key:
            raise SourceNotReadyError(f"cannot read {table} of source {self.name!r}: it has no key; give it one")
        return schema

    def _read(
        self,
        table: TableName,
        statement: Callable[[TableSchema], tuple[sql.Composable, list[object]]],
        *,
        limit: int | None,
    ) -> Chunk:
        """Rows and the snapshot that saw them, out of one transaction."""
        with self._asking(f"read {table}") as connection:
            connection.execute("begin isolation level repeatable read read only")
            try:
                # The lock of any reader, taken before the snapshot: a table that is rewritten or truncated in
                # between would look empty to the snapshot although it is not.
                connection.execute(sql.SQL("lock table {} in access share mode").format(quoted(table)))
                row = connection.execute("select pg_catalog.pg_current_snapshot()::text").fetchone()
                schema = self._describe_now(table, connection)
                columns = texts(connection, *statement(schema))
            finally:
                if not connection.broken:
                    connection.execute("rollback")
        if row is None:
            raise InvariantError(f"cannot read {table}: the server gave no snapshot")
        return _as_chunk(schema, columns, visible_in=Snapshot.parse(row[0]), limit=limit)


def _as_chunk(
    schema: TableSchema, columns: list[list[bytes | None]], *, visible_in: Snapshot, limit: int | None
) -> Chunk:
    arrays = read_columns(schema, columns, place=f"the dump of {schema.name}")
    rows = pa.RecordBatch.from_arrays(arrays, schema=schema.to_arrow())
    is_full = limit is not None and rows.num_rows >= limit
    key_columns = [columns[schema.names.index(name)] for name in schema.key]
    return Chunk(
        schema=schema, rows=rows, visible_in=visible_in, last_key=_key_at(key_columns, -1) if is_full else None
    )


def _key_at(columns: list[list[bytes | None]], row: int) -> tuple[str, ...]:
    # A key column is never null.
    return tuple((column[row] or b"").decode() for column in columns)


def _names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)


def _descending(name: str) -> sql.Composed:
    return sql.SQL("{} desc").format(sql.Identifier(name))


def _typed_key(schema: TableSchema) -> sql.Composed:
    """A placeholder per key column, cast from text to the column's own type so that the index serves it."""
    return sql.SQL(", ").join(
        # The type's name is the server's own spelling, quoted where it must be.
        sql.SQL("cast(%s as {})").format(sql.SQL(schema.column(name).source_type))
        for name in schema.key
    )


def _listing(source: str, found: Sequence[Finding]) -> str:
    lines = "\n".join(f"  - {finding.what}\n    {finding.mend}" for finding in found)
    return f"cannot capture source {source!r}, {len(found)} to mend on the server:\n{lines}"
