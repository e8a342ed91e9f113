"""Checks that stand between what was loaded and what is released; all of them block."""

from collections.abc import Iterator, Sequence

import dagster as dg

from assets import names
from deltaworks import operate
from deltaworks.config import Config
from deltaworks.gate.expectation import Suite, load_suites
from resources import environment
from resources.deltaworks_config import DeltaworksConfig

EXPECTATIONS = environment.ROOT / "assets" / "expectations.yaml"
EQUALS_SOURCE = "equals_source"
LAKE_VERSION = "lake_version"


def source_checks(config: Config) -> list[dg.AssetChecksDefinition]:
    """One check per stored table: same rows as the source, at one position."""
    return [_equals_source(source, config) for source in config.sources]


def _equals_source(source: str, config: Config) -> dg.AssetChecksDefinition:
    keys = {table.short: names.stored(source, table.short) for table in config.sources[source].table_names}

    @dg.multi_asset_check(
        name=f"{EQUALS_SOURCE}_{source}",
        pool="lake",
        specs=[
            dg.AssetCheckSpec(
                EQUALS_SOURCE,
                asset=key,
                blocking=True,
                description=f"The lake has the rows of `{source}.{table}`, no more, no fewer, none different, "
                "at one position of the source.",
            )
            for table, key in keys.items()
        ],
    )
    def equals_source(
        context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.AssetCheckResult]:
        verification = operate.verify(deltaworks.load(), source)
        context.log.info(f"compared at {verification.position}")
        for verdict in verification.tables:
            if verdict.table not in keys:
                context.log.warning(names.unknown(source, verdict.table))
                continue
            yield dg.AssetCheckResult(
                passed=verdict.is_equal,
                asset_key=keys[verdict.table],
                check_name=EQUALS_SOURCE,
                description=f"{verdict.differing:,} of {verdict.source_rows:,} rows differ"
                if not verdict.is_equal
                else f"all {verdict.source_rows:,} rows are equal",
                metadata={
                    "position": str(verification.position),
                    "source_rows": verdict.source_rows,
                    "lake_rows": verdict.lake_rows,
                    "differing_keys": verdict.differing,
                },
            )

    return equals_source


def expectation_checks(config: Config) -> list[dg.AssetChecksDefinition]:
    """The suites of `expectations.yaml`: those on loaded tables before the models, those on models after."""
    suites = load_suites(EXPECTATIONS)
    early = [suite for suite in suites if _asset_of(suite, config).path[0] != "modeled"]
    late = [suite for suite in suites if _asset_of(suite, config).path[0] == "modeled"]
    return [
        _suite_checks(name, part, config)
        for name, part in (("expectations_on_loaded", early), ("expectations_on_models", late))
        if part
    ]


def _suite_checks(name: str, suites: Sequence[Suite], config: Config) -> dg.AssetChecksDefinition:
    keys = {suite.name: _asset_of(suite, config) for suite in suites}

    @dg.multi_asset_check(
        name=name,
        pool="lake",
        specs=[
            dg.AssetCheckSpec(
                suite.name, asset=keys[suite.name], blocking=suite.is_blocking, description=suite.description
            )
            for suite in suites
        ],
    )
    def expectations(
        context: dg.AssetCheckExecutionContext, deltaworks: DeltaworksConfig
    ) -> Iterator[dg.AssetCheckResult]:
        results = operate.expect(deltaworks.load(), suites)
        context.log.info(f"{sum(result.is_success for result in results)} of {len(results)} suites hold")
        for result in results:
            yield dg.AssetCheckResult(
                passed=result.is_success,
                asset_key=keys[result.name],
                check_name=result.name,
                description="; ".join(result.failures) or f"{len(result.results)} expectations hold",
                metadata={
                    LAKE_VERSION: result.version,
                    "rows": result.row_count,
                    "expectations": dg.MetadataValue.md("\n".join(f"- {each.sentence}" for each in result.results)),
                },
            )

    return expectations


def _asset_of(suite: Suite, config: Config) -> dg.AssetKey:
    """The asset whose check a suite is."""
    schema, _, table = suite.data.partition(".")
    if schema in config.sources:
        return names.stored(schema, table)
    if schema in config.apps:
        return names.enriched(schema, table)
    return names.modeled(table)
