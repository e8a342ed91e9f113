"""A cache kept warm: Redis has what the film page shows before anyone asks, and hears of each commit.

The entry of film 7 is the hash `film:7`. A film that is withdrawn leaves at once; an entry that nothing changes
lives an hour.
"""

from typing import TypedDict

from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity
from deltaworks.store.sinks.redis_cache import RedisCache


class Movie(TypedDict):
    title: str
    status: str


class Credit(TypedDict):
    person_id: int
    role: str


class Page(TypedDict):
    title: str
    cast: list[int]


studio = Source("studio")
credit = studio.table("credit", schema=Credit)
films = App("warm_cache", key="movie_id", sources=[studio.table("movie", schema=Movie), credit])


@films.filter
def is_public(film: Entity[Movie]) -> bool:
    """Only what visitors may see is worth its place."""
    return film.after["status"] == "released"


@films.transform
def page(film: Entity[Movie]) -> Page:
    """What the page shows."""
    return Page(
        title=film.after["title"], cast=[item["person_id"] for item in film.rows(credit) if item["role"] == "cast"]
    )


films.sink(RedisCache("film", connection="cache", ttl_s=3600))
