"""A reader that begins in a log which lost its first groups ends equal to the source."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

import pytest
from servers.postgres import Database
from typer.testing import CliRunner

from deltaworks import operate
from deltaworks.cli import app as command_line
from deltaworks.config import Config, LocalLogConfig, load
from deltaworks.log.change_log import Group, OffsetRetiredError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.retention import retire
from deltaworks.operate.beginning import BeginError
from deltaworks.operate.lake import open_lake
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.lake_table import LakeTable

CONFIG = """
home: home
sources:
  shop: {{kind: postgres, dsn: "{dsn}", tables: [t], slot: {name}, publication: {name}}}
apps:
  items: {{module: "flows.test_begin_in_a_short_log:items", source: shop}}
"""


class Row(TypedDict):
    v: int


class Document(TypedDict):
    id: int
    twice: int


items = App("items", key="id", sources=[Source("shop").table("t", schema=Row)])


@items.transform
def document(item: Entity[Row]) -> Document:
    return {"id": item.key, "twice": 2 * item.after["v"]}


items.sink(LakeTable("documents", schema=Document))


@pytest.fixture
def path(database: Database, tmp_path: Path) -> Path:
    """A log without the groups of its first dump; rows from before it were changed, deleted, or left alone."""
    database.execute(
        "create table t (id int primary key, v int not null)",
        "insert into t select g, g from generate_series(1, 50) g",
    )
    path = tmp_path / "deltaworks.yaml"
    path.write_text(CONFIG.format(dsn=database.dsn, name=database.name))
    config = load(path, environment={})
    operate.capture(config, "shop")
    with LocalLogWriter.open(config.log_folder("shop"), segment_bytes=1) as writer:
        end = writer.end()
        # A group of its own segment, so that those before it can be retired.
        writer.append(Group(batches=(), position=end.position, previous_position=end.position, progress=end.progress))
    database.execute("update t set v = 0 where id < 5", "delete from t where id = 40", "insert into t values (99, 99)")
    operate.capture(config, "shop")
    retire(config.log_folder("shop"), LocalLogConfig(max_bytes=1), read_up_to={}, now=datetime.now(UTC))
    oldest = LocalLogReader(config.log_folder("shop")).oldest()
    assert oldest is not None
    assert oldest.sequence > 0
    return path


def config_of(path: Path) -> Config:
    return load(path, environment={})


def run(path: Path, *arguments: str) -> str:
    result = CliRunner().invoke(command_line, ["log", "begin", *arguments, "--config", str(path)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_lake_begins_there_and_ends_equal_to_the_source(path: Path, database: Database) -> None:
    config = config_of(path)
    with pytest.raises(OffsetRetiredError, match="deltaworks log begin"):
        operate.load(config, "shop")
    assert "begins with group" in run(path, "shop")
    operate.capture(config, "shop")
    operate.load(config, "shop")
    database.execute("delete from t where id = 7", "update t set v = 3 where id = 99")
    operate.capture(config, "shop")
    operate.load(config, "shop")
    assert operate.verify(config, "shop").is_equal
    with pytest.raises(BeginError, match="has rows of it"):
        operate.begin_lake(config, "shop")


def test_an_app_begins_there_and_ends_equal_to_the_source(path: Path, database: Database) -> None:
    config = config_of(path)
    assert "begins with group" in run(path, "--app", "items")
    operate.capture(config, "shop")
    operate.process(config, "items")
    operate.load(config, "items")
    with open_lake(config) as lake:
        found = lake.connection.execute("select id, twice from lake.items.documents order by id").fetchall()
    assert found == database.rows("select id, 2 * v from t order by id")
    with pytest.raises(BeginError, match="its stores may have rows"):
        operate.begin_app(config, "items")
