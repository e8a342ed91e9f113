"""Declaring an app: what is wrong is said at once, with the place."""

import re
from datetime import date, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypedDict

import pyarrow as pa
import pytest
from process.material import INT, TEXT, TableSink, table_schema

from deltaworks.config import Config
from deltaworks.process.app import App, Source, count
from deltaworks.process.arrow import SqlStepError
from deltaworks.process.check import AppError
from deltaworks.process.registry import load_app
from deltaworks.process.shape import ShapeError
from deltaworks.process.source import SchemaMismatchError

studio = Source("studio")
HERE = re.escape(__file__)


class Film(TypedDict):
    title: str


class WideFilm(TypedDict):
    title: str
    year: int | None
    runtime: Decimal
    released_on: date
    tags: list[str]


def films() -> App:
    return App("films", key="film_id", sources=[studio.table("film", schema=Film)])


def test_a_wrong_option_names_app_step_file_line_and_value() -> None:
    with pytest.raises(AppError, match=rf"app 'films', step 'people' \({HERE}:\d+\): batch must be .* got 0"):

        @films().enrich(into="people", key=lambda film: film.key, batch=0)
        def people(ids: list[int]) -> dict[int, str]:
            return {}


@pytest.mark.parametrize(
    ("declare", "fault"),
    [
        (lambda app: app.project("year"), "step 'project' .*no column 'year' is declared of film; known: title"),
        (lambda app: app.project(), "step 'project' .*name at least one field"),
        (
            lambda app: (app.project("title"), app.enrich(into="x", key=lambda film: 1)(lambda ids: {})),
            "an enrichment sees entities, so declare it before 'project'",
        ),
        (lambda app: (app.dedup(), app.project("title")), "dedup at .* looks at what leaves, so declare it last"),
        (lambda app: app.window(time="title", size=timedelta(0), n=count()), "size must be more than 0"),
        (lambda app: app.window(time="title", size=timedelta(1)), "give aggregates by name"),
        (lambda app: app.window(time="title", size=timedelta(1), when_closed=True, n=count()), "needs lateness="),
        (
            lambda app: (app.window(time="title", size=timedelta(1), n=count()), app.dedup()),
            "nothing comes after the window",
        ),
    ],
)
def test_steps_that_cannot_follow_each_other_are_refused_where_they_stand(declare: Any, fault: str) -> None:
    with pytest.raises(AppError, match=rf"app 'films', step .*{HERE}:\d+\): .*|{fault}") as raised:
        declare(films())
    assert re.search(fault, str(raised.value))
    assert re.search(HERE, str(raised.value))


def test_a_query_is_tried_out_before_the_first_change(tmp_path: Path) -> None:
    for query, fault in (
        ("select _key, tittle from film", '"tittle" not found'),
        ("select title from film", "it selects title; select _key too"),
        ("select _key from read_csv('/etc/passwd')", "disabled"),
    ):
        app = films()
        app.sink(TableSink(tmp_path / "sink"))
        app.sql(query)
        with pytest.raises(SqlStepError, match=rf"step 'sql' \({HERE}:\d+\): (?s:.*){fault}"):
            app.validate()


def test_a_route_that_declares_where_it_goes_is_compared_with_the_sinks(tmp_path: Path) -> None:
    app = films()
    app.sink(TableSink(tmp_path / "sink"))

    @app.route
    def where(film: Any) -> Literal["table", "lake"] | None:
        return None

    with pytest.raises(AppError, match=rf"step 'where' \({HERE}:\d+\): no sink 'lake'; known: table"):
        app.validate()


def test_two_enrichments_cannot_go_into_one_name() -> None:
    app = films()
    app.enrich(into="people", key=lambda film: 1)(lambda ids: {})

    with pytest.raises(AppError, match="another enrichment goes into 'people'"):
        app.enrich(into="people", key=lambda film: 1)(lambda ids: {})


def test_a_watched_column_must_be_declared() -> None:
    with pytest.raises(AppError, match="no column 'status' is declared of film; known: title"):
        films().on_change("status")(lambda transition: None)


def test_a_step_that_asks_for_an_unknown_client_is_refused_before_it_runs(tmp_path: Path) -> None:
    app = films()
    app.sink(TableSink(tmp_path / "sink"))

    @app.transform
    def document(film: Any, talent: Any) -> dict[str, Any]:
        return {}

    with pytest.raises(AppError, match=r"step 'document' .*no client 'talent'; known: none"):
        app.validate()


def test_an_app_without_a_sink_is_refused() -> None:
    with pytest.raises(AppError, match="app 'films' has no sink"):
        films().validate()


@pytest.mark.parametrize(
    ("tables", "fault"),
    [
        ([], "has no tables"),
        ([studio.table("film")], "table 'film': no schema="),
        ([studio.table("film", schema=Film), Source("other").table("role", schema=Film)], "one app, one source"),
        ([studio.table("film", schema=Film), studio.table("film", schema=Film)], "lists table 'film' twice"),
        ([studio.table("film", key="title", schema=Film)], "key is 'title', the app's is 'film_id'"),
    ],
)
def test_tables_that_cannot_be_joined_are_refused(tables: list[Any], fault: str) -> None:
    with pytest.raises(AppError, match=fault):
        App("films", key="film_id", sources=tables)


def test_a_type_that_no_column_is_read_as_is_refused_where_it_is_declared() -> None:
    class Odd(TypedDict):
        title: set[str]

    with pytest.raises(ShapeError, match=r"Odd\.title: no column is read or written as set\[str\]"):
        studio.table("film", schema=Odd)


def test_every_fault_of_every_table_is_listed(tmp_path: Path) -> None:
    role = studio.table("role", schema=Film)
    app = App("films", key="film_id", sources=[studio.table("film", schema=WideFilm), role])
    app.sink(TableSink(tmp_path / "sink"))
    person = studio.table("person", key="name")
    app.enrich(into="people", key=lambda film: 1, lookup=person)(lambda ids: {})
    film = table_schema(
        "film",
        "film_id",
        film_id=INT,
        title=(pa.string(), "text", True),
        runtime=(pa.string(), "numeric", False),
        released_on=(pa.date32(), "date", False),
        tags=(pa.list_(pa.int32()), "integer[]", False),
    )

    with pytest.raises(SchemaMismatchError) as raised:
        app.check([film, table_schema("person", "person_id", person_id=INT, name=TEXT)])

    assert str(raised.value).splitlines() == [
        "app 'films' does not fit source 'studio', 6 to mend:",
        "  - public.film.title: declared str, found text (string, nullable)",
        "  - public.film.year: declared int | None, found no such column; there are film_id, title, runtime, "
        "released_on, tags",
        "  - public.film.runtime: declared Decimal, found numeric (string)",
        "  - public.film.tags: declared list[str], found integer[] (list<item: int32>)",
        "  - public.role.*: declared a table, found not captured; known: film, person",
        "  - public.person.name: declared the table's key, found the key is person_id",
    ]


def test_an_app_is_found_by_the_name_in_the_configuration(make_config: Any) -> None:
    def config(module: str) -> Config:
        made: Config = make_config("films")
        return made.model_copy(update={"apps": {"films": made.apps["films"].model_copy(update={"module": module})}})

    assert load_app(config("studio.movie_search:movies"), "films").name == "movie_search"
    with pytest.raises(AppError, match=r"no app 'films' in 'studio\.movie_search'; it has movies"):
        load_app(config("studio.movie_search:films"), "films")
    with pytest.raises(AppError, match="cannot import app 'films' from 'nowhere:films'"):
        load_app(config("nowhere:films"), "films")
