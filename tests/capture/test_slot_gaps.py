"""Gaps over a real server: named, never silent, and repaired down to the rows that were deleted."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from capture.replaying import gaps, headers, record, replay, table_of
from servers.postgres import Database

from deltaworks import faults
from deltaworks.capture.postgres.slot import AnotherDatabaseError
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SourceNotReadyError
from deltaworks.log.memory import MemoryLog
from deltaworks.log.watch import Watch
from deltaworks.testing.postgres import PostgresServer

Sources = Callable[..., PostgresSource]

SETUP = (
    "create table t (id int primary key, v text)",
    "insert into t select g, 'v' || g from generate_series(1, 60) g",
)
MISSED = ("delete from t where id <= 20", "update t set v = 'new' where id = 30", "insert into t values (100, 'new')")


class Crash(Exception):  # noqa: N818  it stands for the death of the process
    """The process dies here."""


@pytest.fixture
def sources(database: Database) -> Iterator[Sources]:
    """Makes sources over the test's database and closes them."""
    opened: list[PostgresSource] = []

    def source(*tables: str, **config: object) -> PostgresSource:
        opened.append(database.source(*tables, **config))
        return opened[-1]

    yield source
    for each in opened:
        each.close()


def test_slot_that_is_gone_is_a_named_gap_that_is_repaired(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    reached = log.reader().end().position
    database.execute(f"select pg_drop_replication_slot('deltaworks_{database.name}')", *MISSED)
    record(log, sources("t", chunk_rows=3))
    assert replay(log, "t") == table_of(database, "t")
    (reason,) = gaps(log)
    assert "is gone" in reason
    first = next(header for header in headers(log) if header.progress["gaps"])
    assert first.progress["gaps"][0]["since"] == reached.value
    assert first.position.value == first.progress["gaps"][0]["until"]
    assert not log.reader().end().progress["gaps"], "the alarm ends when all is repaired"
    assert not record(log, sources("t")).reads


def test_slot_that_somebody_moved_is_a_named_gap_that_is_repaired(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute(*MISSED, f"select pg_replication_slot_advance('deltaworks_{database.name}', pg_current_wal_lsn())")
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t")
    assert "is ahead at" in gaps(log)[0]


def test_publication_made_anew_is_a_named_gap_that_is_repaired(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute(f"drop publication deltaworks_{database.name}", *MISSED)
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t")
    assert "publication was dropped and made anew" in gaps(log)[0]


@pytest.mark.parametrize("step", ["capture.before_append", "capture.after_append", "dump.after_mark"])
def test_repair_that_dies_is_taken_up_again(database: Database, sources: Sources, step: str) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute(f"select pg_drop_replication_slot('deltaworks_{database.name}')", *MISSED)

    def crash() -> None:
        raise Crash

    for attempt in range(4):
        passed = iter(range(100))
        faults.arm(step, lambda passed=passed, attempt=attempt: crash() if next(passed) == attempt else None)  # type: ignore[misc]
        with pytest.raises(Crash):
            record(log, sources("t", chunk_rows=3))
    faults.disarm()
    record(log, sources("t", chunk_rows=3))
    assert replay(log, "t") == table_of(database, "t")
    assert gaps(log)
    assert not log.reader().end().progress["gaps"]


@contextmanager
def slot_made_while(database: Database, make: Callable[[], object], *statements: str, written: str) -> Iterator[None]:
    """The slot is made while `statements` are committed; what is `written` then is committed when it is there.

    PostgreSQL takes no note of what is committed before a new slot has met every transaction of its beginning, so it
    would decode what is `written` by the catalog before the `statements`.
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor())
        first, second, third = (stack.enter_context(database.connect()) for _ in range(3))

        def write(connection: psycopg.Connection[Any], statement: str) -> int:
            connection.execute("begin")
            connection.execute(statement)  # type: ignore[arg-type]  # ours
            (row,) = connection.execute("select pg_current_xact_id()::text").fetchall()
            return int(row[0])

        is_made = threading.Event()
        faults.arm("slot.after_create", is_made.set)
        running = write(first, "insert into other values (1)")
        made = pool.submit(make)
        wait_until(lambda: waits_for(database, running))
        running = write(second, "insert into other values (2)")
        database.execute(*statements)
        first.execute("commit")
        wait_until(lambda: waits_for(database, running))
        write(third, written)
        second.execute("commit")
        wait_until(lambda: is_made.is_set() or made.done())
        third.execute("commit")
        made.result(timeout=60)
        yield


def waits_for(database: Database, transaction: int) -> bool:
    """Whether somebody waits for a transaction to end."""
    waiting = "select 1 from pg_locks where locktype = 'transactionid' and not granted and transactionid = '{}'"
    return bool(database.rows(waiting.format(transaction)))


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError(f"{condition} did not come true in 60 s")


def test_slot_whose_log_the_server_cannot_decode_is_a_named_gap(database: Database, sources: Sources) -> None:
    log, name = MemoryLog(), f"deltaworks_{database.name}"
    database.execute(*SETUP, "create table other (id int)", f"create publication {name} for table t")
    make = partial(database.execute, f"select pg_create_logical_replication_slot('{name}', 'pgoutput')")
    with slot_made_while(database, make, "truncate t", written="insert into t values (200, 'late')"):
        record(log, sources("t", chunk_rows=3))
    assert replay(log, "t") == table_of(database, "t")
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t")


def test_table_that_is_altered_while_its_slot_is_made_comes_with_the_new_column(
    database: Database, sources: Sources
) -> None:
    log = MemoryLog()
    database.execute(*SETUP, "create table other (id int)")
    with slot_made_while(
        database,
        partial(record, log, sources("t")),
        "alter table t add w int",
        written="insert into t values (200, 'late', 7)",
    ):
        assert replay(log, "t") == table_of(database, "t")
    assert replay(log, "t")[(200,)]["w"] == 7


@pytest.mark.server
def test_log_that_the_server_recycled_is_a_named_gap_that_is_repaired(
    server_folder: Path, request: pytest.FixtureRequest
) -> None:
    settings = {"fsync": "off", "max_slot_wal_keep_size": "16MB", "min_wal_size": "32MB", "max_wal_size": "32MB"}
    binaries = request.config.getoption("--postgres-binaries")
    with PostgresServer.start(server_folder / "recycling", settings=settings, binaries=binaries) as server:
        database, log = Database(server, "postgres"), MemoryLog()
        database.execute(*SETUP)
        with database.source("t") as source:
            record(log, source)
        database.execute(*MISSED)
        for _ in range(6):
            database.execute("select pg_logical_emit_message(false, 'x', repeat('x', 16000000))", "checkpoint")
        assert database.rows("select wal_status from pg_replication_slots") == [("lost",)]
        with database.source("t") as source:
            record(log, source)
        assert replay(log, "t") == table_of(database, "t")
        assert "the server recycled log" in gaps(log)[0]


@pytest.mark.server
def test_another_database_cluster_is_refused_whatever_its_slot_says(
    database: Database, sources: Sources, server_folder: Path, request: pytest.FixtureRequest
) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    binaries = request.config.getoption("--postgres-binaries")
    with PostgresServer.start(server_folder / "another", settings={"fsync": "off"}, binaries=binaries) as server:
        another = Database(server, "postgres")
        another.execute(*SETUP)
        with another.source("t") as source, pytest.raises(AnotherDatabaseError, match=r"cluster '.*' and .* leads to"):
            record(log, source)


def test_log_that_the_server_keeps_for_the_slot_raises_an_alarm(
    database: Database, sources: Sources, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute("select pg_logical_emit_message(false, 'x', repeat('x', 2000000))")
    record(log, sources("t", slot_alarm_bytes=1_000_000))
    assert "the source keeps much log for the slot" in capsys.readouterr().out


def test_slot_that_stands_while_other_log_passes_is_moved_by_a_heartbeat(database: Database, sources: Sources) -> None:
    database.execute(*SETUP)
    source = sources("t")
    record(MemoryLog(), source)
    beats: list[str] = []
    now = [0.0]
    watch = Watch(source=source, reader=MemoryLog().reader(), write_mark=lambda: beats.append("beat"), clock=now.pop)
    for at in (0.0, 100.0, 200.0):
        now[:] = [at, at]
        database.execute("select pg_logical_emit_message(false, 'x', repeat('x', 17000000))")
        watch.look()
    assert beats, "the slot stood still while 17 MB passed"


def test_publication_by_partition_names_is_refused_for_a_partitioned_table(
    database: Database, sources: Sources
) -> None:
    name = f"deltaworks_{database.name}"
    database.execute(
        "create table m (id int primary key) partition by list (id)",
        f"create publication {name} for table m with (publish_via_partition_root = false)",
    )
    with pytest.raises(SourceNotReadyError, match="publish_via_partition_root = true"):
        record(MemoryLog(), sources("m"))


def test_slot_of_an_older_server_is_made_one_that_standbys_keep(database: Database, sources: Sources) -> None:
    if database.rows("select current_setting('server_version_num')::int >= 170000") != [(True,)]:
        pytest.skip("standbys keep slots from PostgreSQL 17 on")
    name = f"deltaworks_{database.name}"
    database.execute(*SETUP, f"select pg_create_logical_replication_slot('{name}', 'pgoutput')")
    record(MemoryLog(), sources("t"))
    assert database.rows(f"select failover from pg_replication_slots where slot_name = '{name}'") == [(True,)]
