"""Audited: whether what went in came out at every hop, and the job that mends it where it did not."""

from collections.abc import Iterator

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.config import PostgresConfig
from deltaworks.operate import Audit
from resources.deltaworks_config import DeltaworksConfig

NOTHING_LOST = "nothing_lost"


def loss_check(source: str, settings: PostgresConfig) -> dg.AssetChecksDefinition:
    """One check per captured table: no change of it was lost at any hop, or what was lost is repaired."""

    @dg.multi_asset_check(
        name=f"{NOTHING_LOST}_{source}",
        specs=[
            dg.AssetCheckSpec(
                NOTHING_LOST,
                asset=names.captured(source, table.short),
                description=f"What went into each hop came out; `deltaworks audit {source}` shows the sheet.",
            )
            for table in settings.table_names
        ],
    )
    def nothing_lost(
        context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.AssetCheckResult]:
        audit = operate.audit(deltaworks.load(), source, is_since_last=True)
        context.log.info(audit.summary)
        for each in loss_verdicts(source, settings, audit):
            yield dg.AssetCheckResult(
                passed=each.passed,
                asset_key=each.asset_key,
                check_name=each.check_name,
                description=each.description,
                metadata=each.metadata,
            )

    return nothing_lost


def loss_verdicts(source: str, settings: PostgresConfig, audit: Audit) -> list[dg.AssetCheckEvaluation]:
    """What an audit says of each captured table, for a run or a sensor to tell."""
    captured = [str(table) for table in settings.table_names]
    verdicts = []
    for table in settings.table_names:
        blamed = audit.blamed_on(str(table), captured=captured)
        verdicts.append(
            dg.AssetCheckEvaluation(
                asset_key=names.captured(source, table.short),
                check_name=NOTHING_LOST,
                passed=not blamed,
                description="; ".join(incident.summary for incident in blamed) or "nothing is lost",
                metadata={"position": str(audit.position), "open_incidents": len(blamed)},
            )
        )
    return verdicts


def repair_job(source: str) -> dg.JobDefinition:
    """Dump the keys of every open incident of a source again; asked for by a sensor or a person."""

    @dg.op(name=f"repair_{source}_losses", pool=f"slot_{source}")
    def repair(context: dg.OpExecutionContext, deltaworks: DeltaworksConfig) -> None:
        for incident in operate.repair(deltaworks.load(), source):
            context.log.info(incident.summary)

    @dg.job(
        name=f"repair_{source}",
        executor_def=dg.in_process_executor,
        description=f"Dumps the keys of what `{source}` lost again; every hop gets them as changes of now.",
    )
    def repairing() -> None:
        repair()

    return repairing
