"""Stored: the source's tables in the lake, all moved together in one commit."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import names
from assets.metadata import copied_columns, table_metadata
from deltaworks import operate
from deltaworks.config import PostgresConfig
from resources.deltaworks_config import DeltaworksConfig


def stored_tables(source: str, settings: PostgresConfig) -> dg.AssetsDefinition:
    """One load for all tables of a source, so that a snapshot is a state the source really had."""

    @dg.multi_asset(
        name=f"stored_{source}",
        pool="lake",
        specs=[
            dg.AssetSpec(
                names.stored(source, table.short),
                deps=[names.captured(source, table.short)],
                description=f"`{table}` as it was at one position of `{source}`, in `lake.{source}.{table.short}`.",
                group_name="store",
                kinds={"ducklake", "duckdb"},
                owners=[f"team:{settings.owner}"],
            )
            for table in settings.table_names
        ],
    )
    def stored(context: dg.AssetExecutionContext, deltaworks: DeltaworksConfig) -> Iterator[dg.MaterializeResult[Any]]:
        report = operate.load(deltaworks.load(), source)
        context.log.info(report.summary)
        for table in report.tables:
            short = table.schema.name.short
            if table.schema.name not in settings.table_names:
                context.log.warning(names.unknown(source, short))
                continue
            yield dg.MaterializeResult(
                asset_key=names.stored(source, short),
                metadata={
                    **table_metadata(
                        table.schema,
                        row_count=table.rows,
                        lineage=copied_columns(table.schema.names, upstream=names.captured(source, short)),
                    ),
                    **table.counts,
                    **report.places,
                },
            )

    return stored
