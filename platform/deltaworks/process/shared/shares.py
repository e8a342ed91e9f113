"""Which entities of an app are a member's to process, in its state; see `sharing`.

| table     | holds                                                                                             |
|-----------|---------------------------------------------------------------------------------------------------|
| `touched` | of every entity: its share, and between which groups of the log its newest change was folded      |

An entity of a share that is another's is `CLEAN` here, whatever happens to it: its rows are kept, and it is not
processed. `high` says which entities are to do when its share comes here, `low` how far a share is while some are.
"""

import sqlite3
import zlib
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from deltaworks.process.fold import Key
from deltaworks.process.sink import key_text

STATEMENTS = (
    "create table touched (_key primary key, share int not null, low int not null, high int not null) without rowid",
    "create index touched_by_share on touched (share, high)",
)
"""What creates the table."""

_LAST_ORDINAL = (1 << 31) - 1
_OF_SHARE = "(select _key from touched where share = ?)"


def share_of(key: Key, *, shares: int) -> int:
    """The share that an entity belongs to, the same on every machine.

    >>> [share_of(key, shares=8) for key in (1, 2, "tt0078748")]
    [7, 5, 6]
    """
    return zlib.crc32(key_text(key).encode()) % shares


class Undone(NamedTuple):
    """Of entities of a share that are not settled: a group at or before the newest change of each.

    `waiting_since` is when the oldest of their changes was committed, in seconds since 1970; dead ones do not wait.
    """

    low: int
    waiting_since: float | None


class Shares:
    """Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def note(self, share_by_key: Mapping[Key, int], *, low: int, high: int) -> None:
        """Note that changes of these entities were folded in groups `low` to `high`; inside the fold's transaction."""
        self._connection.executemany(
            """
            insert into touched values (?, ?, ?, ?)
            on conflict (_key) do update set low = excluded.low, high = excluded.high
            """,
            ((key, share, low, high) for key, share in share_by_key.items()),
        )

    def begin(self, share: int, *, done: int) -> None:
        """Take a share: what was touched after group `done` is to do, and what others know better is forgotten.

        Inside `settling`.
        """
        self._connection.execute(
            """
            update entity set standing = 1, attempts = 0, next_try = 0
            where _key in (select _key from touched where share = ? and high > ?)
            """,
            (share, done),
        )
        # What left last and what was found for it, others may have done differently since.
        for table, column in (("sent", "_key"), ("answer", "entity")):
            self._connection.execute(f"delete from {table} where {column} in {_OF_SHARE}", (share,))

    def begin_anew(self, share: int, *, position: int) -> None:
        """Make every entity of a share due, as of a position that all members' documents of it are at or before.

        For apps that look rows up: only who processed an entity knows what it used. Inside `settling`.
        """
        self._connection.execute(f"delete from used where entity in {_OF_SHARE}", (share,))
        self._connection.execute(
            f"""
            update entity set standing = 1, attempts = 0, next_try = 0,
              ordinal = iif(position <= ?, ?, ordinal), position = max(position, ?)
            where _key in {_OF_SHARE}
            """,
            (position, _LAST_ORDINAL, position, share),
        )

    def end(self, shares: Iterable[int]) -> None:
        """Let go of shares: nothing of them is due here any more. Inside `settling`."""
        for share in shares:
            self._connection.execute(
                f"update entity set standing = 0, attempts = 0 where standing <> 0 and _key in {_OF_SHARE}", (share,)
            )

    def keep_only(self, shares: Collection[int]) -> None:
        """Let go of what is not of these shares. Inside `settling`."""
        marks = ",".join("?" * len(shares))
        self._connection.execute(
            f"""
            update entity set standing = 0, attempts = 0 where standing <> 0
              and _key not in (select _key from touched where share in ({marks}))
            """,
            tuple(shares),
        )

    def undone(self) -> dict[int, Undone]:
        """Of every share with entities that are not settled, what is to know of those."""
        rows = self._connection.execute(
            """
            select share, min(low), min(iif(e.standing in (1, 2), e.committed_at, null)) / 1e6
            from entity e join touched t using (_key) where e.standing <> 0 group by share
            """
        )
        return {share: Undone(low, waiting_since) for share, low, waiting_since in rows}
