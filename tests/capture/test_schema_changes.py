"""Schema changes over a real server: the log ends with the source's rows, and says what happened."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from capture.replaying import record, replay, schema_changes, table_of
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import SourceNotReadyError
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import follow

Sources = Callable[..., PostgresSource]


@pytest.fixture
def sources(database: Database) -> Iterator[Sources]:
    """Makes sources over the test's database and closes them."""
    opened: list[PostgresSource] = []

    def source(*tables: str, **config: object) -> PostgresSource:
        opened.append(database.source(*tables, **config))
        return opened[-1]

    yield source
    for each in opened:
        each.close()


QUIET = {
    "a column added, empty": "alter table t add x int",
    "a column dropped": "alter table t drop v",
    "a column widened": "alter table t alter w type varchar(40)",
    "a text without its limit": "alter table t alter w type text",
    "a column that must not be null": "alter table t alter v set not null",
}

DUMPED = {
    "a default that no change carries": "alter table t add x int default 3",
    "a default computed for each row": "alter table t add x float default random()",
    "a column named anew": "alter table t rename v to u",
    "a column that takes an old name": "alter table t drop w, add w text",
    "two columns that swap their names": "alter table t rename v to q; alter table t rename w to v; "
    "alter table t rename q to w",
    "a type that prints differently": "alter table t alter n type numeric(12, 3)",
    "values rewritten under one type": "alter table t alter v type text using upper(v)",
    "a label of an enum named anew": "alter type mood rename value 'happy' to 'glad'",
}

SETUP = (
    "create type mood as enum ('happy', 'sad')",
    "create table t (id int primary key, v text, w varchar(20), n numeric(10, 2), m mood)",
    "insert into t select g, 'v' || g, 'w' || g, g, 'happy' from generate_series(1, 50) g",
)


@pytest.mark.parametrize("statement", QUIET.values(), ids=QUIET.keys())
def test_change_that_the_stream_shows_is_recorded_and_dumps_nothing(
    database: Database, sources: Sources, statement: str
) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute(*statement.split("; "), "update t set n = n + 1 where id <= 50")
    report = record(log, sources("t"))
    assert not report.reads
    (change,) = schema_changes(log)[1:] if schema_changes(log)[0].old is None else schema_changes(log)
    assert change.needs_dump is None
    assert change.old is not None
    assert change.new is not None
    assert replay(log, "t") == table_of(database, "t")


@pytest.mark.parametrize("statement", DUMPED.values(), ids=DUMPED.keys())
def test_change_that_the_stream_does_not_show_dumps_the_table_and_says_why(
    database: Database, sources: Sources, statement: str
) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    source = sources("t", chunk_rows=20)
    record(log, source)
    database.execute(*statement.split("; "))
    report = record(log, source)
    assert report.reads == {"public.t": 50}
    assert [change.needs_dump for change in schema_changes(log) if change.needs_dump]
    assert replay(log, "t") == table_of(database, "t")
    # Once only, and also a new process knows what was seen.
    assert not record(log, sources("t")).reads


@pytest.mark.parametrize("statement", ["vacuum full t", "cluster t using t_pkey", "truncate t", "analyze t"])
def test_rewrite_that_changes_no_value_dumps_nothing(database: Database, sources: Sources, statement: str) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    database.execute(statement)
    assert not record(log, sources("t")).reads
    assert not [change for change in schema_changes(log) if change.needs_dump]
    assert replay(log, "t") == table_of(database, "t")


def test_data_and_ddl_in_one_transaction_are_read_with_the_shape_of_their_time(
    database: Database, sources: Sources
) -> None:
    log = MemoryLog()
    database.execute("create table t (id int primary key, v text)")
    record(log, sources("t"))
    with database.connect() as connection, connection.transaction():
        connection.execute("insert into t values (1, 'a')")
        connection.execute("alter table t add x int default 3")
        connection.execute("insert into t values (2, 'b', 4)")
        connection.execute("alter table t drop v")
        connection.execute("insert into t values (3, 5)")
    record(log, sources("t"))
    rows = replay(log, "t")
    assert {key: row["x"] for key, row in rows.items()} == {(1,): 3, (2,): 4, (3,): 5}


