"""Turns: changes of a watched column, kept in the app's state until the step that watches has been told.

    fold ──► save ──► due ──► step ──► take            told: forgotten
                       ▲        ├────► hold ──┐        failed: again at `next_try`
                       │        └────► bury   │        failed for good: dead until a retry
                       └──────────────────────┘

A turn is saved in the same transaction as the rows it comes from, so none is missed; it is forgotten after the
step ran, so a crash in between tells it twice, under the same id.

Where several processes share an app, each of them saves every turn, with its share and the groups of the log that it
came in. A member tells those of its own shares; the others wait until their share is done with them, or comes here:

    fold ──► save ──► placed: of another's share ──► its share is done past it: forgotten
                        ▲     └─► share taken: due, but for what was done with before
                        └── share left: as if it had not been tried
"""

import json
import sqlite3
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deltaworks.position import Lsn, Version
from deltaworks.process.app import App
from deltaworks.process.fold import Key, Turn, moment
from deltaworks.process.rows import Rows
from deltaworks.process.shape import Decode, decoder

STATEMENTS = (
    """
    create table turn (
      id integer primary key, step text not null, entity not null, column text not null, before text not null,
      row text not null, position int not null, ordinal int not null, committed_at int not null,
      attempts int not null default 0, next_try real not null default 0, is_dead int not null default 0, error text,
      is_head int not null default 0, is_passed int not null default 0, failed_at real, place text,
      share int, low int, high int)
    """,
    "create index turn_queue on turn (step, entity, id) where not is_passed",
    "create index turn_head on turn (id) where is_head",
    "create index turn_dead on turn (entity) where is_dead",
)
"""What creates the table. `is_head`: the first of its step and entity, behind which the others wait. `is_passed`: a
dead one that nobody waits for. In shared apps it has its `share`, and the first and last group of the fold it is from.
"""
_SHARED_INDEXES = (
    "create index if not exists turn_unplaced on turn (id) where low is null",
    "create index if not exists turn_of_share on turn (share, low)",
)

_UNTRIED = "is_head = 0, is_dead = 0, is_passed = 0, attempts = 0, next_try = 0, error = null"

