"""The engine's words in the form that Dagster's UI knows."""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from deltaworks import operate
from deltaworks.lineage.sql import Relation
from deltaworks.schema import TableSchema


def column_schema(schema: TableSchema) -> dg.TableSchema:
    """Columns with the source's own type names, keys marked."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                column.name,
                column.source_type,
                constraints=dg.TableColumnConstraints(nullable=column.nullable, unique=schema.key == (column.name,)),
                tags={"key": ""} if column.name in schema.key else None,
            )
            for column in schema.columns
        ]
    )


def copied_columns(names: Iterable[str], *, upstream: dg.AssetKey) -> dg.TableColumnLineage:
    """Lineage of a table that copies its upstream column by column."""
    return dg.TableColumnLineage({name: [dg.TableColumnDep(asset_key=upstream, column_name=name)] for name in names})


def derived_columns(
    sources: Mapping[str, Iterable[tuple[dg.AssetKey, str]]],
) -> dg.TableColumnLineage:
    """Lineage from output column to the (asset, column) pairs it is made of."""
    return dg.TableColumnLineage(
        {
            name: [dg.TableColumnDep(asset_key=asset, column_name=column) for asset, column in upstreams]
            for name, upstreams in sources.items()
        }
    )


def table_metadata(schema: TableSchema, *, row_count: int, lineage: dg.TableColumnLineage) -> dict[str, Any]:
    """The three keys that Dagster draws: schema, lineage and row count."""
    return {
        "dagster/column_schema": column_schema(schema),
        "dagster/column_lineage": lineage,
        "dagster/row_count": row_count,
    }


def model_metadata(model: operate.Model, keys: Mapping[Relation, dg.AssetKey]) -> dict[str, Any]:
    """Schema, lineage and, for a table, rows of a model; `keys` names the assets of its inputs."""
    metadata: dict[str, Any] = {
        "dagster/column_schema": dg.TableSchema([dg.TableColumn(name, kind) for name, kind in model.columns]),
        "dagster/column_lineage": derived_columns(
            {
                column: [(keys[relation], name) for relation, name in sorted(inputs) if relation in keys]
                for column, inputs in model.lineage.columns.items()
            }
        ),
        "lineage_is_guess": model.lineage.is_guess,
    }
    if model.row_count is not None:
        metadata["dagster/row_count"] = model.row_count
    return metadata
