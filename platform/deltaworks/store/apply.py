"""Applies a window of changes to a table that holds the state before it.

The result is the one that applying the changes one by one, in order of (`_commit`, `_ordinal`),
would give; two ways lead there.

| the window has                         | way                                                          |
|----------------------------------------|--------------------------------------------------------------|
| whole rows, deletes, truncates         | last change of each key: one delete, one insert              |
| key moves or columns that were not sent | the same over *entities*: a row is followed through its keys |

An entity is one row's life under changing keys. Its last change gives the final row; a column which
that change left out has the newest value sent before it in that life, or the stored one. Where no row
is known at all (a change that overtook the dump of its row) such a column is null until the dump
repairs it. Moves are traced in Python over numbers (`trace_moves`), values never leave DuckDB.

A window must hold whole transactions. Deletes and inserts, never MERGE: that writes ten times as much.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.change import DELETE, TRUNCATE
from deltaworks.errors import InvariantError
from deltaworks.schema import TableSchema
from deltaworks.store.address import literal
from deltaworks.store.lake import quoted
from deltaworks.store.statements import Statements
from deltaworks.store.texts import PREFIX, has_texts

STATE_COLUMNS = ("_commit", "_committed_at")
"""What a row in the lake says of its last change, beside the source's columns."""

PLACE = "_place"
"""A change's place in its window, a column beside those of `META_COLUMNS`."""

_SQL = Statements("apply.sql")
_TEMPORARY = ("newest", "touched", "step", "moved", "life", "origin", "last", "sent", "stored", "final")


class MalformedChangeError(InvariantError):
    """A change lacks what every change must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Applied:
    """What a window did. `upserted` rows were written, `deleted` keys ended without a row."""

    changes: int = 0
    upserted: int = 0
    deleted: int = 0

    def __add__(self, other: "Applied") -> "Applied":
        return Applied(
            changes=self.changes + other.changes,
            upserted=self.upserted + other.upserted,
            deleted=self.deleted + other.deleted,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A change on a key that takes part in a move. Keys are numbers; `old_key` is set on a move."""

    place: int
    commit: int
    op: str
    key: int
    old_key: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """Which change belongs to which entity, and the key under which an entity's row is stored."""

    life: tuple[tuple[int, int], ...]
    origin: tuple[tuple[int, int], ...]


def apply(
    connection: duckdb.DuckDBPyConnection,
    *,
    target: str,
    schema: TableSchema,
    changes: pa.Table,
    applied_up_to: int = 0,
) -> Applied:
    """Apply changes of one table; `schema` and `changes` are as `texts.spread` gives them, `target` is a quoted
    table that has those columns.

    Run it inside a transaction: it deletes before it inserts. `applied_up_to` is the largest `_commit`
    of earlier windows: a change at or before it may be a late one, which an app's log can hold, and
    does nothing where the table has a newer row of that key. The table keeps no trace of a deleted
    row, so a late change can bring one back until the app has repeated its delete too.

    Raises:
        MalformedChangeError: a change has no key.
    """
    changes = _in_order(changes)
    count = changes.num_rows
    changes, truncated = _truncate(connection, target, changes)
    if changes.num_rows == 0:
        return Applied(changes=count, deleted=truncated)
    _check_keys(schema, changes)
    connection.register("change", changes)
    try:
        if pc.min(changes["_commit"]).as_py() <= applied_up_to:
            changes = _without_late(connection, target, schema, changes)
        way = _apply_whole_rows if _has_whole_rows(changes) else _apply_entities
        applied = way(connection, target, schema)
    finally:
        connection.unregister("change")
        for table in _TEMPORARY:
            connection.execute(f"drop table if exists temp.{table}")
    return Applied(changes=count, deleted=truncated) + applied


