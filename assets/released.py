"""Released: the views that everybody reads, moved in one transaction after the checks."""

from typing import Any

import dagster as dg

from assets import names
from assets.evidence import evidence_of_run
from deltaworks import operate
from deltaworks.config import Config
from resources.deltaworks_config import DeltaworksConfig


def released_views(*, after: list[dg.AssetKey], config: Config) -> dg.AssetsDefinition:
    """The release of everything in `after`; a blocking check that fails keeps the previous one."""

    @dg.asset(
        key=names.RELEASED,
        deps=after,
        pool="lake",
        group_name="gate",
        kinds={"ducklake"},
        owners=sorted({f"team:{source.owner}" for source in config.sources.values()}),
        description="Views in `lake.prod`, pinned to the lake version whose checks passed. "
        "When a check fails, this does not run and the previous release stays readable.",
    )
    def released(context: dg.AssetExecutionContext, deltaworks: DeltaworksConfig) -> dg.MaterializeResult[Any]:
        evidence = evidence_of_run(context)
        release = operate.release(deltaworks.load(), checked_version=evidence.lake_version, evidence=evidence.as_json())
        return dg.MaterializeResult(
            metadata={
                "release": release.id,
                "lake_version": release.version,
                "views": dg.MetadataValue.md("\n".join(f"- `prod.{view}`" for view in release.views)),
                "evidence_hash": release.evidence_hash,
            }
        )

    return released