def test_table_made_anew_loses_the_rows_of_the_old_one(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(
        "create table t (id int primary key, v text)", "insert into t select g, 'old' from generate_series(1, 30) g"
    )
    record(log, sources("t"))
    database.execute("drop table t", "create table t (id int primary key, v text)", "insert into t values (7, 'new')")
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t") == {(7,): {"id": 7, "v": "new"}}
    assert any("dropped and created again" in change.what for change in schema_changes(log))


def test_table_made_anew_with_another_key_loses_the_rows_of_the_old_one(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute("create table t (id int primary key, v text)", "insert into t values (1, 'old')")
    record(log, sources("t"))
    database.execute("drop table t", "create table t (k text primary key, n int)", "insert into t values ('new', 2)")
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t", key=("k",)) == {("new",): {"k": "new", "n": 2}}


def test_table_that_is_gone_stops_capture_with_its_name(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute("create table t (id int primary key)", "create table u (id int primary key)")
    record(log, sources("t", "u"))
    database.execute("drop table u")
    with pytest.raises(SourceNotReadyError, match=r"public\.u does not exist"):
        record(log, sources("t", "u"))


PARTITIONED = (
    "create table m (id int, r text, v text, primary key (id, r)) partition by list (r)",
    "create table m_eu partition of m for values in ('eu')",
    "create table m_us partition of m for values in ('us')",
    "insert into m select g, case when g % 2 = 0 then 'eu' else 'us' end, 'v' from generate_series(1, 40) g",
)
MKEY = ("id", "r")


def test_partition_made_in_place_is_captured_under_its_root_without_a_dump(
    database: Database, sources: Sources
) -> None:
    log = MemoryLog()
    database.execute(*PARTITIONED)
    record(log, sources("m"))
    database.execute("create table m_as partition of m for values in ('as')", "insert into m values (7, 'as', 'n')")
    assert not record(log, sources("m")).reads
    assert replay(log, "m") == table_of(database, "m", key=MKEY)


@pytest.mark.parametrize("together", [False, True], ids=["apart", "in one transaction"])
def test_partition_attached_with_rows_is_dumped(database: Database, sources: Sources, together: bool) -> None:
    log = MemoryLog()
    database.execute(*PARTITIONED)
    record(log, sources("m"))
    statements = (
        "create table m_as (id int not null, r text not null, v text)",
        "insert into m_as values (1, 'as', 'attached')",
        "alter table m attach partition m_as for values in ('as')",
    )
    with database.connect() as connection:
        connection.execute("begin" if together else "select 1")
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]
        connection.execute("commit" if together else "select 1")
    assert record(log, sources("m")).reads == {"public.m": 41}
    assert replay(log, "m") == table_of(database, "m", key=MKEY)


@pytest.mark.parametrize("statement", ["alter table m detach partition m_us", "drop table m_us"])
def test_rows_of_a_partition_that_left_are_deleted(database: Database, sources: Sources, statement: str) -> None:
    log = MemoryLog()
    database.execute(*PARTITIONED)
    record(log, sources("m"))
    database.execute(statement)
    record(log, sources("m"))
    assert replay(log, "m") == table_of(database, "m", key=MKEY)
    assert len(replay(log, "m")) == 20


def test_replica_identity_may_change_midway(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(
        "create table t (id int primary key, code text not null unique, v text)",
        "insert into t select g, 'c' || g, 'v' from generate_series(1, 20) g",
    )
    record(log, sources("t"))
    database.execute(
        "update t set v = 'a' where id = 1",
        "alter table t replica identity full",
        "update t set v = 'b' where id = 2",
        "delete from t where id = 3",
        "alter table t replica identity default",
        "update t set id = 104 where id = 4",
    )
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t")


def test_table_taken_out_of_the_publication_and_put_back_is_dumped_without_the_deleted(
    database: Database, sources: Sources
) -> None:
    log = MemoryLog()
    database.execute(*SETUP, "create table u (id int primary key)")
    source = sources("t", "u")
    record(log, source)
    publication = f"deltaworks_{database.name}"
    database.execute(
        f"alter publication {publication} drop table t",
        "delete from t where id <= 10",
        "insert into t (id) values (100)",
        f"alter publication {publication} add table t",
    )
    assert record(log, source).reads == {"public.t": 41}
    assert replay(log, "t") == table_of(database, "t")
    assert any("published anew" in change.what for change in schema_changes(log))


def test_kinds_of_change_that_the_publication_left_out_for_a_while_are_made_up_for(
    database: Database, sources: Sources
) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t"))
    publication = f"deltaworks_{database.name}"
    database.execute(
        f"alter publication {publication} set (publish = 'insert, update')",
        "delete from t where id <= 10",
        f"alter publication {publication} set (publish = 'insert, update, delete, truncate')",
    )
    record(log, sources("t"))
    assert replay(log, "t") == table_of(database, "t")
    assert len(replay(log, "t")) == 40


def test_table_is_dumped_again_while_its_rows_change(database: Database, sources: Sources) -> None:
    log = MemoryLog()
    database.execute(*SETUP)
    record(log, sources("t", chunk_rows=5))
    database.execute(
        "alter table t add x int default 3", "delete from t where id = 3", "update t set id = 90 where id = 4"
    )
    record(log, sources("t", chunk_rows=5))
    assert replay(log, "t") == table_of(database, "t")


def test_service_that_runs_follows_tables_that_go_and_come(
    database: Database, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.log.watch.LOOK_EVERY_S", 0.1)
    log, stop = MemoryLog(), threading.Event()
    database.execute(*SETUP, "create table u (id int primary key, v text)", "insert into u values (1, 'old')")
    reader = log.reader()

    def wait_until(is_so: Callable[[], bool]) -> None:
        for _ in range(150):
            if is_so():
                return
            reader.wait(after_sequence=reader.end().sequence, timeout_s=0.2)
        raise AssertionError("it did not happen in time")

    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, sources("t", "u"), writer, reader, stop=stop)
        try:
            wait_until(lambda: len(replay(log, "u")) == 1 and len(replay(log, "t")) == 50)
            database.execute("alter table t add x int default 3")
            wait_until(lambda: replay(log, "t") == table_of(database, "t"))
            database.execute("drop table u")
            wait_until(lambda: any("table was dropped or renamed" in change.what for change in schema_changes(log)))
            database.execute("insert into t (id) values (100)")
            wait_until(lambda: replay(log, "t") == table_of(database, "t"))
            database.execute("create table u (id int primary key, v text)", "insert into u values (2, 'new')")
            wait_until(lambda: replay(log, "u") == table_of(database, "u"))
            database.execute("insert into u values (3, 'newer')")
            wait_until(lambda: replay(log, "u") == table_of(database, "u"))
        finally:
            stop.set()
        service.result(timeout=30)
    gone = [change for change in schema_changes(log) if "table was dropped or renamed" in change.what]
    assert len(gone) == 1, "said once, not at every look"


def test_table_that_had_another_name_for_a_while_is_dumped_without_what_was_deleted(
    database: Database, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.log.watch.LOOK_EVERY_S", 0.1)
    log, stop = MemoryLog(), threading.Event()
    database.execute(*SETUP)
    reader = log.reader()
    with ThreadPoolExecutor() as pool, log.writer() as writer:
        service = pool.submit(follow, sources("t"), writer, reader, stop=stop)
        try:
            for is_so in (
                lambda: len(replay(log, "t")) == 50,
                lambda: any("table was dropped or renamed" in change.what for change in schema_changes(log)),
                lambda: replay(log, "t") == table_of(database, "t"),
            ):
                for _ in range(150):
                    if is_so():
                        break
                    reader.wait(after_sequence=reader.end().sequence, timeout_s=0.2)
                assert is_so()
                if len(schema_changes(log)) == 0:
                    database.execute("alter table t rename to t_away", "delete from t_away where id < 10")
                elif not database.rows("select to_regclass('t')")[0][0]:
                    database.execute("alter table t_away rename to t")
        finally:
            stop.set()
        service.result(timeout=30)
    assert len(replay(log, "t")) == 41