def trace_moves(steps: Iterable[Step], present: Iterable[int], *, first_entity: int = 0) -> Traced:
    """Follow rows through their keys; `present` are the keys that have a row before the first step.

    A key has one row at the end of each transaction. Inside one it may have two, where its constraint
    is checked at commit: then the row that was there first is the one that leaves.

    >>> swap = [Step(place=0, commit=9, op="u", key=2, old_key=1), Step(place=1, commit=9, op="u", key=1, old_key=2)]
    >>> trace_moves(swap, present=[1, 2])
    Traced(life=((0, 0), (1, 1)), origin=((0, 1), (1, 2)))
    """
    rows: dict[int, list[int]] = {key: [first_entity + at] for at, key in enumerate(present)}
    origin = tuple((row, key) for key, [row] in rows.items())
    next_entity = first_entity + len(rows)
    owner: dict[int, int] = {}
    crowded: set[int] = set()
    commit = -1
    for step in steps:
        if step.commit != commit:
            for key in crowded:
                del rows[key][:-1]
            crowded.clear()
            commit = step.commit
        here = rows.setdefault(step.key, [])
        if step.op == DELETE:
            del here[:1]
            continue
        if step.old_key is None or step.old_key == step.key:
            entity = here[-1] if here else None
        else:
            left = rows.setdefault(step.old_key, [])
            entity = left.pop(0) if left else None
        if entity is None:
            entity, next_entity = next_entity, next_entity + 1
        if entity not in here:
            here.append(entity)
            crowded.add(step.key)
        owner[step.place] = entity
    final = {here[-1] for here in rows.values() if here}
    return Traced(
        life=tuple((place, entity) for place, entity in owner.items() if entity in final),
        origin=tuple((entity, key) for entity, key in origin if entity in final),
    )


def _in_order(changes: pa.Table) -> pa.Table:
    """The changes by (`_commit`, `_ordinal`); a source's log has them so, an app's need not."""
    commits, ordinals = changes["_commit"].to_numpy(), changes["_ordinal"].to_numpy()
    rises = (commits[1:] > commits[:-1]) | ((commits[1:] == commits[:-1]) & (ordinals[1:] >= ordinals[:-1]))
    return changes if rises.all() else changes.take(pa.array(np.lexsort((ordinals, commits))))


def _truncate(connection: duckdb.DuckDBPyConnection, target: str, changes: pa.Table) -> tuple[pa.Table, int]:
    """Carry out the last truncate; what came before it does not matter. Returns what came after."""
    places = pc.indices_nonzero(pc.equal(changes["_op"], TRUNCATE))
    first = places[-1].as_py() + 1 if len(places) else 0
    deleted = _run(connection, f"delete from {target}") if first else 0
    rest = changes.slice(first)
    return rest.append_column(PLACE, pa.array(np.arange(rest.num_rows))), deleted


def _without_late(
    connection: duckdb.DuckDBPyConnection, target: str, schema: TableSchema, changes: pa.Table
) -> pa.Table:
    """Leave out changes that are older than their row in the table, and register the rest."""
    rows = connection.execute(_SQL["late"].format_map(_names(target, schema))).fetchnumpy()
    rest = changes.filter(pc.invert(pc.is_in(changes[PLACE], pa.array(rows["place"], pa.int64()))))
    connection.unregister("change")
    connection.register("change", rest)
    return rest


def _check_keys(schema: TableSchema, changes: pa.Table) -> None:
    texts = {name: PREFIX + name for name in schema.key if PREFIX + name in schema.key}
    for name in schema.key:
        if name in texts.values() or not changes[name].null_count:
            continue
        missing = pc.is_null(changes[name])
        if name in texts:
            missing = pc.and_(missing, pc.is_null(changes[texts[name]]))
        count = pc.sum(missing).as_py()
        if count:
            raise MalformedChangeError(
                f"cannot apply changes of {str(schema.name)!r}: {count} have no value in key column"
                f" {name!r}; keep the log and report it, capture must send keys"
            )


def _has_whole_rows(changes: pa.Table) -> bool:
    unchanged, moved = changes["_unchanged"], changes["_old_key"]
    has_unsent = unchanged.null_count < len(unchanged) and bool(pc.any(pc.greater(pc.list_value_length(unchanged), 0)))
    return not has_unsent and moved.null_count == len(moved)


def _apply_whole_rows(connection: duckdb.DuckDBPyConnection, target: str, schema: TableSchema) -> Applied:
    names = _names(target, schema)
    connection.execute(_SQL["newest"].format_map(names))
    _run(connection, _SQL["delete_plain"].format_map(names))
    upserted = _run(connection, _SQL["insert_plain"].format_map(names))
    return Applied(upserted=upserted, deleted=_count(connection, "temp.newest") - upserted)


def _apply_entities(connection: duckdb.DuckDBPyConnection, target: str, schema: TableSchema) -> Applied:
    unsent = _unsent(connection)
    # A text column is sent when the column is that it stands for.
    unsent += [PREFIX + name for name in unsent if PREFIX + name in schema.names]
    names = _names(target, schema) | _names_of_unsent(schema, unsent)
    for statement in ("touched", "step", "moved", "life", "origin"):
        connection.execute(_SQL[statement].format_map(names))
    _trace(connection, names)
    for statement in ("last", "sent", "stored", "final"):
        connection.execute(_SQL[statement].format_map(names))
    _run(connection, _SQL["delete_touched"].format_map(names))
    upserted = _run(connection, _SQL["insert_final"].format_map(names))
    return Applied(upserted=upserted, deleted=_count(connection, "temp.touched") - upserted)


