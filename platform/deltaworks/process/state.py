"""An app's state and checkpoint: one SQLite file, so that both are one atomic write.

| table         | holds                                                                             |
|---------------|-----------------------------------------------------------------------------------|
| `row_<table>` | the declared columns of every row, by its key, with the entity it belongs to      |
| `entity`      | every key ever touched: version of its newest change, and where it stands         |
| `used`        | which entities an enrichment looked an id up for                                  |
| `turn`        | changes of watched columns that a step has not been told of yet                   |
| `sent`        | the hash of the document that left last, where an app asks for it                 |
| `window`      | windows with their versions; `member` has who counts in which                     |
| `letter`      | what is known of entities that failed for good, see `letters`                     |
| `answer`      | what an enrichment with `when=changed(…)` found for an entity                     |
| `asked`       | entities that a request wants processed again, see `asked`                        |
| `touched`     | the share of each entity, where several processes share an app, see `shares`      |
| `checkpoint`  | the last group of the log that is folded into the rows                            |
| `taken`, …    | the app's part of the proof that nothing is lost; see `ledger`                    |

A cycle of the runner is two transactions:

    fold    rows, touched keys and checkpoint: synced to disk before anything built on them may leave, see `syncing`
    settle  keys that the sinks have made durable: not synced, because losing it only repeats them

So a document that left is never newer than the state, and a restart can only repeat a document, never
write an older one.
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

from deltaworks.position import Lsn, Version
from deltaworks.process.app import App
from deltaworks.process.asked import STATEMENTS as ASKED_TABLES
from deltaworks.process.asked import Asked
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.direct.plan import STATEMENT as PLAN_TABLE
from deltaworks.process.direct.plan import Plan
from deltaworks.process.direct.reducer import is_direct
from deltaworks.process.enriching.answers import STATEMENT as ANSWER_TABLE
from deltaworks.process.enriching.answers import Answers
from deltaworks.process.enriching.changed import Kept
from deltaworks.process.fold import At, Fold, Key, moment
from deltaworks.process.ledger.ledger import Ledger
from deltaworks.process.letters import STATEMENT as LETTER_TABLE
from deltaworks.process.letters import Letter, Letters, read_letters
from deltaworks.process.room import StateFullError, is_for_want_of_room, opening
from deltaworks.process.rows import Rows, quoted
from deltaworks.process.sent import STATEMENT as SENT_TABLE
from deltaworks.process.sent import Sent
from deltaworks.process.shared.shares import STATEMENTS as SHARE_TABLES
from deltaworks.process.shared.shares import Shares
from deltaworks.process.source import Table
from deltaworks.process.syncing import StateSync
from deltaworks.process.turns import MAY_GO as TURN_MAY_GO
from deltaworks.process.turns import STATEMENTS as TURN_TABLES
from deltaworks.process.turns import Turns
from deltaworks.process.waiting import Setback, Standing, Waiting
from deltaworks.process.windows import STATEMENTS as WINDOW_TABLES
from deltaworks.process.windows import Windows

_FORMAT = 4


class Loaded(NamedTuple):
    """An entity's rows out of the state; `after` is `None` where its row is gone."""

    after: Any
    related: Mapping[str, Sequence[Any]]
    kept: Mapping[str, Kept] = {}


