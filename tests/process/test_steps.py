"""Steps that raise, return what they did not declare, wait for changes, or come from a dataclass."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from threading import Barrier
from typing import Any, TypedDict

import pyarrow as pa
import pytest
from process.material import INT, TEXT, Feed, TableSink, create, delete, read, table_schema, update

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.memory import MemoryLog
from deltaworks.position import Lsn, Version
from deltaworks.process.app import App, Backoff, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.pipeline import Pipeline
from deltaworks.process.runner import Runner

MakeConfig = Callable[..., Config]

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT)
studio = Source("studio")


class Film(TypedDict):
    title: str
    status: str


@pytest.fixture
def app(sink: TableSink) -> App:
    found = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    found.sink(sink)
    return found


@pytest.fixture
def drain(app: App, make_config: MakeConfig, log: MemoryLog) -> Callable[..., Any]:
    """Open the app, drain, and close it; gives the report and the dead letters."""

    def run(**settings: Any) -> Any:
        with Runner.open(app, config=make_config(**settings), name="films", log=log.reader()) as runner:
            return runner.drain(patience_s=10), runner.dead()

    return run


def test_a_step_that_raises_makes_a_dead_letter_with_its_place_and_without_the_data(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    @app.transform
    def document(film: Entity[Film]) -> Film:
        if film.key == 1:
            raise ValueError(film.after["title"])
        return film.after

    feed.commit(*(create(FILM, film_id=number, title="secret", status="released") for number in (1, 2)))
    report, [letter] = drain()

    assert (report.documents, report.dead, sink.bodies().keys()) == (1, 1, {2})
    assert letter.error.startswith(f"ValueError at {__file__}:")
    assert "secret" not in letter.error


def test_a_step_that_raises_stop_iteration_ends_no_run(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    @app.filter
    def listed(film: Entity[Film]) -> bool:
        if film.key in (2, 5):
            next(iter(()))
        return film.key != 3

    feed.commit(*(create(FILM, film_id=number, title="a", status="released") for number in range(1, 6)))
    _, letters = drain()

    assert sink.bodies().keys() == {1, 4}
    assert [letter.key for letter in letters] == [2, 5]


def test_an_entity_that_a_step_took_for_another_is_set_back(app: App) -> None:
    @app.transform
    def document(film: Entity[Film]) -> Film:
        return film.after

    def swap(work: tuple[list[Any], list[Any]]) -> tuple[list[Any], list[Any]]:
        return tuple([each[1], *each[1:]] for each in work)

    now, version = datetime.now(UTC), Version(Lsn(1), 0)
    films = [Entity(key, Film(title="a", status="released"), version, now, {}) for key in (1, 2, 3)]
    faults.arm_handover("process.step", swap)
    outcome = asyncio.run(Pipeline(app, name="films", clients={}).run_entities(films, gone=[]))

    assert [(setback.key, setback.step) for setback in outcome.setbacks] == [(1, "document")]


def test_a_document_that_is_not_as_declared_is_a_dead_letter(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    class Document(TypedDict):
        title: str
        tags: list[str]

    @app.transform
    def document(film: Entity[Film]) -> Document:
        wrong: Any = {1: {"title": "a", "tags": ["x", 2]}, 2: {"title": "a"}, 3: {"title": "a", "tags": []}}
        return wrong[film.key]

    feed.commit(*(create(FILM, film_id=number, title="a", status="released") for number in (1, 2, 3)))
    _, letters = drain()

    assert sink.bodies().keys() == {3}
    assert [letter.error.split(" (")[0] for letter in letters] == [
        "returned a document that is not as declared, .tags[1]: expected str, got int",
        "returned a document that is not as declared, Document: missing ['tags'], not declared []",
    ]


def test_filters_and_transforms_may_be_async_and_wait_for_what_may_pass(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    tries = 0

    @app.filter
    async def is_public(film: Entity[Film]) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise RetryableError("not yet")
        return True

    @app.transform
    async def document(film: Entity[Film]) -> Film:
        return film.after

    feed.commit(create(FILM, film_id=1, title="a", status="released"))
    report, letters = drain()

    assert (tries, report.retried, letters, sink.bodies().keys()) == (3, 2, [], {1})


def test_a_plain_function_may_enrich_and_block_without_stopping_the_others(
    app: App, feed: Feed, sink: TableSink, drain: Callable[..., Any]
) -> None:
    together = Barrier(4)

    @app.enrich(into="lengths", key=lambda film: film.after["title"], batch=1, concurrency=4)
    def lengths(titles: list[str]) -> dict[str, int]:
        together.wait(timeout=10)
        return {title: len(title) for title in titles}

    @app.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        return {"length": film["lengths"]}

    feed.commit(*(create(FILM, film_id=n, title="a" * n, status="released") for n in (1, 2, 3, 4)))
    drain()

    assert sink.bodies() == {n: {"length": n} for n in (1, 2, 3, 4)}


def test_clients_are_opened_once_and_closed_in_reverse(app: App, feed: Feed, drain: Callable[..., Any]) -> None:
    seen: list[str] = []

    @app.client
    def first(settings: Mapping[str, Any]) -> Iterator[str]:
        seen.append("open first")
        yield settings["word"]
        seen.append("close first")

    @app.client
    async def second(settings: Mapping[str, Any]) -> Any:
        seen.append("open second")
        yield "second"
        seen.append("close second")

    @app.client
    def third(settings: Mapping[str, Any]) -> str:
        return "third"

    @app.transform
    def document(film: Entity[Film], first: str, second: str, third: str) -> dict[str, Any]:
        seen.append(f"{first} {second} {third}")
        return {}

    feed.commit(create(FILM, film_id=1, title="a", status="released"))
    drain(word="hello")

    # A transform may run more than once for one change.
    told = list(dict.fromkeys(seen))
    assert told == ["open first", "open second", "hello second third", "close second", "close first"]
    assert seen.count("open first") == seen.count("close second") == 1


@dataclass(frozen=True, slots=True)
class Everything:
    """One column of each type."""

    whole: int
    real: float | None
    rounded: float
    exact: Decimal
    yes: bool
    day: date
    moment: datetime
    raw: bytes
    words: list[str]
    days: list[date] | None


def test_a_step_sees_every_declared_type_as_the_source_has_it(
    sink: TableSink, make_config: MakeConfig, feed: Feed, log: MemoryLog
) -> None:
    table = table_schema(
        "thing",
        "film_id",
        film_id=INT,
        whole=(pa.int64(), "bigint", False),
        real=(pa.float64(), "double precision", True),
        rounded=(pa.decimal128(10, 2), "numeric(10,2)", False),
        exact=(pa.decimal128(10, 2), "numeric(10,2)", False),
        yes=(pa.bool_(), "boolean", False),
        day=(pa.date32(), "date", False),
        moment=(pa.timestamp("us", "UTC"), "timestamptz", False),
        raw=(pa.binary(), "bytea", False),
        words=(pa.list_(pa.string()), "text[]", False),
        days=(pa.list_(pa.date32()), "date[]", True),
    )
    row = {
        "whole": 2**62,
        "real": 0.1,
        "rounded": Decimal("6.80"),
        "exact": Decimal("-1.10"),
        "yes": True,
        "day": date(2026, 2, 28),
        "moment": datetime(2026, 1, 1, 12, 30, 0, 123456, tzinfo=UTC),
        "raw": b"\x00\xff",
        "words": ["a", "ß"],
        "days": [date(1999, 12, 31)],
    }
    app = App("films", key="film_id", sources=[studio.table("thing", schema=Everything)])
    app.sink(sink)
    seen: list[Everything] = []

    @app.transform
    def document(thing: Entity[Everything]) -> dict[str, Any]:
        seen.append(thing.after)
        return {}

    feed.commit(create(table, film_id=1, **row))
    with Runner.open(app, config=make_config(), name="films", log=log.reader()) as runner:
        runner.drain()

    assert seen[0] == Everything(**row | {"rounded": 6.8})


# Steps under on_change


@pytest.fixture
def announced(app: App) -> list[Transition[Film]]:
    found: list[Transition[Film]] = []

    @app.on_change("status", to="released", retry=Backoff(first_s=0.001, max_s=0.001))
    async def announce(transition: Transition[Film]) -> None:
        found.append(transition)

    return found


def test_a_transition_is_told_once_for_each_change_to_the_wanted_value(
    feed: Feed, announced: list[Transition[Film]], drain: Callable[..., Any]
) -> None:
    feed.commit(read(FILM, film_id=1, title="seen by the dump", status="released"))
    feed.commit(create(FILM, film_id=2, title="a", status="released"))
    feed.commit(update(FILM, film_id=2, title="b", status="released"))
    feed.commit(update(FILM, film_id=2, title="b", status="draft"))
    last = feed.commit(update(FILM, film_id=2, title="c", status="released"), delete(FILM, film_id=1))
    report, _ = drain()
    drain()

    assert [(found.key, found.before, found.after["title"]) for found in announced] == [
        (2, None, "a"),
        (2, "draft", "c"),
    ]
    assert (report.turns, announced[1].id) == (2, f"films:announce:2:{last}:0")


def test_a_transition_whose_step_died_is_told_again_under_the_same_id(
    feed: Feed, announced: list[Transition[Film]], drain: Callable[..., Any]
) -> None:
    class Death(BaseException):
        pass

    def die() -> None:
        raise Death

    feed.commit(create(FILM, film_id=2, title="a", status="released"))
    faults.arm("process.after_turn", die)
    with pytest.raises(Death):
        drain()
    faults.disarm()
    drain()

    assert len(announced) == 2
    assert announced[0].id == announced[1].id


def test_later_transitions_of_a_key_wait_behind_one_that_fails_and_others_go_on(
    app: App, feed: Feed, make_config: MakeConfig, log: MemoryLog
) -> None:
    told: list[tuple[int, str]] = []
    is_broken = True

    @app.on_change("status")
    def announce(transition: Transition[Film]) -> None:
        if is_broken and transition.key == 1:
            raise ValueError("no")
        told.append((transition.key, transition.after["status"]))

    feed.commit(create(FILM, film_id=1, title="a", status="one"), create(FILM, film_id=2, title="a", status="one"))
    feed.commit(update(FILM, film_id=1, title="a", status="two"), update(FILM, film_id=2, title="a", status="two"))
    with Runner.open(app, config=make_config(), name="films", log=log.reader()) as runner:
        assert runner.drain(patience_s=0).dead == 1
        assert told == [(2, "one"), (2, "two")]

        is_broken = False
        assert runner.retry_dead() == 1
        runner.drain()

    assert told[2:] == [(1, "one"), (1, "two")]
