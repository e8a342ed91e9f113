"""Dead letters of apps: an asset that counts them, and a check that warns while there is one."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.config import Config
from resources.deltaworks_config import DeltaworksConfig

NO_DEAD_LETTERS = "no_dead_letters"


def dead_letters(app: str, config: Config) -> dg.AssetsDefinition:
    """Count what failed for good in an app, by step, and with which members elsewhere; reading disturbs no service."""
    source = config.apps[app].source

    @dg.asset(
        key=names.dead_letters(app),
        deps=[names.enriched(app, table) for table in operate.lake_tables_of(config, app)],
        description=f"What failed for good in the app `{app}`: `deltaworks dead ls {app}` lists it.",
        group_name="process",
        kinds={"python"},
        owners=[f"team:{config.sources[source].owner}"],
        check_specs=[
            dg.AssetCheckSpec(
                NO_DEAD_LETTERS,
                asset=names.dead_letters(app),
                description=f"No change failed for good in the app `{app}`; the keys of those that did are held.",
            )
        ],
    )
    def dead(deltaworks: DeltaworksConfig) -> Iterator[dg.MaterializeResult[Any]]:
        summary = operate.dead_summary(deltaworks.load(), app)
        metadata: dict[str, Any] = {  # Any: what Dagster takes as metadata
            "dagster/row_count": summary.count,
            "keys_held": summary.holding,
            "oldest": summary.oldest.isoformat() if summary.oldest else "none",
            "by_step": dg.MetadataValue.json(dict(summary.by_step)),
            "elsewhere": dg.MetadataValue.json(dict(summary.elsewhere)),
        }
        yield dg.MaterializeResult(
            metadata=metadata,
            check_results=[
                dg.AssetCheckResult(
                    check_name=NO_DEAD_LETTERS,
                    passed=summary.count == 0,
                    severity=dg.AssetCheckSeverity.WARN,
                    description="nothing failed for good"
                    if summary.count == 0
                    else f"mend the cause, then `deltaworks dead retry {app}`",
                    metadata={name: value for name, value in metadata.items() if not name.startswith("dagster/")},
                )
            ],
        )

    return dead
