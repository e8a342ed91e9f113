"""The app `movie_search`: films with their people, in a search index and in the lake.

    movie + genres, credits, rating, distribution ──► who they are (Talent Service) ──► index, lake

A change of a film, of anything that belongs to it, or of a person in it makes its document anew.
"""

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any, TypedDict

import httpx

from deltaworks.process.app import App, Backoff, Breaker, Source, Ttl
from deltaworks.process.connections import http_client
from deltaworks.process.entity import Entity
from deltaworks.store.lake_table import LakeTable
from deltaworks.store.search import Display, Fact, SearchIndex

# What is read: the columns, as Python types.


@dataclass(frozen=True, slots=True)
class Movie:
    """A film."""

    title: str
    year: int | None
    certificate: str | None
    runtime_min: float | None
    released_on: date | None
    languages: list[str]
    countries: list[str]
    oscars: int
    status: str


@dataclass(frozen=True, slots=True)
class Genre:
    """One genre of a film."""

    genre: str


@dataclass(frozen=True, slots=True)
class Credit:
    """What a person did for a film."""

    person_id: int
    role: str
    billing: int


@dataclass(frozen=True, slots=True)
class Rating:
    """What public and critics think of a film."""

    imdb_rating: float | None
    imdb_votes: int | None
    metascore: int | None
    tomato_meter: int | None
    tomato_rating: float | None
    tomato_reviews: int | None
    user_rating: float | None


@dataclass(frozen=True, slots=True)
class Distribution:
    """How a film reached its public."""

    distributor: str | None
    box_office_usd: float | None


# What is written: a document for each film.


class Person(TypedDict):
    """Somebody who worked on a film."""

    person_id: int
    name: str


class Ratings(TypedDict):
    """The marks of a film."""

    imdb: float | None
    votes: int | None
    metascore: int | None
    tomato_meter: int | None
    tomato_rating: float | None
    tomato_reviews: int | None
    users: float | None


class Takings(TypedDict):
    """Who brought the film out, and what it took."""

    distributor: str | None
    box_office_usd: float | None


class Film(TypedDict):
    """A film as it is searched and as the lake holds it."""

    movie_id: int
    title: str
    year: int | None
    certificate: str | None
    runtime_min: float | None
    released_on: date | None
    status: str
    oscars: int
    genres: list[str]
    languages: list[str]
    countries: list[str]
    rating: Ratings | None
    distribution: Takings | None
    directors: list[Person]
    writers: list[Person]
    cast: list[Person]


studio = Source("studio")
genre = studio.table("movie_genre", schema=Genre)
credit = studio.table("credit", schema=Credit)
rating = studio.table("rating", schema=Rating)
distribution = studio.table("distribution", schema=Distribution)
movies = App(
    "movie_search",
    key="movie_id",
    sources=[studio.table("movie", schema=Movie), genre, credit, rating, distribution],
)


@movies.client
async def talent(settings: Mapping[str, Any]) -> AsyncIterator[httpx.AsyncClient]:
    """The Talent Service."""
    async with http_client(settings["talent_url"]) as client:
        yield client


@movies.filter
def is_public(movie: Entity[Movie]) -> bool:
    """Drafts and withdrawn films are nobody's business."""
    return movie.after.status not in ("draft", "withdrawn")


@movies.enrich(
    into="people",
    key=lambda movie: [item.person_id for item in movie.rows(credit)],
    batch=500,
    concurrency=4,
    timeout_s=5.0,
    retry=Backoff(first_s=0.2, max_s=10.0),
    breaker=Breaker(failures=20, open_s=5.0),
    cache=Ttl(3600, max_items=200_000),
    lookup=studio.table("person", key="person_id"),
)
async def people(person_ids: list[int], talent: httpx.AsyncClient) -> dict[int, Person]:
    """Who these people are; numbers that the service does not know are left out."""
    answer = await talent.post("/people", json={"person_ids": person_ids})
    found = answer.raise_for_status().json()["people"]
    return {person["person_id"]: Person(person_id=person["person_id"], name=person["name"]) for person in found}


@movies.transform
def film(movie: Entity[Movie]) -> Film:
    """The document of a film."""
    after, marks, takings = movie.after, movie.row(rating), movie.row(distribution)
    return Film(
        movie_id=movie.key,
        title=after.title,
        year=after.year,
        certificate=after.certificate,
        runtime_min=after.runtime_min,
        released_on=after.released_on,
        status=after.status,
        oscars=after.oscars,
        genres=[item.genre for item in movie.rows(genre)],
        languages=after.languages,
        countries=after.countries,
        rating=None if marks is None else _ratings(marks),
        distribution=None
        if takings is None
        else Takings(distributor=takings.distributor, box_office_usd=takings.box_office_usd),
        directors=_people(movie, "director"),
        writers=_people(movie, "writer"),
        cast=_people(movie, "cast"),
    )


movies.sink(
    SearchIndex(
        "movies",
        text={"title": 4.0, "directors.name": 2.0, "cast.name": 2.0, "writers.name": 1.0, "genres": 1.0},
        popularity="rating.tomato_reviews",
        display=Display(
            title="title",
            line=(Fact("year", "year"), Fact("runtime", "runtime_min", "{:.0f} min"), Fact("rated", "certificate")),
            tags=("genres",),
            facts=(
                Fact("IMDb", "rating.imdb", "{:.1f}"),
                Fact("votes", "rating.votes", "{:,}"),
                Fact("critics", "rating.tomato_meter", "{} %"),
                Fact("box office", "distribution.box_office_usd", "${:,.0f}"),
            ),
            people=(Fact("directed by", "directors.name"), Fact("with", "cast.name")),
            details=(
                Fact("written by", "writers.name"),
                Fact("released", "released_on"),
                Fact("distributor", "distribution.distributor"),
                Fact("languages", "languages"),
                Fact("countries", "countries"),
                Fact("Oscars", "oscars"),
                Fact("status", "status"),
            ),
        ),
    )
)
movies.sink(LakeTable("movies", schema=Film))


def _ratings(marks: Rating) -> Ratings:
    return Ratings(
        imdb=marks.imdb_rating,
        votes=marks.imdb_votes,
        metascore=marks.metascore,
        tomato_meter=marks.tomato_meter,
        tomato_rating=marks.tomato_rating,
        tomato_reviews=marks.tomato_reviews,
        users=marks.user_rating,
    )


def _people(movie: Entity[Movie], role: str) -> list[Person]:
    """The people of one role by billing; one whom the service does not know yet is left out."""
    credits_ = sorted((item for item in movie.rows(credit) if item.role == role), key=lambda item: item.billing)
    return [movie["people"][item.person_id] for item in credits_ if item.person_id in movie["people"]]
