"""A log that rots: capture names the gap and dumps it, and everything that is derived equals the source again."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from flows.readers import wait
from proof.rot import (
    CHANGES,
    PARTS,
    capture,
    check_equal,
    cut_tail,
    documents,
    end_segment,
    fill,
    lake_rows,
    lose_file,
    reads_of,
    rot_body,
    rot_header,
    rot_sealed,
    rot_tail,
    unsealed,
)
from proof.shop import bring_through
from servers.postgres import Database
from typer.testing import CliRunner

from deltaworks import operate
from deltaworks.cli.commands import app as command
from deltaworks.config import Config, load
from deltaworks.log.change_log import CorruptLogError
from deltaworks.log.end_file import read_last
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.mending import LocalMending
from deltaworks.log.registry import open_reader as open_log
from deltaworks.operate.incident import IncidentState
from deltaworks.operate.mending import NotMendableError


@pytest.fixture
def config(config_file: Path) -> Config:
    return unsealed(config_file)


@pytest.mark.parametrize("rot", [rot_body, rot_header, rot_sealed, lose_file])
def test_what_was_lost_in_the_middle_of_a_log_is_dumped_and_all_equals_the_source(
    rot: Callable[[Config, int], None], config: Config, config_file: Path, database: Database
) -> None:
    database.execute(PARTS)
    fill(config, database)
    end_segment(config)
    bring_through(config)
    # What the lake and the app have taken of the segment, and what they have not.
    capture(config, database, "update item set title = 'seen' where id < 9", "delete from item where id in (14, 15)")
    bring_through(config)
    victim = capture(
        config,
        database,
        CHANGES,
    )
    capture(config, database, "update item set title = 'behind' where id = 35", "delete from item where id = 36")
    end_segment(config)
    capture(config, database, "update item set title = 'later' where id = 50", "delete from part where id = 7")
    at = open_log(config, "shop").end()

    rot(config, victim)

    # Nobody is given what is not there, and everybody is told what to do.
    with pytest.raises(CorruptLogError, match="deltaworks log mend shop"):
        operate.load(config, "shop")
    with pytest.raises(CorruptLogError, match="deltaworks log mend shop"):
        operate.process(config, "items")
    if rot is lose_file:
        # By hand, while nothing runs.
        said = CliRunner().invoke(command, ["log", "mend", "shop", "--config", str(config_file)])
        assert said.exit_code == 0, said.output
        assert "changes of tables that are not known" in said.output
        assert [incident.state for incident in operate.incidents(config, "shop")] == [IncidentState.OPEN]
    operate.capture(config, "shop")

    check_repaired(config, database)
    assert reads_of(config, at.sequence) == ({"public.item"} if rot is rot_body else {"public.item", "public.part"})
    assert victim in {fault.sequence for fault in operate.verify_log(config, "shop").lost}
    # A lake that begins with the gap gets there as well.
    shutil.rmtree(config.lake_data)
    Path(config.lake_catalog.removeprefix("sqlite:")).unlink()
    operate.load(config, "shop")
    assert operate.verify(config, "shop").is_equal


def damage_the_end(config: Config, database: Database, rot: Callable[[Config, int], None]) -> None:
    """Have a log whose last changes are damaged: those that lake and app have taken, and those that they have not."""
    database.execute(PARTS)
    fill(config, database)
    bring_through(config)
    end_segment(config)
    victim = capture(config, database, "update item set title = 'seen' where id < 9", "delete from item where id = 14")
    bring_through(config)
    capture(
        config,
        database,
        CHANGES,
    )
    rot(config, victim)
    database.execute("update item set title = 'later' where id = 50", "delete from part where id = 7")
    with pytest.raises(CorruptLogError, match="deltaworks log mend shop"):
        operate.load(config, "shop")


def check_repaired(config: Config, database: Database) -> None:
    """Everything equals the source, and what was lost is told and repaired."""
    check_equal(config, database)
    assert {each.state for each in operate.incidents(config, "shop")} == {IncidentState.REPAIRED}
    assert operate.verify_log(config, "shop").lost


@pytest.mark.parametrize("rot", [cut_tail, rot_tail, lose_file])
@pytest.mark.parametrize("is_by_hand", [False, True])
def test_what_was_lost_at_the_end_of_a_log_is_dumped_and_all_equals_the_source(
    rot: Callable[[Config, int], None], is_by_hand: bool, config: Config, config_file: Path, database: Database
) -> None:
    damage_the_end(config, database, rot)
    published = read_last(config.log_folder("shop"))
    assert published is not None
    if is_by_hand:
        said = CliRunner().invoke(command, ["log", "mend", "shop", "--config", str(config_file)])
        assert said.exit_code == 0, said.output
        assert "changes of tables that are not known" in said.output
        end = open_log(config, "shop").end()
        assert (end.sequence, end.offset) == (published.sequence, published.next_offset)
        assert (end.position, end.progress) == (published.position, published.progress)
        assert [incident.state for incident in operate.incidents(config, "shop")] == [IncidentState.OPEN]
    operate.capture(config, "shop")
    assert reads_of(config, published.sequence) == {"public.item", "public.part"}
    check_repaired(config, database)


@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_what_an_apps_own_log_lost_is_made_anew_by_the_app(
    is_at_the_end: bool, config: Config, config_file: Path, database: Database
) -> None:
    fill(config, database)
    bring_through(config)
    capture(
        config,
        database,
        "update item set title = 'lost' where id < 30",
        "delete from item where id in (14, 15, 24)",
        "update item set kind = 1 where id = 25",
    )
    operate.process(config, "items")
    victim = open_log(config, "items").end().sequence
    if not is_at_the_end:
        capture(config, database, "update item set title = 'behind' where id = 40")
        operate.process(config, "items")
    rot_header(config, victim, log="items")
    database.execute("update item set title = 'later' where id = 50")
    with pytest.raises(CorruptLogError, match="deltaworks log mend items"):
        operate.load(config, "items")

    operate.capture(config, "shop")
    with pytest.raises(CorruptLogError, match="deltaworks log mend items"):
        operate.process(config, "items")
    said = CliRunner().invoke(command, ["log", "mend", "items", "--config", str(config_file)])
    assert said.exit_code == 0, said.output
    assert "60 documents are made anew" in said.output
    assert LocalMending(config.log_folder("items")).owed() == []
    bring_through(config)
    assert lake_rows(config, "items.items") == documents(database)
    assert operate.verify_log(config, "items").is_whole
    audit = operate.audit(config, "shop")
    assert audit.is_balanced, audit.summary
    # The second time there is nothing to do.
    said = CliRunner().invoke(command, ["log", "mend", "items", "--config", str(config_file)])
    assert "every group in the log's folder can be read" in said.output


def test_the_log_of_an_app_that_runs_is_mended_after_its_service(config: Config, database: Database) -> None:
    fill(config, database)
    bring_through(config)
    with LocalLogWriter.open(config.log_folder("items")) as writer:
        rot_body(config, writer.end().sequence, log="items")
        with pytest.raises(NotMendableError, match="stop the app's service"):
            operate.mend_log(config, "items")
    assert operate.mend_log(config, "items").made_anew == 60
    operate.load(config, "items")
    assert lake_rows(config, "items.items") == documents(database)


def test_what_the_log_of_a_shared_app_lost_is_owed_until_the_app_writes_to_it_again(
    config: Config, config_file: Path, database: Database
) -> None:
    fill(config, database)
    bring_through(config)
    capture(config, database, "update item set title = 'lost' where id < 30")
    operate.process(config, "items")
    rot_body(config, open_log(config, "items").end().sequence, log="items")
    settings = yaml.safe_load(config_file.read_text())
    settings["apps"]["items"]["shares"] = 4
    config_file.write_text(yaml.safe_dump(settings))
    # The gap is named, and whoever mends once more is told the same: nothing is forgotten.
    for _ in range(2):
        with pytest.raises(NotMendableError, match=r"take `shares` out of apps\.items.*`deltaworks log mend items`"):
            operate.mend_log(load(config_file, environment={}), "items")
        assert len(LocalMending(config.log_folder("items")).owed()) == 1

    # The step that it names.
    del settings["apps"]["items"]["shares"]
    config_file.write_text(yaml.safe_dump(settings))
    said = CliRunner().invoke(command, ["log", "mend", "items", "--config", str(config_file)])
    assert said.exit_code == 0, said.output
    assert "60 documents are made anew" in said.output
    assert LocalMending(config.log_folder("items")).owed() == []
    bring_through(config)
    assert lake_rows(config, "items.items") == documents(database)


@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_where_gaps_stop_capture_a_person_has_the_log_mended_and_capture_goes_on(
    is_at_the_end: bool, config: Config, config_file: Path, database: Database
) -> None:
    settings = yaml.safe_load(config_file.read_text())
    settings["sources"]["shop"]["on_gap"] = "stop"
    config_file.write_text(yaml.safe_dump(settings))
    config = load(config_file, environment={})
    if is_at_the_end:
        damage_the_end(config, database, rot_tail)
        for _ in range(2):
            with pytest.raises(CorruptLogError, match="deltaworks log mend shop"):
                operate.capture(config, "shop")
    else:
        fill(config, database)
        end_segment(config)
        victim = capture(config, database, "update item set title = 'lost' where id < 9")
        end_segment(config)
        rot_body(config, victim)
        # Capture reads none of it, and leaves it as it is.
        operate.capture(config, "shop")
        for _ in range(2):
            with pytest.raises(CorruptLogError, match="deltaworks log mend shop"):
                operate.load(config, "shop")
            operate.capture(config, "shop")
    assert LocalMending(config.log_folder("shop")).lost() == []

    said = CliRunner().invoke(command, ["log", "mend", "shop", "--config", str(config_file)])
    assert said.exit_code == 0, said.output
    assert "dumps the tables again" in said.output
    operate.capture(config, "shop")
    check_repaired(config, database)


@contextmanager
def capturing(config: Config) -> Iterator[Future[None]]:
    """The capture service, in a thread."""
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        service = pool.submit(operate.follow_capture, config, "shop", stop=stop)
        try:
            yield service
        finally:
            stop.set()


def check_repaired_by(service: Future[None], config: Config) -> None:
    """A reader meets the damage, the service mends it, and then the lake is as the source."""
    with pytest.raises(CorruptLogError):
        operate.load(config, "shop")

    def is_repaired() -> bool:
        assert not service.done(), service.exception()
        return [each.state for each in operate.incidents(config, "shop")] == [IncidentState.REPAIRED]

    wait(is_repaired, what="the repair of the gap")
    operate.load(config, "shop")
    assert operate.verify(config, "shop").is_equal


@pytest.mark.parametrize("rot", [rot_body, rot_header])
def test_a_running_service_mends_the_segment_that_it_writes_to(
    rot: Callable[[Config, int], None], config: Config, database: Database
) -> None:
    fill(config, database)
    with capturing(config) as service:
        before = open_log(config, "shop").end().offset
        database.execute("delete from item where id < 9")
        wait(lambda: open_log(config, "shop").end().offset > before, what="the deletes in the log")
        # Nothing follows it: the source is idle.
        headers = open_log(config, "shop").headers_backwards()
        rot(config, next(header.sequence for header in headers if header.tables))
        check_repaired_by(service, config)


def test_a_running_service_mends_what_a_reader_meets(config: Config, database: Database) -> None:
    fill(config, database)
    end_segment(config)
    victim = capture(config, database, "delete from item where id < 9")
    end_segment(config)
    rot_body(config, victim)
    with capturing(config) as service:
        check_repaired_by(service, config)
