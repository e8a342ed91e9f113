"""What is missing on a server is reported at once, and every mend that is a statement mends it."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from servers.pooler import pooler_before
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import Finding, Severity, SourceNotReadyError
from deltaworks.config import PostgresConfig
from deltaworks.position import START
from deltaworks.testing.postgres import PostgresServer


@pytest.fixture
def reader(database: Database) -> Iterator[str]:
    """A role that may log in and nothing else."""
    role = f"reader_of_{database.name}"
    database.execute(f"create role {role} login")
    yield role
    database.execute(f"drop owned by {role}", f"drop role {role}")


def source_as(database: Database, role: str, *tables: str, **more: str) -> PostgresSource:
    dsn = database.server.dsn(database.name, user=role)
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": tables, **more})
    return PostgresSource(database.name, config)


def errors_of(source: PostgresSource) -> list[Finding]:
    return [finding for finding in source.check() if finding.severity is Severity.ERROR]


def warnings_of(source: PostgresSource) -> list[Finding]:
    return [finding for finding in source.check() if finding.severity is Severity.WARNING]


def test_ready_server_has_no_errors(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    source = database.source("t")
    assert errors_of(source) == []
    source.prepare()
    source.prepare()
    assert errors_of(source) == []
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
    found = errors_of(source)
    assert [finding.what for finding in found] == [
        f"role '{reader}' may not replicate",
        f"role '{reader}' may not read table closed.t",
        "table public.keyless has no primary key: once it is published, the server refuses updates and deletes",
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
        database.execute(finding.mend)
    assert errors_of(source) == []
    source.prepare()
    source.close()


def test_missing_table_and_view_are_named(database: Database) -> None:
    database.execute("create view v as select 1 as id")
    source = database.source("v", "nowhere.t")
    assert [finding.what for finding in errors_of(source)] == [
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
    assert [finding.what for finding in errors_of(source)] == [
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
    (finding,) = errors_of(source)
    assert "plug-in 'test_decoding'" in finding.what
    database.execute(finding.mend)
    assert errors_of(source) == []
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
        assert [finding.what for finding in errors_of(source)] == [
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


def test_tables_that_have_no_changes_to_give_are_named(database: Database) -> None:
    database.execute(
        "create extension if not exists postgres_fdw",
        "create server elsewhere foreign data wrapper postgres_fdw",
        "create foreign table far (id int) server elsewhere",
        "create materialized view kept as select 1 as id",
        "create table wide (id int)",
        "alter table wide replica identity full",
    )
    source = database.source("far", "kept", "wide")
    assert [finding.what for finding in errors_of(source)] == [
        "public.far is a foreign table, not a table",
        "public.kept is a materialized view, not a table",
    ]
    source.close()


def test_settings_that_endanger_a_slot_are_warnings_and_capture_goes_on(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    source = database.source("t")
    what = [finding.what for finding in warnings_of(source)]
    assert [text.partition(":")[0] for text in what] == [
        "max_slot_wal_keep_size is unlimited",
        "role 'postgres' is a superuser",
    ]
    source.prepare()
    source.close()


def test_every_setting_that_endangers_a_slot_is_named_with_its_mend(server_folder: Path) -> None:
    settings = {"wal_sender_timeout": "2s", "logical_decoding_work_mem": "1MB", "fsync": "off"}
    with PostgresServer.start(
        server_folder / "endangered", settings={**settings, "idle_replication_slot_timeout": "60"}
    ) as server:
        config = {"kind": "postgres", "dsn": server.dsn(), "tables": ["t"]}
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("create table t (id int primary key)")
        with PostgresSource("studio", PostgresConfig.model_validate(config)) as source:
            found = warnings_of(source)
        assert [finding.what.partition(":")[0] for finding in found] == [
            "max_slot_wal_keep_size is unlimited",
            "wal_sender_timeout is 2000 ms",
            "idle_replication_slot_timeout is 60 s",
            "logical_decoding_work_mem is 1024 kB",
            "role 'postgres' is a superuser",
        ]
    # The statements are what removes them; settings of the command line would win over them.
    with PostgresServer.start(server_folder / "endangered", settings={"fsync": "off"}) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            for finding in found[:-1]:
                for statement in finding.mend.partition("--")[0].split(";")[:-1]:
                    connection.execute(statement)  # type: ignore[arg-type]
        with PostgresSource("studio", PostgresConfig.model_validate({**config, "dsn": server.dsn()})) as source:
            assert [finding.what.partition(":")[0] for finding in warnings_of(source)] == [
                "role 'postgres' is a superuser"
            ]


def test_generated_columns_that_are_not_sent_are_named(database: Database) -> None:
    database.execute(
        "create table t (id int primary key, double int generated always as (id * 2) stored)",
        f"create publication deltaworks_{database.name} for table t",
    )
    source = database.source("t")
    (finding,) = [each for each in warnings_of(source) if "generated" in each.what]
    assert finding.what == "generated columns of public.t are left out: double"
    with database.connect() as connection:
        version = connection.info.server_version
    if version >= 180000:
        database.execute(finding.mend.partition("--")[0])
        assert not [each for each in warnings_of(source) if "generated" in each.what]
    source.close()


def test_a_connection_that_nobody_protects_is_a_warning(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    dsn = f"host=db.example hostaddr=127.0.0.1 port={database.server.port} dbname={database.name} user=postgres"
    config = {"kind": "postgres", "dsn": f"{dsn} sslmode=prefer", "tables": ["t"]}
    with PostgresSource(database.name, PostgresConfig.model_validate(config)) as source:
        found = [finding.what for finding in warnings_of(source)]
    assert "the connection to 'db.example' is not encrypted (sslmode 'prefer')" in found


def test_no_free_sender_and_a_refused_stream_are_named(server_folder: Path, pytestconfig: pytest.Config) -> None:
    binaries = pytestconfig.getoption("--postgres-binaries")
    with PostgresServer.start(
        server_folder / "senders", settings={"max_wal_senders": "1", "fsync": "off"}, binaries=binaries
    ) as server:
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute("create table t (id int primary key)")
        config = {"kind": "postgres", "dsn": server.dsn(), "tables": ["t"]}
        source = PostgresSource("studio", PostgresConfig.model_validate(config))
        other = PostgresSource("other", PostgresConfig.model_validate(config))
        other.prepare()
        with other.open(resume_after=START):
            assert [finding.what for finding in errors_of(source)] == ["no WAL sender is free: all 1 are taken"]
        source.close()
        other.close()


def test_rows_that_a_policy_hides_are_named_and_the_mend_shows_them(database: Database, reader: str) -> None:
    database.execute(
        "create table t (id int primary key)",
        "alter table t enable row level security",
        "create policy larger on t using (id > 5)",
        f"alter role {reader} replication",
        f"grant select on t to {reader}",
        f"create publication deltaworks_{database.name} for table t",
    )
    with source_as(database, reader, "t") as source:
        (finding,) = errors_of(source)
        assert finding.what.startswith(f"row-level security of public.t hides rows from role '{reader}'")
        database.execute(finding.mend)
        assert errors_of(source) == []


def test_a_pooler_that_takes_no_replication_is_named(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    with pooler_before(database.server.port) as port:
        dsn = f"postgresql://postgres@127.0.0.1:{port}/{database.name}"
        config = {"kind": "postgres", "dsn": dsn, "tables": ["t"]}
        with PostgresSource(database.name, PostgresConfig.model_validate(config)) as source:
            (finding,) = errors_of(source)
    assert finding.what.startswith("a connection for replication is refused: cannot connect source")
    assert "unsupported startup parameter: replication" in finding.what
    assert "not to a pooler" in finding.mend
