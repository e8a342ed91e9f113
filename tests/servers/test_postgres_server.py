import os
import socket
from pathlib import Path

import psycopg
import pytest
from servers.postgres import Database

from deltaworks.testing.postgres import PostgresServer, ServerNotStartedError


def test_server_has_logical_wal_and_listens_on_loopback_only(postgres_server: PostgresServer) -> None:
    with psycopg.connect(postgres_server.dsn()) as connection:
        settings = connection.execute(
            "select current_setting('wal_level'), current_setting('listen_addresses')"
        ).fetchone()
    assert settings == ("logical", "127.0.0.1")


def test_each_test_has_a_database_of_its_own(database: Database) -> None:
    database.execute("create table only_here (id int primary key)")
    assert database.rows("select current_database()") == [(database.name,)]


def test_killed_server_starts_again_on_its_folder(server_folder: Path) -> None:
    server = PostgresServer.start(server_folder / "killed")
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("create table kept (id int)")
        connection.execute("insert into kept values (7)")
    server.kill()
    with (
        PostgresServer.start(server_folder / "killed", settings={"work_mem": "5MB"}) as again,
        psycopg.connect(again.dsn()) as connection,
    ):
        assert connection.execute("select id, current_setting('work_mem') from kept").fetchall() == [(7, "5MB")]
    assert not again.is_running()


def test_used_port_is_named(server_folder: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerNotStartedError, match=f"port {port} of 127.0.0.1 is in use"):
            PostgresServer.start(server_folder / "unused", port=port)


def test_folder_in_use_names_the_process(postgres_server: PostgresServer) -> None:
    with pytest.raises(ServerNotStartedError, match=f"process {postgres_server.pid} already serves it"):
        PostgresServer.start(postgres_server.folder)


def test_pid_file_of_a_dead_server_is_no_obstacle(server_folder: Path) -> None:
    folder = server_folder / "stale"
    PostgresServer.start(folder).stop()
    (folder / "postmaster.pid").write_text(f"{os.getpid()}\n{folder}\n0\n5432\n\n127.0.0.1\n0 0\nready\n")
    PostgresServer.start(folder).stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes the account")
def test_folder_below_a_closed_one_is_named(server_folder: Path) -> None:
    closed = server_folder / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(ServerNotStartedError, match=r"may not enter .*closed"):
        PostgresServer.start(closed / "data")


def test_wrong_setting_is_reported_in_the_servers_words(server_folder: Path) -> None:
    with pytest.raises(ServerNotStartedError, match="no_such_setting"):
        PostgresServer.start(server_folder / "wrong", settings={"no_such_setting": "1"})
