"""The PostgreSQL source against a real server, which is also the oracle."""

from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from servers.postgres import Database

from deltaworks.capture.postgres.replication import PostgresStream
from deltaworks.capture.postgres.slot import SlotHeldError
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import Slice, SlotInvalidatedError, SourceNotReadyError, SourceUnreachableError
from deltaworks.config import PostgresConfig
from deltaworks.position import START, Lsn
from deltaworks.schema import TableName
from deltaworks.testing.postgres import free_port

META = ("_op", "_commit", "_ordinal", "_txid", "_committed_at", "_unchanged", "_old_key", "_as_text")


@pytest.fixture
def sources() -> Iterator[list[PostgresSource]]:
    """Sources to close after the test."""
    opened: list[PostgresSource] = []
    yield opened
    for source in opened:
        source.close()


def ready(database: Database, sources: list[PostgresSource], *tables: str, **config: Any) -> PostgresSource:
    source = database.source(*tables, **config)
    sources.append(source)
    source.prepare()
    return source


def up_to_mark(source: PostgresSource, stream: PostgresStream, *, max_changes: int = 16_384) -> list[Slice]:
    """Every slice up to a mark that is written now."""
    source.mark("here")
    slices: list[Slice] = []
    while not slices or slices[-1].mark != "here":
        taken = stream.next(timeout_s=10, max_changes=max_changes)
        assert taken is not None, "the mark never came"
        slices.append(taken)
    return slices


def up_to_end(stream: PostgresStream) -> None:
    """Read until the stream breaks."""
    for _ in range(100):
        stream.next(timeout_s=1)


def changes(slices: list[Slice]) -> list[dict[str, Any]]:
    """All changes in commit order, each with its table, its time left out."""
    rows = [
        {"table": batch.schema.name.name, **row}
        for taken in slices
        for batch in taken.batches
        for row in batch.rows.to_pylist()
    ]
    return sorted(rows, key=lambda row: (row["_commit"], row["_ordinal"]))


def ops(slices: list[Slice]) -> list[tuple[str, Any]]:
    return [(row["_op"], row["id"]) for row in changes(slices)]


EVERY_TYPE = """
    create type mood as enum ('happy', 'so so');
    create domain price as numeric(8, 2);
    create table every (
        id bigint primary key, a boolean, b smallint, c integer, d oid, e real, f double precision,
        g numeric(10, 2), h numeric, i numeric(60, 5), j text, k varchar(20), l char(5), m name, n date, o timestamp,
        p timestamptz, q uuid, r json, s jsonb, t mood, u bytea, v text[], w integer[], x numeric(6, 2)[], y mood[],
        z timestamptz[], aa interval, ab inet, ac time, ad price, ae int4range, af price[], ag bytea[], ah box[],
        ai money, aj float4[], al bit(3), am point, an timestamptz(3), ao boolean[], ap date[], aq uuid[]
    )
"""

EVERY_VALUE = """
    insert into every values
    (1, true, -32768, 2147483647, 4294967295, 1.1, 0.1, 12345678.90, 1e100, 1.00001, E'é\\n"\\\\', 'v', 'ab', 'n',
     '0044-03-15', '2020-02-29 23:59:59.999999', '2020-06-01 12:00:00.5+05:30', gen_random_uuid(), '{"a" : 1}',
     '{"b": [1, 2.50]}', 'so so', '\\x00ff5c', array['a,b', 'c"d', null, 'NULL', '', 'e\\f', '{g}', ' h '],
     '{1,NULL,-3}', '{1.50,2.00}', array['happy', 'so so']::mood[], array['2020-01-01 00:00+02']::timestamptz[],
     '1 year 2 mons -3 days 04:05:06.7', '::1', '12:34:56.789', 9.9, '[1,5)', array[1.1, null]::price[],
     array['\\x00', '\\x5c22']::bytea[], array[box '(1,2),(3,4)', box '(0,0),(1,1)'], 1234.5, '{1.1,NaN,-Infinity}',
     '101', '(1.5,2)', '2020-01-01 00:00:00.1234+00', '{t,f,NULL}', '{2020-01-01,0001-01-01}',
     array[gen_random_uuid()]),
    (2, false, 0, 0, 0, 'NaN', '-Infinity', -0.01, 0, 0, '', '', '', '', '9999-12-31', '0001-01-01 00:00:00',
     '9999-12-31 23:59:59.999999+00', gen_random_uuid(), 'null', 'null', 'happy', '', '{}', '{}', '{}', '{}', '{}', '0',
     '10.0.0.0/8', '24:00:00', 0, 'empty', '{}', '{}', '{}', -1, '{}', '000', '(0,0)', 'epoch', '{}', '{}', '{}'),
    (3, null, null, null, null, '-0', 5e-324, null, null, null, null, null, null, null, null, null, null, null, null,
     null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null,
     null, null, null, null, null)
"""


