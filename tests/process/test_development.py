"""What helps while an app is written and while it runs: drawing, a first file, reloading, limits, the watchdog."""

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypedDict

import pytest
import structlog
from process.material import INT, TEXT, Feed, TableSink, create, table_schema, wait_until

from deltaworks.config import Config
from deltaworks.log.local import LocalLogWriter
from deltaworks.log.memory import MemoryLog
from deltaworks.operate import development
from deltaworks.process.app import App, Source, count
from deltaworks.process.entity import Entity
from deltaworks.process.explain import explain
from deltaworks.process.runner import Runner
from deltaworks.process.tuning import TuningError
from deltaworks.process.watchdog import Watchdog
from deltaworks.testing.clock import HandClock

FILM = table_schema("film", "film_id", film_id=INT, title=TEXT)
studio = Source("studio")


class Film(TypedDict):
    title: str


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Config]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield Config.model_validate(
        {
            "home": tmp_path / "home",
            "sources": {"studio": {"kind": "postgres", "dsn": "postgresql://nowhere", "tables": ["film"]}},
            "apps": {"films": {"module": "edited_films:films", "source": "studio"}},
        }
    )
    sys.modules.pop("edited_films", None)


@pytest.fixture
def log(config: Config) -> Iterator[Feed]:
    with LocalLogWriter.open(config.log_folder("studio")) as writer:
        yield Feed(writer)


def test_a_drawing_shows_every_step_with_its_options_and_its_place() -> None:
    role = studio.table("role", key="film_id", schema=Film)
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film), role])

    @app.enrich(into="people", key=lambda film: 1, batch=50, rate_per_s=20, lookup=studio.table("person", key="id"))
    def people(ids: list[int]) -> dict[int, str]:
        return {}

    app.project(name="title")
    app.dedup()
    app.sink(TableSink(Path("nowhere")))
    lines = explain(app).splitlines()

    assert lines[:3] == ["films", "  film, one document per film_id", "  ├─ role, by film_id"]
    assert (
        "enrich people (50 ids a call, 8 at once, 5 s each, at most 20 calls/s, again when person changes)" in lines[3]
    )
    assert "test_development.py:" in lines[3]
    assert [line.split("  ")[2] for line in lines[4:6]] == [
        "project project (title as name)",
        "dedup dedup (by the whole document)",
    ]
    assert lines[6:] == [
        "  ╰─► TableSink table",
        "  remembers every row it reads, because a document needs more than the row that changed",
    ]


def test_a_begun_app_fits_its_table_and_is_checked(log: Feed, config: Config, tmp_path: Path) -> None:
    log.commit(create(FILM, film_id=1, title="Alien"))
    file = tmp_path / "edited_films.py"

    lines = development.begin_app(config, "films", source="studio", table="film", file=file)

    assert "module: edited_films:films" in lines
    assert development.check_app(config, "films").entity.name.short == "film"
    with pytest.raises(development.AppFileError, match="it is there already"):
        development.begin_app(config, "films", source="studio", table="film", file=file)
    with pytest.raises(development.AppFileError, match="table 'role' of source 'studio' is not in the log"):
        development.begin_app(config, "films", source="studio", table="role", file=tmp_path / "other.py")


EDITED = """
from process.material import TableSink
from deltaworks.process.app import App, Source
from typing import TypedDict
from pathlib import Path
class Film(TypedDict):
    title: str
films = App("films", key="film_id", sources=[Source("studio").table("film", schema=Film)])
@films.transform
def document(film):
    return {{"is": {word!r}}}
films.sink(TableSink(Path({sink!r})))
"""


def test_an_edit_takes_effect_without_a_restart_and_a_broken_one_does_not(
    log: Feed, config: Config, tmp_path: Path
) -> None:
    sink = TableSink(tmp_path / "sink.sqlite")
    sink.open(app="films", key="film_id", config=config).close()
    file = tmp_path / "edited_films.py"

    def edit(text: str) -> None:
        draft = tmp_path / "draft"
        draft.write_text(text)
        draft.replace(file)

    edit(EDITED.format(word="old", sink=str(sink.file)))
    importlib.invalidate_caches()
    told: list[str] = []
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(development.follow_reloading, config, "films", stop=stop, say=told.append)
        try:
            log.commit(create(FILM, film_id=1, title="a"))
            wait_until(lambda: sink.bodies() == {1: {"is": "old"}})
            edit("films = 1 +")
            wait_until(lambda: len(told) == 1)
            log.commit(create(FILM, film_id=2, title="a"))
            wait_until(lambda: sink.bodies().get(2) == {"is": "old"})
            edit(EDITED.format(word="new", sink=str(sink.file)))
            wait_until(lambda: len(told) == 2)
            log.commit(create(FILM, film_id=3, title="a"))
            wait_until(lambda: sink.bodies().get(3) == {"is": "new"})
        finally:
            stop.set()
        running.result()
    assert told[0].startswith("films: kept as it was; invalid syntax")
    assert told[1] == "films: loaded anew"


