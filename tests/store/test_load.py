"""A load is one commit that goes exactly as far as it says, whatever happens around it."""

import json
import subprocess
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from threading import Thread

import pyarrow as pa
import pytest

from deltaworks.change import ChangeBatch
from deltaworks.log.change_log import Group, StoredGroup
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.position import Lsn
from deltaworks.schema import Column, TableName, TableSchema
from deltaworks.store.apply import MalformedChangeError
from deltaworks.store.evolve import SchemaConflictError
from deltaworks.store.load import (
    NOTHING_LOADED,
    BrokenLoadChainError,
    LogRestartedError,
    TableLoad,
    last_load,
    load,
    load_at,
    loaded_spans,
)
from deltaworks.testing.faults import fail_at


def films(lake):
    return lake.connection.execute("select film_id, title, plot from lake.studio.film order by film_id").fetchall()


def put(film_id, title="t", plot="p", op="c", **more):
    return {"_op": op, "film_id": film_id, "title": title, "plot": plot, **more}


def with_columns(table, *columns):
    return TableSchema(name=table.name, columns=columns, key=table.key)


def test_a_load_reports_how_far_it_went(lake, changes):
    changes.commit(10, put(1), put(2))
    changes.commit(20, put(2, "new", op="u"), {"_op": "d", "film_id": 1}, put(3))
    report = load(lake, changes.reader, log="studio")
    assert (report.from_sequence, report.to_sequence) == (-1, 1)
    assert (report.from_offset, report.to_offset, report.changes) == (0, 5, 5)
    assert (report.position, report.version, report.is_empty) == (Lsn(20), lake.version(), False)
    assert report.tables == {"film": TableLoad(changes=5, upserted=2, deleted=1, rows=2)}
    assert films(lake) == [(2, "new", "p"), (3, "t", "p")]


def test_rows_say_which_commit_they_are_from(lake, changes):
    changes.commit(10, put(1), put(2))
    changes.commit(20, put(2, op="u"))
    load(lake, changes.reader, log="studio")
    rows = lake.connection.execute("select film_id, _commit, _committed_at from lake.studio.film order by 1").fetchall()
    assert rows == [
        (1, 10, datetime(2026, 1, 1, 0, 0, 10, tzinfo=UTC)),
        (2, 20, datetime(2026, 1, 1, 0, 0, 20, tzinfo=UTC)),
    ]


def test_nothing_new_commits_nothing(lake, changes):
    changes.commit(10, put(1))
    first = load(lake, changes.reader, log="studio")
    again = load(lake, changes.reader, log="studio")
    assert again.is_empty
    assert (again.version, again.position, again.to_sequence) == (first.version, Lsn(10), 0)
    assert lake.version() == first.version


def test_an_empty_log_commits_nothing(lake, changes):
    assert load(lake, changes.reader, log="studio").is_empty
    assert lake.version() == 0
    assert last_load(lake, "studio") == NOTHING_LOADED


def test_a_position_without_changes_is_remembered(lake, changes):
    changes.commit(10, put(1))
    load(lake, changes.reader, log="studio")
    changes.append(position=70)
    report = load(lake, changes.reader, log="studio")
    assert (report.position, report.changes, report.tables) == (Lsn(70), 0, {})
    assert last_load(lake, "studio").position == Lsn(70)


def test_a_load_stops_at_the_group_asked_for(lake, changes):
    for position in (10, 20, 30):
        changes.commit(position, put(position))
    assert load(lake, changes.reader, log="studio", up_to_sequence=1).position == Lsn(20)
    assert [row[0] for row in films(lake)] == [10, 20]
    assert load(lake, changes.reader, log="studio").from_offset == 2
    assert [row[0] for row in films(lake)] == [10, 20, 30]


def test_the_commit_message_says_what_it_holds(lake, changes):
    changes.commit(10, put(1))
    load(lake, changes.reader, log="studio")
    message, info = lake.connection.execute(
        "select commit_message, commit_extra_info from lake.snapshots() order by snapshot_id desc limit 1"
    ).fetchone()
    assert message == "load studio"
    found = json.loads(info)
    (span,) = loaded_spans(lake, "studio")
    assert found.pop("taken") == span.to_json()
    assert (span.after, span.up_to, span.windows.counts) == (-1, 0, {"public.film": 1})
    assert found == {
        "log": "studio",
        "from_sequence": -1,
        "to_sequence": 0,
        "from_offset": 0,
        "to_offset": 1,
        "position": "0/A",
        "position_value": 10,
        "tables": {"film": 1},
    }


