"""A real MariaDB, Debian's; a fresh database for each test."""

import itertools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deltaworks.testing.postgres import free_port

PASSWORD = "the-secret-of-mariadb"
_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True)
class MariaDbServer:
    """A running server on 127.0.0.1."""

    port: int

    def connect(self, database: str | None = None) -> Any:
        """A connection of the administrator, in autocommit mode."""
        import pymysql  # noqa: PLC0415

        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="deltaworks", password=PASSWORD, database=database, autocommit=True
        )


@dataclass(frozen=True, slots=True)
class MariaDbDatabase:
    """A database of its own for one test."""

    server: MariaDbServer
    name: str

    def connection(self, port: int | None = None) -> dict[str, Any]:
        """The settings of `connections:`, by way of a gate where one is given."""
        return {
            "kind": "mysql",
            "port": port or self.server.port,
            "user": "deltaworks",
            "password": PASSWORD,
            "database": self.name,
        }

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.server.connect(self.name) as connection, connection.cursor() as cursor:
            cursor.execute(query)
            return list(cursor.fetchall())


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """One server for the whole run; it needs not survive the machine."""
    folder = Path(tempfile.mkdtemp(prefix="deltaworks-mariadb-"))
    folder.chmod(0o755)
    data, port = folder / "data", free_port()
    account = ["--user=nobody"] if os.geteuid() == 0 else []
    subprocess.run(
        [
            "mariadb-install-db",
            "--no-defaults",
            *account,
            f"--datadir={data}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ],
        check=True,
        capture_output=True,
    )
    grant = folder / "grant.sql"
    grant.write_text(f"grant all on *.* to deltaworks@'127.0.0.1' identified by '{PASSWORD}' with grant option;\n")
    with (folder / "out").open("wb") as out:
        process = subprocess.Popen(
            [
                shutil.which("mariadbd") or "/usr/sbin/mariadbd",
                "--no-defaults",
                *account,
                f"--datadir={data}",
                f"--port={port}",
                "--bind-address=127.0.0.1",
                f"--socket={data / 'socket'}",
                f"--init-file={grant}",
                "--skip-name-resolve",
                "--innodb-flush-log-at-trx-commit=0",
            ],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    try:
        server = MariaDbServer(port)
        _wait(server, process, folder / "out")
        yield server
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def mariadb_database(mariadb_server: MariaDbServer) -> Iterator[MariaDbDatabase]:
    """An empty database, dropped afterwards."""
    name = f"test_{next(_numbers)}"
    with mariadb_server.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"create database {name}")
    yield MariaDbDatabase(mariadb_server, name)
    with mariadb_server.connect() as connection, connection.cursor() as cursor:
        cursor.execute(f"drop database {name}")


def _wait(server: MariaDbServer, process: subprocess.Popen[bytes], out: Path) -> None:
    import pymysql  # noqa: PLC0415

    deadline = time.monotonic() + 60
    while True:
        try:
            server.connect().close()
            return
        except pymysql.err.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(out.read_text()[-3000:]) from None
            time.sleep(0.1)
