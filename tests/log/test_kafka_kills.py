"""A writer of a log on Kafka is killed around its commits: nothing is lost, nothing comes twice, nothing in part."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from confluent_kafka import Consumer
from servers.kafka import KafkaCluster

from deltaworks.log.kafka.place import KafkaLog

pytestmark = pytest.mark.server

CHILD = Path(__file__).with_name("kafka_writer_child.py")
LIVES = 9


@pytest.mark.timeout(300)
def test_killed_around_commits_nothing_is_lost_doubled_or_in_part(small_kafka: KafkaCluster, tmp_path: Path) -> None:
    seed = int.from_bytes(os.urandom(4))
    chance = random.Random(seed)
    log = KafkaLog(f"kills{seed}", tmp_path, small_kafka.log_settings())
    acknowledged, seen = 0, 0
    command = [sys.executable, str(CHILD), small_kafka.brokers, f"kills{seed}", str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        for life in range(LIVES):
            step = ("log.before_commit", "log.after_commit", "time")[life % 3]
            after = chance.randint(200, 900) if step == "time" else chance.randrange(6)
            child.stdin.write(f"{step} {after} {chance.randrange(1 << 30)}\n")
            child.stdin.flush()
            while (line := child.stdout.readline().split())[0] == "done":
                assert int(line[1]) > acknowledged, (seed, life)
                acknowledged = int(line[1])
            assert line == ["ended", str(-signal.SIGKILL.value)], (seed, life, line)
            # Whoever reads now sees all that was acknowledged, and at most what was being committed beside it.
            end = committed(log)
            assert max(acknowledged, seen) <= end <= acknowledged + 1, (seed, life, acknowledged, end)
            acknowledged = seen = end
        child.stdin.close()
    assert acknowledged > LIVES // 3
    log.writer().close()
    assert committed(log) == acknowledged
    assert foreign(small_kafka, f"deltaworks.kills{seed}.public.movie", log) == rows_of(log)


def committed(log: KafkaLog) -> int:
    """The last transaction; all up to it are there once, whole and in order."""
    rows = rows_of(log)
    sizes: dict[int, set[int]] = defaultdict(set)
    for (number, _), size in rows.items():
        sizes[number].add(size)
    assert list(sizes) == list(range(1, len(sizes) + 1))
    wanted = {(number, ordinal): size for number, (size,) in sizes.items() for ordinal in range(size)}
    assert rows == wanted
    return len(sizes)


def rows_of(log: KafkaLog) -> dict[tuple[int, int], int]:
    """Rows of the log by transaction and place in it, with the number of rows that the transaction has."""
    reader = log.reader()
    rows: dict[tuple[int, int], int] = {}
    for group in reader.read(after_sequence=-1):
        for batch in group.batches:
            for row in batch.rows.to_pylist():
                identity = row["_commit"], row["_ordinal"]
                assert identity not in rows, f"{identity} came twice"
                rows[identity] = row["_txid"]
    reader.close()
    return rows


def foreign(cluster: KafkaCluster, topic: str, log: KafkaLog) -> dict[tuple[int, int], int]:
    """What a plain consumer of committed records finds of the same."""
    wanted, found = len(rows_of(log)), Counter[tuple[int, int]]()
    sizes: dict[tuple[int, int], int] = {}
    consumer = Consumer({"bootstrap.servers": cluster.brokers, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    deadline = time.monotonic() + 60
    while len(found) < wanted:
        assert time.monotonic() < deadline, f"{len(found)} of {wanted} records came"
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            source = json.loads(message.value() or b"")["source"]
            found[source["lsn"], int(source["sequence"])] += 1
            sizes[source["lsn"], int(source["sequence"])] = source["txId"]
    consumer.close()
    assert set(found.values()) <= {1}
    return sizes
