"""Streams of a real server: large transactions before their end, and both ways to the bytes."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from servers.postgres import Database

from deltaworks import faults
from deltaworks.capture.postgres.catalog import describe_relation
from deltaworks.capture.postgres.columnar import SliceBuilder
from deltaworks.capture.postgres.connect import connect
from deltaworks.capture.postgres.relations import Relations
from deltaworks.capture.postgres.replication import PostgresStream
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.postgres.wire import LibpqWire, SocketWire, Wire
from deltaworks.capture.source import Slice
from deltaworks.log import recorder
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.verify import verify_log
from deltaworks.position import START, Lsn


@pytest.fixture
def source(database: Database) -> Iterator[PostgresSource]:
    """A source whose server streams a transaction once it is larger than 64 kB."""
    database.execute(
        f"alter database {database.name} set logical_decoding_work_mem = '64kB'",
        "create table t (id int primary key, v text)",
    )
    with database.source("t") as source:
        source.prepare()
        yield source


def up_to_mark(stream: PostgresStream, mark: str) -> list[Slice]:
    slices: list[Slice] = []
    while not slices or slices[-1].mark != mark:
        taken = stream.next(timeout_s=20, max_changes=1000)
        assert taken is not None, "the mark never came"
        slices.append(taken)
    return slices


def rows(slices: list[Slice]) -> list[dict[str, Any]]:
    return [row for taken in slices for batch in taken.batches for row in batch.rows.to_pylist()]


def test_large_transaction_comes_at_its_commit_without_what_was_rolled_back(
    database: Database, source: PostgresSource
) -> None:
    with source.open(resume_after=START) as stream:
        with database.connect() as writer, database.connect() as other:
            writer.execute("begin; insert into t select g, 'kept ' || g from generate_series(1, 20000) g")
            writer.execute("savepoint s; insert into t select g, 'gone' from generate_series(20001, 40000) g")
            writer.execute("rollback to s; insert into t select g, 'late' from generate_series(40001, 60000) g")
            other.execute("insert into t values (0, 'first')")
            source.mark("between")
            before = up_to_mark(stream, "between")
            writer.execute("commit")
        source.mark("after")
        after = up_to_mark(stream, "after")
    assert [row["id"] for row in rows(before)] == [0]
    found = rows(after)
    assert [row["id"] for row in found] == [*range(1, 20001), *range(40001, 60001)]
    assert [row["_ordinal"] for row in found] == list(range(40_000))
    assert len({(row["_commit"], row["_txid"], row["_committed_at"]) for row in found}) == 1
    run = [taken for taken in after if taken.batches]
    assert [taken.is_partial for taken in run[:-1]] == [True] * (len(run) - 1)
    assert {taken.position for taken in run[:-1]} == {before[-1].position}


def test_large_transaction_comes_whole_again_after_a_stream_that_ended_within_it(
    database: Database, source: PostgresSource
) -> None:
    with source.open(resume_after=START) as stream:
        source.mark("start")
        position = up_to_mark(stream, "start")[-1].position
        stream.confirm(position)
        database.execute("insert into t select g, 'v' from generate_series(1, 30000) g")
        while (taken := stream.next(timeout_s=20, max_changes=1000)) is None or not taken.is_partial:
            pass
        assert taken.position == position
    with source.open(resume_after=position) as stream:
        source.mark("end")
        assert [row["id"] for row in rows(up_to_mark(stream, "end"))] == list(range(1, 30001))


def test_both_ways_to_the_bytes_bring_the_same_changes(database: Database, source: PostgresSource) -> None:
    slot = f"deltaworks_{database.name}"
    database.execute(
        "insert into t select g, repeat('x', g % 50) from generate_series(1, 5000) g",
        "update t set v = null where id % 3 = 0",
        "delete from t where id % 7 = 0",
        "insert into t values (-1, repeat('y', 3000000))",
    )
    source.mark("end")

    def read(start: Any) -> list[dict[str, Any]]:
        command = (
            f"START_REPLICATION SLOT {slot} LOGICAL 0/0 (proto_version '2', streaming 'on', "
            f"publication_names '\"deltaworks_{database.name}\"', messages 'true')"
        )
        catalog = connect(SecretStr(database.dsn), name="t", application="t")
        replication = connect(SecretStr(database.dsn), name="t", application="t", replication=True)
        wire: Wire = start(replication, command.encode())
        builder = SliceBuilder(relations=Relations(lambda relation: describe_relation(catalog, relation)))
        with catalog, PostgresStream(connection=replication, wire=wire, builder=builder, durable=START) as stream:
            return rows(up_to_mark(stream, "end"))

    by_libpq = read(LibpqWire.start)
    # The server lets go of the slot a moment after its reader has left.
    with source.open(resume_after=START):
        pass
    by_socket = _once_free(database, lambda: read(SocketWire.start))
    assert by_libpq == by_socket
    assert len(by_socket) > 5000
    assert Lsn(by_socket[-1]["_commit"]) > START


def _once_free(database: Database, action: Any) -> Any:
    statement = "select active_pid is null from pg_replication_slots where database = current_database()"
    for _ in range(200):
        if database.rows(statement) == [(True,)]:
            break
        database.execute("select pg_sleep(0.02)")
    return action()


class _DeathError(Exception):
    """Stands for the end of the process."""


def test_large_transaction_is_in_the_log_once_and_whole_after_a_death_within_it(
    database: Database, source: PostgresSource, tmp_path: Path
) -> None:
    reader = LocalLogReader(tmp_path / "log")
    with LocalLogWriter.open(tmp_path / "log") as writer:
        recorder.drain(source, writer, reader)
        before = reader.end()
        database.execute("insert into t select g, 'v' from generate_series(1, 60000) g")
        parts: list[int] = []

        def die_within() -> None:
            if writer.end().is_partial:
                parts.append(writer.end().sequence)
                assert reader.end() == before
            if len(parts) == 2:
                raise _DeathError

        faults.arm("capture.after_append", die_within)
        with pytest.raises(_DeathError):
            recorder.drain(source, writer, reader)
        faults.disarm()
    assert reader.end() == before
    with LocalLogWriter.open(tmp_path / "log") as writer:
        assert writer.end() == before
        recorder.drain(source, writer, reader)
    groups = list(reader.read(after_sequence=before.sequence))
    ids = [row["id"] for group in groups for batch in group.batches for row in batch.rows.to_pylist()]
    assert ids == list(range(1, 60001))
    assert any(group.header.is_partial for group in groups)
    assert verify_log(reader).is_whole
