"""A step that never returns is ended: its change is a dead letter, other keys go on."""

import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pytest
from process.material import INT, TEXT, Feed, TableSink, create, table_schema, update
from servers import forked

from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.memory import MemoryLog
from deltaworks.process import entities
from deltaworks.process.app import App, Source
from deltaworks.process.entity import Entity, Transition
from deltaworks.process.runner import Runner
from deltaworks.process.stuck import EXIT_STUCK, STUCK_FILE, Stuck

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
PATIENCE_S = 60


class Film(TypedDict):
    title: str


def loop() -> None:
    while True:
        pass


def sleep() -> None:
    time.sleep(1e6)


def read_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.recv(1)


def loop_and_catch() -> None:
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # What a step's own handler catches is not what ends it.
            continue


WAYS = [loop, sleep, read_socket, loop_and_catch]


def films_app(sink: TableSink, kind: str, hang: Callable[[], None], poison: str = "bad") -> App:
    """An app with one step, of that kind, that hangs on the poisoned film."""
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    films.sink(sink)

    def touch(titles: Any) -> None:
        if poison in titles:
            hang()

    match kind:
        case "filter":

            @films.filter
            def step(film: Entity[Film]) -> bool:
                touch([film.after["title"]])
                return True

        case "transform":

            @films.transform
            def step(film: Entity[Film]) -> dict[str, Any]:  # type: ignore[no-redef]
                touch([film.after["title"]])
                return {"title": film.after["title"]}

        case "async transform":

            @films.transform
            async def step(film: Entity[Film]) -> dict[str, Any]:  # type: ignore[no-redef]
                touch([film.after["title"]])
                return {"title": film.after["title"]}

        case "enrich":

            @films.enrich(into="more", key=lambda film: film.after["title"], batch=50)
            async def step(titles: list[str]) -> dict[str, str]:  # type: ignore[no-redef]
                touch(titles)
                return {title: title for title in titles}

        case "key of enrich":

            @films.enrich(into="more", key=lambda film: touch([film.after["title"]]))
            async def step(titles: list[str]) -> dict[str, str]:  # type: ignore[no-redef]
                return {}

        case "arrow":

            @films.arrow
            def step(rows: pa.Table) -> pa.Table:  # type: ignore[no-redef]
                touch(rows.column("title").to_pylist())
                return rows

        case "on_change":

            @films.on_change("title")
            async def step(film: Transition[Film]) -> None:  # type: ignore[no-redef]
                touch([film.after["title"]])

    return films


KINDS = ["filter", "transform", "async transform", "enrich", "key of enrich", "arrow", "on_change"]
CASES = [("transform", way) for way in WAYS] + [(kind, sleep) for kind in KINDS if kind != "transform"]


