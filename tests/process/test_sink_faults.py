"""A sink that refuses a document, or is away: what becomes of the entity and of the others."""

from collections.abc import Callable, Iterator
from threading import Timer
from typing import Any, TypedDict

import pytest
from process.material import INT, TEXT, Feed, create, table_schema, update, wait_until

from deltaworks.config import Config
from deltaworks.errors import RetryableError
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import App, DeadLetter, Source
from deltaworks.process.runner import Runner
from deltaworks.testing.memory_sink import MemorySink

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)


class Film(TypedDict):
    title: str


@pytest.fixture
def search() -> MemorySink:
    return MemorySink("search")


@pytest.fixture
def cache() -> MemorySink:
    return MemorySink("cache")


@pytest.fixture
def runner(
    search: MemorySink, cache: MemorySink, make_config: Callable[..., Config], log: MemoryLog
) -> Iterator[Runner]:
    table = Source("studio").table("film", schema=Film)
    films = App("films", key="film_id", sources=[table], on_fail=DeadLetter(hold_key=False))
    films.sink(search)
    films.sink(cache)
    with Runner.open(films, config=make_config(), name="films", log=log.reader()) as runner:
        yield runner


def film(film_id: int, title: str) -> Any:
    return create(FILM, film_id=film_id, title=title)


def test_a_refused_document_is_a_dead_letter_of_its_entity_alone(
    runner: Runner, feed: Feed, search: MemorySink, cache: MemorySink
) -> None:
    search.refusals[8] = "field 'title' is too long"
    feed.commit(film(7, "Alien"), film(8, "Brazil"), film(9, "Casablanca"))

    report = runner.drain()

    assert (report.documents, report.dead, report.held) == (2, 1, 0)
    [letter] = runner.dead()
    assert (letter.key, letter.step, letter.error, letter.attempts) == (8, "search", "field 'title' is too long", 1)
    assert (search.bodies.keys(), cache.bodies.keys()) == ({7, 9}, {7, 8, 9})


def test_the_next_change_of_a_refused_entity_and_a_retry_try_it_again(
    runner: Runner, feed: Feed, search: MemorySink
) -> None:
    search.refusals |= {7: "too long", 8: "too long"}
    feed.commit(film(7, "Alien"), film(8, "Brazil"))
    runner.drain()

    del search.refusals[7]
    feed.commit(update(FILM, film_id=7, title="Aliens"))
    assert runner.drain().dead == 1
    del search.refusals[8]
    runner.retry_dead([8])

    assert runner.drain().dead == 0
    assert search.bodies == {7: {"title": "Aliens"}, 8: {"title": "Brazil"}}


def test_a_refused_document_may_leave_again_although_it_is_the_same(
    search: MemorySink, make_config: Callable[..., Config], feed: Feed, log: MemoryLog
) -> None:
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    films.sink(search)
    films.dedup()
    search.refusals[7] = "too long"
    feed.commit(film(7, "Alien"))
    with Runner.open(films, config=make_config(), name="films", log=log.reader()) as runner:
        assert runner.drain().dead == 1
        del search.refusals[7]
        runner.retry_dead()
        assert runner.drain().dead == 0
    assert search.bodies == {7: {"title": "Alien"}}


def test_nothing_is_lost_while_a_sink_is_away(
    runner: Runner, feed: Feed, search: MemorySink, cache: MemorySink
) -> None:
    feed.commit(film(7, "Alien"))
    with cache.away(), pytest.raises(RetryableError):
        runner.drain(patience_s=0.2)

    runner.drain()

    assert search.bodies == cache.bodies == {7: {"title": "Alien"}}


def test_a_sink_that_asks_to_wait_is_left_alone_as_long(runner: Runner, feed: Feed, cache: MemorySink) -> None:
    feed.commit(film(7, "Alien"))
    with cache.away(after_s=0.5):
        Timer(0.1, cache.come_back).start()
        runner.drain(patience_s=5)

    assert cache.asked == 1
    wait_until(lambda: 7 in cache.bodies)
