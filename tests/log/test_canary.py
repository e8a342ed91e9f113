"""Canaries: an idle pipe is told apart from a dead one, and the slot moves on a database where nobody writes."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import timedelta

from process.material import wait_until
from servers.postgres import Database

from deltaworks.log.canary import Canary, canary_at
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain, follow
from deltaworks.log.status import read_status
from deltaworks.position import START, Lsn

EVERY_S, PATIENCE_S = 0.05, 60.0


@contextmanager
def captured(database: Database, log: MemoryLog, canary_s: float | None) -> Iterator[None]:
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool, log.writer() as writer, closing(database.source("t")) as source:
        service = pool.submit(follow, source, writer, log.reader(), stop=stop, canary_s=canary_s)
        try:
            yield
        finally:
            stop.set()
            service.result(timeout=PATIENCE_S)


def newest(log: MemoryLog) -> Canary | None:
    return Canary.of(log.reader().end().progress)


def test_canaries_come_through_and_move_the_slot_while_nobody_writes(database: Database) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    log = MemoryLog()
    with captured(database, log, EVERY_S):
        # The row that the first dump reads, and a canary after it.
        wait_until(lambda: log.reader().end().offset == 1, timeout_s=PATIENCE_S)
        wait_until(lambda: newest(log) is not None, timeout_s=PATIENCE_S)
        first = newest(log)
        assert first is not None

        where = f"where slot_name = 'deltaworks_{database.name}'"

        def is_confirmed() -> bool:
            ((confirmed,),) = database.rows(f"select confirmed_flush_lsn from pg_replication_slots {where}")
            return Lsn.parse(confirmed) >= first.position and (newest(log) or first).position > first.position

        wait_until(is_confirmed, timeout_s=PATIENCE_S)
        # Nothing of it is a change.
        assert log.reader().end().offset == 1
        with closing(database.source("t")) as source:
            now = read_status(source, log.reader(), tables=(), service=1)
        assert now.canary is not None
        assert (now.canary.is_overdue, now.canary.took_s >= 0.0) == (False, True)


def test_a_service_that_stands_is_overdue_and_one_that_was_stopped_is_not(database: Database) -> None:
    database.execute("create table t (id int primary key)")
    log = MemoryLog()
    with captured(database, log, EVERY_S):
        wait_until(lambda: newest(log) is not None, timeout_s=PATIENCE_S)

    def is_overdue(service: int | None) -> bool:
        with closing(database.source("t")) as source:
            status = read_status(source, log.reader(), tables=(), service=service)
        assert status.canary is not None
        return status.canary.is_overdue

    # Whoever holds the log now writes nothing: that is what a process that hangs looks like.
    wait_until(lambda: is_overdue(1), timeout_s=PATIENCE_S)
    assert not is_overdue(None)
    # A run of its own says nothing of canaries, and keeps what is known of them.
    known = newest(log)
    with log.writer() as writer, closing(database.source("t")) as source:
        drain(source, writer, log.reader())
    assert newest(log) == known


def test_without_an_interval_there_is_none(database: Database) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    log = MemoryLog()
    with captured(database, log, None):
        wait_until(lambda: log.reader().end().offset == 1, timeout_s=PATIENCE_S)
        assert newest(log) is None


def test_a_place_has_the_newest_canary_that_it_took_and_told_its_sinks_of(database: Database) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    log = MemoryLog()
    seen: dict[int, Canary] = {}
    with captured(database, log, EVERY_S):

        def has_three() -> bool:
            for header in log.reader().headers_backwards():
                if canary := Canary.of(header.progress):
                    seen[header.sequence] = canary
            return len(seen) >= 3

        wait_until(has_three, timeout_s=PATIENCE_S)
    reader = log.reader()
    first, second, third, *_ = sorted(seen)
    end = reader.end()
    assert canary_at(reader, sequence=second, reached=end.position) == seen[second]
    # It was read, and the sinks were not told yet.
    assert canary_at(reader, sequence=third, reached=seen[first].position) == seen[first]
    assert canary_at(reader, sequence=first - 1, reached=end.position) is None
    assert canary_at(reader, sequence=end.sequence, reached=START) is None
    late = seen[third].written_at + timedelta(seconds=10 * EVERY_S)
    assert seen[third].is_overdue(late + timedelta(seconds=seen[third].took_s))
