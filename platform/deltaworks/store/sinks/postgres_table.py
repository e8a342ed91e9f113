"""A table of PostgreSQL as a sink: one transaction for each flush, guarded by the documents' versions.

| declared                      | column             |
|-------------------------------|--------------------|
| `int`, `float`, `Decimal`     | bigint, double precision, numeric |
| `str`, `bool`, `bytes`        | text, boolean, bytea |
| `date`, `datetime`            | date, timestamptz  |
| a list of these               | an array           |
| anything nested               | jsonb              |

Rows travel as one JSON text, which the database reads as rows of the table: one round trip, its own
conversions, so a table made by hand may have other types too, such as integer, varchar or uuid.
"""

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import psycopg
from psycopg import sql
from psycopg.rows import dict_row
from pydantic import SecretStr

from deltaworks.config import Config
from deltaworks.connection import PostgresConnection
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import document_json
from deltaworks.process.shape import is_record
from deltaworks.process.sink import Capabilities, Document, Sink, SinkAwayError, SinkReader, StoredVersion
from deltaworks.store.sinks.pending import PendingSink
from deltaworks.store.sinks.sql_table import (
    CAPABILITIES,
    META,
    REACHED,
    TOMBSTONE,
    SqlDelivery,
    SqlTable,
    SqlTableError,
    aware,
    away,
    closing_on_error,
    columns_to_add,
    newest_of,
    refusing,
    text_fault,
    tombstone_rows,
    unusable,
)

_TYPES: Mapping[Any, str] = {
    int: "bigint",
    float: "double precision",
    Decimal: "numeric",
    str: "text",
    bool: "boolean",
    bytes: "bytea",
    date: "date",
    datetime: "timestamptz",
}
_REFUSED_STATES = ("21", "22", "23", "54")
"""SQLSTATE classes that say something about a row: its values, a constraint, a limit."""
_AWAY_STATES = ("08", "25006", "40", "53", "55", "57", "58")
"""Classes and states that pass: connection, read-only standby, deadlock, resources, locks, shutdown, I/O."""