@pytest.fixture
def impatient(make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr("deltaworks.process.watchdog._LOOK_EVERY_S", 0.02)
    return with_limit(make_config(), 0.2)


def with_limit(config: Config, step_limit_s: float) -> Config:
    app = config.app("films").model_copy(update={"step_limit_s": step_limit_s})
    return config.model_copy(update={"apps": {"films": app}})


@pytest.mark.parametrize(("kind", "hang"), CASES)
def test_a_step_that_never_returns_is_ended_and_other_keys_go_on(
    kind: str, hang: Callable[[], None], impatient: Config, sink: TableSink, feed: Feed, log: MemoryLog
) -> None:
    if kind == "on_change":
        feed.commit(*(create(FILM, film_id=n, title="before") for n in range(4)))
    with Runner.open(films_app(sink, kind, hang), config=impatient, name="films", log=log.reader()) as runner:
        runner.drain(patience_s=0)
        change = update if kind == "on_change" else create
        feed.commit(*(change(FILM, film_id=n, title="bad" if n == 2 else f"title {n}") for n in range(4)))

        report = runner.drain(patience_s=0)

        [letter] = runner.dead()
        assert (report.dead, letter.key, letter.step) == (1, 2, "step")
        assert re.search(rf"did not return in time, ended at {re.escape(__file__)}:\d+", letter.error), letter.error
        assert letter.place.startswith(f"{__file__}:")
        if kind != "on_change":
            assert sink.bodies().keys() == {0, 1, 3}
        # The key is held until the step is mended; the app itself is well.
        feed.commit(create(FILM, film_id=9, title="next"))
        assert runner.drain(patience_s=0).dead == 1
        assert 9 in sink.bodies()
    with Runner.open(films_app(sink, kind, hang, "none"), config=impatient, name="films", log=log.reader()) as runner:
        runner.retry_dead()
        assert runner.drain(patience_s=0).dead == 0
    assert sink.bodies().keys() == {0, 1, 2, 3, 9}


def test_a_plain_step_under_a_time_limit_leaves_no_place_taken_and_no_close_waiting(
    impatient: Config, sink: TableSink, feed: Feed, log: MemoryLog
) -> None:
    """More of them hang than a pool of threads has places."""
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    films.sink(sink)

    @films.enrich(into="more", key=lambda film: film.key, batch=1, timeout_s=0.5, concurrency=64)
    def more(ids: list[int]) -> dict[int, str]:
        if ids[0] < 50:
            sleep()
        return dict.fromkeys(ids, "")

    feed.commit(*(create(FILM, film_id=n, title="a") for n in range(60)))
    with Runner.open(films, config=impatient, name="films", log=log.reader()) as runner:
        runner.drain(patience_s=0)
        assert sink.bodies().keys() == set(range(50, 60))


# What no signal reaches


def hang_for_good() -> None:
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            continue


def serve(config: Config, file: Path, kind: str, poison: str, is_service: bool) -> None:
    """A life of the service; it ends by itself at the end of the log where it is none."""
    from deltaworks.process import watchdog  # noqa: PLC0415

    watchdog._LOOK_EVERY_S = 0.02
    app = films_app(TableSink(file), kind, hang_for_good, poison)
    with Runner.open(app, config=config, name="films") as runner:
        runner.end_when_stuck()
        if not is_service:
            runner.retry_dead()
        runner.drain(patience_s=0)


@pytest.mark.parametrize("kind", ["filter", "on_change"])
def test_a_step_that_cannot_be_ended_ends_its_process_and_is_a_dead_letter_in_the_next(
    kind: str, impatient: Config, sink: TableSink, tmp_path: Path
) -> None:
    output = tmp_path / "output.txt"

    def live(poison: str, *, is_service: bool = True) -> int:
        child = forked.call(serve, impatient, sink.file, kind, poison, is_service, output=output)
        return child.wait(timeout=PATIENCE_S)

    with LocalLogWriter.open(impatient.log_folder("studio")) as writer:
        feed = Feed(writer)
        feed.commit(*(create(FILM, film_id=n, title="before") for n in range(4)))
        assert live("none") == 0, output.read_text()
        feed.commit(*(update(FILM, film_id=n, title="bad" if n == 2 else f"title {n}") for n in range(4)))

        assert live("bad") == EXIT_STUCK, output.read_text()
        assert live("bad") == 0, output.read_text()

        app = films_app(sink, kind, hang_for_good)
        with Runner.open(app, config=impatient, name="films") as runner:
            [letter] = runner.dead()
        assert (letter.key, letter.step) == (2, "step")
        assert letter.place.startswith(f"{__file__}:")
        titles = {key: body["title"] for key, body in sink.bodies().items()}
        assert titles == {0: "title 0", 1: "title 1", 2: "bad" if kind == "on_change" else "before", 3: "title 3"}
        # After the mend a retry tries it: nothing is remembered but the letter.
        assert not (impatient.app_folder("films") / STUCK_FILE).exists()
        assert live("none", is_service=False) == 0, output.read_text()
        assert sink.bodies()[2]["title"] == "bad"
        with Runner.open(app, config=impatient, name="films") as runner:
            assert runner.dead() == []


def test_a_change_that_ended_the_process_stays_noted_whatever_else_is_dead_of_its_key(
    make_config: Callable[..., Config],
    sink: TableSink,
    feed: Feed,
    log: MemoryLog,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, tried = make_config(), []
    films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
    films.sink(sink)

    @films.filter
    def keep(film: Entity[Film]) -> bool:
        tried.append(film.key)
        return True

    @films.on_change("title")
    def tell(_: Transition[Film]) -> None:
        raise ValueError

    feed.commit(create(FILM, film_id=2, title="a"))
    with Runner.open(films, config=config, name="films", log=log.reader()) as runner:
        assert runner.drain(patience_s=0).dead == 1
    # The next life comes to it in its second cycle.
    monkeypatch.setattr(entities, "ENTITIES_PER_CYCLE", 1)
    feed.commit(create(FILM, film_id=1, title="b"))
    at = feed.commit(update(FILM, film_id=2, title="c"))
    note = Stuck(step="keep", place="films.py:1", seconds=60, key=2, position=at, ordinal=0)
    note.write(config.app_folder("films"))
    tried.clear()
    with Runner.open(films, config=config, name="films", log=log.reader()) as runner:
        runner.drain(patience_s=0)
        letters = {letter.step: letter.error for letter in runner.dead()}
    assert (tried, letters["keep"]) == ([1], note.error)
    assert not (config.app_folder("films") / STUCK_FILE).exists()
