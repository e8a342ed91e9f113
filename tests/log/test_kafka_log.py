"""The log on real Kafka: brokers that die, writers that are fenced, topics that are weak, made anew or emptied."""

import itertools
import json
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient
from servers.kafka import KafkaCluster

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import KafkaLogConfig
from deltaworks.log.change_log import CorruptLogError, FencedError, Group, LogAwayError, OffsetRetiredError
from deltaworks.log.kafka.place import KafkaLog
from deltaworks.log.kafka.records import partition_of
from deltaworks.log.kafka.topics import WeakTopicError
from deltaworks.log.kafka.writer import KafkaLogWriter, OversizedRowError
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

pytestmark = pytest.mark.server

TABLE = TableSchema(
    name=TableName.parse("sales.item"),
    columns=(
        Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),
        Column(name="note", type=pa.string(), source_type="text"),
    ),
    key=("id",),
)
_numbers = itertools.count(1)


def changes(ids: list[int], notes: list[str], *, commit: int, op: str = "u", old: int | None = None) -> ChangeBatch:
    count = len(ids)
    rows: dict[str, list[Any]] = {
        "_op": [op] * count,
        "_commit": [commit] * count,
        "_ordinal": list(range(count)),
        "_txid": [commit] * count,
        "_committed_at": [1_780_000_000_000_000] * count,
        "_unchanged": [None] * count,
        "_old_key": [None if old is None else {"id": old}] * count,
        "_as_text": [None] * count,
        "id": ids,
        "note": notes,
    }
    return ChangeBatch(TABLE, pa.RecordBatch.from_pydict(rows, schema=change_schema(TABLE)))


def append(writer: KafkaLogWriter, ids: list[int], notes: list[str] | None = None, **more: Any) -> None:
    end = writer.end().position.value
    batch = changes(ids, notes or [f"{end + 1}"] * len(ids), commit=end + 1, **more)
    writer.append(Group(batches=(batch,), position=Lsn(end + 1), previous_position=Lsn(end), transaction_count=1))


def place(cluster: KafkaCluster, folder: Path, *, name: str | None = None, **settings: Any) -> KafkaLog:
    return KafkaLog(name or f"log{next(_numbers)}", folder, cluster.log_settings(**settings))


