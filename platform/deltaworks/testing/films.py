"""The app that the examples in docstrings declare their steps on."""

from typing import TypedDict

from deltaworks.process.app import App, Source


class Film(TypedDict):
    """A row of the table `film`."""

    title: str
    status: str
    year: int
    released_on: str
    person_ids: list[int]


def films_app() -> App:
    """A new app over one table, without a step.

    >>> films_app().entity.name.short
    'film'
    """
    return App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