def _trace(connection: duckdb.DuckDBPyConnection, names: dict[str, str]) -> None:
    steps = [
        Step(place=place, commit=commit, op=op, key=key, old_key=old_key)
        for place, commit, op, key, old_key in connection.execute(_SQL["moved_steps"]).fetchall()
    ]
    if not steps:
        return
    present = [key for (key,) in connection.execute(_SQL["moved_present"].format_map(names)).fetchall()]
    traced = trace_moves(steps, present, first_entity=_count(connection, "temp.touched") + 1)
    for view, columns, pairs in (
        ("traced_life", ("place", "entity"), traced.life),
        ("traced_origin", ("entity", "id"), traced.origin),
    ):
        values = np.array(pairs, dtype=np.int64).reshape(-1, 2)
        connection.register(view, pa.table(dict(zip(columns, values.T, strict=True))))
        connection.execute(_SQL[view.replace("traced_", "") + "_of_moved"])
        connection.unregister(view)


def _unsent(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """The columns that some change of the window left out."""
    statement = "select distinct name from (select unnest(_unchanged) as name from change) order by name"
    return [name for (name,) in connection.execute(statement).fetchall()]


def _names(target: str, schema: TableSchema) -> dict[str, str]:
    columns = (*schema.names, *STATE_COLUMNS)
    numbered = [(f"key_{at}", name) for at, name in enumerate(schema.key)]
    # Of a value and its text one is always null.
    same = "is not distinct from" if has_texts(schema) else "="
    return {
        "target": target,
        "columns": ", ".join(quoted(name) for name in columns),
        "columns_of_c": ", ".join(quoted("c", name) for name in columns),
        "key_of_c": ", ".join(quoted("c", name) for name in schema.key),
        "key_as_numbered": ", ".join(f"{quoted('c', name)} as {number}" for number, name in numbered),
        "old_key_as_numbered": ", ".join(f"{_old(name)} as {number}" for number, name in numbered),
        "c_is_t": " and ".join(f"{quoted('c', name)} {same} {quoted('t', name)}" for name in schema.key),
        "c_is_k": " and ".join(f"{quoted('c', name)} {same} k.{number}" for number, name in numbered),
        "t_is_k": " and ".join(f"{quoted('t', name)} {same} k.{number}" for number, name in numbered),
        # Where null equals null, no old key would be the same as an old key of nulls.
        "old_c_is_o": " and ".join(
            [
                *(["c._old_key is not null"] if has_texts(schema) else ()),
                *(f"{_old(name)} {same} o.{number}" for number, name in numbered),
            ]
        ),
    }


def _names_of_unsent(schema: TableSchema, unsent: Sequence[str]) -> dict[str, str]:
    numbered = {name: f"column_{at}" for at, name in enumerate(unsent)}
    sent = [
        f"arg_max(struct_pack(v := {quoted('c', name)}), c._place) filter ({_was_sent(name)}) as {number}"
        for name, number in numbered.items()
    ]
    stored = [f"{quoted('t', name)} as {number}" for name, number in numbered.items()]
    final = [
        f"case when {_was_sent(name)} then {quoted('c', name)}"
        f" when s.{numbered[name]} is null then b.{numbered[name]} else s.{numbered[name]}.v end as {quoted(name)}"
        if name in numbered
        else quoted("c", name)
        for name in (*schema.names, *STATE_COLUMNS)
    ]
    return {
        # Two lists are empty when keys moved and all columns were sent.
        "sent_columns": ", ".join(sent) or "null as nothing",
        "stored_columns": ", ".join(stored) or "null as nothing",
        "final_columns": ", ".join(final),
    }


def _was_sent(name: str) -> str:
    stands_for = name.removeprefix(PREFIX)
    return f"not coalesce(list_contains(c._unchanged, {literal(stands_for)}), false)"


def _old(name: str) -> str:
    return quoted("c", "_old_key", name)


def _run(connection: duckdb.DuckDBPyConnection, statement: str) -> int:
    """Run a delete or an insert; returns the rows it touched."""
    row = connection.execute(statement).fetchone()
    return int(row[0]) if row is not None else 0


def _count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    return _run(connection, f"select count(*) from {table}")
