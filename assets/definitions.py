"""Everything that Dagster knows, built from `deltaworks.yaml` and the dbt project."""

from pathlib import Path

import dagster as dg

from assets import names
from assets.audited import loss_check, repair_job
from assets.captured import captured_tables, gap_check, source_tables
from assets.checks import expectation_checks, source_checks
from assets.dead import dead_letters
from assets.dumps import dumped_tables
from assets.enriched import enriched_tables
from assets.fresh import freshness_check
from assets.modeled import modeled_tables
from assets.readiness import readiness_check
from assets.released import released_views
from assets.reprocessed import reprocessed_documents
from assets.stored import stored_tables
from deltaworks import operate
from deltaworks.config import Config
from resources import environment
from resources.dbt import dbt
from resources.deltaworks_config import DeltaworksConfig
from resources.object_store import ObjectStore
from sensors.changes_lost import changes_lost_sensor
from sensors.log_ahead import log_ahead_sensor
from sensors.source_changed import source_changed_sensor
from sensors.source_fresh import source_fresh_sensor


def with_tables_met(config: Config) -> Config:
    """The configuration with the tables that patterns have brought so far: each is an asset as one that is named."""
    sources = {
        source: settings.model_copy(
            update={"tables": (*map(str, operate.tables_met(config, source)), *map(str, settings.table_patterns))}
        )
        for source, settings in config.sources.items()
    }
    return config.model_copy(update={"sources": sources})


def build(config_path: Path) -> dg.Definitions:
    """The definitions of one configuration; connects to nothing but a log on Kafka, and that for patterns alone."""
    config = with_tables_met(environment.config(config_path))
    sources = config.sources.items()
    enriched = [enriched_tables(app, config) for app in config.apps]
    modeled = modeled_tables(config)
    loss_checks = {source: loss_check(source, settings) for source, settings in sources}
    repairs = {source: repair_job(source) for source in loss_checks}
    audits = {
        source: dg.define_asset_job(
            f"audit_{source}",
            selection=dg.AssetSelection.checks(check),
            executor_def=dg.in_process_executor,
            description=f"Compares every hop of `{source}` with the one before, from where the last audit ended.",
        )
        for source, check in loss_checks.items()
    }
    loads = {
        source: dg.define_asset_job(
            f"load_{source}",
            # An audit has a sensor of its own, and what did not change is made anew only when a person asks.
            selection=dg.AssetSelection.assets(
                *(names.captured(source, table.short) for table in settings.table_names)
            ).downstream()
            - dg.AssetSelection.checks(loss_checks[source])
            - dg.AssetSelection.assets(*(names.reprocessed(app) for app in config.apps)),
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
            *loss_checks.values(),
            *(gap_check(source, settings) for source, settings in sources),
            *(freshness_check(source, settings) for source, settings in sources),
            *source_checks(config),
            *expectation_checks(config),
        ],
        jobs=[*loads.values(), *audits.values(), *repairs.values()],
        sensors=[
            *(log_ahead_sensor(source, job=load) for source, load in loads.items()),
            *(source_changed_sensor(source) for source in loads),
            *(source_fresh_sensor(source) for source in loads),
            *(changes_lost_sensor(source, audit_job=audits[source], repair_job=repairs[source]) for source in loads),
        ],
        resources={
            "deltaworks": DeltaworksConfig(path=str(config_path)),
            "dbt": dbt(config),
            "object_store": ObjectStore(path=str(config_path)),
        },
        executor=dg.in_process_executor,
    )


defs = build(environment.config_path())
