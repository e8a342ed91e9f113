"""The recorder over a real server and a real log: nothing lost, nothing repeated, whatever happens."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from log.replay import ops, replay, table_of, wait_until
from servers.postgres import Database

from deltaworks import faults
from deltaworks.capture.postgres.slot import SlotHeldError
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SlotInvalidatedError
from deltaworks.log.change_log import Group, GroupHeader, LogFullError
from deltaworks.log.dumping import DumpProgress
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.memory import MemoryLog, MemoryLogWriter
from deltaworks.log.recorder import drain, follow
from deltaworks.testing.postgres import PostgresServer

DEADLINE_S = 60.0


class Crash(Exception):  # noqa: N818  it stands for the death of the process
    """The process dies here."""


@pytest.fixture
def log() -> MemoryLog:
    return MemoryLog()


@pytest.fixture
def sources(database: Database) -> Iterator[Callable[..., PostgresSource]]:
    """Makes sources over the test's database and closes them."""
    opened: list[PostgresSource] = []

    def source(*tables: str, **config: Any) -> PostgresSource:
        opened.append(database.source(*tables, **config))
        return opened[-1]

    yield source
    for each in opened:
        each.close()


def record(log: MemoryLog, source: PostgresSource) -> Any:
    with log.writer() as writer:
        return drain(source, writer, log.reader())


