"""The contract of `log/change_log.py`, on every implementation."""

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
from servers.kafka import KafkaCluster
from servers.object_store import KEY_ID, SECRET_KEY, Bucket

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import LocalLogConfig
from deltaworks.log.change_log import (
    EMPTY_END,
    BrokenChainError,
    CorruptLogError,
    FencedError,
    Group,
    GroupHeader,
    LogReader,
    LogWriter,
)
from deltaworks.log.kafka.place import KafkaLog
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.memory import MemoryLog
from deltaworks.log.registry import LocalLog
from deltaworks.position import START, Lsn
from deltaworks.schema import Column, TableName, TableSchema

NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Implementation:
    open_writer: Callable[[], LogWriter]
    open_reader: Callable[[], LogReader]


_numbers = itertools.count(1)


def archived_at_once(home: Path, bucket: Bucket) -> Implementation:
    """A log whose segments go to its archive, and away from here, as soon as they are closed."""
    settings = LocalLogConfig.model_validate(
        {"keep_bytes": 0, "seal": False, "archive": {"bucket": bucket.name, "endpoint": bucket.endpoint}}
    )
    local = LocalLog("studio", home / "log" / "studio", settings, cache=home / "cache")

    class Writer(LocalLogWriter):
        def append(self, group: Group) -> GroupHeader:
            header = super().append(group)
            local.archive()
            local.retire(read_up_to={"all": header.sequence})
            return header

    return Implementation(lambda: Writer.open(local.folder, segment_bytes=3_000), local.reader)


@pytest.fixture(
    params=[
        "memory",
        "local",
        "local in small segments",
        "archived",
        pytest.param("kafka", marks=pytest.mark.server),
    ]
)
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Implementation:
    if request.param == "kafka":
        broker: KafkaCluster = request.getfixturevalue("small_kafka")
        settings = broker.log_settings(max_record_bytes=10_000, partitions=3)
        kafka = KafkaLog(f"contract{next(_numbers)}", tmp_path / "log", settings)
        return Implementation(kafka.writer, kafka.reader)
    if request.param == "archived":
        keys: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
        keys.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        keys.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
        return archived_at_once(tmp_path, request.getfixturevalue("bucket"))
    if request.param == "memory":
        memory = MemoryLog()
        return Implementation(memory.writer, memory.reader)
    folder = tmp_path / "log" / "studio"
    segment_bytes = 3_000 if "small" in request.param else 1 << 26
    return Implementation(
        lambda: LocalLogWriter.open(folder, segment_bytes=segment_bytes), lambda: LocalLogReader(folder)
    )


@pytest.fixture
def writer(log: Implementation) -> Iterator[LogWriter]:
    writer = log.open_writer()
    yield writer
    writer.close()


@pytest.fixture
def reader(log: Implementation) -> LogReader:
    return log.open_reader()


def table(name: str = "movie") -> TableSchema:
    return TableSchema(
        name=TableName.parse(name),
        columns=(
            Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),
            Column(name="title", type=pa.string(), source_type="text"),
        ),
        key=("id",),
    )


def batch(ids: list[int], *, op: str = "u", txid: int = 7, name: str = "movie", at: datetime = NOON) -> ChangeBatch:
    schema = table(name)
    count = len(ids)
    rows = {
        "_op": [op] * count,
        "_commit": [9] * count,
        "_ordinal": list(range(count)),
        "_txid": [txid] * count,
        "_committed_at": [at] * count,
        "_unchanged": [["title"]] * count,
        "_old_key": [{"id": number + 1} for number in ids],
        "_as_text": [None] * count,
        "id": ids,
        "title": [f"title {number}" for number in ids],
    }
    return ChangeBatch(schema, pa.RecordBatch.from_pydict(rows, schema=change_schema(schema)))


def group(position: int, *batches: ChangeBatch, after: int = 0, **more: object) -> Group:
    return Group(batches=batches, position=Lsn(position), previous_position=Lsn(after), **more)  # type: ignore[arg-type]


def append_run(writer: LogWriter, count: int, *, rows: int = 3) -> None:
    for _ in range(count):
        end = writer.end().position.value
        writer.append(group(end + 1, batch(list(range(rows))), after=end))


