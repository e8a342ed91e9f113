"""dbt in the process of a run: a model that fails fails the step, and what was built and tested is told."""

import importlib
import os
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from deltaworks import config as configuration
from deltaworks.store.lake import Lake
from resources.dbt import dbt
from resources.deltaworks_config import DeltaworksConfig

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:AssetExecutionContext.op is deprecated:DeprecationWarning")


@pytest.fixture
def modeled(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The models as assets on the small lake, and the resources that they take."""
    settings = yaml.safe_load((ROOT / "deltaworks.yaml").read_text())
    settings["home"] = str(Path(os.environ["DELTAWORKS_EXTENSIONS"]).parent)
    path = tmp_path / "deltaworks.yaml"
    path.write_text(yaml.safe_dump(settings))
    config = configuration.load(path, environment={})
    # The lake's own address, in its own words: dbt parses the project anew when it changes.
    catalog, extensions = os.environ["DELTAWORKS_LAKE_CATALOG"], os.environ["DELTAWORKS_EXTENSIONS"]
    assets = importlib.import_module("assets.modeled").modeled_tables(config)
    resources = {"dbt": dbt(config), "deltaworks": DeltaworksConfig(path=str(path))}
    monkeypatch.setenv("DELTAWORKS_LAKE_CATALOG", catalog)
    monkeypatch.setenv("DELTAWORKS_EXTENSIONS", extensions)
    return assets, resources


def materialize(modeled: tuple[Any, dict[str, Any]], *names: str) -> dg.ExecuteInProcessResult:
    assets, resources = modeled
    selection = [dg.AssetKey(["modeled", name]) for name in names] or None
    return dg.materialize([assets], resources=resources, selection=selection, raise_on_error=False)


def materialized(result: dg.ExecuteInProcessResult) -> set[str]:
    return {event.asset_key.path[-1] for event in result.get_asset_materialization_events() if event.asset_key}


def test_a_model_that_fails_its_tests_fails_the_step_and_the_others_are_told(
    small_lake: Lake, modeled: tuple[Any, dict[str, Any]]
) -> None:
    small_lake.connection.execute("update lake.studio.movie set status = 'lost' where movie_id = 1")
    result = materialize(modeled)

    assert not result.success
    assert "stg_movie" in materialized(result)
    assert "film" not in materialized(result)
    failed = {each.check_name for each in result.get_asset_check_evaluations() if not each.passed}
    assert any(name.startswith("accepted_values_stg_movie") for name in failed)
    [failure] = [event for event in result.all_events if event.event_type == dg.DagsterEventType.STEP_FAILURE]
    reason = str(failure.step_failure_data.user_failure_data)
    assert "accepted_values_stg_movie" in reason
    assert "lost" not in reason, "a message has no row data"


def test_a_selection_builds_what_was_selected_and_nothing_else(
    small_lake: Lake, modeled: tuple[Any, dict[str, Any]]
) -> None:
    # dbt runs the tests between selected models and others too, so those have to be there.
    assert materialize(modeled).success
    result = materialize(modeled, "stg_movie", "stg_person")
    assert result.success
    assert materialized(result) == {"stg_movie", "stg_person"}
