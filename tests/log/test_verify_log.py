"""A log is checked against what its reader saw, and the place of any difference is named."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from servers.postgres import Database

from deltaworks.capture.proof import NO_TRANSACTION, BrokenProofError, Proof
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.change_log import Group, LogWriter
from deltaworks.log.header import decode_header
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain
from deltaworks.log.verify import verify_log
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


def batch(ids: list[int], *, commit: int, at: datetime = NOON, txid: int = 7, name: str = "movie") -> ChangeBatch:
    schema = TableSchema(
        name=TableName.parse(name),
        columns=(Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),),
        key=("id",),
    )
    count = len(ids)
    rows = {
        "_op": ["c"] * count,
        "_commit": [commit] * count,
        "_ordinal": list(range(count)),
        "_txid": [txid] * count,
        "_committed_at": [at] * count,
        "_unchanged": [None] * count,
        "_old_key": [None] * count,
        "_as_text": [None] * count,
        "id": ids,
    }
    return ChangeBatch(schema, pa.RecordBatch.from_pydict(rows, schema=change_schema(schema)))


def append(
    writer: LogWriter, *seen: ChangeBatch, written: tuple[ChangeBatch, ...] | None = None, is_proven: bool = True
) -> None:
    """Append what the reader saw, or `written` in its place."""
    end = writer.end()
    position = max(int(part.rows.column("_commit")[-1].as_py()) for part in seen)
    proof = Proof.of(seen, after=end.chain) if is_proven else None
    batches = seen if written is None else written
    writer.append(Group(batches=batches, position=Lsn(position), previous_position=end.position, proof=proof))


def test_a_log_that_holds_what_was_seen_is_whole() -> None:
    log = MemoryLog()
    with log.writer() as writer:
        append(writer, batch([1, 2], commit=10), batch([5], commit=12, name="person"))
        append(writer, batch([3], commit=20), batch([8, 9], commit=20, txid=0))
        writer.append(Group(batches=(), position=Lsn(30), previous_position=Lsn(20)))
        append(writer, batch([4], commit=40))
    report = verify_log(log.reader())
    assert report.is_whole
    assert (report.groups, report.unproven, report.changes, report.position) == (4, 1, 7, Lsn(40))
    assert report.windows.counts == {"public.movie": 6, "public.person": 1}


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (batch([1, 3], commit=20, at=NOON + timedelta(minutes=7)), "has as many and not the same"),
        (batch([1, 1], commit=20, at=NOON + timedelta(minutes=7)), "has as many and not the same"),
    ],
)
def test_an_exchanged_or_doubled_change_is_named_by_group_table_and_minute(written: ChangeBatch, said: str) -> None:
    log = MemoryLog()
    with log.writer() as writer:
        append(writer, batch([7], commit=10))
        append(writer, batch([1, 2], commit=20, at=NOON + timedelta(minutes=7)), written=(written,))
        append(writer, batch([8], commit=30))
    (fault,) = verify_log(log.reader()).faults
    assert (fault.sequence, fault.table) == (1, "public.movie")
    assert str(fault).startswith("group 1, public.movie, minute 2026-05-01 12:07 UTC: the reader saw 2 changes")
    assert said in str(fault)


def test_a_change_moved_to_another_minute_is_missing_in_one_and_too_many_in_the_other() -> None:
    log = MemoryLog()
    with log.writer() as writer:
        moved = batch([1], commit=20, at=NOON + timedelta(minutes=1))
        append(writer, batch([1], commit=20), written=(moved,))
    assert [fault.what for fault in verify_log(log.reader()).faults] == [
        "the reader saw 1 changes, the log has 0",
        "the reader saw 0 changes, the log has 1",
    ]


def test_a_group_with_another_number_of_changes_than_was_seen_is_not_written(tmp_path: Path) -> None:
    for writer in (MemoryLog().writer(), LocalLogWriter.open(tmp_path / "log")):
        with pytest.raises(BrokenProofError, match=r"the reader saw \{'public.movie': 2\}, the group has \{'public.m"):
            append(writer, batch([1, 2], commit=10), written=(batch([1], commit=10),))
        assert writer.end().sequence == -1
        append(writer, batch([1, 2], commit=10))
        writer.close()


def test_a_transaction_that_is_missing_between_two_groups_breaks_the_chain_once() -> None:
    log = MemoryLog()
    with log.writer() as writer:
        append(writer, batch([1], commit=10))
        # The reader saw one at 15 that never came to the log.
        lost = writer.end().chain.after([batch([2], commit=15)])
        seen = batch([3], commit=20)
        proof = Proof.of([seen], after=lost)
        writer.append(Group(batches=(seen,), position=Lsn(20), previous_position=Lsn(10), proof=proof))
        append(writer, batch([4], commit=30))
    (fault,) = verify_log(log.reader()).faults
    assert str(fault) == (
        "group 1: after 0/A (transaction 1) come those up to 0/14 (2); the reader saw them up to 0/14 (3)"
    )


def test_a_log_begun_without_proofs_is_proven_from_where_they_begin(tmp_path: Path) -> None:
    with LocalLogWriter.open(tmp_path) as writer:
        append(writer, batch([1], commit=10), is_proven=False)
        append(writer, batch([2], commit=20))
    with LocalLogWriter.open(tmp_path) as writer:
        assert writer.end().chain.count == 1
        append(writer, batch([3], commit=30))
    report = verify_log(LocalLogReader(tmp_path))
    assert report.is_whole
    assert (report.groups, report.unproven, report.transactions) == (3, 1, 2)


def test_a_header_of_an_older_or_newer_version_is_read() -> None:
    older = (
        b'{"sequence":0,"offset":0,"next_offset":1,"epoch":1,"position":9,"previous_position":0,"transaction_count":1,'
        b'"tables":{"public.movie":1},"min_txid":7,"max_txid":7,"max_committed_at":"2026-05-01T12:00:00+00:00",'
        b'"appended_at":"2026-05-01T12:00:01+00:00","progress":{}%s,"streams":[8]}'
    )
    header, rest = decode_header(older % b"", "streams")
    assert header.proof is None
    assert header.chain == NO_TRANSACTION
    assert rest == {"streams": [8]}
    assert decode_header(older % b',"added_later":{"a":1}', "streams")[0] == header


@pytest.mark.parametrize("open_log", [MemoryLog, None])
def test_capture_of_a_real_database_proves_itself(
    database: Database, tmp_path: Path, open_log: Callable[[], MemoryLog] | None
) -> None:
    database.execute(
        "create table t (id int, day date, v text, primary key (day, id))",
        "insert into t select i, date '2026-01-01' + i % 5, i from generate_series(1, 300) i",
    )
    source = database.source("t", chunk_rows=100)
    if open_log is None:
        writer, reader = LocalLogWriter.open(tmp_path / "log"), LocalLogReader(tmp_path / "log")
    else:
        memory = open_log()
        writer, reader = memory.writer(), memory.reader()  # type: ignore[assignment]
    source.prepare()
    database.execute("insert into t values (0, '2026-02-01', 'x')", "update t set v = 'y' where id <= 40")
    drain(source, writer, reader)
    database.execute("delete from t where id > 290", "truncate t", "insert into t values (1, '-infinity', 'z')")
    report = drain(source, writer, reader)
    source.close()
    writer.close()
    verified = verify_log(reader)
    assert verified.faults == ()
    assert (verified.unproven, verified.transactions) == (0, 2 + report.transactions)
    assert verified.windows.counts == {"public.t": reader.end().offset}