def test_all_tables_of_a_log_move_in_one_commit(lake, changes, film):
    genre = TableSchema(name=TableName("sales", "genre"), columns=film.columns[:2], key=("film_id",))
    changes.append(
        changes.batch([(10, [put(1)])]),
        changes.batch([(10, [{"_op": "c", "film_id": 1, "title": "g"}])], table=genre),
        position=10,
    )
    before = lake.version()
    report = load(lake, changes.reader, log="studio")
    assert report.version == before + 1
    assert set(report.tables) == {"film", "sales__genre"}
    assert lake.row_count("studio", "sales__genre") == 1


def test_the_newest_load_at_a_position_is_found_with_its_version(lake, changes):
    versions = {}
    for position in (10, 20, 30):
        changes.commit(position, put(position))
        versions[position] = load(lake, changes.reader, log="studio").version
    found = load_at(lake, "studio", up_to=Lsn(25))
    assert (found.version, found.sequence, found.next_offset, found.position) == (versions[20], 1, 2, Lsn(20))
    assert load_at(lake, "studio", up_to=Lsn(9)) == NOTHING_LOADED
    assert load_at(lake, "studio", up_to=Lsn(99)).version == lake.version()


@pytest.mark.parametrize("size", [1, 2, 1000])
def test_rows_swap_their_keys(lake, changes, monkeypatch, size):
    monkeypatch.setattr("deltaworks.store.tables.SLICE_CHANGES", size)
    changes.commit(10, put(1, "one", "first"), put(2, "two", "second"))
    load(lake, changes.reader, log="studio")
    unsent = {"plot": None, "_unchanged": ["plot"]}
    changes.commit(
        20,
        put(2, "one", op="u", _old_key={"film_id": 1}, **unsent),
        put(1, "two", op="u", _old_key={"film_id": 2}, **unsent),
    )
    load(lake, changes.reader, log="studio")
    assert films(lake) == [(1, "two", "second"), (2, "one", "first")]


def test_a_chain_of_keys_keeps_what_was_not_sent(lake, changes):
    changes.commit(10, put(1, "one", "first"))
    load(lake, changes.reader, log="studio")
    for position, (old, new) in zip((20, 30, 40), [(1, 2), (2, 3), (3, 1)], strict=True):
        changes.commit(
            position, put(new, f"at {position}", None, op="u", _old_key={"film_id": old}, _unchanged=["plot"])
        )
    load(lake, changes.reader, log="studio")
    assert films(lake) == [(1, "at 40", "first")]


def test_a_null_that_was_sent_is_no_value_left_out(lake, changes):
    changes.commit(10, put(1, "one", "first"))
    load(lake, changes.reader, log="studio")
    changes.commit(20, put(1, "two", None, op="u"), put(1, "three", None, op="u", _unchanged=["plot"]))
    load(lake, changes.reader, log="studio")
    assert films(lake) == [(1, "three", None)]


def test_a_deleted_row_leaves_nothing_to_its_successor(lake, changes):
    changes.commit(10, put(1, "one", "first"))
    load(lake, changes.reader, log="studio")
    changes.commit(20, {"_op": "d", "film_id": 1}, put(1, "two", None, op="u", _unchanged=["plot"]))
    load(lake, changes.reader, log="studio")
    assert films(lake) == [(1, "two", None)]


def test_a_truncate_takes_what_came_before_it(lake, changes):
    changes.commit(10, put(1), put(2))
    load(lake, changes.reader, log="studio")
    changes.commit(20, put(3), {"_op": "t"}, put(4), {"_op": "t"}, put(5))
    report = load(lake, changes.reader, log="studio")
    assert films(lake) == [(5, "t", "p")]
    assert report.tables["film"] == TableLoad(changes=5, upserted=1, deleted=2, rows=1)


def test_a_late_change_does_not_overtake_the_row(lake, changes):
    changes.commit(20, put(1, "new"))
    load(lake, changes.reader, log="movie_search")
    changes.append(changes.batch([(10, [put(1, "old", op="u"), put(2, "other")])]), position=20)
    load(lake, changes.reader, log="movie_search")
    rows = lake.connection.execute("select film_id, title from lake.movie_search.film order by 1").fetchall()
    assert rows == [(1, "new"), (2, "other")]


