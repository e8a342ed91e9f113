"""Whatever happens: the sink ends at the fold of the tables, and no document ever goes back."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypedDict

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process.material import (
    INT,
    NULL_INT,
    NULL_TEXT,
    TEXT,
    Change,
    create,
    delete,
    read,
    table_schema,
    truncate,
    update,
)
from process.mortal import CRASH_POINTS, Mortal, quick_folder

from deltaworks.errors import RetryableError
from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Entity

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT, note=NULL_TEXT)
ROLE = table_schema("role", "role_id", role_id=INT, film_id=NULL_INT, person_id=INT)
GENRE = table_schema("genre", "film_id,genre", film_id=INT, genre=TEXT)
PERSON = table_schema("person", "person_id", person_id=INT, name=TEXT)


class Film(TypedDict):
    title: str
    status: str


class Role(TypedDict):
    person_id: int


class Genre(TypedDict):
    genre: str


@dataclass
class Tables:
    """The source as it is now: what the app's result has to be equal to."""

    film: dict[int, dict[str, Any]] = field(default_factory=dict)
    role: dict[int, dict[str, Any]] = field(default_factory=dict)
    genre: set[tuple[int, str]] = field(default_factory=set)
    person: dict[int, str] = field(default_factory=dict)

    def documents(self) -> dict[int, Any]:
        return {
            film_id: {
                "title": film["title"],
                "genres": sorted(genre for of, genre in self.genre if of == film_id),
                "cast": [
                    [role["person_id"], self.person.get(role["person_id"])]
                    for _, role in sorted(self.role.items())
                    if role["film_id"] == film_id
                ],
            }
            for film_id, film in self.film.items()
            if film["status"] != "draft"
        }


