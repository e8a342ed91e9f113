"""A power cut that leaves a stale `end`, and a disk that lost what was last appended: PostgreSQL was told of more than
the log has. Capture names the gap before it reads on, and a dump mends it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from log.test_stale_end import STALE, absent, of_an_earlier_group
from proof.rot import (
    CHANGES,
    PARTS,
    capture,
    check_equal,
    documents,
    end_segment,
    fill,
    frame_of,
    lake_rows,
    reads_of,
    rot_tail,
    unsealed,
)
from proof.shop import bring_through
from servers.postgres import Database

from deltaworks import operate
from deltaworks.capture.continuity import Gap
from deltaworks.capture.source import SlotInvalidatedError
from deltaworks.config import Config, load
from deltaworks.log.change_log import CorruptLogError
from deltaworks.log.mending import LocalMending
from deltaworks.log.registry import open_reader as open_log
from deltaworks.position import Lsn
from deltaworks.store.load import BrokenLoadChainError, LogRestartedError


@pytest.fixture
def config(config_file: Path) -> Config:
    return unsealed(config_file)


def rot_the_last(config: Config, victim: int) -> None:
    """The very last group alone."""
    with frame_of(config, open_log(config, "shop").end().sequence, "shop") as (_, content, start, _):
        content[start + 40] ^= 8


def rot_the_first_of_them(config: Config, victim: int) -> None:
    """A group that has whole ones behind it."""
    with frame_of(config, victim, "shop") as (_, content, start, _):
        content[start + 40] ^= 8


def confirmed(database: Database) -> Lsn:
    """What PostgreSQL was told to be durable."""
    [(position,)] = database.rows(
        "select confirmed_flush_lsn from pg_replication_slots where database = current_database()"
    )
    return Lsn.parse(position)


def cut_the_power(
    config: Config,
    database: Database,
    *,
    stale: Callable[[Path, bytes], None],
    rot: Callable[[Config, int], None],
    are_taken: bool,
) -> int:
    """Have changes captured, confirmed and damaged, with an `end` of before them; the first group of them."""
    database.execute(PARTS)
    fill(config, database)
    end_segment(config)
    bring_through(config)
    end = config.log_folder("shop") / "end"
    earlier = end.read_bytes()
    victim = capture(
        config,
        database,
        CHANGES,
        "delete from part where id = 7",
    )
    if are_taken:
        bring_through(config)
    assert confirmed(database) == open_log(config, "shop").end().position
    rot(config, victim)
    stale(end, earlier)
    database.execute("update item set title = 'later' where id = 50", "delete from item where id in (9, 35)")
    return victim


def gaps_named(config: Config) -> list[Gap]:
    """Every gap that the log ever said to be open, in order."""
    named: list[Gap] = []
    for group in open_log(config, "shop").read(after_sequence=-1):
        gaps = map(Gap.from_json, group.header.progress.get("gaps", ()))
        named += [gap for gap in gaps if gap not in named]
    return named


@pytest.mark.parametrize("rot", [rot_the_last, rot_tail])
@pytest.mark.parametrize("stale", STALE.values(), ids=STALE)
def test_a_slot_that_was_told_of_more_than_is_left_is_a_named_gap_and_all_equals_the_source(
    stale: Callable[[Path, bytes], None], rot: Callable[[Config, int], None], config: Config, database: Database
) -> None:
    cut_the_power(config, database, stale=stale, rot=rot, are_taken=False)
    told = confirmed(database)

    operate.capture(config, "shop")

    [gap] = gaps_named(config)
    assert gap.since < told <= gap.until
    assert f"is ahead at {told}" in gap.reason
    assert LocalMending(config.log_folder("shop")).lost() == []
    assert reads_of(config, 0) == {"public.item", "public.part"}
    check_equal(config, database)


@pytest.mark.parametrize("stale", [of_an_earlier_group, absent])
def test_a_whole_group_behind_the_damage_makes_it_a_gap_of_the_log_and_the_slot_is_where_the_log_is(
    stale: Callable[[Path, bytes], None], config: Config, database: Database
) -> None:
    victim = cut_the_power(config, database, stale=stale, rot=rot_the_first_of_them, are_taken=True)
    operate.capture(config, "shop")
    [gap] = gaps_named(config)
    assert "is ahead" not in gap.reason
    [lost] = LocalMending(config.log_folder("shop")).lost()
    assert (lost.first, lost.last) == (victim, victim)
    check_equal(config, database)


def test_where_gaps_stop_capture_a_slot_that_was_told_of_more_than_is_left_stops_it(
    config: Config, config_file: Path, database: Database
) -> None:
    settings = yaml.safe_load(config_file.read_text())
    settings["sources"]["shop"]["on_gap"] = "stop"
    config_file.write_text(yaml.safe_dump(settings))
    stopping = load(config_file, environment={})
    cut_the_power(stopping, database, stale=of_an_earlier_group, rot=rot_tail, are_taken=False)
    for _ in range(2):
        with pytest.raises(SlotInvalidatedError, match="is ahead at"):
            operate.capture(stopping, "shop")
    # Once a person lets it.
    operate.capture(config, "shop")
    assert len(gaps_named(config)) == 1
    check_equal(config, database)


@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("rot", [rot_the_last, rot_tail])
def test_who_has_taken_what_is_lost_stops_and_is_made_anew(
    rot: Callable[[Config, int], None], grows: bool, config: Config, database: Database
) -> None:
    cut_the_power(config, database, stale=of_an_earlier_group, rot=rot, are_taken=True)
    operate.capture(config, "shop")
    if grows:
        # Past where the readers are.
        for number in range(4):
            capture(config, database, f"update item set title = 'after {number}' where id = 1")
    for _ in range(2):
        with pytest.raises((LogRestartedError, BrokenLoadChainError)):
            operate.load(config, "shop")
        with pytest.raises(CorruptLogError, match="start over"):
            operate.process(config, "items")
    # As they say.
    with operate.open_lake(config) as lake:
        for log in ("shop", "items"):
            lake.connection.execute(f"drop schema lake.{log} cascade")
            lake.connection.execute("delete from lake.deltaworks.load where log = ?", [log])
    for folder in (config.app_folder("items"), config.index_folder("items"), config.log_folder("items")):
        shutil.rmtree(folder)
    check_equal(config, database)


def test_a_stale_end_alone_stops_who_has_read_more_until_capture_has_found_the_rest(
    config: Config, database: Database
) -> None:
    cut_the_power(config, database, stale=of_an_earlier_group, rot=lambda *_: None, are_taken=True)
    with pytest.raises(LogRestartedError, match="after a power cut start first what writes the log"):
        operate.load(config, "shop")
    with pytest.raises(CorruptLogError, match="after a power cut start first what writes it"):
        operate.process(config, "items")
    operate.capture(config, "shop")
    assert gaps_named(config) == []
    check_equal(config, database)


def test_what_an_apps_own_log_lost_so_is_named_by_the_audit_and_repaired(config: Config, database: Database) -> None:
    capture(config, database, "insert into item select i, 'item ' || i, i % 10 from generate_series(1, 60) i")
    bring_through(config)
    end = config.log_folder("items") / "end"
    earlier = end.read_bytes()
    capture(config, database, "update item set title = 'lost' where id < 9", "delete from item where id in (14, 15)")
    operate.process(config, "items")
    with frame_of(config, open_log(config, "items").end().sequence, "items") as (_, content, start, _):
        content[start + 40] ^= 8
    of_an_earlier_group(end, earlier)
    # Nobody can tell the app's source of it: the app has the rows, and has sent their documents.
    capture(config, database, "update item set title = 'later' where id = 50")
    bring_through(config)
    assert lake_rows(config, "items.items") != documents(database)

    [incident] = operate.audit(config, "shop").found
    assert incident.loss.hop == "sink items/items"
    assert {int(key) for (key,) in incident.loss.keys["public.item"]} == {3, 4, 5, 6, 7, 8, 14, 15}
    operate.repair(config, "shop")
    bring_through(config)
    assert lake_rows(config, "items.items") == documents(database)
    assert operate.audit(config, "shop").is_balanced
