"""What fails for good: the key is held, others go on, and a retry replays in order."""

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from process.material import INT, TEXT, Feed, TableSink, config_in, create, delete, table_schema, update
from process.mortal import Crash, quick_folder

from deltaworks import faults
from deltaworks.config import Config
from deltaworks.log.memory import MemoryLog
from deltaworks.process.app import App, DeadLetter, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.letters import letters_of, rows_of
from deltaworks.process.runner import STATE_FILE, Runner

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT, status=TEXT)


class Film(TypedDict):
    title: str
    status: str


class World:
    """An app that refuses films titled `bad`, and tells of every status; what is refused can be changed."""

    def __init__(self, sink: TableSink, on_fail: DeadLetter) -> None:
        self.refused = {"bad"}
        self.untellable: set[str] = set()
        self.told: list[tuple[int, str]] = []
        films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)], on_fail=on_fail)

        @films.transform
        def document(film: Entity[Film]) -> Film:
            if film.after["title"] in self.refused:
                raise ValueError(film.after["title"])
            return film.after

        @films.on_change("status")
        def tell(turn: Transition[Film]) -> None:
            if turn.after["status"] in self.untellable:
                raise ValueError("no")
            self.told.append((turn.key, turn.after["status"]))

        films.sink(sink)
        self.app = films


@pytest.fixture
def file(make_config: Callable[..., Config]) -> Path:
    return make_config().app_folder("films") / STATE_FILE


@pytest.fixture
def world(sink: TableSink) -> World:
    return World(sink, DeadLetter())


@pytest.fixture
def loose_world(sink: TableSink) -> World:
    return World(sink, DeadLetter(hold_key=False))


@pytest.fixture
def open_runner(make_config: Callable[..., Config], log: MemoryLog) -> Iterator[Callable[[World], Runner]]:
    opened: list[Runner] = []

    def open_it(world: World) -> Runner:
        opened.append(Runner.open(world.app, config=make_config(), name="films", log=log.reader()))
        return opened[-1]

    yield open_it
    for runner in opened:
        runner.close()


def put(film_id: int, title: str, status: str = "new") -> Any:
    return update(FILM, film_id=film_id, title=title, status=status)


def titles(sink: TableSink) -> dict[int, str]:
    return {key: body["title"] for key, body in sink.bodies().items()}


# Entities