def test_drain_dumps_every_table_then_brings_changes_only(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute(
        "create table t (id int primary key, v text)",
        "create table empty (id int primary key)",
        "insert into t select g, 'v' || g from generate_series(1, 25) g",
    )
    source = sources("t", "empty", chunk_rows=10)
    seen: list[DumpProgress] = []
    with log.writer() as writer:
        report = drain(source, writer, log.reader(), on_progress=seen.append)
    assert (report.reads, report.changes) == ({"public.t": 25}, 0)
    assert [(str(each.table), each.rows, each.estimated_rows, each.is_done) for each in seen] == [
        ("public.t", 0, 25, False),
        ("public.t", 10, 25, False),
        ("public.t", 20, 25, False),
        ("public.t", 25, 25, True),
        ("public.empty", 0, 0, True),
    ]
    database.execute("update t set v = 'new' where id = 3", "insert into empty values (1)")
    again = record(log, source)
    assert (again.reads, again.changes, again.transactions) == ({}, 2, 2)
    assert replay(log, "t") == table_of(database, "t")
    assert replay(log, "empty") == table_of(database, "empty")


def test_drain_of_an_idle_source_ends_and_adds_no_changes(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    source = sources("t")
    record(log, source)
    offset = log.reader().end().offset
    report = record(log, source)
    assert report.changes == 0
    assert log.reader().end().offset == offset
    assert report.position == log.reader().end().position


def test_position_is_confirmed_only_after_the_log_has_it(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    source = sources("t")
    record(log, source)
    confirmed = "select confirmed_flush_lsn from pg_replication_slots where database = current_database()"
    before = database.rows(confirmed)
    database.execute("insert into t values (1)")
    faults.arm("capture.before_append", _crash)
    with pytest.raises(Crash):
        record(log, source)
    assert database.rows(confirmed) == before
    faults.disarm()
    report = record(log, source)
    assert ops(log) == [("c", 1)]
    assert database.rows(confirmed) == [(str(report.position),)]


def test_table_that_is_new_in_the_configuration_is_dumped(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)", "create table u (id int primary key)")
    database.execute("insert into t values (1)", "insert into u values (2)")
    record(log, sources("t"))
    report = record(log, sources("t", "u"))
    assert report.reads == {"public.u": 1}
    # Taken out, changed meanwhile, and put back: what happened meanwhile is dumped.
    record(log, sources("t"))
    database.execute("update u set id = 3")
    record(log, sources("t"))
    assert record(log, sources("t", "u")).reads == {"public.u": 1}


def test_dump_waits_for_transactions_that_began_before_the_table_was_captured(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)", "create table u (id int primary key)")
    record(log, sources("t"))
    source = sources("t", "u")
    with database.connect() as writer, ThreadPoolExecutor() as pool:
        writer.execute("begin; insert into u values (1)")
        drained = pool.submit(record, log, source)
        wait_until(lambda: bool(database.rows("select from pg_publication_tables where tablename = 'u'")))
        # Other work goes on; it must reach the log while the dump waits.
        database.execute("insert into t values (7)")
        wait_until(lambda: ("c", 7) in ops(log))
        assert not drained.done()
        writer.execute("commit")
        drained.result(timeout=DEADLINE_S)
    assert replay(log, "u") == table_of(database, "u")


def _crash() -> None:
    raise Crash


@pytest.mark.parametrize(
    "step",
    ["capture.before_append", "capture.after_append", "capture.after_confirm", "dump.after_select", "dump.after_mark"],
)
def test_crash_at_any_step_of_a_dump_repeats_at_most_one_chunk(
    database: Database, tmp_path: Path, sources: Callable[..., PostgresSource], step: str
) -> None:
    database.execute("create table t (id int primary key)", "insert into t select generate_series(1, 40)")
    reads: list[int] = []
    crashes = 0
    for attempt in range(1, 20):
        passed = iter(range(100))
        # Dies at the second pass of the step, so every attempt gets on by a chunk.
        faults.arm(step, lambda passed=passed: _crash() if next(passed) == 1 else None)
        with LocalLogWriter.open(tmp_path / "log") as writer:
            database.execute(f"insert into t values ({100 + attempt})")
            try:
                drain(sources("t", chunk_rows=10), writer, LocalLogReader(tmp_path / "log"))
                break
            except Crash:
                crashes += 1
    faults.disarm()
    assert crashes >= 3
    with LocalLogWriter.open(tmp_path / "log") as writer:
        drain(sources("t", chunk_rows=10), writer, LocalLogReader(tmp_path / "log"))
    for group in LocalLogReader(tmp_path / "log").read(after_sequence=-1):
        for batch in group.batches:
            reads += [row["id"] for row in batch.rows.to_pylist() if row["_op"] == "r"]
    assert sorted(set(reads)) == sorted(reads), "the log holds a chunk once: cursor and rows are one write"
    assert set(range(1, 41)) <= set(reads)
    stored = [
        row["id"]
        for group in LocalLogReader(tmp_path / "log").read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
    ]
    assert set(stored) == set(table_of(database, "t"))


def test_mark_of_a_dead_run_is_ignored(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    faults.arm("dump.after_mark", _crash)
    for _ in range(3):
        with pytest.raises(Crash):
            record(log, sources("t"))
    faults.disarm()
    database.execute("update t set id = 2", "select pg_logical_emit_message(true, 'deltaworks.mark', 'of nobody')")
    record(log, sources("t"))
    assert replay(log, "t") == {2: {"id": 2}}


def test_large_values_survive_a_dump_among_writers(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute(
        "create table t (id int primary key, v int, plot text)",
        "alter table t alter plot set storage external",
        "insert into t select g, 0, repeat(g::text, 3000) from generate_series(1, 30) g",
    )
    source = sources("t", chunk_rows=10)
    # Between SELECT and mark: changed without the large column, moved, deleted, replaced.
    statements = iter(
        [
            "update t set v = 1 where id = 1",
            "update t set id = 100 where id = 12",
            "update t set id = 2000 where id = 25; update t set id = 2 where id = 2000 and false",
            "delete from t where id = 26",
        ]
    )
    faults.arm("dump.after_select", lambda: _run_next(database, statements))
    record(log, source)
    faults.disarm()
    # A row that moves from what is still to be read to what was read already.
    assert replay(log, "t") == table_of(database, "t")


def test_row_that_moves_behind_the_cursor_keeps_its_large_value(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute(
        "create table t (id int primary key, v int, plot text)",
        "alter table t alter plot set storage external",
        "insert into t select g * 10, 0, repeat(g::text, 3000) from generate_series(1, 30) g",
    )
    statements = iter(["select 1", "update t set id = 5 where id = 290"])
    faults.arm("dump.after_select", lambda: _run_next(database, statements))
    record(log, sources("t", chunk_rows=10))
    assert replay(log, "t") == table_of(database, "t")
    assert ("r", 5) in ops(log)


def _run_next(database: Database, statements: Iterator[str]) -> None:
    with suppress(StopIteration):
        database.execute(*next(statements).split("; "))


def test_dump_among_concurrent_writers_ends_with_the_table(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute(
        "create table t (id int primary key, v int not null default 0, plot text)",
        "alter table t alter plot set storage external",
        "insert into t select g, 0, repeat(g::text, 1200) from generate_series(1, 400) g",
    )
    stop = threading.Event()

    def write(seed: int) -> int:
        done = 0
        with database.connect() as connection:
            connection.execute("select setseed(%s)", [seed / 10])
            while not stop.is_set():
                for statement in (
                    "update t set v = v + 1 where id = 1 + floor(random() * 400)",
                    "update t set plot = repeat(v::text, 2000), v = v + 1 where id = 1 + floor(random() * 400)",
                    "delete from t where id = 1 + floor(random() * 400)",
                    "insert into t values (1 + floor(random() * 450), 0, repeat('n', 2500)) on conflict do nothing",
                    "update t set id = id + 1000 where id = 1 + floor(random() * 400)",
                    "update t set id = id - 1000 where id = (select id from t where id > 1000 limit 1) "
                    "and not exists (select from t u where u.id = t.id - 1000)",
                ):
                    with suppress(psycopg.errors.UniqueViolation, psycopg.errors.DeadlockDetected):
                        connection.execute(statement)
                    done += 1
        return done

    with ThreadPoolExecutor() as pool:
        writers = [pool.submit(write, seed) for seed in range(3)]
        try:
            # The drain must end while they write.
            report = record(log, sources("t", chunk_rows=20))
        finally:
            stop.set()
        assert all(each.result(timeout=DEADLINE_S) > 0 for each in writers)
    record(log, sources("t", chunk_rows=20))
    assert report.changes > 0
    assert replay(log, "t") == table_of(database, "t")


@pytest.mark.parametrize("dies", [False, True], ids=["in one run", "over a crash"])
def test_commit_that_is_logged_but_not_visible_yet_wins_over_the_dump(server_folder: Path, dies: bool) -> None:
    """A commit that waits for a synchronous standby is in the stream while a SELECT shows the row before it."""
    with PostgresServer.start(server_folder / f"standby-{dies}", settings={"fsync": "off"}) as server:
        database, log = Database(server, "postgres"), MemoryLog()
        database.execute("create table t (id int primary key, v text)")
        database.execute("insert into t values (1, 'old'), (2, 'old'), (3, 'old')")
        first, second = database.source("t", chunk_rows=1), database.source("t", chunk_rows=1)
        passed = iter(range(100))
        with ThreadPoolExecutor() as pool:
            stalled: list[Any] = []

            def at_select() -> None:
                if next(passed) == 0:
                    database.execute("alter system set synchronous_standby_names = 'nobody'", "select pg_reload_conf()")
                    wait_until(lambda: database.rows("show synchronous_standby_names") == [("nobody",)])
                    stalled.append(pool.submit(database.execute, "update t set v = 'new' where id = 3"))
                    wait_until(lambda: bool(database.rows("select from pg_stat_activity where wait_event = 'SyncRep'")))
                elif dies:
                    raise Crash

            faults.arm("dump.after_select", at_select)
            try:
                if dies:
                    with pytest.raises(Crash):
                        record(log, first)
                    faults.disarm()
                record(log, second)
                # The whole dump was read while the old row was what a SELECT shows.
                assert database.rows("select v from t where id = 3") == [("old",)]
                assert sorted(ops(log)) == [("r", 1), ("r", 2), ("u", 3)]
            finally:
                first.close()
                second.close()
                database.execute("alter system reset synchronous_standby_names", "select pg_reload_conf()")
            stalled[0].result(timeout=DEADLINE_S)
        assert replay(log, "t") == table_of(database, "t")


def test_slot_ahead_of_the_log_stops_capture(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    source = sources("t", on_gap="stop")
    record(log, source)
    database.execute(
        "insert into t values (1)",
        f"select pg_replication_slot_advance('deltaworks_{database.name}', pg_current_wal_lsn())",
    )
    with pytest.raises(SlotInvalidatedError, match="is ahead"):
        record(log, source)


def test_slot_that_is_gone_is_never_replaced_in_silence(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    source = sources("t", on_gap="stop")
    record(log, source)
    database.execute(f"select pg_drop_replication_slot('deltaworks_{database.name}')", "insert into t values (1)")
    with pytest.raises(SlotInvalidatedError):
        record(log, source)


def test_second_reader_of_a_slot_is_refused(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    stop = threading.Event()
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, sources("t"), writer, log.reader(), stop=stop)
        try:
            wait_until(lambda: log.reader().end().sequence >= 0)
            with pytest.raises(SlotHeldError, match="process"):
                record(MemoryLog(), sources("t"))
        finally:
            stop.set()
        service.result(timeout=DEADLINE_S)


class FullWriter(MemoryLogWriter):
    """A real writer whose disk is full for the first appends."""

    full_for = 3

    def append(self, group: Group) -> GroupHeader:
        if group.batches and self.full_for:
            self.full_for -= 1
            raise LogFullError("no space left on the device")
        return super().append(group)


def test_full_log_loses_nothing(database: Database, log: MemoryLog, sources: Callable[..., PostgresSource]) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    writer = FullWriter(log, epoch=1)
    drain(sources("t"), writer, log.reader())
    assert writer.full_for == 0
    assert ops(log) == [("r", 1)]


def test_service_follows_and_survives_a_restart_of_the_server(server_folder: Path) -> None:
    folder = server_folder / "restarted"
    server = PostgresServer.start(folder, settings={"fsync": "off"})
    database = Database(server, "postgres")
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    log, stop = MemoryLog(), threading.Event()
    source = database.source("t")
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, source, writer, log.reader(), stop=stop)
        try:
            wait_until(lambda: ("r", 1) in ops(log))
            database.execute("insert into t values (2)")
            wait_until(lambda: ("c", 2) in ops(log))
            began_at = time.monotonic()
            server.stop()
            # An orderly stop waits until the reader has confirmed everything.
            assert time.monotonic() - began_at < 10
            server = PostgresServer.start(folder, port=server.port, settings={"fsync": "off"})
            Database(server, "postgres").execute("insert into t values (3)")
            wait_until(lambda: ("c", 3) in ops(log))
            server.kill()
            server = PostgresServer.start(folder, port=server.port, settings={"fsync": "off"})
            Database(server, "postgres").execute("delete from t where id = 1")
            wait_until(lambda: ("d", 1) in ops(log))
        finally:
            stop.set()
            report = service.result(timeout=DEADLINE_S)
            source.close()
    server.stop()
    assert ops(log) == [("r", 1), ("c", 2), ("c", 3), ("d", 1)]
    assert (report.changes, report.reads) == (3, {"public.t": 1})


def test_idle_service_lets_the_server_forget_what_other_tables_wrote(
    database: Database, log: MemoryLog, sources: Callable[..., PostgresSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.log.recorder.EMPTY_GROUP_EVERY_S", 0.05)
    database.execute("create table t (id int primary key)", "create table noise (id int)")
    stop = threading.Event()
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, sources("t"), writer, log.reader(), stop=stop)
        try:
            wait_until(lambda: log.reader().end().sequence >= 0)
            database.execute("insert into noise select generate_series(1, 1000)")
            ((written,),) = database.rows("select pg_current_wal_lsn()::text")
            behind = (
                f"select confirmed_flush_lsn < '{written}' from pg_replication_slots "
                "where database = current_database()"
            )
            wait_until(lambda: database.rows(behind) == [(False,)])
        finally:
            stop.set()
        service.result(timeout=DEADLINE_S)
    assert log.reader().end().offset == 0
