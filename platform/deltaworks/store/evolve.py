"""Lake tables follow the shape of their source tables.

| at the source              | in the lake                                                       |
|----------------------------|-------------------------------------------------------------------|
| a new table                | is created: the source's columns, `_commit`, `_committed_at`      |
| a column added             | is added; rows from before have null until they change or a dump  |
| a column dropped           | stays; rows written from then on have null                        |
| a type widened             | is widened where DuckLake can                                     |
| a type narrowed            | keeps the wider type of the lake                                  |
| any other change of a type | stops the load: a person decides                                  |
| a value that no type here holds | its text's column is added, see `texts`                      |

Lake columns are never NOT NULL, or a column dropped at the source would stop every later load.
"""

import re

import duckdb
import pyarrow as pa

from deltaworks.change import META_COLUMNS
from deltaworks.errors import TerminalError
from deltaworks.schema import Column, TableSchema
from deltaworks.store.lake import quoted
from deltaworks.store.texts import PREFIX, TEXT_TYPE

_STATE = {"_commit": "UBIGINT", "_committed_at": "TIMESTAMP WITH TIME ZONE"}
_RESERVED = (*META_COLUMNS, "_place", "_is_here")
"""Names that a change, a window of changes or a comparison adds to the table's own."""

_INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_DECIMAL = re.compile(r"DECIMAL\((\d+),(\d+)\)")


class SchemaConflictError(TerminalError):
    """A lake table cannot take the shape that its source table has now."""


def evolve(connection: duckdb.DuckDBPyConnection, *, schema: str, table: TableSchema, database: str = "lake") -> str:
    """Create or alter the lake's table so that it takes rows of `table`; returns its quoted name.

    Raises:
        SchemaConflictError: a type changed in a way the lake cannot follow, or names collide.
    """
    name = quoted(database, schema, table.name.short)
    wanted = _column_types(connection, table)
    connection.execute(f"create schema if not exists {quoted(database, schema)}")
    columns = ", ".join(f"{quoted(column)} {kind}" for column, kind in wanted.items())
    connection.execute(f"create table if not exists {name} ({columns})")
    present = {str(row[0]): str(row[1]) for row in connection.execute(f"describe {name}").fetchall()}
    for column, kind in wanted.items():
        if column not in present:
            connection.execute(f"alter table {name} add column {quoted(column)} {kind}")
        elif present[column] != kind and not _fits(kind, into=present[column]):
            _widen(connection, name, column=column, present=present[column], wanted=kind)
    return name


def _column_types(connection: duckdb.DuckDBPyConnection, table: TableSchema) -> dict[str, str]:
    """The columns of the lake's table with DuckDB's types for them."""
    _check_names(table)
    types: dict[str, str] = {}
    for column in table.columns:
        # An Arrow dictionary would become an ENUM of just the values seen so far.
        plain = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        try:
            relation = connection.from_arrow(pa.schema([pa.field(column.name, plain)]).empty_table())
        except duckdb.Error as error:
            raise SchemaConflictError(
                f"cannot store column {column.name!r} of {str(table.name)!r}: DuckDB has no type for"
                f" {column.source_type!r} ({plain}); leave the table out or cast the column at the source"
            ) from error
        types[column.name] = str(relation.types[0])
    return types | _STATE


def _check_names(table: TableSchema) -> None:
    names = [name.lower() for name in (*table.names, *_RESERVED)]
    twice = sorted({name for name in names if names.count(name) > 1})
    twice += [column.name for column in table.columns if _is_taken(column)]
    if twice:
        raise SchemaConflictError(
            f"cannot store {str(table.name)!r}: column names {', '.join(twice)} collide (the lake ignores case, and"
            f" {', '.join(_RESERVED)} and {PREFIX}… are taken); rename them at the source"
        )


def _is_taken(column: Column) -> bool:
    """Whether the name is one that the text column of another column would have."""
    return column.name.lower().startswith(PREFIX) and column.source_type != TEXT_TYPE


def _fits(kind: str, *, into: str) -> bool:
    """Whether every value of type `kind` is exact in a column of type `into`."""
    if kind in _INTEGERS and into in _INTEGERS:
        return _INTEGERS.index(kind) <= _INTEGERS.index(into)
    new, old = _DECIMAL.fullmatch(kind), _DECIMAL.fullmatch(into)
    if new is None or old is None:
        return (kind, into) == ("FLOAT", "DOUBLE")
    (new_width, new_scale), (old_width, old_scale) = (map(int, match.groups()) for match in (new, old))
    return new_scale <= old_scale and new_width - new_scale <= old_width - old_scale


def _widen(connection: duckdb.DuckDBPyConnection, name: str, *, column: str, present: str, wanted: str) -> None:
    try:
        connection.execute(f"alter table {name} alter column {quoted(column)} type {wanted}")
    except duckdb.CatalogException as error:
        raise SchemaConflictError(
            f"cannot load into {name}: column {column!r} is {present} there and {wanted} at the source now, which does"
            " not widen it; drop the lake's table and dump the source's again, or change the type back"
        ) from error