def enriched(sink: TableSink) -> App:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])

    @app.enrich(into="people", key=lambda film: 1)
    def people(ids: list[int]) -> dict[int, str]:
        return {}

    app.sink(sink)
    return app


def test_limits_change_while_the_app_runs_and_are_there_after_a_restart(
    make_config: Callable[..., Config], sink: TableSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, app = make_config(), enriched(sink)
    monkeypatch.setattr(development, "load_app", lambda config, name: app)  # No module of its own has this app.
    for _ in range(2):
        with Runner.open(app, config=config, name="films", log=MemoryLog().reader()) as runner:
            assert development.tune_app(config, "films", {"people.concurrency": "3"}) == {"people.concurrency": 3}
            runner.drain()
            assert runner._pipeline.enrichers["people"]._gate.limit == 3
    assert development.tune_app(config, "films", {"people.concurrency": ""}) == {}
    with pytest.raises(TuningError, match=r"no limit 'people\.batch'; known: people\.concurrency, people\.rate_per_s"):
        development.tune_app(config, "films", {"people.batch": "3"})
    with pytest.raises(TuningError, match=r"cannot set 'people\.rate_per_s' to '-1'"):
        development.tune_app(config, "films", {"people.rate_per_s": "-1"})


def test_a_step_that_does_not_come_back_is_named(sink: TableSink) -> None:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    clock = HandClock()
    frames: list[Any] = []

    @app.filter
    def slow(film: Entity[Film]) -> bool:
        frames.append(sys._getframe())
        return True

    @app.transform
    async def blocking(film: Entity[Film]) -> dict[str, Any]:
        frames.append(sys._getframe())
        return {}

    slow.__call__(None)
    coroutine = blocking(None)  # type: ignore[arg-type]
    with pytest.raises(StopIteration):
        coroutine.send(None)
    dog = Watchdog("films", app.steps, limit_s=10, blocking_s=1, clock=clock)
    with structlog.testing.capture_logs() as told:
        for frame, seconds in ((frames[0], 11), (frames[1], 2)):
            dog.look(frame)
            clock.advance(seconds)
            dog.look(frame)
            dog.look(frame)
            dog.look(None)
    assert [(line["event"], line["step"], line["seconds"]) for line in told] == [
        ("step does not return", "slow", 11),
        ("step blocks the event loop", "blocking", 2),
    ]
    assert all(line["place"].startswith(f"{__file__}:") for line in told)


def test_the_watchdog_sees_the_thread_that_runs_the_app(
    make_config: Callable[..., Config], sink: TableSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deltaworks.process.watchdog._LOOK_EVERY_S", 0.01)
    log = MemoryLog()
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    app.sink(sink)
    told: list[Any] = []

    @app.filter
    def slow(film: Entity[Film]) -> bool:
        wait_until(lambda: bool(told))
        return True

    Feed(log.writer()).commit(create(FILM, film_id=1, title="a"))
    with Runner.open(app, config=make_config(), name="films", log=log.reader()) as runner:
        runner.watchdog = Watchdog("films", app.steps, limit_s=0.02)
        with structlog.testing.capture_logs(processors=[lambda *line: told.append(line[2]) or line[2]]):
            runner.drain()
    assert (told[0]["event"], told[0]["step"]) == ("step does not return", "slow")


def test_windows_are_drawn_with_their_options() -> None:
    app = App("films", key="film_id", sources=[studio.table("film", schema=Film)])
    app.window(time="title", size=timedelta(hours=1), by="title", lateness=timedelta(minutes=5), films=count())
    assert "window window (of 1:00:00, by title, closed 0:05:00 later, films)" in explain(app)
