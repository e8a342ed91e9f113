"""The studio's own suites hold on sound data and each finds its fault."""

from pathlib import Path

import pytest

from deltaworks.gate.expectation import run_suites
from deltaworks.gate.suite import load_suites
from deltaworks.store.lake import Lake

SUITES = load_suites(Path(__file__).parents[2] / "assets" / "expectations.yaml")

SOUND = """
create schema lake.studio; create schema lake.movie_search; create schema lake.deltaworks;
create table lake.deltaworks.load (log varchar, position ubigint);
insert into lake.deltaworks.load values ('studio', 100), ('movie_search', 100);
create table lake.studio.movie as
select i::int as movie_id, 'tt000000' || i as imdb_id, 'film ' || i as title, 1990::smallint as year,
       90.5::decimal(6, 1) as runtime_min, 0::smallint as oscars, if(i = 9, 'draft', 'released') as status,
       i::ubigint as _commit
from range(1, 10) r(i);
create table lake.studio.movie_genre as select movie_id, 'Drama' as genre from lake.studio.movie;
create table lake.studio.person as select i::int as person_id, 'name ' || i as name from range(1, 4) r(i);
create table lake.studio.credit as
select i::bigint as credit_id, i::int as movie_id, 1::int as person_id, 'cast' as role, 1::smallint as billing
from range(1, 10) r(i);
create table lake.studio.rating as
select movie_id, 7.5::decimal(3, 1) as imdb_rating, 10::int as imdb_votes, null::smallint as metascore,
       50::smallint as tomato_meter, null::decimal(3, 1) as tomato_rating, 3::int as tomato_reviews,
       60::smallint as user_meter, 3.25::decimal(3, 2) as user_rating, 4::int as user_reviews
from lake.studio.movie;
create table lake.studio.distribution as select movie_id, 1.5::decimal(14, 2) as box_office_usd from lake.studio.movie;
create table lake.movie_search.movies as
select movie_id, title, status from lake.studio.movie where status <> 'draft';
"""


@pytest.fixture
def studio(lake: Lake) -> Lake:
    lake.commit(lambda connection: connection.execute(SOUND), message="sound", info=lambda _: {})
    return lake


def failing(lake: Lake) -> list[str]:
    return [result.name for result in run_suites(lake, SUITES) if not result.is_success]


def test_sound_data_passes(studio):
    assert failing(studio) == []


@pytest.mark.parametrize(
    ("fault", "found_by"),
    [
        ("insert into lake.studio.movie from lake.studio.movie where movie_id = 1", ["movie_key"]),
        ("update lake.studio.movie set title = null where movie_id = 1", ["movie_values"]),
        ("update lake.studio.movie set year = 1789 where movie_id = 1", ["movie_values"]),
        ("update lake.studio.movie set status = 'lost' where movie_id = 1", ["movie_values"]),
        ("insert into lake.studio.movie_genre values (1, 'Drama')", ["movie_genre_key"]),
        ("insert into lake.studio.movie_genre values (99, 'Drama')", ["movie_genre_has_movie"]),
        ("update lake.studio.person set name = 'name 2' where person_id = 1", ["person_key"]),
        ("update lake.studio.credit set credit_id = 2 where credit_id = 1", ["credit_key"]),
        ("update lake.studio.credit set role = 'extra' where credit_id = 1", ["credit_values"]),
        ("update lake.studio.credit set billing = 0 where credit_id = 1", ["credit_values"]),
        ("insert into lake.studio.credit values (50, 1, 1, 'cast', 2)", ["credit_is_unique"]),
        ("update lake.studio.credit set movie_id = 99 where credit_id = 1", ["credit_has_movie"]),
        ("update lake.studio.credit set person_id = 99 where credit_id = 1", ["credit_has_person"]),
        ("update lake.studio.rating set imdb_rating = 10.1 where movie_id = 1", ["rating_values"]),
        ("update lake.studio.rating set tomato_meter = 101 where movie_id = 1", ["rating_values"]),
        ("update lake.studio.rating set imdb_votes = -1 where movie_id = 1", ["rating_values"]),
        ("update lake.studio.rating set movie_id = 99 where movie_id = 1", ["rating_has_movie"]),
        ("update lake.studio.distribution set box_office_usd = -1 where movie_id = 1", ["distribution_key"]),
        ("update lake.studio.distribution set movie_id = 99 where movie_id = 1", ["distribution_has_movie"]),
        ("update lake.movie_search.movies set title = null where movie_id = 1", ["document_key"]),
        ("update lake.movie_search.movies set status = 'draft' where movie_id = 1", ["document_key"]),
        ("delete from lake.movie_search.movies where movie_id = 1", ["document_of_every_movie"]),
    ],
)
def test_a_fault_is_found_by_the_suite_that_promises_it(studio, fault, found_by):
    studio.connection.execute(fault)
    assert failing(studio) == found_by


def test_a_film_that_the_app_has_not_reached_needs_no_document_yet(studio):
    studio.connection.execute("update lake.studio.movie set _commit = 101 where movie_id = 1")
    studio.connection.execute("delete from lake.movie_search.movies where movie_id = 1")
    assert failing(studio) == []


def test_an_app_that_is_ahead_may_have_dropped_a_few_films_but_not_many(studio):
    studio.connection.execute("update lake.deltaworks.load set position = 200 where log = 'movie_search'")
    studio.connection.execute("delete from lake.movie_search.movies where movie_id = 1")
    assert failing(studio) == []
    studio.connection.execute(
        "insert into lake.studio.movie select i, 'tt1000000', 'more', 1990, 90.5, 0, 'released', 50"
        " from range(100, 151) r(i)"
    )
    assert failing(studio) == ["document_of_every_movie"]
