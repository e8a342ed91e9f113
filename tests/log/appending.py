"""Groups of one small table, for tests and for the processes they start."""

import pyarrow as pa

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

TABLE = TableSchema(
    name=TableName("public", "movie"),
    columns=(Column(name="id", type=pa.int64(), source_type="bigint", nullable=False),),
    key=("id",),
)


def append(writer: LocalLogWriter, ids: list[int]) -> int:
    """Append one group that holds these ids; its sequence."""
    count = len(ids)
    rows = {
        "_op": ["c"] * count,
        "_commit": [1] * count,
        "_ordinal": list(range(count)),
        "_txid": [1] * count,
        "_committed_at": [0] * count,
        "_unchanged": [None] * count,
        "_old_key": [None] * count,
        "_as_text": [None] * count,
        "id": ids,
    }
    batch = ChangeBatch(TABLE, pa.RecordBatch.from_pydict(rows, schema=change_schema(TABLE)))
    end = writer.end()
    position = Lsn(end.position.value + 1)
    return writer.append(Group(batches=(batch,), position=position, previous_position=end.position)).sequence
