"""A sink that several processes write at once and that refuses what is older, as a real one with versions does."""

import json
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process.material import TableSink

from deltaworks.config import Config
from deltaworks.position import Lsn
from deltaworks.process.sink import Capabilities, Document, Refusal


class SharedTable(TableSink):
    """Counts what it refused, and remembers who wrote what."""

    def __init__(self, file: Path, *, writer: str = "") -> None:
        super().__init__(file)
        self.writer = writer

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(is_versioned=True, keeps_tombstones=True, is_transactional=True)

    def open(self, *, app: str, key: str, config: Config) -> "SharedTableWriter":  # type: ignore[override]
        return SharedTableWriter(self.file, self.writer)

    def rows(self) -> list[tuple[Any, int, int, str]]:
        """Key, position, ordinal and body of every document, tombstones with the body `null`."""
        return self._rows("select key, position, ordinal, body from document") if self.file.exists() else []

    def stale(self) -> int:
        """How many older documents were refused."""
        return int(self._rows("select count(*) from stale")[0][0])

    def written_by(self, writer: str) -> int:
        """How many documents of a writer were taken."""
        return int(self._rows(f"select count(*) from written where writer = '{writer}'")[0][0])

    def _rows(self, query: str) -> list[tuple[Any, ...]]:
        connection = sqlite3.connect(self.file, timeout=60)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()


class SharedTableWriter:
    def __init__(self, file: Path, writer: str) -> None:
        self.writer = writer
        self.connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False, timeout=60)
        for statement in (
            "pragma journal_mode = wal",
            "pragma synchronous = off",
            "create table if not exists document (key primary key, position, ordinal, body)",
            "create table if not exists written (key, position, ordinal, writer, at)",
            "create table if not exists stale (key, position, ordinal, writer, at)",
        ):
            self.connection.execute(statement)
        self.pending: list[Document] = []

    @property
    def name(self) -> str:
        return "table"

    def write(self, documents: Sequence[Document]) -> None:
        self.pending += documents

    def flush(self, *, up_to: Lsn) -> Sequence[Refusal]:
        self.connection.execute("begin immediate")
        for document in self.pending:
            version = document.version.position.value, document.version.ordinal
            old = self.connection.execute(
                "select position, ordinal from document where key = ?", (document.key,)
            ).fetchone()
            where = "stale" if old is not None and old > version else "written"
            self.connection.execute(
                f"insert into {where} values (?, ?, ?, ?, ?)", (document.key, *version, self.writer, time.time())
            )
            if where == "written":
                self.connection.execute(
                    "insert or replace into document values (?, ?, ?, ?)",
                    (document.key, *version, json.dumps(document.body, default=str)),
                )
        self.connection.execute("commit")
        self.pending = []
        return []

    def close(self) -> None:
        self.connection.close()
