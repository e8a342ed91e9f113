"""A sink that tells on the runner, and the kit's changes and feed under the names that the tests use."""

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltaworks.config import Config
from deltaworks.position import Lsn, Version
from deltaworks.process.report import ProcessReport
from deltaworks.process.runner import Runner
from deltaworks.process.sink import Capabilities, Document, Refusal
from deltaworks.testing.changes import Change, Feed, batches, create, delete, read, table_schema, truncate, update

__all__ = [
    "INT",
    "NULL_INT",
    "NULL_TEXT",
    "TEXT",
    "Change",
    "Feed",
    "StaleWriteError",
    "TableSink",
    "batches",
    "config_in",
    "create",
    "delete",
    "following",
    "read",
    "table_schema",
    "truncate",
    "update",
    "wait_until",
]

INT, TEXT = (pa.int32(), "integer", False), (pa.string(), "text", False)
NULL_INT, NULL_TEXT = (pa.int32(), "integer", True), (pa.string(), "text", True)


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

    def reached(self) -> list[int]:
        """The position of every flush, in order."""
        with sqlite3.connect(self.file) as connection:
            rows = connection.execute("select position from reached order by rowid").fetchall()
        connection.close()
        return [position for (position,) in rows]


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


def wait_until(
    condition: Callable[[], bool], *, timeout_s: float = 60.0, what: Callable[[], str] = lambda: "timed out"
) -> None:
    """Return as soon as it holds; fail the test, with what there is to say then, when it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.005)


def config_in(home: Path, name: str = "films", **settings: Any) -> Config:
    """The configuration of one app over a source that nobody asks."""
    return Config.model_validate(
        {
            "home": home,
            "sources": {"studio": {"kind": "postgres", "dsn": "postgresql://nowhere", "tables": ["film"]}},
            "apps": {name: {"module": "none:none", "source": "studio", "settings": settings}},
        }
    )


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
