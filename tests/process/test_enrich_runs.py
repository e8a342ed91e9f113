"""Enrichments of a running app against a real service: what is kept, for how long, and over a restart."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, PERSON, ROLE, Film, Role, film_app
from process.material import Feed, TableSink, create, delete, truncate, update

from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import App, AppError, Backoff, Breaker, Source, Ttl, changed
from deltaworks.process.entity import Entity
from deltaworks.process.requests import Kind, Request, Requests
from deltaworks.process.runner import Runner

OpenRunner = Callable[..., Runner]
studio = Source("studio")


@pytest.fixture
def open_runner(make_config: Callable[..., Config], service: FaultyService, log: MemoryLog) -> Iterator[OpenRunner]:
    opened: list[Runner] = []

    def open_it(app: App) -> Runner:
        for runner in opened:
            runner.close()
        opened.append(Runner.open(app, config=make_config(url=service.url), name="films", log=log.reader()))
        return opened[-1]

    yield open_it
    for runner in opened:
        runner.close()


def cast(sink: TableSink) -> dict[int, list[str]]:
    return {key: body["cast"] for key, body in sink.bodies().items()}


def films(feed: Feed, *numbers: int) -> None:
    """Films of these numbers, each with one role, of person 1."""
    feed.commit(
        *(create(FILM, film_id=number, title="Alien", status="released") for number in numbers),
        *(create(ROLE, role_id=number, film_id=number, person_id=1) for number in numbers),
    )


def test_a_kept_answer_serves_later_films_until_its_person_changes(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "Ada"}
    runner = open_runner(film_app(sink, cache=Ttl(3600)))
    films(feed, 7)
    runner.drain()
    films(feed, 8)
    runner.drain()
    assert len(service.requests) == 1

    service.names = {1: "Ada Byron"}
    feed.commit(update(PERSON, person_id=1, name="Ada Byron"), update(FILM, film_id=8, title="B", status="released"))
    runner.drain()

    assert cast(sink) == {7: ["Ada Byron"], 8: ["Ada Byron"]}
    assert len(service.requests) == 2


def test_a_person_who_was_unknown_is_asked_for_again_once_there_is_a_row(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner(film_app(sink, cache=Ttl(3600)))
    films(feed, 7)
    runner.drain()
    films(feed, 8)
    runner.drain()
    assert (cast(sink), len(service.requests)) == ({7: [], 8: []}, 1)

    service.names = {1: "Ada"}
    feed.commit(create(PERSON, person_id=1, name="Ada"))
    runner.drain()

    assert (cast(sink), len(service.requests)) == ({7: ["Ada"], 8: ["Ada"]}, 2)


def test_an_emptied_table_empties_the_cache(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "Ada"}
    runner = open_runner(film_app(sink, cache=Ttl(3600)))
    films(feed, 7)
    runner.drain()

    service.names = {}
    feed.commit(truncate(PERSON))
    runner.drain()

    assert cast(sink) == {7: []}


def test_an_open_breaker_holds_keys_without_a_call_and_lets_others_go_on(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    patient = Backoff(first_s=0.001, max_s=0.002, attempts=3)
    runner = open_runner(film_app(sink, breaker=Breaker(failures=1, open_s=0.5), retry=patient))
    service.names, service.fault = {1: "Ada"}, lambda ids: 503
    films(feed, 7)
    runner.drain(patience_s=0)
    asked = len(service.requests)
    films(feed, 8)
    feed.commit(create(FILM, film_id=9, title="No cast", status="released"))
    runner.drain(patience_s=0)
    assert (cast(sink), asked, len(service.requests)) == ({9: []}, 1, 1)
    assert {letter.attempts for letter in runner.held()} == {0, 1}
    assert "the breaker is open" in {letter.error for letter in runner.held()}

    service.fault = lambda ids: None
    assert runner.drain().dead == 0
    assert cast(sink) == {7: ["Ada"], 8: ["Ada"], 9: []}


def test_a_retry_after_holds_up_those_who_come_later_too(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner(film_app(sink))
    service.fault, service.retry_after = (lambda ids: 429), "3600"
    films(feed, 7)
    runner.drain(patience_s=0)
    feed.commit(create(FILM, film_id=8, title="Aliens", status="released"))
    feed.commit(create(ROLE, role_id=8, film_id=8, person_id=2))
    runner.drain(patience_s=0)

    assert {letter.key for letter in runner.held()} == {7, 8}
    assert len(service.requests) == 1


def test_a_service_that_answers_for_some_of_the_ids_is_asked_for_the_rest(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner(film_app(sink, partial="retry", retry=Backoff(first_s=0.001, max_s=0.002)))
    service.names = {number: f"person {number}" for number in range(30)}
    feed.commit(*(create(FILM, film_id=number, title="Alien", status="released") for number in range(30)))
    feed.commit(*(create(ROLE, role_id=number, film_id=number, person_id=number) for number in range(30)))
    service.limit = 7

    report = runner.drain()

    assert (report.held, report.dead) == (0, 0)
    assert cast(sink) == {number: [f"person {number}"] for number in range(30)}


# when=changed(…)


def scored_app(sink: TableSink, *, has_lookup: bool = False) -> App:
    role = studio.table("role", schema=Role)
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film), role])

    @app.client
    async def names(settings: Mapping[str, Any]) -> Any:
        async with httpx.AsyncClient(base_url=settings["url"]) as client:
            yield client

    @app.filter
    def is_public(film: Entity[Film]) -> bool:
        return film.after["status"] != "draft"

    @app.enrich(
        into="score",
        key=lambda film: len(film.after["title"]),
        when=changed("title"),
        retry=Backoff(first_s=0.001, max_s=0.002),
        lookup=studio.table("person", key="person_id") if has_lookup else None,
    )
    async def score(ids: list[int], names: httpx.AsyncClient) -> dict[int, str]:
        answer = (await names.post("/", json={"ids": ids})).raise_for_status()
        return {int(id_): name for id_, name in answer.json().items()}

    @app.transform
    def document(film: Entity[Film]) -> dict[str, Any]:
        return {"status": film.after["status"], "score": film["score"]}

    app.sink(sink)
    return app


def test_an_enrichment_runs_again_only_when_its_columns_changed_also_after_a_restart(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "short", 2: "long"}
    runner = open_runner(scored_app(sink))
    feed.commit(create(FILM, film_id=7, title="A", status="new"))
    runner.drain()
    service.names = {1: "other", 2: "long"}
    feed.commit(update(FILM, film_id=7, title="A", status="released"))
    runner.drain()
    assert sink.bodies() == {7: {"status": "released", "score": "short"}}

    runner = open_runner(scored_app(sink))
    feed.commit(update(FILM, film_id=7, title="A", status="old"))
    runner.drain()
    assert (sink.bodies()[7], service.requests) == ({"status": "old", "score": "short"}, [[1]])

    feed.commit(update(FILM, film_id=7, title="AA", status="old"))
    runner.drain()
    assert (sink.bodies()[7]["score"], service.requests[1:]) == ("long", [[2]])


def test_a_kept_answer_is_forgotten_with_its_entity_and_when_asked_to(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "first"}
    runner = open_runner(scored_app(sink))
    feed.commit(create(FILM, film_id=7, title="A", status="new"))
    runner.drain()
    service.names = {1: "second"}
    feed.commit(update(FILM, film_id=7, title="A", status="draft"))
    runner.drain()
    feed.commit(update(FILM, film_id=7, title="A", status="new"))
    runner.drain()
    assert sink.bodies()[7]["score"] == "second"

    service.names = {1: "third"}
    feed.commit(delete(FILM, film_id=7))
    runner.drain()
    feed.commit(create(FILM, film_id=7, title="A", status="new"))
    runner.drain()
    assert sink.bodies()[7]["score"] == "third"

    service.names = {1: "fourth"}
    Requests.of(runner.folder).ask(Request.new(Kind.REPROCESS, keys=["7"]))
    runner.drain()
    assert sink.bodies()[7]["score"] == "fourth"


def test_a_change_of_a_looked_up_row_asks_again_although_no_column_changed(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    service.names = {1: "first"}
    runner = open_runner(scored_app(sink, has_lookup=True))
    feed.commit(create(FILM, film_id=7, title="A", status="new"))
    runner.drain()

    service.names = {1: "second"}
    feed.commit(update(PERSON, person_id=1, name="second"))
    runner.drain()

    assert sink.bodies()[7]["score"] == "second"


def test_an_answer_that_json_would_change_is_refused_with_the_step(
    open_runner: OpenRunner, feed: Feed, sink: TableSink
) -> None:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])

    @app.enrich(into="score", key=lambda film: 1, when=changed("title"))
    async def score(ids: list[int]) -> dict[int, Any]:
        return {1: [{2: "two"}]}

    app.sink(sink)
    runner = open_runner(app)
    feed.commit(create(FILM, film_id=7, title="A", status="new"))
    runner.drain()

    [letter] = runner.dead()
    assert letter.error.startswith("returned what JSON cannot hold")
    assert __file__ in letter.error


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"rate_per_s": 0}, "rate_per_s must be more than 0, got 0"),
        ({"breaker": Breaker(failures=0)}, "breaker.failures must be more than 0, got 0"),
        ({"cache": Ttl(-1)}, "cache.seconds must be more than 0, got -1"),
        ({"cache": Ttl(60, negative_s=-5)}, "cache.negative_s must not be less than 0, got -5"),
        ({"partial": "maybe"}, "partial must be 'unknown' or 'retry', got 'maybe'"),
        ({"when": changed()}, r"changed\(\) needs at least one column; known: title, status"),
        ({"when": changed("tilte")}, "no column 'tilte' is declared of the entity; known: title, status"),
    ],
)
def test_an_option_that_makes_no_sense_is_said_with_the_app_the_step_and_its_place(
    options: dict[str, Any], fault: str
) -> None:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])

    def score(ids: list[int]) -> dict[int, Any]:
        return {}

    with pytest.raises(AppError, match=rf"app 'films', step 'score' \({__file__}:\d+\): {fault}"):
        app.enrich(into="score", key=lambda film: 1, **options)(score)
