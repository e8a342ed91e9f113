"""Everything at once: commits that stall at a standby, schema changes, moving keys, large values, deaths.

    primary ──► standby, whose replay is paused and resumed: commits that wait for it are in the stream, and
                nobody sees them yet
    writers     four, on few keys; TRUNCATE now and then      DDL      one of `SCHEMA_CHANGES` at a time
    reader      dumps all the time, dies at random steps and starts again

A few seconds by default; `make stress` runs it for ten minutes, which is thousands of chunks. The seed is printed.
"""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg
import pytest
from log.replay import Row, replay, table_of
from log.test_dump_stress import FAULTS, ROWS, DeadError, filled, finish, keep_asking
from log.writers import writing
from servers.postgres import Database

from deltaworks import faults
from deltaworks.log.dump_requests import DumpRequests
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.recorder import follow
from deltaworks.testing.postgres import PostgresServer

KEPT = ("id", "v", "plot")
"""The columns that no schema change touches: a read must say of them what the log says already."""

SCHEMA_CHANGES = (
    "alter table t add column {new} int default {number}",
    "alter table t add column {new} text",
    "alter table t add column {new} numeric(8,2) not null default 1.5",
    "alter table t drop column {old}",
    "alter table t rename column {old} to {new}",
    "alter table t alter column {old} type text using {old}::text",
    "alter table t replica identity full",
    "alter table t replica identity default",
    "vacuum full t",
)


@dataclass(slots=True)
class DiskLog:
    """A log of files, as a `MemoryLog` is one of memory: minutes of this are gigabytes."""

    folder: Path

    def writer(self) -> LocalLogWriter:
        return LocalLogWriter.open(self.folder)

    def reader(self) -> LocalLogReader:
        return LocalLogReader(self.folder)


@dataclass(slots=True)
class Tally:
    """What happened."""

    deaths: int = 0
    schema_changes: int = 0
    pauses: int = 0
    reads: Counter[str] = field(default_factory=Counter)


@contextmanager
def stalling(standby: Database, primary: Database, tally: Tally, chance: random.Random) -> Iterator[None]:
    """Pause and resume the standby's replay; afterwards nobody waits for it."""
    stop = threading.Event()

    def work() -> None:
        with standby.connect() as connection:
            while not stop.wait(chance.uniform(0.02, 0.2)):
                connection.execute("select pg_wal_replay_pause()")
                tally.pauses += 1
                stop.wait(chance.uniform(0.05, 0.5))
                connection.execute("select pg_wal_replay_resume()")

    with ThreadPoolExecutor() as pool:
        running = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            running.result(timeout=30)
            primary.execute("alter system set synchronous_standby_names = ''", "select pg_reload_conf()")


