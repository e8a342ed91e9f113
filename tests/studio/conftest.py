"""Fixtures: the whole catalogue loaded once per run, and a copy of it for a test that writes."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from servers.postgres import Database, drop_database

from deltaworks.testing.postgres import PostgresServer
from studio import catalogue
from studio.database import create_database, load

LOADED = "studio_loaded"


@pytest.fixture(scope="session")
def loaded(postgres_server: PostgresServer) -> Database:
    """All films, to be read only."""
    dsn = postgres_server.dsn(LOADED)
    create_database(dsn)
    load(dsn)
    return Database(postgres_server, LOADED)


@pytest.fixture
def studio(loaded: Database) -> Iterator[Database]:
    """All films, in a copy that is dropped afterwards."""
    with copied(loaded, "studio_copy") as database:
        yield database


@contextmanager
def copied(database: Database, name: str) -> Iterator[Database]:
    """A copy of a database for the length of a `with`."""
    copy = Database(database.server, name)
    with psycopg.connect(database.server.dsn(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} template {}").format(sql.Identifier(name), sql.Identifier(database.name))
        )
        yield copy
        drop_database(connection, name)


@pytest.fixture
def second_studio(loaded: Database) -> Iterator[Database]:
    """Another copy, for a comparison."""
    with copied(loaded, "studio_second_copy") as database:
        yield database


@pytest.fixture
def few_films(tmp_path: Path) -> Path:
    """A file of films with the first fifty only, for tests that load again and again."""
    path = tmp_path / "few.db"
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("attach ? as whole", [str(catalogue.default_path())])
        for table in ("omdb", "tomatoes"):
            connection.execute(f"create table {table} as select * from whole.{table} order by ID limit 50")
        connection.commit()
    return path