def test_a_change_without_a_key_stops_the_load(lake, changes):
    changes.commit(10, put(None, "secret"))
    with pytest.raises(MalformedChangeError, match="'film_id'") as caught:
        load(lake, changes.reader, log="studio")
    assert "secret" not in str(caught.value)
    assert lake.version() == 0


EVERY_TYPE = {
    "flag": (pa.bool_(), True),
    "small": (pa.int16(), -32768),
    "big": (pa.int64(), 2**63 - 1),
    "oid": (pa.uint32(), 2**32 - 1),
    "real": (pa.float32(), 0.10000000149011612),
    "double": (pa.float64(), 1e-308),
    "nan": (pa.float64(), float("nan")),
    "money": (pa.decimal128(14, 2), Decimal("123456789012.34")),
    "wide": (pa.decimal128(38, 10), Decimal("-1234567890123456789012345678.0123456789")),
    "unbounded": (pa.string(), "3.14159265358979323846264338327950288419716939937510582"),
    "at": (pa.timestamp("us", "UTC"), datetime(2026, 10, 25, 2, 30, 0, 123456, tzinfo=UTC)),
    "local": (pa.timestamp("us"), datetime(1, 1, 1, 0, 0, 0, 1)),  # noqa: DTZ001  # a local time has no zone
    "day": (pa.date32(), date(9999, 12, 31)),
    "words": (pa.list_(pa.string()), ["a", None, "", "NULL", '"{}"']),
    "sums": (pa.list_(pa.decimal128(10, 2)), [Decimal("0.10"), None]),
    "raw": (pa.binary(), bytes(range(256))),
    "uuid": (pa.string(), "6b0f6b1c-94a2-4ef0-8b3b-2f4cfb9a3f11"),
    "text": (pa.string(), "naïve 🎬 \\ ' \" \n"),
    "person": (pa.struct([("name", pa.string()), ("roles", pa.list_(pa.string()))]), {"name": "A", "roles": ["x"]}),
    "people": (pa.list_(pa.struct([("id", pa.int32())])), [{"id": 1}, None, {"id": None}]),
}


def test_every_type_comes_back_exactly(lake, new_changes):
    table = TableSchema(
        name=TableName("public", "thing"),
        columns=(
            Column(name="id", type=pa.int32(), source_type="integer", nullable=False),
            *(Column(name=name, type=kind, source_type="any") for name, (kind, _) in EVERY_TYPE.items()),
        ),
        key=("id",),
    )
    changes = new_changes(table)
    changes.commit(10, {"_op": "c", "id": 1, **{name: value for name, (_, value) in EVERY_TYPE.items()}})
    changes.commit(20, {"_op": "c", "id": 2})
    load(lake, changes.reader, log="studio")
    got = lake.connection.execute("select * from lake.studio.thing order by id").to_arrow_table().to_pylist()
    for name, (_, value) in EVERY_TYPE.items():
        assert got[0][name] == pytest.approx(value, nan_ok=True) if name == "nan" else got[0][name] == value, name
        assert got[1][name] is None, name


def test_an_enum_is_text_that_takes_values_to_come(lake, new_changes):
    kind = pa.dictionary(pa.int32(), pa.string())
    table = TableSchema(
        name=TableName("public", "thing"),
        columns=(
            Column(name="id", type=pa.int32(), source_type="integer", nullable=False),
            Column(name="role", type=kind, source_type="credit_role"),
        ),
        key=("id",),
    )
    changes = new_changes(table)
    changes.commit(10, {"_op": "c", "id": 1, "role": "cast"})
    load(lake, changes.reader, log="studio")
    changes.commit(20, {"_op": "c", "id": 2, "role": "composer"})
    load(lake, changes.reader, log="studio")
    assert lake.connection.execute("select role from lake.studio.thing order by id").fetchall() == [
        ("cast",),
        ("composer",),
    ]


