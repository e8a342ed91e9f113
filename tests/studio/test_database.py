"""The studio's database: what is in it, what it refuses, and that loading it can be repeated."""

import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from servers.postgres import Database

from deltaworks.testing.postgres import free_port
from studio import catalogue
from studio.database import (
    TABLES,
    DatabaseNotReachableError,
    NotOursError,
    create_database,
    is_loaded,
    load,
    row_counts,
)

COUNTS = {
    "movie": 17_472,
    "movie_genre": 35_469,
    "person": 63_794,
    "credit": 234_172,
    "rating": 17_472,
    "distribution": 9_519,
}


def test_all_films_are_there_with_their_people(loaded: Database) -> None:
    assert is_loaded(loaded.dsn)
    assert row_counts(loaded.dsn) == COUNTS


def test_a_known_film_reads_as_in_the_source(loaded: Database) -> None:
    assert loaded.rows(
        "select imdb_id, year, certificate, runtime_min::float, released_on::text, languages, countries, oscars, "
        "awards from movie where title = 'The Matrix' and status = 'released'"
    ) == [
        (
            *("tt0133093", 1999, "R", 136.0, "1999-03-31"),
            *(["English"], ["Australia", "United States"], 3, "Won 3 Oscars. Nominated for 3 Oscars."),
        )
    ]
    assert loaded.rows(
        "select name, role from credit join person using (person_id) join movie using (movie_id) "
        "where title = 'Whatever Works' and name like '%, Jr.' order by name"
    ) == [("Ed Begley, Jr.", "cast"), ("John Gallagher, Jr.", "cast")]


def test_films_picked_at_random_agree_with_the_file_in_every_column(loaded: Database) -> None:
    with closing(sqlite3.connect(catalogue.default_path())) as connection:
        wanted = random.Random(7).sample([id_ for (id_,) in connection.execute("select ID from omdb")], 500)
        marks = ", ".join("?" * len(wanted))
        expected = connection.execute(
            "select ID, imdbID, Title, Year, omdb.Rating, Runtime, Released, Awards, Oscars, Metacritic, Meter, "
            "tomatoes.Rating, Reviews, Fresh, Rotten from omdb join tomatoes using (ID) "
            f"where ID in ({marks}) order by ID",
            wanted,
        ).fetchall()
    found = loaded.rows(
        "select movie_id, imdb_id, title, year, certificate, runtime_min::float, released_on::text, awards, oscars, "
        "metascore, tomato_meter, tomato_rating::float, tomato_reviews, fresh, rotten "
        f"from movie join rating using (movie_id) where movie_id in ({', '.join(map(str, wanted))}) order by movie_id"
    )
    assert found == expected


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("insert into movie (movie_id, title, status) values (1, '', 'released')", psycopg.errors.CheckViolation),
        ("insert into movie (movie_id, status) values (1, 'released')", psycopg.errors.NotNullViolation),
        ("insert into movie (movie_id, title, status) values (1, 'X', 'lost')", psycopg.DataError),
        ("insert into movie (movie_id, title, status) values (372, 'X', 'draft')", psycopg.errors.UniqueViolation),
        ("insert into movie_genre values (1, 'Drama')", psycopg.errors.ForeignKeyViolation),
        ("insert into person (name) values (' A')", psycopg.errors.CheckViolation),
        ("insert into person (name) select name from person limit 1", psycopg.errors.UniqueViolation),
        ("insert into person (person_id, name) values (1, 'A')", psycopg.errors.GeneratedAlways),
        (
            "insert into credit (movie_id, person_id, role, billing) "
            "select movie_id, person_id, role, 1 from credit limit 1",
            psycopg.errors.UniqueViolation,
        ),
        ("delete from person where person_id = 1", psycopg.errors.ForeignKeyViolation),
        ("update rating set imdb_rating = 10.1 where movie_id = 372", psycopg.errors.CheckViolation),
        ("update rating set fresh = fresh + 1 where movie_id = 372", psycopg.errors.CheckViolation),
        ("update distribution set box_office_usd = -1", psycopg.errors.CheckViolation),
    ],
)
def test_the_schema_refuses_what_cannot_be_true(loaded: Database, statement: str, error: type[psycopg.Error]) -> None:
    with loaded.connect() as connection, pytest.raises(error), connection.transaction():
        connection.execute(statement)  # type: ignore[arg-type]


def test_a_deleted_film_takes_its_rows_along(studio: Database) -> None:
    studio.execute("delete from movie where movie_id = 372")
    for table in TABLES:
        if table != "person":
            assert studio.rows(f"select count(*) from {table} where movie_id = 372") == [(0,)]
    assert row_counts(studio.dsn)["person"] == COUNTS["person"]


def test_a_change_sets_the_time_of_the_row_by_itself(studio: Database) -> None:
    studio.execute("update rating set metascore = 50 where movie_id = 372")
    assert studio.rows("select updated_at > now() - interval '1 minute' from rating where movie_id = 372") == [(True,)]


