"""Entities that a request wants processed again, kept in the app's state until each of them was.

    begin ──► waiting ──► released, a few at a time ──► settled: written, held or dead
              │                                          │
              └ survives a restart                       └ counted; the request ends with the last one

Only a few are released while fresh changes come, so a request for every key of a large app holds up no change by more
than one cycle.
"""

import json
import sqlite3
import zlib
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from deltaworks.process.fold import Key
from deltaworks.process.requests import Request, Slice

STATEMENTS = (
    """
    create table asked_request (
      id text primary key, total int not null, missing int not null, set_back int not null default 0)
    """,
    "create table asked (request text, _key, is_released int not null default 0, primary key (request, _key)) "
    "without rowid",
    "create index asked_by_key on asked (_key)",
)
"""What creates the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How far a request is: `left` of `total` entities are not settled yet."""

    total: int
    missing: int
    set_back: int
    left: int


class Asked:
    """The requests in a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._is_busy: bool | None = None
        connection.create_function("in_slice", 3, _is_in_slice, deterministic=True)

    def begin(self, request: Request) -> bool:
        """Choose the entities of a request; `False` and a no-op for one that has begun. Inside `settling`."""
        if self._connection.execute("select 1 from asked_request where id = ?", (request.id,)).fetchone() is not None:
            return False
        keys = self.as_stored(request.keys)
        condition, values = _chosen(keys, request.slice)
        cursor = self._connection.execute(
            f"insert into asked (request, _key) select :id, _key from entity where {condition}",
            {"id": request.id} | values,
        )
        missing = 0 if keys is None else len(keys) - cursor.rowcount
        self._connection.execute(
            "insert into asked_request (id, total, missing) values (?, ?, ?)", (request.id, cursor.rowcount, missing)
        )
        self._is_busy = True
        return True

    def as_stored(self, keys: Sequence[Key] | None) -> Sequence[Key] | None:
        """Keys as a person gives them, `7` or `"7"`, in the type that the state has them in."""
        if keys is None:
            return None
        row = self._connection.execute("select typeof(_key) from entity limit 1").fetchone()
        is_number = row is not None and row[0] == "integer"
        stored = [int(key) if is_number and str(key).lstrip("-").isdecimal() else str(key) for key in keys]
        return list(dict.fromkeys(stored))

    def release(self, *, limit: int) -> list[Key]:
        """Take entities that wait, the oldest request's first; the caller makes them dirty. Inside `settling`."""
        if not self.is_busy:
            return []
        found = self._connection.execute(
            "select request, _key from asked where not is_released limit ?", (limit,)
        ).fetchall()
        self._connection.executemany("update asked set is_released = 1 where request = ? and _key = ?", found)
        return list(dict.fromkeys(key for _, key in found))

    def settle(self, done: Iterable[Key], set_back: Iterable[Key]) -> None:
        """Note that entities were processed; those that failed count apart. Inside `settling`."""
        if not self.is_busy:
            return
        failed = json.dumps(list(set_back))
        self._connection.execute(
            """
            update asked_request set set_back = set_back + (
              select count(*) from asked where request = id and is_released
              and _key in (select value from json_each(?)))
            """,
            (failed,),
        )
        self._connection.execute(
            "delete from asked where is_released and _key in "
            "(select value from json_each(?) union all select value from json_each(?))",
            (failed, json.dumps(list(done))),
        )

    def asking(self, request_id: str) -> Asking | None:
        """How far a request is; `None` for one that has not begun, or is forgotten."""
        row = self._connection.execute(
            "select total, missing, set_back from asked_request where id = ?", (request_id,)
        ).fetchone()
        if row is None:
            return None
        total, missing, set_back = row
        (left,) = self._connection.execute("select count(*) from asked where request = ?", (request_id,)).fetchone()
        return Asking(total=total, missing=missing, set_back=set_back, left=left)

    def forget(self, request_id: str) -> None:
        """Remove what is kept of a request that has ended. Inside `settling`."""
        for table, column in (("asked_request", "id"), ("asked", "request")):
            self._connection.execute(f"delete from {table} where {column} = ?", (request_id,))
        self._is_busy = None

    def forget_all(self) -> None:
        """Remove what is kept of every request. Inside `settling`."""
        self._connection.execute("delete from asked_request")
        self._connection.execute("delete from asked")
        self._is_busy = False

    @property
    def is_busy(self) -> bool:
        """Whether any request has begun and not ended: without one, nothing here costs anything."""
        if self._is_busy is None:
            self._is_busy = self._connection.execute("select 1 from asked_request limit 1").fetchone() is not None
        return self._is_busy


def read_asking(file: Path, request_id: str) -> Asking | None:
    """How far a request is, for another process than the runner's; `None` before it has begun and after it ended."""
    if not file.exists():
        return None
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return Asked(connection).asking(request_id)
        except sqlite3.OperationalError:
            # The runner is creating the file at this moment.
            return None


def slice_of(key: Key, count: int) -> int:
    """The slice that a key falls into; the same in every process and for ever.

    >>> slice_of(7, 16), slice_of("tt0078748", 16)
    (2, 7)
    """
    return zlib.crc32(json.dumps(key).encode()) % count


def _is_in_slice(key: Key, index: int, count: int) -> bool:
    return slice_of(key, count) == index


def _chosen(keys: Sequence[Key] | None, part: Slice | None) -> tuple[str, dict[str, object]]:
    if keys is not None:
        return "_key in (select value from json_each(:keys))", {"keys": json.dumps(keys)}
    if part is not None:
        return "in_slice(_key, :index, :count)", {"index": part.index, "count": part.count}
    return "true", {}
