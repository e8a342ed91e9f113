"""Where a case runs: a real server, a database of its own, and what can be done to both."""

import contextlib
import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql
from values import SESSION, Row, Text

from deltaworks.schema import TableName
from deltaworks.testing.postgres import PostgresServer

SERVERS = {"embedded": None, "debian": Path("/usr/lib/postgresql/15/bin")}
"""Servers by the name on the command line, with the folder of their programs."""

SETTINGS = {"fsync": "off", "max_connections": "80", "max_prepared_transactions": "10"}

_numbers = itertools.count(1)


@contextlib.contextmanager
def started_server(binaries: Path | None) -> Iterator[PostgresServer]:
    """A server in a temporary folder that its account may enter."""
    with tempfile.TemporaryDirectory(prefix="deltaworks-conformance-") as folder:
        Path(folder).chmod(0o755)
        with PostgresServer.start(Path(folder) / "data", settings=SETTINGS, binaries=binaries) as server:
            yield server


@dataclass(slots=True)
class Database:
    """A database of one case. Connections are kept by name, as the case file uses them."""

    server: PostgresServer
    name: str
    standby: PostgresServer | None = None
    """A copy of the server that may take its place."""
    _connections: dict[str, psycopg.Connection[Any]] = field(default_factory=dict)
    _running: list[threading.Thread] = field(default_factory=list)
    _stop_load: threading.Event = field(default_factory=threading.Event)

    @property
    def dsn(self) -> str:
        """The database where it takes writes, as libpq finds it among two servers."""
        if self.standby is None:
            return self.server.dsn(self.name)
        return (
            f"host=127.0.0.1,127.0.0.1 port={self.server.port},{self.standby.port} user={self.server.superuser} "
            f"dbname={self.name} target_session_attrs=read-write sslmode=disable"
        )

    def promote(self) -> None:
        """Lose the server and let its standby take its place."""
        if self.standby is None:
            raise ValueError("there is no standby to promote")
        self.server.kill()
        self.standby.promote()

    def connection(self, name: str = "w") -> psycopg.Connection[Any]:
        """The connection of that name, in autocommit mode; opened when first used, and again after it broke."""
        known = self._connections.get(name)
        if known is None or known.closed or known.broken:
            known = psycopg.connect(self.dsn, autocommit=True)
            self._connections[name] = known
        return known

    def run(self, statement: str | Sequence[str], *, session: str | None = None) -> None:
        """Run a statement as a case file writes it, or several one after the other."""
        if not isinstance(statement, str):
            for each in statement:
                self.run(each, session=session)
            return
        name, colon, text = statement.partition(": ")
        connection = self.connection(name) if colon and name.isalnum() and len(name) < 3 else self.connection()
        if session:
            connection.execute(session)  # type: ignore[call-overload]
        connection.execute(text if colon and name.isalnum() and len(name) < 3 else statement)  # type: ignore[call-overload]

    def run_later(self, statement: str, *, connection: str) -> None:
        """Run a statement that returns only after something else has happened."""
        self._start(lambda: self.connection(connection).execute(statement))  # type: ignore[call-overload]

    def load(self, each: Callable[[psycopg.Connection[Any], int], None], *, per_second: float, seconds: float) -> None:
        """Run `each` with 0, 1, 2… at a rate, until `seconds` are over or `stop_load`."""

        def work() -> None:
            with psycopg.connect(self.dsn, autocommit=True) as connection:
                began = time.monotonic()
                for number in itertools.count():
                    due = began + number / per_second
                    if self._stop_load.wait(max(0.0, due - time.monotonic())) or time.monotonic() > began + seconds:
                        return
                    each(connection, number)

        self._stop_load.clear()
        self._start(work)

    def stop_load(self) -> None:
        """End every load, and wait for what runs."""
        self._stop_load.set()
        for thread in self._running:
            thread.join(30)
        self._running.clear()

    def rows(self, statement: str, values: Sequence[object] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a query, on a connection of its own."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(statement, values).fetchall()  # type: ignore[arg-type]

    def user_tables(self, *, roots: bool) -> list[TableName]:
        """The tables of users; with `roots` partitioned tables instead of their leaves."""
        wanted = "relkind in ('r', 'p') and not relispartition" if roots else "relkind = 'r'"
        found = self.rows(
            f"select nspname, relname from pg_class c join pg_namespace n on n.oid = relnamespace where {wanted} "
            "and nspname not in ('pg_catalog', 'information_schema') and nspname not like 'pg_toast%' order by c.oid"
        )
        return [TableName(*row) for row in found]

    def root_of(self) -> dict[TableName, TableName]:
        """The partitioned table that a leaf belongs to."""
        found = self.rows(
            "select n.nspname, c.relname, rn.nspname, r.relname from pg_class c join pg_namespace n on "
            "n.oid = c.relnamespace join pg_class r on r.oid = pg_partition_root(c.oid) join pg_namespace rn on "
            "rn.oid = r.relnamespace where c.relispartition"
        )
        return {TableName(*row[:2]): TableName(*row[2:]) for row in found}

    def generated_columns(self, table: TableName) -> set[str]:
        """Columns that the server computes."""
        found = self.rows(
            "select attname from pg_attribute where attrelid = %s::regclass and attgenerated <> ''", [quoted(table)]
        )
        return {name for (name,) in found}

    def texts(self, table: TableName) -> list[Row]:
        """The rows of a table as the server's text; empty where there is no such table."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            for setting in SESSION:
                connection.execute(setting)  # type: ignore[call-overload]
            row = connection.execute("select to_regclass(%s)", [quoted(table)]).fetchone()
            if row is None or row[0] is None:
                return []
            cursor = connection.execute(sql.SQL("select * from {}").format(sql.Identifier(table.namespace, table.name)))
            names = [column.name for column in cursor.description or ()]
            result = cursor.pgresult
            if result is None:
                return []
            values = [
                [_text(result.get_value(at, column)) for column in range(result.nfields)]
                for at in range(result.ntuples)
            ]
        return [dict(zip(names, row, strict=True)) for row in values]

    def close(self) -> None:
        """End what runs and close every connection."""
        self.stop_load()
        for connection in self._connections.values():
            connection.close()

    def _start(self, work: Callable[[], object]) -> None:
        def guarded() -> None:
            # A server that is stopped or promoted under a load ends it.
            with contextlib.suppress(psycopg.Error):
                work()

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        self._running.append(thread)


@contextlib.contextmanager
def fresh_database(server: PostgresServer) -> Iterator[Database]:
    """An empty database, dropped at the end with its slots; settings of the server are as before."""
    name = f"case_{next(_numbers)}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
    database = Database(server, name)
    try:
        yield database
    finally:
        database.close()
        if server.is_running() and database.standby is None:
            with psycopg.connect(server.dsn(), autocommit=True) as connection:
                _restore(connection)
                _drop(connection, name)


def quoted(table: TableName) -> str:
    """A table's name as SQL."""
    return ".".join('"' + part.replace('"', '""') + '"' for part in (table.namespace, table.name))


def until(condition: Callable[[], bool], *, what: str, timeout_s: float) -> None:
    """Return when the condition holds.

    Raises:
        TimeoutError: it does not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(0.02)


def _restore(connection: psycopg.Connection[Any]) -> None:
    connection.execute("set synchronous_commit = local")
    connection.execute("alter system reset all")
    connection.execute("select pg_reload_conf()")


def _drop(connection: psycopg.Connection[Any], name: str) -> None:
    connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
    for gid, database in connection.execute("select gid, database from pg_prepared_xacts").fetchall():
        if database == name:
            with psycopg.connect(connection.info.dsn, dbname=name, autocommit=True) as own:
                own.execute(sql.SQL("rollback prepared {}").format(sql.Literal(gid)))
    slots = "select slot_name, active_pid from pg_replication_slots where database = %s"

    def is_free() -> bool:
        held = [pid for _slot, pid in connection.execute(slots, [name]).fetchall() if pid is not None]
        for pid in held:
            connection.execute("select pg_terminate_backend(%s)", [pid])
        return not held

    until(is_free, what=f"a free slot in {name}", timeout_s=10)
    for slot, _pid in connection.execute(slots, [name]).fetchall():
        connection.execute("select pg_drop_replication_slot(%s)", [slot])
    connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _text(value: bytes | None) -> Text:
    return None if value is None else value.decode()
