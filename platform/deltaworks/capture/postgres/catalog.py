"""What the server's catalog says of tables, columns, keys and types."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import pyarrow as pa
from psycopg import Connection, sql
from psycopg.rows import dict_row, tuple_row

from deltaworks.capture.postgres.pgoutput import Relation
from deltaworks.capture.postgres.types import TypeFacts, arrow_type
from deltaworks.schema import Column, TableName, TableSchema

CatalogRow = dict[str, Any]  # Any: a row of the catalog has columns of every kind
AnyConnection = Connection[Any]  # Any: the kind of row is chosen per cursor


@dataclass(frozen=True, slots=True, kw_only=True)
class TableFacts:
    """A table of the configuration as the catalog has it."""

    name: TableName
    oid: int
    kind: str
    """`r` table, `p` partitioned table, `v` view, `m` materialized view, `f` foreign table."""
    is_logged: bool
    identity: str
    """The replica identity: `d` default, `n` nothing, `f` full, `i` an index."""
    may_select: bool
    is_owner: bool
    key: tuple[str, ...]
    """The columns that changes are identified by; empty where there are none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """A table as the publication sends it; `columns` is `None` where the server cannot say (before 15)."""

    columns: frozenset[str] | None
    is_filtered: bool


def quoted(name: TableName) -> sql.Identifier:
    """The table's name as SQL; the one place where names become statements."""
    return sql.Identifier(name.namespace, name.name)


def query(connection: AnyConnection, name: str, **values: object) -> list[CatalogRow]:
    """Run the statement of that name from `queries.sql`."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(_statements()[name], values).fetchall()


def find_tables(connection: AnyConnection, names: Sequence[TableName]) -> dict[TableName, TableFacts]:
    """Those of the tables that exist."""
    rows = query(
        connection, "tables", namespaces=[name.namespace for name in names], names=[name.name for name in names]
    )
    return {
        TableName(row["namespace"], row["name"]): TableFacts(
            name=TableName(row["namespace"], row["name"]),
            oid=row["oid"],
            kind=row["kind"],
            is_logged=row["persistence"] == "p",
            identity=row["identity"],
            may_select=row["may_enter"] and row["may_select"],
            is_owner=row["is_owner"],
            key=tuple(row["key"]),
        )
        for row in rows
    }


def find_published(connection: AnyConnection, publication: str) -> dict[TableName, Published]:
    """The tables that the publication sends; none when it does not exist."""
    name = "published_columns" if connection.info.server_version >= 150000 else "published_tables"
    return {
        TableName(row["namespace"], row["name"]): Published(
            columns=None if row["columns"] is None else frozenset(row["columns"]), is_filtered=row["is_filtered"]
        )
        for row in query(connection, name, publication=publication)
    }


def describe_tables(
    connection: AnyConnection, facts: Iterable[TableFacts], published: Mapping[TableName, Published]
) -> dict[TableName, TableSchema]:
    """The schemas of tables with exactly the columns that the log brings."""
    by_oid = {table.oid: table for table in facts}
    columns = [
        row
        for row in query(connection, "columns", oids=list(by_oid))
        if _is_sent(row, published.get(by_oid[row["oid"]].name))
    ]
    kinds = describe_types(connection, [(row["type_oid"], row["modifier"]) for row in columns])
    of_table: dict[int, list[Column]] = {oid: [] for oid in by_oid}
    for row, (source_type, kind) in zip(columns, kinds, strict=True):
        of_table[row["oid"]].append(
            Column(name=row["name"], type=kind, source_type=source_type, nullable=row["nullable"])
        )
    return {
        table.name: TableSchema(
            name=table.name, columns=tuple(of_table[oid]), key=table.key, has_before=table.identity == "f"
        )
        for oid, table in by_oid.items()
    }


@dataclass(slots=True)
class Descriptions:
    """Tables as a publication sends them, read again only when the catalog says that something changed."""

    publication: str
    _known: dict[TableName, tuple[str, TableSchema]] = field(default_factory=dict)

    def describe(self, name: TableName, connection: AnyConnection) -> TableSchema | None:
        """The table in the state that the connection's transaction sees; `None` when it is not there."""
        found = query(connection, "stamp", namespace=name.namespace, table=name.name, publication=self.publication)
        if not found:
            return None
        known = self._known.get(name)
        if known is None or known[0] != found[0]["stamp"]:
            facts = find_tables(connection, [name])
            schemas = describe_tables(connection, facts.values(), find_published(connection, self.publication))
            if name not in schemas:
                return None
            self._known[name] = known = found[0]["stamp"], schemas[name]
        return known[1]


def describe_relation(connection: AnyConnection, relation: Relation) -> TableSchema:
    """The schema of a table as the log described it, which may be older than the catalog of now.

    Names, order and types are the log's. The key's order and what may be null are the catalog's.
    """
    name = TableName(relation.namespace, relation.name)
    facts = find_tables(connection, [name]).get(name)
    now = query(connection, "columns", oids=[facts.oid] if facts else [])
    nullable = {row["name"]: row["nullable"] for row in now}
    kinds = describe_types(connection, [(column.type_oid, column.modifier) for column in relation.columns])
    return TableSchema(
        name=name,
        columns=tuple(
            Column(name=column.name, type=kind, source_type=source_type, nullable=nullable.get(column.name, True))
            for column, (source_type, kind) in zip(relation.columns, kinds, strict=True)
        ),
        key=_key_of(relation, facts.key if facts else ()),
        has_before=relation.identity == "f",
    )


def describe_types(connection: AnyConnection, types: Sequence[tuple[int, int]]) -> list[tuple[str, pa.DataType]]:
    """The server's spelling and the Arrow type of each (type oid, modifier)."""
    if not types:
        return []
    rows = query(connection, "types", oids=[oid for oid, _ in types], modifiers=[modifier for _, modifier in types])
    return [(row["source_type"], _arrow_type(row)) for row in rows]


def texts(connection: AnyConnection, statement: sql.Composable, values: Sequence[object]) -> list[list[bytes | None]]:
    """The result of a query as the server prints it, column by column."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql.Composed([statement]), values)
        result = cursor.pgresult
        if result is None:
            return []
        count = range(result.ntuples)
        return [[result.get_value(row, column) for row in count] for column in range(result.nfields)]


def _arrow_type(row: CatalogRow) -> pa.DataType:
    if row["is_array"] and row["delimiter"] != ",":
        # Only the geometric type box prints its arrays with another delimiter; the text stays whole.
        return pa.string()
    return arrow_type(
        TypeFacts(source_type=row["source_type"], base=row["base"], modifier=row["modifier"], is_array=row["is_array"])
    )


def _is_sent(column: CatalogRow, published: Published | None) -> bool:
    if published is not None and published.columns is not None:
        return column["name"] in published.columns
    return bool(column["generated"] == "")


def _key_of(relation: Relation, key_now: tuple[str, ...]) -> tuple[str, ...]:
    flagged = tuple(column.name for column in relation.columns if column.in_identity)
    # Under identity full every column is flagged and only the catalog knows the key.
    if relation.identity == "f":
        present = {column.name for column in relation.columns}
        return key_now if set(key_now) <= present else ()
    return key_now if set(key_now) == set(flagged) else flagged


@cache
def _statements() -> dict[str, bytes]:
    """The statements of `queries.sql` by name."""
    text = files(__package__).joinpath("queries.sql").read_text(encoding="utf-8")
    parts = re.split(r"^-- name: (\w+)\n", text, flags=re.MULTILINE)
    return {name: body.strip().encode() for name, body in zip(parts[1::2], parts[2::2], strict=True)}
