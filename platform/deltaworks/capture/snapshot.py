"""The contract of a source that can be read as of one exact position of its log.

A dump reads chunk by chunk while the table moves on. Comparing needs more: all tables in one
snapshot, and the position in the log that this snapshot is the state of.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import pyarrow as pa

from deltaworks.errors import RetryableError
from deltaworks.position import Lsn
from deltaworks.schema import TableName, TableSchema


class TableRewrittenError(RetryableError):
    """A table was truncated or rewritten while the snapshot was taken, so the snapshot misses its rows."""


class SourceSnapshot(Protocol):
    """The captured tables as they were at `position`: with every change at or before it and no later one."""

    @property
    def position(self) -> Lsn:
        """The position that this is the state of."""

    def tables(self) -> Sequence[TableSchema]:
        """The captured tables as they were, in configured order."""

    def read(self, table: TableName) -> Iterator[pa.RecordBatch]:
        """All rows of a table in no order, as its `row_schema()` says; values as in a dump."""


class SnapshotSource(Protocol):
    """A source of which exact snapshots can be taken, next to the stream and without stopping anyone."""

    def snapshot(self) -> AbstractContextManager[SourceSnapshot]:
        """Take one; it lives as long as the context.

        Raises:
            SourceUnreachableError: the server does not answer.
            TableRewrittenError: a table was truncated at that moment; take another.
        """
