"""A log that rots in its middle: capture names the gap and dumps it, and everything derived equals the source again."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from flows.readers import wait
from proof.shop import bring_through
from servers.postgres import Database
from typer.testing import CliRunner

from deltaworks import operate
from deltaworks.cli.commands import app as command
from deltaworks.config import Config, load
from deltaworks.log.change_log import CorruptLogError, Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import open_reader as open_log
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment import PlainBytes, frames
from deltaworks.log.segment_file import segment_files
from deltaworks.operate.incident import IncidentState


@pytest.fixture
def config(config_file: Path) -> Config:
    """The shop; closed segments are sealed by the test alone."""
    settings = yaml.safe_load(config_file.read_text())
    settings["sources"]["shop"]["log"] = {"kind": "local", "seal": False}
    config_file.write_text(yaml.safe_dump(settings))
    return load(config_file, environment={})


def end_segment(config: Config) -> int:
    """Let a segment of its own begin, with a group that says nothing; its sequence."""
    with LocalLogWriter.open(config.log_folder("shop"), segment_bytes=1) as writer:
        end = writer.end()
        at = {"position": end.position, "previous_position": end.position}
        return writer.append(Group(batches=(), **at, progress=end.progress)).sequence


def capture(config: Config, database: Database, *statements: str) -> int:
    """Capture what they do; the first group after them."""
    first = open_log(config, "shop").end().sequence + 1
    for statement in statements:
        database.execute(statement)
        operate.capture(config, "shop")
    return first


@contextmanager
def frame_of(config: Config, sequence: int) -> Iterator[tuple[Path, bytearray, int, int]]:
    """The plain file of a group, its content to change, and where the group's frame and its body begin."""
    folder = config.log_folder("shop")
    first = max(first for first in segment_files(folder) if first <= sequence)
    [path] = segment_files(folder)[first]
    with path.open("rb") as file:
        frame = next(frame for frame in frames(PlainBytes(file.fileno())) if frame.header().sequence == sequence)
    content = bytearray(path.read_bytes())
    yield path, content, frame.start, frame.body_start
    path.write_bytes(content)


def rot_body(config: Config, sequence: int) -> None:
    with frame_of(config, sequence) as (_, content, _, body):
        content[body + 200] ^= 8


def rot_header(config: Config, sequence: int) -> None:
    with frame_of(config, sequence) as (_, content, start, _):
        content[start + 40] ^= 8


def rot_sealed(config: Config, sequence: int) -> None:
    folder = config.log_folder("shop")
    seal_closed(folder, level=1)
    first = max(first for first in segment_files(folder) if first <= sequence)
    [path] = segment_files(folder)[first]
    content = bytearray(path.read_bytes())
    # All of its one block but the first bytes.
    content[200 : len(content) * 2 // 3] = bytes(len(content) * 2 // 3 - 200)
    path.write_bytes(content)


def lose_file(config: Config, sequence: int) -> None:
    folder = config.log_folder("shop")
    first = max(first for first in segment_files(folder) if first <= sequence)
    [path] = segment_files(folder)[first]
    path.unlink()


def documents(database: Database) -> list[tuple[object, ...]]:
    return database.rows("select id, title from item where kind >= 3 order by id")


def lake_rows(config: Config, table: str) -> list[tuple[object, ...]]:
    with operate.open_lake(config) as lake:
        return lake.connection.execute(f"select id, title from lake.{table} order by id").fetchall()


def reads_of(config: Config, after: int) -> set[str]:
    """The tables of which rows were dumped after a group."""
    groups = open_log(config, "shop").read(after_sequence=after)
    batches = [batch for group in groups for batch in group.batches]
    return {str(batch.schema.name) for batch in batches if "r" in batch.rows.column("_op").to_pylist()}


@pytest.mark.parametrize("rot", [rot_body, rot_header, rot_sealed, lose_file])
def test_what_was_lost_in_the_middle_of_a_log_is_dumped_and_all_equals_the_source(
    rot: Callable[[Config, int], None], config: Config, config_file: Path, database: Database
) -> None:
    database.execute("insert into part select p, p % 30 from generate_series(1, 90) p")
    capture(config, database, "insert into item select i, 'item ' || i, i % 10 from generate_series(1, 60) i")
    end_segment(config)
    bring_through(config)
    # What the lake and the app have taken of the segment, and what they have not.
    capture(config, database, "update item set title = 'seen' where id < 9", "delete from item where id in (14, 15)")
    bring_through(config)
    victim = capture(
        config,
        database,
        """with gone as (delete from item where id in (24, 25)), moved as (update item set id = 1024 where id = 28),
        made as (insert into item values (100, 'new', 5)) update item set title = 'lost' where id between 30 and 40""",
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

    bring_through(config)
    assert operate.verify(config, "shop").is_equal
    assert lake_rows(config, "items.items") == documents(database)
    assert reads_of(config, at.sequence) == ({"public.item"} if rot is rot_body else {"public.item", "public.part"})
    assert operate.history(config, "shop").gaps == []
    (incident, *others) = operate.incidents(config, "shop")
    assert [each.state for each in (incident, *others)] == [IncidentState.REPAIRED] * (1 + len(others))
    audit = operate.audit(config, "shop")
    assert audit.is_balanced, audit.summary
    assert audit.found == []
    verification = operate.verify_log(config, "shop")
    assert verification.is_whole, verification.faults
    assert victim in {fault.sequence for fault in verification.lost}
    # A lake that begins with the gap gets there as well.
    shutil.rmtree(config.lake_data)
    Path(config.lake_catalog.removeprefix("sqlite:")).unlink()
    operate.load(config, "shop")
    assert operate.verify(config, "shop").is_equal


def test_a_running_service_mends_what_a_reader_meets(config: Config, database: Database) -> None:
    capture(config, database, "insert into item select i, 'item ' || i, i % 10 from generate_series(1, 60) i")
    end_segment(config)
    victim = capture(config, database, "delete from item where id < 9")
    end_segment(config)
    rot_body(config, victim)
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        service = pool.submit(operate.follow_capture, config, "shop", stop=stop)
        try:
            with pytest.raises(CorruptLogError):
                operate.load(config, "shop")

            def is_repaired() -> bool:
                assert not service.done(), service.exception()
                return [each.state for each in operate.incidents(config, "shop")] == [IncidentState.REPAIRED]

            wait(is_repaired, what="the repair of the gap")
        finally:
            stop.set()
    operate.load(config, "shop")
    assert operate.verify(config, "shop").is_equal
