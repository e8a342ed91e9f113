"""Whether the server lets a source be captured, with the statement that mends what is missing."""

from collections.abc import Iterator

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.capture.source import Severity
from deltaworks.config import PostgresConfig
from resources.deltaworks_config import DeltaworksConfig

SERVER_READY = "server_ready"


def readiness_check(source: str, settings: PostgresConfig) -> dg.AssetChecksDefinition:
    """One check per source table, on demand: what `deltaworks check` says of the server they are all on."""
    keys = [names.in_source(source, table.short) for table in settings.table_names]

    @dg.multi_asset_check(
        name=f"{SERVER_READY}_{source}",
        specs=[
            dg.AssetCheckSpec(
                SERVER_READY, asset=key, description=f"The server of `{source}` has all that capture needs."
            )
            for key in keys
        ],
    )
    def server_ready(
        context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.AssetCheckResult]:
        findings = operate.check(deltaworks.load(), source)
        errors = [finding for finding in findings if finding.severity is Severity.ERROR]
        said = "\n".join(f"- {finding.severity.value}: {finding.what}\n\n      {finding.mend}" for finding in findings)
        for key in keys:
            yield dg.AssetCheckResult(
                passed=not errors,
                asset_key=key,
                check_name=SERVER_READY,
                description=f"{len(errors)} to mend" if errors else "ready",
                metadata={"findings": dg.MetadataValue.md(said or "none")},
            )

    return server_ready