MAY_GO = """
    not turn.is_dead and exists (
      select 1 from entity e where e._key = turn.entity and (e.standing = 0 or e.standing = 3 and not e.holds))
"""
"""A turn is told after the document of the same changes left, so not while its entity is held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingTurn:
    """A turn that its step has not taken yet."""

    id: int
    step: str
    entity: Key
    column: str
    before: Any
    after: Any
    version: Version
    committed_at: datetime
    attempts: int


class Turns:
    """The turns of a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection, app: App, rows: Rows) -> None:
        self._connection = connection
        self._app = app
        self._rows = rows
        self._decoders = {item.name: decoder(item.type) for item in app.entity.fields}
        self._own: set[int] | None = None

    def save(self, turns: Sequence[Turn]) -> None:
        """Keep turns for every step that wants them; inside `folding`."""
        self._connection.executemany(
            """
            insert into turn (step, entity, column, before, row, position, ordinal, committed_at)
            values (?, ?, ?, ?, ?, ?, ?, ?)
            """,
            [
                (
                    step.name,
                    turn.entity,
                    turn.column,
                    json.dumps(turn.before),
                    json.dumps(turn.row),
                    turn.at.position,
                    turn.at.ordinal,
                    turn.at.committed_at,
                )
                for turn in turns
                for step in self._app.reactions
                if step.column == turn.column and self._is_wanted(step.to, turn)
            ],
        )
        if self._own is None:
            self._find_heads({(step.name, turn.entity) for turn in turns for step in self._app.reactions})

    def due(self, *, now: float, limit: int) -> list[WaitingTurn]:
        """Turns to tell now, as they happened: the first of each step and entity, unless it is held or dead."""
        found = self._connection.execute(
            f"""
            select id, step, entity, column, before, row, position, ordinal, committed_at, attempts
            from turn where is_head and next_try <= ? and {MAY_GO} order by id limit ?
            """,
            (now, limit),
        )
        return [self._read(row) for row in found]

    def take(self, turn: WaitingTurn) -> None:
        """Forget a turn that its step has taken."""
        self._connection.execute("delete from turn where id = ?", (turn.id,))
        self._find_heads([(turn.step, turn.entity)])

    def hold(self, turn: WaitingTurn, *, attempts: int, next_try: float, error: str) -> None:
        """Keep a turn whose step failed until `next_try`."""
        self._connection.execute(
            "update turn set attempts = ?, next_try = ?, error = ? where id = ?", (attempts, next_try, error, turn.id)
        )

    def bury(self, turn: WaitingTurn, *, attempts: int, error: str, place: str, holds_key: bool) -> None:
        """Keep a turn whose step failed for good; with `holds_key` the later ones wait behind it."""
        self._connection.execute(
            """
            update turn set attempts = ?, next_try = 0, error = ?, is_dead = 1, is_head = 0, is_passed = ?, place = ?,
              failed_at = ? where id = ?
            """,
            (attempts, error, not holds_key, place, time.time(), turn.id),
        )
        self._find_heads([(turn.step, turn.entity)])

    def retry(self, keys: Sequence[Key] | None = None) -> int:
        """Let dead turns be tried again, all or those of `keys`, each step's in their order; how many."""
        dead = self._dead(keys, until=None)
        self._connection.executemany(
            "update turn set is_dead = 0, is_passed = 0, attempts = 0, next_try = 0 where id = ?",
            ((id_,) for id_, _, _ in dead),
        )
        self._find_heads({(step, entity) for _, step, entity in dead})
        return len(dead)

    def drop(self, keys: Sequence[Key] | None, *, until: datetime) -> int:
        """Forget dead turns, all or those of `keys`, that died by `until`; how many. Those behind them go on."""
        dead = self._dead(keys, until=until)
        self._connection.executemany("delete from turn where id = ?", ((id_,) for id_, _, _ in dead))
        self._find_heads({(step, entity) for _, step, entity in dead})
        return len(dead)

    def dead_count(self) -> int:
        """How many turns failed for good."""
        (count,) = self._connection.execute("select count(*) from turn where is_dead").fetchone()
        return int(count)

    # In an app that several processes share; see `sharing`

    def share(self) -> None:
        """Tell nothing but turns of shares that are taken. Inside `folding`, before anything is saved."""
        if not self._app.reactions:
            return
        self._own = set()
        for statement in _SHARED_INDEXES:
            self._connection.execute(statement)
        self._connection.execute(f"update turn set {_UNTRIED}")

    def place(self, share_by_key: Mapping[Key, int], *, low: int, high: int) -> None:
        """Note of which shares the turns are that were just saved, out of groups `low` to `high`; inside `folding`."""
        if self._own is None:
            return
        own = self._own
        saved = self._connection.execute("select id, step, entity from turn where low is null").fetchall()
        self._connection.executemany(
            "update turn set share = ?, low = ?, high = ? where id = ?",
            ((share_by_key[entity], low, high, id_) for id_, _, entity in saved),
        )
        self._find_heads({(step, entity) for _, step, entity in saved if share_by_key[entity] in own})

    def begin(self, share: int, *, done: int) -> None:
        """Take a share that others are done with up to a group. Inside `settling`."""
        if self._own is None:
            return
        self._own.add(share)
        self.forget_done({share: done})
        queues = self._connection.execute("select distinct step, entity from turn where share = ?", (share,))
        self._find_heads(queues.fetchall())

    def end(self, shares: Collection[int]) -> None:
        """Let go of shares: nothing of them is told here, and what was tried counts for nothing. Inside `settling`."""
        if self._own is None:
            return
        self._own -= set(shares)
        self._connection.executemany(f"update turn set {_UNTRIED} where share = ?", ((share,) for share in shares))

    def forget_done(self, done: Mapping[int, int]) -> None:
        """Forget turns of shares that are done up to these groups, whoever told them. Inside `settling`."""
        if self._own is None:
            return
        # Of a fold that reaches past the group nobody knows which were told: those are told again.
        self._connection.executemany("delete from turn where share = ? and high <= ?", done.items())

    def first_undone(self) -> dict[int, int]:
        """Per share, a group at or before the change of every turn in it that is not told."""
        if self._own is None:
            return {}
        return dict(self._connection.execute("select share, min(low) from turn group by share").fetchall())

    def _dead(self, keys: Sequence[Key] | None, *, until: datetime | None) -> list[tuple[int, str, Key]]:
        return self._connection.execute(
            """
            select id, step, entity from turn where is_dead and (:until is null or failed_at <= :until)
              and (:keys = 'null' or entity in (select value from json_each(:keys)))
            """,
            {"keys": json.dumps(keys), "until": None if until is None else until.timestamp()},
        ).fetchall()

    def _find_heads(self, queues: Iterable[tuple[str, Key]]) -> None:
        """Say again which turn is the first of these steps and entities; a dead first one lets none be told."""
        queues = list(queues)
        self._connection.executemany(
            "update turn set is_head = 0 where is_head and not is_passed and step = ? and entity = ?", queues
        )
        self._connection.executemany(
            """
            update turn set is_head = not is_dead
            where id = (select min(id) from turn where step = ? and entity = ? and not is_passed)
            """,
            queues,
        )

    def _read(self, row: Sequence[Any]) -> WaitingTurn:
        id_, step, entity, column, before, values, position, ordinal, committed_at, attempts = row
        return WaitingTurn(
            id=id_,
            step=step,
            entity=entity,
            column=column,
            before=_decoded(self._decoders[column], json.loads(before)),
            after=self._rows.read(self._app.entity, json.loads(values)[1:]),
            version=Version(Lsn(position), ordinal),
            committed_at=moment(committed_at),
            attempts=attempts,
        )

    def _is_wanted(self, to: Any, turn: Turn) -> bool:
        if repr(to) == "ANY":
            return True
        index = [item.name for item in self._app.entity.fields].index(turn.column)
        return bool(_decoded(self._decoders[turn.column], turn.row[index + 1]) == to)


def _decoded(decode: Decode | None, value: Any) -> Any:  # Any: a column has any type
    return value if decode is None or value is None else decode(value)
