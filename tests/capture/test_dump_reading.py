"""Reading chunks over a real server: three ways to the same rows, and exact ends."""

import threading
from collections.abc import Iterator

import pyarrow as pa
import pytest
from servers.postgres import Database

from deltaworks.capture.postgres import reading
from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.source import Chunk
from deltaworks.errors import TerminalError
from deltaworks.schema import TableName

T = TableName("public", "t")
COLUMNS = """
    id int primary key, a smallint, b bigint, c boolean, d real, e double precision, f numeric(18,4), g numeric(4,4),
    h numeric(18,0), i date, j timestamp, k timestamptz(3), l text, m numeric(30,2), n int[], o numeric(6,-2)
"""
EDGES = """
    (1, -32768, -9223372036854775808, false, '-0', '5e-324', -99999999999999.9999, 0.9999, 999999999999999999,
     '0001-01-01', '0001-01-01 00:00', '9999-12-31 23:59:59.999', '', -1.5, '{1,NULL}', 12300),
    (2, 32767, 9223372036854775807, true, '3.4028235e38', '1.7976931348623157e308', 0.0001, -0.0001,
     -999999999999999999, '9999-12-31', '9999-12-31 23:59:59.999999', '0001-01-01 00:00+00', 'é', 0, '{}', 0),
    (3, null, null, null, null, null, null, null, null, null, null, null, null, null, null, null),
    (4, 0, 0, false, 'NaN', '-Infinity', 10000, 0, 10000, '2000-01-01', '1999-12-31 23:59:59.999999',
     '2000-01-01 00:00:00.001+00', E'a\\\\b\\n', 12345.67, '{-5}', 100)
"""
ODD = {
    "f": ["NaN"],
    "i": ["infinity", "-infinity", "4713-01-01 BC", "10000-01-01"],
    "j": ["infinity", "0044-03-15 BC", "20000-01-01"],
    "k": ["-infinity"],
}


@pytest.fixture
def source(database: Database) -> Iterator[PostgresSource]:
    with database.source("t") as source:
        yield source


def chunk(source: PostgresSource) -> Chunk:
    return source.chunk(T, after_key=None, up_to_key=("2147483647",), limit=100_000)


def test_binary_text_and_the_library_give_the_same_rows(
    database: Database, source: PostgresSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.execute(f"create table t ({COLUMNS})", f"insert into t values {EDGES}")
    in_binary = chunk(source)
    monkeypatch.setattr(reading, "_in_binary", lambda schema: ())
    in_text = chunk(source)
    for module in ("reading", "fetch"):
        monkeypatch.setattr(f"deltaworks.capture.postgres.{module}.has_bare_socket", lambda connection: False)
    by_library = chunk(source)
    assert len(in_binary.rows) == 4
    # NaN is the same NaN here, so Arrow's values are compared by their text.
    assert str(in_binary.rows.to_pylist()) == str(in_text.rows.to_pylist()) == str(by_library.rows.to_pylist())


@pytest.mark.parametrize(("column", "value"), [(column, value) for column, values in ODD.items() for value in values])
def test_value_that_arrow_does_not_hold_is_there_as_its_text(
    database: Database, source: PostgresSource, column: str, value: str
) -> None:
    database.execute(
        f"create table t ({COLUMNS})",
        f"insert into t values {EDGES}",
        f"insert into t (id, a, {column}) values (5, 7, '{value}')",
    )
    *_, row = chunk(source).rows.to_pylist()
    assert (row["id"], row["a"], row[column]) == (5, 7, None)
    ((text,),) = database.rows(f"select {column}::text from t where id = 5")
    assert dict(row["_as_text"]) == {column: text.replace("+00", "+00")}


@pytest.mark.parametrize("is_bare", [True, False], ids=["bare socket", "library"])
def test_row_larger_than_a_chunk_may_be_is_a_chunk_of_its_own(
    database: Database, source: PostgresSource, monkeypatch: pytest.MonkeyPatch, is_bare: bool
) -> None:
    for module in ("reading", "fetch"):
        monkeypatch.setattr(f"deltaworks.capture.postgres.{module}.has_bare_socket", lambda connection: is_bare)
    monkeypatch.setattr(reading, "CHUNK_BYTES", 1 << 20)
    database.execute(
        "create table t (id int primary key, v text)",
        "insert into t select g, repeat('x', case when g % 3 = 0 then 5000000 else 10 end)"
        " from generate_series(1, 12) g",
    )
    after, seen = None, []
    while True:
        part = source.chunk(T, after_key=after, up_to_key=("12",), limit=1000)
        seen += part.rows.column("id").to_pylist()
        if part.last_key is None:
            break
        assert len(part.rows) <= 6
        after = part.last_key
    assert seen == list(range(1, 13))
    # The connection is in order after statements that were cut.
    assert source.last_key(T) == ("12",)


def test_many_rows_arrive_whole_in_pieces(database: Database, source: PostgresSource) -> None:
    database.execute(
        "create table t (id int primary key, v text, n int)",
        "insert into t select g, repeat('v', g % 200), nullif(g % 5, 0) from generate_series(1, 50000) g",
    )
    rows = pa.Table.from_batches([chunk(source).rows])
    assert rows["id"].to_pylist() == list(range(1, 50_001))
    assert [len(text) for text in rows["v"].to_pylist()] == [g % 200 for g in range(1, 50_001)]
    assert rows["n"].to_pylist() == [g % 5 or None for g in range(1, 50_001)]


def test_error_of_the_server_leaves_the_connection_in_order(database: Database, source: PostgresSource) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    for _ in range(3):
        with pytest.raises(TerminalError, match="does not exist"):
            source.chunk(T, after_key=None, up_to_key=("1",), limit=10, where="id ==== 3")
    assert len(chunk(source).rows) == 1


def test_read_that_is_interrupted_ends_at_once(database: Database, source: PostgresSource) -> None:
    database.execute("create table t (id int primary key)", "insert into t values (1)")
    chunk(source)
    timer = threading.Timer(0.3, source.interrupt)
    timer.start()
    with pytest.raises(Exception, match="cancel"):
        source.chunk(T, after_key=None, up_to_key=("1",), limit=10, where="pg_sleep(60) is null")
    timer.join()
    assert len(chunk(source).rows) == 1
