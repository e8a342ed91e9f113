"""Modeled: dbt's staging, intermediate and mart models over the lake."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
from dagster_dbt import DagsterDbtTranslator, dbt_assets

from assets import names
from assets.metadata import model_metadata
from deltaworks import operate
from deltaworks.config import Config
from deltaworks.lineage.sql import Relation
from resources.dbt import Dbt, prepared_project
from resources.deltaworks_config import DeltaworksConfig


class ModelNames(DagsterDbtTranslator):
    """dbt sources are our stored and enriched tables; models are `modeled/<name>`."""

    def __init__(self, config: Config) -> None:
        """Take the configuration to tell sources from apps."""
        super().__init__()
        self._apps = frozenset(config.apps)

    def get_asset_key(self, dbt_resource_props: Mapping[str, Any]) -> dg.AssetKey:
        """Our key for a dbt node."""
        name = dbt_resource_props["name"]
        if dbt_resource_props["resource_type"] != "source":
            return names.modeled(name)
        schema = dbt_resource_props["schema"]
        return names.enriched(schema, name) if schema in self._apps else names.stored(schema, name)

    def get_group_name(self, dbt_resource_props: Mapping[str, Any]) -> str:
        """Models are part of the store."""
        return "store"


def modeled_tables(config: Config) -> dg.AssetsDefinition:
    """All models, with their dbt tests as asset checks."""
    project = prepared_project()
    translator = ModelNames(config)
    manifest = json.loads(project.manifest_path.read_text(encoding="utf-8"))
    keys = {
        _relation(node): translator.get_asset_key(node)
        for node in [*manifest["nodes"].values(), *manifest["sources"].values()]
        if node.get("relation_name")
    }
    relations = {node["unique_id"]: _relation(node) for node in manifest["nodes"].values()}

    @dbt_assets(manifest=manifest, project=project, dagster_dbt_translator=translator, name="modeled", pool="lake")
    def modeled(
        context: dg.AssetExecutionContext, dbt: Dbt, deltaworks: DeltaworksConfig
    ) -> Iterator[Any]:  # Any: the events that dagster-dbt makes of dbt's
        build = dbt.build(context)
        statements = {relations[node]: statement for node, statement in build.statements.items()}
        models = operate.describe_models(deltaworks.load(), statements)
        metadata = {keys[relation]: model_metadata(model, keys) for relation, model in models.items()}
        for event in build.events:
            if isinstance(event, dg.Output):
                yield event.with_metadata(
                    {**event.metadata, **metadata.get(context.asset_key_for_output(event.output_name), {})}
                )
            else:
                yield event
        # What was built before a failure is told as well; the failure follows.
        build.raise_on_failure()

    return modeled


def _relation(node: Mapping[str, Any]) -> Relation:
    return (node["database"], node["schema"], node.get("alias") or node.get("identifier") or node["name"])
