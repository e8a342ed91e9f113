"""The app under test: films, their roles, and the people a service knows."""

from collections.abc import Mapping
from typing import Any, TypedDict

import httpx
from process.material import INT, NULL_TEXT, TEXT, TableSink, table_schema

from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Entity

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT, note=NULL_TEXT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=INT, person_id=INT)
PERSON = table_schema("person", "person_id", person_id=INT, name=TEXT)


class Film(TypedDict):
    title: str
    status: str


class Role(TypedDict):
    person_id: int


class Document(TypedDict):
    title: str
    cast: list[str]


studio = Source("studio")


def film_app(sink: TableSink, **enrich: Any) -> App:
    role = studio.table("role", schema=Role)
    films = App("films", key="film_id", sources=[studio.table("film", schema=Film), role])

    @films.client
    async def names(settings: Mapping[str, Any]) -> Any:
        async with httpx.AsyncClient(base_url=settings["url"]) as client:
            yield client

    @films.filter
    def is_public(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    options = {"retry": Backoff(first_s=0.01, max_s=0.05), "timeout_s": 30.0} | enrich

    @films.enrich(
        into="people",
        key=lambda film: [item["person_id"] for item in film.rows(role)],
        lookup=studio.table("person", key="person_id"),
        **options,
    )
    async def people(ids: list[int], names: httpx.AsyncClient) -> dict[int, str]:
        answer = (await names.post("/", json={"ids": ids})).raise_for_status()
        return {int(id_): name for id_, name in answer.json().items()}

    @films.transform
    def document(film: Entity[Film]) -> Document:
        return {"title": film.after["title"], "cast": list(film["people"].values())}

    films.sink(sink)
    return films
