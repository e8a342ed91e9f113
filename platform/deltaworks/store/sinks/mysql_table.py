"""A table of MySQL or MariaDB as a sink: one transaction for each flush, guarded by the documents' versions.

| declared                   | column                                                          |
|----------------------------|-----------------------------------------------------------------|
| `int`, `float`, `bool`     | bigint, double, boolean                                         |
| `Decimal`                  | decimal(38, 9), as in the lake; more digits refuse the document |
| `str`, `bytes`             | longtext, longblob                                              |
| `date`, `datetime`         | date, datetime(6) in UTC                                        |
| a list, anything nested    | json                                                            |

NaN and infinity become null, which is all that MySQL has for them. A text key is compared byte by byte, so
that `a`, `A` and `a ` are three keys as in the source; it has 700 characters at most.
"""

import json
import math
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from deltaworks.config import Config
from deltaworks.connection import MySqlConnection
from deltaworks.position import Lsn, Version
from deltaworks.process.document_json import document_json
from deltaworks.process.shape import Field
from deltaworks.process.sink import Capabilities, Document, Sink, SinkAwayError, SinkReader, StoredVersion
from deltaworks.store.sinks.package import needed
from deltaworks.store.sinks.pending import PendingSink
from deltaworks.store.sinks.sql_table import (
    CAPABILITIES,
    HALF_A_PAIR,
    REACHED,
    TOMBSTONE,
    RowRefusedError,
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

if TYPE_CHECKING:
    from pymysql.connections import Connection

KEY_CHARS = 700
"""An index of InnoDB takes 3,072 bytes."""
_TYPES: Mapping[Any, str] = {
    int: "bigint",
    float: "double",
    Decimal: "decimal(38, 9)",
    str: "longtext",
    bool: "boolean",
    bytes: "longblob",
    date: "date",
    datetime: "datetime(6)",
}
_REFUSED = frozenset({1048, 1062, 1153, 1264, 1265, 1292, 1366, 1367, 1406, 1451, 1452, 1690, 3140, 3819, 4025, 4078})
"""Errors that say something about a row: null, duplicate, range, type, length, a foreign key, a check, JSON."""
_AWAY = frozenset(
    {1040, 1053, 1158, 1159, 1160, 1161, 1205, 1213, 1290, 1836, 1927, 2002, 2003, 2006, 2013, 2055, 3024}
)
"""Errors that pass: connections, shutdown, network, locks, deadlock, read-only."""
_MODE = "STRICT_ALL_TABLES,ERROR_FOR_DIVISION_BY_ZERO,NO_ENGINE_SUBSTITUTION"
"""Without it the server cuts what does not fit, and says nothing."""


@dataclass(frozen=True, slots=True)
class MySqlTable:
    """A table of a MySQL or MariaDB database as an app declares it; a `SinkSpec`.

    The table is made when it is not there, and columns are added. `schema` is the documents' `TypedDict` or
    dataclass, with the app's key in it. `connection` is a name under `connections:` in `deltaworks.yaml`, of kind
    `mysql`. Needs the extra `[mysql]`.

    >>> MySqlTable("film", connection="legacy", schema=dict).capabilities.is_transactional
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
            SqlTableError: the table is not as declared, or may not be made.
        """
        session = self._session(key, config)
        with closing_on_error(session.close):
            session.prepare()
        return PendingSink(self.name, SqlDelivery(session))

    def open_reader(self, *, app: str, key: str, config: Config) -> SinkReader:  # noqa: ARG002
        """Read the table as of now, in one snapshot."""
        return MySqlTableReader(self._session(key, config))

    def _session(self, key: str, config: Config) -> "MySqlSession":
        connection = config.connection(self.connection, MySqlConnection)
        return MySqlSession(connection, SqlTable.of(self.name, self.schema, key=key), where=self.connection)


class MySqlSession:
    """A `SqlSession` of MySQL."""

    def __init__(self, settings: MySqlConnection, table: SqlTable, *, where: str) -> None:
        self.table = table
        self._settings = settings
        self._where = where
        self._connection: Connection[Any] | None = None
        self._encoders = {item.name: _encoder(item.type) for item in table.fields}
        self.names = {
            "table": _quoted(table.name.name),
            "key": _quoted(table.key),
            "tombstone": _quoted(TOMBSTONE),
            "reached": _quoted(REACHED),
        }

    @property
    def connection(self) -> "Connection[Any]":
        """The connection, opened anew when it is broken."""
        if self._connection is None or not self._connection.open:
            self._connection = _connect(self._settings, self._where)
        return self._connection

    def close(self) -> None:
        """See `SqlSession.close`."""
        if self._connection is not None and self._connection.open:
            self._connection.close()
        self._connection = None

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn the server's errors into ours; none holds a value of a row."""
        from pymysql import err  # noqa: PLC0415

        try:
            yield
        except err.MySQLError as error:
            if _code(error) in _AWAY or isinstance(error, err.InterfaceError):
                self.close()
                raise away(self.table, self._where, _told(error)) from error
            raise unusable(self.table, self._where, _told(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """See `SqlSession.transaction`."""
        with self.errors():
            self.run("start transaction")
            try:
                self.run("insert ignore into {reached} (sink, position) values (%s, 0)", [self._sink])
                self.run("select position from {reached} where sink = %s for update", [self._sink])
                yield
            except BaseException:
                if self._connection is not None and self._connection.open:
                    self._roll_back()
                raise
            self.run("commit")

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """See `SqlSession.savepoint`."""
        self.run("savepoint part")
        try:
            with refusing(self.table, _told_of_row):
                yield
        except RowRefusedError:
            self.run("rollback to savepoint part")
            raise

    def versions(self, keys: Sequence[Any]) -> dict[Any, Version]:
        """See `SqlSession.versions`."""
        rows = self.run("select {key}, _commit, _ordinal from {table} where {key} in %s", [keys])
        buried = self.run(
            "select `key`, commit, ordinal from {tombstone} where sink = %s and `key` in %s",
            [self._sink, [str(key) for key in keys]],
        )
        return newest_of(rows, buried, keys)

    def put(self, documents: Sequence[Document]) -> None:
        """See `SqlSession.put`."""
        columns = [_quoted(name) for name in self.table.columns]
        updates = ", ".join(f"{column} = values({column})" for column in columns)
        # pymysql puts the rows of such a statement into one, up to a megabyte each.
        self.run_many(
            f"insert into {{table}} ({', '.join(columns)}) values ({', '.join(['%s'] * len(columns))}) "
            f"on duplicate key update {updates}",
            [self._row(document) for document in documents],
        )
        self.run(
            "delete from {tombstone} where sink = %s and `key` in %s",
            [self._sink, [str(document.key) for document in documents]],
        )

    def bury(self, documents: Sequence[Document]) -> None:
        """See `SqlSession.bury`."""
        self.run("delete from {table} where {key} in %s", [[document.key for document in documents]])
        self.run_many(
            "insert into {tombstone} (sink, `key`, commit, ordinal) values (%s, %s, %s, %s) "
            "on duplicate key update commit = values(commit), ordinal = values(ordinal)",
            list(tombstone_rows(self._sink, documents)),
        )

    def reach(self, position: Lsn) -> None:
        """See `SqlSession.reach`."""
        self.run(
            "update {reached} set position = greatest(position, %s), flushed_at = utc_timestamp(6) where sink = %s",
            [position.value, self._sink],
        )

    def key_fault(self, key: Any) -> str | None:
        """See `SqlSession.key_fault`."""
        if isinstance(key, str) and len(key) > KEY_CHARS:
            return f"its key has more than {KEY_CHARS} characters; choose a shorter one in the app"
        return text_fault(key) if isinstance(key, str) else None

    def prepare(self) -> None:
        """Make what is missing of the three tables, and check what is there."""
        with self.errors():
            [(version,)] = self.run("select version()")
            # Comparing byte by byte, blanks at the end too, has another name in each.
            collation = "utf8mb4_nopad_bin" if "mariadb" in str(version).lower() else "utf8mb4_0900_bin"
            present = {name for (name,) in self.run("show tables")}
            for name, columns in self._creations(collation):
                if name not in present:
                    self.run(
                        f"create table if not exists {_quoted(name)} ({columns}) engine = innodb character set utf8mb4"
                    )
            self._add_columns()

    def run(self, statement: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Run a statement with the names of this table in it, and give its rows."""
        with self.connection.cursor() as cursor:
            cursor.execute(statement.format(**self.names), values or None)
            return list(cursor.fetchall()) if cursor.description else []

    def run_many(self, statement: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement for each row."""
        with self.connection.cursor() as cursor:
            cursor.executemany(statement.format(**self.names), rows)

    def _creations(self, collation: str) -> Iterator[tuple[str, str]]:
        text_key = f"varchar({KEY_CHARS}) collate {collation}"
        yield REACHED, "sink varchar(64) primary key, position bigint unsigned not null, flushed_at datetime(6)"
        yield (
            TOMBSTONE,
            f"sink varchar(64), `key` {text_key}, commit bigint unsigned not null, ordinal bigint unsigned not null, "
            "primary key (sink, `key`)",
        )
        columns = [
            f"{_quoted(item.name)} "
            + (
                f"{text_key if item.type is str else _column_type(item)} primary key"
                if item.name == self.table.key
                else _column_type(item)
            )
            for item in self.table.fields
        ]
        meta = [
            "_commit bigint unsigned not null",
            "_ordinal bigint unsigned not null",
            "_committed_at datetime(6) not null",
        ]
        yield self.table.name.name, ", ".join([*columns, *meta])

    def _add_columns(self) -> None:
        present = {row[0] for row in self.run("show columns from {table}")}
        meta_types = "bigint unsigned, bigint unsigned, datetime(6)"
        for item in columns_to_add(self.table, present, meta_types=meta_types):
            self.run(f"alter table {{table}} add column {_quoted(item.name)} {_column_type(item)}")

    def _roll_back(self) -> None:
        from pymysql import err  # noqa: PLC0415

        try:
            self.run("rollback")
        except err.MySQLError:
            # The server rolls back what a broken connection leaves.
            self.close()

    @property
    def _sink(self) -> str:
        return self.table.name.name

    def _row(self, document: Document) -> list[Any]:
        row = self.table.values(document)
        encoded = [None if row[name] is None else encode(row[name]) for name, encode in self._encoders.items()]
        return [*encoded, row["_commit"], row["_ordinal"], _scalar(document.committed_at)]


class MySqlTableReader:
    """A `SinkReader` of a table, in one snapshot; serves one thread."""

    def __init__(self, session: MySqlSession) -> None:
        self._session = session
        self._decoders = {item.name: _decoder(item.type) for item in session.table.fields}
        with session.errors():
            session.run("set session transaction isolation level repeatable read")
            session.run("start transaction with consistent snapshot, read only")

    def versions(self) -> Iterator[StoredVersion]:
        """See `SinkReader.versions`."""
        cursors = needed("pymysql.cursors", extra="mysql")
        statement = """
            select {key}, _commit, _ordinal, 0 from {table}
            union all select `key`, commit, ordinal, 1 from {tombstone} where sink = %s
        """
        # Rows stay with the server until they are read.
        with self._session.errors(), self._session.connection.cursor(cursors.SSCursor) as cursor:
            cursor.execute(statement.format(**self._session.names), [self._session.table.name.name])
            for key, commit, ordinal, is_deleted in cursor:
                yield StoredVersion(key=str(key), version=Version(Lsn(commit), ordinal), is_deleted=bool(is_deleted))

    def documents(self, keys: Iterable[str]) -> Mapping[str, Mapping[str, Any]]:
        """See `SinkReader.documents`."""
        wanted = list(keys)
        if not wanted:
            return {}
        columns = ", ".join(_quoted(name) for name in self._decoders)
        with self._session.errors():
            rows = self._session.run(f"select {{key}}, {columns} from {{table}} where {{key}} in %s", [wanted])
        return {
            str(key): {
                name: None if value is None else decode(value)
                for (name, decode), value in zip(self._decoders.items(), values, strict=True)
            }
            for key, *values in rows
        }

    def close(self) -> None:
        """See `SinkReader.close`."""
        self._session.close()


def _connect(settings: MySqlConnection, where: str) -> "Connection[Any]":
    pymysql = needed("pymysql", extra="mysql")
    tls = {} if settings.ca is None else {"ssl_ca": str(settings.ca), "ssl_verify_identity": True}
    try:
        connection: Connection[Any] = pymysql.connect(
            host=settings.host,
            port=settings.port,
            user=settings.user,
            password=settings.password.get_secret_value(),
            database=settings.database,
            charset="utf8mb4",
            connect_timeout=10,
            autocommit=True,
            sql_mode=_MODE,
            init_command="set time_zone = '+00:00'",
            **tls,
        )
        # The variable behind this has another name in MariaDB.
        connection.query("set session transaction isolation level read committed")
    except pymysql.err.MySQLError as error:
        if _code(error) in _AWAY:
            raise SinkAwayError(f"cannot connect to {where!r}: {_told(error)}; it is tried again") from error
        raise SqlTableError(f"cannot connect to {where!r}: {_told(error)}; mend connections.{where}") from error
    return connection


def _code(error: Exception) -> int:
    return error.args[0] if error.args and isinstance(error.args[0], int) else 0


def _told_of_row(error: Exception) -> str | None:
    from pymysql import err  # noqa: PLC0415

    return _told(error) if isinstance(error, err.MySQLError) and _code(error) in _REFUSED else None


def _told(error: Exception) -> str:
    """The error's number and kind; its words may quote a value."""
    return f"{type(error).__name__} {_code(error)}"


def _quoted(name: str) -> str:
    # Doubled braces and percent signs pass through `format` and the parameters as they are.
    return "`" + name.replace("`", "``").replace("{", "{{").replace("}", "}}").replace("%", "%%") + "`"


def _column_type(item: Field) -> str:
    if typing.get_origin(item.type) is typing.Literal:
        return _TYPES[type(typing.get_args(item.type)[0])]
    return _TYPES.get(item.type, "json")


def _encoder(declared: Any) -> Any:
    return _scalar if declared in _TYPES or typing.get_origin(declared) is typing.Literal else _json


def _json(value: Any) -> str:
    return document_json({"": value})[4:-1].decode()


def _scalar(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return aware(value).replace(tzinfo=None)
    if isinstance(value, Decimal):
        return _fitting(value)
    if isinstance(value, str):
        if (fault := text_fault(value)) is not None and "surrogate" in fault:
            raise RowRefusedError(HALF_A_PAIR)
        return value
    if isinstance(value, (int, bytes, date)):
        return value
    return _json(value)


def _fitting(value: Decimal) -> Decimal | None:
    if not value.is_finite():
        return None
    # The server would round without a word, and so would arithmetic beyond 28 digits.
    _, digits, exponent = value.as_tuple()
    if int(exponent) < -9 and any(digits[int(exponent) + 9 :]):
        raise RowRefusedError("it holds a number of more than 9 decimal places; round it in the app")
    return value


def _decoder(declared: Any) -> Any:
    if declared is bool:
        return bool
    if declared is datetime:
        return _in_utc
    return json.loads if _encoder(declared) is _json else _same


def _in_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC)


def _same(value: Any) -> Any:
    return value
