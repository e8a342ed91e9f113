"""Captured: committed changes of each source table, in the change log."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import names
from assets.metadata import copied_columns, table_metadata
from deltaworks import operate
from deltaworks.config import PostgresConfig
from resources.deltaworks_config import DeltaworksConfig

NO_GAP = "no_gap"


def source_tables(source: str, settings: PostgresConfig) -> list[dg.AssetSpec]:
    """The tables of the operational database, which others write to."""
    return [
        dg.AssetSpec(
            names.in_source(source, table.short),
            description=f"Table `{table}` of the operational database `{source}`.",
            group_name="source",
            kinds={"postgres"},
            owners=[f"team:{settings.owner}"],
        )
        for table in settings.table_names
    ]


def captured_tables(source: str, settings: PostgresConfig) -> dg.AssetsDefinition:
    """One capture run for all tables of a source: they share one slot and one order."""

    @dg.multi_asset(
        name=f"captured_{source}",
        pool=f"slot_{source}",
        specs=[
            dg.AssetSpec(
                names.captured(source, table.short),
                deps=[names.in_source(source, table.short)],
                description=f"Every committed change of `{table}`, durable and replayable in the change log.",
                group_name="capture",
                kinds={"postgres", "arrow"},
                owners=[f"team:{settings.owner}"],
            )
            for table in settings.table_names
        ],
    )
    def captured(
        context: dg.AssetExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.MaterializeResult[Any]]:
        report = operate.capture(deltaworks.load(), source)
        context.log.info(report.summary)
        for schema in report.schemas:
            table = schema.name.short
            if schema.name not in settings.table_names:
                context.log.warning(names.unknown(source, table))
                continue
            yield dg.MaterializeResult(
                asset_key=names.captured(source, table),
                metadata={
                    **table_metadata(
                        schema,
                        row_count=report.changes.get(str(schema.name), 0),
                        lineage=copied_columns(schema.names, upstream=names.in_source(source, table)),
                    ),
                    "position": str(report.position),
                    "log_offset": report.offset,
                    "captured_by": report.captured_by,
                },
            )

    return captured


def gap_check(source: str, settings: PostgresConfig) -> dg.AssetChecksDefinition:
    """One check per captured table: nothing that the source committed is missing from the log."""
    keys = [names.captured(source, table.short) for table in settings.table_names]

    @dg.multi_asset_check(
        name=f"{NO_GAP}_{source}",
        specs=[
            dg.AssetCheckSpec(
                NO_GAP,
                asset=key,
                description=f"No change of `{source}` was missed, or all that was missed is dumped again.",
            )
            for key in keys
        ],
    )
    def no_gap(context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig) -> Iterator[dg.AssetCheckResult]:
        gaps = operate.history(deltaworks.load(), source).gaps
        for key in keys:
            yield dg.AssetCheckResult(
                passed=not gaps,
                asset_key=key,
                check_name=NO_GAP,
                description="; ".join(gap.summary for gap in gaps) or "no gap is open",
            )

    return no_gap
