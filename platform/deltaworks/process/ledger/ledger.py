"""An app's part of the proof, in its state: what it took of the log, and what left for the sinks.

| table          | holds                                                                           |
|----------------|---------------------------------------------------------------------------------|
| `taken`        | per run of groups of the log: sketch of the changes that were folded            |
| `taken_window` | of the same: count, sum and xor per table and minute of commit                  |
| `left_document` | per key: the version of the document that every sink was last seen to make durable |
| `left_run`     | the same of an app that keeps no rows, where many left at once; see `left_runs` |

`taken` is written in the transaction of the fold and of the checkpoint, so it can neither miss nor repeat a
group that the state has. What left is written when every sink has flushed: losing it only repeats documents.
"""

import json
import sqlite3
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from deltaworks.capture.proof import Window, WindowSet
from deltaworks.capture.sketch import Sketch
from deltaworks.log.taken import Taken
from deltaworks.position import Lsn, Version
from deltaworks.process.ledger.left import sinks_text, stored_run
from deltaworks.process.ledger.left_runs import LeftRuns, read_runs
from deltaworks.process.rows import quoted
from deltaworks.process.sink import Document

ROW_BY_ROW = 1_000
"""Documents of a range up to which each is a row; more are a run, which costs a tenth for each."""
_PAGE = 65_536
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
      _key primary key, position int, ordinal int, committed_at int, sinks text, is_gone int) without rowid
    """,
)


_LEAVE = "insert or replace into left_document values (?, ?, ?, ?, ?, ?)"


class Ledger:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._runs = LeftRuns(connection)

    def create(self) -> None:
        """Make the tables; a state from before there were any begins its proof where it stands."""
        for statement in _STATEMENTS:
            self._connection.execute(statement)
        self._runs.create()
        columns = [name for _, name, *_ in self._connection.execute("pragma table_info(left_document)")]
        if "is_gone" not in columns:
            self._connection.execute("alter table left_document add column is_gone int")

    def take(self, taken: Taken) -> None:
        """Note what is folded of some groups; inside the fold's transaction."""
        after, up_to = taken.after, taken.up_to
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
            _LEAVE,
            (
                (
                    document.key,
                    document.version.position.value,
                    document.version.ordinal,
                    _microseconds(document.committed_at),
                    sinks_text(document, routes),
                    None,
                )
                for document in documents
            ),
        )

    def leave_runs(self, runs: Sequence[pa.Table]) -> None:
        """As `leave`, of an app that keeps no rows: all that left of one range."""
        if sum(run.num_rows for run in runs) > ROW_BY_ROW:
            for run in runs:
                self._runs.add(run)
            return
        for run in runs:
            key, position, ordinal, minute, sinks, is_gone = (column.to_pylist() for column in run.columns)
            committed_at = (60_000_000 * each for each in minute)
            self._connection.executemany(_LEAVE, zip(key, position, ordinal, committed_at, sinks, is_gone, strict=True))

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

    def left_tables(self) -> Iterator[pa.Table]:
        """Every version that left, as `left` has them; of a key the last one counts where versions are the same."""
        if self._connection is None:
            return
        if "left_run" in self._tables:
            yield from read_runs(self._connection)
        if "left_document" in self._tables:
            has_gone = any(name == "is_gone" for _, name, *_ in self._rows("pragma table_info(left_document)"))
            rows = self._connection.execute(
                "select _key, position, ordinal, committed_at / 60000000, sinks, "
                f"{'ifnull(is_gone, 0)' if has_gone else '0'} from left_document"
            )
            while page := rows.fetchmany(_PAGE):
                yield stored_run(page)

    def left(self) -> str:
        """A text that is another one whenever a newer document of a key left, or one of another key."""
        values: list[Any] = []  # Any: values of SQLite
        if "left_document" in self._tables:
            values += self._rows(
                "select count(*), max(position), total(position % 1000003), total(ordinal % 1000003), "
                "total(length(sinks)), count(sinks) from left_document"
            )
        if "left_run" in self._tables:
            values += self._rows("select max(id) from left_run")
        return ",".join(str(value) for row in values for value in row)

    def newest(self, texts: Collection[str]) -> Iterator[tuple[str, Version]]:
        """Of those of these keys, as `key_text` gives them, that do not wait for another try: their newest change."""
        if self._connection is None or "entity" not in self._tables:
            return
        found = self._connection.execute(
            "select cast(_key as text), position, ordinal from entity "
            "where standing in (0, 1) and cast(_key as text) in (select value from json_each(?))",
            (json.dumps(list(texts)),),
        )
        for text, position, ordinal in found:
            yield text, Version(Lsn(position), ordinal)

    def keeps_rows(self) -> bool:
        """Whether an app that could do without rows keeps them all the same."""
        return "plan" in self._tables and any(kept for (kept,) in self._rows("select keeps_rows from plan"))

    def is_range_under_way(self) -> bool:
        """Whether an app that keeps no rows may have more in its sinks than its ledger says."""
        if not {"plan", "checkpoint"} <= self._tables:
            return False
        ((is_ahead,),) = self._rows(
            "select ifnull((select reading_to from plan), -1) > ifnull((select sequence from checkpoint), -1)"
        )
        return bool(is_ahead)

    def entities(
        self, entity: str, *, are_clean_told: bool = True
    ) -> Iterator[Sequence[Sequence[Any]]]:  # Any: values of SQLite
        """Pages of the entities that the state knows, rows of this table: key, position, ordinal, minute of the
        newest change, standing, and whether the row is there. Clean ones only with `are_clean_told`.
        """
        rows = f"row_{entity}"
        if self._connection is None or not {"entity", rows} <= self._tables:
            return
        found = self._connection.execute(
            "select e._key, e.position, e.ordinal, e.committed_at / 60000000, e.standing, r._key is not null "
            f"from entity as e left join {quoted(rows)} as r using (_key) "
            f"where {int(are_clean_told)} or e.standing <> 0"
        )
        while page := found.fetchmany(_PAGE):
            yield page

    def _rows(self, statement: str) -> Iterable[Any]:  # Any: values of SQLite
        return () if self._connection is None else self._connection.execute(statement)


def _window(count: int, total: str, xor: str) -> Window:
    return Window(count=count, sum=int(total, 16), xor=int(xor, 16))


def _microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)