def test_value_of_a_dump_is_the_value_of_the_log_for_every_type(
    database: Database, sources: list[PostgresSource]
) -> None:
    database.execute(EVERY_TYPE)
    source = ready(database, sources, "every")
    with source.open(resume_after=START) as stream:
        database.execute(EVERY_VALUE)
        (batch,) = [batch for taken in up_to_mark(source, stream) for batch in taken.batches]
    name = TableName("public", "every")
    chunk = source.chunk(name, after_key=None, up_to_key=("9",), limit=100)
    assert chunk.schema == batch.schema == source.tables()[0]
    logged = pa.RecordBatch.from_arrays(batch.rows.columns[len(META) - 1 :], schema=chunk.rows.schema)
    # NaN is the same NaN here, so Arrow's bytes are compared by their text.
    assert str(logged.to_pylist()) == str(chunk.rows.to_pylist())
    assert logged.num_rows == 3


def test_value_is_what_the_server_says(database: Database, sources: list[PostgresSource]) -> None:
    database.execute(EVERY_TYPE, EVERY_VALUE)
    source = ready(database, sources, "every")
    chunk = source.chunk(TableName("public", "every"), after_key=None, up_to_key=("9",), limit=100)
    # psycopg's own reading of the binary protocol is independent of our reading of texts.
    simple = [*"abcdefgnpu", "v", "w", "x", "z", "ap", "ao", "an", "ag", "o"]
    with database.connect() as connection, connection.cursor(binary=True) as cursor:
        cursor.execute("set timezone to 'UTC'")
        expected = cursor.execute(f"select {', '.join(simple)} from every order by id").fetchall()
    found = list(zip(*(chunk.rows.column(name).to_pylist() for name in simple), strict=True))
    # NaN differs from itself, so the comparison is of what is printed; only the name of the zone differs.
    assert str(found).replace("zoneinfo.ZoneInfo(key='UTC')", "datetime.timezone.utc") == str(expected)
    texts = ["h", "i", "j", "l", "q", "r", "s", "t", "aa", "ab", "ac", "ae", "ai", "al", "am"]
    with database.connect() as connection:
        # format() prints with the type's output function and, unlike a cast, changes nothing.
        printed = ", ".join(f"case when {name} is null then null else format('%s', {name}) end" for name in texts)
        connection.execute("set lc_monetary to 'C'")
        server = connection.execute(f"select {printed} from every order by id").fetchall()
    assert list(zip(*(chunk.rows.column(name).to_pylist() for name in texts), strict=True)) == server


def test_types_keep_the_servers_name(database: Database, sources: list[PostgresSource]) -> None:
    database.execute(EVERY_TYPE)
    schema = ready(database, sources, "every").tables()[0]
    named = {name: (schema.column(name).source_type, schema.column(name).type) for name in ("g", "t", "y", "ad", "af")}
    assert named == {
        "g": ("numeric(10,2)", pa.decimal128(10, 2)),
        "t": ("mood", pa.string()),
        "y": ("mood[]", pa.list_(pa.string())),
        "ad": ("price", pa.decimal128(8, 2)),
        "af": ("price[]", pa.list_(pa.decimal128(8, 2))),
    }
    assert schema.key == ("id",)
    assert [column.nullable for column in schema.columns[:2]] == [False, True]


@pytest.mark.parametrize(
    ("kind", "text"),
    [("date", "infinity"), ("timestamptz", "12000-01-01 00:00:00+00"), ("numeric(5,1)", "NaN"), ("int[]", "{{1},{2}}")],
)
def test_value_outside_of_arrow_is_its_text_in_log_and_dump(
    database: Database, sources: list[PostgresSource], kind: str, text: str
) -> None:
    database.execute(f"create table t (id int primary key, v {kind})")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1)", f"insert into t values (2, '{text}')")
        streamed = changes(up_to_mark(source, stream))
    dumped = source.chunk(TableName("public", "t"), after_key=None, up_to_key=("9",), limit=10).rows.to_pylist()
    with source.snapshot() as snapshot:
        compared = [row for rows in snapshot.read(TableName("public", "t")) for row in rows.to_pylist()]
    for rows in (streamed, dumped, compared):
        assert [(row["id"], row["v"], row["_as_text"]) for row in rows] == [(1, None, None), (2, None, [("v", text)])]


