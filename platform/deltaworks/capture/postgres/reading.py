"""Reading rows of a table next to the stream: by key range, or by keys.

Every read is one short transaction that gives the rows and the snapshot that saw them, with no lock
but that of any reader. The database compares keys, so no collation is known here; keys go in and come
out as its own texts.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import psycopg
import pyarrow as pa
from psycopg import sql

from deltaworks.capture.postgres.batches import gather_texts
from deltaworks.capture.postgres.binary_cells import is_read_from_binary, read_binary_cells
from deltaworks.capture.postgres.catalog import AnyConnection, query, quoted, texts
from deltaworks.capture.postgres.cells import Cells, read_cells
from deltaworks.capture.postgres.fetch import Fetch, Piece, has_bare_socket
from deltaworks.capture.postgres.snapshot import Snapshot
from deltaworks.capture.postgres.types import Held
from deltaworks.capture.source import Chunk, DumpBlockedError, Visibility
from deltaworks.errors import InvariantError, TerminalError
from deltaworks.schema import TableName, TableSchema

COUNTED_BYTES = 64 << 20
"""Below this size a table without statistics is counted for the progress display; it takes milliseconds."""

CHUNK_BYTES = 32 << 20
"""A chunk ends early at this size, as the server sends it: so memory is bounded whatever the rows are."""

BAG_BYTES = 256 << 20
"""A table without a key is read as one chunk, whole, and so up to this size only."""

Key = tuple[str, ...]

Describe = Callable[[TableName, AnyConnection], TableSchema]
"""Gives what a table looks like now, inside the transaction that reads it."""

See = Callable[[AnyConnection], Visibility]
"""Gives what the transaction's snapshot sees; the first thing asked in it, so that asking takes the snapshot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Keys to read: `after_key < key <= up_to_key`, at most `limit` rows, those that `where` holds for."""

    after_key: Key | None
    up_to_key: Key
    limit: int
    where: str | None = None


@dataclass(frozen=True, slots=True)
class _Select:
    """A statement with its values for `$1`, `$2`, …"""

    text: sql.Composable
    values: tuple[str, ...]


class TooLargeWithoutKeyError(TerminalError):
    """A table has no key to be read by in parts, and is too large to be read whole."""


def last_key(connection: AnyConnection, schema: TableSchema) -> Key | None:
    """The largest key now, as text in key order; `None` for an empty table, `()` for any without a key."""
    if not schema.key:
        return ()
    statement = sql.SQL("select {} from {} order by {} limit 1").format(
        _names(schema.key), quoted(schema.name), sql.SQL(", ").join(_descending(name) for name in schema.key)
    )
    columns = texts(connection, statement, [])
    # A key column is never null.
    return tuple((column[0] or b"").decode() for column in columns) if columns and columns[0] else None


def read_range(
    connection: AnyConnection,
    table: TableName,
    *,
    describe: Describe,
    see: See,
    within: Range,
    as_text: bool = False,
) -> Chunk:
    """The rows of a key range, from its beginning, in key order; `as_text` where binary does not hold a value."""
    began_at = time.monotonic()
    with _snapshot(connection, table, see) as visible_in:
        schema = describe(table, connection)
        _check_fits(schema, within)
        bound = None if within.where is None else _bound(connection, schema, within)
        rows = _Rows(schema, in_binary=() if as_text or not has_bare_socket(connection) else _in_binary(schema))
        fetch = rows.fetch(
            connection,
            _in_range(schema, within, bound=bound) if schema.key else _whole(schema),
            most_bytes=CHUNK_BYTES if schema.key else BAG_BYTES,
        )
        with _condition_blamed(within.where, table):
            rows.take(fetch.run(connection))
    if rows.has_odd_value:
        return read_range(connection, table, describe=describe, see=see, within=within, as_text=True)
    if fetch.is_cut and not schema.key:
        raise TooLargeWithoutKeyError(
            f"cannot dump {table}: it has no key and more than {BAG_BYTES >> 20} MB, and can only be read whole; "
            "give it a primary key, or take it out of the source's tables"
        )
    if not schema.key:
        following = None
    elif fetch.is_cut:
        following = rows.last_key
        if following is None:
            raise InvariantError(f"cannot go on with {table}: its chunk was cut before the first row; report this")
    elif within.where is None:
        following = rows.last_key if rows.count >= within.limit else None
    else:
        following = bound
    return Chunk(
        schema=schema,
        rows=rows.read(),
        visible_in=visible_in,
        last_key=following,
        scanned=within.limit if bound is not None else rows.count,
        took_s=time.monotonic() - began_at,
    )