def test_later_changes_of_a_dead_key_wait_others_go_on_and_a_retry_writes_the_newest_state(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(world)
    feed.commit(put(1, "good"), put(2, "good"))
    failed = feed.commit(put(1, "bad"))
    runner.drain()
    feed.commit(put(1, "better"), put(2, "better"))
    last = feed.commit(put(1, "best"), put(2, "best"))
    report = runner.drain()

    assert (report.dead, titles(sink)) == (1, {2: "best"})
    [letter] = runner.dead()
    assert (letter.key, letter.step, letter.attempts, letter.waiting, letter.holds_key) == (1, "document", 1, 1, True)
    assert (letter.version.position.value, letter.place) == (failed, world.app.steps[0].place)

    assert runner.retry_dead([1]) == 1
    assert runner.drain().dead == 0
    assert titles(sink) == {1: "best", 2: "best"}
    assert sink.documents()[1][0].position.value == last
    assert runner.dead() == []


def test_a_key_that_fails_again_after_a_retry_is_held_again(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(world)
    feed.commit(put(1, "bad"))
    runner.drain()
    world.refused = {"bad", "worse"}
    second = feed.commit(put(1, "worse"))
    runner.drain()
    runner.retry_dead()
    runner.drain()

    [letter] = runner.dead()
    assert (letter.version.position.value, letter.waiting) == (second, 0)


def test_a_dead_key_whose_row_is_gone_is_released(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(world)
    feed.commit(put(1, "good"))
    runner.drain()
    feed.commit(put(1, "bad"))
    runner.drain()
    assert titles(sink) == {1: "good"}
    feed.commit(delete(FILM, film_id=1))

    assert runner.drain().dead == 0
    assert titles(sink) == {}
    feed.commit(create(FILM, film_id=1, title="again", status="new"))
    runner.drain()
    assert titles(sink) == {1: "again"}


def test_without_holding_the_next_change_tries_again(
    loose_world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(loose_world)
    feed.commit(put(1, "bad"))
    runner.drain()
    assert [letter.holds_key for letter in runner.dead()] == [False]
    feed.commit(put(1, "good"))

    assert runner.drain().dead == 0
    assert titles(sink) == {1: "good"}


def test_a_dropped_letter_leaves_the_sinks_as_they_are_until_the_next_change(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(world)
    feed.commit(put(1, "good"))
    runner.drain()
    feed.commit(put(1, "bad"))
    runner.drain()
    assert runner.drop_dead([1], until=datetime.now(UTC) - timedelta(minutes=1)) == 0
    assert runner.drop_dead([1]) == 1

    assert runner.drain().dead == 0
    assert titles(sink) == {1: "good"}
    feed.commit(put(1, "better"))
    runner.drain()
    assert titles(sink) == {1: "better"}


def test_another_process_reads_letters_and_on_request_their_rows(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, file: Path
) -> None:
    assert letters_of(file) == []
    runner = open_runner(world)
    feed.commit(create(FILM, film_id=1, title="bad", status="secret"), put(2, "bad"))
    runner.drain()

    assert [letter.key for letter in letters_of(file)] == [1, 2]
    assert letters_of(file, key="1") == [letter for letter in runner.dead() if letter.key == 1]
    assert "secret" not in repr(letters_of(file))
    found = rows_of(file, "1")
    assert found.rows == {"film": [{"_key": 1, "title": "bad", "status": "secret"}]}
    assert [turn["step"] for turn in found.turns] == ["tell"]


# Turns


def test_later_turns_wait_behind_a_dead_one_and_are_replayed_in_order(
    world: World, open_runner: Callable[[World], Runner], feed: Feed
) -> None:
    runner = open_runner(world)
    world.untellable = {"two"}
    feed.commit(*(create(FILM, film_id=film_id, title="good", status="one") for film_id in (1, 2)))
    for status in ("two", "three", "four"):
        feed.commit(put(1, "good", status), put(2, "good", status + "!"))
    assert runner.drain().dead == 1
    assert [told for told in world.told if told[0] == 1] == [(1, "one")]
    [letter] = runner.dead()
    assert (letter.key, letter.step, letter.column, letter.waiting) == (1, "tell", "status", 2)

    world.untellable, before = set(), len(world.told)
    assert runner.retry_dead([1]) == 1
    runner.drain()
    assert world.told[before:] == [(1, "two"), (1, "three"), (1, "four")]


def test_more_turns_than_a_cycle_takes_behind_a_dead_one_hold_up_nobody_else(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.process.runner.ENTITIES_PER_CYCLE", 100)
    runner = open_runner(world)
    world.untellable = {"0"}
    feed.commit_together(*([put(1, "good", str(number))] for number in range(150)))
    feed.commit(put(2, "good", "here"), put(2, "good", "there"))
    runner.drain()

    assert (2, "there") in world.told


def test_without_holding_later_turns_go_past_a_dead_one(
    loose_world: World, open_runner: Callable[[World], Runner], feed: Feed
) -> None:
    runner = open_runner(loose_world)
    loose_world.untellable = {"two"}
    feed.commit(create(FILM, film_id=1, title="good", status="one"))
    for status in ("two", "three"):
        feed.commit(put(1, "good", status))
    assert runner.drain().dead == 1
    assert loose_world.told == [(1, "one"), (1, "three")]

    loose_world.untellable = set()
    runner.retry_dead()
    assert runner.drain().dead == 0
    assert loose_world.told[2:] == [(1, "two")]


def test_a_dropped_turn_is_never_told_and_those_behind_it_are(
    world: World, open_runner: Callable[[World], Runner], feed: Feed
) -> None:
    runner = open_runner(world)
    world.untellable = {"two"}
    feed.commit(create(FILM, film_id=1, title="good", status="one"))
    for status in ("two", "three"):
        feed.commit(put(1, "good", status))
    runner.drain()
    assert runner.drop_dead([1]) == 1
    runner.drain()

    assert world.told == [(1, "one"), (1, "three")]


def test_a_turn_waits_until_the_document_of_its_change_has_left(
    world: World, open_runner: Callable[[World], Runner], feed: Feed, sink: TableSink
) -> None:
    runner = open_runner(world)
    feed.commit(create(FILM, film_id=1, title="bad", status="released"))
    runner.drain(patience_s=0)
    assert world.told == []
    assert runner._state.next_try() is None, "a turn that has to wait must not keep the runner awake"

    world.refused = set()
    runner.retry_dead()
    runner.drain()
    assert world.told == [(1, "released")]


# Whatever happens

step = st.one_of(
    st.tuples(st.just("put"), st.integers(1, 3), st.sampled_from(["good", "bad", "fine"]), st.sampled_from("abc")),
    st.tuples(st.just("delete"), st.integers(1, 3)),
    st.tuples(st.just("refuse"), st.sets(st.sampled_from(["good", "bad"]))),
    st.tuples(st.just("untellable"), st.sets(st.sampled_from("ab"))),
    st.tuples(st.just("retry"), st.none() | st.integers(1, 3)),
    st.tuples(st.just("drain")),
    st.tuples(st.just("crash"), st.sampled_from(["process.after_write", "process.after_flush", "process.after_turn"])),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(step, max_size=25))
def test_after_a_last_retry_every_document_is_the_newest_and_every_turn_was_told_in_order(
    steps: list[Any],
) -> None:
    with quick_folder() as folder:
        _replay(folder, steps)


def _replay(folder: Path, steps: list[Any]) -> None:
    sink, log = TableSink(folder / "sink.sqlite"), MemoryLog()
    feed, world = Feed(log.writer()), World(sink, DeadLetter())
    config = config_in(folder)
    rows: dict[int, tuple[str, str]] = {}
    turns: dict[int, list[str]] = {1: [], 2: [], 3: []}

    def run(action: Callable[[Runner], object]) -> None:
        try:
            with Runner.open(world.app, config=config, name="films", log=log.reader()) as runner:
                action(runner)
        except Crash:
            pass
        finally:
            faults.disarm()

    def die() -> None:
        raise Crash

    for what, *given_ in steps:
        match what, *given_:
            case "put", film_id, title, status:
                change = update if film_id in rows else create
                if film_id not in rows or rows[film_id][1] != status:
                    turns[film_id].append(status)
                rows[film_id] = title, status
                feed.commit(change(FILM, film_id=film_id, title=title, status=status))
            case "delete", film_id if film_id in rows:
                del rows[film_id]
                feed.commit(delete(FILM, film_id=film_id))
            case "refuse", refused:
                world.refused = refused
            case "untellable", untellable:
                world.untellable = untellable
            case "retry", key:
                run(lambda runner, keys=None if key is None else [key]: runner.retry_dead(keys))
            case "drain", *_:
                run(lambda runner: runner.drain(patience_s=0))
            case "crash", point:
                faults.arm(point, die)
                run(lambda runner: runner.drain(patience_s=0))
    world.refused, world.untellable = set(), set()
    run(lambda runner: runner.retry_dead())
    run(lambda runner: runner.drain())

    assert sink.bodies() == {key: {"title": title, "status": status} for key, (title, status) in rows.items()}
    for key, expected in turns.items():
        told = [status for of, status in world.told if of == key]
        # A step that died after it was told is told again; nothing else may come twice, go missing or go back.
        assert _without_repeats(told) == _without_repeats(expected)


def _without_repeats(statuses: list[str]) -> list[str]:
    return [status for index, status in enumerate(statuses) if index == 0 or statuses[index - 1] != status]
