"""Change logs written by hand."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa
import pytest

from deltaworks.change import ChangeBatch, change_schema
from deltaworks.log.change_log import Group, LogReader
from deltaworks.log.memory import MemoryLog
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema


class Changes:
    """A table's changes, one call each, written as whole transactions into a log in memory."""

    epoch_time = datetime(2026, 1, 1, tzinfo=UTC)

    def __init__(self, table: TableSchema) -> None:
        self.table = table
        self.log = MemoryLog()
        self._writer = self.log.writer()

    @property
    def reader(self) -> LogReader:
        return self.log.reader()

    def commit(self, position: int, *changes: dict[str, Any], table: TableSchema | None = None) -> None:
        """Append one group with one transaction; a change is a row with `_op` and what else differs."""
        self.commit_all([(position, changes)], table=table)

    def commit_all(
        self, transactions: Sequence[tuple[int, Sequence[dict[str, Any]]]], *, table: TableSchema | None = None
    ) -> None:
        """Append one group with these transactions."""
        self.append(self.batch(transactions, table=table), position=transactions[-1][0])

    def batch(
        self, transactions: Sequence[tuple[int, Sequence[dict[str, Any]]]], *, table: TableSchema | None = None
    ) -> ChangeBatch:
        """The changes of these transactions."""
        table = table or self.table
        rows = [
            self._row(table, position, ordinal, change)
            for position, changes in transactions
            for ordinal, change in enumerate(changes)
        ]
        return ChangeBatch.from_arrow(pa.RecordBatch.from_pylist(rows, schema=change_schema(table)))

    def append(self, *batches: ChangeBatch, position: int) -> None:
        """Append one group; batches without a change are left out."""
        self._writer.append(
            Group(
                batches=tuple(batch for batch in batches if len(batch)),
                position=Lsn(position),
                previous_position=self._writer.end().position,
            )
        )

    def _row(self, table: TableSchema, position: int, ordinal: int, change: dict[str, Any]) -> dict[str, Any]:
        return dict.fromkeys(change_schema(table).names) | {
            "_commit": position,
            "_ordinal": ordinal,
            "_txid": position,
            "_committed_at": self.epoch_time + timedelta(seconds=position),
            **change,
        }


@pytest.fixture
def film() -> TableSchema:
    return TableSchema(
        name=TableName("public", "film"),
        columns=(
            Column(name="film_id", type=pa.int32(), source_type="integer", nullable=False),
            Column(name="title", type=pa.string(), source_type="text"),
            Column(name="plot", type=pa.string(), source_type="text"),
        ),
        key=("film_id",),
    )


@pytest.fixture(scope="session")
def new_changes() -> type[Changes]:
    """Starts a log of a table's changes."""
    return Changes


@pytest.fixture
def changes(film: TableSchema) -> Changes:
    return Changes(film)
