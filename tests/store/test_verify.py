"""Source and lake are compared at one position, exactly, while both are in use."""

import random
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.capture.snapshot import TableRewrittenError
from deltaworks.config import PostgresConfig
from deltaworks.faults import arm
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.log.recorder import drain, follow
from deltaworks.position import START
from deltaworks.schema import TableName
from deltaworks.store.load import load
from deltaworks.store.verify import LogBehindError, TableVerdict, verify

SCHEMA = """
create table film (
    film_id int primary key, title text not null, score numeric(4, 2), tags text[] not null default '{}',
    raw bytea, seen_at timestamptz, day date, ratio double precision, plot text
);
create table cast_member (film_id int references film on delete cascade, name text, primary key (film_id, name));
insert into film
select i, 'film ' || i, i % 10 + 0.25, array['a', null, '"' || i], decode('00ff', 'hex'),
       '2026-10-25 02:30:00.123456+00', '2026-01-01'::date + i, 'NaN', repeat(md5(i::text), 200)
from generate_series(1, 400) i;
insert into cast_member select i, 'p' || n from generate_series(1, 400) i, generate_series(1, 3) n;
"""


class Studio:
    """A source, its log and a lake, driven by hand."""

    def __init__(self, database, folder: Path, lake) -> None:
        self.database, self.folder, self.lake = database, folder, lake
        self.source = self.new_source()

    def new_source(self) -> PostgresSource:
        return PostgresSource(
            "studio",
            PostgresConfig(
                kind="postgres",
                dsn=self.database.dsn,
                tables=("film", "cast_member"),
                publication="films",
                slot=self.database.name,
            ),
        )

    @property
    def reader(self) -> LocalLogReader:
        return LocalLogReader(self.folder)

    def drain(self) -> None:
        with LocalLogWriter.open(self.folder) as writer:
            drain(self.source, writer, self.reader)

    def load(self) -> None:
        load(self.lake, self.reader, log="studio")

    def verify(self, **options):
        return verify(self.source, self.lake, self.reader, log="studio", **({"catch_up": self.drain} | options))

    @contextmanager
    def following(self):
        stop = Event()
        with LocalLogWriter.open(self.folder) as writer:
            thread = Thread(target=follow, args=(self.source, writer, self.reader), kwargs={"stop": stop})
            thread.start()
            try:
                yield
            finally:
                stop.set()
                thread.join()


@pytest.fixture
def studio(database, tmp_path, lake):
    database.execute(SCHEMA)
    studio = Studio(database, tmp_path / "log", lake)
    yield studio
    studio.source.close()


def test_a_loaded_lake_equals_its_source(studio):
    studio.drain()
    studio.load()
    found = studio.verify()
    assert found.is_equal
    assert found.tables == (
        TableVerdict(table="film", source_rows=400, lake_rows=400, differing=0, sample=()),
        TableVerdict(table="cast_member", source_rows=1200, lake_rows=1200, differing=0, sample=()),
    )
    assert found.version == studio.lake.version()


def test_a_lake_that_lags_behind_is_brought_forward_from_the_log_alone(studio):
    studio.drain()
    studio.load()
    version = studio.lake.version()
    studio.database.execute(
        "update film set score = 0 where film_id % 7 = 0",
        "delete from film where film_id % 11 = 0",
        "insert into film (film_id, title) values (1000, 'new')",
    )
    found = studio.verify()
    assert found.is_equal
    assert found.folded_changes > 0
    assert (found.version, studio.lake.version()) == (version, version)


def test_a_lake_that_was_never_loaded_is_the_log_itself(studio):
    found = studio.verify()
    assert found.is_equal
    assert found.version is None
    assert studio.lake.version() == 0


def test_a_load_after_the_position_does_not_count(studio):
    """The lake moves on between the snapshot and the comparison; its older version is what is compared."""
    studio.drain()
    studio.load()

    def catch_up():
        studio.database.execute("update film set title = 'later'")
        studio.drain()
        studio.load()

    found = studio.verify(catch_up=catch_up)
    assert found.is_equal
    assert found.version == studio.lake.version() - 1


def test_what_somebody_did_to_the_lake_is_found_and_named_by_key(studio):
    studio.drain()
    studio.load()
    for statement in (
        "update lake.studio.film set title = 'secret' where film_id <= 12",
        "delete from lake.studio.cast_member where film_id = 5 and name = 'p1'",
        "insert into lake.studio.cast_member (film_id, name) values (9999, 'ghost')",
    ):
        studio.lake.connection.execute(statement)
    found = studio.verify()
    assert not found.is_equal
    film, cast_member = found.tables
    assert (film.differing, film.sample) == (12, tuple((n,) for n in range(1, 11)))
    assert (cast_member.differing, cast_member.sample) == (2, ((5, "p1"), (9999, "ghost")))
    assert "secret" not in str(found)


