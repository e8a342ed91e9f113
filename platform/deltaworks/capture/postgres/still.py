"""PostgreSQL standing still: all tables as of one exact place in the WAL.

    replication connection   CREATE_REPLICATION_SLOT … TEMPORARY … EXPORT_SNAPSHOT ─► LSN, snapshot name
    ordinary connection      BEGIN REPEATABLE READ; SET TRANSACTION SNAPSHOT name;  ─► reads, in that state

A new slot's consistent point is the one place where the server itself relates a snapshot to the WAL: the
snapshot has every transaction whose commit was decoded before that point and none after it, also
where commits become visible late (synchronous standbys). The slot is temporary and gone as soon
as the snapshot is held. Making it waits for the transactions that were running at that moment.
"""

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import structlog
from psycopg import sql
from pydantic import SecretStr

from deltaworks import faults
from deltaworks.capture.postgres.batches import read_rows
from deltaworks.capture.postgres.catalog import (
    AnyConnection,
    describe_tables,
    find_published,
    find_tables,
    quoted,
    texts,
)
from deltaworks.capture.postgres.connect import connect, translated
from deltaworks.capture.snapshot import TableRewrittenError
from deltaworks.capture.source import SourceNotReadyError
from deltaworks.errors import InvariantError
from deltaworks.position import Lsn
from deltaworks.schema import TableName, TableSchema

WAIT_S = 60
"""How long a snapshot waits for the transactions that run when it is asked for."""

TRIES = 10
"""How many snapshots are taken until no table is truncated while one is."""

FETCH_ROWS = 20_000
"""Rows read at a time: some 20 MB as the server's text."""

logger = structlog.get_logger()

_REWRITTEN = """
select oid::regclass::text from pg_catalog.pg_class
where oid = any(%s::regclass[]) and relfilenode <> 0 and relfilenode is distinct from pg_relation_filenode(oid)
"""


class PostgresSnapshot:
    """Tables at one position; a `SourceSnapshot`. Lives inside `take_snapshot`, serves one thread."""

    def __init__(self, connection: AnyConnection, *, position: Lsn, schemas: Sequence[TableSchema]) -> None:
        self.position = position
        self._connection = connection
        self._schemas = {schema.name: schema for schema in schemas}

    def tables(self) -> Sequence[TableSchema]:
        """The tables as they were, in the order asked for."""
        return tuple(self._schemas.values())

    def read(self, table: TableName) -> Iterator[pa.RecordBatch]:
        """All rows of a table, a batch at a time. Read one table to its end before the next."""
        schema = self._schemas[table]
        names = sql.SQL(", ").join(sql.Identifier(name) for name in schema.names)
        select = sql.SQL("declare still no scroll cursor for select {} from {}").format(names, quoted(table))
        with translated(f"read {table} in a snapshot"):
            self._connection.execute(select)
            while columns := texts(
                self._connection, sql.SQL("fetch {} from still").format(sql.Literal(FETCH_ROWS)), []
            ):
                if not columns[0]:
                    break
                yield read_rows(schema, columns)
            self._connection.execute("close still")


@contextmanager
def take_snapshot(
    dsn: SecretStr, *, name: str, tables: Sequence[TableName], publication: str
) -> Iterator[PostgresSnapshot]:
    """Take a snapshot of tables; it needs one free replication slot for a moment.

    Where a table is truncated at that moment it takes another, up to `TRIES` in all.

    Raises:
        SourceUnreachableError: the server does not answer, or transactions ran on for longer than `WAIT_S`.
        SourceNotReadyError: a table is missing, or a right.
        TableRewrittenError: a table was truncated or rewritten each time.
    """
    connection = connect(dsn, name=name, application=f"deltaworks {name} snapshot")
    try:
        with translated(f"take a snapshot of source {name!r}"):
            for tries_left in reversed(range(TRIES)):
                try:
                    position = _enter(connection, dsn, name)
                    faults.reach("snapshot.before_lock")
                    schemas = _describe(connection, name, tables, publication)
                    break
                except TableRewrittenError as error:
                    if not tries_left:
                        raise
                    logger.info("another snapshot is taken", source=name, reason=str(error))
                    connection.execute("rollback")
        yield PostgresSnapshot(connection, position=position, schemas=schemas)
    finally:
        connection.close()


def _enter(connection: AnyConnection, dsn: SecretStr, name: str) -> Lsn:
    """Put the connection into the snapshot of a new slot; returns the slot's position."""
    replication = connect(dsn, name=name, application=f"deltaworks {name} snapshot", replication=True)
    try:
        replication.execute(sql.SQL("set lock_timeout = {}").format(sql.Literal(f"{WAIT_S}s")))
        slot = sql.Identifier(f"deltaworks_snapshot_{uuid.uuid4().hex[:16]}")
        row = replication.execute(
            sql.SQL("CREATE_REPLICATION_SLOT {} TEMPORARY LOGICAL pgoutput EXPORT_SNAPSHOT").format(slot)
        ).fetchone()
        if row is None:
            raise InvariantError(f"cannot take a snapshot of source {name!r}: the server gave none")
        _slot, position, exported, _plugin = _as_texts(row)
        connection.execute("begin isolation level repeatable read read only")
        # The exported snapshot lives until the replication connection does anything else.
        connection.execute(sql.SQL("set transaction snapshot {}").format(sql.Literal(exported)))
    finally:
        replication.close()
    return Lsn.parse(position)


def _describe(
    connection: AnyConnection, name: str, tables: Sequence[TableName], publication: str
) -> Sequence[TableSchema]:
    facts = find_tables(connection, tables)
    missing = [str(table) for table in tables if table not in facts]
    if missing:
        raise SourceNotReadyError(f"cannot read tables of source {name!r}: no {', '.join(missing)}")
    for table in tables:
        connection.execute(sql.SQL("lock table {} in access share mode").format(quoted(table)))
    # TRUNCATE and rewrites ignore snapshots: an older snapshot sees an empty table. Now that the lock keeps
    # them out, the file of each table must still be the one that the snapshot knows.
    names = [quoted(table).as_string(connection) for table in tables]
    rewritten = [row[0] for row in connection.execute(_REWRITTEN, [names]).fetchall()]
    if rewritten:
        raise TableRewrittenError(
            f"cannot read source {name!r} in one snapshot: {', '.join(rewritten)} was truncated or rewritten at that"
            " moment; try again"
        )
    schemas = describe_tables(connection, facts.values(), find_published(connection, publication))
    return [schemas[table] for table in tables]


def _as_texts(row: Any) -> list[str]:  # Any: a replication command answers in text, which psycopg may leave as bytes
    return [value.decode() if isinstance(value, bytes) else str(value) for value in row]
