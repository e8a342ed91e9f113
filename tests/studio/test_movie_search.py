"""The app `movie_search` over a real database, its real log and the real Talent Service."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers.postgres import Database

from deltaworks.capture.postgres.source import PostgresSource
from deltaworks.config import Config
from deltaworks.log import recorder
from deltaworks.log.local import LocalLogReader, LocalLogWriter
from deltaworks.process.runner import ProcessReport, Runner
from deltaworks.store.search import SearchReader
from deltaworks.testing.app import assert_app
from deltaworks.testing.postgres import free_port
from deltaworks.testing.service import Call, FakeService, Status
from deltaworks.testing.source import insert, update
from studio.database import load
from studio.movie_search import movies

TABLES = ("movie", "movie_genre", "person", "credit", "rating", "distribution")

# What the documents have to be, in the database's own words.
DOCUMENTS = """
    select movie_id, json_build_object(
        'movie_id', movie_id, 'title', title, 'year', year, 'certificate', certificate,
        'runtime_min', runtime_min::float, 'released_on', released_on, 'status', status, 'oscars', oscars,
        'genres', array(select genre from movie_genre g where g.movie_id = m.movie_id order by genre collate "C"),
        'languages', languages, 'countries', countries,
        'rating', (select json_build_object(
            'imdb', imdb_rating::float, 'votes', imdb_votes, 'metascore', metascore, 'tomato_meter', tomato_meter,
            'tomato_rating', tomato_rating::float, 'tomato_reviews', tomato_reviews, 'users', user_rating::float)
            from rating r where r.movie_id = m.movie_id),
        'distribution', (select json_build_object('distributor', distributor, 'box_office_usd', box_office_usd::float)
            from distribution d where d.movie_id = m.movie_id),
        'directors', people('director'), 'writers', people('writer'), 'cast', people('cast'))::text
    from movie m where status not in ('draft', 'withdrawn')
"""
PEOPLE = """
    (select coalesce(json_agg(json_build_object('person_id', person_id, 'name', name) order by billing), '[]')
     from credit c join person p using (person_id) where c.movie_id = m.movie_id and role = '{role}')
"""


def expected(database: Database) -> dict[int, Any]:
    query = DOCUMENTS
    for role in ("director", "writer", "cast"):
        query = query.replace(f"people('{role}')", PEOPLE.format(role=role))
    return {movie_id: json.loads(body) for movie_id, body in database.rows(query)}


NAMES = {7: "Ridley Scott", 9: "Sigourney Weaver"}
ALIEN = {
    "movie_id": 1,
    "title": "Alien",
    "year": 1979,
    "certificate": "R",
    "runtime_min": 117.0,
    "released_on": date(1979, 5, 25),
    "languages": ["English"],
    "countries": ["UK", "US"],
    "oscars": 1,
    "status": "released",
}
NOTHING_YET = {"genres": [], "rating": None, "distribution": None, "directors": [], "writers": [], "cast": []}


def test_a_film_is_searchable_with_its_people_while_it_is_public() -> None:
    """The app by itself: no database, no index, the service's answers given here."""

    def people(call: Call) -> Any:
        known = [{"person_id": id_, "name": NAMES[id_]} for id_ in call.json["person_ids"] if id_ in NAMES]
        return {"people": known}

    with FakeService(people) as talent:
        talent.script(Status(503))
        assert_app(
            movies,
            given={"movie": [ALIEN, ALIEN | {"movie_id": 2, "status": "draft"}, ALIEN | {"movie_id": 3}]},
            changes=[
                [
                    insert("credit", movie_id=1, person_id=7, role="director", billing=1),
                    insert("credit", movie_id=1, person_id=9, role="cast", billing=2),
                    insert("credit", movie_id=1, person_id=404, role="cast", billing=1),
                ],
                insert("movie_genre", movie_id=1, genre="Horror"),
                insert("distribution", movie_id=1, distributor="Fox", box_office_usd=78.9),
                update("movie", movie_id=3, status="withdrawn"),
            ],
            then={
                1: ALIEN
                | NOTHING_YET
                | {
                    "genres": ["Horror"],
                    "distribution": {"distributor": "Fox", "box_office_usd": 78.9},
                    "directors": [{"person_id": 7, "name": "Ridley Scott"}],
                    "cast": [{"person_id": 9, "name": "Sigourney Weaver"}],
                }
            },
            settings={"talent_url": talent.url},
            patience_s=60,
        )


