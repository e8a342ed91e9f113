"""A source whose tables come by a pattern alone: what capture has met are assets, as those that are named."""

from pathlib import Path

import dagster as dg
import pytest
import yaml
from servers.postgres import Database

from assets.captured import captured_tables
from assets.checks import source_checks
from assets.definitions import build, with_tables_met
from assets.stored import stored_tables
from deltaworks import operate
from deltaworks.config import load
from resources.deltaworks_config import DeltaworksConfig

MADE = (
    "create table film (id int primary key, title text)",
    "create table person (id int primary key, name text)",
    "insert into film values (1, 'Alien'), (2, 'Aliens')",
    "insert into person values (7, 'Ripley')",
)

pytestmark = pytest.mark.filterwarnings("ignore:Parameter `owners` of initializer:Warning")


@pytest.fixture
def config_path(database: Database, tmp_path: Path) -> Path:
    source = {"kind": "postgres", "dsn": database.dsn, "tables": ["public.*"], "slot": database.name}
    source |= {"publication": database.name}
    path = tmp_path / "deltaworks.yaml"
    path.write_text(yaml.safe_dump({"home": str(tmp_path / "home"), "sources": {"shop": source}}))
    return path


def asset_keys(config_path: Path) -> set[str]:
    keys = build(config_path).resolve_asset_graph().get_all_asset_keys()
    return {key.to_user_string() for key in keys if "shop" in key.path}


def test_tables_of_a_pattern_are_assets_once_capture_has_met_them(database: Database, config_path: Path) -> None:
    assert asset_keys(config_path) == {"dumped/shop"}
    database.execute(*MADE)
    config = load(config_path, environment={})
    operate.capture(config, "shop")
    met = {f"{stage}shop/{table}" for stage in ("", "captured/", "stored/") for table in ("film", "person")}
    assert asset_keys(config_path) == {"dumped/shop"} | met

    # One more comes while the definitions stand: it is captured and loaded, and an asset when they are made again.
    known = with_tables_met(config)
    database.execute("create table genre (id int primary key)", "insert into film values (3, 'Alien 3')")
    settings = known.source("shop")
    done = dg.materialize(
        [captured_tables("shop", settings), stored_tables("shop", settings), *source_checks(known)],
        resources={"deltaworks": DeltaworksConfig(path=str(config_path))},
    )
    rows = {
        event.asset_key.to_user_string(): event.materialization.metadata["dagster/row_count"].value
        for event in done.get_asset_materialization_events()
        if event.asset_key is not None
    }
    assert (rows["stored/shop/film"], rows["stored/shop/person"]) == (3, 1)
    assert {check.passed for check in done.get_asset_check_evaluations()} == {True}
    assert asset_keys(config_path) == {"dumped/shop"} | met | {"shop/genre", "captured/shop/genre", "stored/shop/genre"}