class State:
    """The state of one app. One instance serves one thread at a time; the runner's lock keeps others out."""

    def __init__(self, connection: sqlite3.Connection, app: App, *, file: Path) -> None:
        self.sync = StateSync(file)
        """Of what is committed and has to be on disk before anything leaves."""
        self._connection = connection
        self._app = app
        self._folder = file.parent
        self.rows = Rows(connection, app)
        self.turns = Turns(connection, app, self.rows)
        self.letters = Letters(connection)
        self.sent = Sent(connection)
        self.plan = Plan(connection)
        self.ledger = Ledger(connection)
        self.windows = None if app.windowing is None else Windows(connection, app.windowing)
        self.answers = Answers(connection, [step.into for step in app.enrichments if step.when is not None])
        self.asked = Asked(connection)
        self.shares = Shares(connection)

    @classmethod
    def open(cls, file: Path, app: App, *, shares: int | None = None) -> Self:
        """Open or create the state; one that was made for other tables, keys, columns or shares starts empty.

        An emptied state makes the app read the log from its start, so every column is there again.

        Raises:
            StateFullError: its disk has no room for it.
        """
        with ExitStack() as opened, opening(f"the state of app {app.name!r}", file):
            file.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
            opened.callback(connection.close)
            connection.execute("pragma journal_mode = wal")
            connection.execute("pragma synchronous = full")
            connection.execute("pragma cache_size = -65536")
            state = cls(connection, app, file=file)
            opened.callback(state.sync.close)
            state._create(_fingerprint(app, shares))
            state.ledger.create()
            opened.pop_all()
        return state

    def close(self) -> None:
        """Close the file; an open transaction is rolled back."""
        self.sync.close()
        self._connection.close()

    # The checkpoint

    def checkpoint(self) -> Checkpoint:
        """How far the log is folded."""
        return Checkpoint.stored_in(self._connection)

    @contextmanager
    def folding(self) -> Iterator[None]:
        """A transaction that is on disk when the block ends, or was never there if it raises."""
        with self._transaction("full"):
            yield

    @contextmanager
    def settling(self) -> Iterator[None]:
        """A transaction that survives the process, but perhaps not the machine: it may be done again."""
        with self._transaction("normal"):
            yield

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Say how far the log is folded; inside `folding`."""
        self._connection.execute(
            "insert or replace into checkpoint (id, sequence, offset, position, reached) values (0, ?, ?, ?, ?)",
            (checkpoint.sequence, checkpoint.offset, checkpoint.position.value, checkpoint.reached.value),
        )

    def save_reached(self, position: Lsn) -> None:
        """Say which position the sinks were told of; inside `settling`."""
        self._connection.execute("update checkpoint set reached = ?", (position.value,))

    # Folding

    def apply(self, table: Table[Any], fold: Fold) -> dict[Key, At]:
        """Store what a fold came to, and give the entities it touched; inside `folding`."""
        touched = fold.touched
        if fold.emptied_at is not None:
            for entity in self.rows.entities(table):
                fold.touch(entity, fold.emptied_at)
            self.rows.clear(table)
        self.rows.put(table, fold.puts)
        self.turns.save(fold.turns)
        return touched

    def users(self, table: Table[Any], fold: Fold) -> dict[Key, At]:
        """The entities that used the touched ids of a looked-up table, each at the newest change; inside `folding`.

        What is kept of those ids' answers is forgotten.
        """
        touched = Fold()
        for step in self._app.enrichments:
            if step.lookup is not table:
                continue
            users = Fold()
            if fold.emptied_at is not None:
                found = self._connection.execute("select distinct entity from used where enrichment = ?", (step.into,))
                for (entity,) in found:
                    users.touch(entity, fold.emptied_at)
            found = self._connection.execute(
                "select u.id, u.entity from json_each(?) k cross join used u on u.enrichment = ? and u.id = k.value",
                (json.dumps(list(fold.touched)), step.into),
            )
            for id_, entity in found:
                users.touch(entity, fold.touched[id_])
            self.answers.forget(users.touched, into=step.into)
            for entity, at in users.touched.items():
                touched.touch(entity, at)
        return touched.touched

    def mark(self, touched: Mapping[Key, At], *, is_due: bool = True) -> None:
        """Make these entities dirty, at the newest of their changes; inside `folding`.

        Without `is_due` they are only known: another member processes them.
        """
        standing = Standing.DIRTY if is_due else Standing.CLEAN
        self._connection.executemany(
            """
            insert into entity (_key, position, ordinal, committed_at, is_read, standing) values (?, ?, ?, ?, ?, ?)
            on conflict (_key) do update set
              is_read = iif((excluded.position, excluded.ordinal) > (position, ordinal), excluded.is_read, is_read),
              position = iif((excluded.position, excluded.ordinal) > (position, ordinal), excluded.position, position),
              ordinal = iif((excluded.position, excluded.ordinal) > (position, ordinal), excluded.ordinal, ordinal),
              committed_at = iif(
                (excluded.position, excluded.ordinal) > (position, ordinal), excluded.committed_at, committed_at),
              attempts = iif(standing = 2 or standing = 3 and holds, attempts, 0),
              standing = iif(standing = 2 or standing = 3 and holds, standing, excluded.standing)
            """,
            ((key, at.position, at.ordinal, at.committed_at, at.is_read, standing) for key, at in touched.items()),
        )
        self.letters.note_waiting(touched, entity_rows=self.rows.name_of(self._app.entity))

    # Processing

    def due(self, *, now: float, limit: int) -> list[Waiting]:
        """Entities to process now: the dirty ones by age, then the held ones whose time has come."""
        columns = "_key, position, ordinal, committed_at, attempts, is_read"
        dirty = self._connection.execute(
            f"select {columns} from entity where standing = 1 order by position, ordinal limit ?", (limit,)
        ).fetchall()
        held = self._connection.execute(
            f"select {columns} from entity where standing = 2 and next_try <= ? order by next_try limit ?", (now, limit)
        ).fetchall()
        return [
            Waiting(key, Version(Lsn(position), ordinal), moment(committed_at), attempts, bool(is_read))
            for key, position, ordinal, committed_at, attempts, is_read in [*dirty, *held]
        ]

    def next_try(self) -> float | None:
        """When the next held key or turn is due, in seconds since 1970; `None` without any."""
        (at,) = self._connection.execute(
            f"""
            select min(next_try) from (
              select min(next_try) as next_try from entity where standing = 2
              union all select min(next_try) from turn where is_head and {TURN_MAY_GO})
            """
        ).fetchone()
        return None if at is None else float(at)

    def hasten(self) -> None:
        """Make every held key and turn due now."""
        with self.settling():
            self._connection.execute("update entity set next_try = 0 where standing = 2")
            self._connection.execute("update turn set next_try = 0 where is_head")

    def load(self, keys: Sequence[Key]) -> dict[Key, Loaded]:
        """These entities with all their related rows, in the order of the rows' keys."""
        after = {key: rows[0] for key, rows in self.rows.of_entities(self._app.entity, keys).items()}
        related = [(table.name.short, self.rows.of_entities(table, keys)) for table in self._app.related]
        kept = self.answers.load(keys)
        nothing: dict[str, Kept] = {}
        return {
            key: Loaded(after.get(key), {name: rows.get(key) or [] for name, rows in related}, kept.get(key, nothing))
            for key in keys
        }

    def settle(self, done: Iterable[Key], setbacks: Sequence[Setback]) -> None:
        """Say where processed keys stand now; inside `settling`, after every sink has flushed."""
        done, setbacks = list(done), list(setbacks)
        self.asked.settle(done, [setback.key for setback in setbacks])
        self._connection.executemany(
            "update entity set standing = 0, attempts = 0, next_try = 0, step = null, error = null where _key = ?",
            ((key,) for key in done),
        )
        self._connection.executemany(
            "update entity set standing = ?, attempts = ?, next_try = ?, step = ?, error = ?, holds = ? where _key = ?",
            (
                (
                    Standing.DEAD if setback.next_try is None else Standing.HELD,
                    setback.attempts,
                    setback.next_try or 0,
                    setback.step,
                    setback.error,
                    self._app.on_fail.hold_key if setback.holds_key is None else setback.holds_key,
                    setback.key,
                )
                for setback in setbacks
            ),
        )
        self.letters.sweep_sometimes()
        self.letters.write({setback.key: setback.place for setback in setbacks if setback.next_try is None})

    def save_used(self, name: str, used: Mapping[Key, frozenset[Key]]) -> None:
        """Remember which ids the enrichment looked up for these entities, in place of what they used before."""
        known: dict[Key, set[Key]] = {key: set() for key in used}
        for entity, id_ in self._connection.execute(
            "select u.entity, u.id from json_each(?) k cross join used u on u.enrichment = ? and u.entity = k.value",
            (json.dumps(list(used)), name),
        ):
            known[entity].add(id_)
        changed = [(key, known[key], ids) for key, ids in used.items() if ids != known[key]]
        self._connection.executemany(
            "delete from used where enrichment = ? and id = ? and entity = ?",
            [(name, id_, key) for key, before, ids in changed for id_ in before - ids],
        )
        self._connection.executemany(
            "insert into used (enrichment, id, entity) values (?, ?, ?)",
            [(name, id_, key) for key, before, ids in changed for id_ in ids - before],
        )

    def keep_rows(self, *, fold_to: int) -> None:
        """Empty the state of a direct app, so that it folds the log into rows from its start; see `direct`."""
        reached = self.checkpoint().reached
        with self.folding():
            self.rows.clear(self._app.entity)
            self._connection.execute("delete from entity")
            self.save_checkpoint(Checkpoint(reached=reached))
            self.plan.keep_rows(fold_to=fold_to)

    def settle_all(self) -> None:
        """Take every entity that is due as done, without a document; inside `folding`."""
        self._connection.execute("update entity set standing = 0 where standing = 1")

    def waiting_keys(self) -> set[Key]:
        """Entities whose changes only wait: the held, and the dead that hold their key."""
        rows = self._connection.execute("select _key from entity where standing = 2 or standing = 3 and holds")
        return {key for (key,) in rows}

    def standing_keys(self) -> dict[Key, Standing]:
        """Every entity that is not clean, with where it stands."""
        rows = self._connection.execute("select _key, standing from entity where standing <> 0")
        return {key: Standing(standing) for key, standing in rows}

    def counts(self) -> dict[Standing, int]:
        """How many entities are dirty, held or dead; a clean one needs no one's attention."""
        rows = self._connection.execute("select standing, count(*) from entity where standing <> 0 group by standing")
        found = {Standing(standing): count for standing, count in rows}
        return {standing: found.get(standing, 0) for standing in (Standing.DIRTY, Standing.HELD, Standing.DEAD)}

    def held(self, *, limit: int) -> list[Letter]:
        """Entities that wait for another try, the oldest change first."""
        rows = self._connection.execute(
            """
            select _key, position, ordinal, step, error, attempts from entity
            where standing = 2 order by position, ordinal limit ?
            """,
            (limit,),
        )
        return [
            Letter(
                key=key,
                version=Version(Lsn(position), ordinal),
                step=step or "",
                error=error or "",
                attempts=attempts,
                holds_key=True,
            )
            for key, position, ordinal, step, error, attempts in rows
        ]

    def dead(self, *, limit: int) -> list[Letter]:
        """Entities and turns that failed for good, the oldest change first."""
        return read_letters(self._connection, limit=limit)

    def drop(self, keys: Sequence[Key] | None, *, until: datetime) -> int:
        """Give up dead letters that were written by `until`, all or those of `keys`; how many."""
        count = self.letters.drop(keys, until=until) + self.turns.drop(keys, until=until)
        self.letters.sweep()
        return count

    def retry(self, *, among: Sequence[Standing], keys: Sequence[Key] | None) -> int:
        """Make entities of these standings dirty again, all of them or those of `keys`; how many."""
        chosen = "" if keys is None else "and _key in (select value from json_each(:keys))"
        cursor = self._connection.execute(
            f"""
            update entity set standing = 1, attempts = 0, next_try = 0
            where standing in (select value from json_each(:among)) {chosen}
            """,
            {"among": json.dumps([int(standing) for standing in among]), "keys": json.dumps(keys)},
        )
        self.letters.sweep()
        return cursor.rowcount

    @contextmanager
    def _transaction(self, synchronous: str) -> Iterator[None]:
        # A sync mode can only be changed between transactions.
        self._connection.execute(f"pragma synchronous = {synchronous}")
        try:
            self._connection.execute("begin immediate")
            yield
            self._connection.execute("commit")
        except BaseException as error:
            # SQLite may have rolled back by itself.
            if self._connection.in_transaction:
                self._connection.execute("rollback")
            if isinstance(error, sqlite3.OperationalError) and is_for_want_of_room(error, self._folder):
                raise StateFullError(
                    f"cannot write the state of app {self._app.name!r}: no space left on its disk; free space below "
                    "home, then it goes on from where it is, nothing was lost"
                ) from error
            raise

    def _create(self, fingerprint: str) -> None:
        with self.folding():
            self._connection.execute("create table if not exists made_for (fingerprint text)")
            row = self._connection.execute("select fingerprint from made_for").fetchone()
            if row is not None and row[0] == fingerprint:
                return
            tables = self._connection.execute("select name from sqlite_master where type = 'table'").fetchall()
            for (name,) in tables:
                self._connection.execute(f"drop table {quoted(name)}")
            for statement in (*_STATEMENTS, *self.rows.statements()):
                self._connection.execute(statement)
            self._connection.execute("insert into made_for values (?)", (fingerprint,))


