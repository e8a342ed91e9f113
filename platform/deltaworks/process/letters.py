"""Dead letters: what failed for good, kept in the app's state until a person or the next change sees to it.

| letter of         | holds, with `hold_key`                          | a retry                                        |
|-------------------|-------------------------------------------------|------------------------------------------------|
| an entity         | the key: its later changes are folded into its  | the newest state goes out, with the newest     |
|                   | rows, no step runs                              | version; older states in between never leave   |
| a turn of a step  | that step's later turns of the key, each kept   | every turn is told, in the order they happened |
| under `on_change` | by itself                                       |                                                |

Other keys go on. Without `hold_key` an entity's next change tries again, and the step's later turns go on past the
dead one. An entity whose row is gone is released at once: nothing is left that could fail, and what was deleted
has to leave.

A letter is written in the transaction that settles the key, so a crash in between only makes the step fail once more.
Letters name places and types, never row data.
"""

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deltaworks.position import Lsn, Version
from deltaworks.process.fold import Key, moment

STATEMENT = """
    create table letter (
      _key primary key, position int not null, ordinal int not null, committed_at int not null, failed_at real not null,
      place text, waiting int not null default 0) without rowid
"""
"""What creates the table."""
_SWEEP_EVERY_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """What becomes of a key whose step failed for good: a letter; with `hold_key` later changes wait behind it.

    >>> DeadLetter(hold_key=False)
    DeadLetter(hold_key=False)
    """

    hold_key: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What failed, or waits to be tried again.

    `version` and `committed_at` are those of the change that failed. `waiting` is what a retry brings besides: 1 where
    the entity changed since, for its newest state; the later turns of a turn. A letter of a turn has the `column`
    that changed. `place` is the step's file and line, where it has one. Of a shared app, `member` holds it.
    """

    key: Key
    version: Version
    step: str
    error: str
    attempts: int
    place: str | None = None
    column: str | None = None
    committed_at: datetime | None = None
    failed_at: datetime | None = None
    waiting: int = 0
    holds_key: bool = False
    member: str | None = None


class Letters:
    """The letters of entities in a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._are_any: bool | None = None
        self._swept_at = 0.0

    @property
    def are_any(self) -> bool:
        """Whether there may be any; without one, nothing here costs anything."""
        if self._are_any is None:
            self._are_any = self._connection.execute("select 1 from letter limit 1").fetchone() is not None
        return self._are_any

    def has(self, *, step: str, key: Key, since: Version) -> bool:
        """Whether a change of this entity, or a turn of it, died in this step: that change or a later one."""
        at = (since.position.value, since.ordinal)
        found = self._connection.execute(
            """
            select 1 from letter l join entity e on e._key = l._key
            where l._key = ? and e.standing = 3 and e.step = ? and (l.position, l.ordinal) >= (?, ?)
            union all
            select 1 from turn where is_dead and entity = ? and step = ? and (position, ordinal) >= (?, ?) limit 1
            """,
            (key, step, *at, key, step, *at),
        )
        return found.fetchone() is not None

    def write(self, places: Mapping[Key, str | None]) -> None:
        """Write a letter for each of these entities, which just died at that step's place; inside `settling`."""
        if not places:
            return
        self._connection.executemany(
            """
            insert or replace into letter (_key, position, ordinal, committed_at, failed_at, place)
            select _key, position, ordinal, committed_at, ?, ? from entity where _key = ?
            """,
            ((time.time(), place, key) for key, place in places.items()),
        )
        self._are_any = True

    def note_waiting(self, touched: Iterable[Key], *, entity_rows: str) -> None:
        """Note that held keys changed again, and release those whose row is gone; inside `folding`, after `mark`.

        `entity_rows` is the table with the entities' rows.
        """
        if not self.are_any:
            return
        held = [
            (key,)
            for (key,) in self._connection.execute(
                "select e._key from json_each(?) k cross join entity e on e._key = k.value "
                "where e.standing = 3 and e.holds",
                (json.dumps(list(touched)),),
            )
        ]
        self._connection.executemany("update letter set waiting = 1 where _key = ?", held)
        self._connection.executemany(
            f"update entity set standing = 1, attempts = 0 where _key = ? "
            f"and not exists (select 1 from {entity_rows} r where r._entity = entity._key)",
            held,
        )

    def drop(self, keys: Sequence[Key] | None, *, until: datetime) -> int:
        """Give up letters, all or those of `keys`, that were written by `until`; how many. Inside a transaction.

        The keys go on with their next change; until then the sinks keep what they have of them.
        """
        chosen = "" if keys is None else "and _key in (select value from json_each(:keys))"
        return self._connection.execute(
            f"""
            update entity set standing = 0, attempts = 0, next_try = 0, step = null, error = null
            where standing = 3 {chosen}
              and _key in (select _key from letter where failed_at <= :until)
            """,
            {"keys": json.dumps(keys), "until": until.timestamp()},
        ).rowcount

    def sweep(self) -> None:
        """Remove letters whose entities are not dead any more; inside a transaction. Until then they are ignored."""
        if self.are_any:
            self._connection.execute(
                "delete from letter where _key not in (select _key from entity where standing = 3)"
            )
            self._are_any = None
            self._swept_at = time.monotonic()

    def sweep_sometimes(self) -> None:
        """`sweep`, unless it was done a moment ago: a hot path may call it."""
        if self.are_any and time.monotonic() - self._swept_at > _SWEEP_EVERY_S:
            self.sweep()


