"""Bytes that are damaged on their way: capture stops where it stands, and keeps them for a report."""

import os
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from capture.replaying import replay, table_of
from servers.damage import Damage, damaging
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.config import PostgresConfig
from deltaworks.errors import InvariantError
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain, follow
from deltaworks.position import START

CELL = b"t\x00\x00\x00\x08a secret"


@pytest.fixture
def damage(database: Database) -> Iterator[Damage]:
    with damaging(database.server.port) as damage:
        yield damage


@pytest.fixture
def source(database: Database, damage: Damage, tmp_path: Path) -> Iterator[PostgresSource]:
    """A source behind the proxy."""
    database.execute("create table t (id int primary key, v text)", "insert into t values (1, 'before')")
    dsn = f"host=127.0.0.1 port={damage.port} user=postgres dbname={database.name} sslmode=disable"
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]})
    with closing(PostgresSource(database.name, config, folder=tmp_path / "capture")) as source:
        yield source


def run_drain(source: PostgresSource, log: MemoryLog) -> None:
    with log.writer() as writer:
        drain(source, writer, log.reader())


def run_service(source: PostgresSource, log: MemoryLog) -> None:
    with log.writer() as writer:
        follow(source, writer, log.reader(), stop=threading.Event())


@pytest.mark.parametrize("run", [run_drain, run_service])
@pytest.mark.parametrize(
    ("put", "said"),
    [
        (b"?" + CELL[1:], r"cannot decode the 'I' message of \d+ bytes at [0-9A-F]+/[0-9A-F]+: a marker"),
        (CELL[:1] + b"\x00\x00\x01\x08" + CELL[5:], r"cannot decode the 'I' message of \d+ bytes"),
    ],
)
def test_damaged_message_stops_capture_keeps_the_position_and_is_saved(
    database: Database,
    source: PostgresSource,
    damage: Damage,
    tmp_path: Path,
    put: bytes,
    said: str,
    run: Callable[[PostgresSource, MemoryLog], None],
) -> None:
    log = MemoryLog()
    run_drain(source, log)
    before = log.reader().end()
    database.execute("insert into t values (2, 'a secret')")
    damage.instead_of, damage.put = CELL, put
    with pytest.raises(InvariantError, match=said) as caught:
        run(source, log)
    # The server may also have sent it to the reader before, whose leave it had not noticed yet.
    assert damage.count >= 1
    assert log.reader().end().position == before.position
    (saved,) = (tmp_path / "capture").iterdir()
    assert put in saved.read_bytes()
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    assert f"its bytes are in {saved}: keep them for a report, they hold row data" in str(caught.value)
    assert "secret" not in str(caught.value)
    # The server still has it: undamaged it comes, once.
    damage.instead_of = b""
    run_drain(source, log)
    assert replay(log, "t") == table_of(database, "t")


@pytest.mark.parametrize(
    ("put", "said"),
    [
        (b"z\x00\x00\x00\x38w", "a message of kind 'z' has no place in it"),
        (b"d\x00\x00\x00\x30w", "a message of kind 'a' has no place in it"),
        (b"d\x7f\xff\xff\xffw", "cannot decode the 'I' message"),
    ],
    ids=["kind", "size", "endless"],
)
def test_damaged_frame_stops_capture_keeps_the_position_and_is_saved(
    database: Database, source: PostgresSource, damage: Damage, tmp_path: Path, put: bytes, said: str
) -> None:
    log = MemoryLog()
    run_drain(source, log)
    before = log.reader().end()
    database.execute("insert into t values (2, 'a secret')")
    # The frame of that row; all others are of other sizes.
    damage.instead_of, damage.put = b"d\x00\x00\x00\x38w", put
    with pytest.raises(InvariantError, match=rf"{said}.*; its bytes are in .*message-"):
        run_drain(source, log)
    # The server may also have sent it to the reader before, whose leave it had not noticed yet.
    assert damage.count >= 1
    assert log.reader().end().position == before.position
    (saved,) = (tmp_path / "capture").iterdir()
    assert saved.stat().st_size > 0


def test_stream_keeps_its_spills_in_the_folder_and_removes_those_of_a_death(
    database: Database, source: PostgresSource, tmp_path: Path
) -> None:
    database.execute(f"alter database {database.name} set logical_decoding_work_mem = '64kB'")
    folder = tmp_path / "capture"
    folder.mkdir()
    left, report = folder / "deltaworks-spill-left", folder / "message-0000000000000001.bin"
    left.write_bytes(b"x")
    report.write_bytes(b"y")
    source.prepare()
    with source.open(resume_after=START) as stream, database.connect() as writer:
        assert not left.exists()
        assert report.exists()
        writer.execute("begin; insert into t select g, repeat('x', 50) from generate_series(2, 20000) g")
        for _ in range(500):
            stream.next(timeout_s=0.02)
            if open_below(folder):
                break
        assert open_below(folder)
        writer.execute("rollback")
    assert not open_below(folder)
    assert list(folder.iterdir()) == [report]


def open_below(folder: Path) -> list[str]:
    """The files without a name that this process has open in a folder."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{number}")
        except OSError:
            continue
        if target.startswith(f"{folder}/"):
            found.append(target)
    return found
