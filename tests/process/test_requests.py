"""What another process asks of a running app is done, once begun survives a crash, and holds up no fresh change."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process.faulty_service import FaultyService
from process.film_app import FILM, ROLE, film_app
from process.material import Feed, TableSink, config_in, create, delete, following, update, wait_until

from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process import answering
from deltaworks.process.asked import slice_of
from deltaworks.process.requests import Kind, Outcome, Request, Requests, Slice
from deltaworks.process.runner import Runner
from deltaworks.testing.faults import fail_at

MakeConfig = Callable[..., Config]


@pytest.fixture
def config(make_config: MakeConfig, service: FaultyService) -> Config:
    return make_config(url=service.url)


@pytest.fixture
def open_runner(sink: TableSink, config: Config, log: MemoryLog) -> Any:
    return lambda: Runner.open(film_app(sink), config=config, name="films", log=log.reader())


@pytest.fixture
def requests(config: Config) -> Requests:
    return Requests.of(config.app_folder("films"))


def films(feed: Feed, service: FaultyService, *, count: int) -> None:
    """Films 1 to `count`, each with one role, of the person of the same number."""
    service.names = dict.fromkeys(range(1, count + 1), "old")
    feed.commit(
        *(create(FILM, film_id=number, title="Alien", status="released") for number in service.names),
        *(create(ROLE, role_id=number, film_id=number, person_id=number) for number in service.names),
    )


def rename(service: FaultyService) -> None:
    """The service answers differently now, and no change says so."""
    service.names = dict.fromkeys(service.names, "new")


def cast(sink: TableSink) -> dict[int, str]:
    return {key: body["cast"][0] for key, body in sink.bodies().items() if body["cast"]}


def test_chosen_keys_are_made_anew_and_no_others(
    open_runner: Callable[[], Runner], feed: Feed, service: FaultyService, sink: TableSink, requests: Requests
) -> None:
    films(feed, service, count=4)
    with open_runner() as runner:
        runner.drain()
        rename(service)
        # A person writes keys as text, whatever their type is.
        request = Request.new(Kind.REPROCESS, keys=["2", "3", "99"])
        requests.ask(request)
        runner.drain()

    assert cast(sink) == {1: "old", 2: "new", 3: "new", 4: "old"}
    outcome = requests.outcome(request.id)
    assert outcome is not None
    assert (outcome.count, outcome.missing, outcome.set_back, outcome.error) == (2, 1, 0, None)
    assert not requests.open()


def test_slices_are_disjoint_and_together_all(
    open_runner: Callable[[], Runner], feed: Feed, service: FaultyService, sink: TableSink, requests: Requests
) -> None:
    films(feed, service, count=12)
    with open_runner() as runner:
        runner.drain()
        rename(service)
        for index in range(3):
            requests.ask(Request.new(Kind.REPROCESS, slice=Slice(index=index, count=3)))
            runner.drain()
            done = {key for key, name in cast(sink).items() if name == "new"}
            assert done == {key for key in range(1, 13) if slice_of(key, 3) <= index}


def test_a_request_outlives_the_runner_that_began_it(
    open_runner: Callable[[], Runner],
    feed: Feed,
    service: FaultyService,
    sink: TableSink,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "RELEASED_PER_CYCLE", 2)
    films(feed, service, count=7)
    with open_runner() as runner:
        runner.drain()
    rename(service)
    request = Request.new(Kind.REPROCESS)
    requests.ask(request)

    for after in ("process.after_write", "process.after_checkpoint", "process.after_write"):
        with pytest.raises(SystemExit), fail_at(after, SystemExit()), open_runner() as runner:
            runner.drain()
    assert 0 < list(cast(sink).values()).count("new") < 7
    with open_runner() as runner:
        runner.drain()

    assert set(cast(sink).values()) == {"new"}
    outcome = requests.outcome(request.id)
    assert outcome is not None
    assert outcome.count == 7


def test_fresh_changes_do_not_wait_for_a_large_request(
    open_runner: Callable[[], Runner],
    feed: Feed,
    service: FaultyService,
    sink: TableSink,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answering, "RELEASED_PER_CYCLE", 2)
    films(feed, service, count=9)
    with open_runner() as runner:
        runner.drain()
        rename(service)
        requests.ask(Request.new(Kind.REPROCESS))
        feed.commit(create(FILM, film_id=50, title="Fresh", status="released"))
        runner._cycle(up_to_sequence=10, on_progress=None)

    assert 50 in sink.bodies()
    assert list(cast(sink).values()).count("new") == 2


def test_a_running_app_answers_and_says_who_is_set_back(
    open_runner: Callable[[], Runner], feed: Feed, service: FaultyService, sink: TableSink, requests: Requests
) -> None:
    films(feed, service, count=3)
    with open_runner() as runner:
        runner.drain()
        rename(service)
        service.fault = lambda ids: 422 if 2 in ids else None
        request = Request.new(Kind.REPROCESS)
        with following(runner):
            requests.ask(request)
            wait_until(lambda: requests.outcome(request.id) is not None)
            service.fault = lambda ids: None
            retry = Request.new(Kind.RETRY, keys=[2])
            requests.ask(retry)
            wait_until(lambda: cast(sink)[2] == "new")

    outcome = requests.outcome(request.id)
    assert outcome is not None
    assert (outcome.count, outcome.set_back) == (3, 1)
    assert [each.id for each in requests.outcomes()] == [retry.id, request.id]


def test_a_file_that_is_no_request_is_put_aside(tmp_path: Path) -> None:
    requests = Requests(tmp_path)
    requests.ask(Request.new(Kind.RETRY))
    (tmp_path / "mine.request.json").write_text("{}")

    assert [request.kind for request in requests.open()] == [Kind.RETRY]
    assert (tmp_path / "mine.request.unreadable").exists()


def test_many_may_ask_while_one_answers(tmp_path: Path) -> None:
    asking, answering_ = Requests(tmp_path), Requests(tmp_path)
    threads = [
        threading.Thread(target=lambda: [asking.ask(Request.new(Kind.RETRY)) for _ in range(5)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    ended: set[str] = set()

    def answer() -> bool:
        for request in answering_.open():
            answering_.end(Outcome.of(request))
            ended.add(request.id)
        return len(ended) == 20

    wait_until(answer)
    for thread in threads:
        thread.join()
    assert not list(tmp_path.glob("*.request.json"))


def changes() -> st.SearchStrategy[list[tuple[str, int]]]:
    """Creates, updates and deletes of few films."""
    return st.lists(st.tuples(st.sampled_from(["put", "draft", "delete", "role"]), st.integers(1, 6)), max_size=25)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=changes(), data=st.data())
def test_batch_gives_what_living_through_the_changes_gives(
    changes: list[tuple[str, int]],
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
    service: FaultyService,
) -> None:
    """Live with the new service against live with the old one and then every slice made anew."""
    results = []
    for is_batch in (False, True):
        folder = tmp_path_factory.mktemp("mode")
        sink, log = TableSink(folder / "sink.sqlite"), MemoryLog()
        config = config_in(folder, url=service.url)
        feed = Feed(log.writer())
        service.names = dict.fromkeys(range(1, 30), "old" if is_batch else "new")
        with Runner.open(film_app(sink), config=config, name="films", log=log.reader()) as runner:
            present: dict[int, bool] = {}
            for number, (what, film_id) in enumerate(changes):
                row = {"film_id": film_id, "title": f"T{number}", "status": "draft" if what == "draft" else "released"}
                if what == "role":
                    feed.commit(create(ROLE, role_id=number, film_id=film_id, person_id=number))
                elif what == "delete" and present.pop(film_id, False):
                    feed.commit(delete(FILM, film_id=film_id))
                elif what != "delete":
                    feed.commit((update if film_id in present else create)(FILM, **row))
                    present[film_id] = True
                if data.draw(st.booleans()) if is_batch else number % 3 == 0:
                    runner.drain()
            runner.drain()
            if is_batch:
                service.names = dict.fromkeys(service.names, "new")
                count = data.draw(st.integers(1, 4))
                requests = Requests.of(config.app_folder("films"))
                for index in data.draw(st.permutations(range(count))):
                    requests.ask(Request.new(Kind.REPROCESS, slice=Slice(index=index, count=count)))
                runner.drain()
                assert not requests.open()
        results.append(sink.documents())

    assert results[0] == results[1]
