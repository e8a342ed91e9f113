"""Applies changes to a table without a key: a bag, in which equal rows differ in nothing.

| change              | the bag                                                 |
|---------------------|---------------------------------------------------------|
| truncate            | is empty; every dump begins with one, so it can be repeated |
| create, read        | gets a row                                              |
| delete              | loses one row that is equal to the one before           |
| update              | loses one, gets one                                     |

Adding and taking away commute, so a window is applied as a whole. Before the first dump a change may take away a
row that is not here; nothing happens then, the dump begins with a truncate. Values equal what they were read as:
null equals null, NaN equals NaN.
"""

from collections.abc import Iterable

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from deltaworks.change import BEFORE, DELETE, TRUNCATE
from deltaworks.schema import AS_TEXT, TableSchema
from deltaworks.store.apply import STATE_COLUMNS, Applied
from deltaworks.store.lake import quoted
from deltaworks.store.statements import Statements

_SQL = Statements("bag.sql")
_BEFORE_TEXT = f"{BEFORE}."


def rows_of(schema: TableSchema, changes: pa.Table) -> tuple[bool, pa.Table, pa.Table]:
    """Whether the bag was emptied, and since then the rows that came and those that went.

    Both are as `texts.spread` takes rows, with `STATE_COLUMNS` behind the table's own.
    """
    truncates = pc.indices_nonzero(pc.equal(changes["_op"], TRUNCATE))
    changes = changes.slice(truncates[-1].as_py() + 1 if len(truncates) else 0)
    state = [changes[name] for name in STATE_COLUMNS]
    names = [AS_TEXT.name, *schema.names, *STATE_COLUMNS]
    came = pa.table([_texts(changes, of_before=False), *(changes[name] for name in schema.names), *state], names=names)
    came = came.filter(pc.not_equal(changes["_op"], DELETE))
    if BEFORE not in changes.column_names:
        return bool(len(truncates)), came, came.slice(0, 0)
    before = changes[BEFORE].combine_chunks()
    parts = before.flatten() if isinstance(before, pa.StructArray) else before.combine_chunks().flatten()
    went = pa.table([_texts(changes, of_before=True), *parts, *state], names=names)
    return bool(len(truncates)), came, went.filter(pc.is_valid(changes[BEFORE]))


def apply_bag(
    connection: duckdb.DuckDBPyConnection, *, target: str, schema: TableSchema, came: pa.Table, went: pa.Table
) -> Applied:
    """Put rows into a quoted table and take rows out of it; run it inside a transaction."""
    columns = (*schema.names, *STATE_COLUMNS)
    names = {
        "target": target,
        "columns": ", ".join(quoted(name) for name in columns),
        "values": ", ".join(quoted(name) for name in schema.names),
        "t_is_w": " and ".join(
            f"{quoted('t', name)} is not distinct from {quoted('w', name)}" for name in schema.names
        ),
        "columns_of_t": ", ".join(quoted("t", name) for name in columns),
        "values_of_t": ", ".join(quoted("t", name) for name in schema.names),
    }
    connection.register("came", came)
    connection.register("went", went)
    try:
        connection.execute(_SQL["put"].format_map(names))
        for statement in ("wanted", "kept", "take", "put_back") if went.num_rows else ():
            connection.execute(_SQL[statement].format_map(names))
    finally:
        for view in ("came", "went"):
            connection.unregister(view)
        for table in ("wanted", "kept"):
            connection.execute(f"drop table if exists temp.{table}")
    return Applied(upserted=came.num_rows, deleted=went.num_rows)


def _texts(changes: pa.Table, *, of_before: bool) -> pa.Array:
    """The `_as_text` of the new rows, or of those before."""
    column = changes[AS_TEXT.name].combine_chunks()
    if column.null_count == len(column):
        return pa.nulls(len(column), AS_TEXT.type)

    def ours(texts: Iterable[tuple[str, str]] | None) -> dict[str, str] | None:
        chosen = {
            name.removeprefix(_BEFORE_TEXT): text
            for name, text in texts or ()
            if name.startswith(_BEFORE_TEXT) is of_before
        }
        return chosen or None

    return pa.array([ours(texts) for texts in column.to_pylist()], AS_TEXT.type)