def test_a_row_that_the_lake_has_twice_is_found(studio):
    studio.drain()
    studio.load()
    studio.lake.connection.execute("insert into lake.studio.film from lake.studio.film where film_id = 399")
    film = studio.verify().tables[0]
    assert (film.source_rows, film.lake_rows, film.differing, film.is_equal) == (400, 401, 0, False)


def test_a_log_that_does_not_get_there_is_said(studio):
    studio.drain()
    studio.database.execute("update film set score = 1 where film_id = 400")
    with pytest.raises(LogBehindError, match="is `deltaworks capture studio` running"):
        verify(studio.source, studio.lake, studio.reader, log="studio", timeout_s=0.2)
    assert studio.verify().is_equal


def test_a_lake_open_for_reading_can_be_verified(studio, open_lake):
    studio.drain()
    studio.load()
    studio.database.execute("update film set score = 1 where film_id = 400")
    with open_lake(read_only=True) as lake:
        assert verify(studio.source, lake, studio.reader, log="studio", catch_up=studio.drain).is_equal


def test_a_column_added_at_the_source_compares_as_null(studio):
    studio.drain()
    studio.load()
    studio.database.execute("alter table film add column note text")
    assert studio.verify().is_equal
    studio.database.execute("update film set note = 'x' where film_id = 1")
    assert studio.verify().is_equal


@pytest.mark.parametrize("seed", [1, 2])
def test_source_and_lake_are_equal_at_every_moment_of_a_busy_database(studio, open_lake, seed):
    studio.drain()
    stop = Event()
    failures: list[BaseException] = []
    counts = {"transactions": 0}

    def write(number: int) -> None:
        choice = random.Random(seed * 100 + number)
        try:
            with psycopg.connect(studio.database.dsn, autocommit=True) as connection:
                while not stop.is_set():
                    with connection.transaction():
                        for _ in range(choice.randint(1, 5)):
                            change(connection, choice, number)
                    counts["transactions"] += 1
        except BaseException as error:  # the test's own report from another thread
            failures.append(error)

    def keep_loading() -> None:
        try:
            with open_lake() as lake:
                while not stop.is_set():
                    load(lake, studio.reader, log="studio")
                    stop.wait(0.05)
        except BaseException as error:  # as above
            failures.append(error)

    threads = [Thread(target=write, args=(n,)) for n in range(2)] + [Thread(target=keep_loading)]
    with studio.following():
        for thread in threads:
            thread.start()
        try:
            found = [verify(studio.new_source(), studio.lake, studio.reader, log="studio") for _ in range(5)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    assert failures == []
    assert [verdict for each in found for verdict in each.tables if not verdict.is_equal] == []
    assert len({each.position for each in found}) == 5
    assert counts["transactions"] > 10


def change(connection: psycopg.Connection, choice: random.Random, writer: int) -> None:
    """One change of a row that only this writer touches."""
    film_id = choice.randrange(0, 200) * 2 + writer + 1
    kind = choice.choice(["score", "score", "plot", "delete", "move", "insert", "cast"])
    if kind == "score":
        connection.execute("update film set score = %s, seen_at = now() where film_id = %s", [choice.random(), film_id])
    elif kind == "plot":
        connection.execute("update film set plot = repeat(md5(random()::text), 200) where film_id = %s", [film_id])
    elif kind == "delete":
        connection.execute("delete from film where film_id = %s", [film_id])
    elif kind == "move":
        connection.execute("delete from cast_member where film_id = %s", [film_id])
        connection.execute(
            "update film set film_id = %s where film_id = %s and not exists (select 1 from film where film_id = %s)",
            [film_id + 1000, film_id, film_id + 1000],
        )
    elif kind == "insert":
        connection.execute("insert into film (film_id, title) values (%s, 'new') on conflict do nothing", [film_id])
    else:
        connection.execute(
            "insert into cast_member select film_id, md5(random()::text) from film where film_id = %s", [film_id]
        )


def test_a_snapshot_is_the_state_at_its_position(studio):
    studio.drain()
    with studio.source.snapshot() as snapshot:
        studio.database.execute("delete from film where film_id <= 100")
        rows = sum(batch.num_rows for batch in snapshot.read(TableName("public", "film")))
        assert rows == 400
        assert snapshot.position > START
    temporary = "select count(*) from pg_replication_slots where temporary"
    assert studio.database.rows(temporary) == [(0,)]


def test_a_table_truncated_once_while_a_snapshot_is_taken_is_in_the_next_one(studio):
    studio.drain()
    truncates = iter(["truncate film cascade"])
    arm("snapshot.before_lock", lambda: studio.database.execute(*(each for each in truncates)))
    with studio.source.snapshot() as snapshot:
        assert sum(batch.num_rows for batch in snapshot.read(TableName("public", "film"))) == 0


def test_a_table_truncated_whenever_the_snapshot_is_taken_is_an_error_not_an_empty_table(studio):
    studio.drain()
    arm("snapshot.before_lock", lambda: studio.database.execute("truncate film cascade"))
    with pytest.raises(TableRewrittenError, match="film"), studio.source.snapshot():
        pass