def read_keys(
    connection: AnyConnection, table: TableName, *, describe: Describe, see: See, keys: Sequence[Key]
) -> Chunk:
    """The rows that have one of these keys, and the keys that no row has, each once."""
    began_at = time.monotonic()
    with _snapshot(connection, table, see) as visible_in:
        schema = describe(table, connection)
        if not schema.key:
            raise TerminalError(f"cannot read rows of {table} by key: it has none; dump it whole")
        rows, absent = _Rows(schema), _Rows(schema, only=schema.key)
        rows.take(rows.fetch(connection, _with_keys(schema, keys), most_bytes=1 << 62).run(connection))
        absent.take(absent.fetch(connection, _without_row(schema, keys)).run(connection))
    return Chunk(
        schema=schema,
        rows=rows.read(),
        visible_in=visible_in,
        last_key=None,
        scanned=len(keys),
        took_s=time.monotonic() - began_at,
        absent=absent.read(),
    )


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


def see_primary(connection: AnyConnection) -> Snapshot:
    """What a transaction on the primary sees."""
    row = connection.execute("select pg_catalog.pg_current_snapshot()::text").fetchone()
    if row is None:
        raise InvariantError("the server gave no snapshot; report this")
    return Snapshot.parse(row[0])


@contextmanager
def _snapshot(connection: AnyConnection, table: TableName, see: See) -> Iterator[Visibility]:
    """A transaction that sees one state of the database throughout; always rolled back."""
    # The lock of any reader, taken before the snapshot: a table that is rewritten or truncated in between would
    # look empty to the snapshot although it is not. No statement here takes a snapshot. Rows are asked for some
    # at a time, which no worker helps with, so the planner is not to count on any.
    opening = sql.SQL(
        "begin isolation level repeatable read read only;"
        " set local max_parallel_workers_per_gather = 0;"
        " lock table {} in access share mode"
    )
    try:
        connection.execute(opening.format(quoted(table)), prepare=False)
        yield see(connection)
    finally:
        if not connection.closed and not connection.broken:
            connection.execute("rollback")


@contextmanager
def _condition_blamed(where: str | None, table: TableName) -> Iterator[None]:
    """Say that a condition does not hold up on a row, without the row: the server's message may quote it."""
    try:
        yield
    except psycopg.DataError as error:
        if where is None:
            raise
        raise TerminalError(
            f"cannot read {table} where {where!r}: the condition fails on a row ({type(error).__name__}, "
            f"SQLSTATE {error.sqlstate}); mend the condition"
        ) from None


