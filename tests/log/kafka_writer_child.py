"""Writes to a log on Kafka in one forked process after the other, each killed at a step of its own.

`kafka_writer_child.py BROKERS NAME FOLDER`; each line on stdin, `STEP AFTER SEED`, is one life: it is killed when it
reaches the step for the `AFTER + 1`-th time, or after `AFTER` milliseconds where the step is `time`. It says `done N`
of every transaction that was acknowledged, and in the end `ended CODE`. Forking spares each life the imports.
"""

import os
import random
import signal
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import confluent_kafka  # noqa: F401  # once, not in every life
import pyarrow as pa
import structlog
from log.appending import TABLE

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.config import KafkaLogConfig
from deltaworks.log.change_log import Group, LogEnd
from deltaworks.log.kafka.place import KafkaLog
from deltaworks.position import Lsn
from deltaworks.testing.faults import kill_at


def transaction(end: LogEnd, chance: random.Random) -> list[Group]:
    """The next transaction, in one group or in several; every row says of how many it is one."""
    number, parts = end.position.value + 1, chance.choice((1, 1, 1, 3))
    counts = [chance.randint(1, 40) for _ in range(parts)]
    groups, ordinal = [], 0
    for part, count in enumerate(counts):
        rows = {
            "_op": ["c"] * count,
            "_commit": [number] * count,
            "_ordinal": list(range(ordinal, ordinal + count)),
            "_txid": [sum(counts)] * count,
            "_committed_at": [0] * count,
            "_unchanged": [None] * count,
            "_old_key": [None] * count,
            "_as_text": [None] * count,
            "id": [chance.randrange(100) for _ in range(count)],
        }
        batch = ChangeBatch(TABLE, pa.RecordBatch.from_pydict(rows, schema=change_schema(TABLE)))
        is_last = part == parts - 1
        position = Lsn(number) if is_last else end.position
        groups.append(
            Group(batches=(batch,), position=position, previous_position=end.position, is_partial=not is_last)
        )
        ordinal += count
    return groups


def live(place: KafkaLog, step: str, after: int, seed: int) -> None:
    if step == "time":
        threading.Timer(after / 1000, os.kill, (os.getpid(), signal.SIGKILL)).start()
    else:
        kill_at(step, after=after)
    chance = random.Random(seed)
    writer = place.writer()
    while True:
        groups = transaction(writer.end(), chance)
        for group in groups:
            writer.append(group)
        say("done", groups[-1].position.value)


def say(word: str, number: int) -> None:
    os.write(1, f"{word} {number}\n".encode())


if __name__ == "__main__":
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    brokers, name, folder = sys.argv[1:]
    settings = {"kind": "kafka", "brokers": brokers, "allow_weak_topics": True, "replication_factor": 1}
    log = KafkaLog(name, Path(folder), KafkaLogConfig.model_validate(settings | {"debezium": "all"}))
    for line in sys.stdin:
        step, after, seed = line.split()
        child = os.fork()
        if child == 0:
            live(log, step, int(after), int(seed))
        say("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
