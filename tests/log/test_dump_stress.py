"""Thousands of chunks among writers that move, replace, truncate and stall: no stale row, no lost row.

The seed is printed; `--dump-seconds` makes the runs longer.
"""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from log.replay import replay, table_of, wait_until
from log.writers import MADE, releasing, writing
from servers.postgres import Database

from deltaworks import faults
from deltaworks.capture.source import SourceUnreachableError
from deltaworks.errors import DeltaworksError
from deltaworks.log.dump_requests import DumpRequest, DumpRequests
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain, follow
from deltaworks.testing.postgres import PostgresServer

ROWS = 300
FAULTS = (
    "capture.before_append",
    "capture.after_append",
    "capture.after_confirm",
    "dump.after_select",
    "dump.after_mark",
)


@pytest.fixture
def seconds(pytestconfig: pytest.Config) -> float:
    """How long writers write."""
    return float(pytestconfig.getoption("--dump-seconds"))


@pytest.fixture(autouse=True)
def _rests_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deltaworks.log.dumping.BLOCKED_S", 0.1)


def filled(database: Database, count: int = ROWS) -> None:
    database.execute(*MADE, f"insert into t select g, 0, repeat(g::text, 1200) from generate_series(1, {count}) g")


def chunks_in(log: MemoryLog) -> int:
    return sum(
        batch.rows.column("_op")[0].as_py() == "r"
        for group in log.reader().read(after_sequence=-1)
        for batch in group.batches
    )


def keep_asking(requests: DumpRequests, stop: threading.Event, chance: random.Random) -> None:
    """Two dumps at any time: whole ones, and keys, of which some are gone."""
    while not stop.wait(0.02):
        if len(requests.open()) < 2:
            keys = [(str(chance.randint(1, ROWS + 60)),) for _ in range(40)] if chance.random() < 0.4 else []
            requests.ask(DumpRequest.new(["t"], keys=keys))


def record_until(
    database: Database,
    log: MemoryLog,
    requests: DumpRequests,
    *,
    seconds: float,
    seed: int,
    dies: bool,
    **config: object,
) -> None:
    """A service that dumps all the time; it `dies` at random steps and starts again."""
    chance, stop, over = random.Random(seed), threading.Event(), threading.Event()
    threading.Timer(seconds, over.set).start()
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(keep_asking, requests, stop, random.Random(seed + 1))
        try:
            while not over.is_set():
                passes = chance.randint(5, 60) if dies else 1 << 30
                left = iter(range(passes, -1, -1))
                faults.arm(chance.choice(FAULTS), lambda left=left: _die() if next(left, 0) == 0 else None)
                with database.source("t", name="stress", chunk_rows=20, **config) as source, log.writer() as writer:
                    try:
                        follow(source, writer, log.reader(), stop=over, requests=requests)
                    except DeadError:
                        continue
        finally:
            faults.disarm()
            stop.set()
            asking.result(timeout=10)


class DeadError(DeltaworksError):
    """Stands for the death of the process."""


def _die() -> None:
    raise DeadError


def finish(database: Database, log: MemoryLog, requests: DumpRequests, **config: object) -> None:
    with database.source("t", name="stress", chunk_rows=50, **config) as source, log.writer() as writer:
        drain(source, writer, log.reader(), requests=requests)


@pytest.mark.parametrize("chosen", [3, None], ids=["a known seed", "a new seed"])
def test_dumps_among_stalled_commits_and_deaths_end_with_the_table(
    server_folder: Path, tmp_path: Path, chosen: int | None, seconds: float
) -> None:
    seed = chosen or random.SystemRandom().randint(100, 1 << 30)
    print("seed", seed)  # noqa: T201  to run a failure again
    settings = {"fsync": "off", "synchronous_standby_names": "nobody", "max_connections": "40"}
    with PostgresServer.start(server_folder / f"stalled-{seed}", settings=settings) as server:
        database, log, requests = Database(server, "postgres"), MemoryLog(), DumpRequests(tmp_path / "dumps")
        local = Database(server, "postgres?options=-c%20synchronous_commit%3Dlocal")
        filled(local)
        with (
            releasing(database, every_s=0.15),
            writing(local, seed=seed, count=ROWS, writers=4, stalled=2, truncates=True) as writers,
        ):
            record_until(local, log, requests, seconds=seconds, seed=seed, dies=True)
        done = sum(each.result(timeout=30) for each in writers)
        finish(local, log, requests)
        assert done > 100
        assert chunks_in(log) > 5
        assert replay(log, "t") == table_of(local, "t")