class _Rows:
    """Rows as they arrive; with `only`, of those columns, and null in all others."""

    def __init__(self, schema: TableSchema, *, only: Sequence[str] = (), in_binary: Sequence[bool] = ()) -> None:
        self.count = 0
        self.last_key: Key | None = None
        self.has_odd_value = False
        """Whether a column that came in binary has a value that its type does not hold; nothing is read then."""
        self._schema = schema
        self._names = tuple(only or schema.names)
        self._in_binary = tuple(in_binary) or (False,) * len(self._names)
        self._batches: list[pa.RecordBatch] = []

    def fetch(self, connection: AnyConnection, select: _Select, *, most_bytes: int | None = None) -> Fetch:
        """The statement that gives them."""
        return Fetch(
            select.text.as_bytes(connection),
            select.values,
            column_count=len(self._names),
            most_bytes=CHUNK_BYTES if most_bytes is None else most_bytes,
            in_binary=self._in_binary if any(self._in_binary) else (),
        )

    def take(self, pieces: Iterator[Piece]) -> None:
        """Read every piece while the server sends the next."""
        for piece in pieces:
            cells = dict(zip(self._names, piece, strict=True))
            batch = None if self.has_odd_value else self._read(cells)
            if batch is None:
                self.has_odd_value = True
                continue
            self._batches.append(batch)
            self.count += batch.num_rows
            self.last_key = tuple(_text_at(cells[name], -1) for name in self._schema.key)

    def read(self) -> pa.RecordBatch:
        """All of them as `schema.row_schema()` has them."""
        arrow = self._schema.row_schema()
        return pa.concat_batches(self._batches) if self._batches else pa.RecordBatch.from_pylist([], schema=arrow)

    def _read(self, cells: dict[str, Cells]) -> pa.RecordBatch | None:
        held: dict[str, Held] = {}
        for name, is_binary in zip(self._names, self._in_binary, strict=True):
            kind = self._schema.column(name).type
            if not is_binary:
                held[name] = read_cells(cells[name], kind)
            elif (array := read_binary_cells(cells[name], kind)) is not None:
                held[name] = Held(array, {})
            else:
                return None
        count = len(cells[self._names[0]].sizes)
        as_text = gather_texts(held.items(), row_count=count)
        arrays = [
            held[column.name].array if column.name in held else pa.nulls(count, column.type)
            for column in self._schema.columns
        ]
        return pa.RecordBatch.from_arrays([as_text, *arrays], schema=self._schema.row_schema())


def _in_binary(schema: TableSchema) -> tuple[bool, ...]:
    """The columns to ask for in binary; never those of the key, whose text is the cursor."""
    return tuple(column.name not in schema.key and is_read_from_binary(column.type) for column in schema.columns)


def _check_fits(schema: TableSchema, within: Range) -> None:
    """Check that the range is one of the key that the table has now."""
    if not schema.key and within.where is not None:
        raise TerminalError(
            f"cannot dump a part of {schema.name}: it has no key, so rows that are read again could not replace those "
            "from before; dump it whole, or give it a primary key"
        )
    if len(within.up_to_key) != len(schema.key):
        raise DumpBlockedError(f"the key of {schema.name} is another one now; its dump begins anew")


def _whole(schema: TableSchema) -> _Select:
    """All rows, in the order of the table's blocks."""
    return _Select(sql.SQL("select {} from {}").format(_names(schema.names), quoted(schema.name)), ())


def _in_range(schema: TableSchema, within: Range, *, bound: Key | None) -> _Select:
    """The rows of the range; under a condition those up to `bound`, without one the first `limit`."""
    conditions, values = _range_conditions(schema, within.after_key, bound or within.up_to_key)
    if within.where is not None:
        # On a line of its own, so that a comment at its end does not swallow what follows.
        conditions.append(sql.SQL("(\n{}\n)").format(sql.SQL(within.where)))
    text = sql.SQL("select {} from {} where {} order by {}").format(
        _names(schema.names), quoted(schema.name), sql.SQL(" and ").join(conditions), _names(schema.key)
    )
    if within.where is None:
        text += sql.SQL(" limit {}").format(sql.Literal(within.limit))
    return _Select(text, values)


def _bound(connection: AnyConnection, schema: TableSchema, within: Range) -> Key | None:
    """The key of the `limit`-th row of the range, whether a condition holds for it or not; `None` past its end.

    So a chunk under a condition looks at a bounded number of rows, however few it finds.
    """
    conditions, values = _range_conditions(schema, within.after_key, within.up_to_key)
    text = sql.SQL("select {key} from {table} where {conditions} order by {key} offset {before} limit 1").format(
        key=_names(schema.key),
        table=quoted(schema.name),
        conditions=sql.SQL(" and ").join(conditions),
        before=sql.Literal(within.limit - 1),
    )
    rows = _Rows(schema, only=schema.key)
    rows.take(rows.fetch(connection, _Select(text, values)).run(connection))
    return rows.last_key


