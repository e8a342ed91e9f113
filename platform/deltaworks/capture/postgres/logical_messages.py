"""Messages that somebody wrote into the WAL with `pg_logical_emit_message`, as changes of their own kind."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from deltaworks.capture.postgres import scan
from deltaworks.capture.postgres.batches import gather_texts
from deltaworks.capture.postgres.compiled import Bytes, Longs
from deltaworks.capture.postgres.pgoutput import LogicalMessage, decode
from deltaworks.capture.postgres.types import to_arrow
from deltaworks.change import MESSAGE, MESSAGES, META_COLUMNS, ChangeBatch, change_schema
from deltaworks.schema import Column, TableSchema

OUR_PREFIX = "deltaworks."
"""What the prefix of every message of ours begins with: marks and padding, which never reach the output."""

MESSAGE_SCHEMA = TableSchema(
    name=MESSAGES,
    columns=(
        Column(name="prefix", type=pa.string(), source_type="text", nullable=False),
        Column(name="content", type=pa.string(), source_type="text", nullable=False),
        Column(name="transactional", type=pa.bool_(), source_type="boolean", nullable=False),
    ),
    key=(),
)
"""Content that is not UTF-8 stands in `_as_text`, as its bytes in hexadecimal digits."""


@dataclass(frozen=True, slots=True)
class MessageShape:
    """Builds batches of messages, as `Shape` does for the rows of a table."""

    schema: TableSchema = MESSAGE_SCHEMA

    def build(self, data: Bytes, changes: Longs, lines: Longs, transactions: Longs) -> ChangeBatch:
        """The messages in these lines as a batch that shares no memory with `data`."""
        taken = changes[lines]
        read = [_read(data, line) for line in taken]
        contents = to_arrow([message.content for message in read], pa.string())
        of_transaction = transactions[taken[:, scan.TRANSACTION]]
        arrow, count = change_schema(self.schema), len(lines)
        values = {
            "_op": pa.repeat(pa.scalar(MESSAGE, pa.string()), count),
            "_commit": pa.array(of_transaction[:, scan.COMMIT].astype(np.uint64)),
            "_ordinal": pa.array(taken[:, scan.PLACE].astype(np.uint32)),
            "_txid": pa.array(of_transaction[:, scan.TXID].astype(np.uint64)),
            "_committed_at": pa.array(of_transaction[:, scan.AT_US].copy()).view(pa.timestamp("us", "UTC")),
            "_as_text": gather_texts([("content", contents)], row_count=count),
        }
        meta = [values.get(name, pa.nulls(count, arrow.field(name).type)) for name in META_COLUMNS]
        columns = [
            pa.array([message.prefix for message in read], pa.string()),
            contents.array,
            pa.array([message.transactional for message in read], pa.bool_()),
        ]
        return ChangeBatch(self.schema, pa.RecordBatch.from_arrays([*meta, *columns], schema=arrow))


def _read(data: Bytes, line: Longs) -> LogicalMessage:
    message = decode(b"M" + bytes(data[line[scan.NEW] : line[scan.END]]))
    # It was decoded once when it arrived.
    assert isinstance(message, LogicalMessage)  # noqa: S101
    return message