def test_dumps_from_a_standby_among_writers_end_with_the_table(
    server_folder: Path, tmp_path: Path, seconds: float, pytestconfig: pytest.Config
) -> None:
    seed = random.SystemRandom().randint(100, 1 << 30)
    print("seed", seed)  # noqa: T201  to run a failure again
    binaries = pytestconfig.getoption("--postgres-binaries")
    primary = server_folder / f"primary-{seed}"
    with (
        PostgresServer.start(primary, settings={"fsync": "off"}, binaries=binaries) as server,
        server.start_standby(server_folder / f"standby-{seed}", binaries=binaries) as standby,
    ):
        database, log, requests = Database(server, "postgres"), MemoryLog(), DumpRequests(tmp_path / "dumps")
        filled(database)
        config = {"dump_dsn": standby.dsn()}
        with writing(database, seed=seed, count=ROWS, truncates=True):
            record_until(database, log, requests, seconds=seconds, seed=seed, dies=True, **config)
        finish(database, log, requests, **config)
        assert chunks_in(log) > 5
        assert replay(log, "t") == table_of(database, "t")
        reads = Database(standby, "postgres").rows("select sum(idx_scan) from pg_stat_user_tables where relname = 't'")
        assert reads[0][0] > 5, "the standby was read"


def test_standby_that_is_behind_makes_dumps_rest_and_changes_go_on(
    server_folder: Path, tmp_path: Path, pytestconfig: pytest.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.capture.postgres.standby.PATIENCE_S", 0.2)
    binaries = pytestconfig.getoption("--postgres-binaries")
    with (
        PostgresServer.start(server_folder / "ahead", settings={"fsync": "off"}, binaries=binaries) as server,
        server.start_standby(server_folder / "behind", binaries=binaries) as standby,
    ):
        database, log, requests = Database(server, "postgres"), MemoryLog(), DumpRequests(tmp_path / "dumps")
        filled(database, 10)
        stop = threading.Event()
        with (
            database.source("t", dump_dsn=standby.dsn()) as source,
            log.writer() as writer,
            ThreadPoolExecutor() as pool,
        ):
            service = pool.submit(follow, source, writer, log.reader(), stop=stop, requests=requests)
            try:
                wait_until(lambda: len(replay(log, "t")) == 10)
                Database(standby, "postgres").execute("select pg_wal_replay_pause()")
                database.execute("update t set v = 7 where id = 1")
                request = DumpRequest.new(["t"])
                requests.ask(request)
                database.execute("insert into t values (11, 0, 'later')")
                wait_until(lambda: 11 in replay(log, "t"))
                assert requests.outcome(request.id) is None
                Database(standby, "postgres").execute("select pg_wal_replay_resume()")
                wait_until(lambda: requests.outcome(request.id) is not None)
                # A standby that went away, and came back as a primary of its own, is not read any more.
                standby.promote()
                last = DumpRequest.new(["t"])
                requests.ask(last)
                database.execute("insert into t values (12, 0, 'last')")
                wait_until(lambda: 12 in replay(log, "t"))
                assert requests.outcome(last.id) is None
            finally:
                stop.set()
                service.result(timeout=30)
        assert replay(log, "t") == table_of(database, "t")


def test_dump_dsn_that_is_no_standby_of_the_source_is_not_read(database: Database, tmp_path: Path) -> None:
    database.execute("create table t (id int primary key)")
    with (
        database.source("t", dump_dsn=database.dsn) as source,
        pytest.raises(Exception, match="is no standby") as refused,
    ):
        source.chunk(source.tables()[0].name, after_key=None, up_to_key=("1",), limit=1)
    assert not isinstance(refused.value, SourceUnreachableError)
