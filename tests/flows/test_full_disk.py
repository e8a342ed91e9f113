"""A disk that is really full: the source waits, everybody is told, and once there is room nothing is missing."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import yaml
from flows.chain import wait
from servers.postgres import Database
from servers.small_disk import SmallDisk, on_small_disk

from deltaworks import config as configuration
from deltaworks import operate
from deltaworks.config import Config
from deltaworks.log.local import LocalLogReader
from deltaworks.testing.postgres import free_port

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MB = 1 << 20
ROOT = Path(__file__).resolve().parents[2]
# A kilobyte each that no compression makes smaller.
ROWS = "insert into account select n, string_agg(md5(random()::text), '') from generate_series({}, {}) n, \
generate_series(1, 32) group by n"


class Flow:
    """A database, and a home on a disk of a few megabytes, where one service runs."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.folder = folder
        self.home = folder / "disk"
        self.port = free_port()

    def write_config(self, *, home: Path, log: dict[str, Any]) -> Path:
        source = {"kind": "postgres", "dsn": self.database.dsn, "tables": ["account", "booking"], "log": log}
        settings = {
            "home": str(home),
            "sources": {"bank": source | {"metrics_port": self.port, "canary_s": 1}},
            "apps": {
                "balances": {
                    "module": "flows.shared_app:balances",
                    "source": "bank",
                    "metrics_port": self.port,
                    "settings": {"told": str(self.folder / "told.txt")},
                }
            },
            "connections": {"warehouse": {"kind": "postgres", "dsn": self.database.dsn}},
        }
        path = self.folder / "deltaworks.yaml"
        path.write_text(yaml.safe_dump(settings))
        return path

    @property
    def output(self) -> Path:
        return self.folder / "service.log"

    def run(self, *command: str, size_bytes: int) -> Any:
        return on_small_disk(
            str(Path(sys.executable).with_name("deltaworks")),
            *command,
            folder=self.home,
            size_bytes=size_bytes,
            output=self.output,
            environment=self.environment,
        )

    @property
    def environment(self) -> dict[str, str]:
        return {
            "DELTAWORKS_CONFIG": str(self.folder / "deltaworks.yaml"),
            "PYTHONPATH": str(ROOT / "tests"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def metric(self, name: str) -> float | None:
        try:
            text = httpx.get(f"http://127.0.0.1:{self.port}/metrics", timeout=10).text
        except httpx.HTTPError:
            return None
        found = [float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{")]
        return found[0] if found else None

    def wait(self, disk: SmallDisk, condition: Callable[[], bool], what: str) -> None:
        def holds() -> bool:
            assert disk.process.poll() is None, f"the service ended before {what}"
            return condition()

        try:
            wait(holds, what=what, timeout_s=90)
        except AssertionError as error:
            files = {file.name: file.stat().st_size for file in disk.seen.rglob("*") if file.is_file()}
            said = self.output.read_text()[-2_000:]
            raise AssertionError(f"{error}; on the disk: {files}; the service said:\n{said}") from error


@pytest.fixture
def flow(database: Database, tmp_path: Path) -> Flow:
    database.execute(
        "create table account (account_id int primary key, name text not null)",
        "create table booking (id int primary key, account_id int not null, amount int not null)",
        "create schema mart",
        ROWS.format(1, 100),
    )
    return Flow(database, tmp_path)


def fill_up(disk: SmallDisk, *, leave_bytes: int) -> Path:
    """Somebody else's file takes the rest of the disk."""
    ballast = disk.seen / "ballast"
    with ballast.open("wb") as file:
        while (left := disk.free_bytes() - leave_bytes) > 0:
            file.write(os.urandom(min(left, MB)))
            file.flush()
    return ballast


def read_ids(folder: Path) -> set[int]:
    groups = LocalLogReader(folder).read(after_sequence=-1)
    return {key for group in groups for batch in group.batches for key in batch.rows.column("account_id").to_pylist()}


def test_a_full_log_makes_the_source_wait_and_loses_nothing(flow: Flow) -> None:
    flow.write_config(home=flow.home, log={"kind": "local"})
    with flow.run("capture", "bank", size_bytes=16 * MB) as disk:
        log = disk.seen / "log" / "bank"
        flow.wait(disk, lambda: (log / "end").exists() and len(read_ids(log)) == 100, "the dump")
        ballast = fill_up(disk, leave_bytes=MB)
        flow.database.execute(*(ROWS.format(100 * n + 1, 100 * n + 100) for n in range(1, 40)))
        flow.wait(disk, lambda: flow.metric("deltaworks_capture_log_full") == 1, "the alarm")
        assert (flow.metric("deltaworks_capture_slot_unconfirmed_bytes") or 0) > MB
        # What the log has is whole, and the service lives.
        assert len(read_ids(log)) < 4_000
        assert disk.process.poll() is None
        config = seen_by_the_test(flow, disk)
        assert operate.capture_status(config, "bank").is_full

        ballast.unlink()
        flow.wait(disk, lambda: len(read_ids(log)) == 4_000, "the rows that waited")
        flow.wait(disk, lambda: flow.metric("deltaworks_capture_log_full") == 0, "the end of the alarm")
        assert not operate.capture_status(config, "bank").is_full
        assert operate.audit(config, "bank").is_balanced
        assert "the source waits" in flow.output.read_text()


def said_on_small_disk(flow: Flow, script: str, *, size_bytes: int) -> str:
    """Run a script to its good end with `home` on a small disk; what it said."""
    with on_small_disk(
        "-c",
        script,
        str(flow.home),
        folder=flow.home,
        size_bytes=size_bytes,
        output=flow.output,
        environment={"PYTHONPATH": str(ROOT / "tests"), "PYTHONDONTWRITEBYTECODE": "1"},
    ) as disk:
        ended = disk.process.wait(timeout=90)
    said = flow.output.read_text()
    assert ended == 0, said
    return said


SEALING = """
import random, sys, threading
from pathlib import Path
from log.appending import append
from deltaworks.log.change_log import LogFullError
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.sealing import seal_closed

disk, number = Path(sys.argv[1]), 0
ids = [[random.getrandbits(62) for _ in range(2_000)] for _ in range(200)]
(disk / "ballast").write_bytes(bytes(8 << 20))
writer = LocalLogWriter.open(disk / "log", segment_bytes=1 << 20)
try:
    for number, group in enumerate(ids):
        append(writer, group)
except LogFullError:
    print("full after", number)

def read():
    groups = LocalLogReader(disk / "log").read(after_sequence=-1)
    return [group.batches[0].rows.column("id").to_pylist() for group in groups]

try:
    seal_closed(disk / "log", level=1)
except OSError as error:
    print("not sealed:", error.strerror)
assert read() == ids[:number], "the log is not as it was"
assert not list((disk / "log").glob("*.sealing")), "a draft takes room"
(disk / "ballast").unlink()
print("sealed", len(seal_closed(disk / "log", level=1)))
append(writer, ids[number])
writer.close()
assert read() == ids[: number + 1]
print("whole")
"""


def test_a_segment_that_has_no_room_to_be_sealed_stays_as_it_is(flow: Flow) -> None:
    said = said_on_small_disk(flow, SEALING, size_bytes=16 * MB)
    assert "full after" in said, said
    assert "not sealed: No space left on device" in said, said
    assert "whole" in said.splitlines(), said


def test_a_full_state_makes_an_app_wait_and_loses_nothing(flow: Flow) -> None:
    path = flow.write_config(home=flow.folder / "home", log={"kind": "local"})
    config = configuration.load(path, environment={})
    operate.capture(config, "bank")
    # Only the app's state is on the small disk.
    flow.home = config.app_folder("balances")
    with flow.run("process", "balances", size_bytes=64 * MB) as disk:

        def shown() -> int:
            try:
                return int(flow.database.rows("select count(*) from mart.balance")[0][0])
            except psycopg.errors.UndefinedTable:
                return 0

        flow.wait(disk, lambda: shown() == 100, "the first documents")
        ballast = fill_up(disk, leave_bytes=MB // 2)
        flow.database.execute(*(ROWS.format(100 * n + 1, 100 * n + 100) for n in range(1, 30)))
        operate.capture(config, "bank")
        flow.wait(disk, lambda: flow.metric("deltaworks_process_waits") == 1, "the alarm")
        assert shown() < 3_000
        assert disk.process.poll() is None

        ballast.unlink()
        flow.wait(disk, lambda: shown() == 3_000, "the documents that waited")
        flow.wait(disk, lambda: flow.metric("deltaworks_process_waits") == 0, "the end of the alarm")
        assert "no space left on its disk" in flow.output.read_text()
    assert flow.database.rows("select count(*) from mart.balance join account using (account_id, name)") == [(3_000,)]


OPENING = """
import sys
from contextlib import closing
from pathlib import Path
from flows.shared_app import balances
from deltaworks.process.place import take_lock
from deltaworks.process.room import StateFullError
from deltaworks.process.checkpoint import Checkpoint
from deltaworks.process.state import State
from deltaworks.position import Lsn

disk = Path(sys.argv[1])
folder, ballast = disk / "app", disk / "ballast"
told = set()

def fill():
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass

def tried(open_it):
    try:
        return open_it()
    except StateFullError as error:
        told.add(str(error))
        return None

def is_open(kept):
    state = tried(lambda: State.open(folder / "state.sqlite", balances))
    if state is None:
        return False
    with closing(state):
        assert state.checkpoint() == kept, state.checkpoint()
    return True

def open_with_ever_more_room(kept):
    fill()
    tries = [is_open(kept)]
    while not tries[-1]:
        size = ballast.stat().st_size
        with ballast.open("r+b") as file:
            file.truncate(size - 4096)
        tries.append(is_open(kept))
    return len(tries)

folder.mkdir()
fill()
assert tried(lambda: take_lock(folder, "balances")) is None
print("told of the lock", *told)
told.clear()
assert open_with_ever_more_room(Checkpoint()) > 3
print("told of the state", sorted(told)[0])
ballast.unlink()
there = Checkpoint(sequence=7, offset=70, position=Lsn(700), reached=Lsn(600))
with closing(State.open(folder / "state.sqlite", balances)) as state, state.folding():
    state.save_checkpoint(there)
# What was made before is opened as it was, or not at all.
open_with_ever_more_room(there)
ballast.unlink()
assert is_open(there)
take_lock(folder, "balances")
print("whole")
"""


def test_a_state_without_room_is_named_when_it_is_opened_and_is_whole_once_there_is(flow: Flow) -> None:
    said = said_on_small_disk(flow, OPENING, size_bytes=4 * MB)
    assert f"cannot open the lock of app 'balances', '{flow.home}/app/lock': no space left on its disk" in said, said
    assert f"told of the state cannot open the state of app 'balances', '{flow.home}/app/state.sqlite'" in said, said
    assert "free space below home" in said
    assert "whole" in said.splitlines(), said


FULL_AT_FIRST = """
import os, sys
with open(sys.argv[1] + "/ballast", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_service_whose_disk_is_full_from_the_start_waits_for_room(flow: Flow) -> None:
    path = flow.write_config(home=flow.folder / "home", log={"kind": "local"})
    config = configuration.load(path, environment={})
    operate.capture(config, "bank")
    flow.home = config.app_folder("balances")
    command = Path(sys.executable).with_name("deltaworks")
    with on_small_disk(
        "-c",
        FULL_AT_FIRST,
        str(flow.home),
        *(sys.executable, str(command), "process", "balances"),
        folder=flow.home,
        size_bytes=64 * MB,
        output=flow.output,
        environment=flow.environment,
    ) as disk:
        flow.wait(disk, lambda: "no space left on its disk" in flow.output.read_text(), "word of the full disk")
        (disk.seen / "ballast").unlink()

        def is_there() -> bool:
            try:
                return flow.database.rows("select count(*) from mart.balance") == [(100,)]
            except psycopg.errors.UndefinedTable:
                return False

        flow.wait(disk, is_there, "the documents")


def seen_by_the_test(flow: Flow, disk: SmallDisk) -> Config:
    """The configuration of the service with its home where the test finds it."""
    loaded = configuration.load(flow.folder / "deltaworks.yaml", environment={})
    return loaded.model_copy(update={"home": disk.seen})