_STATEMENTS = (
    "create table made_for (fingerprint text)",
    """
    create table checkpoint (
      id integer primary key, sequence int not null, offset int not null, position int not null,
      reached int not null default 0)
    """,
    """
    create table entity (
      _key primary key, position int not null, ordinal int not null, committed_at int not null, standing int not null,
      is_read int not null default 0, attempts int not null default 0, next_try real not null default 0, step text,
      error text, holds int not null default 0) without rowid
    """,
    "create index entity_dirty on entity (position, ordinal) where standing = 1",
    "create index entity_held on entity (next_try) where standing = 2",
    "create index entity_not_clean on entity (standing) where standing <> 0",
    "create table used (enrichment text, id, entity, primary key (enrichment, id, entity)) without rowid",
    "create index used_by_entity on used (enrichment, entity)",
    *TURN_TABLES,
    LETTER_TABLE,
    SENT_TABLE,
    PLAN_TABLE,
    *WINDOW_TABLES,
    ANSWER_TABLE,
    *ASKED_TABLES,
    *SHARE_TABLES,
)


def _fingerprint(app: App, shares: int | None) -> str:
    tables = [
        [str(table.name), table.key or app.key, [(item.name, str(item)) for item in table.fields]]
        for table in app.tables
    ]
    lookups = [step.into for step in app.enrichments if step.lookup is not None]
    step = app.windowing
    window = None if step is None else repr((step.time, step.size, step.every, step.by, step.lateness, step.aggregates))
    # A shared app that had no reactions has turns without what sharing needs to know of them.
    shared = [] if shares is None else [shares, *(["reactions"] if app.reactions else [])]
    return json.dumps([_FORMAT, app.key, tables, lookups, window, is_direct(app), *shared])