def test_transaction_over_tables_is_one_with_an_order(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table a (id int primary key)", "create table b (id int primary key)")
    source = ready(database, sources, "a", "b")
    with source.open(resume_after=START) as stream:
        with database.connect() as connection, connection.transaction():
            (txid,) = connection.execute("select pg_current_xact_id()::text::bigint").fetchone() or (0,)
            connection.execute("insert into a values (1)")
            connection.execute("insert into b values (2)")
            connection.execute("insert into a values (3)")
        slices = up_to_mark(source, stream)
    rows = changes(slices)
    assert [(row["table"], row["id"], row["_ordinal"]) for row in rows] == [("a", 1, 0), ("b", 2, 1), ("a", 3, 2)]
    assert {row["_txid"] for row in rows} == {txid}
    assert len({row["_commit"] for row in rows}) == len({row["_committed_at"] for row in rows}) == 1
    assert sum(taken.transaction_count for taken in slices) == 1
    assert all(Lsn(row["_commit"]) <= taken.position for taken in slices for row in rows)


def test_what_was_rolled_back_never_shows(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        with database.connect() as connection:
            connection.execute("begin; insert into t values (1); rollback")
            connection.execute(
                "begin; insert into t values (2); savepoint s; insert into t values (3); rollback to s; "
                "insert into t values (4); commit"
            )
        assert ops(up_to_mark(source, stream)) == [("c", 2), ("c", 4)]


def test_many_rows_of_one_position_stay_whole_and_ordered(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t select generate_series(1, 5000)", "insert into t values (6000)")
        slices = up_to_mark(source, stream, max_changes=100)
    with_rows = [taken for taken in slices if taken.batches]
    # A slice never ends inside a transaction, whatever was asked for.
    assert [len(taken.batches[0]) for taken in with_rows] == [5000, 1]
    assert with_rows[0].batches[0].rows.column("_ordinal").to_pylist() == list(range(5000))
    assert len(set(with_rows[0].batches[0].rows.column("_commit").to_pylist())) == 1


def test_resuming_after_a_position_repeats_nothing_and_skips_nothing(
    database: Database, sources: list[PostgresSource]
) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1)", "insert into t values (2)", "insert into t values (3)")
        positions = [row["_commit"] for row in changes(up_to_mark(source, stream))]
    with source.open(resume_after=Lsn(positions[0])) as stream:
        assert ops(up_to_mark(source, stream)) == [("c", 2), ("c", 3)]


@pytest.mark.parametrize(("identity", "unsent"), [("default", ["plot"]), ("full", None)])
def test_large_value_that_was_not_touched(
    database: Database, sources: list[PostgresSource], identity: str, unsent: list[str] | None
) -> None:
    database.execute(
        "create table t (id int primary key, title text, plot text)",
        "alter table t alter plot set storage external",
        f"alter table t replica identity {identity}",
        "insert into t values (1, 'a', repeat('x', 5000))",
    )
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("update t set title = 'b'", "update t set plot = repeat('y', 5000)", "delete from t")
        first, second, gone = changes(up_to_mark(source, stream))
    assert first["_unchanged"] == unsent
    # Under identity full the old row has the value, so nothing is missing.
    assert first["plot"] == (None if unsent else "x" * 5000)
    assert (second["plot"], second["_unchanged"]) == ("y" * 5000, None)
    assert (gone["_op"], gone["id"], gone["title"], gone["plot"]) == ("d", 1, None, None)


def test_identity_full_gives_the_whole_row_before_a_change(database: Database, sources: list[PostgresSource]) -> None:
    database.execute(
        "create table t (id int primary key, title text, price numeric(6,2))",
        "alter table t replica identity full",
        "insert into t values (1, 'a', 'NaN')",
    )
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("update t set title = 'b', price = 1", "delete from t", "insert into t values (2, 'c', 3)")
        moved, gone, made = changes(up_to_mark(source, stream))
    assert moved["_before"] == {"id": 1, "title": "a", "price": None}
    assert dict(moved["_as_text"]) == {"_before.price": "NaN"}
    assert gone["_before"] == {"id": 1, "title": "b", "price": Decimal("1.00")}
    assert made["_before"] is None


def test_key_change_has_both_keys(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (b text, a int, v int, primary key (a, b))", "insert into t values ('x', 1, 0)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("update t set v = 1", "update t set b = 'y'")
        plain, moved = changes(up_to_mark(source, stream))
    assert plain["_old_key"] is None
    assert (moved["_op"], moved["b"], moved["a"], moved["_old_key"]) == ("u", "y", 1, {"a": 1, "b": "x"})
    assert source.tables()[0].key == ("a", "b")


def test_key_by_another_index_identifies_deletes(database: Database, sources: list[PostgresSource]) -> None:
    database.execute(
        "create table t (id int primary key, code text not null unique, v int)",
        "alter table t replica identity using index t_code_key",
        "insert into t values (1, 'x', 1)",
    )
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("delete from t")
        (gone,) = changes(up_to_mark(source, stream))
    assert source.tables()[0].key == ("code",)
    assert (gone["code"], gone["id"]) == ("x", None)


def test_truncate_is_one_change_per_table(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table a (id int primary key)", "create table b (id int primary key)")
    source = ready(database, sources, "a", "b")
    with source.open(resume_after=START) as stream:
        database.execute("insert into a values (1)", "truncate a, b")
        rows = changes(up_to_mark(source, stream))
    assert [(row["_op"], row["id"]) for row in rows] == [("c", 1), ("t", None), ("t", None)]
    assert {row["table"] for row in rows[1:]} == {"a", "b"}


def test_added_column_splits_batches_by_shape(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1)", "alter table t add column v numeric(4, 1)")
        database.execute("insert into t values (2, 1.5)", "alter table t alter v type text", "insert into t values (3)")
        batches = [batch for taken in up_to_mark(source, stream) for batch in taken.batches]
    assert [batch.schema.names for batch in batches] == [("id",), ("id", "v"), ("id", "v")]
    assert [str(batch.schema.columns[-1].type) for batch in batches] == ["int32", "decimal128(4, 1)", "string"]


def test_tables_that_were_not_asked_for_are_passed_over(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)", "create table u (id int primary key)")
    database.execute("create publication everything for all tables")
    source = ready(database, sources, "t", publication="everything")
    with source.open(resume_after=START) as stream:
        database.execute("insert into u values (1)", "insert into t values (2)")
        slices = up_to_mark(source, stream)
    assert ops(slices) == [("c", 2)]
    assert sum(taken.transaction_count for taken in slices) == 1


def test_columns_that_the_publication_leaves_out_are_in_neither(
    database: Database, sources: list[PostgresSource]
) -> None:
    database.execute(
        "create table t (id int primary key, secret text, v int, doubled int generated always as (v * 2) stored)",
        "create publication chosen for table t (id, v)",
    )
    source = ready(database, sources, "t", publication="chosen")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1, 's', 2)")
        (batch,) = [batch for taken in up_to_mark(source, stream) for batch in taken.batches]
    assert source.tables()[0].names == batch.schema.names == ("id", "v")


def test_stored_generated_columns_are_in_log_and_dump_or_in_neither(
    database: Database, sources: list[PostgresSource]
) -> None:
    database.execute("create table t (id int primary key, v int, doubled int generated always as (v * 2) stored)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1, 2)")
        (row,) = changes(up_to_mark(source, stream))
    ((version,),) = database.rows("select current_setting('server_version_num')::int")
    # The server can send them from 18 on.
    assert row.get("doubled") == (4 if version >= 180000 else None)
    assert source.tables()[0].names == (("id", "v", "doubled") if version >= 180000 else ("id", "v"))


def test_names_and_keys_of_every_kind_are_quoted(database: Database, sources: list[PostgresSource]) -> None:
    database.execute(
        'create schema "My ""Shop"""',
        'create type "My ""Shop"""."Größe" as enum (\'s\', \'m\', \'l\')',
        'create table "My ""Shop"""."Order" ("select" "My ""Shop"""."Größe", "at" timestamptz, b bytea, d float8, '
        'primary key ("select", "at", b, d))',
        "insert into \"My \"\"Shop\"\"\".\"Order\" values ('l', '2020-01-01', '\\x00ff', 'NaN'), "
        "('s', '2021-01-01', '', 0.1), ('s', '2021-01-01', '', 'Infinity')",
    )
    source = ready(database, sources, 'My "Shop".Order')
    name = TableName('My "Shop"', "Order")
    last = source.last_key(name)
    assert last == ("l", "2020-01-01 00:00:00+00", r"\x00ff", "NaN")
    seen: list[Any] = []
    after: tuple[str, ...] | None = None
    while True:
        chunk = source.chunk(name, after_key=after, up_to_key=last, limit=1)
        seen += chunk.rows.to_pylist()
        if chunk.last_key is None:
            break
        after = chunk.last_key
    # In the order of the enum, and each once.
    assert [(row["select"], row["d"]) for row in seen[:2]] == [("s", 0.1), ("s", float("inf"))]
    assert len(seen) == 3
    assert source.rows(name, keys=[last, ("m", "2020-01-01", "", "1")]).rows.num_rows == 1


def test_chunks_follow_each_other_and_end_at_the_last_key(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id text primary key)", "insert into t values ('a'), ('B'), ('c'), ('z')")
    source = ready(database, sources, "t")
    name = TableName("public", "t")
    first = source.chunk(name, after_key=None, up_to_key=("c",), limit=2)
    second = source.chunk(name, after_key=first.last_key, up_to_key=("c",), limit=2)
    assert first.rows.column("id").to_pylist() + second.rows.column("id").to_pylist() == ["B", "a", "c"]
    assert second.last_key is None
    assert source.last_key(name) == ("z",)
    database.execute("truncate t")
    assert source.last_key(name) is None


def test_running_transactions_are_seen_with_their_age(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with database.connect() as writer:
        writer.execute("begin")
        (txid,) = writer.execute("select pg_current_xact_id()::text::bigint").fetchone() or (0,)
        (began_at,) = writer.execute("select now()").fetchone() or (None,)
        running = source.running()
        assert not running.visible_in.sees(txid, commit=0)
        assert running.next_txid > txid
        assert running.oldest_began_at is not None
        assert running.oldest_began_at <= began_at
        writer.execute("rollback")
    assert source.running().visible_in.sees(txid, commit=0)


def test_slot_ahead_of_the_log_is_refused(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        database.execute("insert into t values (1)")
        early = up_to_mark(source, stream)[-1].position
        database.execute("insert into t values (2)")
        stream.confirm(up_to_mark(source, stream)[-1].position)
    with pytest.raises(
        SlotInvalidatedError, match=rf"resume after {early}: slot .* is ahead at 0/.* new slot and a dump"
    ):
        source.open(resume_after=early)


def test_server_that_lost_its_log_is_refused(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with pytest.raises(SlotInvalidatedError, match="own log ends before"):
        source.open(resume_after=Lsn.parse("FFFF/0"))


def test_missing_slot_is_a_named_gap(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    position = source.current_position()
    database.execute(f"select pg_drop_replication_slot('deltaworks_{database.name}')")
    with pytest.raises(SlotInvalidatedError, match=f"resume after {position}: slot .* is gone"):
        source.open(resume_after=position)


def test_slot_held_by_another_reader_names_it(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START):
        ((pid,),) = database.rows(f"select active_pid from pg_replication_slots where database = '{database.name}'")
        with pytest.raises(SlotHeldError, match=f"process {pid}"):
            source.open(resume_after=START)


def test_idle_stream_returns_in_time(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        up_to_mark(source, stream)
        assert stream.next(timeout_s=0.05) is None or stream.next(timeout_s=0.05) is None


def test_broken_connection_can_be_opened_again(database: Database, sources: list[PostgresSource]) -> None:
    database.execute("create table t (id int primary key)")
    source = ready(database, sources, "t")
    with source.open(resume_after=START) as stream:
        position = up_to_mark(source, stream)[-1].position
        database.execute(
            "select pg_terminate_backend(pid, 5000) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        with pytest.raises(SourceUnreachableError):
            up_to_end(stream)
    # The ordinary connection was ended too; its first use finds out.
    with pytest.raises(SourceUnreachableError):
        source.current_position()
    database.execute("insert into t values (1)")
    with source.open(resume_after=position) as stream:
        assert ops(up_to_mark(source, stream)) == [("c", 1)]


def test_nobody_there_is_retryable_and_names_no_password() -> None:
    dsn = f"postgresql://studio:s3cret@127.0.0.1:{free_port()}/studio"
    source = PostgresSource("studio", PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]}))
    with pytest.raises(SourceUnreachableError, match="source 'studio'") as caught:
        source.check()
    assert "s3cret" not in str(caught.value)


def test_unknown_database_and_role_are_terminal(database: Database) -> None:
    for dsn in (database.server.dsn("nowhere"), database.server.dsn(database.name, user="nobody_here")):
        config = PostgresConfig.model_validate({"kind": "postgres", "dsn": dsn, "tables": ["t"]})
        with pytest.raises(SourceNotReadyError, match=r"does not exist; mend sources\.studio\.dsn"):
            PostgresSource("studio", config).check()


def test_connection_string_that_is_none_shows_no_secret() -> None:
    config = PostgresConfig.model_validate({"kind": "postgres", "dsn": "s3cret nonsense", "tables": ["t"]})
    with pytest.raises(SourceNotReadyError, match="connection string of source 'studio'") as caught:
        PostgresSource("studio", config).check()
    assert "s3cret" not in str(caught.value)
