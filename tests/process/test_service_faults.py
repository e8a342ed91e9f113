"""The service behind an enrichment fails in every way it can; nothing is skipped and others go on."""

from collections.abc import Callable
from typing import Any

import pytest
from process.faulty_service import FaultyService
from process.film_app import FILM, PERSON, ROLE, film_app
from process.material import Feed, TableSink, create, following, update, wait_until

from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import Backoff, DeadLetter
from deltaworks.process.runner import Runner

MakeConfig = Callable[..., Config]
OpenRunner = Callable[..., Runner]


@pytest.fixture
def open_runner(sink: TableSink, make_config: MakeConfig, service: FaultyService, log: MemoryLog) -> Any:
    opened: list[Runner] = []

    def open_it(url: str | None = None, **enrich: Any) -> Runner:
        config = make_config(url=url or service.url)
        opened.append(Runner.open(film_app(sink, **enrich), config=config, name="films", log=log.reader()))
        return opened[-1]

    yield open_it
    for runner in opened:
        runner.close()


def films(feed: Feed, service: FaultyService, *, count: int) -> None:
    """Films 1 to `count`, each with one role, of the person of the same number."""
    service.names = {number: f"person {number}" for number in range(1, count + 1)}
    feed.commit(
        *(create(FILM, film_id=number, title="Alien", status="released") for number in service.names),
        *(create(ROLE, role_id=number, film_id=number, person_id=number) for number in service.names),
    )


def cast(sink: TableSink) -> dict[int, list[str]]:
    return {key: body["cast"] for key, body in sink.bodies().items()}