def film_app(tables: Tables, troubles: "deque[str]") -> App:
    studio = Source("studio")
    role = studio.table("role", key="film_id", schema=Role)
    genre = studio.table("genre", key="film_id", schema=Genre)
    films = App("films", key="film_id", sources=[studio.table("film", schema=Film), role, genre])

    @films.filter
    def is_public(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    @films.enrich(
        into="people",
        key=lambda film: [item["person_id"] for item in film.rows(role)],
        batch=2,
        retry=Backoff(first_s=0.0005, max_s=0.001),
        lookup=studio.table("person", key="person_id"),
    )
    async def people(ids: list[int]) -> dict[int, str]:
        trouble = troubles.popleft() if troubles else "none"
        if trouble == "retryable":
            raise RetryableError("the service is away")
        if trouble == "terminal":
            raise ValueError("a step that is wrong")
        return {id_: tables.person[id_] for id_ in ids if id_ in tables.person}

    @films.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        return {
            "title": film.after["title"],
            "genres": [item["genre"] for item in film.rows(genre)],
            "cast": [[item["person_id"], film["people"].get(item["person_id"])] for item in film.rows(role)],
        }

    return films


# What may happen in the source, on small numbers so that things meet.

small = st.integers(1, 3)
word = st.sampled_from(["a", "b", "c"])
status = st.sampled_from(["draft", "released"])
operation = st.one_of(
    st.tuples(st.just("put_film"), small, word, status),
    st.tuples(st.just("title_only"), small, word),
    st.tuples(st.just("note_only"), small, word),
    st.tuples(st.just("drop_film"), small),
    st.tuples(st.just("move_film"), small, small),
    st.tuples(st.just("swap_films"), small, small),
    st.tuples(st.just("put_role"), small, st.none() | small, small),
    st.tuples(st.just("role_elsewhere"), small, small),
    st.tuples(st.just("move_role"), small, small),
    st.tuples(st.just("drop_role"), small),
    st.tuples(st.just("put_genre"), small, word),
    st.tuples(st.just("drop_genre"), small, word),
    st.tuples(st.just("put_person"), small, word),
    st.tuples(st.just("drop_person"), small),
    st.tuples(st.just("move_person"), small, small),
    st.tuples(st.just("dump"), st.sampled_from(["film", "role", "genre", "person"])),
    st.tuples(st.just("truncate"), st.sampled_from(["film", "role", "genre", "person"])),
)
commit = st.tuples(st.just("commit"), st.lists(operation, min_size=1, max_size=5))
after_it = st.one_of(
    st.just(("drain",)),
    st.just(("read on",)),
    st.just(("reopen",)),
    st.tuples(st.just("crash"), st.sampled_from(CRASH_POINTS), st.integers(1, 3)),
    st.tuples(st.just("trouble"), st.lists(st.sampled_from(["none", "retryable", "terminal"]), min_size=1, max_size=4)),
)

FIRST_STATE = [
    ("put_film", 1, "a", "released"),
    ("put_film", 2, "b", "released"),
    ("put_role", 1, 1, 1),
    ("put_role", 2, 1, 2),
    ("put_role", 3, 2, 1),
    ("put_genre", 1, "a"),
    ("put_genre", 2, "b"),
    ("put_person", 1, "a"),
    ("put_person", 2, "b"),
]


def changes_of(tables: Tables, op: Any) -> Iterator[Change]:
    """Carry an operation out on the tables, and give the changes it makes; none where it makes no sense."""
    match op:
        case ("put_film", film_id, title, state):
            known = film_id in tables.film
            tables.film[film_id] = {"film_id": film_id, "title": title, "status": state, "note": None}
            yield (update if known else create)(FILM, **tables.film[film_id])
        case ("title_only", film_id, title) if film_id in tables.film:
            tables.film[film_id]["title"] = title
            yield update(FILM, film_id=film_id, title=title, unchanged=["status", "note"])
        case ("note_only", film_id, note) if film_id in tables.film:
            tables.film[film_id]["note"] = note
            yield update(FILM, **tables.film[film_id])
        case ("drop_film", film_id) if film_id in tables.film:
            del tables.film[film_id]
            yield delete(FILM, film_id=film_id)
        case ("move_film", old, new) if old in tables.film and new not in tables.film:
            tables.film[new] = tables.film.pop(old) | {"film_id": new}
            yield update(FILM, film_id=new, old_key={"film_id": old}, title=None, unchanged=["title", "status"])
        case ("swap_films", one, two) if one != two and {one, two} <= tables.film.keys():
            rows = tables.film
            rows[one], rows[two] = rows[two] | {"film_id": one}, rows[one] | {"film_id": two}
            yield update(FILM, film_id=two, old_key={"film_id": one}, unchanged=["title", "status", "note"])
            yield update(FILM, film_id=one, old_key={"film_id": two}, unchanged=["title", "status", "note"])
        case ("put_role", role_id, film_id, person_id):
            known = role_id in tables.role
            tables.role[role_id] = {"role_id": role_id, "film_id": film_id, "person_id": person_id}
            yield (update if known else create)(ROLE, **tables.role[role_id])
        case ("role_elsewhere", role_id, film_id) if role_id in tables.role:
            tables.role[role_id]["film_id"] = film_id
            yield update(ROLE, role_id=role_id, film_id=film_id, unchanged=["person_id"])
        case ("move_role", old, new) if old in tables.role and new not in tables.role:
            tables.role[new] = tables.role.pop(old) | {"role_id": new}
            yield update(ROLE, role_id=new, old_key={"role_id": old}, unchanged=["film_id", "person_id"])
        case ("drop_role", role_id) if role_id in tables.role:
            del tables.role[role_id]
            yield delete(ROLE, role_id=role_id)
        case ("put_genre", film_id, genre) if (film_id, genre) not in tables.genre:
            tables.genre.add((film_id, genre))
            yield create(GENRE, film_id=film_id, genre=genre)
        case ("drop_genre", film_id, genre) if (film_id, genre) in tables.genre:
            tables.genre.discard((film_id, genre))
            yield delete(GENRE, film_id=film_id, genre=genre)
        case ("put_person", person_id, name):
            known = person_id in tables.person
            tables.person[person_id] = name
            yield (update if known else create)(PERSON, person_id=person_id, name=name)
        case ("drop_person", person_id) if person_id in tables.person:
            del tables.person[person_id]
            yield delete(PERSON, person_id=person_id)
        case ("move_person", old, new) if old in tables.person and new not in tables.person:
            tables.person[new] = tables.person.pop(old)
            yield update(PERSON, person_id=new, name=tables.person[new], old_key={"person_id": old})
        case ("dump", "film"):
            yield from (read(FILM, **row) for row in tables.film.values())
        case ("dump", "role"):
            yield from (read(ROLE, **row) for row in tables.role.values())
        case ("dump", "genre"):
            yield from (read(GENRE, film_id=film_id, genre=genre) for film_id, genre in sorted(tables.genre))
        case ("dump", "person"):
            yield from (read(PERSON, person_id=person_id, name=name) for person_id, name in tables.person.items())
        case ("truncate", name):
            getattr(tables, name).clear()
            yield truncate({"film": FILM, "role": ROLE, "genre": GENRE, "person": PERSON}[name])


class World(Mortal):
    """A source, its log, a sink, and a runner that dies and comes back."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.tables = Tables()
        self.troubles: deque[str] = deque()
        self.live(film_app(self.tables, self.troubles))

    def step(self, event: Any) -> None:
        match event:
            case ("commit", operations):
                changes = [change for operation in operations for change in changes_of(self.tables, operation)]
                if changes:
                    self.feed.commit(*changes)
            case ("trouble", found):
                self.troubles.extend(found)
                self.runner.drain(patience_s=0)
            case _:
                super().step(event)


@contextmanager
def world() -> Iterator[World]:
    with quick_folder() as folder:
        found = World(folder)
        try:
            yield found
        finally:
            found.runner.close()


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(commit, after_it), min_size=2, max_size=8))
def test_after_any_changes_faults_and_crashes_the_sink_equals_the_tables(events: list[Any]) -> None:
    with world() as it:
        it.step(("commit", FIRST_STATE))
        it.step(("drain",))
        for found in chain.from_iterable(events):
            # A document that went back would be raised by the sink.
            it.step(found)
        it.troubles.clear()

        it.runner.retry_dead()
        report = it.runner.drain(patience_s=5)

        assert it.sink.bodies() == it.tables.documents()
        assert (report.held, report.dead) == (0, 0)
