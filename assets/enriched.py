"""Enriched: documents that an app made of the changes and of what services told it."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import names
from assets.metadata import derived_columns, table_metadata
from deltaworks import operate
from deltaworks.config import Config
from resources.deltaworks_config import DeltaworksConfig


def enriched_tables(app: str, config: Config) -> dg.AssetsDefinition:
    """Run the app to the log's end, then bring its documents into the lake."""
    source = config.apps[app].source
    owner = config.sources[source].owner
    tables = operate.lake_tables_of(config, app)

    @dg.multi_asset(
        name=f"enriched_{app}",
        pool="lake",
        specs=[
            dg.AssetSpec(
                names.enriched(app, table),
                deps=[names.captured(source, short) for short in operate.tables_read_by(config, app)],
                description=f"Documents of the app `{app}`, in `lake.{app}.{table}` and in its search index.",
                group_name="process",
                kinds={"python", "ducklake", "tantivy"},
                owners=[f"team:{owner}"],
            )
            for table in tables
        ],
    )
    def enriched(
        context: dg.AssetExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.MaterializeResult[Any]]:
        settings = deltaworks.load()
        processed = operate.process(settings, app)
        context.log.info(processed.summary)
        report = operate.load(settings, app)
        context.log.info(report.summary)
        lineage = operate.document_lineage(settings, app)
        for table in report.tables:
            yield dg.MaterializeResult(
                asset_key=names.enriched(app, table.schema.name.short),
                metadata={
                    **table_metadata(
                        table.schema,
                        row_count=table.rows,
                        lineage=derived_columns(
                            {
                                column: [(names.captured(source, short), name) for short, name in upstreams]
                                for column, upstreams in lineage.items()
                            }
                        ),
                    ),
                    **table.counts,
                    **report.places,
                    **processed.counts,
                },
            )

    return enriched
