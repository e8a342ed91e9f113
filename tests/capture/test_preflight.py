"""What is missing on a server is reported at once, and every mend that is a statement mends it."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SourceNotReadyError
from deltaworks.config import PostgresConfig
from deltaworks.testing.postgres import PostgresServer


@pytest.fixture
def reader(database: Database) -> Iterator[str]:
    """A role that may log in and nothing else."""
    role = f"reader_of_{database.name}"
    database.execute(f"create role {role} login")
    yield role
    database.execute(f"drop owned by {role}", f"drop role {role}")


def source_as(database: Database, role: str, *tables: str) -> PostgresSource:
    dsn = database.server.dsn(database.name, user=role)
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": tables})
    return PostgresSource(database.name, config)


def test_ready_server_has_no_findings(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    source = database.source("t")
    assert source.check() == []
    source.prepare()
    source.prepare()
    assert source.check() == []
    source.close()


def test_all_findings_come_at_once_and_their_statements_mend_them(database: Database, reader: str) -> None:
    database.execute(
        "create schema closed",
        "create table closed.t (id int primary key)",
        "create table keyless (id int)",
        "create table silent (id int primary key)",
        "alter table silent replica identity nothing",
        "create unlogged table fleeting (id int primary key)",
    )
    source = source_as(database, reader, "closed.t", "keyless", "silent", "fleeting")
    found = source.check()
    assert [finding.what for finding in found] == [
        f"role '{reader}' may not replicate",
        f"role '{reader}' may not read table closed.t",
        "table public.keyless has no primary key",
        f"role '{reader}' may not read table public.keyless",
        "table public.silent has replica identity nothing: updates do not say which row",
        f"role '{reader}' may not read table public.silent",
        "table public.fleeting is unlogged or temporary: its changes are not in the WAL",
        f"role '{reader}' may not read table public.fleeting",
        f"publication 'deltaworks_{database.name}' does not exist and role '{reader}' may not create it",
    ]
    with pytest.raises(SourceNotReadyError, match="9 to mend on the server") as caught:
        source.prepare()
    assert all(finding.what in str(caught.value) for finding in found)
    for finding in found:
        database.execute(finding.mend.replace("(…); -- name the columns", "(id)"))
    assert source.check() == []
    source.prepare()
    source.close()


def test_missing_table_and_view_are_named(database: Database) -> None:
    database.execute("create view v as select 1 as id")
    source = database.source("v", "nowhere.t")
    assert [finding.what for finding in source.check()] == [
        "public.v is a view, not a table",
        "table nowhere.t does not exist",
    ]
    source.close()


def test_publication_that_is_not_ours_is_not_changed(database: Database, reader: str) -> None:
    database.execute(
        f"alter role {reader} replication",
        "create table t (id int primary key, v int)",
        "create table u (id int primary key)",
        f"grant select on t, u to {reader}",
        f"create publication deltaworks_{database.name} for table t (v) where (id > 5) with (publish = 'insert')",
    )
    source = source_as(database, reader, "t", "u")
    name = f"publication 'deltaworks_{database.name}'"
    assert [finding.what for finding in source.check()] == [
        f"{name} leaves out some kinds of change",
        f"{name} lacks public.u and role '{reader}' may not add tables to it",
        f"{name} filters the rows of public.t: a dump would read others too",
        f"{name} leaves out key columns of public.t: id",
    ]
    source.close()


def test_table_that_is_new_in_the_configuration_is_published(database: Database) -> None:
    database.execute("create table t (id int primary key)", "create table u (id int primary key)")
    first = database.source("t")
    first.prepare()
    first.close()
    source = database.source("t", "u")
    source.prepare()
    assert database.rows("select tablename::text from pg_publication_tables order by 1") == [("t",), ("u",)]
    source.close()


def test_slot_of_another_plug_in_is_named(database: Database) -> None:
    database.execute(
        "create table t (id int primary key)",
        f"select pg_create_logical_replication_slot('deltaworks_{database.name}', 'test_decoding')",
    )
    source = database.source("t")
    (finding,) = source.check()
    assert "plug-in 'test_decoding'" in finding.what
    database.execute(finding.mend)
    assert source.check() == []
    source.close()


def test_physical_wal_no_free_slot_and_wrong_password(server_folder: Path) -> None:
    with PostgresServer.start(
        server_folder / "replica", settings={"wal_level": "replica", "max_replication_slots": "1", "fsync": "off"}
    ) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("create table t (id int primary key)")
            connection.execute("select pg_create_physical_replication_slot('taken')")
            connection.execute(sql.SQL("create role studio login replication password 's3cret'"))
        config = {"kind": "postgres", "dsn": server.dsn(), "tables": ["t"]}
        source = PostgresSource("studio", PostgresConfig.model_validate(config))
        assert [finding.what for finding in source.check()] == [
            "wal_level is 'replica', not 'logical'",
            "no replication slot is free: all 1 are taken",
        ]
        source.close()
        rules = server.folder / "pg_hba.conf"
        rules.write_text("host all studio 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("select pg_reload_conf()")
        dsn = f"postgresql://studio:wr0ng@127.0.0.1:{server.port}/postgres"
        refused = PostgresSource("studio", PostgresConfig.model_validate({**config, "dsn": dsn}))
        with pytest.raises(SourceNotReadyError, match="password authentication failed") as caught:
            refused.check()
        assert "wr0ng" not in str(caught.value)
