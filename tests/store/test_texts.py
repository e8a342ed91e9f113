"""Values that an Arrow column cannot hold reach the lake: in their column where DuckDB can, else beside it as text."""

from contextlib import closing
from datetime import date
from decimal import Decimal

import duckdb
import pyarrow as pa
import pytest

from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.recorder import drain
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.store.evolve import SchemaConflictError
from deltaworks.store.load import load
from deltaworks.store.texts import moment_value
from deltaworks.store.verify import verify

PRICE = TableSchema(
    name=TableName("public", "price"),
    columns=(
        Column(name="id", type=pa.int32(), source_type="integer", nullable=False),
        Column(name="amount", type=pa.decimal128(6, 2), source_type="numeric(6,2)"),
        Column(name="until", type=pa.date32(), source_type="date"),
        Column(name="grid", type=pa.list_(pa.int32()), source_type="integer[]"),
    ),
    key=("id",),
)


def rows(lake, columns="*"):
    return lake.connection.execute(f"select {columns} from lake.studio.price order by id").fetchall()


@pytest.mark.parametrize(
    ("text", "in_duckdb"),
    [
        ("0044-03-15 BC", "0044-03-15 (BC)"),
        ("0001-12-31 BC", "0001-12-31 (BC)"),
        ("4713-11-24 BC", "4713-11-24 (BC)"),
        ("0001-01-01", "0001-01-01"),
        ("2000-02-29", "2000-02-29"),
        ("10000-01-01", "10000-01-01"),
        ("5874897-12-31", "5874897-12-31"),
        ("-infinity", "-infinity"),
    ],
)
def test_date_is_what_duckdb_takes_it_for(text, in_duckdb):
    found = pa.array([moment_value(text, pa.date32())], pa.int32()).view(pa.date32())
    with duckdb.connect() as connection:
        connection.register("found", pa.table({"d": found}))
        assert connection.execute("select d::varchar, d = ?::date from found", [in_duckdb]).fetchone() == (
            in_duckdb,
            True,
        )


@pytest.mark.parametrize(
    ("text", "in_duckdb"),
    [
        ("0044-03-15 12:00:00 BC", "0044-03-15 (BC) 12:00:00"),
        ("4713-01-01 00:00:00+00 BC", "4713-01-01 (BC) 00:00:00"),
        ("20000-12-31 23:59:59.5", "20000-12-31 23:59:59.5"),
        ("infinity", "infinity"),
        ("294247-01-10 04:00:54.775806", "294247-01-10 04:00:54.775806"),
    ],
)
def test_timestamp_is_what_duckdb_takes_it_for(text, in_duckdb):
    found = pa.array([moment_value(text, pa.timestamp("us", "UTC"))], pa.int64()).view(pa.timestamp("us"))
    with duckdb.connect() as connection:
        connection.register("found", pa.table({"t": found}))
        assert connection.execute("select t::varchar from found").fetchone() == (in_duckdb,)


@pytest.mark.parametrize("text", ["294247-01-10 04:00:54.775807", "294276-12-31 23:59:59.999999+00", "soon"])
def test_timestamp_that_duckdb_cannot_hold_has_no_value(text):
    assert moment_value(text, pa.timestamp("us")) is None


def test_a_text_column_is_there_once_a_value_needs_it(lake, new_changes):
    changes = new_changes(PRICE)
    changes.commit(10, {"_op": "c", "id": 1, "amount": Decimal("1.50")})
    load(lake, changes.reader, log="studio")
    before = {name for (name, *_) in lake.connection.execute("describe lake.studio.price").fetchall()}
    changes.commit(20, {"_op": "c", "id": 2, "_as_text": {"amount": "NaN"}})
    load(lake, changes.reader, log="studio")
    after = {name for (name, *_) in lake.connection.execute("describe lake.studio.price").fetchall()}
    assert after - before == {"_as_text_amount"}
    assert rows(lake, "id, amount, _as_text_amount") == [(1, Decimal("1.50"), None), (2, None, "NaN")]