@contextmanager
def changing_schema(database: Database, tally: Tally, chance: random.Random, *, every_s: float) -> Iterator[None]:
    """Change the table's shape now and then; most changes have it dumped anew."""
    stop = threading.Event()

    def work() -> None:
        columns: list[str] = []
        with database.connect(options="-c synchronous_commit=local -c lock_timeout=1s") as connection:
            while not stop.wait(chance.uniform(0.2, 1.8) * every_s):
                new, old = f"x{tally.schema_changes}", chance.choice(columns) if columns else None
                statement = chance.choice(SCHEMA_CHANGES)
                if ("{old}" in statement and old is None) or ("add column" in statement and len(columns) > 5):
                    continue
                with suppress(psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    connection.execute(statement.format(new=new, old=old, number=tally.schema_changes))  # type: ignore[arg-type]
                    tally.schema_changes += 1
                    if "{old}" in statement and "type" not in statement:
                        columns.remove(old or "")
                    if "{new}" in statement:
                        columns.append(new)

    with ThreadPoolExecutor() as pool:
        running = pool.submit(work)
        try:
            yield
        finally:
            stop.set()
            running.result(timeout=30)


def record(
    database: Database, log: DiskLog, requests: DumpRequests, tally: Tally, *, seconds: float, seed: int
) -> None:
    """A service that dumps all the time, dies at random steps and starts again, for so long."""
    chance, stop, over = random.Random(seed), threading.Event(), threading.Event()
    timer = threading.Timer(seconds, over.set)
    timer.start()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(keep_asking, requests, stop, random.Random(seed + 1))
        try:
            while not over.is_set():
                # A start takes as long as many steps, so a run of some minutes is not all starts.
                left = iter(range(chance.randint(1, 20 if seconds < 30 else 300), -1, -1))
                faults.arm(chance.choice(FAULTS), lambda left=left: die() if next(left, 0) == 0 else None)
                with database.source("t", name="stress", chunk_rows=10) as source, log.writer() as writer:
                    try:
                        follow(source, writer, log.reader(), stop=over, requests=requests)
                    except DeadError:
                        tally.deaths += 1
        finally:
            timer.cancel()
            faults.disarm()
            stop.set()
            asking.result(timeout=10)


def die() -> None:
    raise DeadError


def wrong_reads(log: DiskLog, tally: Tally) -> Iterator[str]:
    """Reads that say something else than what the log has said of their row before, once it has all rows.

    The log has every commit before a chunk's mark, so what is read there is the state that it has reached.
    """
    rows: dict[Any, Row] = {}
    is_whole = False
    for group in log.reader().read(after_sequence=-1):
        for batch in group.batches:
            is_read = batch.rows.column("_op")[0].as_py() == "r"
            tally.reads["chunks"] += is_read
            tally.reads["rows" if is_read else "changes"] += len(batch)
            for row in batch.rows.to_pylist():
                if row["_op"] == "t":
                    rows.clear()
                    continue
                had = rows.pop((row["_old_key"] or row)["id"], None)
                if row["_op"] == "d":
                    continue
                unsent = row["_unchanged"] or ()
                now = {name: (had or {}).get(name) if name in unsent else row[name] for name in KEPT}
                if row["_op"] == "r" and is_whole:
                    if had is None:
                        yield f"{row['id']} came back at {row['_commit']}"
                    elif any(had[name] not in (None, now[name]) for name in KEPT):
                        yield f"{row['id']} is stale at {row['_commit']}"
                rows[row["id"]] = now
        dumps = group.header.progress["dumps"]
        is_whole = is_whole or (bool(dumps) and all(dump["state"] == "done" for dump in dumps.values()))


@pytest.mark.slow
def test_dumps_among_stalls_schema_changes_and_deaths_end_with_the_table(
    server_folder: Path, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.log.dumping.BLOCKED_S", 0.1)
    monkeypatch.setattr("deltaworks.log.watch.LOOK_EVERY_S", 1.0)
    seconds, tally = float(pytestconfig.getoption("--dump-seconds")), Tally()
    seed = int(pytestconfig.getoption("--dump-seed") or random.SystemRandom().randint(100, 1 << 30))
    print("seed", seed)  # noqa: T201  to run a failure again
    binaries = pytestconfig.getoption("--postgres-binaries")
    settings = {"fsync": "off", "max_connections": "40"}
    with (
        PostgresServer.start(server_folder / f"endured-{seed}", settings=settings, binaries=binaries) as server,
        server.start_standby(server_folder / f"beside-{seed}", binaries=binaries) as standby,
    ):
        database, log, requests = Database(server, "postgres"), DiskLog(tmp_path / "log"), DumpRequests(tmp_path / "d")
        local = Database(server, "postgres?options=-c%20synchronous_commit%3Dlocal")
        filled(local)
        database.execute("alter system set synchronous_standby_names = '*'", "select pg_reload_conf()")
        with (
            stalling(Database(standby, "postgres"), local, tally, random.Random(seed + 2)),
            changing_schema(database, tally, random.Random(seed + 3), every_s=min(4.0, seconds / 10)),
            writing(local, seed=seed, count=ROWS, writers=4, stalled=2, truncates=True, commit="remote_apply") as done,
        ):
            record(local, log, requests, tally, seconds=seconds, seed=seed)
        changes = sum(each.result(timeout=60) for each in done)
        finish(local, log, requests)
        wrong = list(wrong_reads(log, tally))
        print("deaths", tally.deaths, "schema changes", tally.schema_changes, "pauses", tally.pauses)  # noqa: T201
        print("statements", changes, *(f"{name} {count}" for name, count in tally.reads.items()))  # noqa: T201
        assert not wrong, wrong[:5]
        assert min(changes, tally.schema_changes, tally.pauses, tally.reads["chunks"]) > 0
        source = table_of(local, "t")
        found = replay(log, "t")  # type: ignore[arg-type]  # it has what is asked of it
        names = next(iter(source.values()), {}).keys()
        # What the table had once is no more asked for; a column that came later was empty before.
        assert {key: {name: row.get(name) for name in names} for key, row in found.items()} == source
