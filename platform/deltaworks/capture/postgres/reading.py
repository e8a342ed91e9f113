"""Reading rows of a table next to the stream: by key range, or by keys.

Every read is one short transaction that gives the rows and the snapshot that saw them.
"""

from collections.abc import Callable, Sequence

from psycopg import sql

from deltaworks.capture.postgres.batches import read_rows
from deltaworks.capture.postgres.catalog import AnyConnection, query, quoted, texts
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.source import Chunk
from deltaworks.errors import InvariantError
from deltaworks.schema import TableName, TableSchema

COUNTED_BYTES = 64 << 20
"""Below this size a table without statistics is counted for the progress display; it takes milliseconds."""

Statement = tuple[sql.Composable, list[object]]
"""A statement that selects a table's columns, and its parameters."""

Describe = Callable[[TableName, AnyConnection], TableSchema]
"""Gives what a table looks like now, inside the transaction that reads it."""


def last_key(connection: AnyConnection, schema: TableSchema) -> tuple[str, ...] | None:
    """The largest key now, as text in key order; `None` for an empty table."""
    statement = sql.SQL("select {} from {} order by {} limit 1").format(
        _names(schema.key), quoted(schema.name), sql.SQL(", ").join(_descending(name) for name in schema.key)
    )
    columns = texts(connection, statement, [])
    return _key_at(columns, 0) if columns and columns[0] else None


def in_range(
    schema: TableSchema, *, after_key: tuple[str, ...] | None, up_to_key: tuple[str, ...], limit: int
) -> Statement:
    """Select up to `limit` rows with `after_key < key <= up_to_key`; the database compares the keys."""
    key, typed = _names(schema.key), _typed_key(schema)
    after = sql.SQL("({}) > ({}) and ").format(key, typed) if after_key is not None else sql.SQL("")
    text = sql.SQL("select {} from {} where {}({}) <= ({}) order by {} limit %s").format(
        _names(schema.names), quoted(schema.name), after, key, typed, key
    )
    return text, [*(after_key or ()), *up_to_key, limit]


def with_keys(schema: TableSchema, keys: Sequence[tuple[str, ...]]) -> Statement:
    """Select the rows that have one of these keys."""
    key = _names(schema.key)
    wanted = sql.SQL(", ").join([sql.SQL("({})").format(_typed_key(schema))] * len(keys))
    text = sql.SQL("select {} from {} where ({}) in ({}) order by {}").format(
        _names(schema.names), quoted(schema.name), key, wanted, key
    )
    return text, [part for each in keys for part in each]


def read(
    connection: AnyConnection,
    table: TableName,
    *,
    describe: Describe,
    statement: Callable[[TableSchema], Statement],
    limit: int | None = None,
) -> Chunk:
    """Rows and the snapshot that saw them, out of one transaction."""
    connection.execute("begin isolation level repeatable read read only")
    try:
        # The lock of any reader, taken before the snapshot: a table that is rewritten or truncated in
        # between would look empty to the snapshot although it is not.
        connection.execute(sql.SQL("lock table {} in access share mode").format(quoted(table)))
        row = connection.execute("select pg_catalog.pg_current_snapshot()::text").fetchone()
        schema = describe(table, connection)
        columns = texts(connection, *statement(schema))
    finally:
        if not connection.broken:
            connection.execute("rollback")
    if row is None:
        raise InvariantError(f"cannot read {table}: the server gave no snapshot")
    return _as_chunk(schema, columns, visible_in=Snapshot.parse(row[0]), limit=limit)


def estimated_rows(connection: AnyConnection, table: TableName) -> int | None:
    """The statistics' row count; counted where there are none and the table is small."""
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


def _as_chunk(
    schema: TableSchema, columns: list[list[bytes | None]], *, visible_in: Snapshot, limit: int | None
) -> Chunk:
    rows = read_rows(schema, columns)
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
