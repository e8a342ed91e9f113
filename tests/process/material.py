"""Changes by hand, a feed that puts them into a log, and a sink that tells on the runner."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltaworks.change import CREATE, DELETE, READ, TRUNCATE, UPDATE, ChangeBatch, change_schema
from deltaworks.config import Config
from deltaworks.log.change_log import Group, LogWriter
from deltaworks.position import Lsn, Version
from deltaworks.process.report import ProcessReport
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Capabilities, Document, Refusal
from deltaworks.schema import Column, TableName, TableSchema

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)


def table_schema(table: str, key: str, /, **columns: tuple[pa.DataType, str, bool]) -> TableSchema:
    """A table; each column is (type, source type, nullable)."""
    return TableSchema(
        name=TableName.parse(table),
        key=tuple(key.split(",")),
        columns=tuple(
            Column(name=column, type=kind, source_type=source_type, nullable=nullable)
            for column, (kind, source_type, nullable) in columns.items()
        ),
    )


INT, TEXT = (pa.int32(), "integer", False), (pa.string(), "text", False)
NULL_INT, NULL_TEXT = (pa.int32(), "integer", True), (pa.string(), "text", True)


@dataclass(frozen=True, kw_only=True)
class Change:
    """One change; `row` has the columns after it, or the key alone where it is a delete."""

    op: str
    table: TableSchema
    row: Mapping[str, Any] = field(default_factory=dict)
    unchanged: Sequence[str] = ()
    old_key: Mapping[str, Any] | None = None


def create(table: TableSchema, **row: Any) -> Change:
    return Change(op=CREATE, table=table, row=row)


def update(
    table: TableSchema, *, old_key: Mapping[str, Any] | None = None, unchanged: Sequence[str] = (), **row: Any
) -> Change:
    return Change(op=UPDATE, table=table, row=row, unchanged=unchanged, old_key=old_key)


def read(table: TableSchema, **row: Any) -> Change:
    return Change(op=READ, table=table, row=row)


def delete(table: TableSchema, **key: Any) -> Change:
    return Change(op=DELETE, table=table, row=key)


def truncate(table: TableSchema) -> Change:
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
        schema = change_schema(table)
        rows = [
            {
                **{name: change.row.get(name) for name in table.names},
                "_op": change.op,
                "_commit": position,
                "_ordinal": ordinal,
                "_txid": 0 if change.op == READ else position,
                "_committed_at": committed_at or MOMENT + timedelta(seconds=position),
                "_unchanged": list(change.unchanged) or None,
                "_old_key": change.old_key,
            }
            for ordinal, change in listed
        ]
        found.append(ChangeBatch(table, pa.RecordBatch.from_pylist(rows, schema=schema)))
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


class StaleWriteError(Exception):
    """A sink was given an older version of a document than it had."""


class TableSink:
    """A sink in a SQLite file: what was flushed survives the runner, what was only written does not.

    Never refuses: it reports any write older than what it holds, so a test sees what the runner really did.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    @property
    def name(self) -> str:
        return "table"

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(is_transactional=True)

    def open(self, *, app: str, key: str, config: Config) -> "TableSinkWriter":
        return TableSinkWriter(self.file)

    def documents(self) -> dict[Any, tuple[Version, Any]]:
        """Every flushed document, tombstones with the body `None`."""
        with sqlite3.connect(self.file) as connection:
            rows = connection.execute("select key, position, ordinal, body from document").fetchall()
        connection.close()
        return {key: (Version(Lsn(position), ordinal), json.loads(body)) for key, position, ordinal, body in rows}

    def bodies(self) -> dict[Any, Any]:
        """The bodies of the documents that are there."""
        return {key: body for key, (_, body) in self.documents().items() if body is not None}


class TableSinkWriter:
    def __init__(self, file: Path) -> None:
        self.connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        self.connection.execute("pragma journal_mode = wal")
        self.connection.execute(
            "create table if not exists document (key primary key, position, ordinal, committed_at, flushed_at, body)"
        )
        self.connection.execute("create table if not exists reached (position)")
        self.pending: list[Document] = []

    @property
    def name(self) -> str:
        return "table"

    def write(self, documents: Sequence[Document]) -> None:
        keys = [document.key for document in documents]
        assert len(keys) == len(set(keys)), "a key twice in one write"
        self.pending += documents

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        self.connection.execute("begin")
        for document in self.pending:
            old = self.connection.execute(
                "select position, ordinal from document where key = ?", (document.key,)
            ).fetchone()
            if old is not None and Version(Lsn(old[0]), old[1]) > document.version:
                raise StaleWriteError(document.key, old, document.version)
            self.connection.execute(
                "insert or replace into document values (?, ?, ?, ?, ?, ?)",
                (
                    document.key,
                    document.version.position.value,
                    document.version.ordinal,
                    document.committed_at.timestamp(),
                    time.time(),
                    json.dumps(document.body, default=str),
                ),
            )
        self.connection.execute("insert into reached values (?)", (up_to.value,))
        self.connection.execute("commit")
        self.pending = []
        return []

    def close(self) -> None:
        self.connection.close()


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 20.0) -> None:
    """Return as soon as it holds; fail the test when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.005)


@contextmanager
def following(runner: Runner) -> Iterator["Future[ProcessReport]"]:
    """Follow the log in a thread; stops when the block ends, whatever happens in it."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        followed = pool.submit(runner.follow, stop)
        try:
            yield followed
        finally:
            stop.set()
