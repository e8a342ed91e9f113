"""An app's part of the proof, in its state: what it took of the log, and what left for the sinks.

| table          | holds                                                                           |
|----------------|---------------------------------------------------------------------------------|
| `taken`        | per run of groups of the log: sketch of the changes that were folded            |
| `taken_window` | of the same: count, sum and xor per table and minute of commit                  |
| `left`         | per key: the version of the document that every sink was last seen to make durable |

`taken` is written in the transaction of the fold and of the checkpoint, so it can neither miss nor repeat a
group that the state has. `left` is written when every sink has flushed: losing it only repeats documents.
"""

import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from deltaworks.capture.proof import Window, WindowSet
from deltaworks.capture.sketch import Sketch
from deltaworks.change import ChangeBatch
from deltaworks.log.taken import Taken
from deltaworks.position import Lsn, Version
from deltaworks.process.rows import quoted
from deltaworks.process.sink import Document

GROUPS_TOGETHER = 4096
"""Groups of the log whose changes are one span. Few enough to be kept apart when the log lets old ones go."""

_STATEMENTS = (
    "create table if not exists taken (block integer primary key, after int, up_to int, sketch text)",
    """
    create table if not exists taken_window (
      block int, "table" text, minute int, count int, sum text, xor text, primary key (block, "table", minute)
    ) without rowid
    """,
    """
    create table if not exists left_document (
      _key primary key, position int, ordinal int, committed_at int, sinks text) without rowid
    """,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftDocument:
    """The document of a key as it left last. `sinks` are those that it is in: `None` for all, none where it is gone."""

    key: Any  # Any: a key is what the app's key column holds
    version: Version
    committed_at: int
    sinks: Collection[str] | None

    def is_in(self, sink: str) -> bool:
        """Whether that sink has it, so that it has to be there."""
        return self.sinks is None or sink in self.sinks


class Ledger:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def create(self) -> None:
        """Make the tables; a state from before there were any begins its proof where it stands."""
        for statement in _STATEMENTS:
            self._connection.execute(statement)

    def take(self, batches: Iterable[ChangeBatch], *, after: int, up_to: int) -> None:
        """Note what is folded of the groups after `after`; inside the fold's transaction."""
        taken = Taken.of(batches, after=after, up_to=up_to)
        block = (after + 1) // GROUPS_TOGETHER
        row = self._connection.execute("select after, sketch from taken where block = ?", (block,)).fetchone()
        began, sketch = (after, taken.sketch) if row is None else (row[0], Sketch.from_text(row[1]).merge(taken.sketch))
        if row is None or taken.windows.windows:
            self._connection.execute(
                "insert or replace into taken values (?, ?, ?, ?)", (block, began, up_to, sketch.to_text())
            )
        else:
            self._connection.execute("update taken set up_to = ? where block = ?", (up_to, block))
        self._add(block, taken.windows)

    def leave(self, documents: Iterable[Document], routes: Mapping[Any, Collection[str]]) -> None:  # Any: keys
        """Note documents that every sink has made durable; inside the transaction that settles their keys.

        `routes` has the sinks of those that are not for all of them.
        """
        self._connection.executemany(
            "insert or replace into left_document values (?, ?, ?, ?, ?)",
            (
                (
                    document.key,
                    document.version.position.value,
                    document.version.ordinal,
                    _microseconds(document.committed_at),
                    "" if document.body is None else ",".join(routes[document.key]) if document.key in routes else None,
                )
                for document in documents
            ),
        )

    def _add(self, block: int, windows: WindowSet) -> None:
        for (table, minute), window in windows.windows.items():
            row = self._connection.execute(
                'select count, sum, xor from taken_window where block = ? and "table" = ? and minute = ?',
                (block, table, minute),
            ).fetchone()
            merged = window if row is None else _window(*row).merge(window)
            self._connection.execute(
                "insert or replace into taken_window values (?, ?, ?, ?, ?, ?)",
                (block, table, minute, merged.count, f"{merged.sum:x}", f"{merged.xor:x}"),
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stood:
    """Entities of one minute of their newest change, by where they stand.

    `left` ones have their document in the sinks, `filtered` ones have a row and no document, `gone` ones have no row.
    """

    minute: int
    left: int = 0
    filtered: int = 0
    gone: int = 0
    waiting: int = 0
    held: int = 0
    dead: int = 0

    @property
    def entities(self) -> int:
        """All of them."""
        return self.left + self.filtered + self.gone + self.waiting + self.held + self.dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Left:
    """How many keys have left, and a text that differs when something left since."""

    documents: int = 0
    digest: str = ""


class LedgerReader:
    """Reads an app's ledger beside its runner, each call as of its own moment. A context manager.

    An app that has not run yet has an empty one.
    """

    def __init__(self, file: Path) -> None:
        self._connection = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True) if file.exists() else None
        self._tables = {name for (name,) in self._rows("select name from sqlite_master")}

    def __enter__(self) -> "LedgerReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._connection is not None:
            self._connection.close()

    def spans(self) -> list[Taken]:
        """What was folded of the log, oldest first."""
        if "taken" not in self._tables or self._connection is None:
            return []
        self._connection.execute("begin")
        with closing(self._connection.cursor()):
            windows: dict[int, dict[tuple[str, int], Window]] = {}
            for block, table, minute, *window in self._rows("select * from taken_window"):
                windows.setdefault(block, {})[table, minute] = _window(*window)
            spans = [
                Taken(
                    after=after,
                    up_to=up_to,
                    windows=WindowSet(windows.get(block, {})),
                    sketch=Sketch.from_text(sketch),
                )
                for block, after, up_to, sketch in self._rows("select * from taken order by block")
            ]
        self._connection.rollback()
        return spans

    def documents(self) -> Iterator[LeftDocument]:
        """Every document that left, in the order of the keys."""
        if "left_document" in self._tables:
            for key, position, ordinal, committed_at, sinks in self._rows("select * from left_document"):
                yield LeftDocument(
                    key=key,
                    version=Version(Lsn(position), ordinal),
                    committed_at=committed_at,
                    sinks=None if sinks is None else frozenset(filter(None, sinks.split(","))),
                )

    def left(self) -> Left:
        """What left, summed up: it differs whenever a newer document of a key left, or one of another key."""
        if "left_document" not in self._tables:
            return Left()
        ((count, *rest),) = self._rows(
            "select count(*), max(position), total(position % 1000003), total(ordinal % 1000003), "
            "total(length(sinks)), count(sinks) from left_document"
        )
        return Left(documents=count, digest=",".join(map(str, (count, *rest))))

    def stood(self, entity: str) -> list[Stood]:
        """The entities, rows of this table, by the minute of their newest change."""
        rows = f"row_{entity}"
        if not {"entity", "left_document", rows} <= self._tables:
            return []
        found = self._rows(
            f"""
            select e.committed_at / 60000000,
              sum(standing = 0 and r._key is not null and l.sinks is not ''),
              sum(standing = 0 and r._key is not null and l.sinks is ''),
              sum(standing = 0 and r._key is null),
              sum(standing = 1), sum(standing = 2), sum(standing = 3)
            from entity as e left join left_document as l using (_key) left join {quoted(rows)} as r using (_key)
            group by 1 order by 1
            """
        )
        return [
            Stood(minute=minute, left=left, filtered=filtered, gone=gone, waiting=waiting, held=held, dead=dead)
            for minute, left, filtered, gone, waiting, held, dead in found
        ]

    def _rows(self, statement: str) -> Iterable[Any]:  # Any: values of SQLite
        return () if self._connection is None else self._connection.execute(statement)


def _window(count: int, total: str, xor: str) -> Window:
    return Window(count=count, sum=int(total, 16), xor=int(xor, 16))


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)