@pytest.mark.parametrize("loads", [1, 2])
def test_columns_that_come_and_go(lake, changes, film, loads):
    """In one load and over two: rows written before a column have null in it, rows after its drop too."""
    number, title, _plot = film.columns
    score = Column(name="score", type=pa.float64(), source_type="double precision")
    changes.commit(10, put(1))
    if loads == 2:
        load(lake, changes.reader, log="studio")
    narrowed = with_columns(film, number, score, title)
    changes.commit(20, {"_op": "c", "film_id": 2, "title": "two", "score": 0.5}, table=narrowed)
    load(lake, changes.reader, log="studio")
    rows = lake.connection.execute("select film_id, title, plot, score from lake.studio.film order by 1").fetchall()
    assert rows == [(1, "t", "p", None), (2, "two", None, 0.5)]


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        (pa.int32(), pa.int64(), "BIGINT"),
        (pa.int64(), pa.int32(), "BIGINT"),
        (pa.decimal128(10, 2), pa.decimal128(14, 2), "DECIMAL(14,2)"),
        (pa.decimal128(14, 2), pa.decimal128(10, 1), "DECIMAL(14,2)"),
        (pa.float32(), pa.float64(), "DOUBLE"),
    ],
    ids=str,
)
def test_a_type_is_widened_and_never_narrowed(lake, changes, film, before, after, kept):
    for position, kind in ((10, before), (20, after)):
        table = with_columns(film, film.columns[0], Column(name="n", type=kind, source_type="number"))
        changes.commit(position, {"_op": "c", "film_id": position, "n": 7}, table=table)
        load(lake, changes.reader, log="studio")
    described = {row[0]: row[1] for row in lake.connection.execute("describe lake.studio.film").fetchall()}
    assert described["n"] == kept
    assert lake.connection.execute("select sum(n) from lake.studio.film").fetchone() == (14,)


def test_a_type_that_does_not_widen_stops_the_load_and_keeps_the_lake(lake, changes, film):
    changes.commit(10, put(1))
    before = load(lake, changes.reader, log="studio")
    number, _, plot = film.columns
    changed = with_columns(film, number, Column(name="title", type=pa.int32(), source_type="integer"), plot)
    changes.commit(20, {"_op": "c", "film_id": 2, "title": 3}, table=changed)
    with pytest.raises(SchemaConflictError, match="column 'title' is VARCHAR there and INTEGER at the source now"):
        load(lake, changes.reader, log="studio")
    assert lake.version() == before.version
    assert films(lake) == [(1, "t", "p")]


def test_columns_may_have_the_names_that_we_use_ourselves(lake, new_changes):
    names = ("id", "n", "place", "entity", "column_0", "key_0", "v", "t", "is_partial", "old_id", "rowid")
    table = TableSchema(
        name=TableName("public", "change"),
        columns=tuple(Column(name=name, type=pa.int64(), source_type="bigint") for name in names),
        key=("id", "entity"),
    )
    changes = new_changes(table)
    row = dict.fromkeys(names, 7)
    changes.commit(10, {"_op": "c", **row}, {"_op": "c", **row, "entity": 8})
    load(lake, changes.reader, log="studio")
    unsent = {"n": None, "v": None, "_unchanged": ["n", "v"]}
    changes.commit(20, {"_op": "u", **row, **unsent, "id": 9, "_old_key": {"id": 7, "entity": 7}})
    load(lake, changes.reader, log="studio")
    columns = ", ".join(f'"{name}"' for name in names)
    rows = lake.connection.execute(f"select {columns} from lake.studio.change order by 1").fetchall()
    assert rows == [(7, 7, 7, 8, *[7] * 7), (9, *[7] * 10)]


@pytest.mark.parametrize("name", ["_place", "_OP", "_is_here"])
def test_a_column_with_a_reserved_name_is_refused(lake, changes, film, name):
    taken = with_columns(film, *film.columns, Column(name=name, type=pa.string(), source_type="text"))
    changes.commit(10, put(1), table=taken)
    with pytest.raises(SchemaConflictError, match=f"column names {name.lower()} collide"):
        load(lake, changes.reader, log="studio")


def test_names_that_the_lake_cannot_tell_apart_are_refused(lake, changes, film):
    twice = with_columns(film, *film.columns, Column(name="Title", type=pa.string(), source_type="text"))
    changes.commit(10, put(1), table=twice)
    with pytest.raises(SchemaConflictError, match="column names title collide"):
        load(lake, changes.reader, log="studio")