def test_a_log_that_does_not_exist_yet_is_empty(reader: LogReader) -> None:
    assert reader.end() == EMPTY_END
    assert list(reader.read(after_sequence=-1)) == []
    assert list(reader.headers_backwards()) == []
    assert reader.oldest() is None
    assert not reader.wait(after_sequence=-1, timeout_s=0.02)


def test_an_opened_log_without_groups_is_empty(writer: LogWriter, reader: LogReader) -> None:
    assert reader.end() == EMPTY_END == writer.end()
    assert list(reader.read(after_sequence=-1)) == []


def test_what_was_appended_is_read_back_exactly(writer: LogWriter, reader: LogReader) -> None:
    movies, people = batch([1, 2]), batch([5], name="sales.person", op="d")
    appended = group(100, movies, people, transaction_count=2, progress={"dump": {"after": ["3"]}, "état": None})

    header = writer.append(appended)

    (stored,) = reader.read(after_sequence=-1)
    assert stored.header == header
    assert [part.rows for part in stored.batches] == [movies.rows, people.rows]
    assert [part.schema for part in stored.batches] == [movies.schema, people.schema]
    assert stored.batches[0].rows.schema.equals(movies.rows.schema, check_metadata=True)
    assert header.progress == appended.progress
    assert header.tables == {"public.movie": 2, "sales.person": 1}
    assert (header.sequence, header.offset, header.next_offset, header.transaction_count) == (0, 0, 3, 2)


def test_a_slice_of_a_batch_is_stored_alone(writer: LogWriter, reader: LogReader) -> None:
    (part,) = batch([1, 2, 3]).slice_by_commit(after=0, up_to=9)
    rows = ChangeBatch(part.schema, part.rows.slice(1, 1))
    writer.append(group(1, rows))
    assert next(reader.read(after_sequence=-1)).batches[0].rows.column("id").to_pylist() == [2]


def test_a_group_may_only_move_the_position(writer: LogWriter, reader: LogReader) -> None:
    writer.append(group(5, batch([1])))
    header = writer.append(group(8, after=5, progress={"phase": "stream"}))
    assert (header.offset, header.next_offset, header.position) == (1, 1, Lsn(8))
    assert reader.end().position == Lsn(8)
    assert reader.end().progress == {"phase": "stream"}


def test_bounds_are_over_streamed_changes_and_not_over_reads(writer: LogWriter) -> None:
    later = NOON + timedelta(seconds=5)
    header = writer.append(
        group(
            1,
            batch([1], op="r", txid=0, at=later + timedelta(days=1)),
            batch([2], txid=31),
            batch([3], txid=12, at=later),
        )
    )
    assert (header.min_txid, header.max_txid, header.max_committed_at) == (12, 31, later)
    reads_only = writer.append(group(2, batch([1], op="r", txid=0), after=1))
    assert (reads_only.min_txid, reads_only.max_txid, reads_only.max_committed_at) == (None, None, None)


def test_reading_goes_on_after_a_sequence(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 40)
    assert [stored.header.sequence for stored in reader.read(after_sequence=-1)] == list(range(40))
    assert [stored.header.sequence for stored in reader.read(after_sequence=36)] == [37, 38, 39]
    assert list(reader.read(after_sequence=39)) == []
    append_run(writer, 1)
    assert [stored.header.sequence for stored in reader.read(after_sequence=39)] == [40]


def test_offsets_and_positions_are_gapless(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 20)
    headers = [stored.header for stored in reader.read(after_sequence=-1)]
    for before, after in pairwise(headers):
        assert after.offset == before.next_offset
        assert after.previous_position == before.position


def test_a_limit_stops_after_whole_groups_and_never_before_the_first(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 5, rows=10)
    for limit, expected in ((1, 1), (10, 1), (11, 2), (30, 3), (1_000, 5), (None, 5)):
        assert len(list(reader.read(after_sequence=-1, max_changes=limit))) == expected


def test_a_read_ends_where_the_log_ended_when_it_was_asked_for(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 2)
    groups = reader.read(after_sequence=-1)
    append_run(writer, 1)
    assert [stored.header.sequence for stored in groups] == [0, 1]


def test_headers_come_backwards(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 25)
    assert [header.sequence for header in reader.headers_backwards()] == list(range(24, -1, -1))
    oldest = reader.oldest()
    assert oldest is not None
    assert oldest.sequence == 0


