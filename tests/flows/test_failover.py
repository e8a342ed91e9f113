"""The source's server dies and its standby is promoted: nothing is lost, or what is lost is named and repaired."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from capture.replaying import gaps, record, replay, table_of
from flows.readers import wait
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.config import PostgresConfig
from deltaworks.log.memory import MemoryLog
from deltaworks.testing.postgres import PostgresServer

SETTINGS = {"fsync": "off"}


@pytest.fixture
def binaries(pytestconfig: pytest.Config) -> Path | None:
    folder: Path | None = pytestconfig.getoption("--postgres-binaries")
    return folder


@pytest.fixture
def primary(server_folder: Path, request: pytest.FixtureRequest, binaries: Path | None) -> Iterator[PostgresServer]:
    """A server with a table, which a test may kill."""
    folder = server_folder / f"primary_{abs(hash(request.node.name)) % 10_000}"
    with PostgresServer.start(folder, settings=SETTINGS, binaries=binaries) as server:
        Database(server, "postgres").execute(
            "create table t (id int primary key, v text)",
            "insert into t select g, 'v' from generate_series(1, 50) g",
        )
        yield server


def source_over(*servers: PostgresServer) -> PostgresSource:
    """A source that finds the server which takes writes, as libpq does."""
    hosts, ports = ",".join("127.0.0.1" for _ in servers), ",".join(str(server.port) for server in servers)
    dsn = f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write sslmode=disable"
    return PostgresSource("shop", PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]}))


def is_caught_up(primary: PostgresServer, standby: PostgresServer) -> bool:
    """Whether the standby has all log of the primary."""
    (position,) = Database(primary, "postgres").rows("select pg_current_wal_flush_lsn()")[0]
    return Database(standby, "postgres").rows(f"select pg_last_wal_replay_lsn() >= '{position}'") == [(True,)]


def synchronize_slot(primary: PostgresServer, standby: PostgresServer) -> bool:
    """Help the standby to copy the slot; whether the copy would outlive the primary."""
    Database(primary, "postgres").execute("select pg_log_standby_snapshot()")
    copy = Database(standby, "postgres")
    slots = "select count(*) from pg_replication_slots where synced and not temporary and invalidation_reason is null"
    return copy.rows(slots) == [(1,)]


def test_promoted_standby_that_has_the_slot_goes_on_without_a_gap(
    primary: PostgresServer, server_folder: Path, binaries: Path | None
) -> None:
    database, log = Database(primary, "postgres"), MemoryLog()
    if database.rows("select current_setting('server_version_num')::int >= 170000") != [(True,)]:
        pytest.skip("standbys keep slots from PostgreSQL 17 on")
    settings = {**SETTINGS, "sync_replication_slots": "on"}
    with primary.start_standby(server_folder / "keeps_slots", settings=settings, binaries=binaries) as standby:
        source = source_over(primary, standby)
        record(log, source)
        assert database.rows("select failover from pg_replication_slots where slot_type = 'logical'") == [(True,)]

        def is_kept() -> bool:
            record(log, source)
            return synchronize_slot(primary, standby)

        wait(is_kept, what="the copy of the slot", timeout_s=60)
        database.execute("insert into t values (101, 'captured')")
        record(log, source)
        database.execute("insert into t values (102, 'not captured')", "delete from t where id = 1")
        wait(lambda: is_caught_up(primary, standby), what="replication")
        source.close()
        primary.kill()
        standby.promote()
        promoted = Database(standby, "postgres")
        promoted.execute("update t set v = 'promoted' where id = 2")
        report = record(log, source)
        source.close()
        assert not report.reads, "nothing had to be dumped again"
        assert gaps(log) == []
        assert replay(log, "t") == table_of(promoted, "t")


def test_slot_that_did_not_follow_is_a_named_gap_that_is_repaired(
    primary: PostgresServer, server_folder: Path, binaries: Path | None
) -> None:
    database, log = Database(primary, "postgres"), MemoryLog()
    with primary.start_standby(server_folder / "without_slot", settings=SETTINGS, binaries=binaries) as standby:
        source = source_over(primary, standby)
        record(log, source)
        database.execute("insert into t values (102, 'not captured')", "delete from t where id = 1")
        wait(lambda: is_caught_up(primary, standby), what="replication")
        source.close()
        primary.kill()
        standby.promote()
        record(log, source)
        source.close()
        assert "is gone" in gaps(log)[0]
        assert replay(log, "t") == table_of(Database(standby, "postgres"), "t")


def test_what_was_captured_from_a_primary_and_never_reached_its_standby_is_taken_back(
    primary: PostgresServer, server_folder: Path, binaries: Path | None
) -> None:
    database, log = Database(primary, "postgres"), MemoryLog()
    with primary.start_standby(server_folder / "promoted", settings=SETTINGS, binaries=binaries) as standby:
        source = source_over(primary, standby)
        record(log, source)
        wait(lambda: is_caught_up(primary, standby), what="replication")
        port = standby.port
        standby.stop()
        database.execute("insert into t values (101, 'never replicated')", "delete from t where id = 1")
        record(log, source)
        source.close()
        primary.kill()
    with PostgresServer.start(server_folder / "promoted", port=port, settings=SETTINGS, binaries=binaries) as standby:
        standby.promote()
        promoted = Database(standby, "postgres")
        promoted.execute("insert into t values (103, 'promoted')")
        record(log, source)
        source.close()
        assert "left timeline 1 at" in gaps(log)[0]
        rows = replay(log, "t")
        assert rows == table_of(promoted, "t")
        assert (101,) not in rows
        assert (1,) in rows
        # What comes after the repair has larger positions than all that was taken back.
        promoted.execute("update t set v = 'after' where id = 1")
        record(log, source)
        source.close()
        assert replay(log, "t") == table_of(promoted, "t")
