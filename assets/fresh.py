"""Fresh: whether changes still come through. The canary tells, so an idle source is no alarm and a dead pipe is one."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.config import PostgresConfig
from deltaworks.log.status import CaptureStatus
from deltaworks.schema import TableName
from resources.deltaworks_config import DeltaworksConfig

FRESH = "fresh"


def freshness_check(source: str, settings: PostgresConfig) -> dg.AssetChecksDefinition:
    """One check per captured table: where a service captures, its canaries come through. It blocks nothing."""

    @dg.multi_asset_check(
        name=f"{FRESH}_{source}",
        specs=[
            dg.AssetCheckSpec(
                FRESH,
                asset=names.captured(source, table.short),
                description=f"What the service that captures `{source}` writes there comes back within three intervals "
                "of its canary, also while nobody else writes.",
            )
            for table in settings.table_names
        ],
    )
    def fresh(context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig) -> Iterator[dg.AssetCheckResult]:
        status = operate.capture_status(deltaworks.load(), source)
        context.log.info(freshness_sentence(status))
        for each in freshness_verdicts(source, settings.table_names, status):
            yield dg.AssetCheckResult(
                passed=each.passed,
                asset_key=each.asset_key,
                check_name=each.check_name,
                description=each.description,
                metadata=each.metadata,
            )

    return fresh


def freshness_verdicts(
    source: str, tables: Sequence[TableName], status: CaptureStatus
) -> list[dg.AssetCheckEvaluation]:
    """What the canary says of each captured table, for a run or a sensor to tell."""
    return [
        dg.AssetCheckEvaluation(
            asset_key=names.captured(source, table.short),
            check_name=FRESH,
            passed=is_fresh(status),
            description=freshness_sentence(status),
            metadata=_metadata(status),
        )
        for table in tables
    ]


def is_fresh(status: CaptureStatus) -> bool:
    """Whether there is no sign that a service runs and stands."""
    return status.canary is None or not status.canary.is_overdue


def freshness_sentence(status: CaptureStatus) -> str:
    """One line for people."""
    said = [_canary_sentence(status)]
    if status.service is None:
        said.append("no service captures now, so the next ones come with it")
    if status.unreachable is not None:
        said.append(f"the source does not answer: {status.unreachable}")
    return "; ".join(said)


def _canary_sentence(status: CaptureStatus) -> str:
    canary = status.canary
    if canary is None:
        return "no canary came through yet"
    written = f"the newest canary that came through was written {canary.age_s:,.0f} s ago"
    if canary.is_overdue:
        return (
            f"{written}, beyond the limit of {canary.limit_s:,.0f} s: process {status.service} captures, and what is "
            f"written does not come through; look into its log and `deltaworks status`"
        )
    return written


def _metadata(status: CaptureStatus) -> dict[str, Any]:  # Any: what Dagster takes as metadata
    """Numbers, which Dagster draws over time; what is not known is left out."""
    metadata: dict[str, Any] = {}
    if status.canary is not None:
        metadata["canary_age_s"] = round(status.canary.age_s, 3)
        metadata["canary_took_s"] = round(status.canary.took_s, 3)
        metadata["canary_position"] = str(status.canary.position)
        metadata["limit_s"] = round(status.canary.limit_s, 3)
    if status.lag_s is not None:
        metadata["lag_s"] = round(status.lag_s, 3)
    return metadata
