"""Everything that Dagster knows, built from `deltaworks.yaml` and the dbt project."""

from pathlib import Path

import dagster as dg

from assets import names
from assets.captured import captured_tables, gap_check, source_tables
from assets.checks import expectation_checks, source_checks
from assets.dead import dead_letters
from assets.dumps import dumped_tables
from assets.enriched import enriched_tables
from assets.modeled import modeled_tables
from assets.readiness import readiness_check
from assets.released import released_views
from assets.reprocessed import reprocessed_documents
from assets.stored import stored_tables
from resources import environment
from resources.dbt import dbt
from resources.deltaworks_config import DeltaworksConfig
from resources.object_store import ObjectStore
from sensors.log_ahead import log_ahead_sensor
from sensors.source_changed import source_changed_sensor


def build(config_path: Path) -> dg.Definitions:
    """The definitions of one configuration; connects to nothing."""
    config = environment.config(config_path)
    sources = config.sources.items()
    enriched = [enriched_tables(app, config) for app in config.apps]
    modeled = modeled_tables(config)
    loads = {
        source: dg.define_asset_job(
            f"load_{source}",
            selection=dg.AssetSelection.assets(
                *(names.captured(source, table.short) for table in settings.table_names)
            ).downstream(),
            # One process for the whole load: one per step would import Dagster, dbt and the expectations anew.
            executor_def=dg.in_process_executor,
            description=f"Everything from the changes of `{source}` to the release, in one run.",
        )
        for source, settings in sources
    }
    return dg.Definitions(
        assets=[
            *(spec for source, settings in sources for spec in source_tables(source, settings)),
            *(captured_tables(source, settings) for source, settings in sources),
            *(dumped_tables(source, settings) for source, settings in sources),
            *(stored_tables(source, settings) for source, settings in sources),
            *enriched,
            *(reprocessed_documents(app, config) for app in config.apps),
            *(dead_letters(app, config) for app in config.apps),
            modeled,
            released_views(after=[*modeled.keys, *(key for assets in enriched for key in assets.keys)], config=config),
        ],
        asset_checks=[
            *(readiness_check(source, settings) for source, settings in sources),
            *(gap_check(source, settings) for source, settings in sources),
            *source_checks(config),
            *expectation_checks(config),
        ],
        jobs=list(loads.values()),
        sensors=[
            *(log_ahead_sensor(source, job=load) for source, load in loads.items()),
            *(source_changed_sensor(source) for source in loads),
        ],
        resources={
            "deltaworks": DeltaworksConfig(path=str(config_path)),
            "dbt": dbt(config),
            "object_store": ObjectStore(path=str(config_path)),
        },
        executor=dg.in_process_executor,
    )


defs = build(environment.config_path())
