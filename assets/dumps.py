"""Dumped: existing rows of a table, read again on demand; a partition is a table, a run is a dump."""

import time
from typing import Any

import dagster as dg
from pydantic import Field

from assets import names
from deltaworks import operate
from deltaworks.config import PostgresConfig
from resources.deltaworks_config import DeltaworksConfig

LOG_EVERY_S = 5.0
"""How often a run says how far its dump is."""


class DumpChoice(dg.Config):
    """What of the table to read: all of it, the rows of some keys, or those a condition holds for."""

    keys: list[str] = Field(default_factory=list)
    where: str | None = None


def dumped_tables(source: str, described: PostgresConfig) -> dg.AssetsDefinition:
    """Dump one table of a source per run; several partitions may run at once, they take turns."""

    @dg.asset(
        key=names.dumped(source),
        partitions_def=dg.StaticPartitionsDefinition([table.short for table in described.table_names]),
        deps=[names.in_source(source, table.short) for table in described.table_names],
        description=f"Rows of a table of `{source}`, read into the change log beside its changes: whole, "
        "by keys, or by a condition. To repair, or to run an app over existing rows again.",
        group_name="capture",
        kinds={"postgres", "arrow"},
        owners=[f"team:{described.owner}"],
    )
    def dumped(
        context: dg.AssetExecutionContext, config: DumpChoice, deltaworks: DeltaworksConfig
    ) -> dg.MaterializeResult[Any]:
        settings, table = deltaworks.load(), context.partition_key
        keys = operate.parse_keys(settings, source, table, config.keys) if config.keys else []
        dumped = operate.dump(
            settings, source, [table], keys=keys, where=config.where, on_progress=_said_now_and_then(context)
        )
        context.log.info(dumped.summary)
        return dg.MaterializeResult(
            metadata={
                "dagster/partition_row_count": sum(dumped.outcome.rows.values()),
                "dump": dumped.outcome.id,
                "dumped_by": dumped.dumped_by,
                "keys_not_found": len(dumped.outcome.missing),
                "took_s": (dumped.outcome.ended_at - dumped.outcome.asked_at).total_seconds(),
            }
        )

    return dumped


def _said_now_and_then(context: dg.AssetExecutionContext) -> operate.OnDumpProgress:
    said_at = time.monotonic()

    def say(progress: operate.TableProgress) -> None:
        nonlocal said_at
        if time.monotonic() - said_at >= LOG_EVERY_S:
            said_at = time.monotonic()
            context.log.info(progress.summary)

    return say
