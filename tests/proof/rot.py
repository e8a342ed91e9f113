"""A shop's log that rots on its disk, and the check that everything made of it equals the source again."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from proof.shop import bring_through
from servers.postgres import Database

from deltaworks import operate
from deltaworks.config import Config, load
from deltaworks.log.change_log import Group
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.registry import open_reader as open_log
from deltaworks.log.sealing import seal_closed
from deltaworks.log.segment import PlainBytes, frames
from deltaworks.log.segment_file import segment_files

PARTS = "insert into part select p, p % 30 from generate_series(1, 90) p"
"""Three of each of thirty items."""
CHANGES = """
    with gone as (delete from item where id in (24, 25)), moved as (update item set id = 1024 where id = 28),
    made as (insert into item values (100, 'new', 5)) update item set title = 'lost' where id between 30 and 40
"""
"""Of items that `fill` makes: some go, one moves, one comes, and some have another title."""


def unsealed(config_file: Path) -> Config:
    """The shop with a log of which closed segments are sealed by the test alone."""
    settings = yaml.safe_load(config_file.read_text())
    settings["sources"]["shop"]["log"] = {"kind": "local", "seal": False}
    config_file.write_text(yaml.safe_dump(settings))
    return load(config_file, environment={})


def fill(config: Config, database: Database) -> None:
    """Have sixty items captured."""
    capture(config, database, "insert into item select i, 'item ' || i, i % 10 from generate_series(1, 60) i")


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
def frame_of(config: Config, sequence: int, log: str) -> Iterator[tuple[Path, bytearray, int, int]]:
    """The plain file of a group, its content to change, and where the group's frame and its body begin."""
    folder = config.log_folder(log)
    first = max(first for first in segment_files(folder) if first <= sequence)
    [path] = segment_files(folder)[first]
    with path.open("rb") as file:
        frame = next(frame for frame in frames(PlainBytes(file.fileno())) if frame.header().sequence == sequence)
    content = bytearray(path.read_bytes())
    yield path, content, frame.start, frame.body_start
    path.write_bytes(content)


def rot_body(config: Config, sequence: int, *, log: str = "shop") -> None:
    with frame_of(config, sequence, log) as (_, content, _, body):
        content[body + 200] ^= 8


def rot_header(config: Config, sequence: int, *, log: str = "shop") -> None:
    with frame_of(config, sequence, log) as (_, content, start, _):
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


def cut_tail(config: Config, sequence: int) -> None:
    with frame_of(config, sequence, "shop") as (_, content, start, _):
        del content[start:]


def rot_tail(config: Config, sequence: int) -> None:
    with frame_of(config, sequence, "shop") as (_, content, start, _):
        content[start:] = bytes(byte ^ 8 for byte in content[start:])


def check_equal(config: Config, database: Database) -> None:
    """Everything that is derived equals the source, and nothing is owed any more."""
    bring_through(config)
    assert operate.verify(config, "shop").is_equal
    assert lake_rows(config, "items.items") == documents(database)
    assert operate.history(config, "shop").gaps == []
    audit = operate.audit(config, "shop")
    assert audit.is_balanced, audit.summary
    assert audit.found == []
    verification = operate.verify_log(config, "shop")
    assert verification.is_whole, verification.faults
