"""Fixtures: one PostgreSQL 18 per run, a fresh database per test."""

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.config import PostgresConfig
from deltaworks.testing.postgres import PostgresServer

TEMPLATE = "deltaworks_template"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class Database:
    """A database of its own for one test."""

    server: PostgresServer
    name: str

    @property
    def dsn(self) -> str:
        return self.server.dsn(self.name)

    def source(self, *tables: str, name: str | None = None, **config: Any) -> PostgresSource:
        """A source over these tables, named after the database so that its slot is its own."""
        settings = {"kind": "postgres", "dsn": self.dsn, "tables": tables, **config}
        return PostgresSource(name or self.name, PostgresConfig.model_validate(settings))

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """A connection in autocommit mode."""
        return psycopg.connect(self.dsn, autocommit=True, **options)

    def execute(self, *statements: str) -> None:
        """Run statements, each in its own transaction."""
        with self.connect() as connection:
            for statement in statements:
                connection.execute(statement)  # type: ignore[arg-type]

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.connect() as connection:
            return connection.execute(query).fetchall()  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def server_folder() -> Iterator[Path]:
    """A folder that the server's account can enter, which pytest's own below a 0700 folder is not."""
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-postgres-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_server(server_folder: Path, pytestconfig: pytest.Config) -> Iterator[PostgresServer]:
    """A PostgreSQL for the whole run: 18, or the one of `--postgres-binaries`.

    Tests that stop or crash a server start their own.
    """
    settings = {"fsync": "off", "max_connections": "60", "max_prepared_transactions": "10"}
    binaries = pytestconfig.getoption("--postgres-binaries")
    with PostgresServer.start(server_folder / "data", settings=settings, binaries=binaries) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute(sql.SQL("create database {}").format(sql.Identifier(TEMPLATE)))
        yield server


@pytest.fixture
def database(postgres_server: PostgresServer) -> Iterator[Database]:
    """An empty database, dropped afterwards with its replication slots."""
    name = f"test_{next(_numbers)}"
    with psycopg.connect(postgres_server.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(TEMPLATE))
        )
        yield Database(postgres_server, name)
        drop_database(connection, name)


def drop_database(connection: psycopg.Connection[Any], name: str) -> None:
    """Drop a database, ending whoever is connected and forgetting its slots."""
    connection.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
    connection.execute(
        "select pg_terminate_backend(active_pid) from pg_replication_slots where database = %s and active", [name]
    )
    for (slot,) in connection.execute(
        "select slot_name from pg_replication_slots where database = %s", [name]
    ).fetchall():
        # A slot stays taken for a moment after its reader was ended, and a temporary one goes with it.
        with suppress(psycopg.errors.UndefinedObject):
            _retry(lambda slot=slot: connection.execute("select pg_drop_replication_slot(%s)", [slot]))
    connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _retry(action: Any) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            action()
            return
        except psycopg.errors.ObjectInUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
