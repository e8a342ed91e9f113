"""Our log on Kafka beside `kafka-producer-perf-test`, on the same three brokers with the same settings.

Both write random letters with acks=all, idempotence, lz4, batches of 1 MB and 2 ms of linger to six partitions of
three copies. Ours are Arrow batches, split by key, each group in a transaction of its own that is durable before the
next begins; the tool has no transactions. They take turns. Needs what tests/servers/install.sh brings.
"""

import argparse
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
from measure import Figure, report

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.change_log import Group
from deltaworks.log.kafka.client import Client
from deltaworks.log.kafka.place import KafkaLog
from deltaworks.log.kafka.topics import ensure
from deltaworks.log.kafka.writer import KafkaLogWriter
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from servers.kafka import KafkaCluster, java

TABLE = TableSchema(
    name=TableName("public", "event"),
    columns=(
        Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),
        Column(name="note", type=pa.string(), source_type="text"),
    ),
    key=("id",),
)
RECORD_BYTES = 100_000
NOTE_BYTES = 1_000
TOPIC = "perf"


def batch(rows: int) -> ChangeBatch:
    """Rows of about a kilobyte that compress as badly as the tool's."""
    letters = random.Random(1).choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rows * NOTE_BYTES)
    text = "".join(letters)
    columns = {
        "_op": ["c"] * rows,
        "_commit": [1] * rows,
        "_ordinal": range(rows),
        "_txid": [1] * rows,
        "_committed_at": [0] * rows,
        "_unchanged": [None] * rows,
        "_old_key": [None] * rows,
        "_as_text": [None] * rows,
        "id": range(rows),
        "note": [text[at : at + NOTE_BYTES] for at in range(0, len(text), NOTE_BYTES)],
    }
    return ChangeBatch(TABLE, pa.RecordBatch.from_pydict(columns, schema=change_schema(TABLE)))


def ours(writer: KafkaLogWriter, changes: ChangeBatch, *, total_bytes: int) -> float:
    """MB/s of rows appended."""
    began, done = time.monotonic(), 0
    while done < total_bytes:
        end = writer.end().position
        writer.append(Group(batches=(changes,), position=Lsn(end.value + 1), previous_position=end))
        done += changes.rows.nbytes
    return done / (time.monotonic() - began) / 1e6


def tool_command(settings: dict[str, str | int], total_bytes: int) -> list[str]:
    """How the tool is run."""
    return java(
        "org.apache.kafka.tools.ProducerPerformance",
        *("--topic", TOPIC, "--num-records", str(total_bytes // RECORD_BYTES), "--record-size", str(RECORD_BYTES)),
        *("--throughput", "-1", "--producer-props", *(f"{name}={value}" for name, value in settings.items())),
    )


def theirs(brokers: str, *, total_bytes: int) -> float:
    """MB/s as the tool says."""
    settings: dict[str, str | int] = {
        "bootstrap.servers": brokers,
        "acks": "all",
        "enable.idempotence": "true",
        "compression.type": "lz4",
        "batch.size": 1_000_000,
        "linger.ms": 2,
    }
    # The brokers start faster with the first compiler alone; the tool is to be as fast as it can.
    answer = subprocess.run(
        [word for word in tool_command(settings, total_bytes) if "TieredStopAtLevel" not in word],
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.findall(r"\(([\d.]+) MB/sec\)", answer.stdout)
    # The tool's megabyte has 2^20 bytes.
    return float(found[-1]) * 1.048576


def main() -> int:
    """Run both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="at least three")
    parser.add_argument("--megabytes", type=int, default=400, help="written by each in each repeat")
    parser.add_argument("--group-rows", type=int, default=8_000, help="rows of a kilobyte in a group")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    options = parser.parse_args()
    total_bytes = options.megabytes * 1_000_000
    our_rates: list[float] = []
    their_rates: list[float] = []
    with tempfile.TemporaryDirectory(prefix="deltaworks-kafka-") as name:
        cluster = KafkaCluster(Path(name), brokers=3)
        try:
            cluster.start()
            cluster.wait()
            settings = cluster.log_settings()
            ensure(Client(settings, topics="perf"), {TOPIC: settings.partitions})
            changes = batch(options.group_rows)
            with KafkaLog("bench", Path(name) / "log", settings).writer() as writer:
                ours(writer, changes, total_bytes=total_bytes // 8)  # compiles, and warms the brokers
                for _ in range(options.repeats):
                    their_rates.append(theirs(cluster.brokers, total_bytes=total_bytes))
                    our_rates.append(ours(writer, changes, total_bytes=total_bytes))
        finally:
            cluster.stop()
    ratios = [mine / tool for mine, tool in zip(our_rates, their_rates, strict=True)]
    figures = [
        Figure(name="groups appended to the log on Kafka", values=our_rates, unit="MB/s"),
        Figure(name="kafka-producer-perf-test", values=their_rates, unit="MB/s"),
        Figure(name="… of its rate", values=ratios, unit="of its rate", goal=0.7, smaller_is_better=False),
    ]
    return report("The log on Kafka", figures, path=options.json)


if __name__ == "__main__":
    sys.exit(main())