@pytest.mark.parametrize("fault", [503, 500, 429, "slow", "garbage", "partial"])
def test_while_the_service_fails_keys_wait_and_others_go_on(
    fault: int | str, open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner(timeout_s=0.25 if fault == "slow" else 30.0)
    films(feed, service, count=3)
    feed.commit(create(FILM, film_id=9, title="No cast", status="released"))
    service.fault = lambda ids: fault

    report = runner.drain(patience_s=0)
    assert cast(sink) == {9: []}
    assert (report.held, report.dead) == (3, 0)

    service.fault = lambda ids: None
    report = runner.drain()
    assert cast(sink) == {1: ["person 1"], 2: ["person 2"], 3: ["person 3"], 9: []}
    assert (report.held, report.dead) == (0, 0)


def test_a_service_that_is_not_there_is_waited_for_by_a_running_app(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    url = service.url
    service.stop()
    runner = open_runner(url)
    with following(runner):
        films(feed, service, count=3)
        feed.commit(create(FILM, film_id=9, title="No cast", status="released"))
        wait_until(lambda: cast(sink) == {9: []})
        feed.commit(update(FILM, film_id=9, title="Still none", status="released"))
        wait_until(lambda: sink.bodies()[9]["title"] == "Still none")

        service.start()
        wait_until(lambda: cast(sink).keys() == {1, 2, 3, 9})


def test_a_key_that_waited_is_processed_from_its_newest_state_only(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=1)
    service.fault = lambda ids: 503
    runner.drain(patience_s=0)
    position = feed.commit(update(FILM, film_id=1, title="Aliens", status="released"))
    runner.drain(patience_s=0)

    service.fault = lambda ids: None
    runner.drain()

    version, body = sink.documents()[1]
    assert (version.position.value, body["title"]) == (position, "Aliens")


def test_retry_after_is_honoured(open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink) -> None:
    runner = open_runner()
    films(feed, service, count=1)
    service.fault, service.retry_after = (lambda ids: 503), "3600"

    runner.drain(patience_s=0)
    asked = len(service.requests)
    feed.commit(update(FILM, film_id=1, title="Aliens", status="released"))
    feed.commit(create(FILM, film_id=9, title="No cast", status="released"))
    with following(runner):
        wait_until(lambda: 9 in sink.bodies())

    assert len(service.requests) == asked


def test_batch_that_is_refused_and_then_fails_makes_no_dead_letters(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=40)
    answers = iter([422, 500, 500])
    service.fault = lambda ids: next(answers, None)

    report = runner.drain()

    assert cast(sink).keys() == set(range(1, 41))
    assert (report.held, report.dead) == (0, 0)


def test_one_bad_id_of_a_batch_makes_one_dead_letter(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=40)
    service.fault = lambda ids: 422 if 13 in ids else None

    report = runner.drain()

    assert cast(sink).keys() == set(range(1, 41)) - {13}
    assert (report.held, report.dead) == (0, 1)
    [letter] = runner.dead()
    assert (letter.key, letter.step, letter.attempts) == (13, "people", 1)
    assert letter.error == f"POST {service.url}/ answered 422"


def test_one_id_that_breaks_the_service_does_not_hold_up_the_rest(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=40)
    service.fault = lambda ids: 500 if 13 in ids else None

    report = runner.drain(patience_s=2)

    assert cast(sink).keys() == set(range(1, 41)) - {13}
    assert [letter.key for letter in runner.held()] == [13]
    assert report.dead == 0


def test_after_its_attempts_a_key_is_a_dead_letter(open_runner: OpenRunner, feed: Feed, service: FaultyService) -> None:
    runner = open_runner(retry=Backoff(first_s=0.001, max_s=0.002, attempts=3))
    films(feed, service, count=1)
    service.fault = lambda ids: 503

    runner.drain(patience_s=10)

    assert [(letter.key, letter.attempts) for letter in runner.dead()] == [(1, 3)]


def test_a_dead_letter_that_holds_no_key_is_processed_at_its_next_change(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner(on_fail=DeadLetter(hold_key=False))
    films(feed, service, count=1)
    service.fault = lambda ids: 404
    assert runner.drain().dead == 1

    service.fault = lambda ids: None
    assert runner.drain().dead == 1
    feed.commit(update(PERSON, person_id=1, name="person 1"))

    assert runner.drain().dead == 0
    assert cast(sink) == {1: ["person 1"]}


def test_a_dead_letter_is_processed_when_a_person_asks(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=2)
    service.fault = lambda ids: 404
    assert runner.drain().dead == 2
    service.fault = lambda ids: None

    assert runner.retry_dead([2]) == 1
    runner.drain()
    assert cast(sink) == {2: ["person 2"]}

    assert runner.retry_dead() == 1
    runner.drain()
    assert cast(sink) == {1: ["person 1"], 2: ["person 2"]}


def test_an_unknown_id_is_no_fault(
    open_runner: OpenRunner, feed: Feed, service: FaultyService, sink: TableSink
) -> None:
    runner = open_runner()
    films(feed, service, count=1)
    service.names = {}

    assert runner.drain().dead == 0
    assert cast(sink) == {1: []}


def test_ids_of_many_entities_share_a_call_and_each_is_asked_for_once(
    open_runner: OpenRunner, feed: Feed, service: FaultyService
) -> None:
    runner = open_runner(batch=10)
    service.names = dict.fromkeys(range(25), "somebody")
    feed.commit(*(create(FILM, film_id=number, title="Alien", status="released") for number in range(50)))
    feed.commit(*(create(ROLE, role_id=n, film_id=n, person_id=n % 25) for n in range(50)))

    runner.drain()

    assert sorted(len(ids) for ids in service.requests) == [5, 10, 10]
    assert sorted(id_ for ids in service.requests for id_ in ids) == list(range(25))


def test_a_service_that_refuses_everything_is_not_stormed(
    open_runner: OpenRunner, feed: Feed, service: FaultyService
) -> None:
    runner = open_runner(batch=500, retry=Backoff(first_s=60, max_s=60))
    films(feed, service, count=500)
    service.fault = lambda ids: 401

    runner.drain(patience_s=0)

    assert len(service.requests) < 150