def read_letters(
    connection: sqlite3.Connection,
    *,
    limit: int | None = None,
    key: Key | None = None,
    except_shares: Collection[int] = (),
) -> list[Letter]:
    """Dead letters of entities and of turns, the oldest failed change first; those of one key if it is given."""
    rows = connection.execute(
        """
        select e._key, l.position, l.ordinal, l.committed_at, l.failed_at, l.place, l.waiting, e.holds,
          e.step, e.error, e.attempts, null
        from entity e join letter l on l._key = e._key
        where e.standing = 3 and (:key is null or cast(e._key as text) = :key) and not exists (
          select 1 from touched o where o._key = e._key and o.share in (select value from json_each(:except_shares)))
        union all
        select t.entity, t.position, t.ordinal, t.committed_at, t.failed_at, t.place,
          (select count(*) from turn b where b.step = t.step and b.entity = t.entity and b.id > t.id and not b.is_dead),
          not t.is_passed, t.step, t.error, t.attempts, t.column
        from turn t where t.is_dead and (:key is null or cast(t.entity as text) = :key)
          and ifnull(t.share, -1) not in (select value from json_each(:except_shares))
        order by 2, 3 limit :limit
        """,
        {
            "key": None if key is None else str(key),
            "limit": -1 if limit is None else limit,
            "except_shares": json.dumps(list(except_shares)),
        },
    )
    return [_letter(*row) for row in rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterRows:
    """The row data behind the letters of one key: its rows as they are now, and those of its turns in their order."""

    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    turns: Sequence[Mapping[str, Any]]


def letters_of(
    file: Path, *, limit: int | None = None, key: Key | None = None, except_shares: Collection[int] = ()
) -> list[Letter]:
    """`read_letters` for another process than the runner's; none where the app never ran."""
    if not file.exists():
        return []
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            return read_letters(connection, limit=limit, key=key, except_shares=except_shares)
        except sqlite3.OperationalError:
            # The runner is creating the file at this moment, or made it in an earlier format.
            return []


def rows_of(file: Path, key: Key) -> LetterRows:
    """What the state has of a key, for a person who asked for it: this is row data."""
    if not file.exists():
        return LetterRows(rows={}, turns=[])
    with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        tables = connection.execute(
            "select name from sqlite_master where type = 'table' and name like 'row\\_%' escape '\\' order by rowid"
        ).fetchall()
        rows = {
            name[len("row_") :]: [
                {column: row[column] for column in row.keys() if column != "_entity"}  # noqa: SIM118 - a sqlite3.Row
                for row in connection.execute(f'select * from "{name}" where cast(_entity as text) = ?', (str(key),))
            ]
            for (name,) in tables
        }
        turns = connection.execute(
            "select step, column, before, row, position, ordinal from turn where cast(entity as text) = ? order by id",
            (str(key),),
        ).fetchall()
    return LetterRows(rows={name: found for name, found in rows.items() if found}, turns=[dict(row) for row in turns])


def _letter(  # noqa: PLR0917 - the columns of the query
    key: Key,
    position: int,
    ordinal: int,
    committed_at: int,
    failed_at: float,
    place: str | None,
    waiting: int,
    holds_key: int,
    step: str | None,
    error: str | None,
    attempts: int,
    column: str | None,
) -> Letter:
    return Letter(
        key=key,
        version=Version(Lsn(position), ordinal),
        step=step or "",
        error=error or "",
        attempts=attempts,
        place=place,
        column=column,
        committed_at=moment(committed_at),
        failed_at=datetime.fromtimestamp(failed_at, UTC),
        waiting=waiting,
        holds_key=bool(holds_key),
    )
