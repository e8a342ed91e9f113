"""What a reader of a log ends with, and what is written beside its changes."""

from typing import Any

import psycopg
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.schema_change import SchemaChange
from deltaworks.log.change_log import GroupHeader
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import RecordReport, drain

Row = dict[str, Any]


def record(log: MemoryLog, source: PostgresSource) -> RecordReport:
    """Bring the log to now."""
    with log.writer() as writer:
        return drain(source, writer, log.reader())


def replay(log: MemoryLog, table: str) -> dict[tuple[Any, ...], Row]:
    """The rows of a table as a sink keeps them: by key, the newest word wins, columns that were not sent stay."""
    rows: dict[tuple[Any, ...], Row] = {}
    for group in log.reader().read(after_sequence=-1):
        for batch in group.batches:
            if batch.schema.name.name != table:
                continue
            for row in batch.rows.to_pylist():
                assert row["_commit"] <= group.header.position.value
                if row["_op"] == "t":
                    rows.clear()
                    continue
                key = tuple(row[name] for name in batch.schema.key)
                was_at = tuple((row["_old_key"] or row)[name] for name in batch.schema.key)
                had = rows.pop(was_at, {})
                if row["_op"] != "d":
                    values = {name: row[name] for name in batch.schema.names}
                    rows[key] = values | {name: had[name] for name in row["_unchanged"] or ()}
    return rows


def table_of(database: Database, table: str, *, key: tuple[str, ...] = ("id",)) -> dict[tuple[Any, ...], Row]:
    """The rows of a table as the database has them."""
    with database.connect(row_factory=psycopg.rows.dict_row) as connection:
        found = connection.execute(f"select * from {table}").fetchall()  # type: ignore[arg-type]
    return {tuple(row[name] for name in key): row for row in found}  # type: ignore[call-overload]


def headers(log: MemoryLog) -> list[GroupHeader]:
    """Every group's header, in order."""
    return [group.header for group in log.reader().read(after_sequence=-1)]


def schema_changes(log: MemoryLog) -> list[SchemaChange]:
    """The schema changes in the log, in order."""
    stored = [change for header in headers(log) for change in header.progress.get("schema_changes", ())]
    return [SchemaChange.from_json(change) for change in stored]


def gaps(log: MemoryLog) -> list[str]:
    """Why changes were missed, each gap once."""
    found = [gap["reason"] for header in headers(log) for gap in header.progress["gaps"]]
    return list(dict.fromkeys(found))