def _range_conditions(
    schema: TableSchema, after_key: Key | None, up_to_key: Key
) -> tuple[list[sql.Composable], tuple[str, ...]]:
    """`(key) > (…) and (key) <= (…)` as row comparisons, which an index on the key serves."""
    key = _names(schema.key)
    conditions: list[sql.Composable] = []
    values: tuple[str, ...] = ()
    if after_key is not None:
        conditions.append(sql.SQL("({}) > ({})").format(key, _typed_key(schema, first=1)))
        values = after_key
    conditions.append(sql.SQL("({}) <= ({})").format(key, _typed_key(schema, first=1 + len(values))))
    return conditions, values + up_to_key


def _with_keys(schema: TableSchema, keys: Sequence[Key]) -> _Select:
    text = sql.SQL("select {columns} from {table} where ({key}) in ({asked}) order by {key}").format(
        columns=_names(schema.names), table=quoted(schema.name), key=_names(schema.key), asked=_asked(schema)
    )
    return _Select(text, _as_arrays(keys))


def _without_row(schema: TableSchema, keys: Sequence[Key]) -> _Select:
    """The asked keys that no row has, each once, as the server prints them."""
    asked = sql.SQL("select distinct * from ({}) as a").format(_asked(schema))
    text = sql.SQL(
        "select * from ({asked}) as a ({key}) where not exists (select from {table} as t where {same}) order by {key}"
    ).format(
        asked=asked,
        key=_names(schema.key),
        table=quoted(schema.name),
        same=sql.SQL(" and ").join(sql.SQL("t.{0} = a.{0}").format(sql.Identifier(name)) for name in schema.key),
    )
    return _Select(text, _as_arrays(keys))


def _asked(schema: TableSchema) -> sql.Composed:
    """The asked keys, an array of texts for each key column, as rows of the key's types."""
    parts = range(1, len(schema.key) + 1)
    return sql.SQL("select {} from unnest({}) as k ({})").format(
        sql.SQL(", ").join(
            sql.SQL(f"cast(k.k{part} as {_unbounded(schema.column(name).source_type)})")
            for part, name in zip(parts, schema.key, strict=True)
        ),
        sql.SQL(", ").join(sql.SQL(f"${part}::text[]") for part in parts),
        sql.SQL(", ").join(sql.SQL(f"k{part}") for part in parts),
    )


def _unbounded(source_type: str) -> str:
    """A type without its length or precision: a cast would cut a value to it, and find another row.

    >>> _unbounded("character varying(10)"), _unbounded("timestamp(3) with time zone"), _unbounded("character(2)")
    ('character varying', 'timestamp with time zone', 'pg_catalog.bpchar')
    """
    name, bracket, rest = source_type.partition("(")
    if '"' in name or not bracket:
        return {"character": "pg_catalog.bpchar", "bit": "pg_catalog.bit"}.get(source_type, source_type)
    bare = name + rest.partition(")")[2]
    return {"character": "pg_catalog.bpchar", "bit": "pg_catalog.bit"}.get(bare, bare)


def _as_arrays(keys: Sequence[Key]) -> tuple[str, ...]:
    """The keys part by part, each as the text of an array of texts."""
    return tuple("{" + ",".join(_element(part) for part in column) + "}" for column in zip(*keys, strict=True))


def _element(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _text_at(cells: Cells, row: int) -> str:
    start, size = int(cells.starts[row]), int(cells.sizes[row])
    return bytes(cells.data[start : start + size]).decode()


def _names(names: Sequence[str]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(name) for name in names)


def _descending(name: str) -> sql.Composed:
    return sql.SQL("{} desc").format(sql.Identifier(name))


def _typed_key(schema: TableSchema, *, first: int) -> sql.Composed:
    """A place for each key column's value, read as the column's own type so that the index serves it."""
    return sql.SQL(", ").join(
        # The type's name is the server's own spelling, quoted where it must be.
        sql.SQL(f"cast(${first + at} as {schema.column(name).source_type})")
        for at, name in enumerate(schema.key)
    )