def notes_by_key(log: KafkaLog) -> dict[int, list[int]]:
    found = defaultdict(list)
    for group in log.reader().read(after_sequence=-1):
        for batch in group.batches:
            for key, note in zip(batch.rows["id"].to_pylist(), batch.rows["note"].to_pylist(), strict=True):
                found[key].append(int(note))
    return dict(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nothing_is_lost_while_brokers_are_killed(
    kafka_cluster: KafkaCluster, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    seconds = pytestconfig.getoption("--kafka-seconds")
    log = place(kafka_cluster, tmp_path, patience_s=90.0)
    wanted: dict[int, list[int]] = defaultdict(list)
    chance, ends_at = random.Random(7), time.monotonic() + seconds
    stop, failed = threading.Event(), []

    def write() -> None:
        try:
            with log.writer() as writer:
                while not stop.is_set():
                    ids = [chance.randrange(200) for _ in range(chance.randint(1, 60))]
                    number = writer.end().sequence + 1
                    append(writer, ids, [str(number)] * len(ids))
                    for key in ids:
                        wanted[key].append(number)
        except BaseException as error:
            failed.append(error)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    kills = 0
    while time.monotonic() < ends_at and writing.is_alive():
        victim = kills % kafka_cluster.count
        stop.wait(min(5.0, max(0.0, ends_at - time.monotonic())))
        kafka_cluster.kill(victim)
        kills += 1
        stop.wait(5.0)
        kafka_cluster.start(victim)
        kafka_cluster.wait()
        stop.wait(min(10.0, max(0.0, ends_at - time.monotonic())))
    stop.set()
    writing.join(120)
    assert not failed
    assert kills
    assert notes_by_key(log) == wanted


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_without_a_quorum_the_writer_waits_and_loses_nothing(kafka_cluster: KafkaCluster, tmp_path: Path) -> None:
    log = place(kafka_cluster, tmp_path, patience_s=120.0)
    with log.writer() as writer:
        append(writer, [1, 2, 3])
        kafka_cluster.kill(0)
        kafka_cluster.kill(1)
        done = threading.Event()
        waiting = threading.Thread(target=lambda: (append(writer, [1, 2, 4]), done.set()), daemon=True)
        waiting.start()
        assert not done.wait(3.0)
        kafka_cluster.start(0, 1)
        assert done.wait(120.0)
        kafka_cluster.wait()
        append(writer, [1])
    assert notes_by_key(log) == {1: [1, 2, 3], 2: [1, 2], 3: [1], 4: [2]}


def test_topics_of_three_brokers_are_taken_and_weak_ones_refused(kafka_cluster: KafkaCluster, tmp_path: Path) -> None:
    place(kafka_cluster, tmp_path / "strong").writer().close()
    weak = place(kafka_cluster, tmp_path / "weak", replication_factor=1)
    with pytest.raises(WeakTopicError, match=r"replication factor 1.*\n.*min.insync.replicas is 1"):
        weak.writer()


def test_unclean_election_is_refused(kafka_cluster: KafkaCluster, tmp_path: Path) -> None:
    log = place(kafka_cluster, tmp_path, name="unclean")
    log.writer().close()
    _configure(kafka_cluster, "deltaworks.unclean.changes", "unclean.leader.election.enable", "true")
    with pytest.raises(WeakTopicError, match="unclean leader election is on"):
        log.writer()


def test_a_newer_writer_elsewhere_fences_the_old_one(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    here, there = (place(small_kafka, tmp_path / machine, name="fenced") for machine in ("here", "there"))
    old = here.writer()
    append(old, [1])
    new = there.writer()
    assert new.epoch > old.epoch
    with pytest.raises(FencedError):
        append(old, [2])
    append(new, [3])
    assert sorted(notes_by_key(there)) == [1, 3]
    old.close()
    new.close()


def test_a_log_that_is_held_is_taken_over_here(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path)
    old = log.writer()
    with pytest.raises(FencedError):
        log.writer()
    new = log.take_over()
    with pytest.raises(FencedError):
        append(old, [1])
    append(new, [2])
    new.close()
    old.close()


def test_topics_that_were_made_anew_are_noticed(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path, name="anew")
    reader = log.reader()
    with log.writer() as writer:
        append(writer, [1])
    assert reader.end().sequence == 0
    admin = AdminClient({"bootstrap.servers": small_kafka.brokers})
    for removed in admin.delete_topics(["deltaworks.anew.groups", "deltaworks.anew.changes"]).values():
        removed.result()
    _until_gone(admin, "deltaworks.anew.groups", "deltaworks.anew.changes")
    with pytest.raises(CorruptLogError, match="made anew"):
        log.writer()
    other = place(small_kafka, tmp_path / "other", name="anew")
    with other.writer() as writer:
        for _ in range(5):
            append(writer, [1])
    with pytest.raises(CorruptLogError, match="made anew"):
        reader.end()


def test_what_the_brokers_no_longer_keep_is_a_gap_with_a_name(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path, name="retired")
    with log.writer() as writer:
        for _ in range(6):
            append(writer, [1])
    admin = AdminClient({"bootstrap.servers": small_kafka.brokers})
    for done in admin.delete_records([TopicPartition("deltaworks.retired.groups", 0, 8)]).values():
        done.result()
    with pytest.raises(OffsetRetiredError, match="deltaworks dump"):
        list(log.reader().read(after_sequence=-1))
    assert [group.header.sequence for group in log.reader().read(after_sequence=3)] == [4, 5]


def test_a_row_larger_than_a_record_is_cut_and_put_together(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path, max_record_bytes=10_000, compression="none")
    note = "".join(random.Random(1).choices("abcdefgh", k=300_000))
    with log.writer() as writer:
        append(writer, [1, 2], [note, "small"])
    (group,) = log.reader().read(after_sequence=-1)
    assert group.batches[0].rows["note"].to_pylist() == [note, "small"]


def test_a_key_has_one_partition(small_kafka: KafkaCluster) -> None:
    batch = changes(list(range(600)) * 2, [""] * 1200, commit=1)
    places = partition_of(batch, partitions=6)
    assert (places[:600] == places[600:]).all()
    assert min((places == number).sum() for number in range(6)) > 100


def test_brokers_that_are_away_at_the_start_are_waited_for_by_the_caller(tmp_path: Path) -> None:
    settings = KafkaLogConfig.model_validate({"kind": "kafka", "brokers": "127.0.0.1:1", "patience_s": 1})
    log = KafkaLog("away", tmp_path, settings)
    with pytest.raises(LogAwayError, match=r"127\.0\.0\.1:1"):
        log.writer()
    with pytest.raises(LogAwayError):
        log.reader().end()
    assert log.holder() is None


def test_a_plain_consumer_reads_debezium_envelopes(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path, name="foreign", debezium=["sales.item"], partitions=1)
    with log.writer() as writer:
        append(writer, [1], ["a"], op="c")
        append(writer, [2], ["b"], old=1)
        append(writer, [2], [None], op="d")  # type: ignore[list-item]
        end = writer.end().position
        aborted = changes([9], ["never ended"], commit=9)
        writer.append(Group(batches=(aborted,), position=end, previous_position=end, is_partial=True))
        writer.discard_partial()
    found = list(_consumed(small_kafka, "deltaworks.foreign.sales.item", count=6))
    assert [(key, value and value["op"]) for key, value in found] == [
        ({"id": 1}, "c"),
        ({"id": 1}, "d"),
        ({"id": 1}, None),
        ({"id": 2}, "c"),
        ({"id": 2}, "d"),
        ({"id": 2}, None),
    ]
    first = found[0][1]
    assert first is not None
    assert (first["before"], first["after"]) == (None, {"id": 1, "note": "a"})
    assert first["source"] | {"table": "item", "schema": "sales", "lsn": 1, "txId": 1} == first["source"]
    assert first["transaction"] == {"id": "1:1", "total_order": 1, "data_collection_order": 1}


def test_a_row_too_large_for_an_envelope_is_refused_by_name(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    log = place(small_kafka, tmp_path, debezium="all", max_record_bytes=10_000)
    with log.writer() as writer, pytest.raises(OversizedRowError, match=r"sales\.item.*max_record_bytes"):
        append(writer, [1], ["x" * 20_000])
    assert log.reader().end().sequence == -1


def _until_gone(admin: AdminClient, *names: str) -> None:
    deadline = time.monotonic() + 30
    while set(names) & set(admin.list_topics(timeout=5).topics):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _consumed(
    cluster: KafkaCluster, topic: str, *, count: int
) -> Iterator[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    consumer = Consumer({"bootstrap.servers": cluster.brokers, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    deadline = time.monotonic() + 30
    while count and time.monotonic() < deadline:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            count -= 1
            yield json.loads(message.key() or b"null"), json.loads(message.value() or b"null")
    consumer.close()


def _configure(cluster: KafkaCluster, topic: str, name: str, value: str) -> None:
    from confluent_kafka.admin import (  # noqa: PLC0415
        AlterConfigOpType,
        ConfigEntry,
        ConfigResource,
    )

    entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ConfigResource.Type.TOPIC, topic, incremental_configs=[entry])
    admin = AdminClient({"bootstrap.servers": cluster.brokers})
    for done in admin.incremental_alter_configs([resource]).values():
        done.result()