def test_a_group_that_does_not_follow_is_refused_and_nothing_is_written(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 3)
    with pytest.raises(BrokenChainError, match="0/2"):
        writer.append(group(9, batch([1]), after=2))
    with pytest.raises(BrokenChainError):
        writer.append(Group(batches=(), position=START, previous_position=Lsn(3)))
    assert reader.end().sequence == 2
    append_run(writer, 1)
    assert reader.end().sequence == 3


def test_one_writer_at_a_time(log: Implementation, writer: LogWriter) -> None:
    with pytest.raises(FencedError):
        log.open_writer()
    append_run(writer, 1)


def test_a_later_writer_has_a_larger_epoch_and_goes_on_at_the_end(log: Implementation, reader: LogReader) -> None:
    epochs = []
    for _ in range(4):
        writer = log.open_writer()
        epochs.append(writer.epoch)
        assert writer.end() == reader.end()
        append_run(writer, 4)
        assert reader.end().epoch == writer.epoch
        writer.close()
    assert epochs == sorted(set(epochs))
    assert len(list(reader.read(after_sequence=-1))) == 16


def test_a_closed_writer_writes_nothing(log: Implementation, reader: LogReader) -> None:
    writer = log.open_writer()
    writer.close()
    writer.close()
    with pytest.raises(FencedError, match="closed"):
        writer.append(group(1))
    assert reader.end() == EMPTY_END


def test_reading_after_a_group_that_is_not_there_is_no_silent_wait(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 2)
    with pytest.raises(CorruptLogError, match="ends at group 1"):
        reader.read(after_sequence=5)
    with pytest.raises(CorruptLogError, match="ends at group 1"):
        reader.wait(after_sequence=5, timeout_s=1)


def test_wait_returns_at_once_where_there_is_more(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 2)
    assert reader.wait(after_sequence=0, timeout_s=0)
    assert not reader.wait(after_sequence=1, timeout_s=0.01)


def test_wait_wakes_when_a_group_is_appended(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 1)
    woken = threading.Event()

    def wait() -> None:
        if reader.wait(after_sequence=0, timeout_s=30):
            woken.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    append_run(writer, 1)
    assert woken.wait(5)
    waiting.join()


def test_one_reader_serves_many_threads_while_the_log_grows(writer: LogWriter, reader: LogReader) -> None:
    seen: list[list[int]] = []

    def read_all() -> None:
        sequences: list[int] = []
        while len(sequences) < 30:
            after = sequences[-1] if sequences else -1
            reader.wait(after_sequence=after, timeout_s=5)
            sequences += [stored.header.sequence for stored in reader.read(after_sequence=after)]
        seen.append(sequences)

    threads = [threading.Thread(target=read_all, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    append_run(writer, 30)
    for thread in threads:
        thread.join(20)
    assert seen == [list(range(30))] * 3


def append_parts(writer: LogWriter, count: int) -> None:
    """Parts of a transaction, each with 40 changes, without its last part."""
    at = writer.end().position.value
    for _ in range(count):
        writer.append(group(at, batch(list(range(40))), after=at, is_partial=True))


def test_parts_of_a_transaction_become_visible_with_the_last_one(writer: LogWriter, reader: LogReader) -> None:
    append_run(writer, 1)
    before = reader.end()

    append_parts(writer, 5)

    assert reader.end() == before
    assert len(list(reader.read(after_sequence=-1))) == len(list(reader.headers_backwards())) == 1
    assert not reader.wait(after_sequence=0, timeout_s=0.01)
    writer.append(group(2, batch([40]), after=1, transaction_count=1))
    assert reader.end() == writer.end()
    found = list(reader.read(after_sequence=0))
    assert [stored.header.is_partial for stored in found] == [True] * 5 + [False]
    assert {stored.header.position for stored in found[:-1]} == {Lsn(1)}


@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_transaction_without_its_last_part_is_forgotten(log: Implementation, reader: LogReader, before: int) -> None:
    writer = log.open_writer()
    append_run(writer, before)
    end = writer.end()
    append_parts(writer, 5)
    writer.discard_partial()
    assert (writer.end(), reader.end()) == (end, end)

    append_parts(writer, 5)
    writer.close()
    again = log.open_writer()

    assert (again.end(), reader.end()) == (end, end)
    append_run(again, 2)
    assert [stored.header.sequence for stored in reader.read(after_sequence=-1)] == list(range(before + 2))
    again.close()
