"""Schema changes and gaps all the way: source = lake after each, and Dagster is told."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
import pytest
from flows.readers import Readers
from servers.postgres import Database

from assets.captured import gap_check
from deltaworks import operate
from deltaworks.capture.continuity import Gap
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.position import Lsn
from resources.deltaworks_config import DeltaworksConfig
from sensors.source_changed import source_changed_sensor


@pytest.fixture
def shop(database: Database, tmp_path: Path) -> Iterator[Readers]:
    """A source with a partitioned table; every step is a run, no service."""
    database.execute(
        "create table t (id int, v text, n int, r text, primary key (id, r)) partition by list (r)",
        "create table t_eu partition of t for values in ('eu')",
        "create table t_us partition of t for values in ('us')",
        "insert into t select g, 'v' || g, g, (array['eu', 'us'])[1 + g % 2] from generate_series(1, 60) g",
    )
    made = Readers(database, tmp_path)
    yield made
    made.stop()


STEPS = {
    "a column added, empty": ["alter table t add x int"],
    "rows with it": ["update t set x = id where id < 10"],
    "a column added with a default": ["alter table t add y int default 7"],
    "a column renamed": ["alter table t rename v to w"],
    "a column widened": ["alter table t alter n type bigint"],
    "a column dropped": ["alter table t drop x"],
    "a column of an old name": ["alter table t add x int"],
    "a partition attached with rows": [
        "create table t_as (like t including all)",
        "insert into t_as (id, r) values (1, 'as'), (2, 'as')",
        "alter table t attach partition t_as for values in ('as')",
    ],
    "a partition detached": ["alter table t detach partition t_us"],
    "replica identity full for a while": [
        "alter table t_eu replica identity full",
        "update t set w = 'full' where id = 4",
        "delete from t where id = 6",
        "alter table t_eu replica identity default",
        "delete from t where id = 8",
    ],
    "the slot lost, rows changed and deleted": [
        "select pg_drop_replication_slot(current_database())",
        "delete from t where id between 20 and 30",
        "update t set w = 'missed' where id = 40",
    ],
    "dropped and created again": [
        "drop table t",
        "create table t (id int, w text, r text, primary key (id, r))",
        "insert into t values (2, 'new', 'eu')",
    ],
}


def test_lake_equals_the_source_after_every_change_of_schema(shop: Readers) -> None:
    config = shop.config()
    operate.capture(config, "shop")
    operate.load(config, "shop")
    for step, statements in STEPS.items():
        shop.database.execute(*statements)
        operate.capture(config, "shop")
        operate.load(config, "shop")
        verification = operate.verify(config, "shop")
        assert verification.is_equal, (step, verification.tables)
        assert verification.tables[0].source_rows == shop.database.rows("select count(*) from t")[0][0]


def test_dagster_is_told_of_a_schema_change_once(shop: Readers) -> None:
    config, resource = shop.config(), DeltaworksConfig(path=str(shop.config_path()))
    operate.capture(config, "shop")
    sensor = source_changed_sensor("shop")

    def look(cursor: str | None) -> tuple[list[dg.AssetObservation], str | None]:
        context = dg.build_sensor_context(cursor=cursor, resources={"deltaworks": resource})
        result = sensor(context)
        if isinstance(result, dg.SkipReason):
            return [], context.cursor
        return list(result.asset_events), result.cursor

    events, cursor = look(None)
    assert events == []
    shop.database.execute("alter table t add y int default 7")
    operate.capture(config, "shop")
    events, cursor = look(cursor)
    (event,) = events
    assert event.asset_key == dg.AssetKey(["captured", "shop", "t"])
    assert "column y is new" in (event.description or "")
    assert event.metadata["new"].value["y"] == "integer"
    assert "default" in str(event.metadata["dumped_again_because"].value)
    assert look(cursor)[0] == []


def test_open_gap_fails_the_check_and_a_repaired_one_passes(shop: Readers) -> None:
    config, resource = shop.config(), DeltaworksConfig(path=str(shop.config_path()))
    operate.capture(config, "shop")
    check = gap_check("shop", config.source("shop"))

    def verdicts() -> list[dg.AssetCheckResult]:
        return list(check(dg.build_asset_check_context(), deltaworks=resource))

    assert [verdict.passed for verdict in verdicts()] == [True]
    # A repair that died after its first group: the gap is in the log, the dump is not.
    with LocalLogWriter.open(config.log_folder("shop")) as writer:
        end = writer.end()
        gap = Gap(since=Lsn(1), until=Lsn(2), reason="the slot is gone", noticed_at=datetime.now(UTC))
        progress = {**end.progress, "gaps": [gap.to_json()], "sweeps": {"public.t": [end.position.value, False]}}
        writer.append(Group(batches=(), position=end.position, previous_position=end.position, progress=progress))
    (verdict,) = verdicts()
    assert not verdict.passed
    assert "changes from 0/1 to 0/2 were missed: the slot is gone" in (verdict.description or "")
    operate.capture(config, "shop")
    assert [verdict.passed for verdict in verdicts()] == [True]
