"""Tables by pattern: those that are there, those that come, and one that gets another name."""

import threading
from concurrent.futures import ThreadPoolExecutor

from log.replay import wait_until
from servers.postgres import Database

from deltaworks.capture.schema_change import SchemaChange
from deltaworks.capture.source import Severity
from deltaworks.log.memory import MemoryLog
from deltaworks.log.recorder import drain, follow


def tables_in(log: MemoryLog) -> dict[str, list[tuple[object, ...]]]:
    """The rows that each table ends with in the log, by its name."""
    found: dict[str, dict[object, tuple[object, ...]]] = {}
    for group in log.reader().read(after_sequence=-1):
        for batch in group.batches:
            rows = found.setdefault(str(batch.schema.name), {})
            for row in batch.rows.to_pylist():
                rows.pop(row["id"], None)
                if row["_op"] != "d":
                    rows[row["id"]] = tuple(row[name] for name in batch.schema.names)
    return {name: sorted(rows.values()) for name, rows in found.items()}


def record(log: MemoryLog, database: Database, *tables: str) -> None:
    with database.source(*tables) as source, log.writer() as writer:
        drain(source, writer, log.reader())


def test_pattern_holds_for_tables_and_partitioned_tables_and_nothing_else(database: Database) -> None:
    database.execute(
        "create schema shop",
        "create table shop.b (id int primary key)",
        'create table shop."A_1" (id int primary key)',
        "create table shop.parted (id int primary key) partition by range (id)",
        "create table shop.parted_1 partition of shop.parted for values from (0) to (10)",
        "create view shop.seen as select 1 as id",
        "create unlogged table shop.fleeting (id int primary key)",
        "create table shop.no_key (v int)",
        "create table order_line (id int primary key)",
        "create table orders (id int primary key)",
    )
    with database.source("order_*", "shop.*", "orders") as source:
        names = [str(schema.name) for schema in source.tables()]
        assert names == ["public.orders", "public.order_line", "shop.A_1", "shop.b", "shop.parted"]
        warned = [finding for finding in source.check() if "left out" in finding.what]
        assert {finding.severity for finding in warned} == {Severity.WARNING}
        assert [finding.what.partition(" is left out")[0] for finding in warned] == ["shop.no_key"]
        assert "replica identity full" in warned[0].mend
        source.prepare()
    published = database.rows("select tablename from pg_publication_tables order by 1")
    assert [name for (name,) in published] == ["A_1", "b", "order_line", "orders", "parted"]


def test_new_table_that_fits_is_published_dumped_and_followed_by_a_running_service(
    database: Database, monkeypatch: object
) -> None:
    monkeypatch.setattr("deltaworks.log.watch.LOOK_EVERY_S", 0.1)  # type: ignore[attr-defined]
    monkeypatch.setattr("deltaworks.log.recorder.FIRST_RETRY_S", 0.05)  # type: ignore[attr-defined]
    database.execute("create table order_a (id int primary key)", "insert into order_a values (1)")
    log, stop = MemoryLog(), threading.Event()
    with database.source("order_*") as source, log.writer() as writer, ThreadPoolExecutor() as pool:
        service = pool.submit(follow, source, writer, log.reader(), stop=stop)
        try:
            wait_until(lambda: tables_in(log) == {"public.order_a": [(1,)]})
            database.execute("create table order_b (id int primary key, v text)", "insert into order_b values (1, 'x')")
            wait_until(lambda: tables_in(log).get("public.order_b") == [(1, "x")])
            database.execute("insert into order_b values (2, 'y')", "insert into order_a values (2)")
            wait_until(
                lambda: tables_in(log) == {"public.order_a": [(1,), (2,)], "public.order_b": [(1, "x"), (2, "y")]}
            )
        finally:
            stop.set()
            service.result(timeout=30)


def test_table_of_another_name_is_followed_and_said_to_be_the_same(database: Database) -> None:
    database.execute("create table order_a (id int primary key, v text)", "insert into order_a values (1, 'before')")
    log = MemoryLog()
    record(log, database, "order_*")
    database.execute(
        "alter table order_a rename to order_old",
        "create table order_a (id int primary key, v text)",
        "insert into order_old values (2, 'after')",
        "insert into order_a values (9, 'fresh')",
    )
    record(log, database, "order_*")
    assert tables_in(log) == {
        "public.order_a": [(9, "fresh")],
        "public.order_old": [(1, "before"), (2, "after")],
    }
    changes = [
        SchemaChange.from_json(stored)
        for group in log.reader().read(after_sequence=-1)
        for stored in group.header.progress.get("schema_changes", ())
    ]
    assert {str(change.table): change.what for change in changes} == {
        "public.order_a": ("dropped and created again",),
        "public.order_old": ("table is new, it was named public.order_a",),
    }


def test_name_without_pattern_means_that_table_only(database: Database) -> None:
    database.execute("create table order_a (id int primary key)", 'create table "order_*" (id int primary key)')
    with database.source('"order_*"') as source:
        assert [schema.name.name for schema in source.tables()] == ["order_*"]


def test_role_for_patterns_may_read_the_whole_schema(database: Database) -> None:
    with database.source("shop.*", "order_line") as source:
        statements = source.least_role()
    assert 'grant usage on schema "shop" to' in statements
    assert 'grant select on all tables in schema "shop" to' in statements
    assert 'grant select on table "public"."order_line" to' in statements
