"""A warehouse table in step with its source: one row for each film, with its rating, as the warehouse wants it.

`deltaworks process warehouse_sync` keeps `mart.film` of the connection `warehouse` in step with each commit.
"""

from datetime import date
from typing import TypedDict

from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.sinks.postgres_table import PostgresTable


class Movie(TypedDict):
    title: str
    released_on: date | None
    status: str


class Rating(TypedDict):
    imdb_rating: float | None


class FilmRow(TypedDict):
    movie_id: int
    title: str
    year: int | None
    rating: float | None
    is_public: bool


studio = Source("studio")
rating = studio.table("rating", schema=Rating)
films = App("warehouse_sync", key="movie_id", sources=[studio.table("movie", schema=Movie), rating])


@films.transform
def row(film: Entity[Movie]) -> FilmRow:
    """The film as the warehouse has it."""
    released, marks = film.after["released_on"], film.row(rating)
    return FilmRow(
        movie_id=film.key,
        title=film.after["title"],
        year=None if released is None else released.year,
        rating=None if marks is None else marks["imdb_rating"],
        is_public=film.after["status"] == "released",
    )


films.sink(PostgresTable("mart.film", connection="warehouse", schema=FilmRow))
