"""Changes given as Python values, and a feed that puts them into a log as capture would.

    table_schema ──► create, update, delete, read, truncate ──► Feed.commit ──► a log

The exact form, in which a test says everything that a source can send. For an app, `deltaworks.testing.source` is
easier: it knows the app's tables and keeps the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from deltaworks.change import CREATE, DELETE, READ, TRUNCATE, UPDATE, ChangeBatch, change_schema
from deltaworks.log.change_log import Group, LogWriter
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""A transaction at position n committed n seconds after this, unless a test says otherwise."""


def table_schema(table: str, key: str, /, **columns: tuple[pa.DataType, str, bool]) -> TableSchema:
    """A table; `key` names its key columns, with commas between them; a column is (type, source type, nullable)."""
    return TableSchema(
        name=TableName.parse(table),
        key=tuple(key.split(",")),
        columns=tuple(
            Column(name=column, type=kind, source_type=source_type, nullable=nullable)
            for column, (kind, source_type, nullable) in columns.items()
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change; `row` has the columns after it, or the key alone where it is a delete."""

    op: str
    table: TableSchema
    row: Mapping[str, Any] = field(default_factory=dict)
    unchanged: Sequence[str] = ()
    old_key: Mapping[str, Any] | None = None


def create(table: TableSchema, **row: Any) -> Change:
    """A row that came."""
    return Change(op=CREATE, table=table, row=row)


def update(
    table: TableSchema, *, old_key: Mapping[str, Any] | None = None, unchanged: Sequence[str] = (), **row: Any
) -> Change:
    """A row as it is now; `unchanged` are columns whose value the source did not send, `old_key` the key it had."""
    return Change(op=UPDATE, table=table, row=row, unchanged=unchanged, old_key=old_key)


def read(table: TableSchema, **row: Any) -> Change:
    """A row that a dump found."""
    return Change(op=READ, table=table, row=row)


def delete(table: TableSchema, **key: Any) -> Change:
    """A row that went."""
    return Change(op=DELETE, table=table, row=key)


def truncate(table: TableSchema) -> Change:
    """All rows of a table went."""
    return Change(op=TRUNCATE, table=table)


def batches(
    changes: Sequence[Change], *, position: int, committed_at: datetime | None = None
) -> tuple[ChangeBatch, ...]:
    """The changes of one transaction, as capture would hand them over."""
    by_table: dict[str, list[tuple[int, Change]]] = {}
    for ordinal, change in enumerate(changes):
        by_table.setdefault(str(change.table.name), []).append((ordinal, change))
    found = []
    for listed in by_table.values():
        table = listed[-1][1].table
        rows = [
            {
                **{name: change.row.get(name) for name in table.names},
                "_op": change.op,
                "_commit": position,
                "_ordinal": ordinal,
                "_txid": 0 if change.op == READ else position,
                "_committed_at": committed_at or EPOCH + timedelta(seconds=position),
                "_unchanged": list(change.unchanged) or None,
                "_old_key": change.old_key,
            }
            for ordinal, change in listed
        ]
        found.append(ChangeBatch(table, pa.RecordBatch.from_pylist(rows, schema=change_schema(table))))
    return tuple(found)


class Feed:
    """Appends one transaction after the other, each as a group of its own."""

    def __init__(self, writer: LogWriter) -> None:
        self.writer = writer

    def commit(self, *changes: Change, committed_at: datetime | None = None) -> int:
        """Append a transaction; returns its position."""
        return self.commit_together(changes, committed_at=committed_at)

    def commit_together(self, *transactions: Sequence[Change], committed_at: datetime | None = None) -> int:
        """Append several transactions as one group; returns the last position."""
        end = self.writer.end().position
        position = end.value
        found: list[ChangeBatch] = []
        for changes in transactions:
            position += 10
            found += batches(changes, position=position, committed_at=committed_at)
        self.writer.append(
            Group(
                batches=tuple(found),
                position=Lsn(position),
                previous_position=end,
                transaction_count=len(transactions),
            )
        )
        return position
