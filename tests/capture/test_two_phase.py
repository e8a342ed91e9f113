"""Two-phase commits: what was prepared comes at its COMMIT PREPARED, whole and once, or never."""

from collections.abc import Iterator
from typing import Any

import pytest
from capture.replaying import record, replay, table_of
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.log.memory import MemoryLog

SMALL, LARGE = 3, 5_000
"""Rows of a transaction; the server streams the larger before its end."""


@pytest.fixture
def source(database: Database) -> Iterator[PostgresSource]:
    database.execute(
        f"alter database {database.name} set logical_decoding_work_mem = '64kB'",
        "create table t (id int primary key, v text)",
    )
    with database.source("t") as source:
        yield source
    # A database with a prepared transaction cannot be dropped.
    for (left,) in database.rows("select gid from pg_prepared_xacts where database = current_database()"):
        database.execute(f"rollback prepared '{left}'")


def prepare(database: Database, gid: str, *, first: int, count: int) -> None:
    """Prepare a transaction that inserts so many rows and rolls some back within."""
    name = f"{database.name}_{gid}"
    with database.connect() as connection:
        connection.execute("begin")
        connection.execute(f"insert into t select g, '{gid}' from generate_series({first}, {first + count - 1}) g")  # type: ignore[arg-type]
        connection.execute("savepoint s")
        connection.execute(f"insert into t select -g, 'gone' from generate_series({first}, {first + count - 1}) g")  # type: ignore[arg-type]
        connection.execute("rollback to s")
        connection.execute(f"prepare transaction '{name}'")  # type: ignore[arg-type]


def finish(database: Database, how: str, gid: str) -> None:
    database.execute(f"{how} prepared '{database.name}_{gid}'")


def streamed(log: MemoryLog) -> list[dict[str, Any]]:
    """The inserts in the log, in order."""
    return [
        row
        for group in log.reader().read(after_sequence=-1)
        for batch in group.batches
        for row in batch.rows.to_pylist()
        if row["_op"] == "c"
    ]


@pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "streamed"])
def test_prepared_transaction_comes_at_its_commit_and_in_the_order_of_commits(
    database: Database, source: PostgresSource, count: int
) -> None:
    log = MemoryLog()
    record(log, source)
    prepare(database, "kept", first=1, count=count)
    prepare(database, "dropped", first=100_001, count=count)
    prepare(database, "late", first=200_001, count=count)
    database.execute("insert into t values (0, 'between')")
    record(log, source)
    assert [row["id"] for row in streamed(log)] == [0]
    finish(database, "commit", "late")
    finish(database, "rollback", "dropped")
    database.execute("insert into t values (-1, 'after')")
    finish(database, "commit", "kept")
    record(log, source)
    found = streamed(log)
    assert [row["id"] for row in found] == [
        0,
        *range(200_001, 200_001 + count),
        -1,
        *range(1, 1 + count),
    ]
    for gid in ("kept", "late"):
        rows = [row for row in found if row["v"] == gid]
        assert [row["_ordinal"] for row in rows] == list(range(count))
        assert len({(row["_commit"], row["_txid"], row["_committed_at"]) for row in rows}) == 1
    assert [row["_commit"] for row in found] == sorted(row["_commit"] for row in found)
    assert replay(log, "t") == table_of(database, "t")


@pytest.mark.parametrize("count", [SMALL, LARGE], ids=["small", "streamed"])
def test_prepared_transaction_is_whole_for_a_reader_that_came_after_the_prepare(
    database: Database, source: PostgresSource, count: int
) -> None:
    log = MemoryLog()
    record(log, source)
    prepare(database, "kept", first=1, count=count)
    database.execute("insert into t values (0, 'between')")
    # What is confirmed here lies behind the prepared rows.
    record(log, source)
    with database.source("t") as other:
        finish(database, "commit", "kept")
        record(log, other)
    assert [row["id"] for row in streamed(log)] == [0, *range(1, 1 + count)]
    assert replay(log, "t") == table_of(database, "t")
