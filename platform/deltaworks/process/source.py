"""What an app reads: tables of a captured source, with the columns it needs declared as a type."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

from deltaworks.errors import TerminalError
from deltaworks.process.shape import Field, fields_of, reads
from deltaworks.schema import TableName, TableSchema

R = TypeVar("R")


class SchemaMismatchError(TerminalError):
    """Tables are not as the app declares them; the message lists every fault."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Table(Generic[R]):
    """A table as an app reads it: the column that names the entity, and the columns it needs.

    Make it with `Source.table`. Two declarations are two tables, so it can be handed around as a name.
    """

    source: str
    name: TableName
    key: str | None
    schema: type[R] | None
    fields: tuple[Field, ...]

    def __str__(self) -> str:
        return self.name.short


@dataclass(frozen=True, slots=True)
class Source:
    """A captured source by its name in `deltaworks.yaml`.

    >>> Source("studio").table("credit", key="movie_id").name
    TableName(namespace='public', name='credit')
    """

    name: str

    def table(self, name: str, *, key: str | None = None, schema: type[R] | None = None) -> Table[R]:
        """Declare a table: `key` is the column that groups its rows, `schema` the columns to read.

        `key` is the app's own key when left out. A looked-up table needs no schema, because only
        its keys are read.

        Raises:
            ShapeError: `schema` is not a `TypedDict` or dataclass of types that columns are read as.
        """
        fields = fields_of(schema) if schema is not None else ()
        return Table(source=self.name, name=TableName.parse(name), key=key, schema=schema, fields=fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemaFault:
    """One way in which a table is not as declared."""

    table: TableName
    column: str
    declared: str
    actual: str

    def __str__(self) -> str:
        return f"{self.table}.{self.column}: declared {self.declared}, found {self.actual}"


def schema_faults(table: Table[R], actual: TableSchema, *, key: str, is_keyed_by: bool) -> Iterable[SchemaFault]:
    """How the table differs from its declaration.

    `key` is the column that groups its rows; `is_keyed_by` asks that it is the table's whole key.
    """
    if not actual.key:
        yield SchemaFault(
            table=table.name,
            column=key,
            declared="a table with a key",
            actual="it has none, so its changes do not say which row they are of; give it a primary key at the source",
        )
    elif is_keyed_by and actual.key != (key,):
        yield SchemaFault(
            table=table.name, column=key, declared="the table's key", actual=f"the key is {', '.join(actual.key)}"
        )
    if key not in actual.names:
        yield _missing(table.name, actual, key, "the column that names the entity")
    elif not (reads(int, actual.column(key).type) or reads(str, actual.column(key).type)):
        yield SchemaFault(
            table=table.name, column=key, declared="a key of int or str", actual=actual.column(key).source_type
        )
    for field in table.fields:
        if field.name not in actual.names:
            yield _missing(table.name, actual, field.name, str(field))
            continue
        column = actual.column(field.name)
        # A key is never null, whatever the source says of the column.
        is_nullable = column.nullable and column.name not in actual.key
        if not reads(field.type, column.type) or (is_nullable and not field.nullable):
            found = f"{column.source_type} ({column.type}{', nullable' if is_nullable else ''})"
            yield SchemaFault(table=table.name, column=field.name, declared=str(field), actual=found)


def _missing(table: TableName, actual: TableSchema, column: str, declared: str) -> SchemaFault:
    found = f"no such column; there are {', '.join(actual.names)}"
    return SchemaFault(table=table, column=column, declared=declared, actual=found)
