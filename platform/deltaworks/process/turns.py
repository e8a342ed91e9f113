"""Turns: changes of a watched column, kept in the app's state until the step that watches has been told.

    fold ──► save ──► waiting ──► step ──► take            told: forgotten
                         ▲          └────► hold            failed: again at `next_try`, or dead until a retry
                         └───────────────────┘

A turn is saved in the same transaction as the rows it comes from, so none is missed; it is forgotten after the
step ran, so a crash in between tells it twice, under the same id.
"""

import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from deltaworks.position import Lsn, Version
from deltaworks.process.app import App
from deltaworks.process.fold import Key, Turn, moment
from deltaworks.process.rows import Rows
from deltaworks.process.shape import Decode, decoder

STATEMENT = """
    create table turn (
      id integer primary key, step text not null, entity not null, column text not null, before text not null,
      row text not null, position int not null, ordinal int not null, committed_at int not null,
      attempts int not null default 0, next_try real not null default 0, is_dead int not null default 0, error text)
    """
"""What creates the table."""


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
    next_try: float
    is_dead: bool


class Turns:
    """The turns of a state. Shares the state's connection, its transactions and its thread."""

    def __init__(self, connection: sqlite3.Connection, app: App, rows: Rows) -> None:
        self._connection = connection
        self._app = app
        self._rows = rows
        self._decoders = {item.name: decoder(item.type) for item in app.entity.fields}

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

    def waiting(self, *, limit: int) -> list[WaitingTurn]:
        """Turns not taken yet in the order they happened, the held and the dead ones too."""
        found = self._connection.execute(
            """
            select id, step, entity, column, before, row, position, ordinal, committed_at, attempts, next_try, is_dead
            from turn order by id limit ?
            """,
            (limit,),
        )
        return [self._read(row) for row in found]

    def take(self, ids: Iterable[int]) -> None:
        """Forget turns that their steps have taken."""
        self._connection.executemany("delete from turn where id = ?", ((id_,) for id_ in ids))

    def hold(self, id_: int, *, attempts: int, next_try: float | None, error: str) -> None:
        """Keep a turn whose step failed: until `next_try`, or for good."""
        self._connection.execute(
            "update turn set attempts = ?, next_try = ?, is_dead = ?, error = ? where id = ?",
            (attempts, next_try or 0, next_try is None, error, id_),
        )

    def retry(self) -> int:
        """Let dead turns be tried again; how many."""
        return self._connection.execute(
            "update turn set is_dead = 0, attempts = 0, next_try = 0 where is_dead"
        ).rowcount

    def dead_count(self) -> int:
        """How many turns failed for good."""
        (count,) = self._connection.execute("select count(*) from turn where is_dead").fetchone()
        return int(count)

    def _read(self, row: Sequence[Any]) -> WaitingTurn:
        id_, step, entity, column, before, values, position, ordinal, committed_at, attempts, next_try, is_dead = row
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
            next_try=next_try,
            is_dead=bool(is_dead),
        )

    def _is_wanted(self, to: Any, turn: Turn) -> bool:
        if repr(to) == "ANY":
            return True
        index = [item.name for item in self._app.entity.fields].index(turn.column)
        return bool(_decoded(self._decoders[turn.column], turn.row[index + 1]) == to)


def _decoded(decode: Decode | None, value: Any) -> Any:  # Any: a column has any type
    return value if decode is None or value is None else decode(value)