class Films:
    """A small studio: capture into its log, and run the app to the log's end."""

    def __init__(self, database: Database, config: Config) -> None:
        self.database = database
        self.config = config

    def source(self) -> "closing[PostgresSource]":
        return closing(PostgresSource("studio", self.config.source("studio")))

    def process(self) -> ProcessReport:
        folder = self.config.log_folder("studio")
        with self.source() as source, LocalLogWriter.open(folder) as writer:
            recorder.drain(source, writer, LocalLogReader(folder))
        with Runner.open(movies, config=self.config, name="movie_search") as runner:
            return runner.drain()

    def searchable(self) -> dict[int, Any]:
        """The documents in the index, of every film the database knows or knew."""
        reader = SearchReader(self.config.index_folder("movie_search"))
        keys = [key for (key,) in self.database.rows("select generate_series(0, 30000)")]
        return {int(hit.key): hit.body for hit in reader.documents(keys)}

    def in_log_of_lake(self) -> dict[int, Any]:
        """The documents that a load would bring into the lake: per key the largest identity wins."""
        newest: dict[int, tuple[tuple[int, int], Any]] = {}
        for group in LocalLogReader(self.config.log_folder("movie_search")).read(after_sequence=-1):
            for row in (row for batch in group.batches for row in batch.rows.to_pylist()):
                identity = (row["_commit"], row["_ordinal"])
                body = None if row["_op"] == "d" else {key: row[key] for key in row if not key.startswith("_")}
                if row["movie_id"] not in newest or newest[row["movie_id"]][0] <= identity:
                    newest[row["movie_id"]] = identity, body
        found = {key: body for key, (_, body) in newest.items() if body is not None}
        return json.loads(json.dumps(found, default=str), object_hook=_with_numbers)


def _with_numbers(values: dict[str, Any]) -> dict[Any, Any]:
    return {int(key) if key.isdigit() else key: value for key, value in values.items()}


@pytest.fixture
def films(database: Database, few_films: Path, tmp_path: Path) -> Iterator[Films]:
    load(database.dsn, path=few_films)
    database.execute("update movie set status = 'draft' where movie_id = (select min(movie_id) from movie)")
    port = free_port()
    config = Config.model_validate(
        {
            "home": tmp_path / "home",
            "sources": {"studio": {"kind": "postgres", "dsn": database.dsn, "tables": TABLES, "slot": database.name}},
            "apps": {
                "movie_search": {
                    "module": "studio.movie_search:movies",
                    "source": "studio",
                    "settings": {"talent_url": f"http://127.0.0.1:{port}"},
                }
            },
        }
    )
    command = [sys.executable, "-m", "studio.talent", "--port", str(port), "--dsn", database.dsn]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as service:
        _wait_for(port)
        yield Films(database, config)
        service.terminate()


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).raise_for_status()
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("the Talent Service did not start")


def test_the_app_fits_the_studios_database(films: Films) -> None:
    with films.source() as source:
        movies.check(source.tables())


def test_every_public_film_is_searchable_and_in_the_lakes_log_with_its_people(films: Films) -> None:
    report = films.process()

    wanted = expected(films.database)
    assert len(wanted) > 40
    assert films.searchable() == wanted
    assert films.in_log_of_lake() == wanted
    assert (report.documents, report.held, report.dead) == (len(wanted), 0, 0)

    films.database.execute(
        "update person set name = 'Somebody Else' where person_id = (select min(person_id) from credit)",
        "update movie set status = 'released' where status = 'draft'",
        "update movie set status = 'withdrawn' where movie_id = (select max(movie_id) from movie)",
        "delete from movie where movie_id = (select max(movie_id) - 1 from movie) or title like 'T%'",
        "insert into movie (movie_id, title, status) values (29998, 'A New Film', 'released')",
        "update movie set movie_id = 29999 where movie_id = 29998",
        "update rating set imdb_votes = 1000, imdb_rating = 7.5",
        "delete from credit where credit_id % 7 = 0",
    )
    films.process()

    wanted = expected(films.database)
    assert films.searchable() == wanted
    assert films.in_log_of_lake() == wanted