def test_a_later_value_takes_the_place_of_a_text(lake, new_changes):
    changes = new_changes(PRICE)
    changes.commit(10, {"_op": "c", "id": 1, "_as_text": {"amount": "NaN", "grid": "{{1},{2}}"}})
    load(lake, changes.reader, log="studio")
    changes.commit(20, {"_op": "u", "id": 1, "amount": Decimal(2), "_unchanged": ["grid"]})
    load(lake, changes.reader, log="studio")
    assert rows(lake, "amount, _as_text_amount, grid, _as_text_grid") == [(Decimal(2), None, None, "{{1},{2}}")]


def test_infinite_date_is_duckdbs_own(lake, new_changes):
    changes = new_changes(PRICE)
    changes.commit(10, {"_op": "c", "id": 1, "_as_text": {"until": "infinity"}})
    changes.commit(11, {"_op": "c", "id": 2, "until": date(2026, 1, 1)})
    changes.commit(12, {"_op": "c", "id": 3, "_as_text": {"until": "0044-03-15 BC"}})
    load(lake, changes.reader, log="studio")
    assert rows(lake, "id, until::varchar") == [(1, "infinity"), (2, "2026-01-01"), (3, "0044-03-15 (BC)")]
    assert len(rows(lake)[0]) == len(PRICE.columns) + 2


def test_a_source_column_with_the_name_of_a_text_column_is_refused(lake, new_changes):
    taken = TableSchema(
        name=PRICE.name,
        columns=(*PRICE.columns, Column(name="_as_text_amount", type=pa.string(), source_type="text")),
        key=("id",),
    )
    changes = new_changes(taken)
    changes.commit(10, {"_op": "c", "id": 1})
    with pytest.raises(SchemaConflictError, match="_as_text_amount"):
        load(lake, changes.reader, log="studio")


EXTREME = """
create table extreme (
    k numeric(5, 2), since timestamptz, amount numeric(6, 2), at timestamp, grid int[], days date[], note text,
    primary key (k, since)
);
insert into extreme values
    ('NaN', 'infinity', 'NaN', '-infinity', '{{1,2},{3,4}}', '{infinity}', 'a'),
    (1.5, 'infinity', 1.5, '0044-03-15 12:00:00 BC', '{1}', '{2020-01-01}', 'b'),
    ('NaN', '2020-01-01', null, '294276-12-31 23:59:59', '[0:1]={7,8}', null, 'c'),
    (2.5, '2020-01-01', 2, '2020-01-01', '{}', '{}', 'd');
alter table extreme alter grid set storage external;
"""
CHANGES = (
    "update extreme set note = 'e', grid = array_fill(7, array[2, 600]) where k = 'NaN' and since = 'infinity'",
    "update extreme set note = 'f' where k = 'NaN'",
    "update extreme set k = 'NaN' where k = 1.5 and since = '-infinity'",
    "update extreme set since = '-infinity' where k = 'NaN' and since = 'infinity'",
    "update extreme set k = 'NaN', amount = 'NaN' where k = 1.5",
    "update extreme set k = 3 where k = 'NaN' and since = '2020-01-01'",
    "delete from extreme where k = 2.5",
    "insert into extreme values (2.5, '-infinity', 'NaN', null, null, null, 'g')",
)


def test_a_lake_with_extreme_values_and_keys_equals_its_source(database, tmp_path, lake):
    database.execute(EXTREME)
    with closing(database.source("extreme")) as source:

        def catch_up():
            with LocalLogWriter.open(tmp_path / "log") as writer:
                drain(source, writer, LocalLogReader(tmp_path / "log"))

        def differing():
            found = verify(source, lake, LocalLogReader(tmp_path / "log"), log="studio", catch_up=catch_up)
            return found.tables[0].differing

        catch_up()
        load(lake, LocalLogReader(tmp_path / "log"), log="studio")
        assert differing() == 0
        for at, change in enumerate(CHANGES):
            database.execute(change)
            assert differing() == 0, change
            if at % 2:
                load(lake, LocalLogReader(tmp_path / "log"), log="studio")
        assert lake.row_count("studio", "extreme") == 4
        lake.commit(
            lambda connection: connection.execute("update lake.studio.extreme set _as_text_k = 'nan' where note = 'f'"),
            message="by hand",
            info=lambda _: {},
        )
        assert differing() > 0
