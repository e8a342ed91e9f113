"""Writers that do to a table whatever a dump must survive."""

import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress

import psycopg
from servers.postgres import Database

MADE = (
    "create table t (id int primary key, v int not null default 0, plot text)",
    "alter table t alter plot set storage external",
)
STATEMENTS = (
    "update t set v = v + 1 where id = {key}",
    "update t set v = v + 1 where id = {key}",
    "update t set v = v + 1, plot = repeat(v::text, 2000) where id = {key}",
    "delete from t where id = {key}",
    "insert into t values ({key}, 0, repeat('n', 2500)) on conflict do nothing",
    "insert into t values ({key}, 0, repeat('m', 2500)) on conflict (id) do update set v = t.v + 1",
    "update t set id = {other} where id = {key}",
    "update t set id = {other} where id = {key}",
    "begin; update t set v = -1 where id = {key}; rollback",
    "begin; update t set id = {other} where id = {key}; update t set v = v + 1 where id = {other}; commit",
)
TRUNCATES = (
    "begin; truncate t; insert into t select g, 0, repeat(g::text, 1200) from generate_series(1, {count}) g; commit"
)


@contextmanager
def writing(
    database: Database,
    *,
    seed: int,
    count: int,
    writers: int = 3,
    stalled: int = 0,
    truncates: bool = False,
    commit: str = "on",
) -> Iterator[list[Future[int]]]:
    """Random statements on keys 1 to `count`, over connections of their own, until the end of the context.

    `stalled` of the writers commit as `commit` says, synchronously, so that where a standby is waited for their
    commits are in the log long before anybody sees them; each gives up waiting after a moment, as a client that is
    gone does.
    """
    stop = threading.Event()

    def write(number: int) -> int:
        chance, done = random.Random(seed * 1000 + number), 0
        how = commit if number < stalled else "local"
        with database.connect(options=f"-c synchronous_commit={how} -c lock_timeout=2s") as connection:
            while not stop.is_set():
                key, other = chance.randint(1, count), chance.randint(1, count + count // 5)
                statement = chance.choice(STATEMENTS).format(key=key, other=other)
                if truncates and chance.random() < 0.004:
                    statement = TRUNCATES.format(count=count)
                for part in statement.split("; "):
                    try:
                        connection.execute(part)  # type: ignore[arg-type]
                    except psycopg.Error:
                        with suppress(psycopg.Error):
                            connection.execute("rollback")
                        break
                done += 1
        return done

    with ThreadPoolExecutor() as pool:
        running = [pool.submit(write, number) for number in range(writers)]
        try:
            yield running
        finally:
            stop.set()


@contextmanager
def releasing(database: Database, *, every_s: float) -> Iterator[None]:
    """Let commits that wait for a standby go, now and then: their sessions are told to stop waiting."""
    stop = threading.Event()

    def release() -> None:
        with database.connect(options="-c synchronous_commit=local") as connection:
            while not stop.wait(every_s):
                connection.execute("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
            # Whoever commits from now on does not wait.
            connection.execute("alter system reset synchronous_standby_names")
            connection.execute("select pg_reload_conf()")
            for _ in range(40):
                connection.execute("select pg_cancel_backend(pid) from pg_stat_activity where wait_event = 'SyncRep'")
                threading.Event().wait(0.05)

    thread = threading.Thread(target=release)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
