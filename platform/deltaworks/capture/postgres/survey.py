"""Surveys of the catalog: what `capture.schema_change` compares to find what the stream does not show."""

from collections import defaultdict
from collections.abc import Sequence

from deltaworks.capture.postgres.catalog import AnyConnection, CatalogRow, TableFacts, find_tables, query
from deltaworks.capture.schema_change import ColumnSurvey, Survey, TableSurvey
from deltaworks.position import Lsn
from deltaworks.schema import TableName


def take_survey(connection: AnyConnection, *, tables: Sequence[TableName], publication: str) -> Survey:
    """Read the catalog in one snapshot; tables that do not exist are left out."""
    connection.execute("begin isolation level repeatable read read only")
    try:
        facts = find_tables(connection, tables)
        oids = [table.oid for table in facts.values()]
        source = query(connection, "survey_source", publication=publication)[0]
        columns, parts = _columns(connection, oids), _parts(connection, oids)
        published = {
            row["oid"]: row["entry"]
            for row in query(connection, "survey_published", publication=publication, oids=oids)
        }
        position = query(connection, "survey_position")[0]["position"]
    finally:
        if not connection.broken:
            connection.execute("rollback")

    def survey(table: TableFacts) -> TableSurvey:
        return TableSurvey(
            identity=table.oid,
            published=published.get(table.oid),
            key=table.key,
            row_identity=table.identity,
            columns=tuple(columns[table.oid]),
            files={row["part"]: row["file"] for row in parts[table.oid]},
            attached=frozenset(row["part"] for row in parts[table.oid] if row["is_attached"]),
        )

    return Survey(
        position=Lsn.parse(position),
        system=source["system"],
        timeline=source["timeline"],
        publication=source["publication"],
        tables={name: survey(table) for name, table in facts.items()},
    )


def _columns(connection: AnyConnection, oids: list[int]) -> dict[int, list[ColumnSurvey]]:
    found: dict[int, list[ColumnSurvey]] = defaultdict(list)
    for row in query(connection, "survey_columns", oids=oids):
        found[row.pop("oid")].append(ColumnSurvey(**row))
    return found


def _parts(connection: AnyConnection, oids: list[int]) -> dict[int, list[CatalogRow]]:
    found: dict[int, list[CatalogRow]] = defaultdict(list)
    for row in query(connection, "survey_parts", oids=oids):
        found[row["oid"]].append(row)
    return found
