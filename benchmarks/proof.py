"""What the proof costs per change at each hop, beside the work that the hop does anyway.

    .venv/bin/python benchmarks/proof.py

Windows are computed at the reader and at every hop, the sketch at every hop behind the log.
"""

import sqlite3
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa

from deltaworks.capture.proof import WindowSet, change_hashes
from deltaworks.capture.sketch import Sketch
from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.taken import Taken
from deltaworks.position import Lsn, Version
from deltaworks.process.ledger.ledger import Ledger
from deltaworks.process.sink import Document
from deltaworks.schema import Column, TableName, TableSchema

CHANGES = 16_384
ROUNDS = 15


def batch() -> ChangeBatch:
    column = Column(name="id", type=pa.int64(), source_type="bigint", nullable=False)
    schema = TableSchema(name=TableName.parse("item"), columns=(column,), key=("id",))
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    rows = {
        "_op": ["u"] * CHANGES,
        "_commit": [place // 8 + 1 for place in range(CHANGES)],
        "_ordinal": [place % 8 for place in range(CHANGES)],
        "_txid": [place // 8 + 1 for place in range(CHANGES)],
        "_committed_at": [noon] * CHANGES,
        "_unchanged": [None] * CHANGES,
        "_old_key": [None] * CHANGES,
        "_as_text": [None] * CHANGES,
        "id": list(range(CHANGES)),
    }
    return ChangeBatch(schema, pa.RecordBatch.from_pydict(rows, schema=change_schema(schema)))


def measured(work: Callable[[], object]) -> float:
    """Nanoseconds per change, the median of the rounds."""
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) / CHANGES * 1e9)
    return statistics.median(times)


def main() -> None:
    changes = batch()
    hashes = change_hashes(changes)
    connection = sqlite3.connect(":memory:", isolation_level=None)
    ledger = Ledger(connection)
    ledger.create()
    # As in the runner: one transaction for a batch.
    connection.execute("begin")
    noon = datetime(2026, 5, 1, 12, tzinfo=UTC)
    documents = [
        Document(key=key, version=Version(Lsn(key + 1), 0), committed_at=noon, body={}) for key in range(CHANGES)
    ]
    for name, work in (
        ("reader: windows", lambda: WindowSet.of([changes])),
        ("lake, app: windows and sketch", lambda: Taken.of([changes], after=-1, up_to=0)),
        ("of this, the sketch", lambda: Sketch.of_hashes(hashes)),
        ("app, rows plan: a document in the ledger", lambda: ledger.leave(documents, {})),
    ):
        print(f"{name:<45}{measured(work):8.0f} ns per change")


if __name__ == "__main__":
    main()