@dataclass(frozen=True, slots=True)
class PostgresTable:
    """A table of a PostgreSQL database as an app declares it; a `SinkSpec`.

    `name` is `table` or `schema.table`; the table is made when it is not there, and nullable columns are added.
    `schema` is the documents' `TypedDict` or dataclass, with the app's key in it. `connection` is a name under
    `connections:` in `deltaworks.yaml`, of kind `postgres`.

    >>> PostgresTable("film", connection="warehouse", schema=dict).capabilities.is_transactional
    True
    """

    name: str
    connection: str = field(kw_only=True)
    schema: type = field(kw_only=True)

    @property
    def capabilities(self) -> Capabilities:
        """Everything a database can promise."""
        return CAPABILITIES

    def open(self, *, app: str, key: str, config: Config) -> Sink:  # noqa: ARG002
        """Connect, and make or check the table.

        Raises:
            SinkAwayError: the server is not there now.
            SqlTableError: the table is not as declared, or may not be made; all faults are listed.
        """
        session = self._session(key, config)
        with closing_on_error(session.close):
            session.prepare()
        return PendingSink(self.name, SqlDelivery(session))

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read the table as of now, in one snapshot."""
        return PostgresTableReader(self._session(key, config))

    def _session(self, key: str, config: Config) -> "PostgresSession":
        connection = config.connection(self.connection, PostgresConnection)
        table = SqlTable.of(self.name, self.schema, key=key)
        return PostgresSession(connection.dsn.get_secret_value(), table, where=self.connection)


class PostgresSession:
    """A `SqlSession` of PostgreSQL."""

    def __init__(self, dsn: str, table: SqlTable, *, where: str) -> None:
        self.table = table
        self._dsn = SecretStr(dsn)
        self._where = where
        self._connection: psycopg.Connection[Any] | None = None
        self._encoders = {field.name: _encoder(field.type) for field in table.fields}
        self._sql = _Names(table)

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection, opened anew when it is broken."""
        if self._connection is None or self._connection.closed:
            self._connection = _connect(self._dsn.get_secret_value(), self._where)
        return self._connection

    def close(self) -> None:
        """See `SqlSession.close`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the server's errors into ours; none holds a value of a row."""
        try:
            yield
        except psycopg.Error as error:
            state = error.sqlstate or ""
            # A connection that broke has no state, or tells of a shutdown.
            if isinstance(error, psycopg.OperationalError) and (not state or state.startswith(_AWAY_STATES)):
                self.close()
                raise away(self.table, self._where, _told(error)) from error
            if state.startswith(_AWAY_STATES):
                raise away(self.table, self._where, _told(error)) from error
            raise unusable(self.table, self._where, _told(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `SqlSession.transaction`."""
        with self.errors(), self.connection.transaction():
            self._run(
                "insert into {reached} (sink, position) values (%(sink)s, 0) on conflict do nothing", sink=self._sink
            )
            self._run("select from {reached} where sink = %(sink)s for update", sink=self._sink)
            yield

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """See `SqlSession.savepoint`."""
        with refusing(self.table, _told_of_row), self.connection.transaction():
            yield

    def versions(self, keys: Sequence[Any]) -> dict[Any, Version]:
        """See `SqlSession.versions`."""
        rows = self._run("select {key}, _commit, _ordinal from {table} where {key} = any(%(keys)s)", keys=list(keys))
        buried = self._run(
            "select key, commit, ordinal from {tombstone} where sink = %(sink)s and key = any(%(keys)s)",
            sink=self._sink,
            keys=[str(key) for key in keys],
        )
        return newest_of(rows, buried, keys)

    def put(self, documents: Sequence[Document]) -> None:
        """See `SqlSession.put`."""
        rows = json.dumps([self._row(document) for document in documents], ensure_ascii=False)
        self._run(self._sql.upsert, rows=rows)
        self._run(
            "delete from {tombstone} where sink = %(sink)s and key = any(%(keys)s)",
            sink=self._sink,
            keys=[str(document.key) for document in documents],
        )

    def bury(self, documents: Sequence[Document]) -> None:
        """See `SqlSession.bury`."""
        self._run("delete from {table} where {key} = any(%(keys)s)", keys=[document.key for document in documents])
        _, keys, commits, ordinals = zip(*tombstone_rows(self._sink, documents), strict=True)
        self._run(
            """
            insert into {tombstone} (sink, key, commit, ordinal)
            select %(sink)s, * from unnest(%(keys)s::text[], %(commits)s::bigint[], %(ordinals)s::bigint[])
            on conflict (sink, key) do update set commit = excluded.commit, ordinal = excluded.ordinal
            """,
            sink=self._sink,
            keys=list(keys),
            commits=list(commits),
            ordinals=list(ordinals),
        )

    def reach(self, position: Lsn) -> None:
        """See `SqlSession.reach`."""
        self._run(
            """
            update {reached} set position = greatest(position, %(position)s), flushed_at = now()
            where sink = %(sink)s
            """,
            sink=self._sink,
            position=position.value,
        )

    def key_fault(self, key: Any) -> str | None:
        """See `SqlSession.key_fault`."""
        return text_fault(key) if isinstance(key, str) else None

    def prepare(self) -> None:
        """Make what is missing of the three tables, and check what is there."""
        with self.errors(), self.connection.transaction():
            # Two apps may come at once, and "if not exists" alone does not wait.
            self._run("select pg_advisory_xact_lock(hashtext('deltaworks sinks'))")
            for name, statement in self._sql.creations:
                [(found,)] = self._run("select to_regclass(%(name)s)", name=name)
                if found is None:
                    self._run(statement)
            self._add_columns()

    def _add_columns(self) -> None:
        rows = self._run(
            """
            select attname from pg_attribute
            where attrelid = to_regclass(%(name)s) and attnum > 0 and not attisdropped
            """,
            name=self._sql.table_text,
        )
        present = {name for (name,) in rows}
        for item in columns_to_add(self.table, present, meta_types="bigint, bigint, timestamptz"):
            self._run(f"alter table {{table}} add column {{column}} {_column_type(item.type)}", column=item.name)

    @property
    def _sink(self) -> str:
        return str(self.table.name)

    def _row(self, document: Document) -> dict[str, Any]:
        row = self.table.values(document)
        encoded = {name: None if row[name] is None else encode(row[name]) for name, encode in self._encoders.items()}
        meta = {name: row[name] for name in META} | {"_committed_at": aware(document.committed_at).isoformat()}
        return encoded | meta

    def _run(self, statement: str | sql.Composed, *, column: str | None = None, **values: Any) -> list[tuple[Any, ...]]:
        composed = self._sql.composed(statement, column)
        cursor = self.connection.execute(composed, values)
        return cursor.fetchall() if cursor.description else []


class PostgresTableReader:
    """A `SinkReader` of a table, in one snapshot; serves one thread."""

    def __init__(self, session: PostgresSession) -> None:
        self._session = session
        self._names = _Names(session.table)
        with session.errors():
            session.connection.execute("begin isolation level repeatable read, read only")

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        statement = self._names.composed(
            """
            select {key}::text, _commit, _ordinal, false from {table}
            union all select key, commit, ordinal, true from {tombstone} where sink = %(sink)s
            """
        )
        with self._session.errors(), self._session.connection.cursor(name="versions") as cursor:
            cursor.itersize = 10_000
            for key, commit, ordinal, is_deleted in cursor.execute(statement, {"sink": str(self._session.table.name)}):
                yield StoredVersion(key=key, version=Version(Lsn(commit), ordinal), is_deleted=is_deleted)

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        columns = sql.SQL(", ").join(sql.Identifier(item.name) for item in self._session.table.fields)
        statement = sql.SQL(
            "select {key}::text as _key, {columns} from {table} where {key}::text = any(%(keys)s)"
        ).format(columns=columns, **self._names.parts)
        with self._session.errors(), self._session.connection.cursor(row_factory=dict_row) as cursor:
            rows = cursor.execute(statement, {"keys": list(keys)}).fetchall()
        return {row.pop("_key"): row for row in rows}

    def close(self) -> None:
        """See `SinkReader.close`."""
        self._session.close()


class _Names:
    """The statements of one table, with its names quoted."""

    def __init__(self, table: SqlTable) -> None:
        schema, short = table.name.namespace, table.name.name
        identifier = sql.Identifier(schema, short)
        self.table_text = identifier.as_string()
        self.parts = {
            "table": identifier,
            "key": sql.Identifier(table.key),
            "tombstone": sql.Identifier(schema, TOMBSTONE),
            "reached": sql.Identifier(schema, REACHED),
        }
        columns = [sql.Identifier(name) for name in table.columns]
        updates = [sql.SQL("{0} = excluded.{0}").format(column) for column in columns]
        self.upsert = sql.SQL(
            """
            insert into {table} ({columns})
            select {columns} from json_populate_recordset(null::{table}, %(rows)s::json)
            on conflict ({key}) do update set {updates}
            """
        ).format(columns=sql.SQL(", ").join(columns), updates=sql.SQL(", ").join(updates), **self.parts)
        self.creations = (
            (
                self.parts["reached"].as_string(),
                "create table {reached} (sink text primary key, position bigint not null, flushed_at timestamptz)",
            ),
            (
                self.parts["tombstone"].as_string(),
                "create table {tombstone} (sink text, key text, commit bigint not null, ordinal bigint not null, "
                "primary key (sink, key))",
            ),
            (self.table_text, self._creation(table)),
        )

    def composed(self, statement: str | sql.Composed, column: str | None = None) -> sql.Composed:
        """A statement with the names of this table in the place of `{table}`, `{key}` and so on."""
        if isinstance(statement, sql.Composed):
            return statement
        return sql.SQL(statement).format(column=sql.Identifier(column or ""), **self.parts)

    def _creation(self, table: SqlTable) -> sql.Composed:
        columns = [
            sql.SQL("{} {}").format(
                sql.Identifier(item.name),
                sql.SQL(_column_type(item.type) + (" primary key" if item.name == table.key else "")),
            )
            for item in table.fields
        ]
        meta = sql.SQL("_commit bigint not null, _ordinal bigint not null, _committed_at timestamptz not null")
        return sql.SQL("create table {table} ({columns})").format(
            columns=sql.SQL(", ").join([*columns, meta]), **self.parts
        )


def _connect(dsn: str, where: str) -> psycopg.Connection[Any]:
    try:
        connection = psycopg.connect(dsn, autocommit=True, connect_timeout=10, application_name="deltaworks sink")
    except psycopg.OperationalError as error:
        raise SinkAwayError(f"cannot connect to {where!r}: {_told(error)}; it is tried again") from error
    except psycopg.ProgrammingError:
        # The error repeats the string, which may hold a password.
        raise SqlTableError(f"cannot read the connection string of {where!r}; mend connections.{where}.dsn") from None
    connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
    connection.execute("set time zone 'UTC'; set client_encoding to 'UTF8'")
    return connection


def _told_of_row(error: Exception) -> str | None:
    if isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_REFUSED_STATES):
        return _told(error)
    return None


def _told(error: psycopg.Error) -> str:
    """What the server said, without the part that quotes a value: the state's name, the column, the constraint."""
    if error.sqlstate is None:
        return " ".join(str(error).split()) if isinstance(error, psycopg.OperationalError) else type(error).__name__
    names = (("column", error.diag.column_name), ("constraint", error.diag.constraint_name))
    where = "".join(f", {kind} {name!r}" for kind, name in names if name)
    return f"{type(error).__name__} (SQLSTATE {error.sqlstate}{where})"


def _column_type(declared: Any) -> str:
    if declared in _TYPES:
        return _TYPES[declared]
    if typing.get_origin(declared) is typing.Literal:
        return _TYPES[type(typing.get_args(declared)[0])]
    if typing.get_origin(declared) is list and typing.get_args(declared)[0] in _TYPES:
        return _TYPES[typing.get_args(declared)[0]] + "[]"
    return "jsonb"


def _encoder(declared: Any) -> Any:
    """What turns a value of this type into JSON that PostgreSQL reads as the column's type."""
    if typing.get_origin(declared) is list and typing.get_args(declared)[0] in _TYPES:
        return _array
    if is_record(declared) or typing.get_origin(declared) is list:
        return lambda value: json.loads(document_json({"value": value}))["value"]
    return _scalar


def _array(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [None if item is None else _scalar(item) for item in value]
    return _scalar(value)


def _scalar(value: Any) -> Any:
    if isinstance(value, bytes):
        return "\\x" + value.hex()
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, datetime):
        return aware(value).isoformat()
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, (str, int, float, bool)):
        return value
    return json.loads(document_json({"value": value}))["value"]