def test_new_people_and_credits_get_numbers_after_the_loaded_ones(database: Database, few_films: Path) -> None:
    counts = load(database.dsn, path=few_films).row_counts
    assert database.rows("insert into person (name) values ('Somebody New') returning person_id") == [
        (counts["person"] + 1,)
    ]
    assert database.rows(
        "insert into credit (movie_id, person_id, role, billing) "
        f"values (372, {counts['person'] + 1}, 'cast', 1) returning credit_id"
    ) == [(counts["credit"] + 1,)]


def test_every_table_and_column_is_described(loaded: Database) -> None:
    assert (
        loaded.rows(
            "select relname, attname from pg_class join pg_attribute on attrelid = pg_class.oid "
            "where relnamespace = 'public'::regnamespace and relkind = 'r' and attnum >= 0 and not attisdropped "
            "and col_description(attrelid, attnum) is null"
        )
        == []
    )
    assert loaded.rows(
        "select count(*) from pg_class where relnamespace = 'public'::regnamespace and relkind = 'r' "
        "and obj_description(oid, 'pg_class') is not null"
    ) == [(len(TABLES),)]


def test_the_reader_role_may_read_and_stream_and_nothing_else(loaded: Database) -> None:
    with psycopg.connect(loaded.server.dsn(loaded.name, user="deltaworks"), autocommit=True) as reader:
        for table in TABLES:
            assert reader.execute(f"select count(*) from {table}").fetchone() == (COUNTS[table],)  # type: ignore[arg-type]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute("delete from movie")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            reader.execute("select * from studio_admin.catalogue_load")
    assert loaded.rows("select rolreplication, rolsuper from pg_roles where rolname = 'deltaworks'") == [(True, False)]


def test_loading_again_does_nothing(database: Database, few_films: Path) -> None:
    first = load(database.dsn, path=few_films)
    database.execute("delete from movie where movie_id = 372")
    second = load(database.dsn, path=few_films)
    assert (first.was_loaded, second.was_loaded) == (False, True)
    assert (first.row_counts["movie"], second.row_counts["movie"]) == (50, 49)


def test_a_half_loaded_database_starts_over(database: Database, few_films: Path) -> None:
    def die_after_credits(table: str, done: int, total: int) -> None:
        if table == "credit":
            raise InterruptedError

    with pytest.raises(InterruptedError):
        load(database.dsn, path=few_films, on_progress=die_after_credits)
    assert not is_loaded(database.dsn)
    assert row_counts(database.dsn)["movie"] == 50
    report = load(database.dsn, path=few_films)
    assert not report.was_loaded
    assert report.row_counts["movie"] == 50
    assert is_loaded(database.dsn)


def test_two_loaders_at_once_load_once(database: Database, few_films: Path) -> None:
    reports = []
    threads = [threading.Thread(target=lambda: reports.append(load(database.dsn, path=few_films))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.was_loaded for report in reports) == [False, True]
    assert row_counts(database.dsn)["movie"] == 50


def test_progress_counts_every_row_and_ends_at_the_total(database: Database, few_films: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = load(database.dsn, path=few_films, on_progress=lambda *call: calls.append(call))
    assert [table for table, _, _ in calls] == list(TABLES)
    assert calls[-1][1] == calls[-1][2] == sum(report.row_counts.values())


def test_tables_of_somebody_else_are_left_alone(database: Database, few_films: Path) -> None:
    database.execute("create table movie (mine text)", "insert into movie values ('precious')")
    with pytest.raises(NotOursError, match="tables 'movie' are there already"):
        load(database.dsn, path=few_films)
    assert database.rows("select mine from movie") == [("precious",)]


def test_no_server_is_an_error_with_the_next_step() -> None:
    port = free_port()
    with pytest.raises(DatabaseNotReachableError, match=rf"127\.0\.0\.1:{port}.*python -m studio\.database run"):
        create_database(f"postgresql://studio@127.0.0.1:{port}/studio")


def test_the_service_stops_in_the_middle_of_a_load_and_the_next_one_finishes_it(server_folder: Path) -> None:
    folder, port = server_folder / "studio", free_port()
    with service(folder, port) as process:
        # The server answers before the load has begun, or shortly after.
        wait_until_listening(port, process)
    assert process.returncode == 0
    assert not (folder / "postmaster.pid").exists()
    with service(folder, port) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("studio database ready"):
                break
        assert row_counts(f"postgresql://studio@127.0.0.1:{port}/studio") == COUNTS
        refused = subprocess.run(
            [sys.executable, "-m", "studio.database", "run", "--port", str(port), "--folder", str(folder) + "2"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert refused.returncode == 1
        assert f"port {port} of 127.0.0.1 is in use" in refused.stderr
    assert process.returncode == 0


@contextmanager
def service(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`studio.database run` in a process; ended by SIGTERM."""
    command = [sys.executable, "-m", "studio.database", "run", "--port", str(port), "--folder", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def wait_until_listening(port: int, process: subprocess.Popen[str]) -> None:
    while process.poll() is None:
        try:
            psycopg.connect(f"postgresql://studio@127.0.0.1:{port}/studio").close()
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return
