"""What the lake says of models that were just built: columns, rows, and where each column comes from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltaworks.config import Config
from deltaworks.lineage.sql import ColumnLineage, Relation, column_lineage
from deltaworks.operate.lake import open_lake
from deltaworks.store.lake import Lake


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One model: (column, type) pairs in order, rows (`None` for a view), and its lineage."""

    columns: Sequence[tuple[str, str]]
    row_count: int | None
    lineage: ColumnLineage


def describe_models(config: Config, statements: Mapping[Relation, str]) -> Mapping[Relation, Model]:
    """Describe the relations that these SELECT statements were built as; those that are not there are left out."""
    with open_lake(config, read_only=True) as lake:
        columns = _columns(lake)
        tables = _tables(lake)
        names = {relation: [name for name, _ in described] for relation, described in columns.items()}
        return {
            relation: Model(
                columns=columns[relation],
                row_count=lake.row_count(relation[1], relation[2]) if relation in tables else None,
                lineage=column_lineage(statement, relations=names, outputs=names[relation]),
            )
            for relation, statement in statements.items()
            if relation in columns
        }


def _columns(lake: Lake) -> dict[Relation, list[tuple[str, str]]]:
    found: dict[Relation, list[tuple[str, str]]] = {}
    rows = lake.connection.execute(
        "select database_name, schema_name, table_name, column_name, data_type from duckdb_columns() "
        "where database_name = 'lake' order by schema_name, table_name, column_index"
    ).fetchall()
    for catalogue, schema, table, name, kind in rows:
        found.setdefault((catalogue, schema, table), []).append((name, kind))
    return found


def _tables(lake: Lake) -> set[Relation]:
    rows = lake.connection.execute(
        "select database_name, schema_name, table_name from duckdb_tables() where database_name = 'lake'"
    ).fetchall()
    return {(catalogue, schema, table) for catalogue, schema, table in rows}
