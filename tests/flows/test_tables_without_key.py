"""A table without a key: a bag in which equal rows differ in nothing, exact in the log and in the lake."""

import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers.postgres import Database

from deltaworks.capture.postgres import reading
from deltaworks.capture.source import Severity
from deltaworks.errors import TerminalError
from deltaworks.log.dump_requests import DumpRequest, DumpRequests, Ending
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain, follow
from deltaworks.store.lake import Lake
from deltaworks.store.load import load
from deltaworks.store.verify import verify

MADE = (
    "create table bag (a int, n numeric(6,2), d date, f float8, v text)",
    "alter table bag replica identity full",
    "insert into bag select g % 5, 0.5, null, 1.5, 'v' || g % 3 from generate_series(1, 200) g",
)
ODD = ("'NaN', 'infinity', '-0', null", "1, '0044-03-15 BC', 'NaN', 'x'", "null, null, null, repeat('y', 9000)")
STATEMENTS = (
    "insert into bag select {a}, 0.5, null, 1.5, 'v' || g % 3 from generate_series(1, 3) g",
    "insert into bag values ({a}, {odd}), ({a}, {odd})",
    "update bag set v = 'u' || a where ctid = (select min(ctid) from bag where a = {a})",
    "update bag set a = a + 1 where ctid in (select ctid from bag where a = {a} limit 2)",
    "delete from bag where ctid = (select min(ctid) from bag where a = {a})",
    "begin; insert into bag values ({a}, {odd}); delete from bag where a = {a} and v = 'v1'; commit",
    "begin; delete from bag where a = {a}; rollback",
)


def write(database: Database, stop: threading.Event, chance: random.Random) -> int:
    done = 0
    with database.connect() as connection:
        while not stop.is_set():
            statement = chance.choice(STATEMENTS) if chance.random() > 0.01 else "truncate bag"
            for part in statement.format(a=chance.randint(0, 6), odd=chance.choice(ODD)).split("; "):
                connection.execute(part)  # type: ignore[arg-type]  # ours
            done += 1
    return done


@pytest.fixture
def requests(tmp_path: Path) -> DumpRequests:
    return DumpRequests(tmp_path / "dumps")


def test_lake_has_every_row_as_often_as_the_source_while_it_is_dumped_again_and_again(
    database: Database, lake: Lake, requests: DumpRequests
) -> None:
    seed = random.SystemRandom().randint(0, 1 << 30)
    print("seed", seed)  # noqa: T201  to run a failure again
    database.execute(*MADE)
    log, over, stop = MemoryLog(), threading.Event(), threading.Event()
    with (
        database.source("bag") as source,
        database.source("bag") as other,
        log.writer() as writer,
        ThreadPoolExecutor() as pool,
    ):
        service = pool.submit(follow, source, writer, log.reader(), stop=stop, requests=requests)
        writers = [pool.submit(write, database, over, random.Random(seed + number)) for number in range(2)]
        try:
            for _ in range(4):
                request = DumpRequest.new(["bag"])
                requests.ask(request)
                wait_for(lambda request=request: requests.outcome(request.id) is not None)
                load(lake, log.reader(), log="shop")
            found = verify(other, lake, log.reader(), log="shop")
            assert found.is_equal, found
        finally:
            over.set()
            assert all(each.result(timeout=30) > 10 for each in writers)
            stop.set()
            service.result(timeout=30)
        # The service may have ended before it read the last of what was written.
        drain(source, writer, log.reader())
    load(lake, log.reader(), log="shop")
    rows = lake.connection.execute("select count(*), count(distinct hash(a, n, d, f, v)) from lake.shop.bag").fetchone()
    assert rows == database.rows("select count(*), count(distinct (a, n, d, f, v)) from bag")[0]


def wait_for(condition: Callable[[], bool]) -> None:
    tick = threading.Event()
    for _ in range(1500):
        if condition():
            return
        tick.wait(0.02)
    raise TimeoutError("it did not happen")


def test_row_that_the_lake_lost_is_found(database: Database, lake: Lake) -> None:
    database.execute(*MADE)
    log = MemoryLog()

    def catch_up() -> None:
        with log.writer() as writer:
            drain(source, writer, log.reader())

    with database.source("bag") as source:
        catch_up()
        load(lake, log.reader(), log="shop")
        lake.connection.execute("delete from lake.shop.bag where a = 1 and v = 'v1'")
        (found,) = verify(source, lake, log.reader(), log="shop", catch_up=catch_up).tables
    assert (found.source_rows, found.is_equal) == (200, False)
    assert found.differing == found.source_rows - found.lake_rows > 0


def test_table_whose_updates_the_server_would_refuse_is_not_published(database: Database) -> None:
    database.execute("create table bag (a int)", "insert into bag values (1), (1)")
    with database.source("bag") as source:
        (found,) = [each for each in source.check() if each.severity is Severity.ERROR]
        assert "the server refuses updates and deletes" in found.what
        database.execute(found.mend.partition(";")[0])
        source.prepare()
        database.execute("update bag set a = 2", "delete from bag")


def test_parts_of_it_are_refused_and_so_is_one_that_is_too_large(
    database: Database, requests: DumpRequests, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute(*MADE)
    log = MemoryLog()
    asked = [DumpRequest.new(["bag"], keys=[("1",)]), DumpRequest.new(["bag"], where="a = 1")]
    for request in asked:
        requests.ask(request)
    with database.source("bag") as source, log.writer() as writer:
        drain(source, writer, log.reader(), requests=requests)
    outcomes = [requests.outcome(request.id) for request in asked]
    assert [outcome and outcome.ending for outcome in outcomes] == [Ending.FAILED, Ending.FAILED]
    assert all("dump it whole" in (outcome.error or "") for outcome in outcomes if outcome)
    monkeypatch.setattr(reading, "BAG_BYTES", 1000)
    with database.source("bag") as source, pytest.raises(TerminalError, match="no key and more than"):
        source.chunk(source.tables()[0].name, after_key=None, up_to_key=(), limit=10)