def test_a_load_that_dies_before_its_commit_did_not_happen(lake, changes):
    changes.commit(10, put(1))
    load(lake, changes.reader, log="studio")
    changes.commit(20, put(2))
    with fail_at("load.before_commit", OSError("power")), pytest.raises(OSError, match="power"):
        load(lake, changes.reader, log="studio")
    assert films(lake) == [(1, "t", "p")]
    assert last_load(lake, "studio").position == Lsn(10)
    assert load(lake, changes.reader, log="studio").from_offset == 1


def test_a_load_that_dies_after_its_commit_is_not_repeated(lake, changes):
    changes.commit(10, put(1))
    with fail_at("load.after_commit", OSError("power")), pytest.raises(OSError, match="power"):
        load(lake, changes.reader, log="studio")
    assert load(lake, changes.reader, log="studio").is_empty


def test_a_log_that_starts_over_is_not_loaded(lake, changes, new_changes, film):
    for position in (10, 20):
        changes.commit(position, put(position))
    load(lake, changes.reader, log="studio")
    shorter = new_changes(film)
    shorter.commit(10, put(1))
    with pytest.raises(LogRestartedError, match="up to 1, the log ends at 0"):
        load(lake, shorter.reader, log="studio")
    as_long = new_changes(film)
    for position in (5, 15):
        as_long.commit(position, put(position))
    with pytest.raises(LogRestartedError, match="up to 1, the log ends at 1 with position '0/F'"):
        load(lake, as_long.reader, log="studio")
    longer = new_changes(film)
    for position in (5, 15, 25):
        longer.commit(position, put(position))
    with pytest.raises(BrokenLoadChainError, match="expected group 2 at offset 2 after '0/14'"):
        load(lake, longer.reader, log="studio")
    assert [row[0] for row in films(lake)] == [10, 20]


def test_a_missing_group_stops_the_load(lake, changes):
    for position in (10, 20, 30):
        changes.commit(position, put(position))
    groups = list(changes.reader.read(after_sequence=-1))

    class WithoutTheSecond:
        """A log that lost a group, which no log of ours lets happen unseen."""

        def end(self):
            return changes.reader.end()

        def read(self, *, after_sequence: int, max_changes: int | None = None) -> list[StoredGroup]:
            return [groups[0], groups[2]]

    with pytest.raises(BrokenLoadChainError, match="found group 2"):
        load(lake, WithoutTheSecond(), log="studio")
    assert lake.version() == 0


def test_two_loads_at_once_load_everything_once(lake, open_lake, changes):
    for position in range(1, 13):
        changes.commit(position, put(position))
    failures: list[BaseException] = []

    def work():
        try:
            with open_lake() as mine:
                for sequence in range(12):
                    load(mine, changes.reader, log="studio", up_to_sequence=sequence)
        except BaseException as error:  # the test's own report from another thread
            failures.append(error)

    threads = [Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert [row[0] for row in films(lake)] == list(range(1, 13))


CHILD = """
import sys
from pathlib import Path
from deltaworks.log.local import LocalLogReader
from deltaworks.store.lake import Lake
from deltaworks.store.load import load
from deltaworks.testing.faults import kill_at

catalog, data, extensions, log, step = sys.argv[1:]
kill_at(step)
with Lake.open(catalog=catalog, data=data, extensions=Path(extensions)) as lake:
    load(lake, LocalLogReader(Path(log)), log="studio")
"""


@pytest.mark.parametrize("step", ["load.before_commit", "load.after_commit"])
def test_a_killed_load_loses_and_repeats_nothing(tmp_path, open_lake, lake_settings, changes, step):
    folder = tmp_path / "log"
    first, second = changes.batch([(10, [put(1), put(2)])]), changes.batch([(20, [put(2, "new", op="u"), put(3)])])
    with LocalLogWriter.open(folder) as writer:
        append(writer, first, position=10)
        with open_lake() as lake:
            load(lake, LocalLogReader(folder), log="studio")
        append(writer, second, position=20)
    arguments = [lake_settings["catalog"], lake_settings["data"], str(lake_settings["extensions"]), str(folder), step]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == -9, done.stderr
    with open_lake() as lake:
        assert load(lake, LocalLogReader(folder), log="studio").is_empty == (step == "load.after_commit")
        assert films(lake) == [(1, "t", "p"), (2, "new", "p"), (3, "t", "p")]


def append(writer: LocalLogWriter, batch: ChangeBatch, *, position: int) -> None:
    writer.append(Group(batches=(batch,), position=Lsn(position), previous_position=writer.end().position))
