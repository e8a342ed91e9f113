"""A log written before a meta column existed is read as if it had been there."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.position import START, Lsn
from deltaworks.schema import AS_TEXT, Column, TableName, TableSchema

FILM = TableSchema(
    name=TableName("public", "film"),
    columns=(Column(name="id", type=pa.int32(), source_type="integer", nullable=False),),
    key=("id",),
)


def test_changes_from_before_as_text_are_read_with_it(tmp_path: Path) -> None:
    row = {
        "_op": "c",
        "_commit": 9,
        "_ordinal": 0,
        "_txid": 7,
        "_committed_at": datetime(2026, 1, 1, tzinfo=UTC),
        "id": 1,
    }
    new = pa.RecordBatch.from_pylist([row], schema=change_schema(FILM))
    old = new.drop_columns([AS_TEXT.name])
    with LocalLogWriter.open(tmp_path) as writer:
        writer.append(Group(batches=(ChangeBatch(FILM, old),), position=Lsn(9), previous_position=START))
    (group,) = LocalLogReader(tmp_path).read(after_sequence=-1)
    (batch,) = group.batches
    assert (batch.schema, batch.rows) == (FILM, new)
